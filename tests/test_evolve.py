"""The search, on a toy task that needs no data: mutations, gates, surrogate, state, journal, closing round, workers."""

import argparse
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Full, damaged, journal, open_on_full_disk, records, retrained
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils import tensorboard

import evolve
from evolve import Branch, Child, InvalidLoss, Member, Surrogate, Tried, Worker
from loss_ops import OPERATORS, Expr, canonical, evaluate, is_dead, parse

SYMBOLS = ("y", "p", "1")
CE = parse("Neg(Mul(y, Log(p)))")
PLANTED = "Neg(Mul(Sqrt(MeanNHW(y)), Mul(y, p)))"


def toy_branch(C=4, size=8, eta=0.6, states=2):
    """Samples at `states` states of a network that gets better."""
    g = torch.Generator().manual_seed(0)
    label = torch.randint(0, C, (5, size, size), generator=g)
    logits = 0.1 * torch.randn(5, 1, C, size, size, generator=g)
    onehot = F.one_hot(label, C).movedim(-1, 1).float().unsqueeze(1)
    return Branch(
        SYMBOLS,
        torch.stack([logits + k * onehot for k in range(states)]),
        onehot,
        lambda x, y: {"y": y.expand_as(x), "p": x.softmax(-3)},
        lambda x, y: (x.argmax(-3) == y.argmax(-3)).float().mean((-3, -2, -1)),
        eta,
        ideal=10 * onehot,
        known=("Neg(Mul(y, Log(p)))", "Abs(Add(p, Neg(y)))"),
    )


class ToyTask(evolve.Task):
    """The score of a loss is the cosine of its first gradient with that of a planted formula."""

    name, baseline, metrics = "toy", "ce", ("toy",)
    symbols = {name: SYMBOLS for name in ("loss", "cls", "reg", "one", "two")}

    def __init__(self, planted="Neg(Mul(y, p))", invalid=False, branches=("loss",), **branch):
        self.branches = {name: toy_branch(**branch) for name in branches}
        self.symbols = dict.fromkeys(branches, SYMBOLS)
        self.curve = [(0, 1.0)]
        self.invalid = invalid
        self.calls = []  # of `train` and `retrain`
        self.want = self.gradient(parse(planted))

    def load(self):
        pass

    def prepare(self, base):
        pass

    def gradient(self, expr):
        branch = next(iter(self.branches.values()))
        x = branch.prediction[0].clone().requires_grad_()
        value = evaluate(expr, branch.leaves(x, branch.target)).sum()
        return torch.autograd.grad(value, x)[0].flatten() if value.requires_grad else torch.zeros(x.numel())

    def score(self, losses):
        if isinstance(losses, str):
            return 0.5
        gradient = sum(self.gradient(expr) for expr in losses.values())
        if self.invalid or not gradient.isfinite().all():
            raise InvalidLoss("step 0")
        return round(F.cosine_similarity(gradient, self.want, dim=0).item(), 6)

    def train(self, losses, base=0):
        self.calls.append(evolve.losses_text(losses))
        return self.score(losses)

    def retrain(self, losses, seed, picture=None, checkpoint=None):
        self.calls.append(evolve.losses_text(losses))
        luck = random.Random(f"{self.calls[-1]} {seed}").random()
        score = self.score(losses) + 0.02 * luck
        return {"val": {"toy": score}, "test": {"toy": score}}

    def witness(self, losses, seed):
        return self.score(losses)

    def simulate(self, losses):
        try:
            return 2 * self.score(losses)
        except InvalidLoss:
            return 0.0

    def export(self, losses, title):
        return f"{title}\n{losses}"


@pytest.fixture(autouse=True)
def small_search(monkeypatch):
    monkeypatch.setattr(evolve, "POOL", 8)
    monkeypatch.setattr(evolve, "ATTEMPTS", 80)


def arguments(tmp_path, *argv):
    parser = evolve.Parser()
    evolve.add_search_flags(parser)
    args = parser.parse_args(["--runs", str(tmp_path), "--minutes", "5", "--workers", "1", *argv])
    args.metric, args.data, args.device, args.by_default = "toy", "none", "cpu", {}
    return args


def run(tmp_path, *argv, task=None, resume=None, **options):
    """A whole run in this process; its directory."""
    args = arguments(tmp_path, *argv)
    args.resume = resume
    evolve.run(args, task or ToyTask(**options))
    return resume or max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime)


def result_of(directory):
    return json.loads((directory / "result.json").read_text())


def begin(task, *argv, **fields):
    """The state of a search that has not begun."""
    state = evolve.make_state(arguments("", *argv), task)
    for name, value in fields.items():
        setattr(state, name, value)
    return state


def make_child(state, text, branch="loss"):
    expr = parse(text) if isinstance(text, str) else text
    return Child({branch: expr}, None, [state.tree(branch, expr)])


nobody = SimpleNamespace(works_on=lambda *what: None)  # a worker without a run directory


def explore(state, turns, guide=None, seed=0):
    """Some turns of a search without a run directory; the records."""
    found = []
    for turn in range(state.evaluated, state.evaluated + turns):
        rng = random.Random(f"{seed}/{turn}")
        fitted = guide and guide.fit(state, [])
        child = evolve.next_child(state, rng, fitted, math.inf)
        record = evolve.proxy_training(state, nobody, child) | {"worker": 0, "turn": turn, "elapsed": 0}
        found.append(json.loads(json.dumps(record)))
        state.absorb(found[-1])
    return found


def scored(state, scores, **more):
    """Absorb proxy trainings of losses as formulas, with these scores."""
    for text, score in scores.items():
        child = make_child(state, text)
        evolve.judge(state, child, evolve.CHEAP, tried := Tried())
        tried.close(state, child)
        record = evolve.proxy_training(state, nobody, child) | {
            "worker": 0,
            "turn": state.evaluated,
            "elapsed": 0,
            **more,
        }
        state.absorb({**json.loads(json.dumps(record)), "score": score})


STAMP = {"seconds": 0, "worker": 0, "elapsed": 0}


def again(state, text, *values, first=evolve.CHOICE_SEEDS):
    """Absorb re-trainings with these scores; None: invalid."""
    for k, value in enumerate(values):
        scores = value if value is None else {split: {"toy": value} for split in ("val", "test")}
        named = text if text == "ce" else {"loss": text}
        state.absorb(STAMP | {"retrained": named, "seed": first + k, "scores": scores})


# Trees and mutations


def test_random_trees_have_their_depth_and_use_everything():
    rng = random.Random(0)
    seen = set()
    for _ in range(2000):
        expr = evolve.random_tree(rng, SYMBOLS)
        node, depth = expr, 0
        while node.args:
            node, depth = node.args[-1], depth + 1
        assert depth == evolve.DEPTH
        seen |= {node.op for node in evolve.nodes(expr)}
    assert seen == set(OPERATORS) | set(SYMBOLS)


def counted(expr, operators=True):
    return sorted(node.op for node in evolve.nodes(expr) if bool(node.args) == operators)


def test_mutations_change_what_they_say():
    rng = random.Random(1)
    swapped = 0
    for _ in range(500):
        expr, other = evolve.random_tree(rng, SYMBOLS), evolve.random_tree(rng, SYMBOLS)
        count = len(evolve.nodes(expr))
        grown = evolve.insert(rng, expr, SYMBOLS)
        assert count < len(evolve.nodes(grown)) <= count + 2
        cut = evolve.delete(rng, expr, SYMBOLS)
        assert len(evolve.nodes(cut)) < count
        replaced = evolve.replace(rng, expr, SYMBOLS)
        assert replaced != expr and abs(len(evolve.nodes(replaced)) - count) < count
        leaf = evolve.exchange_leaf(rng, expr, SYMBOLS)
        pairs = list(zip(evolve.nodes(expr), evolve.nodes(leaf)))
        assert sum(one.op != two.op for one, two in pairs) == 1 and counted(leaf) == counted(expr)
        turned = evolve.swap(rng, expr, SYMBOLS)
        assert counted(turned) == counted(expr) and counted(turned, False) == counted(expr, False)
        swapped += turned != expr
        crossed = evolve.cross(rng, expr, other)
        places = [(k, node, part) for k, node in enumerate(evolve.nodes(expr)) for part in evolve.nodes(other)]
        assert any(
            crossed == evolve.replace_node(expr, k, new)
            for k, node, part in places
            for new in (part, Expr("Add", (node, part)), Expr("Mul", (node, part)))
        )
        combined = evolve.combine(rng, expr, SYMBOLS)
        assert count + 2 < len(evolve.nodes(combined)) and not Counter(counted(expr)) - Counter(counted(combined))
        for new in (grown, cut, replaced, leaf, turned, crossed, combined):
            assert all(len(n.args) == OPERATORS[n.op].arity for n in evolve.nodes(new) if n.args)
    assert swapped > 50


def test_swap_leaves_alone_what_has_no_two_sides():
    rng = random.Random(0)
    assert evolve.swap(rng, parse("p"), SYMBOLS) == parse("p")
    assert all(evolve.swap(rng, parse("Neg(Exp(p))"), SYMBOLS) == parse("Neg(Exp(p))") for _ in range(20))
    found = {str(evolve.swap(rng, parse("Add(Exp(y), Mul(p, 1))"), SYMBOLS)) for _ in range(200)}
    assert {"Add(Mul(p, 1), Exp(y))", "Add(Exp(p), Mul(y, 1))", "Add(Exp(Mul(p, 1)), y)"} <= found


KINDS = ("insert", "delete", "replace", "exchange_leaf", "swap", "combine")


def watch_mutations(monkeypatch, act):
    """Replace every kind of mutation by `act(kind, expr)`."""
    for name in KINDS:
        monkeypatch.setattr(evolve, name, lambda rng, expr, symbols, name=name: act(name, expr))


def test_mutations_are_equally_likely_and_up_to_three(monkeypatch):
    drawn, lengths = [], []
    watch_mutations(monkeypatch, lambda name, expr: drawn.append(name) or expr)
    rng = random.Random(3)
    for _ in range(3000):
        before = len(drawn)
        evolve.mutate(rng, CE, SYMBOLS)
        lengths.append(len(drawn) - before)
    assert all(0.14 < drawn.count(name) / len(drawn) < 0.19 for name in KINDS)
    assert {k: round(6 * lengths.count(k) / 3000) for k in set(lengths)} == {1: 3, 2: 2, 3: 1}


def test_some_children_have_a_second_parent(monkeypatch):
    crossed = []
    monkeypatch.setattr(evolve, "cross", lambda rng, expr, other: crossed.append(other) or expr)
    watch_mutations(monkeypatch, lambda name, expr: expr)
    rng, other = random.Random(3), parse("Exp(y)")
    for _ in range(3000):
        evolve.mutate(rng, CE, SYMBOLS, other)
    assert 0.12 < len(crossed) / (3000 * 10 / 6) < 0.18 and set(crossed) == {other}
    crossed.clear()
    evolve.mutate(rng, CE, SYMBOLS)
    assert not crossed


def test_a_leaf_can_only_grow(monkeypatch):
    drawn = []
    watch_mutations(monkeypatch, lambda name, expr: drawn.append(name) or expr)
    rng = random.Random(2)
    for _ in range(50):
        evolve.mutate(rng, parse("p"), SYMBOLS)
    assert set(drawn) == {"insert"}


def test_no_tree_outgrows_the_bound():
    rng, expr = random.Random(4), CE
    sizes = []
    for _ in range(300):
        expr = evolve.mutate(rng, evolve.insert(rng, expr, SYMBOLS), SYMBOLS, expr)
        sizes.append(len(evolve.nodes(expr)))
    assert max(sizes) <= evolve.NODES and max(sizes) > evolve.NODES // 2
    long = parse("Neg(" * 80 + "p" + ")" * 80)
    assert len(evolve.nodes(evolve.mutate(rng, long, SYMBOLS))) <= evolve.NODES


# Gates


def gradient_of(text, branch=None):
    return evolve.gradients(branch or toy_branch(), parse(text))


@pytest.mark.parametrize(
    "text",
    [
        "Mul(p, MeanC(y))",  # y sums to one over the classes: alive on paper, blind in fact
        "Inv(Add(Exp(Exp(Exp(Inv(Mul(y, p))))), y))",  # not finite
        "Add(y, MeanC(Mul(1, p)))",  # softmax sums to one: zero gradient
    ],
)
def test_gradient_turns_away(text):
    assert gradient_of(text) is None


@pytest.mark.parametrize("special", [0.0, math.inf])
def test_gradient_looks_at_the_true_targets_of_every_sample(special):
    """Zero with the true targets though not with others; infinite on a single sample."""
    branch = toy_branch()
    first = branch.target[0]
    where = branch.target if special == 0 else torch.stack([first, *torch.full_like(branch.target[1:], -1.0)])

    def leaves(x, y):
        return {"y": torch.where((y == where).expand_as(x), special, y.expand_as(x)), "p": x.softmax(-3)}

    branch.leaves = leaves
    assert gradient_of("Mul(y, Square(p))", branch) is None


