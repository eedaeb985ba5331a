"""The language of losses: what AutoLoss-Zero searches over.

A loss is a rooted tree of primitive operators over a few leaves (AutoLoss-Zero, arXiv 2103.14026, Sec. 3.1):

    Neg(Mul(y, Log(p)))              cross entropy
    Square(Add(p, Neg(y)))           squared error
    Neg(Sqrt(MeanNHW(Mul(p, y))))    minus the root of each class's soft true positives

Leaves are the target `y`, the prediction `p` (after softmax or sigmoid) and the constant `1`; for box regression the
intersection `i`, the union `u` and the enclosing area `e` of predicted and target box. Every tensor is
(..., N, C, H, W): leading dimensions hold independent losses, H = W = 1 where a task has no space. The value of a tree
is summed over C and averaged over N, H and W, so that `Neg(Mul(y, Log(p)))` is exactly cross entropy (but near p = 0,
where EPS is not small).

Ignored positions (mask False) are left out of every sum, mean and pool.

Marks, here and in the other files: [P] published by AutoLoss-Zero, [A] read off the published Auto Seg-Loss code,
[S] off Simple Baselines, [D] this project's own choice.
"""

import difflib
import inspect
import re
import reprlib
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


def log(x):  # odd, so 0 at 0
    return torch.sign(x) * torch.log(torch.abs(x) + EPS)


def sqrt(x):
    return torch.sign(x) * torch.sqrt(torch.abs(x) + EPS)


def mean_nhw(x, mask):
    if mask is None:  # a sum, divided: the gradient of a mean would be written out at full size
        return x.sum((-4, -2, -1), keepdim=True) / (x.shape[-4] * x.shape[-2] * x.shape[-1])
    count = mask.sum((-4, -2, -1), keepdim=True).clamp(min=1)
    return torch.where(mask, x, 0.0).sum((-4, -2, -1), keepdim=True) / count


def mean_c(x):
    return x.sum(-3, keepdim=True) / x.shape[-3]


def max_pool3(x, mask):
    if x.shape[-2:] == (1, 1) or not x.numel():  # without neighbours, whatever the mask's size; torch refuses the empty
        return x
    # An ignored position wins over -inf alone; its own output is the input, finite and kept out of every later sum.
    # With -inf in place of the least number torch.compile takes a window of such positions for one without a maximum.
    seen = x if mask is None else torch.where(mask, x, torch.finfo(x.dtype).min)
    if x.is_cuda:
        pooled = F.max_pool2d(seen.reshape(1, -1, *x.shape[-2:]), 3, stride=1, padding=1).reshape(x.shape)
    else:  # a CPU pools all planes at once where they are the fast dimension: several times as fast
        last = x.dim() - 2, x.dim() - 1  # one of torch's ONNX exporters counts from the front only
        planes = seen.movedim(last, (0, 1))
        pixels = planes.reshape(1, *x.shape[-2:], -1).movedim(3, 1)
        pooled = F.max_pool2d(pixels, 3, stride=1, padding=1).movedim(1, 3)
        pooled = pooled.reshape(planes.shape).movedim((0, 1), last)
    return pooled if mask is None else torch.where(mask, pooled, x)


def min_pool3(x, mask):
    return -max_pool3(-x, mask)


class Operator(NamedTuple):
    arity: int  # 1 or 2
    function: Callable[..., Tensor]  # what is exported: a `def` of torch, F, EPS and operators above it alone
    latex: str  # of terms that bring their own brackets
    why: str
    masked: bool = False  # takes the mask of valid positions as its last argument


# A further operator needs a line here and one in tests/test_loss_ops.py, and where its algebra is to be known one in
# COMMUTATIVE, ODD, EVEN ... below; one that pools belongs to OTHER_POOL.
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
#
# Within these bounds every function here takes a quarter of Python's stack at most; losses of use are far below.

MAX_DEPTH = 100  # operators above a leaf [D]
MAX_NODES = 1000  # operators and leaves, repeated ones repeatedly [D]


class Expr(NamedTuple):
    """One node of a loss: an operator with its operands, or a leaf. `str` gives the prefix text that `parse` reads."""

    op: str
    args: tuple["Expr", ...] = ()

    def __str__(self) -> str:
        args = [arg.__str__() for arg in self.args]  # `str` itself would take two more frames a level
        return f"{self.op}({', '.join(args)})" if args else self.op


