"""The search, on a toy task that needs no data: mutations, gates, surrogate, state, journal, closing round, workers."""

import itertools
import json
import math
import os
import random
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import journal, records, retrained

import evolve
from evolve import Branch, Child, InvalidLoss, Member, State, Surrogate, Tried, Worker
from loss_ops import OPERATORS, canonical, evaluate, is_dead, parse

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

    def __init__(self, planted="Neg(Mul(y, p))", invalid=False, branches=("loss",), **branch):
        self.branches = {name: toy_branch(**branch) for name in branches}
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

    def train(self, losses):
        self.calls.append(evolve.losses_name(losses))
        return self.score(losses)

    def retrain(self, losses, seed, picture=None, checkpoint=None):
        self.calls.append(evolve.losses_name(losses))
        score = self.score(losses) + 0.0001 * seed
        return {"val": {"toy": score}, "test": {"toy": score}}

    def simulate(self, losses):
        try:
            return 2 * self.score(losses)
        except InvalidLoss:
            return 0.0

    def export(self, losses, title):
        return f"{title}\n{losses}"


@pytest.fixture(autouse=True)
def small_pool(monkeypatch):
    monkeypatch.setattr(evolve, "POOL", 8)
    monkeypatch.setattr(evolve, "ATTEMPTS", 80)


def arguments(tmp_path, *argv):
    parser = evolve.Parser()
    evolve.add_search_arguments(parser)
    args = parser.parse_args(["--runs", str(tmp_path), "--minutes", "5", "--workers", "1", *argv])
    args.metric, args.data, args.device = "toy", "none", "cpu"
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


def explore(task, state, turns, guide=None, seed=0):
    """Some turns of a search without a run directory; the records."""
    found = []
    for turn in range(state.evaluated, state.evaluated + turns):
        rng = random.Random(f"{seed}/{turn}")
        fitted = guide and guide.fit(task, state, [])
        child = evolve.next_child(task, state, rng, fitted, math.inf)
        record = evolve.evaluate(task, nobody, child) | {"worker": 0, "turn": turn, "elapsed": 0}
        found.append(json.loads(json.dumps(record)))
        state.absorb(found[-1])
    return found


def scored(task, state, scores, **more):
    """Absorb proxy trainings of losses as formulas, with these scores."""
    for text, score in scores.items():
        child = make_child(state, text)
        evolve.judge(task, state, [child], evolve.CHEAP, tried := Tried())
        tried.close(state, child)
        record = evolve.evaluate(task, nobody, child) | {"worker": 0, "turn": state.evaluated, "elapsed": 0, **more}
        state.absorb({**json.loads(json.dumps(record)), "score": score})


def again(state, text, *values, first=0):
    """Absorb converged trainings with these scores; None: invalid."""
    for k, value in enumerate(values):
        scores = value if value is None else {split: {"toy": value} for split in ("val", "test")}
        state.absorb({"retrained": {"loss": text}, "seed": first + k, "scores": scores, "elapsed": 0})


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
        assert any(evolve.replace_node(expr, k, part) == crossed for k in range(count) for part in evolve.nodes(other))
        for new in (grown, cut, replaced, leaf, turned, crossed):
            assert all(len(n.args) == OPERATORS[n.op].arity for n in evolve.nodes(new) if n.args)
    assert swapped > 50


def test_swap_leaves_alone_what_has_no_two_sides():
    rng = random.Random(0)
    assert evolve.swap(rng, parse("p"), SYMBOLS) == parse("p")
    assert all(evolve.swap(rng, parse("Neg(Exp(p))"), SYMBOLS) == parse("Neg(Exp(p))") for _ in range(20))
    found = {str(evolve.swap(rng, parse("Add(Exp(y), Mul(p, 1))"), SYMBOLS)) for _ in range(200)}
    assert {"Add(Mul(p, 1), Exp(y))", "Add(Exp(p), Mul(y, 1))", "Add(Exp(Mul(p, 1)), y)"} <= found


