"""Tables of a results.json, as Markdown.

usage: python -m cem_fast.report.markdown RESULTS.json [--summary]

The attack on a run is the strongest one on it; figures are means over the runs of a cell. `docs/results/evaluation.md` holds the tables,
and the README the summary, of the results in `benchmarks/results`.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Json = dict[str, Any]
NOT_OF_A_CELL = ("data", "seed", "fold", "attacks")
OF_CEM = ("lambda", "cem_by_class", "cem_components", "cem_covariance", "cem_variant", "cem_gradient", "cem_schedule")


def tables(results: Json) -> str:
    """All tables of a results.json, those of one data set after those of the other."""
    return "\n\n".join(
        f"### {data}\n\n" + "\n\n".join(part(results, data) for part in (frontier, sweep, same_noise, attacks))
        for data in results["baseline"]
    )


def summary(results: Json) -> str:
    """One row a data set: what CEM gains over all defenses, over plain noise at equal accuracy and at the same noise."""
    rows = []
    for data in results["baseline"]:
        pairs = _of(data, results["pairs"])
        both = [_both(results, pair) for pair in pairs]
        lost = mean(accuracy(off) - accuracy(on) for off, on in both)
        sure = sum(pair["interval"][0] > 0 for pair in pairs)
        paired = {pair["run"] for pair in pairs}
        over_noise = [entry for entry in _of(data, results["frontier"]) if entry["run"] in paired]
        known = f" ({len(over_noise)} of {len(pairs)})"  # the others are less accurate than every level of the sweep
        figures = _range(over_noise) + known, f"{100 * lost:.1f} points", _range(pairs), f"{sure} of {len(pairs)}"
        rows.append([data, *figures])
    heads = [
        "data",
        "gain over plain noise at equal accuracy",
        "accuracy lost",
        "gain at the same noise",
        "interval above 0",
    ]
    return _table(heads, rows)


def same_noise(results: Json, data: str) -> str:
    """Every defense without CEM and with it, at the same noise."""
    ceiling, pairs, rows = results["baseline"][data]["class_mean_mse"], _of(data, results["pairs"]), []
    for pair in pairs:
        figures = [
            figure
            for cell in _both(results, pair)
            for figure in (f"{accuracy(cell):.1%}", f"{mse(cell):.5f}", f"{mse(cell) / ceiling:.0%}")
        ]
        rows.append([pair["defense"], f"{pair['noise_std']:g}", *figures, _gain(pair)])
    title = f"At the same noise (the error of the class mean is {ceiling:.5f}; gain {_range(pairs)}):"
    heads = [
        "defense",
        "noise",
        "accuracy",
        "attack MSE",
        "/ class mean",
        "accuracy, CEM",
        "attack MSE, CEM",
        "/ class mean, CEM",
    ]
    return title + "\n\n" + _table([*heads, "gain"], rows)


def frontier(results: Json, data: str) -> str:
    """CEM against more plain noise at equal accuracy."""
    entries, rows = {entry["run"]: entry for entry in _of(data, results["frontier"])}, []
    for cell in _cells(results, data):
        if not cell[0]["cem"]:
            continue
        name = cell[0]["defense"] + ("" if cell[0]["config"]["cem_by_class"] else ", one Gaussian without labels")
        entry = entries.get(results["runs"].index(cell[0]))
        gain = _gain(entry) if entry else "less accurate than every level of the sweep"
        rows.append([f"{name} + CEM", f"{accuracy(cell):.1%}", f"{mse(cell):.5f}", gain])
    return "Over plain noise at equal accuracy:\n\n" + _table(["defense", "accuracy", "attack MSE", "gain"], rows)


def sweep(results: Json, data: str) -> str:
    """The bottleneck with nothing but noise, level by level."""
    plain = {
        cell[0]["config"]["noise_std"]: [f"{accuracy(cell):.1%}", f"{mse(cell):.5f}"]
        for cell in _cells(results, data)
        if cell[0]["defense"] in ("noise", "bottleneck") and not cell[0]["cem"]
    }
    rows = [[f"{level:g}", *plain[level]] for level in sorted(plain)]
    return "The plain noise that this compares to:\n\n" + _table(["noise", "accuracy", "attack MSE"], rows)


def attacks(results: Json, data: str) -> str:
    """Every attack on runs with noise: its error, how often it was the strongest, and what half its budget costs it."""
    runs = [run for run in _of(data, results["runs"]) if run["config"]["noise_std"] > 0]
    strongest = [min(run["attacks"], key=lambda name: run["attacks"][name]["mse"]) for run in runs]
    rows = []
    for name in runs[0]["attacks"]:
        entries = [run["attacks"][name] for run in runs]
        halves = [e["mse_half_budget"] / e["mse"] - 1 for e in entries if e["mse_half_budget"] is not None]
        cost = [f"{mean(halves):+.1%}", f"{max(halves):+.1%}"] if halves else ["-", "-"]
        rows.append([name, f"{mean(e['mse'] for e in entries):.5f}", f"{strongest.count(name)} of {len(runs)}", *cost])
    heads = ["attack", "MSE", "strongest of its run", "half the budget: error, mean", "at worst"]
    return "The attacks, over all runs with noise:\n\n" + _table(heads, rows)


def accuracy(cell: list[Json]) -> float:
    """Mean accuracy of the runs of a cell."""
    return mean(run["accuracy"] for run in cell)


def mse(cell: list[Json]) -> float:
    """Mean error of the strongest attack on every run of a cell."""
    return mean(min(attack["mse"] for attack in run["attacks"].values()) for run in cell)


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _of(data: str, entries: list[Json]) -> list[Json]:
    return [entry for entry in entries if entry["data"] == data]


def _cells(results: Json, data: str) -> list[list[Json]]:
    """The runs that differ in seed and fold alone, in the order in which they come."""
    found = defaultdict(list)
    for run in _of(data, results["runs"]):
        found[_settings(run)].append(run)
    return list(found.values())


def _both(results: Json, pair: Json) -> tuple[list[Json], list[Json]]:
    """The runs without CEM and with it that a pair compares."""
    on, cells = results["runs"][pair["run"]], _cells(results, pair["data"])
    alike = [cell for cell in cells if _settings(cell[0], *OF_CEM) == _settings(on, *OF_CEM)]
    return next(c for c in alike if not c[0]["cem"]), next(c for c in alike if _settings(c[0]) == _settings(on))


def _settings(run: Json, *ignored: str) -> str:
    ignored = (*NOT_OF_A_CELL, *ignored)
    return json.dumps({key: value for key, value in run["config"].items() if key not in ignored}, sort_keys=True)


def _range(entries: list[Json]) -> str:
    gains = [entry["gain"] for entry in entries]
    return f"{min(gains):+.0%} to {max(gains):+.0%}, mean {mean(gains):+.0%}" if gains else "-"


def _gain(entry: Json) -> str:
    low, high = entry["interval"]
    return f"{entry['gain']:+.0%} ({low:+.0%} to {high:+.0%})"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--summary", action="store_true", help="one row a data set")
    arguments = parser.parse_args()
    print((summary if arguments.summary else tables)(json.loads(arguments.results.read_text())))
