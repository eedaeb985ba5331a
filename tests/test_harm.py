"""Harm done to the real searches: processes that are killed, writes that fail.

A few of each in the suite; `HARM=1 python -m pytest -q tests/test_harm.py` does twenty of each to each script.
"""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback

import pytest
from conftest import Full, open_on_full_disk, records

import search_det
import search_pose
import search_seg
from data import shapes

METRICS = {search_seg: "macc", search_det: "bbox", search_pose: "ap"}
SMALL = "--proxy-steps 2 --retrain-steps 2 --batch 4 --device cpu --workers 1 --seeds 1 --evals 4 --seed 3".split()
NUMBER = 20 if os.environ.get("HARM") else 2
SCRIPTS = pytest.mark.parametrize("script", METRICS, ids=lambda script: script.__name__)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return shapes.write_shapes(tmp_path_factory.mktemp("data") / "shapes", splits={"train": 30, "val": 8, "test": 8})


CLEAN = multiprocessing.get_context("forkserver")  # processes that begin with everything imported, and no threads
CLEAN.set_forkserver_preload([__name__])


def act(script, argv, log, failing):
    """A command, in a process of its own."""
    code = 1
    with log.open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            if failing is not None:
                Full.at, Full.done, io.open = failing, 0, open_on_full_disk
            sys.argv = [f"{script}.py", *argv]
            importlib.import_module(script).main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
        print("writes", Full.done)
    os._exit(code)


def search(script, argv, log, kill_after=280, failing=None):
    """The exit code of a command, or minus the signal that ended it.

    It is killed after some seconds, or its write number `failing` fails; what it says goes to a file.
    """
    process = CLEAN.Process(target=act, args=(script.__name__, [*map(str, argv)], log, failing))
    process.start()
    process.join(kill_after)
    process.kill()
    process.join()
    return process.exitcode


def begin(script, root, runs):
    return ["--metric", METRICS[script], *SMALL, "--data-root", root, "--runs", runs]


def made(runs):
    """The run directory that a search has made, as far as that can be resumed."""
    return next((path.parent for path in runs.glob("*/args.json")), None)


def outcome(directory):
    return records(directory), {**json.loads((directory / "result.json").read_text()), "seconds": 0}


@pytest.fixture(scope="module")
def unharmed(root, tmp_path_factory):
    """Of a script, once: what a run comes to that nothing happens to, how long it takes, how often it writes."""
    done = {}

    def of(script):
        if script not in done:
            folder, start = tmp_path_factory.mktemp("unharmed"), time.time()
            code = search(script, begin(script, root, folder), folder / "log", failing=-1)
            printed = (folder / "log").read_text()
            assert code == 0, printed
            done[script] = outcome(made(folder)), time.time() - start, int(printed.split()[-1])
        return done[script]

    return of


@SCRIPTS
def test_killed_again_and_again(script, unharmed, root, tmp_path):
    """Each kill comes at a random moment of the rest of a run; the end is that of an unharmed one, also in between."""
    whole, seconds, _ = unharmed(script)
    rng, kills, runs = random.Random(script.__name__), 0, tmp_path / "0"
    while True:
        argv = ["--resume", made(runs)] if made(runs) else begin(script, root, runs)
        last = kills == NUMBER
        code = search(script, argv, tmp_path / "log", 280 if last else rng.uniform(0.1, 0.9) * seconds)
        assert code in (0, -signal.SIGKILL), (tmp_path / "log").read_text()
        kills += code != 0
        if code == 0:
            assert outcome(made(runs)) == whole
            runs = tmp_path / str(kills)
        if last:
            return


@SCRIPTS
def test_failed_writes(script, unharmed, root, tmp_path):
    """One line that names the file and --resume, exit code 2; what is resumed ends as an unharmed run."""
    whole, _, writes = unharmed(script)
    assert writes > NUMBER
    for k in range(NUMBER):
        runs, log = tmp_path / str(k), tmp_path / f"log-{k}"
        code = search(script, begin(script, root, runs), log, failing=(2 * k + 1) * writes // (2 * NUMBER))
        error = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
        assert code == 2 and len(error) == 1 and "Traceback" not in log.read_text(), log.read_text()
        assert str(runs) in error[0] and "No space left" in error[0] and "--resume" in error[0]
        argv = ["--resume", made(runs)] if made(runs) else begin(script, root, runs)
        assert search(script, argv, log) == 0, log.read_text()
        assert outcome(made(runs)) == whole
