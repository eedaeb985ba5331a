"""Does the surrogate of one search know a good loss of another when it sees one?

    python tests/bench_surrogate.py RUN_DIR RUN_DIR ...    # runs of search_seg.py on the embedded data

Within one search most losses are relatives, and any model foretells them. What a search lives by is what it expects of
strangers. So, for every run, the surrogate learns its first 40, 80 and 130 trainings and is asked about losses of other
runs: those that were re-trained, good ones mostly (their worth: by how much they were ahead of cross entropy), and as
many that were bad in searches for the same metric (a proxy score .03 below the baseline's).

Bad: how many of the ten most promising are bad. Ten: where these ten stand among the good ones, from 0 to 1, the bad at
0. Good: where the ten most promising of the good stand. Rank: Spearman's correlation over the good. By chance it would
be 5.0, .25, .50 and 0. Nothing is trained.

Measured on thirteen searches (BF1, seeds 0 to 3 and 3 again; BIoU, seeds 0, 1 and 0 again; mAcc, seeds 0 and 1; FWIoU;
mIoU twice; the mean over those that went so far), 208 losses that had been trained for 600 steps:

                           after    bad    ten   good   rank
    scores as they are        40   1.83   0.47   0.55   0.06
    scores as they are        80   1.58   0.44   0.54   0.02
    scores as they are       130   1.36   0.52   0.61   0.07
    knee 1                    40   1.58   0.49   0.57   0.12
    knee 1                    80   1.17   0.54   0.61   0.11
    knee 1                   130   1.09   0.61   0.68   0.15
    knee .1                   40   1.42   0.49   0.57   0.15
    knee .1                   80   1.67   0.44   0.55   0.16
    knee .1                  130   2.64   0.46   0.62   0.16
    unit gradients            40   1.08   0.46   0.51   0.06
    unit gradients            80   1.58   0.43   0.52   0.08
    unit gradients           130   0.45   0.51   0.55   0.08
    no linear part            40   1.75   0.49   0.59   0.12
    no linear part            80   3.42   0.40   0.65   0.18
    no linear part           130   3.73   0.38   0.65   0.21
    linear                    40   2.83   0.40   0.57   0.17
    linear                    80   3.58   0.40   0.63   0.19
    linear                   130   2.82   0.43   0.62   0.14
    evolve.Surrogate          40   1.75   0.47   0.57   0.15
    evolve.Surrogate          80   1.50   0.53   0.62   0.14
    evolve.Surrogate         130   1.45   0.52   0.60   0.15

With the scores as they are it ranks the good ones hardly better than chance; what separates 0.1, 0.3 and 1 (`KNEE`) is
within the noise of a dozen searches.
"""

import argparse
import collections
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

AFTER = (40, 80, 130)  # trainings
BAD = 0.03  # below the baseline


class Linear(evolve.Surrogate):
    """Next to nothing but a linear part."""

    TRENDS = (100.0,)


class Plain(evolve.Surrogate):
    """No linear part."""

    TRENDS = (0.0,)


class Unit(evolve.Surrogate):
    """Of unit gradients as they are, without the bound of `evolve.bounded`."""

    def point(self, task, losses, trees=()):
        bounded = evolve.bounded
        evolve.bounded = lambda branch, slope: slope / slope.norm(dim=-1, keepdim=True).clamp(min=1e-300)
        try:
            return super().point(task, losses, trees)
        finally:
            evolve.bounded = bounded


class Scores(evolve.Surrogate):
    """Of scores as they are."""

    KNEE = 1e6


class Less(evolve.Surrogate):
    """Bad scores are compressed less ..."""

    KNEE = 1.0


class More(evolve.Surrogate):
    """... and more."""

    KNEE = 0.1


KINDS = {
    "scores as they are": Scores,
    "knee 1": Less,
    "knee .1": More,
    "unit gradients": Unit,
    "no linear part": Plain,
    "linear": Linear,
    "evolve.Surrogate": evolve.Surrogate,
}


