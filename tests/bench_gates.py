"""The gates against the plain protocol: speed, agreement of verdicts, and what a rejection is worth.

    python tests/bench_gates.py [--trees 400] [--quality 200] [--metric miou] [--runs RUN_DIR ...] [--witness]

Half of the trees are random, half are mutations of good losses. The plain protocol is what one would write first: for
every tree 500 optimisation steps on the five rejection samples, no symbolic test, no cache, no early decision. This
project's code judges the same trees in the same order. Rejected is rejected, for whatever reason; verdicts are
compared tree by tree, without the gate `unstable`. One thread; both sides are timed in the same run.

Quality: that many trees get their proxy training whatever they gain in the rejection protocol: what does each limit
lose? And how much do good losses gain, those with pools included?

Stability: what the gate `unstable` measures of the losses in tests/RESULTS.md, and of those that searches for this
metric have trained and found ahead of cross entropy; which it turns away, and how near the limits the others come.

Witness: what the losses in tests/RESULTS.md score by `Task.witness`, a quarter of a minute for each; which are out.
"""

import argparse
import contextlib
import math
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import evolve  # noqa: E402
import search_seg  # noqa: E402
from loss_ops import evaluate, leaves_of, parse  # noqa: E402

GOOD = (
    "Neg(Mul(y, Log(p)))",
    "Square(Add(p, Neg(y)))",
    "Neg(Sqrt(MeanNHW(Mul(p, y))))",
    "Neg(Mul(MeanNHW(Mul(y, p)), Inv(MeanNHW(Add(y, p)))))",
    "Square(Mul(Tanh(y), Log(p)))",
    "Neg(Mul(MeanNHW(Mul(y, Sqrt(p))), Inv(MeanNHW(Add(y, p)))))",
    "Neg(Sqrt(MeanNHW(Mul(y, Log(p)))))",
    "MinPool3(Neg(Mul(Sqrt(Mul(y, p)), Inv(MeanNHW(Add(y, p))))))",
    "Neg(Mul(MaxPool3(y), Log(p)))",
    "Square(Add(MaxPool3(p), Neg(MaxPool3(y))))",
)
SHOWN = {"unstable": None, "stable": 10}  # how many are printed
LIMITS = (-math.inf, 0.0, 0.05, 0.1, 0.2, 0.4, 0.6, math.inf)


def plain_protocol(branch: evolve.Branch, expr, steps: int = 500) -> float:
    """The gain after all steps; -inf if the loss has no gradient or becomes invalid."""
    x = branch.prediction[0].clone().requires_grad_()
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


def show_quality(task: search_seg.SegTask, number: int) -> None:
    """Train trees of all gains: how many of those below a limit would have been worth it?"""
    branch, baseline, rows = task.branches["loss"], task.train("ce"), []
    state = evolve.make_state(task.args, task)
    for expr in some_trees(100 * number, 1):
        tree = state.tree("loss", expr)
        child = evolve.Child({"loss": expr}, None, [tree])
        if not evolve.judge(state, child, evolve.CHEAP, evolve.Tried()):
            continue
        state.learn("loss", tree.text, evolve.PASSED, tree.key, None)
        gain = evolve.rejection_gain(branch, expr, early=())
        try:
            score = task.train({"loss": expr})
        except search_seg.InvalidLoss:
            score = 0.0
        rows.append((gain, score / baseline, str(expr)))
        if len(rows) == number:
            break
    print(f"\n{len(rows)} trees trained whatever they gain; cross entropy {baseline:.3f} after the same training")
    print(f"{'gain':<16}{'trees':>7}{'within 5 %':>12}{'ahead':>7}{'best / CE':>11}  the best of them")
    for low, high in zip(LIMITS, LIMITS[1:]):
        inside = [row[1:] for row in rows if low <= row[0] < high]
        best, text = max(inside, default=(0.0, "-"))
        near, ahead = (sum(score > limit for score, _ in inside) for limit in (0.95, 1.0))
        print(f"{low:>5.2f} to {high:<7.2f}{len(inside):>7}{near:>12}{ahead:>7}{best:>11.3f}  {text}", flush=True)
    print(f"\ngains of good losses; the limit for {task.args.metric} is {branch.eta}")
    for text in GOOD:
        gain = evolve.rejection_gain(branch, parse(text), early=())
        print(f"{gain:.2f} {'passes' if gain >= branch.eta else 'is rejected'}  {text}")


