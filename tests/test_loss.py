"""CEMLoss and CEMSchedule as a user meets them."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from support.definitions import draw, paper_bound
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounter

from cem_fast import CEMLoss, CEMSchedule, defenses

FEATURES = (4, 2, 3)  # channels, height, width: D = 24


def data(rows=60, classes=3):
    """Rows with two clear clusters in each class."""
    labels = torch.arange(rows) % classes
    cluster = torch.arange(rows) // classes % 2
    noise = torch.rand(rows, *FEATURES, generator=torch.Generator().manual_seed(7))
    return noise + (labels + 5 * cluster).view(-1, 1, 1, 1), labels


def fitted(**options):
    features, labels = data()
    return CEMLoss(num_classes=3, num_components=2, noise_std=0.1, **options).fit(features, labels)


def test_is_an_exact_zero_on_the_graph_before_the_first_fit():
    features, labels = data()
    features[0, 0, 0, 0] = float("nan")
    leaf = features.requires_grad_()
    value = CEMLoss(num_classes=3)(leaf, labels)
    value.backward()
    assert value == 0
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_a_fit_that_was_forgotten_is_said_once(monkeypatch):
    monkeypatch.setattr("cem_fast.loss.PATIENCE", 3)
    features, labels = data()
    leaf, loss = features.requires_grad_(), CEMLoss(num_classes=3, num_components=2)
    loss.eval()(leaf, labels)
    loss.train()(leaf.detach(), labels)
    with torch.no_grad():
        loss(leaf.detach(), labels)
    loss(leaf, labels), loss(leaf, labels)
    with pytest.warns(
        UserWarning, match="an exact zero for 3 training steps, because it was never fitted: call fit"
    ) as said:
        loss(leaf, labels)
    assert said[0].filename == __file__
    loss(leaf, labels)
    early = CEMLoss(num_classes=3, num_components=2)
    early(leaf, labels), early(leaf, labels), early.fit(leaf, labels)
    assert early(leaf, labels) > 0


def test_compiled_code_does_not_count_steps_without_a_fit(monkeypatch):
    monkeypatch.setattr("cem_fast.loss.PATIENCE", 2)
    features, labels = data()
    loss, counter = CEMLoss(num_classes=3), CompileCounter()
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    assert [compiled(features.requires_grad_(), labels).item() for _ in range(4)] == [0] * 4
    assert counter.frame_count == 1


@pytest.mark.parametrize("covariance_type", ["spherical", "diag"])
def test_loaded_mixture_gives_the_paper_value(covariance_type):
    x, labels, mixture = draw(30, 24, 3, 2, diag=covariance_type == "diag")
    prior = torch.tensor([0.2, 0.3, 0.5]).double()
    loss = CEMLoss(num_classes=3, num_components=2, noise_std=0.3, covariance_type=covariance_type).double()
    loss.load_mixture(**mixture._asdict(), class_prior=prior, num_samples=900)
    want = paper_bound(x, labels, mixture, prior, 900, torch.tensor(0.3**2, dtype=torch.float64)) / 24
    torch.testing.assert_close(loss(x.view(30, *FEATURES), labels), want, rtol=1e-12, atol=0)


def test_descending_the_loss_shrinks_the_spread_within_components():
    loss = fitted()
    features, labels = data()
    leaf = features.clone().requires_grad_()
    before = loss(leaf, labels)
    before.backward()
    after = loss(features - 20 * leaf.grad, labels)
    assert after < before


def test_gradient_does_not_depend_on_accumulation():
    loss = fitted(covariance_type="diag")
    loss.num_samples.fill_(1e9)
    features, labels = data()
    leaf = features.clone().requires_grad_()
    loss(leaf, labels).backward()
    halves = features.clone().requires_grad_()
    for rows in (slice(0, 30), slice(30, 60)):
        (loss(halves[rows], labels[rows]) / 2).backward()
    torch.testing.assert_close(leaf.grad, halves.grad, rtol=1e-4, atol=1e-8)


def test_channels_last_equals_contiguous():
    loss = fitted()
    features, labels = data()
    grads = []
    for value in (features, features.to(memory_format=torch.channels_last)):
        leaf = value.detach().requires_grad_()
        loss(leaf, labels).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_state_dict_round_trip_through_an_unfitted_loss():
    loss, fresh = (
        fitted(covariance_type="diag"),
        CEMLoss(num_classes=3, num_components=2, noise_std=0.1, covariance_type="diag"),
    )
    buffer = io.BytesIO()
    torch.save(loss.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    features, labels = data()
    assert fresh.is_fitted
    assert torch.equal(fresh(features, labels), loss(features, labels))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same(clone):
    loss, (features, labels) = fitted(), data()
    assert torch.equal(clone(loss)(features, labels), loss(features, labels))


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_half_models_keep_a_full_precision_mixture(cast):
    loss, (features, labels) = fitted(), data()
    means, value = loss.mixture.means.clone(), loss(features, labels)
    half = getattr(torch.nn.ModuleDict({"cem": loss}), cast)()["cem"]
    assert torch.equal(half.mixture.means, means)
    assert half.mixture.means.dtype == torch.float32
    torch.testing.assert_close(half(getattr(features, cast)(), labels), value, rtol=1e-2, atol=0)


def test_double_keeps_the_exact_noise_and_float_keeps_the_count():
    loss = CEMLoss(num_classes=1, noise_std=0.05).float().double()
    assert loss.noise_variance.item() == 0.05**2
    assert loss.num_samples.dtype == torch.float64


def test_refit_is_in_place_and_starts_from_the_last_fit():
    loss, (features, labels) = fitted(), data()
    addresses = [t.data_ptr() for t in loss.state_dict().values()]
    before = loss.mixture.means.clone()
    loss.fit(features + 0.01, labels)
    assert [t.data_ptr() for t in loss.state_dict().values()] == addresses
    torch.testing.assert_close(loss.mixture.means, before + 0.01)


def test_compiled_training_step_sees_a_refit():
    loss = CEMLoss(num_classes=3, num_components=2, noise_std=0.1)
    features, labels = data()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert compiled(features, labels) == 0
    loss.fit(features, labels)
    torch.testing.assert_close(compiled(features, labels), loss(features, labels))
    loss.fit(features * 2, labels)
    torch.testing.assert_close(compiled(features, labels), loss(features, labels))


def test_backward_pass_can_be_compiled_as_a_whole():
    loss, (features, labels) = fitted(), data()
    features = features.flatten(1).requires_grad_()
    (expected,) = torch.autograd.grad(loss(features, labels), features)
    with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        loss(features, labels).backward()
    assert torch.equal(features.grad, expected)


def test_fit_loader_collects_features_in_evaluation_mode():
    encoder = torch.nn.Sequential(torch.nn.Dropout(0.9), torch.nn.Flatten()).train()
    features, labels = data()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(features, labels), batch_size=25)
    loaded = CEMLoss(num_classes=3, num_components=1).fit_loader(encoder, loader)
    direct = CEMLoss(num_classes=3, num_components=1).fit(features, labels)
    assert encoder.training
    assert loaded.num_samples == 60
    torch.testing.assert_close(loaded.mixture.means, direct.mixture.means)


def test_label_free_mixture():
    features, _ = data()
    loss = CEMLoss(num_classes=1, num_components=6, noise_std=0.1).fit(features)
    assert loss(features).isfinite()


def test_class_absent_from_the_batch_gets_no_gradient_and_no_nan():
    features, labels = data()
    rows = labels != 1
    for variant in ("paper", "official"):
        loss = fitted(variant=variant)
        leaf = features[rows].requires_grad_()
        value = loss(leaf, labels[rows])
        value.backward()
        assert value.isfinite()
        assert leaf.grad.isfinite().all()


def test_official_reads_the_weights_of_the_right_class():
    x, labels, mixture = draw(30, 24, 2, 2, diag=False)
    skewed = mixture._replace(weights=torch.tensor([[0.9, 0.1], [0.2, 0.8]]).double())
    loss = CEMLoss(num_classes=2, num_components=2, variant="official").double()
    loss.load_mixture(**skewed._asdict(), class_prior=torch.full((2,), 0.5), num_samples=10**9)
    only_second = loss(x[labels == 1], labels[labels == 1])
    per_component = torch.log(skewed.variances[1] + 0.01) - torch.log(torch.tensor(0.125 * 0.025**2 + 0.01)).double()
    torch.testing.assert_close(only_second, (skewed.weights[1] * per_component).sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(num_classes=0), ValueError, "num_classes must be at least 1, got 0"),
        (dict(num_components=0), ValueError, "num_components must be at least 1, got 0"),
        (dict(noise_std=0), ValueError, "noise_std must be a positive number .* got 0"),
        (dict(noise_std=-1.0), ValueError, "noise_std must be a positive number .* got -1.0"),
        (dict(noise_std=float("nan")), ValueError, "noise_std must be a positive number .* got nan"),
        (dict(covariance_type="full"), ValueError, "covariance_type must be one of spherical, diag, got 'full'"),
        (dict(variant="theirs"), ValueError, "variant must be one of paper, official"),
        (dict(variant="official", reduction="sum"), ValueError, "reduction must be mean, got 'sum'"),
        (dict(variant="official", covariance_type="diag"), ValueError, "spherical variances only"),
        (dict(noise_std=1e-200), ValueError, "noise_std must be a positive number"),
        (dict(noise_std="loud"), TypeError, "noise_std must be a number or a .* tensor, got 'loud'"),
        (dict(gamma=0.0), ValueError, "gamma must be positive and finite, got 0.0"),
        (dict(boost=-1.0), ValueError, "boost must be positive and finite, got -1.0"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        CEMLoss(**(dict(num_classes=3) | options))


def test_bad_features_and_labels():
    features, labels = data()
    loss = fitted(check_finite=True, check_labels=True)
    with pytest.raises(TypeError, match=r"features must be a tensor of shape \[N, ...\], got list"):
        loss([1.0], labels)
    with pytest.raises(ValueError, match=r"at least two dimensions, got \(60,\)"):
        loss(torch.rand(60), labels)
    with pytest.raises(TypeError, match="features must be a floating-point tensor, got torch.int64"):
        loss(labels.view(-1, 1), labels)
    with pytest.raises(ValueError, match=r"with D = 24 as in means, got \(60, 5\)"):
        loss(torch.rand(60, 5), labels)
    with pytest.raises(TypeError, match="features must be float32, float16 or bfloat16 .* got torch.float64"):
        loss(features.double(), labels)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\), got 5 at index 7"):
        loss(features, labels.index_fill(0, torch.tensor([7]), 5))
    features[8, 0] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinity in 1 rows, first row 8 of class 2"):
        loss(features, labels)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda x, y: ([1.0], y), TypeError, "features must be a tensor"),
        (lambda x, y: (x[:, :5], y), ValueError, "with D = 24 as in means"),
        (lambda x, y: (x.unflatten(1, (-1, 1))[:, :5], y), ValueError, "with D = 24 as in means"),
        (lambda x, y: (x.unflatten(1, (-1, 1))[:, :0], y), ValueError, "at least one number per row"),
        (lambda x, y: (x.flatten(), y), ValueError, "at least two dimensions"),
        (lambda x, y: (x.double(), y), TypeError, "features must be float32, float16 or bfloat16"),
        (lambda x, y: (x.to_sparse(), y), TypeError, "features must be a dense tensor"),
        (lambda x, y: (x.to("meta"), y), ValueError, "must be on meta like the features|means must be on meta"),
        (lambda x, y: (x, y[:7]), ValueError, "labels must have shape"),
        (lambda x, y: (x, y.float()), TypeError, "labels must be an integer tensor"),
        (lambda x, y: (x, y.to("meta")), ValueError, "labels must be on cpu"),
        (lambda x, y: (x, None), ValueError, "labels may be None only for one class"),
        (lambda x, y: (x, y + 2), ValueError, "labels must lie in"),
    ],
)
def test_bad_features_and_labels_after_good_ones(change, error, message):
    """Batches like the last one are not checked again; these differ from it."""
    loss, (features, labels) = fitted(), data()
    features = features.flatten(1)
    loss(features, labels)
    with pytest.raises(error, match=message):
        loss(*change(features, labels))


def test_options_that_are_set_later_count():
    loss, (features, labels) = fitted(), data()
    before = loss(features, labels)
    loss.options = loss.options._replace(mean=False)
    torch.testing.assert_close(loss(features, labels), before * features.flatten(1).shape[1])


def test_a_new_mixture_is_checked_after_good_features():
    loss, (features, labels) = fitted(), data()
    wanted = loss(features, labels)
    assert torch.equal(loss(features, labels), wanted)
    assert torch.equal(copy.deepcopy(loss)(features, labels), wanted)
    loss.double()
    with pytest.raises(TypeError, match="features must be float64"):
        loss(features, labels)


def test_bad_fit_leaves_the_old_mixture_in_force():
    loss, (features, labels) = fitted(), data()
    before = copy.deepcopy(loss.state_dict())
    broken = features.clone()
    broken[0] = float("nan")
    with pytest.raises(ValueError, match="features must be finite, got 1 rows with NaN or infinity"):
        loss.fit(broken, labels)
    with pytest.raises(ValueError, match="num_samples must be positive, got 0"):
        loss.load_mixture(
            **{k: getattr(loss.mixture, k) for k in ("means", "variances", "weights", "class_prior")}, num_samples=0
        )
    mixture = loss.mixture
    with pytest.raises(ValueError, match=r"variances must have shape .* got \(3, 2, 24\)"):
        loss.load_mixture(
            means=mixture.means,
            variances=torch.ones(3, 2, 24),
            weights=mixture.weights,
            class_prior=mixture.class_prior,
            num_samples=60,
        )
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())


def test_schedules():
    assert CEMSchedule(2.0).weight_at(epoch=3, learning_rate=0.05) == 2.0
    official = CEMSchedule(16.0, kind="official")
    assert official.weight_at(epoch=1, learning_rate=0.05) == pytest.approx(0.32)
    assert official.weight_at(epoch=200, learning_rate=0.0004) == 16.0
    with pytest.raises(ValueError, match="weight must be a number >= 0, got -1"):
        CEMSchedule(-1)
    with pytest.raises(ValueError, match="kind must be one of constant, official, got 'linear'"):
        CEMSchedule(1, kind="linear")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(variances=-torch.ones(2, 1)), "variances must be positive, got -1.0"),
        (dict(weights=torch.full((2, 1), 9.0)), "weights must sum to 1, got a sum that is off by 8"),
        (dict(class_prior=torch.full((2,), 7.0)), "class_prior must sum to 1, got a sum that is off by 13"),
        (dict(num_samples=0), "num_samples must be positive, got 0"),
    ],
)
def test_a_mixture_that_is_none_is_refused(change, message):
    given = dict(
        means=torch.zeros(2, 1, 3),
        variances=torch.ones(2, 1),
        weights=torch.ones(2, 1),
        class_prior=torch.full((2,), 0.5),
        num_samples=10,
    )
    with pytest.raises(ValueError, match=message):
        CEMLoss(num_classes=2, num_components=1).load_mixture(**given | change)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_iter=0), "max_iter must be at least 1, got 0"),
        (dict(tol=float("nan")), "tol must not be negative, got nan"),
    ],
)
def test_bad_fits(options, message):
    with pytest.raises(ValueError, match=message):
        CEMLoss(num_classes=1).fit(torch.rand(9, 2), **options)
    with pytest.raises(TypeError, match=r"features must be a tensor of shape \[N, ...\], got list"):
        CEMLoss(num_classes=1).fit([[1.0, 2.0]])


def test_a_loader_that_can_be_iterated_once_is_refused():
    batches = [(torch.rand(4, 3), torch.zeros(4, dtype=torch.int64))] * 2
    with pytest.raises(TypeError, match="loader must be iterable more than once .* got an iterator"):
        CEMLoss(num_classes=1).fit_loader(torch.nn.Identity(), iter(batches))


class Exhausted:
    """A loader that has one pass, as that of a file or a queue."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def __iter__(self):
        return self.batches


