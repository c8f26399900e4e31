"""Tiny data sets in the published formats; patches the digests and counts that the readers expect."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from cem_fast.data import cifar10, facescrub, fashion_mnist, tiny_imagenet

WNIDS = ("n03", "n01", "n02")  # unsorted, as listed


class Python2Pickler(pickle._Pickler):
    """Writes pickles as Python 2 with an old numpy did: byte strings, and numpy's former module name."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_text(self, value: str | bytes) -> None:
        content = value.encode("latin1") if isinstance(value, str) else value
        short = len(content) < 256
        self.write(pickle.SHORT_BINSTRING + bytes([len(content)]) if short else b"T" + struct.pack("<i", len(content)))
        self.write(content)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_text

    def save_global(self, value: Any, name: str | None = None) -> None:
        module = value.__module__.replace("numpy._core", "numpy.core")
        self.write(f"c{module}\n{name or value.__name__}\n".encode())
        self.memoize(value)

    dispatch[type(lambda: None)] = save_global


def python2_pickle(value: Any) -> bytes:
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(value)
    return stream.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def cifar(module: Any, root: Path, monkeypatch: pytest.MonkeyPatch, *, rows: int = 10) -> dict[str, Any]:
    """Writes CIFAR-10 or CIFAR-100; returns the contents by file name."""
    random = np.random.default_rng(0)
    labels = "labels" if module is cifar10 else "fine_labels"
    tables: dict[str, Any] = {}
    for index, name in enumerate((*module.TRAIN, *module.TEST)):
        tables[name] = {
            "data": random.integers(0, 256, (rows, 3072), dtype=np.uint8),
            labels: [(index + row) % module.CLASSES for row in range(rows)],
            "filenames": [f"{row}.png" for row in range(rows)],
            "batch_label": "training batch é",
        }
    (meta,) = module.META
    names = [f"class {label}" for label in range(module.CLASSES)]
    tables[meta] = {"label_names" if module is cifar10 else "fine_label_names": names}
    folder = root / module.SOURCE.folder
    folder.mkdir(parents=True)
    for name, table in tables.items():
        write_pickle(module, folder / name, python2_pickle(table), monkeypatch)
    return tables


def write_pickle(module: Any, path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes one file and patches its published digest."""
    path.write_bytes(content)
    for digests in (module.TRAIN, module.TEST, module.META):
        if path.name in digests:
            monkeypatch.setitem(digests, path.name, md5(content))


def idx(array: np.ndarray) -> bytes:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(bytes((0, 0, 8, array.ndim)) + sizes + array.astype(np.uint8).tobytes(), mtime=0)


def fashion(folder: Path) -> dict[str, np.ndarray]:
    """Writes Fashion-MNIST; returns the arrays by file name."""
    random = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 20), ("t10k", 10)):
        arrays[f"{part}-images-idx3-ubyte.gz"] = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{part}-labels-idx1-ubyte.gz"] = np.arange(count, dtype=np.uint8) % 10
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        (folder / name).write_bytes(idx(array))
    assert set(arrays) == set(fashion_mnist.SOURCE.files)
    return arrays


def photograph(brightness: int, *, mode: str = "RGB", side: int = 64) -> Image.Image:
    return Image.new(mode, (side, side), brightness if mode == "L" else (brightness,) * len(mode))


def tiny(root: Path, monkeypatch: pytest.MonkeyPatch, *, prepared: bool = False) -> Path:
    """Writes Tiny-ImageNet: three classes of four training and two validation images, each of another brightness."""
    for name, value in (("CLASSES", 3), ("TRAIN", 4), ("VALIDATION", 2)):
        monkeypatch.setattr(tiny_imagenet, name, value)
    folder = root / tiny_imagenet.SOURCE.folder
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in WNIDS))
    (folder / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\ttoad\nn99\tnothing\n")
    lines = []
    for wnid in WNIDS:
        label = int(wnid[1:]) - 1
        (folder / "train" / wnid / "images").mkdir(parents=True)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t62\t62\n")
        for index in range(4):
            mode = "L" if index == 3 else "RGB"
            image = photograph(80 * label + 10 * index, mode=mode)
            image.save(folder / "train" / wnid / "images" / f"{wnid}_{index}.JPEG")
        for index in range(2):
            name = f"val_{2 * index + label}{index}.JPEG"
            place = folder / "val" / "images" / (wnid if prepared else "")
            place.mkdir(exist_ok=True)
            photograph(80 * label + 5 + 10 * index).save(place / name)
            lines.append(f"{name}\t{wnid}\t0\t0\t62\t62\n")
    if not prepared:
        (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "test" / "images").mkdir(parents=True)
    photograph(0).save(folder / "test" / "images" / "test_0.JPEG")
    return folder


def faces(root: Path) -> Path:
    """Writes raw photographs of FaceScrub: two people, several sizes and modes; returns their folder."""
    raw = root / facescrub.FOLDER / "raw"
    for part, count in (("train", 4), ("validate", 2)):
        for label, person in enumerate(("Ada_Lovelace", "Alan_Turing")):
            (raw / part / person).mkdir(parents=True)
            for index in range(count):
                mode = ("RGB", "L", "CMYK", "RGB")[index]
                brightness = 120 * label + 10 * index + 5 * (part == "train")  # differs between the parts
                image = photograph(brightness, mode=mode, side=60 + index)
                image.save(raw / part / person / f"{label}{index}.jpg")
    return raw


def write_images(folder: Path, *, classes: int = 2, count: int = 5, mode: str = "L", seed: int = 0) -> Path:
    """Writes a folder of random 20x30 images, one sub-folder per class; returns it."""
    random = np.random.default_rng(seed)
    for label in range(classes):
        (folder / f"class {label}").mkdir(parents=True)
        for index in range(count):
            shape = (20, 30) if mode == "L" else (20, 30, 3)
            pixels = random.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class {label}" / f"{index}.png")
    return folder
