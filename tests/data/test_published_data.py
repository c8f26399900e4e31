"""Data sets in their published formats: tiny twins are read right, and damaged ones are named."""

from __future__ import annotations

import gzip
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from support import twins

from cem_fast import data
from cem_fast.cli import main as cli
from cem_fast.config import GridConfig, RunConfig
from cem_fast.data import cifar10, cifar100, facescrub, fashion_mnist
from cem_fast.experiments import saved_run
from cem_fast.experiments.grid import check
from cem_fast.experiments.run import run


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
    with pytest.raises(UnicodeDecodeError):  # as everybody finds out who forgets the encoding
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


def test_names_that_are_not_there_are_named(tmp_path, monkeypatch):
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
    assert load("fashion_mnist", tmp_path / "root").digest() != splits.digest()  # one's own comes first


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


@pytest.mark.parametrize(
    "part, content, message",
    [
        ("images-idx3", b"not gzip", "as gzip: Not a gzipped file"),
        ("images-idx3", b"", "must be an idx file of bytes in 3 dimensions, got b''"),
        ("images-idx3", twins.idx(IMAGES)[:-9], "as gzip: "),
        ("images-idx3", twins.idx(IMAGES)[:-8] + bytes(8), "as gzip: CRC check failed"),
        ("images-idx3", twins.idx(LABELS), "an idx file of bytes in 3 dimensions, got"),
        ("images-idx3", twins.idx(IMAGES[:, :27]), r"images of 28x28 pixels, got sizes \(20, 27, 28\)"),
        ("images-idx3", gzip.compress(bytes((0, 0, 8, 3)) + b"\xff" * 4 + bytes((0, 0, 0, 28)) * 2), "at most 1,000,000"),
        ("images-idx3", gzip.compress(gzip.decompress(twins.idx(IMAGES))[:-1]), r"must hold 15,680 bytes .*, got 15,679"),
        ("images-idx3", gzip.compress(gzip.decompress(twins.idx(IMAGES)) + b"x"), "must hold 15,680 bytes .*, got more"),
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
    for wnid in twins.WNIDS:  # without the folder in the middle, another habit
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


def test_facescrub_is_prepared_and_read(tmp_path, capfd, monkeypatch):
    raw = twins.faces(tmp_path)
    (raw / "train" / "Ada_Lovelace" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    (raw / "train" / "Ada_Lovelace" / "page.jpg").write_text("<html>404</html>")
    (raw / "validate" / "Alan_Turing" / ".hidden.jpg").write_text("not counted")
    with pytest.raises(FileNotFoundError, match=r"no .*48x48: `cem-fast data prepare facescrub` makes it of .*raw"):
        load("facescrub", tmp_path)
    monkeypatch.setenv("CEM_FAST_DATA", "elsewhere")
    assert cli.main(["data", "prepare", "facescrub", "--data-root", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    assert "left out 2 files that cannot be read: train/Ada_Lovelace/broken.jpg, train/Ada_Lovelace/page.jpg\n" in out
    assert f"12 photographs are in {tmp_path}/facescrub-dataset/48x48\n" in out
    folder = tmp_path / "facescrub-dataset" / "48x48"
    assert (folder / "unreadable.txt").read_text().count("\n") == 2
    with Image.open(folder / "train" / "Alan_Turing" / "12.jpg") as image:
        assert (image.size, image.mode, image.format) == ((48, 48), "RGB", "JPEG")
    splits = load("facescrub", tmp_path)
    assert (splits.image_shape, splits.unit) == ((3, 48, 48), "people")
    assert splits.class_names == ("Ada Lovelace", "Alan Turing")
    assert splits.train.labels.tolist() == [0] * 4 + [1] * 4
    assert splits.test.groups.tolist() == splits.test.labels.tolist() == [0, 0, 1, 1]
    brightness = splits.test.images.mean((1, 2, 3)) * 255
    assert brightness.tolist() == pytest.approx([0, 10, 120, 130], abs=2)
    with pytest.raises(FileExistsError, match=r"48x48 is there already: remove it to make it again"):
        facescrub.prepare(tmp_path)


def test_facescrub_without_photographs(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .*48x48: its photographs have no public archive: ask its authors"):
        load("facescrub", tmp_path)
    with pytest.raises(FileNotFoundError, match="no photographs in .*raw: its photographs have no public archive"):
        facescrub.prepare(tmp_path)
    person = tmp_path / "facescrub-dataset" / "raw" / "train" / "Nobody"
    person.mkdir(parents=True)
    (person / "a.jpg").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="none of the 1 files in .*raw can be read as an image"):
        facescrub.prepare(tmp_path)
    assert [path.name for path in (tmp_path / "facescrub-dataset").iterdir()] == ["raw"]


def test_people_who_are_missing_from_a_part_are_named(tmp_path):
    raw = twins.faces(tmp_path)
    for path in (raw / "validate" / "Ada_Lovelace").iterdir():
        path.write_bytes(b"nothing")
    facescrub.prepare(tmp_path)
    with pytest.raises(ValueError, match=r"validate must hold .* all 2 people, got none of Ada_Lovelace, one of 1"):
        load("facescrub", tmp_path)


def test_an_interrupted_preparation_leaves_nothing(tmp_path):
    twins.faces(tmp_path)

    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        facescrub.prepare(tmp_path, stop)
    assert [path.name for path in (tmp_path / "facescrub-dataset").iterdir()] == ["raw"]


def test_a_full_disk_is_not_an_unreadable_photograph(tmp_path, monkeypatch):
    twins.faces(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        facescrub.prepare(tmp_path)


@pytest.fixture
def everything(tmp_path, monkeypatch):
    """Every published data set, below one root."""
    twins.cifar(cifar10, tmp_path, monkeypatch)
    twins.cifar(cifar100, tmp_path, monkeypatch)
    twins.fashion(tmp_path / "fashion-mnist")
    twins.tiny(tmp_path, monkeypatch)
    twins.faces(tmp_path)
    facescrub.prepare(tmp_path)
    return tmp_path


PUBLISHED = ("cifar10", "cifar100", "tiny_imagenet", "facescrub", "fashion_mnist", "fashion_mnist_5k")


def test_every_published_data_set_keeps_its_parts(everything, monkeypatch):
    assert set(PUBLISHED) == set(data.names()) - {"faces", "digits"}
    monkeypatch.setenv("CEM_FAST_DATA", str(everything))
    for name in PUBLISHED:
        splits = data.load(name, fold=0, image_size=16)
        assert splits.name == name
        assert splits.fixed
        assert splits.image_shape[1:] == (16, 16)
        assert splits.train.images.dtype == torch.float32
        assert 0 <= splits.train.images.min() < splits.train.images.max() <= 1
        assert splits.digest() == data.load(name, fold=4, image_size=16, seed=7).digest()
        with pytest.raises(ValueError, match="fold must be an integer from 0 to 4, got 5"):
            data.load(name, fold=5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_missing_data_set_is_one_line_that_names_the_path(name, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "debian")
    monkeypatch.setenv("CEM_FAST_DATA", "elsewhere")
    assert cli.main(["train", "--data", name, "--data-root", str(tmp_path), "--folder", str(tmp_path / "run")]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    whole = name.removesuffix("_5k")
    assert err.startswith(f"cem-fast: {whole} is not there, no {tmp_path}/")
    assert "cem-fast data prepare" in err if name == "facescrub" else f"cem-fast data fetch {whole}" in err


def test_where_data_sets_are_looked_for(monkeypatch, tmp_path):
    monkeypatch.delenv("CEM_FAST_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.data_root() == tmp_path / ".cache" / "cem_fast"
    monkeypatch.setenv("CEM_FAST_DATA", "~/elsewhere")
    assert data.data_root() == tmp_path / "elsewhere"


def test_a_run_on_a_published_data_set_and_its_data_again(everything, tmp_path, monkeypatch):
    monkeypatch.setenv("CEM_FAST_DATA", str(everything))
    config = RunConfig(data="cifar10", image_size=16, epochs=2, cem_weight=1.0, cem_components=2)
    config = replace(config, attacks=("ridge",), noise_draws=2)
    record = run(config, tmp_path / "run")
    assert (record["data"], record["num_test"]) == ("cifar10", 10)
    loaded = saved_run.load_run(tmp_path / "run")
    assert len(loaded.data.train) == 50
    monkeypatch.setenv("CEM_FAST_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="cifar10 is not there, no .*elsewhere/cifar-10-batches-py"):
        _ = saved_run.load_run(tmp_path / "run").data


def test_folds_of_a_fixed_test_part_are_refused(everything, monkeypatch):
    monkeypatch.setenv("CEM_FAST_DATA", str(everything))
    grid = GridConfig(data=("fashion_mnist",), image_size=16, folds=(1, 2))
    with pytest.raises(ValueError, match="folds must list one value for 'fashion_mnist', .*got 1 and 2"):
        check(grid.runs())
    check(replace(grid, folds=(2,)).runs())
