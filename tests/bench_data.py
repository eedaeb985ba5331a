"""Data sets of full count: how soon the first batch comes, what a worker's memory holds, and how fast batches come.

    python tests/bench_data.py                  # all; --only coco, voc or cityscapes; --device cuda

Look-alikes of COCO (118,287 and 5,000 pictures of 640 x 480, 860,000 objects, 150,000 persons), VOC with SBD (10,582
and 1,449 of 500 x 375) and Cityscapes (2,975 and 500 of 2048 x 1024) are drawn into a temporary folder: a few hundred
pictures, and hard links to them. Each script then reads one in a process of its own, from the start to batches of its
proxy. `start`: seconds until the first batch, annotations and all. `own`: GiB of memory that no other worker shares
while batches come; `peak`: the most until then, shared pictures and the annotations' text included. `images/s`: over
batches alone; beside it a torch DataLoader with two worker processes that decodes and augments the same way. `wait`:
the share of a training step of the data set's own network that is spent waiting for its batch.

Measured (two cores of an AMD EPYC, torch 2.14.1; `voc, kept` beside other work, and after a change to how a batch is
shared out to threads that the others have not seen):

                     pictures   start    own   peak  images/s  DataLoader  ratio    step   wait
    coco boxes        103,501    15.3   1.04   3.92       136         169    0.8    74.1   0.1%
    coco pose         131,058     8.8   0.91   1.80       342         326    1.0    32.5   0.5%
    voc, streamed       9,259     1.5   0.51   0.85       479         454    1.1     6.2   1.3%
    voc, kept           9,259     4.1   0.44   7.25      1282         876    1.5     9.5   0.3%
    cityscapes          2,603    19.1   1.15   1.48        28          26    1.1     6.4  15.4%

A step of these networks takes seconds on a CPU, a batch a fraction of one.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import search_det  # noqa: E402
import search_pose  # noqa: E402
import search_seg  # noqa: E402
from data import shapes  # noqa: E402
from data.masks import CITYSCAPES_IDS  # noqa: E402
from data.pictures import threads  # noqa: E402

CASES = {  # script, flags
    "coco boxes": (search_det, "--data coco --memory 1"),
    "coco pose": (search_pose, "--data coco --memory 1"),
    "voc, streamed": (search_seg, "--data voc --memory 1"),
    "voc, kept": (search_seg, "--data voc --memory 12"),
    "cityscapes": (search_seg, "--data cityscapes --memory 1"),
}


# The look-alikes


def draw_picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Blobs of all sizes and grain: a JPEG of it is about as large as one of a photograph."""
    picture = rng.normal(0, 5, (height, width, 3)).astype(np.float32) + 128
    for cells in (3, 9, 27, 81):
        blobs = rng.normal(0, 30, (cells, cells, 3)).astype(np.float32)
        picture += cv2.resize(blobs, (width, height), interpolation=cv2.INTER_CUBIC)
    return picture.clip(0, 255).astype(np.uint8)


def draw_label(rng: np.random.Generator, height: int, width: int, values: list[int]) -> Image.Image:
    label = rng.choice(values, (9, 12)).astype(np.uint8)
    picture = Image.fromarray(cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST))
    picture.putpalette(shapes.voc_palette())
    return picture


def link(sources: list[Path], folder: Path, names: list[str]) -> None:
    """The sources again and again under these names."""
    for name, source in zip(names, itertools.cycle(sources)):
        path = folder / name
        if "/" in name or not folder.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, path)


def draw_sources(root: Path, number: int, height: int, width: int, suffix: str, values: list[int]) -> tuple[list, list]:
    root.mkdir()
    rng, found = np.random.default_rng(0), ([], [])
    for k in range(number):
        found[0].append(root / f"{k}.{suffix}")
        Image.fromarray(draw_picture(rng, height, width)).save(found[0][-1], quality=90)
        if values:
            found[1].append(root / f"{k}_label.png")
            draw_label(rng, height, width, values).save(found[1][-1])
    return found


