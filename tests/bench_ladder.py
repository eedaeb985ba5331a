"""The published efficiency ladder, measured again: how many losses are explored in the same time, gate by gate.

    python tests/bench_ladder.py [--minutes 2] [--metric miou]

Every row is an evolution of its own with the same seed, network and data, one thread. The first four rows are the
published method, with its 500 steps of rejection to the end and norms alone as the key of equivalence; the next one
adds the symbolic gates, the test of the first gradient, direction and relative scale in the key, and decisions before
the last step; the last one the surrogate. The published numbers: 300, 2.1e5, 3.2e5 and 1.5e6 losses
(AutoLoss-Zero, arXiv 2103.14026), within days on GPUs.
"""

import argparse
import functools
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import evolve  # noqa: E402
import search_seg  # noqa: E402

PUBLISHED = {"naive": 1, "+ rejection": 700, "+ equivalence": 1000, "+ invalid stop": 5000}
ROWS = {
    "naive": (set(), False),
    "+ rejection": ({"rejected"}, False),
    "+ equivalence": ({"rejected", "equivalent"}, False),
    "+ invalid stop": ({"rejected", "equivalent"}, True),
    "+ symbolic gates, early decisions": ({*evolve.TREE_GATES} - {"unstable"}, True),
    "+ surrogate": ({*evolve.TREE_GATES, "surrogate"} - {"unstable"}, True),
}


def norms_alone(gradient, scale_free) -> str:
    """The published key: norms of the gradient per sample, two significant digits."""
    return " ".join(f"{norm:.1e}" for norm in gradient[0].norm(dim=-1).tolist())


def climb(task: search_seg.SegTask, gates: set[str], stop_invalid: bool) -> evolve.State:
    switched = [gate for gate in (*evolve.TREE_GATES, "surrogate") if gate not in gates]
    task.args.without = switched + ["invalid"] * (not stop_invalid)
    state = evolve.make_state(task.args, task)
    with tempfile.TemporaryDirectory() as folder:
        worker = evolve.Worker(Path(folder))
        evolve.search(state, worker, task.args)
        worker.hear(state)
        worker.leave()
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--metric", default="miou")
    args = parser.parse_args()
    torch.set_num_threads(1)
    flags = ["--metric", args.metric, "--minutes", str(args.minutes), "--evals", "1000000", "--device", "cpu"]
    task = search_seg.SegTask(search_seg.parse_arguments(flags))
    task.load()
    with tempfile.TemporaryDirectory() as folder:
        task.prepare(Path(folder) / "base.pt")
    task.train("ce")  # everything that is made once is made
    own = evolve.equivalence_key, evolve.rejection_gain
    base = None
    print(f"{args.minutes:g} minutes each, {args.metric}, torch {torch.__version__}, {task.device}, one thread")
    print(f"{'':34}{'explored':>9}{'trained':>9}{'invalid':>9}{'best':>8}{'ratio':>8}{'published':>11}")
    for name, (gates, stop_invalid) in ROWS.items():
        evolve.equivalence_key, evolve.rejection_gain = own
        if name in PUBLISHED:
            evolve.equivalence_key = norms_alone
            evolve.rejection_gain = functools.partial(own[1], early=())
        state = climb(task, gates, stop_invalid)
        base = base or state.explored
        scores = [result.score for result in state.results.values() if result.score is not None]
        best = f"{max(scores):.3f}" if scores else "-"
        print(
            f"{name:<34}{state.explored:>9}{state.evaluated:>9}{state.counts['invalid']:>9}{best:>8}"
            f"{state.explored / base:>8.1f}{PUBLISHED.get(name, ''):>11}",
            flush=True,
        )


if __name__ == "__main__":
    main()
