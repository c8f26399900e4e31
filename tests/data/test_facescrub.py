"""FaceScrub: preparation of raw photographs, and reading them."""

from __future__ import annotations

import os

import pytest
from PIL import Image
from support import twins

from cem_fast import data
from cem_fast.cli import main as cli
from cem_fast.data import facescrub


def load(name, root, **settings):
    return data.load(name, fold=1, root=root, **settings)


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
    with pytest.raises(FileExistsError, match=r"48x48 exists already: remove it to prepare it again"):
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


def test_deep_and_transparent_photographs_are_prepared_as_they_look(tmp_path):
    raw = twins.faces(tmp_path)
    place = raw / "train" / "Ada_Lovelace"
    Image.new("I;16", (60, 60), 26214).save(place / "deep.tif")
    Image.new("I;16", (60, 60), 4095).save(place / "of 12 bits.tif")
    Image.new("LA", (60, 60), (0, 0)).save(place / "transparent.png")
    assert facescrub.prepare(tmp_path)[2] == ["train/Ada_Lovelace/of 12 bits.tif"]
    folder = tmp_path / "facescrub-dataset" / "48x48" / "train" / "Ada_Lovelace"
    for name, expected in (("deep.tif", 102), ("transparent.png", 255)):
        with Image.open(folder / name) as image:
            assert image.getpixel((5, 5)) == pytest.approx((expected,) * 3, abs=1)


def test_clutter_is_skipped_and_a_fifo_is_unreadable(tmp_path):
    raw = twins.faces(tmp_path)
    (raw / "train" / "__MACOSX").mkdir()
    (raw / "train" / "__MACOSX" / "0.jpg").write_bytes(b"nothing")
    (raw / "train" / "Ada_Lovelace" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(raw / "train" / "Ada_Lovelace" / "odd.jpg")
    _, number, unreadable = facescrub.prepare(tmp_path)
    assert (number, unreadable) == (12, ["train/Ada_Lovelace/odd.jpg"])
