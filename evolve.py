"""Regularised evolution over the language of losses (AutoLoss-Zero, arXiv 2103.14026, Sec. 3.2-3.4).

    population <- K random trees that pass the gates, each scored by a proxy training
    repeat until the budget is spent
        parent     <- the best of a random 5 % of the population
        child      <- mutate(parent), again and again until one passes the gates
        score      <- proxy training with the child, stopped at the first invalid value
        population <- the newest P of population + child
    closing round: the best few are re-trained for longer, with several seeds; the best of these is the found loss

The gates stand between a child and its training, cheapest first: dead, seen, gradient, equivalent, rejected. This
module knows no task: what a script hands over is a `Task`, a handful of tensors and a few functions that train. Other
kinds of search (`SEARCHES`), workers, run directories and the shared part of the command line are here as well.
"""

import argparse
import csv
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import torch
import torch.distributed as dist
from torch import Tensor

from loss_ops import OPERATORS, ZERO, Expr, canonical, evaluate_batch, is_dead, latex, parse

POPULATION = 2500  # [P] the newest P candidates stay
INITIAL = 20  # [P] random candidates to begin with
DEPTH = 3  # [P] operators above each leaf of a random tree
TOURNAMENT = 0.05  # [P] share of the population that competes to be the parent ...
TOURNAMENT_MIN = 5  # ... but never fewer [D]: 5 % of a population of 100 would be hardly a selection
FRESH = 0.10  # [D] probability that a child is a random tree instead of a mutation
# With several branches:
TOURNAMENT_SEVERAL = 15  # [D] in place of TOURNAMENT_MIN: a child changes one loss of several, a smaller step
TRIALS = 30  # [D] early candidates that have a tree for one branch alone, and the baseline's loss for the others
ASSEMBLED = 5  # [D] candidates that are then put together from these
EXCHANGE = 0.3  # [D] probability that a child takes a branch from the winner of another tournament
ETA = 0.6  # [P] least gain in the rejection protocol, where the metric allows it
REJECTION_STEPS = 500  # [P]
REJECTION_LR = 0.1  # [D] step of Adam on the raw predictions: saturates a softmax within some fifty steps
GPU_BATCH = 64  # [D] children that are judged together on a GPU; on a CPU core one by one is as fast
FINALISTS = 5  # [D] candidates of the closing round ...
RELATED = 0.45  # ... whose gradients differ at least this much: cosine 0.9 at most [D]

PROGRAM = 20  # [P] instructions of an AutoML-Zero program, at most ...
REGISTERS = 5  # ... and its memory beyond the symbols of the task [D]
TREE = 500  # nodes of a program written as a tree, at most [D]: repeated squaring would write millions
SIMULATION = 0.75  # [D] share of the baseline's score that a loss must reach in CSE's short training on a few samples

GATES = ("dead", "seen", "gradient", "equivalent", "rejected")
OTHER_GATES = ("rising", "simulation")  # of convergence simulation (CSE)


class Kind(NamedTuple):
    """What one kind of search consists of."""

    gates: tuple[str, ...]
    about: str
    evolving: bool = True  # False: every candidate is fresh
    known: bool = False  # fresh candidates come from the known losses, not from nowhere
    programs: bool = False  # what is mutated is a program, not a tree


SEARCHES = {
    "evolve": Kind(GATES, "all gates"),
    "random": Kind(GATES, "the same gates, no evolution", evolving=False),
    "naive": Kind((), "evolution without gates"),
    "cse": Kind(("seen", *OTHER_GATES), "convergence simulation, from the known losses", known=True),
    "cse-rand": Kind(("seen", *OTHER_GATES), "the same from random trees"),
    "aml": Kind((), "programs as in AutoML-Zero, without gates", programs=True),
}


# ---------------------------------------------------------------------------------------------------------------------
# The task, as the search sees it


class InvalidLoss(Exception):
    """Training met a loss or a gradient that is not finite."""


@dataclass
class Branch:
    """One searched loss: its symbols, and B samples on which a tree can show what it optimises.

    prediction: (B, N, C, H, W) raw network outputs; target: (B, N, ...) in whatever form the two functions take.
    leaves(prediction, target) -> tensors (..., B, N, C, H, W) by symbol; score(prediction, target) -> (..., B), how
    well each prediction scores. Both take leading dimensions. `ideal`, of the shape of `prediction`, is right about the
    target, and `known` holds hand-made losses as formulas; both are there for `--search cse` alone.
    """

    symbols: tuple[str, ...]
    prediction: Tensor
    target: Tensor
    leaves: Callable[[Tensor, Tensor], dict[str, Tensor]]
    score: Callable[[Tensor, Tensor], Tensor]
    eta: float = ETA
    scale_free: bool = False  # the task trains with an optimiser that a factor before the loss does not change
    ideal: Tensor | None = None
    known: tuple[str, ...] = ()


class Sampler(Protocol):
    """A search over losses that are not trees, which a script may bring along; the state is a fold over the records."""

    def propose(self, rng: random.Random) -> tuple[dict[str, object], dict]:
        """Losses to train next (`str` writes them, `Story.read` reads them), and what else their record shall hold."""

    def learn(self, record: dict) -> None:
        """A finished evaluation."""

    def show(self, board) -> None:
        """Write to TensorBoard what is new."""


class Task(Protocol):
    """What a script gives to the search.

    `losses`: a tree per branch, the baseline's loss where one has none; or the name of a hand-made loss.
    """

    branches: dict[str, Branch]
    curve: list[tuple[int, float]]  # (step, loss) of the latest training

    def train(self, losses: dict[str, Expr] | str) -> float:
        """Proxy training; the metric on the search-validation split. Raises InvalidLoss."""

    def retrain(
        self, losses: dict[str, Expr] | str, seed: int, picture: Path | None = None, checkpoint=None
    ) -> dict[str, dict[str, float]]:
        """The longer schedule: all metrics on `val` and `test`; predictions drawn to `picture`. Raises InvalidLoss.

        With a `Checkpoint` it goes on from there, and is shared by all processes under torchrun.
        """

    def simulate(self, losses: dict[str, Expr]) -> float:
        """A short training on a few samples, the metric on these samples as a share of the baseline's; for CSE."""


# ---------------------------------------------------------------------------------------------------------------------
# Trees and mutations


def random_tree(rng: random.Random, symbols: tuple[str, ...], depth: int = DEPTH) -> Expr:
    """A tree with `depth` operators above each leaf; operators and leaves uniformly at random."""
    if depth == 0:
        return Expr(rng.choice(symbols))
    op = rng.choice(list(OPERATORS))
    return Expr(op, tuple(random_tree(rng, symbols, depth - 1) for _ in range(OPERATORS[op].arity)))


def nodes(expr: Expr) -> list[Expr]:
    """Every node of `expr` in preorder, repeated subtrees repeatedly."""
    return [expr] + [node for arg in expr.args for node in nodes(arg)]


def replace_node(expr: Expr, index: int, new: Expr) -> Expr:
    """`expr` with its node number `index` (in preorder) replaced by `new`."""
    if index == 0:
        return new
    args, start = [], 1
    for arg in expr.args:
        size = len(nodes(arg))
        args.append(replace_node(arg, index - start, new) if start <= index < start + size else arg)
        start += size
    return Expr(expr.op, tuple(args))


def insert(rng: random.Random, expr: Expr, symbols: tuple[str, ...]) -> Expr:
    """Put a random operator between a random node and its parent; a second operand is a random leaf."""
    everything = nodes(expr)
    index = rng.randrange(len(everything))
    op = rng.choice(list(OPERATORS))
    args = [everything[index]] + [Expr(rng.choice(symbols)) for _ in range(OPERATORS[op].arity - 1)]
    rng.shuffle(args)
    return replace_node(expr, index, Expr(op, tuple(args)))


def delete(rng: random.Random, expr: Expr, symbols: tuple[str, ...]) -> Expr:
    """Remove a random operator; one of its operands, at random, takes its place."""
    index, node = rng.choice([(k, node) for k, node in enumerate(nodes(expr)) if node.args])
    return replace_node(expr, index, rng.choice(node.args))


