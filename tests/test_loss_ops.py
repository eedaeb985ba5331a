"""The language: values and gradients against float64 definitions, text, algebra, and the exported file."""

import ast
import math
import random
import shutil
import subprocess
import sys
import tracemalloc

import pytest
import torch
import torch.nn.functional as F
from conftest import through_onnx

from evolve import random_tree
from loss_ops import (
    LEAVES,
    MAX_DEPTH,
    MAX_NODES,
    OPERATORS,
    Expr,
    Operator,
    canonical,
    evaluate,
    evaluate_batch,
    fits,
    is_dead,
    latex,
    leaves_of,
    parse,
    planes_last,
    python_module,
    python_source,
    reduce,
    simplify,
    softmax_leaves,
    subtrees,
    value_of_constant,
)

EPS = 1e-12
SEG = ("y", "p", "1")


def trees(number, symbols=SEG, seed=0):
    rng = random.Random(seed)
    return [random_tree(rng, symbols, rng.randint(0, 4)) for _ in range(number)]


def sample(seed=0, N=2, C=4, H=5, W=6, ignored=True, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, C, H, W, generator=g, dtype=dtype)
    label = torch.randint(0, C, (N, H, W), generator=g)
    if ignored:
        label[torch.rand(label.shape, generator=g) < 0.2] = 255
    return logits, label


# One scalar (or plain loop) definition per operator, independent of the code under test.
SCALAR = {
    "Add": lambda x, z: x + z,
    "Mul": lambda x, z: x * z,
    "Neg": lambda x: -x,
    "Abs": abs,
    "Inv": lambda x: 1 / (x + EPS),
    "Log": lambda x: math.copysign(1, x) * math.log(abs(x) + EPS) if x else 0.0,
    "Exp": math.exp,
    "Tanh": math.tanh,
    "Square": lambda x: x**2,
    "Sqrt": lambda x: math.copysign(1, x) * math.sqrt(abs(x) + EPS) if x else 0.0,
}


def slow(op, x, z, mask):
    """The full (N, C, H, W) value of one operator, element by element."""
    N, C, H, W = x.shape
    out = torch.zeros_like(x)
    for n in range(N):
        for c in range(C):
            for h in range(H):
                for w in range(W):
                    if op in SCALAR:
                        args = [x[n, c, h, w].item()] + ([z[n, c, h, w].item()] if OPERATORS[op].arity == 2 else [])
                        out[n, c, h, w] = SCALAR[op](*args)
                    elif op == "MeanC":
                        out[n, c, h, w] = sum(x[n, k, h, w] for k in range(C)) / C
                    elif op == "MeanNHW":
                        out[n, c, h, w] = x[:, c][mask[:, 0]].mean()
                    else:
                        most = {"MaxPool3": max, "MinPool3": min}[op]
                        window = [
                            x[n, c, a, b].item()
                            for a in range(max(0, h - 1), min(H, h + 2))
                            for b in range(max(0, w - 1), min(W, w + 2))
                            if mask[n, 0, a, b]
                        ]
                        out[n, c, h, w] = most(window, default=0.0)
    return out


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("masked", [False, True])
def test_operator_value(op, masked):
    x, label = sample(1, C=3, H=4, W=5)
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    mask = (label != 255).unsqueeze(1) if masked else torch.ones(2, 1, 4, 5, dtype=torch.bool)
    expr = Expr(op, (Expr("p"), Expr("y"))[: OPERATORS[op].arity])
    want = slow(op, x, z, mask)
    want = sum(want[:, c][mask[:, 0]].mean() for c in range(3))
    got = evaluate(expr, {"p": x, "y": z}, mask if masked else None)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    single = evaluate(expr, {"p": x.float(), "y": z.float()}, mask if masked else None)
    torch.testing.assert_close(single, want.float(), rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("masked", [False, True])
def test_operator_gradient(op, masked):
    x, label = sample(3, C=2, H=4, W=3)
    x = x.sign() * (x.abs() + 0.1)  # away from the kinks at zero
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=x.dtype)
    mask = (label != 255).unsqueeze(1) if masked else None
    weigh = parse("Mul(y, p)")  # unequal weights, so that a wrong position shows
    expr = Expr("Mul", (Expr("y"), Expr(op, (weigh, Expr("p"))[: OPERATORS[op].arity])))
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: evaluate(expr, {"p": p, "y": z}, mask), (x,))


