"""A step is at most eight launches, reads x once a direction, writes its gradient once, and moves little else."""

import csv

import pytest
from cem_fast.kernels import _configs
from support.interpreter import watching
from traffic import MOST, OPERATIONS, SHAPES, TABLE, measure

LONG = pytest.mark.long


@pytest.mark.parametrize(
    "operation, shape, diag",
    [
        pytest.param("CEMLoss step", (64, 512, 1, 2), True),
        pytest.param("mixture_log_prob step", (64, 512, 1, 2), False),
        *(pytest.param(name, (520, 512, 4, 3), diag, marks=LONG) for name in OPERATIONS for diag in (False, True)),
        *(pytest.param(name, (64, 4096, 1, 5), diag, marks=LONG) for name in OPERATIONS for diag in (False, True)),
    ],
)
def test_bytes_and_launches(operation, shape, diag):
    row = measure(operation, shape, diag)
    assert 0 < row["launches"] <= 8
    twice = operation == "CEMLoss step" and diag and shape[1] > 512
    assert row["times x is read"] == (3 if twice else 2)
    assert row["times dx is written"] == 1
    assert 0.9 <= row["ratio"] <= MOST


@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
def test_launches_where_labels_are_counted(diag, monkeypatch):
    monkeypatch.setattr(_configs, "PAIRWISE_SORT_ROWS", 512)
    # dimensions that no program holds at once
    step, _ = OPERATIONS["CEMLoss step"](520, 129, 2, 1, diag)
    with watching() as seen:
        step()
    assert seen.launches["place_kernel"] == 1
    assert seen.launches.total() <= 8


@LONG
def test_table():
    with TABLE.open(newline="") as file:
        file.readline()
        rows = list(csv.DictReader(file))
    assert len(rows) == len(OPERATIONS) * len(SHAPES) * 2
    for row in rows:
        shape = tuple(int(row[size]) for size in "NDCK")
        again = measure(row["operation"], shape, row["variances"] == "diag")
        assert {name: str(value) for name, value in again.items()} == row
