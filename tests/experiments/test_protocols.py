"""Protocols: neither attacks nor the classifier that measures them are fitted to victims or test images."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from cem_fast import attacks, data, training
from cem_fast.attacks import kernel_ridge
from cem_fast.attacks.budgets import BUDGETS
from cem_fast.config import RunConfig
from cem_fast.data import Part, Splits
from cem_fast.experiments import saved_run
from cem_fast.experiments.attack import attack_model
from cem_fast.experiments.grid import evaluate
from cem_fast.experiments.run import run
from cem_fast.metrics import recognition
from cem_fast.report import page

ALL = attacks.names()


@pytest.fixture(scope="module")
def faces():
    return data.load("faces", fold=0, image_size=16)


def prints(part: Part) -> set[bytes]:
    return set(part.fingerprints())


def test_inference_is_the_training_set_against_the_test_set(faces):
    assert faces.under("inference") is faces
    assert faces.victims is faces.test
    assert faces.attacker is faces.train
    assert not prints(faces.victims) & prints(faces.attacker)


def test_under_train_network_attacker_and_test_have_different_images(faces):
    split = faces.under("train")
    assert split.under("train") is split
    assert split.victims is split.train
    parts = [prints(part) for part in (split.train, split.attacker, split.test)]
    assert [len(part) for part in parts] == [160, 160, 80]
    assert len(set.union(*parts)) == 400
    assert split.test is faces.test
    for part in (split.train, split.attacker):
        assert torch.bincount(part.labels).tolist() == [4] * 40
        assert torch.equal(part.groups, part.labels)
    assert split.digest() == data.load("faces", fold=0, image_size=16).under("train").digest() != faces.digest()


def test_classes_of_odd_size_leave_the_odd_image_to_the_network(faces):
    few = faces.train[(faces.train.labels < 3).nonzero()[:, 0]]
    few = few[torch.tensor([0, 1, 2, 8, 16, 17])]  # classes of 3, 1 and 2 images
    split = replace(faces, train=few, attacker=few).under("train")
    assert torch.bincount(split.train.labels).tolist() == [2, 1, 1]
    assert torch.bincount(split.attacker.labels, minlength=3).tolist() == [1, 0, 1]
    means = data.class_means(split)
    assert torch.equal(means[1], split.attacker.images.mean(0))  # the attacker has no image of this class


def test_duplicate_images_are_in_one_part_only():
    torch.manual_seed(0)
    images = torch.rand(12, 1, 8, 8).repeat(3, 1, 1, 1)
    part, test = (
        Part(images, torch.arange(36) % 3, torch.arange(36)),
        Part(images[:2], torch.arange(2), torch.arange(2)),
    )
    split = Splits("twice", part, test, part, 3, ("a", "b", "c")).under("train")
    assert not prints(split.attacker) & (prints(split.train) | prints(test))
    assert 0 < len(split.attacker) < 18
    assert len(split.train) == 18
    same = Part(torch.zeros(4, 1, 8, 8), torch.zeros(4).long(), torch.arange(4))
    with pytest.raises(ValueError, match="the attacker needs images that are in no other part, got none"):
        Splits("same", same, same, same, 1, ("a",)).under("train")


def test_an_attacker_with_images_of_its_own_keeps_them(faces):
    own, rest = faces.train[torch.arange(0, 320, 4)], faces.train[torch.arange(1, 320, 4)]
    split = replace(faces, train=rest, attacker=own).under("train")
    assert prints(split.train) == prints(rest)
    assert prints(split.attacker) == prints(own)
    overlapping = replace(faces, train=rest, attacker=faces.train).under("train")
    assert prints(overlapping.attacker) == prints(faces.train) - prints(rest)


def test_splits_of_one_protocol_are_not_attacked_under_another(faces, tmp_path):
    with pytest.raises(ValueError, match="cannot be attacked under 'inference'"):
        run(RunConfig(epochs=1), tmp_path / "run", splits=faces.under("train"))
    with pytest.raises(ValueError, match="unknown protocol 'trian': .*the nearest is 'train'"):
        faces.under("trian")
    assert not (tmp_path / "run").exists()


def test_controls_are_the_attackers_own_guesses(faces):
    split = faces.under("train")
    found = data.baselines(split)
    own = torch.stack([split.attacker.images[split.attacker.labels == label].mean(0) for label in range(40)])
    assert torch.allclose(data.class_means(split), own)
    assert found["class_mean_mse"] == pytest.approx(
        float((split.train.images - own[split.train.labels]).square().mean())
    )
    assert found["mean_image_mse"] == pytest.approx(
        float((split.train.images - split.attacker.images.mean(0)).square().mean())
    )


@pytest.mark.parametrize("protocol", data.PROTOCOLS)
def test_no_attack_is_fitted_to_its_victims_or_to_test_images(faces, tmp_path, monkeypatch, protocol):
    split = faces.under(protocol)
    learned: dict[str, set[bytes]] = {}
    inside: list[str] = []

    def spy_on_fits(cls):
        fit = cls.fit

        def spied(self, observe, images, labels):
            learned.setdefault(self.name, set()).update(Part(images, labels, labels).fingerprints())
            inside.append(self.name)
            try:
                fit(self, observe, images, labels)
            finally:
                inside.pop()

        monkeypatch.setattr(cls, "fit", spied)

    for name in ALL:
        spy_on_fits(type(attacks.build(name, image_shape=(1, 8, 8))))
    seen: set[bytes] = set()

    class Spied(training.Observer):
        def features(self, images):
            if inside:
                seen.update(prints(Part(images.detach(), images, images)))
            return super().features(images)

    monkeypatch.setattr(training, "observer", Spied)
    monkeypatch.setattr(kernel_ridge, "TRIAL", 60)
    monkeypatch.setitem(BUDGETS, "quick", dict.fromkeys(BUDGETS["quick"], 2) | {"stages": 3})
    build = recognition.Recognizer.__init__

    def spied_recognizer(self, images, labels):
        learned.setdefault("recognizer", set()).update(Part(images, labels, labels).fingerprints())
        build(self, images, labels)

    monkeypatch.setattr(recognition.Recognizer, "__init__", spied_recognizer)
    config = RunConfig(
        image_size=16, epochs=1, attack_epochs=1, attack_gan_epochs=1, attack_steps=1, attacks=ALL, noise_draws=1,
        attack_budget="quick", protocol=protocol, fold=0, cem_components=2,
    )  # fmt: skip
    record = run(config, tmp_path, splits=faces)
    assert record.config.protocol == protocol
    assert set(learned) == {*ALL, "recognizer"}
    forbidden = prints(split.victims) | prints(split.test)
    assert seen & prints(split.attacker)
    assert not seen & forbidden  # others are warped, or pixels under optimization
    for who, images in learned.items():
        assert images <= prints(split.attacker), who
        assert not images & forbidden, who
    measured = saved_run.load_run(tmp_path).measurements
    for name in ALL:
        assert len(measured[f"mse.{name}"]) == len(split.victims)
    assert torch.equal(measured["groups"], split.victims.groups)
    assert torch.equal(measured["correct.groups"], split.test.groups)
    assert len(measured["correct"]) == len(split.test)
    assert torch.equal(measured["pictures.original"], split.victims.images[measured["pictures.index"]])


def test_a_grid_under_train_is_compared_and_reported_and_attacked_again(tiny_grid, tmp_path):
    grid = replace(tiny_grid, protocol="train", attacks=("ridge",), noise_levels=(0.3, 0.05))
    results = evaluate(grid, tmp_path)
    assert len(results.pairs) == 1
    run = saved_run.load_run(tmp_path / results.runs[0].checkpoint)
    assert run.data.protocol == "train"
    assert (len(run.data.victims), len(run.data.attacker), len(run.data.test)) == (12, 12, 6)
    entry, errors, _ = attack_model("ridge", run.model, run.defense, run.data, run.config)
    assert entry.mse == pytest.approx(results.runs[0].attacks["ridge"].mse, rel=1e-5)
    assert len(errors) == 12
    assert vars(results.baseline["tiny"]) == pytest.approx(data.baselines(run.data))
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.write(tmp_path).read_text()))
    assert "It rebuilds the 12 images that the network was trained on, and holds none of them" in text
    assert "training images, which the attacker does not hold" in text
    assert "test images, unseen in training" not in text
    assert "all 12 training images of every network" in text
