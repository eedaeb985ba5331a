"""What describes a loss best? How likely the surrogate finds each proxy score without having seen it.

    python tests/bench_surrogate.py RUN_DIR ...        # runs of search_seg.py on the embedded data, by one worker

For every run: log density of each standardised score, left out, given all others (nats, the mean over candidates;
Rasmussen and Williams 2006, Eqs. 5.10-5.12), under the length and noise of greatest marginal likelihood. Rows: the
covariance as a function of the distance of two gradients, and what distance means: of unit gradients, or bounded ones.

Measured on seven searches for mIoU and BIoU (70 to 93 candidates each):

    covariance              gradients    each run, and their mean
    exp(-d^2 / 2 l^2)       unit        -0.42  -0.82  -0.69  -0.82  -0.82  -0.71  -0.38  -0.67
    exp(-d / l)             unit        -0.35  -0.76  -0.63  -0.72  -0.72  -0.71  -0.37  -0.61
    (1 + d^2 / l^2)^(-1/2)  unit        -0.30  -0.74  -0.61  -0.65  -0.77  -0.59  -0.22  -0.56
    exp(-d^2 / 2 l^2)       bounded     -0.20  -0.61  -0.63  -0.70  -0.69  -0.70  -0.44  -0.57
    exp(-d / l)             bounded     -0.20  -0.58  -0.49  -0.61  -0.53  -0.71  -0.37  -0.50
    (1 + d^2 / l^2)^(-1/2)  bounded     -0.17  -0.51  -0.47  -0.57  -0.52  -0.57  -0.25  -0.44
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
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


def left_out(covariance, squared: Tensor, values: Tensor) -> float:
    best = (-torch.inf, 0.0)
    for length in LENGTHS:
        for noise in NOISES:
            matrix = covariance(squared, length) + noise * torch.eye(len(values), dtype=torch.float64)
            factor = torch.linalg.cholesky(matrix)
            weights = torch.cholesky_solve(values[:, None], factor)[:, 0]
            variance = values @ weights / len(values)
            evidence = -(len(values) / 2 * variance.log() + factor.diagonal().log().sum()).item()
            precision = torch.cholesky_inverse(factor).diagonal() / variance
            error = weights / variance / precision
            density = (precision.log() - precision * error**2).mean().item() / 2 - math.log(2 * math.pi) / 2
            best = max(best, (evidence, density))
    return best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    torch.set_num_threads(1)
    table: dict[tuple[str, str], list[float]] = {}
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
        values = torch.tensor([row["score"] for row in rows], dtype=torch.float64).clamp(min=0.7 * baseline)
        values = (values - values.mean()) / values.std()
        for name, describe in {"unit": unit, "bounded": evolve.bounded}.items():
            fields = torch.stack([describe(branch, slope) for slope in slopes])  # (n, S, B, D)
            points = fields.flatten(1)[:, None] / math.prod(fields.shape[1:3]) ** 0.5
            squared = evolve.squared_distances(points, points)[0]  # the mean over states and samples
            for text, covariance in COVARIANCES.items():
                table.setdefault((text, name), []).append(left_out(covariance, squared, values))
    print(f"{'covariance':<24}{'gradients':<10}   each run, and their mean")
    for (text, name), numbers in table.items():
        cells = "".join(f"{number:>7.2f}" for number in [*numbers, sum(numbers) / len(numbers)])
        print(f"{text:<24}{name:<10}{cells}")


if __name__ == "__main__":
    main()
