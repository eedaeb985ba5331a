"""How well does the surrogate of one search foretell the scores of losses that other searches found?

    python tests/bench_surrogate.py RUN_DIR RUN_DIR ... --scores FILE    # runs of search_seg.py on the embedded data

Within one search most losses are relatives, and any model foretells them. What a search lives by is what it expects of
strangers. So, for every run, losses of the other runs (the eighty best of each, then those whose gradients have a
cosine of less than .985) are trained by this run's proxy; FILE keeps the scores. The surrogate learns the run's first
20, 40, 70 and 136 trainings, and is asked about those strangers that are farther than a cosine of .99 from all of them.

Rank: Spearman's correlation of what is expected with what came out, over all strangers and over the better half of
them. Ten: how many of the ten most promising are better than the best that the run had seen (by .002); by chance it
would be `chance`. Sure: error of what is expected of the better half, in the deviations that it claims (mean and
spread; it should be 0 and 1).

Measured on five searches (BF1, seeds 1 and 2; BIoU, seeds 0 and 1; mIoU, seed 1; 136 trainings each, by the surrogate
of the first row), 104 to 124 strangers each:

                                                   rank: all  better   ten  chance        sure
    (1 + d^2 / l^2)^(-1/2), knee at the median          0.63   -0.00   2.6     2.2  +2.1   1.1
    exp(-d^2 / l^2)                                     0.62    0.05   3.6     2.2  +1.1   0.7
    linear                                              0.68    0.16   3.5     2.2  +0.9   0.7
    exp(-d^2 / l^2) + linear, knee at the median        0.70    0.17   3.9     2.2  +1.4   1.1
    exp(-d^2 / l^2) + linear, unit gradients            0.65    0.07   4.6     2.2  +0.9   0.6
    exp(-d^2 / l^2) + linear (evolve.Surrogate)         0.71    0.17   4.7     2.2  +0.9   0.6
"""

import argparse
import json
import random
import statistics
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent)]
from bench_proxy import spearman  # noqa: E402

import evolve  # noqa: E402
import search_seg  # noqa: E402
from loss_ops import parse  # noqa: E402

AFTER = (20, 40, 70, 136)  # trainings
BEST, NUMBER = 80, 130  # losses of each other run, and of all of them


class Plain(evolve.Surrogate):
    """No linear part."""

    TRENDS = (0.0,)


class Mixed(Plain):
    """Squared exponentials of all lengths, as it was before; no linear part."""

    LENGTHS, KNEE = (0.2, 0.4, 0.7, 1.2, 2.0), 0.5

    def covariance(self, pairs, late, other):
        alike = (1 + pairs[0] / self.length**2).rsqrt()
        return alike.mean(0) * (1 + self.drift * late[:, None] * other)


class Median(evolve.Surrogate):
    KNEE = 0.5


class Linear(evolve.Surrogate):
    """Next to nothing but a linear part."""

    TRENDS = (100.0,)


class Unit(evolve.Surrogate):
    """Of unit gradients as they are, without the bound of `evolve.bounded`."""

    def point(self, task, losses, trees=()):
        bounded = evolve.bounded
        evolve.bounded = lambda branch, slope: slope / slope.norm(dim=-1, keepdim=True).clamp(min=1e-300)
        try:
            return super().point(task, losses, trees)
        finally:
            evolve.bounded = bounded


KINDS = {
    "(1 + d^2 / l^2)^(-1/2), knee at the median": Mixed,
    "exp(-d^2 / l^2)": Plain,
    "linear": Linear,
    "exp(-d^2 / l^2) + linear, knee at the median": Median,
    "exp(-d^2 / l^2) + linear, unit gradients": Unit,
    "exp(-d^2 / l^2) + linear (evolve.Surrogate)": evolve.Surrogate,
}


