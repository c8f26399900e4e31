"""Images that do not fit into memory: the same bits from a file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cem_fast import CEMLoss, CEMSchedule, cost, data, defenses, models, training
from cem_fast.cli.main import main
from cem_fast.config import RunConfig
from cem_fast.data import cache, decoding, memory, stored
from cem_fast.data.stored import StoredImages
from cem_fast.experiments import saved_run
from cem_fast.experiments.build import build_parts
from cem_fast.experiments.run import run
from cem_fast.training import measure


def photographs(root: Path, *, count: int = 20, side: int = 16, mode: str = "RGB", parts: tuple[str, ...] = ()) -> str:
    """Writes a folder of two classes, divided into parts or not."""
    random = np.random.default_rng(0)
    for part in parts or ("",):
        for index in range(count):
            path = root / part / ("cats", "dogs")[index % 2] / f"{index:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).convert(mode).save(path)
    return str(root)


@pytest.fixture
def little_memory(monkeypatch, tmp_path):
    """Leaves room for no more than three images of a folder in memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))

    def leave() -> None:
        monkeypatch.setattr(stored, "MEMORY", 3 * 4 * 16 * 16)

    return leave


@pytest.mark.parametrize("parts", [(), ("train", "test")])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("workers", [1, 2])
def test_images_in_a_file_have_the_bits_of_images_in_memory(tmp_path, monkeypatch, little_memory, parts, mode, workers):
    path = photographs(tmp_path / "photos", mode=mode, parts=parts)
    whole = data.load(path, fold=1)
    little_memory()
    monkeypatch.setattr(decoding, "MANY", 2)
    monkeypatch.setattr(decoding, "CHUNK_BYTES", 3 * 3 * 16 * 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: workers)
    for _ in range(2):  # decoded, and found
        found = data.load(path, fold=1)
        assert isinstance(found.train.images, StoredImages)
        assert isinstance(found.test.images, StoredImages)
        assert (found.digest(), found.image_shape) == (whole.digest(), whole.image_shape)
        assert torch.equal(found.train.images[:], whole.train.images)
        index = torch.tensor([5, 0, 0, -1, 3])
        assert torch.equal(found.train.images[index], whole.train.images[index])
        assert torch.equal(found.train[index].images[1:], whole.train[index].images[1:])
        assert torch.equal(found.train.images[2], whole.train.images[2])
        assert torch.equal(torch.cat(list(found.test.images.split(3))), whole.test.images)
        assert torch.equal(found.train.images.tensor_split(3)[1][:], whole.train.images.tensor_split(3)[1])
        assert found.under("train").digest() == whole.under("train").digest()
        monkeypatch.setattr("cem_fast.data.folder.decode", None)
    mean, variance = stored.moments(found.train.images)
    torch.testing.assert_close((mean, variance), stored.moments(whole.train.images))


def test_what_needs_all_images_in_memory_says_so(tmp_path, little_memory):
    little_memory()
    images = data.load(photographs(tmp_path / "photos"), fold=0).train.images
    for act in (torch.sum, lambda each: torch.cat([each, each]), lambda each: each.mean(0)):
        with pytest.raises(
            (TypeError, AttributeError), match=r"needs images in memory, and these are in a file: take as many as fit"
        ):
            act(images)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def made_longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"0")


def of_another_shape(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"(20, 3, 16, 16)", b"(20, 3, 16, 61)"))


def of_a_huge_shape(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"(20, 3, 16, 16), }    ", b"(20, 3, 16, 999999), }"))


def a_pickle(path: Path) -> None:
    np.save(path, np.array([object()] * 20), allow_pickle=True)


def of_floats(path: Path) -> None:
    np.save(path, np.full((20, 3, 16, 16), 7.0, np.float32))


def fewer(path: Path) -> None:
    np.save(path, np.zeros((19, 3, 16, 16), np.uint8))


def a_link(path: Path) -> None:
    other = path.with_name("other")
    path.rename(other)
    other.write_bytes(other.read_bytes()[:-768] + bytes(768))
    path.symlink_to(other)


def a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "tamper",
    [cut_short, made_longer, of_another_shape, of_a_huge_shape, a_pickle, of_floats, fewer, a_link, a_fifo, empty],
)
def test_a_kept_file_that_was_changed_is_decoded_again(tmp_path, little_memory, tamper):
    path = photographs(tmp_path / "photos")
    little_memory()
    expected = data.load(path, fold=0).digest()
    (kept,) = (tmp_path / "kept").rglob("*.npy")
    tamper(kept)
    assert data.load(path, fold=0).digest() == expected
    assert cache.find(kept.stem[:32], 20) is not None


