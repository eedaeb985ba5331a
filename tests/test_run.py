"""The real command: files, table, TensorBoard, resume after kills, workers, and what wrong input is told."""

import contextlib
import errno
import functools
import importlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import damaged, journal, ready, records, refusals, refused

import evolve
import search_seg
from data import shapes
from loss_ops import parse

REPOSITORY = Path(__file__).parent.parent
GLOSSARY = (REPOSITORY / "tests/RESULTS.md").read_text().split("## TensorBoard")[1].split("\n## ")[0]
FINISHED = ("--metric", "macc", "--evals", "6", "--seed", "3", "--workers", "1", "--seeds", "2")
SMALL = ("--proxy-steps", "3", "--retrain-steps", "3", "--batch", "4", "--device", "cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return shapes.write_shapes(tmp_path_factory.mktemp("data") / "shapes", splits={"train": 40, "val": 10, "test": 10})


def command(root, runs, *argv):
    return [sys.executable, "search_seg.py", "--data-root", str(root), "--runs", str(runs), *SMALL, *argv]


def call(root, runs, *argv, **options):
    options = {"cwd": REPOSITORY, "capture_output": True, "text": True, "timeout": 300} | options
    return subprocess.run(command(root, runs, *argv), **options)


@contextlib.contextmanager
def started(root, runs, *argv, resume=None):
    """A command that runs beside the test: the process, and what it has printed so far. Ends with the test."""
    out = runs.parent / f"out-{resume is not None}"
    again = [sys.executable, "search_seg.py", "--resume", str(resume), *argv]
    line = again if resume else command(root, runs, *argv)
    with out.open("w") as file:
        process = subprocess.Popen(line, cwd=REPOSITORY, stdout=file, stderr=file)
    try:
        yield process, out.read_text
    finally:
        for pid in [*children_of(process), process.pid] if process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        process.wait()


def children_of(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_until(true, process=None, printed=str):
    """Until `true()`; fails if the process ends before, or after minutes."""
    start = time.time()
    while not true():
        assert process is None or process.poll() is None, printed()
        assert time.time() < start + 280, printed()
        time.sleep(0.02)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """One finished run: its directory and what it printed."""
    runs = tmp_path_factory.mktemp("runs")
    done = call(root, runs, *FINISHED)
    assert done.returncode == 0, done.stderr
    (directory,) = runs.iterdir()
    return directory, done.stdout


def test_run_writes_what_it_promises(finished):
    directory, printed = finished
    assert re.match(r"seg_macc_shapes_3_\d{8}-\d{6}$", directory.name)
    assert len(re.findall(r"^eval +\d+/6  macc ", printed, re.M)) == 6
    assert ">>>>" in printed and str(directory) in printed
    assert printed.count("training the base network: 15 steps of ce\n") == 1
    result = json.loads((directory / "result.json").read_text())
    told = "task metric losses explored evaluated gates seconds whole_schedule test difference"
    assert set(result) == set(told.split())
    assert (result["task"], result["metric"], result["evaluated"]) == ("seg", "macc", 6)
    assert set(result["gates"]) == {*evolve.TREE_GATES, "surrogate", "invalid"}
    assert result["whole_schedule"] is False and "2 fresh seeds, shortened schedule" in printed
    assert set(result["difference"]) == set(search_seg.METRICS)
    assert re.search(r"(ahead of|nothing better than) ce\b.*: macc [+-]\d\.\d+ \(\d", printed), "in plain words"
    for side in ("found", "baseline"):
        assert set(result["test"][side]) == set(search_seg.METRICS)
        assert all(len(values) == 2 for values in result["test"][side].values())
    about = json.loads((directory / "args.json").read_text())
    assert about["arguments"]["seed"] == 3 and about["versions"]["torch"] == torch.__version__
    rows = (directory / "hall_of_fame.csv").read_text().splitlines()
    assert rows[0].startswith("rank,proxy_macc") and 2 <= len(rows) <= 7


@pytest.mark.parametrize("workers", [1, 3])
def test_out_of_memory_has_cures(capsys, workers):
    def full(args):
        raise MemoryError("no room")

    with pytest.raises(SystemExit) as stop:
        evolve.main(search_seg.parse_arguments(["--device", "cpu", "--workers", str(workers)]), full)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: --device cpu: out of memory") and "batch" in error
    assert ("fewer --workers" in error) == (workers > 1)


def test_a_full_disk_is_one_line_also_where_nobody_says_which_file(capsys):
    def full(args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SystemExit) as stop:
        evolve.main(search_seg.parse_arguments(["--device", "cpu", "--runs", "somewhere"]), full)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: somewhere: No space left on device; ")


def test_a_folder_that_tensorboard_cannot_name_is_refused(monkeypatch, capsys):
    error = refused(search_seg, monkeypatch, capsys, "--runs", os.fsdecode(b"sur-\xfc"))
    assert error.startswith("error: --runs sur-") and "UTF-8" in error


def test_found_loss_stands_alone(finished, tmp_path):
    directory, _ = finished
    shutil.copy(directory / "best_loss.py", tmp_path)
    code = (
        "import torch; from best_loss import loss;"
        "x = torch.randn(2, 7, 8, 8, requires_grad=True); y = torch.randint(0, 7, (2, 8, 8)); y[0, 0] = 255;"
        "loss(x, y).backward(); assert x.grad.isfinite().all() and x.grad.any() and not x.grad[0, :, 0].any()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={"OMP_NUM_THREADS": "1"})


def test_tensorboard_shows_what_the_glossary_explains(root, tmp_path, monkeypatch, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(evolve.Task, "rungs", ((2, 1),))
    for name, value in {"INITIAL": 3, "POOL": 5, "ATTEMPTS": 100}.items():
        monkeypatch.setattr(evolve, name, value)
    flags = ["--data-root", str(root), "--runs", str(tmp_path), *SMALL, "--metric", "macc", "--evals", "7"]
    monkeypatch.setattr(sys, "argv", ["search_seg.py", *flags, "--workers", "1", "--seeds", "1"])
    search_seg.main()
    (directory,) = tmp_path.iterdir()
    events = EventAccumulator(str(directory), size_guidance={"images": 0, "scalars": 0, "tensors": 0}).Reload()
    kinds = events.Tags()
    tags = {tag.removesuffix("/text_summary") for kind in ("scalars", "images", "tensors") for tag in kinds[kind]}
    tags = {re.sub(r"proxy_curve/\d+", "proxy_curve/<n>", tag) for tag in tags}
    explained = {tag for tag in re.findall(r"^\| `([^`]+)` \|", GLOSSARY, re.M)}
    assert {tag for tag in tags if not tag.startswith("_hparams_")} <= explained
    elsewhere = ("asl/", "retrain/", "gates/rising", "gates/simulation", "search/witness")
    assert {tag for tag in explained if not tag.startswith(elsewhere)} <= tags
    best = [event.value for event in events.Scalars("found/best")]
    assert best == sorted(best)
    assert best[-1] == pytest.approx(max(line["score"] or 0 for line in journal(directory)), abs=1e-6)
    assert len(events.Scalars("search/score")) == sum(line["score"] is not None for line in journal(directory))
    result = json.loads((directory / "result.json").read_text())
    test = result["test"]
    for tag, column in (("found/test", "found"), ("found/test_baseline", "baseline")):
        assert events.Scalars(tag)[0].value == pytest.approx(statistics.fmean(test[column]["macc"]), abs=1e-6)
    *_, formula = events.Tensors("found/formula/text_summary")
    assert f"`{result['losses']['loss']}`".encode() in formula.tensor_proto.string_val[0]
    (table,) = events.Tensors("found/closing_table/text_summary")
    (text,) = table.tensor_proto.string_val
    assert f"| ce | {100 * test['baseline']['miou'][0]:.1f}".encode() in text and b"| found |" in text


def test_same_seed_same_journal_across_a_kill(root, finished, tmp_path):
    with started(root, tmp_path / "runs", *FINISHED) as (process, printed):
        wait_until(lambda: "eval   3/6" in printed(), process, printed)
        process.send_signal(signal.SIGKILL)
        process.wait()
    (directory,) = (tmp_path / "runs").iterdir()
    assert 3 <= len(journal(directory)) < 6
    resume = [sys.executable, "search_seg.py", "--resume", str(directory)]  # all else is known to the run
    done = subprocess.run(resume, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert records(directory) == records(finished[0])
    results = [json.loads((path / "result.json").read_text()) for path in (directory, finished[0])]
    assert results[0]["test"] == results[1]["test"]


def test_interrupt_says_how_to_go_on(root, tmp_path):
    with started(root, tmp_path / "runs", "--evals", "500", "--workers", "1") as (process, printed):
        wait_until(lambda: "eval   2/500" in printed(), process, printed)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
    (directory,) = (tmp_path / "runs").iterdir()
    assert f"--resume {directory}" in printed() and "Traceback" not in printed()
    assert (directory / "best_loss.py").exists() and len(journal(directory)) >= 2


@pytest.mark.parametrize("metric", ["miou", "bf1"])
def test_losses_that_searches_have_fallen_for_are_unstable(root, tmp_path, metric):
    """Two never learn from some random weights, one collapses late, see tests/RESULTS.md."""
    flags = ["--data-root", str(root), "--runs", str(tmp_path), *SMALL, "--metric", metric]
    branch = ready(search_seg.SegTask(search_seg.parse_arguments(flags))).branches["loss"]
    wrong, sure = (branch.score(x, branch.target).nanmean() for x in (branch.wrong, branch.sure))
    assert wrong < 0.2 < 0.9 < sure
    assert branch.wrong.softmax(-3).max() == pytest.approx(0.961, abs=0.001)
    results = (Path(__file__).parent / "RESULTS.md").read_text()
    for start in ("Inv(Tanh(Mul(Add(Add(Sqrt", "Neg(MinPool3(Mul(Add(Add(Exp", "Inv(Add(MinPool3(y), Mul(Abs(Inv(Log"):
        (text,) = re.findall(rf"`({re.escape(start)}.*?)`", results)
        assert not evolve.is_stable(branch, parse(text)), text
    for text in search_seg.KNOWN:
        assert evolve.is_stable(branch, parse(text)), text


def test_a_further_metric(root, tmp_path, monkeypatch, capsys):
    """It needs a name and a value; Auto Seg-Loss, which has no curves for it, says so."""
    names, compute = (*search_seg.METRICS, "worst"), search_seg.SegMetrics.compute

    def with_worst(metrics):
        confusion = metrics.confusion.double()
        accuracy = confusion.diagonal(dim1=1, dim2=2) / confusion.sum(2)
        return compute(metrics) | {"worst": accuracy.nan_to_num(1).amin(1)}

    monkeypatch.setattr(search_seg, "METRICS", names)
    monkeypatch.setattr(search_seg.SegTask, "metrics", names)
    monkeypatch.setattr(search_seg.SegMetrics, "compute", with_worst)
    flags = ["--data-root", str(root), "--runs", str(tmp_path), *SMALL, "--metric", "worst"]
    task = ready(search_seg.SegTask(search_seg.parse_arguments(flags)))
    assert 0 < task.branches["loss"].eta <= 0.1
    scores = task.proxy_scores({"loss": parse("Neg(Mul(y, Log(p)))")})
    assert 0 <= task.train("ce") <= 1 and 0 <= scores["worst"] <= scores["macc"] and scores.keys() == {*names}
    for argv in (["--search", "asl"], ["--loss", "asl"], ["--compare", "ce,asl"]):
        assert "--metric worst: Auto Seg-Loss has no surrogate of it" in bad(monkeypatch, capsys, *flags, *argv)


def test_termination_ends_all_workers(root, tmp_path):
    with started(root, tmp_path / "runs", "--evals", "500", "--workers", "2") as (process, printed):
        wait_until(lambda: "eval   1/500" in printed(), process, printed)
        workers = children_of(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
        wait_until(lambda: not any(map(alive, workers)))
    (directory,) = (tmp_path / "runs").iterdir()
    last = printed().strip().splitlines()[-1]
    assert last == f"interrupted; go on with: python search_seg.py --resume {directory}"
    assert len(workers) == 2 and "Traceback" not in printed() and "warning" not in printed()


@pytest.mark.parametrize("moment", ["starting 2 workers", "eval   1/500"])
def test_workers_end_when_their_launcher_is_killed(root, tmp_path, moment):
    with started(root, tmp_path / "runs", "--evals", "500", "--workers", "2") as (process, printed):
        wait_until(lambda: moment in printed() and len(children_of(process)) == 2, process, printed)
        workers = children_of(process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        try:
            wait_until(lambda: not any(map(alive, workers)))
        finally:
            for pid in filter(alive, workers):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_the_run_goes_on_when_a_worker_dies_or_hangs(root, tmp_path, blow):
    with started(root, tmp_path / "runs", "--evals", "16", "--workers", "2", "--seeds", "1") as (process, printed):
        wait_until(lambda: "eval   4/16" in printed(), process, printed)
        workers = children_of(process)
        os.kill(workers[0], blow)
        assert process.wait(280) == 0, printed()
        wait_until(lambda: not any(map(alive, workers)))
    (directory,) = (tmp_path / "runs").iterdir()
    lines = journal(directory)
    assert 16 <= len(lines) <= 17 and (directory / "result.json").exists(), "the survivor went on to the end"
    warnings = [line for line in printed().splitlines() if line.startswith("warning")]
    named = f"warning: worker {workers[0]} ended by signal 9; the others go on, its training is lost"
    assert warnings == [named] * (blow == signal.SIGKILL)


def test_who_resumes_a_running_search_joins_it(root, tmp_path):
    flags = ("--evals", "14", "--workers", "1", "--seeds", "1")
    with started(root, tmp_path / "runs", *flags) as (first, printed):
        wait_until(lambda: "eval   2/14" in printed(), first, printed)
        (directory,) = (tmp_path / "runs").iterdir()
        first.send_signal(signal.SIGSTOP)  # until the other one is there
        with started(root, tmp_path / "runs", resume=directory) as (second, answer):
            other = directory / "journal-1.jsonl"
            wait_until(lambda: other.exists() and other.read_bytes().count(b"\n") >= 2, second, answer)
            first.send_signal(signal.SIGCONT)
            assert first.wait(280) == 0 == second.wait(280), printed() + answer()
    assert "another worker" in answer() and "eval" not in answer(), "whoever started it reports"
    assert len(re.findall(r"^eval +\d+/14  ", printed(), re.M)) == len(journal(directory)) in (14, 15)
    assert {line["worker"] for line in journal(directory)} == {0, 1}
    assert json.loads((directory / "result.json").read_text())["evaluated"] == len(journal(directory))


def test_who_joins_with_a_larger_budget_is_waited_for_in_the_closing_round(root, tmp_path):
    flags = ("--retrain-steps", "100", "--evals", "4", "--workers", "1", "--seeds", "1")
    with started(root, tmp_path / "runs", *flags) as (first, printed):
        wait_until(lambda: "re-training" in printed(), first, printed)
        (directory,) = (tmp_path / "runs").iterdir()
        with started(root, tmp_path / "runs", "--evals", "8", resume=directory) as (second, answer):
            assert first.wait(280) == 0 == second.wait(280), printed() + answer()
    result = json.loads((directory / "result.json").read_text())
    assert result["evaluated"] == len(journal(directory)) == 8 and "trained 8;" in printed()


def test_who_outlives_the_one_that_reports_does_so(root, tmp_path):
    flags = ("--evals", "14", "--workers", "1", "--seeds", "1")
    with started(root, tmp_path / "runs", *flags) as (first, printed):
        wait_until(lambda: "eval   2/14" in printed(), first, printed)
        (directory,) = (tmp_path / "runs").iterdir()
        with started(root, tmp_path / "runs", resume=directory) as (second, answer):
            other = directory / "journal-1.jsonl"
            wait_until(lambda: other.exists() and other.read_bytes().count(b"\n") >= 2, second, answer)
            first.kill()
            assert second.wait(280) == 0, answer()
    assert ">>>>" in answer() and json.loads((directory / "result.json").read_text())["evaluated"] >= 14


def test_a_finished_run_of_two_workers_goes_on_with_a_larger_budget(root, tmp_path):
    done = call(root, tmp_path / "runs", "--evals", "4", "--workers", "2", "--seeds", "1")
    (directory,) = (tmp_path / "runs").iterdir()
    assert done.returncode == 0 and len(journal(directory)) in (4, 5), done.stderr
    for evals in ("8", "8"):
        again = [sys.executable, "search_seg.py", "--resume", str(directory), "--evals", evals]
        done = subprocess.run(again, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
        number = len(journal(directory))
        assert done.returncode == 0 and number in (8, 9) and f"trained {number};" in done.stdout, done.stderr


def test_torchrun_enters_the_same_way(root, tmp_path):
    flags = ["--data-root", str(root), "--runs", str(tmp_path / "runs"), *SMALL, "--evals", "8", "--seeds", "1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*launcher, "search_seg.py", *flags], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (directory,) = (tmp_path / "runs").iterdir()
    lines = journal(directory)
    assert 8 <= len(lines) <= 9 and {line["worker"] for line in lines} == {0, 1}
    assert (directory / "result.json").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--search", "naive", "--evals", "25"],
        ["--search", "random", "--evals", "2"],
        ["--search", "cse", "--evals", "2"],
        ["--search", "cse-rand", "--evals", "1"],
        ["--search", "aml", "--evals", "25"],
        ["--without", "dead,gradient", "--evals", "2"],
    ],
)
def test_other_searches(root, tmp_path, monkeypatch, capsys, flags):
    common = ["--data-root", str(root), "--runs", str(tmp_path), *SMALL, "--seeds", "1", "--workers", "1"]
    monkeypatch.setattr(sys, "argv", ["search_seg.py", *common, *flags])
    search_seg.main()
    (directory,) = tmp_path.iterdir()
    lines = journal(directory)
    assert len(lines) == int(flags[-1])
    if "naive" in flags or "aml" in flags:
        gates = json.loads((directory / "result.json").read_text())["gates"]
        assert gates["invalid"] > 0 and gates.keys() == {"invalid"}, "most random trees cannot even be trained with"
        assert any(line["parent"] for line in lines)


def test_search_of_auto_seg_loss(root, tmp_path, monkeypatch, capsys):
    """Rounds are learned from, a resume goes on exactly, and the found parameters can be taken away in three ways."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(search_seg.AslSearch, "ROUND", 3)
    common = ["--data-root", str(root), *SMALL, "--workers", "1", "--seeds", "1"]

    def begin(runs, *flags):
        monkeypatch.setattr(sys, "argv", ["search_seg.py", *common, "--runs", str(tmp_path / runs), *flags])
        search_seg.main()
        (directory,) = (tmp_path / runs).iterdir()
        return directory

    whole = begin("whole", "--search", "asl", "--metric", "bf1", "--evals", "8")
    part = begin("part", "--search", "asl", "--metric", "bf1", "--evals", "4")
    begin("part", "--resume", str(part), "--evals", "8")
    assert journal(part) == journal(whole) and len(journal(whole)) == 8
    means = [line["mu"] for line in journal(whole)]
    assert means[0] == means[2] == [0.5] * 8, "the identity"
    assert means[2] != means[3] == means[5] != means[6]

    found = json.loads((whole / "result.json").read_text())["losses"]["loss"]
    assert found.startswith("asl(bf1: ") and found in (whole / "hall_of_fame.csv").read_text()
    capsys.readouterr()
    flags = ["--runs", str(tmp_path / "table"), "--compare", f"{whole},{found},asl", "--metric", "bf1"]
    monkeypatch.setattr(sys, "argv", ["search_seg.py", *common, *flags])
    search_seg.main()
    rows = [line.split(" | ")[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[1] == rows[2] != rows[3]

    events = EventAccumulator(str(whole)).Reload()
    assert len(events.Images("asl/curves")) == 2
    assert [event.step for event in events.Scalars("asl/mu_7")] == [1, 2]
    assert "| `asl/curves` |" in GLOSSARY and "| `asl/mu_<k>` |" in GLOSSARY

    logits, label = torch.randn(2, 7, 8, 8), torch.randint(0, 7, (2, 8, 8))
    label[0, 0] = 255
    torch.save((logits, label, search_seg.Asl.read(found)(logits, label)), tmp_path / "numbers")
    code = (
        "import torch; from best_loss import loss; x, y, value = torch.load('numbers');"
        "x.requires_grad_(); z = loss(x, y); z.backward(); assert z == value and x.grad.isfinite().all()"
    )
    shutil.copy(whole / "best_loss.py", tmp_path)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("loss", ["dice", "Neg(Mul(y, Log(p)))", "RUN_DIR"])
def test_one_loss_instead_of_a_search(root, finished, tmp_path, capsys, monkeypatch, loss):
    loss = str(finished[0]) if loss == "RUN_DIR" else loss
    flags = ["--data-root", str(root), "--runs", str(tmp_path), *SMALL]
    flags += ["--loss", loss, "--seeds", "2", "--metric", "bf1"]
    monkeypatch.setattr(sys, "argv", ["search_seg.py", *flags])
    search_seg.main()
    printed = capsys.readouterr().out
    assert ">>>>  bf1" in printed and printed.count("+-") == 6
    (directory,) = tmp_path.iterdir()
    state = torch.load(directory / "training_0_1.pt", weights_only=True)
    search_seg.build_model("small", 7).load_state_dict(state["parts"][0])


def test_one_training_goes_on_where_it_was_stopped(root, tmp_path, monkeypatch, capsys):
    common = ["search_seg.py", "--data-root", str(root), *SMALL, "--retrain-steps", "7", "--checkpoint-steps", "2"]

    def start(*flags):
        monkeypatch.setattr(sys, "argv", [*common, *flags])
        search_seg.main()

    def results(runs):
        (log,) = runs.glob("*/retrain.jsonl")
        return [{**json.loads(line), "seconds": 0} for line in log.read_text().splitlines()]

    flags = ["--compare", "ce,wce", "--seeds", "2", "--runs"]
    start(*flags, str(tmp_path / "whole"))
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    save, saved = evolve.Checkpoint.save, []

    def save_and_stop(self, *args):
        save(self, *args)
        saved.append(self.path.name)
        if saved.count("training_1_0.pt") == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evolve.Checkpoint, "save", save_and_stop)
        with pytest.raises(SystemExit) as stop:
            start(*flags, str(tmp_path / "part"))
    (directory,) = (tmp_path / "part").iterdir()
    assert stop.value.code == 130 and f"--resume {directory}" in capsys.readouterr().out
    assert len(results(tmp_path / "part")) == 2 and (directory / "training_1_0.pt").exists()
    with monkeypatch.context() as patch:
        patch.setattr(evolve.Checkpoint, "save", lambda self, steps, *rest: saved.append((self.path.stem, steps)))
        start("--resume", str(directory))
    assert saved[-6:] == [("training_1_0", 6), ("training_1_0", 7)] + [("training_1_1", k) for k in (2, 4, 6, 7)]
    assert results(tmp_path / "part") == results(tmp_path / "whole")
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")] == table
    assert not list(directory.glob("*.pt")), "of a comparison no networks are kept"


def test_several_processes_share_one_training(root, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    flags = ["--data-root", str(root), "--runs", str(tmp_path), *SMALL, "--loss", "dice", "--seeds", "1"]
    done = subprocess.run(
        [*launcher, "search_seg.py", *flags], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("dice, seed 0: miou") == 1 == done.stdout.count(">>>>"), "one of them speaks"
    (directory,) = tmp_path.iterdir()
    assert len((directory / "retrain.jsonl").read_text().splitlines()) == 1
    state = torch.load(directory / "training_0_0.pt", weights_only=True)
    assert state["steps"] == 3
    orders = [order for order, _ in state["generators"]]
    assert len(orders) == 2 and not torch.equal(*orders), "each draws pictures of its own"


SHARED = """
import math, torch, torch.distributed as dist, search_seg
dist.init_process_group("gloo")
rank = dist.get_rank()
images = torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(rank))
data = [(x, torch.randint(0, 7, (4, 16, 16), generator=torch.Generator().manual_seed(rank))) for x in images]
torch.manual_seed(0)
net, plan = search_seg.build_model("small", 7), search_seg.PROXY["shapes"]._replace(steps=2)
search_seg.train_network(net, search_seg.ce, data, plan)
weights = [None, None]
dist.all_gather_object(weights, torch.cat([w.detach().flatten() for w in net.parameters()]))
assert torch.equal(*weights), "the processes have drifted apart"
try:
    search_seg.train_network(net, lambda x, y: search_seg.ce(x, y) + (math.inf if rank else 0), data, plan)
except search_seg.InvalidLoss:
    print("stopped", flush=True)
dist.destroy_process_group()
"""


def test_processes_keep_the_same_weights_and_stop_together(tmp_path):
    (tmp_path / "shared.py").write_text(SHARED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 60, "env": environment}
    done = subprocess.run([*launcher, "shared.py"], **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stopped") == 2, "what one of them finds invalid ends the training of all"


def test_several_losses_side_by_side(root, finished, capsys, monkeypatch, tmp_path):
    listed = f"ce,wce,Mul(y, Exp(Neg(p))),{finished[0]}"
    flags = ["--data-root", str(root), "--runs", str(tmp_path), *SMALL, "--compare", listed, "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", ["search_seg.py", *flags])
    search_seg.main()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in table] == [
        "| loss",
        "| ce",
        "| wce",
        "| Mul(y, Exp(Neg(p)))",
        f"| {finished[0]}",
    ]
    assert all(float(row.split(" | ")[4].split()[0]) > 1 for row in table[1:]), "gacc is in percent"
    assert all(row.count("+-") == 6 for row in table[1:]) and len(set(table)) == 5


# Bad input: one line, the flag, the value, the cure; exit code 2; nothing written


bad = functools.partial(refused, search_seg)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--metric", "mIOU"], ["--metric", "mIOU", "miou fwiou macc gacc biou bf1"]),
        (["--loss", "Neg(Mul(y, Lg(p)))"], ["--loss", "position 11", "Log"]),
        (["--loss", "Neg(Mul(y, Log(p))"], ["--loss", "position 18", "expected ')'"]),
        (["--compare", "ce,focal"], ["--compare focal", "ce wce dice"]),
        (["--loss", "ce", "--compare", "dice"], ["--compare dice", "--loss"]),
        (["--loss", "focal"], ["--loss focal", "ce wce dice lovasz dpce ssim asl"]),
        (["--loss", "Add(i, u)"], ["--loss", "'i'", "y, p and 1"]),
        (["--loss", "Add(p, y)"], ["--loss", "cannot teach"]),
        (["--evals", "-3"], ["--evals", "-3", "at least 1"]),
        (["--evals", "many"], ["--evals", "many", "not a number"]),
        (["--minutes", "0"], ["--minutes", "0", "at least"]),
        (["--minutes", "nan"], ["--minutes", "nan", "at least"]),
        (["--workers", "-1"], ["--workers", "-1"]),
        (["--search", "grid"], ["--search", "grid", "evolve random naive cse cse-rand aml asl"]),
        (["--loss", "asl(miou: 0.1 0.2)"], ["--loss asl(miou: 0.1 0.2)", "12 numbers in 0..1, got 0.1 0.2"]),
        (["--loss", "asl(iou: 0.1)"], ["--loss asl(iou", "'iou' has no surrogate"]),
        (["--loss", "asl(macc: 0 0 0 0 0 x)"], ["--loss asl(macc", "'x'"]),
        (["--loss", "asl(macc: nan 0 0 0 0 0)"], ["--loss asl(macc", "6 numbers in 0..1", "got nan 0"]),
        (["--download"], ["--download", "VOC", "leave the flag out"]),
        (["--without", "dead,foo"], ["--without", "foo", "equivalent"]),
        (["--data", "coco"], ["--data", "coco", "shapes voc cityscapes"]),
        (["--data", "voc"], ["--data voc", "--data-root"]),
        (["--model", "resnet"], ["--model", "resnet", "small"]),
        (["--device", "tpu9"], ["--device tpu9", "cpu"]),
        (["--metrc", "miou"], ["--metrc", "--help"]),
        (["--metri", "miou", "--loss", "focal"], ["--metri", "--help"]),
    ],
)
def test_bad_flags(monkeypatch, capsys, argv, words):
    error = bad(monkeypatch, capsys, *argv)
    assert all(word in error for word in words), error


def test_bad_data(monkeypatch, capsys, tmp_path):
    missing = tmp_path / "nowhere"
    assert str(missing) in bad(monkeypatch, capsys, "--data", "voc", "--data-root", missing)
    (tmp_path / "JPEGImages").mkdir()
    assert str(tmp_path) in bad(monkeypatch, capsys, "--data-root", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["JPEGImages"]


def test_unreadable_picture_is_named_by_one_of_several_workers(root, tmp_path):
    broken = tmp_path / "shapes"
    shutil.copytree(root, broken)
    picture = next((broken / "JPEGImages").iterdir())
    picture.write_bytes(b"not a picture")
    done = call(broken, tmp_path / "runs", "--workers", "2")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert str(picture) in done.stderr and "not a readable image" in done.stderr
    assert not any((tmp_path / "runs").iterdir())


def test_bad_resume(monkeypatch, capsys, finished, tmp_path):
    assert "not a run directory" in bad(monkeypatch, capsys, "--resume", tmp_path)
    assert "not a run directory" in bad(monkeypatch, capsys, "--loss", tmp_path)
    (tmp_path / "args.json").write_text("{")
    assert "damaged" in bad(monkeypatch, capsys, "--resume", tmp_path)
    (tmp_path / "args.json").write_text(json.dumps({"task": "pose", "arguments": {}}))
    assert "search_pose.py" in bad(monkeypatch, capsys, "--resume", tmp_path)
    error = bad(monkeypatch, capsys, "--resume", finished[0], "--metric", "miou")
    assert "--metric miou" in error and "macc" in error
    assert "--pretrained True: the run was made with False" in bad(
        monkeypatch, capsys, "--resume", finished[0], "--pretrained"
    )
    error = bad(monkeypatch, capsys, "--resume", finished[0], "--without", "dead,seen")
    assert "--without dead,seen: the run was made with" in error
    other = search_seg.parse_arguments(["--resume", str(finished[0]), "--memory", "0.5", "--checkpoint-steps", "7"])
    assert (other.memory, other.checkpoint_steps) == (0.5, 7), "of this machine, not of the run"


def test_what_a_machine_decided_a_resume_decides_anew(monkeypatch, tmp_path):
    def parsed(*argv, cores):
        monkeypatch.setattr(evolve.os, "sched_getaffinity", lambda process: range(cores))
        monkeypatch.setattr(evolve, "machine_memory", lambda: 8.0 * cores)
        return search_seg.parse_arguments([*map(str, argv)])

    for given, here, elsewhere in (
        ((), (16, 16.0), (2, 2.0)),
        (("--workers", 0), (16, 16.0), (2, 2.0)),
        (("--workers", 3, "--memory", 5), (3, 5.0), (3, 5.0)),
    ):
        args = parsed(*given, "--device", "cpu", "--runs", tmp_path, cores=16)
        assert (args.workers, args.memory) == here
        directory = evolve.open_run(args, "seg")
        args = parsed("--resume", directory, cores=2)
        assert (args.workers, args.memory) == elsewhere


def test_the_same_weights_are_the_same_from_elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search_seg, "build_model", lambda *what: None)  # which would read them
    flags = ["--device", "cpu", "--model", "r50-psp", "--pretrained", "weights.pth", "--runs", str(tmp_path)]
    directory = evolve.open_run(search_seg.parse_arguments(flags), "seg")
    args = search_seg.parse_arguments(["--resume", str(directory), "--pretrained", "weights.pth"])
    assert args.pretrained == str(tmp_path / "weights.pth")


def test_runs_that_can_be_nowhere(monkeypatch, capsys, tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "not mounted")
    args = search_seg.parse_arguments(["--device", "cpu", "--runs", str(tmp_path / "runs")])
    with pytest.raises(FileExistsError):  # `main` says it in one line
        evolve.open_run(args, "seg")


READERS = {  # of the files of a run directory, and which damages they cannot see
    "args.json": (
        lambda path: search_seg.parse_arguments(["--resume", str(path.parent)]),
        r"Latin-1|(git|versions|device|by_default|arguments\.(runs|resume))\b.*|"
        r"arguments\.\w+ (null|a word|huge|negative|true|a list|a fraction)",
    ),
    "result.json": (
        lambda path: search_seg.read_loss(str(path.parent), "--loss"),
        r"(metric|explored|evaluated|gates|seconds|whole_schedule|test|difference)\b.*",
    ),
    "workers/finalists-6.json": (
        lambda path: evolve.read_agreed(path, "finalists", search_seg.SegTask),
        r"\d+ removed|b'\[\]'",
    ),
    "workers/found-6.json": (lambda path: evolve.read_agreed(path, "found", search_seg.SegTask), "b'null'"),
}


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_of_a_run_are_refused(finished, tmp_path, capsys, name):
    directory = shutil.copytree(finished[0], tmp_path / finished[0].name)
    reader, unseen = READERS[name]
    refused, taken = refusals(reader, directory / name, json.loads((directory / name).read_text()), capsys)
    assert len(refused) > 20 and not [what for what in taken if not re.fullmatch(unseen, what)]


@pytest.mark.parametrize("name", ["base.pt", "training_0_0.pt"])
@pytest.mark.parametrize("content", [None, b"", b"no tensors", {}, [], [{}], [{"weight": torch.zeros(2)}]])
def test_damaged_weights_are_refused(tmp_path, capsys, name, content):
    path, net = tmp_path / name, torch.nn.Linear(2, 2)
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(SystemExit) as stop:
        if name == "base.pt":
            evolve.base_states(path, "cpu", None, net)
        else:
            evolve.Checkpoint(path, 1).load([net], [torch.Generator()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"error: {path}: damaged, ") and error.count("\n") == 1


def test_a_torn_line_of_a_comparison_is_cut_off(tmp_path, capsys):
    line = {"loss": "ce", "seed": 0, "scores": {"val": {"miou": 0.5}, "test": {"miou": 0.5}}, "seconds": 1.0}
    whole = json.dumps(line) + "\n"
    (tmp_path / "retrain.jsonl").write_text(whole + whole[:40])
    assert evolve.finished_lines(tmp_path, ("miou",)) == [line] and "torn" in capsys.readouterr().err
    assert (tmp_path / "retrain.jsonl").read_text() == whole, "or the next line would be glued to it"


def test_a_comparison_goes_on_with_the_losses_that_it_began_with(root, tmp_path, monkeypatch, capsys):
    """Wherever it is resumed, and though the run that had found one of them is gone."""
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN/result.json").write_text(json.dumps({"task": "seg", "losses": {"loss": "Neg(Mul(y, Log(p)))"}}))
    monkeypatch.chdir(tmp_path)
    flags = ["--data-root", str(root), "--runs", str(tmp_path / "runs"), *SMALL, "--seeds", "1"]
    evolve.main(search_seg.parse_arguments([*flags, "--compare", "RUN,Square(Add(p, Neg(y)))"]), search_seg.SegTask)
    (directory,) = (tmp_path / "runs").iterdir()
    lines = (directory / "retrain.jsonl").read_text().splitlines(True)
    (directory / "retrain.jsonl").write_text(lines[1])
    shutil.rmtree(tmp_path / "RUN")
    monkeypatch.chdir(root)
    evolve.main(search_seg.parse_arguments(["--resume", str(directory)]), search_seg.SegTask)
    whole = [json.loads(line) for line in (directory / "retrain.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in whole] == ["Square(Add(p, Neg(y)))", "RUN"]
    assert whole[1]["scores"] == json.loads(lines[0])["scores"]


def test_a_training_that_became_invalid_has_no_curve_of_another(root, tmp_path):
    args = search_seg.parse_arguments(["--data-root", str(root), "--runs", str(tmp_path), *SMALL, "--compare", "ce"])
    task = ready(search_seg.SegTask(args))
    for name, losses in (("ce", "ce"), ("bad", {"loss": parse("Mul(y, Exp(Inv(Add(p, Neg(p)))))")})):
        evolve.train_once(args, task, name, losses, 0, evolve.Checkpoint(tmp_path / f"{name}.pt", 10))
        assert bool(task.curve) == (name == "ce")


@pytest.mark.parametrize("made, now", [(2, 1), (1, 2)])
def test_a_checkpoint_of_another_number_of_processes_is_refused(tmp_path, monkeypatch, capsys, made, now):
    checkpoint, parts = evolve.Checkpoint(tmp_path / "training.pt", 1), [torch.nn.Linear(1, 1)]
    states = [[torch.Generator().get_state()]] * made
    content = {"steps": 1, "curve": [], "parts": [part.state_dict() for part in parts], "generators": states}
    torch.save(content, tmp_path / "training.pt")
    monkeypatch.setattr(evolve, "rank_and_world", lambda: (now - 1, now))
    with pytest.raises(SystemExit):
        checkpoint.load(parts, [torch.Generator()])
    assert f"a training of {made} processes, not of {now}; go on with as many" in capsys.readouterr().err


@pytest.mark.parametrize("ready", [False, True])
def test_what_one_worker_alone_has_seen_it_says(monkeypatch, capsys, ready):
    """Of broken data the first of several tells; of what shows up during a training, who met it."""
    monkeypatch.setenv("AUTOLOSS_RUN_DIR", "somewhere")
    monkeypatch.setenv("RANK", "1")
    args = search_seg.parse_arguments(["--device", "cpu"])

    class Broken(evolve.Task):
        def __init__(self, args):
            self.ready = ready

    def work(args, task):
        raise evolve.DataError("img_77.jpg: cut off")

    monkeypatch.setattr(evolve, "run", work)
    with pytest.raises(SystemExit) as stop:
        evolve.main(args, Broken)
    assert stop.value.code == 2 and ("img_77.jpg" in capsys.readouterr().err) == ready


def test_two_processes_do_not_train_in_one_directory(root, tmp_path, capsys):
    args = search_seg.parse_arguments(["--data-root", str(root), *SMALL, "--compare", "ce,dice"])
    args.resume = tmp_path
    with (tmp_path / "report.lock").open("a") as lock:
        assert evolve.hold(lock)
        with pytest.raises(SystemExit):
            evolve.compare(args, search_seg.SegTask(args))
    assert f"--resume {tmp_path}: another process is training there" in capsys.readouterr().err


def test_a_worker_says_itself_what_ends_it_alone(monkeypatch, capsys):
    monkeypatch.setenv("AUTOLOSS_RUN_DIR", "runs/x")
    monkeypatch.setenv("RANK", "1")
    for everyone, said in ((False, ""), (True, "error: no space\n")):
        with pytest.raises(SystemExit):
            evolve.fail("no space", everyone=everyone)
        assert capsys.readouterr().err == said


def test_damaged_lines_of_a_comparison_are_trained_again(tmp_path, capsys):
    line = {"loss": "ce", "seed": 0, "scores": {"val": {"miou": 0.5}, "test": {"miou": 0.5}}, "seconds": 1.0}
    skipped = set()
    for what, text in damaged(line):
        damage = text.replace(b"\n", b" ")
        (tmp_path / "retrain.jsonl").write_bytes(json.dumps(line).encode() + b"\n" + damage + b"\n")
        first, *second = evolve.finished_lines(tmp_path, ("miou",))
        assert first == line and ("1 broken line" in capsys.readouterr().err) == (not second and damage != b""), what
        skipped |= set() if second else {what}
    assert len(skipped) > 40 and {"scores.test removed", "scores.test.miou NaN", "seed true", "loss null"} <= skipped


@pytest.mark.parametrize("script", ["search_seg", "search_det", "search_pose"])
@pytest.mark.parametrize(
    "argv, words",
    [
        (["--loss", ""], "--loss '': names no loss"),
        (["--compare", " , "], "--compare ' , ': names no loss"),
        (["--compare", "BASELINE,BASELINE"], "named twice"),
        (["--loss", "x" * 5000], "--loss xxx"),
        (["--loss", "a\nb"], "--loss a b: unknown"),
        (["--resume", "y" * 400], "--resume yyy"),
        (["--device", "hpu"], "--device hpu: not available"),
        (["--pretrained"], "--model small has no such weights"),
        (["--device", "meta"], "--device meta: not available"),
        (["--workers", "100000"], "--workers: 100000 is too large"),
        (["--data-root", __file__], "a file; give a folder"),
    ],
)
def test_what_no_flag_takes(script, argv, words, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")  # as a scheduler sets it, for no worker of ours
    module = importlib.import_module(script)
    baseline = next(iter(module.LOSSES))
    assert words in refused(module, monkeypatch, capsys, *(word.replace("BASELINE", baseline) for word in argv))


def test_a_folder_of_any_name_is_a_run_directory(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs (copy), a=b"
    folder.mkdir()
    for script in ("search_seg", "search_det", "search_pose"):
        for flag in ("--loss", "--compare"):
            error = refused(importlib.import_module(script), monkeypatch, capsys, flag, folder)
            assert "not a run directory (neither result.json nor" in error


def test_a_run_whose_data_have_moved(tmp_path, monkeypatch, capsys):
    root = tmp_path / "here"
    root.mkdir()
    monkeypatch.chdir(tmp_path)
    args = search_seg.parse_arguments(["--data-root", "here", "--runs", "runs"])
    assert args.data_root == root
    directory = evolve.open_run(args, "seg")
    assert search_seg.parse_arguments(["--resume", str(directory)]).data_root == root
    root.rename(tmp_path / "there")
    error = refused(search_seg, monkeypatch, capsys, "--resume", directory)
    assert f"--data-root {root}: not found; say where the data of this run lie now" in error
    moved = search_seg.parse_arguments(["--resume", str(directory), "--data-root", "there"])
    assert moved.data_root == tmp_path / "there"


def test_an_unfinished_run_of_another_script(tmp_path, monkeypatch, capsys):
    (tmp_path / "args.json").write_text(json.dumps({"task": "pose", "arguments": {}}))
    (tmp_path / "journal-0.jsonl").write_text("")
    assert "a run of search_pose.py, not of search_seg.py" in refused(
        search_seg, monkeypatch, capsys, "--loss", tmp_path
    )


@pytest.mark.parametrize("script", ["search_seg", "search_det", "search_pose"])
def test_readme_commands_parse(script):
    text = (REPOSITORY / "README.md").read_text()
    commands = re.findall(rf"^python {script}\.py(.*?)(?:#.*)?$", text, re.M)
    assert len(commands) >= 2
    for line in commands:
        argv = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)]
        argv = [word for word in argv if word != "--pretrained"]  # it fetches weights at once
        if not any("RUN_DIR" in word for word in argv):
            importlib.import_module(script).parse_arguments(argv)
    for path in re.findall(r"python (tests/bench_\w+\.py)", text):
        assert (REPOSITORY / path).exists()
