"""How much is the proxy's ranking worth? Rank correlation of short trainings with long ones.

    python tests/bench_proxy.py [--table FILE]          # 25 minutes of one core; FILE keeps what is done

Losses of all qualities (fast and slow starters, hand-made and evolved ones) are trained by each proxy and, with two
seeds, by long trainings (600 steps, other weights and batches). All are scored on the search-validation split
of the embedded data. Shown: Spearman's rank correlation over all losses, and over the better half of them.

Measured (two cores of an AMD EPYC, torch 2.14.1):

    Spearman, all and the better half         s        miou       fwiou        macc        gacc        biou         bf1
    80 from scratch                         1.4   0.76 0.28   0.74 0.56   0.91 0.78   0.76 0.51   0.64 0.44   0.72 0.48
    160 from scratch                        2.6   0.82 0.43   0.81 0.69   0.94 0.84   0.81 0.62   0.79 0.57   0.78 0.44
    100 + 80                                1.4   0.80 0.44   0.82 0.62   0.93 0.82   0.81 0.58   0.78 0.36   0.78 0.47
    100 + 120                               2.0   0.92 0.62   0.91 0.73   0.97 0.89   0.87 0.70   0.91 0.59   0.88 0.59
    100 + 120, no warm-up                   2.1   0.87 0.40   0.87 0.61   0.96 0.87   0.88 0.59   0.85 0.40   0.87 0.59
    250 + 80                                1.5   0.93 0.75   0.88 0.65   0.97 0.87   0.81 0.46   0.89 0.43   0.84 0.60
    80 from scratch and 250 + 80            2.9   0.87 0.41   0.85 0.64   0.96 0.82   0.80 0.61   0.83 0.47   0.82 0.50
    160 from scratch and 250 + 80           4.1   0.88 0.53   0.90 0.74   0.96 0.84   0.87 0.65   0.88 0.70   0.82 0.49
    one long training against the other     9.5   0.97 0.91   0.94 0.75   0.98 0.92   0.95 0.73   0.98 0.93   0.94 0.66

A base of 100 steps is early enough to tell losses that cannot teach (two witnesses in one training), and late enough to
take the advantage from those that only start fast. Among the better half two long trainings agree at .66 to .93.
"""

import argparse
import copy
import itertools
import json
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
# Steps of cross entropy before (as of a long training), steps of the loss itself, share of these that warm up.
PROXIES = {
    "80 from scratch": (0, 80, 0.3),
    "160 from scratch": (0, 160, 0.3),
    "100 + 80": (100, 80, 0.3),
    "100 + 120": (100, 120, 0.3),
    "100 + 120, no warm-up": (100, 120, 0.0),
    "250 + 80": (250, 80, 0.3),
}
MIXTURES = (("80 from scratch", "250 + 80"), ("160 from scratch", "250 + 80"))  # mean of two scores
LONG = ("long, seed 0", "long, seed 1")


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


def show_ranking(task, losses: dict, proxies: list[str]) -> None:
    """For the other tasks: proxies such as "100+80", steps of the base and of the loss, against one long training."""
    table, spent = {}, {}
    for proxy in ("long", *proxies):
        if proxy != "long":
            base, steps = map(int, proxy.split("+"))
            task.proxy = task.proxy._replace(base=base, steps=steps)
            vars(task).pop("proxy_batches", None)
            with tempfile.TemporaryDirectory() as folder:
                task.prepare(Path(folder) / "base.pt")
        start = time.process_time()
        for name, loss in losses.items():
            try:
                table[proxy, name] = (
                    task.retrain(loss, 0, task.long)["val"] if proxy == "long" else task.proxy_scores(loss)
                )
            except evolve.InvalidLoss:
                table[proxy, name] = dict.fromkeys(task.metrics, 0.0)
            print(f"{proxy:<12}" + " ".join(f"{value:.3f}" for value in table[proxy, name].values()), name, flush=True)
        spent[proxy] = (time.process_time() - start) / len(losses)
    print(f"\n{'Spearman, all and the better half':<36}{'s':>7}" + "".join(f"{m:>12}" for m in task.metrics))
    for proxy in proxies:
        cells = ""
        for metric in task.metrics:
            cells += f"{correlations(*([table[p, name][metric] for name in losses] for p in (proxy, 'long'))):>12}"
        print(f"{proxy:<36}{spent[proxy]:>7.1f}{cells}")
    print(f"{len(losses)} losses; a long training takes {spent['long']:.1f} s; s is the processor's time")


