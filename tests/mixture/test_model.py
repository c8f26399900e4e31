"""GaussianMixture: fits, hard cases and scikit-learn's meanings."""

import json
import warnings

import numpy as np
import pytest
import torch
from support.blobs import blobs
from support.definitions import Mixture, log_prob

from cem_fast import CEMLoss, GaussianMixture, KMeans
from cem_fast.mixture import interchange
from cem_fast.mixture.fitting import Estimate, expectation_maximization_of_matrices
from cem_fast.mixture.rows import Rows
from cem_fast.mixture.seeding import kmeans_plus_plus, squared_distance


@pytest.mark.parametrize("algorithm", ["em", "kmeans"])
@pytest.mark.parametrize("covariance_type", ["spherical", "diag"])
def test_recovers_separated_clusters(algorithm, covariance_type):
    x, labels, component, centers = blobs()
    mixture = GaussianMixture(
        num_components=2, num_classes=3, algorithm=algorithm, covariance_type=covariance_type
    ).fit(x, labels)
    distance = torch.cdist(mixture.means, centers).min(2).values
    assert distance.max() < 0.05
    torch.testing.assert_close(mixture.variances, torch.full_like(mixture.variances, 0.05**2), rtol=0.6, atol=0)
    torch.testing.assert_close(mixture.weights.sum(1), torch.ones(3))
    torch.testing.assert_close(mixture.class_prior, torch.bincount(labels) / 600)
    assert mixture.counts.sum() == 600
    assert mixture.converged_
    found = mixture.predict(x, labels)
    for c in range(3):
        rows = labels == c
        agree = (found[rows] == component[rows]).float().mean()
        assert agree in (0, 1)


def test_lloyd_from_a_given_start_equals_a_plain_loop():
    x = torch.randn(300, 4, dtype=torch.float64)
    start = x[:3].clone()
    mixture = GaussianMixture(num_components=3, algorithm="kmeans", init=start[None], max_iter=4, tol=0.0).fit(x)
    means = start
    for _ in range(4):
        nearest = torch.cdist(x, means).argmin(1)
        means = torch.stack([x[nearest == k].mean(0) for k in range(3)])
    torch.testing.assert_close(mixture.means[0], means)
    inertia = (torch.cdist(x, means).min(1).values ** 2).mean()
    assert mixture.lower_bound_ == pytest.approx(-float(inertia), rel=1e-9)


@pytest.mark.parametrize("covariance_type", ["spherical", "diag"])
def test_em_equals_a_plain_loop_and_never_loses_likelihood(covariance_type):
    x = torch.randn(200, 3, dtype=torch.float64) + torch.randint(0, 2, (200, 1)) * 2
    start = x[:2].clone()
    diag = covariance_type == "diag"
    options = dict(
        num_components=2,
        covariance_type=covariance_type,
        init=start[None],
        tol=0.0,
        reg_covar=1e-6,
        init_variances=torch.ones(1, 2, 3) if diag else torch.ones(1, 2),
        init_weights=torch.full((1, 2), 0.5),
    )
    means, variances, weights = start, torch.ones(2, 3).double(), torch.full((2,), 0.5).double()
    scores = []
    for iteration in range(1, 8):
        per_component = torch.stack(
            [torch.distributions.Normal(m, v.sqrt()).log_prob(x).sum(1) for m, v in zip(means, variances)], 1
        )
        joint = per_component + weights.log()
        scores.append(float(torch.logsumexp(joint, 1).mean()))
        r = torch.softmax(joint, 1)
        n = r.sum(0)
        means = (r.T @ x) / n[:, None]
        variances = torch.stack([(r[:, k : k + 1] * (x - means[k]) ** 2).sum(0) / n[k] for k in range(2)]) + 1e-6
        variances = variances if diag else variances.mean(1, keepdim=True).expand(2, 3)
        weights = n / len(x)
        mixture = GaussianMixture(max_iter=iteration, **options).fit(x)
        torch.testing.assert_close(mixture.means[0], means)
        torch.testing.assert_close(mixture.variances[0], variances if diag else variances[:, 0])
        torch.testing.assert_close(mixture.weights[0], weights)
        assert mixture.lower_bound_ == pytest.approx(scores[-1], rel=1e-9)
    assert all(b >= a for a, b in zip(scores, scores[1:]))