KINDS = ("insert", "delete", "replace", "exchange_leaf", "swap")


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
    assert all(0.18 < drawn.count(name) / len(drawn) < 0.22 for name in KINDS)
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
    return evolve.gradients(branch or toy_branch(), [parse(text)])[0]


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
        evolve.evaluate_batch([CE], branch.leaves(x[None], branch.target)).sum().backward()
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
    trees = [evolve.mutate(rng, parse(PLANTED), SYMBOLS) for _ in range(60)]
    slopes = [slope for slope in evolve.gradients(branch, trees) if slope is not None]
    assert len(slopes) > 10
    worst = 0.0
    for one, two in itertools.combinations(slopes, 2):
        exact = (2 - 2 * F.cosine_similarity(one, two, dim=-1)).mean().item()
        sketched = (evolve.sketch(one) - evolve.sketch(two)).square().sum().item()
        worst = max(worst, abs(sketched - exact) / max(exact, 0.05))
    assert worst < 0.25
    assert evolve.sketch(slopes[0]).square().sum().item() == pytest.approx(1, abs=0.1)
    assert torch.equal(evolve.sketch(slopes[0]), evolve.sketch(4 * slopes[0])), "directions, not norms"


def gain(expr, **limits):
    return evolve.rejection_gains(toy_branch(), [expr], **limits)[0]


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
        evolve.evaluate_batch([CE], branch.leaves(x, branch.target)).sum().backward()
        adam.step()
    seen = []
    watched = branch.score
    branch.score = lambda x, y: seen.append(x) or watched(x, y)
    evolve.rejection_gains(branch, [CE], steps=7, early=())
    assert torch.allclose(seen[-1][0], x, atol=1e-5)


def test_early_decisions_are_taken_at_their_limits_alone():
    whole = gain(CE, early=())
    assert gain(CE, early=((2, -9, 9),)) == whole, "between the limits it goes on"
    stopped = gain(CE, early=((2, 9, 99),))
    assert stopped < whole and stopped == gain(CE, steps=2, early=())
    assert gain(CE, early=((2, -9, -8),)) == stopped, "above the upper limit it accepts"


def test_a_decided_tree_leaves_the_others_alone():
    branch = toy_branch()
    others = [CE, parse("Square(Add(p, Neg(y)))")]
    bad = [parse("Mul(y, Log(p))"), parse("Mul(y, Exp(Inv(Add(p, Neg(p)))))")]  # gains nothing; not finite
    alone = [evolve.rejection_gains(branch, [expr])[0] for expr in others]
    together = evolve.rejection_gains(branch, [bad[0], others[0], bad[1], others[1]])
    assert together[1::2] == pytest.approx(alone, abs=1e-6)
    assert together[0] < 0.1 and together[2] == float("-inf")


EVERY_GATE = evolve.CHEAP + evolve.DEAR


def judged(task, state, children):
    """Through all gates; the children that pass, and what was tried."""
    tried = Tried()
    return evolve.judge(task, state, children, EVERY_GATE, tried), tried


def test_judging_together_is_judging_one_by_one():
    rng, task = random.Random(5), ToyTask()
    good = [CE, parse("Square(Add(p, Neg(y)))"), parse("Neg(Mul(MeanNHW(y), Mul(y, p)))")]
    trees = [evolve.random_tree(rng, SYMBOLS) for _ in range(50)]
    trees += [evolve.mutate(rng, rng.choice(good), SYMBOLS) for _ in range(50)]
    trees = list({str(canonical(tree)): tree for tree in trees}.values())
    together, alone = begin(task), begin(task)
    children = [make_child(together, tree) for tree in trees]
    passing, _ = judged(task, together, children)
    singly = [make_child(alone, tree) for tree in trees]
    surviving = [child for child in singly if judged(task, alone, [child])[0]]
    assert [child.losses for child in passing] == [child.losses for child in surviving]
    assert [child.trees[0].verdict for child in children] == [child.trees[0].verdict for child in singly]
    assert together.verdicts == alone.verdicts and together.keys.keys() == alone.keys.keys()
    assert {tree.gate for child in children for tree in child.trees} >= {"dead", "gradient", "rejected", ""}


def test_children_judged_together_wait_for_their_turn():
    task = ToyTask()
    lines = explore(task, begin(task, "--without", "surrogate", batch=40), 6)
    assert len({tuple(line["identity"]) for line in lines}) == 6, "nothing is trained twice"


def test_gates_come_in_order():
    task = ToyTask()
    state = begin(task)

    def decided(text):
        passing, tried = judged(task, state, [child := make_child(state, text)])
        assert bool(passing) == (not tried.counts)
        if passing:
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
    scored(task, state, {"Neg(Mul(y, Log(p)))": 0.9})
    assert decided("Mul(Neg(Log(p)), y)") == "seen"
    assert decided("Neg(Mul(y, Log(Abs(p))))") == "equivalent" and verdict("Neg(Mul(y, Log(Abs(p))))") == "passed"


