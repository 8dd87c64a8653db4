"""Steps of one rank for all: every rank ends in the same way, and soon."""

import os
import socket
import time
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from typing import Any

import pytest
import torch
import torch.distributed

from hpd_verl.engine.ranks import on_every_rank, on_rank_zero, sums_of_ranks

TIMEOUT = timedelta(seconds=10)


def slow(seconds: float) -> str:
    time.sleep(seconds)
    return "slow"


def fail(rank: int) -> int:
    if torch.distributed.get_rank() == rank:
        raise ValueError(f"rank {rank} found nothing")
    return torch.distributed.get_rank()


STEPS: dict[str, Any] = {
    "result": lambda: on_rank_zero(lambda: {"rank": torch.distributed.get_rank()}),
    "none": lambda: on_rank_zero(lambda: None),
    "longer than the timeout": lambda: on_rank_zero(lambda: slow(12.0), interval=0.5),
    "error of rank 0": lambda: on_rank_zero(lambda: fail(0)),
    "every rank": lambda: on_every_rank(torch.distributed.get_rank),
    "error of rank 1": lambda: on_every_rank(lambda: fail(1)),
    "sums": lambda: sums_of_ranks([torch.distributed.get_rank(), 10.5]),
    "still in step": lambda: on_rank_zero(lambda: "in step"),
}


def run_steps(rank: int, port: int, results: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3, timeout=TIMEOUT
    )
    outcomes = {}
    for name, step in STEPS.items():
        try:
            outcomes[name] = step()
        except (ValueError, RuntimeError) as error:
            outcomes[name] = f"{type(error).__name__}: {error}"
    results.put((rank, outcomes))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_three_ranks(processes: ForkServerContext) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = processes.Queue()
    workers = [processes.Process(target=run_steps, args=(rank, port, results)) for rank in range(3)]
    for worker in workers:
        worker.start()
    found = dict(results.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    for rank in range(3):
        assert found[rank] == {
            "result": {"rank": 0},
            "none": None,
            "longer than the timeout": "slow",
            "error of rank 0": ("ValueError: " if rank == 0 else "RuntimeError: rank 0: ValueError: ")
            + "rank 0 found nothing",
            "every rank": rank,
            "error of rank 1": ("ValueError: " if rank == 1 else "RuntimeError: rank 1: ValueError: ")
            + "rank 1 found nothing",
            "sums": [3.0, 31.5],
            "still in step": "in step",
        }


def test_one_process() -> None:
    assert on_rank_zero(os.getpid) == on_every_rank(os.getpid) == os.getpid()
    for run in (on_rank_zero, on_every_rank):
        with pytest.raises(ZeroDivisionError):
            run(lambda: 1 // 0)