def test_a_loader_that_ends_with_its_first_pass_loses_no_batch_or_is_refused():
    x, labels = torch.rand(100, 8), torch.arange(100) % 2
    batches = [(x[i : i + 25], labels[i : i + 25]) for i in range(0, 100, 25)]
    torch.manual_seed(0)
    expected = CEMLoss(num_classes=2, num_components=1).fit_loader(torch.nn.Identity(), batches)
    torch.manual_seed(0)
    found = CEMLoss(num_classes=2, num_components=1).fit_loader(torch.nn.Identity(), Exhausted(batches))
    assert found.num_samples == 100
    assert torch.equal(found.mixture.means, expected.mixture.means)
    with pytest.raises(ValueError, match="loader must give the same rows in every iteration .* got 100 and then 0"):
        CEMLoss(num_classes=2).fit_loader(torch.nn.Identity(), Exhausted(batches), memory_budget=1)


@pytest.mark.parametrize(
    "batch, got",
    [
        (dict(images=torch.rand(4, 3), labels=torch.arange(4) % 2), "a dict"),
        (torch.rand(2, 3), "a Tensor"),
        ([torch.rand(4, 3)], "a list of Tensor"),
        ((torch.rand(4, 3), None), "a tuple of Tensor, NoneType"),
        ((torch.rand(4, 3), [0, 1, 0, 1]), "a tuple of Tensor, list"),
    ],
)
def test_batches_of_a_loader_start_with_two_tensors(batch, got):
    expected = (
        rf"loader must yield batches \(images, labels\) of two tensors, got {got}; pass unpack to take others apart$"
    )
    with pytest.raises(TypeError, match=expected):
        CEMLoss(num_classes=2, num_components=1).fit_loader(torch.nn.Identity(), [batch])


