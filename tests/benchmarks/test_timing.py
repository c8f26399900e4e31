"""Timing: order of the calls, buffers, and the calls inside the clock."""

import gc
import time

import pytest
import torch
from cem_fast.benchmarks import machine, timing
from cem_fast.benchmarks.timing import SETS, Contender, CpuClock, CudaClock, quantiles, race


class Scripted:
    """A clock that records the calls and returns given times."""

    def __init__(self, **times):
        self.times, self.ran = times, []

    def time(self, contender, buffers):
        self.ran.append((contender.key, buffers))
        contender.run(buffers)
        return self.times[contender.key]


def idle(_):
    return None


def test_contenders_are_interleaved_on_rotated_buffers():
    clock = Scripted(a=1.0, b=1.0, c=1.0)
    found = race([Contender(key, idle) for key in "abc"], clock, budget_s=1, most=12)
    raced = clock.ran[3:]  # one call each estimates the time per call
    for turn in range(12):
        round_ = raced[3 * turn : 3 * turn + 3]
        assert {key for key, _ in round_} == set("abc")
        assert {buffers for _, buffers in round_} == {turn % SETS}
    orders = {tuple(key for key, _ in raced[3 * turn : 3 * turn + 3]) for turn in range(12)}
    assert len(orders) > 1
    assert found["a"].rounds == 12


def test_slow_contenders_run_in_few_rounds_spread_evenly():
    clock = Scripted(fast=1.0, slow=1000.0)
    found = race([Contender(key, idle) for key in ("fast", "slow")], clock, budget_s=0.03, fewest=3, most=30)
    assert (found["fast"].rounds, found["slow"].rounds) == (30, 3)
    where = [index for index, (key, _) in enumerate(clock.ran[2:]) if key == "slow"]
    assert where[1] - where[0] >= 9
    assert where[2] - where[1] >= 9


def test_preparation_is_not_timed():
    clock = CpuClock()
    slow_to_start = Contender("a", idle, before=lambda _: time.sleep(0.05))
    slow = Contender("b", lambda _: time.sleep(0.05))
    assert clock.time(slow_to_start, 0) < 25
    assert clock.time(slow, 0) >= 50


def test_spinning_threads_get_time_to_settle():
    clock = CpuClock()
    start = time.perf_counter()
    assert clock.time(Contender("a", idle, settles=True), 0) < 1e3 * timing.SETTLE_S
    assert time.perf_counter() - start >= timing.SETTLE_S


@pytest.mark.parametrize("settles", [False, True])
def test_an_untimed_call_wakes_sleeping_threads(settles, monkeypatch):
    monkeypatch.setattr(timing, "SETTLE_S", 0.0)
    happened = []
    own = Contender("a", lambda i: happened.append(("run", i)), before=lambda i: happened.append(("before", i)))
    found = race([own, Contender("b", idle, settles=settles)], CpuClock(), budget_s=1.0, fewest=3, most=3)
    assert found["a"].rounds == 3
    counted = [0, 0, 1, 2]  # the first estimates the time per call
    buffers = [b for i in counted for b in ((i + 1) % timing.SETS, i)] if settles else counted
    assert happened == [(what, i) for i in buffers for what in ("before", "run")]


def test_quantiles_are_measured_values():
    assert quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (2.0, 3.0, 5.0, 6)
    assert quantiles([7.0]) == (7.0, 7.0, 7.0, 1)


def test_cuda_clock_flushes_the_cache_and_times_by_events(monkeypatch):
    """Uses events that only record the order of the calls."""
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("event")

        def elapsed_time(self, end):
            return 1.5

    class Flushed:
        def zero_(self):
            happened.append("flush")

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda n, dtype, device: Flushed() if device == "gpu" else empty(n))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: happened.append("wait"))
    clock = CudaClock("gpu")
    contender = Contender("a", lambda _: happened.append("run"), lambda _: happened.append("before"))
    assert clock.time(contender, 0) == 1.5
    assert happened == ["before", "flush", "event", "run", "event", "wait"]


def test_peak_memory_of_a_call():
    cpu = torch.device("cpu")
    if machine.peak_of(lambda: None, cpu) is None:
        pytest.skip("the system does not report peak memory")
    held = torch.ones(10 << 18)
    found = machine.peak_of(lambda: torch.ones(40 << 18).sum(), cpu)
    assert 38 <= found <= 60
    assert machine.peak_of(lambda: held.sum(), cpu) < 10


def test_the_command_restarts_once_to_tune_the_allocator(monkeypatch):
    started = []
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(machine.os, "execve", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(machine.sys, "orig_argv", ["python", "-m", "cem_fast", "bench", "--quick"])
    monkeypatch.delenv(machine.MALLOC, raising=False)
    machine.keep_large_blocks()
    ((program, arguments, environment),) = started
    assert arguments == [program, "-m", "cem_fast", "bench", "--quick"]
    assert environment[machine.MALLOC] == machine.KEEP_LARGE_BLOCKS
    monkeypatch.setenv(machine.MALLOC, "the user's own")
    machine.keep_large_blocks()
    assert len(started) == 1


def test_threads_are_pinned_and_restored():
    before = torch.get_num_threads()
    with machine.pinned(1) as words:
        assert torch.get_num_threads() == 1
        assert words.startswith("1")
    assert torch.get_num_threads() == before
    with (
        pytest.raises(ValueError, match="threads must be at most the .* cores of this process, got 100000"),
        machine.pinned(100_000),
    ):
        pass


def test_older_objects_are_hidden_from_the_garbage_collector_inside_the_block():
    old = [[] for _ in range(1_000)]
    with machine.older_objects_aside():
        assert gc.get_freeze_count() >= len(old)
        assert not any(found is old for found in gc.get_objects())
    assert gc.get_freeze_count() == 0
    assert any(found is old for found in gc.get_objects())
