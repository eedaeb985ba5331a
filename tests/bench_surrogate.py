"""What describes a loss best? How likely the surrogate finds each proxy score without having seen it.

    python tests/bench_surrogate.py RUN_DIR ...        # runs of search_seg.py on the embedded data, by one worker

For every run: log density of each score of the better half, left out, given all others, in hundredths of the baseline's
score (nats, the mean over candidates; Rasmussen and Williams 2006, Eqs. 5.10-5.12), under the length and noise of
greatest marginal likelihood; and Spearman's correlation of what is predicted with what came out among them. Rows: the
covariance as a function of the distance of two gradients; what distance means, of unit gradients or bounded ones; and
as what scores below a floor count: a share of the baseline's, or the median of all.

Measured on three searches (BF1, seeds 0 and 1, 136 and 80 candidates; BIoU, seed 1, 140):

    covariance              gradients  floor     each run, and their mean
    exp(-d^2 / 2 l^2)       unit       median   -0.31 0.65   -0.87 0.81   -1.46 0.59   -0.88 0.68
    exp(-d / l)             unit       median   -0.33 0.65   -1.08 0.82   -1.46 0.56   -0.96 0.68
    (1 + d^2 / l^2)^(-1/2)  unit       median   -0.33 0.67   -0.92 0.82   -1.44 0.59   -0.90 0.69
    exp(-d^2 / 2 l^2)       bounded    median   -0.37 0.64   -0.85 0.81   -1.48 0.64   -0.90 0.69
    exp(-d / l)             bounded    median   -0.42 0.64   -0.95 0.83   -1.32 0.70   -0.90 0.72
    (1 + d^2 / l^2)^(-1/2)  bounded    median   -0.37 0.64   -0.78 0.80   -1.37 0.68   -0.84 0.71
    (1 + d^2 / l^2)^(-1/2)  bounded    0.70     -2.10 0.06   -1.16 0.87   -2.34 0.41   -1.86 0.45
    (1 + d^2 / l^2)^(-1/2)  bounded    0.90     -1.40 0.47   -0.99 0.85   -2.06 0.51   -1.49 0.61
    (1 + d^2 / l^2)^(-1/2)  bounded    0.96     -0.79 0.61   -0.80 0.83   -1.81 0.57   -1.13 0.67

With a floor of .7 of the baseline, as it was in these three, the search for BF1 with seed 0 found nothing; with the
median, as many trainings found a loss ahead by .024 (.003) on test. For BIoU, seed 1, +.004 (.002) became BIOUGAIN.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent.parent)]
from bench_proxy import spearman  # noqa: E402

import evolve  # noqa: E402
import search_seg  # noqa: E402
from loss_ops import parse  # noqa: E402

LENGTHS, NOISES = (0.2, 0.4, 0.7, 1.2, 2.0, 4.0), (0.001, 0.005, 0.02, 0.1)
COVARIANCES = {
    "exp(-d^2 / 2 l^2)": lambda squared, length: (-squared / (2 * length**2)).exp(),
    "exp(-d / l)": lambda squared, length: (-squared.sqrt() / length).exp(),
    "(1 + d^2 / l^2)^(-1/2)": lambda squared, length: (1 + squared / length**2).rsqrt(),
}


def unit(branch: evolve.Branch, slope: Tensor) -> Tensor:
    return slope / slope.norm(dim=-1, keepdim=True).clamp(min=1e-300)


def left_out(covariance, squared: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The error of each prediction, and its standard deviation."""
    best = (-math.inf, None)
    for length in LENGTHS:
        for noise in NOISES:
            matrix = covariance(squared, length) + noise * torch.eye(len(values), dtype=torch.float64)
            factor = torch.linalg.cholesky(matrix)
            weights = torch.cholesky_solve(values[:, None], factor)[:, 0]
            variance = values @ weights / len(values)
            evidence = -(len(values) / 2 * variance.log() + factor.diagonal().log().sum()).item()
            precision = torch.cholesky_inverse(factor).diagonal() / variance
            best = max(best, (evidence, (weights / variance / precision, precision.rsqrt())), key=lambda pair: pair[0])
    return best[1]


def quality(covariance, squared: Tensor, scores: Tensor, floor: float) -> tuple[float, float]:
    """Of the better half: mean log density, and rank correlation."""
    values = scores.clamp(min=floor)
    error, deviation = (
        values.std() * x for x in left_out(covariance, squared, (values - values.mean()) / values.std())
    )
    better = scores >= scores.median()
    density = -(deviation.log() + (error / deviation) ** 2 / 2 + math.log(2 * math.pi) / 2)
    return density[better].mean().item(), spearman((values - error)[better].tolist(), scores[better].tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    torch.set_num_threads(1)
    table: dict[tuple[str, str, str], list] = {}
    for run in parser.parse_args().runs:
        flags = json.loads((run / "args.json").read_text())["arguments"]
        argv = ["--metric", flags["metric"], "--seed", str(flags["seed"]), "--device", "cpu"]
        task = search_seg.SegTask(search_seg.parse_arguments(argv))
        task.load()
        task.prepare(run / "base.pt")
        (branch,) = task.branches.values()
        records = [json.loads(line) for line in (run / "journal-0.jsonl").read_text().splitlines()]
        baseline = next(record["baseline"] for record in records if "baseline" in record)
        rows = [record for record in records if record.get("score") is not None and "losses" in record]
        slopes = [evolve.gradients(branch, [parse(row["losses"]["loss"])])[0] for row in rows]
        scores = torch.tensor([100 * row["score"] / baseline for row in rows], dtype=torch.float64)
        floors = {"median": scores.median().item()} | {f"{share:.2f}": 100 * share for share in (0.7, 0.9, 0.96)}
        for name, describe in {"unit": unit, "bounded": evolve.bounded}.items():
            fields = torch.stack([describe(branch, slope) for slope in slopes])  # (n, S, B, D)
            points = fields.flatten(1)[:, None] / math.prod(fields.shape[1:3]) ** 0.5
            squared = evolve.squared_distances(points, points)[0]  # the mean over states and samples
            for text, covariance in COVARIANCES.items():
                table.setdefault((text, name, "median"), []).append(
                    quality(covariance, squared, scores, floors["median"])
                )
        for floor in list(floors)[1:]:  # of what came last in the two loops
            table.setdefault((text, name, floor), []).append(quality(covariance, squared, scores, floors[floor]))
    print(f"{'covariance':<24}{'gradients':<11}{'floor':<8}  each run, and their mean")
    for row, pairs in table.items():
        pairs = [*pairs, tuple(sum(column) / len(pairs) for column in zip(*pairs))]
        cells = "  ".join(f"{density:>6.2f} {correlation:>4.2f}" for density, correlation in pairs)
        print(f"{row[0]:<24}{row[1]:<11}{row[2]:<8}{cells}", flush=True)


if __name__ == "__main__":
    main()
