"""Interrupted training resumes with the bits of an uninterrupted run, and only from its own snapshot."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save

from cem_fast import CEMLoss, CEMSchedule, defenses, models, training
from cem_fast.cli import main as cli
from cem_fast.config import LATER, RunConfig
from cem_fast.experiments import saved_run
from cem_fast.experiments.build import load_data
from cem_fast.experiments.grid import check_folder
from cem_fast.experiments.results import RESULTS
from cem_fast.training.resume import NAME, Snapshot

CONFIG = RunConfig(image_size=16, epochs=4, batch_size=8, seed=1, noise_std=0.1, pruned_channels=0.3)


@pytest.fixture
def splits(tiny_grid):
    (path,) = tiny_grid.data
    return load_data(RunConfig(data=path, image_size=16))


class Interrupted(Exception):
    pass


def trained(splits, config, *, snapshot=None, stop=None):
    """The state after training, and the history; network and defense are new, as in a new process."""
    torch.manual_seed(0)
    model = models.build("slim", image_shape=splits.image_shape, num_classes=3, cut=2, bottleneck=8)
    defense = defenses.build(config.defense, **{key: asdict(config)[key] for key in defenses.settings()})
    cem = CEMLoss(num_classes=3, num_components=2, noise_std=0.1, covariance_type="diag")

    def on_epoch(record):
        if record.epoch == stop:
            raise Interrupted

    options = {"cem": cem, "schedule": CEMSchedule(0.7), "on_epoch": on_epoch, "snapshot": snapshot}
    history = training.train(model, splits, defense, config=config, **options)
    state = {
        f"{name}.{key}": value
        for name, part in (("model", model), ("defense", defense), ("cem", cem))
        for key, value in part.state_dict().items()
    }
    return state, [replace(record, seconds=0) for record in history]


@pytest.mark.parametrize(
    "own, stops",
    [
        ({"defense": "noise"}, (1, 2, 4)),
        ({"defense": "noise_arl", "precision": "fp16", "accumulate": 2}, (3,)),
        ({"defense": "patrol"}, (2, 4)),  # before its channels are pruned, and after
    ],
)
def test_interrupted_training_ends_with_the_bits_of_an_uninterrupted_run(splits, tmp_path, own, stops):
    if own["defense"] == "patrol":
        pytest.importorskip("torch_pruning")
    config = replace(CONFIG, **own)
    state, history = trained(splits, config)
    for stop in stops:  # at the end of that epoch, before it is kept
        snapshot = Snapshot(tmp_path / str(stop), {"epochs": 4})
        with pytest.raises(Interrupted):
            trained(splits, config, snapshot=snapshot, stop=stop)
        assert snapshot.path.exists() == (stop > 1)
        torch.manual_seed(stop)  # what the new process has drawn before does not matter
        again, entries = trained(splits, config, snapshot=snapshot)
        assert entries == history
        assert again.keys() == state.keys()
        assert all(torch.equal(again[key], value) for key, value in state.items())
    untouched, _ = trained(splits, replace(config, epochs=2))
    assert any(not torch.equal(untouched[key], value) for key, value in state.items() if key in untouched)


def test_a_finished_training_is_not_repeated(splits, tmp_path, monkeypatch):
    snapshot = Snapshot(tmp_path, {})
    state, history = trained(splits, CONFIG, snapshot=snapshot)
    monkeypatch.setattr("cem_fast.training.loop._Training.epoch", None)
    again, entries = trained(splits, CONFIG, snapshot=snapshot)
    assert entries == history
    assert all(torch.equal(again[key], value) for key, value in state.items())


def test_a_snapshot_holds_any_tree_and_the_callers_records(tmp_path):
    beside = [{"epoch": 1, "nats": None}]
    tree = {"a": {0: torch.arange(3), 1: [torch.zeros(2, 0), None, 0.1, float("inf")]}, "b": "text", "c": True}
    Snapshot(tmp_path, {"x": (1, 2)}, beside=beside).save(tree)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    found = Snapshot(tmp_path, {"x": (1, 2)})
    loaded = found.load()
    assert torch.equal(loaded["a"].pop(0), tree["a"].pop(0))
    assert loaded["a"][1].pop(0).shape == (2, 0)
    assert loaded == {"a": {1: [None, 0.1, float("inf")]}, "b": "text", "c": True}
    assert found.beside == beside
    assert Snapshot(tmp_path, {}, resume=False).load() is None
    assert Snapshot(tmp_path / "nowhere", {}).load() is None


def test_damaged_snapshots_and_those_of_another_training_are_refused(tmp_path):
    snapshot = Snapshot(tmp_path, {"epochs": 40, "code": "a"})
    snapshot.save({"x": torch.zeros(1000)})
    assert snapshot.fits()
    other = Snapshot(tmp_path, {"epochs": 50, "code": "a"})
    with pytest.raises(ValueError, match=f"{NAME} cannot be continued: epochs was 40 and is 50$"):
        other.load()
    assert not other.fits()
    content = snapshot.path.read_bytes()
    for damaged in (b"", content[:7], content[:2000], pickle.dumps({"x": 1}), save({"x": torch.zeros(1)})):
        snapshot.path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{NAME} is damaged, or no training that was interrupted"):
            snapshot.load()
        assert not snapshot.fits()
        assert snapshot.owner() == {}


KILLED = """
import os, sys
import torch
from cem_fast.cli import main as cli
from cem_fast.training import resume as snapshot