def tried_child(task, state, child):
    """The child with an identity and with nothing else tried in its turn."""
    child.identity = state.identity(child)
    return Tried().close(state, child)


@pytest.mark.parametrize("gate", evolve.PUBLISHED)
def test_a_gate_switched_off_never_decides(tmp_path, gate):
    directory = run(tmp_path, "--evals", "12", "--without", f"{gate},surrogate")
    counts = sum((evolve.Counter(line["tried"]["counts"]) for line in journal(directory)), evolve.Counter())
    gates = result_of(directory)["gates"]
    assert len(journal(directory)) == 12 and gate not in gates and counts[gate] == 0
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
    scored(task, state, {str(CE): 0.9})
    passing, tried = judged(task, state, [child := make_child(state, "Neg(Mul(y, Log(Abs(p))))")])
    assert not passing and dict(tried.counts) == {"equivalent": 1}
    assert tried.reused == [({"loss": "Neg(Mul(y, Log(Abs(p))))"}, child.identity)]
    other = tried_child(task, state, make_child(state, "Neg(Mul(y, p))"))
    other.tried["reused"] = tried.reused
    state.absorb(evolve.evaluate(task, nobody, other) | {"worker": 0, "turn": 1, "elapsed": 0})
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
    scored(task, state, known)
    return state, state.surrogate.fit(task, state, [{"loss": parse(text)} for text in at_work])


def predicted(task, guide, names):
    mean, deviation = guide.predict(torch.stack([guide.point(task, {"loss": parse(text)}) for text in names]))
    return mean, deviation


def spearman(one, other):
    ranks = torch.stack([torch.tensor(values, dtype=torch.float64).argsort().argsort() for values in (one, other)])
    return torch.corrcoef(ranks.double())[0, 1].item()


def test_surrogate_predicts_the_scores_of_others():
    task, known, others = spread(90)
    _, guide = guided(task, known)
    mean, deviation = predicted(task, guide, others)
    assert spearman(mean.tolist(), list(others.values())) > 0.7
    truth = torch.tensor(list(others.values())).clamp(min=0)  # how bad a bad loss is says nothing of the good ones
    errors = (torch.tensor(guide.scores(mean)) - truth).abs()
    assert (errors < 3 * guide.spread * deviation).double().mean() > 0.8, "and knows how sure it is"
    mine, _ = predicted(task, guide, known)
    assert spearman(mine.tolist(), list(known.values())) > 0.9


def test_surrogate_waits_for_the_initial_population():
    task, known, _ = spread(30)
    first = dict(list(known.items())[: evolve.INITIAL - 1])
    state, guide = guided(task, first)
    assert guide is None
    scored(task, state, dict(list(known.items())[: evolve.INITIAL]))
    assert state.evaluated > evolve.INITIAL and state.surrogate.fit(task, state, []) is not None


RELATIVES = [f"Neg(Mul(y, {pool}))" for pool in ("MinPool3(p)", "Tanh(MinPool3(p))", "MinPool3(Tanh(p))")]
RELATIVES += ["Neg(Mul(Sqrt(y), MinPool3(p)))"]


def test_surrogate_learns_from_converged_scores():
    """A family leads by the proxy; once some of it have trained badly to convergence, all of it falls behind."""
    task, known, _ = spread(60)
    known = {text: min(score, 0.8) for text, score in known.items()}
    state, guide = guided(task, {**known, **dict(zip(RELATIVES, (0.95, 0.94, 0.96)))})
    best = sorted(known, key=known.get)[-8:]
    (before, *_), strangers = (guide.scores(predicted(task, guide, names)[0]) for names in (RELATIVES[3:], best))
    assert before > max(strangers)
    for text in RELATIVES[:3]:
        again(state, text, 0.2)
    for text in best[:3]:
        again(state, text, known[text])
    guide = state.surrogate.fit(task, state, [])
    (after, *_), strangers = (guide.scores(predicted(task, guide, names)[0]) for names in (RELATIVES[3:], best))
    assert after < min(strangers) and after < before - 0.2
    family = [result.text for result in state.ranking()].index(RELATIVES[0])
    assert family > 5, "parents and finalists are chosen by that"
    state.again.clear()
    for text in RELATIVES[:3]:
        again(state, text, None)
    guide = state.surrogate.fit(task, state, [])
    assert guide.scores(predicted(task, guide, RELATIVES[3:])[0])[0] < before - 0.1, "invalid is as bad as bad"


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
        return evolve.expected_improvement(mean, deviation, guide.best)

    _, alone = guided(task, known)
    _, beside = guided(task, known, [busy])
    print(promise(beside, [relative]), promise(alone, [relative]))
    assert promise(beside, [relative]) < 0.8 * promise(alone, [relative])
    assert (promise(beside, strangers) / promise(alone, strangers)).median() > 0.9
    assert len(beside.promise) == len(known) and busy not in beside.merits, "a score to come is none yet"


