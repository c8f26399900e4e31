"""Every defense trains with CEM and without, and is loaded from disk with the same bits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cem_fast import CEMSchedule, defenses, training
from cem_fast._support.seeding import seeded
from cem_fast.config import RunConfig
from cem_fast.experiments import saved_run
from cem_fast.experiments.build import build_parts, load_data
from cem_fast.experiments.run import run

CONFIG = RunConfig(
    image_size=16, fold=0, epochs=1, batch_size=8, cem_components=2, attacks=("ridge",), attack_epochs=1, noise_draws=2
)


@pytest.mark.parametrize("weight, bottleneck", [(0.0, 8), (0.5, 8), (0.5, "D8")])
@pytest.mark.parametrize("name", defenses.names())
def test_every_defense_trains_with_cem_and_without_and_is_loaded_the_same(
    name, weight, bottleneck, tiny_images, tmp_path
):
    config = replace(CONFIG, data=str(tiny_images), defense=name, cem_weight=weight, epochs=2 if weight else 1)
    config = replace(config, bottleneck=bottleneck)
    seen = {}

    with pytest.MonkeyPatch.context() as patch:
        train = training.train

        def trained(model, splits, defense, **kwargs):
            history = train(model, splits, defense, **kwargs)
            seen.update(model=model, defense=defense)
            return history

        patch.setattr(training, "train", trained)
        record = run(config, tmp_path)
    loaded = saved_run.load_run(tmp_path)
    history = loaded.description.history
    assert all(math.isfinite(epoch.loss) for epoch in history)
    assert (history[-1].cem is not None) == (weight > 0)
    assert math.isfinite(record.attacks["ridge"].mse)
    assert math.isfinite(record.leakage.heldout_nats)

    released = []
    for model, defense in ((seen["model"], seen["defense"]), (loaded.model, loaded.defense)):
        with seeded(3):
            released.append(training.observer(model, defense)(loaded.data.test.images))
    assert torch.equal(*released)
    with torch.no_grad():
        assert torch.equal(seen["model"].decoder(released[0]), loaded.model.decoder(released[0]))
    images, features = loaded.data.train.images, training.clean_features(loaded.model, loaded.data.train.images)
    penalties = [
        d.penalty(images, features, features, loaded.data.train.labels) for d in (seen["defense"], loaded.defense)
    ]
    assert float(penalties[0]) == pytest.approx(float(penalties[1]), rel=1e-6)


@pytest.mark.parametrize("name", defenses.names())
def test_no_defense_ever_sees_a_test_image(name, tiny_images):
    """Trains twice, once with test images that would poison everything they touch."""
    splits = load_data(RunConfig(data=str(tiny_images), fold=0, image_size=16))
    broken = replace(splits, test=replace(splits.test, images=torch.full_like(splits.test.images, torch.nan)))
    config = replace(CONFIG, data=str(tiny_images), defense=name)
    states = []
    for each in (splits, broken):
        torch.manual_seed(0)
        model, defense, _ = build_parts(config, image_shape=(1, 16, 16), num_classes=3)
        training.train(model, each, defense, config=config)
        states.append({**model.state_dict(), **defense.state_dict()})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_all_defenses_compose(tiny_images, tmp_path):
    """One composition of everything that changes the network, the features or the loss."""
    config = replace(CONFIG, data=str(tiny_images), cem_weight=0.5, epochs=2)
    splits = load_data(replace(config, fold=0, image_size=16))
    names = [name for name in defenses.names() if name not in ("none", "bottleneck") and not name.startswith("noise")]
    networks = []
    for _ in range(2):
        torch.manual_seed(0)
        model, noise, cem = build_parts(config, image_shape=(1, 16, 16), num_classes=3)
        values = {key: getattr(config, key) for key in defenses.settings() if key != "noise_std"}
        defense = defenses.Composed(*(defenses.build(name, noise_std=0.0, **values) for name in names), noise)
        networks.append((model, defense, cem))
    (model, defense, cem), (again, same, _) = networks
    history = training.train(model, splits, defense, config=config, cem=cem, schedule=CEMSchedule(0.5))
    assert all(math.isfinite(epoch.loss) for epoch in history)
    assert defense.noise_std == config.noise_std
    same.attach(again, torch.Size((1, 16, 16)))
    same.reshape(again, {key: value.shape for key, value in model.state_dict().items()})
    again.load_state_dict(model.state_dict())
    same.load_state_dict(defense.state_dict())
    released = []
    for network, each in ((model, defense), (again, same)):
        with seeded(3):
            released.append(training.observer(network, each)(splits.test.images))
    assert torch.equal(*released)


def test_information_is_estimated_from_features_before_the_noise(tiny_images, tmp_path):
    nats = {}
    for name, own in (("noise", {}), ("topk_pruning", {"pruned_share": 0.99})):
        config = replace(CONFIG, data=str(tiny_images), defense=name, **own)
        nats[name] = run(config, tmp_path / name, attack=False).leakage.heldout_nats
        loaded = saved_run.load_run(tmp_path / name)
        sent = loaded.defense.before_noise(training.clean_features(loaded.model, loaded.data.train.images)).flatten(1)
        mixture = loaded.loss.mixture
        assert (mixture.means.flatten(0, 1).unsqueeze(1) - sent).square().sum(-1).min(0).values.mean() < sent.var(
            0
        ).sum()
        if name == "topk_pruning":
            unsent = (sent == 0).all(0)
            assert unsent.any()
            assert mixture.means[:, :, unsent].abs().max() == 0
    assert all(math.isfinite(value) for value in nats.values())
