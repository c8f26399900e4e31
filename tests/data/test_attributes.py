"""Further columns of a folder of images."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from cem_fast.data import attributes, folder


@pytest.fixture
def people(tmp_path):
    """A folder of twelve images; those with an even number have glasses."""
    lines = ["file,glasses,age"]
    for index in range(12):
        path = tmp_path / f"person{index % 2}" / f"{index:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (16, 16), 20 * index).save(path)
        lines.append(
            f"{path.relative_to(tmp_path).as_posix()},{['no', 'yes'][index % 4 < 2]},{'old' if index < 4 else 'young'}"
        )
    (tmp_path / attributes.NAME).write_text("\n".join(reversed(lines[1:])).join([lines[0] + "\n", "\n"]))
    return tmp_path


def test_every_image_keeps_its_attributes(people):
    splits = folder.load(people, fold=1, image_size=None, seed=0)
    for part in (splits.train, splits.test, splits.attacker):
        index = (part.images[:, 0, 0, 0] * 255 / 20).round().long()
        assert torch.equal(part.attributes["glasses"], (index % 4 < 2).long())
        assert torch.equal(part.attributes["age"], (index >= 4).long())
    assert splits.attacker is splits.train
    assert hash(splits) is not None
    trained = splits.under("train")
    assert set(trained.attacker.attributes) == {"glasses", "age"}


def test_attributes_do_not_change_the_identity_of_the_images(people):
    before = folder.load(people, fold=1, image_size=None, seed=0).digest()
    (people / attributes.NAME).unlink()
    bare = folder.load(people, fold=1, image_size=None, seed=0)
    assert bare.digest() == before
    assert bare.train.attributes == {}


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "the first line must name the column of files"),
        ("file\n", "the first line must name the column of files"),
        ("file,a,a\n", "different further columns"),
        ("file,a\nperson0/00.png,1,2\n", r"expected 2 values in the line of 'person0/00.png' \(2\), got 3"),
        ("file,a\nperson0/00.png,1\n", "no line for 11 of 12 images, such as person"),
        (b"\xff\xfe\x00", "not a table of comma-separated values"),
    ],
)
def test_a_wrong_table_is_refused(people, content, message):
    (people / attributes.NAME).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        folder.load(people, fold=1, image_size=None, seed=0)
