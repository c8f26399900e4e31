"""A user's own images: classes, hidden files, and errors that name the file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import twins

from cem_fast import data
from cem_fast.config import RunConfig
from cem_fast.data import cache, decoding, images
from cem_fast.experiments import build


def test_folder_of_grey_images(tmp_path):
    splits = data.load(str(twins.write_images(tmp_path / "photos")), fold=1, image_size=24)
    assert (splits.name, splits.image_shape, splits.class_names) == ("photos", (1, 24, 24), ("class 0", "class 1"))
    assert (len(splits.train), len(splits.test)) == (8, 2)


def test_one_color_image_makes_a_folder_color(tmp_path):
    folder = twins.write_images(tmp_path / "photos")
    Image.new("RGB", (10, 10), (255, 0, 0)).save(folder / "class 0" / "red.jpg")
    splits = data.load(str(folder), fold=0, image_size=48)
    assert splits.image_shape == (3, 48, 48)
    images = torch.cat([splits.train.images, splits.test.images])
    assert any(image[0].min() > 0.9 and image[1:].max() < 0.1 for image in images)


def test_corrupt_file_is_named(tmp_path):
    folder = twins.write_images(tmp_path / "photos")
    broken = folder / "class 1" / "broken.png"
    broken.write_bytes((folder / "class 1" / "0.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cannot read .*broken\.png as an image"):
        data.load(str(folder), fold=0, image_size=48)


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="one sub-folder per class, at least 2, got 0"):
        data.load(str(tmp_path), fold=0)
    folder = twins.write_images(tmp_path / "photos", count=1)
    with pytest.raises(ValueError, match="at least 2 images to be split, 'class 0' has 1"):
        data.load(str(folder), fold=0, image_size=48)
    for count in (2, 4):
        few = twins.write_images(tmp_path / f"few {count}", count=count)
        with pytest.raises(ValueError, match=f"10 images are needed for 5 folds of at least 2, got {2 * count}"):
            data.load(str(few), fold=0, image_size=48)
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no image"):
        data.load(str(folder), fold=0, image_size=48)


def test_hidden_files_and_folders_are_not_images(tmp_path):
    folder = twins.write_images(tmp_path / "photos")
    before = data.load(str(folder), fold=0, image_size=48).digest()
    hidden = folder / "class 0" / ".ipynb_checkpoints"
    hidden.mkdir()
    (hidden / "0.png").write_bytes((folder / "class 0" / "0.png").read_bytes())
    (folder / "class 0" / "._0.png").write_bytes(b"not an image")
    assert data.load(str(folder), fold=0, image_size=48).digest() == before


def grey(path, brightness, *, side=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (side, side), brightness).save(path)


def in_parts(root, *names, classes=("cats", "dogs")):
    """Writes a folder with parts: three images per class in each, all different."""
    brightness = iter(range(10, 250, 3))
    for name in names:
        for label in classes:
            for index in range(3):
                grey(root / name / label / f"{index}.png", next(brightness))
    return root


@pytest.mark.parametrize("train", ["train", "Train", "training", "train_set", "train2017"])
@pytest.mark.parametrize("test", ["test", "val", "validation", "Test", "dev", "eval", "holdout", "test-images"])
def test_a_folder_with_parts_keeps_them(train, test, tmp_path):
    folder = in_parts(tmp_path / "photos", train, test)
    splits = data.load(str(folder), fold=0)
    assert (splits.class_names, splits.num_classes, splits.fixed) == (("cats", "dogs"), 2, True)
    assert splits.train.labels.tolist() == splits.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert splits.attacker is splits.train
    assert splits.train.images.max() < splits.test.images.min()  # written later, and brighter
    assert len(set(splits.train.groups.tolist() + splits.test.groups.tolist())) == 12
    assert splits.digest() == data.load(str(folder), fold=3, seed=5).digest()


def test_a_part_that_is_not_used_is_named(tmp_path):
    folder = in_parts(tmp_path / "photos", "train", "val", "test")
    with pytest.warns(UserWarning, match=r"the test part of .*photos is test; not used: val"):
        splits = data.load(str(folder), fold=0)
    assert splits.test.images.min() > splits.train.images.max() + 0.07  # val is between them
    unlabeled = in_parts(tmp_path / "more", "train", "val")
    grey(unlabeled / "test" / "images" / "0.png", 3)
    with pytest.warns(UserWarning, match=r"the test part of .*more is val; not used: test"):
        data.load(str(unlabeled), fold=0)


def test_parts_with_other_classes_are_refused(tmp_path):
    folder = in_parts(tmp_path / "photos", "train", "val")
    for name in ("birds", "fish"):
        grey(folder / "train" / name / "0.png", 1)
    grey(folder / "val" / "cows" / "0.png", 2)
    message = (
        r"hold the same classes, got birds, fish \(2\) in .*photos/train alone and cows \(1\) in .*photos/val alone"
    )
    with pytest.raises(ValueError, match=message):
        data.load(str(folder), fold=0)


@pytest.mark.parametrize("names", [["train"], ["test", "val"], ["train", "training", "test"]])
def test_a_part_without_its_counterpart_is_refused(names, tmp_path):
    with pytest.raises(ValueError, match=f"one training and one test part, .*got {', '.join(names)} alone"):
        data.load(str(in_parts(tmp_path / "photos", *names)), fold=0)


def test_parts_next_to_classes_are_refused(tmp_path):
    folder = in_parts(tmp_path / "photos", "train", "test", "cows")
    with pytest.raises(ValueError, match="must hold parts or classes, got the parts train, test next to cows"):
        data.load(str(folder), fold=0)


def test_parts_without_classes_are_refused(tmp_path):
    for name in ("train", "test"):
        grey(tmp_path / "photos" / name / "0.png", 1)
    with pytest.raises(ValueError, match=r"photos/train must hold one sub-folder per class, at least 2, got 0"):
        data.load(str(tmp_path / "photos"), fold=0)


@pytest.mark.parametrize("names", [("train", "car", "bus"), ("test", "control"), ("val", "cat")])
def test_a_class_may_be_called_like_a_part(names, tmp_path):
    for label, name in enumerate(names):
        for index in range(5):
            grey(tmp_path / "photos" / name / "nested" / f"{index}.png", 50 * label + index)
    splits = data.load(str(tmp_path / "photos"), fold=0)
    assert splits.class_names == tuple(sorted(names))
    assert len(splits.train) + len(splits.test) == 5 * len(names)


def test_clutter_and_dangling_links_are_left_out(tmp_path):
    folder = twins.write_images(tmp_path / "photos")
    before = data.load(str(folder), fold=0, image_size=16).digest()
    for name in ("__MACOSX", "lost+found", "@eaDir", ".cache"):
        for place in (folder / name, folder / "class 0" / name):
            place.mkdir()
            (place / "0.png").write_bytes((folder / "class 0" / "1.png").read_bytes())
    (folder / "class 1" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    assert data.load(str(folder), fold=0, image_size=16).digest() == before


@pytest.mark.parametrize("kind, named", [("fifo", "a FIFO"), ("device", "a character device")])
def test_files_that_are_not_regular_are_refused(kind, named, tmp_path):
    folder = twins.write_images(tmp_path / "photos")
    path = folder / "class 0" / "odd.png"
    os.mkfifo(path) if kind == "fifo" else path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=rf"odd\.png must be a regular file, got {named}"):
        data.load(str(folder), fold=0, image_size=16)


def test_all_corrupt_files_are_named(tmp_path):
    folder = twins.write_images(tmp_path / "photos")
    content = (folder / "class 1" / "0.png").read_bytes()
    (folder / "class 0" / "a.png").write_bytes(content[:10])  # no header
    for name in ("b.png", "c.png", "d.png"):
        (folder / "class 1" / name).write_bytes(content[:300])  # half an image
    with pytest.raises(
        ValueError, match=r"4 files are not usable: .*a\.png.*; .*b\.png.*; .*c\.png.*; and .*d\.png; --skip-corrupt"
    ):
        data.load(str(folder), fold=0, image_size=16)
    (folder / "class 1" / "d.png").unlink()
    with pytest.raises(ValueError, match=r"3 files are not usable: .*a\.png.*; .*b\.png.*; .*c\.png[^;]*; --skip"):
        data.load(str(folder), fold=0, image_size=16)


def test_corrupt_files_are_left_out_on_request(tmp_path, monkeypatch):
    folder = twins.write_images(tmp_path / "photos")
    whole = data.load(str(folder), fold=0, image_size=16)
    content = (folder / "class 1" / "0.png").read_bytes()
    (folder / "class 0" / "a.png").write_bytes(b"")
    (folder / "class 1" / "b.png").write_bytes(content[:300])
    with pytest.warns(UserWarning, match=r"left out 2 files that cannot be read as images: .*a\.png, .*b\.png"):
        splits = data.load(str(folder), fold=0, image_size=16, skip_corrupt=True)
    assert splits.digest() == whole.digest()
    monkeypatch.setenv("CEM_FAST_SKIP_CORRUPT", "1")
    with pytest.warns(UserWarning, match="left out 2 files"):
        assert build.load_data(RunConfig(data=str(folder), fold=0, image_size=16)).digest() == whole.digest()
    for file in (folder / "class 1").iterdir():
        file.write_bytes(b"")
    with (
        pytest.raises(ValueError, match="photos holds no image that can be read of class 1"),
        pytest.warns(UserWarning, match="left out"),
    ):
        data.load(str(folder), fold=0, image_size=16)


@pytest.mark.parametrize("side", [8, 16, 32, 96])
def test_equal_squares_keep_their_size(side, tmp_path):
    for index in range(10):
        grey(tmp_path / "photos" / str(index % 2) / f"{index}.png", 20 * index, side=side)
    splits = data.load(str(tmp_path / "photos"), fold=0)
    assert splits.image_shape == (1, side, side)
    assert data.load(str(tmp_path / "photos"), fold=0, image_size=24).image_shape == (1, 24, 24)


@pytest.mark.parametrize("width, height", [(24, 16), (8, 40), (256, 9)])
def test_equal_images_that_are_not_square_keep_their_size(width, height, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (10, height, width), dtype=np.uint8)
    for index, pixels in enumerate(noise):
        path = tmp_path / "photos" / str(index % 2) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    splits = data.load(str(tmp_path / "photos"), fold=0)
    found = torch.cat([splits.train.images, splits.test.images])
    assert found.shape == (10, 1, height, width)
    assert {image.numpy().tobytes() for image in (255 * found).round().byte()} == {each.tobytes() for each in noise}
    assert data.load(str(tmp_path / "photos"), fold=0, image_size=24).image_shape == (1, 24, 24)


def test_deep_images_that_are_not_square_keep_their_size(tmp_path):
    for index in range(10):
        path = tmp_path / "photos" / str(index % 2) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((12, 20), 6000 * index + 5000, np.uint16)).save(path)
    assert data.load(str(tmp_path / "photos"), fold=0).image_shape == (1, 12, 20)


@pytest.mark.parametrize("sides, span", [((16, 20), "16x16 to 20x20"), ((4, 4), "4x4"), ((300, 300), "300x300")])
def test_other_images_are_resized_with_a_warning(sides, span, tmp_path):
    for index in range(10):
        grey(tmp_path / "photos" / str(index % 2) / f"{index}.png", 20 * index, side=sides[index % 2])
    with pytest.warns(UserWarning, match=rf"photos, of {span} pixels, are resized to 48x48: image_size sets another"):
        assert data.load(str(tmp_path / "photos"), fold=0).image_shape == (1, 48, 48)


def test_photographs_taken_upright_and_sideways_have_two_sizes(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for index in range(10):
        path = tmp_path / "photos" / str(index % 2) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 16), 20 * index).save(path, **({"exif": exif} if index == 3 else {}))
    with pytest.warns(UserWarning, match="16x20 to 20x16"):
        data.load(str(tmp_path / "photos"), fold=0)


def test_a_class_of_copies_is_refused_in_every_fold(tmp_path):
    for index in range(20):
        grey(tmp_path / "photos" / "many" / f"{index}.png", 10 * index)
    for index in range(3):
        grey(tmp_path / "photos" / "copies" / f"{index}.png", 255)
    for fold in range(5):
        with pytest.raises(ValueError, match="at least 2 different images to be split, all of 'copies' are copies"):
            data.load(str(tmp_path / "photos"), fold=fold)


def mixed(root: Path, *, side: int = 16) -> Path:
    """Writes a folder of two classes with files of many kinds."""
    noise = np.random.default_rng(0).integers(0, 256, (12, side, side, 4), dtype=np.uint8)
    modes = ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "RGB", "L", "RGBA", "RGB", "YCbCr"]
    for index, (pixels, mode) in enumerate(zip(noise, modes, strict=True)):
        path = root / ("cats", "dogs")[index % 2] / f"{index:02}.{'jpg' if mode in ('CMYK', 'YCbCr') else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert("RGB" if mode in ("CMYK", "YCbCr") else "RGBA").convert(mode).save(path)
    return root


@pytest.mark.parametrize("side", [16, 11])
def test_any_number_of_processes_decodes_the_same_bits(tmp_path, monkeypatch, side):
    paths = sorted(mixed(tmp_path).rglob("*.*"))
    alone = decoding.decode(paths, (side, side), workers=0)
    monkeypatch.setattr(decoding, "MANY", 2)
    monkeypatch.setattr(decoding, "CHUNK_BYTES", 3 * 3 * side * side)
    steps, state = [], torch.get_rng_state()
    shared = decoding.decode(paths, (side, side), workers=3, on_step=lambda *step: steps.append(step))
    assert torch.equal(state, torch.get_rng_state())
    assert (alone.images == shared.images).all()
    assert alone.headers == shared.headers
    assert steps == [(0, 12), (3, 12), (6, 12), (9, 12), (12, 12)]
    assert torch.equal(torch.from_numpy(alone.images) / 255, images.read_all(paths, side, "RGB"))


@pytest.mark.parametrize("side", [16, 11])
def test_a_folder_is_decoded_once(tmp_path, monkeypatch, side):
    folder, where = mixed(tmp_path / "photos", side=side), tmp_path / "kept"
    monkeypatch.setenv("XDG_CACHE_HOME", str(where))
    monkeypatch.setattr(cache, "WORTH", 1)
    tall = Image.new("RGB", (8, 16))
    if side == 11:
        tall.save(folder / "cats" / "tall.png")

    def load():
        if side == 11:
            with pytest.warns(UserWarning, match="of 8x16 to 11x11 pixels, are resized to 48x48"):
                return data.load(str(folder), fold=0)
        return data.load(str(folder), fold=0)

    before = load()
    (kept,) = where.rglob("*.npy")
    with monkeypatch.context() as patch:
        patch.setattr("cem_fast.data.folder.decode", None)
        assert load().digest() == before.digest()
    np.save(kept, np.array([object()] * len(list(folder.rglob("*.*")))), allow_pickle=True)
    assert load().digest() == before.digest()
    Image.new("RGB", (side, side), (1, 2, 3)).save(folder / "cats" / "00.png")
    assert load().digest() != before.digest()


def test_images_are_drawn_before_they_are_decoded(tmp_path, monkeypatch):
    folder = in_parts(tmp_path / "photos", "train", "test")
    decoded = []
    decode = decoding.decode
    monkeypatch.setattr(
        "cem_fast.data.folder.decode", lambda paths, *a, **k: (decoded.extend(paths), decode(paths, *a, **k))[1]
    )
    splits = data.load(str(folder), fold=0, at_most=(4, 2), seed=3)
    assert (splits.train.labels.tolist(), splits.test.labels.tolist()) == ([0, 0, 1, 1], [0, 1])
    assert len(decoded) == 6
    assert splits.digest() == data.load(str(folder), fold=0, at_most=(4, 2), seed=3).digest()
    whole = data.load(str(twins.write_images(tmp_path / "whole", count=20)), fold=0, image_size=16, at_most=(8, 2))
    assert (len(whole.train), len(whole.test), whole.num_available) == (8, 2, 32)
    assert len(data.load(str(folder), fold=0, memory=2 * 4 * 3 * 16 * 16).train) == 2
