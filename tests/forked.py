"""Commands of this project in processes of their own, forked from one that has imported PyTorch: that takes longest."""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
MODULES = ("train.main", "train.check_data", "train.evaluate", "train.export", "vggt.__main__")
CONTEXT = multiprocessing.get_context("forkserver")


def start_server():
    CONTEXT.set_forkserver_preload(
        [*MODULES, "torch.utils.tensorboard", "torch._dynamo", "prep.packing.pack", "prep.verify", "webdataset"]
    )
    forkserver.ensure_running()


def module_of(arguments):
    """The module that `python <arguments>` runs, if it is one of these, and the arguments that are left for it.

    "-c": code, which is the first of these.
    """
    first, *rest = arguments or [""]
    if first == "-c":
        return first, rest
    name, rest = (rest[0], rest[1:]) if first == "-m" else (first.removesuffix(".py").replace("/", "."), rest)
    name = f"{name}.__main__" if name == "vggt" else name
    return (name, rest) if name in MODULES else (None, rest)


def run_forked(module, arguments, environment, timeout):
    """What subprocess.run would return, text captured."""
    with tempfile.TemporaryDirectory() as folder:
        process = CONTEXT.Process(target=_run, args=(module, arguments, os.environ | environment, folder))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(module, timeout)
        out, err = (Path(folder, name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess([module, *arguments], process.exitcode, out, err)


def _run(module, arguments, environment, folder):
    os.chdir(ROOT)
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    sys.argv = [module, *arguments]
    try:
        if module == "-c":
            sys.argv = [module, *arguments[1:]]
            exec(arguments[0], {"__name__": "__main__"})
        else:
            importlib.import_module(module).main()
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
