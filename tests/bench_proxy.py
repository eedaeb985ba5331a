"""How much is the proxy's ranking worth? Rank correlation of short trainings with re-trainings.

    python tests/bench_proxy.py --seeds 1 [--table FILE]     # an hour and a half of one core; FILE keeps what is done
    python tests/bench_proxy.py --runs RUN_DIR RUN_DIR ...   # of what these runs have found; half a minute for each

Losses of all qualities (fast and slow starters, hand-made ones, found ones) are trained by each proxy and, with so many
seeds, by re-trainings (2,400 steps, other weights and batches). All are scored on the search-validation split of the
embedded data. Shown: Spearman's rank correlation over all losses, and over the better half of them.

Measured (AMD EPYC, torch 2.14.1, one seed; `600 from scratch` begins with the weights and batches of the re-training):

    Spearman, all and the better half         s        miou       fwiou        macc        gacc        biou         bf1
    600 from scratch                       14.4   0.95 0.93   0.94 0.78   0.97 0.94   0.94 0.77   0.96 0.93   0.93 0.82
    100 of 600, then 120                    2.7   0.91 0.84   0.94 0.92   0.94 0.82   0.93 0.92   0.90 0.82   0.88 0.75
    100 of 600, then 240                    5.3   0.93 0.89   0.94 0.83   0.96 0.89   0.93 0.81   0.94 0.89   0.91 0.85
    250 of 600, then 80                     1.9   0.93 0.89   0.94 0.92   0.97 0.82   0.92 0.88   0.89 0.78   0.89 0.78
    250 of 600, then 120                    2.8   0.93 0.90   0.93 0.90   0.97 0.83   0.92 0.87   0.94 0.89   0.88 0.80
    400 of 600, then 120                    2.8   0.89 0.87   0.88 0.89   0.94 0.83   0.86 0.83   0.88 0.82   0.80 0.79
    600 of 600, then 120                    2.7   0.90 0.86   0.90 0.89   0.94 0.86   0.90 0.82   0.89 0.83   0.79 0.77
    1200 of 2400, then 120                  2.7   0.84 0.78   0.89 0.89   0.89 0.82   0.88 0.82   0.83 0.80   0.67 0.67
    ... and 400 of 600, then 120            5.6   0.93 0.89   0.94 0.91   0.97 0.84   0.93 0.88   0.94 0.88   0.87 0.80
    ... and 600 of 600, then 120            5.5   0.93 0.89   0.94 0.91   0.97 0.86   0.93 0.88   0.94 0.88   0.86 0.80
    ... and 1200 of 2400, then 120          5.5   0.93 0.89   0.94 0.91   0.96 0.83   0.92 0.86   0.94 0.87   0.88 0.79

A later base adds nothing over such a list, but tells among the finalists of searches: see tests/RESULTS.md.

With --runs the losses are those that searches have found, and what counts is their lead over cross entropy on the test
split, the mean of the closing table's paired seeds: is what leads the most by proxy ahead the most in the end?
"""

import argparse
import copy
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import evolve  # noqa: E402
import search_seg  # noqa: E402

