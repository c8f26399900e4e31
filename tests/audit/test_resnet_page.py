"""The page that audits torchvision's resnet18, with fewer images; run where torchvision is installed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from cem_fast.cli.main import main

PAGE = Path(__file__).parents[2] / "docs/guide/audit-resnet.md"


@pytest.mark.long
def test_the_page_runs(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 12), ("test", 4)):
        for label in range(10):
            for index in range(count):
                path = Path("photos", part, str(label), f"{index}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = 20 * label + torch.randint(0, 60, (32, 32, 3), generator=generator)
                Image.fromarray(pixels.byte().numpy()).save(path)
    (code,) = re.findall(r"^:caption: mine.py\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    Path("mine.py").write_text(code)
    subprocess.run([sys.executable, "mine.py", "photos/train"], check=True)
    (line,) = re.findall(r"^cem-fast (audit .*)$", PAGE.read_text(), re.MULTILINE)
    arguments = [each.strip("'") for each in re.findall(r"'[^']*'|\S+", line)]
    assert main([*arguments, "--attacks", "ridge", "--folder", "audit"]) in (0, 3)
    found = json.loads(Path("audit/audit.json").read_text())
    assert [each["limit"] for each in found["limits"]] == ["mse >= 0.01", "label <= 0.5"]
    assert found["accuracy"] is not None