def test_operators_at_zero_are_finite():
    zero = torch.zeros(1, 1, 2, 2, requires_grad=True)
    for op in OPERATORS:
        value = evaluate(Expr(op, (Expr("p"),) * OPERATORS[op].arity), {"p": zero})
        gradient = torch.autograd.grad(value, zero)[0]
        assert value.isfinite() and gradient.isfinite().all(), op


@pytest.mark.parametrize("ignored", [False, True])
def test_cross_entropy_is_a_tree(ignored):
    logits, label = sample(5, ignored=ignored)
    logits.requires_grad_()
    want = F.cross_entropy(logits, label, ignore_index=255)
    leaves, mask = softmax_leaves(logits, label)
    got = evaluate(parse("Neg(Mul(y, Log(p)))"), leaves, mask)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*(torch.autograd.grad(v, logits)[0] for v in (got, want)), rtol=1e-9, atol=1e-9)


def test_dice_is_a_tree():
    logits, label = sample(6)
    logits.requires_grad_()
    leaves, mask = softmax_leaves(logits, label)
    # -2/(2C) sum_c |yp| / (|y| + |p|): Dice without its constant, up to the factor C / 2 of the class mean
    got = evaluate(parse("Neg(Mul(MeanNHW(Mul(y, p)), Inv(MeanNHW(Add(y, p)))))"), leaves, mask)
    valid = label != 255
    y = F.one_hot(label[valid], 4).double()
    p = logits.softmax(1).movedim(1, -1)[valid]
    dice = (2 * (y * p).sum(0) / (y + p).sum(0)).mean()
    torch.testing.assert_close(got, -2 * dice, rtol=1e-9, atol=1e-9)


def test_ignored_positions_have_no_influence():
    logits, label = sample(7)
    other = torch.where((label == 255).unsqueeze(1), torch.randn_like(logits) * 30, logits)
    for expr in trees(300, seed=8):
        values = [evaluate(expr, *softmax_leaves(x, label)) for x in (logits, other)]
        torch.testing.assert_close(*values, equal_nan=True, msg=str(expr))


def test_a_batch_of_nothing_is_a_connected_zero():
    for text in (CE, POOLED):
        for shape in ((0, 3, 8, 8), (2, 3, 0, 8)):
            logits = torch.zeros(shape, requires_grad=True)
            value = Exported(text)(logits, torch.zeros(shape[0], *shape[2:], dtype=torch.int64))
            assert value == 0 and value.requires_grad


def test_all_ignored_gives_a_connected_zero():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    label = torch.full((1, 4, 4), 255)
    for text in ("Neg(Mul(y, Log(p)))", "Mul(MaxPool3(y), Square(MeanNHW(p)))"):
        value = evaluate(parse(text), *softmax_leaves(logits, label))
        gradient = torch.autograd.grad(value, logits)[0]
        assert value == 0 and not gradient.any()


def test_leading_dimensions_are_independent_losses():
    logits, label = sample(9, N=6, ignored=False)
    leaves, _ = softmax_leaves(logits, label)
    stacked = {name: x.view(3, 2, *x.shape[1:]) for name, x in leaves.items()}
    for expr in trees(100, seed=10):
        want = torch.stack([evaluate(expr, {name: x[k] for name, x in stacked.items()}) for k in range(3)])
        torch.testing.assert_close(evaluate(expr, stacked), want, equal_nan=True)