IMAGES, CLASSES = torch.tensor([[1.0], [3.0]]), torch.tensor([4, 9])


@pytest.mark.parametrize("batch", [IMAGES, (IMAGES,), (IMAGES, None), (IMAGES, CLASSES), [IMAGES, None, CLASSES]])
def test_a_loader_with_or_without_labels_fits_one_class(batch):
    loss = CEMLoss(num_classes=1, num_components=1).fit_loader(torch.nn.Identity(), [batch])
    assert loss.mixture.means.item() == 2


def test_a_loader_of_more_than_two_entries_or_of_dictionaries_fits():
    images, labels = torch.rand(8, 3), torch.arange(8) % 2
    loss = CEMLoss(num_classes=2, num_components=1).fit_loader(torch.nn.Identity(), [(images, labels, torch.zeros(8))])
    assert loss.num_samples == 8
    batches = [dict(picture=images, kind=labels)]
    other = CEMLoss(num_classes=2, num_components=1).fit_loader(
        torch.nn.Identity(), batches, unpack=lambda batch: (batch["picture"], batch["kind"])
    )
    assert torch.equal(other.mixture.means, loss.mixture.means)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_loader_of_single_precision_fits_an_encoder_of_another(dtype):
    encoder = torch.nn.Linear(3, 2).to(dtype)
    loss = CEMLoss(num_classes=2, num_components=1).fit_loader(encoder, [(torch.rand(8, 3), torch.arange(8) % 2)])
    assert loss.num_samples == 8
    assert loss.mixture.means.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_features_of_no_width_name_themselves():
    for call in (CEMLoss(num_classes=1).fit, CEMLoss(num_classes=1)):
        with pytest.raises(ValueError, match=r"features must have at least one number per row, got \(5, 0, 4\)"):
            call(torch.zeros(5, 0, 4))


