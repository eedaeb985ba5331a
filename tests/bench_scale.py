"""How far one run directory scales: evaluations an hour with 1 to 1,000 workers, from measured costs of the journal.

    python tests/bench_scale.py [--seconds 5 60 600]

Workers share nothing but files, so nobody waits for a lock: a turn of each is its training and, before it, what all
others have done since its last turn. That is measured here with as many journals and signs of life as there are
workers, each with one new record of a usual size, on a local disk with warm caches: `tell` appends a record, `hear`
tails all journals and folds what is new into the state, `others` reads the signs of life. Surrogate and breeding cost
the same however many work, and stand in `--seconds` together with the training.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent)]
import evolve  # noqa: E402
from evolve import Worker  # noqa: E402

WORKERS = (1, 10, 100, 1000)
CHILDREN = 200  # verdicts in a record: of the pool of one turn


class NoTask(evolve.Task):
    """Enough of a task to read a journal."""

    name, baseline, metrics, symbols = "none", "ce", ("toy",), {"loss": "yp1"}


def usual_record(rng: random.Random, worker: int) -> dict:
    trees = [str(evolve.random_tree(rng, ("y", "p", "1"))) for _ in range(CHILDREN)]
    return {
        "turn": 0,
        "losses": {"loss": trees[0]},
        "parent": {"loss": trees[1]},
        "score": rng.random(),
        "gain": {"loss": 0.7},
        "identity": [f"loss:{rng.random()}"],
        "predicted": [0.5, 0.1],
        "tried": {
            "counts": {"dead": 500, "surrogate": CHILDREN},
            "verdicts": [["loss", tree, "equivalent", f"{rng.getrandbits(64):016x}", None] for tree in trees],
            "reused": [],
            "failed": [],
        },
        "curve": [[step, 1.0] for step in range(0, 120, 10)],
        "seconds": 5.0,
        "worker": worker,
        "elapsed": 1.0,
    }


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def turn_costs(number: int) -> tuple[float, float, float]:
    """Seconds of `tell`, `hear` and `others` in a turn, with so many workers, each with one record more."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        method = evolve.METHODS["evolve"]
        state, worker = evolve.State(NoTask(), method, "toy"), Worker(directory)
        lines = [json.dumps(usual_record(rng, k)) + "\n" for k in range(number)]
        for k in range(1, number):
            (directory / f"journal-{k}.jsonl").write_text(lines[k])
            (worker.room / f"{k}-host-{k}.alive").write_text(worker.sign.read_text())
        told = seconds(lambda: worker.tell(json.loads(lines[0])))
        heard = seconds(lambda: worker.hear(state))
        looked = seconds(worker.others)
        assert state.evaluated == number and len(worker.others()) == number - 1
        worker.leave()
    return told, heard, looked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", nargs="+", type=float, default=[5.0, 60.0, 600.0], help="of a training")
    args = parser.parse_args()
    size = len(json.dumps(usual_record(random.Random(0), 0)))
    print(f"a record has {size / 1024:.0f} KiB, {size / (500 + 2 * CHILDREN):.0f} bytes a candidate")
    print(f"{'workers':>8}{'tell s':>9}{'hear s':>9}{'others s':>9}  evaluations an hour, and of what were ideal")
    for number in WORKERS:
        costs = turn_costs(number)
        cells = ""
        for training in args.seconds:
            rate = 3600 * number / (training + sum(costs))
            cells += f"{rate:>12,.0f} ({training / (training + sum(costs)):4.0%}, {training:.0f} s)"
        print(f"{number:>8}" + "".join(f"{cost:>9.4f}" for cost in costs) + cells, flush=True)


if __name__ == "__main__":
    main()
