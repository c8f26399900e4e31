"""Runs of a grid side by side, on processes of their own that share the cores."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cem_fast import experiment
from cem_fast.config import RunConfig

PATIENCE = 1.0  # seconds between two looks at whether every worker is still alive


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(
    tasks: Sequence[tuple[int, RunConfig, Path]], *, jobs: int, device: str | torch.device
) -> Iterator[tuple[str, int, tuple[Any, ...]]]:
    """Runs the tasks on ``jobs`` processes with an equal share of the cores each.

    However the caller stops, by closing the iterator or by an exception, the processes are ended; what they had saved stays.

    Args:
        tasks: the number, the settings and the folder of every run.
        jobs: number of processes.
        device: where to compute.

    Yields:
        ``("started", number, ())``, ``("stage", number, (name, done, total))`` and ``("finished", number, ())`` as it happens.

    Raises:
        ChildProcessError: a process died.
        Exception: what went wrong in a run.
    """
    context = multiprocessing.get_context("spawn")
    waiting, events = context.Queue(), context.Queue()
    waiting.cancel_join_thread()  # tasks that nobody takes any more must not hold up the end
    for task in tasks:
        waiting.put(task)
    for _ in range(jobs):
        waiting.put(None)
    threads = max(1, num_cores() // jobs)
    workers = [
        context.Process(target=_work, args=(waiting, events, str(device), threads), daemon=True) for _ in range(jobs)
    ]
    with _deaf_to_interruptions():
        for worker in workers:
            worker.start()
    try:
        unfinished = len(tasks)
        while unfinished:
            try:
                kind, number, details = events.get(timeout=PATIENCE)
            except queue.Empty:
                dead = [worker.exitcode for worker in workers if worker.exitcode]
                if dead:
                    how = f"was killed by signal {-dead[0]}" if dead[0] < 0 else f"died with exit status {dead[0]}"
                    raise ChildProcessError(f"a process of the grid {how}") from None
                continue
            if kind == "failed":
                raise details[0]
            unfinished -= kind == "finished"
            yield kind, number, details
        for worker in workers:  # nothing is left to do: let them go in peace
            worker.join()
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()


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


def _work(waiting: Any, events: Any, device: str, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where the start could not see to it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that half-written files are removed on the way out
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # do not outlive it
    torch.set_num_threads(threads)
    while (task := waiting.get()) is not None:
        number, config, folder = task
        events.put(("started", number, ()))

        def on_stage(*details: Any, number: int = number) -> None:
            events.put(("stage", number, details))

        try:
            experiment.run(config, folder, device=device, on_stage=on_stage)
        except Exception as error:
            events.put(("failed", number, (error,)))
            break
        events.put(("finished", number, ()))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the interpreter's own end must not be interrupted by an exception
