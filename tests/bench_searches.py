"""Kinds of search, compared: anytime curves from one table of scores.

    python tests/bench_searches.py --table scores.jsonl --kinds evolve,published,random --seeds 3 --evals 100

Every proxy training and every re-training is kept in the table, by its schedule and the text of the loss, with all
six metrics. A search trains only what the table lacks: what one kind of search, seed or metric has paid for, the others
get for nothing, and the whole can be stopped and taken up again. Seconds are those of the training when it was made.

Each search is stopped after 25, 50, 100, ... trainings; what it would have given then, its best candidate by
proxy, has its score on the test split after others read off the table (mean of two seeds). Shown:
median and quartiles over the seeds of the search, per metric and kind; `--picture FILE` draws the curves.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
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
COLOURS = {  # BGR
    "evolve": (40, 40, 200),
    "published": (200, 120, 30),
    "random": (120, 120, 120),
    "naive": (60, 160, 60),
    "cse": (160, 60, 160),
    "aml": (140, 140, 40),
    "asl": (30, 140, 230),
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


def draw(rows: dict, path: Path, title: str, baseline: float) -> None:
    """Medians and quartiles over trainings, a curve per kind of search."""
    width, height, left, bottom = 760, 420, 70, 50
    picture = np.full((height, width, 3), 255, np.uint8)
    values = [value for row in rows.values() for quartiles in row.values() for value in quartiles] + [baseline]
    low, high = min(values) - 0.01, max(values) + 0.01
    steps = sorted({step for row in rows.values() for step in row})

    def spot(step: float, value: float) -> tuple[int, int]:
        x = left + (width - left - 150) * (steps.index(step) + 0.5) / len(steps)
        return round(x), round(height - bottom - (height - bottom - 40) * (value - low) / (high - low))

    def write(text: str, at: tuple[int, int], colour=(0, 0, 0), size: float = 0.45) -> None:
        cv2.putText(picture, text, at, cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA)

    write(title, (left, 24), size=0.55)
    for k in range(6):
        value = low + (high - low) * k / 5
        y = spot(steps[0], value)[1]
        cv2.line(picture, (left, y), (width - 150, y), (230, 230, 230))
        write(f"{value:.3f}", (12, y + 5))
    for step in steps:
        write(str(step), (spot(step, low)[0] - 12, height - bottom + 20))
    write("proxy trainings", (width // 2 - 110, height - 10))
    y = spot(steps[0], baseline)[1]
    cv2.line(picture, (left, y), (width - 150, y), (0, 0, 0), 1, cv2.LINE_AA)
    write("cross entropy", (width - 140, y + 5))
    for k, (kind, row) in enumerate(rows.items()):
        line = np.array([spot(step, row[step][1]) for step in row], np.int32)
        cv2.polylines(picture, [line], False, COLOURS[kind], 2, cv2.LINE_AA)
        for step in row:
            shift = 4 * k - 8
            (x, y0), (_, y1) = spot(step, row[step][0]), spot(step, row[step][2])
            cv2.line(picture, (x + shift, y0), (x + shift, y1), COLOURS[kind], 2, cv2.LINE_AA)
        write(kind, (width - 140, 60 + 22 * k), COLOURS[kind], 0.5)
    cv2.imwrite(str(path), picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", type=Path, required=True, help="file that keeps the scores")
    parser.add_argument("--kinds", default="evolve,published,random", help="comma-separated: " + " ".join(KINDS))
    parser.add_argument("--metrics", default="miou", help="comma-separated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evals", type=int, default=100)
    parser.add_argument("--picture", type=Path, help="PNG to draw the curves to; of the first metric")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(args.table)
    judge = ReplayTask(search_seg.parse_arguments(["--device", "cpu"]), table)
    judge.load()
    for metric in args.metrics.split(","):
        rows = {}
        reference = [judge.retrain("ce", evolve.TABLE_SEEDS + k)["test"][metric] for k in (0, 1)]
        baseline = sum(reference) / 2
        print(f"\n{metric}, test after {judge.retraining.steps:,} steps; cross entropy {baseline:.3f}")
        print(f"{'search':<12}{'seed':>5}" + "".join(f"{n:>9}" for n in AT if n <= args.evals) + f"{'seconds':>9}")
        for kind in args.kinds.split(","):
            results = []
            for seed in range(args.seeds):
                curve = replay(kind, metric, seed, args.evals, table)
                at = {n: final_score(judge, curve[n - 1][2], metric) for n in AT if n <= len(curve)}
                results.append(at)
                cells = "".join(f"{at[n]:>9.3f}" if n in at else f"{'-':>9}" for n in AT if n <= args.evals)
                print(f"{kind:<12}{seed:>5}{cells}{curve[-1][1]:>9.0f}", flush=True)
            rows[kind] = {}
            for n in results[0]:
                found = sorted(result[n] for result in results if n in result)
                quartiles = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
                rows[kind][n] = quartiles
            cells = "".join(f"{row[1]:>9.3f}" for row in rows[kind].values())
            print(f"{kind:<12}{'median':>5}{cells}", flush=True)
        if args.picture and metric == args.metrics.split(",")[0]:
            draw(
                rows,
                args.picture,
                f"{metric} of the best loss so far, after {judge.retraining.steps:,} steps",
                baseline,
            )


if __name__ == "__main__":
    main()