def draw_coco(root: Path) -> None:
    pictures, _ = draw_sources(root / "sources", 200, 480, 640, "jpg", [])
    (root / "annotations").mkdir()
    for split, number, objects, persons in (("train", 118_287, 860_001, 149_813), ("val", 5000, 36_781, 6352)):
        names = [f"{k:012}.jpg" for k in range(number)]
        link(pictures, root / f"{split}2017", names)
        images = [{"id": k + 1, "file_name": name, "width": 640, "height": 480} for k, name in enumerate(names)]
        rng = np.random.default_rng(1)
        for kind, rows in (("instances", objects), ("person_keypoints", persons)):
            owner, label = rng.integers(1, number + 1, rows).tolist(), rng.integers(1, 81, rows).tolist()
            corner, side = rng.integers(0, 300, (rows, 2)).tolist(), rng.integers(8, 160, (rows, 2)).tolist()
            turns = np.linspace(0, 2 * np.pi, 30, endpoint=False)
            circle = np.stack([np.cos(turns), np.sin(turns)], 1) / 2 + 0.5
            entries = []
            for k in range(rows):
                (x, y), (w, h) = corner[k], side[k]
                entry = {
                    "id": k + 1,
                    "image_id": owner[k],
                    "category_id": 1,
                    "bbox": [x, y, w, h],
                    "area": w * h * 0.78,
                }
                polygon = (circle * (w, h) + (x, y)).round(2).flatten().tolist()
                entry |= {"iscrowd": 0, "segmentation": [polygon]}
                if kind == "instances":
                    entry["category_id"] = label[k]
                else:
                    entry |= {"keypoints": [v for point in zip(polygon[:34:2], polygon[1:34:2]) for v in (*point, 2)]}
                    entry["num_keypoints"] = 17
                entries.append(entry)
            categories = [{"id": k, "name": f"class {k}"} for k in range(1, 81)]
            if kind == "person_keypoints":
                categories = [{"id": 1, "name": "person", "keypoints": list(shapes.JOINTS), "skeleton": shapes.LIMBS}]
            content = {"images": images, "annotations": entries, "categories": categories}
            (root / f"annotations/{kind}_{split}2017.json").write_text(json.dumps(content))


def draw_voc(root: Path) -> None:
    pictures, labels = draw_sources(root / "sources", 200, 375, 500, "jpg", [*range(21), 255])
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    names = [f"2007_{k:06}" for k in range(10_582 + 1449)]
    link(pictures, root / "JPEGImages", [f"{name}.jpg" for name in names])
    for folder in ("SegmentationClass", "SegmentationClassAug"):
        link(labels, root / folder, [f"{name}.png" for name in names])
    for split, part in (("trainaug", names[:10_582]), ("train", names[:1464]), ("val", names[10_582:])):
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(part))


def draw_cityscapes(root: Path) -> None:
    pictures, labels = draw_sources(root / "sources", 24, 1024, 2048, "png", [*CITYSCAPES_IDS, 0])
    for split, number in (("train", 2975), ("val", 500)):
        names = [f"ulm/{k:06}" for k in range(number)]
        link(pictures, root / "leftImg8bit" / split, [f"{name}_leftImg8bit.png" for name in names])
        link(labels, root / "gtFine" / split, [f"{name}_gtFine_labelIds.png" for name in names])


# One script on one of them, in a process of its own