def test_scores_and_probabilities_with_and_without_labels():
    x, labels, _, _ = blobs(spread=1.0)
    mixture = GaussianMixture(num_components=2, num_classes=3).fit(x, labels)
    parameters = [t.double() for t in (mixture.means, mixture.variances, mixture.weights)]
    conditional = torch.stack(
        [log_prob(x.double(), Mixture(*parameters), torch.full_like(labels, c)) for c in range(3)], 1
    )
    torch.testing.assert_close(
        mixture.score_samples(x, labels).double(),
        conditional.gather(1, labels[:, None]).squeeze(1),
        rtol=1e-4,
        atol=1e-4,
    )
    marginal = torch.logsumexp(conditional + mixture.class_prior.double().log(), 1)
    torch.testing.assert_close(mixture.score_samples(x).double(), marginal, rtol=1e-4, atol=1e-4)
    assert mixture.predict_proba(x, labels).shape == (600, 2)
    flat = mixture.predict_proba(x)
    torch.testing.assert_close(flat.sum(1), torch.ones(600))
    assert torch.equal(mixture.predict(x), flat.argmax(1))


def test_samples_have_the_moments_of_the_mixture():
    x, labels, _, _ = blobs(spread=1.0)
    mixture = GaussianMixture(num_components=2, num_classes=3).fit(x, labels)
    drawn, component = mixture.sample(20_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.mean(0), x.mean(0), rtol=0, atol=0.15)
    pi = (mixture.class_prior[:, None] * mixture.weights).flatten()
    torch.testing.assert_close(torch.bincount(component, minlength=6) / 20_000, pi, rtol=0, atol=0.02)


def test_information_criteria_count_the_parameters():
    x = torch.randn(100, 3)
    mixture = GaussianMixture(num_components=2).fit(x)
    log_likelihood = float(mixture.score_samples(x).double().sum())
    assert mixture.aic(x) == pytest.approx(2 * (6 + 6 + 1) - 2 * log_likelihood)
    assert mixture.bic(x) == pytest.approx((6 + 6 + 1) * torch.tensor(100.0).log().item() - 2 * log_likelihood)


def test_restarts_keep_the_best_of_each_class():
    x, labels, _, _ = blobs(components=4, spread=0.3)
    options = dict(num_components=4, num_classes=3, algorithm="kmeans")
    once = [
        GaussianMixture(**options, generator=torch.Generator().manual_seed(s)).fit(x, labels).lower_bound_
        for s in range(3)
    ]
    best = GaussianMixture(**options, num_init=5, generator=torch.Generator().manual_seed(0)).fit(x, labels)
    assert best.lower_bound_ >= once[0]


def test_the_generator_decides():
    x, labels, _, _ = blobs(spread=1.0)
    fits = [
        GaussianMixture(num_components=3, num_classes=3, generator=torch.Generator().manual_seed(5)).fit(x, labels)
        for _ in range(2)
    ]
    torch.testing.assert_close(fits[0].means, fits[1].means)


def test_common_offset_and_tiny_spread():
    x, labels, _, centers = blobs(spread=0.05)
    shifted = GaussianMixture(num_components=2, num_classes=3, algorithm="kmeans").fit(x * 1e-3 + 1000, labels)
    near = torch.cdist(shifted.means.double(), centers.double() * 1e-3 + 1000).min(2).values
    assert near.max() < 1e-3


def test_fewer_rows_than_components_warns_once_and_keeps_weights_that_sum_to_one():
    x, labels = torch.randn(7, 4), torch.tensor([0, 0, 0, 0, 0, 1, 1])
    for algorithm in ("kmeans", "em"):
        with pytest.warns(UserWarning, match="fewer distinct rows than num_components=4") as caught:
            mixture = GaussianMixture(num_components=4, num_classes=3, algorithm=algorithm).fit(x, labels)
        assert len(caught) == 1
        torch.testing.assert_close(mixture.weights.sum(1), torch.ones(3))
        assert mixture.class_prior[2] == 0
        assert all(t.isfinite().all() for t in mixture.state_dict().values())
        assert mixture.score_samples(x, labels).isfinite().all()


def test_duplicates_and_constant_features():
    x = torch.ones(20, 3)
    with pytest.warns(UserWarning, match="fewer distinct rows"):
        mixture = GaussianMixture(num_components=3, algorithm="kmeans").fit(x)
    torch.testing.assert_close(mixture.means, torch.ones(1, 3, 3))
    assert (mixture.variances >= 1e-7).all()
    assert mixture.weights.tolist() == [[1, 0, 0]]


