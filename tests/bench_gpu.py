"""What a GPU brings: trainings of the embedded data, evaluators, and the published networks.

    python tests/bench_gpu.py [--processes 1 8] [--tasks seg det pose] [--only trainings evaluators networks]

Trainings: proxy trainings with the baseline's loss, validation included, a minute, by one process on one CPU core and
by several that share the GPU (`--workers N`). Evaluators: 1,000 x 100 detections of 80 classes, and all six metrics of
500 label maps of 21 classes. Networks: one step with a batch that is already on the GPU, in the published settings.
Both sides run in turn.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import search_det  # noqa: E402
import search_pose  # noqa: E402
import search_seg  # noqa: E402

TASKS = {
    "seg miou": (search_seg, search_seg.SegTask, "ce"),
    "det bbox": (search_det, search_det.DetTask, "ce+l1"),
    "pose ap": (search_pose, search_pose.PoseTask, "mse"),
}


def seconds(work, device: str = "cpu") -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ready(name: str, device: str, folder: Path):
    """A task with its data and base network, which the first one leaves in the folder for the others."""
    script, task, _ = TASKS[name]
    task = task(script.parse_arguments(["--metric", name.split()[1], "--device", device, "--workers", "1"]))
    task.load()
    task.prepare(folder / "base.pt")
    return task


def train(name: str, device: str, folder: Path, number: int, barrier, spent) -> None:
    """Of several processes: once to warm up, then `number` trainings at the same time as the others."""
    torch.set_num_threads(1)
    task = ready(name, device, folder)
    task.train(TASKS[name][2])
    barrier.wait()
    spent.put(seconds(lambda: [task.train(TASKS[name][2]) for _ in range(number)], device))


def rate(name: str, device: str, folder: Path, processes: int, number: int) -> float:
    """Trainings a minute of several processes together."""
    context = multiprocessing.get_context("spawn")
    barrier, spent = context.Barrier(processes), context.Queue()
    work = name, device, folder, number, barrier, spent
    jobs = [context.Process(target=train, args=work) for _ in range(processes)]
    for job in jobs:
        job.start()
    longest = max(spent.get() for _ in jobs)
    for job in jobs:
        job.join()
    return 60 * processes * number / longest


def show_trainings(processes: list[int], tasks: list[str]) -> None:
    search_seg.SegTask(search_seg.parse_arguments([]))  # draws the data, before several ask for it
    print(f"{'proxy trainings a minute':<26}{'one core':>10}", end="")
    print("".join(f"{f'GPU, {n}':>10}" for n in processes), "  ratio of the last")
    for name in (name for name in TASKS if name.split()[0] in tasks):
        with tempfile.TemporaryDirectory() as folder:
            rates = [rate(name, "cuda", Path(folder), n, 8) for n in processes]
            rates.insert(0, rate(name, "cpu", Path(folder), 1, 3))
        print(f"{name:<26}" + "".join(f"{r:>10.1f}" for r in rates) + f"{rates[-1] / rates[0]:>8.1f}", flush=True)


def show_evaluators() -> None:
    from bench_det import large_case

    truth, results = large_case()
    pred = torch.randint(0, 21, (500, 32, 32)).repeat_interleave(16, 1).repeat_interleave(16, 2).byte()
    label = torch.where(torch.rand(500, 512, 512) < 0.7, pred, 0)

    def segmentation(device):
        metrics = search_seg.SegMetrics(21, device)
        for k in range(0, 500, 4):
            metrics.update(pred[k : k + 4].to(device), label[k : k + 4].to(device))
        return metrics.compute()["bf1"].item()

    print(f"\n{'evaluators':<40}{'one core s':>12}{'GPU s':>10}{'ratio':>8}")
    for name, work in (
        ("1,000 x 100 detections, 80 classes", lambda device: search_det.coco_eval(truth, results, "bbox", device)),
        ("500 label maps 512 x 512, 21 classes", segmentation),
    ):
        work("cuda")
        cpu, gpu = (min(seconds(lambda: work(device), device) for _ in range(2)) for device in ("cpu", "cuda"))  # noqa: B023
        print(f"{name:<40}{cpu:>12.2f}{gpu:>10.3f}{cpu / gpu:>8.1f}", flush=True)


def show_networks(steps: int = 20) -> None:
    print(f"\n{'networks, as published':<40}{'batch':>12}{'ms/step':>10}{'images/s':>10}{'GiB':>7}")
    for name, script, size in (
        ("r101-dlv3p", search_seg, (512, 512)),
        ("r101-psp", search_seg, (512, 512)),
        ("r50-fpn", search_det, (1024, 1024)),
        ("r50", search_pose, (256, 128)),
    ):
        plan = (script.RETRAIN.get("voc") or script.RETRAIN.get("coco") or script.RETRAIN["r50"])._replace(steps=steps)
        images = torch.randn(plan.batch, 3, *size, device="cuda")
        torch.manual_seed(0)
        if script is search_seg:
            net, loss = search_seg.build_model(name, 21), search_seg.LOSSES["ce"]
            targets = [torch.randint(0, 21, (plan.batch, *size), device="cuda")]
        elif script is search_pose:
            net, loss = search_pose.build_model(name, 17), search_pose.LOSSES["mse"]
            targets = [torch.rand(plan.batch, 17, 64, 32, device="cuda"), torch.ones(plan.batch, 17, device="cuda")]
        else:
            net = search_det.build_model(name, 81, False)
            loss = {branch: next(iter(known.values())) for branch, (_, known) in search_det.BRANCHES.items()}
            corner = 800 * torch.rand(plan.batch, 7, 2, device="cuda")
            boxes = torch.cat([corner, corner + 20 + 180 * torch.rand(plan.batch, 7, 2, device="cuda")], -1)
            labels = torch.randint(1, 81, (plan.batch, 7), device="cuda")
            targets = [[{"boxes": b, "labels": t} for b, t in zip(boxes, labels)]]
        net = net.to("cuda", memory_format=torch.channels_last)
        torch.cuda.reset_peak_memory_stats()

        def work():
            script.train_network(net, loss, [(images, *targets)] * steps, plan)  # noqa: B023

        work()  # chooses its kernels
        taken, memory = seconds(work, "cuda") / steps, torch.cuda.max_memory_allocated() / 2**30
        shape = f"{plan.batch} x {size[0]} x {size[1]}"
        print(f"{name:<36}{shape:>16}{1000 * taken:>10.0f}{plan.batch / taken:>10.0f}{memory:>7.1f}", flush=True)


PARTS = {"evaluators": show_evaluators, "networks": show_networks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--tasks", nargs="+", choices=["seg", "det", "pose"], default=["seg", "det", "pose"])
    parser.add_argument("--only", nargs="+", choices=["trainings", *PARTS], default=["trainings", *PARTS])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for part in args.only:
        PARTS.get(part, lambda: show_trainings(args.processes, args.tasks))()
    print(f"\ntorch {torch.__version__}, {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    main()
