"""A grid that is killed repeatedly has the same results in the end as an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml

from cem_fast.experiments import saved_run
from cem_fast.experiments.results import RESULTS
from cem_fast.training import resume

SETTINGS = {
    "name": "killed", "image_size": 16, "seeds": [0], "cem_components": 2, "epochs": 20, "batch_size": 4, "attack_epochs": 30,
    "attacks": ["decoder", "ridge"], "cem_weights": [0, 0.35],
}  # fmt: skip


def start(config, folder) -> subprocess.Popen:
    """Starts the grid on two processes, in a new process group."""
    command = [sys.executable, "-m", "cem_fast", "evaluate", "--config", str(config), "--folder", str(folder)]
    return subprocess.Popen(
        [*command, "--jobs", "2"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def without_times(results: dict) -> dict:
    """The content of results.json without times and without the folder in the command."""
    runs = [{key: value for key, value in run.items() if key != "seconds"} for run in results["runs"]]
    return {**results, "runs": runs, "command": None}


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_a_grid_that_is_killed_at_random_ends_like_an_undisturbed_one(tiny_images, tmp_path):
    kills, defenses = 10, ["noise", "noise_arl"]
    config, whole, killed = tmp_path / "grid.yaml", tmp_path / "whole", tmp_path / "killed"
    config.write_text(yaml.safe_dump({**SETTINGS, "data": [str(tiny_images)], "defenses": defenses}))
    undisturbed = start(config, whole)
    undisturbed.stdout.readline()  # a run has started
    began = time.monotonic()
    undisturbed.communicate()
    work = time.monotonic() - began
    assert undisturbed.returncode == 0
    expected = json.loads((whole / RESULTS).read_text())
    assert len(expected["runs"]) == 1 + 2 * len(defenses)

    seed = random.randrange(2**32)
    print(f"kills drawn with seed {seed}")
    draw, halfway = random.Random(seed), 0
    for _ in range(kills):
        process = start(config, killed)
        process.stdout.readline()
        after = draw.uniform(0, work / 3)  # the whole grid must not be over before the last kill
        threading.Event().wait(after)
        alone = draw.random() < 0.5
        (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)  # its processes must not outlive it
        process.communicate()
        if alone:
            wait_for_end(process.pid)
        halfway += any(killed.rglob(resume.NAME))
    last = start(config, killed)
    said, _ = last.communicate()
    assert last.returncode == 0
    reused = said.count("found on disk")
    print(
        f"{work:.0f} s of work; {halfway} of {kills} kills left a half-trained run; {reused} of {len(expected['runs'])} runs "
        "were found on disk in the end"
    )
    results = json.loads((killed / RESULTS).read_text())
    assert without_times(results) == without_times(expected)
    for run, twin in zip(results["runs"], expected["runs"]):
        descriptions = [
            saved_run.read_description(folder / each["checkpoint"]) for folder, each in ((killed, run), (whole, twin))
        ]
        assert descriptions[0].files == descriptions[1].files  # named after their content: weights and measurements
        assert descriptions[0].curves == descriptions[1].curves
        assert {path.name for path in (killed / run["checkpoint"]).iterdir()} == {
            path.name for path in (whole / twin["checkpoint"]).iterdir()
        }


def wait_for_end(group: int) -> None:
    """Waits until no process of a group is left."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(group, signal.SIGKILL)
    raise AssertionError("a process of the grid has outlived it by a minute")
