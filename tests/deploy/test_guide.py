"""The commands of the guide to deployment, from a run to a device and a cloud that classify real images."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("onnx", "onnxruntime", "onnxscript", "fastapi", "uvicorn"):
    pytest.importorskip(package)
GUIDE = Path(__file__).parents[2] / "docs/guide/deploy.md"


def free_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


@pytest.mark.long
def test_a_device_process_and_a_cloud_process_classify_digits(tmp_path):
    section = GUIDE.read_text().partition("## Two processes")[2]
    port = free_port()
    prepare, cloud, device = re.findall(r"^```sh\n(.*?)^```", section.replace("8000", port), re.DOTALL | re.MULTILINE)[
        :3
    ]
    paths = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    settings = {"cwd": tmp_path, "env": {**os.environ, "PATH": paths}, "text": True}
    done = subprocess.run(["bash", "-ec", prepare], **settings, capture_output=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "phone").iterdir()) == ["device.onnx", "manifest.json"]
    with subprocess.Popen(["bash", "-c", f"exec {cloud}"], **settings, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout.readline().startswith(f"serving cloud on http://127.0.0.1:{port}")
            done = subprocess.run(["bash", "-ec", device], **settings, capture_output=True, timeout=200)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    assert done.returncode == 0, done.stderr
    accuracy, count = re.fullmatch(r"([\d.]+)% of (\d+) images\n", done.stdout).groups()
    assert int(count) == 1000
    assert float(accuracy) > 90
