"""The page: self-contained, complete, and explicit about what was not measured."""

from __future__ import annotations

import ast
import html
import json
import re
import shlex
import shutil
from html.parser import HTMLParser

import pytest
from support.made_up import measured

from cem_fast import load_run
from cem_fast.cost import message_bytes
from cem_fast.experiments.grid import RUNS, evaluate
from cem_fast.experiments.results import RESULTS, make_rows
from cem_fast.report.page import MARK, PAGE, Gain, _averaged, _shown, write


class Links(HTMLParser):
    """Collects everything that a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for key, value in attributes if key in ("src", "href", "srcset", "action", "poster")]
        if tag not in ("meta", "img", "source", "br"):
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(finished) -> str:
    return write(finished.folder).read_text()


def test_page_carries_its_own_pictures_and_fetches_nothing(page):
    assert MARK in page.encode()[:1000]
    links = Links()
    links.feed(page)
    assert links.open == []
    assert len(links.found) > 20
    assert all(link.startswith("data:image/png;base64,") for link in links.found)
    assert not re.search(r"url\(|@import", page)
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]+", "", page)


def test_page_shows_the_numbers_of_results_json(page, finished):
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)).replace("−", "-")
    pair, frontier = finished.results.pairs[0], finished.results.frontier
    assert f"{100 * pair.gain:+.0f}%" in text
    assert f"{100 * pair.interval[0]:+.0f}% to {100 * pair.interval[1]:+.0f}%" in text
    baseline = finished.results.baseline["tiny"]
    assert f"{baseline.class_mean_mse:.4f}" in text
    assert f"{baseline.mean_image_mse:.4f}" in text
    if frontier:
        assert f"{100 * frontier[0].gain:+.0f}%" in text
    for record in finished.results.runs:
        assert record.attacks["ridge"].knowledge in text
    assert "cem-fast evaluate" in text
    assert finished.results.versions["torch"] in text
    assert "is unknown" in text
    sent = message_bytes(load_run(finished.run(cem=True)).model, (1, 16, 16))
    assert re.search(rf"noise \+ CEM × 2 0\.1 {sent:,} ", text)
    assert "no finite bound" in text


def test_page_states_what_a_grid_without_a_sweep_does_not_measure(tiny_grid, finished, tmp_path):
    from dataclasses import replace

    folder = shutil.copytree(finished.folder, tmp_path / "copy")
    (folder / RESULTS).unlink()
    evaluate(replace(tiny_grid, noise_levels=()), folder)
    text = write(folder).read_text()
    assert "Whether more plain noise would do as well at equal accuracy is not measured in this grid" in text
    assert "not measured</b>" in text
    (folder / RESULTS).unlink()
    evaluate(replace(tiny_grid, noise_levels=(), cem_weights=(0.0,)), folder)
    assert "says nothing about what CEM gains" in write(folder).read_text()


def test_an_attack_whose_budget_was_not_halved_is_not_called_converged(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "copy")
    page = write(folder).read_text()
    assert "With half its budget, the decoder attack" in page
    assert re.search(r"The ridge attack \(a closed form, .*\) has no half of its budget to be compared with\.", page)
    results = json.loads((folder / RESULTS).read_text())
    for record in results["runs"]:
        record["attacks"]["decoder"] |= {"mse_half_budget": None, "budget": "1 epoch"}
    (folder / RESULTS).write_text(json.dumps(results))
    page = write(folder).read_text()
    assert "With half its budget" not in page
    assert "converged" not in page
    assert "The decoder attack (1 epoch) has no half of its budget to be compared with." in page


def test_page_states_how_many_test_images_the_attacker_holds(finished, tmp_path):
    def said(**changes) -> str:
        for path in (folder / RUNS).glob("*/run.json"):
            description = json.loads(path.read_text())
            description["data"] = {k: v for k, v in {**description["data"], **changes}.items() if v is not None}
            path.write_text(json.dumps(description, indent=1) + "\n")
        return " ".join(write(folder).read_text().split())

    folder = shutil.copytree(finished.folder, tmp_path / "copy")
    assert "none of which is, pixel by pixel, among those that it holds" in said()
    assert "of which it holds 2 of 6, pixel by pixel" in said(num_leaked=2)
    assert "whether it holds copies of some was not recorded" in said(num_leaked=None)


def test_page_states_that_settings_are_chosen_on_its_test_images(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "copy")
    page = write(folder).read_text()
    assert "held out for choosing settings" not in page
    assert "Nothing is chosen on test images" in page
    for path in (folder / RESULTS, *(folder / RUNS).glob("*/run.json")):
        document = json.loads(path.read_text())
        for record in document.get("runs", [document]):
            record["config"]["validation"] = True
        path.write_text(json.dumps(document, indent=1) + "\n")
    page = write(folder).read_text()
    assert "held out for choosing settings. Report on the test part." in page
    assert "Nothing is chosen on test images" not in page


def test_user_text_is_escaped(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "copy")
    path = folder / RESULTS
    path.write_text(path.read_text().replace('"cem-fast evaluate"', '"cem-fast <script>alert(1)</script>"'))
    assert "<script>" not in write(folder).read_text()


def test_a_foreign_page_is_left_alone(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "copy")
    (folder / PAGE).write_text("<title>mine</title>")
    with pytest.raises(ValueError, match=r"report\.html was not written by cem_fast and is left alone"):
        write(folder)
    assert (folder / PAGE).read_text() == "<title>mine</title>"


def test_results_without_the_files_of_some_runs_name_the_command_that_remakes_them(finished, tmp_path):
    results = json.loads((finished.folder / RESULTS).read_text())
    results["runs"][1]["checkpoint"] = None
    (tmp_path / RESULTS).write_text(json.dumps(results))
    message = r"results\.json: the files of 1 of its 10 runs were not kept; to have them again: cem-fast evaluate"
    with pytest.raises(FileNotFoundError, match=message):
        write(tmp_path)


def test_a_pair_without_its_partner_is_named(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "copy")
    document = json.loads((folder / RESULTS).read_text())
    run = document["pairs"][0]["run"]
    document["runs"][run]["config"]["learning_rate"] = 0.25
    (folder / RESULTS).write_text(json.dumps(document))
    with pytest.raises(ValueError, match=rf"results\.json: run {run} is in a pair, but there is no run without CEM"):
        write(folder)


def test_missing_and_damaged_results_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"results\.json: no results here"):
        write(tmp_path)
    (tmp_path / RESULTS).write_text("{")
    with pytest.raises(ValueError, match=r"results\.json: damaged"):
        write(tmp_path)


def test_printed_commands_can_be_pasted(finished, tmp_path):
    name = 'my run $(touch pwned) "it\'s"'
    folder = shutil.copytree(finished.folder, tmp_path / name)
    path = folder / RESULTS
    path.write_text(path.read_text().replace('"cem-fast evaluate"', '"cem-fast evaluate; touch pwned"'))
    page = html.unescape(write(folder).read_text())
    (line,) = [line for line in page.splitlines() if "cem-fast attack " in line]
    assert any(word.startswith(f"path/to/{name}/runs/") for word in shlex.split(line))
    assert "cem-fast 'evaluate;' touch pwned" in page
    (load,) = [line for line in page.splitlines() if "load_run(" in line]
    assert f"path/to/{name}/runs/" in ast.literal_eval(load.partition("load_run(")[2].rpartition(")")[0])


def test_a_mean_over_settings_of_one_defense_is_not_called_one_over_defenses():
    runs = [measured("noise", 0.1, weight, 0.9, 0.01) for weight in (0.1, 0.5)]
    runs.append(measured("dropout", 0.1, 0.5, 0.9, 0.01))
    gains = [Gain(row, None, gain=0.1, low=0.0, high=0.2) for row in make_rows(runs)]
    assert _averaged(gains) == "3 settings"
    assert _averaged(gains[1:]) == "2 defenses"


def test_the_first_cells_are_shown_once_and_next_to_plain_noise():
    runs = [measured("bottleneck", 0.0, 0.0, 0.9, 0.01), measured("noise", 0.1, 0.0, 0.9, 0.01)]
    runs += [measured("noise", level, 0.0, 0.9, 0.01) for level in (0.2, 0.4)]
    runs += [measured("noise", 0.1, weight, 0.9, 0.01, bottleneck="D64") for weight in (0.0, 0.5)]
    rows = make_rows(runs)
    off, on = (
        next(r for r in rows if r.record.config.bottleneck == "D64" and r.role == role) for role in ("off", "on")
    )
    pair, lead = Gain(on, off, gain=0.1, low=0.0, high=0.2), Gain(off, None, gain=1.0, low=0.5, high=2.0)
    shown = [(row.record.config.bottleneck, row.noise_std, row.role) for row in _shown(rows, pair, lead)]
    assert shown == [(8, 0, "undefended"), (8, 0.1, "off"), ("D64", 0.1, "off"), ("D64", 0.1, "on")]
