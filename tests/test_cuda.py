"""What only a GPU can show: the same numbers as on the CPU, and searches that run there and go on elsewhere."""

import contextlib
import itertools
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import test_det
import test_pose
import torch
from conftest import journal, ready, refused
from PIL import Image
from test_seg import blobs

import evolve
import search_det
import search_pose
import search_seg
from data import pictures, shapes
from loss_ops import evaluate, evaluate_batch, parse

if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

REPOSITORY = Path(__file__).parent.parent
SCRIPTS = {"seg": search_seg, "det": search_det, "pose": search_pose}
TASKS = {"seg": search_seg.SegTask, "det": search_det.DetTask, "pose": search_pose.PoseTask}
SMALL = ("--proxy-steps", "3", "--retrain-steps", "3", "--batch", "4")
METRICS = [("seg", "miou"), ("seg", "bf1"), ("det", "bbox"), ("det", "segm"), ("pose", "ap"), ("pose", "pck")]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return shapes.write_shapes(tmp_path_factory.mktemp("data") / "shapes", splits={"train": 40, "val": 10, "test": 10})


def task_of(root, name, device, *argv):
    flags = ["--data-root", str(root), "--workers", "1", "--device", device, *SMALL, *argv]
    return ready(TASKS[name](SCRIPTS[name].parse_arguments(flags)))


def run(monkeypatch, name, *argv):
    monkeypatch.setattr(sys, "argv", [f"search_{name}.py", *map(str, argv)])
    SCRIPTS[name].main()


def only(folder):
    (path,) = folder.iterdir()
    return path


# The same numbers


POOLED = "MaxPool3(MinPool3(Mul(y, p)))", "Mul(y, MaxPool3(MeanNHW(p)))", "Mul(MinPool3(1), Mul(y, p))"


