"""How much is the proxy's ranking worth? Rank correlation of proxy training with re-training.

    python tests/bench_proxy.py [--proxy-steps 60 80 100]

Trains losses of all qualities, hand-made and evolved, with the proxy schedule (for each number of steps) and with the
re-training schedule (other weights, other batches), both scored on the search-validation split of the embedded data.
Noise: the standard deviation of the proxy score over three seeds, averaged over the hand-made losses.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import search_seg  # noqa: E402
from loss_ops import parse  # noqa: E402

HAND_MADE = ("ce", "wce", "dice", "lovasz", "dpce", "ssim")
TREES = (
    "Square(Add(p, Neg(y)))",
    "Abs(Add(p, Neg(y)))",
    "Neg(Sqrt(MeanNHW(Mul(p, y))))",
    "Neg(Mul(MeanNHW(Mul(y, p)), Inv(MeanNHW(Add(y, p)))))",
    "Neg(Log(MeanNHW(Mul(y, p))))",
    "Square(Mul(y, Log(p)))",
    "Neg(Mul(y, Sqrt(p)))",
    "Neg(Mul(Sqrt(MeanNHW(y)), Mul(y, p)))",
    "Mul(y, Exp(Neg(p)))",
    "Square(Add(MaxPool3(p), Neg(MaxPool3(y))))",
    "Neg(Mul(MaxPool3(y), Log(p)))",
    "Neg(Mul(Mul(y, Inv(MeanNHW(y))), Log(p)))",
    "Neg(Tanh(Mul(Add(y, y), p)))",
    "Mul(Square(Log(p)), Sqrt(MeanC(y)))",
)


def ranks(values: list[float]) -> torch.Tensor:
    """Ranks with ties at their mean."""
    v = torch.tensor(values, dtype=torch.float64)
    return (v[:, None] > v).sum(1) + 0.5 * (v[:, None] == v).sum(1)


def spearman(a: list[float], b: list[float]) -> float:
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


def score(task: search_seg.SegTask, losses, plan: search_seg.Schedule, seed: int) -> dict[str, float]:
    net = task.network(plan, seed)
    try:
        search_seg.train_network(net, task.loss(losses), task.batches(losses, plan, seed), plan)
    except search_seg.InvalidLoss:
        return dict.fromkeys(search_seg.METRICS, 0.0)
    return search_seg.test_network(net, task.data["val"], task.num_classes, task.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--proxy-steps", type=int, nargs="+", default=[search_seg.PROXY["shapes"].steps])
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = search_seg.SegTask(search_seg.parse_arguments([]))
    plans = {f"proxy{steps}": task.proxy._replace(steps=steps) for steps in args.proxy_steps}
    plans["retrain"] = task.retraining
    losses = {name: name for name in HAND_MADE} | {text: {"loss": parse(text)} for text in TREES}
    table, seconds = {}, dict.fromkeys(plans, 0.0)
    print("miou macc bf1 by " + ", ".join(plans))
    for name, loss in losses.items():
        for plan_name, plan in plans.items():
            start = time.time()
            table[name, plan_name] = score(task, loss, plan, 1000 if plan_name == "retrain" else 0)
            seconds[plan_name] += time.time() - start
        cells = ["{miou:.3f} {macc:.3f} {bf1:.3f}".format(**table[name, plan]) for plan in plans]
        print(" | ".join(cells), name, flush=True)

    noise = {}
    for plan_name, plan in plans.items():
        runs = [[score(task, name, plan, seed) for seed in (1, 2)] for name in HAND_MADE]
        for metric in search_seg.METRICS:
            groups = [
                [table[name, plan_name][metric], *(r[metric] for r in more)] for name, more in zip(HAND_MADE, runs)
            ]
            noise[plan_name, metric] = torch.tensor(groups).std(1).mean().item()

    print(f"\n{'':12}{'s/eval':>8}" + "".join(f"{metric:>16}" for metric in search_seg.METRICS))
    for plan_name in plans:
        cells = []
        for metric in search_seg.METRICS:
            again = [table[name, "retrain"][metric] for name in losses]
            rho = spearman([table[name, plan_name][metric] for name in losses], again)
            cells.append(f"{rho:.2f} (sd {noise[plan_name, metric]:.3f})")
        print(f"{plan_name:<12}{seconds[plan_name] / len(losses):>8.1f}" + "".join(f"{cell:>16}" for cell in cells))
    print(f"Spearman with re-training over {len(losses)} losses; sd: over three seeds of the hand-made losses")


if __name__ == "__main__":
    main()
