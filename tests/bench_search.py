"""Whole searches: two workers against one.

    python tests/bench_search.py [--rounds 3] [--minutes 2] [--metric miou]

Proxy trainings per minute of one and of two workers in turn, between the first and the last record of the journals.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def start(runs: Path, metric: str, minutes: float, seed: int, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "search_seg.py", "--metric", metric, "--minutes", str(minutes), "--seed", str(seed)]
    command += ["--runs", str(runs), "--device", "cpu", *flags]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)


def rate(runs: Path) -> tuple[int, float]:
    """Proxy trainings, and how many a minute."""
    records = [json.loads(line) for path in runs.glob("*/journal-*.jsonl") for line in path.read_text().splitlines()]
    times = sorted(record["elapsed"] for record in records if "score" in record)
    return len(times), 60 * (len(times) - 1) / (times[-1] - times[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--metric", default="miou")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        print(f"{'workers':<10}{'evaluations':>12}{'per minute':>12}{'ratio':>8}", flush=True)
        for turn in range(args.rounds):
            rates = []
            for workers in ("1", "2"):
                runs = root / f"workers{workers}-{turn}"
                start(runs, args.metric, args.minutes, turn, "--workers", workers, "--seeds", "1").wait()
                number, speed = rate(runs)
                rates.append(speed)
                print(f"{workers:<10}{number:>12}{rates[-1]:>12.1f}{rates[-1] / rates[0]:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
