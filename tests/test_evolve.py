"""The search, on a toy task that needs no data: mutations, gates, state, resume, workers' log, a planted formula."""

import json
import math
import random
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import journal

import evolve
from evolve import Branch, Fate, InvalidLoss, Member, Search, Story
from loss_ops import OPERATORS, canonical, evaluate, is_dead, parse

SYMBOLS = ("y", "p", "1")
CE = parse("Neg(Mul(y, Log(p)))")


def toy_branch(C=4, size=8, eta=0.6):
    g = torch.Generator().manual_seed(0)
    label = torch.randint(0, C, (5, size, size), generator=g)
    logits = 0.1 * torch.randn(5, 1, C, size, size, generator=g)
    onehot = F.one_hot(label, C).movedim(-1, 1).float().unsqueeze(1)
    return Branch(
        SYMBOLS,
        logits,
        onehot,
        lambda x, y: {"y": y.expand_as(x), "p": x.softmax(-3)},
        lambda x, y: (x.argmax(-3) == y.argmax(-3)).float().mean((-3, -2, -1)),
        eta,
        ideal=10 * onehot,
        known=("Neg(Mul(y, Log(p)))", "Abs(Add(p, Neg(y)))"),
    )


class ToyTask:
    """The score of a loss is the cosine of its first gradient with that of a planted formula."""

    def simulate(self, losses):
        return 2 * self.train(losses)

    def __init__(self, planted="Neg(Mul(y, p))", invalid=False, branches=("loss",)):
        self.branches = {name: toy_branch() for name in branches}
        self.curve = [(0, 1.0)]
        self.invalid = invalid
        self.trained = []
        self.want = self.gradient(parse(planted))

    def gradient(self, expr):
        branch = self.branches[next(iter(self.branches))]
        x = branch.prediction.clone().requires_grad_()
        value = evaluate(expr, branch.leaves(x, branch.target)).sum()
        return torch.autograd.grad(value, x)[0].flatten() if value.requires_grad else torch.zeros(x.numel())

    def train(self, losses):
        if isinstance(losses, str):
            return 0.5
        self.trained.append(evolve.losses_text(losses))
        gradient = sum(self.gradient(expr) for expr in losses.values())
        if self.invalid or not gradient.isfinite().all():
            raise InvalidLoss("step 0")
        return round(F.cosine_similarity(gradient, self.want, dim=0).item(), 6)

    def retrain(self, losses, seed, picture=None):
        score = self.train(losses) + 0.001 * seed
        return {"val": {"toy": score}, "test": {"toy": score}}


def arguments(tmp_path, *argv):
    parser = evolve.Parser()
    evolve.add_search_arguments(parser)
    args = parser.parse_args(["--runs", str(tmp_path), "--minutes", "5", "--workers", "1", *argv])
    args.metric, args.data, args.device = "toy", "none", "cpu"
    return args


def story(**options):
    return Story("toy", "ce", ("toy",), lambda: ToyTask(**options), lambda losses: str(losses))


def run(tmp_path, *argv, **options):
    evolve.run(arguments(tmp_path, *argv), story(**options))
    (directory,) = tmp_path.iterdir()
    return directory


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


def test_mutations_change_what_they_say():
    rng = random.Random(1)
    for _ in range(500):
        expr = evolve.random_tree(rng, SYMBOLS)
        count = len(evolve.nodes(expr))
        grown = evolve.insert(rng, expr, SYMBOLS)
        assert count < len(evolve.nodes(grown)) <= count + 2
        cut = evolve.delete(rng, expr, SYMBOLS)
        assert len(evolve.nodes(cut)) < count
        other = evolve.replace(rng, expr, SYMBOLS)
        assert other != expr and abs(len(evolve.nodes(other)) - count) < count
        for new in (grown, cut, other):
            assert all(len(n.args) == OPERATORS[n.op].arity for n in evolve.nodes(new) if n.args)


def test_a_leaf_can_only_grow():
    rng = random.Random(2)
    assert all(evolve.mutate(rng, parse("p"), SYMBOLS).args for _ in range(50))


