"""Copies of models with a CEM loss or a mixture: averages of models, copies and pickles under a process group."""

import copy
import pickle

import pytest
import torch
from torch import distributed, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from cem_fast import CEMLoss, GaussianMixture


def rows(width: int = 8):
    generator = torch.Generator().manual_seed(width)
    return torch.rand(60, width, generator=generator), torch.arange(60) % 2


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), CEMLoss(num_classes=2, num_components=2), nn.BatchNorm1d(8))


AVERAGES = {
    "weights alone": {},
    "buffers, too": dict(use_buffers=True),
    "exponential": dict(use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "exponential, one by one": dict(use_buffers=True, avg_fn=get_ema_avg_fn(0.9)),
    "own formula": dict(use_buffers=True, avg_fn=lambda mean, new, count: mean + (new - mean) / (count + 1)),
}


@pytest.mark.parametrize("options", AVERAGES.values(), ids=list(AVERAGES))
@pytest.mark.parametrize("updates_before", [0, 2])
def test_an_averaged_copy_follows_a_loss_that_is_fitted_later(options, updates_before):
    trained, (features, labels) = model(), rows()
    average = AveragedModel(trained, **options)
    for _ in range(updates_before):
        average.update_parameters(trained)
    assert not average.module[1].is_fitted
    for shift in (0.0, 1.0):
        trained[1].fit(features + shift, labels)
        average.update_parameters(trained)
        assert torch.equal(average.module[1](features, labels), trained[1](features, labels))
        average.update_parameters(trained)
    wide, _ = rows(12)
    trained[1].fit(wide, labels)
    average.update_parameters(trained)
    assert torch.equal(average.module[1](wide, labels), trained[1](wide, labels))
    before = average.module[1].mixture.means.clone()
    trained[1].fit(wide + 1, labels)
    assert torch.equal(average.module[1].mixture.means, before)


def test_an_averaged_copy_of_a_mixture_has_the_results_of_its_fit():
    trained, (features, _) = nn.ModuleList([GaussianMixture(num_components=2)]), rows()
    average = AveragedModel(trained)
    trained[0].fit(features)
    average.update_parameters(trained)
    assert torch.equal(average.module[0].score_samples(features), trained[0].score_samples(features))
    assert average.module[0].num_rows_ == 60


def test_the_checkpoint_of_an_averaged_copy_loads():
    trained, (features, labels) = model(), rows()
    average = AveragedModel(trained)
    trained[1].fit(features, labels)
    average.update_parameters(trained)
    fresh = model()
    fresh.load_state_dict(average.module.state_dict())
    assert torch.equal(fresh[1](features, labels), trained[1](features, labels))
    assert set(fresh.state_dict()) == set(trained.state_dict())


def test_copies_of_copies_follow_their_own_original_alone():
    first, (features, labels) = model(), rows()
    second = copy.deepcopy(first)
    average = AveragedModel(second)
    first[1].fit(features, labels)
    average.update_parameters(second)
    assert not second[1].is_fitted
    assert not average.module[1].is_fitted


@pytest.fixture
def group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def test_copies_and_pickles_under_a_process_group(group):
    features, labels = rows()
    loss = CEMLoss(num_classes=2, num_components=2, process_group=group).fit(features, labels)
    copied = copy.deepcopy(loss)
    assert copied.process_group is group
    assert copied.mixture.process_group is group
    pickled = pickle.loads(pickle.dumps(loss))
    assert pickled.process_group is None
    assert pickled.mixture.process_group is None
    for twin in (copied, pickled):
        assert torch.equal(twin(features, labels), loss(features, labels))
        # before the first step of training, whether all ranks have a mixture is unknown
        twin(features.requires_grad_(), labels).backward()


def test_the_noise_of_the_constructor_stays_when_a_checkpoint_has_another():
    features, labels = rows()
    torch.manual_seed(0)
    saved = CEMLoss(num_classes=2, noise_std=0.5).fit(features, labels).state_dict()
    fresh = CEMLoss(num_classes=2, noise_std=0.1)
    with pytest.warns(UserWarning, match="the checkpoint has noise_std 0.5; this CEMLoss keeps its own, 0.1"):
        fresh.load_state_dict(saved)
    assert "noise_std=0.1" in repr(fresh)
    assert fresh.is_fitted
    torch.manual_seed(0)
    same = CEMLoss(num_classes=2, noise_std=0.1).fit(features, labels)
    torch.testing.assert_close(fresh(features, labels), same(features, labels))
    same.load_state_dict(fresh.state_dict())  # without a warning, which would be an error here


def test_the_noise_is_in_the_repr():
    assert "noise_std=0.05" in repr(CEMLoss(num_classes=1, noise_std=0.05))
    assert "noise_std=0.1 to 0.3" in repr(CEMLoss(num_classes=1, noise_std=torch.tensor([0.1, 0.2, 0.3])))


def test_a_loss_shares_memory_and_takes_memory_later():
    features, labels = rows()
    loss = CEMLoss(num_classes=2, num_components=2).fit(features, labels)
    before = loss(features, labels)
    assert loss.share_memory().mixture.means.is_shared()
    assert torch.equal(loss(features, labels), before)
    saved = copy.deepcopy(loss.state_dict())
    empty = loss.to("meta").to_empty(device="cpu")
    assert empty.num_samples.dtype == torch.float64
    empty.noise_variance.copy_(saved["noise_variance"])
    empty.load_state_dict(saved)
    assert torch.equal(empty(features, labels), before)
