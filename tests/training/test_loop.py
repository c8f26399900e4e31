"""Training: reproducible to the bit, CEM where and when it should act, and a clear stop when it goes wrong."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace

import pytest
import torch
from support.ranks_at_work import unnormalized

from cem_fast import CEMLoss, CEMSchedule, defenses, training
from cem_fast._support.learning_rate import one_cycle
from cem_fast._support.seeding import seeded
from cem_fast.config import RunConfig
from cem_fast.experiments.build import build_parts, load_data

CONFIG = RunConfig(fold=0, epochs=3, batch_size=32, seed=1)


def cem() -> CEMLoss:
    return CEMLoss(num_classes=10, num_components=2, noise_std=0.1)


def defense(name: str = "noise") -> defenses.Defense:
    config = asdict(RunConfig(noise_std=0.1 if name != "bottleneck" else 0.0, seed=1))
    return defenses.build(name, **{key: config[key] for key in defenses.settings()})


def vector(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def trained(model, splits, *, config=CONFIG, name="noise", weight=0.0, stir=0):
    """A copy of the network after training, its history, and its parameters in one vector."""
    torch.manual_seed(stir)
    model = copy.deepcopy(model)
    with_cem = {"cem": cem(), "schedule": CEMSchedule(weight)} if weight else {}
    history = training.train(model, splits, defense(name), config=config, **with_cem)
    return model, history, vector(model)


@pytest.mark.parametrize("name, weight", [("noise", 0.0), ("noise", 1.0), ("noise_arl", 1.0)])
def test_the_same_seed_gives_the_same_bits(model, splits, name, weight):
    _, first, weights = trained(model, splits, name=name, weight=weight, stir=1)
    state = torch.manual_seed(2).get_state()
    _, again, same = trained(model, splits, name=name, weight=weight, stir=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights, same)
    assert [replace(r, seconds=0) for r in first] == [replace(r, seconds=0) for r in again]
    _, _, other = trained(model, splits, config=replace(CONFIG, seed=2), name=name, weight=weight)
    assert not torch.equal(weights, other)


def test_training_learns_and_leaves_the_network_in_eval_mode(model, splits):
    before = training.evaluate_accuracy(model, defense(), splits.test, draws=2, seed=0)
    after, history, _ = trained(model, splits, config=replace(CONFIG, epochs=25))
    assert history[-1].loss < 0.5 * history[0].loss
    assert training.evaluate_accuracy(after, defense(), splits.test, draws=2, seed=0) > max(0.6, before)
    assert not after.training


def test_history(model, splits):
    seen = []
    history = training.train(
        model, splits, defense(), config=CONFIG, cem=cem(), schedule=CEMSchedule(1.0), on_epoch=seen.append
    )
    assert seen == history
    assert [r.epoch for r in history] == [1, 2, 3]
    assert set(history[0].to_json()) == {"epoch", "loss", "accuracy", "cem", "learning_rate", "seconds"}
    assert history[0].cem is None  # nothing is fitted before the first epoch
    assert all(r.cem > 0 for r in history[1:])
    assert all(0 <= r.accuracy <= 1 and r.seconds > 0 for r in history)
    assert all(0 < r.learning_rate <= CONFIG.learning_rate for r in history)


def test_cem_acts_from_the_second_epoch_on(model, splits):
    def states(weight):
        each, seen = copy.deepcopy(model), []
        with_cem = {"cem": cem(), "schedule": CEMSchedule(weight)} if weight else {}
        training.train(each, splits, defense(), config=CONFIG, **with_cem, on_epoch=lambda _: seen.append(vector(each)))
        return seen

    assert [torch.equal(without, acted) for without, acted in zip(states(0.0), states(5.0))] == [True, False, False]


def test_cem_in_a_single_epoch_is_refused(model, splits):
    one = replace(CONFIG, epochs=1)
    with pytest.raises(
        ValueError, match="epochs must be at least 2 with CEM, which is first fitted after epoch 1, got 1"
    ):
        training.train(model, splits, defense(), config=one, cem=cem(), schedule=CEMSchedule(1.0))
    with pytest.raises(
        ValueError, match=r"epochs must be at least 2 where cem_weight is positive, .* got 1 with cem_w"
    ):
        replace(one, cem_weight=0.5)


def test_cem_shrinks_what_varies_within_a_class(model, splits):
    def spread(network):
        features = training.clean_features(network, splits.train.images).flatten(1)
        means = torch.stack([features[splits.train.labels == c].mean(0) for c in range(10)])
        return (features - means[splits.train.labels]).square().mean()

    config = replace(CONFIG, epochs=12)
    assert spread(trained(model, splits, config=config, weight=2.0)[0]) < 0.5 * spread(
        trained(model, splits, config=config)[0]
    )


class Recorder(torch.nn.Module):
    """Stands where the CEM loss does and writes down what it is given."""

    def __init__(self):
        super().__init__()
        self.fitted, self.called = [], []

    def fit(self, features, labels):
        self.fitted.append((features, labels))

    def forward(self, features, labels):
        self.called.append(features)
        return features.sum() * 0


def test_cem_is_given_clean_features_of_training_images(model, splits):
    recorder = Recorder()
    loud = defenses.GaussianNoise(noise_std=50.0)
    training.train(model, splits, loud, config=CONFIG, cem=recorder, schedule=CEMSchedule(1.0))
    assert len(recorder.fitted) == CONFIG.epochs - 1
    for features, labels in recorder.fitted:
        assert not features.requires_grad
        assert torch.equal(labels, splits.train.labels)
        assert 0 <= features.min() <= features.max() <= 1
    assert len(recorder.called) == CONFIG.epochs * 3
    assert all(0 <= features.min() <= features.max() <= 1 and features.requires_grad for features in recorder.called)


def test_the_schedule_gives_the_weight(model, splits):
    asked = []

    class Schedule:
        def weight_at(self, *, epoch, learning_rate):
            asked.append((epoch, learning_rate))
            return 0.0

    _, _, without = trained(model, splits)
    training.train(model, splits, defense(), config=CONFIG, cem=Recorder(), schedule=Schedule())
    assert [epoch for epoch, _ in asked] == [0] * 3 + [1] * 3 + [2] * 3
    assert max(rate for _, rate in asked) <= CONFIG.learning_rate
    assert torch.equal(vector(model), without)  # a weight of zero is no CEM


def test_the_test_part_is_never_touched(model, splits):
    poisoned = replace(splits, test=replace(splits.test, images=torch.full_like(splits.test.images, torch.nan)))
    assert torch.equal(trained(model, splits, weight=1.0)[2], trained(model, poisoned, weight=1.0)[2])


def test_a_loss_that_is_not_finite_stops_at_its_step(model, splits):
    images = splits.train.images.clone()
    images[-1] = torch.nan
    broken = replace(splits, train=replace(splits.train, images=images))
    with pytest.raises(FloatingPointError, match=r"training loss is nan at epoch 1, step \d of 3: lower learning_rate"):
        training.train(model, broken, defense(), config=CONFIG)


def test_cem_and_its_schedule_go_together(model, splits):
    with pytest.raises(ValueError, match="cem and schedule must be given together"):
        training.train(model, splits, defense(), config=CONFIG, cem=cem())


@pytest.mark.parametrize("mirror", [False, True])
def test_mirror_images_of_a_folder_are_shown_on_request(tiny_images, monkeypatch, mirror):
    shown, augment = set(), training.loop.augment
    monkeypatch.setattr(training.loop, "augment", lambda *a, **k: (shown.add(k["mirror"]), augment(*a, **k))[1])
    config = RunConfig(data=str(tiny_images), image_size=16, epochs=1, mirror=mirror)
    splits = load_data(config)
    model, defended, _ = build_parts(config, image_shape=splits.image_shape, num_classes=3)
    training.train(model, splits, defended, config=config)
    assert shown == {mirror}


def test_augmentation_shifts_and_mirrors():
    image = torch.arange(36.0).reshape(1, 1, 6, 6)
    generator = torch.Generator().manual_seed(0)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2), mode="replicate")
    shifts = [padded[:, :, i : i + 6, j : j + 6] for i in range(5) for j in range(5)]
    for mirror, wanted in ((False, shifts), (True, shifts + [s.flip(3) for s in shifts])):
        made = training.augment(image.expand(2000, -1, -1, -1), mirror=mirror, generator=generator)
        assert made.shape == (2000, 1, 6, 6)
        assert len(torch.unique(made.flatten(1), dim=0)) == len(wanted)
        assert all((made == w).flatten(1).all(1).any() for w in wanted)


@pytest.mark.parametrize("name, weight", [("noise", 0.35), ("bottleneck", 0.0)])
def test_features_that_are_not_finite_stop_training(model, splits, name, weight):
    config = replace(
        CONFIG, learning_rate=1e30, batch_size=10**6
    )  # a single step an epoch, whose own loss is still finite
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        training.clean_features(trained(model, splits, config=config, name=name, weight=weight)[0], splits.test.images)


def test_the_loop_is_algorithm_1_of_the_paper(model, splits):
    config, ours, loss = replace(CONFIG, batch_size=30), copy.deepcopy(model), cem()
    history = training.train(ours, splits, defense(), config=config, cem=loss, schedule=CEMSchedule(0.7))
    images, labels, mixture, noise = splits.train.images, splits.train.labels, cem(), defense()
    with seeded(config.seed, "training"):
        generator = torch.Generator().manual_seed(config.seed)
        groups = [[p for p in model.parameters() if (p.dim() > 1) == decayed] for decayed in (True, False)]
        optimizer = torch.optim.SGD(
            [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (5e-4, 0.0))],
            lr=config.learning_rate, momentum=0.9, nesterov=True,
        )  # fmt: skip
        steps = -(-len(images) // 30)
        rates = one_cycle(optimizer, steps=config.epochs * steps, warmup=0.2)
        for epoch in range(config.epochs):
            if epoch:
                mixture.fit(training.clean_features(model, images), labels)
            model.train()
            for batch in torch.randperm(len(images), generator=generator).tensor_split(steps):
                x = training.augment(images[batch], mirror=splits.mirrored, generator=generator)
                features = model.encoder(x)
                logits = model.decoder(noise.release(features))
                total = torch.nn.functional.cross_entropy(logits, labels[batch]) + 0.7 * mixture(
                    features, labels[batch]
                )
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
                rates.step()
    assert torch.equal(vector(model), vector(ours))
    assert torch.equal(mixture.mixture.means, loss.mixture.means)
    assert [entry.epoch for entry in history] == [1, 2, 3]


class Still(defenses.Defense):
    """Releases features as they are and keeps the images that it is given."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def after_step(self, images, released):
        assert not released.requires_grad
        self.steps.append((images, released))