ONE = Expr("1")
ZERO = Expr("Add", (ONE, Expr("Neg", (ONE,))))


def fits(expr: Expr) -> bool:
    """Whether `expr` is within MAX_DEPTH and MAX_NODES: whether `parse` would read its text."""
    level, nodes = [expr], 1
    for _ in range(MAX_DEPTH):
        level = [arg for node in level for arg in node.args]
        nodes += len(level)
        if not level or nodes > MAX_NODES:
            break
    return nodes <= MAX_NODES and not any(node.args for node in level)


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

    Raises ValueError, in less than 300 characters, naming the position (from 0) of an unknown name (with the nearest
    known one), of an operator with the wrong number of operands, of a stray character, or of what exceeds MAX_DEPTH or
    MAX_NODES.
    """
    tokens = re.finditer(r"\w+|[^\w\s]|\Z", text)  # the last one is empty
    token, nodes = next(tokens), 0

    def take() -> re.Match:
        nonlocal token
        taken, token = token, next(tokens, token)
        return taken

    def fail(at: re.Match, what: str):
        raise ValueError(f"position {at.start()}: {what}")

    def show(at: re.Match) -> str:
        return reprlib.repr(at.group()) if at.group() else "the end"

    def expect(wanted: str, after: str) -> None:
        if token.group() != wanted:
            fail(token, f"expected '{wanted}' {after}, found {show(token)}")
        take()

    def read(depth: int) -> Expr:
        nonlocal nodes
        at = take()
        name = at.group()
        nodes += 1
        if nodes > MAX_NODES:
            fail(at, f"more than {MAX_NODES} operators and leaves")
        if name in LEAVES:
            return Expr(name)
        if name not in OPERATORS:
            lost = name in "(),"  # or the end
            fail(at, f"expected a formula, found {show(at)}" if lost else f"unknown name {show(at)}; {hint(name)}")
        if depth == MAX_DEPTH:
            fail(at, f"nested too deeply, more than {MAX_DEPTH} operators")
        expect("(", f"after '{name}'")
        args = [read(depth + 1)]
        while token.group() == ",":
            take()
            args.append(read(depth + 1))
        arity = OPERATORS[name].arity
        if len(args) < arity and token.group() not in ")":
            expect(",", f"before the next operand of '{name}' at {at.start()}")
        expect(")", f"to close '{name}' at {at.start()}")
        if len(args) != arity:
            fail(at, f"'{name}' takes {arity} operand{'s' * (arity > 1)}, got {len(args)}")
        return Expr(name, tuple(args))

    expr = read(0)
    if token.group():
        fail(token, f"unexpected {show(token)} after the formula")
    return expr


def hint(name: str) -> str:
    """The known name nearest to `name`, or all that are known."""
    known = {known.lower(): known for known in (*OPERATORS, *(LEAVES if len(name) == 1 else ()))}
    near = difflib.get_close_matches(name.lower(), known, 1, 0.3)
    return f"did you mean '{known[near[0]]}'?" if near else "known are " + " ".join((*OPERATORS, *LEAVES))


def latex(expr: Expr) -> str:
    """`expr` in LaTeX. Log and Sqrt are odd: sign(x) log(|x| + eps) and sign(x) sqrt(|x| + eps)."""

    def show(node: Expr) -> str:
        if not node.args:
            return node.op
        args = [show(arg) for arg in node.args]
        if node.op in ("Mul", "Neg"):  # these bind tighter than sums and, behind a product sign, than Neg
            loose = [len(a.args) == 2 and a.op != "Mul" or (node.op, a.op) == ("Mul", "Neg") for a in node.args]
            args = [rf"\left({t}\right)" if out else t for out, t in zip(loose, args)]
        elif node.op not in ("Add", "Abs", "Inv", "Exp", "Sqrt"):  # these bring no brackets of their own
            args = [t if node.op == "Square" and not a.args else rf"\left({t}\right)" for a, t in zip(node.args, args)]
        return OPERATORS[node.op].latex.format(*args)

    return show(expr).replace("+ -", "- ")


# ---------------------------------------------------------------------------------------------------------------------
# Values


def apply(op: str, args: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    operator = OPERATORS[op]
    return operator.function(*args, mask) if operator.masked else operator.function(*args)


def reduce(x, channels, mask):
    """Sum over C, mean over N, H, W of the valid positions; `x` may have dimensions of size one."""
    x = mean_nhw(x, mask)
    return x.expand(*x.shape[:-3], channels, 1, 1).sum((-4, -3, -2, -1))


def has_pool(nodes: Sequence[Expr]) -> bool:
    return any(node.op in OTHER_POOL for node in nodes)


def planes_last(x):
    """The same tensor, or None, as a CPU pools it fastest; what is computed from it element by element stays so."""
    if x is None or x.is_cuda:
        return x
    last = x.dim() - 2, x.dim() - 1
    return x.movedim(last, (0, 1)).contiguous().movedim((0, 1), last)


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
    nodes = subtrees(expr)
    if has_pool(nodes):
        leaves, mask = {name: planes_last(leaf) for name, leaf in leaves.items()}, planes_last(mask)
    values = {ONE: some.new_ones((1, 1, 1, 1))}
    for node in nodes:
        if node.args:
            values[node] = apply(node.op, [values[arg] for arg in node.args], mask)
        elif node != ONE:
            values[node] = leaves[node.op]
    return reduce(values[expr], some.shape[-3], mask).expand(some.shape[:-4])


def evaluate_batch(exprs: Sequence[Expr], leaves: Mapping[str, Tensor], mask: Tensor | None = None) -> Tensor:
    """The values of K losses, each on predictions of its own, with one call per operator and level of the trees.

    Equal operators whose operands are at hand and have equal shapes are stacked into one tensor and computed together:
    the number of kernel launches grows with the depth of the deepest tree, not with the number of trees. For a GPU: the
    search judges one tree after the other, on the CPU.

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
            for group in by_shape(wanted, lambda kn: [values[kn[0], arg].shape for arg in kn[1].args]):
                operands = zip(*([values[k, arg] for arg in node.args] for k, node in group))
                values.update(zip(group, apply(op, [torch.stack(column) for column in operands], mask).unbind()))
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