LOSSES = (
    "ce",
    "dice",
    "lovasz",
    "dpce",
    "asl(miou)",
    "asl(biou)",
    "asl(bf1)",
    "asl(macc)",
    "Square(Add(p, Neg(y)))",
    "Abs(Add(p, Neg(y)))",
    "Neg(Sqrt(MeanNHW(Mul(p, y))))",
    "Neg(Mul(MeanNHW(Mul(y, p)), Inv(MeanNHW(Add(y, p)))))",
    "Neg(Log(MeanNHW(Mul(y, p))))",
    "Square(Mul(y, Log(p)))",
    "Neg(Mul(y, Sqrt(p)))",
    "Mul(y, Exp(Neg(p)))",
    "Square(Add(MaxPool3(p), Neg(MaxPool3(y))))",
    "Neg(Mul(MaxPool3(y), Log(p)))",
    "Neg(Mul(Mul(y, Inv(MeanNHW(y))), Log(p)))",
    "Neg(Tanh(Mul(Add(y, y), p)))",
    "Mul(Square(Log(p)), Sqrt(MeanC(y)))",
    "Neg(Mul(MeanNHW(Mul(y, Sqrt(p))), Inv(MeanNHW(Add(y, p)))))",
    "Neg(Sqrt(MeanNHW(Mul(y, Log(p)))))",
    "MinPool3(Neg(Mul(Sqrt(Mul(y, p)), Inv(MeanNHW(Add(y, p))))))",
    "Sqrt(MeanNHW(Sqrt(Tanh(Tanh(Neg(Mul(y, p)))))))",
    "Sqrt(Inv(Mul(Add(Add(Tanh(MinPool3(y)), Sqrt(p)), Mul(Abs(MaxPool3(p)), "
    "Add(MinPool3(MinPool3(y)), p))), Abs(y))))",
    "Log(MeanNHW(Add(Inv(Mul(p, Add(Inv(Mul(y, 1)), y))), MinPool3(p))))",
    "Log(Inv(MeanNHW(Mul(y, Tanh(Mul(p, y))))))",
    "MinPool3(Log(Add(Add(1, p), Inv(Mul(y, p)))))",
    "Add(Inv(MaxPool3(Sqrt(MaxPool3(Mul(1, Mul(p, Tanh(y))))))), MaxPool3(p))",
    "Neg(Mul(Sqrt(Mul(y, p)), Inv(MeanNHW(Add(y, p)))))",
    "Neg(Sqrt(Mul(MeanNHW(Mul(y, p)), Inv(MeanNHW(Add(y, p))))))",
    "Neg(Mul(Mul(y, Inv(Sqrt(MeanNHW(y)))), Log(p)))",
    "Neg(Mul(Mul(y, Square(Add(1, Neg(p)))), Log(p)))",
    "Square(Square(Add(p, Neg(y))))",
    "Neg(Mul(Tanh(y), Exp(Sqrt(p))))",
)
FOUND = (  # by earlier searches, for several metrics
    "MaxPool3(Add(Log(Mul(Mul(y, Exp(y)), MeanC(MaxPool3(Square(Log(Mul(Mul(y, p), MeanC(MaxPool3(Mul(y, "
    "Sqrt(p))))))))))), MeanNHW(MinPool3(p))))",
    "Mul(Log(Inv(Add(Mul(p, Sqrt(Inv(Add(p, MaxPool3(Sqrt(Inv(MaxPool3(p)))))))), Neg(MinPool3(y))))), y)",
    "Log(Mul(Neg(y), Mul(MinPool3(Add(MaxPool3(Mul(Mul(y, Sqrt(p)), p)), y)), Add(MinPool3(Mul(p, "
    "Tanh(MaxPool3(y)))), y))))",
    "Log(Mul(Inv(Mul(p, Mul(p, y))), Add(MinPool3(Inv(y)), MaxPool3(Add(Exp(MinPool3(Log(Add(p, Neg(Add(y, "
    "Exp(Log(MaxPool3(p))))))))), Exp(p))))))",
    "Log(Mul(Neg(Add(MinPool3(y), Mul(Mul(Mul(Mul(p, y), Sqrt(p)), MaxPool3(Add(p, MinPool3(Add(y, p))))), p))), "
    "Sqrt(Sqrt(MaxPool3(MinPool3(p))))))",
    "Inv(Mul(Add(Add(Sqrt(Add(Add(MinPool3(Mul(y, Inv(Add(MeanC(MinPool3(p)), MaxPool3(p))))), Add(MeanC(Add(p, "
    "p)), p)), p)), p), p), y))",
    "Square(Mul(Log(Mul(p, y)), MinPool3(Mul(Exp(Add(Add(Exp(MinPool3(p)), Neg(y)), MaxPool3(MeanC(Mul(y, "
    "p))))), Tanh(Square(MaxPool3(Exp(p))))))))",
    "Log(Mul(y, Inv(Add(Mul(Add(p, Add(MinPool3(p), p)), p), MinPool3(y)))))",
    "Log(Mul(Mul(Inv(Add(Add(MaxPool3(p), MinPool3(Add(p, Mul(y, Inv(Mul(Inv(p), Square(p))))))), MeanC(y))), "
    "Inv(Mul(p, y))), MaxPool3(y)))",
    "Log(Mul(Add(p, Add(MinPool3(MinPool3(MaxPool3(y))), Mul(Mul(p, MinPool3(Inv(MinPool3(y)))), Sqrt(Add(p, "
    "Neg(MinPool3(y))))))), Neg(y)))",
    "Inv(Add(Add(Mul(Add(Mul(Add(y, 1), Sqrt(p)), Neg(p)), MaxPool3(y)), Mul(MeanNHW(MaxPool3(p)), Tanh(y))), "
    "Add(MaxPool3(y), Exp(y))))",
    "MaxPool3(Add(Mul(Tanh(Neg(y)), Add(Log(p), 1)), MinPool3(Add(Mul(Neg(y), Add(MeanNHW(p), 1)), Add(p, Exp(y))))))",
    "Inv(Add(Mul(Mul(Add(y, 1), Add(Sqrt(Add(p, MinPool3(Square(Mul(Square(p), y))))), Add(Mul(p, y), Neg(p)))), "
    "MaxPool3(y)), 1))",
    "MaxPool3(Add(Mul(Neg(y), Add(Log(p), Add(MeanNHW(p), Sqrt(p)))), MinPool3(MaxPool3(Add(Mul(Neg(y), "
    "MeanNHW(Square(p))), MinPool3(Add(Add(p, y), p)))))))",
    "Mul(Tanh(Log(MeanNHW(y))), Log(MaxPool3(Mul(Add(p, MinPool3(Add(y, MeanNHW(y)))), Mul(y, Add(p, 1))))))",
)
# Steps of cross entropy that go before, of a training of so many; steps of the loss; seed of weights and batches.
PROXIES = {
    "600 from scratch": (0, 1, 600, 1000),
    "100 of 600, then 120": (100, 600, 120, 0),
    "100 of 600, then 240": (100, 600, 240, 0),
    "250 of 600, then 80": (250, 600, 80, 0),
    "250 of 600, then 120": (250, 600, 120, 0),
    "400 of 600, then 120": (400, 600, 120, 0),
    "600 of 600, then 120": (600, 600, 120, 0),
    "1200 of 2400, then 120": (1200, 2400, 120, 0),
}
AGAIN = ("again, seed 0", "again, seed 1")  # re-trainings
# What is ahead of cross entropy by the first proxy has its lead by the second one added, as in `evolve.train_by_proxy`.
LATER = ("250 of 600, then 120", ("400 of 600, then 120", "600 of 600, then 120", "1200 of 2400, then 120"))


