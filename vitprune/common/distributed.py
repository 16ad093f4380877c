"""Several processes under `torchrun` or `accelerate launch`: which one this is, and how they agree.

All of them must run the same vitprune command. Without a launcher there is one process, and nothing here does
anything.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

from vitprune.errors import UsageError

Value = TypeVar("Value")


def rank() -> int:
    """The number of this process."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """The number of this process on its machine, and so of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def start(device: Any) -> None:
    """Let the processes find each other; to be called once the device is known."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState(cpu=device.type == "cpu")


def finish() -> None:
    """Disconnect from the others at the end of a command that went well: a process that just ends may be aborted."""
    if world_size() > 1:
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def refuse_several(command: str) -> None:
    """For what several processes would do at the same time, each disturbing the other's clock.

    Raises:
        UsageError: there are several.
    """
    if world_size() > 1:
        raise UsageError(f"vitprune {command} runs in one process, not in {world_size()}", "start it without torchrun")


def gather(value: Value) -> list[Value]:
    """The values of all processes, in their order, in every process."""
    if world_size() == 1:
        return [value]
    import torch.distributed

    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def from_main(value: Value | None) -> Value:
    """The main process' value, in every process."""
    if world_size() == 1:
        return value  # type: ignore[return-value]
    import torch.distributed

    values: list[Any] = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]  # type: ignore[no-any-return]