@pytest.mark.parametrize("seed", range(40))
def test_trees_have_the_same_value_and_gradient(seed):
    rng = random.Random(seed)
    exprs = [evolve.random_tree(rng, ("y", "p", "1")) for _ in range(4)] + [*map(parse, POOLED)]
    mask = torch.rand(3, 1, 9, 8, generator=torch.Generator().manual_seed(seed)) < 0.8 if seed % 2 else None
    logits = torch.randn(3, 5, 9, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    target = torch.zeros_like(logits).scatter_(1, logits.roll(1, 2).argmax(1, keepdim=True), 1.0)
    found = []
    for device in ("cpu", "cuda"):
        x, y, valid = logits.to(device).requires_grad_(), target.to(device), mask if mask is None else mask.to(device)
        leaves, K = {"y": y, "p": x.softmax(1)}, len(exprs)
        values = evaluate_batch(exprs, {name: leaf.expand(K, *y.shape) for name, leaf in leaves.items()}, valid)
        alone = torch.stack([evaluate(expr, leaves, valid) for expr in exprs])
        assert torch.allclose(values, alone, rtol=1e-9, equal_nan=True)
        slope = torch.autograd.grad(values.sum(), x)[0] if values.requires_grad else torch.zeros_like(x)
        found.append((values.detach().cpu(), slope.cpu()))
    for cpu, cuda in zip(*found):
        assert torch.allclose(cuda, cpu, rtol=1e-8, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize(("name", "metric"), METRICS)
def test_gates_look_at_the_same_predictions(root, monkeypatch, name, metric):
    """On the CPU, whatever trains: an untrained network's are the same up to the rounding of its convolutions."""
    monkeypatch.setattr(pictures, "is_plain_jpeg", lambda *picture: False)  # nvJPEG's pixels are a little coarser
    sides = [task_of(root, name, device, "--metric", metric).branches for device in ("cpu", "cuda")]
    assert sides[0].keys() == sides[1].keys()
    for one, other in zip(*(side.values() for side in sides)):
        for a, b in ((one.prediction, other.prediction), (one.target, other.target), (one.ideal, other.ideal)):
            assert a.device == b.device and a.shape == b.shape and b.isfinite().all()
        if name != "det":  # where other proposals may be drawn
            assert torch.allclose(one.target, other.target, atol=1e-5), "heatmaps are drawn on the device"
            off = (one.prediction[0] - other.prediction[0]).abs().mean()
            assert off < 0.02 * one.prediction[0].std()


@pytest.mark.parametrize("seed", range(4))
def test_metrics_are_the_same(seed):
    rng = np.random.default_rng(seed)
    label = blobs(rng, 3, 7, 60, 70)
    pred = torch.where(torch.rand(label.shape) < 0.7, label, blobs(rng, 3, 7, 60, 70, False)) % 255
    want = search_seg.seg_metrics(pred, label, 7)
    assert search_seg.seg_metrics(pred.cuda(), label.cuda(), 7) == pytest.approx(want, abs=1e-12)
    for kind in ("bbox", "segm"):
        truth, found = test_det.random_case(seed, kind)
        want = search_det.coco_eval(truth, found, kind, "cpu")
        assert search_det.coco_eval(truth, found, kind, "cuda") == pytest.approx(want, abs=1e-12, nan_ok=True)
    truth, found, sigmas = test_pose.random_case(seed)
    want = search_pose.oks_eval(truth, found, sigmas)
    assert search_pose.oks_eval(truth, found, sigmas, "cuda") == pytest.approx(want, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("name", search_seg.LOSSES)
def test_losses_are_the_same(name):
    logits, label = torch.randn(2, 7, 24, 24), blobs(np.random.default_rng(0), 2, 7, 24, 24)
    weights = [search_seg.WEIGHTS[name](label, 7).float()] if name in search_seg.WEIGHTS else []
    loss = search_seg.Asl("bf1", search_seg.ASL_THETA["bf1"]) if name == "asl" else search_seg.LOSSES[name]
    found = []
    for device in ("cpu", "cuda"):
        x = logits.to(device).requires_grad_()
        value = loss(x, label.to(device), *(w.to(device) for w in weights))
        found.append((value.item(), torch.autograd.grad(value, x)[0].cpu()))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-2, atol=1e-5)


# Data


def photograph(path, size, mode="RGB", **more):
    rng = np.random.default_rng(size[0])
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    coarse.resize(size, Image.Resampling.BICUBIC).convert(mode).save(path, **more)
    return path


def test_jpegs_on_the_gpu(tmp_path):
    """Up to rounding; nvJPEG does not smooth the halved colours of most JPEGs, libjpeg does."""

    def difference(paths):
        sides = [search_seg.read_pictures(paths, [None] * len(paths), device) for device in ("cpu", "cuda")]
        assert [a.shape for a in sides[0]] == [b.shape for b in sides[1]]
        return max((a.float() - b.cpu().float()).abs().mean().item() for a, b in zip(*sides))

    full = [photograph(tmp_path / f"{k}.jpg", (80 + k, 64), quality=90, subsampling=0) for k in range(5)]
    assert all(picture.is_cuda for picture in search_seg.read_pictures(full, [None] * 5, "cuda"))
    assert difference(full) < 1
    assert difference([photograph(tmp_path / "halved.jpg", (80, 64), quality=90)]) < 8
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = photograph(tmp_path / "turned.jpg", (50, 40), exif=exif)
    odd = [photograph(tmp_path / f"{mode}.jpg", (50, 40), mode) for mode in ("L", "CMYK")]
    assert difference([*odd, turned, full[0]]) == 0, "the CPU reads them all"
    progressive = photograph(tmp_path / "progressive.jpg", (90, 60), progressive=True, subsampling=0)
    assert difference([progressive, full[0]]) < 1


@pytest.mark.parametrize("size", [100, 2, 0])
def test_torn_jpegs_are_named(tmp_path, size):
    paths = [photograph(tmp_path / f"{k}.jpg", (80, 64)) for k in range(3)]
    paths[1].write_bytes(paths[1].read_bytes()[:size])
    with pytest.raises(search_seg.DataError, match="1.jpg"):
        search_seg.read_pictures(paths, [None] * 3, "cuda")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("memory", ["0.000001", "8"])
def test_batches_are_the_same(tmp_path, memory, suffix):
    """Kept on the device, kept in memory or decoded for each batch; augmented alike."""
    for split, number in (("train", 12), ("val", 3)):
        for kind in ("images", "masks"):
            (tmp_path / kind / split).mkdir(parents=True, exist_ok=True)
        for k in range(number):
            photograph(tmp_path / f"images/{split}/{k}.{suffix}", (300 + 20 * k, 260))
            mask = np.zeros((260, 300 + 20 * k), np.uint8)
            mask[40 + k : 120, 50:200] = 1 + k % 2
            Image.fromarray(mask).save(tmp_path / f"masks/{split}/{k}.png")
    found = []
    for device in ("cpu", "cuda"):
        flags = ["--data", "folder", "--data-root", str(tmp_path), "--memory", memory, "--device", device]
        args = search_seg.parse_arguments([*flags, "--crop", "128", "--workers", "1", "--batch", "6"])
        split = search_seg.read_data(args)["train"]
        plan = search_seg.SegTask(args).proxy
        found.append(list(itertools.islice(search_seg.Batches(split, plan, 0), 3)))
    for cpu, cuda in zip(*found):
        assert all(part.is_cuda for part in cuda)
        assert (cpu[0] - cuda[0].cpu()).abs().mean() < (0.01 if suffix == "png" else 0.05)
        assert (cpu[1] != cuda[1].cpu()).float().mean() < 0.01


@pytest.mark.parametrize(("name", "metric"), [("det", "segm"), ("pose", "ap"), ("seg", "miou")])
def test_batches_of_shapes_are_the_same(root, name, metric):
    batches = []
    for device in ("cpu", "cuda"):
        task = task_of(root, name, device, "--metric", metric)
        batches.append(task.proxy_batches[0])
    (images, *targets), (others, *more) = batches
    assert others.is_cuda and (others.cpu() - images).abs().mean() < 0.05, "nvJPEG is a little coarser"
    for a, b in zip(targets, more):
        for one, other in zip(a, b) if isinstance(a, list) else [({"": a}, {"": b})]:
            for key in one:
                assert other[key].is_cuda and one[key].shape == other[key].shape
                assert (one[key].float() - other[key].cpu().float()).abs().mean() < 1e-2, key


# The real command


@pytest.mark.parametrize(("name", "metric"), METRICS)
def test_a_search_runs_and_goes_on_on_a_cpu(root, tmp_path, monkeypatch, capsys, name, metric):
    flags = ["--data-root", root, "--metric", metric, *SMALL, "--workers", "1", "--seeds", "2"]
    run(monkeypatch, name, *flags, "--runs", tmp_path, "--evals", "4", "--device", "cuda")
    directory, printed = only(tmp_path), capsys.readouterr().out
    assert len(journal(directory)) == 4 and "best_loss.py" in printed
    assert torch.cuda.get_device_name() in (directory / "args.json").read_text()
    run(monkeypatch, name, "--resume", directory, "--device", "cpu", "--evals", "6")
    assert len(journal(directory)) == 6
    run(monkeypatch, name, "--resume", directory, "--device", "cuda:0", "--evals", "7")
    assert len(journal(directory)) == 7
    assert set(json.loads((directory / "result.json").read_text())["test"]) == {"found", "baseline"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_loss_trains(root, tmp_path, monkeypatch, capsys, name):
    script = SCRIPTS[name]
    listed = ",".join(loss for loss in script.LOSSES if loss != "asl") + (",asl(miou),asl(bf1)" * (name == "seg"))
    flags = ["--data-root", root, *SMALL, "--seeds", "1", "--device", "cuda", "--runs", tmp_path]
    run(monkeypatch, name, *flags, "--compare", listed)
    lines = [json.loads(line) for line in (only(tmp_path) / "retrain.jsonl").read_text().splitlines()]
    assert len(lines) >= len(script.LOSSES) and all(line["scores"] for line in lines)


SEARCHES = [("seg", kind) for kind in ("random", "naive", "cse", "aml", "asl")] + [("pose", "cse"), ("det", "cse")]


@pytest.mark.parametrize(("name", "search"), SEARCHES)
def test_other_searches(root, tmp_path, monkeypatch, name, search):
    flags = ["--data-root", root, *SMALL, "--seeds", "1", "--workers", "1", "--device", "cuda", "--runs", tmp_path]
    run(monkeypatch, name, *flags, "--search", search, "--evals", "3")
    assert len(journal(only(tmp_path))) == 3


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_training_goes_on_where_it_was_stopped(root, tmp_path, monkeypatch, name):
    common = ["--data-root", root, *SMALL, "--retrain-steps", "6", "--checkpoint-steps", "2", "--device", "cuda"]
    common += ["--loss", search_seg.BASELINE if name == "seg" else SCRIPTS[name].BASELINE, "--seeds", "1", "--runs"]
    run(monkeypatch, name, *common, tmp_path / "whole")
    save = evolve.Checkpoint.save

    def save_and_stop(self, *args):
        save(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(evolve.Checkpoint, "save", save_and_stop)
        run(monkeypatch, name, *common, tmp_path / "part")
    run(monkeypatch, name, "--resume", only(tmp_path / "part"))
    curves = []
    for runs in (tmp_path / "whole", tmp_path / "part"):
        state = torch.load(only(runs) / "training_0_0.pt", weights_only=True, map_location="cpu")
        curves.append([float(value) for _, value in state["curve"]])
    near = 0.2 if name == "det" else 0.05  # its sums over boxes come in any order
    assert len(curves[0]) == len(curves[1]) and curves[1] == pytest.approx(curves[0], rel=near)


def test_workers_share_one_gpu_and_outlive_a_kill(root, tmp_path):
    flags = ["--data-root", str(root), *SMALL, "--seeds", "1", "--device", "cuda", "--runs", str(tmp_path)]
    command = [sys.executable, "search_seg.py", *flags, "--workers", "3", "--evals", "12"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    with contextlib.closing(process.stdout):
        for line in process.stdout:
            if line.startswith("eval   4"):
                break
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(1)  # the workers notice
    done = subprocess.run(
        [sys.executable, "search_seg.py", "--resume", str(only(tmp_path))],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(journal(only(tmp_path))) >= 12


def test_torchrun_with_nccl(root, tmp_path):
    flags = ["--data-root", str(root), *SMALL, "--seeds", "1", "--device", "cuda", "--runs", str(tmp_path)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    done = subprocess.run(
        [*command, "search_seg.py", *flags, "--loss", "ce"], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert ">>>>  miou" in done.stdout


def test_workers_by_default(monkeypatch):
    monkeypatch.setattr(evolve.os, "sched_getaffinity", lambda process: range(64))
    gpus = torch.cuda.device_count()
    assert search_seg.parse_arguments(["--device", "cuda"]).workers == min(25, 8 * gpus)
    assert search_seg.parse_arguments(["--device", "cuda", "--evals", "40"]).workers == 2
    real = ["--data", "voc", "--data-root", "."]
    assert search_seg.parse_arguments(["--device", "cuda", *real]).workers == min(25, gpus)


def test_a_gpu_that_is_not_there(monkeypatch, capsys):
    error = refused(search_seg, monkeypatch, capsys, "--device", f"cuda:{torch.cuda.device_count()}")
    assert "--device" in error and "cpu or cuda" in error


@pytest.mark.parametrize("text", ["Mul(y, Exp(Inv(Add(p, Neg(p)))))"])
def test_invalid_values_stop_the_training(root, text):
    task = task_of(root, "seg", "cuda")
    with pytest.raises(search_seg.InvalidLoss):
        task.train({"loss": parse(text)})