def wide(x: Tensor) -> Tensor:
    """`x` in float32 at least. In half precision EPS is 0 or lost, and a sum over pixels overflows."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def softmax_leaves(
    logits: Tensor, label: Tensor, ignore_index: int = 255, pools: bool = True
) -> tuple[dict[str, Tensor], Tensor]:
    """Leaves (N, C, H, W) and mask (N, 1, H, W) of a classification, in float32 at least.

    logits: (N, C), (N, C, L) for sequences, or (N, C, H, W); any (N, C, ...) where nothing `pools`. label: the shape of
    the logits without C, integers 0..C-1 or `ignore_index`, which may be any integer. Raises ValueError for other
    shapes, and for a label that is no integer.

    An ignored position carries class 0 and equal probabilities under its mask, so that no operator overflows there.
    """
    shape = logits.shape
    if pools and len(shape) > 4:
        raise ValueError(f"logits {tuple(shape)}: a pool of 3x3 takes (N, C, H, W), (N, C, L) or (N, C), no volume")
    if len(shape) < 2 or shape[1] < 2 or label.shape != shape[:1] + shape[2:]:
        raise ValueError(
            f"logits {tuple(shape)} and label {tuple(label.shape)}: expected (N, C, ...) before softmax, with C "
            "at least 2 (for a sigmoid's x: 0 and x), and (N, ...) of integers"
        )
    if label.is_floating_point():
        raise ValueError(f"label of {label.dtype}: expected integers")
    if len(shape) > 4:
        logits, label = logits.flatten(2), label.flatten(1)
    N, C, H, W = (*logits.shape, 1, 1)[:4]
    logits, label = wide(logits).reshape(N, C, H, W).contiguous(), label.long().reshape(N, 1, H, W)
    mask = label != ignore_index
    logits = torch.where(mask, logits, 0.0)
    y = torch.zeros_like(logits).scatter_(1, label * mask, 1.0)
    return {"y": y, "p": logits.softmax(1)}, mask


# ---------------------------------------------------------------------------------------------------------------------
# Export


def sources(*functions: Callable) -> dict[str, str]:
    """The text of functions by name. To be read on import, while the file is still the one that runs."""
    return {function.__name__: inspect.getsource(function).strip() for function in functions}


SOURCES = sources(*(operator.function for operator in OPERATORS.values()), reduce, wide, planes_last, softmax_leaves)

# How `python_source` begins a function of logits and labels.
CLASSIFICATION = '''def loss(logits, label, ignore_index=255):
    """{expr}

    logits: (N, C, ...) before softmax, of any floating type; label: (N, ...), integers 0..C-1 or ignore_index.
    Returns a scalar, float32 at least: summed over classes, averaged over the positions that are not ignored.
    """
    leaves, mask = softmax_leaves(logits, label, ignore_index, pools={pools})
    y, p = leaves["y"], leaves["p"]
'''


def python_source(
    expr: Expr,
    title: str = "A loss function found by search.",
    head: str = CLASSIFICATION,
    helpers: Mapping[str, str] | None = None,
) -> str:
    """A standalone Python file with a function `loss`; it computes the same number as `evaluate`.

    By default its arguments are (logits, label, ignore_index=255); `head` says otherwise, see `python_module`. The file
    imports torch and nothing of this repository; the operators in it are the very functions of OPERATORS.
    """
    return python_module([(expr, head)], title, helpers)


def python_module(losses: Sequence[tuple[Expr, str]], title: str, helpers: Mapping[str, str] | None = None) -> str:
    """As `python_source` for several losses, each with the head of its function.

    A head is the text of a function up to its formula, with `{expr}` where the documentation shows that, and `{pools}`
    for whether it has a pool. It must define the leaves of its formula, (N, C, H, W), and `mask`, None where every
    position counts. It may call `wide`, `softmax_leaves` and `helpers`: the `sources` of functions, callees first.
    """
    bodies = []
    for expr, head in losses:
        order = [node for node in subtrees(expr) if node.args]
        names = {Expr(leaf): leaf for leaf in LEAVES} | {ONE: "one"}
        names |= {node: f"x{k}" for k, node in enumerate(order, 1)}
        leaves, pools = leaves_of(expr), has_pool(order)
        some = min(leaves - {"1"}, default="p")
        steps = [f"    {name} = planes_last({name})" for name in (*sorted(leaves - {"1"}), "mask") if pools]
        steps += [f"    one = {some}.new_ones((1, 1, 1, 1))"] * ("1" in leaves)
        for node in order:
            operator = OPERATORS[node.op]
            args = [names[arg] for arg in node.args] + ["mask"] * operator.masked
            steps.append(f"    {names[node]} = {operator.function.__name__}({', '.join(args)})")
        steps.append(f"    return reduce({names[expr]}, {some}.shape[1], mask)")
        bodies.append(head.replace("{expr}", str(expr)).replace("{pools}", str(pools)) + "\n".join(steps))
    formulas, shown = ("\n    ".join(show(expr) for expr, _ in losses) for show in (str, latex))
    about = f"    {formulas}\n\nIn LaTeX, log and sqrt extended as odd functions:\n\n    {shown}"
    return standalone(title, about, f"EPS = {EPS}", bodies, helpers or {})


def standalone(title: str, about: str, constants: str, bodies: Sequence[str], helpers: Mapping[str, str]) -> str:
    """A Python file: documentation, whatever characters are in `title`, constants, the functions it takes, `bodies`."""
    text, functions = "\n".join(bodies), []
    for name, source in reversed((SOURCES | helpers).items()):
        if re.search(rf"(?<![\w.]){name}\(", text):
            functions.insert(0, source)
            text += source
    title = "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in title)
    title = title.replace('"""', "'''")
    functional = "import torch.nn.functional as F\n" * ("F." in text)
    parts = [f"import torch\n{functional}from torch import Tensor\n\n{constants}", *functions, *bodies]
    return f'r"""{title}\n\n{about}\n"""\n\n' + "\n\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Algebra: what can be known of a loss without touching a tensor

