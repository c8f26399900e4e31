"""Runs of a grid on a Ray cluster, whose machines share the folder of the results."""

from __future__ import annotations

import os
import queue
import re
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from cem_fast._support import optional
from cem_fast._support.counts import require_number
from cem_fast.experiments import provenance
from cem_fast.experiments.run import run_cell
from cem_fast.experiments.workers import Event, Task

PREFIX = "CEM_FAST_"  # of the environment variables that the machines take over
EVERY = 1.0  # seconds between two messages about a stage


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, and what a run takes of it.

    Args:
        address: ``HOST:PORT`` of the cluster's head; ``auto`` for the one that runs on this machine.
        gpus_per_run: GPUs of a run; 0 for runs on the CPU, 0.5 for two runs on one GPU.

    Raises:
        ValueError: the address has another form, or the number is negative or infinite.

    Example:
        >>> from cem_fast.experiments.cluster import Cluster
        >>> Cluster("auto", gpus_per_run=0.5)
        Cluster(address='auto', gpus_per_run=0.5)
    """

    address: str
    gpus_per_run: float = 0

    def __post_init__(self) -> None:
        if self.address != "auto" and not re.fullmatch(r"[^:/\s]+:\d{1,5}", self.address):
            raise ValueError(f"cluster must be HOST:PORT or auto, got {self.address!r}")
        if not 0 <= require_number("gpus_per_run", self.gpus_per_run) < float("inf"):
            raise ValueError(f"gpus_per_run must be at least 0 and finite, got {self.gpus_per_run}")


@contextmanager
def joined(cluster: Cluster) -> Iterator[Any]:
    """Connects this process to a cluster, and leaves it at the end; a process that is already connected stays so.

    Args:
        cluster: the cluster.

    Yields:
        The module ``ray``.

    Raises:
        ImportError: ray is not installed.
        ConnectionError: there is no cluster at the address, or it refuses this process.
    """
    # clusters that others have started have a setting of their own
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = optional.load("ray", "a cluster", "'cem_fast[cluster]'")
    if ray.is_initialized():
        yield ray
        return
    main = threading.current_thread() is threading.main_thread()
    on_sigterm = signal.getsignal(signal.SIGTERM) if main else None
    try:
        if cluster.address != "auto":
            _require_answer(cluster.address)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # of many kinds: no address, no answer, other versions, no token
        raise ConnectionError(f"no Ray cluster at {cluster.address!r}: {reason_of(error)}") from None
    try:
        if main:
            signal.signal(signal.SIGTERM, on_sigterm)  # ray has set its own
        yield ray
    finally:
        ray.shutdown()  # which ends the runs


def run_all(
    tasks: Sequence[Task], *, cluster: Cluster, jobs: int, device: str | torch.device, fresh: bool
) -> Iterator[Event]:
    """Runs tasks on a cluster. All of its machines need the same cem_fast, and the same folders at the same paths.

    A task whose process or machine is lost is retried once. When the caller stops, by closing the iterator or by an exception, the runs
    are stopped. What they have saved is kept.

    Args:
        tasks: number, settings and folder of every run.
        cluster: the cluster.
        jobs: runs at a time, each on its share of all cores; 0 for as many as there is room for, each on one core.
        device: ``cpu``, or ``cuda`` for the GPU that Ray gives a run.
        fresh: whether to start over instead of continuing interrupted runs.

    Yields:
        ``("started", number, ())``, ``("stage", number, (name, done, total))``, ``("finished", number, ())``,
        ``("again", number, (reason,))`` and ``("failed", number, (reason,))`` as it happens.

    Raises:
        ImportError: ray is not installed.
        ConnectionError: there is no cluster at the address.
        ValueError: no machine of the cluster has what a run takes.
        OSError: a run could not read or write its files.

    Example:
        >>> from cem_fast.experiments.cluster import Cluster, run_all
        >>> list(run_all([], cluster=Cluster("auto"), jobs=0, device="cpu", fresh=False))
        []
    """
    if not tasks:
        return
    with joined(cluster) as ray:
        cpus = _cpus_per_run(ray, cluster, jobs)
        runs = _Runs(ray, tasks, cluster, cpus, str(device), fresh)
        try:
            yield from runs.events(jobs or len(tasks))
        finally:
            runs.stop()


def reason_of(error: BaseException) -> str:
    """The first line of an error of Ray, which has many.

    Args:
        error: the error.

    Example:
        >>> from cem_fast.experiments.cluster import reason_of
        >>> reason_of(ValueError("no answer\\n  at line 3"))
        'no answer'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _require_answer(address: str) -> None:
    """Connects once: Ray tries for minutes."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=5).close()


def _cpus_per_run(ray: ModuleType, cluster: Cluster, jobs: int) -> int:
    """Cores of a run. A run that fits nowhere would wait without end."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = int(max((machine.get("CPU", 0) for machine in machines), default=0))
    gpus = max((machine.get("GPU", 0) for machine in machines), default=0)
    if cluster.gpus_per_run > gpus:
        raise ValueError(
            f"gpus_per_run must be at most {gpus:g}, the GPUs of the cluster's largest machine, got {cluster.gpus_per_run:g}"
        )
    if most < 1:
        raise ValueError(f"the cluster at {cluster.address!r} has no machine with a core for runs")
    total = int(sum(machine.get("CPU", 0) for machine in machines))
    return min(most, max(1, total // jobs)) if jobs else 1


class _Runs:
    """Runs of a cluster on their way: each is a generator of events."""

    def __init__(
        self, ray: ModuleType, tasks: Sequence[Task], cluster: Cluster, cpus: int, device: str, fresh: bool
    ) -> None:
        self.ray, self.waiting = ray, deque(tasks)
        self.running: dict[Any, Task] = {}
        environment = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
        self.settings = (os.getcwd(), provenance.source_digest(), device, cpus, fresh)
        self.work = ray.remote(_work).options(
            num_cpus=cpus,
            num_gpus=cluster.gpus_per_run,
            num_returns="streaming",
            max_retries=0,
            runtime_env={"env_vars": environment},
        )

    def events(self, at_a_time: int) -> Iterator[Event]:
        retried: set[int] = set()
        while self.waiting or self.running:
            while self.waiting and len(self.running) < at_a_time:
                task = self.waiting.popleft()
                self.running[self.work.remote(task, *self.settings)] = task
            ready, _ = self.ray.wait(list(self.running), num_returns=1)
            for run in ready:
                task = self.running[run]
                number = task[0]
                kind, details = self._next(run)
                if kind == "died":
                    kind = "again" if number not in retried else "failed"
                    if kind == "again":
                        self.waiting.appendleft(task)
                    retried.add(number)
                elif kind == "broken":
                    raise OSError(details[0])
                if kind in ("again", "failed", "finished"):
                    del self.running[run]
                yield kind, number, details

    def _next(self, run: Any) -> tuple[str, tuple[Any, ...]]:
        """The next event; ``("died", (reason,))`` if the process or the machine is lost."""
        exceptions = self.ray.exceptions
        try:
            kind, details = self.ray.get(next(run))
            return kind, details
        except StopIteration:
            return "died", ("it ended without a word",)
        except (exceptions.RayTaskError, exceptions.RuntimeEnvSetupError) as error:
            return "failed", (reason_of(error),)
        except exceptions.RayError as error:
            return "died", (reason_of(error),)

    def stop(self) -> None:
        for run in self.running:
            self.ray.cancel(run, force=True)


def _work(
    task: Task, folder: str, digest: str, device: str, cpus: int, fresh: bool
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Runs a task on a machine of the cluster and yields its events."""
    host = socket.gethostname()
    if provenance.source_digest() != digest:
        yield "failed", (f"{host} has another version of cem_fast",)
        return
    try:
        os.chdir(folder)  # the paths of images and results may be relative
    except OSError as error:
        yield "broken", (f"{host}: {error}",)
        return
    events: queue.SimpleQueue[tuple[str, tuple[Any, ...]]] = queue.SimpleQueue()
    threading.Thread(target=_run, args=(events, task, device, cpus, fresh), daemon=True).start()
    yield "started", ()
    shown = 0.0
    while True:
        kind, details = events.get()
        ends = kind != "stage"
        if ends or details[1] == details[2] or time.monotonic() - shown > EVERY:
            shown = time.monotonic()
            yield kind, details
        if ends:
            return


def _run(
    events: queue.SimpleQueue[tuple[str, tuple[Any, ...]]], task: Task, device: str, cpus: int, fresh: bool
) -> None:
    """Runs a task, in a thread of its own, and puts its events into a queue."""
    _, config, folder = task
    torch.set_num_threads(cpus)

    def on_stage(*details: Any) -> None:
        events.put(("stage", details))

    try:
        run_cell(config, folder, device=device, fresh=fresh, on_stage=on_stage)
        events.put(("finished", ()))
    except OSError as error:
        events.put(("broken", (f"{socket.gethostname()}: {error}",)))
    except BaseException as error:  # whatever it is, the queue must not stay empty
        events.put(("failed", (" ".join(str(error).split()) or type(error).__name__,)))
