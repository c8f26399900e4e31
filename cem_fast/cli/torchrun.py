"""Processes started by torchrun: number, rank, process group, exit. Importable without torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

TIMEOUT = timedelta(minutes=30)  # for a process that hangs; one that has ended is noticed at once
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # set by torchrun for every process


def count() -> int:
    """Number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in VARIABLES) else 1


def rank() -> int:
    """Index of this process, from 0; 0 without torchrun."""
    return int(os.environ["RANK"]) if count() > 1 else 0


@contextmanager
def together(device: torch.device) -> Iterator[tuple[ProcessGroup | None, torch.device]]:
    """Join the processes of torchrun to a group, and leave it after the block once all are done.

    Args:
        device: where to compute; ``cuda`` without an index gives every process of a machine its own GPU.

    Yields:
        The process group, None for a single process, and the device of this process.

    Raises:
        ConnectionError: another process ended early or did not answer in time.
    """
    if count() == 1:
        yield None, device
        return
    import torch
    from torch import distributed

    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if device.index is None else device.index)
        torch.cuda.set_device(device)
    try:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        yield distributed.group.WORLD, device
        distributed.barrier()  # a process that leaves while another one communicates with it aborts that one
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        reason = str(error).splitlines()[0]
        raise ConnectionError(
            f"process {rank()} of {count()} has lost another one, which has ended or did not answer within {TIMEOUT}: {reason}"
        ) from error
    distributed.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End this process; one that torchrun started skips the interpreter's shutdown.

    A thread of gloo may still hold a tensor of Python, even after the group was destroyed: references keep the group
    alive. Releasing the tensor needs the interpreter's lock. Asking for it during the shutdown aborts the process.

    Args:
        status: the exit status.

    Source:
        https://github.com/pytorch/pytorch/issues/190489
    """
    if count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _is_lost_connection(error: RuntimeError) -> bool:
    """Tell whether an error comes from communication with another process; gloo has no exception class of its own."""
    from torch import distributed

    return isinstance(error, distributed.DistError) or any(sign in str(error) for sign in ("gloo", "process group"))