COMMUTATIVE = frozenset({"Add", "Mul"})
ODD = frozenset({"Tanh", "Log", "Sqrt", "MeanNHW", "MeanC"})  # f(-x) = -f(x)
EVEN = frozenset({"Abs", "Square"})  # f(-x) = f(x)
NEVER_NEGATIVE = frozenset({"Abs", "Square", "Exp"})
OTHER_POOL = {"MaxPool3": "MinPool3", "MinPool3": "MaxPool3"}
LINEAR = frozenset({"Add", "Neg", "MeanNHW", "MeanC"})


def uniform(expr: Expr, mean: str | None) -> bool:
    """Whether `expr` is constant along the dimensions that `mean` averages over (MeanNHW, MeanC; None: along all)."""
    op, args = expr
    if op == mean:
        return True
    for arg in args:  # a loop, for speed: most end at the first leaf
        if not uniform(arg, mean):
            return False
    return bool(args) or op == "1"


def constant(expr: Expr) -> float | None:
    """The value of a tree over `1` alone; None if it has any other leaf. 0 means 0 in float32, too."""
    return value_of_constant(expr) or value_of_constant(expr, torch.float32) if uniform(expr, None) else None


@lru_cache(maxsize=1 << 12)
def value_of_constant(expr: Expr, dtype: torch.dtype = torch.float64) -> float:
    args = [torch.full((1, 1, 1, 1), value_of_constant(arg, dtype), dtype=dtype) for arg in expr.args]
    return apply(expr.op, args, None).item() if args else 1.0