def test_labels_out_of_range_raise_before_the_first_fit():
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\), got 5 at index 1"):
        CEMLoss(num_classes=2)(torch.rand(3, 4), torch.tensor([0, 5, 1]))


def test_num_samples_that_is_no_number_is_named():
    loss = CEMLoss(num_classes=1, num_components=1)
    with pytest.raises(TypeError, match="num_samples must be a number, got str"):
        loss.load_mixture(
            means=torch.zeros(1, 1, 2),
            variances=torch.ones(1, 1),
            weights=torch.ones(1, 1),
            class_prior=torch.ones(1),
            num_samples="many",
        )


def test_num_samples_of_numpy_is_a_number():
    loss = CEMLoss(num_classes=1, num_components=1).load_mixture(
        means=torch.zeros(1, 1, 2),
        variances=torch.ones(1, 1),
        weights=torch.ones(1, 1),
        class_prior=torch.ones(1),
        num_samples=np.int64(100),
    )
    assert int(loss.num_samples) == 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_fitted_in_inference_mode_trains(dtype):
    features = torch.rand(30, 4, dtype=dtype)
    loss = CEMLoss(num_classes=1, num_components=2)
    with torch.inference_mode():
        loss.fit(features)
    leaf = features.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad.abs().sum() > 0
    loss.fit(features)


@pytest.mark.parametrize("name", ["noise_std", "boost", "threshold", "gamma"])
def test_integers_that_no_float_holds_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} must be (a )?positive"):
        CEMLoss(num_classes=2, **{name: 10**400})
    with pytest.raises(ValueError, match="weight must be a number >= 0"):
        CEMSchedule(10**400)
    with pytest.raises(ValueError, match="noise_std must be positive"):
        defenses.GaussianNoise(noise_std=10**400)


def test_a_number_of_samples_that_no_float_holds_is_refused_by_name():
    one = torch.ones(1, 1)
    mixture = dict(means=torch.zeros(1, 1, 2), variances=one, weights=one, class_prior=one[0])
    with pytest.raises(ValueError, match="num_samples must be finite, got 1000"):
        CEMLoss(num_classes=1, num_components=1).load_mixture(**mixture, num_samples=10**400)
