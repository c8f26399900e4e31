"""Gains: of CEM at the same noise (pairs), and of every defense over plain noise at equal accuracy (frontier)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cem_fast import metrics
from cem_fast.experiments.gain_records import FrontierEntry, Pair
from cem_fast.experiments.names import name
from cem_fast.experiments.results import Measured, cells

NUM_RESAMPLES = 2000
SEED = 0
# settings of a cell and of the plain noise that it is compared to
SHARED = ("model", "image_size", "protocol", "validation", "noise_draws")


def pairs(runs: Sequence[Measured]) -> list[Pair]:
    """Relative rise of the strongest attack's error with CEM, all other settings equal.

    The interval is a paired bootstrap over the images (the people, for faces), pooled over seeds and folds.

    Args:
        runs: attacked runs; those without a partner are left out.

    Returns:
        One entry per cell with CEM that has runs without. ``run`` is the index of the cell's first run among ``runs``.

    Example:
        >>> import torch
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments import gains
        >>> from cem_fast.experiments.records import Leakage, Outcome, Record
        >>> from cem_fast.experiments.results import Measured
        >>> def run(weight, mse):
        ...     outcome = Outcome(mse, 20.0, 0.5, 0.6, 0.9, None, knowledge="its own images", budget="a closed form")
        ...     rest = 0.9, 80, {"ridge": outcome}, Leakage(None, None, None), {"total": 1.0}
        ...     errors = {"mse.ridge": torch.full((80,), mse), "groups": torch.arange(80)}
        ...     return Measured(Record("faces", RunConfig(cem_weight=weight), *rest).at(None), errors)
        >>> (pair,) = gains.pairs([run(0.0, 0.01), run(0.5, 0.02)])
        >>> pair.run, round(pair.gain, 3)
        (1, 1.0)
    """
    found = []
    for on_runs in cells(_attacked(runs)):
        first = on_runs[0].record
        if not first.cem:
            continue
        alike = [run for run in _attacked(runs) if run.record.without_cem == first.without_cem]
        off_by_repeat = {run.record.repeat: run for run in alike if not run.record.cem}
        matched = [(off_by_repeat[on.record.repeat], on) for on in on_runs if on.record.repeat in off_by_repeat]
        if not matched:
            continue
        gain, low, high = metrics.paired_bootstrap(
            torch.cat([off.errors for off, _ in matched]),
            torch.cat([on.errors for _, on in matched]),
            torch.cat([on.measurements["groups"] for _, on in matched]),
            num_resamples=NUM_RESAMPLES,
            seed=SEED,
        )
        found.append(Pair(*_cell(on_runs[0], runs), gain=gain, interval=(low, high)))
    return found


def frontier(runs: Sequence[Measured]) -> list[FrontierEntry]:
    """Relative rise of the strongest attack's error over plain noise at equal accuracy, for every cell that is not plain noise.

    Plain noise at several levels on the paper's bottleneck of 8 channels spans a curve, with the undefended bottleneck as level zero. It
    has the data, network, image size, protocol and attacks of the cell, at any cut and with any settings of training. The curve is the
    highest error that plain noise reaches at a given accuracy or a better one, linear between its corners. A cell's error is compared to
    that curve at the cell's own accuracy. The interval resamples images (people, for faces), accuracies and errors together.

    A cell that is more accurate than every run of the curve is compared to the most accurate one, which understates the gain. Where it is
    less accurate than all of them, there is no entry.

    Args:
        runs: attacked runs.

    Returns:
        One entry per cell that a noise sweep of at least two levels can be compared to. ``run`` is the index of the cell's first run among
        ``runs``, and ``baseline`` are those of the runs of the curve.

    Source:
        Xia et al., CVPR 2025, Fig. 4 (a), compares at equal accuracy by eye.

    Example:
        >>> import torch
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments import gains
        >>> from cem_fast.experiments.records import Leakage, Outcome, Record
        >>> from cem_fast.experiments.results import Measured
        >>> def run(noise, weight, correct, mse):
        ...     outcome = Outcome(mse, 20.0, 0.5, 0.6, 0.9, None, knowledge="its own images", budget="a closed form")
        ...     rest = correct / 80, 80, {"ridge": outcome}, Leakage(None, None, None), {"total": 1.0}
        ...     units = torch.arange(80)
        ...     tensors = {"mse.ridge": torch.full((80,), mse), "groups": units}
        ...     tensors |= {"correct": (units < correct).double(), "correct.groups": units}
        ...     return Measured(Record("faces", RunConfig(noise_std=noise, cem_weight=weight), *rest).at(None), tensors)
        >>> (entry,) = gains.frontier([run(0.1, 0.0, 76, 0.01), run(0.2, 0.0, 72, 0.02), run(0.1, 0.5, 72, 0.03)])
        >>> entry.name, entry.baseline, entry.accuracy, round(entry.gain, 3)
        ('noise + CEM', (0, 1), 0.9, 0.5)
    """
    found = []
    every = cells(_attacked(runs))
    first = [cell[0].record for cell in every]
    index = {id(run): place for place, run in enumerate(runs)}
    for on_runs in every:
        if on_runs[0].record.plain:
            continue
        curve = noise_sweep(runs, on_runs[0])
        repeats = set.intersection(*({run.record.repeat for run in cell} for cell in [*curve, on_runs]))
        if not curve or not repeats:
            continue
        curve = [[run for run in cell if run.record.repeat in repeats] for cell in curve]
        table = _table([*curve, [run for run in on_runs if run.record.repeat in repeats]])
        everyone = np.ones((1, table.shape[-1]))
        accuracy, gain = _gain_at_equal_accuracy(table, everyone, clamp=False)
        if np.isnan(gain[0]):
            continue
        draws = _resampled(table)
        low, high = np.quantile(_gain_at_equal_accuracy(table, draws, clamp=True)[1], [0.025, 0.975])
        found.append(
            FrontierEntry(
                *_cell(on_runs[0], runs),
                accuracy=float(accuracy[0]),
                gain=float(gain[0]),
                interval=(float(low), float(high)),
                name=name(on_runs[0].record, first),
                baseline=tuple(sorted(index[id(run)] for cell in curve for run in cell)),
            )
        )
    return found


def noise_sweep(runs: Sequence[Measured], other: Measured) -> list[list[Measured]]:
    """Finds the cells of plain noise at several levels that a run is compared to; see :func:`frontier`.

    Args:
        runs: runs; those that were not attacked are left out.
        other: a run that is not plain noise.

    Returns:
        The runs of every level; empty without a sweep of at least two levels above zero.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments import gains
        >>> from cem_fast.experiments.records import Leakage, Outcome, Record
        >>> from cem_fast.experiments.results import Measured
        >>> def run(noise, weight):
        ...     outcome = Outcome(0.01, 20.0, 0.5, 0.6, 0.9, None, knowledge="its own images", budget="a closed form")
        ...     rest = 0.9, 80, {"ridge": outcome}, Leakage(None, None, None), {"total": 1.0}
        ...     return Measured(Record("faces", RunConfig(noise_std=noise, cem_weight=weight), *rest).at(None), {})
        >>> levels = [run(0.1, 0.0), run(0.2, 0.0)]
        >>> len(gains.noise_sweep(levels, run(0.1, 0.5)))
        2
    """
    compared = _compared(other)
    curve = [cell for cell in cells(_attacked(runs)) if cell[0].record.plain and _compared(cell[0]) == compared]
    levels = {cell[0].record.config.noise_std for cell in curve} - {0}
    return curve if len(levels) >= 2 else []


def envelope(accuracies: np.ndarray, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the highest error that is reached at a given accuracy or a better one, by rising accuracy.

    Args:
        accuracies: ``[L]`` accuracy of every level.
        errors: ``[L]`` the attack's error at that level.

    Returns:
        Accuracies and errors of the corners; the errors fall as the accuracies rise.

    Example:
        >>> import numpy as np
        >>> from cem_fast.experiments import gains
        >>> accuracies, errors = gains.envelope(np.array([0.95, 0.95, 0.8]), np.array([0.01, 0.02, 0.03]))
        >>> accuracies.tolist(), errors.tolist()
        ([0.8, 0.95], [0.03, 0.02])
    """
    corners: list[tuple[float, float]] = []
    for accuracy, error in sorted(zip(accuracies, errors), key=lambda point: (-point[0], -point[1])):
        if not corners or error > corners[-1][1]:
            corners.append((accuracy, error))
    return np.array([a for a, _ in corners[::-1]]), np.array([e for _, e in corners[::-1]])


def _attacked(runs: Sequence[Measured]) -> list[Measured]:
    return [run for run in runs if run.record.strongest]


def _cell(run: Measured, runs: Sequence[Measured]) -> tuple[str, str, float, float, int]:
    """Data, defense, noise level, weight of CEM, and the run's index."""
    config = run.record.config
    index = next(index for index, each in enumerate(runs) if each is run)
    return run.record.data, config.defense, config.noise_std, config.cem_weight, index


def _compared(run: Measured) -> dict[str, object]:
    """What a run shares with the plain noise that it is compared to: data, network, image size and attacks."""
    shared = {key: value for key, value in run.record.settings.items() if key in SHARED or key.startswith("attack")}
    return {**shared, "data": run.record.data}


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
