"""Runs in worker processes."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace

import pytest

from cem_fast.experiments import saved_run, workers


@pytest.mark.parametrize("kills", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_whose_process_is_killed_is_retried_once(tiny_grid, tmp_path, kills):

    (config, *_) = replace(tiny_grid, undefended=(), attacks=("ridge",), epochs=10).runs()
    events = []
    for kind, number, details in workers.run_all([(7, config, tmp_path / "run")], jobs=2, device="cpu", fresh=False):
        assert number == 7
        events.append((kind, *details) if kind != "stage" else ("stage",))
        if kind == "stage" and kills:
            kills -= 1
            multiprocessing.active_children()[0].kill()
    ends = [event for event in events if event[0] in ("again", "failed", "finished")]
    died = "its process was killed by signal 9"
    assert ends in ([("again", died), ("finished",)], [("again", died), ("failed", died)])
    assert (tmp_path / "run" / saved_run.DESCRIPTION).exists() == (ends[-1][0] == "finished")
    assert events.count(("started",)) == 2
    assert not multiprocessing.active_children()