def replace(rng: random.Random, expr: Expr, symbols: tuple[str, ...]) -> Expr:
    """Exchange a random operator; surplus operands are dropped at random, missing ones are random leaves."""
    index, node = rng.choice([(k, node) for k, node in enumerate(nodes(expr)) if node.args])
    op = rng.choice([name for name in OPERATORS if name != node.op])
    args, arity = list(node.args), OPERATORS[op].arity
    while len(args) > arity:
        args.pop(rng.randrange(len(args)))
    while len(args) < arity:
        args.insert(rng.randrange(len(args) + 1), Expr(rng.choice(symbols)))
    return replace_node(expr, index, Expr(op, tuple(args)))


def mutate(rng: random.Random, expr: Expr, symbols: tuple[str, ...]) -> Expr:
    """One of the three mutations, equally likely [D]; a bare leaf can only grow."""
    kind = rng.choice((insert, delete, replace)) if expr.args else insert
    return kind(rng, expr, symbols)


# Programs, as AutoML-Zero evolves them (Real 2020, arXiv 2003.03384): instructions that write one register each, over a
# memory that holds the symbols first and zeros behind them. The value of a program is its last register.

Instruction = tuple[str, int, int, int]  # operator, registers of its operands, register that is written


def random_instruction(rng: random.Random, symbols: tuple[str, ...]) -> Instruction:
    first, size = len(symbols), len(symbols) + REGISTERS
    return rng.choice(list(OPERATORS)), rng.randrange(size), rng.randrange(size), rng.randrange(first, size)


def random_program(rng: random.Random, symbols: tuple[str, ...]) -> list[Instruction]:
    return [random_instruction(rng, symbols) for _ in range(rng.randint(1, PROGRAM))]


def mutate_program(rng: random.Random, program: list[Instruction], symbols: tuple[str, ...]) -> list[Instruction]:
    """Insert or remove an instruction, redraw all of them, or redraw one part of one [P: AutoML-Zero, Sec. 3.2]."""
    program = list(program)
    kind = rng.choice(("length", "all", "part"))
    if kind == "all":
        return [random_instruction(rng, symbols) for _ in program]
    k = rng.randrange(len(program))
    if kind == "length":
        longer = len(program) == 1 or (len(program) < PROGRAM and rng.random() < 0.5)
        program[k : k + (not longer)] = [random_instruction(rng, symbols)] * longer
    else:
        part, other = rng.randrange(4), random_instruction(rng, symbols)
        program[k] = (*program[k][:part], other[part], *program[k][part + 1 :])
    return program


def program_tree(program: Sequence[Instruction], symbols: tuple[str, ...]) -> Expr | None:
    """What a program computes, as a tree; None if that would have more than TREE nodes."""
    memory = [(Expr(symbol), 1) for symbol in symbols] + [(ZERO, 4)] * REGISTERS  # trees and how many nodes they have
    for op, *operands, out in program:
        used = [memory[k] for k in operands[: OPERATORS[op].arity]]
        memory[out] = Expr(op, tuple(tree for tree, _ in used)), 1 + sum(size for _, size in used)
        if memory[out][1] > TREE:
            return None
    return memory[-1][0]


# ---------------------------------------------------------------------------------------------------------------------
# Gates that look at tensors