@pytest.mark.parametrize("leading", [(), (3,)])
@pytest.mark.parametrize("masked", [False, True])
def test_batch_equals_one_by_one(leading, masked):
    exprs = trees(60, seed=20)
    g = torch.Generator().manual_seed(21)
    shape = (60, *leading, 2, 4, 5, 6)
    logits = torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)
    label = torch.randint(0, 4, (60, *leading, 2, 5, 6), generator=g)
    y = F.one_hot(label, 4).movedim(-1, -3).double()
    mask = torch.rand((2, 1, 5, 6), generator=g) < 0.8 if masked else None
    got = evaluate_batch(exprs, {"y": y, "p": logits.softmax(-3)}, mask)
    assert got.shape == (60, *leading)
    want = [
        evaluate(expr, {"y": y[k], "p": logits[k].softmax(-3)}, mask).expand(leading) for k, expr in enumerate(exprs)
    ]
    torch.testing.assert_close(got, torch.stack(want), equal_nan=True)
    finite = torch.stack(want).isfinite()
    gradients = [torch.autograd.grad(v[finite].sum(), logits)[0] for v in (got, torch.stack(want))]
    torch.testing.assert_close(*gradients, equal_nan=True)


def test_text_round_trip():
    for expr in trees(3000, LEAVES, seed=11):
        assert parse(str(expr)) == expr
    assert parse(" Neg ( Mul(y ,Log(p)) )") == parse("Neg(Mul(y, Log(p)))")


@pytest.mark.parametrize(
    "text, position, word",
    [
        ("Neg(Mul(y, Lgo(p)))", 11, "Log"),
        ("neg(p)", 0, "Neg"),
        ("Mul(y)", 0, "takes 2 operands, got 1"),
        ("Neg(y, p)", 0, "takes 1 operand, got 2"),
        ("Neg(p", 5, "expected ')'"),
        ("Mul(y p)", 6, "expected ','"),
        ("Mul(y,)", 6, "expected a formula, found ')'"),
        ("Sub(p, y)", 0, "did you mean 'Square'"),
        ("Neg", 3, "expected '('"),
        ("Neg(p))", 6, "unexpected ')'"),
        ("Neg(p) + 1", 7, "unexpected '+'"),
        ("Add(p, @)", 7, "unknown name '@'"),
        ("__import__('os')", 0, "unknown name '__import__'"),
        ("2", 0, "unknown name '2'"),
        ("", 0, "found the end"),
        ("Neg(" * 5000, 4 * MAX_DEPTH, "nested too deeply"),
        ("Mul(" + "p," * 5000, 4 + 2 * MAX_NODES - 2, "more than 1000 operators and leaves"),
        ("Neg(" + 1000000 * "a", 4, "unknown name 'aaa"),
        ("p" + 1000000 * " é", 2, "unexpected 'é'"),
        ("Neg(p\0)", 5, r"found '\x00'"),
        ("Neg(\ud800)", 4, r"unknown name '\ud800'"),
    ],
)
def test_parse_errors_name_position_and_cure(text, position, word):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert word in str(error.value)
    assert str(error.value).startswith(f"position {position}:") and len(str(error.value)) < 300


def test_parse_survives_any_text():
    rng = random.Random(22)
    words = [*OPERATORS, *LEAVES, *"(),(),(), \n\0\ud800²_9'\"\\", "x" * 99, "\U000e0001" * 99]
    for _ in range(5000):
        text = list(str(random_tree(rng, SEG, rng.randint(0, 3))))
        for _ in range(rng.randint(1, 4)):
            at = rng.randint(0, len(text))
            text[at : at + rng.randint(0, 9)] = rng.choices(words, k=rng.randint(0, 3))
        try:
            expr = parse("".join(text))
        except ValueError as error:
            assert len(str(error)) < 300
        else:
            assert fits(expr) and parse(str(expr)) == expr


