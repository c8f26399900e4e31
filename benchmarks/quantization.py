"""Cost of quantized messages: accuracy, and the error of attacks that know the quantizer.

Usage: ``python -m cem_fast.benchmarks.quantization RUN [--attacks ridge kernel_ridge inversion] [--budget quick]``, with a saved run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from cem_fast import attacks, defenses, load_run, metrics, training
from cem_fast._support.seeding import seeded
from cem_fast.defenses.quantized import CODES
from cem_fast.experiments.saved_run import Run

DRAWS = 20  # of the noise, for the accuracy


def rows(run: Run, names: Sequence[str], budget: str) -> Iterator[list[str]]:
    """Cells of the table, a row for each dtype: bytes a message, accuracy, and the mean squared error of each attack.

    Args:
        run: the finished run.
        names: the attacks.
        budget: their computation, ``quick``, ``standard`` or ``thorough``.
    """
    known, victims, seed = run.data.attacker, run.data.victims, run.config.seed
    for dtype, of_torch in CODES.items():
        defense = defenses.Quantized(run.defense, message=dtype).eval()
        accuracy = training.evaluate_accuracy(run.model, defense, run.data.test, draws=DRAWS, seed=seed)
        observe, errors = training.observer(run.model, defense), []
        for name in names:
            attack = attacks.build(name, image_shape=run.data.image_shape, seed=seed, budget=budget)
            with seeded(seed):
                attack.fit(observe, known.images, known.labels)
                rebuilt = attack.reconstruct(observe(victims.images))
            errors.append(float(metrics.mse(rebuilt, victims.images).mean()))
        size = observe.features(victims.images[:1]).numel() * torch.empty(0, dtype=of_torch).element_size()
        yield [dtype, f"{size:,}", f"{accuracy:.4f}", *(f"{error:.5f}" for error in errors)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--attacks", nargs="+", choices=attacks.names(), default=["ridge", "kernel_ridge", "inversion"])
    parser.add_argument("--budget", choices=attacks.budget_names(), default="quick")
    options = parser.parse_args()
    print("| message | bytes | accuracy |", " | ".join(f"MSE, {name}" for name in options.attacks), "|")
    print("|---|--:|--:|", "--:|" * len(options.attacks), sep="")
    for cells in rows(load_run(options.run), options.attacks, options.budget):
        print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
