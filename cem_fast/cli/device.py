"""Where to compute: the flags ``--device``, ``--jobs``, ``--cluster`` and ``--gpus-per-run``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


def place(name: str, jobs: int, cluster: str | None, gpus_per_run: float | None) -> dict[str, Any]:
    """Return where the runs of a grid are done: the arguments ``device``, ``jobs`` and, for a cluster, ``cluster``.

    Args:
        name: name of the device.
        jobs: runs at a time; 0 for a number that suits the place.
        cluster: address of a cluster; None for this machine.
        gpus_per_run: GPUs of a run on the cluster; None for one if the device is a GPU.

    Raises:
        ValueError: the device is not there, or the settings do not fit one another.
    """
    from cem_fast.experiments import workers
    from cem_fast.experiments.cluster import Cluster, require_device

    if cluster is None:
        if gpus_per_run is not None:
            raise ValueError(f"gpus_per_run must be left out without cluster, got {gpus_per_run:g}")
        here = find(name)
        # on the CPU, runs side by side use the cores better than the threads of one small run
        return {"device": here, "jobs": jobs or (workers.num_cores() if here.type == "cpu" else 1)}
    chosen = Cluster(cluster, gpus_per_run if gpus_per_run is not None else float(name != "cpu"))
    require_device(chosen, name)
    return {"device": name, "jobs": jobs, "cluster": chosen}
