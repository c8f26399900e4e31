"""Pixels of image files and PIL images: brightness, orientation, and refusals."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from support import twins

from cem_fast import data
from cem_fast.data.splits import Splits


def load_all(folder, **changes):
    """All images of a folder in the order of their brightness."""
    splits = data.load(str(folder), **{"fold": 0, "image_size": 8, **changes})
    images = torch.cat([splits.train.images, splits.test.images])
    return images[images.flatten(1).mean(1).argsort()]


def of_depth(values, depth):
    """Values in [0, 1] as a grey image: 16-bit integers, 32-bit integers that hold 16 bits, or floating point."""
    kind, white = {"I;16": (np.uint16, 65535), "I": (np.int32, 65535), "F": (np.float32, 1), "L": (np.uint8, 255)}[
        depth
    ]
    return Image.fromarray((values * white).astype(kind))


@pytest.mark.parametrize("depth", ["I;16", "I", "F"])
@pytest.mark.parametrize("color", [False, True])
def test_deep_grey_images_keep_their_brightness(tmp_path, depth, color):
    random = np.random.default_rng(0)
    for index in range(10):
        values = random.uniform(index / 10, index / 10 + 0.1, (16, 16))
        for name, mode in (("deep", depth), ("plain", "L")):
            (tmp_path / name / str(index % 2)).mkdir(parents=True, exist_ok=True)
            of_depth(values, mode).save(tmp_path / name / str(index % 2) / f"{index}.tif")
    if color:
        for name in ("deep", "plain"):
            Image.new("RGB", (16, 16), (255, 255, 255)).save(tmp_path / name / "0" / "white.png")
    deep, plain = load_all(tmp_path / "deep"), load_all(tmp_path / "plain")
    assert deep.shape == plain.shape == (10 + color, 3 if color else 1, 8, 8)
    torch.testing.assert_close(deep, plain, atol=0.006, rtol=0)


@pytest.mark.parametrize("values", [[0.0, 2.0], [-0.5, 0.5], [0.0, np.nan]])
def test_floating_point_images_without_a_scale_are_refused(tmp_path, values):
    folder = twins.write_images(tmp_path / "photos")
    Image.fromarray(np.array([values], dtype=np.float32)).save(folder / "class 0" / "odd.tif")
    with pytest.raises(
        ValueError, match=r"cannot read .*odd\.tif as an image: its pixels must lie between 0 and 1, got"
    ):
        data.load(str(folder), fold=0)


def test_photographs_are_turned_upright(tmp_path):
    folder = twins.write_images(tmp_path / "photos", mode="RGB")
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:, :4] = 255  # white on the left
    for name, orientation in (("upright", 1), ("turned", 6)):  # 6: to be turned clockwise, so that white is on top
        exif = Image.Exif()
        exif[0x0112] = orientation
        for path in (folder / "class 0").iterdir():
            Image.fromarray(pixels).save(path, exif=exif)
        images = load_all(folder)
        white = images[images.amax((1, 2, 3)) == 1]
        top, left = white[:, :, 0, -1].mean(), white[:, :, -1, 0].mean()
        assert (top > left) == (name == "turned")


def test_a_huge_image_is_named(tmp_path):
    folder = twins.write_images(tmp_path / "photos")
    content = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0), b"IDAT"):
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (folder / "class 0" / "huge.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read .*huge\.png as an image: .*decompression bomb"):
        data.load(str(folder), fold=0)


def test_every_kind_of_pil_image_in_a_dataset():
    random = np.random.default_rng(0)
    color = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    truth = torch.from_numpy(np.array(color)).permute(2, 0, 1) / 255
    kinds = [color, color.quantize(64), color.convert("RGBA"), color.convert("CMYK")]
    found = Splits.from_datasets([(image, 0) for image in kinds], [(color, 0)]).train.images
    assert found.shape == (4, 3, 8, 8)
    assert (found - truth).abs().mean() < 0.03
    deep = of_depth(random.random((8, 8)), "I;16")
    splits = Splits.from_datasets([(deep, 0)], [(deep.convert("F").point(lambda v: v / 65535), 0)])
    torch.testing.assert_close(splits.train.images, splits.test.images, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"cannot read the image of train\[0\]: its pixels must lie between 0 and 1"):
        Splits.from_datasets([(Image.new("F", (8, 8), 7), 0)], [(color, 0)])