def nested(*ops, depth=MAX_DEPTH):
    """A tree of so many operators above its deepest leaf."""
    expr = parse("Mul(Neg(y), p)")
    for k in range(depth - 2):
        op = ops[k % len(ops)]
        expr = Expr(op, (expr, Expr("y"))[: OPERATORS[op].arity])
    return expr


@pytest.mark.parametrize(
    "ops", [("Tanh",), ("Add",), ("Exp", "Neg"), ("MeanNHW", "MeanC"), ("Mul", "MaxPool3", "Square")]
)
def test_all_functions_answer_up_to_the_bounds(ops):
    expr = nested(*ops)
    leaves = {name: torch.rand(2, 1, 2, 3, 3) for name in "yp"}
    one = {name: x[0] for name, x in leaves.items()}

    def below(frames, function, *args):  # as deep in other code as a test or a compiler is
        return below(frames - 1, function, *args) if frames else function(*args)

    assert fits(expr) and below(600, parse, below(600, str, expr)) == expr
    for function in (latex, canonical, is_dead, subtrees, leaves_of):
        simplify.cache_clear()
        below(600, function, expr)
    value = below(600, evaluate, expr, one)
    batch = below(600, evaluate_batch, [expr, expr], leaves)
    torch.testing.assert_close(batch[0], value, equal_nan=True)
    ast.parse(below(600, python_source, expr))
    below(600, str, canonical(expr))