def canonical(expr: Expr) -> Expr:
    """One representative of all trees that are the same loss by the laws below: the key of every cache.

    Commutative order, signs pulled out of odd functions and dropped in even ones, double negation, neutral elements,
    constants worth 0, 1 or -1, means and pools of what they leave unchanged, and means right below the final reduction.
    The value changes by rounding in the last place at most; associativity, which rounds sums anew, is left alone.
    """
    expr = simplify(expr)
    while (bare := strip_means(expr)) != expr:
        expr = simplify(bare)
    return expr


def strip_means(expr: Expr) -> Expr:
    """The loss without means next to its final reduction: the mean over N, H, W, and C times the mean over C.

    What is constant along C adds up to C times itself there, so a MeanC changes nothing either.
    """
    if expr.op in ("MeanNHW", "MeanC"):
        return strip_means(expr.args[0])
    if expr.op in ("Add", "Neg"):
        return Expr(expr.op, tuple(map(strip_means, expr.args)))
    return expr


@lru_cache(maxsize=1 << 13)  # a few megabytes; what a search looks at shares most subtrees with what it has just seen
def simplify(expr: Expr) -> Expr:
    return combine(expr.op, *map(simplify, expr.args)) if expr.args else expr


def combine(op: str, *args: Expr) -> Expr:
    """The simple form of an operator with simple operands."""
    x, z = args[0], args[-1]
    if uniform(x, None) and uniform(z, None):
        value = value_of_constant(Expr(op, args))
        if value in (0.0, 1.0, -1.0) and value == value_of_constant(Expr(op, args), torch.float32):
            return {0.0: ZERO, 1.0: ONE, -1.0: Expr("Neg", (ONE,))}[value]

    minus = x.op == "Neg", z.op == "Neg"
    if True in minus:
        bare = [arg.args[0] if arg.op == "Neg" else arg for arg in args]
        if op == "Neg":
            return bare[0]
        if op == "Mul":
            product = combine("Mul", *bare)
            return product if all(minus) else combine("Neg", product)
        if op in EVEN:
            return combine(op, *bare)
        if op in ODD or (op == "Add" and all(minus)):
            return combine("Neg", combine(op, *bare))
        if op in OTHER_POOL:
            return combine("Neg", combine(OTHER_POOL[op], *bare))

    if op == "Mul" and ONE in args:
        return z if x == ONE else x
    if op == "Add" and ZERO in args:
        return z if x == ZERO else x
    if op in COMMUTATIVE:
        return Expr(op, args if x <= z else (z, x))
    if op in EVEN and x.op == "Abs":
        return combine(op, *x.args)
    if op == "Abs" and x.op in NEVER_NEGATIVE:
        return x
    if op in ("MeanNHW", "MaxPool3", "MinPool3") and uniform(x, "MeanNHW"):
        return x
    if op == "MeanC" and uniform(x, "MeanC"):
        return x
    if op == "MeanNHW" and x.op == "MeanC":
        return combine("MeanC", combine("MeanNHW", *x.args))
    return Expr(op, args)


def is_dead(expr: Expr) -> bool:
    """Whether the loss provably has no gradient towards the prediction, or one that does not know the target.

    The loss is split into the terms that its linear operators add up; each term's gradient is its own. A term without
    prediction has none, and a term without target gives a gradient without target: only a term with both can teach.
    """

    def terms(node: Expr):
        factors = [constant(arg) for arg in node.args] if node.op == "Mul" else []
        if node.op in LINEAR or any(factor is not None for factor in factors):
            for arg in node.args if 0.0 not in factors else ():
                yield from terms(arg)
        else:
            yield leaves_of(node)

    return not any(known & KNOWS_PREDICTION and known & KNOWS_TARGET for known in terms(expr))