def first_gradients(branch: Branch, exprs: Sequence[Expr]) -> list[Tensor | None]:
    """dL/d(prediction) at the start, (B, D) float64 for each tree; None where nothing can be learned from it.

    That is: a gradient that is not finite, that is zero on every sample, or that stays the same (to a thousandth of its
    norm, on every sample) when the targets are exchanged between samples and when they are shifted within each: along N
    where there are several, so that each stays whole; a box shifted by a coordinate would be none.
    """
    x, y = branch.prediction, branch.target
    several, flat = y.shape[1] > 1, y.flatten(1)
    shifted = y.roll(y.shape[1] // 3 + 1, 1) if several else flat.roll(flat.shape[1] // 3 + 1, 1).view_as(y)
    targets = torch.stack([y, y.roll(1, 0), shifted])
    x = x.expand(len(exprs), 3, *x.shape).clone().requires_grad_()  # (K, 3, B, N, C, H, W)
    values = evaluate_batch(exprs, branch.leaves(x, targets))  # (K, 3, B)
    if not values.requires_grad:
        return [None] * len(exprs)
    gradients = torch.autograd.grad(values.sum(), x)[0].flatten(3).double()  # (K, 3, B, D)
    norms = gradients[:, 0].norm(dim=-1)
    finite = values.isfinite().flatten(1).all(1) & gradients.isfinite().flatten(1).all(1)
    changes = (gradients[:, 1:] - gradients[:, :1]).norm(dim=-1)  # (K, 2, B)
    aware = (changes > 1e-3 * norms[:, None]).flatten(1).any(1)
    useful = finite & norms.any(1) & aware
    return [gradients[k, 0] if good else None for k, good in enumerate(useful.tolist())]


def equivalence_key(gradient: Tensor, scale_free: bool) -> str:
    """What losses with the same gradient share: two significant digits, per sample, of its norm [P] and direction [D].

    Norms alone confuse cross entropy with its negative and with losses of another direction, so the key also holds the
    projection of each sample's gradient on a fixed random direction. Where the optimiser does not feel the scale of a
    loss, neither does the key: norms are relative to that over all samples [D].
    """
    norm = gradient.norm(dim=-1)
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    side = (gradient * direction.to(gradient.device)).sum(-1) / norm.clamp(min=1e-300)
    norm = norm / norm.norm() if scale_free else norm
    return " ".join(f"{n:.1e}:{s:+.1e}" for n, s in zip(norm.tolist(), side.tolist()))


# Decisions before the last step: at `step`, a gain below `low` rejects and one of at least `high` accepts, both as
# shares of eta. Measured, not guessed: tests/bench_gates.py counts the verdicts that differ from the full protocol.
EARLY = ((10, 0.02, 1.30), (25, 0.10, 1.25), (50, 0.25, 1.20), (100, 0.45, 1.15), (200, 0.70, 1.10))


def rejection_gains(branch: Branch, exprs: Sequence[Expr], steps: int = REJECTION_STEPS, early=EARLY) -> list[float]:
    """The loss-rejection protocol [P]: how much the predictions improve when the loss itself is minimised on them.

    Each of the B raw predictions is optimised on its own. The step rule is Adam's, which does not feel the scale of the
    loss: with plain gradient steps a factor before the loss would decide the verdict [D]. All trees are optimised at
    once; those that are decided leave the batch.

    Returns: for each tree the mean over samples of score(after) - score(before); -inf if it became invalid on the way.
    """
    gains = [-math.inf] * len(exprs)
    undecided = list(range(len(exprs)))
    before = branch.score(branch.prediction, branch.target).mean()
    x = branch.prediction.expand(len(exprs), *branch.prediction.shape).clone()  # (K, B, N, C, H, W)
    mean, square = torch.zeros_like(x), torch.zeros_like(x)  # moments of the gradient
    limits = {step: (low * branch.eta, high * branch.eta) for step, low, high in early}
    for step in range(1, steps + 1):
        x.requires_grad_()
        value = evaluate_batch([exprs[k] for k in undecided], branch.leaves(x, branch.target)).sum()
        if not value.requires_grad:  # no prediction in it; only a search without the first two gates comes here
            return gains
        (gradient,) = torch.autograd.grad(value, x)
        x = x.detach()
        mean.lerp_(gradient, 0.1)
        square.lerp_(gradient.square_(), 0.001)
        x -= REJECTION_LR / (1 - 0.9**step) * mean / ((square / (1 - 0.999**step)).sqrt_() + 1e-16)
        if step in limits or step == steps:
            gain = branch.score(x, branch.target).mean(-1) - before
            gain = torch.where(x.flatten(1).isfinite().all(1), gain, -math.inf).tolist()
            low, high = limits.get(step, (-math.inf, math.inf))
            for k, value in zip(undecided, gain):
                gains[k] = value
            stay = [k for k, value in enumerate(gain) if low <= value < high]
            if not stay:
                break
            if len(stay) < len(undecided):
                undecided = [undecided[k] for k in stay]
                x, mean, square = x[stay], mean[stay], square[stay]
    return gains


def falling(branch: Branch, exprs: Sequence[Expr]) -> list[bool]:
    """CSE's convergence property (Liu 2021, arXiv 2102.04700, Sec. 3.3): whether the loss, averaged over the samples,
    falls with every step of the way from the prediction to the right one.
    """
    way = torch.stack([branch.prediction.lerp(branch.ideal, t) for t in (0.0, 0.25, 0.5, 0.75, 1.0)])
    values = evaluate_batch(exprs, branch.leaves(way.expand(len(exprs), *way.shape), branch.target))  # (K, 5, B)
    return (values.mean(-1).diff(dim=-1) < 0).all(-1).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# The state of a search: a fold over its records


class Member(NamedTuple):
    losses: dict[str, Expr]
    score: float | None  # None: invalid


class Fate(NamedTuple):
    """What became of one tree of one branch."""

    branch: str
    text: str  # canonical
    gate: str  # the gate that turned it away, or "passed"
    key: str = ""  # equivalence key
    gain: float | None = None


@dataclass
class Search:
    """Everything a search knows. It changes by `learn`, `reuse` and `add` alone, live as well as on resume."""

    task: Task | None
    gates: frozenset[str] = frozenset(GATES)
    kind: Kind = SEARCHES["evolve"]
    batch: int = 1  # children that are judged together
    sampler: "Sampler | None" = None  # proposes in place of evolution
    read: Callable[[str], object] = parse  # a loss from its text
    waiting: deque = field(default_factory=deque)  # children that have passed, with parent and deciding gate
    population: deque[Member] = field(default_factory=lambda: deque(maxlen=POPULATION))
    counts: Counter = field(default_factory=Counter)
    fates: dict[tuple[str, str], Fate] = field(default_factory=dict)  # by branch and canonical text
    keys: dict[tuple[str, str], Fate] = field(default_factory=dict)  # by branch and equivalence key
    scores: dict[tuple[str, ...], float | None] = field(default_factory=dict)  # by the keys of all branches
    evaluated: int = 0
    best: Member | None = None
    hall: dict[str, tuple[float, dict]] = field(default_factory=dict)  # score and record by text, evaluated ones only
    programs: dict[str, list[Instruction]] = field(default_factory=dict)  # the latest one that computes a tree

    @property
    def explored(self) -> int:
        """Candidates looked at: those that a gate decided and those that were trained."""
        return sum(self.counts[gate] for gate in (*GATES, *OTHER_GATES)) + self.evaluated

    def gate_counts(self) -> dict[str, int]:
        """What each gate has turned away, and how many trainings became invalid."""
        others = [gate for gate in OTHER_GATES if gate in self.kind.gates]
        return {gate: self.counts[gate] for gate in (*GATES, *others, "invalid")}

    def text(self, expr: Expr) -> str:
        """What a tree is remembered by."""
        return str(canonical(expr)) if "seen" in self.gates else str(expr)

    def learn(self, fate: Fate) -> None:
        self.fates[fate.branch, fate.text] = fate
        if fate.key:
            self.keys.setdefault((fate.branch, fate.key), fate)

    def reuse(self, member: Member) -> None:
        self.population.append(member)

    def add(self, record: dict) -> None:
        """A finished evaluation: enters population, score cache and hall of fame."""
        losses = {branch: self.read(text) for branch, text in record["losses"].items()}
        member = Member(losses, record["score"])
        self.population.append(member)
        self.evaluated += 1
        if self.sampler:
            self.sampler.learn(record)
        self.counts["invalid"] += member.score is None
        self.programs.update(record.get("programs", {}))
        if record["identity"]:
            self.scores.setdefault(tuple(record["identity"]), member.score)
        if member.score is not None and not record.get("trial"):  # a tree beside the baseline's is no answer yet
            self.hall.setdefault(losses_text(record["losses"]), (member.score, record))
            if self.best is None or member.score > self.best.score:
                self.best = member

    def absorb(self, record: dict) -> None:
        """All that a record of another worker, or of an earlier life of this one, has to tell."""
        self.counts.update(record["tried"]["counts"])
        for fate in record["tried"]["fates"]:
            self.learn(Fate(*fate))
        for losses, score in record["tried"]["reused"]:
            self.reuse(Member({branch: parse(text) for branch, text in losses.items()}, score))
        self.add(record)

    def best_trial(self, branch: str) -> float:
        """The best score of a tree that was tried in this branch alone; -inf while there is none."""
        trials = (member.score for member in self.population if member.losses.keys() == {branch})
        return max((score for score in trials if score is not None), default=-math.inf)

    def best_parts(self) -> dict[str, str]:
        """For each branch the tree of the best candidate that has one."""
        parts = {}
        for member in sorted((m for m in self.population if m.score is not None), key=lambda m: m.score):
            parts |= {branch: str(expr) for branch, expr in member.losses.items()}
        return parts

    def ranking(self) -> list[tuple[float, dict]]:
        """Score and record of the distinct evaluated candidates, best first."""
        return sorted(self.hall.values(), key=lambda entry: -entry[0])


def losses_text(losses: dict[str, object]) -> str:
    """One line for one or several losses, or their texts."""
    if len(losses) == 1:
        return str(next(iter(losses.values())))
    return "; ".join(f"{branch}={expr}" for branch, expr in losses.items())


# ---------------------------------------------------------------------------------------------------------------------
# One turn of the search: propose a child that passes the gates, train it


def select_parent(search: Search, rng: random.Random, branches: Sequence[str]) -> Member | None:
    """The best of a random 5 % of the population; None while no candidate of it has all `branches` and is valid.

    Equivalent losses share their score to the last digit; the newest stands for all of them [D]. Otherwise copies of
    the best so far soon fill the population, win every tournament, and the search never leaves them.
    """
    able = (member for member in search.population if member.score is not None and member.losses.keys() >= {*branches})
    distinct = list({member.score: member for member in able}.values())
    if not distinct:
        return None
    least = TOURNAMENT_SEVERAL if len(search.task.branches) > 1 else TOURNAMENT_MIN
    size = max(least, math.ceil(TOURNAMENT * len(distinct)))
    return max(rng.sample(distinct, min(size, len(distinct))), key=lambda member: member.score)


def fresh_loss(search: Search, rng: random.Random, branch: Branch) -> Expr:
    """A loss without a parent: random; for CSE a known one, mutated up to three times."""
    if search.kind.programs:
        return compile_program(search, branch, lambda: random_program(rng, branch.symbols))
    if not search.kind.known:
        return random_tree(rng, branch.symbols)
    expr = parse(rng.choice(branch.known))
    for _ in range(rng.randrange(4)):
        expr = mutate(rng, expr, branch.symbols)
    return expr


def mutate_loss(search: Search, rng: random.Random, branch: Branch, expr: Expr) -> Expr:
    if search.kind.programs:
        parent = search.programs[str(expr)]
        return compile_program(search, branch, lambda: mutate_program(rng, parent, branch.symbols))
    return mutate(rng, expr, branch.symbols)


def compile_program(search: Search, branch: Branch, make: Callable[[], list[Instruction]]) -> Expr:
    """The tree of the first program out of `make` that is not too large; by its tree the program is remembered."""
    tree = None
    while tree is None:
        program = make()
        tree = program_tree(program, branch.symbols)
    search.programs[str(tree)] = program
    return tree


Child = tuple[dict[str, Expr], dict[str, Expr] | None, list[str]]


def propose(search: Search, rng: random.Random) -> Child:
    """A child, its parent (None for a fresh one) and the branches of it that are new."""
    branches, evolving, parent = search.task.branches, search.kind.evolving, None
    fresh = rng.random() < FRESH
    if evolving and len(branches) > 1 and search.evaluated > 0:
        return change_one_branch(search, rng, fresh)
    if evolving and search.evaluated >= INITIAL and not fresh:
        parent = select_parent(search, rng, branches)
    if parent is None:
        return {name: fresh_loss(search, rng, branch) for name, branch in branches.items()}, None, list(branches)
    name = rng.choice(list(branches))
    return {name: mutate_loss(search, rng, branches[name], parent.losses[name])}, parent.losses, [name]


def change_one_branch(search: Search, rng: random.Random, fresh: bool) -> Child:
    """What `propose` does with several branches, where candidates of random trees are hardly ever good in all [D].

    After a first whole one TRIALS candidates try a random tree in one branch alone, always the branch that has fared
    worst. The next few are put together from the winners of all branches. From then on a child differs from its parent
    in one branch, which is mutated, drawn afresh, or taken from the winner of another tournament.
    """
    branches = search.task.branches
    if search.evaluated <= TRIALS:
        name = min(branches, key=search.best_trial)
        return {name: fresh_loss(search, rng, branches[name])}, None, [name]
    parent = select_parent(search, rng, branches) if search.evaluated > TRIALS + ASSEMBLED else None
    winners = {name: parent or select_parent(search, rng, [name]) for name in branches}
    parts = {name: winner.losses[name] for name, winner in winners.items() if winner}
    name = rng.choice(list(branches))
    if fresh or name not in parts:
        tree = fresh_loss(search, rng, branches[name])
    elif rng.random() < EXCHANGE:
        tree = select_parent(search, rng, [name]).losses[name]
    else:
        tree = mutate_loss(search, rng, branches[name], parts[name])
    return {**parts, name: tree}, parts, [name]


def judge(search: Search, trees: list[tuple[str, Expr]]) -> list[tuple[Fate, str | None]]:
    """For each (branch, tree) its fate, and the gate that decided it (None: it passed them all).

    The verdicts are those that the trees would get one by one. What needs tensors is computed for all at once.
    """
    gates, verdicts, later = search.gates, {}, []

    def settle(k: int, fate: Fate, gate: str | None) -> None:
        verdicts[k] = fate, gate
        if gate not in ("dead", "seen"):
            search.learn(fate)

    new: dict[tuple[str, str], int] = {}
    for k, (name, expr) in enumerate(trees):
        text = search.text(expr)
        if "dead" in gates and is_dead(canonical(expr)):
            settle(k, Fate(name, text, "dead"), "dead")
        elif "seen" in gates and (name, text) in search.fates:
            settle(k, search.fates[name, text], "seen")
        elif (name, text) in new:
            later.append(k)  # the twin of another one here: what becomes of that one will be known then
        else:
            new[name, text] = k

    for name, branch in search.task.branches.items():
        texts = {k: text for (where, text), k in new.items() if where == name}
        gradients = [None] * len(texts)
        if texts and gates & {"gradient", "equivalent"}:
            gradients = first_gradients(branch, [trees[k][1] for k in texts])
        keys: dict[int, str] = {}
        for (k, text), gradient in zip(texts.items(), gradients):
            key = text
            if gradient is None and "gradient" in gates:
                settle(k, Fate(name, text, "gradient"), "gradient")
                continue
            if gradient is not None and "equivalent" in gates:
                key = equivalence_key(gradient, branch.scale_free)
                if (name, key) in search.keys:
                    known = search.keys[name, key]
                    settle(k, Fate(name, text, known.gate, key, known.gain), "equivalent")
                    continue
                if key in keys.values():
                    later.append(k)
                    continue
            keys[k] = key

        if keys and "rising" in gates:
            for k, falls in zip(list(keys), falling(branch, [trees[k][1] for k in keys])):
                if not falls:
                    settle(k, Fate(name, texts[k], "rising"), "rising")
                    del keys[k]
        gains = [math.inf] * len(keys)
        if keys and "rejected" in gates:
            gains = rejection_gains(branch, [trees[k][1] for k in keys])
        for (k, key), gain in zip(keys.items(), gains):
            gate = None if gain >= branch.eta else "rejected"
            shown = round(gain, 4) if math.isfinite(gain) else None
            settle(k, Fate(name, texts[k], gate or "passed", key, shown), gate)

    for k in sorted(later):
        verdicts[k] = judge(search, [trees[k]])[0]
    return [verdicts[k] for k in range(len(trees))]


def next_candidate(search: Search, rng: random.Random, deadline: float):
    """Propose until a candidate deserves a training; (losses, parent, identity, gains, tried), or None at the deadline.

    A child whose equivalent was trained before takes over that score and joins the population at once [P].

    On a GPU many children are proposed and judged together. Their parents come from the same population, as if as many
    workers had asked at once; what passes beyond the first waits for its turn. Workers make the evolution asynchronous
    in the same way: a parent is always the best of its tournament among the newest P that are known.
    """
    tried = {"counts": Counter(), "fates": [], "reused": []}
    order = (*GATES, *OTHER_GATES).index

    def tally(gate: str) -> None:
        tried["counts"][gate] += 1
        search.counts[gate] += 1

    draft: dict[str, Expr] = {}  # branches of a fresh candidate that have passed; only the others are drawn again
    while time.time() < deadline:
        while search.waiting:
            losses, parent, gate = search.waiting.popleft()
            fates = [search.fates[name, search.text(expr)] for name, expr in losses.items()]
            identity = [fate.key for fate in fates] if search.gates & {"seen", "equivalent"} else []
            if identity and len(losses) < len(search.task.branches):
                identity = [*losses, *identity]  # its score says nothing of a whole candidate, nor of another branch
            if tuple(identity) not in search.scores:
                if "simulation" in search.gates and not search.task.simulate(losses) >= SIMULATION:
                    tally("simulation")
                    continue
                return losses, parent, identity, {fate.branch: fate.gain for fate in fates}, tried
            tally(gate or "equivalent")
            member = Member(losses, search.scores[tuple(identity)])
            search.reuse(member)
            tried["reused"].append([{k: str(v) for k, v in losses.items()}, member.score])

        children = []
        for _ in range(search.batch):
            losses, parent, new = propose(search, rng)
            if parent is None:
                losses |= draft
                new = [name for name in new if name not in draft]
            children.append((losses, parent, new))
        verdicts = iter(judge(search, [(name, losses[name]) for losses, _, new in children for name in new]))
        for losses, parent, new in children:
            decided = {name: next(verdicts) for name in new}
            tried["fates"] += [fate for fate, gate in decided.values() if gate not in ("dead", "seen")]
            blocking = [gate for fate, gate in decided.values() if fate.gate != "passed"]
            if parent is None:
                passed = {name: losses[name] for name, (fate, _) in decided.items() if fate.gate == "passed"}
                draft = draft | passed if blocking else {}
            if blocking:
                tally(min(blocking, key=order))
            else:
                known = [gate for _, gate in decided.values() if gate]
                search.waiting.append((losses, parent, min(known, key=order) if known else None))
    return None


def evaluation(search: Search, rng: random.Random, deadline: float) -> dict | None:
    """One turn of the search, as the record that goes into the journal; None if the deadline came first."""
    more = {}
    if search.sampler:
        losses, more = search.sampler.propose(rng)
        parent, identity, gains, tried = None, [], {}, {"counts": {}, "fates": [], "reused": []}
    else:
        candidate = next_candidate(search, rng, deadline)
        if candidate is None:
            return None
        losses, parent, identity, gains, tried = candidate
    if len(losses) < len(search.task.branches):
        more |= {"trial": True}
    if search.kind.programs:
        more |= {"programs": {str(expr): search.programs[str(expr)] for expr in losses.values()}}
    start = time.time()
    try:
        score = search.task.train(losses)
    except InvalidLoss:
        score = None
    return {
        "losses": {name: str(expr) for name, expr in losses.items()},
        "parent": parent and {name: str(expr) for name, expr in parent.items()},
        "score": score,
        "gain": gains,
        "identity": identity,
        "tried": tried,
        "curve": [[step, float(f"{loss:.4g}")] for step, loss in search.task.curve],
        "seconds": round(time.time() - start, 3),
        **more,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Workers
#
# There is no master. Every worker keeps its own copy of the search, publishes each record in a log of its own in
# torch.distributed's store and reads the others' logs before it proposes its next child. No call waits for another
# worker, so a slow or dead one holds nobody up. Whoever reports (the process that launched the workers, or rank 0)
# reads the same logs and mirrors them to files.


class Board:
    """The store, seen as one append-only log per worker, tickets for evaluations, and jobs that workers claim."""

    def __init__(self, store: dist.Store, rank: int, world: int):
        self.store, self.rank, self.written, self.read = store, rank, 0, [0] * world

    def publish(self, **message) -> None:
        self.store.set(f"log/{self.rank}/{self.written}", json.dumps(message))
        self.written += 1

    def news(self) -> Iterator[tuple[int, dict]]:
        """(rank, message) of all that was published and not read here before, this worker's own messages included."""
        for rank in range(len(self.read)):
            while self.store.check([f"log/{rank}/{self.read[rank]}"]):
                yield rank, json.loads(self.store.get(f"log/{rank}/{self.read[rank]}"))
                self.read[rank] += 1

    def claim(self, name: str) -> int:
        """How many have claimed `name`, this claim included."""
        return self.store.add(f"claim/{name}", 1)

    def post_jobs(self, phase: int, jobs: list | None) -> None:
        """Offer jobs to the workers; None sends them home."""
        self.store.set(f"jobs/{phase}", json.dumps(jobs))

    def wait_for_jobs(self, phase: int) -> list | None:
        while not self.store.check([f"jobs/{phase}"]):
            time.sleep(0.1)
        return json.loads(self.store.get(f"jobs/{phase}"))


def search_loop(search: Search, board: Board, args, elapsed: float, finished: int, hear: Callable) -> None:
    """Evaluate candidates until the budget is spent. `finished` of this worker's evaluations are in the journal."""
    deadline = time.time() + 60 * args.minutes - elapsed
    for number in count(finished):
        hear()
        if time.time() >= deadline or board.claim("evaluations") > args.evals:
            break
        # A generator of its own for each evaluation: a resumed search needs no generator state to go on exactly.
        record = evaluation(search, random.Random(f"{args.seed}/{board.rank}/{number}"), deadline)
        if record is None:
            break
        search.add(record)
        board.publish(record=record)
    board.publish(idle="search")
    hear()


def serve(search: Search, board: Board, phase: int, jobs: list[dict], hear: Callable = lambda: None) -> None:
    """Re-train what nobody else has claimed; publish each result, and `hear` what there is to report."""
    for k, job in enumerate(jobs):
        if board.claim(f"{phase}/{k}") == 1:
            losses = job["losses"]
            if isinstance(losses, dict):
                losses = {name: search.read(text) for name, text in losses.items()}
            start = time.time()
            try:
                scores = search.task.retrain(losses, job["seed"], Path(job["picture"]) if job["picture"] else None)
            except InvalidLoss:
                scores = None
            board.publish(retrained={**job, "scores": scores, "seconds": round(time.time() - start, 2)})
            hear()
    board.publish(idle=phase)


# ---------------------------------------------------------------------------------------------------------------------
# The run directory


def write_atomically(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def read_lines(path: Path) -> list[dict]:
    """The records of a .jsonl file; a last line torn by a kill is cut off, with a warning."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole, _, torn = content.rpartition(b"\n")
    if torn:
        print(f"warning: {path}: the last line is torn and was skipped", file=sys.stderr)
        with path.open("r+b") as file:
            file.truncate(len(content) - len(torn))
    return [json.loads(line) for line in whole.splitlines()]


class Reporter:
    """Mirrors what the workers publish to the run directory, the console and TensorBoard."""

    def __init__(self, directory: Path, search: Search, args, story: "Story"):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only needed here

        self.directory, self.search, self.args, self.story = directory, search, args, story
        self.journal = (directory / "journal.jsonl").open("a")
        self.retrained = read_lines(directory / "retrain.jsonl")
        self.retrain_log = (directory / "retrain.jsonl").open("a")
        self.board = SummaryWriter(str(directory))
        self.start = time.time()
        self.earlier = 0.0  # seconds of search before a resume
        self.explored_earlier = 0
        self.baseline: float | None = None
        self.best: float | None = None  # best score reported so far
        self.idle: dict[int, object] = {}

    def begin(self, lines: list[dict]) -> None:
        """Take up where the journal ends."""
        if lines:
            self.earlier, self.explored_earlier = lines[-1]["elapsed"], self.search.explored
            self.best = self.search.best.score if self.search.best else None
        rows = "\n".join(f"| {name} | {value} |" for name, value in sorted(vars(self.args).items()))
        self.board.add_text("run/arguments", "| argument | value |\n|---|---|\n" + rows)

    @property
    def elapsed(self) -> float:
        return self.earlier + time.time() - self.start

    def hear(self, rank: int, message: dict) -> None:
        if "idle" in message:
            self.idle[rank] = message["idle"]
        elif "baseline" in message:
            self.baseline = message["baseline"]
            shown = "invalid" if self.baseline is None else f"{self.baseline:.3f}"
            print(f"baseline {self.story.baseline}: {self.args.metric} {shown} in the same proxy training", flush=True)
        elif "retrained" in message:
            self.hear_retrained(message["retrained"])
        else:
            self.hear_record(message["record"] | {"worker": rank})

    def hear_record(self, record: dict) -> None:
        search, args = self.search, self.args
        n, score, gates = search.evaluated, record["score"], search.gate_counts()
        line = {"n": n, **record, "explored": search.explored, "gates": gates, "elapsed": round(self.elapsed, 3)}
        self.journal.write(json.dumps(line) + "\n")
        self.journal.flush()

        rate = (search.explored - self.explored_earlier) / max(1e-9, time.time() - self.start)
        share = max(n / args.evals, self.elapsed / (60 * args.minutes))
        left = max(0, int(self.elapsed * (1 / max(share, 1e-9) - 1)))
        best = f"{search.best.score:.3f}" if search.best else "  -  "
        improved = search.best is not None and (self.best is None or search.best.score > self.best)
        self.best = search.best.score if search.best else None
        print(
            f"eval {n:>3}/{args.evals}  {args.metric} {'  -  ' if score is None else f'{score:.3f}'}  best {best}  "
            f"explored {search.explored:,} ({rate:,.0f}/s)  "
            f"equivalent {gates['equivalent']}  invalid {gates['invalid']}  "
            f"{record['seconds']:.1f} s  eta {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
            + (f"  * {losses_text(search.best.losses)}" if improved else "")
            + (f"  {' '.join(record['losses'])} alone" if record.get("trial") else ""),
            flush=True,
        )

        add, x = self.board.add_scalar, search.explored
        if score is not None:
            add("search/score", score, x)
        if search.best:
            scores = [member.score for member in search.population if member.score is not None]
            add("search/best", search.best.score, x)
            add("search/best_by_minute", search.best.score, int(self.elapsed))
            add("search/population_mean", sum(scores) / len(scores), x)
        add("search/explored_per_second", rate, x)
        add("search/evaluated", n, x)
        if self.baseline is not None:
            add("search/baseline", self.baseline, x)
        for gate, number in gates.items():
            add(f"gates/{gate}", number / max(1, search.explored), x)
        add("proxy/seconds", record["seconds"], x)
        if improved:
            for step, loss in record["curve"]:
                add(f"proxy_curve/{n:04d}", loss, step)
            formulas = [
                f"{name}: `{loss}`" + (f"\n\n$${latex(loss)}$$" if isinstance(loss, Expr) else "")
                for name, loss in search.best.losses.items()
            ]
            self.board.add_text("search/formula", "\n\n".join(formulas), x)
            write_atomically(self.directory / "best_loss.py", self.story.export(search.best.losses))
        if search.sampler:
            search.sampler.show(self.board)
        self.write_hall_of_fame()

    def write_hall_of_fame(self) -> None:
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(["rank", f"proxy_{self.args.metric}", f"retrained_{self.args.metric}", "gain", "loss"])
        for rank, (score, record) in enumerate(self.search.ranking()[:50], 1):
            again = self.closing_score(record["losses"])
            gain = min((g for g in record["gain"].values() if g is not None), default="")
            text = losses_text(record["losses"])
            writer.writerow([rank, score, round(again, 6) if again > -math.inf else "", gain, text])
        write_atomically(self.directory / "hall_of_fame.csv", table.getvalue())

    def hear_retrained(self, result: dict) -> None:
        self.retrained.append(result)
        self.retrain_log.write(json.dumps(result) + "\n")
        self.retrain_log.flush()
        name, scores = result["losses"], result["scores"]
        text = name if isinstance(name, str) else losses_text(name)
        shown = "invalid" if scores is None else " ".join(f"{k} {v[self.args.metric]:.3f}" for k, v in scores.items())
        print(
            f"re-trained, seed {result['seed']}: {self.args.metric} {shown}  {result['seconds']:.1f} s  {text}",
            flush=True,
        )

    def scores_of(self, losses, seed: int) -> dict | None:
        """All metrics by split of a re-training; None if it became invalid. KeyError if it was not done yet."""
        for result in self.retrained:
            if result["losses"] == losses and result["seed"] == seed:
                return result["scores"]
        raise KeyError((losses, seed))

    def closing_score(self, losses: dict[str, str]) -> float:
        """Mean over the re-training seeds, search-validation split; -inf where one was invalid or none was done."""
        runs = [result["scores"] for result in self.retrained if result["losses"] == losses]
        if not runs or None in runs:
            return -math.inf
        return sum(scores["val"][self.args.metric] for scores in runs) / len(runs)

    def show_end(self, found, finalists: list, test: dict, pictures: dict[str, Path]) -> None:
        """The end of a run, on the console and in TensorBoard."""
        args, story, search = self.args, self.story, self.search
        print(f"\n{'':6}{'proxy':>7} {'re-trained':>10}  loss ({args.metric} on the search-validation split)")
        proxy = {json.dumps(record["losses"]): f"{score:.3f}" for score, record in search.ranking()}
        for losses in finalists:
            mark = ">>>>" if losses == found else "    "
            scores = f"{proxy.get(json.dumps(losses), '-'):>7} {self.closing_score(losses):>10.3f}"
            print(f"{mark}  {scores}  {losses_text(losses)}")
        named = {("found" if name == "found" else story.baseline): column for name, column in test.items()}
        show_table(named, story.metrics, args.metric)
        print(f"\nexplored {search.explored:,} losses, trained {search.evaluated}; everything is in {self.directory}")
        if found is None:
            print("no valid loss was found; give the search more --minutes or --evals")
        else:
            print(f"take the found loss with you: {self.directory / 'best_loss.py'}")

        for name, column in test.items():
            for metric, values in column.items():
                if values:
                    self.board.add_scalar(f"test/{metric}/{name}", sum(values) / len(values), search.explored)
        for name, losses in (("found", found), ("baseline", story.baseline)):
            picture = pictures.get(json.dumps(losses))
            if picture and picture.exists():
                pixels = cv2.imread(str(picture))[..., ::-1]  # BGR to RGB
                self.board.add_image(f"predictions/{name}", pixels, search.explored, dataformats="HWC")
        flags = {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str))}
        final = test["found"][args.metric] if found else []
        self.board.add_hparams(flags, {"hparam/test": sum(final) / len(final) if final else 0.0}, run_name=".")


class Crew:
    """The workers as whoever reports sees them: its own process, child processes, or the other ranks of torchrun."""

    def __init__(self, board: Board, reporter: Reporter, task: Task | None, children: list[subprocess.Popen]):
        self.board, self.reporter, self.task, self.children, self.phase = board, reporter, task, children, 0

    def hear(self) -> None:
        for rank, message in self.board.news():
            if "record" in message and not (self.task and rank == self.board.rank):
                self.reporter.search.absorb(message["record"])
            self.reporter.hear(rank, message)

    def wait_until_idle(self, phase) -> None:
        """Listen until every living worker has nothing left to do in `phase`.

        However long that takes: of a search or a re-training nobody knows. torchrun ends all ranks if one has died.
        """
        while True:
            self.hear()
            busy = [rank for rank in range(len(self.board.read)) if self.reporter.idle.get(rank) != phase]
            if self.children:
                busy = [rank for rank in busy if self.children[rank].poll() is None]
                if all(child.poll() is not None for child in self.children):
                    self.hear()
                    raise ChildProcessError("all workers have ended")
            if not busy:
                return
            time.sleep(0.05)

    def retrain(self, jobs: list[tuple]) -> None:
        """Have (losses, seed, picture) re-trained, once each; what a dying worker leaves undone is offered again."""
        for _ in range(3):
            done = {(json.dumps(r["losses"]), r["seed"]) for r in self.reporter.retrained}
            left = [
                {"losses": losses, "seed": seed, "picture": str(picture) if picture else None}
                for losses, seed, picture in jobs
                if (json.dumps(losses), seed) not in done
            ]
            if not left:
                return
            self.board.post_jobs(self.phase, left)
            if self.task:
                serve(self.reporter.search, self.board, self.phase, left, self.hear)
            self.wait_until_idle(self.phase)
            self.phase += 1
        raise ChildProcessError("workers keep ending while they re-train")

    def dismiss(self) -> None:
        self.board.post_jobs(self.phase, None)
        for child in self.children:
            child.wait()


# ---------------------------------------------------------------------------------------------------------------------
# The command line that all scripts share


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line: flag, value and cure; exit code 2."""

    def error(self, message: str):
        fail(message.removeprefix("argument "))


def fail(message: str):
    """End the program because of what the user gave it; of several workers the first one says why."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def at_least(least, kind=int):
    """An argparse type: a number that is not below `least`."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not (value >= least and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is too small; give at least {least}")
        return value

    return convert


def one_of(names):
    """An argparse type: one of `names`."""

    def convert(text: str):
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text}: unknown; choose one of {' '.join(names)}")
        return text

    return convert


def add_search_arguments(parser: argparse.ArgumentParser, own: dict[str, str] | None = None) -> None:
    """The flags of the search itself, the same in every script but for the task's `own` kinds of search."""
    kinds = {name: kind.about for name, kind in SEARCHES.items()} | (own or {})
    group = parser.add_argument_group("search")
    group.add_argument(
        "--search",
        type=one_of(tuple(kinds)),
        default="evolve",
        metavar="NAME",
        help="; ".join(f"{name}: {about}" for name, about in kinds.items()) + " (%(default)s)",
    )
    group.add_argument(
        "--without",
        type=gate_list,
        default=[],
        metavar="GATES",
        help="gates to switch off, comma-separated, for ablations: dead,seen,gradient,equivalent,rejected,invalid",
    )
    group.add_argument(
        "--evals", type=at_least(1), default=500, metavar="N", help="budget: proxy trainings (%(default)s)"
    )
    group.add_argument(
        "--minutes",
        type=at_least(0.01, float),
        default=7.0,
        metavar="M",
        help="budget: minutes of searching, before the closing round (%(default)s)",
    )
    group.add_argument(
        "--workers",
        type=at_least(0),
        default=0,
        metavar="N",
        help="processes that search; 0: one per core on the CPU, one per GPU on CUDA (%(default)s)",
    )
    group.add_argument(
        "--checkpoint-steps",
        type=at_least(1),
        default=500,
        metavar="N",
        help="steps between two checkpoints of a --loss or --compare training (%(default)s)",
    )
    group.add_argument(
        "--seeds", type=at_least(1), default=3, metavar="N", help="re-training seeds of the closing table (%(default)s)"
    )
    group.add_argument(
        "--seed",
        type=at_least(0),
        default=0,
        metavar="S",
        help="seed of the search; one worker on the CPU with the same seed gives the same journal (%(default)s)",
    )
    group.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="folder in which the run directory is made (%(default)s)",
    )
    group.add_argument(
        "--resume",
        type=Path,
        metavar="RUN_DIR",
        help="go on with an interrupted run; only --evals, --minutes and --workers may differ from its own flags",
    )