def test_what_fits_is_what_can_be_read():
    pair = "Add(p, " * (MAX_NODES // 2 // 100)
    shared = parse("Mul(y, p)")
    for _ in range(MAX_DEPTH // 2):
        shared = Expr("Mul", (shared, shared))  # 2^52 leaves, if it were written out
    assert not fits(shared) and not fits(nested("Exp", depth=MAX_DEPTH + 1)) and not fits(nested("Exp", depth=5000))
    assert fits(nested("Exp")) and fits(parse("p")) and fits(parse(f"{pair}p{')' * pair.count('(')}"))
    balanced = parse("Mul(y, p)")
    while fits(balanced):
        assert parse(str(balanced)) == balanced
        balanced = Expr("Add", (balanced, balanced))
    with pytest.raises(ValueError, match="more than 1000"):
        parse(str(balanced))
    with pytest.raises(ValueError, match="nested too deeply"):
        parse(str(nested("Exp", depth=MAX_DEPTH + 1)))


def test_common_subtrees_are_listed_once():
    expr = parse("Add(Mul(y, Log(p)), Square(Mul(y, Log(p))))")
    assert [str(node) for node in subtrees(expr)] == [
        "y", "p", "Log(p)", "Mul(y, Log(p))", "Square(Mul(y, Log(p)))", str(expr),
    ]  # fmt: skip


def test_canonical_keeps_the_value():
    logits, label = sample(12)
    leaves, mask = softmax_leaves(logits, label)
    changed = 0
    for expr in trees(4000, seed=13):
        short = canonical(expr)
        changed += short != expr
        assert canonical(short) == short
        value = evaluate(expr, leaves, mask)
        torch.testing.assert_close(evaluate(short, leaves, mask), value, rtol=1e-6, atol=1e-9, equal_nan=True)
    assert changed > 1000


@pytest.mark.parametrize(
    "one, other",
    [
        ("Mul(y, p)", "Mul(p, y)"),
        ("Neg(Neg(p))", "p"),
        ("Mul(Neg(y), Neg(p))", "Mul(y, p)"),
        ("Square(Neg(p))", "Square(Abs(p))"),
        ("Tanh(Neg(p))", "Neg(Tanh(p))"),
        ("MaxPool3(Neg(p))", "Neg(MinPool3(p))"),
        ("Mul(Square(1), p)", "p"),
        ("Add(p, Add(1, Neg(1)))", "p"),
        ("Neg(MeanNHW(Mul(y, Log(p))))", "Neg(Mul(y, MeanC(Log(p))))".replace("MeanC(Log(p))", "Log(p)")),
        ("MeanC(Square(p))", "Square(p)"),
        ("Square(MeanNHW(MeanNHW(p)))", "Square(MaxPool3(MeanNHW(p)))"),
        ("Abs(Exp(p))", "Exp(p)"),
    ],
)
def test_canonical_meets(one, other):
    assert canonical(parse(one)) == canonical(parse(other))


@pytest.mark.parametrize("one, other", [("Neg(p)", "p"), ("Inv(Neg(p))", "Neg(Inv(p))"), ("MeanC(p)", "MaxPool3(p)")])
def test_canonical_keeps_apart(one, other):
    assert canonical(parse(one)) != canonical(parse(other))


def test_long_searches_need_no_memory():
    simplify.cache_clear(), value_of_constant.cache_clear()
    exprs = trees(500, seed=23)
    tracemalloc.start()
    rng = random.Random(24)
    for _ in range(6000):
        expr = Expr("Mul", (rng.choice(exprs), Expr("Tanh", (Expr("Add", (rng.choice(exprs), rng.choice(exprs))),))))
        is_dead(canonical(expr))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 6e6


@pytest.mark.parametrize(
    "text",
    ["y", "1", "p", "Add(p, y)", "Neg(Add(Exp(p), Square(y)))", "MeanNHW(Add(p, Mul(1, y)))", "Mul(Add(y, p), Exp(1))",
     "Mul(Add(1, Neg(1)), Mul(y, p))"],
)  # fmt: skip
def test_dead(text):
    assert is_dead(parse(text))


@pytest.mark.parametrize(
    "text", ["Mul(y, p)", "Square(Add(p, y))", "Abs(Add(y, Neg(p)))", "MaxPool3(Add(p, y))", "Neg(i)", "Mul(1, u)"]
)
def test_not_dead(text):
    assert not is_dead(parse(text))


def test_dead_means_what_it_says():
    """Whatever is called dead has the same gradient for another target."""
    logits, label = sample(14, ignored=False)
    logits.requires_grad_()
    other = (label + 1) % 4
    dead = [expr for expr in trees(1500, seed=15) if is_dead(expr)]
    assert len(dead) > 500
    for expr in dead:
        gradients = []
        for target in (label, other):
            value = evaluate(expr, *softmax_leaves(logits, target))
            gradients.append(torch.autograd.grad(value, logits)[0] if value.requires_grad else torch.zeros_like(logits))
        torch.testing.assert_close(*gradients, equal_nan=True, rtol=1e-6, atol=1e-12, msg=str(expr))


def test_latex_has_every_part():
    text = latex(parse("Neg(Mul(Add(y, Neg(1)), Log(MeanNHW(p))))"))
    assert text == r"-\left(y - 1\right) \cdot \log \left(\mathrm{mean}_{NHW} \left(p\right)\right)"
    for expr in trees(300, seed=16):
        shown = latex(expr)
        assert shown.count("{") == shown.count("}") and shown.count(r"\left") == shown.count(r"\right")


def test_a_further_operator(monkeypatch):
    """Infix and not commutative, as no operator here is."""
    monkeypatch.setitem(OPERATORS, "Sub", Operator(2, lambda x, z: x - z, "{} - {}", "differences"))
    assert latex(parse("Mul(y, Sub(1, p))")) == r"y \cdot \left(\left(1\right) - \left(p\right)\right)"
    assert latex(parse("Neg(Sub(y, p))")) == r"-\left(\left(y\right) - \left(p\right)\right)"
    one, other = parse("Sub(y, p)"), parse("Sub(p, y)")
    assert canonical(one) == one and canonical(other) == other
    leaves = {name: torch.rand(2, 3, 4, 4) for name in "yp"}
    torch.testing.assert_close(evaluate(one, leaves), -evaluate(other, leaves))


CHECK = """
import sys, torch
assert not any(name in sys.modules for name in ("loss_ops", "evolve", "numpy.testing"))
from best_loss import loss
data = torch.load("data.pt", weights_only=True)
logits = data["logits"].requires_grad_()
value = loss(logits, data["label"])
value.backward()
torch.save({"value": value.detach(), "gradient": logits.grad}, "out.pt")
"""


@pytest.mark.parametrize(
    "text",
    [
        "Neg(Mul(y, Log(p)))",
        "Add(Square(Add(1, Neg(MaxPool3(Mul(y, p))))), MeanC(MinPool3(Inv(Add(p, 1)))))",
        "Mul(y, p)",
    ],
)
def test_exported_file_stands_alone(tmp_path, text):
    logits, label = sample(17, dtype=torch.float32)
    torch.save({"logits": logits, "label": label}, tmp_path / "data.pt")
    (tmp_path / "best_loss.py").write_text(python_source(parse(text)))
    subprocess.run([sys.executable, "-c", CHECK], cwd=tmp_path, check=True, env={"OMP_NUM_THREADS": "1"})
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    logits.requires_grad_()
    value = evaluate(parse(text), *softmax_leaves(logits, label))
    assert torch.equal(out["value"], value)
    assert torch.equal(out["gradient"], torch.autograd.grad(value, logits)[0])


def test_a_cpu_copies_nothing_between_pools():
    """What goes through pools and other operators keeps the layout in which they are fast; so do the gradients."""
    logits, label = sample(20, ignored=False)
    leaves, _ = softmax_leaves(logits, label)
    p = planes_last(leaves["p"]).requires_grad_()
    inner = OPERATORS["MaxPool3"].function(p, None)
    outer = OPERATORS["MinPool3"].function(inner * p, None)
    slopes = torch.autograd.grad(reduce(outer * outer, p.shape[1], None), (inner, outer))
    for tensor in (inner, outer, *slopes):
        assert tensor.movedim((-2, -1), (0, 1)).is_contiguous() and not tensor.is_contiguous()


def test_exported_random_trees():
    logits, label = sample(18, dtype=torch.float32)
    for expr in trees(200, seed=19):
        scope: dict = {}
        exec(compile(python_source(expr), "best_loss.py", "exec"), scope)
        want = evaluate(expr, *softmax_leaves(logits, label))
        torch.testing.assert_close(scope["loss"](logits, label), want, rtol=0, atol=0, equal_nan=True)


def test_several_losses_in_one_file():
    head = 'def NAME(p, y):\n    """{expr}"""\n    mask = None\n'
    texts = {"first": "MinPool3(Neg(Mul(y, Log(p))))", "second": "Square(Add(1, Neg(p)))"}
    scope = {}
    exec(python_module([(parse(text), head.replace("NAME", name)) for name, text in texts.items()], "Two."), scope)
    leaves = {name: torch.rand(2, 3, 5, 5) for name in "py"}
    for name, text in texts.items():
        assert scope[name].__doc__ == text
        torch.testing.assert_close(scope[name](**leaves), evaluate(parse(text), leaves))


def exported(source):
    scope: dict = {}
    exec(compile(source, "best_loss.py", "exec"), scope)
    return scope["loss"]


CE = "Neg(Mul(y, Log(p)))"
DICE = "Neg(Mul(MeanNHW(Mul(y, p)), Inv(MeanNHW(Add(y, p)))))"
POOLED = "Add(Square(Add(1, Neg(MaxPool3(Mul(y, p))))), Neg(Mul(y, Log(MinPool3(p)))))"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("text", [CE, DICE, POOLED])
def test_half_precision_is_computed_in_single(text, dtype):
    logits, label = sample(25, N=1, C=3, H=384, W=384)
    logits = (8 * logits).to(dtype).requires_grad_()
    loss = exported(python_source(parse(text)))
    value, want = loss(logits, label), loss(logits.double(), label)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.item() == pytest.approx(want.item(), rel=1e-4)
    assert value == evaluate(parse(text), *softmax_leaves(logits, label))
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.dtype == dtype and gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    logits, label = sample(26, dtype=torch.float32)
    for expr in [parse(CE), parse(DICE), parse(POOLED), *trees(100, seed=27)]:
        loss = exported(python_source(expr))
        for given in (logits, logits.to(dtype)):
            with torch.autocast("cpu", dtype):
                inside = loss(given, label)
            torch.testing.assert_close(inside, loss(given, label), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("space", [(), (9,), (4,), (5, 6), (4, 6, 6), (1, 5, 6), (2, 3, 4, 5)])
def test_any_number_of_dimensions(space):
    g = torch.Generator().manual_seed(28)
    logits = torch.randn(4, 4, *space, generator=g, dtype=torch.float64)
    label = torch.randint(0, 4, (4, *space), generator=g)
    label[0] = 255
    loss, pooled = (exported(python_source(parse(text))) for text in (CE, POOLED))
    torch.testing.assert_close(loss(logits, label), F.cross_entropy(logits, label, ignore_index=255))
    if len(space) > 2:
        with pytest.raises(ValueError, match=r"logits \(4, 4, .*3x3.*no volume"):
            pooled(logits, label)
    elif len(space) == 1:  # a line: neighbours to the left and to the right
        p, y = logits.softmax(1), F.one_hot(label % 255, 4).movedim(-1, 1)
        p, y = p[1:], y[1:]
        near = F.max_pool1d(y * p, 3, 1, 1), -F.max_pool1d(-p, 3, 1, 1)
        want = ((1 - near[0]).square() - y * (near[1] + EPS).log()).sum(1).mean()
        torch.testing.assert_close(pooled(logits, label), want)
    else:
        assert pooled(logits, label).dim() == 0


@pytest.mark.parametrize(
    "logits, label",
    [((2, 4, 5, 5), (2, 1, 5, 5)), ((2, 4, 5, 5), (2, 4, 5, 5)), ((2, 4, 5, 6), (2, 6, 5)), ((2, 4, 5, 5), (50,)),
     ((2, 4, 3, 5, 5), (2, 15, 5)), ((2, 1, 5, 5), (2, 5, 5)), ((2, 4), (2, 1)), ((2, 4), (1,)), ((4,), ()), ((), ())],
)  # fmt: skip
def test_wrong_shapes_are_named(logits, label):
    with pytest.raises(ValueError) as error:
        exported(python_source(parse(CE)))(torch.zeros(logits), torch.zeros(label, dtype=torch.long))
    text = str(error.value)
    assert f"logits {logits} and label {label}" in text and "expected (N, C, ...)" in text and "(N, ...)" in text


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool])
def test_labels_of_any_integer_type(dtype):
    logits, label = sample(29, C=2, ignored=False)
    loss = exported(python_source(parse(CE)))
    for ignore_index in (255, -100, -1, 2**40):
        torch.testing.assert_close(loss(logits, label.to(dtype), ignore_index), F.cross_entropy(logits, label))


@pytest.mark.parametrize("ignore_index", [255, -100, -1, 0, 7, 10**6])
def test_any_class_may_be_ignored(ignore_index):
    logits, label = sample(30, C=300, ignored=False)
    label[0, 0, :3], label[1, :2] = 255, ignore_index
    logits.requires_grad_()
    values = [
        loss(logits, label, ignore_index=ignore_index) for loss in (exported(python_source(parse(CE))), F.cross_entropy)
    ]
    torch.testing.assert_close(*values, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in values), rtol=1e-6, atol=1e-9)