def test_a_file_that_is_cut_short_in_use_is_an_error(tmp_path, little_memory):
    little_memory()
    images = data.load(photographs(tmp_path / "photos"), fold=0).train.images
    (kept,) = (tmp_path / "kept").rglob("*.npy")
    os.truncate(kept, 200)
    with pytest.raises(OSError, match="was cut short while it was in use"):
        images[:]


def test_files_that_cannot_be_read_are_left_out_of_a_file_too(tmp_path, little_memory):
    path = photographs(tmp_path / "photos")
    (tmp_path / "photos/cats/000.png").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="left out 1 files"):
        whole = data.load(path, fold=0, skip_corrupt=True)
    little_memory()
    with pytest.warns(UserWarning, match="left out 1 files"):
        assert data.load(path, fold=0, skip_corrupt=True).digest() == whole.digest()
    assert not list((tmp_path / "kept").rglob("*.*")), "a file that is no longer needed stays"


def test_no_place_for_a_file_is_an_error_that_says_what_to_do(tmp_path, monkeypatch, little_memory):
    path = photographs(tmp_path / "photos")
    little_memory()
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda place: _Disk())
    with pytest.raises(ValueError, match="has 0.0 GB left: XDG_CACHE_HOME names another folder"):
        data.load(path, fold=0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="need a folder that can be written to, and XDG_CACHE_HOME gives none"):
        data.load(path, fold=0)


class _Disk:
    free = 1


def trained(path: str, defense: str) -> tuple[list[list[float | None]], dict[str, torch.Tensor]]:
    """Losses, weights and accuracy of a training on the images of a folder."""
    splits = data.load(path, fold=0)
    config = RunConfig(defense=defense, epochs=3, batch_size=8, mirror=True, cem_components=2, pruned_channels=0.3)
    torch.manual_seed(0)
    model, protection, cem = build_parts(config, image_shape=splits.image_shape, num_classes=2)
    history = training.train(model, splits, protection, config=config, cem=cem, schedule=CEMSchedule(1.0))
    accuracy = training.correctness(model, protection.eval(), splits.test, draws=3, seed=0)
    return [[e.loss, e.accuracy, e.cem] for e in history], {**model.state_dict(), "accuracy": accuracy}


@pytest.mark.parametrize("workers", [1, 2])
def test_training_from_a_file_has_the_bits_of_training_from_memory(tmp_path, monkeypatch, little_memory, workers):
    path = photographs(tmp_path / "photos", count=30)
    losses, weights = trained(path, "noise")
    little_memory()
    monkeypatch.setattr(decoding, "MANY", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: workers)
    again, same = trained(path, "noise")
    assert again == losses
    assert all(torch.equal(same[name], value) for name, value in weights.items())


@pytest.mark.parametrize("defense", ["ressfl", "patrol", "sca", "noise_nopeek"])
def test_every_kind_of_defense_trains_from_a_file(tmp_path, little_memory, defense):
    """The mean image of adversarial defenses is summed in another order, so bits differ."""
    path = photographs(tmp_path / "photos", count=20)
    losses, _ = trained(path, defense)
    little_memory()
    again, _ = trained(path, defense)
    assert again[0][:2] == pytest.approx(losses[0][:2], rel=1e-3)


@pytest.mark.parametrize("workers", [None, 2])
def test_a_data_set_that_does_not_fit_is_kept_in_a_file(tmp_path, little_memory, workers):
    pairs = [(torch.rand(3, 16, 16), index % 2) for index in range(12)]
    source = pairs if workers is None else torch.utils.data.DataLoader(pairs, batch_size=5, num_workers=workers)
    whole = data.Splits.from_datasets(source, pairs[:2])
    little_memory()
    found = data.Splits.from_datasets(source, pairs[:2])
    assert isinstance(found.train.images, StoredImages)
    assert found.digest() == whole.digest()
    assert torch.equal(found.train.images[3:7], whole.train.images[3:7])
    assert not list((tmp_path / "kept").rglob("*.*")), "the file has no name any more"
    with pytest.raises(
        ValueError, match=r"train\[12\] must have the shape of train\[0\] \(3, 16, 16\), got \(3, 8, 8\)"
    ):
        data.Splits.from_datasets([*pairs, (torch.rand(3, 8, 8), 1)], pairs[:2])


