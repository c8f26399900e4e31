"""Kernels compiled for real GPUs, without one: no spills, shared memory within limits, wide access, tensor cores."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from aot import collect, machine
from cem_fast.benchmarks import tune_kernels
from cem_fast.kernels import _configs

# One of each kernel that reads x and the bound, spread over the architectures; the rest is left to collect.py.
QUICK = [
    ("resident_statistics_kernel", {"BLOCK_D": 512}, 120),
    ("component_statistics_fwd_kernel", {"aligned": False, "DIAG": False}, 75),
    ("component_statistics_bwd_kernel", {"GATHER": False}, 90),
    ("mixture_log_prob_fwd_kernel", {"DIAG": True}, 80),
    ("mixture_log_prob_bwd_kernel", {"aligned": False, "DIAG": True}, 86),
    ("mixture_moments_kernel", {"features": "bf16"}, 100),
    ("entropy_bound_kernel", {"FROM_PARTIALS": True}, 89),
    ("scatter_kernel", {}, "gfx942"),
    ("global_log_prob_kernel", {"PRECISION": "tf32x3", "DIAG": True}, 90),
    ("global_gradient_kernel", {"PRECISION": "tf32x3", "DIAG": False}, 80),
    ("global_moments_kernel", {"PRECISION": "ieee", "DIAG": True}, "gfx90a"),
]


def place(name, wanted):
    """Where the first case of a kernel with the given fields and constants is in the list."""
    wanted = {"aligned": True, "features": "fp32"} | wanted

    def fits(case):
        fields = {"aligned": bool(case.attrs), "features": case.features, **case.constexprs}
        return case.name == name and all(fields[key] == value for key, value in wanted.items())

    return next(i for i, case in enumerate(collect.CASES) if fits(case))


@pytest.mark.parametrize("name, wanted, arch", QUICK, ids=lambda value: str(value))
def test_promises_and_table(name, wanted, arch):
    found, faults = collect.row((place(name, wanted), arch))
    assert not faults
    assert collect.written().get(collect.key_of(found), found) == found


def test_table_is_complete():
    """Of every kernel there are all rows, by one Triton or by several."""
    table = collect.written()
    by_kernel = {}
    for i, arch in collect.JOBS:
        key = collect.key(collect.CASES[i], arch)
        by_kernel.setdefault(key["kernel"], set()).add(collect.key_of(key)[1:])
    assert sum(map(len, by_kernel.values())) == len(collect.JOBS)
    recorded = {}
    for compiler, *key in table:
        if compiler.startswith("triton"):
            recorded.setdefault((compiler, key[0]), set()).add(tuple(key))
    assert {kernel for _, kernel in recorded} == set(by_kernel)
    assert all(keys == by_kernel[kernel] for (_, kernel), keys in recorded.items())


def test_nothing_in_the_table_spills_and_products_run_on_tensor_cores():
    for row in collect.written().values():
        assert row["spills"] == "0"
        if "PRECISION" in row["configuration"] and row["arch"] != "sm_75":
            assert int(row["tensor"]) > 0


def test_every_case_serves_some_architecture():
    assert {i for i, _ in collect.JOBS} == set(range(len(collect.CASES)))
    of_this_torch = {case.precision for case in collect.aot_cases()}
    assert of_this_torch == {None, "ieee" if torch.version.hip else "tf32x3"}


def test_unaligned_inputs_are_not_promised_wide_access():
    assert not any(case.vectorized for case in collect.CASES if not case.attrs)


@pytest.mark.parametrize("fault", ["spills", "shared memory", "128 bits", "no tensor-core instruction"])
def test_a_bad_kernel_is_noticed(fault, monkeypatch):
    good = collect.CASES[place("component_statistics_bwd_kernel", {"GATHER": False})]
    arch = 80
    if fault == "128 bits":  # a kernel that promises what only its aligned version can hold
        bad = dataclasses.replace(good, attrs={})
    elif fault == "no tensor-core instruction":  # a product that NVIDIA's tensor cores cannot take
        bad = collect.CASES[place("global_log_prob_kernel", {"PRECISION": "ieee", "DIAG": False})]
    elif fault == "spills":  # a tile of twice as many elements as four warps have registers
        constants = good.constexprs | {"BLOCK_N": 128, "BLOCK_D": 256}
        bad = dataclasses.replace(good, constexprs=constants, options=good.options | {"num_warps": 4})
    else:  # a kernel that is fine, on a multiprocessor with next to no memory
        bad = collect.CASES[place("mixture_log_prob_fwd_kernel", {"DIAG": True})]
        monkeypatch.setitem(machine.ARCHITECTURES, arch, machine.Limits(0, 64))
    monkeypatch.setattr(collect, "CASES", [bad])
    _, faults = collect.row((0, arch))
    assert any(fault in text for text in faults), faults


def test_a_tile_size_is_compiled_before_it_is_recommended(monkeypatch):
    fine = _configs.config("reduce", 4)
    assert tune_kernels.faults("reduce", fine, "sm_90") == []
    monkeypatch.setitem(machine.ARCHITECTURES, 90, machine.Limits(0, 64))
    (found,) = tune_kernels.faults("reduce", fine._replace(num_warps=8), "sm_90")
    assert found.startswith("reduce_kernel (fp32, aligned): ")
    assert found.endswith("bytes of shared memory, at most 0 KiB")


def test_a_sample_of_the_tile_sizes_that_are_tried_compiles():
    for family, arch in (("gradient", 86), ("product_gradient", 75)):
        config = list(tune_kernels.candidates(family))[-1]
        text, right = tune_kernels.compiled(family, config, arch, seed=0)
        assert right, text


def test_a_tile_size_that_does_not_compile_is_noticed():
    odd = _configs.Config(1, 1000, 4)  # no power of two
    text, right = tune_kernels.compiled("reduce", odd, 90, seed=0)
    assert not right
    assert "FAILED" in text
    (found,) = tune_kernels.faults("reduce", odd, "sm_90")
    assert found.startswith("reduce_kernel (fp32, aligned): ")


def test_a_device_that_is_in_no_table_brings_its_own_limits(monkeypatch):
    monkeypatch.setattr(machine, "ARCHITECTURES", dict(machine.ARCHITECTURES))
    device = SimpleNamespace(shared_memory_per_block_optin=101376, max_threads_per_multi_processor=1536, warp_size=32)
    machine.know("sm_87", device)
    machine.know("sm_90", device)
    assert machine.ARCHITECTURES[87] == machine.Limits(99, 48)
    assert machine.ARCHITECTURES[90] == machine.Limits(227, 64)
