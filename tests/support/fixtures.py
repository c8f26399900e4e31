"""A tiny folder of images and a finished grid on it, made once for all tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cem_fast import data, defenses, models, training
from cem_fast.config import GridConfig, RunConfig
from cem_fast.data import Splits
from cem_fast.experiments.grid import evaluate
from cem_fast.experiments.records import Results
from cem_fast.models.split import SplitModel


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs the block on one thread: bits depend on the number of threads, and small networks are no faster on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def _one_thread(request):
    """One thread for all tests but those of the operations, which use all cores."""
    with nullcontext() if {"ops", "mixture"} & {*request.path.parts} else one_thread():
        yield


@pytest.fixture
def heeds_ctrl_c():
    """Handles Ctrl-C as in a terminal, here and in every process that is started. Background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory) -> Path:
    """Three classes of ten grey 16x16 images: a bright square at a different place per class, and noise."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images") / "tiny"
    random = np.random.default_rng(0)
    for label, name in enumerate(("left", "middle", "right")):
        (folder / name).mkdir(parents=True)
        for index in range(10):
            pixels = random.integers(0, 80, (16, 16), dtype=np.uint8)
            pixels[4:12, 5 * label : 5 * label + 5] += 150
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def tiny_grid(tiny_images) -> GridConfig:
    """A grid that takes seconds: the undefended bottleneck, noise at three levels, and noise with CEM."""
    return GridConfig(
        name="tiny",
        data=(str(tiny_images),),
        image_size=16,
        noise_levels=(0.05, 0.3),
        seeds=(0,),
        cem_components=2,
        epochs=2,
        batch_size=8,
        attack_epochs=4,
        noise_draws=3,
    )


@dataclass(frozen=True)
class Finished:
    """A finished grid: its settings, its folder, and the content of results.json."""

    grid: GridConfig
    folder: Path
    results: Results

    def run(self, *, cem: bool, noise_std: float = 0.1) -> Path:
        """The folder of one of its runs."""
        found = [r for r in self.results.runs if r.cem == cem and r.config.noise_std == noise_std]
        return self.folder / found[0].checkpoint


@pytest.fixture(scope="session")
def finished(tiny_grid, tmp_path_factory) -> Finished:
    """The tiny grid with two seeds, finished; tests copy what they change."""
    grid, folder = replace(tiny_grid, seeds=(0, 1)), tmp_path_factory.mktemp("finished")
    with one_thread():  # made before the fixture of the module sets it
        return Finished(grid, folder, evaluate(grid, folder, command="cem-fast evaluate"))


@pytest.fixture(scope="session")
def undefended_faces() -> tuple[Splits, SplitModel]:
    """Small faces and the slim network, trained on them without a defense. Tests must not change them."""
    faces = data.load("faces", fold=0, image_size=24)
    torch.manual_seed(0)
    model = models.build("slim", image_shape=faces.image_shape, num_classes=40, cut=2, bottleneck=8)
    training.train(model, faces, defenses.Bottleneck(), config=RunConfig(epochs=10))
    return faces, model