def test_features_that_do_not_fit_are_computed_in_every_iteration_of_a_fit(tmp_path, monkeypatch, little_memory):
    little_memory()
    splits = data.load(photographs(tmp_path / "photos", count=300), fold=0)
    model = models.build("slim", image_shape=splits.image_shape, num_classes=2, cut=2, bottleneck=4)
    losses = [CEMLoss(num_classes=2, num_components=1, noise_std=0.1) for _ in range(2)]
    measure.fit(losses[0], model, splits.train.images, splits.train.labels)
    monkeypatch.setattr(measure, "FEATURES", 1000)
    monkeypatch.setattr(measure, "CHUNK", 32)
    monkeypatch.setattr(losses[1], "fit", None)
    measure.fit(losses[1], model, splits.train.images, splits.train.labels)
    torch.testing.assert_close(losses[1].mixture.means, losses[0].mixture.means)
    one, many = (
        training.correctness(model, defenses.Bottleneck(), part, draws=1, seed=0)
        for part in (splits.train[torch.arange(32)], splits.train)
    )
    assert torch.equal(many[:32], one)


def test_attacks_draw_what_fits_and_the_record_says_so(tmp_path, monkeypatch, little_memory, capsys):
    path = photographs(tmp_path / "photos", count=60)
    little_memory()
    monkeypatch.setattr(memory, "room", lambda image, features=(): 20 if features else 7)
    monkeypatch.setattr(memory, "draws", lambda images, features: 3)
    config = RunConfig(data=path, epochs=2, batch_size=16, attacks=("ridge",), cem_weight=1.0, cem_components=1)
    with pytest.warns(UserWarning, match="attacks hold 20 of 48 images and rebuild 7 of 12, drawn by a fixed seed"):
        record = run(config, tmp_path / "run")
    assert record is not None
    assert (record.num_test, list(record.attacks)) == (12, ["ridge"])
    assert record.attacks["ridge"].budget == "a closed form, from 3 observations of each of its images"
    found = saved_run.load_run(tmp_path / "run")
    facts = found.description.data
    assert (facts.num_train, facts.num_attacker, facts.num_available, facts.num_victims) == (48, 20, 48, 7)
    assert len(found.measurements["mse.ridge"]) == 7
    assert isinstance(found.data.train.images, StoredImages)
    with pytest.warns(UserWarning, match="attacks hold 20 of 48 images"):
        assert main(["attack", str(tmp_path / "run"), "--attacks", "ridge"]) == 0
    printed = capsys.readouterr().out
    assert "7 images under attack" in printed
    assert "from 3 observations" in " ".join(printed.split())
    part = found.data.train
    assert cost.measure_training(found.model, found.loss, part.images, part.labels, batch_size=8, steps=1).step > 0


PEAK = """
import resource, sys
import torch
from cem_fast import CEMLoss, CEMSchedule, data, defenses, models, training
from cem_fast.config import RunConfig
from cem_fast.data import stored
from cem_fast.training import measure

torch.set_num_threads(1)
stored.MEMORY, measure.FEATURES = 5_000_000, 2_000_000
splits = data.load(sys.argv[1], fold=0)
model = models.build("slim", image_shape=splits.image_shape, num_classes=2, cut=2, bottleneck=4)
cem = CEMLoss(num_classes=2, num_components=1, noise_std=0.1)
defense, config = defenses.GaussianNoise(noise_std=0.1), RunConfig(epochs=2)
training.train(model, splits, defense, config=config, cem=cem, schedule=CEMSchedule(1.0))
training.evaluate_accuracy(model, defense.eval(), splits.test, draws=1, seed=0)
print(type(splits.train.images).__name__, len(splits.train), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


@pytest.mark.long
def test_memory_of_training_does_not_grow_with_the_number_of_images(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    peaks = []
    for count in (1000, 12_000):  # all of the latter would need 147 MB
        path = photographs(tmp_path / str(count), count=count, side=32)
        done = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=True)
        kind, trained, peak = done.stdout.split()
        assert (kind, int(trained)) == ("StoredImages", count * 4 // 5)
        peaks.append(int(peak))
    assert peaks[1] < peaks[0] + 80
