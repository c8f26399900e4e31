"""The ORL faces: folds, sizes, and the package that carries them."""

from __future__ import annotations

import torch

from cem_fast import data


def fingerprints(part: data.Part) -> list[bytes]:
    return [image.numpy().tobytes() for image in part.images]


def test_faces_are_forty_people_and_the_folds_cover_every_photograph_once():
    folds = [data.load("faces", fold=fold) for fold in range(data.NUM_FOLDS)]
    seen = [image for splits in folds for image in fingerprints(splits.test)]
    assert len(seen) == len(set(seen)) == 400
    assert set(seen) == set(fingerprints(folds[0].train) + fingerprints(folds[0].test))
    for splits in folds:
        assert not set(fingerprints(splits.train)) & set(fingerprints(splits.test))
        assert torch.bincount(splits.test.labels).tolist() == [2] * 40
        assert torch.equal(splits.test.groups, splits.test.labels)
    first = folds[0]
    assert (first.image_shape, first.num_classes, first.unit, first.mirrored) == ((1, 48, 48), 40, "people", True)
    assert "AT&T Laboratories Cambridge" in first.credit
    assert first.attacker is first.train
    assert first.train.images.dtype == torch.float32
    assert 0 <= first.train.images.min() < first.train.images.max() <= 1


def test_image_size_and_seed_of_the_folds():
    small = data.load("faces", fold=0, image_size=16)
    assert small.image_shape == (1, 16, 16)
    assert fingerprints(small.test) == fingerprints(data.load("faces", fold=0, image_size=16).test)
    assert fingerprints(small.test) != fingerprints(data.load("faces", fold=0, image_size=16, seed=1).test)
    assert data.load("digits", fold=0, image_size=16).image_shape == (1, 16, 16)
