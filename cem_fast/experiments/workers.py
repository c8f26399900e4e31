"""Runs of a grid side by side, on processes of their own that share the cores."""

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


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(
    tasks: Sequence[Task], *, jobs: int, device: str | torch.device, fresh: bool
) -> Iterator[tuple[str, int, tuple[Any, ...]]]:
    """Does the tasks on at most ``jobs`` processes, which have an equal share of the cores each, however many tasks there are.

    A task whose process dies, as when the system is short of memory, is tried once more, on a new process. However the caller stops, by
    closing the iterator or by an exception, the processes are ended; what they had saved stays.

    Args:
        tasks: the number, the settings and the folder of every run.
        jobs: number of processes.
        device: where to compute.
        fresh: whether runs start anew where they could go on.

    Yields:
        ``("started", number, ())``, ``("stage", number, (name, done, total))``, ``("finished", number, ())``,
        ``("again", number, (reason,))`` and ``("failed", number, (reason,))`` as it happens.

    Raises:
        OSError: what kept a run from reading or writing its files.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, num_cores() // jobs)
    waiting, tried = deque(tasks), set()
    idle: list[_Worker] = []
    busy: list[_Worker] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < jobs:
                worker = idle.pop() if idle else _Worker(context, str(device), threads, fresh)
                busy.append(worker)
                worker.begin(waiting.popleft())
            by_connection = {worker.connection: worker for worker in busy}
            for connection in wait(list(by_connection)):
                worker = by_connection[connection]
                number = worker.task[0]
                try:
                    kind, details = connection.recv()
                except (EOFError, OSError):
                    kind, details = "again" if number not in tried else "failed", (worker.death(),)
                    if kind == "again":
                        waiting.appendleft(worker.task)
                    tried.add(number)
                    busy.remove(worker)
                else:
                    if kind == "broken":
                        raise details[0]
                    if kind in ("finished", "failed"):
                        busy.remove(worker)
                        idle.append(worker)
                yield kind, number, details
        for worker in idle:  # nothing is left to do: let them go in peace
            worker.dismiss()
    finally:
        for worker in [*idle, *busy]:
            worker.process.terminate()
        for worker in [*idle, *busy]:
            worker.process.join()


def reason(error: Exception) -> str:
    """Why a run failed, in one line.

    Raises:
        OSError: the error itself if it is one: whatever keeps results from being written would meet every other run as well.
    """
    if isinstance(error, OSError):
        raise error
    return " ".join(str(error).split()) or type(error).__name__


class _Worker:
    """A process that does one task after the other. It has a line of its own to this one: a killed process leaves no shared lock held."""

    task: Task

    def __init__(self, context: SpawnContext, device: str, threads: int, fresh: bool):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, device, threads, fresh), daemon=True)
        with _deaf_to_interruptions():
            self.process.start()
        theirs.close()  # so that the line ends when the process does

    def begin(self, task: Task) -> None:
        self.task = task
        with suppress(OSError):  # it has died: the end of the line will say so
            self.connection.send(task)

    def dismiss(self) -> None:
        with suppress(OSError):
            self.connection.send(None)
        self.process.join()

    def death(self) -> str:
        """What became of the process."""
        self.process.join()
        status = self.process.exitcode
        return (
            f"its process was killed by signal {-status}"
            if status < 0
            else f"its process died with exit status {status}"
        )


@contextmanager
def _deaf_to_interruptions() -> Iterator[None]:
    """Processes that are started here inherit that Ctrl-C is the parent's to handle, before they have imported anything."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(line: Connection, device: str, threads: int, fresh: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where the start could not see to it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that half-written files are removed on the way out
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # do not outlive it
    torch.set_num_threads(threads)
    try:
        while (task := line.recv()) is not None:
            _answer(line, task, device, fresh)
    except (EOFError, ConnectionError):  # the parent is gone
        os._exit(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the interpreter's own end must not be interrupted by an exception


def _answer(line: Connection, task: Task, device: str, fresh: bool) -> None:
    """Does a task and says how it goes on."""
    _, config, folder = task
    line.send(("started", ()))

    def on_stage(*details: Any) -> None:
        line.send(("stage", details))

    try:
        run_cell(config, folder, device=device, fresh=fresh, on_stage=on_stage)
    except OSError as error:
        line.send(("broken", (error,)))
    except Exception as error:
        line.send(("failed", (reason(error),)))
    else:
        line.send(("finished", ()))