def test_an_empty_cluster_is_reseeded():
    x = torch.cat([torch.randn(50, 2), torch.randn(50, 2) + 20])
    start = torch.tensor([[[10.0, 10.0], [500.0, 500.0]]])
    mixture = GaussianMixture(num_components=2, algorithm="kmeans", init=start).fit(x)
    assert mixture.counts.flatten().tolist() == [50, 50]


def test_kmeans_plus_plus_draws_the_same_rows_in_pieces():
    x = blobs(rows=900, dimension=7, components=9)[0]
    for K in (1, 2, 12):
        means = [
            kmeans_plus_plus(Rows(chunks), 1, K, like=x[0], generator=torch.Generator().manual_seed(3))
            for chunks in ([(x, None)], [(x[:100], None), (x[100:], None)])
        ]
        assert means[0].shape == (1, K, 7)
        assert torch.equal(*means)


def test_kmeans_plus_plus_picks_rows_of_the_class_far_from_each_other():
    x, labels, _, centers = blobs(components=4, spread=0.01)
    means = kmeans_plus_plus(Rows([(x, labels)]), 3, 4, like=x[0])
    for c in range(3):
        assert all((x[labels == c] == mean).all(1).any() for mean in means[c])
        assert torch.cdist(centers[c], means[c]).min(1).values.max() < 0.2


def test_squared_distance_is_exact():
    x, labels, _, centers = blobs(spread=1.0)
    truth = (x.double() - centers[labels, 0].double()).square().sum(1)
    torch.testing.assert_close(squared_distance(x, centers[:, 0], labels).double(), truth, rtol=1e-5, atol=1e-6)


