"""Saved runs, attacked again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cem_fast.benchmarks import attack_again

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "benchmarks" / "results" / "evaluation"
REST = {"psnr": 20.0, "ssim": 0.5, "seconds": 1.0, "threads": 1}
ONE = "digits-bottleneck-seed0-fold1-c681b48c"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(KEPT / "runs" / ONE, tmp_path / "runs" / ONE)
    return tmp_path


def attack(folder, name):
    attack_again.attack_all(folder, [name], budget="standard", seed=0, only="digits", device=torch.device("cpu"))


def test_an_attack_of_the_saved_run_has_its_saved_error(folder):
    attack(folder, "ridge")
    (entry,) = attack_again.read(folder)
    saved = json.loads((folder / "runs" / ONE / "run.json").read_text())["record"]["attacks"]["ridge"]
    assert entry.mse == pytest.approx(saved["mse"], rel=0.02)
    assert entry.key == (f"runs/{ONE}", "ridge", "standard", 0)
    assert entry.cpu_seconds > 0


def test_the_errors_of_the_stages_are_kept_and_shown(folder, monkeypatch, capsys):
    stages = {"decoder": 0.02, "correction": 0.01}
    monkeypatch.setattr(
        attack_again, "attack", lambda run, *args, **kwargs: (torch.zeros_like(run.data.victims.images), stages)
    )
    attack(folder, "inversion")
    assert "held-out images after correction: 0.01000" in capsys.readouterr().out
    (entry,) = attack_again.read(folder)
    assert entry.stages == stages
    text = attack_again.tables(folder)
    assert "| data | defense | noise | CEM | decoder | correction |" in text
    assert "| digits | bottleneck | 0.1 | 0 | 0.02000 | 0.01000 |" in text


def test_what_is_there_is_not_attacked_again(folder, monkeypatch):
    attack(folder, "nearest")
    before = (folder / attack_again.FILE).read_bytes()
    monkeypatch.setattr(attack_again, "attack", lambda *args, **kwargs: pytest.fail("attacked again"))
    attack(folder, "nearest")
    assert (folder / attack_again.FILE).read_bytes() == before


def test_the_tables_of_the_documentation_are_those_of_the_results():
    assert attack_again.tables(KEPT) in (ROOT / "docs" / "results" / "attacks.md").read_text()


def test_gains_are_of_networks_that_inversion_was_run_on(tmp_path):
    for name in ("digits-bottleneck-cem-seed0-fold1-d1443551", ONE):
        (tmp_path / "runs" / name).mkdir(parents=True)
        shutil.copy(KEPT / "runs" / name / "run.json", tmp_path / "runs" / name)
    entries = [
        {"run": f"runs/{run}", "attack": name, "budget": budget, "seed": 0, "mse": mse, **REST}
        for run, mse in (("digits-bottleneck-cem-seed0-fold1-d1443551", 0.009), (ONE, 0.004))
        for name, budget in (("kernel_ridge", "standard"), ("inversion", "standard"), ("flow", "standard"), ("flow", "thorough"))
    ]  # fmt: skip
    (tmp_path / attack_again.FILE).write_text(json.dumps(entries))
    text = attack_again.tables(tmp_path)
    assert "| digits | bottleneck | 0.1 | +110% | +125% |" in text
    assert "| digits | bottleneck | 0.1 | 0.5 | 0.01120 (optimization) | 0.00900 | 0.00900 | 0.00900 | 0.80 |" in text
    assert "| digits | bottleneck | 0.1 | 0 | flow | 0.00400 | 0.00400 | +0.0% |" in text
    (tmp_path / attack_again.FILE).write_text(
        json.dumps([entry for entry in entries if entry["attack"] != "inversion"])
    )
    assert "+125%" not in attack_again.tables(tmp_path)
