"""Every Python block of the README runs as pasted."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture
def folder_of_images(tmp_path, monkeypatch):
    """Two classes of ten small color images each, at the path that the README uses."""
    monkeypatch.chdir(tmp_path)
    g = torch.Generator().manual_seed(0)
    for name, brightness in (("dark", 60), ("light", 180)):
        folder = tmp_path / "path/to/folder" / name
        folder.mkdir(parents=True)
        for i in range(10):
            pixels = brightness + torch.randint(0, 50, (24, 20, 3), generator=g)
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{i}.png")


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_block_runs_as_pasted(index, folder_of_images):
    names = {}
    exec(BLOCKS[index], names)  # the README is ours
    if "rebuilt" in names:
        assert names["rebuilt"].shape == names["splits"].test.images.shape
    if "NearestNeighbor" in names:
        images, labels = torch.rand(12, 1, 4, 4), torch.zeros(12, dtype=torch.long)
        attack, defense = names["NearestNeighbor"](), names["Rounding"]()
        attack.fit(defense.release, images, labels)
        assert torch.equal(attack.reconstruct(defense.release(images[3:4])), images[3:4])
        assert defense.release(images).unique().numel() <= 5


def test_there_are_blocks():
    assert len(BLOCKS) == 3
