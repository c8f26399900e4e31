"""The speed model: what its parts say of simple kernels, and that the table keeps to them."""

import csv

import pytest

pytest.importorskip("triton")

from aot import gpu_model
from aot.device import H200, L2, LAUNCH_US, Launch, Work, in_flight, microseconds, utilization


def launch(blocks, registers=32, threads=128, shared=0):
    return Launch("kernel", blocks, threads, registers, shared)


def test_a_kernel_that_streams_reaches_the_rate_of_a_copy():
    work = Work(hbm=1, read=4e9, written=4e9, requested=8192)
    assert utilization(launch(1 << 20), work, H200) == 1
    assert microseconds(launch(1 << 20), work, H200) == pytest.approx(8e9 / 4.3e6 + LAUNCH_US, rel=0.01)


def test_too_few_bytes_in_flight_slow_memory_down():
    few, many = (launch(1 << 20, registers) for registers in (255, 32))
    work = Work(hbm=1, read=8e9, requested=2048, pipelined=True)
    assert in_flight(few, work, H200) == 2 * 2048
    assert utilization(few, work, H200) < 0.5 < utilization(many, work, H200)


def test_waves_of_blocks_wait_for_each_other():
    one, two = (microseconds(launch(blocks, 255), Work(hbm=10), H200) for blocks in (264, 265))
    assert two - LAUNCH_US == pytest.approx(2 * (one - LAUNCH_US))


def test_work_that_all_blocks_wait_for_is_added():
    alone, behind = (microseconds(launch(264), Work(hbm=10, before=of), H200) for of in (None, Work(l2=11)))
    assert behind - alone == pytest.approx(11 * L2 / 1980)


@pytest.mark.parametrize("resources, blocks", [((128, 32, 0), 16), ((128, 128, 0), 4), ((128, 32, 100 << 10), 2)])
def test_registers_threads_and_shared_memory_limit_blocks(resources, blocks):
    threads, registers, shared = resources
    assert H200.resident(launch(1, registers, threads, shared)) == blocks


def test_the_first_version_is_predicted_as_in_the_table():
    with gpu_model.TABLE.open(newline="") as file:
        written = [row for row in csv.DictReader(file) if row["version"] == "0.1"]
    assert written == list(gpu_model.before())


def test_a_difference_is_noticed_but_not_noise_of_the_host():
    row = next(gpu_model.before())
    assert gpu_model.alike("host_us", "20", "30", row)
    assert not gpu_model.alike("host_us", "20", "90", row)
    assert not gpu_model.alike("registers", "20", "21", row)
