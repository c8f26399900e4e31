"""Splits: disjoint parts, copies of images, and data sets of the user's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cem_fast.data.splits import Part, Splits, by_fold, published


def test_any_two_datasets():
    train = [(np.full((6, 6), 255, dtype=np.uint8), 0), (Image.new("L", (6, 6), 51), 1)]
    test = [(torch.full((1, 6, 6), 0.5), 1)]
    splits = Splits.from_datasets(train, test, name="mine")
    assert (splits.name, splits.num_classes, splits.image_shape) == ("mine", 2, (1, 6, 6))
    assert splits.train.images[:, 0, 0, 0].tolist() == pytest.approx([1.0, 0.2])
    assert splits.attacker is splits.train


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loaders_of_two_datasets(workers):
    train, test = ([(torch.rand(1, 6, 6), index % 2) for index in range(8)] for _ in range(2))
    loaders = [
        torch.utils.data.DataLoader(part, batch_size=3, shuffle=True, num_workers=workers) for part in (train, test)
    ]
    assert Splits.from_datasets(*loaders).digest() == Splits.from_datasets(train, test).digest()


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


def test_copies_of_an_image_never_end_on_both_sides():
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    labels = torch.arange(40) % 4
    for fold in range(5):
        parts = by_fold(
            "twice", images, labels, fold=fold, seed=0, class_names="abcd", credit="", unit="images", mirrored=False
        )
        assert not set(parts.train.fingerprints()) & set(parts.test.fingerprints())


def test_copies_across_published_parts_stay_and_are_counted():
    images, labels = torch.rand(6, 1, 8, 8), torch.arange(6) % 2
    settings = {"class_names": "ab", "credit": "", "mirrored": False}
    apart = published("apart", (images[:4], labels[:4]), (images[4:], labels[4:]), **settings)
    assert apart.num_leaked == 0
    test = images[[4, 2, 2, 5]], labels[:4]
    with pytest.warns(UserWarning, match="2 of the 4 test images of twice are among its training images as well"):
        twice = published("twice", (images[:4], labels[:4]), test, **settings)
    assert (twice.num_leaked, len(twice.train), len(twice.test)) == (2, 4, 4)


def halves(**settings):
    """Published parts, with a test image and a training image of every class twice."""
    images = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60) % 2
    images[2:4] = images[:2]
    settings = {"class_names": "ab", "credit": "somebody", "mirrored": True, **settings}
    return published("halves", (images[:50], labels[:50]), (images[50:], labels[50:]), **settings)


def test_validation_takes_the_place_of_the_test_part():
    splits = halves()
    known = set(splits.train.fingerprints())
    rebuilt: list[bytes] = []
    for fold in range(5):
        held = splits.validation(fold)
        assert held.attacker is held.train
        assert not held.fixed
        assert held.num_leaked == 0
        assert (held.name, held.class_names, held.credit, held.mirrored) == ("halves", ("a", "b"), "somebody", True)
        assert len(held.train) + len(held.test) == 50
        assert set(held.train.fingerprints()) <= known
        assert abs(int(held.test.labels.sum()) - len(held.test) / 2) <= 1
        rebuilt += held.test.fingerprints()
        assert held.digest() == splits.validation(fold).digest() != splits.validation(fold, seed=1).digest()
    assert sorted(rebuilt) == sorted(splits.train.fingerprints())
    assert len(splits.validation(0).under("train").attacker) > 0


def test_validation_keeps_groups_and_attributes():
    splits = halves(unit="people")
    part = replace(splits.train, attributes={"glasses": splits.train.labels * 2})
    held = replace(splits, train=part, attacker=part, num_available=100).validation(1)
    assert held.num_available == 80
    for each in (held.train, held.test):
        assert torch.equal(each.groups, each.labels)
        assert torch.equal(each.attributes["glasses"], 2 * each.labels)


def test_validation_of_data_with_folds_and_of_too_little_data_is_refused():
    splits = halves()
    with pytest.raises(ValueError, match="validation must be false for halves, which has no fixed test part"):
        splits.validation(0).validation(1)
    with pytest.raises(ValueError, match="fold must be an integer from 0 to 4, got 5"):
        splits.validation(5)
    with pytest.raises(ValueError, match="10 images are needed for 5 folds of at least 2, got 6"):
        replace(splits, train=splits.train[torch.arange(10, 16)]).validation(0)


def test_images_of_two_datasets_have_different_groups():
    pictures = [(torch.rand(1, 8, 8), index % 2) for index in range(12)]
    parts = Splits.from_datasets(pictures[:8], pictures[8:])
    assert not set(parts.train.groups.tolist()) & set(parts.test.groups.tolist())


COLOR = torch.zeros(16, 16, 3)


@pytest.mark.parametrize(
    "image, message",
    [
        (
            COLOR,
            r"the image of train\[0\] must have shape \[C, H, W\], got \(16, 16, 3\), which looks like \[H, W, C\]",
        ),
        (COLOR[..., :1], r"got \(16, 16, 1\), which looks like \[H, W, C\]"),
        (COLOR.byte(), r"got \(16, 16, 3\), which looks like \[H, W, C\]"),
        (
            COLOR.permute(2, 0, 1).numpy(),
            r"array of train\[0\] must have shape \[H, W, C\], got \(3, 16, 16\), which looks",
        ),
    ],
)
def test_channels_in_the_wrong_place_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        Splits.from_datasets([(image, 0)], [(image, 0)])


def test_channels_in_their_place_are_taken():
    for channels in (1, 2, 3, 4, 16):
        image = torch.zeros(channels, 16, 16)
        assert Splits.from_datasets([(image, 0)], [(image, 0)]).image_shape == (channels, 16, 16)
    assert Splits.from_datasets([(COLOR.numpy(), 0)], [(COLOR.numpy(), 0)]).image_shape == (3, 16, 16)
    assert Splits.from_datasets([(torch.zeros(3, 3, 3), 0)], [(torch.zeros(3, 3, 3), 0)]).image_shape == (3, 3, 3)


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (torch.zeros(5, 16, 16, 3), torch.zeros(5).long(), r"got \(16, 16, 3\), which looks like \[H, W, C\]"),
        (
            torch.zeros(5, 16, 16),
            torch.zeros(5).long(),
            r"of shape \[N, C, H, W\], got torch.float32 of shape \(5, 16, 16\)",
        ),
        (torch.zeros(5, 3, 16, 16).byte(), torch.zeros(5).long(), r"must be floating point of .*, got torch.uint8"),
        (
            torch.zeros(5, 3, 16, 16),
            torch.zeros(4).long(),
            "labels of a part must hold one value for each of the 5 images, got 4",
        ),
    ],
)
def test_parts_of_other_shapes_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        Part(images, labels, torch.arange(5))


def test_a_class_of_the_test_part_alone_is_refused():
    rows = [(torch.rand(1, 4, 4), label) for label in (0, 2, 0, 2)]
    with pytest.raises(ValueError, match="test labels must be among the 2 training classes, got 1"):
        Splits.from_datasets(rows, [(torch.rand(1, 4, 4), 1)])
    assert Splits.from_datasets(rows, rows[:2]).num_classes == 3


def test_labels_far_above_the_number_of_images_are_refused():
    rows = [(torch.rand(1, 4, 4), label) for label in (0, 10**12)]
    with pytest.raises(
        ValueError, match="train labels must number the classes from 0, got 2 classes and the label 1000"
    ):
        Splits.from_datasets(rows, rows)


@pytest.mark.parametrize("dataset", [None, iter([(torch.rand(1, 4, 4), 0)])], ids=["none", "iterator"])
def test_what_is_no_list_of_pairs_is_named(dataset):
    with pytest.raises(TypeError, match="test must be a map-style data set or a list of pairs .* got "):
        Splits.from_datasets([(torch.rand(1, 4, 4), 0)], dataset)


def test_copies_never_take_a_class_out_of_the_training_part():
    settings = {"seed": 0, "class_names": "ab", "credit": "", "unit": "images", "mirrored": False}
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 2
    images[labels == 1] = images[1].clone()
    for fold in range(5):
        with pytest.raises(ValueError, match="at least 2 different images to be split, all of 'b' are copies"):
            by_fold("copies", images, labels, fold=fold, **settings)
    images[labels == 1] += 0.01 * torch.arange(10).view(-1, 1, 1, 1)
    for fold in range(5):
        assert set(by_fold("different", images, labels, fold=fold, **settings).train.labels.tolist()) == {0, 1}
