"""Runs of a grid in parallel, in worker processes that share the cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import Any

import torch

from cem_fast.config import RunConfig
from cem_fast.experiments.run import run_cell

Task = tuple[int, RunConfig, Path]
Event = tuple[str, int, tuple[Any, ...]]


def num_cores() -> int:
    """Number of cores that this process may use.

    Example:
        >>> from cem_fast.experiments import workers
        >>> workers.num_cores() >= 1
        True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(tasks: Sequence[Task], *, jobs: int, device: str | torch.device, fresh: bool) -> Iterator[Event]:
    """Runs tasks in at most ``jobs`` worker processes. Each gets the same share of the cores, however many tasks there are.

    A task whose process dies, such as for lack of memory, is retried once in a new process. When the caller stops, by closing the iterator
    or by an exception, the processes are terminated. What they have saved is kept.

    Args:
        tasks: number, settings and folder of every run.
        jobs: number of processes.
        device: device to compute on.
        fresh: whether to start over instead of continuing interrupted runs.

    Yields:
        ``("started", number, ())``, ``("stage", number, (name, done, total))``, ``("finished", number, ())``,
        ``("again", number, (reason,))`` and ``("failed", number, (reason,))`` as it happens.

    Raises:
        OSError: a run could not read or write its files.

    Example:
        >>> from cem_fast.experiments import workers
        >>> list(workers.run_all([], jobs=2, device="cpu", fresh=False))
        []
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, num_cores() // jobs)
    waiting: deque[Task] = deque(tasks)
    retried: set[int] = set()
    idle: list[_Worker] = []
    busy: list[_Worker] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < jobs:
                worker = idle.pop() if idle else _Worker(context, str(device), threads, fresh)
                busy.append(worker)
                worker.begin(waiting.popleft())
            ready = wait([worker.connection for worker in busy])
            for worker in [worker for worker in busy if worker.connection in ready]:
                number = worker.task[0]
                kind, details = worker.receive()
                if kind == "died":
                    kind = "again" if number not in retried else "failed"
                    if kind == "again":
                        waiting.appendleft(worker.task)
                    retried.add(number)
                    busy.remove(worker)
                elif kind == "broken":
                    raise details[0]
                elif kind in ("finished", "failed"):
                    busy.remove(worker)
                    idle.append(worker)
                yield kind, number, details
        for worker in idle:  # nothing is left to do: let them exit on their own
            worker.dismiss()
    finally:
        for worker in [*idle, *busy]:
            worker.process.terminate()
        for worker in [*idle, *busy]:
            worker.process.join()


def reason(error: BaseException) -> str:
    """Why a run failed, in one line.

    Args:
        error: the exception of the run.

    Raises:
        OSError: the error itself if it is one, since every other run would fail to write its results as well.

    Example:
        >>> from cem_fast.experiments import workers
        >>> workers.reason(ValueError("the training loss is nan\\nat epoch 3"))
        'the training loss is nan at epoch 3'
    """
    if isinstance(error, OSError):
        raise error
    return " ".join(str(error).split()) or type(error).__name__


class _Worker:
    """A worker process that runs tasks one at a time. It has its own pipe: a killed process leaves no shared lock held."""

    task: Task

    def __init__(self, context: SpawnContext, device: str, threads: int, fresh: bool):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, device, threads, fresh), daemon=True)
        with _interruptions_blocked():
            self.process.start()
        theirs.close()  # so that the pipe closes when the process ends

    def begin(self, task: Task) -> None:
        self.task = task
        with suppress(OSError):  # the process has died: receive() reports it
            self.connection.send(task)

    def receive(self) -> tuple[str, tuple[Any, ...]]:
        """The next message; ``("died", (reason,))`` if the process has ended."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
        status = self.process.exitcode or 0
        died = f"its process was killed by signal {-status}"
        return "died", (died if status < 0 else f"its process died with exit status {status}",)

    def dismiss(self) -> None:
        with suppress(OSError):
            self.connection.send(None)
        self.process.join()


@contextmanager
def _interruptions_blocked() -> Iterator[None]:
    """Blocks Ctrl-C for processes that are started here, before they have imported anything. The parent handles it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: Connection, device: str, threads: int, fresh: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where signals could not be blocked at the start
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that half-written files are removed on exit
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        while (task := connection.recv()) is not None:
            _run(connection, task, device, fresh)
    except (EOFError, ConnectionError):  # the parent has ended
        os._exit(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # an exception must not interrupt the interpreter's shutdown


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(connection: Connection, task: Task, device: str, fresh: bool) -> None:
    """Runs a task and sends its events."""
    _, config, folder = task
    connection.send(("started", ()))

    def on_stage(*details: Any) -> None:
        connection.send(("stage", details))

    try:
        run_cell(config, folder, device=device, fresh=fresh, on_stage=on_stage)
    except OSError as error:
        connection.send(("broken", (error,)))
    except Exception as error:
        connection.send(("failed", (reason(error),)))
    else:
        connection.send(("finished", ()))