def test_float64_rows_give_a_float64_mixture_and_state_round_trips():
    x, labels, _, _ = blobs()
    mixture = GaussianMixture(num_components=2, num_classes=3).fit(x.double(), labels)
    assert mixture.means.dtype == torch.float64
    fresh = GaussianMixture(num_components=2, num_classes=3).double()
    fresh.load_state_dict(mixture.state_dict())
    assert torch.equal(fresh.score_samples(x.double()), mixture.score_samples(x.double()))


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(num_components=0), ValueError, "num_components must be at least 1, got 0"),
        (
            dict(covariance_type="banded"),
            ValueError,
            "covariance_type must be one of diag, spherical, tied, full, got 'banded'",
        ),
        (
            dict(covariance_type="full", algorithm="kmeans"),
            ValueError,
            "estimates spherical or diag covariances, got 'full'",
        ),
        (dict(num_components=True), TypeError, "num_components must be an integer of at least 1, got True"),
        (dict(algorithm="vb"), ValueError, "algorithm must be one of em, kmeans, got 'vb'"),
        (dict(init="corners"), ValueError, r"init must be 'k-means\+\+', 'random' or a tensor"),
        (dict(init=[[0.0]]), TypeError, r"init must be 'k-means\+\+', 'random' or a tensor .* of means, got list"),
        (dict(init_variances=1.0), TypeError, "init_variances must be a tensor or None, got float"),
        (dict(tol=-1.0), ValueError, "tol must be finite and not negative, got -1.0"),
        (dict(reg_covar=float("nan")), ValueError, "reg_covar must be finite and not negative, got nan"),
        (dict(reg_covar="small"), TypeError, "reg_covar must be a number, got str"),
        (dict(generator=0), TypeError, "generator must be a torch.Generator or None, got int"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        GaussianMixture(**(dict(num_components=2) | options))


def test_settings_of_numpy_are_numbers(tmp_path):
    mixture = GaussianMixture(num_components=1, tol=np.float32(0.25), reg_covar=np.float32(0.5))
    mixture.fit(torch.tensor([[1.0], [3.0]])).save(tmp_path / "mixture.safetensors")
    loaded = GaussianMixture.load(tmp_path / "mixture.safetensors")
    assert (loaded.tol, loaded.reg_covar) == (0.25, 0.5)


IDENTITY = {
    "spherical": torch.ones(1, 3),
    "diag": torch.ones(1, 3, 4),
    "tied": torch.eye(4).unsqueeze(0),
    "full": torch.eye(4).expand(1, 3, 4, 4),
}


def correlated(rows=400):
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(4, 4, generator=g, dtype=torch.float64)
    x = torch.randn(rows, 4, generator=g, dtype=torch.float64) @ mix
    return x + 4 * torch.randint(0, 2, (rows, 1), generator=g)


@pytest.mark.parametrize("kind", sorted(IDENTITY))
def test_em_has_the_meaning_of_scikit_learn(kind):
    sklearn = pytest.importorskip("sklearn.mixture")
    x = correlated()
    start = dict(init=x[:3].unsqueeze(0), init_variances=IDENTITY[kind], init_weights=torch.full((1, 3), 1 / 3))
    ours = GaussianMixture(num_components=3, covariance_type=kind, max_iter=20, tol=0.0, **start).fit(x)
    precisions = IDENTITY[kind][0].numpy()
    theirs = sklearn.GaussianMixture(
        3, covariance_type=kind, means_init=x[:3], precisions_init=precisions, weights_init=[1 / 3] * 3
    )
    theirs.set_params(max_iter=20, tol=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # twenty iterations do not converge
        theirs.fit(x.numpy())
    torch.testing.assert_close(ours.means[0], torch.from_numpy(theirs.means_), rtol=1e-9, atol=1e-9)
    spread = getattr(ours, "variances" if kind in ("spherical", "diag") else "covariances")[0]
    torch.testing.assert_close(spread, torch.from_numpy(theirs.covariances_), rtol=1e-8, atol=1e-10)
    assert ours.lower_bound_ == pytest.approx(theirs.lower_bound_, rel=1e-10)
    assert (ours.aic(x), ours.bic(x)) == pytest.approx((theirs.aic(x.numpy()), theirs.bic(x.numpy())), rel=1e-10)
    converted = ours.to_sklearn()
    torch.testing.assert_close(torch.from_numpy(converted.score_samples(x.numpy())), ours.score_samples(x))
    assert torch.equal(torch.from_numpy(converted.predict(x.numpy())), ours.predict(x))
    back = GaussianMixture.from_sklearn(converted)
    torch.testing.assert_close(back.predict_proba(x), ours.predict_proba(x))
    with pytest.raises(ValueError, match="not fitted"):
        GaussianMixture.from_sklearn(sklearn.GaussianMixture(2))


@pytest.mark.parametrize("kind", ["tied", "full"])
def test_covariances_of_several_classes(kind):
    x, labels, _, _ = blobs(spread=1.0)
    x = x.double() @ torch.randn(5, 5, generator=torch.Generator().manual_seed(3)).double()
    start = torch.stack([x[labels == c][:2] for c in range(3)])
    options = dict(num_components=2, covariance_type=kind, max_iter=7, tol=0.0)
    together = GaussianMixture(num_classes=3, init=start, **options).fit(x, labels)
    for c in range(3):
        rows = x[labels == c]
        alone = GaussianMixture(init=start[c : c + 1], **options).fit(rows)
        torch.testing.assert_close(together.covariances[c], alone.covariances[0])
        torch.testing.assert_close(together.score_samples(x, labels)[labels == c], alone.score_samples(rows))
    marginal = torch.stack(
        [together.score_samples(x, torch.full_like(labels, c)) + together.class_prior[c].log() for c in range(3)], 1
    )
    torch.testing.assert_close(together.score_samples(x), marginal.logsumexp(1))
    drawn, component = together.sample(20_000, generator=torch.Generator().manual_seed(0))
    first = drawn[component == 0]
    torch.testing.assert_close(
        torch.cov(first.T),
        together.covariances[0, 0] if kind == "full" else together.covariances[0],
        rtol=0.2,
        atol=0.3,
    )
    leaf = x[:5].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: together.score_samples(rows, labels[:5]), leaf)
    assert torch.equal(together.predict(x, labels), together.predict_proba(x, labels).argmax(1))
    with pytest.raises(ValueError, match=f"partial_fit needs spherical or diag covariances, got '{kind}'"):
        together.partial_fit(x, labels)


@pytest.mark.parametrize("kind", ["tied", "full"])
def test_few_rows_are_fitted_in_the_space_that_they_span(kind):
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(torch.tensor([11, 200, 6]))
    x = torch.randn(217, 30, generator=g, dtype=torch.float64) + 3 * torch.randint(0, 2, (217, 1), generator=g)
    means = torch.randn(3, 2, 30, generator=g, dtype=torch.float64)  # not in the space of the rows
    nothing = torch.zeros(3, 2, dtype=torch.float64)
    first = Estimate(means, nothing, nothing + 0.5, nothing, nothing[:, 0], nothing[:, 0], nothing[:, 0])
    settings = dict(tied=kind == "tied", reg_covar=1e-3, dtype=torch.float64, max_iter=6, tol=1e-3)
    # rows in two chunks are fitted in all dimensions
    parts = [(x[:150], labels[:150]), (x[150:], labels[150:])]
    wide = expectation_maximization_of_matrices(Rows(parts), first.select(torch.arange(3)), **settings)
    narrow = expectation_maximization_of_matrices(Rows([(x, labels)]), first, **settings)
    assert torch.equal(narrow.n_iter, wide.n_iter)
    for name, value in vars(narrow).items():
        torch.testing.assert_close(value, getattr(wide, name), rtol=1e-8, atol=1e-8)
    assert torch.linalg.matrix_rank(narrow.variances[0] - 1e-3 * torch.eye(30), atol=1e-6).max() <= 13


def test_thin_covariances_stay_positive_definite():
    x = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)) * 10
    x[:, 20:] = 1.0  # dead features
    mixture = GaussianMixture(num_components=2, covariance_type="full").fit(x)
    assert mixture.score_samples(x).isfinite().all()
    assert mixture.covariances.dtype == torch.float64
    with pytest.raises(ValueError, match="covariances must be positive definite, got one that is not: raise reg_covar"):
        GaussianMixture(num_components=2, covariance_type="full", reg_covar=0.0).fit(x)


