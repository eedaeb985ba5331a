"""Loader and metrics of segmentation against what one would use instead, and where a proxy training spends its time.

    python tests/bench_seg.py            # `pip install torchmetrics` beforehand compares with that, too

Loader: batches of 16 augmented 48 x 48 windows, against a torch DataLoader with two worker processes that does the same
augmentation picture by picture. Metrics: all six on 500 label maps of 64 x 64, against the plain NumPy and OpenCV
version of the tests. Pools: three trees and their gradients, against torch's own pool of what comes as it comes. Proxy:
three losses, part by part. Ratios within one run; one torch thread per process.
"""

import itertools
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from test_seg import slow_metrics  # noqa: E402

import evolve  # noqa: E402
import search_seg  # noqa: E402
from loss_ops import OPERATORS, evaluate, parse  # noqa: E402
from search_seg import Split  # noqa: E402


class PictureByPicture(torch.utils.data.IterableDataset):
    """The augmentation of search_seg, one picture at a time."""

    def __init__(self, split: Split, plan: search_seg.Schedule, number: int):
        self.split, self.plan, self.number = split, plan, number

    def __iter__(self):
        torch.set_num_threads(1)
        info = torch.utils.data.get_worker_info()
        generator = torch.Generator().manual_seed(info.id)
        for _ in range(self.number // info.num_workers):
            index = torch.randint(len(self.split.images), (1,), generator=generator)
            images, labels = search_seg.batch_scale_crop_flip(
                self.split, index, self.plan.crop, self.plan.scale, generator
            )
            images = search_seg.batch_colour_jitter(images, 0.25, generator)
            yield search_seg.normalise(images)[0], labels[0]


TREES = (
    "Mul(Neg(Log(p)), MaxPool3(y))",
    "Sqrt(Inv(Mul(Add(p, MinPool3(Add(y, MaxPool3(Square(p))))), y)))",
    "Log(Inv(Mul(Add(p, MinPool3(Add(p, Abs(Log(MinPool3(Mul(p, y))))))), Add(y, MinPool3(MaxPool3(p))))))",
)
TREE = "Mul(Mul(y, Log(Inv(Tanh(p)))), MaxPool3(Square(MeanC(MaxPool3(y)))))"


def show_pools(number: int = 20) -> None:
    """Milliseconds of a tree's value and gradient."""
    logits = torch.randn(16, 7, 48, 48, requires_grad=True)
    target = torch.nn.functional.one_hot(torch.randint(0, 7, (16, 48, 48)), 7).movedim(-1, 1).float()

    def pool(x, mask):
        return torch.nn.functional.max_pool2d(x, 3, 1, 1)

    plain = {"MaxPool3": pool, "MinPool3": lambda x, mask: -pool(-x, mask)}
    own = {name: OPERATORS[name] for name in plain}

    def work(expr):
        for _ in range(number):
            torch.autograd.grad(evaluate(expr, {"y": target, "p": logits.softmax(1)}), logits)

    print(f"\n{'trees with pools':<34}{'torch ms':>10}{'ms':>8}{'ratio':>8}")
    for expr in map(parse, TREES):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("loss_ops.planes_last", lambda x: x)
            for name, function in plain.items():
                patch.setitem(OPERATORS, name, own[name]._replace(function=function))
            slow = min(seconds(lambda: work(expr)) for _ in range(3)) * 1000 / number  # noqa: B023
        fast = min(seconds(lambda: work(expr)) for _ in range(3)) * 1000 / number  # noqa: B023
        pools = sum(node.op in plain for node in evolve.nodes(expr))
        print(f"{f'{pools} pools, {len(evolve.nodes(expr))} nodes':<34}{slow:>10.2f}{fast:>8.2f}{slow / fast:>8.1f}")


def show_proxy(task: search_seg.SegTask) -> None:
    """Seconds of one proxy training by part: what is not the network's arithmetic is overhead."""
    plan, data = task.proxy, task.proxy_batches
    print(f"\n{'one proxy training, s':<34}{'network':>10}{'loss':>8}{'rest':>8}{'metrics':>9}{'share of network':>18}")
    for name, losses in (("ce", "ce"), ("dice", "dice"), ("a tree with two pools", {"loss": parse(TREE)})):
        loss, net = task.loss(losses), task.network(plan, 0)
        stages = dict.fromkeys(("network", "loss"), 0.0)
        for images, labels in data:  # the parts alone
            start = time.perf_counter()
            logits = net(images)
            middle = time.perf_counter()
            leaf = logits.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(leaf, labels), leaf)
            end = time.perf_counter()
            logits.backward(gradient)
            stages["loss"] += end - middle
            stages["network"] += middle - start + time.perf_counter() - end
        net = task.network(plan, 0)
        whole = seconds(lambda: search_seg.train_network(net, loss, data, plan))  # noqa: B023
        score = seconds(lambda: search_seg.test_network(net, task.data["val"], task.num_classes))  # noqa: B023
        rest = max(0.0, whole - sum(stages.values()))
        share = stages["network"] / (whole + score)
        print(f"{name:<34}{stages['network']:>10.2f}{stages['loss']:>8.2f}{rest:>8.2f}{score:>9.2f}{share:>18.0%}")


