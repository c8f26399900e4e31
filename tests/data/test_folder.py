"""A user's own images: classes, hidden files, and errors that name the file."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from support import twins

from cem_fast import data


def test_folder_of_grey_images(tmp_path):
    splits = data.load(str(twins.write_images(tmp_path / "photos")), fold=1, image_size=24)
    assert (splits.name, splits.image_shape, splits.class_names) == ("photos", (1, 24, 24), ("class 0", "class 1"))
    assert (len(splits.train), len(splits.test)) == (8, 2)


def test_one_color_image_makes_a_folder_color(tmp_path):
    folder = twins.write_images(tmp_path / "photos")
    Image.new("RGB", (10, 10), (255, 0, 0)).save(folder / "class 0" / "red.jpg")
    splits = data.load(str(folder), fold=0)
    assert splits.image_shape == (3, 48, 48)
    images = torch.cat([splits.train.images, splits.test.images])
    assert any(image[0].min() > 0.9 and image[1:].max() < 0.1 for image in images)


def test_corrupt_file_is_named(tmp_path):
    folder = twins.write_images(tmp_path / "photos")
    broken = folder / "class 1" / "broken.png"
    broken.write_bytes((folder / "class 1" / "0.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cannot read .*broken\.png as an image"):
        data.load(str(folder), fold=0)


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="one sub-folder per class, at least 2, got 0"):
        data.load(str(tmp_path), fold=0)
    folder = twins.write_images(tmp_path / "photos", count=1)
    with pytest.raises(ValueError, match="at least 2 images to be split, 'class 0' has 1"):
        data.load(str(folder), fold=0)
    for count in (2, 4):
        few = twins.write_images(tmp_path / f"few {count}", count=count)
        with pytest.raises(ValueError, match=f"10 images are needed for 5 folds of at least 2, got {2 * count}"):
            data.load(str(few), fold=0)
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no image"):
        data.load(str(folder), fold=0)


def test_hidden_files_and_folders_are_not_images(tmp_path):
    folder = twins.write_images(tmp_path / "photos")
    before = data.load(str(folder), fold=0).digest()
    hidden = folder / "class 0" / ".ipynb_checkpoints"
    hidden.mkdir()
    (hidden / "0.png").write_bytes((folder / "class 0" / "0.png").read_bytes())
    (folder / "class 0" / "._0.png").write_bytes(b"not an image")
    assert data.load(str(folder), fold=0).digest() == before