def test_the_most_promising_child_is_trained(monkeypatch):
    task, known, others = spread(60)
    state, guide = guided(task, known)
    monkeypatch.setattr(evolve, "POOL", len(others))
    waiting = iter([*others, *others])
    monkeypatch.setattr(evolve, "propose", lambda task, state, *rest: make_child(state, next(waiting)))
    state.gates = frozenset(state.gates) - {"rejected"}
    child = evolve.next_child(task, state, random.Random(0), guide, math.inf)
    names = list(others)
    mean, deviation = predicted(task, guide, names)
    best = evolve.expected_improvement(mean, deviation, guide.best).argmax().item()
    assert str(child.losses["loss"]) == names[best]
    assert child.predicted == pytest.approx([guide.scores(mean)[best], deviation[best].item() * guide.spread], abs=1e-3)
    assert child.tried["counts"]["surrogate"] > 0


def test_without_surrogate_is_the_plain_algorithm(tmp_path):
    directory = run(tmp_path, "--evals", "25", "--without", "surrogate,rejected", planted=PLANTED)
    lines = journal(directory)
    assert all(line["predicted"] is None and "surrogate" not in line["tried"]["counts"] for line in lines)
    assert not any(record.get("leader") for record in retrained(directory))
    assert any(line["tried"]["reused"] for line in lines)
    assert "surrogate" not in result_of(directory)["gates"]


def test_with_surrogate_leaders_are_trained_in_mid_search(tmp_path, monkeypatch):
    monkeypatch.setattr(evolve, "INITIAL", 6)
    monkeypatch.setattr(evolve, "LEADER_EVERY", 4)
    directory = run(tmp_path, "--evals", "16", "--without", "rejected", planted=PLANTED)
    lines = [record for record in records(directory) if "baseline" not in record]
    first = next(k for k, line in enumerate(lines) if line.get("leader"))
    assert first == 10 and all(line["predicted"] is None for line in lines[:6])
    assert all(line["predicted"] for line in journal(directory)[6:])
    at = [sum("losses" in line for line in lines[:k]) for k, line in enumerate(lines) if line.get("leader")]
    assert at == [10, 14]
    scores = {evolve.losses_text(line["losses"]): line["score"] for line in journal(directory)}
    leaders = [evolve.losses_text(line["retrained"]) for line in lines if line.get("leader")]
    assert len(set(leaders)) == 2 and all(scores[text] is not None for text in leaders)
    assert not any(line["tried"]["reused"] for line in lines if "losses" in line)
    assert result_of(directory)["gates"]["surrogate"] > 0


def test_surrogate_finds_the_planted_formula_sooner(monkeypatch):
    monkeypatch.setattr(evolve, "INITIAL", 10)
    monkeypatch.setattr(evolve, "POOL", 30)
    monkeypatch.setattr(evolve, "ATTEMPTS", 300)

    def trainings(seed, without):
        task = ToyTask(planted="Neg(Mul(Square(p), Mul(y, MeanNHW(y))))")
        state = begin(task, "--without", without)
        for number in range(1, 61):
            (record,) = explore(task, state, 1, state.surrogate, seed)
            if (record["score"] or 0) > 0.995:
                break
        return number

    with_it, plain = (sum(trainings(seed, w) for seed in range(2)) for w in ("rejected", "rejected,surrogate"))
    assert with_it < 0.7 * plain


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
    state.population.extend(Member({"loss": tree}, k / 60, (str(k),)) for k, tree in enumerate(trees))
    state.turns = {0: set(range(60))}
    monkeypatch.setattr(evolve, "judge", lambda t, s, children, names, tried: [c for c in children if fertile(c, luck)])
    select = evolve.select_parent
    monkeypatch.setattr(evolve, "select_parent", lambda *args: drawn.append(select(*args)) or drawn[-1])
    fresh = 0
    for turn in range(400):
        drawn.clear()
        child = evolve.next_child(task, state, random.Random(turn), None, math.inf)
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