def ranks(values: list[float]) -> torch.Tensor:
    """Ranks with ties at their mean."""
    v = torch.tensor(values, dtype=torch.float64)
    return (v[:, None] > v).sum(1) + 0.5 * (v[:, None] == v).sum(1)


def spearman(a: list[float], b: list[float]) -> float:
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


def correlations(proxy: list[float], again: list[float]) -> str:
    """Over all losses, and over those that are the better half by `again`."""
    better = sorted(range(len(again)), key=lambda k: -again[k])[: (len(again) + 1) // 2]
    half = spearman([proxy[k] for k in better], [again[k] for k in better])
    return f"{spearman(proxy, again):.2f} {half:.2f}"


def with_leads(first: list[float], later: list[float], baseline: int) -> list[float]:
    """Scores by the first proxy, with the leads over the baseline by a later one of what is ahead by the first."""
    return [a + (b - later[baseline]) * (a > first[baseline]) for a, b in zip(first, later)]


def own_proxies(plan) -> list[str]:
    """The proxy of a script, as `show_ranking` takes it."""
    return [f"{base}/{plan.base_of}+{plan.steps}" for base in plan.base]


def show_ranking(task, losses: dict, proxies: list[str]) -> None:
    """For the other tasks: proxies such as "100/1200+80", steps of the base, of its training and of the loss.

    The leads by each of the others are added to the first one, too.
    """
    table, spent = {}, {}
    for proxy in ("again", *proxies):
        if proxy != "again":
            base, steps = proxy.split("+")
            base, _, of = base.partition("/")
            task.proxy = task.proxy._replace(base=(int(base),), base_of=int(of or 1), steps=int(steps))
            vars(task).pop("proxy_batches", None)
            with tempfile.TemporaryDirectory() as folder:
                task.prepare(Path(folder) / "base.pt")
        start = time.process_time()
        for name, loss in losses.items():
            try:
                table[proxy, name] = task.retrain(loss, 0)["val"] if proxy == "again" else task.proxy_scores(loss)
            except evolve.InvalidLoss:
                table[proxy, name] = dict.fromkeys(task.metrics, 0.0)
            print(f"{proxy:<16} " + " ".join(f"{value:.3f}" for value in table[proxy, name].values()), name, flush=True)
        spent[proxy] = (time.process_time() - start) / len(losses)
    print(f"\n{'Spearman, all and the better half':<36}{'s':>7}" + "".join(f"{m:>12}" for m in task.metrics))
    baseline = [*losses].index(task.baseline)
    for proxy in (*proxies, *(f"... and {later}" for later in proxies[1:])):
        cells, names = "", [proxies[0], proxy.removeprefix("... and ")] if proxy not in proxies else [proxy]
        for metric in task.metrics:
            again, *scores = ([table[p, name][metric] for name in losses] for p in ("again", *names))
            ranked = with_leads(*scores, baseline) if len(scores) == 2 else scores[0]
            cells += f"{correlations(ranked, again):>12}"
        print(f"{proxy:<36}{sum(spent[name] for name in names):>7.1f}{cells}")
    print(f"{len(losses)} losses; a re-training takes {spent['again']:.1f} s; s is the processor's time")


class Bench:
    def __init__(self, table: Path | None):
        self.task = search_seg.SegTask(search_seg.parse_arguments(["--device", "cpu"]))
        self.task.load()
        self.table, self.done, self.bases = table, {}, {}
        if table and table.exists():
            for line in table.read_text().splitlines():
                entry = json.loads(line)
                self.done[entry["proxy"], entry["loss"]] = entry

    def base(self, steps: int, of: int) -> torch.nn.Module:
        """The network after so many steps of the baseline's loss, as SegTask.train_base makes it."""
        if (steps, of) not in self.bases:
            plan = self.task.proxy._replace(steps=of)
            net = self.task.network(plan, 0)
            batches = itertools.islice(self.task.batches("ce", plan, 500), steps)
            search_seg.train_network(net, search_seg.ce, batches, plan)
            self.bases[steps, of] = net
        return copy.deepcopy(self.bases[steps, of])

    def score(self, proxy: str, loss: str) -> dict:
        """All metrics, and seconds of the processor; kept in the table."""
        if (proxy, loss) in self.done:
            return self.done[proxy, loss]
        losses, task = search_seg.read_loss(loss, "--loss"), self.task
        if proxy in AGAIN:
            plan, seed = task.retraining, 1000 + AGAIN.index(proxy)
            net = task.network(plan, seed)
        else:
            before, of, steps, seed = PROXIES[proxy]
            plan = task.proxy._replace(steps=steps)
            net = self.base(before, of) if before else task.network(plan, seed)
        start = time.process_time()
        try:
            search_seg.train_network(net, task.loss(losses), task.batches(losses, plan, seed), plan)
            scores = search_seg.test_network(net, task.data["val"], 7)
        except search_seg.InvalidLoss:
            scores = dict.fromkeys(search_seg.METRICS, 0.0)
        entry = {"proxy": proxy, "loss": loss, "seconds": round(time.process_time() - start, 1), **scores}
        self.done[proxy, loss] = entry
        if self.table:
            with self.table.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        return entry


def final_leads(run: Path) -> tuple[str, dict[str, float]] | None:
    """What a run has found, and how far it is ahead of cross entropy; None where its closing table is not complete."""
    scores = {}
    for record in (each for journal in run.glob("journal*.jsonl") for each in evolve.read_records(journal)[0]):
        if record.get("scores") and record["seed"] >= evolve.TABLE_SEEDS:
            loss = record["retrained"]
            scores.setdefault(loss if loss == "ce" else loss["loss"], {})[record["seed"]] = record["scores"]["test"]
    baseline = scores.pop("ce", {})
    for loss, by_seed in scores.items():
        if paired := by_seed.keys() & baseline.keys():
            leads = {m: statistics.mean(by_seed[s][m] - baseline[s][m] for s in paired) for m in search_seg.METRICS}
            return loss, leads
    return None


def show_found(bench: "Bench", runs: list[Path]) -> None:
    """How proxies rank what runs have found, against how their closing tables do."""
    found = dict(filter(None, map(final_leads, runs)))
    lead = {
        (name, loss): {m: bench.score(name, loss)[m] - bench.score(name, "ce")[m] for m in search_seg.METRICS}
        for loss in found
        for name in PROXIES
    }
    print(f"{'Spearman, all and the better half':<52}" + "".join(f"{m:>12}" for m in search_seg.METRICS))
    for proxies in [(name,) for name in PROXIES] + [(LATER[0], name) for name in LATER[1]]:
        cells = ""
        for metric in search_seg.METRICS:
            ranked = [sum(lead[name, loss][metric] for name in proxies) for loss in found]
            cells += f"{correlations(ranked, [final[metric] for final in found.values()]):>12}"
        print(f"{' and '.join(proxies):<52}{cells}")
    print(f"{len(found)} losses of {len(runs)} runs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, nargs="+", default=[], metavar="RUN_DIR")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--seeds", type=int, choices=(1, 2), default=2, help="re-trainings of each loss")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench, losses, again = Bench(args.table), (*LOSSES, *FOUND), AGAIN[: args.seeds]
    if args.runs:
        return show_found(bench, args.runs)
    for loss in losses:
        entries = [bench.score(name, loss) for name in (*again, *PROXIES)]
        print(" ".join(f"{entry['miou']:.3f}" for entry in entries), loss, flush=True)

    def column(names: tuple[str, ...], metric: str) -> list[float]:
        return [sum(bench.done[name, loss][metric] for name in names) / len(names) for loss in losses]

    def row(name: str, wanted: tuple[str, ...], later: str = "") -> None:
        cells, names = [], [name, later] if later else [name]
        seconds = sum(bench.done[each, loss]["seconds"] for each in names for loss in losses) / len(losses)
        for metric in search_seg.METRICS:
            scores = column((name,), metric)
            if later:
                scores = with_leads(scores, column((later,), metric), losses.index("ce"))
            cells.append(correlations(scores, column(wanted, metric)))
        print(f"{f'... and {later}' if later else name:<36}{seconds:>7.1f}" + "".join(f"{cell:>12}" for cell in cells))

    print(f"\n{'Spearman, all and the better half':<36}{'s':>7}" + "".join(f"{m:>12}" for m in search_seg.METRICS))
    for name in PROXIES:
        row(name, again)
    first, others = LATER
    for later in others:
        row(first, again, later)
    if args.seeds == 2:
        row(AGAIN[0], AGAIN[1:])
    print(f"{len(losses)} losses; the proxy of search_seg.py is {first} and {others[1]}")


if __name__ == "__main__":
    main()
