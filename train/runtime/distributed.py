"""The processes of a run: as torchrun starts them, or a single one without it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.rendezvous import rendezvous

from shards.storage import OUTAGE_PATIENCE

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    local_size: int  # ranks on this machine
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place, on every rank."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, value: bool) -> bool:
        """Whether it is true on any rank, on every rank."""
        return bool(self.sum(torch.tensor(float(value), device=self.device)))

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, function: Callable[[], T]) -> T:
        """The main rank's result, for every rank. A ValueError or OSError there raises ValueError on all."""
        outcome: Any = (None, None)  # the value, or what is wrong
        if self.is_main:
            try:
                outcome = (function(), None)
            except (ValueError, OSError) as error:
                outcome = (None, str(error))
        if self.size > 1:
            values: list[Any] = [outcome]
            dist.broadcast_object_list(values, src=0)
            outcome = values[0]
        if outcome[1] is not None:
            raise ValueError(outcome[1])
        return outcome[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def fail(error: Exception) -> NoReturn:
    """End this process with a line for people, which torchrun repeats at the end of its own report."""
    # The first rank speaks for all: the others wait, for torchrun kills everyone as soon as one has exited.
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(5)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)
    print(f"Error: {error}", file=sys.stderr, flush=True)
    sys.exit(1)


def _fresh_store() -> Store:
    """The store through which ranks find each other, without the entries of dead ranks.

    torchrun 2.13 gives restarted ranks the old store with its stale addresses, and they may wait forever. On a single
    node all ranks know the number of restarts. Raises ValueError on several nodes, where they do not.
    """
    store, _, _ = next(rendezvous("env://"))
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if not restarts or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        raise ValueError("to restart ranks on several nodes, start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    return PrefixStore(f"restart_{restarts}", store)


@contextmanager
def start_world(*, tf32: bool) -> Iterator[World]:
    """Join the process group that torchrun describes in the environment (nccl on GPUs, else gloo); leave it after."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available():
        if local_size > torch.cuda.device_count():
            raise ValueError(f"{local_size} processes on a machine with {torch.cuda.device_count()} GPUs: lower NPROC")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    else:
        device = torch.device("cpu")
        if "LOCAL_RANK" in os.environ:  # torchrun allows each rank a single thread; share the cores out instead
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    if size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        if rank == 0 and "TORCHELASTIC_RUN_ID" not in os.environ:  # which starts them all
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            print(f"WORLD_SIZE={size}: waiting for the other processes at {place}", file=sys.stderr, flush=True)
        # Longer than a rank may wait for its data, while the others wait for it.
        patience = timedelta(seconds=3 * OUTAGE_PATIENCE)
        dist.init_process_group(backend, store=_fresh_store(), rank=rank, world_size=size, timeout=patience)
    yield World(rank, size, local_size, device)
    if size > 1:  # not after an exception: other ranks may be waiting in a collective, and torchrun ends them
        dist.barrier()  # they leave together: one that is gone while another still works may abort at its exit
        dist.destroy_process_group()
