"""Tables of a results.json, as Markdown.

usage: python benchmarks/evaluation.py RESULTS.json [--summary]

The attack on a run is the strongest one on it; figures are means over the runs of a cell. `docs/evaluation.md` holds the tables, and the
README the summary, of the results in `benchmarks/results`.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Run = dict[str, Any]
NOT_OF_A_CELL = ("data", "seed", "fold", "attacks")


def tables(results: dict[str, Any]) -> str:
    """All tables of a results.json, those of one data set after those of the other."""
    return "\n\n".join(
        f"### {data}\n\n" + "\n\n".join(part(results, data) for part in (same_noise, sweep, frontier, attacks))
        for data in results["baseline"]
    )


def summary(results: dict[str, Any]) -> str:
    """One row a data set: what CEM gains over all defenses at the same noise, and over plain noise at equal accuracy."""
    rows = []
    for data in results["baseline"]:
        pairs = [pair for pair in results["pairs"] if pair["data"] == data]
        gains, drops = [pair["gain"] for pair in pairs], []
        for pair in pairs:
            off, on = _both(results, pair)
            drops.append(_mean(off, _accuracy) - _mean(on, _accuracy))
        sure = sum(pair["interval"][0] > 0 for pair in pairs)
        at_equal_accuracy = [
            entry["gain"] for entry in results["frontier"] if entry["data"] == data and _of_pairs(entry, pairs)
        ]
        rows.append(
            [
                data,
                f"{min(gains):+.0%} to {max(gains):+.0%}, mean {_mean(gains, float):+.0%}",
                f"{sure} of {len(pairs)}",
            ]
        )
        rows[-1].append(f"{100 * _mean(drops, float):.1f} points")
        low, high = min(at_equal_accuracy, default=float("nan")), max(at_equal_accuracy, default=float("nan"))
        rows[-1].append(
            f"{low:+.0%} to {high:+.0%}, mean {_mean(at_equal_accuracy, float):+.0%}" if at_equal_accuracy else "-"
        )
    heads = ["data", "same noise: gain", "interval above 0", "accuracy lost", "over plain noise at equal accuracy"]
    return _table(heads, rows)


def same_noise(results: dict[str, Any], data: str) -> str:
    """Every defense without CEM and with it, at the same noise."""
    ceiling = results["baseline"][data]["class_mean_mse"]
    rows = []
    for pair in (pair for pair in results["pairs"] if pair["data"] == data):
        rows.append([pair["defense"], f"{pair['noise_std']:g}"])
        for cell in _both(results, pair):
            rows[-1] += [
                f"{_mean(cell, _accuracy):.1%}",
                f"{_mean(cell, _mse):.5f}",
                f"{_mean(cell, _mse) / ceiling:.0%}",
            ]
        rows[-1].append(_gain(pair))
    mean = sum(pair["gain"] for pair in results["pairs"] if pair["data"] == data) / max(len(rows), 1)
    title = f"With CEM and without at the same noise; the class mean's error is {ceiling:.5f}; mean gain {mean:+.0%}:"
    heads = ["defense", "noise", "accuracy", "attack MSE", "/ class mean"]
    return title + "\n\n" + _table([*heads, "accuracy, CEM", "attack MSE, CEM", "/ class mean, CEM", "gain"], rows)


def sweep(results: dict[str, Any], data: str) -> str:
    """The bottleneck with nothing but noise, level by level."""
    plain = [
        cell
        for cell in _cells(results, data).values()
        if cell[0]["defense"] in ("noise", "bottleneck") and not cell[0]["cem"]
    ]
    plain.sort(key=lambda cell: cell[0]["config"]["noise_std"])
    rows = [
        [f"{cell[0]['config']['noise_std']:g}", f"{_mean(cell, _accuracy):.1%}", f"{_mean(cell, _mse):.5f}"]
        for cell in plain
    ]
    return "Plain noise, what CEM is held against at equal accuracy:\n\n" + _table(
        ["noise", "accuracy", "attack MSE"], rows
    )


def frontier(results: dict[str, Any], data: str) -> str:
    """CEM against more plain noise at equal accuracy."""
    rows = []
    for entry in (entry for entry in results["frontier"] if entry["data"] == data):
        config = results["runs"][entry["run"]]["config"]
        name = entry["defense"] + ("" if config["cem_by_class"] else ", one Gaussian without labels")
        rows.append([f"{name} + CEM", f"{entry['accuracy']:.1%}", _gain(entry)])
    return "CEM over plain noise at equal accuracy:\n\n" + _table(["defense", "accuracy", "gain"], rows)


def attacks(results: dict[str, Any], data: str) -> str:
    """Every attack: its error, how often it was the strongest, and what half its budget costs it."""
    runs = [run for run in results["runs"] if run["data"] == data]
    noisy = [run for run in runs if run["config"]["noise_std"] > 0]
    rows = []
    for name in runs[0]["attacks"]:
        of_name = [run["attacks"][name] for run in noisy]
        halves = [each["mse_half_budget"] / each["mse"] - 1 for each in of_name if each["mse_half_budget"] is not None]
        strongest = sum(min(run["attacks"], key=lambda n: run["attacks"][n]["mse"]) == name for run in noisy)
        rows.append([name, f"{_mean(of_name, lambda each: each['mse']):.5f}", f"{strongest} of {len(noisy)}"])
        rows[-1] += [f"{sum(halves) / len(halves):+.1%}", f"{max(halves):+.1%}"] if halves else ["-", "-"]
    heads = ["attack", "MSE", "strongest of its run", "half the budget, mean", "at worst"]
    return "The attacks, over all runs with noise:\n\n" + _table(heads, rows)


def _both(results: dict[str, Any], pair: dict[str, Any]) -> tuple[list[Run], list[Run]]:
    """The runs without CEM and with it that a pair compares."""
    on, cells = results["runs"][pair["run"]], _cells(results, pair["data"])
    off = next(cell for cell in cells.values() if not cell[0]["cem"] and _partners(cell[0], on))
    return off, cells[_key(on)]


def _of_pairs(entry: dict[str, Any], pairs: list[dict[str, Any]]) -> bool:
    return entry["run"] in {pair["run"] for pair in pairs}


def _cells(results: dict[str, Any], data: str) -> dict[str, list[Run]]:
    found = defaultdict(list)
    for run in results["runs"]:
        if run["data"] == data:
            found[_key(run)].append(run)
    return found


def _key(run: Run) -> str:
    return json.dumps({k: v for k, v in run["config"].items() if k not in NOT_OF_A_CELL}, sort_keys=True)


def _partners(off: Run, on: Run) -> bool:
    """Whether two cells differ in CEM alone."""
    return all(
        value == on["config"][key]
        for key, value in off["config"].items()
        if key not in NOT_OF_A_CELL and key != "lambda" and not key.startswith("cem_")
    )


def _accuracy(run: Run) -> float:
    return run["accuracy"]


def _mse(run: Run) -> float:
    return min(attack["mse"] for attack in run["attacks"].values())


def _mean(items: Iterable[Any], value: Callable[[Any], float]) -> float:
    values = [value(item) for item in items]
    return sum(values) / len(values)


def _gain(entry: dict[str, Any]) -> str:
    low, high = entry["interval"]
    return f"{entry['gain']:+.0%} ({low:+.0%} to {high:+.0%})"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--summary", action="store_true")
    arguments = parser.parse_args()
    print((summary if arguments.summary else tables)(json.loads(arguments.results.read_text())))