def test_planted_formula_is_found(tmp_path):
    directory = run(tmp_path, "--evals", "40", "--without", "rejected", planted=PLANTED)
    assert result_of(directory)["test"]["found"]["toy"][0] > 0.9
    scores = [line["score"] or 0 for line in journal(directory)]
    assert max(scores) > max(scores[: evolve.INITIAL]), "evolution improved on the random start"


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
    task.train = lambda losses: math.nan
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
    assert capsys.readouterr().out.count(" alone\n") == len(trials)
    assert all(line["trial"] and len(line["losses"]) == 1 and not line["parent"] for line in trials)
    best = dict.fromkeys(("cls", "reg"), -math.inf)
    for line in trials:
        (name,) = line["losses"]
        assert name == min(best, key=best.get), "where the trees are worst another one is tried"
        assert line["identity"][0].startswith(f"{name}:"), "the same tree in another branch is another candidate"
        best[name] = max(best[name], -math.inf if line["score"] is None else line["score"])
    for k, line in enumerate(children):
        assert set(line["losses"]) == set(line["parent"]) == {"cls", "reg"} and "trial" not in line
        changes = sum(line["losses"][name] != line["parent"][name] for name in ("cls", "reg"))
        assert changes == 1 or (k < evolve.ASSEMBLED and changes == 0)
    rows = (directory / "hall_of_fame.csv").read_text().splitlines()[1:]
    assert set(result_of(directory)["losses"]) == {"cls", "reg"}
    assert all("cls=" in row and "reg=" in row for row in rows)


def test_a_short_search_puts_the_best_parts_together(tmp_path):
    directory = run(tmp_path, "--evals", "9", "--without", "rejected", branches=("cls", "reg"))
    lines = journal(directory)
    best = {}
    for line in sorted(lines, key=lambda line: line["score"]):
        best |= line["losses"]
    assert len(lines) == 9 and best.keys() == {"cls", "reg"}
    assert best in [record["retrained"] for record in retrained(directory)]


def test_one_of_several_branches_changes():
    fresh, rng = parse("Neg(p)"), random.Random(0)
    task = ToyTask(branches=("cls", "reg"))
    method = evolve.METHODS["evolve"]._replace(fresh=lambda *args: fresh)
    state = begin(task, method=method, turns={0: set(range(evolve.TRIALS + evolve.ASSEMBLED + 1))})
    trees = [evolve.random_tree(rng, SYMBOLS) for _ in range(40)]
    state.population.extend(Member({"cls": trees[k], "reg": trees[39 - k]}, k / 40, (str(k),)) for k in range(40))
    kinds = {"fresh": 0, "exchanged": 0, "mutated": 0}
    for _ in range(1000):
        parent = evolve.select_parent(state, rng, ["cls", "reg"])
        child = evolve.propose_several(task, state, rng, parent, Tried())
        (tree,) = child.trees
        (other,) = {"cls", "reg"} - {tree.branch}
        assert child.losses[other] == child.parent[other] and child.parent == parent.losses
        assert child.losses[tree.branch] == tree.expr and not child.more
        kinds["fresh" if tree.expr == fresh else "exchanged" if tree.expr in trees else "mutated"] += 1
    assert 70 < kinds["fresh"] < 130 and 220 < kinds["exchanged"] < 330, kinds


def test_random_search_of_several_branches_draws_whole_candidates(tmp_path):
    directory = run(tmp_path, "--evals", "4", "--search", "random", "--without", "rejected", branches=("cls", "reg"))
    lines = journal(directory)
    assert all(line["losses"].keys() == {"cls", "reg"} and not line["parent"] for line in lines)
    known = {(branch, text) for line in lines for branch, text, *_ in line["tried"]["verdicts"]}
    assert {(k, str(canonical(parse(v)))) for line in lines for k, v in line["losses"].items()} <= known


def test_nothing_is_trained_twice():
    task = ToyTask()
    state = begin(task, "--without", "surrogate,rejected")
    explore(task, state, 60)
    assert len(state.results) == 60 == len(state.scores) == len({r.identity for r in state.results.values()})
    assert len(state.population) > 60, "equivalents of trained losses join with the known score"