@pytest.mark.parametrize("with_cem", [False, True])
def test_parts_of_a_batch_add_up_to_the_batch(splits, with_cem):
    torch.manual_seed(0)
    model = unnormalized(num_classes=10).double()
    wide = replace(splits, train=replace(splits.train, images=splits.train.images.double()))
    found = []
    for parts in (1, 3):
        each, still = copy.deepcopy(model), Still()
        loss = {"cem": cem().double(), "schedule": CEMSchedule(1.0)} if with_cem else {}
        config = replace(CONFIG, epochs=2, accumulate=parts)
        history = training.train(each, wide, still, config=config, **loss)
        found.append((vector(each), [r.loss for r in history], still.steps))
    (one, losses, steps), (three, added, again) = found
    # CEM blends a third of the batch into its mixture at a time
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if not with_cem else {"rtol": 2e-3, "atol": 2e-5}
    torch.testing.assert_close(three, one, **tolerance)
    assert added == pytest.approx(losses, rel=1e-3 if with_cem else 1e-6)
    assert [len(images) for images, _ in again] == [len(images) for images, _ in steps]
    assert not torch.equal(one, vector(model))


def test_a_batch_that_cannot_be_divided_is_named(model, splits):
    config = replace(CONFIG, batch_size=len(splits.train) - 1, accumulate=len(splits.train) - 2)
    message = f"batch_size must give each of {config.accumulate} parts on each of 1 processes an image"
    with pytest.raises(ValueError, match=message):
        training.train(model, splits, defense(), config=config)


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("name", ["noise", "sca"])
def test_half_precision_applies_only_to_the_network(model, splits, precision, dtype, name):
    computed, released, acted = set(), set(), set()

    class Watched(Recorder):
        def forward(self, features, labels):
            acted.add(features.dtype)
            return super().forward(features, labels)

    model.encoder[0].register_forward_hook(lambda _, __, out: computed.add((model.training, out.dtype)))
    each = defense(name)
    release = each.release
    each.release = lambda features: released.add(features.dtype) or release(features)
    config = replace(CONFIG, precision=precision)
    history = training.train(model, splits, each, config=config, cem=Watched(), schedule=CEMSchedule(1.0))
    assert computed >= {(True, dtype)}
    assert all(kind == (dtype if in_training else torch.float32) for in_training, kind in computed)
    assert released == acted == {torch.float32}
    assert all(value.dtype == torch.float32 for value in model.state_dict().values() if value.is_floating_point())
    assert history[-1].loss < history[0].loss
    assert torch.isfinite(vector(model)).all()


