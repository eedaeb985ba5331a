"""The published efficiency ladder, measured again: how many losses are explored in the same time, gate by gate.

    python tests/bench_ladder.py [--minutes 2] [--metric miou]

Every row is an evolution of its own with the same seed, network and data, one thread. The first four rows are the
published method, with its 500 steps of rejection to the end and norms alone as the key of equivalence; the last one
adds what is this project's own: the symbolic gates, the test of the first gradient, direction and relative scale in the
key, decisions before the last step, known scores reused. The published numbers: 300, 2.1e5, 3.2e5 and 1.5e6 losses
(AutoLoss-Zero, arXiv 2103.14026), within days on GPUs.
"""

import argparse
import functools
import random
import sys
import time
from itertools import count
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
    "+ this project": (set(evolve.GATES), True),
}


def norms_alone(gradient, scale_free) -> str:
    """The published key: norms of the gradient per sample, two significant digits."""
    return " ".join(f"{norm:.1e}" for norm in gradient.norm(dim=-1).tolist())


def climb(task: search_seg.SegTask, gates: set[str], stop_invalid: bool, seconds: float) -> evolve.Search:
    task.args.without = [] if stop_invalid else ["invalid"]
    search = evolve.Search(task, frozenset(gates))
    deadline = time.time() + seconds
    for number in count():
        record = evolve.evaluation(search, random.Random(f"ladder/{number}"), deadline)
        if record is None or time.time() > deadline:
            return search
        search.add(record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--metric", default="miou")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = search_seg.SegTask(search_seg.parse_arguments(["--metric", args.metric]))
    task.train("ce")  # everything that is made once is made
    own = evolve.equivalence_key, evolve.rejection_gains
    base = None
    print(f"{args.minutes:g} minutes each, {args.metric}, torch {torch.__version__}, {task.device}, one thread")
    print(f"{'':18}{'explored':>9}{'trained':>9}{'invalid':>9}{'best':>8}{'ratio':>8}{'published':>11}")
    for name, (gates, stop_invalid) in ROWS.items():
        evolve.equivalence_key, evolve.rejection_gains = own
        if name in PUBLISHED:
            evolve.equivalence_key = norms_alone
            evolve.rejection_gains = functools.partial(own[1], early=())
        search = climb(task, gates, stop_invalid, 60 * args.minutes)
        base = base or search.explored
        best = f"{search.best.score:.3f}" if search.best else "-"
        print(
            f"{name:<18}{search.explored:>9}{search.evaluated:>9}{search.counts['invalid']:>9}{best:>8}"
            f"{search.explored / base:>8.1f}{PUBLISHED.get(name, ''):>11}",
            flush=True,
        )


if __name__ == "__main__":
    main()
