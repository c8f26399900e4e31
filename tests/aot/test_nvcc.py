"""The CUDA C++ kernels compiled by nvcc: a part of what collect.py compares with the table."""

import re
import shutil

import pytest

pytest.importorskip("triton")

from aot import collect, nvcc

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@needs_nvcc
def test_one_file_as_the_table_has_it():
    table = collect.written()
    found = nvcc.rows((nvcc.SOURCES / "groups.cu", 90))
    assert {row["kernel"] for row, _ in found} == {"count_kernel", "place_kernel", "sort_kernel"}
    for row, faults in found:
        assert not faults
        assert table.get(collect.key_of(row), row) == row


@needs_nvcc
def test_a_kernel_that_spills_is_noticed():
    assert nvcc.starved()


@needs_nvcc
def test_a_warning_is_an_error(tmp_path):
    source = tmp_path / "unused.cu"
    source.write_text("__global__ void unused_kernel(int*) { int never; }\n")
    with pytest.raises(RuntimeError, match=r"unused.cu for sm_90: .*never"):
        nvcc.rows((source, 90))


def test_names_are_readable():
    symbol = "_ZN8cem_fast4cuda15distance_kernelILb1E6__halfEEvNS_8FeaturesE"
    assert nvcc.readable(symbol) == ("distance_kernel", "true half")
    assert nvcc.readable("_ZN8cem_fast4cuda12place_kernelENS0_4SortE") == ("place_kernel", "")


def test_the_table_has_every_kernel_on_every_architecture():
    rows = [row for row in collect.written().values() if row["compiler"].startswith("nvcc")]
    on = {}
    for row in rows:
        on.setdefault((row["kernel"], row["configuration"]), set()).add(row["arch"])
        assert row["spills"] == "0"
        assert 0 < float(row["occupancy"]) <= 1
    assert all(archs == {f"sm_{arch}" for arch in nvcc.LIMITS} for archs in on.values())
    code = "".join(header.read_text() for header in nvcc.SOURCES.glob("*.cuh"))
    defined = set(re.findall(r"__global__[^;{]*?(\w+_kernel)\(", code))
    assert {kernel for kernel, _ in on} == defined
