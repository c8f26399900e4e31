"""The commands of the guide to deployment, from a run to a device and a cloud that classify real faces."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cem_fast import deploy, load_run
from cem_fast.cli.commands import DEMO
from cem_fast.cli.parser import read_grid
from cem_fast.deploy import draws
from cem_fast.deploy.files import open_half
from cem_fast.experiments.saved_run import Run

for package in ("onnx", "onnxruntime", "onnxscript", "fastapi", "uvicorn"):
    pytest.importorskip(package)
GUIDE = Path(__file__).parents[2] / "docs/guide/deploy.md"
MAKEFILE = Path(__file__).parents[2] / "Makefile"
ONE_CELL = "--undefended [] --defenses noise --cem-weights 0.35 --seeds 0 --attacks ridge --jobs 1 --folder runs/demo"


def free_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the halves of a run of the demo, made by the first block of the guide."""
    place = tmp_path_factory.mktemp("guide")
    demo, activate, *rest = blocks("8000")[0].splitlines()
    assert (demo, activate) == ("make demo", "source .venv/bin/activate")
    assert "$(PY) -m cem_fast demo" in MAKEFILE.read_text()
    commands = "\n".join([f"cem-fast evaluate --config {shlex.quote(str(DEMO))} {ONE_CELL}", *rest])
    done = subprocess.run(["bash", "-ec", commands], **settings(place), capture_output=True, timeout=280)
    assert done.returncode == 0, done.stderr
    demos = [replace(run, attacks=("ridge",)) for run in read_grid(DEMO).runs()]
    assert exported_run(place).config in demos
    return place


def exported_run(place: Path) -> Run:
    return load_run(next((place / "runs/demo/runs").glob("faces-noise-cem-seed0-fold1-*")))


def blocks(port: str) -> list[str]:
    """The shell blocks of the section: halves, cloud, device."""
    section = GUIDE.read_text().partition("## Two processes")[2].partition("\n## ")[0].replace("8000", port)
    return re.findall(r"^```sh\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


def settings(place: Path) -> dict[str, Any]:
    paths = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return {"cwd": place, "env": {**os.environ, "PATH": paths}, "text": True}


@contextmanager
def cloud(place: Path):
    """The cloud's process, on a free port; yields the port."""
    port = free_port()
    with subprocess.Popen(
        ["bash", "-c", f"exec {blocks(port)[1]}"], **settings(place), stdout=subprocess.PIPE
    ) as server:
        try:
            assert server.stdout.readline().startswith(f"serving cloud on http://127.0.0.1:{port}")
            yield port
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def test_the_guide_takes_at_most_ten_commands():
    code = re.sub(r"^python -c '.*?^'$", "python -c", "".join(blocks("8000")), flags=re.DOTALL | re.MULTILINE)
    assert len(code.strip().splitlines()) <= 10


@pytest.mark.long
def test_a_device_process_and_a_cloud_process_classify_faces(place):
    assert sorted(path.name for path in (place / "phone").iterdir()) == ["device.onnx", "manifest.json"]
    assert sorted(path.name for path in (place / "cloud").iterdir()) == ["cloud.onnx", "manifest.json"]
    with cloud(place) as port:
        done = subprocess.run(["bash", "-ec", blocks(port)[2]], **settings(place), capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    accuracy, count = re.fullmatch(r"([\d.]+)% of (\d+) images\n", done.stdout).groups()
    run = exported_run(place)
    assert int(count) == run.description.record.num_test
    assert float(accuracy) / 100 == pytest.approx(run.description.record.accuracy, abs=0.06)


@pytest.mark.long
def test_the_cloud_process_answers_with_the_logits_of_pytorch(place):
    run = exported_run(place)
    images = run.data.test.images
    with cloud(place) as port:
        client = deploy.DeviceClient(place / "phone", f"http://127.0.0.1:{port}")
        drawn = draws.seeded(client.manifest.random_inputs, len(images), seed=0)
        messages = open_half(place / "phone/device.onnx")(images, *drawn)
        logits = torch.cat([client.send(each) for each in messages.split(16)])
    with torch.no_grad(), draws.Draws(drawn):
        expected = run.model.decoder(run.defense.release(run.model.encoder(images)))
    assert torch.allclose(logits, expected, rtol=0, atol=1e-4)
    assert torch.equal(logits.argmax(1), expected.argmax(1))