def test_mutations_are_equally_likely(monkeypatch):
    drawn = []
    for name in ("insert", "delete", "replace"):
        monkeypatch.setattr(evolve, name, lambda rng, expr, symbols, name=name: drawn.append(name) or expr)
    rng = random.Random(3)
    for _ in range(3000):
        evolve.mutate(rng, CE, SYMBOLS)
    assert all(900 < drawn.count(name) < 1100 for name in ("insert", "delete", "replace"))


# Gates


@pytest.mark.parametrize(
    "text",
    [
        "Mul(p, MeanC(y))",  # y sums to one over the classes: alive on paper, blind in fact
        "Inv(Add(Exp(Exp(Exp(Inv(Mul(y, p))))), y))",  # not finite
        "Add(y, MeanC(Mul(1, p)))",  # softmax sums to one: zero gradient
    ],
)
def test_first_gradient_turns_away(text):
    assert evolve.first_gradients(toy_branch(), [parse(text)])[0] is None


@pytest.mark.parametrize("special", [0.0, math.inf])
def test_first_gradient_looks_at_the_true_targets_of_every_sample(special):
    """Zero with the true targets though not with others; infinite on a single sample."""
    branch = toy_branch()
    first = branch.target[0]
    where = branch.target if special == 0 else torch.stack([first, *torch.full_like(branch.target[1:], -1.0)])

    def leaves(x, y):
        return {"y": torch.where((y == where).expand_as(x), special, y.expand_as(x)), "p": x.softmax(-3)}

    branch.leaves = leaves
    assert evolve.first_gradients(branch, [parse("Mul(y, Square(p))")])[0] is None