class Exported(torch.nn.Module):
    """The loss of an exported file as a module."""

    def __init__(self, text):
        super().__init__()
        self.loss = exported(python_source(parse(text)))

    def forward(self, logits, label):
        return self.loss(logits, label)


@pytest.mark.parametrize("text", [CE, DICE, POOLED])
def test_compilers_take_the_exported_file(text):
    """torch.export with a free batch and torch.compile in one graph, up to code generation."""
    logits, label = sample(31, dtype=torch.float32)
    module = Exported(text)
    loss = module.loss
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(module, (logits, label), dynamic_shapes=({0: batch}, {0: batch})).module()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for call in (program, compiled):
        torch.testing.assert_close(call(logits, label), loss(logits, label))
    more = torch.cat([logits, -logits]), torch.cat([label, label])
    torch.testing.assert_close(program(*more), loss(*more))


@pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile needs a C compiler")
def test_compiled_code_bears_a_border_of_ignored_pixels():
    """Windows of ignored pixels alone: with -inf there torch's code for the gradient left the tensor."""
    logits, label = sample(31, H=12, W=12, dtype=torch.float32)
    label[:, :2] = 255
    logits.requires_grad_()
    loss = exported(python_source(parse("Neg(Mul(y, Log(MaxPool3(p))))")))
    values = [call(logits, label) for call in (torch.compile(loss, fullgraph=True), loss)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in values))


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("text", [CE, DICE, POOLED])
def test_onnx_takes_the_exported_file(tmp_path, text, dynamo):
    module, inputs = Exported(text), sample(31, dtype=torch.float32)
    torch.testing.assert_close(through_onnx(tmp_path, module, inputs, dynamo), module(*inputs))