class PictureByPicture(torch.utils.data.IterableDataset):
    """What the script does with a batch, done to one picture after another."""

    def __init__(self, script, split, plan, more):
        self.script, self.split, self.plan, self.more = script, split, plan, more

    def __iter__(self):
        torch.set_num_threads(1)
        generator = torch.Generator().manual_seed(torch.utils.data.get_worker_info().id)
        while True:
            index = torch.randint(len(self.split.images), (1,), generator=generator)
            if self.script is search_det:
                plan = self.plan
                images, targets = search_det.batch_scale_flip(self.split, index, plan.size, plan.scale, generator)
                images = search_det.normalise(search_det.batch_colour_jitter(images, 0.25, generator))
                yield images[0], targets[0]
            elif self.script is search_pose:
                swap, size = self.more
                images, joints, seen = search_pose.batch_scale_rotate_flip(
                    self.split, swap, index, size, self.plan, generator
                )
                coarse = (size[0] // search_pose.STRIDE, size[1] // search_pose.STRIDE)
                heatmaps = search_pose.batch_heatmaps(joints / search_pose.STRIDE, coarse, self.plan.sigma)
                yield search_pose.normalise(images)[0], heatmaps[0], seen[0].float()
            else:
                images, labels = search_seg.batch_scale_crop_flip(
                    self.split, index, self.plan.crop, self.plan.scale, generator
                )
                images = search_seg.batch_colour_jitter(images, 0.25, generator)
                yield search_seg.normalise(images)[0], labels[0]


def collate(rows: list) -> list:
    return [torch.stack(column) if torch.is_tensor(column[0]) else list(column) for column in zip(*rows)]


def load(script, args):
    """What the script's task does before its first batch: all three splits. Batches, plan, and what else they take."""
    if script is search_seg:
        plan = search_seg.PROXY[args.data]
        split = search_seg.read_data(args)["train"]
        return search_seg.Batches(split, plan, 0), split, plan, ()
    if script is search_pose:
        data, skeleton = search_pose.read_data(args)
        plan, size = search_pose.PROXY[args.model], (args.crop, round(args.crop * args.aspect))
        batches = search_pose.Batches(data["train"], skeleton.swap, plan, size, 0)
        return batches, data["train"], plan, (skeleton.swap, size)
    task = object.__new__(search_det.DetTask)
    task.args, task.device, task.masks = args, args.device, args.metric == "segm"
    task.proxy, task.retraining = search_det.PROXY[args.data], search_det.RETRAIN[args.data]
    task.data = search_det.read_data(args, max(task.proxy.size, task.retraining.size), task.masks)
    return task.batches(task.proxy, 0), task.data["train"], task.proxy, ()


def network(script, args, split, plan):
    """The data set's own network and its baseline's loss."""
    torch.manual_seed(0)
    if script is search_seg:
        net, loss = search_seg.build_model(plan.model, search_seg.CLASSES[args.data]), search_seg.LOSSES["ce"]
    elif script is search_pose:
        net, loss = search_pose.build_model(args.model, split.joints.shape[1]), search_pose.LOSSES["mse"]
    else:
        masks = args.metric == "segm"
        net = search_det.build_model(plan.model, 1 + len(split.truth.categories), masks)
        loss = {branch: next(iter(known.values())) for branch, (_, known) in search_det.BRANCHES.items()}
    return net.to(args.device, memory_format=torch.channels_last), loss


def finish(args) -> None:
    """Wait for what a GPU still has to do."""
    if args.device != "cpu":
        torch.cuda.synchronize()


def steps_seconds(script, args, net, loss, batches, plan, number: int) -> float:
    """Of one of so many training steps."""
    finish(args)
    start = time.perf_counter()
    script.train_network(net, loss, batches, plan._replace(steps=number), stop_invalid=False)
    finish(args)
    return (time.perf_counter() - start) / number


def share_waited(step: float, batches) -> float:
    """Of a step on a CPU: a pause stands for the network, whose own arithmetic would hold this core."""
    stream, waited = iter(batches), []
    next(stream)
    for _ in range(3):
        time.sleep(min(step, 5))
        before = time.perf_counter()
        next(stream)
        waited.append(time.perf_counter() - before)
    stream.close()
    return sorted(waited)[1] / (sorted(waited)[1] + step)


def measure(name: str, root: Path, device: str) -> None:
    script, flags = CASES[name]
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    begin = time.perf_counter()
    flags = [*flags.split(), "--data-root", str(root), "--workers", "1", "--device"]
    args = script.parse_arguments([*flags, device])
    batches, split, plan, more = load(script, args)
    stream = iter(batches)
    batch = next(stream)
    finish(args)
    start = time.perf_counter() - begin

    def rate(source, least: float = 12.0) -> float:
        """Images a second, after two batches to fill what reads ahead."""
        next(source), next(source)
        finish(args)
        begin, number = time.perf_counter(), 0
        while time.perf_counter() - begin < least:
            next(source)
            number += plan.batch
        finish(args)
        return number / (time.perf_counter() - begin)

    if name.endswith("kept"):  # after the first epoch
        for part in split:
            if isinstance(part, script.Pictures):
                for k in range(0, len(part), 256):
                    part.take(range(k, min(k + 256, len(part))))
    mine = rate(stream)
    status = Path("/proc/self/status").read_text().split("\n")
    own = sum(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    stream.close()
    net, loss = network(script, args, split, plan)
    if device == "cpu":
        step = steps_seconds(script, args, net, loss, [batch], plan, 1)
        wait = share_waited(step, batches)
    else:
        steps_seconds(script, args, net, loss, [batch] * 5, plan, 5)  # chooses its kernels
        step = steps_seconds(script, args, net, loss, [batch] * 20, plan, 20)
        wait = max(0.0, 1 - step / steps_seconds(script, args, net, loss, batches, plan, 20))
    if device != "cpu":  # whose memory no forked process can use
        _, split, plan, more = load(script, script.parse_arguments([*flags, "cpu"]))
    threads.cache_clear()  # a forked process needs its own
    dataset = PictureByPicture(script, split, plan, more)
    loader = torch.utils.data.DataLoader(dataset, plan.batch, num_workers=2, collate_fn=collate)
    other = rate(iter(loader))
    print(
        f"{name:<16}{len(split.images):>9,}{start:>8.1f}{own:>7.2f}{peak:>7.2f}{mine:>10.0f}{other:>12.0f}"
        f"{mine / other:>7.1f}{step:>8.{1 if device == 'cpu' else 3}f}{wait:>7.1%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=["coco", "voc", "cityscapes"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--measure", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help="where the look-alikes are left, and found by a later run")
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure, args.root, args.device)
    with tempfile.TemporaryDirectory() as temporary:
        root = args.root or Path(temporary)
        print(f"{'':<16}{'pictures':>9}{'start':>8}{'own':>7}{'peak':>7}{'images/s':>10}{'DataLoader':>12}", end="")
        print(f"{'ratio':>7}{'step':>8}{'wait':>7}", flush=True)
        for kind, draw in (("coco", draw_coco), ("voc", draw_voc), ("cityscapes", draw_cityscapes)):
            if args.only in (None, kind):
                if not (root / kind).is_dir():
                    (root / kind).mkdir(parents=True)
                    begin = time.perf_counter()
                    draw(root / kind)
                    print(f"({kind} drawn in {time.perf_counter() - begin:.0f} s)", file=sys.stderr)
                for name in CASES:
                    if name.startswith(kind):
                        command = [sys.executable, __file__, "--measure", name, "--root", str(root / kind)]
                        command += ["--device", args.device]
                        subprocess.run(command, check=True)
    print(f"\ntorch {torch.__version__}, {torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU'}")


if __name__ == "__main__":
    main()
