"""train.evaluate, called in the process of the test."""

from __future__ import annotations

import json
import sys

import torch

from train import evaluate

OPTIONS = ("--split", "train", "--min-frames", "20", "--views", "4", "--width", "56")  # of shard_dir: 7 sequences


def evaluate_here(shard_set, checkpoints, out, *options):
    """In this process, without loader processes: what is printed goes to pytest's capture."""
    checkpoints = checkpoints if isinstance(checkpoints, list) else [checkpoints]
    arguments = ["--shards", str(shard_set), "--out", str(out), "--workers", "0", *(options or OPTIONS)]
    for checkpoint in checkpoints:
        arguments += ["--checkpoint", str(checkpoint)]
    before, sys.argv = sys.argv, ["evaluate", *arguments]
    try:
        evaluate.main()
    finally:
        sys.argv = before
    return json.loads((out / "results.json").read_text())


def changed(exported, path, change):
    """A copy of a checkpoint whose state dict `change` has worked on."""
    content = torch.load(exported, weights_only=True)
    change(content["model"])
    torch.save(content, path)
    return path