def test_targets_are_exchanged_along_n_where_there_are_several():
    """Samples with equal targets and numbers that belong together, as those of boxes do."""
    target = torch.tensor([[3.0, 1.0], [5.0, 2.0], [9.0, 8.0]]).expand(4, 3, 2)[..., None, None]
    seen = []

    def leaves(x, y):
        seen.append(y)
        return {"y": y.expand_as(x), "p": x}

    prediction = torch.rand(4, 3, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    branch = Branch(SYMBOLS, prediction, target, leaves, lambda x, y: x.mean((-4, -3, -2, -1)))
    assert evolve.first_gradients(branch, [parse("Square(Add(p, Neg(y)))")])[0] is not None
    pairs = {tuple(pair) for pair in seen[0].reshape(-1, 2).tolist()}
    assert pairs == {(3.0, 1.0), (5.0, 2.0), (9.0, 8.0)}, "each target stays whole"


@pytest.mark.parametrize("text", [str(CE), "Square(Add(p, Neg(y)))", "Neg(Mul(Sqrt(MeanNHW(y)), Mul(y, p)))"])
def test_first_gradient_lets_pass(text):
    assert evolve.first_gradients(toy_branch(), [parse(text)])[0] is not None


def key(text, scale_free=False):
    return evolve.equivalence_key(evolve.first_gradients(toy_branch(), [parse(text)])[0], scale_free)


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


def gain(expr, **limits):
    return evolve.rejection_gains(toy_branch(), [expr], **limits)[0]


def test_rejection_protocol():
    assert gain(CE) > 0.6
    assert gain(CE, early=()) == pytest.approx(0.75, abs=0.15)
    assert gain(parse("Mul(y, Log(p))")) < 0.1
    tiny = "Mul(Mul(Inv(Exp(Exp(Add(1, 1)))), Inv(Exp(Exp(Add(1, 1))))), Neg(Mul(y, Log(p))))"
    assert gain(parse(tiny)) > 0.6, "a factor of 4e-7 is no reason to reject"


def test_rejection_takes_the_steps_of_adam():
    branch = toy_branch()
    x = branch.prediction.clone().requires_grad_()
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


def test_judging_together_is_judging_one_by_one():
    rng = random.Random(5)
    good = [CE, parse("Square(Add(p, Neg(y)))"), parse("Neg(Mul(MeanNHW(y), Mul(y, p)))")]
    trees = [evolve.random_tree(rng, ("y", "p", "1")) for _ in range(60)]
    trees += [evolve.mutate(rng, rng.choice(good), ("y", "p", "1")) for _ in range(60)]
    together, alone = Search(ToyTask()), Search(ToyTask())
    verdicts = evolve.judge(together, [("loss", expr) for expr in trees])
    singly = [evolve.judge(alone, [("loss", expr)])[0] for expr in trees]
    assert [(fate.text, fate.gate, gate) for fate, gate in verdicts] == [(f.text, f.gate, gate) for f, gate in singly]
    assert {gate for _, gate in verdicts} == {*evolve.GATES, None}
    assert together.fates.keys() == alone.fates.keys() and together.keys.keys() == alone.keys.keys()


def test_children_judged_together_wait_for_their_turn():
    task = ToyTask()
    search = Search(task, batch=40)
    for number in range(6):
        record = evolve.evaluation(search, random.Random(number), time.time() + 60)
        search.add(record)
    assert search.evaluated == 6
    assert len({tuple(record["identity"]) for _, record in search.ranking()}) == 6, "nothing is trained twice"


def test_gates_come_in_order():
    search = Search(ToyTask())

    def verdict(text):
        return evolve.judge(search, [("loss", parse(text))])[0][1]

    assert verdict("Add(p, y)") == "dead"
    assert verdict("Mul(p, MeanC(y))") == "gradient"
    assert verdict("Mul(MeanC(y), p)") == "seen"
    assert verdict("Mul(y, Log(p))") == "rejected"
    assert verdict("Neg(Mul(y, Log(p)))") is None
    assert verdict("Mul(Neg(Log(p)), y)") == "seen"
    assert verdict("Neg(Mul(y, Log(Abs(p))))") == "equivalent"
    assert search.fates["loss", str(canonical(parse("Neg(Mul(y, Log(Abs(p))))")))].gate == "passed"


@pytest.mark.parametrize("gate", evolve.GATES)
def test_a_gate_switched_off_never_decides(tmp_path, gate):
    directory = run(tmp_path, "--evals", "19", "--without", gate)
    lines = journal(directory)
    assert len(lines) == 19 and lines[-1]["gates"][gate] == 0
    assert all(lines[-1]["gates"][other] > 0 for other in ("gradient", "rejected") if other != gate)


def test_naive_has_no_gates(tmp_path):
    directory = run(tmp_path, "--evals", "60", "--search", "naive")
    gates = journal(directory)[-1]["gates"]
    assert all(gates[gate] == 0 for gate in evolve.GATES)
    assert any(is_dead(parse(line["losses"]["loss"])) for line in journal(directory))


# Evolution


@pytest.mark.parametrize("branches, mean", [(1, 8 / 9), (4, 15 / 16)])
def test_parent_is_the_best_of_its_tournament(branches, mean):
    search = Search(ToyTask(branches=["loss", "b", "c", "d"][:branches]))
    for k in range(200):
        search.population.append(Member({"loss": CE}, k / 200 if k % 4 else None))
    rng = random.Random(4)
    scores = [evolve.select_parent(search, rng, ["loss"]).score for _ in range(300)]
    assert abs(sum(scores) / len(scores) - mean) < 0.02  # the mean of the best of n uniform draws is n / (n + 1)
    search.population.extend([Member({"loss": CE}, None)] * evolve.POPULATION)
    assert len(search.population) == evolve.POPULATION, "the oldest leave"
    assert evolve.select_parent(search, rng, ["loss"]) is None, "nobody valid is left"


def test_copies_of_the_best_do_not_win_every_tournament():
    search = Search(ToyTask())
    others = [Member({"loss": CE}, k / 100) for k in range(100)]
    newest = Member({"loss": parse("Neg(Mul(Log(p), y))")}, 1.0)
    search.population.extend([*others, *[Member({"loss": CE}, 1.0)] * 900, newest])
    rng = random.Random(4)
    parents = [evolve.select_parent(search, rng, ["loss"]) for _ in range(300)]
    assert sum(parent.score == 1.0 for parent in parents) < 40  # tournaments of six among 101
    assert all(parent is newest for parent in parents if parent.score == 1.0), "the newest stands for its equivalents"


def test_planted_formula_is_found(tmp_path):
    directory = run(tmp_path, "--evals", "150", planted="Neg(Mul(Sqrt(MeanNHW(y)), Mul(y, p)))")
    result = json.loads((directory / "result.json").read_text())
    assert result["test"]["found"]["toy"][0] > 0.995
    lines = journal(directory)
    best_of_first = max(line["score"] for line in lines[: evolve.INITIAL])
    assert max(line["score"] for line in lines) > best_of_first, "evolution improved on the random start"


def test_every_candidate_invalid(tmp_path):
    directory = run(tmp_path, "--evals", "25", invalid=True)
    result = json.loads((directory / "result.json").read_text())
    assert result["evaluated"] == 25 and result["gates"]["invalid"] == 25 and result["losses"] == {}


def test_several_branches(tmp_path, capsys):
    directory = run(tmp_path, "--evals", "60", branches=("cls", "reg"))
    first, *lines = journal(directory)
    trials, children = lines[: evolve.TRIALS], lines[evolve.TRIALS :]
    assert capsys.readouterr().out.count(" alone\n") == len(trials)
    assert set(first["losses"]) == {"cls", "reg"} and not first["parent"]
    assert all(line["trial"] and len(line["losses"]) == 1 and not line["parent"] for line in trials)
    best = dict.fromkeys(("cls", "reg"), -math.inf)
    for line in trials:
        (name,) = line["losses"]
        assert name == min(best, key=best.get), "where the trees are worst another one is tried"
        assert line["identity"][0] == name, "the same tree in another branch is another candidate"
        best[name] = max(best[name], line["score"])
    for k, line in enumerate(children):
        assert set(line["losses"]) == set(line["parent"]) == {"cls", "reg"} and "trial" not in line
        changes = sum(line["losses"][name] != line["parent"][name] for name in ("cls", "reg"))
        assert changes == 1 or (k < evolve.ASSEMBLED and changes == 0)
    assert all(line["parent"] != first["losses"] for line in children[:4]), "they are put together from trials"
    result = json.loads((directory / "result.json").read_text())
    rows = (directory / "hall_of_fame.csv").read_text().splitlines()[1:]
    assert set(result["losses"]) == {"cls", "reg"} and all("cls=" in row and "reg=" in row for row in rows)


def test_a_short_search_puts_the_best_parts_together(tmp_path):
    directory = run(tmp_path, "--evals", "9", branches=("cls", "reg"))
    lines = journal(directory)
    best = {}
    for line in sorted(lines, key=lambda line: line["score"]):
        best |= line["losses"]
    retrained = [json.loads(line)["losses"] for line in (directory / "retrain.jsonl").read_text().splitlines()]
    assert len(lines) == 9 and best in retrained and lines[0]["losses"] in retrained


def test_one_of_several_branches_changes(monkeypatch):
    fresh, rng = parse("Neg(p)"), random.Random(0)
    monkeypatch.setattr(evolve, "fresh_loss", lambda search, rng, branch: fresh)
    search = Search(ToyTask(branches=("cls", "reg")), evaluated=evolve.TRIALS + evolve.ASSEMBLED + 1)
    trees = [evolve.random_tree(rng, SYMBOLS) for _ in range(40)]
    search.population.extend(Member({"cls": trees[k], "reg": trees[39 - k]}, k / 40) for k in range(40))
    kinds = {"fresh": 0, "exchanged": 0, "mutated": 0}
    for _ in range(1000):
        child, parent, (name,) = evolve.propose(search, rng)
        (other,) = {"cls", "reg"} - {name}
        assert child[other] == parent[other] and parent in [member.losses for member in search.population]
        tree = child[name]
        kinds["fresh" if tree == fresh else "exchanged" if tree in trees else "mutated"] += 1
    assert 70 < kinds["fresh"] < 130 and 220 < kinds["exchanged"] < 330, kinds


def test_nothing_is_trained_twice(tmp_path):
    search = Search(ToyTask())
    for n in range(60):
        record = evolve.evaluation(search, random.Random(n), math.inf)
        search.add(record)
    assert len({tuple(record["identity"]) for _, record in search.hall.values()}) == 60 == len(search.scores)
    assert len(search.population) > 60, "equivalents of trained losses join with the known score"


# Journal, resume, workers


@pytest.mark.parametrize("branches", [("loss",), ("cls", "reg")])
def test_same_seed_same_journal_and_exact_resume(tmp_path, branches):
    straight = run(tmp_path / "a", "--evals", "50", "--seed", "5", branches=branches)
    again = run(tmp_path / "b", "--evals", "50", "--seed", "5", branches=branches)
    other = run(tmp_path / "c", "--evals", "50", "--seed", "6", branches=branches)
    assert journal(straight) == journal(again) != journal(other)

    stopped = run(tmp_path / "d", "--evals", "23", "--seed", "5", branches=branches)
    with (stopped / "journal.jsonl").open("a") as file:
        file.write('{"n": 24, "losses": {"lo')  # the kill came in the middle of a line
    args = arguments(tmp_path, "--evals", "50", "--seed", "5")
    args.resume = stopped
    evolve.run(args, story(branches=branches))
    assert journal(stopped) == journal(straight)


def test_torn_line_is_skipped_with_a_warning(tmp_path, capsys):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}\n{"n": ')
    assert evolve.read_lines(path) == [{"n": 1}, {"n": 2}]
    assert "torn" in capsys.readouterr().err
    assert path.read_text() == '{"n": 1}\n{"n": 2}\n'


def test_a_worker_learns_everything_from_the_log():
    store = dist.HashStore()
    boards = [evolve.Board(store, rank, 2) for rank in (0, 1)]
    first, second = Search(ToyTask()), Search(ToyTask())
    for n in range(30):
        record = evolve.evaluation(first, random.Random(n), math.inf)
        first.add(record)
        boards[0].publish(record=record)
    for rank, message in boards[1].news():
        assert rank == 0
        second.absorb(message["record"])
    assert list(boards[1].news()) == []
    assert second.fates == first.fates and second.keys == first.keys and second.scores == first.scores
    assert list(second.population) == list(first.population) and second.counts == first.counts
    assert second.explored == first.explored and second.best == first.best


def test_tickets_and_jobs_are_claimed_once():
    store = dist.HashStore()
    boards = [evolve.Board(store, rank, 2) for rank in (0, 1)]
    assert [boards[k % 2].claim("evaluations") for k in range(4)] == [1, 2, 3, 4]
    jobs = [{"losses": {"loss": str(CE)}, "seed": s, "picture": None} for s in range(3)]
    task = ToyTask()
    evolve.serve(Search(task), boards[0], 0, jobs)
    evolve.serve(Search(task), boards[1], 0, jobs)
    assert len(task.trained) == 3


def test_finalists_are_no_relatives():
    texts = [
        "Neg(Mul(y, Log(p)))",
        "Neg(Mul(y, Log(Add(p, Square(p)))))",
        "Mul(y, Log(p))",
        "Mul(y, p)",
    ]
    ranking = [(0.9 - 0.1 * k, {"losses": {"loss": text}, "identity": [key(text)]}) for k, text in enumerate(texts)]
    assert len({record["identity"][0] for _, record in ranking}) == 4

    def names(ranking, baseline):
        return [losses["loss"] for losses in evolve.select_finalists(ranking, baseline)]

    assert names(ranking, 0.5) == names(ranking, None) == [texts[k] for k in (0, 2, 1, 3)], "relatives wait"
    assert names(ranking, 0.75) == texts, "a stranger that loses to the baseline is no better than a relative"
    assert names([], 0.5) == []
    plain = [(0.9 - 0.1 * (k // 2), {"losses": {"loss": str(k)}, "identity": []}) for k in range(8)]
    assert names(plain, 0.0) == ["0", "2", "4", "6", "1"], "equal scores: equivalent losses"


def test_finalists_are_ranked_by_all_seeds_on_the_search_validation_split():
    def result(text, seed, val, test):
        scores = None if val is None else {"val": {"toy": val}, "test": {"toy": test}}
        return {"losses": {"loss": text}, "seed": seed, "scores": scores}

    retrained = [result("p", 0, 0.9, 0.1), result("p", 1, 0.1, 0.9), result("y", 0, 0.6, 0.2), result("y", 1, None, 0)]
    reporter = SimpleNamespace(retrained=retrained, args=SimpleNamespace(metric="toy"))
    score = {text: evolve.Reporter.closing_score(reporter, {"loss": text}) for text in ("p", "y", "1")}
    assert score == {"p": pytest.approx(0.5), "y": -math.inf, "1": -math.inf}, "one invalid training is enough"


def test_files_of_a_run(tmp_path):
    directory = run(tmp_path, "--evals", "25", "--seeds", "2")
    for name in ("args.json", "journal.jsonl", "retrain.jsonl", "hall_of_fame.csv", "best_loss.py", "result.json"):
        assert (directory / name).stat().st_size > 0, name
    result = json.loads((directory / "result.json").read_text())
    last = journal(directory)[-1]
    assert result["explored"] == last["explored"] == sum(last["gates"][g] for g in evolve.GATES) + result["evaluated"]
    assert len(result["test"]["found"]["toy"]) == len(result["test"]["baseline"]["toy"]) == 2
    first = (directory / "hall_of_fame.csv").read_text().splitlines()[1].split(",")
    assert float(first[1]) == max(line["score"] for line in journal(directory))
    assert evolve.read_found(directory, "toy", "--loss") == {k: parse(v) for k, v in result["losses"].items()}


def test_equivalent_scores_are_reused():
    search = Search(SimpleNamespace(branches={"loss": toy_branch()}))
    k = key("Neg(Mul(y, Log(p)))")
    search.learn(Fate("loss", str(canonical(CE)), "passed", k, 0.7))
    search.scores[(k,)] = 0.9
    fate, gate = evolve.judge(search, [("loss", parse("Neg(Mul(y, Log(Abs(p))))"))])[0]
    assert gate == "equivalent" and fate.key == k and fate.gain == 0.7


def test_minutes_end_a_search_that_nothing_passes(tmp_path):
    args = arguments(tmp_path, "--evals", "5")
    args.minutes = 0.02
    hopeless = ToyTask()
    hopeless.branches = {"loss": toy_branch(eta=2.0)}  # no gain reaches it
    evolve.run(args, Story("toy", "ce", ("toy",), lambda: hopeless, str))
    (directory,) = tmp_path.iterdir()
    assert json.loads((directory / "result.json").read_text())["evaluated"] == 0


def test_workers_are_waited_for_however_long_they_take(monkeypatch):
    hours = iter(range(0, 10**6, 3600))
    monkeypatch.setattr(evolve.time, "time", lambda: next(hours))
    messages = [[]] * 20 + [[(0, {"idle": "search"})], [], [(1, {"idle": "search"})]]
    board = SimpleNamespace(read=[0, 0], rank=0, news=lambda: messages.pop(0))
    heard = SimpleNamespace(idle={})
    heard.hear = lambda rank, message: heard.idle.update({rank: message["idle"]})
    evolve.Crew(board, heard, None, []).wait_until_idle("search")
    assert not messages and heard.idle == {0: "search", 1: "search"}


def test_a_kill_in_the_closing_round_costs_one_training(tmp_path):
    class Killed(ToyTask):
        def retrain(self, losses, seed, picture=None):
            if seed == 1:
                raise MemoryError
            return super().retrain(losses, seed, picture)

    with pytest.raises(MemoryError):
        evolve.run(arguments(tmp_path, "--evals", "6"), Story("toy", "ce", ("toy",), Killed, str))
    (directory,) = tmp_path.iterdir()
    done = [json.loads(line) for line in (directory / "retrain.jsonl").read_text().splitlines()]
    assert len(done) >= 3 and all(line["seed"] == 0 and line["scores"] for line in done)


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
    lengths, changes = set(), []
    for _ in range(3000):
        child = evolve.mutate_program(rng, program, SYMBOLS)
        assert 1 <= len(child) <= evolve.PROGRAM and abs(len(child) - len(program)) <= 1
        assert all(op in OPERATORS and 3 <= out < 8 and 0 <= min(a, b) <= max(a, b) < 8 for op, a, b, out in child)
        if len(child) == len(program):
            changes.append(sum(new != old for new, old in zip(child, program)))
        lengths.add(len(child))
        program = child
    assert lengths >= set(range(1, evolve.PROGRAM)) and changes.count(1) > 600 and max(changes) > 10


def test_falling_sees_what_falls_on_the_whole_way():
    branch = toy_branch()
    losses = {
        "Neg(Mul(y, Log(p)))": True,
        "Abs(Add(p, Neg(y)))": True,
        "Mul(y, Log(p))": False,  # rises
        "Neg(Abs(Add(Mul(y, p), Neg(MeanC(Tanh(1))))))": False,  # rises, then falls
        "Square(1)": False,
        "Exp(Exp(Exp(Exp(Inv(Mul(y, p))))))": False,  # not finite
    }
    assert dict(zip(losses, evolve.falling(branch, list(map(parse, losses))))) == losses
    assert [evolve.falling(branch, [parse(text)])[0] for text in losses] == list(losses.values())


@pytest.mark.parametrize("kind", ["cse", "cse-rand"])
def test_convergence_simulation(tmp_path, kind):
    directory = run(tmp_path, "--search", kind, "--evals", "25")
    lines = journal(directory)
    result = json.loads((directory / "result.json").read_text())
    assert result["gates"]["rising"] > 0 and result["gates"]["simulation"] > 0
    assert result["gates"]["rejected"] == result["gates"]["gradient"] == 0, "the gates of the other searches are open"
    assert all(evolve.falling(toy_branch(), [parse(line["losses"]["loss"])])[0] for line in lines)
    assert all(2 * line["score"] >= evolve.SIMULATION for line in lines)
    texts = [line["losses"]["loss"] for line in lines]
    assert len(set(texts)) == len(texts)
    search, rng = Search(ToyTask(), kind=evolve.SEARCHES[kind]), random.Random(0)
    fresh = [str(evolve.fresh_loss(search, rng, toy_branch())) for _ in range(200)]
    known = sum(text in toy_branch().known for text in fresh)
    assert 30 < known < 80 if kind == "cse" else known == 0, "a quarter of them is not mutated"


def test_programs_evolve_without_gates_and_go_on_after_a_resume(tmp_path):
    flags = ("--search", "aml", "--evals")
    whole = journal(run(tmp_path / "whole", *flags, "60"))
    part = run(tmp_path / "part", *flags, "35")
    args = arguments(tmp_path / "part", *flags, "60")
    args.resume = part
    evolve.run(args, story())
    assert journal(part) == whole
    assert not any(whole[-1]["gates"][gate] for gate in evolve.GATES)
    for line in whole:
        (text,) = line["losses"].values()
        assert str(evolve.program_tree(line["programs"][text], SYMBOLS)) == text
    assert any(line["parent"] for line in whole)


class ToySampler:
    """Counts upwards from the mean of what was learned."""

    def __init__(self):
        self.seen, self.shown = [], 0

    def propose(self, rng):
        return {"loss": Number(round(sum(self.seen) + rng.random(), 3))}, {"known": len(self.seen)}

    def learn(self, record):
        self.seen.append(record["score"])

    def show(self, board):
        self.shown += 1


class Number(float):
    def __str__(self):
        return f"number {float(self)!r}"


def test_a_search_of_the_tasks_own(tmp_path):
    def begin(directory, evals, resume=None):
        task = ToyTask()
        task.train = lambda losses: 0.5 if losses == "ce" else 1 / losses["loss"]
        own = Story("toy", "ce", ("toy",), lambda: task, str, {"own": ToySampler}, lambda text: Number(text.split()[1]))
        args = arguments(directory, "--evals", evals)
        args.search, args.resume = "own", resume
        evolve.run(args, own)
        return next(directory.iterdir())

    whole = journal(begin(tmp_path / "whole", "9"))
    part = begin(tmp_path / "part", "4")
    begin(tmp_path / "part", "9", part)
    assert journal(part) == whole
    assert [line["known"] for line in whole] == list(range(9)), "each proposal knows all earlier scores"
    assert whole[0]["losses"]["loss"].startswith("number ")
    assert json.loads((part / "result.json").read_text())["losses"]["loss"].startswith("number ")
