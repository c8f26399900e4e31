"""Runs that were never made, with made-up results."""

from __future__ import annotations

import torch

from cem_fast.config import RunConfig
from cem_fast.experiments.records import (
    Baseline,
    Description,
    GridRecord,
    Identity,
    Images,
    Leakage,
    Outcome,
    Recognition,
    Record,
)
from cem_fast.experiments.results import Measured


def record(config: RunConfig, *, accuracy: float = 0.9, mse: float = 0.01) -> GridRecord:
    """A run under the ridge attack."""
    outcome = Outcome(mse, 20.0, 0.5, 0.6, 0.9, None, knowledge="its own images", budget="a closed form")
    nothing = Leakage(None, None, None)
    return Record(config.data, config, accuracy, 80, {"ridge": outcome}, nothing, {"total": 1.0}).at(None)


def measured(defense, noise, weight, accuracy, mse, seed=0, images=200, **own) -> Measured:
    """A run whose per-image errors and correctness have exactly these means."""
    config = RunConfig(defense=defense, noise_std=noise, cem_weight=weight, seed=seed, **own)
    correct = (torch.arange(images) < round(accuracy * images)).float()
    shape = 1 + 0.5 * torch.sin(torch.arange(images).double())
    errors = {"mse.ridge": mse * shape / shape.mean(), "correct": correct, "groups": torch.arange(images) // 2}
    errors["correct.groups"] = errors["groups"]
    return Measured(record(config, accuracy=accuracy, mse=mse), errors)


def description(config: RunConfig, *, image_shape: tuple[int, int, int], num_classes: int) -> Description:
    """Content of the run.json of a run that was not attacked."""
    return Description(
        config=config,
        image_shape=image_shape,
        num_classes=num_classes,
        data=Images(config.data, "nobody", "images", 100, 100, 10),
        baseline=Baseline(0.02, 0.01),
        recognition=Recognition(0.9, 0.1),
        identity=Identity("0", "0", "0"),
        history=(),
        curves=(),
        record=Record(config.data, config, 0.9, 10, {}, Leakage(None, None, None), {"total": 1.0}),
    )
