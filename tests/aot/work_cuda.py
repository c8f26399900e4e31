"""What every CUDA C++ kernel asks of a device, from its code."""

from __future__ import annotations

from collections.abc import Callable

from aot.device import Launch, Shape, Work

_KERNELS: dict[str, Callable[[Shape, Launch], Work]] = {}


def work_of(shape: Shape, launch: Launch) -> Work:
    """What a launch asks of a device.

    Raises:
        KeyError: the kernel is not described.
    """
    return _KERNELS.get(launch.kernel, lambda *_: Work())(shape, launch)
