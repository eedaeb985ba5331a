"""Kinds of search, compared: anytime curves from one table of scores.

    python tests/bench_searches.py --table scores.jsonl --kinds evolve,published,random --seeds 3 --evals 100

Every proxy training and every re-training is kept in the table, by its schedule and the text of the loss, with all six
metrics (what is asked from random weights with the one that is searched for). A search trains only what the table
lacks: what one kind of search, seed or metric has paid for, the others get for nothing, and the whole can be stopped
and taken up again. Seconds are those of the training when it was made.

Each search is stopped after 25, 50, 100, ... trainings; what it would have given then, its best candidate by
proxy, has its score on the test split after others read off the table (mean of two seeds). Per metric and kind the
quartiles over the seeds of the search follow. tests/bench_runs.py compares whole runs, with their closing rounds.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import evolve  # noqa: E402
import search_seg  # noqa: E402

KINDS = {
    "evolve": [],
    "published": ["--without", "surrogate"],
    "random": ["--search", "random"],
    "naive": ["--search", "naive"],
    "cse": ["--search", "cse"],
    "aml": ["--search", "aml"],
    "asl": ["--search", "asl"],
}
AT = (25, 50, 100, 200, 400)  # trainings


class Table:
    """Scores by schedule and loss: all metrics, or None where the training became invalid."""

    def __init__(self, path: Path):
        self.path, self.entries = path, {}
        for line in path.read_text().splitlines() if path.exists() else ():
            entry = json.loads(line)
            self.entries[entry["schedule"], entry["loss"]] = entry

    def get(self, schedule: str, loss: str, make) -> dict:
        if (schedule, loss) not in self.entries:
            start = time.time()
            try:
                scores = make()
            except evolve.InvalidLoss:
                scores = None
            seconds = round(time.time() - start, 2)
            entry = {"schedule": schedule, "loss": loss, "scores": scores, "seconds": seconds}
            self.entries[schedule, loss] = entry
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        return self.entries[schedule, loss]


class ReplayTask(search_seg.SegTask):
    """SegTask that trains only what the table lacks; `spent` are the seconds that its trainings took or had taken."""

    def __init__(self, args, table: Table):
        super().__init__(args)
        self.table, self.spent = table, 0.0

    def look_up(self, schedule: str, losses, make):
        entry = self.table.get(schedule, evolve.losses_text(losses), make)
        self.spent += entry["seconds"]
        self.curve = []
        if entry["scores"] is None:
            raise evolve.InvalidLoss(schedule)
        return entry["scores"]

    def proxy_scores(self, losses, base=0):
        make = super().proxy_scores
        return self.look_up(f"proxy {self.proxy} {base}", losses, lambda: make(losses, base))

    def witness(self, losses, seed):
        make, schedule = super().witness, f"witness {self.proxy} {seed} {self.args.metric}"
        return self.look_up(schedule, losses, lambda: {"witness": make(losses, seed)})["witness"]

    def retrain(self, losses, seed, picture=None, checkpoint=None):
        make = super().retrain
        return self.look_up(f"again {self.retraining} {seed}", losses, lambda: make(losses, seed))


def replay(kind: str, metric: str, seed: int, evals: int, table: Table) -> list[tuple[int, float, object]]:
    """One search: (trainings, seconds, best candidate) whenever a training has ended."""
    flags = ["--metric", metric, "--seed", str(seed), "--evals", str(evals), "--minutes", "100000", "--workers", "1"]
    args = search_seg.parse_arguments([*flags, "--device", "cpu", *KINDS[kind]])
    args.seed = 0  # of data, weights and batches; they are the same for all
    task, curve = ReplayTask(args, table), []
    task.load()
    with tempfile.TemporaryDirectory() as folder:
        base = table.path.with_suffix(".base.pt")
        task.prepare(base)
        state, worker = evolve.make_state(args, task), evolve.Worker(Path(folder))
        state.baseline, *state.later = (task.train(task.baseline, base) for base in range(task.bases))
        state.witness = evolve.witness_score(state, task.baseline)
        task.spent, start = 0.0, time.process_time()
        trained = 0.0  # processor time within trainings that were made now
        inner = task.look_up

        def timed(*what):
            nonlocal trained
            before = time.process_time()
            try:
                return inner(*what)
            finally:
                trained += time.process_time() - before

        task.look_up = timed
        args.seed = seed  # of the search

        def report() -> None:
            if state.evaluated > len(curve):
                seconds = task.spent + time.process_time() - start - trained
                curve.append((state.evaluated, seconds, state.best()))

        worker.report = report
        evolve.search(state, worker, args)
        worker.leave()
    return curve


def final_score(task: ReplayTask, best, metric: str) -> float:
    """The score on test after a re-training, mean of two seeds that no search has seen."""
    if best is None:
        return 0.0
    runs = []
    for seed in (evolve.TABLE_SEEDS, evolve.TABLE_SEEDS + 1):
        try:
            runs.append(task.retrain(best.losses, seed)["test"][metric])
        except evolve.InvalidLoss:
            runs.append(0.0)
    return sum(runs) / len(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", type=Path, required=True, help="file that keeps the scores")
    parser.add_argument("--kinds", default="evolve,published,random", help="comma-separated: " + " ".join(KINDS))
    parser.add_argument("--metrics", default="miou", help="comma-separated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evals", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(args.table)
    judge = ReplayTask(search_seg.parse_arguments(["--device", "cpu"]), table)
    judge.load()
    for metric in args.metrics.split(","):
        reference = [judge.retrain("ce", evolve.TABLE_SEEDS + k)["test"][metric] for k in (0, 1)]
        baseline, at = sum(reference) / 2, [n for n in AT if n <= args.evals]
        print(f"\n{metric}, test after {judge.retraining.steps:,} steps; cross entropy {baseline:.3f}")
        print(f"{'search':<12}{'seed':>8}" + "".join(f"{n:>9}" for n in at) + f"{'seconds':>9}")
        for kind in args.kinds.split(","):
            found = []  # by seed, after each number of trainings
            for seed in range(args.seeds):
                curve = replay(kind, metric, seed, args.evals, table)
                found.append([final_score(judge, curve[n - 1][2], metric) for n in at])
                cells = "".join(f"{score:>9.3f}" for score in found[-1])
                print(f"{kind:<12}{seed:>8}{cells}{curve[-1][1]:>9.0f}", flush=True)
            if args.seeds > 1:
                columns = [statistics.quantiles(scores, n=4, method="inclusive") for scores in zip(*found)]
                for name, row in zip(("quarter", "median", "quarter"), zip(*columns)):
                    print(f"{kind:<12}{name:>8}" + "".join(f"{score:>9.3f}" for score in row), flush=True)


if __name__ == "__main__":
    main()