def gate_list(text: str) -> list[str]:
    """An argparse type: gates, comma-separated."""
    return [one_of((*GATES, "invalid"))(name) for name in text.split(",") if name]


def settle_device_and_workers(args) -> None:
    """Resolve --device for this process and the number of workers; end with one line where the device is not there."""
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        fail(f"--device {args.device}: not available here; choose cpu" + " or cuda" * torch.cuda.is_available())
    cuda = device.type == "cuda"
    if cuda and device.index is None:  # "cuda" means the current device from here on, another one in each worker
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if not args.workers:  # a further worker pays once there is an initial population for each
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        most = torch.cuda.device_count() if cuda else cores
        args.workers = max(1, min(most, args.evals // INITIAL))


def read_found(directory: Path, task_name: str, flag: str, read: Callable[[str], object] = parse) -> dict[str, object]:
    """The losses that a finished run has found; of an unfinished one the best so far."""
    result, journal = directory / "result.json", directory / "journal.jsonl"
    if result.is_file():
        content = json.loads(result.read_text())
        if content["task"] != task_name:
            fail(f"{flag} {directory}: a run of search_{content['task']}.py, not of search_{task_name}.py")
        found = content["losses"]
    elif journal.is_file():
        valid = [line for line in read_lines(journal) if line["score"] is not None]
        found = max(valid, key=lambda line: line["score"], default={"losses": {}})["losses"]
    else:
        fail(f"{flag} {directory}: not a run directory (neither result.json nor journal.jsonl in it)")
    if not found:
        fail(f"{flag} {directory}: that run has found no valid loss")
    return {name: read(text) for name, text in found.items()}


RESUMABLE = ("evals", "minutes", "workers", "resume", "runs")  # flags that may change when a run goes on


def resume_arguments(args, given: set[str], task_name: str):
    """The arguments of the run to go on with, with the budget flags that were given now."""
    path = args.resume / "args.json"
    if not path.is_file():
        fail(f"--resume {args.resume}: not a run directory (no args.json in it); give one that a search has made")
    try:
        saved = json.loads(path.read_text())
        known = saved["arguments"]
    except (ValueError, KeyError):
        fail(f"--resume {args.resume}: its args.json cannot be read; give a run directory that a search has made")
    if saved["task"] != task_name:
        fail(
            f"--resume {args.resume}: a run of search_{saved['task']}.py, not of search_{task_name}.py; use that script"
        )
    for name in sorted(given - set(RESUMABLE)):
        if str(getattr(args, name)) != str(known.get(name)):
            flag, value = name.replace("_", "-"), getattr(args, name)
            fail(f"--{flag} {value}: the run was made with {known.get(name)}; leave the flag out")
    for name, value in known.items():
        if name not in RESUMABLE or (name not in given and name in ("evals", "minutes", "workers")):
            setattr(args, name, value)
    return args


def given_flags(parser: argparse.ArgumentParser, argv: list[str]) -> set[str]:
    """The names of the arguments that stand on the command line."""
    bare = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    for action in parser._actions:
        switch = {"action": "store_true"} if action.nargs == 0 else {}
        if action.dest != "help":
            bare.add_argument(*action.option_strings, dest=action.dest, **switch)
    return set(vars(bare.parse_known_args(argv)[0]))


# ---------------------------------------------------------------------------------------------------------------------
# The whole run


@dataclass
class Story:
    """What a script tells `run` about its task without loading anything."""

    name: str  # seg, det, pose
    baseline: str  # the hand-made loss to beat, a name that `Task.retrain` knows
    metrics: tuple[str, ...]
    make_task: Callable[[], Task]
    export: Callable[[dict[str, Expr]], str]  # the losses as one standalone Python file
    samplers: dict[str, Callable[[], Sampler]] = field(default_factory=dict)  # searches of its own, by name
    read: Callable[[str], object] = parse  # a loss from its text


def run(args, story: Story) -> None:
    """Search, close, compare, report. In a child or in rank > 0 of torchrun: only work."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    under_torchrun, is_child = "TORCHELASTIC_RUN_ID" in os.environ, "AUTOLOSS_RUN_DIR" in os.environ
    launching = not under_torchrun and not is_child and args.workers > 1
    task = None if launching else story.make_task()  # first: what is wrong with the data shall leave nothing behind
    if under_torchrun or is_child:
        own_server = under_torchrun and rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        port = int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(os.environ["MASTER_ADDR"], port, None, own_server, wait_for_workers=False)
        if under_torchrun and rank == 0:
            directory = Path(store.get("run_dir").decode()) if store.check(["run_dir"]) else open_run(args, story.name)
            store.set("run_dir", str(directory))
        else:
            directory = Path(os.environ.get("AUTOLOSS_RUN_DIR") or store.get("run_dir").decode())
    else:
        world = args.workers
        store = dist.HashStore() if world == 1 else dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        directory = open_run(args, story.name)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # an elastic restart begins with fresh logs
    board = Board(dist.PrefixStore(f"attempt{attempt}", store), rank, world)

    lines = read_lines(directory / "journal.jsonl")
    if is_child or (under_torchrun and rank > 0):
        lines = lines[: int(board.store.get("lines"))]  # what has come since is in the others' logs
    else:
        board.store.set("lines", str(len(lines)))
    kind = SEARCHES.get(args.search, Kind((), "the task's own"))
    sampler = story.samplers[args.search]() if args.search in story.samplers else None
    batch = GPU_BATCH if args.device.startswith("cuda") else 1
    search = Search(task, frozenset(kind.gates) - set(args.without), kind, batch, sampler, story.read)
    for line in lines:
        search.absorb(line)
    finished = sum(line["worker"] == rank for line in lines)
    elapsed = lines[-1]["elapsed"] if lines else 0.0

    if is_child or (under_torchrun and rank > 0):
        work(args, story, search, board, elapsed, finished)
        return

    board.store.add("claim/evaluations", search.evaluated)
    children = launch(world, store.port, directory) if launching else []
    reporter = Reporter(directory, search, args, story)
    reporter.begin(lines)
    crew = Crew(board, reporter, task, children)
    try:
        if task:
            publish_baseline(story, task, board)
            search_loop(search, board, args, elapsed, finished, crew.hear)
        crew.wait_until_idle("search")
        close(args, story, crew)
        crew.dismiss()
    except KeyboardInterrupt:
        crew.hear()
        print(f"\ninterrupted; go on with: python search_{story.name}.py --resume {directory}")
        raise SystemExit(130) from None
    except ChildProcessError as error:
        if all(child.returncode == 2 for child in children) and not search.evaluated:
            shutil.rmtree(directory)  # the data set was broken; a worker has said so
            raise SystemExit(2) from None
        print(f"error: {error}; go on with: python search_{story.name}.py --resume {directory}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        for child in children:
            child.kill()
        reporter.board.close()


def launch(world: int, port: int, directory: Path) -> list[subprocess.Popen]:
    """Start the same command once per worker, with the environment that torchrun would give it.

    In sessions of their own: Ctrl-C reaches this process alone, which then ends them.
    """
    print(f"starting {world} workers", flush=True)
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared = {**os.environ, **shared, "AUTOLOSS_RUN_DIR": str(directory)}
    return [
        subprocess.Popen(
            [sys.executable, *sys.argv], env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, start_new_session=True
        )
        for r in range(world)
    ]


def work(args, story: Story, search: Search, board: Board, elapsed: float, finished: int) -> None:
    """The life of a worker: search, then re-train what is asked for, until sent home."""

    def hear() -> None:
        for rank, message in board.news():
            if "record" in message and rank != board.rank:
                search.absorb(message["record"])

    try:
        if board.rank == 0:
            publish_baseline(story, search.task, board)
        search_loop(search, board, args, elapsed, finished, hear)
        for phase in count():
            jobs = board.wait_for_jobs(phase)
            if jobs is None:
                return
            serve(search, board, phase, jobs)
    except dist.DistError:  # whoever reports has gone, and so does this worker
        os._exit(1)


def publish_baseline(story: Story, task: Task, board: Board) -> None:
    try:
        score = task.train(story.baseline)
    except InvalidLoss:
        score = None
    board.publish(baseline=score)


def open_run(args, task_name: str) -> Path:
    """Make a run directory, or go on in the given one."""
    if args.resume:
        print(f"going on in {args.resume}")
        return args.resume
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = f"{task_name}_{args.metric}_{args.data}_{args.seed}_{stamp}"
    for suffix in ("", *(f"-{k}" for k in range(2, 100))):
        directory = args.runs / (name + suffix)
        try:
            directory.mkdir(parents=True)
            break
        except FileExistsError:
            continue
    revision = ""
    if shutil.which("git"):
        here = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
        revision = subprocess.run(["git", "rev-parse", "HEAD"], **here).stdout.strip()
    about = {
        "task": task_name,
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "git": revision or None,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "device": torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "cpu",
    }
    write_atomically(directory / "args.json", json.dumps(about, indent=1))
    print(f"run directory: {directory}", flush=True)
    return directory


def select_finalists(ranking: list[tuple[float, dict]], baseline: float | None) -> list[dict[str, str]]:
    """The best few by proxy, no two with nearly the same gradient as long as others beat the baseline [D].

    Near relatives train alike: five of them would be one candidate, re-trained five times; and a whole family can have
    won by starting fast. The directions in the equivalence keys tell relatives: sqrt(2 (1 - cosine)) per sample; so
    does a score that is equal to the last digit.
    """

    def direction(record: dict) -> list[float]:
        return [float(part.split(":")[1]) for key in record["identity"] for part in key.split(" ") if ":" in part]

    chosen, others, last = [], [], None
    for score, record in ranking:
        here = direction(record)
        related = score == last or (
            here and any(math.dist(here, direction(other)) < RELATED * len(here) ** 0.5 for other in chosen)
        )
        last = score
        worse = baseline is not None and score < baseline
        (others if related or worse else chosen).append(record)
    return [record["losses"] for record in (chosen[:FINALISTS] + others)[:FINALISTS]]


def close(args, story: Story, crew: Crew) -> None:
    """The closing round, the comparison on the test split, and everything that is written at the end."""
    reporter, search = crew.reporter, crew.reporter.search
    directory = reporter.directory
    seconds = reporter.elapsed
    finalists = select_finalists(search.ranking(), reporter.baseline)
    parts = search.best_parts()
    if len(finalists) < FINALISTS and len(parts) > 1 and parts not in finalists:  # a short search of several branches
        finalists.append(parts)
    print(f"closing round: the best {len(finalists)} by proxy and {story.baseline}, re-trained", flush=True)
    seeds = [args.seed + k for k in range(args.seeds)]
    pictures = {json.dumps(losses): directory / f"finalist_{k}.png" for k, losses in enumerate(finalists, 1)}
    pictures[json.dumps(story.baseline)] = directory / "baseline.png"
    jobs = [
        (losses, seed, pictures[json.dumps(losses)] if seed == seeds[0] else None)
        for seed in seeds
        for losses in (story.baseline, *finalists)
    ]
    crew.retrain(jobs)

    found = max(finalists, key=reporter.closing_score, default=None)
    if found is not None and reporter.closing_score(found) == -math.inf:
        found = None
    names = {"baseline": story.baseline}
    if found is not None:
        names = {"found": found, **names}
        write_atomically(directory / "best_loss.py", story.export({k: search.read(v) for k, v in found.items()}))
    reporter.write_hall_of_fame()

    test = {}
    for name, losses in names.items():
        runs = [reporter.scores_of(losses, seed) for seed in seeds]
        test[name] = {m: [run["test"][m] for run in runs if run is not None] for m in story.metrics}
    result = {
        "task": story.name,
        "metric": args.metric,
        "losses": found or {},
        "explored": search.explored,
        "evaluated": search.evaluated,
        "gates": search.gate_counts(),
        "seconds": round(seconds, 1),
        "test": {"found": {}, **test},
    }
    write_atomically(directory / "result.json", json.dumps(result, indent=1))
    reporter.show_end(found, finalists, test, pictures)


# ---------------------------------------------------------------------------------------------------------------------
# Losses by name instead of a search: --loss and --compare


def rank_and_world() -> tuple[int, int]:
    """This process among those that share one training under torchrun; (0, 1) where none do, as in a search."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Checkpoint:
    """A training on disk, written every so many steps: a kill costs no more than the steps since the last one.

    `parts` are what has a state_dict (network, optimizer, schedule), `generators` where the batches come from.
    """

    def __init__(self, path: Path, every: int):
        self.path, self.every = path, every

    def load(self, parts: Sequence, generators: Sequence[torch.Generator]) -> tuple[int, list]:
        """Restore everything; how many steps are done, and the curve so far."""
        if not self.path.exists():
            return 0, []
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        for part, saved in zip(parts, state["parts"]):
            part.load_state_dict(saved)
        for generator, saved in zip(generators, state["generators"][rank_and_world()[0]]):
            generator.set_state(saved)
        return state["steps"], state["curve"]

    def save(self, steps: int, curve: list, parts: Sequence, generators: Sequence[torch.Generator]) -> None:
        """Written by rank 0; of the others only the generators differ."""
        states = [[generator.get_state() for generator in generators]]
        rank, world = rank_and_world()
        if world > 1:
            own, states = states[0], [None] * world
            dist.all_gather_object(states, own)
        if rank == 0:
            unfinished = self.path.with_suffix(".part")
            parts = [part.state_dict() for part in parts]
            torch.save({"steps": steps, "curve": curve, "parts": parts, "generators": states}, unfinished)
            unfinished.replace(self.path)


def compare(args, story: Story) -> None:
    """Train losses as at the end of a search, and print their scores on the test split.

    Everything goes into a run directory; `--resume` repeats nothing that is finished there and goes on with the
    training in flight. Under torchrun all processes share each training.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    rank, world = rank_and_world()
    task = story.make_task()
    shared = [open_run(args, story.name) if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(shared)
    (directory,) = shared
    done = {(line["loss"], line["seed"]): line for line in read_lines(directory / "retrain.jsonl")}
    seeds = range(args.seed, args.seed + args.seeds)
    try:
        for k, (name, losses) in enumerate(args.wanted.items()):
            for seed in seeds:
                if (name, seed) not in done:
                    checkpoint = Checkpoint(directory / f"training_{k}_{seed}.pt", args.checkpoint_steps)
                    done[name, seed] = train_once(args, task, name, losses, seed, checkpoint)
                if rank == 0:
                    line = done[name, seed]
                    scores = line["scores"] and f"{args.metric} {line['scores']['test'][args.metric]:.3f}"
                    print(f"{name}, seed {seed}: {scores or line['invalid']}  {line['seconds']:.1f} s", flush=True)
    except KeyboardInterrupt:
        if rank == 0:
            print(f"\ninterrupted; go on with: python search_{story.name}.py --resume {directory}")
        raise
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    test = {}
    for name in args.wanted:
        valid = [line["scores"]["test"] for line in (done[name, seed] for seed in seeds) if line["scores"]]
        test[name] = {metric: [scores[metric] for scores in valid] for metric in story.metrics}
    if args.compare:
        show_losses(test, story.metrics, args.seeds)
    else:
        show_table({name if len(name) < 17 else "loss": test[name] for name in test}, story.metrics, args.metric)
        print(f"\nthe trained networks are in {directory}")


def train_once(args, task: Task, name: str, losses, seed: int, checkpoint: Checkpoint) -> dict:
    """One training of `compare` as its line in retrain.jsonl, and its curve in TensorBoard."""
    line, start, directory = {"loss": name, "seed": seed, "scores": None}, time.time(), checkpoint.path.parent
    try:
        line["scores"] = task.retrain(losses, seed, checkpoint=checkpoint)
    except InvalidLoss as error:
        line["invalid"] = f"the loss or its gradient became invalid at {error}"
    line["seconds"] = round(time.time() - start, 2)
    if rank_and_world()[0] == 0:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed before

        with (directory / "retrain.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        with SummaryWriter(str(directory)) as board:
            for step, value in task.curve:
                board.add_scalar(f"retrain/{checkpoint.path.stem}", value, step)
        if args.compare:  # the networks of a single loss are kept
            checkpoint.path.unlink(missing_ok=True)
    return line


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def mean_and_spread(values: list[float], digits: int = 3) -> str:
    """Mean and sample standard deviation."""
    if not values:
        return "invalid"
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))
    return f"{mean:.{digits}f} +- {spread:.{digits}f}"


def show_table(test: dict[str, dict[str, list[float]]], metrics: tuple[str, ...], chosen: str | None) -> None:
    """One column per loss, one row per metric; the metric that was searched for is marked."""
    number = max((len(values) for column in test.values() for values in column.values()), default=0)
    print(f"\ntest split, mean and spread over {number} re-training seed{'s' * (number != 1)}")
    print(" " * 16 + "".join(f"{name:>18}" for name in test))
    for metric in metrics:
        mark = ">>>>" if metric == chosen else "    "
        print(f"{mark}  {metric:<10}" + "".join(f"{mean_and_spread(column[metric]):>18}" for column in test.values()))


def show_losses(test: dict[str, dict[str, list[float]]], metrics: tuple[str, ...], seeds: int) -> None:
    """One row per loss, one column per metric: the shape of the published tables, in percent."""
    print(f"\ntest split, percent, mean and spread over {seeds} re-training seed{'s' * (seeds != 1)}\n")
    print("| loss | " + " | ".join(metrics) + " |\n|---|" + "---|" * len(metrics))
    for name, scores in test.items():
        cells = [mean_and_spread([100 * v for v in scores[metric]], 1) for metric in metrics]
        print(f"| {name} | " + " | ".join(cells) + " |")