torch.set_num_threads(1)
save, saved = snapshot.Snapshot.save, []

def killing(self, state):
    save(self, state)
    saved.append(1)
    if len(saved) == 2:
        os.kill(os.getpid(), 9)

snapshot.Snapshot.save = killing
cli.main(sys.argv[1:])
"""


def test_train_resumes_after_kill_9(tiny_images, tmp_path, capfd):
    shared = ["--data", str(tiny_images), "--image-size", "16", "--epochs", "4", "--batch-size", "8"]
    command = ["train", *shared, "--cem-components", "2", "--cem-weight", "0.5", "--folder"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    done = subprocess.run([sys.executable, "-c", KILLED, *command, str(killed)], capture_output=True, timeout=250)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in killed.iterdir()] == [NAME]

    other = [*command, str(killed), "--epochs", "5"]
    for extra in ([], ["--resume"]):
        assert cli.main([*other, *extra]) == 2
        assert (
            "killed holds a run of other settings, which would be lost: give this one a --folder of its own (epochs was "
            in (capfd.readouterr().err)
        )
    assert cli.main([*command, str(killed), "--resume"]) == 0
    assert cli.main([*command, str(whole), "--resume"]) == 0  # from the beginning where there is nothing
    runs = [saved_run.load_run(folder) for folder in (killed, whole)]
    for part in ("model", "loss"):
        states = [getattr(run, part).state_dict() for run in runs]
        assert all(torch.equal(states[0][key], value) for key, value in states[1].items())
    entries = [[replace(entry, seconds=0.0) for entry in run.description.history] for run in runs]
    assert entries[0] == entries[1]
    assert runs[0].description.curves == runs[1].description.curves
    assert len(entries[0]) == len(runs[0].description.curves) == 4
    assert not (killed / NAME).exists()

    capfd.readouterr()
    before = (killed / saved_run.DESCRIPTION).read_bytes()
    assert cli.main([*command, str(killed), "--resume"]) == 0
    assert "killed holds the finished run of these settings" in capfd.readouterr().out
    assert cli.main(other) == 2
    assert "(epochs was 4 and is 5)" in capfd.readouterr().err
    assert (killed / saved_run.DESCRIPTION).read_bytes() == before


def test_later_settings_default_to_the_behavior_of_earlier_runs(finished, tmp_path):
    record = finished.results.runs[0]
    settings = {key: value for key, value in record.settings.items() if key not in LATER}
    assert RunConfig.from_json(settings) == record.config
    results = {**finished.results.to_json(), "runs": [{**record.to_json(), "config": settings}]}
    (tmp_path / RESULTS).write_text(json.dumps(results, indent=1))
    check_folder(tmp_path, finished.grid.runs())