def test_targets_are_exchanged_along_n_where_there_are_several():
    """Samples with equal targets and numbers that belong together, as those of boxes do."""
    target = torch.tensor([[3.0, 1.0], [5.0, 2.0], [9.0, 8.0]]).expand(4, 3, 2)[..., None, None]
    seen = []

    def leaves(x, y):
        seen.append(y)
        return {"y": y.expand_as(x), "p": x}

    prediction = torch.rand(1, 4, 3, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    branch = Branch(SYMBOLS, prediction, target, leaves, lambda x, y: x.mean((-4, -3, -2, -1)))
    assert gradient_of("Square(Add(p, Neg(y)))", branch) is not None
    pairs = {tuple(pair) for pair in seen[0].reshape(-1, 2).tolist()}
    assert pairs == {(3.0, 1.0), (5.0, 2.0), (9.0, 8.0)}, "each target stays whole"


@pytest.mark.parametrize("text", [str(CE), "Square(Add(p, Neg(y)))", PLANTED])
def test_gradient_lets_pass(text):
    assert gradient_of(text).shape == (2, 5, 4 * 8 * 8)


def test_gradients_are_those_at_every_state():
    branch = toy_branch(states=3)
    found = gradient_of(str(CE), branch)
    for k, x in enumerate(branch.prediction):
        x = x.clone().requires_grad_()
        evaluate(CE, branch.leaves(x, branch.target)).sum().backward()
        assert torch.allclose(found[k].float(), x.grad.flatten(1), atol=1e-7)


def test_a_later_state_that_is_not_finite_counts_as_zero_alone():
    branch = toy_branch(states=3)
    branch.prediction[1, 2] *= math.nan
    found = gradient_of(str(CE), branch)
    assert found.isfinite().all() and not found[1, 2].any()
    assert all(found[s, b].any() for s in range(3) for b in range(5) if (s, b) != (1, 2))


def key(text, scale_free=False, **branch):
    return evolve.equivalence_key(gradient_of(text, toy_branch(**branch)), scale_free)


def test_equivalence_key():
    assert key("Neg(Mul(y, Log(p)))") == key("Mul(y, Neg(Log(Abs(p))))") == key("Add(Neg(Mul(y, Log(p))), y)")
    assert key("Neg(Mul(y, Log(p)))") != key("Mul(y, Log(p))"), "a loss and its negative have the same norms"
    assert key("Neg(Mul(y, Log(p)))") != key("Neg(Mul(y, p))")
    assert key("Neg(Mul(y, Square(p)))") != key("Neg(Mul(y, p))")


def test_equivalence_key_knows_scale_only_where_the_optimiser_does():
    one, twice = "Neg(Mul(y, p))", "Mul(Add(1, 1), Neg(Mul(y, p)))"
    assert key(one) != key(twice)
    assert key(one, True) == key(twice, True)
    assert key("Mul(y, p)", True) != key(one, True)
    others = [one, "Neg(Mul(y, Log(p)))", "Square(Add(p, Neg(y)))", "Mul(y, Inv(p))", "Neg(Mul(MeanNHW(y), Mul(y, p)))"]
    assert len({key(text, True) for text in others}) == len(others), "different losses stay apart without their scale"


def test_equivalence_key_knows_all_states():
    """Where all classes are equally likely, these two have the same gradient; nowhere else."""
    branch = toy_branch()
    branch.prediction[0] = 0
    one, two = (gradient_of(text, branch) for text in ("Neg(Mul(y, p))", "Neg(Mul(Mul(y, Add(1, 1)), Square(p)))"))
    assert evolve.equivalence_key(one[:1], False) == evolve.equivalence_key(two[:1], False)
    assert evolve.equivalence_key(one, False) != evolve.equivalence_key(two, False)


def test_sketches_keep_distances():
    branch, rng = toy_branch(states=3), random.Random(0)
    branch.scale_free = True
    trees = [evolve.mutate(rng, parse(PLANTED), SYMBOLS) for _ in range(60)]
    slopes = [slope for tree in trees if (slope := evolve.gradients(branch, tree)) is not None]
    assert len(slopes) > 10
    errors = []
    for one, two in itertools.combinations(slopes, 2):
        apart = evolve.bounded(branch, one) - evolve.bounded(branch, two)
        exact = apart.square().sum(-1).mean().item()
        sketched = (evolve.sketch(branch, one) - evolve.sketch(branch, two)).square().sum().item()
        errors.append(abs(sketched - exact) / max(exact, 0.05))
    assert sorted(errors)[len(errors) // 2] < 0.1 and max(errors) < 0.5
    assert evolve.sketch(branch, slopes[0]).square().sum().item() == pytest.approx(1, abs=0.1)
    once, four_times = (evolve.sketch(branch, factor * slopes[0]) for factor in (1, 4))
    assert torch.equal(once, four_times), "directions, not norms"


def test_no_few_positions_rule_a_direction():
    branch = toy_branch(states=1)
    C, size = branch.prediction.shape[3], math.prod(branch.prediction.shape[4:])
    slope = torch.randn(1, branch.prediction.shape[1], C * size, generator=torch.Generator().manual_seed(0)).double()
    loud = slope.clone().view(1, -1, C, size)
    loud[..., 0] *= 1000  # one position
    one, two = evolve.bounded(branch, slope), evolve.bounded(branch, loud.view_as(slope))
    field = two.view(1, -1, C, size).norm(dim=2)
    assert (field[..., 0] < 0.95).all() and (field[..., 0] > field[..., 1:].amax(-1)).all(), "in the same order"
    assert torch.allclose(two.norm(dim=-1), torch.ones(()).double())
    assert (F.cosine_similarity(slope, loud.view_as(slope), dim=-1) < (one * two).sum(-1)).all()
    zero = evolve.bounded(branch, torch.zeros_like(slope))
    assert not zero.any(), "and nothing stays nothing"


def gain(expr, **limits):
    return evolve.rejection_gain(toy_branch(), expr, **limits)


def test_rejection_protocol():
    assert gain(CE) > 0.6
    assert gain(CE, early=()) == pytest.approx(0.75, abs=0.15)
    assert gain(parse("Mul(y, Log(p))")) < 0.1
    tiny = "Mul(Mul(Inv(Exp(Exp(Add(1, 1)))), Inv(Exp(Exp(Add(1, 1))))), Neg(Mul(y, Log(p))))"
    assert gain(parse(tiny)) > 0.6, "a factor of 4e-7 is no reason to reject"


def test_rejection_takes_the_steps_of_adam_from_the_first_state():
    branch = toy_branch()
    x = branch.prediction[0].clone().requires_grad_()
    adam = torch.optim.Adam([x], lr=evolve.REJECTION_LR, eps=1e-16)
    for _ in range(7):
        adam.zero_grad()
        evaluate(CE, branch.leaves(x, branch.target)).sum().backward()
        adam.step()
    seen = []
    watched = branch.score
    branch.score = lambda x, y: seen.append(x) or watched(x, y)
    evolve.rejection_gain(branch, CE, steps=7, early=())
    assert torch.allclose(seen[-1], x, atol=1e-5)


def test_early_decisions_are_taken_at_their_limits_alone():
    whole = gain(CE, early=())
    assert gain(CE, early=((2, -9, 9),)) == whole, "between the limits it goes on"
    stopped = gain(CE, early=((2, 9, 99),))
    assert stopped < whole and stopped == gain(CE, steps=2, early=())
    assert gain(CE, early=((2, -9, -8),)) == stopped, "above the upper limit it accepts"


def test_what_becomes_invalid_is_rejected():
    assert gain(parse("Mul(y, Exp(Inv(Add(p, Neg(p)))))")) == -math.inf


def test_the_baseline_passes_with_a_margin(monkeypatch):
    """Also where hardly anything is left to gain, or an early decision would be wrong."""

    def settled(**change):
        return evolve.settle_limits(dataclasses.replace(toy_branch(eta=0.3), baseline=str(CE), **change))

    plain = settled()
    assert (plain.eta, plain.early) == (0.3, evolve.EARLY), "nothing changes where it passes"
    monkeypatch.setattr(evolve, "REJECTION_LR", 0.01)
    hasty = settled(early=((1, 9, 99),))
    assert hasty.early == () and evolve.rejection_gain(hasty, CE) >= hasty.eta
    nearly = settled(score=lambda x, y: 0.95 + 0.05 * plain.score(x, y))
    assert 0.01 < nearly.eta < 0.03 and evolve.rejection_gain(nearly, CE) >= nearly.eta
    assert evolve.rejection_gain(nearly, parse("Mul(y, Log(p))")) < nearly.eta
    losing = settled(score=lambda x, y: 1 - 0.1 * plain.score(x, y))
    assert losing.eta < 0 and evolve.rejection_gain(losing, CE) >= losing.eta
    assert losing.early == () == settled(score=lambda x, y: 0 * plain.score(x, y)).early, "shares of nothing"
    nothing = settled(score=lambda x, y: torch.full(x.shape[:-4], math.nan))
    assert nothing.eta == 0.3


def sure_branch(**change):
    """The same with predictions that are sure: of the next class, and of the right one but for noise."""
    branch = toy_branch()
    g = torch.Generator().manual_seed(1)
    sure = (4 + 16 * torch.rand(60, 5, 1, 1, 8, 8, generator=g)) * branch.target
    sure += 1.5 * torch.randn(60, *branch.target.shape, generator=g)
    branch = dataclasses.replace(branch, wrong=5 * branch.target.roll(1, 2), sure=sure, baseline=str(CE), **change)
    return evolve.settle_limits(branch)


LOST = "Neg(Mul(y, Square(Add(p, Neg(Exp(Neg(Exp(1))))))))"  # leads the right class down where p < exp(-e)
# What training these two showed, see tests/RESULTS.md
NEVER = "Inv(Tanh(Mul(Add(Sqrt(p), Add(y, Neg(Mul(Log(p), y)))), y)))"
POLE = "Inv(Mul(y, Abs(Inv(Log(Mul(Tanh(Sqrt(Inv(Add(Log(Abs(Inv(Log(p)))), Add(p, Add(p, y)))))), p))))))"


def test_the_gate_unstable_looks_where_no_base_network_leads():
    branch = sure_branch()
    assert branch.recovery == pytest.approx(evolve.RECOVERY) and 1 < branch.steepness < 30
    task = ToyTask()
    task.branches = {"loss": branch}
    state = begin(task)

    def verdict(text):
        return evolve.unstable(state, make_child(state, text).trees[0])

    for text in (str(CE), "Neg(Mul(y, Sqrt(p)))", "Square(Add(p, Neg(y)))", "Neg(Mul(y, p))"):
        assert verdict(text) is None, text
    for text, agrees, regains, level in ((LOST, 1, 0, 1), (NEVER, 0, 0, 1), (POLE, 1, 1, 0)):
        assert (evolve.agreement(branch, parse(text)) > 0) == agrees, text
        assert (evolve.recovery(branch, parse(text)) > 0) == regains, text
        assert (evolve.steepness(branch, parse(text)) < branch.steepness) == level, text
        assert verdict(text).gate == "unstable", text
    for text in (NEVER, POLE):
        state = begin(task, "--without", "rejected")
        child, tried = make_child(state, text), Tried()
        passed = evolve.judge(state, child, EVERY_GATE, tried)
        assert not passed and tried.counts == {"unstable": 1} and not state.keys, text
        state = begin(task, "--without", "rejected,unstable")
        assert evolve.judge(state, make_child(state, text), EVERY_GATE, Tried())
    assert evolve.steepness(branch, parse("Square(y)")) == math.inf, "no prediction in it"
    branch.wrong = None
    assert verdict(NEVER) is None, "of tasks that have no such predictions"


def test_the_protocol_from_what_is_wrong_stops_where_it_suffices():
    branch, looked = sure_branch(), []
    score = branch.score
    branch.score = lambda x, y: looked.append(x) or score(x, y)
    whole = evolve.recovery(branch, CE)
    assert whole == 1 and len(looked) == 2 + len(evolve.EARLY)
    looked.clear()
    assert branch.recovery <= evolve.recovery(branch, CE, branch.recovery) <= whole and len(looked) < 5


def test_where_nothing_is_regained_nothing_is_asked():
    """As with two classes: the boundaries are right when they are exchanged."""
    branch = sure_branch(score=lambda x, y: torch.ones(x.shape[:-4]))
    assert evolve.recovery(branch, CE) == 0 and branch.recovery == -math.inf
    assert evolve.is_stable(branch, parse(LOST)) and not evolve.is_stable(branch, parse(POLE))
    undefined = sure_branch(score=lambda x, y: torch.full(x.shape[:-4], math.nan))
    assert evolve.is_stable(undefined, parse(LOST))


def test_a_loss_leads_an_untrained_network_to_where_the_baseline_does():
    branch = sure_branch()
    assert evolve.agreement(branch, CE) == pytest.approx(1)
    assert evolve.agreement(branch, parse(f"Neg({CE})")) == pytest.approx(-1)
    assert math.isnan(evolve.agreement(branch, parse("Square(y)"))), "no prediction in it"
    branch.recovery = -math.inf
    assert evolve.is_stable(branch, CE)
    assert not evolve.is_stable(branch, parse("Mul(y, p)")) and not evolve.is_stable(branch, parse("Square(y)"))


def test_what_would_be_unstable_without_an_operator_stays_as_it_is(monkeypatch):
    task, long = ToyTask(), parse("Neg(Neg(Neg(Mul(y, p))))")
    task.branches = {"loss": sure_branch()}
    assert len(evolve.nodes(evolve.in_short(task, "loss", long))) == 4
    monkeypatch.setattr(evolve, "is_stable", lambda branch, expr: expr == long)
    assert evolve.in_short(task, "loss", long) == long


EVERY_GATE = evolve.CHEAP + evolve.DEAR


def judged(state, child):
    """Through all gates; whether the child passes, and what was tried."""
    tried = Tried()
    return evolve.judge(state, child, EVERY_GATE, tried), tried


def test_every_gate_turns_something_away_and_good_losses_pass():
    rng, task = random.Random(5), ToyTask()
    good = [CE, parse("Square(Add(p, Neg(y)))"), parse("Neg(Mul(MeanNHW(y), Mul(y, p)))")]
    trees = good + [evolve.random_tree(rng, SYMBOLS) for _ in range(50)]
    trees += [evolve.mutate(rng, rng.choice(good), SYMBOLS) for _ in range(50)]
    state = begin(task)
    children = [make_child(state, tree) for tree in {str(canonical(tree)): tree for tree in trees}.values()]
    passing = [child for child in children if judged(state, child)[0]]
    assert {str(canonical(tree)) for tree in good} <= {child.trees[0].text for child in passing}
    assert all((child.trees[0].verdict is None) == (child in passing) for child in children)
    assert {tree.gate for child in children for tree in child.trees} >= {"dead", "gradient", "rejected", ""}


def test_gates_come_in_order():
    task = ToyTask()
    state = begin(task)

    def decided(text):
        passes, tried = judged(state, child := make_child(state, text))
        assert passes == (not tried.counts)
        if passes:
            tried.close(state, child)
            return None
        return next(iter(tried.counts))

    def verdict(text):
        return state.verdicts["loss", str(canonical(parse(text)))].gate

    assert decided("Add(p, y)") == "dead"
    assert decided("Mul(p, MeanC(y))") == "gradient" == verdict("Mul(p, MeanC(y))")
    assert decided("Mul(MeanC(y), p)") == "seen"
    assert decided("Mul(y, Log(p))") == "rejected"
    assert decided("Mul(y, Log(Abs(p)))") == "equivalent" and verdict("Mul(y, Log(Abs(p)))") == "rejected"
    assert decided("Neg(Mul(y, Log(p)))") is None and verdict("Neg(Mul(y, Log(p)))") == "passed"
    scored(state, {"Neg(Mul(y, Log(p)))": 0.9})
    assert decided("Mul(Neg(Log(p)), y)") == "seen"
    assert decided("Neg(Mul(y, Log(Abs(p))))") == "equivalent" and verdict("Neg(Mul(y, Log(Abs(p))))") == "passed"


def tried_child(state, child):
    """The child with an identity and with nothing else tried in its turn."""
    child.identity = state.identity(child)
    return Tried().close(state, child)


@pytest.mark.parametrize("gate", evolve.TREE_GATES)
def test_a_gate_switched_off_never_decides(tmp_path, gate):
    directory = run(tmp_path, "--evals", "4", "--seeds", "1", "--without", f"{gate},surrogate")
    counts = sum((Counter(line["tried"]["counts"]) for line in journal(directory)), Counter())
    gates = result_of(directory)["gates"]
    assert len(journal(directory)) == 4 and gate not in gates and counts[gate] == 0
    assert all(gates[other] == counts[other] > 0 for other in ("gradient", "rejected") if other != gate)


def test_naive_has_no_gates(tmp_path):
    directory = run(tmp_path, "--evals", "60", "--search", "naive")
    assert result_of(directory)["gates"].keys() == {"invalid"} and not any(
        line["tried"]["counts"] for line in journal(directory)
    )
    assert any(is_dead(parse(line["losses"]["loss"])) for line in journal(directory))


def test_equivalent_scores_are_reused():
    task = ToyTask()
    state = begin(task, "--without", "surrogate")
    scored(state, {str(CE): 0.9})
    passes, tried = judged(state, child := make_child(state, "Neg(Mul(y, Log(Abs(p))))"))
    assert not passes and dict(tried.counts) == {"equivalent": 1}
    assert tried.reused == [({"loss": "Neg(Mul(y, Log(Abs(p))))"}, child.identity)]
    other = tried_child(state, make_child(state, "Neg(Mul(y, p))"))
    other.tried["reused"] = tried.reused
    record = evolve.proxy_training(state, nobody, other) | {"worker": 0, "turn": 1, "elapsed": 0}
    state.absorb(json.loads(json.dumps(record)))
    assert [member.score for member in state.population][:2] == [0.9, 0.9]


def test_verdicts_are_forgotten_in_the_order_they_came(monkeypatch):
    monkeypatch.setattr(evolve, "REMEMBERED", 5)
    state = begin(ToyTask())
    for k in range(9):
        state.learn("loss", f"text {k}", "passed", f"key {k}", 0.7)
        state.learn("loss", f"text {k}", "passed", f"key {k}", 0.7)
    assert [text for _, text in state.verdicts] == [f"text {k}" for k in range(4, 9)]
    assert [text for _, text in state.keys] == [f"key {k}" for k in range(4, 9)]


# Surrogate


def spread(number, seed=0):
    """Losses of many scores for the planted formula, as formulas."""
    task, rng, found = ToyTask(planted=PLANTED), random.Random(seed), {}
    starts = [parse(text) for text in (PLANTED, str(CE), "Square(Add(p, Neg(y)))")]
    while len(found) < number:
        tree = evolve.random_tree(rng, SYMBOLS)
        expr = tree if rng.random() < 0.5 else evolve.mutate(rng, rng.choice(starts), SYMBOLS)
        if not is_dead(canonical(expr)) and gradient_of(str(expr), task.branches["loss"]) is not None:
            try:
                found.setdefault(task.score({"loss": expr}), str(expr))
            except InvalidLoss:
                continue
    pairs = [(text, score) for score, text in found.items()]
    rng.shuffle(pairs)
    return task, dict(pairs[: number * 2 // 3]), dict(pairs[number * 2 // 3 :])


def guided(task, known, at_work=()):
    """A surrogate that has learned these scores, and the state behind it."""
    state = begin(task)
    scored(state, known)
    return state, state.surrogate.fit(state, [{"loss": parse(text)} for text in at_work])


def predicted(task, guide, names):
    """Mean and deviation of what losses are expected to score, by formula."""
    return guide.predict(torch.stack([guide.point(task, {"loss": parse(text)}) for text in names]))


def spearman(one, other):
    ranks = torch.stack([torch.tensor(values, dtype=torch.float64).argsort().argsort() for values in (one, other)])
    return torch.corrcoef(ranks.double())[0, 1].item()


def test_surrogate_predicts_the_scores_of_others():
    task, known, others = spread(90)
    _, guide = guided(task, known)
    mean, deviation = predicted(task, guide, others)
    assert spearman(mean.tolist(), list(others.values())) > 0.7
    knee = sorted(known.values())[(len(known) - 1) // 2]
    truth = evolve.compressed(torch.tensor(list(others.values())), knee, guide.KNEE * (max(known.values()) - knee))
    errors = (torch.tensor(guide.scores(mean)) - truth).abs()
    assert (errors < 3 * guide.spread * deviation).double().mean() > 0.8, "and knows how sure it is"
    mine, _ = predicted(task, guide, known)
    assert spearman(mine.tolist(), list(known.values())) > 0.9


def test_what_helped_a_little_may_help_a_lot():
    """Scores rise along one direction of the gradients: beyond all that was tried the surrogate expects still more."""
    task, known, others = spread(60)
    places = 0.6 * torch.rand(len(known), 1, 2, generator=torch.Generator().manual_seed(0)) - 0.3
    state = begin(task, baseline=0.5)
    scored(state, {text: 0.5 + 0.2 * place[0, 0].item() for text, place in zip(known, places)})
    far, back, *_ = others
    state.surrogate.known = {"": torch.zeros(1, 2), far: torch.tensor([[0.9, 0.0]]), back: torch.tensor([[-0.9, 0.0]])}
    state.surrogate.known |= dict(zip(known, places))
    guide = state.surrogate.fit(state, [])
    best = max(result.score for result in state.results.values())
    ahead, behind = guide.scores(predicted(task, guide, [far, back])[0])
    assert ahead > best + 0.02 and behind < 0.48


def test_bad_is_what_is_worse_than_the_baseline_and_among_the_worse_half():
    task, known, _ = spread(60)
    scores = {text: 0.01 * k for k, text in enumerate(known)}  # 0 .. 0.39

    def steps(baseline):
        """How far apart the surrogate sees neighbours, the lower half of them and the upper one."""
        state = begin(task, baseline=baseline)
        scored(state, scores)
        state.surrogate.learn(state, state.members())
        assert state.surrogate.values[-1] == 0, "the baseline is where it counts from"
        apart = state.surrogate.values[:-1].sort().values.diff()
        return apart[: len(apart) // 2 - 1], apart[len(apart) // 2 + 1 :]

    for baseline in (0.25, 0.9):
        lower, upper = steps(baseline)
        assert (lower.diff() > 0).all(), "ever closer, the worse they are"
    assert upper.max() == pytest.approx(upper.min()), "all are worse: the better half is seen as it is"
    lower, upper = steps(0.05)
    assert lower[6:].min() == pytest.approx(upper.max()), "what is better than the baseline likewise"


def test_what_is_in_training_moves_no_other_expectation():
    """It is imagined at its own expectation."""
    task, known, others = spread(40)
    state = begin(task, baseline=0.5)
    scored(state, known)
    waiting, *rest = others
    alone = predicted(task, state.surrogate.fit(state, []), rest)
    busy = predicted(task, state.surrogate.fit(state, [{"loss": parse(waiting)}]), rest)
    torch.testing.assert_close(busy[0], alone[0], atol=1e-4, rtol=0)
    assert (busy[1] < alone[1]).any(), "but all around it is better known"


def test_sketches_tell_the_scale_where_it_counts():
    twice = "Add(Mul(y, Log(p)), Mul(y, Log(p)))"
    for scale_free in (True, False):
        branch = toy_branch()
        branch.scale_free = scale_free
        one, two = (evolve.sketch(branch, evolve.gradients(branch, parse(t))) for t in ("Mul(y, Log(p))", twice))
        number = evolve.SKETCH * math.prod(branch.prediction.shape[:2])
        torch.testing.assert_close(one[:number], two[:number])
        scale = [] if scale_free else [evolve.SCALE * math.log10(2)]
        torch.testing.assert_close((two - one)[number:], torch.tensor(scale))


def test_bad_scores_are_compressed():
    scores = torch.tensor([0.0, 0.3, 0.49, 0.5, 0.51, 0.7], dtype=torch.float64)
    warped = evolve.compressed(scores, 0.5, 0.05)
    assert torch.equal(warped[3:], scores[3:]) and (warped.diff() > 0).all()
    assert (warped[3] - warped[2]).item() == pytest.approx(0.01, rel=0.1), "just below the knee nothing changes"
    assert (warped[3] - warped[0]).item() == pytest.approx(0.05 * math.log(11))


def test_surrogate_waits_for_the_initial_population():
    task, known, _ = spread(30)
    first = list(known.items())[: evolve.INITIAL]
    state, guide = guided(task, dict(first[:-1]))
    assert guide is None
    scored(state, dict(first[-1:]))
    assert state.surrogate.fit(state, []) is not None


RELATIVES = [f"Neg(Mul(y, {pool}))" for pool in ("MinPool3(p)", "Tanh(MinPool3(p))", "MinPool3(Tanh(p))")]
RELATIVES += ["Neg(Mul(Sqrt(y), MinPool3(p)))"]


@pytest.mark.parametrize("mean, deviation, best", [(0.0, 1.0, 0.5), (-1.0, 0.3, 0.2), (2.0, 0.5, 1.0), (0.1, 2.0, 0.1)])
def test_expected_improvement_is_the_integral(mean, deviation, best):
    x = torch.linspace(mean - 12 * deviation, mean + 12 * deviation, 200_001, dtype=torch.float64)
    density = torch.distributions.Normal(mean, deviation).log_prob(x).exp()
    wanted = torch.trapezoid((x - best).clamp(min=0) * density, x)
    numbers = (torch.tensor(value, dtype=torch.float64) for value in (mean, deviation, best))
    assert evolve.expected_improvement(*numbers).item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-9)


def test_what_others_are_training_promises_less():
    task, known, others = spread(60)
    busy, relative, *_ = RELATIVES
    strangers = list(others)

    def promise(guide, names):
        mean, deviation = predicted(task, guide, names)
        return evolve.expected_improvement(mean, evolve.UPWARDS * deviation, guide.best)

    _, alone = guided(task, known)
    _, beside = guided(task, known, [busy])
    left_to_relative = promise(beside, [relative]).sum() / promise(alone, [relative]).sum()
    left_to_strangers = promise(beside, strangers).sum() / promise(alone, strangers).sum()
    assert left_to_relative < 0.8 * left_to_strangers and left_to_strangers > 0.7
    assert len(beside.merits) == len(known), "a score to come is none yet"


def test_the_most_promising_child_is_trained(monkeypatch):
    monkeypatch.setattr(evolve, "TWINS", 1.0)
    task, known, others = spread(60)
    state, guide = guided(task, known)
    monkeypatch.setattr(evolve, "POOL", len(others))
    waiting = iter([*others, *others])
    monkeypatch.setattr(evolve, "propose", lambda state, *rest: make_child(state, next(waiting)))
    state.gates = frozenset(state.gates) - {"rejected"}
    child = evolve.next_child(state, random.Random(0), guide, math.inf)
    names = list(others)
    mean, deviation = predicted(task, guide, names)
    cost = torch.tensor([1 + 0.03 * len(evolve.nodes(parse(text))) for text in names])
    best = (evolve.expected_improvement(mean, evolve.UPWARDS * deviation, guide.best) / cost).argmax().item()
    assert str(child.losses["loss"]) == names[best]
    assert child.predicted == pytest.approx([guide.scores(mean)[best], deviation[best].item() * guide.spread], abs=1e-3)
    assert child.tried["counts"]["surrogate"] > 0


def test_twins_of_what_was_trained_are_passed_over(monkeypatch):
    task, known, others = spread(60)
    one, *twins = RELATIVES
    state, guide = guided(task, {**known, one: 0.95})
    names = [*twins, *list(others)[:12]]
    trained = torch.stack(
        [guide.point(task, losses)[0] for losses in (*(r.losses for r in state.results.values()), {})]
    )
    points = {text: guide.point(task, {"loss": parse(text)})[0] for text in names}
    cosine = {text: (1 - (point - trained).square().sum(1) / 2).max() for text, point in points.items()}
    monkeypatch.setattr(evolve, "TWINS", sorted(cosine.values())[len(names) // 2].item() + 1e-4)
    children = [make_child(state, text) for text in names]
    for child in children:
        evolve.describe(task, *child.trees)
    alone = {str(child.losses["loss"]) for child in guide.without_twins(task, children)}
    assert alone == {text for text in names if cosine[text] < evolve.TWINS} and not alone >= {*names}
    pool = itertools.cycle(names)
    monkeypatch.setattr(evolve, "POOL", len(names))
    monkeypatch.setattr(evolve, "propose", lambda state, *rest: make_child(state, next(pool)))
    tried = Tried()
    bred = evolve.breed(state, random.Random(0), guide, True, tried)
    assert {str(child.losses["loss"]) for child in bred} <= alone and tried.counts["surrogate"] > 0
    monkeypatch.setattr(evolve, "TWINS", -1.0)
    state.waiting.clear()
    assert evolve.breed(state, random.Random(0), guide, True, tried), "where there are twins alone, the best of them"


def test_relatives_of_the_best_do_not_win_every_tournament():
    task, known, _ = spread(60)
    state, guide = guided(task, {**known, **dict(zip(RELATIVES, (0.95, 0.94, 0.96, 0.93)))})
    apart = {text: guide.point(task, {"loss": parse(text)}) for text in state.results}
    niches = list(
        {r.identity: r.text for r in state.results.values() if r.identity in guide.niche_bests(["loss"])}.values()
    )
    assert 5 < len(niches) < len(state.results) and len([text for text in RELATIVES if text in niches]) < 3
    near = 2 - 2 * evolve.RELATED
    for one, other in itertools.combinations(niches, 2):
        assert (apart[one] - apart[other]).square().sum() >= 0.99 * near
    for text in state.results:
        assert any((apart[text] - apart[niche]).square().sum() <= 1.01 * near for niche in niches), (
            "somebody's relative"
        )
    drawn = [evolve.select_parent(state, random.Random(k), ["loss"]) for k in range(200)]
    assert {member.identity for member in drawn} <= guide.niche_bests(["loss"])


def test_trials_of_several_branches_are_no_relatives():
    """In its own branch each trial is as far from the others as its loss is; elsewhere all have the baseline's."""
    task = ToyTask(planted=str(CE), branches=("cls", "reg"))
    for branch in task.branches.values():
        branch.baseline = str(CE)
    state = begin(task)
    scores = {("cls", str(CE)): 0.95, ("cls", "Square(Add(y, p))"): 0.5, ("reg", "Neg(Mul(y, Log(Tanh(p))))"): 1.0}
    scores |= {("reg", text): 0.9 * task.score({"reg": parse(text)}) for text in spread(30)[1]}
    for (branch, text), score in scores.items():
        child = make_child(state, text, branch)
        evolve.judge(state, child, evolve.CHEAP, tried := Tried())
        record = evolve.proxy_training(state, nobody, tried.close(state, child)) | {
            "worker": 0,
            "turn": state.evaluated,
        }
        state.absorb({**json.loads(json.dumps(record)), "elapsed": 0, "score": score})
    assert state.surrogate.fit(state, [])
    best = {str(evolve.select_parent(state, random.Random(k), ["cls"]).losses["cls"]) for k in range(20)}
    assert best == {str(CE)}, "not turned away for a better trial of the other branch"


def test_children_are_trained_in_short():
    task = ToyTask()
    task.branches["loss"].scale_free = True
    state = begin(task)
    long, plain = (make_child(state, text) for text in ("Neg(Mul(y, Log(Neg(Neg(Mul(1, Abs(p)))))))", str(CE)))
    assert evolve.judge(state, long, evolve.CHEAP, Tried())
    long.predicted = [0.5, 0.1]
    brief = evolve.briefly(state, long)
    assert str(brief.losses["loss"]) == state.text(CE) and brief.predicted == [0.5, 0.1]
    assert evolve.judge(state, plain, ("gradient",), Tried())
    assert brief.identity == plain.identity, "and known by what it is"
    tried = Tried()
    tried.close(state, brief)
    assert [(text, verdict) for _, text, verdict, *_ in tried.verdicts] == [(state.text(CE), evolve.PASSED)]
    assert evolve.briefly(state, long) is long, "the short one is known by now"


def test_without_surrogate_is_the_plain_algorithm(tmp_path):
    directory = run(tmp_path, "--evals", "25", "--without", "surrogate,rejected", planted=PLANTED)
    lines = journal(directory)
    assert all(line["predicted"] is None and "surrogate" not in line["tried"]["counts"] for line in lines)
    assert any(line["tried"]["reused"] for line in lines)
    assert "surrogate" not in result_of(directory)["gates"]


def test_after_the_random_trees_the_surrogate_chooses(tmp_path, monkeypatch):
    monkeypatch.setattr(evolve, "INITIAL", 6)
    directory = run(tmp_path, "--evals", "16", "--without", "rejected", planted=PLANTED)
    lines = journal(directory)
    assert [line["predicted"] is None for line in lines] == [True] * 6 + [False] * 10
    kinds = ["retrained" in record for record in records(directory)]
    assert any(kinds) and kinds == sorted(kinds), "re-trainings are for the closing round"
    assert not any(line["tried"]["reused"] for line in lines)
    assert result_of(directory)["gates"]["surrogate"] > 0


def test_surrogate_finds_the_planted_formula_sooner(monkeypatch):
    monkeypatch.setattr(evolve, "INITIAL", 10)
    monkeypatch.setattr(evolve, "POOL", 20)
    monkeypatch.setattr(evolve, "ATTEMPTS", 200)

    def trainings(seed, without):
        task = ToyTask(planted="Neg(Mul(y, MinPool3(p)))")
        state = begin(task, "--without", without)
        while state.evaluated < 45:
            (record,) = explore(state, 1, state.surrogate, seed)
            if (record["score"] or 0) > 0.9:
                break
        return state.evaluated

    with_it, plain = (sum(trainings(seed, w) for seed in range(4)) for w in ("rejected", "rejected,surrogate"))
    assert with_it < 0.8 * plain


# Evolution


def test_the_first_candidates_are_random(tmp_path):
    lines = journal(run(tmp_path, "--evals", "24", "--without", "rejected,surrogate"))
    assert all(line["parent"] is None for line in lines[: evolve.INITIAL])
    assert any(line["parent"] for line in lines[evolve.INITIAL :])


def fertile(child, rng):
    """Most mutated children die, none of the fresh ones does."""
    return child.parent is None or rng.random() < 0.05


def test_fresh_share_counts_trainings_and_a_turn_has_one_parent(monkeypatch):
    task, luck, drawn = ToyTask(), random.Random(0), []
    method = evolve.METHODS["evolve"]._replace(mutate=lambda state, rng, name, branch, expr: evolve.parse("Neg(p)"))
    state = begin(task, "--without", "surrogate", method=method)
    trees = [evolve.random_tree(luck, SYMBOLS) for _ in range(60)]
    state.population.extend(Member({"loss": tree}, k / 60, (str(k),), str(k)) for k, tree in enumerate(trees))
    state.results = {member.text: member for member in state.population}
    monkeypatch.setattr(evolve, "judge", lambda state, child, names, tried: fertile(child, luck))
    select = evolve.select_parent
    monkeypatch.setattr(evolve, "select_parent", lambda *args: drawn.append(select(*args)) or drawn[-1])
    fresh = 0
    for turn in range(400):
        drawn.clear()
        child = evolve.next_child(state, random.Random(turn), None, math.inf)
        fresh += child.parent is None
        assert [member.losses for member in drawn] == ([] if child.parent is None else [child.parent])
    assert 20 < fresh < 60


@pytest.mark.parametrize("least, mean", [(evolve.TOURNAMENT_MIN, 8 / 9), (evolve.TOURNAMENT_SEVERAL, 15 / 16)])
def test_parent_is_the_best_of_its_tournament(least, mean):
    state = begin(ToyTask())
    for k in range(200):
        state.population.append(Member({"loss": CE}, k / 200 if k % 4 else None, (str(k),)))
    rng = random.Random(4)
    scores = [evolve.select_parent(state, rng, ["loss"], least).score for _ in range(300)]
    assert abs(sum(scores) / len(scores) - mean) < 0.02  # the mean of the best of n uniform draws is n / (n + 1)
    state.population.extend([Member({"loss": CE}, None, ("",))] * evolve.POPULATION)
    assert len(state.population) == evolve.POPULATION, "the oldest leave"
    assert evolve.select_parent(state, rng, ["loss"]) is None, "nobody valid is left"


def test_copies_of_the_best_do_not_win_every_tournament():
    state = begin(ToyTask())
    others = [Member({"loss": CE}, k / 100, (str(k),)) for k in range(100)]
    newest = Member({"loss": parse("Neg(Mul(Log(p), y))")}, 1.0, ("best",))
    state.population.extend([*others, *[Member({"loss": CE}, 1.0, ("best",))] * 900, newest])
    rng = random.Random(4)
    parents = [evolve.select_parent(state, rng, ["loss"]) for _ in range(300)]
    assert sum(parent.score == 1.0 for parent in parents) < 40  # tournaments of six among 101
    assert all(parent is newest for parent in parents if parent.score == 1.0), "the newest stands for its equivalents"


def test_planted_formula_is_found(tmp_path, monkeypatch):
    for name, value in {"POOL": 20, "ATTEMPTS": 200}.items():
        monkeypatch.setattr(evolve, name, value)
    flags = ("--evals", "40", "--seed", "3", "--seeds", "1", "--without", "rejected")
    directory = run(tmp_path, *flags, planted="Neg(Mul(y, MinPool3(p)))")
    scores = [line["score"] or 0 for line in journal(directory)]
    assert max(scores) > 0.995 and max(scores[: evolve.INITIAL]) < 0.5, "evolution improved on the random start"
    assert result_of(directory)["test"]["found"]["toy"][0] > 0.995


def test_every_candidate_invalid(tmp_path, capsys):
    directory = run(tmp_path, "--evals", "25", "--without", "rejected", invalid=True)
    result = result_of(directory)
    assert result["evaluated"] == 25 and result["gates"]["invalid"] == 25 and result["losses"] == {}
    printed = capsys.readouterr().out
    assert "no valid loss was found" in printed and "best_loss.py" not in printed
    assert not (directory / "best_loss.py").exists()
    assert {record["retrained"] for record in retrained(directory)} == {"ce"}


def test_a_score_that_is_no_number_is_invalid(tmp_path):
    task = ToyTask()
    task.train = lambda losses, base: math.nan
    directory = run(tmp_path, "--evals", "5", task=task)
    assert all(line["score"] is None for line in journal(directory)) and result_of(directory)["gates"]["invalid"] == 5


def test_a_curve_with_numbers_that_are_not_finite_is_no_trouble(tmp_path):
    task = ToyTask()
    task.curve = [(0, 1.0), (1, math.nan), (2, math.inf), (3, 0.123456)]
    directory = run(tmp_path, "--evals", "2", "--without", "invalid,rejected", task=task)
    assert journal(directory)[0]["curve"] == [[0, 1.0], [3, 0.1235]]


def test_several_branches(tmp_path, capsys):
    directory = run(tmp_path, "--evals", "45", "--without", "rejected", branches=("cls", "reg"))
    lines = journal(directory)
    trials, children = lines[: evolve.TRIALS], lines[evolve.TRIALS :]
    assert re.search(r"^eval   3/45 .*  (cls|reg)$", capsys.readouterr().out, re.M)
    assert all(len(line["losses"]) == 1 for line in trials)
    mutated = [line for line in trials if line["parent"]]
    assert 0 < len(mutated) < len(trials) and all(line["parent"].keys() == line["losses"].keys() for line in mutated)
    parts = {}
    for line in sorted(trials, key=lambda line: line["score"] or 0):
        parts |= line["losses"]
    assert children[0]["losses"] == parts and not children[0]["parent"], "the best trials are put together first"
    for k, line in enumerate(trials):
        (name,) = line["losses"]
        assert name == ("cls", "reg")[k % 2]
        assert line["identity"][0].startswith(f"{name}:"), "the same tree in another branch is another candidate"
    for line in children[1:]:
        assert line["losses"] != line["parent"] and line["gain"].keys() <= line["losses"].keys()
    assert any(len(line["losses"]) == 2 for line in children[1:])
    rows = (directory / "hall_of_fame.csv").read_text().splitlines()[1:]
    assert result_of(directory)["losses"].keys() <= {"cls", "reg"}
    assert all("cls=" in row or "reg=" in row for row in rows) and any("cls=" in row and "reg=" in row for row in rows)


def test_losses_of_some_branches_may_be_the_best(tmp_path, capsys):
    """Where no tree beats the baseline's loss it stays."""

    class Task(ToyTask):
        def score(self, losses):
            return (0.9 if "reg" in losses else 0.5) + (0.1 if "cls" not in losses else 0.0)

        def retrain(self, losses, *args, **more):
            return {split: {"toy": self.score({} if losses == self.baseline else losses)} for split in ("val", "test")}

    directory = run(tmp_path, "--evals", "40", "--without", "rejected", task=Task(branches=("cls", "reg")))
    assert result_of(directory)["losses"].keys() == {"reg"}
    assert "reg=" in capsys.readouterr().out.split(">>>>")[1]


def test_one_of_several_branches_changes():
    fresh, rng = parse("Neg(p)"), random.Random(0)
    task = ToyTask(branches=("cls", "reg"))
    mutated = parse("Exp(p)")
    method = evolve.METHODS["evolve"]._replace(fresh=lambda *args: fresh, mutate=lambda *args: mutated)
    state = begin(task, method=method, turns={0: set(range(evolve.TRIALS + 1))})
    trees = [evolve.random_tree(rng, SYMBOLS) for _ in range(40)]
    state.population.extend(Member({"cls": trees[k], "reg": trees[39 - k]}, k / 40, (str(k),)) for k in range(40))
    kinds = {"fresh": 0, "exchanged": 0, "mutated": 0, "given back": 0}
    for _ in range(1000):
        parent = evolve.select_parent(state, rng, ["cls", "reg"])
        child = evolve.propose(state, rng, parent, Tried())
        assert child.parent == parent.losses and not child.more
        if not child.trees:
            assert child.losses.items() < parent.losses.items()
            kinds["given back"] += 1
            continue
        (tree,) = child.trees
        (other,) = {"cls", "reg"} - {tree.branch}
        assert child.losses[other] == child.parent[other] and child.losses[tree.branch] == tree.expr
        kinds["fresh" if tree.expr == fresh else "mutated" if tree.expr == mutated else "exchanged"] += 1
    assert 70 < kinds["fresh"] < 130 and 240 < kinds["exchanged"] < 360 and 70 < kinds["given back"] < 130, kinds


def test_the_best_trials_are_put_together_by_one_worker():
    both = {"cls": CE, "reg": parse("Neg(p)")}
    state = begin(ToyTask(branches=("cls", "reg")), turns={0: set(range(evolve.TRIALS))})
    for k, (name, expr) in enumerate([("cls", parse("p")), *both.items()]):
        state.results[str(k)] = Member({name: expr}, k / 10, (str(k),))
    assert evolve.best_trials_together(state, []).losses == both
    assert evolve.best_trials_together(state, [{"cls": CE}]).losses == both
    assert evolve.best_trials_together(state, [both]) is None, "another worker is at it"


def test_a_branch_without_a_tree_gets_one():
    rng, task = random.Random(0), ToyTask(branches=("cls", "reg"))
    state = begin(task, turns={0: set(range(evolve.TRIALS + 1))})
    state.population.extend(Member({name: CE}, 0.5, (name,)) for name in ("cls", "reg"))
    parent = evolve.Child({"reg": parse("Neg(p)")})
    children = [evolve.propose(state, rng, parent, Tried()) for _ in range(100)]
    assert {(*child.losses,) for child in children} == {("reg",), ("cls", "reg")}, "always in the same order"
    assert CE in [child.losses.get("cls") for child in children], "that of the winner of a tournament"


def test_a_favourite_gives_a_branch_back_with_its_tree(monkeypatch):
    state, rng, (_, known, rest) = begin(ToyTask(branches=("cls", "reg"))), random.Random(0), spread(150)
    texts = [[*known, *rest], [*rest, *known]]

    def propose(state, rng, parent, tried):
        if parent:
            return evolve.Child({"cls": parent.losses["cls"]}, parent.losses)
        trees = {name: parse(own.pop() if own else "1") for name, own in zip(("cls", "reg"), texts)}
        return evolve.Child(trees, None, [state.tree(*item) for item in trees.items()])

    for name, value in {"propose": propose, "POOL": 100, "ATTEMPTS": 1000}.items():
        monkeypatch.setattr(evolve, name, value)
    guide = SimpleNamespace(rank=lambda task, children: children, without_twins=lambda state, children: children)
    pool = evolve.breed(state, rng, guide, True, Tried())
    some = [child for child in pool if child.losses.keys() == {"cls"}]
    assert 5 < len(some) < len(pool) - 5
    assert all({tree.branch for tree in child.trees} == child.losses.keys() for child in pool)


def test_relatives_are_so_in_the_branches_that_count():
    guide = Surrogate()
    apart = torch.tensor([[0.0, 0.15], [0.15, 0.0]])  # the limit is 0.1
    guide.pairs, guide.names, guide.ranking = torch.stack([apart, torch.zeros(2, 2)])[None], ["cls", "reg"], [0, 1]
    guide.rows = [Member({"cls": CE}, 0.5, ("first",)), Member({"cls": CE}, 0.5, ("second",))]
    assert guide.niche_bests(["cls"]) == {("first",), ("second",)}
    assert guide.niche_bests([]) == {("first",)} and guide.niche_bests(["reg"]) == set()


def test_losses_of_different_branches_are_different():
    texts = [evolve.losses_text({name: CE}) for name in ("cls", "reg", "loss")]
    assert texts == [f"cls={CE}", f"reg={CE}", str(CE)]


def test_a_branch_that_was_given_back_is_no_news():
    state = begin(ToyTask(branches=("cls", "reg")), "--without", "surrogate")
    child = evolve.Child({"cls": CE}, {"cls": CE, "reg": CE})
    assert evolve.judge(state, child, evolve.CHEAP, Tried())
    state.scores[child.identity] = 0.5
    assert not evolve.judge(state, child, evolve.CHEAP, tried := Tried()) and tried.counts == {"seen": 1}


def test_a_favourite_of_the_surrogate_is_mutated_among_the_trials_as_well():
    mutated = parse("Exp(p)")
    method = evolve.METHODS["evolve"]._replace(mutate=lambda state, rng, name, branch, expr: mutated)
    state = begin(ToyTask(branches=("cls", "reg")), method=method)
    favourite = evolve.Child({"cls": parse("Neg(p)")}, None)
    for seed in range(20):
        child = evolve.propose(state, random.Random(seed), favourite, Tried())
        assert child.losses == {"cls": mutated} and child.parent == favourite.losses


def test_random_search_of_several_branches_draws_whole_candidates(tmp_path):
    directory = run(tmp_path, "--evals", "4", "--search", "random", "--without", "rejected", branches=("cls", "reg"))
    lines = journal(directory)
    assert all(line["losses"].keys() == {"cls", "reg"} and not line["parent"] for line in lines)
    known = {(branch, text) for line in lines for branch, text, *_ in line["tried"]["verdicts"]}
    assert {(k, str(canonical(parse(v)))) for line in lines for k, v in line["losses"].items()} <= known


def test_random_search_of_several_branches_ends_at_its_deadline():
    task = ToyTask(branches=("cls", "reg"))
    dead = evolve.METHODS["random"]._replace(fresh=lambda *args: parse("Add(p, y)"))
    state = begin(task, "--search", "random", method=dead)
    start = time.monotonic()
    assert evolve.next_child(state, random.Random(0), None, start + 0.2) is None
    assert time.monotonic() - start < 5


def test_nothing_is_trained_twice():
    task = ToyTask()
    state = begin(task, "--without", "surrogate,rejected")
    explore(state, 60)
    assert len(state.results) == 60 == len(state.scores) == len({r.identity for r in state.results.values()})
    assert len(state.population) > 60, "equivalents of trained losses join with the known score"


# Journal, resume, workers


def shortened(patch):
    """All phases of a search and of its closing round within a few trainings."""
    patch.setattr(evolve.Task, "rungs", ((3, 1), (2, 2)))
    for name, value in {"INITIAL": 3, "TRIALS": 3, "POOL": 8, "ATTEMPTS": 80}.items():
        patch.setattr(evolve, name, value)


@pytest.fixture
def short(monkeypatch):
    shortened(monkeypatch)


class Killed(Exception):
    pass


class Fragile(ToyTask):
    """Ends its process, so to speak, in the training number `at`."""

    def __init__(self, at, **options):
        super().__init__(**options)
        self.at = at

    def score(self, losses):
        if len(self.calls) > self.at:
            raise Killed
        return super().score(losses)


SHORT = ("--evals", "6", "--seed", "5", "--seeds", "1", "--without")
WITH_AND_WITHOUT = pytest.mark.parametrize("without", ["rejected", "rejected,surrogate"])


@WITH_AND_WITHOUT
@pytest.mark.parametrize("branches", [("loss",), ("cls", "reg")])
def test_killed_in_every_training_and_resumed_each_time(tmp_path, short, without, branches):
    options = {"planted": PLANTED, "branches": branches}
    straight = run(tmp_path / "straight", *SHORT, without, **options)
    number = len(records(straight))
    assert number > 12 and any(line["predicted"] for line in journal(straight)) == ("surrogate" not in without)
    stopped = None
    for n in range(number):
        with pytest.raises(Killed):
            run(tmp_path / "part", *SHORT, without, task=Fragile(min(n, 1), **options), resume=stopped)
        (stopped,) = (tmp_path / "part").iterdir()
        assert len(records(stopped)) == n
    run(tmp_path / "part", *SHORT, without, resume=stopped, **options)
    assert records(stopped) == records(straight)
    assert {**result_of(stopped), "seconds": 0} == {**result_of(straight), "seconds": 0}


@WITH_AND_WITHOUT
@pytest.mark.parametrize("n", [0, 2, 4, 5, 7, 9, 11])
def test_killed_once_and_resumed(tmp_path, short, n, without):
    straight = run(tmp_path / "straight", *SHORT, without, planted=PLANTED)
    with pytest.raises(Killed):
        run(tmp_path / "part", *SHORT, without, task=Fragile(n, planted=PLANTED))
    (stopped,) = (tmp_path / "part").iterdir()
    assert len(records(stopped)) == n
    with (stopped / "journal-0.jsonl").open("a") as file:
        file.write('{"turn": 24, "losses": {"lo')  # the kill came in the middle of a line
    run(tmp_path / "part", *SHORT, without, resume=stopped, planted=PLANTED)
    assert records(stopped) == records(straight)


@pytest.fixture
def full_disk(monkeypatch):
    monkeypatch.setattr(io, "open", open_on_full_disk)


def test_every_failed_write(tmp_path, short, full_disk):
    """The n-th write of a run fails: one error that names the file, and a resume that loses nothing.

    For every fifth n, which meets every kind of file; for all of them with HARM=1 in the environment.
    """
    Full.at, Full.done = -1, 0
    straight = run(tmp_path / "straight", *SHORT, "rejected", planted=PLANTED)
    number, failed = Full.done, Counter()
    assert number > 40
    for n in range(0, number, 1 if os.environ.get("HARM") else 5):
        Full.at, Full.done = n, 0
        folder = tmp_path / str(n)
        with pytest.raises(OSError, match="No space left") as error:
            run(folder, *SHORT, "rejected", planted=PLANTED)
        failed[Path(error.value.filename).name.split(".")[0].rstrip("0123456789")] += 1
        del error
        (stopped,) = folder.iterdir()
        assert not list((stopped / "workers").glob("claim-*.part")), "no half of what is written once"
        if (stopped / "args.json").exists():
            run(folder, *SHORT, "rejected", resume=stopped, planted=PLANTED)
            assert records(stopped) == records(straight), n
            assert {**result_of(stopped), "seconds": 0} == {**result_of(straight), "seconds": 0}, n
    assert {"journal-", "hall_of_fame", "args"} <= set(failed)


def test_same_seed_same_journal(tmp_path, short):
    one, two = (run(tmp_path / k, *SHORT, "rejected", planted=PLANTED) for k in "ab")
    other = run(tmp_path / "c", *SHORT, "rejected", "--seed", "6", planted=PLANTED)
    assert records(one) == records(two) != records(other)


def test_a_larger_budget_goes_on_from_a_finished_run(tmp_path, short):
    directory = run(tmp_path, *SHORT, "rejected", planted=PLANTED)
    first = records(directory)
    longer = ("--evals", "9", *SHORT[2:], "rejected")
    run(tmp_path, *longer, resume=directory, planted=PLANTED)
    assert records(directory)[: len(first)] == first and len(journal(directory)) == 9
    assert result_of(directory)["evaluated"] == 9


def fold(directory, task=None):
    """What a reader makes of a run directory."""
    state = begin(task or ToyTask())
    evolve.Journal(directory).hear(state)
    return state


def knowledge(state):
    """All that a search has learned from its journal."""
    fields = "population counts verdicts keys failed scores results again turns programs baseline".split()
    return {name: getattr(state, name) for name in fields}


def test_a_reader_learns_everything_from_the_journal(tmp_path, short):
    task = ToyTask(planted=PLANTED)
    args = arguments(tmp_path, *SHORT, "rejected")
    worker, state = Worker(tmp_path), begin(task, *SHORT, "rejected")
    worker.tell({"baseline": 0.5})
    evolve.search(state, worker, args)
    evolve.close(state, worker, args)
    worker.leave()
    reader = fold(tmp_path, task)
    assert knowledge(reader) == knowledge(state) and reader.evaluated == 6 and reader.broken == 0
    assert reader.best() == state.best() and reader.explored == state.explored > 6


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        shortened(patch)
        return run(tmp_path_factory.mktemp("runs"), *SHORT, "rejected", planted=PLANTED)


@pytest.fixture
def finished(finished_once, tmp_path, short, capsys):
    """A copy of a finished run; nothing has been printed yet."""
    capsys.readouterr()
    return shutil.copytree(finished_once, tmp_path / finished_once.name)


def damage(directory, line, at=3):
    """Put a line, as bytes, into a journal."""
    path = directory / "journal-0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:at], line + b"\n", *lines[at:]]))


def changed(record, **values):
    return json.dumps({**record, "turn": 99, "elapsed": 1.0} | values).encode()


BROKEN = {
    "nuls": lambda record: b"\0" * 512,
    "nuls, then a record": lambda record: b"\0" * 64 + changed(record),
    "half a line": lambda record: changed(record)[:-40],
    "the second half": lambda record: changed(record)[40:],
    "no record": lambda record: b"[1, 2]",
    "a number": lambda record: b"17",
    "no utf-8": lambda record: b'{"losses": "\xff\xfe"}',
    "nothing in it": lambda record: b"{}",
    "no score": lambda record: changed({k: v for k, v in record.items() if k != "score"}),
    "no time": lambda record: json.dumps({**{k: v for k, v in record.items() if k != "elapsed"}, "turn": 99}).encode(),
    "losses that are none": lambda record: changed(record, losses={"loss": "Neg("}),
    "losses of another kind": lambda record: changed(record, losses=["Neg(p)"]),
    "a score that is no number": lambda record: changed(record, losses={"loss": "Neg(Square(p))"}, score=math.nan),
    "a baseline that is no number": lambda record: b'{"baseline": NaN, "worker": 0, "elapsed": 1}',
    "a symbol of another task": lambda record: changed(record, losses={"loss": "Neg(u)"}),
    "a branch of another task": lambda record: changed(record, losses={"mask": "Neg(p)"}),
    "a curve that is none": lambda record: changed(record, curve=[[1]]),
    "a score in words": lambda record: changed(record, score="good"),
    "counts that are infinite": lambda record: changed(record, tried={**record["tried"], "counts": {"dead": math.inf}}),
    "verdicts that are none": lambda record: changed(record, tried={**record["tried"], "verdicts": [1]}),
    "failures that are none": lambda record: changed(record, tried={**record["tried"], "failed": [1]}),
    "a turn in words": lambda record: changed(record, turn="first"),
    "a re-training without scores": lambda record: (
        b'{"retrained": "ce", "seed": 3, "scores": {"val": 1}, "elapsed": 1}'
    ),
    "a re-training of nothing": lambda record: (
        b'{"retrained": {"loss": ""}, "seed": 3, "scores": null, "seconds": 1, "worker": 0, "elapsed": 1}'
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_lines_are_skipped_and_counted(finished, capsys, kind):
    record = {**journal(finished)[0], "seconds": 1.0, "elapsed": 1.0}
    whole = fold(finished)
    damage(finished, BROKEN[kind](record))
    damage(finished, BROKEN[kind](record), at=6)
    state = fold(finished)
    assert knowledge(state) == knowledge(whole), "nothing else is lost, nothing of it has got in"
    assert state.broken == 2 and whole.broken == 0
    error = capsys.readouterr().err
    assert error.startswith("warning: ") and "journal-0.jsonl" in error and error.count("\n") == 1 and "2" in error


def test_of_all_readers_of_a_journal_one_warns(finished, tmp_path, short, capsys):
    damage(finished, b"\0" * 64)
    run(finished.parent, *SHORT, "rejected", resume=finished, planted=PLANTED)
    assert capsys.readouterr().err.count("1 broken lines were skipped (it has no 'worker')") == 1


def test_damaged_records_do_no_harm(finished, tmp_path):
    """Whatever a line says, a reader either skips it or can tell of it."""
    args, lines = arguments(tmp_path), (finished / "journal-0.jsonl").read_bytes().splitlines()
    skipped = taken = 0
    for record in (next(line for line in lines if json.loads(line).get("predicted", 0) is kind) for kind in (None, 0)):
        for k, (_, text) in enumerate(damaged(json.loads(record))):
            (directory := tmp_path / f"{len(record)}-{k}").mkdir()
            state = begin(ToyTask())
            reporter = evolve.Reporter(directory, state, args)
            (directory / "journal-0.jsonl").write_bytes(text.replace(b"\n", b" ") + b"\n")
            reporter.hear()
            skipped, taken = skipped + state.broken, taken + (not state.broken)
            reporter.board.close()
    assert skipped > 100 and taken > 20


def test_an_interrupt_that_a_library_swallowed_comes_again(tmp_path, monkeypatch):
    """For whoever reads the journal: a worker, and the launcher that only reports."""
    monkeypatch.setattr(evolve, "STOPPED", [15])
    with pytest.raises(KeyboardInterrupt, match="15"):
        evolve.Journal(tmp_path).hear(begin(ToyTask()))


def test_empty_lines_are_nothing(finished, capsys):
    whole = fold(finished)
    damage(finished, b"")
    damage(finished, b"  \r")
    state = fold(finished)
    assert knowledge(state) == knowledge(whole) and state.broken == 0 and not capsys.readouterr().err


def test_a_copied_line_counts_once(finished):
    path = finished / "journal-0.jsonl"
    whole = fold(finished)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, *(line for line in lines if b'"turn"' in line)]))
    assert knowledge(fold(finished)) == knowledge(whole)


def test_a_lost_line_shifts_nothing(finished):
    path = finished / "journal-0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    second = next(k for k, line in enumerate(lines) if b'"turn": 1,' in line)
    path.write_bytes(b"".join(lines[:second] + lines[second + 1 :]))
    state = fold(finished)
    assert state.turns == {0: {0, 2, 3, 4, 5}} and state.evaluated == 5 and state.next_turn(0) == 6
    run(finished.parent, *SHORT, "rejected", resume=finished, planted=PLANTED)
    assert [line["turn"] for line in journal(finished)] == [0, 2, 3, 4, 5, 6], "the budget is spent"


def test_a_resume_over_broken_lines_ends_as_it_should(tmp_path, short):
    with pytest.raises(Killed):
        run(tmp_path, *SHORT, "rejected", task=Fragile(5, planted=PLANTED))
    (directory,) = tmp_path.iterdir()
    damage(directory, b"\0" * 100, at=2)
    run(tmp_path, *SHORT, "rejected", resume=directory, planted=PLANTED)
    assert result_of(directory)["evaluated"] == 6


def test_only_its_owner_cuts_off_a_torn_line(tmp_path, capsys):
    path = tmp_path / "journal-0.jsonl"
    torn = b'{"a": 1}\n{"a": 2}\n{"a": '
    path.write_bytes(torn)
    whole, position = evolve.read_records(path)
    assert (whole, position) == ([{"a": 1}, {"a": 2}], len(torn) - 6) and path.read_bytes() == torn
    with path.open("ab") as file:
        file.write(b"3}\n")
    assert evolve.read_records(path, position) == ([{"a": 3}], len(torn) + 3), "it was only being written"
    path.write_bytes(torn)
    worker = Worker(tmp_path)
    worker.leave()
    assert path.read_bytes() == torn[:-6] and "torn" in capsys.readouterr().err


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Two workers in one run directory, whose signs of life change only by what they do."""
    monkeypatch.setattr(Worker, "live", lambda self: None)
    workers = [Worker(tmp_path), Worker(tmp_path)]
    yield workers
    for worker in workers:
        worker.leave()


def hang(worker):
    """Let the sign of life of a worker grow old."""
    os.utime(worker.sign, (0, 0))


def test_two_workers_have_two_ranks_and_two_files(two, tmp_path):
    assert [worker.rank for worker in two] == [0, 1]
    for worker in two:
        worker.tell({"baseline": 0.5})
    assert [line["worker"] for line in records(tmp_path)] == [0, 1]
    two[0].leave()
    assert Worker(tmp_path).rank == 0, "who goes on takes up the journal that nobody holds"


def test_a_claim_of_the_dead_is_taken_over_and_one_of_the_living_is_not(two):
    first, second = two
    assert first.claim("a job") and not second.claim("a job") and first.claim("a job")
    assert second.claim("another")
    hang(first)
    assert second.claim("a job") and not first.claim("a job")
    second.leave()
    assert first.claim("another"), "who has left has no sign of life"


def test_of_several_who_take_over_a_claim_one_has_it(two, monkeypatch):
    first, second = two
    dead = "2-gone-1"
    evolve.write_atomically(first.room / f"claim-{hashlib.blake2b(b'a job', digest_size=8).hexdigest()}", dead)
    assert first.claim("a job")
    stale, read = [dead], Path.read_text
    with monkeypatch.context() as patch:  # what the second had read just before
        patch.setattr(Path, "read_text", lambda path, *how, **more: stale.pop() if stale else read(path, *how, **more))
        assert not second.claim("a job") and not stale
    assert first.claim("a job")


def test_who_takes_over_a_journal_knows_its_owner_to_be_dead(tmp_path, monkeypatch):
    """A resume right after a kill, while the sign of life is still fresh: or it would do other jobs first."""
    monkeypatch.setattr(Worker, "live", lambda self: None)
    killed = Worker(tmp_path)
    assert killed.claim("a job")
    killed.file.close()  # what a kill does, too
    monkeypatch.setattr(os, "getpid", lambda: 1)  # another process
    resumed = Worker(tmp_path)
    assert resumed.rank == killed.rank and resumed.life != killed.life
    assert resumed.claim("a job") and not resumed.others()
    resumed.leave()


def test_who_was_to_train_the_baseline_and_died_is_replaced(two, tmp_path, short):
    first, second = two
    assert first.claim("baseline")
    args, task = arguments(tmp_path, "--evals", "1", "--without", "rejected"), ToyTask(planted=PLANTED)
    state = begin(task, "--without", "rejected")
    evolve.search(state, second, args)
    assert state.evaluated == 1 and not state.compared, "while it lives nobody else does"
    first.leave()
    args.evals = 2
    evolve.search(state, second, args)
    assert state.evaluated == 2 and state.compared and state.baseline is not None


def test_all_agree_on_the_first_answer(two):
    first, second = {"loss": "Neg(p)"}, {"loss": "Neg(y)"}
    task, (one, other) = ToyTask(), two
    assert [w.agree("short", 0, task, lambda k=k: (first, second)[k]) for k, w in enumerate(two)] == [first] * 2
    assert other.agree("found", 0, task, lambda: None) is None and one.agree("found", 0, task, lambda: first) is None
    assert other.agree("short", 1, task, lambda: second) == second, "of a larger search"


def test_jobs_are_done_once_and_those_of_the_dead_by_others(two):
    first, second = two
    task = ToyTask()
    state, other = begin(task), begin(task)
    jobs = [({"loss": str(CE)}, seed) for seed in range(3)] + [("ce", 0)]
    assert first.claim(f"{CE} 1")
    hang(first)
    second.serve(state, jobs)
    assert task.calls == [str(CE)] * 3 + ["ce"]
    first.serve(other, jobs)
    assert len(task.calls) == 4 and other.again == state.again


def test_a_job_of_the_living_is_waited_for(two, monkeypatch):
    first, second = two
    task, jobs = ToyTask(), [("ce", 0), ("ce", 1)]
    state = begin(task)
    assert first.claim("ce 0")
    naps = []

    def nap(seconds):
        naps.append(seconds)
        os.utime(first.sign)
        if len(naps) == 30:
            first.tell(evolve.retraining(task, first, "ce", 0, 1.0))

    monkeypatch.setattr(evolve.time, "sleep", nap)
    second.serve(state, jobs)
    assert len(naps) == 30 and task.calls == ["ce", "ce"] and set(state.again["ce"]) == {0, 1}


def test_who_would_wait_for_a_job_begins_others(two, monkeypatch):
    first, second = two
    task, jobs, others = ToyTask(), [("ce", 0), ("ce", 1)], [("ce", 100), ("ce", 101)]
    state = begin(task)
    assert first.claim("ce 0")
    monkeypatch.setattr(evolve.time, "sleep", lambda seconds: pytest.fail("there is work to do"))
    retraining = evolve.retraining

    def train(task, worker, losses, seed, *picture):
        if seed == 100:
            first.tell(retraining(task, first, "ce", 0))
        return retraining(task, worker, losses, seed, *picture)

    monkeypatch.setattr(evolve, "retraining", train)
    second.serve(state, jobs, others)
    assert set(state.again["ce"]) == {0, 1, 100}, "what is decided next needs no more"
    second.serve(state, jobs + others)
    assert set(state.again["ce"]) == {0, 1, 100, 101} and len(task.calls) == 4


def test_who_searches_is_waited_for_and_who_hangs_is_not(two, monkeypatch):
    first, second = two
    state, naps = begin(ToyTask()), []

    def nap(seconds):
        naps.append(seconds)
        os.utime(first.sign)
        if len(naps) == 50:
            first.tell({"baseline": 0.25})
            first.searching = False
            first.works_on(None)

    monkeypatch.setattr(evolve.time, "sleep", nap)
    second.wait_for_searching(state)
    assert len(naps) == 50 and state.baseline == 0.25
    first.searching = True
    first.works_on(None)
    hang(first)
    second.wait_for_searching(state)
    assert len(naps) == 50


def test_a_setting_that_rounding_spoils_is_not_chosen(monkeypatch):
    task, known, _ = spread(60)
    state = begin(task)
    scored(state, known)
    surrogate, solve = state.surrogate, evolve.Surrogate.solve

    def fragile(self, length, noise, trend):
        if noise < 0.01:
            raise torch.linalg.LinAlgError("not positive-definite")
        solve(self, length, noise, trend)

    monkeypatch.setattr(evolve.Surrogate, "solve", fragile)
    assert surrogate.fit(state, []).noise >= 0.01


def test_others_at_work_are_seen(two):
    first, second = two
    state = begin(ToyTask())
    first.works_on({"loss": CE})
    assert second.others_at_work(state) == [{"loss": CE}] and first.others_at_work(state) == []
    first.works_on("ce")
    assert second.others_at_work(state) == [] and len(second.others()) == 1
    hang(first)
    assert second.others() == {}


def test_minutes_end_a_search_that_nothing_passes(tmp_path):
    args = arguments(tmp_path, "--evals", "5", "--without", "surrogate")
    args.minutes = 0.02
    evolve.run(args, ToyTask(eta=2.0))  # no gain reaches it
    (directory,) = tmp_path.iterdir()
    assert result_of(directory)["evaluated"] == 0


# Proxies from several base networks

SIX = [
    "Neg(Mul(y, Log(p)))",
    "Square(Add(p, Neg(y)))",
    "Neg(Mul(y, MinPool3(p)))",
    "Neg(Mul(y, MaxPool3(p)))",
    "Mul(y, Inv(p))",
    "Neg(Mul(MeanNHW(p), y))",
]


class Lasting(ToyTask):
    """From each base network another score, by text; None: invalid."""

    bases = 3

    def __init__(self, scores):
        super().__init__()
        self.given = scores | {"ce": (0.5, 0.7, 0.8)}

    def train(self, losses, base=0):
        text = evolve.losses_text(losses)
        self.calls.append((text, base))
        self.curve = [(0, float(base))]
        if self.given[text][base] is None:
            raise InvalidLoss("step 3")
        return self.given[text][base]


def test_weights_are_kept_on_the_way():
    net, states = torch.nn.Linear(1, 1), []
    for batch in evolve.on_the_way(range(9), net, [0, 0, 2, 3], states):
        assert batch < 3, "no step more than is needed"
        torch.nn.init.constant_(net.weight, batch + 1)
    assert [state["weight"].item() for state in states[2:]] == [2, 3]
    assert len(states) == 4 and torch.equal(states[0]["weight"], states[1]["weight"])


def test_what_is_ahead_of_the_baseline_goes_on_from_later_bases():
    task = Lasting({SIX[0]: (0.6, 0.65, 0.9), SIX[1]: (0.5, 1.0, 1.0), SIX[2]: (0.6, None, 0.9), SIX[3]: (None, 1, 1)})
    state = begin(task, baseline=0.5, later=[0.7, 0.8])
    scores = {}
    for text in SIX[:4]:
        record = evolve.proxy_training(state, nobody, tried_child(state, make_child(state, text)))
        scores[text] = record["score"], record["later"]
        assert record["curve"] == [[0, 0.0]], "of the first training"
    assert scores[SIX[0]] == (pytest.approx(0.6 - 0.05 + 0.1), [0.65, 0.9])
    assert scores[SIX[1]] == (0.5, []) and scores[SIX[3]] == (None, []), "what is not ahead is not trained again"
    assert scores[SIX[2]] == (None, [None, 0.9]), "invalid later is invalid"
    assert [base for text, base in task.calls if text == SIX[0]] == [0, 1, 2]
    state.later = [None, 0.8]
    shown, _ = evolve.train_by_proxy(state, {"loss": parse(SIX[0])})
    assert shown["score"] == pytest.approx(0.7), "where the baseline failed"


@pytest.mark.parametrize("known, given", [(0.7, 0.39), (0.4, 0.19)])
def test_what_is_further_ahead_than_all_before_is_trained_from_random_weights(known, given):
    class Witnessed(Lasting):
        def witness(self, losses, seed):
            asked.append((evolve.losses_text(losses), seed))
            if losses["loss"] == parse(SIX[3]):
                raise InvalidLoss("step 3")
            return given if losses["loss"] == parse(SIX[0]) else 0.65

    leads = dict(zip(SIX, (0.1, 0.2, 0.014, 0.3, 0.24, 0.26)))
    task, asked = Witnessed({text: (0.5 + lead, 0.7, 0.8) for text, lead in leads.items()}), []

    def shown(text):
        child = tried_child(state, make_child(state, text))
        record = evolve.proxy_training(state, nobody, child) | {"worker": 0, "turn": state.evaluated, "elapsed": 0.0}
        state.absorb(json.loads(json.dumps(record)))
        return record["score"], record["witness"]

    state = begin(task, baseline=0.5, later=[0.7, 0.8], witness=known)
    assert shown(SIX[2]) == (0.514, None), "does not promise enough"
    assert shown(SIX[0]) == (None, given), "hardly learns"
    assert shown(SIX[3]) == (None, None), "becomes invalid"
    assert state.counts["invalid"] == 2 and state.proven == -math.inf
    assert shown(SIX[1]) == (0.7, 0.65) and state.proven == 0.7
    assert shown(SIX[0]) == (0.6, None) and shown(SIX[4]) == (0.74, None), "hardly more is not asked"
    assert shown(SIX[5]) == (0.76, 0.65)
    assert asked == [(SIX[k], 50) for k in (0, 3, 1, 5)]
    state = begin(task, "--without", "unstable", baseline=0.5, later=[0.7, 0.8])
    assert shown(SIX[1]) == (0.7, None) and len(asked) == 4
    assert evolve.witness_score(state, {"loss": CE}) is None and len(asked) == 4
    assert evolve.witness_score(begin(task), {"loss": CE}) == given
    task.witness = lambda *what: evolve.Task.witness(task, *what)
    assert evolve.witness_score(begin(task), {"loss": CE}) is None, "of a task without"


def test_the_baseline_is_trained_from_every_base(tmp_path, short):
    scores = {text: (0.9, 0.8, 0.85) for text in SIX}

    class Any(Lasting):
        def train(self, losses, base=0):
            self.given.setdefault(evolve.losses_text(losses), (0.4, 0.0, 0.0))
            return super().train(losses, base)

        def witness(self, losses, seed):
            return 0.9

    directory = run(tmp_path, *SHORT, "rejected", task=Any(scores))
    (baseline,) = (line for line in records(directory) if "baseline" in line)
    assert (baseline["baseline"], baseline["later"], baseline["witness"]) == (0.5, [0.7, 0.8], 0.9)
    state = begin(ToyTask())
    state.absorb(baseline | {"elapsed": 0})
    assert (state.baseline, state.later, state.witness) == (0.5, [0.7, 0.8], 0.9)
    del baseline["later"], baseline["witness"]
    state.absorb(baseline | {"elapsed": 0})
    assert list(state.later) == [] and state.witness is None, "of an earlier version"


# Closing round


def converge(tmp_path, scores, *argv):
    """The closing round over losses with these scores of trainings: the found loss, and the seeds of all trainings."""

    class Given(ToyTask):
        def retrain(self, losses, seed, picture=None, checkpoint=None):
            text = evolve.losses_text(losses)
            given = scores.get(text, 0.0)
            score = given(seed) if callable(given) else given
            if score is None:
                raise InvalidLoss("step 3")
            trained.setdefault(text, []).append(seed)
            return {"val": {"toy": score}, "test": {"toy": score}}

    trained, task = {}, Given()
    state = begin(task)
    tmp_path.mkdir(exist_ok=True)
    worker = Worker(tmp_path)
    scored(state, {text: 0.9 - 0.01 * k for k, text in enumerate(scores)})
    args = arguments(tmp_path, *argv)
    state.choice_seeds = evolve.choice_seeds(args.seed)
    evolve.close(state, worker, args)
    worker.leave()
    return json.loads((tmp_path / "workers" / f"found-{state.evaluated}.json").read_text()), trained


def test_what_a_run_has_re_trained_is_not_re_trained_when_it_goes_on(tmp_path, short):
    directory = run(tmp_path, "--evals", "8", "--seeds", "2", "--without", "rejected", planted=PLANTED)
    before = retrained(directory)
    run(tmp_path, "--evals", "12", "--seeds", "2", "--without", "rejected", resume=directory, planted=PLANTED)
    told = [(evolve.losses_text(line["retrained"]), line["seed"]) for line in retrained(directory)]
    assert len(told) > len(before) and len(told) == len({*told})
    (*_, last) = sorted((directory / "workers").glob("finalists-*"), key=lambda path: path.stat().st_mtime)
    finalists = [evolve.losses_text(losses) for losses in json.loads(last.read_text())]
    best = max(before, key=lambda line: line["seed"] == 50 and line["scores"]["val"]["toy"])
    assert evolve.losses_text(best["retrained"]) in finalists, "what was the best then is a finalist again"


def test_the_table_of_the_baseline_is_begun_before_the_decision(tmp_path, monkeypatch):
    serve, meanwhile = Worker.serve, []

    def listen(self, state, jobs, others=()):
        meanwhile.append([(losses, seed) for losses, seed, _ in others])
        serve(self, state, jobs, others)

    monkeypatch.setattr(Worker, "serve", listen)
    _, trained = converge(tmp_path, {"Neg(Neg(Neg(Mul(y, p))))": 0.7, "Neg(y)": 0.5}, "--seeds", "2")
    baseline = [("ce", seed) for seed in trained["ce"]]
    assert len(baseline) == 2 and meanwhile == [*[baseline] * 3, []], "finalists, one in short, the table"


def test_halving_keeps_the_better_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(evolve.Task, "rungs", ((6, 1), (3, 2), (2, 4)))
    found, trained = converge(tmp_path, dict(zip(SIX, (0.1, 0.6, 0.2, 0.8, 0.3, 0.7))), "--seeds", "2")
    table = [evolve.TABLE_SEEDS, evolve.TABLE_SEEDS + 1]
    assert found == {"loss": SIX[3]}
    last = [50, 51, 52, 53]
    assert [trained[text] for text in SIX] == [[50], [50, 51], [50], [*last, *table], [50], last]
    assert trained["ce"] == table


def test_the_mean_over_seeds_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(evolve.Task, "rungs", ((3, 1), (3, 4)))
    lucky = {SIX[0]: lambda seed: 0.9 if seed == 50 else 0.1, SIX[1]: 0.5, SIX[2]: 0.4}
    found, _ = converge(tmp_path, lucky, "--seeds", "2")
    assert found == {"loss": SIX[1]}


def test_seeds_bound_the_rungs(tmp_path, monkeypatch):
    monkeypatch.setattr(evolve.Task, "rungs", ((2, 1), (2, 6)))
    _, trained = converge(tmp_path, {SIX[0]: 0.5, SIX[1]: 0.4}, "--seeds", "1", "--seed", "7")
    assert trained[SIX[1]] == [57, 58] and trained["ce"] == [7 + evolve.TABLE_SEEDS]


def test_ties_go_to_the_better_proxy(tmp_path, monkeypatch):
    monkeypatch.setattr(evolve.Task, "rungs", ((4, 1), (2, 2)))
    strangers = [SIX[k] for k in (0, 2, 3, 5)]
    found, trained = converge(tmp_path, dict.fromkeys(strangers, 0.5))
    assert found == {"loss": SIX[0]} and trained[SIX[2]] == [50, 51] and trained[SIX[3]] == [50]


def test_one_invalid_training_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(evolve.Task, "rungs", ((3, 1), (2, 3)))
    unstable = {SIX[0]: None, SIX[1]: lambda seed: None if seed == 52 else 0.9, SIX[2]: 0.3}
    assert converge(tmp_path, unstable)[0] == {"loss": SIX[2]}


def test_all_invalid_in_the_last_rung_falls_back_to_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setattr(evolve.Task, "rungs", ((3, 1), (2, 2)))
    late = {text: lambda seed: 0.9 if seed == 50 else None for text in SIX[:2]}
    assert converge(tmp_path, {**late, SIX[2]: 0.3})[0] == {"loss": SIX[2]}


def test_where_the_best_fail_with_another_seed_the_next_ones_follow(tmp_path, monkeypatch):
    monkeypatch.setattr(evolve.Task, "rungs", ((5, 1), (2, 2)))
    late = {text: lambda seed: 0.9 if seed == 50 else 0.2 for text in SIX[:3]}
    found, trained = converge(tmp_path, {**late, SIX[3]: 0.7, SIX[5]: 0.65}, "--seeds", "1")
    assert found == {"loss": SIX[3]} and 51 in trained[SIX[3]] and trained[SIX[5]] == [50]


@pytest.mark.parametrize("failing", [0.71, None])
@pytest.mark.parametrize("rungs", [((2, 1),), ((2, 1), (2, 2))])
def test_where_a_finalist_fails_the_next_has_its_turn(tmp_path, monkeypatch, rungs, failing):
    monkeypatch.setattr(evolve.Task, "rungs", rungs)
    strangers = [SIX[k] for k in (0, 2, 3, 5)]
    found, trained = converge(tmp_path / "fail", dict(zip(strangers, (0.8, failing, 0.85, 0.9))), "--seeds", "1")
    assert found == {"loss": strangers[2]} and strangers[3] not in trained, "two that hold are enough"
    found, trained = converge(tmp_path / "hold", dict(zip(strangers, (0.8, 0.73, 0.85, 0.9))), "--seeds", "1")
    assert found == {"loss": strangers[0]} and strangers[2] not in trained
    found, _ = converge(tmp_path / "none", dict(zip(strangers, (None, None, 0.85, 0.9))), "--seeds", "1")
    assert found == {"loss": strangers[3]}, "until two have learned"
    found, _ = converge(tmp_path / "all", dict(zip(strangers, (None, None, None, None))), "--seeds", "1")
    assert found is None


def test_what_others_have_trained_meanwhile_changes_no_decision(tmp_path, monkeypatch):
    """All workers compare with the next finalist's first seeds, whichever further ones they have heard of."""
    monkeypatch.setattr(evolve.Task, "rungs", ((3, 1), (1, 2)))
    select, early = evolve.select_finalists, {"retrained": {"loss": SIX[1]}, "seed": 51, "seconds": 1.0}

    def heard(state):
        state.absorb({**early, "worker": 1, "elapsed": 1.0, "scores": {"val": {"toy": 0.2}, "test": {"toy": 0.2}}})

    monkeypatch.setattr(evolve, "select_finalists", lambda state: heard(state) or select(state))
    late = {text: lambda seed, text=text: {SIX[0]: 0.9, SIX[1]: 0.78}[text] if seed == 50 else 0.2 for text in SIX[:2]}
    assert converge(tmp_path, {**late, SIX[3]: 0.77})[0] == {"loss": SIX[3]}


def test_finalists_of_a_version_with_more_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(evolve.Task, "rungs", ((2, 1),))
    monkeypatch.setattr(evolve, "select_finalists", lambda state: [{"loss": text} for text in SIX[:4]])
    found, trained = converge(tmp_path, dict.fromkeys(SIX[:4], 0.5) | {SIX[3]: 0.9})
    assert found == {"loss": SIX[0]} and SIX[3] not in trained


@pytest.mark.parametrize("again, goes_on", [(0.56, False), (0.52, True)])
def test_a_tenth_behind_the_next_one_has_failed(tmp_path, monkeypatch, again, goes_on):
    monkeypatch.setattr(evolve.Task, "rungs", ((3, 1), (1, 2)))
    found, trained = converge(tmp_path, {SIX[0]: lambda seed: 0.9 if seed == 50 else again, SIX[3]: 0.8})
    assert (51 in trained[SIX[3]]) == goes_on == (found == {"loss": SIX[3]})


def test_no_valid_training_at_all(tmp_path, capsys):
    class Never(ToyTask):
        def retrain(self, losses, seed, picture=None, checkpoint=None):
            if losses != "ce":
                raise InvalidLoss("step 9")
            return super().retrain(losses, seed)

    directory = run(tmp_path, "--evals", "4", "--seeds", "1", "--without", "rejected", task=Never())
    printed = capsys.readouterr().out
    assert "no valid loss was found" in printed and "take the found loss" not in printed and "best_loss" not in printed
    assert result_of(directory)["losses"] == {} and result_of(directory)["test"]["found"] == {}
    assert "re-training, seed 50: toy invalid" in printed


LONG = "Neg(Mul(Add(y, Mul(1, MeanC(1))), Log(p)))"


def test_shortening_keeps_directions():
    task = ToyTask()
    branch = task.branches["loss"]
    branch.scale_free = True
    for text, wanted in {
        "Neg(Mul(y, Log(Abs(p))))": "Neg(Mul(y, Log(p)))",
        "Exp(Neg(Mul(1, Mul(y, MeanNHW(p)))))": None,
        "Tanh(Mul(Add(1, 1), Neg(Mul(Abs(y), Abs(Log(Sqrt(Square(p))))))))": None,
        "Neg(Mul(y, MinPool3(p)))": "Neg(Mul(y, MinPool3(p)))",
        "Neg(Mul(y, Neg(Neg(Log(p)))))": str(canonical(CE)),
    }.items():
        (short,) = evolve.shorten(task, {"loss": text}).values()
        assert wanted in (None, short) and len(evolve.nodes(parse(short))) <= len(evolve.nodes(parse(text)))
        one, two = (gradient_of(loss, branch) for loss in (text, short))
        assert (F.cosine_similarity(one, two, dim=-1) >= evolve.SAME).all()
        assert evolve.shorten(task, {"loss": short}) == {"loss": short}, "nothing is left to cut"


def test_shortening_keeps_the_scale_where_it_counts():
    task = ToyTask()
    twice = {"loss": "Mul(Add(1, 1), Neg(Mul(y, Log(p))))"}
    assert evolve.shorten(task, twice) == twice
    task.branches["loss"].scale_free = True
    assert evolve.shorten(task, twice) == {"loss": "Neg(Mul(y, Log(p)))"}


@pytest.mark.parametrize("score, kept", [(0.5, True), (0.49, False), (None, False)])
def test_the_short_formula_must_train_as_well(tmp_path, score, kept):
    long, brief = "Neg(Mul(y, Log(Abs(p))))", "Neg(Mul(y, Log(p)))"
    found, trained = converge(tmp_path, {long: 0.5, brief: score} | {SIX[1]: 0.1})
    assert brief not in found.values() or kept
    assert found == {"loss": brief if kept else long}


def test_finalists_are_no_relatives(monkeypatch):
    task = ToyTask()
    names = ["Neg(Mul(y, Log(p)))", "Neg(Mul(y, Log(Tanh(p))))", "Neg(Mul(y, MaxPool3(p)))", "Mul(y, MinPool3(p))"]
    points = [Surrogate().point(task, {"loss": parse(text)}) for text in names]
    near = [[(one - two).square().sum().item() / 2 < 1 - evolve.RELATED for one in points] for two in points]
    assert near == [[j == k or j + k == 1 for j in range(4)] for k in range(4)], "the first two are alike"

    def finalists(scores, baseline, number=4):
        state = begin(task, "--without", "surrogate", baseline=baseline)
        scored(state, scores)
        return [losses["loss"] for losses in evolve.select_finalists(state)]

    ranking = {text: 0.9 - 0.1 * k for k, text in enumerate(names)}
    assert finalists(ranking, 0.5) == finalists(ranking, None) == [names[k] for k in (0, 2, 3, 1)], "relatives wait"
    assert finalists(ranking, 0.75) == names, "a stranger that loses to the baseline is no better than a relative"
    state = begin(task, "--without", "surrogate", baseline=0.5)
    scored(state, ranking)
    again(state, names[3], 0.55)
    chosen = [losses["loss"] for losses in evolve.select_finalists(state)]
    assert chosen == [names[k] for k in (3, 0, 2, 1)], "who was re-trained before comes first"
    again(state, names[0], None)
    chosen = [losses["loss"] for losses in evolve.select_finalists(state)]
    assert chosen == [names[k] for k in (3, 1, 2, 0)], "who became invalid comes last, its relative not"
    assert finalists({}, 0.5) == [] == finalists({names[0]: None}, 0.5)
    equal = dict(zip((names[0], names[2], names[3]), (0.9, 0.9, 0.8)))
    assert finalists(equal, 0.0) == [names[k] for k in (0, 3, 2)], "equal scores: equivalent losses"
    monkeypatch.setattr(evolve.Task, "rungs", ((2, 1),))
    assert finalists(ranking, 0.5) == [names[k] for k in (0, 2, 3)], "others to replace them, but no relatives"
    assert finalists(ranking, 0.65) == [names[k] for k in (0, 2)], "nor what is behind"


def test_scores_are_means_over_seeds_on_the_search_validation_split():
    state = begin(ToyTask())
    for text, seed, val, test in (("p", 50, 0.9, 0.1), ("p", 51, 0.1, 0.9), ("y", 50, 0.6, 0.2), ("y", 51, None, 0)):
        scores = None if val is None else {"val": {"toy": val}, "test": {"toy": test}}
        state.absorb(STAMP | {"retrained": {"loss": text}, "seed": seed, "scores": scores})
    assert state.full_score("p") == pytest.approx(0.5) and state.full_score("p", range(50, 51)) == 0.9
    assert state.full_score("y") == -math.inf and state.full_score("1") is None
    assert state.full_score("y", range(50, 51)) == 0.6
    again(state, "p", 0.0, first=evolve.TABLE_SEEDS)
    assert state.full_score("p") == pytest.approx(0.5), "nothing is chosen by the seeds of the closing table"
    again(state, "1", 0.3, first=0)
    assert state.full_score("1") is None, "earlier versions had shorter trainings with these seeds"


def test_who_was_re_trained_leads_the_hall_of_fame():
    state = begin(ToyTask())
    scored(state, {text: 0.9 - 0.1 * k for k, text in enumerate(SIX)})
    again(state, SIX[1], 0.6)
    again(state, SIX[2], 0.7)
    again(state, SIX[4], None)
    assert [result.text for result in state.hall_of_fame()] == [SIX[k] for k in (2, 1, 0, 3, 5, 4)]


def runs_of(*values):
    return [value if value is None else {"test": {"toy": value}} for value in values]


@pytest.mark.parametrize(
    "found, baseline, wanted, words",
    [
        ((0.7, 0.8, 0.9), (0.5, 0.5, 0.5), (0.3, 0.1 / 3**0.5), "ahead of ce: toy +0.300 (0.058)"),
        ((0.7, None, 0.9), (0.5, 0.6, None), (0.2, None), "+0.200 (one seed)"),
        ((0.6, 0.5), (0.5, 0.5), (0.05, 0.05), "too little to be sure"),
        ((0.4, 0.5), (0.5, 0.5), (-0.05, 0.05), "nothing better than ce was found: toy -0.050 (0.050)"),
        ((0.51, 0.4908), (0.5, 0.5), (0.0004, 0.0096), "nothing better than ce was found: toy +0.000 (0.010)"),
        ((0.7,), (0.5,), (0.2, None), "too little to be sure"),
        ((0.4,), (0.5,), (-0.1, None), "nothing better than ce"),
        ((None,), (0.5,), (), "with no seed both it and ce stayed valid"),
    ],
)
def test_difference_over_paired_seeds_and_its_words(found, baseline, wanted, words):
    runs = {"found": runs_of(*found), "baseline": runs_of(*baseline)}
    difference = evolve.paired_difference(runs, "toy")
    assert difference == [value if value is None else pytest.approx(value) for value in wanted]
    told = evolve.verdict_in_words(ToyTask(), "toy", {"toy": difference})
    assert words in told and told.count("\n") == 0
    assert ("0.000)" in told) is False, "one seed has no error"


def test_the_found_loss_is_listed_behind_any_number_of_others(tmp_path, capsys, monkeypatch):
    fame = evolve.State.hall_of_fame
    monkeypatch.setattr(evolve.State, "hall_of_fame", lambda state: fame(state)[1:] + fame(state)[:1])
    run(tmp_path, "--evals", "14", "--seeds", "1", "--without", "rejected,surrogate", planted=PLANTED)
    rows = capsys.readouterr().out.split("loss (toy on the")[1].split("test split")[0]
    assert rows.count(">>>>") == 1


def test_out_of_memory_is_no_damage(tmp_path, monkeypatch):
    def full(*args, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(torch.OutOfMemoryError):
        evolve.read_weights(tmp_path / "base.pt", "cuda", list, "remove it")


def test_machines_write_unfinished_files_of_their_own(tmp_path, monkeypatch):
    parts, write_bytes = [], Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, content: parts.append(path) or write_bytes(path, content))
    evolve.write_atomically(tmp_path / "a", "here")
    monkeypatch.setattr(evolve.socket, "gethostname", lambda: "elsewhere")
    evolve.write_atomically(tmp_path / "a", "there")
    assert parts[0] != parts[1] and (tmp_path / "a") not in parts
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "there")]


def test_of_equivalent_trees_the_first_verdict_stands():
    state = begin(ToyTask())
    state.learn("loss", "p", "rejected", "key", 0.1)
    state.learn("loss", "y", evolve.PASSED, "key", 0.9)
    assert state.keys["loss", "key"].gate == "rejected" and state.verdicts["loss", "y"].gate == evolve.PASSED


def test_who_must_write_is_told_where_a_file_is_in_the_way(tmp_path, monkeypatch):
    def there(*what):
        raise FileExistsError(17, "File exists", "a")

    monkeypatch.setattr(Path, "replace", there)
    with pytest.raises(FileExistsError):
        evolve.write_atomically(tmp_path / "a", "b")
    evolve.write_atomically(tmp_path / "a", "first", once=True)
    evolve.write_atomically(tmp_path / "a", "second", once=True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["first"]


def test_trainings_that_became_invalid_are_told(capsys):
    told = evolve.verdict_in_words(ToyTask(), "toy", {"toy": [0.3, None]}, invalid=2)
    assert "2 of its trainings became invalid" in told and "ahead" not in told
    evolve.show_table({"found": {"toy": [0.8]}, "ce": {"toy": [0.9, 0.5, 0.9]}}, ("toy",), "toy", 3, ahead={})
    printed = capsys.readouterr().out
    assert "over 3 fresh seeds" in printed and printed.endswith(
        "found: 2 of 3 trainings became invalid; the others count\n"
    )
    evolve.show_table({"ce": {"toy": [0.9]}}, ("toy",), "toy", 1)
    assert "over 1 seed\n" in capsys.readouterr().out, "which need not be fresh to a loss that was named"
    evolve.show_invalid({"ce": {"toy": [0.9, 0.5]}}, 2)
    assert "invalid" not in capsys.readouterr().out


def test_files_of_a_run(tmp_path, short, capsys):
    directory = run(tmp_path, "--evals", "6", "--seeds", "2", "--without", "rejected", planted=PLANTED)
    for name in ("args.json", "journal-0.jsonl", "hall_of_fame.csv", "best_loss.py", "result.json"):
        assert (directory / name).stat().st_size > 0, name
    result = result_of(directory)
    counts = sum((Counter(line["tried"]["counts"]) for line in journal(directory)), Counter())
    assert result["explored"] == counts.total() + 6 and result["evaluated"] == 6
    assert {gate: n for gate, n in result["gates"].items() if n and gate != "invalid"} == dict(counts)
    assert len(result["test"]["found"]["toy"]) == len(result["test"]["baseline"]["toy"]) == 2
    mean, error = result["difference"]["toy"]
    gaps = [f - b for f, b in zip(result["test"]["found"]["toy"], result["test"]["baseline"]["toy"])]
    assert mean == pytest.approx(sum(gaps) / 2) and error == pytest.approx(abs(gaps[0] - gaps[1]) / 2)
    head, first, *_ = csv.reader((directory / "hall_of_fame.csv").read_text().splitlines())
    assert head == ["rank", "proxy_toy", "retrained_toy", "gain", "loss"]
    again: dict[str, list] = {}
    for line in retrained(directory):
        if line["seed"] in evolve.choice_seeds(0):
            again.setdefault(line["retrained"]["loss"], []).append(line["scores"]["val"]["toy"])
    again = {text: sum(scores) / len(scores) for text, scores in again.items()}
    text = max(again, key=again.get)
    proxy = {line["losses"]["loss"]: line["score"] for line in journal(directory)}[text]
    assert (
        first[:3] + first[4:] == ["1", str(proxy), str(round(again[text], 6)), text]
        and abs(again[text] - proxy) > 0.001
    )
    assert f"{proxy:>7.3f}  {again[text]:>10.3f}  {text}" in capsys.readouterr().out, "in the list at the end"
    assert evolve.read_found(directory, ToyTask, "--loss") == {k: parse(v) for k, v in result["losses"].items()}


def test_lineage_goes_back_to_a_random_tree(tmp_path, short):
    directory = run(tmp_path, "--evals", "14", "--without", "rejected", planted=PLANTED)
    args = arguments(tmp_path)
    parents = {line["losses"]["loss"]: line["parent"] and line["parent"]["loss"] for line in journal(directory)}
    reporter = evolve.Reporter(directory, evolve.make_state(args, ToyTask()), args)
    youngest = max(parents, key=lambda text: parents[text] is not None)
    proxies, again, rows = zip(*(line.split(None, 2) for line in reporter.lineage(youngest).splitlines()[2:-1]))
    scores = [(reporter.state.results[text].score, reporter.state.full_score(text)) for text in rows]
    assert [*zip(proxies, again)] == [tuple(evolve.shown(score).strip() for score in pair) for pair in scores]
    assert {score for _, score in scores} - {None}, "one of them was re-trained"
    assert len(rows) > 1 and rows[0] == youngest and parents[rows[-1]] is None
    assert all(parents[child] == parent for child, parent in itertools.pairwise(rows))
    reporter.board.close()


@pytest.mark.parametrize("place", [0, 1])
def test_two_evaluations_at_once_are_told_apart(tmp_path, capsys, place):
    """The star, and the curve, are those of the better one; each has the second at which it came."""
    best, other = (lines := explore(begin(ToyTask()), 2))[:: 1 - 2 * place]
    reporter = evolve.Reporter(tmp_path, evolve.make_state(arguments(tmp_path), ToyTask()), arguments(tmp_path))
    best["score"], other["score"], lines[0]["elapsed"], lines[1]["elapsed"] = 0.9, 0.2, 10.0, 11.0
    best["witness"], other["witness"] = 0.75, None
    late = STAMP | {"retrained": "ce", "seed": 1, "scores": None, "elapsed": 900.0}
    (tmp_path / "journal-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, late]))
    capsys.readouterr()
    reporter.hear()
    reporter.board.close()
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("eval")]
    assert ["*" in line for line in told] == [place == k for k in (0, 1)]
    assert told[place].endswith(f"* {best['losses']['loss']}")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [tag for tag in events.Tags()["scalars"] if tag.startswith("proxy_curve")] == [f"proxy_curve/000{place + 1}"]
    assert [event.step for event in events.Scalars("search/best_by_second")] == [10, 11]
    assert [event.value for event in events.Scalars("search/witness")] == [0.75], "of the one that was asked"


@pytest.mark.parametrize("same", [True, False])
def test_a_proxy_that_tells_no_losses_apart_is_told(tmp_path, capsys, same):
    lines = explore(begin(ToyTask()), 12)
    reporter = evolve.Reporter(tmp_path, evolve.make_state(arguments(tmp_path), ToyTask()), arguments(tmp_path))
    for line in lines:
        line["score"] = 0.25
    lines[3]["score"] = 0.25 if same else 0.26
    (tmp_path / "journal-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reporter.hear()
    reporter.board.close()
    assert capsys.readouterr().err.count("more --proxy-steps may tell losses apart") == same


def test_gradients_are_drawn():
    task = ToyTask()
    task.branches["loss"].baseline = str(CE)

    def points(loss):
        plot = cv2.imdecode(np.frombuffer(evolve.draw_gradients(task, {"loss": loss}), np.uint8), cv2.IMREAD_COLOR)
        return [set(zip(*np.nonzero((plot[45:335] == colour).all(-1)))) for colour in ((200, 80, 0), (170, 170, 170))]

    blue, grey = points(str(CE))
    assert blue and not grey, "on top of each other"
    rows, columns = np.array(sorted(blue)).T
    assert np.corrcoef(rows, columns)[0, 1] < -0.99, "p - 1, upwards"
    blue, grey = points("Neg(Mul(y, p))")
    assert blue and grey
    rows, columns = np.array(sorted(blue)).T
    lowest = columns[rows == rows.max()].mean()
    assert 200 < lowest < 280, "p (p - 1): the pull is strongest in the middle"


def test_an_unfinished_run_gives_its_best_so_far(tmp_path, short):
    with pytest.raises(Killed):
        run(tmp_path, *SHORT, "rejected", task=Fragile(5, planted=PLANTED))
    (directory,) = tmp_path.iterdir()
    first, *_, best = sorted(journal(directory), key=lambda line: line["score"] or -1)
    path = directory / "journal-0.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"retrained"' not in line))
    assert evolve.texts(evolve.read_found(directory, ToyTask, "--loss")) == best["losses"]
    proven = STAMP | {
        "retrained": first["losses"],
        "seed": evolve.choice_seeds(5)[0],
        "scores": {k: {"toy": 0.1} for k in ("val", "test")},
    }
    with path.open("a") as file:
        file.write(json.dumps(proven) + "\n")
    assert evolve.texts(evolve.read_found(directory, ToyTask, "--loss")) == first["losses"], "proven by a re-training"


@pytest.fixture
def interruptible():
    """As in a real run; what has come is forgotten at the end."""
    before = signal.signal(signal.SIGTERM, evolve.interrupt)
    yield
    signal.signal(signal.SIGTERM, before)
    evolve.STOPPED.clear()


def amid(function):
    """`function`, with SIGTERM coming before it has done anything; what it was done with."""
    done = []

    def interrupted(*what, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        function(*what, **more)
        done.append(what)

    return interrupted, done


def test_signals_wait_while_tensorboard_is_written(tmp_path, monkeypatch, interruptible):
    """An exception amid its work leaves its queue such that closing it would never end."""
    args = arguments(tmp_path)
    reporter = evolve.Reporter(tmp_path, evolve.make_state(args, ToyTask()), args)
    worker = Worker(tmp_path)
    worker.tell({"baseline": 0.5})
    interrupted, written = amid(reporter.board.add_scalar)
    monkeypatch.setattr(reporter, "tell_baseline", lambda: interrupted("search/baseline", 0.5, 0))
    with pytest.raises(KeyboardInterrupt):
        reporter.hear()
    assert len(written) == 1 and evolve.STOPPED == [signal.SIGTERM]
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    worker.leave()
    reporter.board.close()


@pytest.mark.parametrize("moment", ["add_text", "add_hparams", "close"])
def test_signals_wait_at_the_end_of_a_run(tmp_path, short, monkeypatch, interruptible, moment):
    board = tensorboard.SummaryWriter
    interrupted, written = amid(getattr(board, moment))

    def at_the_end(self, *what, **more):
        over = moment == "close" or (what and what[0] == "found/closing_table") or moment == "add_hparams"
        (interrupted if over else before)(self, *what, **more)

    before = getattr(board, moment)
    monkeypatch.setattr(board, moment, at_the_end)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *SHORT, "rejected", planted=PLANTED)
    assert len(written) == (2 if moment == "close" else 1), "hyperparameters have a writer of their own"


def test_signals_wait_while_a_curve_is_written(tmp_path, monkeypatch, interruptible):
    class Curved(ToyTask):
        def retrain(self, *what, **how):
            self.curve = [(0, 1.0)]
            return super().retrain(*what, **how)

    board = tensorboard.SummaryWriter
    interrupted, written = amid(board.add_scalar)
    monkeypatch.setattr(board, "add_scalar", interrupted)
    args = arguments(tmp_path)
    args.compare = "ce"
    with pytest.raises(KeyboardInterrupt):
        evolve.train_once(args, Curved(), "ce", "ce", 0, evolve.Checkpoint(tmp_path / "training_0_0.pt", 1))
    assert len(written) == 1


def test_only_searching_takes_from_the_minutes(tmp_path, short):
    directory = run(tmp_path, *SHORT, "rejected", planted=PLANTED)
    path, number = directory / "journal-0.jsonl", result_of(directory)["evaluated"]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    closing = [line for line in lines if "retrained" in line]
    for line in closing:
        line["elapsed"] = 1e6
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "gradients.png").write_bytes(b"of another loss")
    run(tmp_path, *SHORT, "rejected", "--evals", str(number + 3), resume=directory, planted=PLANTED)
    assert result_of(directory)["evaluated"] == number + 3, "though the closing round took longer than --minutes"
    assert (directory / "gradients.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_so_far_never_falls(tmp_path, monkeypatch):
    """Though it has left the population."""
    monkeypatch.setattr(evolve, "POPULATION", 2)
    directory = run(tmp_path, "--evals", "12", "--seeds", "1", "--without", "surrogate", planted=PLANTED)
    events = EventAccumulator(str(directory))
    events.Reload()
    best = [event.value for event in events.Scalars("found/best")]
    scores = [line["score"] for line in journal(directory)]
    assert best == pytest.approx([max(scores[: k + 1]) for k in range(len(scores))]), "of all, not of two"
    assert max(scores[-2:]) < best[-1] == pytest.approx(max(scores))


def test_what_goes_wrong_in_a_training_its_worker_says(tmp_path, monkeypatch, capsys):
    class Late(ToyTask):
        def train(self, losses, base=0):
            raise evolve.DataError("img_77.jpg: cut off")

    monkeypatch.setenv("AUTOLOSS_RUN_DIR", str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    args = arguments(tmp_path)
    args.data_root, args.wanted, args.resume = tmp_path, {}, None
    with pytest.raises(SystemExit) as stop:
        evolve.main(args, lambda args: Late())
    assert stop.value.code == 2 and "img_77.jpg: cut off" in capsys.readouterr().err


@pytest.mark.parametrize("launched", [False, True])
def test_what_the_launcher_said_its_workers_do_not_repeat(tmp_path, monkeypatch, capsys, launched):
    class Loud(ToyTask):
        def __init__(self, args):
            evolve.note(f"of the data, {launched}")
            evolve.warn_once(f"beware, {launched}")
            super().__init__()

        def load(self):
            evolve.note(f"while loading, {launched}")
            raise evolve.DataError("enough")

    if launched:
        monkeypatch.setenv("AUTOLOSS_RUN_DIR", str(tmp_path))
        monkeypatch.setenv("RANK", "0")
    args = arguments(tmp_path)
    args.data_root, args.wanted, args.resume = tmp_path, {}, None
    with pytest.raises(SystemExit):
        evolve.main(args, Loud)
    told = capsys.readouterr()
    assert ("of the data" in told.out) == ("beware" in told.err) == (not launched)
    assert "while loading" in told.out and "enough" in told.err, "the launcher loads nothing"


def test_a_score_that_is_no_number_is_none(tmp_path):
    class Odd(ToyTask):
        def retrain(self, losses, seed, picture=None, checkpoint=None):
            return {"val": {"toy": 0.5}, "test": {"toy": math.nan if seed == 2 else 0.4}}

    assert evolve.retraining(Odd(), nobody, "ce", 1)["scores"]["test"] == {"toy": 0.4}
    assert evolve.retraining(Odd(), nobody, "ce", 2)["scores"] is None
    args = arguments(tmp_path)
    args.compare = "ce"
    for seed, valid in ((1, True), (2, False)):
        checkpoint = evolve.Checkpoint(tmp_path / f"training_0_{seed}.pt", 5)
        line = evolve.train_once(args, Odd(), "ce", "ce", seed, checkpoint)
        assert (line["scores"] is not None) == valid and ("toy on test" in line.get("invalid", "")) != valid


def test_journals_are_read_in_order_of_time(tmp_path):
    """Or the newest candidates would be those of the worker whose file is read last."""
    task = ToyTask()
    lines = {0: [], 1: []}
    for k, text in enumerate(spread(12)[1]):
        state = begin(task)
        scored(state, {text: 0.5})
        child = make_child(state, text)
        child.tried = {"counts": {}, "verdicts": [], "reused": [], "failed": []}
        worker = k * 7 % 2
        elapsed = k if k != 5 else 0  # a clock that was set back: a file keeps its own order
        stamp = {"worker": worker, "turn": k, "elapsed": elapsed}
        lines[worker].append(json.dumps(evolve.proxy_training(state, nobody, child) | stamp))
    for worker, text in lines.items():
        (tmp_path / f"journal-{worker}.jsonl").write_text("\n".join(text) + "\n")
    state = begin(task)
    evolve.Journal(tmp_path).hear(state)
    known = [*spread(12)[1]]
    assert [*state.results] == [known[k] for k in (0, 1, 2, 3, 5, 4, 6, 7)]


# Other searches


def test_a_program_is_the_tree_of_its_last_register():
    memory = {"y": 0, "p": 1, "1": 2, "last": 2 + evolve.REGISTERS}
    program = [
        ("Log", memory["p"], 0, 3),
        ("Mul", memory["y"], 3, memory["last"]),
        ("Exp", memory["p"], 0, 4),  # never read
        ("Neg", memory["last"], 3, memory["last"]),
    ]
    assert evolve.program_tree(program, SYMBOLS) == CE
    assert is_dead(evolve.program_tree(program[2:3], SYMBOLS)), "a register that nothing has written is zero"
    assert evolve.program_tree([("Mul", 1, 1, 7)] + 12 * [("Mul", 7, 7, 7)], SYMBOLS) is None, "too many nodes"


def test_mutations_of_programs():
    rng = random.Random(0)
    program = evolve.random_program(rng, SYMBOLS)
    lengths, changes, behind = set(), [], 0
    for _ in range(3000):
        child = evolve.mutate_program(rng, program, SYMBOLS)
        assert 1 <= len(child) <= evolve.PROGRAM and abs(len(child) - len(program)) <= 1
        assert all(op in OPERATORS and 3 <= out < 8 and 0 <= min(a, b) <= max(a, b) < 8 for op, a, b, out in child)
        behind += len(child) > len(program) and child[:-1] == program
        if len(child) == len(program):
            changes.append(sum(new != old for new, old in zip(child, program)))
        lengths.add(len(child))
        program = child
    assert lengths >= set(range(1, evolve.PROGRAM)) and changes.count(1) > 600 and max(changes) > 10
    assert behind > 20, "what is last is the value"


def rises(text):
    task = ToyTask()
    state = begin(task)
    return evolve.rising(state, state.tree("loss", parse(text))) is not None


def test_rising_sees_what_does_not_fall_on_the_whole_way():
    losses = {
        "Neg(Mul(y, Log(p)))": False,
        "Abs(Add(p, Neg(y)))": False,
        "Mul(y, Log(p))": True,
        "Neg(Abs(Add(Mul(y, p), Neg(MeanC(Tanh(1))))))": True,  # rises, then falls
        "Square(1)": True,
        "Exp(Exp(Exp(Exp(Inv(Mul(y, p))))))": True,  # not finite
    }
    assert {text: rises(text) for text in losses} == losses


@pytest.mark.parametrize("kind", ["cse", "cse-rand"])
def test_convergence_simulation(tmp_path, kind):
    directory = run(tmp_path, "--search", kind, "--evals", "20")
    lines, gates = journal(directory), result_of(directory)["gates"]
    assert gates.keys() == {"seen", "rising", "simulation", "invalid"}, "the gates of the other searches are open"
    assert gates["rising"] > 0 and gates["simulation"] > 0
    assert not any(rises(line["losses"]["loss"]) for line in lines)
    assert all(2 * line["score"] >= evolve.SIMULATION for line in lines)
    texts = [line["losses"]["loss"] for line in lines]
    assert len(set(texts)) == len(texts)
    state, rng = begin(ToyTask()), random.Random(0)
    fresh = [str(evolve.METHODS[kind].fresh(state, rng, "loss", toy_branch())) for _ in range(200)]
    known = sum(text in toy_branch().known for text in fresh)
    assert 30 < known < 80 if kind == "cse" else known == 0, "a quarter of them is not mutated"


@pytest.mark.parametrize("kind", [kind for kind in evolve.METHODS if not kind.startswith("cse")])
def test_nothing_is_simulated_in_other_searches(tmp_path, kind):
    task = ToyTask()
    task.simulate = None
    assert len(journal(run(tmp_path, "--search", kind, "--evals", "3", "--seeds", "1", task=task))) == 3


def test_programs_evolve_without_gates_and_go_on_after_a_resume(tmp_path):
    flags = ("--search", "aml", "--seeds", "1", "--evals")
    whole = run(tmp_path / "whole", *flags, "50")
    with pytest.raises(Killed):
        run(tmp_path / "part", *flags, "50", task=Fragile(36))
    (part,) = (tmp_path / "part").iterdir()
    run(tmp_path / "part", *flags, "50", resume=part)
    assert records(part) == records(whole)
    assert result_of(whole)["gates"].keys() == {"invalid"}
    for line in journal(whole):
        (text,) = line["losses"].values()
        assert str(evolve.program_tree(line["programs"][f"loss:{text}"], SYMBOLS)) == text
    assert any(line["parent"] for line in journal(whole))


class ToySampler:
    """Counts upwards from the mean of what was learned."""

    def __init__(self):
        self.seen, self.shown = [], 0

    def propose(self, rng):
        loss = Number(round(sum(self.seen) + rng.random(), 3))
        tried = {"counts": {}, "verdicts": [], "reused": [], "failed": []}
        return Child({"loss": loss}, identity=(str(loss),), tried=tried, more={"known": len(self.seen)})

    def learn(self, record):
        self.seen.append(record["score"])

    def show(self, board):
        self.shown += 1


class Number(float):
    def __str__(self):
        return f"number {float(self)!r}"


class NumberTask(ToyTask):
    samplers = {"own": ToySampler}

    def score(self, losses):
        return 0.5 if losses == "ce" else 1 / losses["loss"]

    @staticmethod
    def read(text):
        return Number(text.split()[1])


def test_a_search_of_the_tasks_own(tmp_path):
    def start(directory, evals, resume=None):
        args = arguments(directory, "--evals", evals, "--seeds", "1")
        args.search, args.resume = "own", resume
        evolve.run(args, NumberTask())
        return next(directory.iterdir())

    whole = journal(start(tmp_path / "whole", "9"))
    part = start(tmp_path / "part", "4")
    start(tmp_path / "part", "9", part)
    assert journal(part) == whole
    assert [line["known"] for line in whole] == list(range(9)), "each proposal knows all earlier scores"
    assert whole[0]["losses"]["loss"].startswith("number ")
    assert result_of(part)["losses"]["loss"].startswith("number ")


def test_lists_of_names_bear_blanks_and_repetition():
    names = evolve.some_of(("dead", "seen"))
    assert names("seen, dead,,seen") == ["seen", "dead"] and names("") == []
    with pytest.raises(argparse.ArgumentTypeError, match="ded: unknown; choose one of dead seen"):
        names("seen, ded")


@pytest.mark.parametrize("batch, world, least, share", [(16, 1, 2, 16), (16, 8, 2, 2), (4, 4, 1, 1), (2, 1, 2, 2)])
def test_a_batch_is_shared_evenly(monkeypatch, batch, world, least, share):
    monkeypatch.setattr(evolve, "rank_and_world", lambda: (0, world))
    assert evolve.share_of(batch, least) == share


@pytest.mark.parametrize("batch, world, cure", [(16, 3, 6), (2, 2, 4), (15, 2, 4)])
def test_a_batch_that_cannot_be_shared_is_named(monkeypatch, capsys, batch, world, cure):
    monkeypatch.setattr(evolve, "rank_and_world", lambda: (0, world))
    with pytest.raises(SystemExit):
        evolve.share_of(batch)
    assert (
        f"--batch {batch}: not to be shared by {world} processes; give a multiple of {cure}" in capsys.readouterr().err
    )
