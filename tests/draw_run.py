"""A run as a picture: what its trainings scored over the minutes, and what the found loss pulls at.

    python tests/draw_run.py RUN_DIR .github/search.png

On the left, over minutes of searching: proxy scores (grey) and the best so far (line), minus that of the baseline. On
the right `gradients.png` of the run, see `evolve.draw_gradients`.
"""

import argparse
import json
import sys
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from evolve import BASELINE, FOUND, put_text  # noqa: E402

BLACK = (0, 0, 0)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 360, 60, 20, 50, 45


def draw_scores(records: list[dict], metric: str) -> np.ndarray:
    proxy = next(record["baseline"] for record in records if "baseline" in record)
    baseline = next(r["retrained"] for r in records if isinstance(r.get("retrained"), str))
    dots = [(r["elapsed"] / 60, r["score"] - proxy) for r in records if r.get("score") is not None and "losses" in r]
    points = np.array(dots)
    low, high = max(-0.15, points[:, 1].min()) - 0.01, points[:, 1].max() + 0.01
    end = points[:, 0].max()

    def place(minute: float, value: float) -> tuple[int, int]:
        x = LEFT + minute / end * (WIDTH - LEFT - RIGHT)
        y = TOP + (high - max(value, low)) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return round(x), round(y)

    canvas = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    for value in np.arange(np.ceil(low / 0.05) * 0.05, high, 0.05):
        cv2.line(canvas, place(0, value), place(end, value), BLACK if abs(value) < 1e-9 else (225, 225, 225), 1)
        put_text(canvas, f"{value:+.2f}", (8, place(0, value)[1] + 4))
    for minute in range(0, int(end) + 1, 2):
        put_text(canvas, str(minute), (place(minute, low)[0] - 4, HEIGHT - 25))
    best = -np.inf
    for minute, value in dots:
        cv2.circle(canvas, place(minute, value), 2, BASELINE, -1, cv2.LINE_AA)
        if value > best:
            if np.isfinite(best):
                cv2.line(canvas, place(minute, best), place(minute, value), FOUND, 1)
            best, since = value, minute
        later = [m for m, _ in dots if m > minute]
        cv2.line(canvas, place(since, best), place(min(later, default=end), best), FOUND, 1)
    put_text(canvas, f"{metric} minus that of {baseline}, over minutes of searching", (LEFT, 18))
    put_text(canvas, "proxy", (LEFT, 36), BASELINE)
    put_text(canvas, "best proxy so far", (LEFT + 60, 36), FOUND)
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    lines = [line for path in sorted(args.run.glob("journal-*.jsonl")) for line in path.read_text().splitlines()]
    records = sorted(map(json.loads, lines), key=lambda record: record["elapsed"])
    about = json.loads((args.run / "args.json").read_text())
    canvas = draw_scores(records, about["arguments"]["metric"])
    gradients = args.run / "gradients.png"
    if gradients.exists():
        canvas = np.concatenate([canvas, cv2.imread(str(gradients))[:HEIGHT]], 1)
    cv2.imwrite(str(args.picture), canvas)


if __name__ == "__main__":
    main()
