"""Pixels of image files and PIL images: brightness, orientation, and refusals."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from support import twins

from cem_fast import data
from cem_fast.data import folder, images
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
        data.load(str(folder), fold=0, image_size=48)


def test_photographs_are_turned_upright(tmp_path):
    folder = twins.write_images(tmp_path / "photos", mode="RGB")
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:, :4] = 255  # white on the left
    for name, orientation in (("upright", 1), ("turned", 6)):  # 6: to be turned clockwise, so that white is on top
        exif = Image.Exif()
        exif[0x0112] = orientation
        for index, path in enumerate((folder / "class 0").iterdir()):
            pixels[-1, -1] = index  # all different
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
    with pytest.raises(
        ValueError, match=r"cannot read .*huge\.png as an image: .*decompression bomb.*scale it down or remove it"
    ):
        data.load(str(folder), fold=0, image_size=48)


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


def test_a_large_photograph_is_no_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    folder = twins.write_images(tmp_path / "photos")  # 600 pixels, less than twice the limit
    assert len(data.load(str(folder), fold=0, image_size=8).train) == 8
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(
        ValueError, match=r"10 files are not usable: cannot read .*/0\.png as an image: .* scale it down"
    ):
        data.load(str(folder), fold=0, image_size=8)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_only_formats_of_pixels_are_opened(suffix, tmp_path, monkeypatch):
    folder = twins.write_images(tmp_path / "photos")
    Image.new("RGB", (8, 8)).save(folder / "class 0" / "drawing.eps")
    path = (folder / "class 0" / "drawing.eps").rename(folder / "class 0" / f"drawing.{suffix}")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    message = rf"cannot read {path} as an image: it is damaged, or none of BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP"
    with pytest.raises(ValueError, match=message):
        data.load(str(folder), fold=0, image_size=8)


def test_every_format_of_a_folder_is_read(tmp_path):
    suffixes = ("bmp", "gif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")
    assert {f".{suffix}" for suffix in suffixes} == folder.SUFFIXES
    for index, suffix in enumerate(suffixes):
        path = tmp_path / "photos" / str(index % 2) / f"{index}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * index).save(path)
    brightness = load_all(tmp_path / "photos").mean((1, 2, 3)) * 255
    assert brightness.tolist() == pytest.approx([20 * index for index in range(10)], abs=2)


def transparent(mode):
    """A black image whose left half is transparent, in one of Pillow's modes or encodings."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 8))
    if mode == "P":  # the first color of the palette is transparent
        image = Image.new("P", (8, 8), 1)
        image.putpalette([0, 0, 0] * 256)
        image.paste(0, (0, 0, 4, 8))
        image.info["transparency"] = 0
        return image
    if mode in ("L", "RGB", "I;16"):  # one color is transparent
        values = np.zeros((8, 8), dtype=np.uint16 if mode == "I;16" else np.uint8)
        values[:, :4] = 7
        image = Image.fromarray(values)
        image = image if mode == "I;16" else image.convert(mode)
        image.info["transparency"] = (7, 7, 7) if mode == "RGB" else 7
        return image
    return image.convert("RGBA").convert(mode) if mode != "La" else image.convert("LA").convert("La")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La", "P", "L", "RGB", "I;16"])
@pytest.mark.parametrize("channels", ["L", "RGB"])
def test_transparent_pixels_are_white(mode, channels):
    found = images.pixels(transparent(mode), channels)
    assert found[:, :, :4].min() == 1
    assert found[:, :, 4:].max() == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "I;16"])
def test_transparent_icons_are_white_in_folders(mode, tmp_path):
    for index in range(10):
        path = tmp_path / "photos" / str(index % 2) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * index).save(path)
    transparent(mode).save(tmp_path / "photos" / "0" / "icon.png")
    found = load_all(tmp_path / "photos")
    assert any(image[:, :, :4].min() == 1 and image[:, :, 4:].max() == 0 for image in found)


def test_half_transparent_pixels_are_mixed_with_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 51))
    assert images.pixels(image, "RGB").mean((1, 2)).tolist() == pytest.approx([1, 0.8, 0.8], abs=0.005)


def test_opaque_images_with_an_alpha_channel_keep_their_pixels():
    color = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    for mode in ("L", "RGB"):
        assert torch.equal(images.pixels(color.convert("RGBA"), mode), images.pixels(color, mode))
    assert torch.equal(images.pixels(color.convert("L").convert("LA"), "L"), images.pixels(color, "L"))


def deep_folder(root, save, *, white):
    """Writes ten deep images whose brightness grows from 0 to 1, with ``save(values, path)``."""
    for index in range(10):
        path = root / str(index % 2) / f"{index}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        save(Image.fromarray(np.full((8, 8), round(white * index / 9), dtype=np.uint16)), path)
    return root


def test_images_of_fewer_bits_in_16_are_refused_where_nothing_declares_them(tmp_path):
    for bits in (10, 12, 14):
        folder = deep_folder(tmp_path / str(bits), lambda image, path: image.save(path), white=2**bits - 1)
        message = (
            rf"more than 8 bits in .*{bits} were read with 65535 as white and reach at most {2**bits - 1}, as images"
        )
        with pytest.raises(ValueError, match=message):
            load_all(folder)
    rows = [(Image.fromarray(np.full((8, 8), 4095, dtype=np.uint16)), 0)]
    with pytest.raises(ValueError, match="more than 8 bits in train were read with 65535"):
        Splits.from_datasets(rows, rows)


def test_images_that_declare_their_white_are_scaled_by_it(tmp_path):
    folder = deep_folder(
        tmp_path / "declared", lambda image, path: image.save(path, tiffinfo={images.WHITEST: 4095}), white=4095
    )
    brightness = load_all(folder).mean((1, 2, 3))
    assert brightness.tolist() == pytest.approx([index / 9 for index in range(10)], abs=1e-3)


def test_a_portable_graymap_is_scaled_by_its_maximum(tmp_path):
    for index in range(10):
        path = tmp_path / "maps" / str(index % 2) / f"{index}.pgm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"P5 8 8 4095\n" + np.full((8, 8), 100 * index, dtype=">u2").tobytes())
    brightness = load_all(tmp_path / "maps").mean((1, 2, 3))  # dark by its declared maximum
    assert brightness.tolist() == pytest.approx([100 * index / 4095 for index in range(10)], abs=1e-3)


def test_white_may_be_zero(tmp_path):
    info = {images.PHOTOMETRIC: 0}
    folder = deep_folder(tmp_path / "inverted", lambda image, path: image.save(path, tiffinfo=info), white=65535)
    with Image.open(folder / "0" / "0.tif") as image:
        assert image.tag_v2[images.PHOTOMETRIC] == 0
        assert images.pixels(image, "L").min() == 1


def test_deep_photographs_are_turned_upright(tmp_path):
    values = np.zeros((8, 8), dtype=np.uint16)
    values[:, :4] = 65535  # white on the left; turned clockwise, white is on top
    Image.fromarray(values).save(tmp_path / "turned.tif", tiffinfo={images.ORIENTATION: 6})
    found = images.read_all([tmp_path / "turned.tif"], 8, "L")[0, 0]
    assert found[:4].min() == 1
    assert found[4:].max() == 0