@pytest.mark.parametrize("kind", sorted(IDENTITY))
def test_save_and_load(kind, tmp_path):
    x, labels, _, _ = blobs(spread=1.0)
    mixture = GaussianMixture(num_components=2, num_classes=3, covariance_type=kind).fit(x.double(), labels)
    mixture.save(tmp_path / "mixture.safetensors")
    loaded = GaussianMixture.load(tmp_path / "mixture.safetensors")
    assert torch.equal(loaded.score_samples(x.double(), labels), mixture.score_samples(x.double(), labels))
    assert loaded.covariance_type == kind
    (tmp_path / "broken").write_bytes(b"PK not a mixture")
    with pytest.raises(ValueError, match="path must be a file that GaussianMixture.save wrote"):
        GaussianMixture.load(tmp_path / "broken")
    with pytest.raises(FileNotFoundError, match="path must be a file that GaussianMixture.save wrote"):
        GaussianMixture.load(tmp_path / "missing")


def test_without_labels_classes_without_rows_take_none():
    x = torch.cat([torch.randn(50, 2) * 0.01 + 5, torch.randn(50, 2) * 0.01 - 5])
    labels = torch.arange(100) // 50
    for algorithm in ("kmeans", "em"):
        mixture = GaussianMixture(num_components=2, num_classes=3, algorithm=algorithm).fit(x, labels)
        assert (mixture.predict(torch.zeros(1, 2)) < 4).all()  # class 2 lies there
        assert (mixture.predict(x) // 2 == labels).all()


def test_information_criteria_without_labels_count_the_class_priors():
    x, labels, _, _ = blobs(spread=1.0)
    mixture = GaussianMixture(num_components=2, num_classes=3).fit(x, labels)
    log_likelihood = float(mixture.score_samples(x).double().sum())
    assert mixture.aic(x) == pytest.approx(2 * (3 * 2 * 5 * 2 + 3 * 2 - 1) - 2 * log_likelihood)


def test_a_state_of_another_shape_leaves_everything_as_it_was():
    x, labels, _, _ = blobs(spread=1.0)
    loss, other = (CEMLoss(num_classes=3, num_components=k, noise_std=0.1) for k in (2, 5))
    loss.fit(x, labels)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    other.fit(x[:, :4], labels)
    with pytest.raises(RuntimeError, match="size mismatch"):
        loss.load_state_dict(other.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
    fresh = CEMLoss(num_classes=3, num_components=2)
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_state_dict(other.state_dict())
    assert not fresh.is_fitted


def test_bad_rows():
    x, labels, _, _ = blobs()
    mixture = GaussianMixture(num_components=2, num_classes=3)
    with pytest.raises(RuntimeError, match="not fitted"):
        mixture.score_samples(x)
    with pytest.raises(ValueError, match="labels may be None only for one class"):
        mixture.fit(x)
    with pytest.raises(ValueError, match=r"x must have at least one row, got \(0, 5\)"):
        mixture.fit(x[:0], labels[:0])
    with pytest.raises(ValueError, match="x must be finite, got 2 rows"):
        mixture.fit(x.index_fill(0, torch.tensor([1, 2]), float("inf")), labels)
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        mixture.fit(labels[:, None], labels)
    with pytest.raises(ValueError, match=r"init must have shape \[C, K, D\] = \(3, 2, 5\), got \(3, 2, 4\)"):
        GaussianMixture(num_components=2, num_classes=3, init=torch.zeros(3, 2, 4)).fit(x, labels)


@pytest.mark.parametrize("options", [dict(algorithm="kmeans"), dict(), dict(covariance_type="full")])
def test_rows_with_nan_have_no_component(options):
    x, labels, _, _ = blobs(spread=1.0)
    mixture = GaussianMixture(num_components=2, num_classes=3, **options).fit(x, labels)
    x[4, 1] = float("nan")
    with pytest.raises(ValueError, match="x must be finite, got NaN or infinity in 1 rows, first row 4"):
        mixture.predict(x, labels)


@pytest.mark.parametrize("kind", ["tied", "full"])
def test_covariances_stay_in_double_precision(kind):
    x, labels, _, _ = blobs(spread=1.0)
    mixture = GaussianMixture(num_components=2, num_classes=3, covariance_type=kind).fit(x, labels)
    fresh = GaussianMixture(num_components=2, num_classes=3, covariance_type=kind)
    fresh.load_state_dict(mixture.state_dict())
    for name, value in mixture.float().half().state_dict().items():
        assert value.dtype == torch.float64, name
        assert torch.equal(value, fresh.state_dict()[name]), name


def test_more_rows_for_a_mixture_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.mixture")
    x = torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = sklearn.GaussianMixture(1, covariance_type="diag").fit(x[:150].numpy())
    with pytest.raises(RuntimeError, match="partial_fit needs the counts of the earlier rows"):
        GaussianMixture.from_sklearn(model).partial_fit(x[150:])
    mixture = GaussianMixture.from_sklearn(model, num_rows=150).partial_fit(x[150:])
    torch.testing.assert_close(mixture.means[0, 0], x.mean(0))
    assert mixture.num_rows_ == 200


def test_a_file_keeps_settings_and_results(tmp_path):
    x, labels, _, centers = blobs(spread=1.0)
    options = dict(num_init=2, max_iter=7, tol=0.5, reg_covar=1e-3, algorithm="kmeans", init=centers)
    mixture = GaussianMixture(num_components=2, num_classes=3, **options).fit(x, labels)
    mixture.save(tmp_path / "mixture.safetensors")
    loaded = GaussianMixture.load(tmp_path / "mixture.safetensors")
    for name in ("num_init", "max_iter", "tol", "reg_covar", "num_rows_", "n_iter_", "converged_", "lower_bound_"):
        assert getattr(loaded, name) == getattr(mixture, name), name
    assert torch.equal(loaded.init, centers)
    assert torch.equal(loaded.fit(x, labels).means, mixture.means)


def test_a_file_of_version_0_1_loads(tmp_path):
    mixture = GaussianMixture(num_components=1, reg_covar=0.5).fit(torch.tensor([[1.0], [3.0]]))
    settings = {name: getattr(mixture, name) for name in ("num_components", "num_classes", "covariance_type")}
    settings |= {"algorithm": "em", "reg_covar": 0.5}  # it has no other settings, and no results of the fit
    interchange.write(tmp_path / "mixture.safetensors", mixture.state_dict(), settings)
    loaded = GaussianMixture.load(tmp_path / "mixture.safetensors")
    assert (loaded.reg_covar, loaded.max_iter, loaded.means.item()) == (0.5, 100, 2.0)
    interchange.write(tmp_path / "mixture.safetensors", mixture.state_dict(), {})
    with pytest.raises(ValueError, match="path must be a file that GaussianMixture.save wrote, got .*num_components"):
        GaussianMixture.load(tmp_path / "mixture.safetensors")


@pytest.mark.parametrize(
    "initial, message",
    [
        (dict(init=torch.full((3, 2, 5), torch.nan)), "init must be finite, got NaN or infinity"),
        (dict(init_variances=torch.zeros(3, 2, 5)), "init_variances must be positive, got 0.0"),
        (dict(init_variances=torch.full((3, 2, 5), torch.inf)), "init_variances must be finite, got NaN or infinity"),
        (dict(init_weights=torch.full((3, 2), -1.0)), "init_weights must not be negative, got -1.0"),
    ],
)
def test_bad_initial_parameters(initial, message):
    x, labels, _, _ = blobs()
    with pytest.raises(ValueError, match=message):
        GaussianMixture(num_components=2, num_classes=3, **initial).fit(x, labels)


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
@pytest.mark.parametrize("algorithm", ["kmeans", "em"])
def test_rows_without_features_are_refused(method, algorithm):
    mixture = GaussianMixture(num_components=1, algorithm=algorithm)
    with pytest.raises(ValueError, match=r"x must have at least one feature, got \(3, 0\)"):
        getattr(mixture, method)(torch.zeros(3, 0))
    with pytest.raises(ValueError, match=r"x must have at least one feature, got \(3, 0\)"):
        mixture.fit_stream([(torch.zeros(3, 0), None)])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_components": 10**9}, "num_components"),
        ({"num_classes": 10**9}, "num_classes"),
        ({"num_components": "2"}, "num_components"),
        ({"n_iter_": "many"}, "n_iter_ must be of type int, got str"),
        ({"converged_": None}, "converged_ must be of type bool"),
        ({"means": float("nan")}, "means must be finite"),
        ({"variances": -1.0}, "variances must not be negative"),
        ({"weights": 0.7}, "must each sum to 1"),
    ],
    ids=str,
)
def test_a_file_of_a_stranger_loads_or_is_refused_before_it_is_allocated(change, message, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "mixture.safetensors"
    GaussianMixture(num_components=2).fit(torch.rand(20, 3)).save(path)
    with safe_open(path, framework="pt") as file:
        values = json.loads(file.metadata()["gaussian_mixture"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, value in change.items():
        if name in tensors:
            tensors[name] = torch.full_like(tensors[name], value)
        else:
            values[name] = value
    save_file(tensors, path, {"gaussian_mixture": json.dumps(values)})
    with pytest.raises(ValueError, match=message) as raised:
        GaussianMixture.load(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("metadata", ["[" * 100_000, "[]", "5", "{"], ids=["deep", "list", "number", "open"])
def test_a_mixture_with_damaged_settings_is_refused(metadata, tmp_path):
    from safetensors.torch import save_file

    save_file({"means": torch.zeros(1, 1, 1)}, tmp_path / "m", {"gaussian_mixture": metadata})
    with pytest.raises(ValueError, match="path must be a file that GaussianMixture"):
        GaussianMixture.load(tmp_path / "m")


class Called(torch.nn.Module):
    """A method of a mixture as a network."""

    def __init__(self, mixture, method):
        super().__init__()
        self.mixture, self.method = mixture, method

    def forward(self, x, labels):
        return getattr(self.mixture, self.method)(x, labels)


@pytest.mark.parametrize(
    "kind, method, labeled",
    [
        ("diag", "predict_proba", False),
        ("full", "score_samples", True),
        ("tied", "predict", False),
    ],
)
def test_mixtures_compile_and_export_with_any_batch_size(kind, method, labeled):
    torch._dynamo.reset()
    x, labels, _, _ = blobs(spread=1.0)
    network = Called(GaussianMixture(num_components=2, num_classes=3, covariance_type=kind).fit(x, labels), method)
    labels = labels if labeled else None
    some = (x[:8], labels[:8] if labeled else None)
    rows = {0: torch.export.Dim("rows")}
    exported = torch.export.export(network, some, dynamic_shapes=(rows, rows if labeled else None)).module()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    for traced in (exported, compiled):
        torch.testing.assert_close(traced(x, labels), network(x, labels))


@pytest.mark.parametrize("build", [GaussianMixture, KMeans])
@pytest.mark.parametrize("sign", [1, -1])
def test_integers_that_no_float_holds_are_refused_by_name(build, sign):
    count = {"num_clusters": 2} if build is KMeans else {"num_components": 2}
    with pytest.raises(ValueError, match="tol must be finite and not negative, got "):
        build(**count, tol=sign * 10**400)
    with pytest.raises(
        ValueError, match=f"max_iter must be at {'most 9223372036854775807' if sign > 0 else 'least 1'}, got"
    ):
        build(**count, max_iter=sign * 10**400)
