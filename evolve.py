"""Regularised evolution over the language of losses (AutoLoss-Zero, arXiv 2103.14026, Sec. 3.2-3.4).

    replay the journal
    while there is budget
        parent  <- the best of a random 5 % of the population
        child   <- mutate(parent), again and again until one passes the gates
        score   <- proxy training with the child, stopped at the first invalid value
        journal <- child, score;    population <- the newest P of population + child
    closing round: the best few are trained with all steps; the best of these is the found loss

Between a child and its training stand gates, cheapest first: dead, seen, gradient, equivalent, surrogate, rejected,
unstable. A child ahead of the baseline shows from later base networks, too, whether that lasts, and one further ahead
than all before from random weights whether it learns (`train_by_proxy`) [D].

This module knows no task: what a script hands over is a `Task`, a handful of tensors and a few functions that train.

The journal is all that workers share. Each appends its records to a file of its own in the run directory and tails the
files of the others; a search is a fold over these records, live as well as on resume.

From top to bottom: The algorithm, Task, Trees, Gates, Surrogate, State, Several branches, Closing round, Files of a
run, Journal and workers, Report, The whole run, Command line, Losses by name, Tables, Other searches.
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import NamedTuple, NoReturn, Protocol

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from loss_ops import OPERATORS, ZERO, Expr, canonical, evaluate, fits, is_dead, latex, leaves_of, parse

POPULATION = 2500  # [P] the newest P candidates stay
INITIAL = 20  # [P] random candidates to begin with
DEPTH = 3  # [P] operators above each leaf of a random tree
TOURNAMENT = 0.05  # [P] share of the population that competes to be the parent ...
TOURNAMENT_MIN = 5  # ... but never fewer [D]: 5 % of a population of 100 would be hardly a selection
FRESH = 0.10  # [D] share of the trainings whose candidate has no parent
REMEMBERED = 100_000  # verdicts that are kept for reuse [D]
NODES = 30  # [D] of a mutated tree, at most: longer ones cost more and say no more
ETA = 0.6  # [P] least gain in the rejection protocol; the scripts say where another limit was measured
REJECTION_STEPS = 500  # [P]
# [D] Decisions before the last step: at `step`, a gain below `low` rejects and one of at least `high` accepts, both as
# shares of eta. Measured, not guessed: tests/bench_gates.py counts the verdicts that differ from the full protocol.
EARLY = ((10, 0.02, 1.30), (25, 0.10, 1.25), (50, 0.25, 1.20), (100, 0.45, 1.15), (200, 0.70, 1.10))
RECOVERY = 0.05  # [D] of what the baseline gains from predictions that are sure and wrong
STEEPNESS = 30  # [D] times the baseline's, of gradients where predictions are sure and right
REJECTION_LR = 0.1  # [D] step of Adam on the raw predictions: saturates a softmax within some fifty steps
GPU_WORKERS = 8  # [D] that share a GPU by default, on the embedded data (tests/bench_gpu.py)
POOL = 200  # [D] children from which the surrogate chooses ...
ATTEMPTS = 2000  # [D] ... made by at most so many mutations, many of which are dead or known ...
ELITE = 0.5  # [D] ... this share of them from the most promising children before them
UPWARDS = 0.5  # [D] share of the surrogate's standard deviation that counts: few trainings surpass what is expected
PROMISING = 0.03  # [D] share of what the baseline leaves to be gained, at which a loss is trained from random weights,
FURTHER = 1.25  # [D] ... and the next one at so many times the lead of what has learned there
RELATED = 0.95  # [D] mean cosine of gradients: of losses nearer than this one alone is a parent, or a finalist
TWINS = 0.99  # [D] cosine of gradients beyond which the training of one loss tells nothing that the other's has not
SAME = 0.999  # [D] cosine of the gradients before and after the formula is made short
HOLDS = 0.9  # [D] share of what the best finalist scores, below which one has failed
CHOICE_SEEDS = 50  # [D] seeds of the re-trainings by which losses are chosen; the closing table has ...
TABLE_SEEDS = 100  # [D] ... those from here on, by which nothing was chosen


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm


def search(state: "State", worker: "Worker", args) -> None:
    """One worker's part of the search, until the budget is spent.

    Every turn has a random generator of its own, and all else comes from the journal: a resumed search goes on exactly.
    """
    deadline = time.monotonic() + 60 * args.minutes - state.searched
    while True:
        worker.hear(state)
        if state.evaluated >= args.evals or time.monotonic() >= deadline:
            return
        if not state.compared and worker.claim("baseline"):
            worker.works_on(state.task.baseline)
            first, *later = [proxy_score(state.task, state.task.baseline, base) for base in range(state.task.bases)]
            worker.tell({"baseline": first, "later": later, "witness": witness_score(state, state.task.baseline)})
            continue
        turn = state.next_turn(worker.rank)
        rng = Random(f"{args.seed}/{worker.rank}/{turn}")
        at_work = worker.others_at_work(state)
        guide = state.surrogate.fit(state, at_work) if state.surrogate else None
        child = next_child(state, rng, guide, deadline, at_work)
        if child is None:  # the deadline came first
            return
        worker.tell({"turn": turn, **proxy_training(state, worker, child)})


def next_child(
    state: "State", rng: Random, guide: "Surrogate | None", deadline: float, at_work: Sequence[dict] = ()
) -> "Child | None":
    """A child that deserves a training; None where the deadline has come and nothing has passed.

    As published, one parent is drawn and mutated until a child passes: a new parent for every attempt would select for
    fertility. With the surrogate some hundred children of many parents pass the cheap gates, and the most promising of
    them go on [D].
    """
    if state.sampler:
        return state.sampler.propose(rng)
    tried, parent = Tried(deadline), None
    if together := best_trials_together(state, at_work):
        return tried.close(state, together)
    early = len(state.results) < (INITIAL if len(state.task.branches) == 1 else TRIALS)
    fresh = rng.random() < FRESH or not state.method.mutate or early
    while time.monotonic() < deadline:
        if guide:
            pool = breed(state, rng, guide, fresh, tried)
        else:
            parent = parent if parent or fresh else select_parent(state, rng)
            child = propose(state, rng, parent, tried)
            pool = [child] if child and judge(state, child, CHEAP, tried) else []
        for k, child in enumerate(pool):
            if judge(state, child, DEAR, tried):
                tried.counts["surrogate"] += len(pool) - k - 1 if guide else 0
                return tried.close(state, briefly(state, child) if guide else child)
    return None


def proxy_training(state: "State", worker: "Worker", child: "Child") -> dict:
    """The proxy training of a child, as its record in the journal."""
    start = time.monotonic()
    worker.works_on(child.losses)
    shown, curve = train_by_proxy(state, child.losses)
    return {
        "losses": texts(child.losses),
        "parent": texts(child.parent),
        **shown,
        "gain": {tree.branch: tree.gain for tree in child.trees},
        "identity": child.identity,
        "predicted": child.predicted,
        "tried": child.tried,
        "curve": [[step, float(f"{loss:.4g}")] for step, loss in curve if math.isfinite(loss)],
        "seconds": round(time.monotonic() - start, 3),
        **child.more,
    }


def train_by_proxy(state: "State", losses) -> tuple[dict, list[tuple[int, float]]]:
    """What losses show in proxy trainings, as the journal has it, and the curve of the first of them.

    Where they are ahead of the baseline, they go on from later base networks, too, and how far they are ahead there is
    added: what starts well may not last. What is behind is not looked at any further, and nothing is until the baseline
    has been trained, as by another worker in the first seconds of a search [D].

    What is further ahead than all before is trained from random weights, too, since no base network has these; what
    hardly learns there counts as invalid [D].
    """
    task, later, witness = state.task, [], None
    score, curve = proxy_score(task, losses), task.curve
    if score is not None and state.baseline is not None and score > state.baseline:
        later = [proxy_score(task, losses, base) for base in range(1, 1 + len(state.later))]
        leads = [again - known for again, known in zip(later, state.later) if None not in (again, known)]
        score = None if None in later else round(score + sum(leads), 6)
        if score is not None and state.needs_witness(score):
            witness = witness_score(state, losses)
            score = score if learns(state, witness) else None
    return {"score": score, "later": later, "witness": witness}, curve


def witness_score(state: "State", losses) -> float | None:
    """What losses score by `Task.witness`, from the weights that the closing round begins with; None if not asked."""
    return score_of(state.task.witness, losses, state.choice_seeds[0]) if "unstable" in state.gates else None


def learns(state: "State", witness: float | None) -> bool:
    """Whether losses with this score of a witness come half as far as the baseline, with an error at most twice its."""
    return witness is not None and witness >= max(state.witness / 2, 2 * state.witness - 1)


def proxy_score(task: "Task", losses, base: int = 0) -> float | None:
    """What a proxy training of losses scores, as below."""
    return score_of(task.train, losses, base)


def score_of(train: Callable[..., float], *what) -> float | None:
    """What a training scores; None where that is no number, or the training became invalid."""
    try:
        score = float(train(*what))
    except InvalidLoss:
        return None
    return score if math.isfinite(score) else None


def retraining(task: "Task", worker: "Worker", losses, seed: int, picture: Path | None = None) -> dict:
    """A training of losses, or of the baseline by its name, from fresh weights, as its record in the journal."""
    start, scores = time.monotonic(), None
    worker.works_on(losses)
    with contextlib.suppress(InvalidLoss):
        scores = finite(task.retrain(losses, seed, picture))
    return {"retrained": texts(losses), "seed": seed, "scores": scores, "seconds": round(time.monotonic() - start, 3)}


def finite(scores: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The scores of a training on all splits. Raises InvalidLoss where one is no number: that is no score."""
    for split, of_split in scores.items():
        if wrong := [metric for metric, score in of_split.items() if not math.isfinite(score)]:
            raise InvalidLoss(f"the end: {wrong[0]} on {split} is no number")
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# The task, as the search sees it


class InvalidLoss(Exception):
    """Training met a loss or a gradient that is not finite."""


class DataError(Exception):
    """A data set that is missing or broken; the message names the path and the cure."""


@dataclass
class Branch:
    """One searched loss: its symbols, and samples on which a tree can show what it optimises.

    All tensors are on the CPU: for so few numbers one core is faster than a GPU (tests/bench_gpu.py).

    prediction: (S, B, N, C, H, W), raw outputs for B samples of the base network at S states of its training; the
    first state, an untrained network, is where the rejection protocol starts. target: (B, N, ...) in whatever form the
    two functions take. leaves(prediction, target) -> tensors (..., B, N, C, H, W) by symbol; score(prediction, target)
    -> (..., B), how well each prediction scores. Both take leading dimensions. `ideal` (B, N, C, H, W) is right about
    the target, and `known` holds hand-made losses as formulas; both are there for `--search cse` alone. `wrong` has
    the shape of `ideal` and is sure of something false; `sure` (R, B, N, C, H, W) is right, but for noise, and more or
    less sure. Where a task has these two the gate `unstable` looks there; the last two numbers are its limits.
    """

    symbols: tuple[str, ...]
    prediction: Tensor
    target: Tensor
    leaves: Callable[[Tensor, Tensor], dict[str, Tensor]]
    score: Callable[[Tensor, Tensor], Tensor]
    eta: float = ETA
    early: tuple[tuple[int, float, float], ...] = EARLY
    baseline: str = ""  # the baseline's loss as a formula, where it is one
    scale_free: bool = False  # the task trains with an optimiser that a factor before the loss does not change
    ideal: Tensor | None = None
    known: tuple[str, ...] = ()
    wrong: Tensor | None = None
    sure: Tensor | None = None
    recovery: float = -math.inf
    steepness: float = math.inf


class Sampler(Protocol):
    """A search over losses that are not trees, which a script may bring along; the state is a fold over the records."""

    def propose(self, rng: Random) -> "Child":
        """Losses to train next (`str` writes, `Task.read` reads them); `more` is what else the record shall hold."""

    def learn(self, record: dict) -> None:
        """A finished evaluation. Raises ValueError, before anything has changed, where it has not what `more` had."""

    def show(self, board) -> None:
        """Write to TensorBoard what is new."""


class Task:
    """What a script gives to the search: a class of its own on top of this one.

    It is made in every process, also in those that only report; `load` and `prepare` bring what training needs.
    `losses`: a tree per branch, the baseline's loss where one has none; or the name of a hand-made loss.
    """

    name: str  # seg, det, pose
    baseline: str  # the hand-made loss to beat, a name that `retrain` knows
    metrics: tuple[str, ...]
    symbols: dict[str, Sequence[str]]  # of trees, by branch; of the class
    samplers: dict[str, Callable[[], Sampler]] = {}  # searches of its own, by name
    rungs: tuple = ((4, 1), (2, 2))  # closing round: so many finalists, so many seeds; the best ones go on [D]
    whole = True  # whether `retrain` has all the steps of its schedule, and not fewer by --retrain-steps
    ready = False  # once the data are loaded: what is wrong with them from then on, this process alone may have seen
    branches: dict[str, Branch]  # at the latest from `prepare` on
    bases = 1  # networks from which proxy trainings go on, the earliest first; from `prepare` on
    curve: list[tuple[int, float]] = []  # (step, loss) of the latest training

    def load(self) -> None:
        """Load the data, once. Raises DataError."""
        raise NotImplementedError

    def prepare(self, base: Path) -> None:
        """What a search needs beyond that: branches, and the base network, trained now or read from the file `base`."""

    def train(self, losses: dict[str, Expr] | str, base: int = 0) -> float:
        """Proxy training from a base network; the metric on the search-validation split. Raises InvalidLoss."""
        raise NotImplementedError

    def retrain(
        self, losses: dict[str, Expr] | str, seed: int, picture: Path | None = None, checkpoint=None
    ) -> dict[str, dict[str, float]]:
        """From fresh weights: all metrics on `val` and `test`; some predictions as `picture`.

        With a `Checkpoint` it goes on from there, and is shared by all processes under torchrun. Raises InvalidLoss.
        """
        raise NotImplementedError

    def witness(self, losses: dict[str, Expr] | str, seed: int) -> float:
        """As `train`, but longer, and from the random weights of `retrain`, to tell who learns from these.

        NaN: nothing is asked of this task's losses there.
        """
        return math.nan

    def simulate(self, losses: dict[str, Expr] | str) -> float:
        """A short training on a few samples: the metric on these, 0 if it became invalid; for `--search cse` alone."""
        raise NotImplementedError

    def export(self, losses: dict[str, object], title: str) -> str:
        """The losses as one standalone Python file."""
        raise NotImplementedError

    @staticmethod
    def read(text: str) -> object:
        """A searched loss from its text. Raises ValueError."""
        return parse(text)

    @classmethod
    def read_losses(cls, texts: dict[str, str] | str) -> dict[str, object] | str:
        """Losses from what `texts` makes of them. Raises ValueError where a branch or a symbol is none of this task."""
        if isinstance(texts, str):
            return texts
        losses = {name: cls.read(text) for name, text in texts.items()}
        for name, loss in losses.items():
            leaves = leaves_of(loss) if isinstance(loss, Expr) else set()
            if not leaves <= {*cls.symbols.get(name, ())} or name not in cls.symbols:
                raise ValueError(f"{name}={loss!s:.60} is no loss of search_{cls.name}.py")
        if not losses:
            raise ValueError("there is no loss")
        return losses


# ---------------------------------------------------------------------------------------------------------------------
# Trees and mutations


def random_tree(rng: Random, symbols: tuple[str, ...], depth: int = DEPTH) -> Expr:
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


def pick(rng: Random, expr: Expr, operators: bool | None = None) -> tuple[int, Expr]:
    """A random node of `expr`, or one of its operators, or of its leaves, with its number in preorder."""
    return rng.choice([(k, node) for k, node in enumerate(nodes(expr)) if operators in (None, bool(node.args))])


def insert(rng: Random, expr: Expr, symbols: tuple[str, ...]) -> Expr:
    """Put a random operator between a random node and its parent; a second operand is a random leaf [P]."""
    index, node = pick(rng, expr)
    op = rng.choice(list(OPERATORS))
    args = [node] + [Expr(rng.choice(symbols)) for _ in range(OPERATORS[op].arity - 1)]
    rng.shuffle(args)
    return replace_node(expr, index, Expr(op, tuple(args)))


