"""What all tests share. One thread per process, here and in every command: more of them cost more than they gain."""

import copy
import errno
import functools
import io
import json
import math
import operator
import os
import sys
import tempfile
from pathlib import Path

import cv2
import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
cv2.setNumThreads(1)


def records(directory):
    """All records of a run, worker by worker, without what times say."""
    lines = [line for path in sorted(directory.glob("journal-*.jsonl")) for line in path.read_text().splitlines()]
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "elapsed")} for line in lines]


def journal(directory):
    """The proxy trainings among them."""
    return [record for record in records(directory) if "losses" in record]


def retrained(directory):
    """Those of trainings from fresh weights among them."""
    return [record for record in records(directory) if "retrained" in record]


def refused(script, monkeypatch, capsys, *argv):
    """What `script` says of bad input: one line, exit code 2."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        script.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ")
    return error


def through_onnx(path, module, inputs, dynamo):
    """What ONNX computes of a module; skips where it is not installed (onnx, onnxscript, onnxruntime)."""
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    torch.onnx.export(module.eval(), inputs, str(path / "module.onnx"), dynamo=dynamo)
    session = onnxruntime.InferenceSession(str(path / "module.onnx"))
    (value,) = session.run(None, {slot.name: x.numpy() for slot, x in zip(session.get_inputs(), inputs)})
    return torch.tensor(value)


WRONG = {
    "null": None, "a word": "x", "a list": [], "an object": {"x": 1}, "NaN": math.nan, "infinite": math.inf,
    "negative": -7, "a fraction": 0.5, "huge": 1e300, "a huge integer": 10**400, "true": True,
}  # fmt: skip


def damaged(content):
    """(what, bytes) of a json file with one damage after another.

    Everything in it is in turn removed and replaced by each of WRONG: the lists, their entries, what these hold, and
    the first two and the last of longer lists of numbers. Then the file itself is torn, or none.
    """

    def spots(node, place=()):
        if isinstance(node, dict):
            keys = list(node)
        else:
            keys = sorted({*range(len(node))[:2], len(node) - 1}) if isinstance(node, list) and node else []
        for key in keys:
            yield (*place, key)
            yield from spots(node[key], (*place, key))

    for *place, key in spots(content):
        for name, value in {"removed": None, **WRONG}.items():
            wrong = copy.deepcopy(content)
            holder = functools.reduce(operator.getitem, place, wrong)
            if name == "removed":
                del holder[key]
            else:
                holder[key] = value
            yield f"{'.'.join(map(str, [*place, key]))} {name}", json.dumps(wrong).encode()
    whole = json.dumps(content).encode()
    yield from ((f"torn at {size}", whole[:size]) for size in (0, 1, len(whole) // 2, len(whole) - 1))
    yield from (
        (repr(text), text) for text in (b"\xff\xd8\xff\xe0 a picture", b"\x00\x05\x16\x07", b"[]", b"7", b"null")
    )
    if isinstance(content, dict):
        yield "Latin-1", json.dumps(content | {"info": "Fußgänger"}, ensure_ascii=False).encode("latin-1")
    yield "too deep", b"[" * 100_000


def refusals(reader, path, content, capsys):
    """Damages of a json file that `reader` refuses, by a short line that names file or flag, and those it takes."""
    capsys.readouterr()
    refused, taken = [], []
    for what, text in damaged(content):
        path.write_bytes(text)
        try:
            reader(path)
            taken.append(what)
        except SystemExit as stop:
            error = capsys.readouterr().err
            assert stop.code == 2 and error.startswith("error: ") and error.count("\n") == 1, (what, error)
            assert (str(path.parent) in error or " --" in error) and len(error) < 300 + len(str(path)), (what, error)
            refused.append(what)
    return refused, taken


def ready(task):
    """The task with its data loaded and its base network trained."""
    task.load()
    with tempfile.TemporaryDirectory() as folder:
        task.prepare(Path(folder) / "base.pt")
    return task


class Full(io.FileIO):
    """A file on a disk that is full for one write, number `at` of all: half of it is written.

    Who writes without a buffer is told how much that was, as the system does; a buffer is told at once.
    """

    at = done = 0
    buffered = True

    def write(self, data):
        Full.done += 1
        if Full.done - 1 != Full.at:
            return super().write(data)
        half = super().write(bytes(data)[: len(data) // 2])
        if self.buffered:
            raise OSError(errno.ENOSPC, "No space left on device")  # without the file's name, as Python does
        return half


real_open = io.open


def open_on_full_disk(path, mode="r", *args, **options):
    """In place of `io.open`: all that a run writes but TensorBoard's events goes through `Full`."""
    if not set(mode) & set("wa+") or "tfevents" in str(path) or not isinstance(path, os.PathLike):
        return real_open(path, mode, *args, **options)
    raw = Full(path, mode.replace("b", "").replace("t", ""))
    if 0 in (*args, *options.values()):
        raw.buffered = False
        return raw
    buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
    return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")
