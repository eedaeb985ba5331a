"""Kinds of search at their full budget, from run directories that the real commands have made.

    for seed in 0 1 2; do
        python search_seg.py --metric miou --workers 1 --evals 230 --minutes 90 --seed $seed --search random
    done
    python tests/bench_runs.py RUN_DIR... --picture .github/searches.png

Per run: the best proxy score minus that of the baseline after so many trainings, and what the closing table says of the
found loss on test, found minus baseline with its standard error (so with two --seeds at least). On the picture a line
per run on the left, the closing tables on the right.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from evolve import put_text  # noqa: E402

AT = (25, 50, 100, 150, 200)  # trainings
COLOURS = [(200, 80, 0), (40, 40, 200), (60, 160, 60), (30, 140, 230), (160, 60, 160)]  # BGR
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, COLUMN = 520, 360, 60, 30, 50, 130


class Run(NamedTuple):
    """What is shown of a run directory."""

    kind: str
    seed: int
    metric: str
    best: list[float]  # the highest lead of a proxy score over the baseline's so far, by training
    ahead: float  # found minus baseline on test ...
    error: float  # ... and its standard error


def read_run(directory: Path) -> Run:
    about = json.loads((directory / "args.json").read_text())["arguments"]
    lines = [line for path in directory.glob("journal-*.jsonl") for line in path.read_text().splitlines()]
    records = sorted(map(json.loads, lines), key=lambda record: record["elapsed"])
    baseline = next(record["baseline"] for record in records if "baseline" in record)
    leads = [-1.0 if r["score"] is None else r["score"] - baseline for r in records if "losses" in r]
    kind = "without " + ", ".join(about["without"]) if about["without"] else about["search"]
    ahead, error = json.loads((directory / "result.json").read_text())["difference"][about["metric"]]
    return Run(kind, about["seed"], about["metric"], list(itertools.accumulate(leads, max)), ahead, error)


def draw(runs: list[Run], path: Path) -> None:
    kinds = list(dict.fromkeys(run.kind for run in runs))
    canvas = np.full((HEIGHT, WIDTH + COLUMN * len(kinds) + 30, 3), 255, np.uint8)
    most = max(len(run.best) for run in runs)

    def axis(left: int, right: int, low: float, high: float, step: float):
        """A grid of lines `step` apart; the function that gives the row of a value."""

        def row(value: float) -> int:
            return round(TOP + (high - max(value, low)) / (high - low) * (HEIGHT - TOP - BOTTOM))

        for k in range(round(low / step), round(high / step) + 1):
            cv2.line(canvas, (left, row(k * step)), (right, row(k * step)), (0, 0, 0) if k == 0 else (225, 225, 225))
            put_text(canvas, f"{k * step:+.2f}", (left - 50, row(k * step) + 4))
        return row

    row = axis(LEFT, WIDTH - 30, -0.1, 0.1 * np.ceil(10 * max(run.best[-1] for run in runs)), 0.05)
    for run in runs:
        spots = [(LEFT + (WIDTH - LEFT - 30) * k / most, row(lead)) for k, lead in enumerate(run.best, 1)]
        colour = COLOURS[kinds.index(run.kind)]
        cv2.polylines(canvas, [np.array(spots, np.int32)], False, colour, 1, cv2.LINE_AA)
    for k in range(0, most + 1, 50):
        put_text(canvas, str(k), (round(LEFT + (WIDTH - LEFT - 30) * k / most) - 8, HEIGHT - BOTTOM + 20))
    put_text(canvas, f"best proxy {runs[0].metric} minus the baseline's, over trainings", (LEFT, 18))

    low, high = min(run.ahead - run.error for run in runs), max(run.ahead + run.error for run in runs)
    low, high = 0.01 * np.floor(100 * min(low, 0)), 0.01 * np.ceil(100 * max(high, 0))
    row = axis(WIDTH + 30, canvas.shape[1] - 10, low, high, 0.01)
    put_text(canvas, f"{runs[0].metric} on test, found minus baseline", (WIDTH + 30, 18))
    for k, kind in enumerate(kinds):
        put_text(canvas, kind[:20], (WIDTH + 40 + COLUMN * k, HEIGHT - BOTTOM + 20), COLOURS[k])
        for j, run in enumerate(run for run in runs if run.kind == kind):
            x = WIDTH + 50 + COLUMN * k + 16 * j
            cv2.line(canvas, (x, row(run.ahead - run.error)), (x, row(run.ahead + run.error)), COLOURS[k], 1)
            cv2.circle(canvas, (x, row(run.ahead)), 4, COLOURS[k], -1, cv2.LINE_AA)
    cv2.imwrite(str(path), canvas)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--picture", type=Path, help="PNG to draw to")
    args = parser.parse_args()
    runs = [read_run(directory) for directory in args.runs]
    print(
        "| search | seed | trained | " + " | ".join(map(str, AT)) + " | test |\n|---|---|---|" + "---|" * (len(AT) + 1)
    )
    for run in runs:
        cells = [f"{run.best[n - 1]:+.3f}" if n <= len(run.best) else "" for n in AT]
        numbers = " | ".join([*cells, f"**{run.ahead:+.3f} ({run.error:.3f})**"])
        print(f"| {run.kind} | {run.seed} | {len(run.best)} | {numbers} |")
    if args.picture:
        draw(runs, args.picture)


if __name__ == "__main__":
    main()