def delete(rng: Random, expr: Expr, symbols: tuple[str, ...]) -> Expr:
    """Remove a random operator; one of its operands, at random, takes its place [P]."""
    index, node = pick(rng, expr, operators=True)
    return replace_node(expr, index, rng.choice(node.args))


def replace(rng: Random, expr: Expr, symbols: tuple[str, ...]) -> Expr:
    """Exchange a random operator; surplus operands are dropped at random, missing ones are random leaves [P]."""
    index, node = pick(rng, expr, operators=True)
    op = rng.choice([name for name in OPERATORS if name != node.op])
    args, arity = list(node.args), OPERATORS[op].arity
    while len(args) > arity:
        args.pop(rng.randrange(len(args)))
    while len(args) < arity:
        args.insert(rng.randrange(len(args) + 1), Expr(rng.choice(symbols)))
    return replace_node(expr, index, Expr(op, tuple(args)))


def exchange_leaf(rng: Random, expr: Expr, symbols: tuple[str, ...]) -> Expr:
    """Another symbol in place of a random leaf [D]."""
    index, node = pick(rng, expr, operators=False)
    return replace_node(expr, index, Expr(rng.choice([symbol for symbol in symbols if symbol != node.op])))


def swap(rng: Random, expr: Expr, symbols: tuple[str, ...]) -> Expr:
    """Two operands of different operators, neither inside of the other, change places [D]; no operator is lost."""
    everything = nodes(expr)
    first, second = sorted(rng.sample(range(1, len(everything)), 2)) if len(everything) > 2 else (0, 0)
    if second < first + len(nodes(everything[first])):
        return expr
    return replace_node(replace_node(expr, second, everything[first]), first, everything[second])


def combine(rng: Random, expr: Expr, symbols: tuple[str, ...]) -> Expr:
    """Add a small random tree to a random node, or multiply by it [D]: a weight or a penalty in a single step."""
    index, node = pick(rng, expr)
    term = random_tree(rng, symbols, rng.randint(1, DEPTH))
    return replace_node(expr, index, Expr(rng.choice(("Add", "Mul")), (node, term)))


def cross(rng: Random, expr: Expr, other: Expr) -> Expr:
    """A random subtree of `other` in place of a random node of `expr`, or as a term or factor beside it [D]."""
    (index, node), (_, part) = pick(rng, expr), pick(rng, other)
    beside = Expr(rng.choice(("Add", "Mul")), (node, part))
    return replace_node(expr, index, rng.choice((part, beside)))


def mutate(rng: Random, expr: Expr, symbols: tuple[str, ...], other: Expr | None = None) -> Expr:
    """One, two or three mutations in a row (1/2, 1/3, 1/6) [D]; some children have a second parent, `other`.

    A bare leaf can only grow, and what has outgrown NODES can only shrink.
    """
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        if other and rng.random() < 0.15:
            expr = cross(rng, expr, other)
        else:
            kind = rng.choice((insert, delete, replace, exchange_leaf, swap, combine)) if expr.args else insert
            expr = kind(rng, expr, symbols)
        while len(nodes(expr)) > NODES:
            expr = delete(rng, expr, symbols)
    return expr


# ---------------------------------------------------------------------------------------------------------------------
# Gates: functions of one shape, a tree in, a verdict out; None lets the tree pass


class Verdict(NamedTuple):
    """What became of a tree in a branch."""

    gate: str  # the gate that turned it away, or "passed"
    key: str = ""  # what equivalent trees share
    gain: float | None = None  # in the rejection protocol


PASSED = "passed"


@dataclass
class Tree:
    """A tree of one branch on its way through the gates."""

    branch: str
    expr: Expr
    text: str  # what it is remembered by
    key: str | None = None  # "" where the gradient is of no use
    gain: float | None = None
    sketch: Tensor | None = None  # see `sketch`
    verdict: Verdict | None = None
    gate: str = ""  # the gate that gave the verdict


@dataclass
class Child:
    """A candidate: a loss per branch, or for one alone; `trees` are those that its parent does not have."""

    losses: dict[str, Expr]
    parent: dict[str, Expr] | None = None
    trees: Sequence[Tree] = ()
    identity: tuple[str, ...] = ()  # shared by all equivalent candidates
    predicted: list[float] | None = None  # mean and standard deviation, by the surrogate
    tried: dict | None = None  # what was looked at before it, see `Tried`
    more: dict = field(default_factory=dict)  # for the record, by other kinds of search


class Tried:
    """What one turn of the search has looked at: counters, verdicts, and children that took over a known score."""

    def __init__(self, deadline: float = math.inf):
        self.deadline = deadline
        self.counts: Counter = Counter()
        self.verdicts: list[tuple] = []
        self.reused: list[tuple] = []
        self.failed: list[tuple] = []  # identities that CSE's short training turned away

    def learn(self, state: "State", tree: Tree) -> None:
        tree.verdict = tree.verdict or Verdict(PASSED, tree.key or "", tree.gain)
        self.verdicts.append((tree.branch, tree.text, *tree.verdict))
        state.learn(*self.verdicts[-1])

    def close(self, state: "State", child: Child) -> Child:
        """What the record of `child`, which goes on to its training, has to tell of this turn."""
        for tree in (tree for tree in child.trees if tree.verdict is None):
            self.learn(state, tree)
        state.waiting.clear()
        child.identity = child.identity or state.identity(child)
        keys = [f"{name}:{expr}" for name, expr in child.losses.items()]
        if programs := {key: state.programs[key] for key in keys if key in state.programs}:
            child.more = child.more | {"programs": programs}
        child.tried = {"counts": +self.counts, "verdicts": self.verdicts, "reused": self.reused, "failed": self.failed}
        return child


def judge(state: "State", child: Child, names: tuple[str, ...], tried: Tried) -> bool:
    """Whether a child passes the named gates; its new trees go through one gate after the other.

    A child whose equivalent was trained takes over its score [P], but for a search with the surrogate.
    """
    names = [name for name in names if name in state.gates]
    for name in (name for name in names if name in GATES):  # "simulation" judges the whole child, below
        for tree in child.trees:
            if tree.verdict is None and (verdict := GATES[name](state, tree)):
                tree.verdict, tree.gate = verdict, name
                if name not in ("dead", "seen"):
                    tried.learn(state, tree)
    decided = [tree for tree in child.trees if tree.verdict]
    refused = [tree.gate for tree in decided if tree.verdict.gate != PASSED]
    child.identity = state.identity(child)
    if refused:
        gate = min(refused, key=list(GATES).index)
    elif child.identity in state.failed:
        gate = "seen"
    elif (decided or not child.trees) and child.identity in state.scores:  # an equivalent was trained
        gate = decided[-1].gate if decided else "seen"
        if not state.surrogate:  # hundreds a turn would soon make a population of copies
            tried.reused.append((texts(child.losses), child.identity))
    elif "simulation" in names and not simulated(state, child):
        gate = "simulation"
        tried.failed.append(child.identity)
        state.failed.add(child.identity)
    else:
        return True
    tried.counts[gate] += 1
    return False


def dead(state: "State", tree: Tree) -> Verdict | None:
    """Symbolic, no tensor touched: the gradient provably knows no prediction or no target [D]."""
    return Verdict("dead") if is_dead(canonical(tree.expr)) else None


def seen(state: "State", tree: Tree) -> Verdict | None:
    """The canonical text was judged before, and the verdict stands; or it has come up earlier in this turn [D]."""
    here = tree.branch, tree.text
    verdict = state.verdicts.get(here) or (Verdict("seen") if here in state.waiting else None)
    state.waiting.add(here)
    return verdict


def gradient(state: "State", tree: Tree) -> Verdict | None:
    """Nothing can be learned from the gradient [D]; see `gradients`."""
    return None if describe(state.task, tree) else Verdict("gradient")


def equivalent(state: "State", tree: Tree) -> Verdict | None:
    """Norms and directions of the gradients are known to two digits [P]; verdict and score are reused."""
    return state.keys.get((tree.branch, describe(state.task, tree)))  # "" is no key there


def rejected(state: "State", tree: Tree) -> Verdict | None:
    """The loss-rejection protocol [P], see `rejection_gain`."""
    branch = state.task.branches[tree.branch]
    gain = rejection_gain(branch, tree.expr)
    tree.gain = round(gain, 4) if math.isfinite(gain) else None
    return None if gain >= branch.eta else Verdict("rejected", tree.key or "", tree.gain)


def unstable(state: "State", tree: Tree) -> Verdict | None:
    """What no training from a base network shows: it may not learn from random weights, or collapse late [D].

    Losses with the same gradients at the base networks may differ in this, so that the verdict has no key.
    """
    return None if is_stable(state.task.branches[tree.branch], tree.expr) else Verdict("unstable", "", tree.gain)


def describe(task: Task, tree: Tree) -> str:
    """The key of a tree, "" where its gradient is of no use; this and the sketch are computed once."""
    if tree.key is None:
        branch = task.branches[tree.branch]
        slope = gradients(branch, tree.expr)
        tree.key = "" if slope is None else equivalence_key(slope, branch.scale_free)
        tree.sketch = None if slope is None else sketch(branch, slope)
    return tree.key


