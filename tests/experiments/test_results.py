"""results.json: schema, reading, writing, and rows."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support import made_up, tampered
from support.made_up import measured

from cem_fast.config import RunConfig
from cem_fast.experiments import results, saved_run
from cem_fast.experiments.gain_records import FrontierEntry
from cem_fast.experiments.records import Baseline, Results
from cem_fast.experiments.results import RESULTS, load_runs, make_rows, read

KEPT = Path(__file__).parents[2] / "benchmarks" / "results"
RUN_KEYS = {
    "data", "protocol", "model", "cut", "defense", "cem", "config", "seed", "fold", "accuracy", "num_test", "attacks",
    "leakage", "seconds", "inferred", "checkpoint",
}  # fmt: skip


def test_results_have_the_documented_schema(finished):
    results = json.loads((finished.folder / RESULTS).read_text())
    assert results == finished.results.to_json()
    assert set(results) == {
        "schema", "command", "git", "versions", "baseline", "runs", "pairs", "frontier", "failed",
    }  # fmt: skip
    assert results["schema"] == 1
    assert results["command"] == "cem-fast evaluate"
    assert results["versions"]["torch"] == torch.__version__
    assert set(results["baseline"]["tiny"]) == {"mean_image_mse", "class_mean_mse"}
    assert len(results["runs"]) == 2 * 5
    for record in results["runs"]:
        assert set(record) == RUN_KEYS
        assert record["cem"] == (record["config"]["lambda"] > 0)
        assert 0 <= record["accuracy"] <= 1
        assert record["num_test"] == 6
        assert set(record["attacks"]) == {"decoder", "ridge"}
        for name, attack in record["attacks"].items():
            assert set(attack) == {
                "mse", "psnr", "ssim", "ssim_paper", "recognized", "mse_half_budget", "knowledge", "budget",
            }  # fmt: skip
            assert (attack["mse_half_budget"] is None) == (name == "ridge")
        assert set(record["inferred"]) == {"label"}  # the images are of no people and have no attributes
        assert set(record["inferred"]["label"]) == {"share", "chance"}
        noiseless = record["config"]["noise_std"] == 0
        estimates = {"plugin_nats", "heldout_nats", "heldout_se"}
        assert set(record["leakage"]) == (estimates if noiseless else {*estimates, "capacity_nats"})
        assert all((value is None) == noiseless for value in record["leakage"].values())
        assert RunConfig.from_json(record["config"]).to_json() == record["config"]
        assert (finished.folder / record["checkpoint"] / saved_run.DESCRIPTION).is_file()
    for entry in results["frontier"]:
        assert entry["name"] == "noise + CEM"
        assert {results["runs"][run]["cem"] for run in entry["baseline"]} == {False}
    for entry in [*results["pairs"], *results["frontier"]]:
        assert entry["interval"][0] <= entry["gain"] <= entry["interval"][1]


def test_settings_of_cem_are_named_in_few_words():
    own = {"cem_by_class": False, "cem_components": 1, "cem_covariance": "diag", "cem_variant": "official"}
    rows = make_rows([measured("noise", 0.1, 0.5, 0.9, 0.01, **some) for some in ({}, own)])
    assert [row.name for row in rows] == [
        "noise + CEM, K = 5, by class, spherical, variant = paper",
        "noise + CEM, K = 1, without labels, diag, variant = official",
    ]


def test_only_rows_without_noise_are_undefended():
    runs = [measured("bottleneck", s, 0.0, 0.9, 0.01) for s in (0.0, 0.1)] + [measured("noise", 0.1, 0.0, 0.9, 0.01)]
    rows = make_rows(runs)
    names = [row.name for row in rows]
    assert names == ["bottleneck, σ = 0", "bottleneck, σ = 0.1", "noise"]
    assert [row.short_name for row in rows] == ["bottleneck", "bottleneck", "noise"]
    assert [row.role for row in rows] == ["undefended", "off", "off"]
    assert [row.noise_std for row in rows] == [0.0, 0.1, 0.1]


@pytest.mark.parametrize("name", ["evaluation", "fashion_mnist"])
def test_reading_and_writing_changes_no_byte(name):
    path = KEPT / name / RESULTS
    content = path.read_text()
    assert json.dumps(read(path.parent).to_json(), indent=1) + "\n" == content


def test_runs_that_are_kept_change_no_byte():
    folders = sorted(path.parent for path in KEPT.glob("*/runs/*/run.json"))
    assert folders
    for folder in folders:
        written = json.dumps(saved_run.read_description(folder).to_json(), indent=1) + "\n"
        assert written == (folder / saved_run.DESCRIPTION).read_text()


@pytest.mark.parametrize("wrong", tampered.VALUES)
def test_edited_results_are_read_or_refused_in_one_line(finished, tmp_path, wrong):
    document = json.loads((finished.folder / RESULTS).read_text())
    refused = []
    for place in tampered.places(document):
        (tmp_path / RESULTS).write_text(json.dumps(tampered.changed(document, place, wrong)))
        try:
            read(tmp_path)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert all(message.startswith(f"{tmp_path / RESULTS}: ") and "\n" not in message for message in refused)


def test_a_wrong_entry_is_named(finished, tmp_path):
    document = json.loads((finished.folder / RESULTS).read_text())
    for place, wrong, message in (
        (("runs", 0, "attacks", "ridge", "mse"), "low", "runs.0.attacks.ridge.mse must be a number, got 'low'"),
        (("runs", 0, "accuracy"), ..., "runs.0.accuracy is missing"),
        (("runs", 0, "config", "cut"), 0, "runs.0.config: cut must be at least 1, got 0"),
        (("runs", 0, "seconds"), {}, r"runs.0: seconds must have a total, got \[\]"),
        (("pairs", 0, "run"), 10, "pairs.0.run must be the index of one of 10 runs, got 10"),
        (("pairs", 0, "interval"), [0.1], r"pairs.0.interval must be a list of 2 entries, got \[0.1\]"),
        (("baseline",), {}, r"baseline must be of the data sets of runs, \['tiny'\], got \[\]"),
        (("schema",), 2, "expected results of schema 1, got 2"),
    ):
        (tmp_path / RESULTS).write_text(json.dumps(tampered.changed(document, place, wrong)))
        with pytest.raises(ValueError, match=f"{RESULTS}: {message}"):
            read(tmp_path)


def test_unknown_entries_are_ignored_and_later_ones_have_defaults(finished, tmp_path):
    document = json.loads((finished.folder / RESULTS).read_text())
    document["news"] = document["runs"][0]["news"] = document["runs"][0]["attacks"]["ridge"]["news"] = 1
    del document["failed"], document["runs"][0]["config"]["precision"]
    (tmp_path / RESULTS).write_text(json.dumps(document))
    assert read(tmp_path) == finished.results


def test_measurements_that_a_record_needs_are_named(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "copy")
    document = json.loads((folder / RESULTS).read_text())
    document["runs"][0]["attacks"]["nearest"] = document["runs"][0]["attacks"]["ridge"]
    (folder / RESULTS).write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"run\.json: the measurements lack mse.nearest, pictures.nearest"):
        load_runs(folder, read(folder))


@pytest.mark.parametrize("checkpoint", ["/etc", "../other", "runs/../../other"])
def test_a_run_lies_in_the_folder_of_its_results(finished, tmp_path, checkpoint):
    document = json.loads((finished.folder / "results.json").read_text())
    document["runs"][0]["checkpoint"] = checkpoint
    (tmp_path / "results.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="checkpoint must lie in the folder of results.json"):
        read(tmp_path)


@pytest.mark.parametrize(
    "name, change",
    [
        ("mse.ridge", lambda t: t[:-1]),
        ("mse.ridge", lambda t: t * float("nan")),
        ("mse.ridge", lambda t: t.long()),
        ("groups", lambda t: t.double()),
        ("correct", lambda t: t[:, None]),
        ("pictures.ridge", lambda t: t[:, :, 0]),
        ("pictures.original", lambda t: t.repeat(1, 5, 1, 1)),
    ],
)
def test_measurements_of_another_kind_are_named(finished, tmp_path, name, change):
    record = finished.results.runs[0]
    run = shutil.copytree(finished.folder / record.checkpoint, tmp_path / record.checkpoint)
    description = json.loads((run / "run.json").read_text())
    tensors = saved_run.read_measurements(run)
    content = safetensors.torch.save({**tensors, name: change(tensors[name]).contiguous()})
    file = f"measurements-{saved_run._digest(content)}.safetensors"
    (run / file).write_bytes(content)
    description["files"]["measurements"] = file
    (run / "run.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=rf"run\.json: .*{name.partition('.')[0]}.* of the measurements must be"):
        results.measured(tmp_path, record)


def test_a_command_of_a_stranger_is_printed_as_one_command(finished):
    made = replace(finished.results, command="cem-fast demo; rm -r *\x1b[2J")
    lost = replace(made, runs=tuple(replace(run, checkpoint=None) for run in made.runs))
    with pytest.raises(FileNotFoundError, match=r"to have them again: cem-fast 'demo;' rm -r '\*\\x1b\[2J'$"):
        load_runs(finished.folder, lost)


def test_the_first_cell_of_noise_in_the_order_of_the_grid_leads():
    configs = [RunConfig(defense="dropout"), RunConfig(bottleneck="D64"), RunConfig(bottleneck="D32")]
    runs = tuple(made_up.record(config) for config in configs)
    entries = tuple(
        FrontierEntry("faces", config.defense, 0.1, 0.0, run=index, accuracy=0.9, gain=index, interval=(0.0, 3.0))
        for index, config in enumerate(configs)
    )
    made = Results("", None, {}, {"faces": Baseline(0.02, 0.01)}, runs, (), entries)
    assert made.lead("faces") == entries[1]
    assert replace(made, frontier=entries[:1]).lead("faces") == entries[0]
    assert made.lead("digits") is None
    with pytest.raises(ValueError, match="frontier.0.baseline must be indices of 3 runs, got 3 among them"):
        replace(made, frontier=(replace(entries[0], baseline=(0, 3)),))
