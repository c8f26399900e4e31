"""Tables of a results.json, as Markdown.

usage: python -m cem_fast.report.markdown RESULTS.json [--summary]

The attack on a run is its strongest one, and figures are means over the runs of a cell. `docs/results/evaluation.md` holds the tables,
and the README the summary, of the results in `benchmarks/results`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from cem_fast.config import RunConfig
from cem_fast.experiments.gain_records import FrontierEntry, Pair
from cem_fast.experiments.names import differing, name
from cem_fast.experiments.records import GridRecord, Record, Results
from cem_fast.experiments.results import cells, read_file


def tables(results: Results) -> str:
    """All tables of a results.json, one data set after another.

    Args:
        results: its content.

    Example:
        >>> from cem_fast.experiments.records import Results
        >>> from cem_fast.report import markdown
        >>> markdown.tables(Results("cem-fast demo", None, {}, {}, (), (), ()))
        ''
    """
    return "\n\n".join(
        f"### {data}\n\n"
        + "\n\n".join(filter(None, (part(results, data) for part in (frontier, sweep, same_noise, attacks, inferred))))
        for data in results.baseline
    )


def summary(results: Results) -> str:
    """One row per data set: what CEM gains, over plain noise at equal accuracy and at the same noise.

    Args:
        results: content of a results.json.

    Example:
        >>> from cem_fast.experiments.records import Results
        >>> from cem_fast.report import markdown
        >>> print(markdown.summary(Results("cem-fast demo", None, {}, {}, (), (), ())))
        | data | gain over plain noise at equal accuracy | interval above 0 | accuracy lost | gain at the same noise | interval above 0 |
        | --- | ---: | ---: | ---: | ---: | ---: |
    """
    rows = []
    for data in results.baseline:
        pairs = [pair for pair in results.pairs if pair.data == data]
        both = [compared(results, pair) for pair in pairs]
        lost = f"{100 * mean(accuracy(off) - accuracy(on) for off, on in both):.1f} points" if both else "-"
        paired = {pair.run for pair in pairs}
        over_noise = [entry for entry in results.frontier if entry.data == data and entry.run in paired]
        # the others are less accurate than every level of the sweep
        rows.append([data, _range(over_noise), _above_zero(over_noise), lost, _range(pairs), _above_zero(pairs)])
    heads = [
        "data",
        "gain over plain noise at equal accuracy",
        "interval above 0",
        "accuracy lost",
        "gain at the same noise",
        "interval above 0",
    ]
    return _table(heads, rows)


def same_noise(results: Results, data: str) -> str:
    """Every defense without CEM and with it, at the same noise.

    Args:
        results: content of a results.json.
        data: name of a data set.

    Example:
        >>> from cem_fast.experiments.records import Baseline, Results
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments.records import Leakage, Record
        >>> from cem_fast.report import markdown
        >>> run = Record("faces", RunConfig(), 0.9, 80, {}, Leakage(None, None, None), {"total": 1.0}).at(None)
        >>> print(markdown.same_noise(Results("", None, {}, {"faces": Baseline(0.02, 0.01)}, (run,), (), ()), "faces"))
        At the same noise (the error of the class mean is 0.01000; gain -):
        <BLANKLINE>
        | defense | noise | accuracy | attack MSE | / class mean | accuracy, CEM | attack MSE, CEM | / class mean, CEM | gain |
        | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
    """
    ceiling, rows = results.baseline[data].class_mean_mse, []
    pairs = [pair for pair in results.pairs if pair.data == data]
    names = _without_cem(results, pairs)
    for pair in pairs:
        figures = [
            figure
            for cell in compared(results, pair)
            for figure in (f"{accuracy(cell):.1%}", f"{mse(cell):.5f}", f"{mse(cell) / ceiling:.0%}")
        ]
        rows.append([names[pair.run], f"{pair.noise_std:g}", *figures, _gain(pair)])
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


def frontier(results: Results, data: str) -> str:
    """Every cell that is not plain noise against more plain noise at equal accuracy.

    Results of earlier versions have entries for cells with CEM alone, without names.

    Args:
        results: content of a results.json.
        data: name of a data set.

    Example:
        >>> from cem_fast.experiments.records import Results
        >>> from cem_fast.report import markdown
        >>> print(markdown.frontier(Results("", None, {}, {}, (), (), ()), "faces"))
        Over plain noise at equal accuracy:
        <BLANKLINE>
        | defense | accuracy | attack MSE | gain |
        | --- | ---: | ---: | ---: |
    """
    entries, rows = {entry.run: entry for entry in results.frontier}, []
    named = any(entry.name for entry in results.frontier)
    found = _cells(results, data)
    for cell in found:
        first = cell[0]
        if first.plain or not (first.cem or named):
            continue
        title = name(first, [each[0] for each in found])
        if not named:
            title = (
                first.config.defense + ("" if first.config.cem_by_class else ", one Gaussian without labels") + " + CEM"
            )
        entry = entries.get(results.runs.index(first))
        gain = _gain(entry) if entry else "less accurate than every level of the sweep"
        rows.append([title, f"{accuracy(cell):.1%}", f"{mse(cell):.5f}", gain])
    return "Over plain noise at equal accuracy:\n\n" + _table(["defense", "accuracy", "attack MSE", "gain"], rows)


def sweep(results: Results, data: str) -> str:
    """The paper's bottleneck with nothing but noise, one row per level.

    Args:
        results: content of a results.json.
        data: name of a data set.

    Example:
        >>> from cem_fast.experiments.records import Results
        >>> from cem_fast.report import markdown
        >>> print(markdown.sweep(Results("", None, {}, {}, (), (), ()), "faces"))
        The plain noise that this compares to:
        <BLANKLINE>
        | noise | accuracy | attack MSE |
        | --- | ---: | ---: |
    """
    plain = sorted((cell for cell in _cells(results, data) if cell[0].plain), key=lambda cell: cell[0].config.noise_std)
    rows = []
    for cell in plain:
        config = cell[0].config
        levels = [each[0].config for each in plain if each[0].config.noise_std == config.noise_std]
        level = ", ".join([f"{config.noise_std:g}", *differing(config, levels)])
        rows.append([level, f"{accuracy(cell):.1%}", f"{mse(cell):.5f}"])
    return "The plain noise that this compares to:\n\n" + _table(["noise", "accuracy", "attack MSE"], rows)


def attacks(results: Results, data: str) -> str:
    """Every attack on runs with noise: its error, how often it was the strongest, and the cost of half its budget.

    Args:
        results: content of a results.json.
        data: name of a data set.

    Example:
        >>> from cem_fast.experiments.records import Results
        >>> from cem_fast.report import markdown
        >>> print(markdown.attacks(Results("", None, {}, {}, (), (), ()), "faces"))
        The attacks, over all runs with noise:
        <BLANKLINE>
        | attack | MSE | strongest of its run | half the budget: error, mean | at worst |
        | --- | ---: | ---: | ---: | ---: |
    """
    runs = [run for run in results.runs if run.data == data and run.config.noise_std > 0]
    strongest = [run.strongest for run in runs]
    rows = []
    for attack in dict.fromkeys(attack for run in runs for attack in run.attacks):
        outcomes = [run.attacks[attack] for run in runs if attack in run.attacks]
        halves = [
            each.mse_half_budget / each.mse - 1 for each in outcomes if each.mse_half_budget is not None and each.mse
        ]
        cost = [f"{mean(halves):+.1%}", f"{max(halves):+.1%}"] if halves else ["-", "-"]
        error = mean(each.mse for each in outcomes)
        rows.append([attack, f"{error:.5f}", f"{strongest.count(attack)} of {len(runs)}", *cost])
    heads = ["attack", "MSE", "strongest of its run", "half the budget: error, mean", "at worst"]
    return "The attacks, over all runs with noise:\n\n" + _table(heads, rows)


def inferred(results: Results, data: str) -> str:
    """What an attacker reads from the features apart from pixels, one row per cell; empty for results of earlier versions.

    Args:
        results: content of a results.json.
        data: name of a data set.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments.records import Baseline, Leakage, Outcome, Record, Results
        >>> from cem_fast.metrics.recognition import Rate
        >>> from cem_fast.report import markdown
        >>> outcome = Outcome(0.01, 20.0, 0.5, 0.6, 0.9, None, knowledge="its own images", budget="a closed form")
        >>> rest = 0.9, 80, {"ridge": outcome}, Leakage(None, None, None), {"total": 1.0}
        >>> run = Record("faces", RunConfig(), *rest, {"label": Rate(share=0.75, chance=0.1)}).at(None)
        >>> print(markdown.inferred(Results("", None, {}, {"faces": Baseline(0.02, 0.01)}, (run,), (), ()), "faces"))
        What an attacker reads from the features:
        <BLANKLINE>
        | defense | noise | label (by chance 10.0%) |
        | --- | ---: | ---: |
        | noise | 0.1 | 75.0% |
    """
    grouped = _cells(results, data)
    chances = {name: rate.chance for cell in grouped for run in cell for name, rate in run.inferred.items()}
    if not chances:
        return ""
    rows = []
    for cell in grouped:
        shares = [[run.inferred[name].share for run in cell if name in run.inferred] for name in chances]
        figures = [f"{mean(found):.1%}" if found else "-" for found in shares]
        title = name(cell[0], [each[0] for each in grouped], shown=["noise_std"])
        rows.append([title, f"{cell[0].config.noise_std:g}", *figures])
    heads = ["defense", "noise", *(f"{name} (by chance {chance:.1%})" for name, chance in chances.items())]
    return "What an attacker reads from the features:\n\n" + _table(heads, rows)


def accuracy(cell: Sequence[Record]) -> float:
    """Mean accuracy of the runs of a cell.

    Args:
        cell: the runs.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments.records import Leakage, Record
        >>> from cem_fast.report import markdown
        >>> markdown.accuracy([Record("faces", RunConfig(), 0.9, 80, {}, Leakage(None, None, None), {"total": 1.0})])
        0.9
    """
    return mean(run.accuracy for run in cell)


def mse(cell: Sequence[Record]) -> float:
    """Mean error of the strongest attack on every run of a cell.

    Args:
        cell: the runs, all of them attacked.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments.records import Leakage, Outcome, Record
        >>> from cem_fast.report import markdown
        >>> outcome = Outcome(0.01, 20.0, 0.5, 0.6, 0.9, None, knowledge="its own images", budget="a closed form")
        >>> record = Record("faces", RunConfig(), 0.9, 80, {"ridge": outcome}, Leakage(None, None, None), {"total": 1.0})
        >>> markdown.mse([record])
        0.01
    """
    return mean(min(outcome.mse for outcome in run.attacks.values()) for run in cell)


def mean(values: Iterable[float]) -> float:
    """Mean of at least one number.

    Args:
        values: the numbers.

    Example:
        >>> from cem_fast.report import markdown
        >>> markdown.mean([1.0, 2.0])
        1.5
    """
    values = list(values)
    return sum(values) / len(values)


def compared(results: Results, pair: Pair) -> tuple[list[GridRecord], list[GridRecord]]:
    """The runs that a pair compares.

    Args:
        results: content of a results.json.
        pair: one of its pairs.

    Returns:
        The runs without CEM and those with it.

    Raises:
        ValueError: there are no runs without CEM that agree in all other settings.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments.gain_records import Pair
        >>> from cem_fast.experiments.records import Baseline, Leakage, Outcome, Record, Results
        >>> from cem_fast.report import markdown
        >>> outcome = Outcome(0.01, 20.0, 0.5, 0.6, 0.9, None, knowledge="its own images", budget="a closed form")
        >>> rest = 0.9, 80, {"ridge": outcome}, Leakage(None, None, None), {"total": 1.0}
        >>> runs = tuple(Record("faces", RunConfig(cem_weight=weight), *rest).at(None) for weight in (0.0, 0.5))
        >>> pair = Pair("faces", "noise", 0.1, 0.5, run=1, gain=0.9, interval=(0.8, 1.0))
        >>> results = Results("", None, {}, {"faces": Baseline(0.02, 0.01)}, runs, (pair,), ())
        >>> [[run.label for run in cell] for cell in markdown.compared(results, pair)]
        [['noise'], ['noise + CEM']]
    """
    on = results.runs[pair.run]
    alike = [cell for cell in _cells(results, on.data) if cell[0].without_cem == on.without_cem]
    without = next((cell for cell in alike if not cell[0].cem), None)
    if without is None:
        raise ValueError(
            f"run {pair.run} of results.json is in a pair, but there is no run without CEM of its settings"
        )
    return without, next(cell for cell in alike if cell[0].cell == on.cell)


def _without_cem(results: Results, pairs: Sequence[Pair]) -> dict[int, str]:
    """Names of the defenses of pairs, with every setting that tells them apart, by the run of the pair."""
    configs = {pair.run: results.runs[pair.run].config for pair in pairs}

    def words(config: RunConfig) -> list[str]:
        return [config.defense, *differing(config, configs.values(), shown=["noise_std"])]

    return {run: ", ".join(words(config)) for run, config in configs.items()}


def _cells(results: Results, data: str) -> list[list[GridRecord]]:
    return cells(run for run in results.runs if run.data == data and run.attacks)


def _range(entries: Sequence[Pair] | Sequence[FrontierEntry]) -> str:
    gains = [entry.gain for entry in entries]
    return f"{min(gains):+.0%} to {max(gains):+.0%}, mean {mean(gains):+.0%}" if gains else "-"


def _above_zero(entries: Sequence[Pair] | Sequence[FrontierEntry]) -> str:
    return f"{sum(entry.interval[0] > 0 for entry in entries)} of {len(entries)}"


def _gain(entry: Pair | FrontierEntry) -> str:
    low, high = entry.interval
    return f"{entry.gain:+.0%} ({low:+.0%} to {high:+.0%})"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--summary", action="store_true", help="one row per data set")
    arguments = parser.parse_args()
    print((summary if arguments.summary else tables)(read_file(arguments.results)))
