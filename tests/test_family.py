"""The scripts side by side: what a reader learns in one holds in the others, and a diff shows the tasks alone."""

import ast
import copy
import importlib
import itertools
import re
import sys
from pathlib import Path

import pytest
import torch

import evolve
from data import shapes

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in REPOSITORY.glob("search_*.py"))
READERS = ["data/pictures", "data/masks", "data/layouts", "data/coco"]
PAIRS = list(itertools.combinations(SCRIPTS, 2))
BANNERS = ["Arguments", "Data", "Network", "Metric", "Losses", "Training", "Search", "Main"]
PACKAGES = {"torch", "torchvision", "numpy", "pycocotools", "cv2", "PIL"}
EVERYWHERE = (
    "Schedule parse_arguments check_arguments read_loss Split list_data read_data normalise build_model "
    "tree_loss export Batches make_optimizer batch_loss train_network test_network draw_predictions main"
).split()
COPIES = set(  # the same to the letter wherever they occur
    "Pictures map_pictures read_ahead rows_of batch_colour_jitter normalise conv resnet ranks_within best_first match "
    "accumulate train_network".split()
)
# Flags whose help goes on with what the task has to offer; up to there it is the same.
OWN_ENDING = {"metric", "loss", "compare", "data", "model", "proxy_steps", "retrain_steps", "batch", "lr", "search"}
OWN_MEANING = {"crop"}  # a window of a picture, or a person


def text(name: str) -> str:
    return (REPOSITORY / f"{name}.py").read_text()


def definitions(name: str) -> dict[str, str]:
    """Functions and classes at the top level, in their order, with their source."""
    tree = ast.parse(text(name))
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: ast.get_source_segment(text(name), node) for node in tree.body if isinstance(node, kinds)}