def records(run: Path) -> list[dict]:
    lines = (json.loads(line) for path in sorted(run.glob("journal-*.jsonl")) for line in path.open())
    return sorted(lines, key=lambda record: record["elapsed"])


def worths(runs: list[list[dict]]) -> dict[str, dict[str, float]]:
    """By how much the re-trainings of losses were ahead of cross entropy's, on search-validation: mean by metric."""
    found = collections.defaultdict(list)
    for record in (record for run in runs for record in run if record.get("scores")):
        found[evolve.losses_text(record["retrained"])].append(record["scores"]["val"])
    means = {
        text: {m: statistics.fmean(s[m] for s in every) for m in search_seg.METRICS} for text, every in found.items()
    }
    baseline = means.pop("ce")
    return {text: {metric: mean[metric] - baseline[metric] for metric in baseline} for text, mean in means.items()}


class World:
    """One run: its task, its records, and the losses that it has seen."""

    def __init__(self, run: Path):
        flags = json.loads((run / "args.json").read_text())["arguments"]
        self.metric = flags["metric"]
        argv = ["--metric", self.metric, "--seed", str(flags["seed"]), "--device", "cpu"]
        self.args = search_seg.parse_arguments(argv)
        self.task = search_seg.SegTask(self.args)
        self.task.load()
        self.task.prepare(run / "base.pt")
        self.records = records(run)
        self.scores = {r["losses"]["loss"]: r["score"] for r in self.records if "turn" in r}
        (self.baseline,) = (record["baseline"] for record in self.records if "baseline" in record)
        self.points: dict[tuple, torch.Tensor] = {}  # of strangers

    def bad(self) -> list[str]:
        return [text for text, score in self.scores.items() if score is None or score < self.baseline - BAD]

    def point(self, guide: evolve.Surrogate, text: str) -> torch.Tensor:
        key = type(guide).point, text
        if key not in self.points:
            self.points[key] = guide.point(self.task, {"loss": parse(text)})
        return self.points[key]

    def ask(self, guide: evolve.Surrogate, good: dict[str, float], bad: list[str], number: int) -> tuple[float, ...]:
        """What the surrogate makes of the first trainings, and of these strangers after them."""
        state = evolve.make_state(self.args, self.task)
        for record in self.records:
            if state.evaluated < number:
                state.absorb(record)
        guide.fit(state, [], whole=True)
        mean, deviation = guide.predict(torch.stack([self.point(guide, text) for text in (*good, *bad)]))
        promise = evolve.expected_improvement(mean, evolve.UPWARDS * deviation, guide.best)
        order, worth = promise.argsort(descending=True).tolist(), list(good.values())
        place = [sum(other < value for other in worth) / len(worth) for value in worth] + [0.0] * len(bad)
        return (
            sum(k >= len(good) for k in order[:10]),
            statistics.fmean(place[k] for k in order[:10]),
            statistics.fmean(place[k] for k in [k for k in order if k < len(good)][:10]),
            spearman(mean[: len(good)].tolist(), worth),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    args = parser.parse_args()
    torch.set_num_threads(1)
    worlds = [World(run) for run in args.runs]
    again = worths([world.records for world in worlds])
    print(f"{'':<22}{'after':>6}{'bad':>7}{'ten':>7}{'good':>7}{'rank':>7}")
    for kind, make in KINDS.items():
        for number in AFTER:
            rows = []
            for world in worlds:
                good = {text: worth[world.metric] for text, worth in again.items() if text not in world.scores}
                bad = [t for w in worlds if w is not world and w.metric == world.metric for t in w.bad()]
                bad = [text for text in dict.fromkeys(bad) if text not in world.scores and text not in good]
                if bad and len(world.scores) >= number:
                    bad = random.Random(0).sample(bad, min(len(bad), len(good)))
                    rows.append(world.ask(make(), good, bad, number))
            if rows:
                numbers = "".join(f"{statistics.fmean(column):>7.2f}" for column in zip(*rows))
                print(f"{kind:<22}{number:>6}{numbers}", flush=True)
    print(f"{len(worlds)} searches, {len(again)} losses re-trained")


if __name__ == "__main__":
    main()
