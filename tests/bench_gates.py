"""The gates against the plain protocol: speed, agreement of verdicts, and what a rejection is worth.

    python tests/bench_gates.py [--trees 400] [--quality 30]

Half of the trees are random, half are mutations of good losses. The plain protocol is what one would write first: for
every tree 500 optimisation steps on the five rejection samples, no symbolic test, no cache, no early decision. This
project's code judges the same trees in the same order. Rejected is rejected, for whatever reason; verdicts are
compared tree by tree. One thread; both sides are timed in the same run.

Quality: that many rejected and that many accepted trees get the proxy training, whatever the gate said: how many come
within 10 % of cross entropy? And do the hand-made losses that are trees pass?
"""

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import evolve  # noqa: E402
import search_seg  # noqa: E402
from loss_ops import evaluate, parse  # noqa: E402

GOOD = (
    "Neg(Mul(y, Log(p)))",
    "Square(Add(p, Neg(y)))",
    "Neg(Sqrt(MeanNHW(Mul(p, y))))",
    "Neg(Mul(MeanNHW(Mul(y, p)), Inv(MeanNHW(Add(y, p)))))",
    "Square(Mul(Tanh(y), Log(p)))",
)

BATCH = 16


def plain_protocol(branch: evolve.Branch, expr, steps: int = 500) -> float:
    """The gain after all steps; -inf if the loss has no gradient or becomes invalid."""
    x = branch.prediction.clone().requires_grad_()
    before = branch.score(x.detach(), branch.target).mean()
    adam = torch.optim.Adam([x], lr=evolve.REJECTION_LR, eps=1e-16)
    for _ in range(steps):
        value = evaluate(expr, branch.leaves(x, branch.target)).sum()
        if not value.requires_grad:
            return float("-inf")
        (x.grad,) = torch.autograd.grad(value, x)
        adam.step()
    if not x.isfinite().all():
        return float("-inf")
    return (branch.score(x.detach(), branch.target).mean() - before).item()


def some_trees(number: int, seed: int):
    rng = random.Random(seed)
    for k in range(number):
        if k % 2:
            yield evolve.random_tree(rng, ("y", "p", "1"))
        else:
            expr = parse(rng.choice(GOOD))
            for _ in range(rng.randint(1, 3)):
                expr = evolve.mutate(rng, expr, ("y", "p", "1"))
            yield expr


def show_quality(task: search_seg.SegTask, trees: list, number: int) -> None:
    """Train what was rejected, and what was accepted."""
    baseline = task.train("ce")
    print(f"\n{'trained anyway':<24}{'trees':>9}{'within 10 % of CE':>20}{'best / CE':>12}")
    for verdict in ("rejected", "passed"):
        chosen = [expr for expr, (fate, gate) in trees if fate.gate == verdict and gate in (None, "rejected")][:number]
        scores = []
        for expr in chosen:
            try:
                scores.append(task.train({"loss": expr}))
            except search_seg.InvalidLoss:
                scores.append(0.0)
        close = sum(score >= 0.9 * baseline for score in scores)
        print(f"{verdict:<24}{len(scores):>9}{close:>20}{max(scores, default=0) / baseline:>12.2f}", flush=True)
    for text in GOOD:
        gain = evolve.rejection_gains(task.branches["loss"], [parse(text)], early=())[0]
        verdict = "passes" if gain >= task.branches["loss"].eta else "is rejected"
        print(f"gain {gain:.2f}: {verdict}: {text}")


def judge_together(task: search_seg.SegTask, trees: list, size: int) -> tuple[float, list[str]]:
    """Seconds and fates of the same trees, `size` at a time."""
    search, fates = evolve.Search(task), []
    start = time.perf_counter()
    for k in range(0, len(trees), size):
        fates += [fate.gate for fate, _ in evolve.judge(search, [("loss", expr) for expr in trees[k : k + size]])]
    return time.perf_counter() - start, fates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trees", type=int, default=400)
    parser.add_argument("--quality", type=int, default=30)
    parser.add_argument("--metric", default="miou")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = search_seg.SegTask(search_seg.parse_arguments(["--metric", args.metric]))
    branch, search = task.branches["loss"], evolve.Search(task)
    counts, differ, verdicts = Counter(), [], []
    seconds = {"plain": 0.0, "ours, one by one": 0.0}
    for expr in some_trees(args.trees, 0):
        start = time.perf_counter()
        ((fate, gate),) = evolve.judge(search, [("loss", expr)])
        seconds["ours, one by one"] += time.perf_counter() - start
        counts[gate or "passed"] += 1
        verdicts.append((expr, (fate, gate)))
        start = time.perf_counter()
        gain = plain_protocol(branch, expr)
        seconds["plain"] += time.perf_counter() - start
        if (gain >= branch.eta) != (fate.gate == "passed"):
            differ.append((gate, fate.gain, gain, str(expr)))
    for gate, early, gain, text in differ:
        print(f"differs: {gate or 'passed'}, gain {early} here, {gain:.3f} after all steps: {text}")
    print(f"\n{args.trees} trees, {args.metric}, torch {torch.__version__}, one thread: " + ", ".join(
        f"{gate} {number}" for gate, number in counts.most_common()))  # fmt: skip
    together, fates = judge_together(task, [expr for expr, _ in verdicts], BATCH)
    seconds[f"ours, {BATCH} at a time"] = together
    same = sum(fate.gate == other for (_, (fate, _)), other in zip(verdicts, fates))
    print(f"{'':24}{'seconds':>9}{'trees/s':>9}{'ratio':>8}")
    for side, number in seconds.items():
        print(f"{side:<24}{number:>9.1f}{args.trees / number:>9.1f}{seconds['plain'] / number:>8.1f}")
    print(
        f"verdicts agree with the plain protocol: {1 - len(differ) / args.trees:.2%}; one by one and together: ", end=""
    )
    print(f"{same / args.trees:.2%}")
    if args.quality:
        show_quality(task, verdicts, args.quality)


if __name__ == "__main__":
    main()
