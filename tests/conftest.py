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


def records(directory):
    """All records of a run, worker by worker, without what times say."""
    lines = [line for path in sorted(directory.glob("journal-*.jsonl")) for line in path.read_text().splitlines()]
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "elapsed")} for line in lines]


def journal(directory):
    """The proxy trainings among them."""
    return [record for record in records(directory) if "losses" in record]


def retrained(directory):
    """The converged trainings among them."""
    return [record for record in records(directory) if "retrained" in record]


def refused(script, monkeypatch, capsys, *argv):
    """What `script` says of bad input: one line, exit code 2."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        script.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ")
    return error