def gradients(branch: Branch, expr: Expr) -> Tensor | None:
    """dL/d(prediction) at all states, (S, B, D) float64; None where the first state teaches nothing.

    That is where it is not finite, where it is zero on every sample, or where it stays the same on every sample (to a
    thousandth of its norm) with wrong targets: those of another sample, and its own ones shifted, along N where it has
    several (a box shifted by a coordinate would be none). At later states a gradient that is not finite counts as zero.
    """
    x, y = branch.prediction, branch.target
    rows = y if y.shape[1] > 1 else y.flatten(1)
    shifted = rows.roll(rows.shape[1] // 3 + 1, 1).view_as(y)
    targets = torch.stack([y, y.roll(1, 0), shifted, *[y] * (len(x) - 1)])  # (2 + S, B, ...)
    x = torch.cat([x[:1].expand(3, *x.shape[1:]), x[1:]]).requires_grad_()  # (2 + S, B, N, C, H, W)
    values = evaluate(expr, branch.leaves(x, targets))  # (2 + S, B)
    if not values.requires_grad:
        return None
    slopes = torch.autograd.grad(values.sum(), x)[0].flatten(2).double()  # (2 + S, B, D)
    first, finite = slopes[:3], slopes.isfinite().all(-1) & values.isfinite()  # (2 + S, B)
    norm = first[0].norm(dim=-1)
    changes = (first[1:] - first[:1]).norm(dim=-1)  # (2, B)
    if not (finite[:3].all() and norm.any() and (changes > 1e-3 * norm).any()):
        return None
    return torch.where(finite[..., None], slopes, 0.0)[[0, *range(3, len(slopes))]]


def equivalence_key(slope: Tensor, scale_free: bool) -> str:
    """What losses with the same gradient share: two significant digits, per sample, of its norm [P] and direction [D].

    Norms alone confuse cross entropy with its negative and with losses of another direction, so the key also holds the
    projection of each sample's gradient on a fixed random direction. Where the optimiser does not feel the scale of a
    loss, neither does the key: norms are relative to that over all samples [D]. All states of the base network count.
    """
    norm = slope.norm(dim=-1)  # (S, B)
    side = (slope @ directions(slope.shape[-1])[:, 0].double()) / norm.clamp(min=1e-300)
    norm = norm / norm.norm() if scale_free else norm
    digits = " ".join(f"{n:.1e}:{s:+.1e}" for n, s in zip(norm.flatten().tolist(), side.flatten().tolist()))
    return hashlib.blake2b(digits.encode(), digest_size=8).hexdigest()


SKETCH = 128  # [D] numbers that stand for the direction of one gradient
SCALE = 0.25  # [D] distance of two gradients of the same direction, one of which is ten times as long


@functools.lru_cache(maxsize=8)
def directions(size: int) -> Tensor:
    """Fixed random directions (size, SKETCH)."""
    return torch.randn(size, SKETCH, generator=torch.Generator().manual_seed(0))


def sketch(branch: Branch, slope: Tensor) -> Tensor:
    """Directions of the gradients (S, B, D) in few numbers, (S * B * SKETCH [+ 1],) float32.

    Random projections keep distances (Johnson & Lindenstrauss): the squared distance of two sketches is the mean over
    the S * B gradients of that of the bounded unit gradients, 2 - 2 cosine, to a few percent. Where the scale of a loss
    counts, as among several that are added, one more number tells it.
    """
    projected = bounded(branch, slope).float() @ directions(slope.shape[-1]) / SKETCH**0.5
    projected = (projected / math.prod(slope.shape[:2]) ** 0.5).flatten()
    scale = SCALE * slope.norm(dim=-1).mean().log10().clamp(-4, 2).float()
    return projected if branch.scale_free else torch.cat([projected, scale[None]])


def bounded(branch: Branch, slope: Tensor) -> Tensor:
    """Unit gradients (S, B, D) in which a few positions cannot outweigh the rest [D].

    At each position the length m over C becomes m / (m + mean). Where a loss pulls most is soon learned, and then the
    rest decides (measured in tests/bench_surrogate.py).
    """
    field = slope.view(*slope.shape[:2], *branch.prediction.shape[2:4], -1)  # (S, B, N, C, H * W)
    length = field.norm(dim=3, keepdim=True)
    field = (field / (length + length.mean((2, 4), keepdim=True)).clamp(min=1e-300)).flatten(2)
    return field / field.norm(dim=-1, keepdim=True).clamp(min=1e-300)


def rejection_gain(branch: Branch, expr: Expr, steps: int = REJECTION_STEPS, early: tuple | None = None) -> float:
    """The loss-rejection protocol [P]: how much the predictions improve when the loss itself is minimised on them.

    Each of the B raw predictions is optimised on its own. The step rule is Adam's, which does not feel the scale of the
    loss: with plain gradient steps a factor before the loss would decide the verdict [D]. `early` decisions are those
    of the branch unless others are given.

    Returns: the mean over samples of score(after) - score(before); -inf if it became invalid on the way.
    """
    early = branch.early if early is None else early
    x, gain = branch.prediction[0].clone(), -math.inf  # (B, N, C, H, W)
    before = branch.score(x, branch.target).nanmean()  # NaN of a sample with nothing to measure
    mean, square = torch.zeros_like(x), torch.zeros_like(x)  # moments of the gradient
    limits = {step: (low * branch.eta, high * branch.eta) for step, low, high in early}
    for step in range(1, steps + 1):
        x.requires_grad_()
        value = evaluate(expr, branch.leaves(x, branch.target)).sum()
        if not value.requires_grad:  # no prediction in it; only a search without the first two gates comes here
            break
        (slope,) = torch.autograd.grad(value, x)
        x = x.detach()
        mean.lerp_(slope, 0.1)
        square.lerp_(slope.square_(), 0.001)
        x -= REJECTION_LR / (1 - 0.9**step) * mean / ((square / (1 - 0.999**step)).sqrt_() + 1e-16)
        if step in limits or step == steps:
            gain = (branch.score(x, branch.target).nanmean() - before).item() if x.isfinite().all() else -math.inf
            low, high = limits.get(step, (-math.inf, math.inf))
            if not low <= gain < high:
                break
    return gain


def is_stable(branch: Branch, expr: Expr) -> bool:
    """Whether a loss leads an untrained network to where the baseline does, leads away from what is sure and wrong, and
    meets no pole on the way to what is sure and right.

    No base network is untrained, nor sure of what is wrong, as a network may come to be from random weights; in the end
    it is sure of what is right, and one gradient far longer than all before would throw it back.
    """
    if branch.wrong is None:
        return True
    if not agreement(branch, expr) > 0 or recovery(branch, expr, branch.recovery) < branch.recovery:
        return False
    return steepness(branch, expr) <= branch.steepness


def agreement(branch: Branch, expr: Expr) -> float:
    """The cosine of the gradients of a loss and of the baseline at the untrained network; NaN where there is none."""
    ours, its = (gradients(branch, loss) for loss in (expr, parse(branch.baseline)))
    missing = ours is None or its is None
    return math.nan if missing else torch.cosine_similarity(ours[0].flatten(), its[0].flatten(), 0).item()


def recovery(branch: Branch, expr: Expr, enough: float = math.inf) -> float:
    """What the loss-rejection protocol gains from predictions that are sure of what is wrong, until that is enough."""
    early = [(step, -math.inf, 1.0) for step, *_ in EARLY]
    return rejection_gain(dataclasses.replace(branch, prediction=branch.wrong[None], eta=enough), expr, early=early)


def steepness(branch: Branch, expr: Expr) -> float:
    """The longest gradient where predictions are sure and right, over the mean of those at the last base network.

    inf where one of them is not finite, or there is none.
    """
    norms = []
    for x in (branch.prediction[-1], branch.sure):
        x = x.detach().requires_grad_()
        value = evaluate(expr, branch.leaves(x, branch.target)).sum()
        if not value.requires_grad:  # as above
            return math.inf
        norms.append(torch.autograd.grad(value, x)[0].double().flatten(-4).norm(dim=-1))  # (..., B)
    ratio = (norms[1].max() / norms[0].mean()).item()
    return ratio if math.isfinite(ratio) else math.inf


def settle_limits(branch: Branch) -> Branch:
    """The branch, so that its baseline passes `rejected` and `unstable` with a margin [D].

    Where nearly all of a picture is one class an untrained network may be nearly right, and nothing gains much; of two
    classes that are exchanged the boundaries are right, and nothing can be regained.
    """
    expr = parse(branch.baseline)
    gain = rejection_gain(branch, expr, early=())
    if math.isfinite(gain):
        branch.eta = min(branch.eta, gain / 2, gain)  # it may lose, where an untrained network is right
    if branch.eta <= 0 or rejection_gain(branch, expr) < branch.eta:  # shares of nothing decide nothing
        branch.early = ()
    if branch.wrong is not None:
        regained = recovery(branch, expr)
        branch.recovery = RECOVERY * regained if regained > 0 else -math.inf
        branch.steepness = STEEPNESS * steepness(branch, expr)
    return branch


CHEAP = ("dead", "seen", "gradient", "equivalent", "rising")
DEAR = ("rejected", "unstable", "simulation")
GATES = {gate.__name__: gate for gate in (dead, seen, gradient, equivalent, rejected, unstable)}
COUNTERS = (*CHEAP, "surrogate", *DEAR)


# ---------------------------------------------------------------------------------------------------------------------
# Surrogate: losses with nearly the same gradient train nearly alike [D]


class Surrogate:
    """A Gaussian process over the gradients of losses that predicts the score of a proxy training.

    A score is modelled as the baseline's, plus a linear function of where the gradient lies, seen from the baseline's,
    plus a smooth function of it. Hence the covariance of two candidates, averaged over branches:
    trend * <g - b, g' - b> + exp(-|g - g'|^2 / length^2), where g and g' are their unit gradients and b the baseline's,
    over samples and states [D]. The linear part sees beyond the families that were tried: what helped a little may help
    a lot. The baseline, which is trained anyway, is part of what it learns from. Length, noise and trend are chosen by
    their marginal likelihood, one after another, twice; the best variance is known in closed form.
    """

    ROWS = 400  # candidates it learns from: the best of all and the newest, half and half
    LENGTHS, NOISES = (0.1, 0.2, 0.4, 0.7, 1.2), (0.001, 0.005, 0.02, 0.1)
    TRENDS = (0.1, 0.3, 1.0, 3.0, 10.0)
    KNEE = 0.3  # scale on which bad scores are `compressed`: this much of the best one's lead

    def __init__(self):
        self.known: dict[str, Tensor] = {}  # points of what was trained, by text
        self.merits: dict[tuple[str, ...], float] = {}  # expected scores, by identity
        self.niches: dict[tuple[str, ...], set] = {}  # see `niche_bests`, by branches

    def fit(self, state: "State", at_work: list[dict[str, Expr]]) -> "Surrogate | None":
        """Learn all that is known; None while that is too little."""
        members = state.members()
        if len(members) < INITIAL:
            return None
        self.learn(state, members)
        choices_of = self.LENGTHS, self.NOISES, self.TRENDS
        setting = [choices[len(choices) // 2] for choices in choices_of]
        for k, choices in [*enumerate(choices_of)] * 2:
            setting = max(([*setting[:k], value, *setting[k + 1 :]] for value in choices), key=self.evidence)
        self.solve(*setting)
        points = self.points
        for those in at_work:  # what others are training at this moment, as if its expected score had come out
            point = self.point(state.task, those)[None]
            self.values = torch.cat([self.values, self.predict(point)[0]])
            self.points = torch.cat([self.points, point])
            self.pairs = self.compare(self.points, self.points)
            self.solve(*setting)
        mean, _ = self.predict(points)
        self.best = mean.max()
        self.merits = {row.identity: value for row, value in zip(self.rows, self.scores(mean))}
        self.ranking = mean[: len(self.rows)].argsort(descending=True).tolist()
        self.names, self.niches = list(state.task.branches), {}
        return self

    def learn(self, state: "State", members: list["Member"]) -> None:
        """What there is to learn from: `rows` of candidates, `points` and `values` of these and of the baseline."""
        task = state.task
        half, ranking = self.ROWS // 2, sorted(members, key=lambda member: member.score or 0.0)
        self.rows = list({member.text: member for member in ranking[-half:] + members[-half:]}.values())
        losses, scores = [row.losses for row in self.rows], [row.score or 0.0 for row in self.rows]
        if state.baseline is not None:
            losses, scores = [*losses, {}], [*scores, state.baseline]
        values = torch.tensor(scores, dtype=torch.float64)
        knee = min(values.median().item(), math.inf if state.baseline is None else state.baseline)
        values = compressed(values, knee, max(self.KNEE * (values.max().item() - knee), 1e-3))
        self.centre = values.mean().item() if state.baseline is None else values[len(self.rows)].item()
        self.spread = max(values.std().item(), 1e-6)
        self.values = (values - self.centre) / self.spread
        self.points = torch.stack([self.point(task, those) for those in losses])
        self.origin = self.point(task, {})[None]
        self.pairs = self.compare(self.points, self.points)

    def niche_bests(self, branches: Sequence[str]) -> set[tuple[str, ...]]:
        """The best candidates with a tree in each of these branches, by identity, of which no two are near relatives.

        What they have in others does not count, unless no branch is named.
        """
        key = tuple(branches)
        if key not in self.niches:
            apart = self.pairs[0][[self.names.index(name) for name in key or self.names]].mean(0) >= 2 - 2 * RELATED
            best: list[int] = []
            for k in self.ranking:
                if self.rows[k].score is not None and {*key} <= self.rows[k].losses.keys() and apart[k, best].all():
                    best.append(k)
            self.niches[key] = {self.rows[k].identity for k in best}
        return self.niches[key]

    def point(self, task: Task, losses: dict[str, Expr], trees: Sequence[Tree] = ()) -> Tensor:
        """(branches, size): the sketches of a candidate. A baseline that is no tree is a direction by itself."""
        text = losses_text(losses)
        if text in self.known:
            return self.known[text]
        sketches = {tree.branch: tree.sketch for tree in trees}
        rows = []
        for name, branch in task.branches.items():
            own = torch.zeros(SKETCH * math.prod(branch.prediction.shape[:2]) + 2 - branch.scale_free)
            expr = losses.get(name) or (parse(branch.baseline) if branch.baseline else None)
            if expr is None:
                own[-1] = 1.0
            elif (found := sketches.get(name)) is not None:
                own[:-1] = found
            elif (slope := gradients(branch, expr)) is not None:
                own[:-1] = sketch(branch, slope)
            rows.append(own)
        if not trees:
            self.known[text] = torch.stack(rows)
        return torch.stack(rows)

    def compare(self, one: Tensor, other: Tensor) -> Tensor:
        """(2, branches, n, m) of points (n, branches, size) and (m, branches, size), seen from the baseline.

        First their squared distances, then their inner products.
        """
        squared = squared_distances(one, other)
        from_one, from_other = squared_distances(one, self.origin), squared_distances(other, self.origin)
        return torch.stack([squared, (from_one + from_other.mT - squared) / 2])

    def covariance(self, pairs: Tensor) -> Tensor:
        """(n, m) of two lots of scores, by what `compare` says of their points."""
        squared, inner = pairs
        return ((-squared / self.length**2).exp() + self.trend * inner).mean(0)

    def solve(self, length: float, noise: float, trend: float) -> None:
        self.length, self.noise, self.trend = length, noise, trend
        matrix = self.covariance(self.pairs)
        self.factor = torch.linalg.cholesky(matrix + noise * torch.eye(len(matrix), dtype=torch.float64))
        self.weights = torch.cholesky_solve(self.values[:, None], self.factor)[:, 0]
        self.variance = (self.values @ self.weights / len(self.values)).clamp(min=1e-12)

    def evidence(self, setting: Sequence[float]) -> float:
        """Log marginal likelihood, up to a constant."""
        try:
            self.solve(*setting)
        except torch.linalg.LinAlgError:  # by rounding, where many are nearly alike and little noise is assumed
            return -math.inf
        return -(len(self.values) / 2 * self.variance.log() + self.factor.diagonal().log().sum()).item()

    def predict(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """What losses are expected to score, in the units of `self.values`, and how uncertain that is."""
        known = self.covariance(self.compare(points, self.points))
        prior = 1 + self.trend * squared_distances(points, self.origin)[:, :, 0].mean(0)
        told = torch.linalg.solve_triangular(self.factor, known.T, upper=False).square().sum(0)
        return known @ self.weights, (self.variance * (prior - told).clamp(min=1e-12)).sqrt()

    def scores(self, values: Tensor) -> list[float]:
        return (values * self.spread + self.centre).tolist()

    def rank(self, task: Task, children: Sequence[Child]) -> list[Child]:
        """The greatest expected improvement per second first; each child is told what is predicted of it.

        On the embedded data a node costs some three hundredths of what the rest of a training step costs [D].
        """
        mean, deviation = self.predict(torch.stack([self.point(task, c.losses, c.trees) for c in children]))
        for child, m, d in zip(children, self.scores(mean), deviation.tolist()):
            child.predicted = [round(m, 4), round(d * self.spread, 4)]
        sizes = [sum(len(nodes(expr)) for expr in child.losses.values()) for child in children]
        cost = 1 + 0.03 * torch.tensor(sizes, dtype=torch.float64)
        promise = (expected_improvement(mean, UPWARDS * deviation, self.best) / cost).tolist()
        return [child for _, child in sorted(zip(promise, children), key=lambda pair: -pair[0])]

    def without_twins(self, task: Task, children: Sequence[Child]) -> list[Child]:
        """The children that are no twin of a candidate that was or is being trained, nor of the baseline [D]."""
        points = torch.stack([self.point(task, child.losses, child.trees) for child in children])
        alone = squared_distances(points, self.points).amax(0).amin(1) >= 2 - 2 * TWINS
        return [child for child, keep in zip(children, alone.tolist()) if keep]


def breed(state: "State", rng: Random, guide: Surrogate, fresh: bool, tried: Tried) -> list[Child]:
    """Children that pass the cheap gates, the greatest expected improvement first.

    Half of them are children of the most promising ones before them. So several mutations in a row, each chosen by what
    is expected of it, cross valleys that single ones do not, for the price of a few gradients.
    """
    task = state.task
    pool: dict[tuple, Child] = {}
    elite: list[Child] = []
    ranked = 0  # size of the pool when the elite was chosen
    for _ in range(ATTEMPTS):
        if len(pool) >= POOL or time.monotonic() >= tried.deadline:
            break
        if len(pool) >= ranked + POOL // 5:
            elite, ranked = guide.rank(task, list(pool.values()))[: POOL // 10], len(pool)
        elder = rng.choice(elite) if elite and rng.random() < ELITE else None
        parent = elder or (None if fresh else select_parent(state, rng))
        child = propose(state, rng, parent, tried)
        if not judge(state, child, CHEAP, tried):
            continue
        if elder:  # in the journal its parent is the last one that was trained
            old = child.losses.keys() - {tree.branch for tree in child.trees}
            child.trees = [*child.trees, *(tree for tree in elder.trees if tree.branch in old)]
            child.parent, child.identity = elder.parent, state.identity(child)
        pool[child.identity] = child
    if not pool:
        return []
    ranked = guide.rank(task, list(pool.values()))
    alone = guide.without_twins(task, ranked) or ranked
    tried.counts["surrogate"] += len(ranked) - len(alone)
    return alone


def in_short(task: Task, name: str, expr: Expr) -> Expr:
    """The tree of a branch without the operators that make no difference to its gradients [D]; nothing is trained.

    Double negations and the like go first. Where the scale of a loss counts, the norms must stay the same, too. What
    would be unstable without them stays as it is.
    """
    branch, whole = task.branches[name], expr
    expr = min(expr, canonical(expr), key=lambda tree: len(nodes(tree)))
    wanted = gradients(branch, expr)
    free = branch.scale_free and len(task.branches) == 1

    def same(candidate: Expr) -> bool:
        slope = gradients(branch, candidate)
        if slope is None or wanted is None:
            return False
        norms = slope.norm(dim=-1), wanted.norm(dim=-1)
        cosine = (slope * wanted).sum(-1) / (norms[0] * norms[1]).clamp(min=1e-300)
        alike = (cosine >= SAME) | ((norms[0] == 0) & (norms[1] == 0))
        return bool(alike.all()) and (free or bool(((norms[0] - norms[1]).abs() <= 0.01 * norms[1]).all()))

    while True:
        cuts = {replace_node(expr, k, arg) for k, node in enumerate(nodes(expr)) for arg in node.args}
        shortest_first = sorted(cuts, key=lambda cut: (len(nodes(cut)), str(cut)))
        cut = next((cut for cut in shortest_first if not is_dead(canonical(cut)) and same(cut)), None)
        if cut is None:
            return expr if expr == whole or is_stable(branch, expr) else whole
        expr = cut


def briefly(state: "State", child: Child) -> Child:
    """The child with its new trees in short: cheaper to train, and no mutation of it is wasted on idle operators.

    It stays as it is where the short one is known already.
    """
    trees = [state.tree(t.branch, in_short(state.task, t.branch, t.expr), t.gain) for t in child.trees]
    useful = all(describe(state.task, tree) for tree in trees)
    losses = child.losses | {tree.branch: tree.expr for tree in trees}
    short = dataclasses.replace(child, losses=losses, trees=trees)
    short.identity = state.identity(short)
    known = any((tree.branch, tree.text) in state.verdicts for tree in trees) or short.identity in state.scores
    return child if known or not useful else short


def compressed(scores: Tensor, knee: float, scale: float) -> Tensor:
    """Scores, those below the knee on a logarithmic scale: how bad a bad loss is says little of the good ones [D].

    Bad is what is worse than the baseline and among the worse half. Good losses differ from the baseline, most of what
    differs from it is bad, and a smooth function of the gradient would learn from that to stay near the baseline
    (measured in tests/bench_surrogate.py).
    """
    below = (knee - scores).clamp(min=0)
    return torch.where(below > 0, knee - scale * (below / scale).log1p(), scores)


def squared_distances(one: Tensor, other: Tensor) -> Tensor:
    """(branches, n, m) float64 of points (n, branches, size) and (m, branches, size)."""
    one, other = one.movedim(1, 0), other.movedim(1, 0)
    square = one.square().sum(-1)[:, :, None] + other.square().sum(-1)[:, None]
    return (square - 2 * one @ other.mT).clamp(min=0).double()


def expected_improvement(mean: Tensor, deviation: Tensor, best: Tensor) -> Tensor:
    """Of normal variables beyond `best` (Jones 1998, Eq. 15)."""
    z = (mean - best) / deviation
    return deviation * (z * torch.special.ndtr(z) + (-z * z / 2).exp() / (2 * math.pi) ** 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# State: a fold over the records


class Member(NamedTuple):
    """A candidate with the score of its proxy training, or with that of an equivalent one."""

    losses: dict[str, Expr]
    score: float | None  # None: invalid
    identity: tuple[str, ...]
    text: str = ""
    gain: float | None = None
    parent: str | None = None  # its text


@dataclass
class State:
    """Everything a search knows. It changes by `absorb` alone, but for what a turn has learned before its record."""

    task: Task
    method: "Method"
    metric: str
    gates: frozenset[str] = frozenset(GATES)
    surrogate: Surrogate | None = None
    sampler: Sampler | None = None  # proposes in place of evolution
    population: deque[Member] = field(default_factory=lambda: deque(maxlen=POPULATION))
    counts: Counter = field(default_factory=Counter)  # by gate, and of invalid trainings
    verdicts: dict[tuple[str, str], Verdict] = field(default_factory=dict)  # by branch and text
    keys: dict[tuple[str, str], Verdict] = field(default_factory=dict)  # by branch and key
    waiting: set[tuple[str, str]] = field(default_factory=set)  # branch and text of what is in the pool of this turn
    failed: set[tuple[str, ...]] = field(default_factory=set)  # identities that CSE's short training turned away
    scores: dict[tuple[str, ...], float | None] = field(default_factory=dict)  # of proxy trainings, by identity
    results: dict[str, Member] = field(default_factory=dict)  # distinct candidates, by text
    again: dict[str, dict[int, dict | None]] = field(default_factory=dict)  # `Task.retrain` by text and seed
    turns: dict[int, set[int]] = field(default_factory=dict)  # numbers of the proxy trainings, by worker
    programs: dict[str, list] = field(default_factory=dict)  # by branch and tree, the latest that computes it
    compared: bool = False  # whether the baseline has had its proxy trainings:
    baseline: float | None = None  # its score ...
    later: Sequence[float | None] = ()  # ... what it scores from later base networks ...
    witness: float | None = None  # ... and from random weights
    proven: float = -math.inf  # the best score of what has learned from these, too
    simulated: float | None = None  # its score in the short training of CSE
    choice_seeds: Sequence[int] = range(CHOICE_SEEDS, TABLE_SEEDS)  # of the re-trainings by which losses are chosen
    broken: int = 0  # lines of the journal that could not be read
    elapsed: float = 0.0  # seconds
    searched: float = 0.0  # of these before the closing round

    @property
    def evaluated(self) -> int:
        return sum(map(len, self.turns.values()))

    def next_turn(self, worker: int) -> int:
        """One more than the last: a line that was lost on the way shifts no later turn."""
        return max(self.turns.get(worker, ()), default=-1) + 1

    def members(self) -> list["Member"]:
        """The distinct candidates, the oldest first."""
        return list(self.results.values())

    def needs_witness(self, score: float) -> bool:
        """Whether this promises enough, and by a quarter more than what has learned from random weights already."""
        lead, proven = score - self.baseline, self.proven - self.baseline
        return self.witness is not None and lead >= max(PROMISING * (1 - self.baseline), FURTHER * proven)

    @property
    def explored(self) -> int:
        """Candidates looked at: those that a gate decided and those that were trained."""
        return sum(self.counts[gate] for gate in COUNTERS) + self.evaluated

    def gate_counts(self) -> dict[str, int]:
        """What each gate has turned away, and how many trainings became invalid."""
        return {gate: self.counts[gate] for gate in (*(g for g in COUNTERS if g in self.gates), "invalid")}

    def text(self, expr: Expr) -> str:
        """What a tree is remembered by."""
        return str(canonical(expr)) if "seen" in self.gates else str(expr)

    def tree(self, branch: str, expr: Expr, gain: float | None = None) -> Tree:
        return Tree(branch, expr, self.text(expr), gain=gain)

    def identity(self, child: Child) -> tuple[str, ...]:
        """Shared by all candidates with the same keys in the same branches."""
        new = {tree.branch: tree.key or (tree.verdict and tree.verdict.key) or tree.text for tree in child.trees}
        keys = []
        for name, expr in child.losses.items():
            known = self.verdicts.get((name, self.text(expr)))
            keys.append(f"{name}:{new.get(name) or (known and known.key) or self.text(expr)}")
        return tuple(keys)

    def learn(self, branch: str, text: str, *verdict) -> None:
        verdict = Verdict(*verdict)
        self.verdicts[branch, text] = verdict
        if verdict.key:
            self.keys.setdefault((branch, verdict.key), verdict)
        for known in (self.verdicts, self.keys):  # a long search needs no more memory than a short one
            if len(known) > REMEMBERED:
                del known[next(iter(known))]

    def absorb(self, record: dict) -> None:
        """Take in one record. Raises ValueError, before anything has changed, where it is none."""
        kind, record = next((kind for kind in RECORDS if kind in record), "losses"), UNSAID | record
        checked(record, RECORDS[kind])
        if kind == "baseline":
            self.compared, self.baseline = True, record["baseline"]
            self.later, self.witness = record["later"], record["witness"]
        elif kind == "retrained":
            key, scores = losses_text(self.task.read_losses(record["retrained"])), record["scores"]
            checked(scores, (dict.fromkeys(SCORES, dict.fromkeys(self.task.metrics, float)), None), "scores")
            self.again.setdefault(key, {})[record["seed"]] = scores
        else:
            self.absorb_evaluation(record)
        self.elapsed = max(self.elapsed, record["elapsed"])
        if kind != "retrained":
            self.searched = max(self.searched, record["elapsed"])

    def absorb_evaluation(self, record: dict) -> None:
        losses, score, tried = self.task.read_losses(record["losses"]), record["score"], record["tried"]
        identity, worker, turn = tuple(record["identity"]), record["worker"], record["turn"]
        gain = min((value for value in record["gain"].values() if value is not None), default=None)
        reused = [(self.task.read_losses(losses), tuple(known)) for losses, known in tried["reused"]]
        if turn in self.turns.setdefault(worker, set()):  # a copy of a line
            return
        if self.sampler:
            self.sampler.learn(record)
        self.turns[worker].add(turn)
        self.counts.update(tried["counts"])
        self.counts["invalid"] += score is None
        if None not in (score, record["witness"]):
            self.proven = max(self.proven, score)
        for branch, tree, *verdict in tried["verdicts"]:
            self.learn(branch, tree, *verdict)
        self.failed |= {tuple(known) for known in tried["failed"]}
        self.scores.setdefault(identity, score)
        for child, known in reused:
            self.population.append(Member(child, self.scores.get(known), known))
        parent = record["parent"] and losses_text(record["parent"])
        member = Member(losses, score, identity, losses_text(losses), gain, parent)
        self.population.append(member)
        self.results.setdefault(member.text, member)
        self.programs.update(record["programs"])

    def full_score(self, text: str, seeds: Sequence[int] = ()) -> float | None:
        """The mean over its re-trainings with these seeds on search-validation: None without, -inf if one was invalid.

        Unless seeds are given these are all by which losses are chosen, and not those of the closing table.
        """
        runs = [run for seed, run in self.again.get(text, {}).items() if seed in (seeds or self.choice_seeds)]
        if not runs:
            return None
        return -math.inf if None in runs else sum(run["val"][self.metric] for run in runs) / len(runs)

    def merit(self, member: Member) -> float:
        """What a candidate is chosen by: what it is expected to score, else its score."""
        return self.surrogate.merits.get(member.identity, member.score) if self.surrogate else member.score

    def valid(self) -> list[Member]:
        """The valid candidates, the oldest first."""
        return [result for result in self.results.values() if result.score is not None]

    def hall_of_fame(self) -> list[Member]:
        """The same by what they have shown: in re-trainings, else by proxy; what was invalid there comes last."""

        def key(result: Member):
            score = self.full_score(result.text)
            return score == -math.inf, score is None, -(result.score if score in (None, -math.inf) else score)

        return sorted(self.valid(), key=key)

    def best(self) -> Member | None:
        return next(iter(self.hall_of_fame()), None)


def texts(losses: dict[str, object] | str | None) -> dict[str, str] | str | None:
    """Losses as the journal has them: their texts by branch; the name of hand-made ones, or None, as it is."""
    return {branch: str(loss) for branch, loss in losses.items()} if isinstance(losses, dict) else losses


def losses_text(losses: dict[str, object] | str) -> str:
    """One line for one or several losses, or their texts; the name of hand-made ones as it is."""
    if isinstance(losses, str):
        return losses
    if losses.keys() == {"loss"}:
        return str(losses["loss"])
    return "; ".join(f"{branch}={loss}" for branch, loss in losses.items())


def select_parent(
    state: State, rng: Random, branches: Sequence[str] = (), least: int = TOURNAMENT_MIN
) -> Member | None:
    """The best of a random 5 % of the population; None while no valid one has a tree in each of these `branches`.

    Equivalent losses share their score to the last digit; the newest stands for all of them [D], and of near relatives
    (by the surrogate) the best one. Otherwise variants of the best so far soon fill the population, win every
    tournament, and the search never leaves them.
    """
    able = [member for member in state.population if member.score is not None and member.losses.keys() >= {*branches}]
    if state.surrogate:
        niches = state.surrogate.niche_bests(branches) if state.surrogate.merits else ()
        able = [member for member in able if member.identity in niches] or able
    distinct = list({member.score: member for member in able}.values())
    if not distinct:
        return None
    size = max(least, math.ceil(TOURNAMENT * len(distinct)))
    return max(rng.sample(distinct, min(size, len(distinct))), key=state.merit)


def propose(state: State, rng: Random, parent: Member | Child | None, tried: Tried) -> Child | None:
    """A mutated copy of the parent, or a fresh candidate; None if the deadline comes first."""
    branches, method = state.task.branches, state.method
    several = len(branches) > 1
    if several and not method.mutate:
        return whole_fresh(state, rng, tried)
    if several and state.evaluated >= TRIALS:
        return change_one(state, rng, parent)
    name = [*branches][state.evaluated % len(branches)]
    earlier = select_parent(state, rng, [name], TOURNAMENT_SEVERAL) if several and not parent else None
    if earlier and rng.random() < min(0.5, earlier.score / (state.baseline or 1.0)):
        parent = earlier
    mutated = parent and method.mutate(state, rng, name, branches[name], parent.losses[name])
    expr = mutated or method.fresh(state, rng, name, branches[name])
    return Child({name: expr}, parent and parent.losses, [state.tree(name, expr)])


# ---------------------------------------------------------------------------------------------------------------------
# Several branches
#
# A candidate has a tree in some of the branches, and the baseline's loss in the others. The first TRIALS have a single
# one, in one branch after the other: a fresh tree, or one mutated from an earlier trial, the likelier the better that
# was. The next one is put together of the best trials of all branches. From then on a child is a copy of its parent
# with one branch changed; without a parent, of the winners of one tournament per branch, put together. The branch is
# mutated, drawn afresh, taken from the winner of another tournament, or given back to the baseline [D].

TRIALS = 30
EXCHANGE = 0.3  # probability that a child takes a branch from the winner of another tournament
GIVE_BACK = 0.1  # ... that a branch has the baseline's loss again
TOURNAMENT_SEVERAL = 15  # in place of TOURNAMENT_MIN where a branch is taken from the winner


def change_one(state: State, rng: Random, parent: Member | Child | None) -> Child:
    """A child of several branches after the trials, see above."""
    branches, method = state.task.branches, state.method

    def winner(name: str) -> Expr | None:
        member = select_parent(state, rng, [name], TOURNAMENT_SEVERAL)
        return member and member.losses[name]

    before = parent and parent.losses
    losses = before or {name: expr for name in branches if (expr := winner(name))}
    name, move = rng.choice([*branches]), rng.random()
    if move < GIVE_BACK and losses.keys() > {name}:
        return Child({other: expr for other, expr in losses.items() if other != name}, before)
    if move > 1 - FRESH:
        expr = method.fresh(state, rng, name, branches[name])
    elif name in losses and not GIVE_BACK <= move < GIVE_BACK + EXCHANGE:
        expr = method.mutate(state, rng, name, branches[name], losses[name])
    else:
        expr = winner(name) or method.fresh(state, rng, name, branches[name])
    losses = {**losses, name: expr}  # in the order of the branches: the same losses are the same candidate
    return Child({key: losses[key] for key in branches if key in losses}, before, [state.tree(name, expr)])


def whole_fresh(state: State, rng: Random, tried: Tried) -> Child | None:
    """A random tree for each branch, drawn until it passes the gates by itself; None if the deadline comes first."""
    losses, branches = {}, state.task.branches
    while len(losses) < len(branches):
        if time.monotonic() >= tried.deadline:
            return None
        name = [*branches][len(losses)]
        tree = state.tree(name, state.method.fresh(state, rng, name, branches[name]))
        if judge(state, Child({name: tree.expr}, None, [tree]), (*CHEAP, *DEAR), tried):
            if tree.verdict is None:
                tried.learn(state, tree)
            losses[name] = tree.expr
    return Child(losses)


def best_trials_together(state: State, at_work: Sequence[dict]) -> Child | None:
    """The best trial of every branch, as one candidate; None before TRIALS, and once such a one is or was trained."""
    branches, parts = state.task.branches, {}
    known = [*(result.losses for result in state.results.values()), *at_work]
    if not state.method.mutate or state.evaluated < TRIALS or any(each.keys() == branches.keys() for each in known):
        return None
    for member in sorted(state.valid(), key=lambda member: member.score):
        parts |= member.losses
    return Child({name: parts[name] for name in branches}) if parts.keys() == branches.keys() else None


# ---------------------------------------------------------------------------------------------------------------------
# Closing round: finalists with all steps, a short formula, the table


def close(state: State, worker: "Worker", args) -> int:
    """One worker's part of the closing round; of how many evaluations it was.

    What is decided is decided once, in a file that all of them read. Who has nothing to do before a decision trains the
    baseline for the table.
    """
    task, table_seeds = state.task, range(args.seed + TABLE_SEEDS, args.seed + TABLE_SEEDS + args.seeds)

    def table_jobs(losses: dict | str) -> list[tuple]:
        picture = predictions_of(worker.directory, losses)
        return [(losses, seed, picture if seed == table_seeds[0] else None) for seed in table_seeds]

    worker.wait_for_searching(state)
    evaluated = state.evaluated
    finalists = worker.agree("finalists", evaluated, task, lambda: select_finalists(state))
    baseline = table_jobs(task.baseline)
    rungs = [(number, state.choice_seeds[: min(several, 2 * args.seeds)]) for number, several in task.rungs]
    found, seeds = halve(state, worker, finalists, rungs, baseline), rungs[-1][1]
    short = worker.agree("short", evaluated, task, lambda: found and shorten(task, found))
    if found and short != found:
        worker.serve(state, [(losses, seed) for seed in seeds for losses in (found, short)], baseline)
        found = max((short, found), key=lambda losses: state.full_score(losses_text(losses), seeds))
    found = worker.agree("found", evaluated, task, lambda: found)
    if found and (picture := draw_gradients(task, found)):
        write_atomically(worker.directory / "gradients.png", picture)
    worker.serve(state, [job for pair in zip(baseline, table_jobs(found)) for job in pair] if found else baseline)
    return evaluated


def halve(
    state: State, worker: "Worker", finalists: list[dict], rungs: list[tuple[int, Sequence[int]]], others: list[tuple]
) -> dict | None:
    """Successive halving: so many finalists are trained with these seeds, the best of them with those; the best of all.

    Where one fails, the next has its turn. `others` is what may be trained meanwhile.
    """

    def score(losses: dict, seeds: Sequence[int]) -> float:  # a resumed round may know other seeds, too
        return state.full_score(losses_text(losses), seeds)

    first = rungs[0][1]
    for k, (most, seeds) in enumerate(rungs):
        for number in itertools.count(most):
            worker.serve(state, [(losses, seed) for seed in seeds for losses in finalists[:number]], others)
            finalists[:number] = sorted(finalists[:number], key=lambda losses, seeds=seeds: -score(losses, seeds))
            if number >= len(finalists):
                break
            best = score(finalists[0], seeds)
            if k == 0:  # all that go on must hold beside the best, ...
                hold = score(finalists[most - 1], seeds) >= HOLDS * best > -math.inf
            else:  # ... and then the best beside the next one
                hold = best >= HOLDS * score(finalists[number], first)
            if hold:
                break
        if k == 0:
            del finalists[number:]
    return next((losses for losses in finalists if score(losses, seeds) > -math.inf), None)


def predictions_of(directory: Path, losses: dict[str, str] | str) -> Path:
    """The picture of what a network predicts that these losses have trained; another round may find others."""
    return directory / f"predictions-{hashlib.blake2b(losses_text(losses).encode(), digest_size=4).hexdigest()}.png"


def select_finalists(state: State) -> list[dict[str, str]]:
    """The best few and as many to replace them, no two with nearly the same gradient, all ahead of the baseline [D].

    Where these are too few others join them. First come those that have shown it in a re-training, for half of the
    places, then those that promise it. Near relatives train alike: a few of them would be one candidate, trained a few
    times. Equal proxy scores are taken for those of equivalent losses.
    """
    most, chosen, others, points, last = state.task.rungs[0][0], [], [], [], None
    guide = state.surrogate and state.surrogate.fit(state, []) or Surrogate()
    proven = [result for result in state.hall_of_fame() if state.full_score(result.text) not in (None, -math.inf)]
    promising = sorted(state.valid(), key=lambda result: -state.merit(result))
    candidates = [*proven[: most // 2], *promising[: 20 * most]]
    for result in {result.text: result for result in candidates}.values():
        trees = all(isinstance(loss, Expr) for loss in result.losses.values())
        point = [guide.point(state.task, result.losses)] if trees else []
        related = any((own - other).square().sum(1).mean() < 2 - 2 * RELATED for own in point for other in points)
        again = state.full_score(result.text)
        worse = again is None and state.baseline is not None and result.score < state.baseline
        if related or worse or again == -math.inf or result.score == last:
            others.append(texts(result.losses))
        else:
            chosen.append(texts(result.losses))
            points += point
        last = result.score
        if len(chosen) == 2 * most:
            break
    return chosen if len(chosen) >= most else (chosen + others)[:most]


def shorten(task: Task, losses: dict[str, str]) -> dict[str, str]:
    """The same losses in short, see `in_short`; those of a search with the surrogate mostly are."""
    trees = {name: loss for name, loss in task.read_losses(losses).items() if isinstance(loss, Expr)}
    return losses | {name: str(in_short(task, name, expr)) for name, expr in trees.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Files of a run: what they hold, checked as they are read
#
# A shape is a type (a float is any finite number), a list of one shape, a list of several that stand in this order, an
# object with these keys, or with any ({str: shape}); in a tuple, one of these.

TREES = {str: str}  # the text of a loss by branch
SCORES = {"val": {str: float}, "test": {str: float}}
AGAIN = {"seed": int, "scores": (SCORES, None), "seconds": float}  # a training from fresh weights
TRAINING = {**AGAIN, "loss": str}  # a line of retrain.jsonl
STAMP = {"worker": int, "elapsed": float}
VERDICT = [str, str, str, str, (float, None)]  # branch, text, and a `Verdict`
RECORDS = {  # the lines of a journal, by the key that tells their kind
    "baseline": {**STAMP, "baseline": (float, None), "later": [(float, None)], "witness": (float, None)},
    "retrained": {**STAMP, **AGAIN, "retrained": (TREES, str)},
    "losses": {
        **STAMP,
        "turn": int,
        "losses": TREES,
        "parent": (TREES, None),
        "score": (float, None),
        "later": [(float, None)],
        "witness": (float, None),
        "gain": {str: (float, None)},
        "identity": [str],
        "predicted": ([float, float], None),
        "tried": {"counts": {str: int}, "verdicts": [VERDICT], "reused": [[TREES, [str]]], "failed": [[str]]},
        "programs": {str: [[str, int, int, int]]},
        "curve": [[int, float]],
        "seconds": float,
    },
}
UNSAID = {"programs": {}, "later": [], "witness": None}  # by earlier versions
ABOUT = {"task": str, "arguments": {str: (str, bool, float, [(str, float)], None)}}  # args.json
RESULT = {"task": str, "losses": TREES}  # result.json, as far as it is read
ALIVE = {"losses": (TREES, str, None), "searching": bool}  # a worker's sign of life
AGREED = {"finalists": [TREES], "short": (TREES, None), "found": (TREES, None)}  # by the workers in the closing round


def checked(value, shape, place: str = "it"):
    """The value, if it has the shape. Raises ValueError that names the place in it where it has not."""
    fitting = [one for one in (shape if isinstance(shape, tuple) else (shape,)) if is_a(value, one)]
    if not fitting:
        raise ValueError(f"{place} is {value!r:.40}")
    one = fitting[0]
    if isinstance(one, list):
        if len(one) > 1 and len(one) != len(value):
            raise ValueError(f"{place} has {len(value)} entries in place of {len(one)}")
        for k, part in enumerate(value):
            checked(part, one[k % len(one)], f"{place}[{k}]")
    elif isinstance(one, dict):
        for key in value if str in one else one:
            if key not in value:
                raise ValueError(f"{place} has no {key!r}")
            checked(value[key], one.get(str) or one[key], f"{place}.{key}")
    return value


def is_a(value, shape) -> bool:
    """Whether a value is of the outer type of a shape."""
    if shape in (int, float):
        return isinstance(value, (int, shape)) and not isinstance(value, bool) and abs(value) < 1e300
    return isinstance(value, shape if isinstance(shape, type) else type(shape))


def read_json(path: Path, shape, cure: str, use: Callable = lambda document: document):
    """What `use` makes of the document in a file; the program ends with one line where that has not the shape."""
    try:
        return use(checked(json.loads(path.read_text(encoding="utf-8")), shape))
    except OSError as error:
        fail(f"{path}: {error.strerror}; {cure}")
    except (ValueError, RecursionError) as error:
        fail(f"{path}: damaged, {error!s:.120}; {cure}")


def read_weights(path: Path, device: str, use: Callable[[object], object], cure: str):
    """What `use` makes of the tensors in a file; the program ends with one line where it cannot."""
    try:
        return use(torch.load(path, map_location=device, weights_only=True))
    except torch.OutOfMemoryError:  # `main` knows the cure
        raise
    except Exception as error:  # a file of anything makes torch.load, and load_state_dict, raise anything
        fail(f"{path}: damaged, {' '.join(str(error).split()) or type(error).__name__:.120}; {cure}")


def base_states(path: Path, device: str, train: Callable[[], list[dict]], net: torch.nn.Module) -> list[dict]:
    """The weights of the base network at some of its steps; who finds no file trains it, the first for all workers."""
    if not path.exists():
        write_atomically(path, tensors_as_bytes(train()), once=True)

    def use(states: list[dict]) -> list[dict]:
        for state in checked(states, [{str: Tensor}]) or [{}]:  # no state at all fits no network either
            net.load_state_dict(state)
        return states

    return read_weights(path, device, use, "remove it, and --resume trains the base network anew")


def on_the_way(batches: Iterable, net: torch.nn.Module, steps: Sequence[int], states: list[dict]) -> Iterator:
    """The batches of a training up to the last of `steps`, before each of which the weights join `states`."""
    for step, batch in enumerate(batches):
        states += [copy.deepcopy(net.state_dict()) for _ in range(steps.count(step))]
        if step == steps[-1]:
            return
        yield batch


# ---------------------------------------------------------------------------------------------------------------------
# The journal, and those who write it


@contextlib.contextmanager
def naming(path: Path):
    """A write that fails meanwhile says in which file, what Python leaves out."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from None


def write_atomically(path: Path, content: str | bytes, once: bool = False) -> None:
    """Write a whole file or none; with `once` only if there is none yet, whoever of all workers comes first."""
    part = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        known = [FileExistsError] if once else []  # what a link finds out in one step
        with naming(path), contextlib.suppress(*known):
            part.write_bytes(content.encode() if isinstance(content, str) else content)
            os.link(part, path) if once else part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def tensors_as_bytes(tensors) -> bytes:
    """What torch.save writes, which by itself meets a full disk with an error of another kind."""
    torch.save(tensors, content := io.BytesIO())
    return content.getvalue()


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


SAID: list[bool] = []  # while anything is in it, whoever launched this worker has said what it would say of the data


@functools.cache
def warn_once(message: str) -> None:
    """A warning about the data; of several workers the first one says it."""
    if speaks() and not SAID:
        warn(message)


@functools.cache
def note(text: str) -> None:
    """A line about the data, once; of several workers the first one says it."""
    if speaks() and not SAID:
        print(text, flush=True)


def read_records(path: Path, start: int = 0) -> tuple[list[dict], int]:
    """The records of a .jsonl file from byte `start` on, and where to go on reading; a line that is none gives {}.

    A last line without its end is left for the next time: it is being written, or torn by a kill.
    """
    with path.open("rb") as file:
        file.seek(start)
        whole, end, _ = file.read().rpartition(b"\n")
    records = []
    for line in filter(bytes.strip, whole.split(b"\n")):
        record = None
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
        records.append(record if isinstance(record, dict) else {})
    return records, start + len(whole) + len(end)


class Journal:
    """The records of all workers in a run directory, read as they come."""

    warns = True  # of what cannot be read

    def __init__(self, directory: Path):
        self.directory = directory
        self.read: dict[Path, int] = {}  # bytes

    def hear(self, state: State) -> list[dict]:
        """Fold what is new into the state; the records. What cannot be read is skipped with a warning and counted."""
        if STOPPED:
            raise KeyboardInterrupt(STOPPED[0])
        heard, news, broken = [], [], {}
        for path in sorted(self.directory.glob("journal-*.jsonl")):
            records, self.read[path] = read_records(path, self.read.get(path, 0))
            times = itertools.accumulate((is_a(r.get("elapsed"), float) and r["elapsed"] or 0.0 for r in records), max)
            news += [(moment, path, record) for moment, record in zip(times, records)]
        for _, path, record in sorted(news, key=lambda new: new[0]):  # as they came, also when all are read at once
            try:
                state.absorb(record)
                heard.append(record)
            except ValueError as error:
                state.broken += 1
                broken.setdefault(path, []).append(str(error))
        for path, errors in broken.items() if self.warns else ():
            warn(f"{path}: {len(errors)} broken lines were skipped ({errors[0]:.80})")
        return heard


class Worker(Journal):
    """One process that searches: the owner of one journal file, with a sign of life that the others see.

    Its rank is the lowest whose journal nobody holds. A file lock tells who holds one: it ends with its process,
    whatever ends that. The sign of life is a file touched every second; who has not touched it for STALE seconds (a
    stopped process, a lost machine) is not waited for, and what it had claimed is taken over.
    """

    STALE = 10.0
    warns = False  # whoever reports does

    def __init__(self, directory: Path, report: Callable[[], None] = lambda: None):
        super().__init__(directory)
        self.report, self.start = report, time.monotonic()  # a resume sets it back by what was searched
        self.room = directory / "workers"
        self.room.mkdir(exist_ok=True)
        self.rank, self.file = self.enlist()
        for sign in self.room.glob(f"{self.rank}-*.alive"):  # whoever held this journal before is dead for certain
            sign.unlink(missing_ok=True)
        self.life = f"{self.rank}-{socket.gethostname()}-{os.getpid()}"
        self.sign = self.room / f"{self.life}.alive"
        self.searching = True
        self.works_on(None)
        self.gone = threading.Event()
        threading.Thread(target=self.live, daemon=True).start()

    def enlist(self) -> tuple[int, io.FileIO]:
        for rank in itertools.count():
            path = self.directory / f"journal-{rank}.jsonl"
            file = path.open("ab+", buffering=0)
            if hold(file):
                break
            file.close()
        size = file.seek(0, os.SEEK_END)
        _, whole = read_records(path)
        if whole < size:
            warn(f"{path}: the last line is torn and was skipped")
            file.truncate(whole)
        return rank, file

    def live(self) -> None:
        """Touch the sign of life; end with whoever launched this process."""
        while not self.gone.wait(1.0):
            with contextlib.suppress(OSError):  # the run directory has gone; the next record will say so
                os.utime(self.sign)
            if os.environ.get("AUTOLOSS_LAUNCHER", str(os.getppid())) != str(os.getppid()):
                os._exit(1)

    def leave(self) -> None:
        self.gone.set()
        self.sign.unlink(missing_ok=True)
        self.file.close()

    def hear(self, state: State) -> None:
        super().hear(state)
        self.report()

    def tell(self, record: dict) -> None:
        """Append a record: one write, which a kill leaves whole or torn at the end."""
        record |= {"worker": self.rank, "elapsed": round(time.monotonic() - self.start, 3)}
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        if self.file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.file.name)
        self.works_on(None)

    def works_on(self, losses: dict | str | None) -> None:
        write_atomically(self.sign, json.dumps({"losses": texts(losses), "searching": self.searching}))

    def others(self) -> dict[str, dict]:
        """What the other living workers are doing, by their life."""
        found = {}
        for path in self.room.glob("*.alive"):
            with contextlib.suppress(OSError, ValueError):  # it has left in this moment
                if path != self.sign and path.stat().st_mtime > self.sign.stat().st_mtime - self.STALE:
                    found[path.stem] = checked(json.loads(path.read_text(encoding="utf-8")), ALIVE)
        return found

    def others_at_work(self, state: State) -> list[dict]:
        """Losses that others are training in this moment."""
        busy = [other["losses"] for other in self.others().values() if isinstance(other["losses"], dict)]
        return [state.task.read_losses(losses) for losses in busy]

    def claim(self, name: str) -> bool:
        """Whether a job is this worker's: nobody has claimed it, or who has is dead."""
        path = self.room / f"claim-{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"
        if not path.exists():
            write_atomically(path, self.life, once=True)
        holder = path.read_text(encoding="utf-8", errors="replace")
        if holder != self.life and holder not in self.others():
            with (self.room / "claims.lock").open("a") as lock:  # of several that take over the first succeeds
                fcntl.flock(lock, fcntl.LOCK_EX)
                if path.read_text(encoding="utf-8", errors="replace") == holder:
                    write_atomically(path, holder := self.life)
        return holder == self.life

    def agree(self, name: str, evaluated: int, task: Task, make: Callable):
        """What the first worker to come here makes of so many evaluations, for all and for every resume."""
        path = self.room / f"{name}-{evaluated}.json"
        if not path.exists():
            write_atomically(path, json.dumps(make()), once=True)
        return read_agreed(path, name, task)

    def serve(self, state: State, jobs: list[tuple], others: Sequence[tuple] = ()) -> None:
        """Re-trainings (losses, seed[, picture]) that nobody else has claimed, until all `jobs` are done.

        While the last of them are with other workers, `others` are begun.
        """

        def left(jobs: Sequence[tuple]) -> list[tuple]:
            return [job for job in jobs if job[1] not in state.again.get(losses_text(job[0]), {})]

        while True:
            self.hear(state)
            if not left(jobs):
                return
            free = (job for job in left([*jobs, *others]) if self.claim(f"{losses_text(job[0])} {job[1]}"))
            if mine := next(free, None):
                losses, seed, *picture = mine
                self.tell(retraining(state.task, self, state.task.read_losses(losses), seed, *picture))
            else:
                time.sleep(0.1)

    def wait_for_searching(self, state: State) -> None:
        """Until no living worker goes on searching."""
        self.searching = False
        self.works_on(None)
        while any(other["searching"] for other in self.others().values()):
            self.hear(state)
            time.sleep(0.1)
        self.hear(state)


def read_agreed(path: Path, name: str, task: Task):
    """What the workers agreed on, see `AGREED`."""

    def use(agreed):
        for losses in agreed if isinstance(agreed, list) else [agreed] if agreed is not None else []:
            task.read_losses(losses)
        return agreed

    return read_json(path, AGREED[name], "remove it, and --resume decides it anew", use)


# ---------------------------------------------------------------------------------------------------------------------
# Report: console, TensorBoard, and the files for people


STOPPED: list[int] = []  # signals that have come
HELD_BACK: list[bool] = []  # they wait while anything is in it


def interrupt(number: int, frame) -> None:
    """Ctrl-C and SIGTERM. Should some library swallow the exception, the next look at the journal raises it again."""
    STOPPED.append(number)
    if not HELD_BACK:
        raise KeyboardInterrupt(number)


@contextlib.contextmanager
def held_back():
    """Ctrl-C and SIGTERM wait meanwhile: TensorBoard waits forever where an exception came in the midst of its work."""
    HELD_BACK.append(True)
    try:
        yield
    finally:
        HELD_BACK.pop()
    if STOPPED:
        raise KeyboardInterrupt(STOPPED[0])


class Reporter:
    """Reads the journal like any worker, and tells."""

    @held_back()
    def __init__(self, directory: Path, state: State, args):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only needed here

        self.directory, self.task, self.state, self.args = directory, state.task, state, args
        self.journal = Journal(directory)
        self.journal.hear(state)
        self.board = SummaryWriter(str(directory))
        self.start, self.explored_earlier = time.monotonic(), state.explored
        self.best, self.told = state.best(), state.evaluated  # evaluations; several may come in at once
        arguments = sorted((given_arguments(args) | args.by_default).items())
        rows = "\n".join(f"| {name} | {value} |" for name, value in arguments if value is not None)
        self.board.add_text("run/arguments", "| argument | value |\n|---|---|\n" + rows)

    def lineage(self, text: str) -> str:
        """A candidate and its ancestors, the newest first, with their scores."""
        lines = ["```", " proxy re-trained  loss"]
        while text in self.state.results and len(lines) < 100:  # two workers may have made each other's children
            score, again = shown(self.state.results[text].score), shown(self.state.full_score(text))
            lines.append(f"{score:>6} {again:>10}  {text}")
            text = self.state.results[text].parent
        return "\n".join([*lines, "```"])

    @held_back()
    def hear(self) -> None:
        records, earlier = self.journal.hear(self.state), self.best  # several may have come in at once
        self.best = self.state.best()
        improved = self.best is not None and (earlier is None or earlier.text != self.best.text)
        for record in records:
            if "baseline" in record:
                self.tell_baseline()
            elif "retrained" in record:
                self.tell_retrained(record)
            else:
                self.tell_evaluated(record, improved and self.best.text == losses_text(record["losses"]))
        if improved:
            self.export(self.best.losses, f"proxy score {self.best.score:.4f}")
        if records:
            self.write_hall_of_fame()

    def tell_baseline(self) -> None:
        name, metric, score = self.task.baseline, self.args.metric, self.state.baseline
        score = "invalid" if score is None else f"{score:.3f}"
        print(f"baseline {name}: {metric} {score} in the same proxy training", flush=True)

    def tell_evaluated(self, record: dict, improved: bool) -> None:
        state, args, score = self.state, self.args, record["score"]
        self.told += 1
        n, gates = self.told, state.gate_counts()
        rate = (state.explored - self.explored_earlier) / max(1e-9, time.monotonic() - self.start)
        share = max(n / args.evals, state.searched / (60 * args.minutes))
        left = max(0, int(state.searched * (1 / max(share, 1e-9) - 1)))
        best = max((result.score for result in state.valid()), default=None)
        print(
            f"eval {n:>3}/{args.evals}  {args.metric} {shown(score)}  best {shown(best)}  "
            f"explored {state.explored:,} ({rate:,.0f}/s)  "
            f"equivalent {gates.get('equivalent', 0)}  invalid {gates['invalid']}  "
            f"{record['seconds']:.1f} s  eta {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
            + (f"  * {self.best.text}" if improved else "")
            + (f"  {' '.join(record['losses'])}" if len(state.task.symbols) > 1 and not improved else ""),
            flush=True,
        )
        if n == 10 and len({result.score for result in state.valid()}) == 1:
            warn(f"ten proxy trainings ended at the same {args.metric}; more --proxy-steps may tell losses apart")
        scores = [member.score for member in state.population if member.score is not None]
        mean, deviation = record["predicted"] or (None, None)
        tags = {f"gates/{gate}": number / max(1, state.explored) for gate, number in gates.items()} | {
            "found/best": best,
            "search/score": score,
            "search/witness": record.get("witness"),  # earlier versions had none
            "search/population_mean": sum(scores) / len(scores) if scores else None,
            "search/baseline": state.baseline,
            "search/explored_per_second": rate,
            "search/evaluated": state.evaluated,
            "proxy/seconds": record["seconds"],
            "surrogate/predicted": mean,
            "surrogate/deviation": deviation,
            "surrogate/screened": None if mean is None else record["tried"]["counts"].get("surrogate", 0),
            "surrogate/error": None if None in (mean, score) else score - mean,
        }
        for tag, value in tags.items():
            if value is not None:
                self.board.add_scalar(tag, value, state.explored)
        if best is not None:
            self.board.add_scalar("search/best_by_second", best, int(record["elapsed"]))
        if state.sampler:
            state.sampler.show(self.board)
        for step, loss in record["curve"] if improved else ():
            self.board.add_scalar(f"proxy_curve/{n:04d}", loss, step)

    def tell_retrained(self, record: dict) -> None:
        text, scores, metric = losses_text(record["retrained"]), record["scores"], self.args.metric
        numbers = "invalid" if scores is None else " ".join(f"{k} {v[metric]:.3f}" for k, v in scores.items())
        print(f"re-training, seed {record['seed']}: {metric} {numbers}  {record['seconds']:.1f} s  {text}", flush=True)

    def export(self, losses: dict[str, object], score: str) -> None:
        """The best so far as formulas in TensorBoard and as best_loss.py."""
        formulas = [
            f"{name}: `{loss}`" + (f"\n\n```latex\n{latex(loss)}\n```" if isinstance(loss, Expr) else "")
            for name, loss in losses.items()
        ]
        self.board.add_text("found/formula", "\n\n".join(formulas), self.state.explored)
        aim, run = f"search_{self.task.name}.py for {self.args.metric}", self.directory.name
        title = f"A loss found by {aim}: {score}. Run {run}."
        write_atomically(self.directory / "best_loss.py", self.task.export(losses, title))

    def write_hall_of_fame(self) -> None:
        state, table = self.state, io.StringIO()
        writer = csv.writer(table)
        writer.writerow(["rank", f"proxy_{self.args.metric}", f"retrained_{self.args.metric}", "gain", "loss"])
        for rank, result in enumerate(state.hall_of_fame()[:50], 1):
            again = state.full_score(result.text)  # None is written as nothing
            again = "invalid" if again == -math.inf else again and round(again, 6)
            writer.writerow([rank, result.score, again, result.gain, result.text])
        write_atomically(self.directory / "hall_of_fame.csv", table.getvalue())

    def found(self) -> tuple[dict[str, str] | None, dict[str, list]] | None:
        """What the closing round has decided, and the columns of its table by seed; None until that is complete."""
        path = self.directory / "workers" / f"found-{self.state.evaluated}.json"
        if not path.exists():
            return None
        losses = read_agreed(path, "found", self.task)
        seeds = [self.args.seed + TABLE_SEEDS + k for k in range(self.args.seeds)]
        names = ({"found": losses_text(losses)} if losses else {}) | {"baseline": self.task.baseline}
        again = {column: self.state.again.get(name, {}) for column, name in names.items()}
        if not all({*seeds} <= runs.keys() for runs in again.values()):
            return None
        return losses, {column: [runs[seed] for seed in seeds] for column, runs in again.items()}

    @held_back()
    def finish(self, losses: dict[str, str] | None, runs: dict[str, list]) -> None:
        """The closing table, on the console, in TensorBoard and in result.json."""
        args, task, state = self.args, self.task, self.state
        test = {column: test_scores(again, task.metrics) for column, again in runs.items()}
        ahead = {metric: paired_difference(runs, metric) for metric in task.metrics} if losses else {}
        result = {
            "task": task.name,
            "metric": args.metric,
            "losses": losses or {},
            "explored": state.explored,
            "evaluated": state.evaluated,
            "gates": state.gate_counts(),
            "seconds": round(state.elapsed, 1),
            "whole_schedule": task.whole,
            "test": {"found": {}, **test},
            "difference": ahead,
        }
        write_atomically(self.directory / "result.json", json.dumps(result, indent=1))
        self.write_hall_of_fame()
        if losses:
            numbers = test["found"][args.metric]
            mean = sum(numbers) / len(numbers) if numbers else math.nan
            self.export(task.read_losses(losses), f"{mean:.4f} on test, {len(numbers)} seeds")
        text = losses_text(losses) if losses else None
        print(f"\n        proxy  re-trained  loss ({args.metric} on the search-validation split)")
        rows = {result.text: shown(result.score) for result in state.hall_of_fame()[:8]}
        if text:  # a formula in short had no proxy training
            rows.setdefault(text, shown(state.results[text].score) if text in state.results else "")
        for name, proxy in rows.items():
            mark, remark = ">>>>" if name == text else "    ", "" if proxy else "  (in short)"
            print(f"{mark}  {proxy:>7}  {shown(state.full_score(name)):>10}  {name}{remark}")
        named = {("found" if name == "found" else task.baseline): column for name, column in test.items()}
        show_table(named, task.metrics, args.metric, args.seeds, ahead, "" if task.whole else ", shortened schedule")
        invalid = args.seeds - len(test["found"][args.metric]) if losses else 0
        verdict = verdict_in_words(task, args.metric, ahead, invalid)
        print("\n" + verdict)
        if losses and (left := [name for name in getattr(args, "branches", ()) if name not in losses]):
            print(f"{', '.join(left)}: as in {task.baseline}; nothing better was found there")
        print(f"explored {state.explored:,} losses, trained {state.evaluated}; everything is in {self.directory}")
        if losses:
            better = ahead[args.metric] and round(ahead[args.metric][0], 3) > 0
            what = "take the found loss with you" if better else "the best that was found"
            print(f"{what}: {self.directory / 'best_loss.py'}")
        self.draw_end(text, f"{verdict}\n\n{markdown_table(named, task.metrics)}", test)

    def draw_end(self, text: str | None, table: str, test: dict) -> None:
        args, state = self.args, self.state
        self.board.add_text("found/closing_table", table, state.explored)
        tags = {"predictions_baseline": predictions_of(self.directory, self.task.baseline)}
        if text:
            found = {"gradients": self.directory / "gradients.png", "predictions": predictions_of(self.directory, text)}
            tags = found | tags
        for tag, picture in tags.items():
            pixels = cv2.imread(str(picture)) if picture.is_file() else None
            if pixels is not None:  # BGR to RGB
                self.board.add_image(f"found/{tag}", pixels[..., ::-1], state.explored, dataformats="HWC")
        origin = state.results.get(text) or (state.best() if text else None)  # the found loss may be one in short
        if origin:
            self.board.add_text("found/lineage", self.lineage(origin.text), state.explored)
        first = ("data", "metric", "minutes", "search", "seed")  # as many as the tab shows unasked
        given = {name: getattr(args, name) for name in first} | {"without": " ".join(args.without)}
        final = {name: statistics.fmean(column[args.metric]) for name, column in test.items() if column[args.metric]}
        final = {"found/test" + "_baseline" * (name == "baseline"): score for name, score in final.items()}
        self.board.add_hparams(given, final, run_name=".", global_step=state.explored)


FOUND, BASELINE = (200, 80, 0), (170, 170, 170)  # blue and grey, as BGR


def put_text(plot: np.ndarray, text: str, corner: tuple[int, int], colour=(0, 0, 0)) -> None:
    cv2.putText(plot, text, corner, cv2.FONT_HERSHEY_SIMPLEX, 0.42, colour, 1, cv2.LINE_AA)


def draw_gradients(task: Task, losses: dict[str, str]) -> bytes | None:
    """What found trees pull at, as a PNG: a plot per branch, found (blue) on top of the baseline (grey).

    A point per position of the gates' samples, at all their states: dL/d(prediction) over the probability that is given
    to what is right; of boxes, the length of the gradient over their IoU. In units of each loss's own root mean square.
    """
    plots = []
    for name, branch in task.branches.items():
        expr, shape = task.read(losses[name]) if name in losses else None, branch.prediction.shape
        if not isinstance(expr, Expr):
            continue
        leaves, boxes = branch.leaves(branch.prediction, branch.target), "i" in branch.symbols
        over = leaves["i"] / leaves["u"] if boxes else leaves["p"]
        right = torch.ones_like(over) if boxes else leaves["y"] / leaves["y"].amax((-3, -2, -1), keepdim=True)
        plot = np.full((360, 480, 3), 255, np.uint8)  # rows 50 to 330: gradients of +4 to -4
        baseline = [parse(branch.baseline)] if branch.baseline else []
        for tree in (*baseline, expr):
            slope = gradients(branch, tree)
            if slope is None:
                continue
            slope = slope.view(shape).norm(dim=-3, keepdim=True) if boxes else slope.view(shape)
            x, y = over[right > 0.9], slope.expand_as(over)[right > 0.9]
            y = y / y.square().mean().sqrt().clamp(min=1e-300)
            rows, columns = (190 - 35 * y.clamp(-4, 4)).long().tolist(), (20 + 440 * x.clamp(0, 1)).long().tolist()
            for row, column in zip(rows, columns):
                cv2.circle(plot, (column, row), 1, FOUND if tree is expr else BASELINE, -1)
        cv2.line(plot, (20, 190), (460, 190), (0, 0, 0))
        put_text(plot, f"{name}: gradient over {'IoU' if boxes else 'probability of what is right'}", (20, 18))
        put_text(plot, "found", (20, 38), FOUND)
        put_text(plot, branch.baseline, (80, 38), BASELINE)
        put_text(plot, "0", (16, 348))
        put_text(plot, "1", (456, 348))
        plots.append(plot)
    return cv2.imencode(".png", np.concatenate(plots, 1))[1].tobytes() if plots else None


def shown(score: float | None) -> str:
    return "  -  " if score is None else "invalid" if score == -math.inf else f"{score:.3f}"


def paired_difference(runs: dict[str, list], metric: str) -> list[float | None]:
    """Found minus baseline on test: mean over the seeds at which both were valid, and its standard error.

    A single seed has no standard error: None.
    """
    gaps = [f["test"][metric] - b["test"][metric] for f, b in zip(runs["found"], runs["baseline"]) if f and b]
    if not gaps:
        return []
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
    return [statistics.fmean(gaps), error]


def verdict_in_words(task: Task, metric: str, ahead: dict, invalid: int = 0) -> str:
    """What the table says of the searched metric, in a sentence; `invalid` of the found loss's trainings became so."""
    if not ahead:
        return "no valid loss was found; give the search more --minutes or --evals"
    if not ahead[metric]:
        return f"a loss was found, but with no seed both it and {task.baseline} stayed valid"
    mean, error = ahead[metric]
    size = f"{metric} {difference_text(mean, error)}"
    if invalid:
        return f"a loss was found, but {invalid} of its trainings became invalid; in the others {size}"
    if round(mean, 3) <= 0:
        return f"nothing better than {task.baseline} was found: {size}"
    unsure = "; too little to be sure, more --seeds would tell" if error is None or mean <= 2 * error else ""
    return f"found a loss ahead of {task.baseline}: {size}{unsure}"


def difference_text(mean: float, error: float | None) -> str:
    return f"{mean:+.3f} " + ("(one seed)" if error is None else f"({error:.3f})")


# ---------------------------------------------------------------------------------------------------------------------
# The whole run


def main(args, make_task: Callable[..., Task]) -> None:
    """What every script does with its arguments: search, or train losses by name."""
    torch.set_num_threads(1)  # a second thread of one process gains less than a second process
    cv2.setNumThreads(1)
    warnings.filterwarnings("ignore", module="PIL")  # of palettes, sizes and tags in what it reads all the same
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)
    task = None
    try:
        SAID[:] = [True] * ("AUTOLOSS_RUN_DIR" in os.environ)
        try:
            task = make_task(args)
        finally:
            SAID.clear()
        compare(args, task) if args.wanted else run(args, task)
    except DataError as error:
        fail(f"--data-root {args.data_root}: {error}", everyone=task is not None and task.ready)
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
        cure = "take a smaller batch, window or network" + ", or fewer --workers" * (args.workers > 1)
        fail(f"--device {args.device}: out of memory ({error!s:.80}); {cure}", everyone=True)
    except OSError as error:  # no right to write, no space, a folder that has gone
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a write does not say in which file
        if error.strerror is None or error.filename is None and not full:
            raise
        cure = "mend it and go on with --resume, or choose other folders by --data-root and --runs"
        fail(f"{error.filename or args.resume or args.runs}: {error.strerror}; {cure}", everyone=True)
    except KeyboardInterrupt as stop:
        raise SystemExit(128 + (stop.args or (signal.SIGINT,))[0]) from None


def run(args, task: Task) -> None:
    """Search, close, report; as one worker of several only the first two."""
    if "AUTOLOSS_RUN_DIR" in os.environ:
        return work(args, task, Path(os.environ["AUTOLOSS_RUN_DIR"]))
    launching = args.workers > 1 and "TORCHELASTIC_RUN_ID" not in os.environ
    if not launching:
        task.load()  # first: what is wrong with the data shall leave nothing behind
    directory, first = meet(args, task)
    if dist.is_initialized():  # the workers of a search share nothing but files
        dist.destroy_process_group()
    lock = (directory / "report.lock").open("a") if first else None
    if lock is None or not hold(lock):
        print(f"joining {directory} as another worker; whoever started it reports", flush=True)
        work(args, task, directory)
        if lock is None or not hold(lock):
            return
        launching = False  # who started it has gone: this one reports
    reporter = Reporter(directory, make_state(args, task), args)
    children = launch(args.workers, directory) if launching else []
    try:
        watch(children, reporter) if children else work(args, task, directory, reporter.hear)
        reporter.hear()
        if (found := reporter.found()) is None:  # a worker that nobody had waited for has come back
            raise ChildProcessError("a training came in after the closing round had begun")
        reporter.finish(*found)
    except KeyboardInterrupt:
        STOPPED.clear()
        reporter.hear()
        print(f"\ninterrupted; go on with: python search_{task.name}.py --resume {directory}", flush=True)
        raise
    except ChildProcessError as error:
        if children and all(child.returncode == 2 for child in children):  # what was given is wrong; a worker said so
            if not reporter.state.evaluated and not args.resume:
                shutil.rmtree(directory)
            raise SystemExit(2) from None
        print(f"error: {error}; go on with: python search_{task.name}.py --resume {directory}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        for child in children:
            child.kill()
        with held_back():
            reporter.board.close()


def meet(args, task: Task, backend: str = "gloo") -> tuple[Path, bool]:
    """The run directory, and whether this process is the first in it; under torchrun all ranks meet and share one."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        dist.init_process_group(backend)
    rank, world = rank_and_world()
    shared = [open_run(args, task.name) if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(shared)
    return shared[0], rank == 0


def hold(file) -> bool:
    """Whether the lock of a file could be had; it ends with this process."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise OSError(error.errno, "its file system has no locks", str(file.name)) from None
    return True


def choice_seeds(seed: int) -> range:
    """Seeds of the re-trainings by which a search with this seed chooses its losses."""
    return range(seed + CHOICE_SEEDS, seed + TABLE_SEEDS)


def make_state(args, task: Task) -> State:
    method = METHODS.get(args.search) or Method("the task's own", ())
    gates = frozenset(method.gates) - set(args.without)
    sampler = task.samplers[args.search]() if args.search in task.samplers else None
    surrogate = Surrogate() if "surrogate" in gates else None
    return State(task, method, args.metric, gates, surrogate, sampler, choice_seeds=choice_seeds(args.seed))


def work(args, task: Task, directory: Path, report: Callable[[], None] = lambda: None) -> None:
    """The life of a worker: take up what the journal tells, search, close."""
    worker, state = Worker(directory, report), make_state(args, task)
    try:
        task.load()
        task.prepare(directory / "base.pt")
        task.ready = True
        worker.hear(state)
        worker.start = time.monotonic() - state.searched
        search(state, worker, args)
        while close(state, worker, args) != state.evaluated:  # somebody has come with more evaluations meanwhile
            pass
    finally:
        worker.leave()


def launch(number: int, directory: Path) -> list[subprocess.Popen]:
    """Start the same command once per worker.

    In sessions of their own: Ctrl-C reaches this process alone, which then ends them.
    """
    print(f"starting {number} workers", flush=True)
    shared = {**os.environ, "AUTOLOSS_RUN_DIR": str(directory), "AUTOLOSS_LAUNCHER": str(os.getpid())}
    ranks = [{"RANK": str(k), "LOCAL_RANK": str(k)} for k in range(number)]
    return [subprocess.Popen([sys.executable, *sys.argv], env=shared | own, start_new_session=True) for own in ranks]


def watch(children: list[subprocess.Popen], reporter: Reporter) -> None:
    """Listen until the closing table is complete. A worker that ends too early is named; the others go on."""
    named, before = set(), reporter.state.evaluated if reporter.found() else -1  # a finished run goes on
    while True:
        ended = [child for child in children if child.poll() is not None]  # all that these have written is heard now
        reporter.hear()
        over = len(ended) == len(children)
        if reporter.found() and (over or reporter.state.evaluated > before):
            return
        for child in ended:
            if child.returncode not in (0, 2) and child.pid not in named:
                named.add(child.pid)
                how = f"by signal {-child.returncode}" if child.returncode < 0 else f"with code {child.returncode}"
                warn(f"worker {child.pid} ended {how}; the others go on, its training is lost")
        if over:
            raise ChildProcessError("all workers have ended")
        time.sleep(0.05)


def open_run(args, task_name: str) -> Path:
    """Make a run directory, or go on in the given one."""
    if args.resume:
        print(f"going on in {args.resume}")
        return args.resume
    name = f"{task_name}_{args.metric}_{args.data}_{args.seed}_{time.strftime('%Y%m%d-%H%M%S')}"
    args.runs.mkdir(parents=True, exist_ok=True)
    for k in itertools.count(1):
        directory = args.runs / (name if k == 1 else f"{name}-{k}")
        with contextlib.suppress(FileExistsError):
            directory.mkdir()
            break
    revision = ""
    if shutil.which("git"):
        here = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
        revision = subprocess.run(["git", "rev-parse", "HEAD"], **here).stdout.strip()
    about = {
        "task": task_name,
        "arguments": given_arguments(args),
        "by_default": args.by_default,
        "git": revision or None,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "device": torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "cpu",
    }
    write_atomically(directory / "args.json", json.dumps(about, indent=1))
    print(f"run directory: {directory}", flush=True)
    return directory


# ---------------------------------------------------------------------------------------------------------------------
# The command line that all scripts share


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line: flag, value and cure; exit code 2. Flags are written out."""

    place = ""  # the file in which the arguments stand

    def __init__(self, **about):
        super().__init__(allow_abbrev=False, **about)

    def error(self, message: str):
        cure = "; --help tells all flags" * message.startswith("unrecognized")
        fail(self.place + message.removeprefix("argument ") + cure)


def speaks() -> bool:
    """Whether this process says what concerns all workers: it is the first of them, or alone."""
    several = {"AUTOLOSS_RUN_DIR", "TORCHELASTIC_RUN_ID"} & os.environ.keys()  # others set RANK, too
    return not several or os.environ.get("RANK", "0") == "0"


def fail(message: str, everyone: bool = False) -> NoReturn:
    """End the program because of what the user gave it, in one line; what concerns all workers the first one says."""
    if everyone or speaks():
        print("error:", "".join(letter if letter.isprintable() else " " for letter in message), file=sys.stderr)
    raise SystemExit(2)


def at_least(least, kind=int, most=10**9):
    """An argparse type: a number from `least` to `most`."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r:.40} is not a number") from None
        if not value >= least:
            raise argparse.ArgumentTypeError(f"{text:.40} is too small; give at least {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text:.40} is too large; give at most {most}")
        return value

    return convert


def one_of(names):
    """An argparse type: one of `names`."""

    def convert(text: str):
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text:.40}: unknown; choose one of {' '.join(names)}")
        return text

    return convert


def some_of(names):
    """An argparse type: some of `names`, comma-separated, each of them once."""
    known = one_of(names)
    return lambda text: [*dict.fromkeys(known(name) for name in text.replace(" ", "").split(",") if name)]


def flags(parser: argparse.ArgumentParser, title: str) -> Callable[..., None]:
    """Begin a group of the help text. Returns the function that adds a flag to it, with its default in brackets."""
    group = parser.add_argument_group(title)

    def flag(name: str, metavar: str | None, about: str, kind=None, default=None, **more) -> None:
        more |= {"metavar": metavar, "type": kind} if metavar else {}
        group.add_argument(name, default=default, help=about + " (%(default)s)" * bool(default), **more)

    return flag


def add_task_flags(parser: argparse.ArgumentParser, metrics, losses, others: str, data, models) -> Callable[..., None]:
    """Add the flags that mean the same in every script. Returns the function that adds a script's own beside them."""
    flag, where = flags(parser, "task"), "cuda" if torch.cuda.is_available() else "cpu"
    flag("--metric", "NAME", "what to search for: " + " ".join(metrics), one_of(metrics), metrics[0])
    flag("--loss", "LOSS", f"train and evaluate this loss instead of searching: {' '.join(losses)}, {others}")
    flag("--compare", "LOSSES", "the same for several, comma-separated, as one table: losses x metrics")
    flag("--data", "NAME", "data set: " + " ".join(data), one_of(data), data[0])
    about = "where the data set lies; shapes are drawn there if need be (data/generated/shapes)"
    flag("--data-root", "DIR", about, Path)
    about = "splits that fit into so much are decoded once, others for each batch; by default an eighth of the machine"
    flag("--memory", "GIB", about, at_least(0, float))
    about = f"network: {' '.join(models)}; by default the data set's own; a small one is trained as on shapes"
    flag("--model", "NAME", about, one_of(models))
    about = "start ResNets from ImageNet weights: those in FILE, or torchvision's, downloaded on first use"
    flag("--pretrained", "FILE", about, os.path.abspath, False, nargs="?", const=True)
    flag("--device", "NAME", "where to compute: cpu, cuda or cuda:1", default=where)
    return flag


def add_search_flags(parser: argparse.ArgumentParser, own: dict[str, str] | None = None, minutes: float = 6.5) -> None:
    """The flags of the search itself, the same in every script but for the task's `own` kinds and its budget."""
    kinds = {name: method.about for name, method in METHODS.items()} | (own or {})
    flag = flags(parser, "search")
    about = "; ".join(f"{name}: {about}" for name, about in kinds.items())
    flag("--search", "NAME", about, one_of(tuple(kinds)), "evolve")
    about = "what to switch off, comma-separated, for ablations: " + ", ".join(SWITCHABLE)
    flag("--without", "GATES", about, some_of(SWITCHABLE), [])
    flag("--evals", "N", "budget: proxy trainings", at_least(1), 500)
    about = "budget: minutes before the closing round, should they end first; other data than shapes need more"
    flag("--minutes", "M", about, at_least(0.01, float), minutes)
    about = f"processes that search; by default one per core, on CUDA one per GPU ({GPU_WORKERS} on shapes)"
    flag("--workers", "N", about, at_least(0, most=1024))
    about = "steps between two checkpoints of a --loss or --compare training"
    flag("--checkpoint-steps", "N", about, at_least(1), 500)
    flag("--seeds", "N", "trainings of each loss in the closing table, and by --loss and --compare", at_least(1), 3)
    about = "seed of the search, or first of --loss and --compare, 0 by default; one worker on a CPU repeats exactly"
    flag("--seed", "S", about, at_least(0), 0)
    flag("--runs", "DIR", "folder in which the run directory is made", Path, Path("runs"))
    about = "go on with a run, or join one; its budget, --workers, --device, --memory and --data-root may differ"
    flag("--resume", "RUN_DIR", about, Path)


def told(schedules: dict[str, NamedTuple], number: str) -> str:
    """A number of several schedules in words: 120 (shapes), 1000 (voc cityscapes)."""
    names: dict = {}
    for name, plan in schedules.items():
        names.setdefault(getattr(plan, number), []).append(name)
    return ", ".join(f"{value} ({' '.join(those)})" for value, those in names.items())


def machine_memory() -> float:
    """GiB of this machine, or of the container where that has less."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        size = min(size, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return size / 2**30


def settle_arguments(args, read_loss: Callable[[str, str], object]) -> None:
    """Fill in what depends on other flags, in all scripts alike; end with one line where something is wrong.

    `args.wanted`: what --loss or --compare asks for, by its text, as read_loss(text, flag) reads it.
    """
    settle_machine(args)
    if args.data_root is None and args.data != "shapes":
        fail(f"--data {args.data}: needs --data-root DIR, the folder that holds it (see data/README.md)")
    default = Path(__file__).parent / "data/generated/shapes"
    args.data_root = Path(args.data_root or default).absolute()
    if os.path.isfile(args.data_root):  # unlike Path.is_file it takes what is too long for a name
        fail(f"--data-root {args.data_root}: a file; give a folder")
    if args.resume and args.data_root != default and not os.path.isdir(args.data_root):
        fail(f"--data-root {args.data_root}: not found; say where the data of this run lie now")
    try:
        os.fspath(args.resume or args.runs).encode()
    except UnicodeEncodeError:
        flag = f"--resume {args.resume}" if args.resume else f"--runs {args.runs}"
        fail(f"{flag}: a name that TensorBoard cannot write; give one in UTF-8")
    if args.loss is not None and args.compare is not None:
        fail(f"--compare {args.compare}: not together with --loss; give one of them")
    flag, given = ("--loss", args.loss) if args.compare is None else ("--compare", args.compare)
    whole = flag == "--loss" or os.path.isdir(given)
    names = [] if given is None else [given] if whole else split_outside_brackets(given, ",")
    if given is not None and not "".join(names).strip():
        fail(f"{flag} {given!r:.40}: names no loss; leave the flag out to search for one")
    if len(set(names)) < len(names):
        fail(f"{flag} {args.compare:.80}: a loss is named twice; give each of them once")
    began = args.resume / "losses.json" if args.resume else None  # what the names stood for; RUN_DIR may have gone
    known = read_json(began, {str: str}, "remove it") if began and began.is_file() else {}
    args.wanted = {text: read_loss(known.get(text, text), flag) for text in names}


def split_outside_brackets(text: str, separators: str) -> list[str]:
    """The parts between the separators that are not inside of a formula."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character in separators and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def read_formula(text: str, shown: str, symbols: Sequence[str]) -> Expr:
    """A formula that can teach; else the program ends with a line that begins with `shown`."""
    try:
        expr = parse(text)
    except ValueError as error:
        fail(f"{shown}: {error}")
    if foreign := leaves_of(expr) - {*symbols}:
        fail(f"{shown}: '{min(foreign)}' has no meaning here; use {', '.join(symbols[:-1])} and {symbols[-1]}")
    if is_dead(expr):
        fail(f"{shown}: its gradient knows nothing of prediction and target together; it cannot teach")
    return expr


def settle_machine(args) -> None:
    """Resolve --device for this process, --workers and --memory; end with one line where the device is not there.

    `args.by_default`: those that nobody gave and this machine decides, so that a resume elsewhere settles them anew.
    """
    try:
        if args.device.split(":")[0] not in ("cpu", "cuda"):
            raise RuntimeError
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        fail(f"--device {args.device}: not available here; choose cpu" + " or cuda" * torch.cuda.is_available())
    cuda = device.type == "cuda"
    if cuda:  # "cuda" alone means another device in each worker
        own = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count() if device.index is None else device.index
        torch.cuda.set_device(own)
    args.workers = args.workers or None
    unset = [name for name in ("workers", "memory") if getattr(args, name) is None]
    if args.memory is None:
        args.memory = round(machine_memory() / 8, 1)
    if args.workers is None:  # a further worker pays once there is an initial population for each
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        if cuda:
            cores = min(cores, torch.cuda.device_count() * (GPU_WORKERS if args.data == "shapes" else 1))
        args.workers = max(1, min(cores, args.evals // INITIAL))
    args.by_default = {name: getattr(args, name) for name in unset}


def read_found(directory: Path, task: type[Task], flag: str) -> dict[str, object]:
    """The losses that a finished run has found; of an unfinished one the best so far, see `State.best`."""
    result, about = directory / "result.json", directory / "args.json"
    for path in (about, result):
        made_by = read_json(path, {"task": str}, "mend it or remove it")["task"] if os.path.isfile(path) else task.name
        if made_by != task.name:
            fail(f"{flag} {directory}: a run of search_{made_by:.20}.py, not of search_{task.name}.py")
    if os.path.isfile(result):
        losses = read_json(result, RESULT, "remove it: then the best loss of the journal counts")["losses"]
    elif os.path.isfile(about):
        known = read_json(about, {"arguments": {"metric": str, "seed": int}}, "mend it")["arguments"]
        state = State(task, METHODS["evolve"], known["metric"], choice_seeds=choice_seeds(known["seed"]))
        try:
            Journal(directory).hear(state)
        except OSError as error:
            fail(f"{flag} {directory}: {error.filename}: {error.strerror}")
        losses = texts(best.losses) if (best := state.best()) else {}
    else:
        fail(f"{flag} {directory}: not a run directory (neither result.json nor args.json in it)")
    if not losses:
        fail(f"{flag} {directory}: that run has found no valid loss")
    try:
        return task.read_losses(losses)
    except ValueError as error:
        fail(f"{flag} {directory}: {error}")


def given_arguments(args) -> dict[str, object]:
    """The arguments of a run as args.json has them; a resume reads them back, maybe on another machine."""
    given = {k: v for k, v in vars(args).items() if k not in ("wanted", "by_default")} | dict.fromkeys(args.by_default)
    return {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in given.items()}


# Flags that may change when a run goes on. Its data may have moved.
RESUMABLE = ("evals", "minutes", "workers", "device", "memory", "checkpoint_steps", "resume", "runs", "data_root")


def resume_arguments(parser: Parser, argv: list[str], task: type[Task]) -> argparse.Namespace:
    """The arguments of the run to go on with, checked like those of a command line; the budget is that given now."""
    unset = dict.fromkeys(vars(parser.parse_args([])), parser)  # stands for no value
    now = parser.parse_args(argv, argparse.Namespace(**unset))
    given = {name: value for name, value in vars(now).items() if value is not parser}
    path, cure = now.resume / "args.json", "give a run directory that a search has made"
    if not os.path.isfile(path):
        fail(f"--resume {now.resume}: not a run directory (no args.json in it); {cure}")
    saved = read_json(path, ABOUT, cure)
    if saved["task"] != task.name:
        wrong = f"a run of search_{saved['task']:.20}.py, not of search_{task.name}.py"
        fail(f"--resume {now.resume}: {wrong}; use that script")
    parser.place = f"{path}: "
    args = parser.parse_args(flags_of(parser, saved["arguments"]))
    for name in sorted(given.keys() - set(RESUMABLE)):
        if given[name] != (before := getattr(args, name)):
            new, old = (",".join(map(str, v)) or "none" if isinstance(v, list) else v for v in (given[name], before))
            fail(f"--{name.replace('_', '-')} {new}: the run was made with {old}; leave the flag out")
    vars(args).update(given)
    return args


def flags_of(parser: Parser, values: dict) -> list[str]:
    """The command line that gives the parser's arguments these values."""
    line = []
    for action in parser._actions:
        if action.dest in ("help", "resume", "runs"):
            continue
        flag, value = action.option_strings[-1], values.get(action.dest)
        if action.dest not in values or "\0" in str(value):
            parser.error(f"{flag} is not given; give a run directory that a search has made")
        elif value is None or value is False or value == []:
            if action.default not in (None, False, []):
                parser.error(f"{flag} has no value; give a run directory that a search has made")
        elif value is True:
            line.append(flag)
        else:
            line.append(f"{flag}={','.join(map(str, value)) if isinstance(value, list) else value}")
    return line


# ---------------------------------------------------------------------------------------------------------------------
# Losses by name instead of a search: --loss and --compare


def rank_and_world() -> tuple[int, int]:
    """This process among those that share one training under torchrun; (0, 1) where none do, as in a search."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share_of(batch: int, least: int = 2) -> int:
    """How many pictures of a batch are for this process; ends the program where they cannot be shared evenly."""
    _, world = rank_and_world()
    if batch % world or batch < least * world:
        fail(f"--batch {batch}: not to be shared by {world} processes; give a multiple of {least * world}")
    return batch // world


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
        rank, world = rank_and_world()

        def use(state) -> tuple[int, list]:
            for part, saved in zip(parts, state["parts"], strict=True):
                part.load_state_dict(saved)
            if (number := len(state["generators"])) != world:  # each has its own share of a batch
                fail(f"{self.path}: a training of {number} processes, not of {world}; go on with as many, or remove it")
            for generator, saved in zip(generators, state["generators"][rank], strict=True):
                generator.set_state(saved)
            return checked(state["steps"], int), checked([*map(list, state["curve"])], [[int, (float, Tensor)]])

        return read_weights(self.path, "cpu", use, "remove it, and --resume begins this training anew")

    def save(self, steps: int, curve: list, parts: Sequence, generators: Sequence[torch.Generator]) -> None:
        """Written by rank 0; of the others only the generators differ."""
        rank, world = rank_and_world()
        states = [[generator.get_state() for generator in generators]] * world
        if world > 1:
            dist.all_gather_object(states, states[rank])
        if rank == 0:
            parts = [part.state_dict() for part in parts]
            state = {"steps": steps, "curve": curve, "parts": parts, "generators": states}
            part = self.path.with_suffix(".part")  # the next one overwrites what a kill has left
            with naming(self.path):
                part.write_bytes(tensors_as_bytes(state))
                part.replace(self.path)


def compare(args, task: Task) -> None:
    """Train losses as at the end of a search, and print their scores on the test split.

    Everything goes into a run directory; `--resume` repeats nothing that is finished there and goes on with the
    training in flight. Under torchrun all processes share each training.
    """
    task.load()
    task.ready = True
    directory, first = meet(args, task, "nccl" if args.device.startswith("cuda") else "gloo")
    with (directory / "report.lock").open("a") as lock:
        if first and not hold(lock):
            fail(f"--resume {directory}: another process is training there; let it finish, or end it")
        try:
            runs = train_wanted(args, task, directory, first)
        except KeyboardInterrupt:
            if first:
                print(f"\ninterrupted; go on with: python search_{task.name}.py --resume {directory}")
            raise
    if dist.is_initialized():
        dist.destroy_process_group()
    if not first:
        return
    test = {name: test_scores(scores, task.metrics) for name, scores in runs.items()}
    if args.compare:  # the shape of the published tables
        print(f"\ntest split, percent, mean and spread over {args.seeds} seed{'s' * (args.seeds != 1)}\n")
        print(markdown_table(test, task.metrics))
        show_invalid(test, args.seeds)
    else:
        columns = {name if len(name) < 17 else "loss": test[name] for name in test}
        show_table(columns, task.metrics, args.metric, args.seeds)
        print(f"\nthe trained networks are in {directory}")


def train_wanted(args, task: Task, directory: Path, first: bool) -> dict[str, list[dict | None]]:
    """The scores of all trainings that are asked for, by loss, from the run directory as far as they are there."""
    formulas = {name: losses_text(losses) for name, losses in args.wanted.items()}
    write_atomically(directory / "losses.json", json.dumps(formulas, indent=1), once=True)
    done = {(line["loss"], line["seed"]): line for line in finished_lines(directory, task.metrics)}
    seeds = range(args.seed, args.seed + args.seeds)
    for k, (name, losses) in enumerate(args.wanted.items()):
        for seed in seeds:
            if (name, seed) not in done:
                checkpoint = Checkpoint(directory / f"training_{k}_{seed}.pt", args.checkpoint_steps)
                done[name, seed] = train_once(args, task, name, losses, seed, checkpoint)
            if first:
                line = done[name, seed]
                scores = line["scores"] and f"{args.metric} {line['scores']['test'][args.metric]:.3f}"
                print(f"{name}, seed {seed}: {scores or line['invalid']}  {line['seconds']:.1f} s", flush=True)
    return {name: [done[name, seed]["scores"] for seed in seeds] for name in args.wanted}


def finished_lines(directory: Path, metrics: tuple[str, ...]) -> list[dict]:
    """The trainings that `compare` has behind it; what cannot be read is skipped with a warning, and trained again."""
    path, lines = directory / "retrain.jsonl", []
    records, whole = read_records(path) if path.exists() else ([], 0)
    if path.exists() and whole < path.stat().st_size and rank_and_world()[0] == 0:
        warn(f"{path}: the last line is torn and was skipped")
        os.truncate(path, whole)
    for record in records:
        with contextlib.suppress(ValueError):
            valid = checked(record, TRAINING)["scores"] is not None
            checked(record, {"scores": {"test": dict.fromkeys(metrics, float)}} if valid else {"invalid": str})
            lines.append(record)
    if len(lines) < len(records):
        warn(f"{path}: {len(records) - len(lines)} broken lines were skipped")
    return lines


def train_once(args, task: Task, name: str, losses, seed: int, checkpoint: Checkpoint) -> dict:
    """One training of `compare` as its line in retrain.jsonl, and its curve in TensorBoard."""
    line, start, directory = {"loss": name, "seed": seed, "scores": None}, time.monotonic(), checkpoint.path.parent
    task.curve = []  # where this one becomes invalid, it has none
    try:
        line["scores"] = finite(task.retrain(losses, seed, checkpoint=checkpoint))
    except InvalidLoss as error:
        line["invalid"] = f"the loss or its gradient became invalid at {error}"
    line["seconds"] = round(time.monotonic() - start, 2)
    if rank_and_world()[0] == 0:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed before

        log = directory / "retrain.jsonl"
        with naming(log), log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        with held_back(), SummaryWriter(str(directory)) as board:
            for step, value in task.curve:
                board.add_scalar(f"retrain/{checkpoint.path.stem}", value, step)
        if args.compare:  # the networks of a single loss are kept
            checkpoint.path.unlink(missing_ok=True)
    return line


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def test_scores(runs: list[dict | None], metrics: tuple[str, ...]) -> dict[str, list[float]]:
    """By metric what those of some trainings that stayed valid score on the test split."""
    return {metric: [run["test"][metric] for run in runs if run] for metric in metrics}


def mean_and_spread(values: list[float], digits: int = 3) -> str:
    """Mean and sample standard deviation."""
    if not values:
        return "invalid"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} +- {spread:.{digits}f}"


def show_table(
    test: dict, metrics: tuple[str, ...], chosen: str, seeds: int, ahead: dict | None = None, note: str = ""
) -> None:
    """One column per loss, one row per metric, and the paired difference; the metric searched for is marked."""
    fresh = "fresh " * (ahead is not None)  # of a search; a loss that was named may have been found by these
    print(f"\ntest split, mean and spread over {seeds} {fresh}seed{'s' * (seeds != 1)}{note}")
    print(" " * 16 + "".join(f"{name:>18}" for name in test) + f"{'difference (standard error)':>30}" * bool(ahead))
    for metric in metrics:
        mark = ">>>>" if metric == chosen else "    "
        cells = "".join(f"{mean_and_spread(column[metric]):>18}" for column in test.values())
        if ahead and ahead[metric]:
            cells += f"{difference_text(*ahead[metric]):>30}"
        print(f"{mark}  {metric:<10}{cells}")
    show_invalid(test, seeds)


def show_invalid(test: dict, seeds: int) -> None:
    """Of which losses some trainings are missing in the means."""
    for name, scores in test.items():
        if missing := seeds - min(map(len, scores.values())):
            print(f"{name}: {missing} of {seeds} trainings became invalid; the others count")


def markdown_table(test: dict, metrics: tuple[str, ...]) -> str:
    """One row per loss, one column per metric: mean and spread in percent."""
    rows = ["| loss | " + " | ".join(metrics) + " |", "|---|" + "---|" * len(metrics)]
    for name, scores in test.items():
        cells = [mean_and_spread([100 * v for v in scores[metric]], 1) for metric in metrics]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Other searches, behind three hooks: gates, fresh, mutate


class Method(NamedTuple):
    """What one kind of search consists of."""

    about: str
    gates: tuple[str, ...]
    fresh: Callable[..., Expr] | None = None  # (state, rng, branch name, branch) -> a loss without a parent
    mutate: Callable[..., Expr] | None = None  # (state, rng, branch name, branch, loss) -> a child; None: no evolution


def random_loss(state: State, rng: Random, name: str, branch: Branch) -> Expr:
    return random_tree(rng, branch.symbols)


def mutated_loss(state: State, rng: Random, name: str, branch: Branch, expr: Expr) -> Expr:
    other = select_parent(state, rng, [name])
    return mutate(rng, expr, branch.symbols, other and other.losses[name])


# Convergence simulation (CSE-Autoloss, Liu 2021, arXiv 2102.04700): evolution from known losses through two gates.

SIMULATION = 0.75  # [D] share of the baseline's score that a loss must reach in a short training on a few samples


def known_loss(state: State, rng: Random, name: str, branch: Branch) -> Expr:
    """A known loss after up to three calls of `mutate`."""
    expr = parse(rng.choice(branch.known))
    for _ in range(rng.randrange(4)):
        expr = mutate(rng, expr, branch.symbols)
    return expr


def rising(state: State, tree: Tree) -> Verdict | None:
    """CSE's convergence property (Sec. 3.3): the loss, averaged over the samples, must fall with every step of the way
    from the prediction to the right one.
    """
    branch = state.task.branches[tree.branch]
    way = torch.stack([branch.prediction[0].lerp(branch.ideal, t) for t in (0.0, 0.25, 0.5, 0.75, 1.0)])
    values = evaluate(tree.expr, branch.leaves(way, branch.target))  # (5, B)
    return None if (values.mean(-1).diff() < 0).all() else Verdict("rising")


def simulated(state: State, child: Child) -> bool:
    """Whether a short training on a few samples reaches enough of the baseline's score there (Sec. 3.3)."""
    task = state.task
    if state.simulated is None:
        state.simulated = task.simulate(task.baseline)
    score = task.simulate(child.losses)
    return score > 0 and score >= SIMULATION * state.simulated


GATES["rising"] = rising


# Programs, as AutoML-Zero evolves them (Real 2020, arXiv 2003.03384): instructions that write one register each, over a
# memory that holds the symbols first and zeros behind them. The value of a program is its last register.

PROGRAM = 20  # [P] instructions, at most ...
REGISTERS = 5  # ... and memory beyond the symbols of the task [D]
TREE = 500  # nodes of a program written as a tree, at most [D]: repeated squaring would write millions

Instruction = tuple[str, int, int, int]  # operator, registers of its operands, register that is written


def random_instruction(rng: Random, symbols: tuple[str, ...]) -> Instruction:
    first, size = len(symbols), len(symbols) + REGISTERS
    return rng.choice(list(OPERATORS)), rng.randrange(size), rng.randrange(size), rng.randrange(first, size)


def random_program(rng: Random, symbols: tuple[str, ...]) -> list[Instruction]:
    return [random_instruction(rng, symbols) for _ in range(rng.randint(1, PROGRAM))]


def mutate_program(rng: Random, program: list[Instruction], symbols: tuple[str, ...]) -> list[Instruction]:
    """Insert or remove an instruction, redraw all of them, or redraw one part of one [P: AutoML-Zero, Sec. 3.2]."""
    program = list(program)
    kind = rng.choice(("length", "all", "part"))
    if kind == "all":
        return [random_instruction(rng, symbols) for _ in program]
    if kind == "length":
        longer = len(program) == 1 or (len(program) < PROGRAM and rng.random() < 0.5)
        k = rng.randrange(len(program) + longer)  # also behind the last one
        program[k : k + (not longer)] = [random_instruction(rng, symbols)] * longer
    else:
        k = rng.randrange(len(program))
        part, other = rng.randrange(4), random_instruction(rng, symbols)
        program[k] = (*program[k][:part], other[part], *program[k][part + 1 :])
    return program


def program_tree(program: Sequence[Instruction], symbols: tuple[str, ...]) -> Expr | None:
    """What a program computes, as a tree; None if that would have more than TREE nodes, or not fit."""
    memory = [(Expr(symbol), 1) for symbol in symbols] + [(ZERO, 4)] * REGISTERS  # trees and how many nodes they have
    for op, *operands, out in program:
        used = [memory[k] for k in operands[: OPERATORS[op].arity]]
        memory[out] = Expr(op, tuple(tree for tree, _ in used)), 1 + sum(size for _, size in used)
        if memory[out][1] > TREE:
            return None
    return memory[-1][0] if fits(memory[-1][0]) else None


def compiled(state: State, rng: Random, name: str, branch: Branch, expr: Expr | None = None) -> Expr:
    """The tree of a random or, with `expr`, mutated program that is not too large; by branch and tree it is kept."""
    parent, tree = expr and state.programs[f"{name}:{expr}"], None
    while tree is None:
        program = mutate_program(rng, parent, branch.symbols) if parent else random_program(rng, branch.symbols)
        tree = program_tree(program, branch.symbols)
    state.programs[f"{name}:{tree}"] = program
    return tree


TREE_GATES = ("dead", "seen", "gradient", "equivalent", "rejected", "unstable")
SIMULATED = ("seen", "rising", "simulation")
METHODS = {
    "evolve": Method("all gates", (*TREE_GATES, "surrogate"), random_loss, mutated_loss),
    "random": Method("the same gates but the surrogate, no evolution", TREE_GATES, random_loss),
    "naive": Method("evolution without gates", (), random_loss, mutated_loss),
    "cse": Method("convergence simulation, from known losses", SIMULATED, known_loss, mutated_loss),
    "cse-rand": Method("the same from random trees", SIMULATED, random_loss, mutated_loss),
    "aml": Method("programs as in AutoML-Zero, without gates", (), compiled, compiled),
}
SWITCHABLE = (*TREE_GATES, "surrogate", "invalid")  # by --without
