"""Kernels compiled for real GPUs, without one: no spills, shared memory within limits, wide access on aligned inputs."""

import dataclasses

import pytest

pytest.importorskip("triton")

from aot import collect, machine

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
    version, table = collect.written()
    want = table[tuple(found[column] for column in collect.KEY)]
    assert version != collect.triton.__version__ or found == want


def test_table_is_complete():
    _, table = collect.written()
    keys = {tuple(collect.key(case, arch).values()) for case in collect.CASES for arch in machine.ARCHITECTURES}
    assert len(keys) == len(collect.CASES) * len(machine.ARCHITECTURES)
    assert set(table) == keys
    assert all(row["spills"] == "0" for row in table.values())


def test_unaligned_inputs_are_not_promised_wide_access():
    assert not any(case.vectorized for case in collect.CASES if not case.attrs)


@pytest.mark.parametrize("fault", ["spills", "shared memory", "128 bits"])
def test_a_bad_kernel_is_noticed(fault, monkeypatch):
    good = collect.CASES[place("component_statistics_bwd_kernel", {"GATHER": False})]
    arch = 80
    if fault == "128 bits":  # a kernel that promises what only its aligned version can hold
        bad = dataclasses.replace(good, attrs={})
    elif fault == "spills":  # a tile of twice as many elements as four warps have registers
        constants = good.constexprs | {"BLOCK_N": 128, "BLOCK_D": 256}
        bad = dataclasses.replace(good, constexprs=constants, options=good.options | {"num_warps": 4})
    else:  # a kernel that is fine, on a multiprocessor with next to no memory
        bad = collect.CASES[place("mixture_log_prob_fwd_kernel", {"DIAG": True})]
        monkeypatch.setitem(machine.ARCHITECTURES, arch, machine.Limits(0, 64))
    monkeypatch.setattr(collect, "CASES", [bad])
    _, faults = collect.row((0, arch))
    assert any(fault in text for text in faults), faults
