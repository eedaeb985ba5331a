"""Whole searches: two workers against one, and evolution against random search under the same budget.

    python tests/bench_search.py [--rounds 3] [--minutes 2] [--seeds 3] [--metric miou]

Workers: evaluations per minute of one and of two workers in turn, between the first and the last line of
the journal. Evolution and random search run side by side, a core each, with the same seed and the same minutes.
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


def outcome(runs: Path) -> tuple[list[dict], dict]:
    (directory,) = runs.iterdir()
    journal = [json.loads(line) for line in (directory / "journal.jsonl").read_text().splitlines()]
    return journal, json.loads((directory / "result.json").read_text())


def mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--seeds", type=int, default=3)
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
                journal, _ = outcome(runs)
                rates.append((len(journal) - 1) / (journal[-1]["elapsed"] - journal[0]["elapsed"]) * 60)
                print(f"{workers:<10}{len(journal):>12}{rates[-1]:>12.1f}{rates[-1] / rates[0]:>8.2f}", flush=True)

        print(
            f"\n{args.minutes:g} minutes of one core each, {args.metric}; proxy: best score; test: mean of three seeds"
        )
        print(f"{'seed':<6}{'search':<10}{'explored':>9}{'trained':>9}{'proxy':>8}{'test':>8}{'CE':>8}", flush=True)
        for seed in range(args.seeds):
            names = ("evolve", "random")
            running = [
                start(root / f"{name}{seed}", args.metric, args.minutes, seed, "--workers", "1", "--search", name)
                for name in names
            ]
            for process in running:
                process.wait()
            for name in names:
                journal, result = outcome(root / f"{name}{seed}")
                best = max((line["score"] for line in journal if line["score"] is not None), default=0)
                found, baseline = (mean(result["test"][key].get(args.metric, [])) for key in ("found", "baseline"))
                print(
                    f"{seed:<6}{name:<10}{result['explored']:>9}{result['evaluated']:>9}{best:>8.3f}{found:>8.3f}"
                    f"{baseline:>8.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
