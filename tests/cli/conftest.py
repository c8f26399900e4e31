"""Settings of a small grid, and signal handlers as they were."""

from __future__ import annotations

import signal

import pytest
import yaml


@pytest.fixture(autouse=True)
def _own_signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def config(tiny_images, tmp_path):
    """A YAML file of a grid that takes seconds."""
    path = tmp_path / "grid.yaml"
    settings = {
        "name": "small", "data": [str(tiny_images)], "image_size": 16, "seeds": [0], "cem_components": 2,
        "epochs": 2, "batch_size": 8, "attack_epochs": 4, "attacks": ["decoder", "ridge"],
    }  # fmt: skip
    path.write_text(yaml.safe_dump(settings))
    return path
