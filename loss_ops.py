"""The language of losses: what AutoLoss-Zero searches over.

A loss is a rooted tree of primitive operators over a few leaves (AutoLoss-Zero, arXiv 2103.14026, Sec. 3.1):

    Neg(Mul(y, Log(p)))              cross entropy
    Square(Add(p, Neg(y)))           squared error
    Neg(Sqrt(MeanNHW(Mul(p, y))))    a soft recall, class by class

Leaves are the target `y`, the prediction `p` (after softmax or sigmoid) and the constant `1`; for box regression the
intersection `i`, the union `u` and the enclosing area `e` of predicted and target box. Every tensor is
(..., N, C, H, W): leading dimensions hold independent losses, H = W = 1 where a task has no space. The value of a tree
is summed over C and averaged over N, H and W, so that `Neg(Mul(y, Log(p)))` is exactly cross entropy.

Ignored positions (mask False) are left out of every sum, mean and pool.

Marks, here and in the other files: [P] published by AutoLoss-Zero, [A] read off the published Auto Seg-Loss code,
[D] this project's own choice.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12  # [P]

# ---------------------------------------------------------------------------------------------------------------------
# Operators
#
# MeanNHW and MeanC leave dimensions of size one and let broadcasting restore them: the same numbers as a tensor of full
# shape, for less work. A value that is constant along a dimension is its own mean and its own pool, so no operator
# needs to know which of its dimensions have been reduced.


def add(x, z):
    return x + z


def mul(x, z):
    return x * z


def neg(x):
    return -x


def abs_(x):
    return torch.abs(x)


def exp(x):
    return torch.exp(x)


def tanh(x):
    return torch.tanh(x)


def square(x):
    return x * x


def inv(x):
    return 1 / (x + EPS)


def log(x):
    return torch.sign(x) * torch.log(torch.abs(x) + EPS)


def sqrt(x):
    return torch.sign(x) * torch.sqrt(torch.abs(x) + EPS)


def mean_nhw(x, mask):
    if mask is None:
        return x.mean((-4, -2, -1), keepdim=True)
    count = mask.sum((-4, -2, -1), keepdim=True).clamp(min=1)
    return torch.where(mask, x, 0.0).sum((-4, -2, -1), keepdim=True) / count


def mean_c(x):
    return x.mean(-3, keepdim=True)


def max_pool3(x, mask):
    # An ignored position never wins; its own output is the input, which keeps it finite and out of every later sum.
    seen = x if mask is None else torch.where(mask, x, float("-inf"))
    planes = seen.reshape(1, -1, *seen.shape[-2:])
    if not x.is_cuda:  # a CPU pools all planes at once where they are the fast dimension: several times as fast
        planes = planes.contiguous(memory_format=torch.channels_last)
    pooled = F.max_pool2d(planes, 3, stride=1, padding=1).contiguous().view(seen.shape)
    return pooled if mask is None else torch.where(mask, pooled, x)


def min_pool3(x, mask):
    return -max_pool3(-x, mask)


class Operator(NamedTuple):
    arity: int
    function: Callable[..., Tensor]
    latex: str
    why: str
    masked: bool = False  # takes the mask of valid positions as its last argument


OPERATORS = {
    "Add": Operator(2, add, "{} + {}", "combine terms"),
    "Mul": Operator(2, mul, r"{} \cdot {}", "weigh one term by another; select with a one-hot target"),
    "Neg": Operator(1, neg, "-{}", "turn a reward into a loss"),
    "Abs": Operator(1, abs_, r"\left|{}\right|", "L1-like residuals"),
    "Inv": Operator(1, inv, r"\frac{{1}}{{{} + \epsilon}}", "ratios, as in Dice and IoU"),
    "Log": Operator(1, log, r"\log {}", "likelihoods; odd in x, so that it is defined everywhere"),
    "Exp": Operator(1, exp, r"e^{{{}}}", "sharp penalties"),
    "Tanh": Operator(1, tanh, r"\tanh {}", "saturating penalties"),
    "Square": Operator(1, square, "{}^2", "L2-like residuals, focusing"),
    "Sqrt": Operator(1, sqrt, r"\sqrt{{{}}}", "favours small values; odd in x, like Log"),
    "MeanNHW": Operator(1, mean_nhw, r"\mathrm{{mean}}_{{NHW}} {}", "statistics of a class over the batch", True),
    "MeanC": Operator(1, mean_c, r"\mathrm{{mean}}_{{C}} {}", "statistics of a position over the classes"),
    "MaxPool3": Operator(1, max_pool3, r"\mathrm{{max}}_{{3\times3}} {}", "dilation: neighbourhoods, boundaries", True),
    "MinPool3": Operator(1, min_pool3, r"\mathrm{{min}}_{{3\times3}} {}", "erosion: neighbourhoods, boundaries", True),
}

LEAVES = ("y", "p", "1", "i", "u", "e")
KNOWS_PREDICTION = frozenset("piue")
KNOWS_TARGET = frozenset("yiue")


# ---------------------------------------------------------------------------------------------------------------------
# Expressions


class Expr(NamedTuple):
    """One node of a loss: an operator with its operands, or a leaf. `str` gives the prefix text that `parse` reads."""

    op: str
    args: tuple["Expr", ...] = ()

    def __str__(self) -> str:
        return f"{self.op}({', '.join(map(str, self.args))})" if self.args else self.op


ONE = Expr("1")
ZERO = Expr("Add", (ONE, Expr("Neg", (ONE,))))


def subtrees(expr: Expr) -> list[Expr]:
    """The distinct subtrees of `expr`, operands before the operators that use them; the last one is `expr` itself."""
    found: dict[Expr, None] = {}

    def visit(node: Expr) -> None:
        if node not in found:
            for arg in node.args:
                visit(arg)
            found[node] = None

    visit(expr)
    return list(found)


def leaves_of(expr: Expr) -> set[str]:
    """The symbols at the bottom of `expr`."""
    return set().union(*map(leaves_of, expr.args)) if expr.args else {expr.op}


def parse(text: str) -> Expr:
    """Read prefix text such as `Neg(Mul(y, Log(p)))`; `parse(str(expr)) == expr`. Nothing is ever evaluated.

    Raises ValueError naming the position (from 0) of an unknown name (with the nearest known one), of an operator with
    the wrong number of operands, or of a stray character.
    """
    tokens = [(m.start(), m.group()) for m in re.finditer(r"\w+|[^\w\s]", text)] + [(len(text), "")]
    at = 0

    def fail(position: int, what: str):
        raise ValueError(f"position {position}: {what}")

    def expect(token: str, after: str) -> None:
        nonlocal at
        position, found = tokens[at]
        if found != token:
            fail(position, f"expected '{token}' {after}, found {repr(found) if found else 'the end'}")
        at += 1

    def read() -> Expr:
        nonlocal at
        position, name = tokens[at]
        at += 1
        if name in LEAVES:
            return Expr(name)
        if name not in OPERATORS:
            near = difflib.get_close_matches(name.lower(), [k.lower() for k in (*OPERATORS, *LEAVES)], 1, 0.3)
            known = [k for k in (*OPERATORS, *LEAVES) if k.lower() in near]
            hint = f"did you mean '{known[0]}'?" if known else "known are " + " ".join((*OPERATORS, *LEAVES))
            fail(
                position, f"unknown name {name!r}; {hint}" if name else "expected an operator or a leaf, found the end"
            )
        expect("(", f"after '{name}'")
        args = [read()]
        while tokens[at][1] == ",":
            at += 1
            args.append(read())
        arity = OPERATORS[name].arity
        if len(args) != arity:
            fail(position, f"'{name}' takes {arity} operand{'s' * (arity > 1)}, got {len(args)}")
        expect(")", f"to close '{name}' at {position}")
        return Expr(name, tuple(args))

    try:
        expr = read()
    except RecursionError:
        raise ValueError(f"position {tokens[at][0]}: nested too deeply") from None
    if tokens[at][1]:
        fail(tokens[at][0], f"unexpected {tokens[at][1]!r} after the formula")
    return expr


def latex(expr: Expr) -> str:
    """`expr` in LaTeX. Log and Sqrt are odd: sign(x) log(|x| + eps) and sign(x) sqrt(|x| + eps)."""

    def show(node: Expr) -> str:
        if not node.args:
            return node.op
        args = [show(arg) for arg in node.args]
        if node.op in ("Mul", "Neg"):  # these bind tighter than Add and, behind a product sign, than Neg
            loose = ("Add", "Neg") if node.op == "Mul" else ("Add",)
            args = [rf"\left({t}\right)" if a.op in loose else t for a, t in zip(node.args, args)]
        elif node.op not in ("Add", "Abs", "Inv", "Exp", "Sqrt"):  # these bring no brackets of their own
            args = [rf"\left({t}\right)" if a.args else t for a, t in zip(node.args, args)]
        return OPERATORS[node.op].latex.format(*args)

    return show(expr).replace("+ -", "- ")


# ---------------------------------------------------------------------------------------------------------------------
# Values


def reduce(x, channels, mask):
    """Sum over C, mean over N, H, W of the valid positions; `x` may have dimensions of size one."""
    x = mean_nhw(x, mask)
    return x.expand(*x.shape[:-3], channels, 1, 1).sum((-4, -3, -2, -1))


# What `python_source` writes, read while the file is still the one that runs.
SOURCES = {f: inspect.getsource(f).strip() for f in (*(op.function for op in OPERATORS.values()), reduce)}


def evaluate(expr: Expr, leaves: Mapping[str, Tensor], mask: Tensor | None = None) -> Tensor:
    """The value of the loss `expr`, differentiable in the leaves; common subtrees are computed once.

    Args:
        expr: the loss.
        leaves: tensors (..., N, C, H, W) for the symbols in `expr`, all of one shape; `1` needs none.
        mask: (..., N, 1, H, W) bool, True where a position counts; None where all do. With no valid position the value
            is 0, and still connected to the graph.

    Returns: a scalar; with leading dimensions, a tensor of their shape.
    Raises: KeyError if a symbol of `expr` is not in `leaves`.
    """
    some = next(iter(leaves.values()))
    values = {ONE: some.new_ones((1, 1, 1, 1))}
    for node in subtrees(expr):
        if node.args:
            operator = OPERATORS[node.op]
            args = [values[arg] for arg in node.args]
            values[node] = operator.function(*args, mask) if operator.masked else operator.function(*args)
        elif node != ONE:
            values[node] = leaves[node.op]
    return reduce(values[expr], some.shape[-3], mask).expand(some.shape[:-4])


def evaluate_batch(exprs: Sequence[Expr], leaves: Mapping[str, Tensor], mask: Tensor | None = None) -> Tensor:
    """The values of K losses, each on predictions of its own, with one call per operator and level of the trees.

    Equal operators whose operands are at hand and have equal shapes are stacked into one tensor and computed together:
    the number of kernel launches grows with the depth of the deepest tree, not with the number of trees.

    Args:
        exprs: K losses.
        leaves: tensors (K, ..., N, C, H, W), the k-th slice for the k-th loss.
        mask: (..., N, 1, H, W) bool, shared by all; or None.

    Returns: (K, ...), equal to `evaluate` of each loss up to rounding, and as differentiable.
    """
    if len(exprs) == 1:
        return evaluate(exprs[0], leaves, mask)
    some = next(iter(leaves.values()))
    one = some.new_ones((1,) * (some.dim() - 1))
    values: dict[tuple[int, Expr], Tensor] = {}
    levels: dict[int, dict[str, list[tuple[int, Expr]]]] = {}
    for k, expr in enumerate(exprs):
        level: dict[Expr, int] = {}
        for node in subtrees(expr):
            if node.args:
                level[node] = 1 + max(level[arg] for arg in node.args)
                levels.setdefault(level[node], {}).setdefault(node.op, []).append((k, node))
            else:
                level[node] = 0
                values[k, node] = one if node == ONE else leaves[node.op][k]
    for height in sorted(levels):
        for op, wanted in levels[height].items():
            operator = OPERATORS[op]
            for group in by_shape(wanted, lambda kn: [values[kn[0], arg].shape for arg in kn[1].args]):
                args = [torch.stack([values[k, node.args[a]] for k, node in group]) for a in range(operator.arity)]
                result = operator.function(*args, mask) if operator.masked else operator.function(*args)
                values.update(zip(group, result.unbind()))
    losses: list[Tensor | None] = [None] * len(exprs)
    for group in by_shape(list(enumerate(exprs)), lambda kn: [values[kn].shape]):
        result = reduce(torch.stack([values[kn] for kn in group]), some.shape[-3], mask)
        for (k, _), value in zip(group, result.unbind()):
            losses[k] = value.expand(some.shape[1:-4])
    return torch.stack(losses)


def by_shape(items: list, shapes: Callable) -> list[list]:
    """Items grouped by what `shapes` says of them."""
    groups: dict[tuple, list] = {}
    for item in items:
        groups.setdefault(tuple(shapes(item)), []).append(item)
    return list(groups.values())


def softmax_leaves(logits: Tensor, label: Tensor, ignore_index: int = 255) -> tuple[dict[str, Tensor], Tensor | None]:
    """Leaves and mask of a classification: logits (N, C, H, W), label (N, H, W) of 0..C-1 or `ignore_index`.

    An ignored position carries class 0 below its mask: as regular as any other, so that no operator overflows there.
    """
    mask = (label != ignore_index).unsqueeze(1)  # (N, 1, H, W)
    y = torch.zeros_like(logits).scatter_(1, label.long().unsqueeze(1) * mask, 1.0)
    return {"y": y, "p": logits.softmax(1)}, mask


# How `python_source` begins a function of logits and labels.
CLASSIFICATION = '''def loss(logits, label, ignore_index=255):
    """{expr}

    logits: (N, C, H, W) or (N, C), before softmax; label: (N, H, W) or (N,), integers 0..C-1 or ignore_index.
    Returns a scalar: summed over classes, averaged over the positions that are not ignored.
    """
    if logits.dim() == 2:
        logits, label = logits[..., None, None], label[..., None, None]
    mask = (label != ignore_index).unsqueeze(1)
    y = torch.zeros_like(logits).scatter_(1, label.long().unsqueeze(1) * mask, 1.0)
    p = logits.softmax(1)
'''


def python_source(expr: Expr, title: str = "A loss function found by search.", head: str = CLASSIFICATION) -> str:
    """A standalone Python file with a function `loss`; it computes the same number as `evaluate`.

    By default its arguments are (logits, label, ignore_index=255); `head` says otherwise, see `python_module`. The file
    imports torch and nothing of this repository; the operators in it are the very functions of OPERATORS.
    """
    return python_module([(expr, head)], title)


def python_module(losses: Sequence[tuple[Expr, str]], title: str) -> str:
    """As `python_source` for several losses, each with the head of its function.

    A head is the text of a function up to its formula, with `{expr}` where the documentation shows that. It must define
    the leaves of its formula, (N, C, H, W), and `mask`, None where every position counts.
    """
    used, bodies = {mean_nhw}, []
    for expr, head in losses:
        order = [node for node in subtrees(expr) if node.args]
        names = {Expr(leaf): leaf for leaf in LEAVES} | {ONE: "one"}
        names |= {node: f"x{k}" for k, node in enumerate(order, 1)}
        steps = []
        for node in order:
            operator = OPERATORS[node.op]
            args = [names[arg] for arg in node.args] + ["mask"] * operator.masked
            steps.append(f"    {names[node]} = {operator.function.__name__}({', '.join(args)})")
            used.add(operator.function)
        some = min(leaves_of(expr) - {"1"}, default="p")
        if "1" in leaves_of(expr):
            steps.insert(0, f"    one = {some}.new_ones((1, 1, 1, 1))")
        steps.append(f"    return reduce({names[expr]}, {some}.shape[1], mask)")
        bodies.append(head.replace("{expr}", str(expr)) + "\n".join(steps))

    used |= {max_pool3} if min_pool3 in used else set()
    functions = [op.function for op in OPERATORS.values() if op.function in used] + [reduce]
    pools = "import torch.nn.functional as F\n" * (max_pool3 in used)
    formulas, shown = ("\n    ".join(show(expr) for expr, _ in losses) for show in (str, latex))
    parts = [
        f'r"""{title}\n\n    {formulas}\n\nIn LaTeX, log and sqrt extended as odd functions:\n\n    {shown}\n"""',
        f"import torch\n{pools}\nEPS = {EPS}",
        *(SOURCES[function] for function in functions),
        *bodies,
    ]
    return "\n\n\n".join(parts).replace('"""\n\n\nimport', '"""\n\nimport') + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Algebra: what can be known of a loss without touching a tensor

ODD = frozenset({"Tanh", "Log", "Sqrt", "MeanNHW", "MeanC"})  # f(-x) = -f(x)
EVEN = frozenset({"Abs", "Square"})  # f(-x) = f(x)
NEVER_NEGATIVE = frozenset({"Abs", "Square", "Exp"})
OTHER_POOL = {"MaxPool3": "MinPool3", "MinPool3": "MaxPool3"}
LINEAR = frozenset({"Add", "Neg", "MeanNHW", "MeanC"})


@lru_cache(maxsize=1 << 16)
def constant(expr: Expr) -> float | None:
    """The value of a tree over `1` alone, in float64; None if it has any other leaf."""
    if not expr.args:
        return 1.0 if expr == ONE else None
    args = [constant(arg) for arg in expr.args]
    if None in args:
        return None
    operator = OPERATORS[expr.op]
    tensors = [torch.full((1, 1, 1, 1), arg, dtype=torch.float64) for arg in args]
    return (operator.function(*tensors, None) if operator.masked else operator.function(*tensors)).item()


def uniform(expr: Expr, mean: str) -> bool:
    """Whether `expr` is constant along the dimensions that `mean` (MeanNHW or MeanC) averages over."""
    if expr.op == mean:
        return True
    return all(uniform(arg, mean) for arg in expr.args) if expr.args else expr == ONE


def canonical(expr: Expr) -> Expr:
    """One representative of all trees that are the same loss by laws that hold exactly: the key of every cache.

    Commutative order, signs pulled out of odd functions and dropped in even ones, double negation, neutral elements,
    constants worth 0, 1 or -1, means and pools of what they leave unchanged, and means right below the final reduction.
    Associativity is left alone: it reorders rounding. The value never changes (up to rounding in the last place).
    """
    simple = _simplify(expr)
    while (bare := _simplify(_strip_means(simple))) != simple:
        simple = bare
    return simple


def _strip_means(expr: Expr) -> Expr:
    """The loss without means next to its final reduction, which takes the same mean (and C times the mean over C)."""
    if expr.op in ("MeanNHW", "MeanC"):
        return _strip_means(expr.args[0])
    if expr.op in ("Add", "Neg"):
        return Expr(expr.op, tuple(map(_strip_means, expr.args)))
    return expr


@lru_cache(maxsize=1 << 18)
def _simplify(expr: Expr) -> Expr:
    if not expr.args:
        return expr
    expr = Expr(expr.op, tuple(map(_simplify, expr.args)))
    op, args = expr
    value = constant(expr)
    if value is not None and value in (0.0, 1.0, -1.0):
        return {0.0: ZERO, 1.0: ONE, -1.0: Expr("Neg", (ONE,))}[value]
    x, z = args[0], args[-1]
    negative = [arg.op == "Neg" for arg in args]

    if op == "Neg" and negative[0]:
        return x.args[0]
    if op == "Mul" and any(negative):
        bare = Expr("Mul", tuple(arg.args[0] if minus else arg for arg, minus in zip(args, negative)))
        return _simplify(bare if all(negative) else Expr("Neg", (bare,)))
    if op == "Add" and all(negative):
        return _simplify(Expr("Neg", (Expr("Add", (x.args[0], z.args[0])),)))
    if op in EVEN and (negative[0] or x.op == "Abs"):
        return _simplify(Expr(op, x.args))
    if op == "Abs" and x.op in NEVER_NEGATIVE:
        return x
    if op in ODD and negative[0]:
        return _simplify(Expr("Neg", (Expr(op, x.args),)))
    if op in OTHER_POOL and negative[0]:
        return _simplify(Expr("Neg", (Expr(OTHER_POOL[op], x.args),)))

    if op == "Mul" and ONE in args:
        return z if x == ONE else x
    if op == "Add" and ZERO in args:
        return z if x == ZERO else x
    if op in ("MeanNHW", "MaxPool3", "MinPool3") and uniform(x, "MeanNHW"):
        return x
    if op == "MeanC" and uniform(x, "MeanC"):
        return x
    if op == "MeanNHW" and x.op == "MeanC":
        return _simplify(Expr("MeanC", (Expr("MeanNHW", x.args),)))
    return Expr(op, tuple(sorted(args))) if op in ("Add", "Mul") else expr


def is_dead(expr: Expr) -> bool:
    """Whether the loss provably has no gradient towards the prediction, or one that does not know the target.

    The loss is split into the terms that its linear operators add up; each term's gradient is its own. A term without
    prediction has none, and a term without target gives a gradient without target: only a term with both can teach.
    """

    def terms(node: Expr):
        factors = [constant(arg) for arg in node.args]
        if node.op in LINEAR:
            for arg in node.args:
                yield from terms(arg)
        elif node.op == "Mul" and any(f is not None for f in factors):
            if 0.0 not in factors:
                yield from terms(node.args[1] if factors[0] is not None else node.args[0])
        else:
            yield leaves_of(node)

    return not any(known & KNOWS_PREDICTION and known & KNOWS_TARGET for known in terms(expr))