def some_losses(runs: list[Path]):
    """(where from, text) of the losses in RESULTS.md and of those ahead in these run directories."""
    for text in re.findall(r"`([A-Z]\w+\([^`\n]*\))`", Path(__file__).with_name("RESULTS.md").read_text()):
        with contextlib.suppress(ValueError):
            if set(leaves_of(parse(text))) <= set("yp1"):
                yield "RESULTS.md", text
    for journal in (file for run in runs for file in run.glob("journal*.jsonl")):
        for record in evolve.read_records(journal)[0]:
            if record.get("later") and None not in record["later"] and "losses" in record:
                yield f"{journal.parent.name}, {evolve.shown(record['score'])}", record["losses"]["loss"]


def show_stability(task: search_seg.SegTask, runs: list[Path]) -> None:
    branch, known = task.branches["loss"], {text: origin for origin, text in some_losses(runs)}
    print(f"\n{len(known)} losses have to agree with cross entropy (> 0) at the untrained network, to regain")
    print(f"{branch.recovery:.3f} of what is sure and wrong, and may be as steep as {branch.steepness:.1f}")
    measures = evolve.agreement, evolve.recovery, evolve.steepness
    measured = [(*(f(branch, parse(text)) for f in measures), origin, text) for text, origin in known.items()]
    stable = [row for row in measured if evolve.is_stable(branch, parse(row[-1]))]
    print(f"{'':<10}{'agreement':>10}{'regained':>10}{'steepness':>10}")
    for verdict, rows in (("unstable", set(measured) - set(stable)), ("stable", stable)):
        for agrees, regained, steep, origin, text in sorted(rows)[: SHOWN[verdict]]:
            print(f"{verdict:<10}{agrees:>10.2f}{regained:>10.3f}{steep:>10.2f}  {origin}: {text}")
    agrees, regained, steep = zip(*(row[:3] for row in stable))
    print(f"of the {len(stable)} stable ones: {min(agrees):.2f}, {min(regained):.3f} and {max(steep):.2f}")


def show_witness(task: search_seg.SegTask) -> None:
    state = evolve.make_state(task.args, task)
    state.witness = evolve.witness_score(state, "ce")
    print(f"\n{state.witness:.3f}     ce, from the weights that the closing round begins with")
    for text in dict.fromkeys(text for _, text in some_losses([])):
        score = evolve.witness_score(state, {"loss": parse(text)})
        print(f"{evolve.shown(score)} {'   ' if evolve.learns(state, score) else 'out'} {text}", flush=True)


def verdicts_of(task: search_seg.SegTask, trees: list) -> tuple[float, list[tuple[str, str]]]:
    """Seconds, and for each tree its verdict and the gate that gave it."""
    state, found, start = evolve.make_state(task.args, task), [], time.perf_counter()
    state.gates -= {"unstable"}
    for expr in trees:
        child, tried = evolve.Child({"loss": expr}, None, [state.tree("loss", expr)]), evolve.Tried()
        if evolve.judge(state, child, (*evolve.CHEAP, *evolve.DEAR), tried):
            tried.close(state, child)
        state.waiting.clear()
        found.append((child.trees[0].verdict.gate, child.trees[0].gate))
    return time.perf_counter() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trees", type=int, default=400)
    parser.add_argument("--quality", type=int, default=200)
    parser.add_argument("--metric", default="miou")
    parser.add_argument("--runs", type=Path, nargs="*", default=[], metavar="RUN_DIR")
    parser.add_argument("--witness", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = search_seg.SegTask(search_seg.parse_arguments(["--metric", args.metric, "--device", "cpu"]))
    task.load()
    with tempfile.TemporaryDirectory() as folder:
        task.prepare(Path(folder) / "base.pt")
    branch, trees = task.branches["loss"], list(some_trees(args.trees, 0))
    seconds = {}
    if trees:
        seconds["this project"], found = verdicts_of(task, trees)
        start = time.perf_counter()
        gains = [plain_protocol(branch, expr) for expr in trees]
        seconds["plain protocol"] = time.perf_counter() - start
        differ = [k for k, gain in enumerate(gains) if (gain >= branch.eta) != (found[k][0] == evolve.PASSED)]
        for k in differ:
            print(f"differs: {found[k]} here, gain {gains[k]:.3f} after all steps: {trees[k]}")
        counts = Counter(gate or evolve.PASSED for _, gate in found)
        print(
            f"\n{len(trees)} trees, {args.metric}, torch {torch.__version__}, one thread: {dict(counts.most_common())}"
        )
        print(f"{'':30}{'seconds':>9}{'trees/s':>9}{'ratio':>8}")
        for side, number in seconds.items():
            ratio = seconds["plain protocol"] / number
            print(f"{side:<30}{number:>9.1f}{len(trees) / number:>9.1f}{ratio:>8.1f}")
        print(f"verdicts agree with the plain protocol: {1 - len(differ) / len(trees):.2%}")
    if args.quality:
        show_quality(task, args.quality)
    show_stability(task, args.runs)
    if args.witness:
        show_witness(task)


if __name__ == "__main__":
    main()
