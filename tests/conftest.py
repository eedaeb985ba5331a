"""What all tests share. One thread per process, here and in every command: more of them cost more than they gain."""

import json
import os
import sys

import cv2
import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
cv2.setNumThreads(1)


def journal(directory):
    """The journal of a run without what times say."""
    lines = [json.loads(line) for line in (directory / "journal.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "elapsed")} for line in lines]


def refused(script, monkeypatch, capsys, *argv):
    """What `script` says of bad input: one line, exit code 2."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        script.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ")
    return error
