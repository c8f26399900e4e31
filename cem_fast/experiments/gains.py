"""What CEM gains: at the same noise (pairs), and at the accuracy that more plain noise would cost (frontier)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cem_fast import defenses, metrics
from cem_fast.experiments.results import Measured, cells

NUM_RESAMPLES = 2000
SEED = 0


def pairs(runs: Sequence[Measured]) -> list[dict[str, Any]]:
    """CEM on against CEM off, all other settings equal: relative rise of the strongest attack's error.

    The interval is a paired bootstrap over the images (the people, for faces), pooled over seeds and folds.

    Args:
        runs: attacked runs; those without a partner are left out.

    Returns:
        One entry per cell with CEM that has runs without: ``data``, ``defense``, ``noise_std``, ``lambda``, ``run`` (the index of the
        cell's first run among ``runs``), ``gain``, ``interval``.
    """
    attacked = [run for run in runs if run.strongest]
    found = []
    for on_runs in cells(attacked).values():
        first = on_runs[0]
        if not first.record["cem"]:
            continue
        partners = [run for run in attacked if not run.record["cem"] and run.without_cem == first.without_cem]
        off_by_repeat = {run.repeat: run for run in partners}
        matched = [(off_by_repeat[on.repeat], on) for on in on_runs if on.repeat in off_by_repeat]
        if not matched:
            continue
        gain, low, high = metrics.paired_bootstrap(
            torch.cat([off.errors for off, _ in matched]),
            torch.cat([on.errors for _, on in matched]),
            torch.cat([on.measurements["groups"] for _, on in matched]),
            num_resamples=NUM_RESAMPLES,
            seed=SEED,
        )
        found.append({**_name(first, runs), "gain": gain, "interval": [low, high]})
    return found


def frontier(runs: Sequence[Measured]) -> list[dict[str, Any]]:
    """CEM against more plain noise at equal accuracy: relative rise of the strongest attack's error.

    The runs without CEM of a bottleneck with noise at several levels, with the undefended bottleneck as level zero, span a curve:
    the highest error that plain noise reaches at a given accuracy or a better one, linear between its corners. CEM's error is compared
    to that curve at CEM's own accuracy. The interval resamples images (people, for faces), accuracies and errors together.

    Where CEM is more accurate than every run of the curve, it is compared to the most accurate one, which understates the gain; where it
    is less accurate than all of them, the sweep says nothing and there is no entry.

    Args:
        runs: attacked runs.

    Returns:
        One entry per cell with CEM whose data set has a noise sweep of at least two levels: ``data``, ``defense``, ``noise_std``,
        ``lambda``, ``run`` (the index of the cell's first run among ``runs``), ``accuracy``, ``gain``, ``interval``.

    Source:
        Xia et al., CVPR 2025, Fig. 4 (a), compares at equal accuracy by eye.
    """
    grouped = cells([run for run in runs if run.strongest])
    found = []
    for on_runs in grouped.values():
        first = on_runs[0]
        if not first.record["cem"]:
            continue
        curve = noise_sweep(runs, first)
        repeats = set.intersection(*({run.repeat for run in cell} for cell in [*curve, on_runs]))
        if not curve or not repeats:
            continue
        table = _table([[run for run in cell if run.repeat in repeats] for cell in [*curve, on_runs]])
        everyone = np.ones((1, table.shape[-1]))
        accuracy, gain = _gain_at_equal_accuracy(table, everyone, clamp=False)
        if np.isnan(gain[0]):
            continue
        draws = _resampled(table)
        low, high = np.quantile(_gain_at_equal_accuracy(table, draws, clamp=True)[1], [0.025, 0.975])
        entry = {"accuracy": float(accuracy[0]), "gain": float(gain[0]), "interval": [float(low), float(high)]}
        found.append({**_name(first, runs), **entry})
    return found


def noise_sweep(runs: Sequence[Measured], on: Measured) -> list[list[Measured]]:
    """The cells of plain noise at several levels that a run with CEM is compared to; empty where there is no sweep.

    Args:
        runs: attacked runs.
        on: a run with CEM.
    """
    attacked = [run for run in runs if run.strongest]
    curve = [cell for cell in cells(attacked).values() if _is_plain_noise(cell[0], on)]
    levels = {cell[0].record["config"]["noise_std"] for cell in curve} - {0}
    return curve if len(levels) >= 2 else []


def envelope(accuracies: np.ndarray, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the highest error reached at a given accuracy or a better one, by rising accuracy.

    Args:
        accuracies: ``[L]`` accuracy of every level.
        errors: ``[L]`` the attack's error at that level.

    Returns:
        Accuracies and errors of the corners; the errors fall as the accuracies rise.
    """
    corners: list[tuple[float, float]] = []
    for accuracy, error in sorted(zip(accuracies, errors), key=lambda point: (-point[0], -point[1])):
        if not corners or error > corners[-1][1]:
            corners.append((accuracy, error))
    return np.array([a for a, _ in corners[::-1]]), np.array([e for _, e in corners[::-1]])


def _name(run: Measured, runs: Sequence[Measured]) -> dict[str, Any]:
    config = run.record["config"]
    return {
        "data": run.record["data"],
        "defense": run.record["defense"],
        "noise_std": config["noise_std"],
        "lambda": config["lambda"],
        "run": next(index for index, each in enumerate(runs) if each is run),
    }


def _is_plain_noise(run: Measured, other: Measured) -> bool:
    """Whether ``run`` is a level of the noise sweep that ``other``, a run with CEM, is to be compared to."""
    ignored = {"defense", "lambda", "fold", *defenses.settings()}  # plain noise has no strength but its level
    alike = all(
        run.record["config"][key] == value
        for key, value in other.record["config"].items()
        if key not in ignored and not key.startswith("cem_")
    )
    plain = run.record["defense"] in ("noise", "bottleneck")
    return alike and plain and run.record["data"] == other.record["data"] and not run.record["cem"]


def _table(cells: list[list[Measured]]) -> np.ndarray:
    """``[cells, 4, groups]``: per resampling unit, the sum and number of correct answers, and the sum and number of errors."""
    units = torch.cat([run.measurements[key] for run in cells[0] for key in ("correct.groups", "groups")]).unique()
    table = np.zeros((len(cells), 4, len(units)))
    for row, runs in zip(table, cells):
        for run in runs:
            measured = (run.measurements["correct"].double(), "correct.groups"), (run.errors, "groups")
            for place, (values, groups) in zip((0, 2), measured):
                index = torch.searchsorted(units, run.measurements[groups]).numpy()
                np.add.at(row[place], index, values.numpy())
                np.add.at(row[place + 1], index, 1.0)
    return table


def _resampled(table: np.ndarray) -> np.ndarray:
    """How often each resample counts each unit, ``[R, groups]``.

    Units with accuracies alone, with errors alone and with both are resampled apart, so that no resample is left without either.
    """
    random = np.random.default_rng(SEED)
    draws = np.empty((NUM_RESAMPLES, table.shape[-1]))
    kinds = (table[0, 1] > 0) + 2 * (table[0, 3] > 0)
    for kind in np.unique(kinds):
        units = np.flatnonzero(kinds == kind)
        draws[:, units] = random.multinomial(len(units), np.full(len(units), 1 / len(units)), size=NUM_RESAMPLES)
    return draws


def _gain_at_equal_accuracy(table: np.ndarray, draws: np.ndarray, *, clamp: bool) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and gain of the last row of ``table`` over the envelope of the others, for each of the draws ``[R, groups]``."""
    sums = np.einsum("csg,rg->rsc", table, draws)
    accuracies, errors = sums[:, 0] / sums[:, 1], sums[:, 2] / sums[:, 3]
    gains = np.empty(len(draws))
    for r in range(len(draws)):
        corners = envelope(accuracies[r, :-1], errors[r, :-1])
        covered = clamp or accuracies[r, -1] >= accuracies[r, :-1].min()
        reference = np.interp(accuracies[r, -1], *corners) if covered else np.nan
        gains[r] = errors[r, -1] / reference - 1
    return accuracies[:, -1], gains
