"""Runs of a grid on a Ray cluster, whose machines share the folder of the results."""

from __future__ import annotations

import math
import os
import queue
import re
import secrets
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cem_fast._support import optional
from cem_fast._support.counts import require_number
from cem_fast.data.root import VARIABLE
from cem_fast.experiments import provenance
from cem_fast.experiments.run import run_cell
from cem_fast.experiments.workers import Event, Task, reason

PREFIX = "CEM_FAST_"  # of the environment variables that the machines take over
EVERY = 1.0  # seconds between two messages about a stage
PATIENCE = 60.0  # seconds for a machine to come back, or for a file to become visible on a shared folder


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, and the GPUs of a run on it.

    Args:
        address: ``HOST:PORT`` of the cluster's head; ``auto`` for that of ``RAY_ADDRESS``, or else the one that runs on this machine.
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
        if not 0 <= require_number("gpus_per_run", self.gpus_per_run) < math.inf:
            raise ValueError(f"gpus_per_run must be at least 0 and finite, got {self.gpus_per_run}")


@contextmanager
def joined(cluster: Cluster) -> Iterator[Any]:
    """Connects this process to a cluster, and disconnects it at the end. A process that is connected already stays connected.

    Args:
        cluster: the cluster.

    Yields:
        The module ``ray``.

    Raises:
        ImportError: ray is not installed.
        ConnectionError: there is no cluster at the address, or it refuses this process.
        ValueError: this process is connected to another cluster, or ``RAY_ADDRESS`` has another form.
    """
    # clusters that others have started have a setting of their own
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = optional.load("ray", "a cluster", "'cem_fast[cluster]'")
    if ray.is_initialized():
        connected = ray.get_runtime_context().gcs_address
        if cluster.address not in ("auto", connected):
            raise ValueError(f"cluster must be {connected}, to which this process is connected, got {cluster.address}")
        yield ray
        return
    address = cluster.address
    if address == "auto" and (given := os.environ.get("RAY_ADDRESS")):
        address = Cluster(given).address
    main = threading.current_thread() is threading.main_thread()
    on_sigterm = signal.getsignal(signal.SIGTERM) if main else None
    try:
        if address != "auto":
            _require_answer(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # of many kinds: no address, no answer, other versions, no token
        raise ConnectionError(f"no Ray cluster at {address!r}: {reason_of(error)}") from None
    try:
        if main:
            signal.signal(signal.SIGTERM, on_sigterm)  # ray has set its own
        yield ray
    finally:
        ray.shutdown()  # which ends the runs


def run_all(
    tasks: Sequence[Task], *, cluster: Cluster, jobs: int, device: str | torch.device, fresh: bool
) -> Iterator[Event]:
    """Runs tasks on a cluster. All of its machines need the same versions, and the same folders at the same paths.

    A task whose process or machine is lost is retried once. When the caller stops, by closing the iterator or by an exception, the runs
    are stopped. What they have saved is kept.

    Args:
        tasks: number, settings and folder of every run.
        cluster: the cluster.
        jobs: runs at a time, each on its share of the cores; 0 for as many as there is room for, each on one core.
        device: ``cpu``, or ``cuda`` for the GPU that Ray gives a run.
        fresh: whether to start over instead of continuing interrupted runs.

    Yields:
        ``("started", number, ())``, ``("stage", number, (name, done, total))``, ``("finished", number, ())``,
        ``("again", number, (reason,))`` and ``("failed", number, (reason,))`` as it happens.

    Raises:
        ImportError: ray is not installed.
        ConnectionError: there is no cluster at the address, or its last machine that fits a run is lost.
        ValueError: no machine of the cluster fits a run, or the device does not fit ``gpus_per_run``.
        OSError: a machine lacks the folder or has other versions, or a run could not read or write its files.

    Example:
        >>> from cem_fast.experiments.cluster import Cluster, run_all
        >>> list(run_all([], cluster=Cluster("auto"), jobs=0, device="cpu", fresh=False))
        []
    """
    require_device(cluster, device)
    if not tasks:
        return
    tasks = [(number, config, folder.resolve()) for number, config, folder in tasks]
    with joined(cluster) as ray, _marked({folder.parent for _, _, folder in tasks}) as mark:
        runs = _Runs(ray, cluster.gpus_per_run, jobs, (mark, str(device), fresh))
        try:
            yield from runs.events(deque(tasks))
        finally:
            runs.stop()


def require_device(cluster: Cluster, device: str | torch.device) -> None:
    """Raises unless runs take GPUs of the cluster just where they compute on GPUs.

    Args:
        cluster: the cluster.
        device: ``cpu`` or ``cuda``; Ray chooses the GPU.

    Raises:
        ValueError: the device is another one, or does not fit ``gpus_per_run``.

    Example:
        >>> from cem_fast.experiments.cluster import Cluster, require_device
        >>> require_device(Cluster("auto", gpus_per_run=1), "cpu")
        Traceback (most recent call last):
        ValueError: gpus_per_run must be 0 on the device cpu, got 1
    """
    if str(device) not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda on a cluster, which chooses the GPU, got {str(device)!r}")
    if (cluster.gpus_per_run > 0) != (str(device) == "cuda"):
        allowed = "0" if str(device) == "cpu" else "above 0"
        raise ValueError(f"gpus_per_run must be {allowed} on the device {device}, got {cluster.gpus_per_run:g}")


def cores_of_run(machines: Sequence[Mapping[str, float]], gpus: float, jobs: int) -> int:
    """The most cores of a run with which so many runs fit at a time; 0 if no machine fits one.

    Args:
        machines: ``CPU`` and ``GPU`` of every machine.
        gpus: GPUs of a run.
        jobs: runs at a time; 0 for as many as there is room for.

    Example:
        >>> from cem_fast.experiments.cluster import cores_of_run
        >>> cores_of_run([{"CPU": 3}, {"CPU": 5}], gpus=0, jobs=2), cores_of_run([{"CPU": 8}], gpus=1, jobs=2)
        (3, 0)
    """

    def room(cores: int) -> int:
        return sum(
            int(min(machine.get("CPU", 0) // cores, machine.get("GPU", 0) / gpus if gpus else math.inf))
            for machine in machines
        )

    if not room(1):
        return 0
    most = int(max(machine.get("CPU", 0) for machine in machines))
    # more runs than there is room for take turns, on one core each
    return next((cores for cores in range(most, 1, -1) if 0 < jobs <= room(cores)), 1)


def reason_of(error: BaseException) -> str:
    """The reason of an error, in one line: errors of Ray hold a traceback, or advice after the first line.

    Args:
        error: the error.

    Example:
        >>> from cem_fast.experiments.cluster import reason_of
        >>> reason_of(ValueError("no answer\\n  at line 3"))
        'no answer'
    """
    cause = getattr(error, "cause", None)  # of an error in a task
    if isinstance(cause, BaseException):
        return f"{type(cause).__name__}: {reason_of(cause)}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def becomes_visible(path: Path, patience: float = PATIENCE) -> bool:
    """Whether a file of another machine is there, after a wait: network file systems remember for a while what was missing.

    Args:
        path: the file.
        patience: seconds to wait.

    Example:
        >>> from pathlib import Path
        >>> from cem_fast.experiments.cluster import becomes_visible
        >>> becomes_visible(Path("nowhere"), patience=0)
        False
    """
    until = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() >= until:
            return False
        time.sleep(1)
    return True


def _require_answer(address: str) -> None:
    """Connects once: Ray tries for minutes."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=5).close()


@contextmanager
def _marked(folders: Collection[Path]) -> Iterator[str]:
    """Puts an empty file into every folder, by which a machine knows that it sees the same folder."""
    name = f".cluster-{secrets.token_hex(8)}"
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        yield name
    finally:
        for folder in folders:
            (folder / name).unlink(missing_ok=True)


class _Runs:
    """Runs on their way: each is a generator of events."""

    def __init__(self, ray: Any, gpus: float, jobs: int, settings: tuple[str, str, bool]) -> None:
        self.ray, self.gpus, self.jobs = ray, gpus, jobs
        self.running: dict[Any, Task] = {}
        self.cores = cores_of_run(self._machines(), gpus, jobs)
        if not self.cores:
            raise ValueError(f"gpus_per_run must fit a machine of the cluster that has cores for runs, got {gpus:g}")
        environment = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
        if root := environment.get(VARIABLE):
            environment[VARIABLE] = os.path.abspath(root)
        self.settings = (os.getcwd(), _versions(), self.cores, *settings)
        self.work = ray.remote(_work).options(
            num_cpus=self.cores,
            num_gpus=gpus,
            num_returns="streaming",
            max_retries=0,
            runtime_env={"env_vars": environment},
        )

    def events(self, waiting: deque[Task]) -> Iterator[Event]:
        retried: set[int] = set()
        while waiting or self.running:
            while waiting and (not self.jobs or len(self.running) < self.jobs):
                task = waiting.popleft()
                self.running[self.work.remote(task, *self.settings)] = task
            for run in self._ready():
                task = self.running[run]
                number = task[0]
                kind, details = self._next(run)
                if kind == "died":
                    kind = "again" if number not in retried else "failed"
                    if kind == "again":
                        waiting.appendleft(task)
                    retried.add(number)
                elif kind == "broken":
                    raise OSError(details[0])
                if kind in ("again", "failed", "finished"):
                    del self.running[run]
                yield kind, number, details

    def stop(self) -> None:
        for run in self.running:
            self.ray.cancel(run, force=True)

    def _machines(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def _ready(self) -> list[Any]:
        """Runs that have an event. Ray itself would wait for a machine without end."""
        lost_at: float | None = None
        while True:
            ready, _ = self.ray.wait(list(self.running), num_returns=1, timeout=5)
            if ready:
                return list(ready)
            fits = any(m.get("CPU", 0) >= self.cores and m.get("GPU", 0) >= self.gpus for m in self._machines())
            lost_at = None if fits else lost_at or time.monotonic()
            if lost_at is not None and time.monotonic() - lost_at > PATIENCE:
                raise ConnectionError(
                    "the cluster has lost all machines that fit a run: the same command continues on others"
                )

    def _next(self, run: Any) -> tuple[str, tuple[Any, ...]]:
        """The next event; ``("died", (reason,))`` if the process or the machine is lost."""
        exceptions = self.ray.exceptions
        try:
            kind, details = self.ray.get(next(run))
            return kind, details
        except StopIteration:
            return "died", ("its process ended early",)
        except (exceptions.RayTaskError, exceptions.RuntimeEnvSetupError) as error:
            return "failed", (reason_of(error),)
        except exceptions.RayError as error:
            return "died", (reason_of(error),)


def _versions() -> dict[str, str | None]:
    """What has to be the same on all machines."""
    return {**provenance.versions(), "source": provenance.source_digest()}


def _work(
    task: Task, here: str, versions: dict[str, str | None], cores: int, mark: str, device: str, fresh: bool
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Runs a task on a machine of the cluster and yields its events."""
    host, folder = socket.gethostname(), task[2].parent
    if others := [name for name, version in _versions().items() if version != versions.get(name)]:
        yield "broken", (f"{host} differs from this machine in the version of {', '.join(others)}",)
        return
    if not becomes_visible(folder / mark):
        yield "broken", (f"{host} does not share the folder {folder}",)
        return
    with suppress(OSError):
        os.chdir(here)  # the path of the images may be relative
    events: queue.SimpleQueue[tuple[str, tuple[Any, ...]]] = queue.SimpleQueue()
    threading.Thread(target=_run, args=(events, task, device, cores, fresh), daemon=True).start()
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
    events: queue.SimpleQueue[tuple[str, tuple[Any, ...]]], task: Task, device: str, cores: int, fresh: bool
) -> None:
    """Runs a task, in a thread of its own, and puts its events into a queue."""
    _, config, folder = task
    torch.set_num_threads(cores)

    def on_stage(*details: Any) -> None:
        events.put(("stage", details))

    try:
        run_cell(config, folder, device=device, fresh=fresh, on_stage=on_stage)
        events.put(("finished", ()))
    except OSError as error:
        events.put(("broken", (f"{socket.gethostname()}: {error}",)))
    except BaseException as error:  # whatever it is, the queue must not stay empty
        events.put(("failed", (reason(error),)))