class World:
    """One run: its task, its records, and the strangers' scores in it."""

    def __init__(self, run: Path):
        self.flags = json.loads((run / "args.json").read_text())["arguments"]
        argv = ["--metric", self.flags["metric"], "--seed", str(self.flags["seed"]), "--device", "cpu"]
        self.args = search_seg.parse_arguments(argv)
        self.task = search_seg.SegTask(self.args)
        self.task.load()
        self.task.prepare(run / "base.pt")
        self.name, self.run = f"{self.flags['metric']}, {self.flags['seed']}", run
        (self.branch,) = self.task.branches.values()
        self.records = [json.loads(line) for line in (run / "journal-0.jsonl").read_text().splitlines()]

    def best(self) -> list[str]:
        scores = {r["losses"]["loss"]: r["score"] for r in self.records if r.get("score") is not None and "turn" in r}
        return sorted(scores, key=scores.get, reverse=True)[:BEST]

    def unlike(self, losses: list[str]) -> list[str]:
        """NUMBER of them, at random, of which no two have nearly the same gradient."""
        random.Random(0).shuffle(losses)
        chosen, points = [], []
        for text in dict.fromkeys(losses):
            point = evolve.Surrogate().point(self.task, {"loss": parse(text)})[0]
            if point.any() and all(point @ other < 0.985 * (point @ point) for other in points):
                chosen.append(text)
                points.append(point)
        return chosen[:NUMBER]

    def train(self, text: str) -> float | None:
        try:
            return self.task.train({"loss": parse(text)})
        except evolve.InvalidLoss:
            return None

    def ask(self, guide: evolve.Surrogate, scores: dict[str, float], number: int) -> tuple[float, ...]:
        """What the surrogate makes of the first trainings, and of these strangers after them."""
        state = evolve.make_state(self.args, self.task)
        for record in self.records:
            if state.evaluated < number:
                state.absorb(record)
        guide.fit(state, [])
        points = torch.stack([guide.point(self.task, {"loss": parse(text)}) for text in scores])
        far = evolve.squared_distances(points, guide.points)[0].amin(1) > 2 - 2 * 0.99
        points, texts = points[far], [text for text, keep in zip(scores, far) if keep]
        truth = torch.tensor([scores[text] for text in texts], dtype=torch.float64)
        mean, deviation = guide.predict(points, late=0.0)
        cost = torch.tensor([1 + 0.03 * len(evolve.nodes(parse(text))) for text in texts])
        order = (evolve.expected_improvement(mean, evolve.UPWARDS * deviation, guide.best) / cost).argsort(
            descending=True
        )
        better, ahead = truth >= truth.median(), truth > state.best().score + 0.002
        errors = (truth - torch.tensor(guide.scores(mean)))[better] / (deviation * guide.spread)[better]
        return (
            spearman(mean.tolist(), truth.tolist()),
            spearman(mean[better].tolist(), truth[better].tolist()),
            10 * ahead[order[:10]].double().mean().item(),
            10 * ahead.double().mean().item(),
            errors.mean().item(),
            errors.std().item(),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--scores", type=Path, required=True, help="file that keeps what is trained")
    args = parser.parse_args()
    torch.set_num_threads(1)
    worlds = [World(run) for run in args.runs]
    table = json.loads(args.scores.read_text()) if args.scores.exists() else {}
    for world in worlds:
        scores = table.setdefault(world.run.name, {})
        strangers = [text for other in worlds if other is not world for text in other.best()]
        for text in scores or world.unlike(strangers):
            if text not in scores:
                scores[text] = world.train(text)
        args.scores.write_text(json.dumps(table))
        print(f"{world.name}: {len(scores)} strangers", flush=True)
    print(f"{'':<46}{'rank: all':>10}{'better':>8}{'ten':>6}{'chance':>8}{'sure':>12}")
    for kind, make in KINDS.items():
        rows = []
        for world in worlds:
            scores = {text: score for text, score in table[world.run.name].items() if score is not None}
            rows += [world.ask(make(), scores, number) for number in AFTER]
        rank, better, ten, chance, mean, spread = (statistics.fmean(column) for column in zip(*rows))
        print(f"{kind:<46}{rank:>10.2f}{better:>8.2f}{ten:>6.1f}{chance:>8.1f}{mean:>+6.1f}{spread:>6.1f}", flush=True)


if __name__ == "__main__":
    main()