def imports(name: str) -> set[str]:
    """The modules that a file names, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(text(name))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def flags(name: str, monkeypatch) -> dict:
    """The flags of a script by name, in their order."""

    class Seen(Exception):
        pass

    def stop(parser, argv):
        raise Seen(parser)

    with monkeypatch.context() as patch:
        patch.setattr(evolve.Parser, "parse_args", stop)
        with pytest.raises(Seen) as seen:
            importlib.import_module(name).parse_arguments([])
    (parser,) = seen.value.args
    return {action.dest: action for action in parser._actions}


def describe(action, own_ending: bool) -> tuple:
    """All that a user sees of a flag and can expect of it."""
    kind = getattr(action.type, "__qualname__", None)
    about = re.split(r"[:;,(]", action.help)[0].strip() if own_ending else action.help
    default = None if action.dest in ("metric", "minutes") else action.default
    return action.option_strings, type(action).__name__, kind, action.nargs, action.metavar, default, about


def test_there_is_a_family():
    assert {"search_seg", "search_pose"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_banners(name):
    found = re.findall(r"^# ={20,}\n# (\w+)", text(name), re.M)
    assert found == BANNERS


@pytest.mark.parametrize("name", ["loss_ops", "evolve", *SCRIPTS, *READERS, "data/shapes"])
def test_import_law(name):
    readers = {"evolve", "data"}
    ours = {"search": {"evolve", "loss_ops", "data"}, "evolve": {"loss_ops"}} | dict.fromkeys(READERS, readers)
    more = {"torch"} if name == "loss_ops" else PACKAGES
    found = imports(name) - set(sys.stdlib_module_names)
    assert found <= ours.get(name.partition("_")[0], set()) | more, "no script imports another"


@pytest.mark.parametrize("name", SCRIPTS)
def test_opening(name):
    """What it is, commands to copy that begin with its own, the paper, and what the file holds."""
    opening = ast.get_docstring(ast.parse(text(name)))
    commands = re.findall(r"^    python (search_\w+)\.py --(metric|compare) ", opening, re.M)
    assert len(commands) >= 4 and {script for script, _ in commands} == {name} and commands[0][1] == "metric"
    assert "tensorboard --logdir runs" in opening and "arXiv 2103.14026 (marks [P])" in opening
    assert "The whole task is in this file but for what data/ reads: arguments, data, networks, metric" in opening


@pytest.mark.parametrize("one, other", PAIRS)
def test_shared_flags(one, other, monkeypatch):
    mine, theirs = flags(one, monkeypatch), flags(other, monkeypatch)
    shared = [name for name in mine if name in theirs]
    assert shared == [name for name in theirs if name in mine], "in the same order"
    assert {"metric", "loss", "compare", "data", "data_root", "model", "proxy_steps", "device", "resume"} <= set(shared)
    for name in shared:
        if name not in OWN_MEANING:
            assert describe(mine[name], name in OWN_ENDING) == describe(theirs[name], name in OWN_ENDING), name


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_has_a_sentence_and_a_reader(name, monkeypatch):
    code = text(name) + text("evolve")
    for dest, action in flags(name, monkeypatch).items():
        assert action.help and action.help[0].islower() or dest == "pretrained", dest
        assert dest == "help" or re.search(rf"args\.{dest}\b", code), f"nothing reads --{dest}"


@pytest.mark.parametrize("one, other", PAIRS)
def test_definitions_stand_in_the_same_order(one, other):
    mine, theirs = definitions(one), definitions(other)
    assert set(EVERYWHERE) <= set(mine) & set(theirs)
    assert [name for name in mine if name in EVERYWHERE] == [name for name in theirs if name in EVERYWHERE]
    for name in COPIES & set(mine) & set(theirs):
        assert mine[name] == theirs[name], name


@pytest.mark.parametrize("one, other", PAIRS)
def test_main_has_one_shape(one, other):
    """The same statements, but for the task."""
    shapes = []
    for name in (one, other):
        (main,) = ast.parse(definitions(name)["main"]).body
        statements = [ast.unparse(statement) for statement in main.body]
        shapes.append([re.sub(r"\w+Task", "Task", line) for line in statements])
    assert shapes[0] == shapes[1]


TASKS = [("search_seg", "SegTask"), ("search_det", "DetTask"), ("search_pose", "PoseTask")]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return shapes.write_shapes(tmp_path_factory.mktemp("data") / "shapes", splits={"train": 20, "val": 6, "test": 6})


def loaded(name, task, root, *argv):
    script = importlib.import_module(name)
    args = script.parse_arguments(["--data-root", str(root), "--device", "cpu", *argv])
    task = getattr(script, task)(args)
    task.load()
    return script, task


@pytest.mark.parametrize("name, task", TASKS)
def test_base_and_re_trainings_have_their_steps(name, task, root, monkeypatch):
    (script, task), steps = loaded(name, task, root, "--retrain-steps", "40"), []
    monkeypatch.setattr(script, "train_network", lambda net, losses, data, plan, **_: steps.append(plan.steps) or [])
    monkeypatch.setattr(type(task), "test", lambda self, *_: {})
    task.retrain(script.BASELINE, 0)
    task.proxy = task.proxy._replace(base=(30,), base_of=50)
    task.train_base()
    assert steps == [40, 50] and not task.whole


@pytest.mark.parametrize("name, task", TASKS)
def test_a_shorter_proxy_has_shorter_bases(name, task, root):
    own = next(iter(importlib.import_module(name).PROXY.values()))
    for steps, share in ((own.steps // 2, 0.5), (4 * own.steps, 1)):
        _, other = loaded(name, task, root, "--proxy-steps", str(steps))
        assert other.proxy.steps == steps and other.proxy.base == tuple(round(share * base) for base in own.base)
        assert other.proxy.base_of == round(share * own.base_of), "and they come from a shorter training"


@pytest.mark.parametrize("last", [4, 6])
@pytest.mark.parametrize("name, task", TASKS)
def test_proxies_go_on_from_each_base(name, task, last, root, tmp_path, monkeypatch):
    """From what the baseline has trained for so many steps of a training of six, the last one included."""
    script, task = loaded(name, task, root, "--batch", "4")
    task.proxy = task.proxy._replace(base=(2, last), base_of=6, steps=3)
    task.prepare(tmp_path / "base.pt")
    assert task.bases == 2 and all(
        len(b.prediction) <= len(getattr(script, "STATES", "1")) for b in task.branches.values()
    )
    plan, seed, began = task.proxy._replace(steps=6), task.args.seed, []

    def keep(net, *what, **how):
        began.append(copy.deepcopy(net.state_dict()))
        return []

    with monkeypatch.context() as patch:
        patch.setattr(script, "train_network", keep)
        for base in (0, 1):
            task.train(script.BASELINE, base)
    for weights, steps in zip(began, (2, last)):
        net, named = task.network(plan, seed), [script.BASELINE] * (name == "search_seg")
        loss = task.losses(script.BASELINE) if name == "search_det" else script.LOSSES[script.BASELINE]
        script.train_network(net, loss, itertools.islice(task.batches(*named, plan, 500 + seed), steps), plan)
        assert all(torch.equal(weights[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize("one, other", PAIRS)
def test_tasks_have_their_methods_in_one_order(one, other):
    def methods(name: str) -> list[str]:
        (task,) = (node for node in ast.parse(text(name)).body if getattr(node, "name", "").endswith("Task"))
        return [node.name for node in task.body if isinstance(node, ast.FunctionDef)]

    common = {*methods(one)} & {*methods(other)}
    assert len(common) > 10
    assert [name for name in methods(one) if name in common] == [name for name in methods(other) if name in common]
