"""What describes a loss best? How likely the surrogate finds each proxy score without having seen it.

    python tests/bench_surrogate.py RUN_DIR ...        # runs of search_seg.py on the embedded data, by one worker

For every run: log density of each score of the better half, left out, given all others, in hundredths of the baseline's
score (nats, the mean over candidates; Rasmussen and Williams 2006, Eqs. 5.10-5.12), under the length and noise of
greatest marginal likelihood; and Spearman's correlation of what is predicted with what came out among them. Rows: the
covariance as a function of the distance of two gradients; what distance means, of unit gradients or bounded ones; and
what becomes of scores below a knee: all of them count as that (`cut`, at a share of the baseline's or at the median of
all), or they are on a logarithmic scale below the median (`log`, see `evolve.compressed`). `bad`: what improvement the
surrogate expects, left out, of losses five hundredths behind the baseline, over what it expects of the better half.

Measured on five searches (BF1, seed 0, once with the last row and once with `cut, median`; with that BIoU, seed 1, and
mIoU, seeds 0 and 1; 136 to 140 candidates each), only the means:

    covariance              gradients  below        density  correlation  bad
    exp(-d^2 / 2 l^2)       unit       log, median    -0.79         0.69  0.13
    exp(-d / l)             unit       log, median    -0.33         0.84  0.04
    (1 + d^2 / l^2)^(-1/2)  unit       log, median    -0.44         0.82  0.10
    exp(-d^2 / 2 l^2)       bounded    log, median    -0.45         0.78  5.27
    exp(-d / l)             bounded    log, median    -0.30         0.83  0.10
    (1 + d^2 / l^2)^(-1/2)  bounded    log, median    -0.22         0.83  0.16
    (1 + d^2 / l^2)^(-1/2)  bounded    cut, median    -0.25         0.84  0.32
    (1 + d^2 / l^2)^(-1/2)  bounded    cut, 0.96      -0.29         0.83  0.09
    (1 + d^2 / l^2)^(-1/2)  bounded    cut, 0.70      -0.98         0.67  0.11
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


def quality(covariance, squared: Tensor, scores: Tensor, values: Tensor) -> tuple[float, float, float]:
    """Of the better half: mean log density, rank correlation; and the improvement expected of bad losses over its."""
    error, deviation = (
        values.std() * x for x in left_out(covariance, squared, (values - values.mean()) / values.std())
    )
    better, bad = scores >= scores.median(), scores < 95
    density = -(deviation.log() + (error / deviation) ** 2 / 2 + math.log(2 * math.pi) / 2)
    expected = evolve.expected_improvement(values - error, deviation, scores.max())
    hope = (expected[bad].mean() / expected[better].mean()).item() if bad.any() else 0.0
    return density[better].mean().item(), spearman((values - error)[better].tolist(), scores[better].tolist()), hope


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
        knee = scores.median().item()
        warped = {
            "log, median": evolve.compressed(scores, knee, (scores.max().item() - knee) / 4),
            "cut, median": scores.clamp(min=knee),
            "cut, 0.96": scores.clamp(min=96),
            "cut, 0.70": scores.clamp(min=70),
        }
        for name, describe in {"unit": unit, "bounded": evolve.bounded}.items():
            fields = torch.stack([describe(branch, slope) for slope in slopes])  # (n, S, B, D)
            points = fields.flatten(1)[:, None] / math.prod(fields.shape[1:3]) ** 0.5
            squared = evolve.squared_distances(points, points)[0]  # the mean over states and samples
            for text, covariance in COVARIANCES.items():
                row = quality(covariance, squared, scores, warped["log, median"])
                table.setdefault((text, name, "log, median"), []).append(row)
        for kind in list(warped)[1:]:  # of what came last in the two loops
            table.setdefault((text, name, kind), []).append(quality(covariance, squared, scores, warped[kind]))
    print(f"{'covariance':<24}{'gradients':<11}{'below':<13}  each run: density, correlation, bad; and the mean")
    for row, several in table.items():
        several = [*several, tuple(sum(column) / len(several) for column in zip(*several))]
        cells = "  ".join(f"{density:>5.2f} {correlation:>4.2f} {hope:>4.2f}" for density, correlation, hope in several)
        print(f"{row[0]:<24}{row[1]:<11}{row[2]:<13}{cells}", flush=True)


if __name__ == "__main__":
    main()
