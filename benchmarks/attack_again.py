"""Saved runs, attacked again by other attacks: old and new errors next to one another.

usage: python benchmarks/attack_again.py RESULTS [--attacks kernel_ridge,inversion,flow] [--budget standard] [--seed 0] [--only TEXT]
                                         [--device cpu] [--table]

RESULTS is the folder of a grid. Every outcome is added to `attacked_again.json` in it as soon as it is there, and outcomes that are there
are not computed again, so an interrupted command continues. `--only` attacks the runs whose folder has the text in its name. `--table`
attacks nothing and prints the tables of `docs/results/attacks.md`.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cem_fast import attacks, load_run, metrics, training
from cem_fast._support import typed_json
from cem_fast._support.files import write_atomically
from cem_fast._support.seeding import seeded
from cem_fast.experiments.records import Description
from cem_fast.experiments.saved_run import DESCRIPTION, Run, read_description

FILE = "attacked_again.json"
NEW = ("kernel_ridge", "inversion", "flow")


@dataclass(frozen=True)
class Entry:
    """Result of one attack on one saved run.

    Attributes:
        run: folder of the run, below that of the results.
        attack: name of the attack.
        budget: its budget.
        seed: its seed.
        mse: mean squared error over the victims, pixels in [0, 1].
        psnr: peak signal-to-noise ratio per image in dB, averaged.
        ssim: structural similarity.
        seconds: time of the attack, which other programs on the machine prolong.
        threads: threads that it ran on.
        cpu_seconds: processor time of the attack; None if it was not measured.
        stages: mean squared error on held-out images of the attacker after every stage; None for attacks without stages.
    """

    run: str
    attack: str
    budget: str
    seed: int
    mse: float
    psnr: float
    ssim: float
    seconds: float
    threads: int
    cpu_seconds: float | None = None
    stages: dict[str, float] | None = None

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What was attacked, and how."""
        return self.run, self.attack, self.budget, self.seed


def read(folder: Path) -> list[Entry]:
    """The entries of a folder of results; none if there is no file."""
    path = folder / FILE
    if not path.exists():
        return []
    return list(typed_json.read(tuple[Entry, ...], json.loads(path.read_bytes()), path))


def attack(
    run: Run, name: str, *, budget: str, seed: int, device: torch.device
) -> tuple[Tensor, dict[str, float] | None]:
    """Reconstructions of the victims of a run, and the errors of the attack's stages on held-out images, if it has stages."""
    known, victims = run.data.attacker, run.data.victims
    observe = training.observer(run.model, run.defense)
    built = attacks.build(name, image_shape=run.data.image_shape, budget=budget, seed=seed)
    with seeded(seed):
        built.fit(observe, known.images.to(device), known.labels.to(device))
        rebuilt = built.reconstruct(observe(victims.images.to(device))).detach().cpu()
    return rebuilt, built.errors if isinstance(built, attacks.Inversion) else None


def attack_all(folder: Path, names: list[str], *, budget: str, seed: int, only: str, device: torch.device) -> None:
    """Attacks every run of a folder of results, and writes each outcome."""
    paths = [
        path for path in sorted((folder / "runs").iterdir()) if (path / DESCRIPTION).exists() and only in path.name
    ]
    # one attack after another, so that an interrupted command has all runs attacked by the quick ones
    for name in names:
        for path in paths:
            key = (path.relative_to(folder).as_posix(), name, budget, seed)
            if key in {entry.key for entry in read(folder)}:
                continue
            run = load_run(path, device=device)
            start, busy = time.perf_counter(), time.process_time()
            rebuilt, stages = attack(run, name, budget=budget, seed=seed, device=device)
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - busy
            truth = run.data.victims.images
            found = {
                measure.__name__: _mean(measure(rebuilt, truth))
                for measure in (metrics.mse, metrics.psnr, metrics.ssim)
            }
            figures = {
                "seconds": round(seconds, 1),
                "threads": torch.get_num_threads(),
                "cpu_seconds": round(cpu_seconds, 1),
            }
            entry = Entry(*key, **found, **figures, stages=stages)
            # read again: another process may attack other runs of the same folder
            entries = sorted([*read(folder), entry], key=lambda each: each.key)
            document = json.dumps(typed_json.write(entries), indent=1) + "\n"
            write_atomically(folder / FILE, document.encode())
            print(f"{path.name}: {name} {entry.mse:.5f}, {entry.seconds:.0f} s", flush=True)
            for stage, error in (stages or {}).items():
                print(f"  held-out images after {stage}: {error:.5f}", flush=True)


