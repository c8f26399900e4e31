"""The paper's figures: what they show, and tables equal to the measurements of the runs."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from support import made_up

import cem_fast
from cem_fast import bounds, cost, training
from cem_fast._support.seeding import seeded
from cem_fast.cli import main as cli
from cem_fast.cli.parser import read_grid
from cem_fast.config import GridConfig, RunConfig
from cem_fast.experiments import saved_run
from cem_fast.experiments.build import build_parts
from cem_fast.experiments.results import RESULTS, Measured, Row, load_runs, make_rows
from cem_fast.report import figures
from cem_fast.report.figures import arms, leakage, sweeps

SWEEPS = Path(cem_fast.__file__).parent / "configs" / "sweeps"


def lines(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def rows(*configs: RunConfig) -> list[Row]:
    """Cells of runs that were never made, their error and accuracy made up."""
    runs = []
    for index, config in enumerate(configs):
        runs.append(Measured(made_up.record(config, accuracy=1 - 0.01 * index, mse=0.01 + 0.001 * index), {}))
    return make_rows(runs)


def curves(cells: list[Row]) -> list[tuple]:
    """Panel, setting, arm and the values and roles along it, of every curve."""
    found: dict[tuple, list] = {}
    for place, _ in arms.lines(cells):
        key = place["panel"], place["setting"], place["arm"]
        found.setdefault(key, []).append((place["value"], place["role"]))
    return [(*key, *map(list, zip(*points))) for key, points in found.items()]


def test_cells_become_curves_over_the_one_setting_in_which_they_differ():
    levels = [RunConfig(noise_std=std, cem_weight=weight) for std in (0.3, 0.1, 0.2) for weight in (0.0, 0.5)]
    weights = [RunConfig(noise_std=0.1, cem_weight=weight) for weight in (1.0, 2.0)]
    one_gaussian = [RunConfig(noise_std=0.1, cem_weight=w, cem_components=1) for w in (0.5, 2.0)]
    cuts = [RunConfig(defense="dropout", cut=cut, cem_weight=0.5) for cut in (3, 1, 2)]
    other = [RunConfig(defense="dropout", cut=cut, epochs=7) for cut in (1, 2)]  # two are no curve
    seeds = [replace(config, seed=1) for config in levels]
    expected = [
        (1, "noise_std", "noise", [0.1, 0.2, 0.3], ["off"] * 3),
        (1, "noise_std", "noise + CEM, λ = 0.5, K = 5", [0.1, 0.2, 0.3], ["on"] * 3),
        (2, "lambda", "noise + CEM, K = 5", [0, 0.5, 1, 2], ["off", "on", "on", "on"]),
        (2, "lambda", "noise + CEM, K = 1", [0, 0.5, 2], ["off", "on", "on"]),
        (3, "cut", "dropout + CEM", [1, 2, 3], ["on"] * 3),
    ]
    found = curves(rows(*levels, *seeds, *weights, *one_gaussian, *cuts, *other))
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert curves(rows(*levels[:4], *weights[:1])) == [
        (1, "lambda", "noise + CEM", [0, 0.5, 1], ["off", "on", "on"]),
    ]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("noise_and_weight", {"noise_std": [("off", 6), ("on", 6)], "lambda": [("on", 6)]}),
        ("cut", {"cut": [("off", 5), ("on", 5)]}),
    ],
)
def test_included_sweeps_have_at_least_five_points_per_arm(name, expected):
    plan = read_grid(SWEEPS / f"{name}.yaml").runs()
    found: dict[str, list] = {}
    for _, setting, _, values, roles in curves(rows(*plan)):
        found.setdefault(setting, []).append((roles[-1], len(values)))
    assert found == expected
    for config in plan:
        build_parts(config, image_shape=(1, config.image_size, config.image_size), num_classes=40)


def test_every_data_set_has_a_block_of_its_own_and_points_stand_at_their_values():
    from matplotlib.figure import Figure

    from cem_fast.report.charts import COLORS

    levels = [RunConfig(noise_std=std, cem_weight=weight) for std in (0.1, 0.2, 0.3) for weight in (0.0, 0.5, 1.0)]
    table = sweeps.table(rows(*levels, *(RunConfig(data="digits", noise_std=std) for std in (0.5, 0.7, 0.9))), Path())
    picture = Figure()
    sweeps.draw(picture, table, COLORS["light"])
    assert sweeps.size(table)[0] > 4 * 4
    faces, digits = ([axes for axes in part.axes if axes.get_visible()] for part in picture.subfigs)
    assert (len(faces), len(digits)) == (2 * 4, 2)  # noise, and the weights at each of three levels
    assert digits[0].get_title(loc="left") == "digits, slim, noise"
    assert [axes.get_title(loc="left") for axes in faces[:4]] == [
        "faces, slim, noise", *(f"faces, slim, noise, σ = {std}" for std in (0.1, 0.2, 0.3)),
    ]  # fmt: skip
    for axes, key, scale in ((digits[0], "accuracy", 100), (digits[1], "mse", 1)):
        measured = [scale * line[key] for line in table if line["data"] == "digits"]
        assert list(axes.lines[0].get_xdata()) == [0, 1, 2]
        assert list(axes.lines[0].get_ydata()) == pytest.approx(measured)
    assert [tick.get_text() for tick in digits[1].get_xticklabels()] == ["0.5", "0.7", "0.9"]
    assert [text.get_text() for text in faces[4].get_legend().get_texts()] == [
        "noise", "noise + CEM, λ = 0.5", "noise + CEM, λ = 1",
    ]  # fmt: skip


@pytest.mark.parametrize("name", figures.names())
def test_a_picture_and_its_table_are_written(name, finished, tmp_path):
    table, picture = figures.write(name, finished.folder, tmp_path / "new")
    assert (table.name, picture.name) == (f"{name}.csv", f"{name}.png")
    with Image.open(picture) as image:
        assert min(image.size) > 200
        assert len(image.convert("RGB").resize((200, 200)).getcolors(40_000)) > 20
    before = table.read_text()
    assert before.count("\n") >= 2
    figures.check(name, tmp_path / "new")  # its own may be replaced
    (tmp_path / "new" / f"{name}.csv").write_text("mine")
    with pytest.raises(ValueError, match=f"{name}.csv was not written by cem_fast and is left alone"):
        figures.write(name, finished.folder, tmp_path / "new")


def test_leakage_has_the_measurements_of_the_runs(finished, tmp_path):
    table = lines(figures.write("leakage", finished.folder, tmp_path)[0])
    cells = {row.record.cell: row for row in make_rows(load_runs(finished.folder, finished.results))}
    noisy = [row for row in cells.values() if row.noise_std > 0]
    assert len(table) == len(noisy) == 4
    for line, row in zip(table, noisy):
        assert (line["role"], float(line["noise_std"]), int(line["runs"])) == (
            row.role,
            row.noise_std,
            2,
        )
        measured = [run.record.leakage.heldout_nats for run in row.runs]
        assert float(line["heldout_nats"]) == pytest.approx(sum(measured) / 2, rel=1e-5)
        assert float(line["mse"]) == pytest.approx(row.mse.mean, rel=1e-5)
        assert float(line["mse_deviation"]) == pytest.approx(row.mse.deviation, rel=1e-5)
        assert int(line["dimension"]) == 16 * 16


def test_leakage_draws_the_exponential_that_the_cells_follow():
    from matplotlib.figure import Figure

    from cem_fast.report.charts import COLORS

    shared = {"data": "x", "role": "off", "dimension": 100}
    table = [{**shared, "heldout_nats": n, "plugin_nats": n / 2, "mse": math.exp(-3 * n / 100)} for n in (10, 40, 90)]
    picture = Figure()
    leakage.draw(picture, table, COLORS["light"])
    labels = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in picture.axes]
    assert ["MSE ∝ exp(3 h), correlation 1.00, of ranks 1.00" in labels[0], "exp(6 h)" in labels[1][2]] == [True, True]
    bound = next(line for line in picture.axes[0].lines if "Theorem 1" in str(line.get_label()))
    for place, height in zip(bound.get_xdata(), bound.get_ydata()):
        assert height <= 1.0001 * math.exp(3 * place)
    assert bound.get_ydata()[0] == pytest.approx(math.exp(-2.7))  # touches the cell that allows the least


def test_utility_is_that_of_the_test_images(finished, tmp_path):
    table = lines(figures.write("utility", finished.folder, tmp_path)[0])
    assert [line["value"] for line in table] == ["0.05", "0.1", "0.3"]
    for line in table:
        expected = torch.zeros(2, dtype=torch.float64)
        for record in finished.results.runs:
            if record.config.noise_std != float(line["value"]) or record.cem:
                continue
            run = saved_run.load_run(finished.folder / record.checkpoint)
            sent, labels = training.clean_features(run.model, run.data.test.images), run.data.test.labels
            with seeded(record.config.seed, "utility"):
                found = bounds.utility(
                    run.loss.mixture, sent.repeat(3, 1, 1, 1), labels.repeat(3), float(line["value"])
                )
            expected += torch.stack([found.label, found.component]) / 2
        assert float(line["class_posterior"]) == pytest.approx(expected[0].item(), rel=1e-5)
        assert float(line["component_posterior"]) == pytest.approx(expected[1].item(), rel=1e-5)


def test_cost_is_that_of_the_runs_networks(finished, tmp_path):
    (line,) = lines(figures.write("cost", finished.folder, tmp_path)[0])
    run = saved_run.load_run(finished.run(cem=True))
    parts = cost.measure(run.model, torch.rand(1, 1, 16, 16), passes=1)
    for name, part in (("device", "encoder"), ("cloud", "decoder")):
        assert int(line[f"{name}_parameters"]) == parts[part].parameters
        assert int(line[f"{name}_macs"]) == parts[part].macs
        assert float(line[f"{name}_ms"]) > 0
    named = [line[key] for key in ("model", "cut", "image_shape", "defenses", "bottleneck", "message_bytes")]
    assert named == ["slim", "2", "1x16x16", "bottleneck noise", "8", "512"]
    assert float(line["plain_epoch_s"]) > 0
    wrote = [
        saved_run.read_description(finished.folder / record.checkpoint).history[1].seconds
        for record in finished.results.runs
        if record.cem
    ]
    assert float(line["on_trained_s"]) == pytest.approx(sum(wrote) / 2, rel=1e-4)


def test_a_figure_without_data_names_what_it_needs(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "copy")
    noiseless = tuple(run for run in finished.results.runs if run.config.noise_std == 0)
    results = replace(finished.results, runs=noiseless, pairs=(), frontier=())
    (folder / RESULTS).write_text(json.dumps(results.to_json()))
    for name, needs in (("leakage", "attacked runs with noise"), ("sweeps", "differ in one of noise_std, lambda, cut")):
        with pytest.raises(ValueError, match=f"has nothing for the figure {name}: it needs .*{needs}"):
            figures.write(name, folder, tmp_path)
    (line,) = lines(figures.write("cost", folder, tmp_path)[0])
    assert (line["plain_epoch_s"], line["on_trained_s"]) == ("", "")


def test_one_command_runs_a_grid_and_draws_it(tiny_images, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    grid = GridConfig(
        name="small", data=(str(tiny_images),), image_size=16, undefended=(), noise_levels=(0.2,), cem_weights=(0.0,),
        seeds=(0,), epochs=1, attacks=("ridge",), noise_draws=1,
    )  # fmt: skip
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(grid).items()}
    Path("grid.yaml").write_text(yaml.safe_dump(settings))
    assert cli.main(["figures", "leakage", "grid.yaml", "--dry-run"]) == 0
    assert "nothing was run" in capfd.readouterr().out
    assert not Path("runs").exists()
    assert cli.main(["figures", "leakage", "grid.yaml", "--jobs", "1", "--save", "pictures"]) == 0
    assert capfd.readouterr().out.endswith("written: pictures/leakage.csv\nwritten: pictures/leakage.png\n")
    assert [line["noise_std"] for line in lines(Path("pictures/leakage.csv"))] == ["0.1", "0.2"]
    assert cli.main(["figures", "leakage", "runs/small"]) == 0
    assert Path("runs/small/leakage.png").is_file()
    for arguments, message in (
        (["leakege", "runs/small"], "unknown figure 'leakege': .*the nearest is 'leakage'"),
        (["sweeps", "runs/small"], "runs/small has nothing for the figure sweeps"),
        (["sweeps", "pictures"], "pictures/results.json: no results here"),
    ):
        capfd.readouterr()
        assert cli.main(["figures", *arguments]) == 2
        assert re.search(message, capfd.readouterr().err)


def test_a_name_longer_than_a_picture_is_drawn_without_a_warning():
    from cem_fast.report import charts

    with charts.canvas(2.0, 1.0, charts.COLORS["light"]) as figure:
        figure.subplots().set_ylabel("of a run " * 40)
        figure.subplots().set_title("of a run\n" * 40)
        figure.savefig(io.BytesIO(), format="png")
