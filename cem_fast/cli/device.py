"""The flag ``--device``: a device that exists here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def find(name: str) -> torch.device:
    """Return the device of a name.

    Args:
        name: ``cpu``, ``cuda`` or ``cuda:<index>``.

    Raises:
        ValueError: the name is none of these, or there is no such GPU.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:<index>, got {name!r}") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise ValueError(f"device {name!r} is not there: this PyTorch sees {count} CUDA devices")
    elif device.type != "cpu":
        raise ValueError(f"device must be cpu, cuda or cuda:<index>, got {name!r}")
    return device
