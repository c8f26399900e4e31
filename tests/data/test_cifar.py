"""CIFAR-10 and CIFAR-100: tiny copies in the published format, and damaged ones."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from support import twins

from cem_fast import data
from cem_fast.data import cifar10, cifar100


def load(name, root, **settings):
    return data.load(name, fold=1, root=root, **settings)


@pytest.mark.parametrize("module, size, classes", [(cifar10, 50, 10), (cifar100, 10, 100)])
def test_cifar(module, size, classes, tmp_path, monkeypatch):
    tables = twins.cifar(module, tmp_path, monkeypatch)
    splits = load(module.NAME, tmp_path)
    assert (len(splits.train), len(splits.test), splits.num_classes) == (size, 10, classes)
    assert splits.image_shape == (3, 32, 32)
    assert splits.class_names[7] == "class 7"
    assert splits.attacker is splits.train
    assert splits.mirrored
    assert "Krizhevsky" in splits.credit
    assert not set(splits.train.groups.tolist()) & set(splits.test.groups.tolist())
    (last,) = module.TEST
    labels = "labels" if module is cifar10 else "fine_labels"
    assert splits.test.labels.tolist() == tables[last][labels]
    # a row holds the red plane, then the green, then the blue, each row by row
    row, plane, line, column = 3, 1, 5, 7
    expected = tables[last]["data"][row, 1024 * plane + 32 * line + column] / 255
    assert float(splits.test.images[row, plane, line, column]) == pytest.approx(expected, abs=1e-7)
    first = next(iter(module.TRAIN))
    torch.testing.assert_close(
        splits.train.images[:10].flatten(1), torch.from_numpy(tables[first]["data"]).float() / 255
    )


def test_the_twins_are_pickles_of_python_2(tmp_path, monkeypatch):
    twins.cifar(cifar10, tmp_path, monkeypatch)
    content = (tmp_path / "cifar-10-batches-py" / "test_batch").read_bytes()
    assert content.startswith(b"\x80\x02")
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in content
    assert pickle.SHORT_BINSTRING + b"\x04data" in content
    with pytest.raises(UnicodeDecodeError):  # without encoding='latin1'
        pickle.loads(content)


def test_pickles_of_newer_numpy_are_read_too(tmp_path, monkeypatch):
    tables = twins.cifar(cifar10, tmp_path, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    for protocol in (2, 4):
        twins.write_pickle(cifar10, path, pickle.dumps(tables["test_batch"], protocol), monkeypatch)
        splits = load("cifar10", tmp_path)
        assert splits.test.labels.tolist() == tables["test_batch"]["labels"]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_pickle_that_would_run_something_is_refused(tmp_path, monkeypatch):
    twins.cifar(cifar10, tmp_path, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    content = pickle.dumps({"data": Evil(tmp_path / "made")}, 2)
    twins.write_pickle(cifar10, path, content, monkeypatch)
    with pytest.raises(ValueError, match=r"cannot read .*test_batch as a pickle of arrays: it asks for \w+\.mkdir"):
        load("cifar10", tmp_path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("damage", [lambda c: c[:-7], lambda c: b"", lambda c: c[:500] + b"\x00" + c[501:]])
def test_a_damaged_batch_is_refused_before_it_is_opened(damage, tmp_path, monkeypatch):
    twins.cifar(cifar10, tmp_path, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    content = damage(path.read_bytes())
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"data_batch_3 has {len(content):,} bytes with md5 .* get it again with"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"data": np.zeros((10, 3071), np.uint8)},
            r"uint8 'data' of 3072 pixels a row, got uint8 of shape \(10, 3071\)",
        ),
        ({"data": np.zeros((10, 3072))}, "got float64 of shape"),
        ({"data": None}, "got None"),
        ({"labels": [0] * 9}, "a list 'labels' of 10 entries, one a row, got a list of 9"),
        ({"labels": [0] * 9 + [10]}, "must be integers from 0 to 9, got 10"),
        ({"labels": [0] * 9 + [-1]}, "must be integers from 0 to 9, got -1"),
        ({"labels": [0] * 9 + ["cat"]}, "must be integers from 0 to 9, got 'cat'"),
        ({"labels": None}, "a list 'labels' of 10 entries, one a row, got None"),
    ],
)
def test_a_batch_that_holds_something_else_is_named(change, message, tmp_path, monkeypatch):
    tables = twins.cifar(cifar10, tmp_path, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    twins.write_pickle(cifar10, path, twins.python2_pickle({**tables["test_batch"], **change}), monkeypatch)
    with pytest.raises(ValueError, match=message) as raised:
        load("cifar10", tmp_path)
    assert str(path) in str(raised.value)


def test_missing_names_of_classes_are_reported(tmp_path, monkeypatch):
    twins.cifar(cifar100, tmp_path, monkeypatch)
    path = tmp_path / "cifar-100-python" / "meta"
    for table, found in (({"fine_label_names": ["a"]}, "a list of 1"), ({}, "None")):
        twins.write_pickle(cifar100, path, twins.python2_pickle(table), monkeypatch)
        with pytest.raises(ValueError, match=f"meta must hold a list 'fine_label_names' of 100 names, got {found}"):
            load("cifar100", tmp_path)
    twins.write_pickle(cifar100, path, twins.python2_pickle([1]), monkeypatch)
    with pytest.raises(ValueError, match="meta must hold a dictionary, got list"):
        load("cifar100", tmp_path)


def test_a_missing_file_is_named(tmp_path, monkeypatch):
    twins.cifar(cifar10, tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "data_batch_5").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*data_batch_5: `cem-fast data fetch cifar10` gets it"):
        load("cifar10", tmp_path)


def test_a_fifo_is_refused(tmp_path, monkeypatch):
    twins.cifar(cifar10, tmp_path, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="data_batch_3 must be a regular file, got a FIFO"):
        load("cifar10", tmp_path)
