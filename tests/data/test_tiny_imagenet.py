"""Tiny-ImageNet: tiny copies in the published format, and damaged ones."""

from __future__ import annotations

import os

import pytest
import torch
from support import twins

from cem_fast import data


def load(name, root, **settings):
    return data.load(name, fold=1, root=root, **settings)


@pytest.mark.parametrize("prepared", [False, True])
def test_tiny_imagenet(prepared, tmp_path, monkeypatch):
    twins.tiny(tmp_path, monkeypatch, prepared=prepared)
    splits = load("tiny_imagenet", tmp_path)
    assert (splits.image_shape, splits.class_names) == ((3, 64, 64), ("goldfish", "toad", "n03"))
    assert splits.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.bincount(splits.test.labels).tolist() == [2, 2, 2]
    for part, offset in ((splits.train, (0, 30)), (splits.test, (5, 15))):
        brightness = part.images.mean((1, 2, 3)) * 255 - 80 * part.labels
        assert offset[0] - 2 < brightness.min() < brightness.max() < offset[1] + 2
    assert not splits.train.images.amax(1).sub(splits.train.images.amin(1)).any()  # grey, in three channels


def test_the_layout_of_the_validation_images_changes_nothing(tmp_path, monkeypatch):
    twins.tiny(tmp_path / "raw", monkeypatch)
    folder = twins.tiny(tmp_path / "prepared", monkeypatch, prepared=True)
    expected = load("tiny_imagenet", tmp_path / "raw").digest()
    assert load("tiny_imagenet", tmp_path / "prepared").digest() == expected
    for wnid in twins.WNIDS:  # without the intermediate folder
        (folder / "val" / "images" / wnid).rename(folder / "val" / wnid)
    (folder / "val" / "images" / "._val_00.JPEG").write_bytes(b"what an operating system leaves")
    assert load("tiny_imagenet", tmp_path / "prepared").digest() == expected


def test_damaged_copies_of_tiny_imagenet_are_named(tmp_path, monkeypatch):
    folder = twins.tiny(tmp_path, monkeypatch)

    def refused(message):
        with pytest.raises(ValueError, match=message):
            load("tiny_imagenet", tmp_path)

    image = folder / "train" / "n01" / "images" / "n01_2.JPEG"
    content = image.read_bytes()
    image.write_bytes(content[:200])
    refused(r"cannot read .*n01_2\.JPEG as an image")
    image.unlink()
    refused(r"train must hold 4 images of every class, got 3 of n01, one of 1 such classes: remove .* get it again")
    twins.photograph(0, side=65).save(image)
    refused(r"cannot read .*n01_2\.JPEG as an image: it must have 64x64 pixels, got 65x65")
    image.write_bytes(content)
    annotations = folder / "val" / "val_annotations.txt"
    text = annotations.read_text()
    annotations.write_text(text.replace("\tn02\t", "\tn04\t"))
    refused(r"val_\d+\.JPEG must lie in a folder of its class or be listed in .*val_annotations.txt, got n04")
    annotations.write_text("")
    refused("got neither")
    annotations.write_text(text.replace("\tn02\t", "\tn01\t"))
    refused("val must hold 2 images of every class, got 4 of n01, one of 2 such classes")
    annotations.write_text(text)
    (folder / "val" / "images" / "n03").mkdir()
    (folder / "val" / "images" / "val_00.JPEG").rename(folder / "val" / "images" / "n03" / "val_00.JPEG")
    refused(r"val_00\.JPEG lies in the folder of n03, and .*val_annotations\.txt says n01")
    (folder / "wnids.txt").write_text("n01\nn01\nn02\n")
    refused(r"wnids\.txt must list 3 classes, got 2")
    (folder / "wnids.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*wnids\.txt: `cem-fast data fetch tiny_imagenet` gets it"):
        load("tiny_imagenet", tmp_path)


def test_a_fifo_is_refused(tmp_path, monkeypatch):
    path = twins.tiny(tmp_path, monkeypatch) / "wnids.txt"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"wnids\.txt must be a regular file, got a FIFO"):
        load("tiny_imagenet", tmp_path)