def test_a_step_whose_half_precision_gradient_overflows_is_left_out(model, splits, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, init_scale=2.0**40, **k))
    before, seen = vector(model), []
    config = replace(CONFIG, precision="fp16", epochs=1)
    training.train(model, splits, defense(), config=config, on_epoch=lambda _: seen.append(vector(model)))
    assert torch.equal(before, seen[0])  # three steps, none of which fits yet


def test_frozen_normalization_stays_frozen_and_a_network_in_eval_mode_does_not(model, splits):
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    model.train()
    norms[0].eval()
    before = [module.running_mean.clone() for module in norms]
    training.train(model, splits, defense(), config=replace(CONFIG, epochs=1))
    assert [torch.equal(module.running_mean, old) for module, old in zip(norms, before)] == [True] + [False] * (
        len(norms) - 1
    )
    training.train(
        model, splits, defense(), config=replace(CONFIG, epochs=1)
    )  # after training, all of it is in eval mode
    assert not torch.equal(norms[0].running_mean, before[0])


def test_a_warning_about_small_classes_is_attributed_to_the_library(model, splits):
    many = CEMLoss(num_classes=10, num_components=12, noise_std=0.1)  # of 8 images per class
    with pytest.warns(UserWarning, match="fewer distinct rows than num_components=12") as caught:
        training.train(model, splits, defense(), config=replace(CONFIG, epochs=2), cem=many, schedule=CEMSchedule(1.0))
    assert not any(warning.filename.endswith("_contextlib.py") for warning in caught)  # torch's
