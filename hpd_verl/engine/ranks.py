"""Steps that one rank takes for all, failures that must end all ranks, and numbers gathered from all ranks."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch
import torch.distributed
from verl.utils.device import get_device_id

from hpd_verl.errors import typed_line

T = TypeVar("T")


def _alone() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1


def on_rank_zero(step: Callable[[], T], interval: float = 30.0) -> T:
    """Take a step on rank 0 and give its result to all ranks; all ranks call it.

    Rank 0 reports to the others while it works, so that a step may take longer than the process group's timeout.

    Args:
        step: called on rank 0, in a thread; no collectives. Its result is pickled.
        interval: seconds between two reports.

    Raises:
        Exception: on rank 0 what ``step`` raised; on the others ``RuntimeError`` with its message.
    """
    if _alone():
        return step()
    with ThreadPoolExecutor(1) as pool:
        future: Future[T] | None = pool.submit(step) if torch.distributed.get_rank() == 0 else None
        report: list[tuple[str | None, T | None] | None] = [None]
        while report[0] is None:
            if future is not None and wait([future], timeout=interval).done:
                error = future.exception()
                report = [(None, future.result()) if error is None else (typed_line(error), None)]
            torch.distributed.broadcast_object_list(report, src=0)
    if future is not None:
        return future.result()
    message, result = report[0]
    if message is not None:
        raise RuntimeError(f"rank 0: {message}")
    return result  # type: ignore[return-value]


def on_every_rank(step: Callable[[], T]) -> T:
    """Take a step on every rank; all ranks together.

    Args:
        step: no collectives.

    Raises:
        Exception: where ``step`` failed, what it raised; on the others ``RuntimeError`` with the first rank's message.
    """
    if _alone():
        return step()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(step)
        error = future.exception()
    messages: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(messages, None if error is None else typed_line(error))
    if error is None:
        for rank, message in enumerate(messages):
            if message is not None:
                raise RuntimeError(f"rank {rank}: {message}")
    return future.result()


def highest_of_ranks(count: int) -> int:
    """The largest of all ranks' counts; with a bool, whether it is true on any. All ranks together."""
    value = torch.tensor(int(count), device=get_device_id())
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return int(value.item())


def sums_of_ranks(counts: Sequence[float]) -> list[float]:
    """Each count summed over all ranks. All ranks together."""
    values = torch.tensor(counts, dtype=torch.float64, device=get_device_id())
    torch.distributed.all_reduce(values)
    found: list[float] = values.tolist()
    return found


def seed_rank(seed: int) -> None:
    """Make what torch draws from here on (the start of LoRA, dropout) the same in every run, and another on each rank.

    verl takes parameters from rank 0, so that they start alike on any number of ranks.
    """
    torch.manual_seed((seed + torch.distributed.get_rank()) % 2**63)