class Bench:
    def __init__(self, table: Path | None):
        self.task = search_seg.SegTask(search_seg.parse_arguments([]))
        self.task.load()
        self.long = self.task.retraining._replace(steps=round(search_seg.LONG * self.task.retraining.steps))
        self.table, self.done, self.bases = table, {}, {}
        if table and table.exists():
            for line in table.read_text().splitlines():
                entry = json.loads(line)
                self.done[entry["proxy"], entry["loss"]] = entry

    def base(self, steps: int) -> torch.nn.Module:
        """The network after so many steps of the baseline's loss, as SegTask.train_base makes it."""
        if steps not in self.bases:
            plan = self.long
            net = self.task.network(plan, 0)
            batches = itertools.islice(self.task.batches("ce", plan, 500), steps)
            search_seg.train_network(net, search_seg.ce, batches, plan)
            self.bases[steps] = net
        return copy.deepcopy(self.bases[steps])

    def score(self, proxy: str, loss: str) -> dict:
        """All metrics, and seconds; kept in the table."""
        if (proxy, loss) in self.done:
            return self.done[proxy, loss]
        losses, start = search_seg.read_loss(loss, "--loss"), time.time()
        if proxy in LONG:
            plan, seed = self.long, 1000 + LONG.index(proxy)
            net = self.task.network(plan, seed)
        else:
            before, steps, warmup = PROXIES[proxy]
            plan, seed = search_seg.PROXY["shapes"]._replace(steps=steps, warmup=warmup), 0
            net = self.base(before)
        try:
            search_seg.train_network(net, self.task.loss(losses), self.task.batches(losses, plan, seed), plan)
            scores = search_seg.test_network(net, self.task.data["val"], 7, "cpu")
        except search_seg.InvalidLoss:
            scores = dict.fromkeys(search_seg.METRICS, 0.0)
        entry = {"proxy": proxy, "loss": loss, "seconds": round(time.time() - start, 1), **scores}
        self.done[proxy, loss] = entry
        if self.table:
            with self.table.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(args.table)
    for loss in LOSSES:
        entries = [bench.score(name, loss) for name in (*LONG, *PROXIES)]
        print(" ".join(f"{entry['miou']:.3f}" for entry in entries), loss, flush=True)

    def column(names: tuple[str, ...], metric: str) -> list[float]:
        return [sum(bench.done[name, loss][metric] for name in names) / len(names) for loss in LOSSES]

    def row(name: str, names: tuple[str, ...], wanted: tuple[str, ...]) -> None:
        cells = []
        for metric in search_seg.METRICS:
            cells.append(correlations(column(names, metric), column(wanted, metric)))
        seconds = sum(bench.done[n, loss]["seconds"] for n in names for loss in LOSSES) / len(LOSSES)
        print(f"{name:<36}{seconds:>7.1f}" + "".join(f"{cell:>12}" for cell in cells))

    print(f"\n{'Spearman, all and the better half':<36}{'s':>7}" + "".join(f"{m:>12}" for m in search_seg.METRICS))
    for name in PROXIES:
        row(name, (name,), LONG)
    for names in MIXTURES:
        row(" and ".join(names), names, LONG)
    row("one long training against the other", LONG[:1], LONG[1:])
    print(f"{len(LOSSES)} losses; the proxy of search_seg.py is 100 + 120")


if __name__ == "__main__":
    main()