def tables(folder: Path) -> str:
    """Old and new errors of every run that was attacked again, and the gains of CEM by either."""
    entries = [entry for entry in read(folder) if entry.seed == 0]
    standard = [entry for entry in entries if entry.budget == "standard"]
    runs = {entry.run: read_description(folder / entry.run) for entry in standard}
    found = {run: {entry.attack: entry.mse for entry in standard if entry.run == run} for run in runs}
    parts = [_errors(runs, found), _gains(runs, found), _stages(runs, standard), _seconds(standard)]
    if more := [entry for entry in entries if entry.budget == "thorough"]:
        parts.append(_budgets(runs, found, more))
    return "\n\n".join(parts)


def _errors(runs: dict[str, Description], found: dict[str, dict[str, float]]) -> str:
    rows = []
    for run, description in runs.items():
        before, now = _before(description), found[run]
        best = min(now, key=lambda name: now[name])
        strongest = min(before, now[best])
        news = [f"{now[name]:.5f}" if name in now else "-" for name in NEW]
        rows.append(
            [*_named(description), f"{before:.5f} ({description.record.strongest})", *news, f"{strongest / before:.2f}"]
        )
    heads = ["data", "defense", "noise", "CEM", "strongest before", *NEW, "strongest now / before"]
    return "Errors, and the share that the strongest attack of all leaves of the strongest before:\n\n" + _table(
        heads, rows
    )


def _gains(runs: dict[str, Description], found: dict[str, dict[str, float]]) -> str:
    rows = []
    for run, on in runs.items():
        if not on.record.cem:
            continue
        for other, off in runs.items():
            both = "inversion" in found[run].keys() & found[other].keys()
            alike = off.record.without_cem == on.record.without_cem and off.record.repeat == on.record.repeat
            if alike and both and not off.record.cem:
                before = _before(on) / _before(off) - 1
                now = min(_before(on), *found[run].values()) / min(_before(off), *found[other].values()) - 1
                rows.append([*_named(on)[:3], f"{before:+.0%}", f"{now:+.0%}"])
    title = "What CEM gains at the same noise, by the strongest attack before and now, where `inversion` was run on both networks:"
    return title + "\n\n" + _table(["data", "defense", "noise", "gain before", "gain now"], rows)


def _stages(runs: dict[str, Description], entries: list[Entry]) -> str:
    rows, heads = [], ["data", "defense", "noise", "CEM"]
    for entry in entries:
        if entry.stages:
            heads[4:] = entry.stages
            rows.append([*_named(runs[entry.run]), *(f"{error:.5f}" for error in entry.stages.values())])
    title = "Errors of `inversion` after every stage, on held-out images of the attacker, from which its networks have not learned yet:"
    return title + "\n\n" + _table(heads, rows)


def _seconds(entries: list[Entry]) -> str:
    rows = []
    for name in NEW:
        took = [entry.cpu_seconds for entry in entries if entry.attack == name and entry.cpu_seconds is not None]
        if took:
            rows.append([name, str(len(took)), f"{sum(took) / len(took):.0f}", f"{max(took):.0f}"])
    return "Processor seconds per network:\n\n" + _table(["attack", "networks", "mean", "most"], rows)


def _budgets(runs: dict[str, Description], found: dict[str, dict[str, float]], more: list[Entry]) -> str:
    rows = []
    for entry in more:
        once = found.get(entry.run, {}).get(entry.attack)
        if once is not None:
            figures = [f"{once:.5f}", f"{entry.mse:.5f}", f"{entry.mse / once - 1:+.1%}"]
            rows.append([*_named(runs[entry.run]), entry.attack, *figures])
    heads = ["data", "defense", "noise", "CEM", "attack", "standard", "twice the budget", "change"]
    return "Twice the budget:\n\n" + _table(heads, rows)


def _before(description: Description) -> float:
    return min(outcome.mse for outcome in description.record.attacks.values())


def _named(description: Description) -> list[str]:
    config = description.config
    return [description.record.data, config.defense, f"{config.noise_std:g}", f"{config.cem_weight:g}"]


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--attacks", type=lambda text: text.split(","), default=list(NEW))
    parser.add_argument("--budget", choices=attacks.budget_names(), default="standard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        print(tables(given.results))
        return
    attack_all(given.results, given.attacks, budget=given.budget, seed=given.seed, only=given.only, device=given.device)


if __name__ == "__main__":
    main()