def show_torchmetrics(pred: torch.Tensor, label: torch.Tensor, ours: float) -> None:
    """The three of the six metrics that torchmetrics has, if it is installed."""
    try:
        from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index
    except ImportError:
        print("torchmetrics is not installed: not compared")
        return
    pred, label = pred.long(), label.long()
    theirs = {}

    def three():
        theirs["miou"] = multiclass_jaccard_index(pred, label, 7, average="macro", ignore_index=255)
        theirs["macc"] = multiclass_accuracy(pred, label, 7, average="macro", ignore_index=255)
        theirs["gacc"] = multiclass_accuracy(pred, label, 7, average="micro", ignore_index=255)

    slow = min(seconds(three) for _ in range(3))
    mine = search_seg.seg_metrics(pred, label, 7)
    differ = max(abs(theirs[name].item() - mine[name]) for name in theirs)
    print(f"{'torchmetrics, three of the six':<34}{slow:>10.3f}{slow / ours:>8.1f} x this project's six")
    print(f"largest difference in these three: {differ:.1e}")


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    task = search_seg.SegTask(search_seg.parse_arguments(["--device", "cpu"]))
    task.load()
    plan = task.proxy._replace(steps=200)
    number = plan.steps * plan.batch

    def ours():
        for _ in itertools.islice(search_seg.Batches(task.data["train"], plan, 0), plan.steps):
            pass

    def theirs():
        loader = torch.utils.data.DataLoader(
            PictureByPicture(task.data["train"], plan, number), plan.batch, num_workers=2
        )
        for _ in loader:
            pass

    pairs = [(seconds(ours), seconds(theirs)) for _ in range(3)]
    a, b = (sorted(column)[1] for column in zip(*pairs))
    print(f"{'loader':<34}{'images/s':>10}{'ratio':>8}   (medians of three)")
    print(f"{'DataLoader, two workers':<34}{number / b:>10.0f}{1.0:>8.1f}")
    print(f"{'this project, one process':<34}{number / a:>10.0f}{b / a:>8.1f}")

    net = task.network(plan, 0)
    stored = list(itertools.islice(search_seg.Batches(task.data["train"], plan, 0), 60))
    step = seconds(lambda: search_seg.train_network(net, task.loss("ce"), stored, plan._replace(steps=60))) / 60
    share = (a / plan.steps) / (a / plan.steps + step)
    print(f"share of a re-training step spent in the loader: {share:.1%}")

    split = task.data["test"]
    pred = torch.cat([search_seg.predict(net, split.images[k : k + 50]) for k in range(0, 500, 50)])
    fast = min(seconds(lambda: search_seg.seg_metrics(pred, split.labels, 7)) for _ in range(3))
    part = 20  # the plain version is slow: measured on this many pictures
    slow = seconds(lambda: slow_metrics(pred[:part].long(), split.labels[:part].long(), 7)) * len(pred) / part
    print(f"\n{'six metrics of 500 label maps':<34}{'seconds':>10}{'ratio':>8}")
    print(f"{'plain, from the definitions':<34}{slow:>10.2f}{1.0:>8.1f}")
    print(f"{'this project':<34}{fast:>10.3f}{slow / fast:>8.1f}")
    show_torchmetrics(pred, split.labels, fast)
    show_pools()
    show_proxy(task)
    print(f"\ntorch {torch.__version__}, CPU")


if __name__ == "__main__":
    main()