TITLES = [
    "Two\nlines.",
    'ends in "',
    'three """ of them',
    '"""',
    "'''",
    "ends in \\",
    r"C:\new \N{x} \u12 \"",
    r'\"""',
    "\\" * 3 + '"' * 7,
    "\0 \r \x0c \ud800 é \u2028",
    "{expr} %s {0}",
    "",
]


@pytest.mark.parametrize("title", TITLES)
def test_any_title_is_valid(tmp_path, title):
    expr = parse(CE)
    (tmp_path / "best_loss.py").write_text(python_source(expr, title=title), encoding="utf-8")
    scope: dict = {}
    exec(compile((tmp_path / "best_loss.py").read_bytes(), "best_loss.py", "exec"), scope)
    shown = "".join(c if c.isprintable() or c == "\n" else " " for c in title).replace('"""', "'''")
    assert scope["__doc__"].startswith(f"{shown}\n\n    {expr}\n") and latex(expr) in scope["__doc__"]
    logits, label = sample(32)
    assert scope["loss"](logits, label) == evaluate(expr, *softmax_leaves(logits, label))


def test_labels_of_floats_are_refused():
    with pytest.raises(ValueError, match="label of torch.float32: expected integers"):
        softmax_leaves(torch.zeros(1, 2, 3), torch.zeros(1, 3))


def test_constants_are_folded_where_all_precisions_agree():
    """Log(1) is 1e-12 in double precision and 0 in single: Tanh(Log(Log(1))) is -1, or 0."""
    loss = parse("Mul(Add(1, Tanh(Log(Log(1)))), Neg(Mul(y, Log(p))))")
    assert not is_dead(loss) and not is_dead(canonical(loss))
    logits, label = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2, 4, 4).long()
    leaves, mask = softmax_leaves(logits, label)
    for dtype in (torch.float32, torch.float64):
        those = {name: leaf.to(dtype) for name, leaf in leaves.items()}
        torch.testing.assert_close(evaluate(canonical(loss), those, mask), evaluate(loss, those, mask))


def test_an_ignored_position_has_no_gradient_whatever_is_predicted_there():
    loss, label = parse("Exp(Inv(Add(p, Add(1, Neg(y)))))"), torch.tensor([[1, 255]])
    logits = torch.tensor([[[0.0, -20.0], [0.0, 20.0]]], requires_grad=True)
    evaluate(loss, *softmax_leaves(logits, label)).backward()
    assert logits.grad.isfinite().all() and logits.grad[..., 1].abs().max() == 0 < logits.grad[..., 0].abs().max()
