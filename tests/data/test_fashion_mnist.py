"""Fashion-MNIST: tiny copies in the published format, and damaged ones."""

from __future__ import annotations

import gzip
import os

import numpy as np
import pytest
import torch
from support import twins

from cem_fast import data
from cem_fast.data import fashion_mnist


def load(name, root, **settings):
    return data.load(name, fold=1, root=root, **settings)


def test_fashion_mnist(tmp_path):
    arrays = twins.fashion(tmp_path / "fashion-mnist")
    splits = load("fashion_mnist", tmp_path)
    assert (len(splits.train), len(splits.test), splits.image_shape) == (20, 10, (1, 32, 32))
    assert splits.class_names[9] == "Ankle boot"
    assert splits.test.labels.tolist() == list(range(10))
    images = torch.from_numpy(arrays["train-images-idx3-ubyte.gz"].copy()).float() / 255
    torch.testing.assert_close(splits.train.images[:, 0, 2:-2, 2:-2], images)
    assert splits.train.images[:, :, :2].abs().sum() == 0  # the padding


def test_fashion_mnist_of_debian(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "debian")
    with pytest.raises(FileNotFoundError, match=r"no .*root/fashion-mnist: `cem-fast data fetch fashion_mnist`"):
        load("fashion_mnist", tmp_path / "root")
    twins.fashion(tmp_path / "debian")
    splits = load("fashion_mnist", tmp_path / "root")
    assert len(splits.train) == 20
    arrays = twins.fashion(tmp_path / "root" / "fashion-mnist")
    (tmp_path / "root" / "fashion-mnist" / "t10k-images-idx3-ubyte.gz").write_bytes(
        twins.idx(arrays["t10k-images-idx3-ubyte.gz"][::-1])
    )
    assert load("fashion_mnist", tmp_path / "root").digest() != splits.digest()  # the data root takes precedence


def test_the_subset_of_fashion_mnist_is_the_first_images_of_every_class(tmp_path, monkeypatch):
    twins.fashion(tmp_path / "fashion-mnist")
    whole = load("fashion_mnist", tmp_path)
    subset = load("fashion_mnist_5k", tmp_path)
    assert (subset.name, len(subset.train), len(subset.test)) == ("fashion_mnist_5k", len(whole.train), len(whole.test))
    monkeypatch.setattr(fashion_mnist, "OF_CLASS", (1, 1))
    subset = load("fashion_mnist_5k", tmp_path)
    assert subset.attacker is subset.train
    first = [whole.train.labels.tolist().index(label) for label in range(10)]
    torch.testing.assert_close(subset.train.images, whole.train.images[sorted(first)])
    assert sorted(subset.train.labels.tolist()) == sorted(subset.test.labels.tolist()) == list(range(10))


IMAGES, LABELS = np.zeros((20, 28, 28), np.uint8), np.zeros(20, np.uint8)


def compressed(content):
    """Without the time: the names of tests hold it, and must be the same in all processes of a run."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    "part, content, message",
    [
        ("images-idx3", b"not gzip", "as gzip: Not a gzipped file"),
        ("images-idx3", b"", "must be an idx file of bytes in 3 dimensions, got b''"),
        ("images-idx3", twins.idx(IMAGES)[:-9], "as gzip: "),
        ("images-idx3", twins.idx(IMAGES)[:-8] + bytes(8), "as gzip: CRC check failed"),
        ("images-idx3", twins.idx(LABELS), "an idx file of bytes in 3 dimensions, got"),
        ("images-idx3", twins.idx(IMAGES[:, :27]), r"images of 28x28 pixels, got sizes \(20, 27, 28\)"),
        ("images-idx3", compressed(bytes((0, 0, 8, 3)) + b"\xff" * 4 + bytes((0, 0, 0, 28)) * 2), "at most 1,000,000"),
        ("images-idx3", compressed(gzip.decompress(twins.idx(IMAGES))[:-1]), r"must hold 15,680 bytes .*, got 15,679"),
        ("images-idx3", compressed(gzip.decompress(twins.idx(IMAGES)) + b"x"), "must hold 15,680 bytes .*, got more"),
        ("labels-idx1", twins.idx(LABELS[:19]), "a label for each of the 20 images, got 19"),
        ("labels-idx1", twins.idx(LABELS + 10), "must be from 0 to 9, got 10"),
    ],
)  # fmt: skip
def test_damaged_idx_files_are_named(part, content, message, tmp_path):
    twins.fashion(tmp_path / "fashion-mnist")
    path = tmp_path / "fashion-mnist" / f"train-{part}-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        load("fashion_mnist", tmp_path)
    assert str(path) in str(raised.value)


def test_a_fifo_is_refused(tmp_path):
    twins.fashion(tmp_path / "fashion-mnist")
    path = tmp_path / "fashion-mnist" / "train-images-idx3-ubyte.gz"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz must be a regular file, got a FIFO"):
        load("fashion_mnist", tmp_path)
