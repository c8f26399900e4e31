"""The theorems against closed forms and Monte Carlo."""

import math

import pytest
import torch
from support.definitions import Mixture, log_prob

from cem_fast import GaussianMixture, bounds


def gaussian_channel(encoder, prior_std, noise_std, draws=200_000):
    """z = A x + noise with x ~ N(0, prior_std^2 I): exact I(x; z), H(x|z), and the error of the posterior mean."""
    D, d = encoder.shape
    g = torch.Generator().manual_seed(0)
    gram = torch.eye(D).double() + prior_std**2 / noise_std**2 * encoder @ encoder.T
    information = 0.5 * torch.logdet(gram)
    entropy = 0.5 * d * math.log(2 * math.pi * math.e * prior_std**2)
    x = prior_std * torch.randn(draws, d, generator=g, dtype=torch.float64)
    z = x @ encoder.T + noise_std * torch.randn(draws, D, generator=g, dtype=torch.float64)
    posterior_precision = torch.eye(d).double() / prior_std**2 + encoder.T @ encoder / noise_std**2
    estimate = z @ encoder @ torch.linalg.inv(posterior_precision) / noise_std**2
    return information, entropy - information, (x - estimate).square().mean()


def test_theorem_1_is_attained_by_a_scaled_orthogonal_encoder():
    orthogonal = 1.7 * torch.linalg.qr(torch.randn(4, 4).double())[0]
    information, conditional_entropy, error = gaussian_channel(orthogonal, prior_std=0.5, noise_std=0.3)
    bound = bounds.mse_lower_bound(conditional_entropy, 4)
    torch.testing.assert_close(error, bound, rtol=5e-3, atol=0)
    torch.testing.assert_close(bounds.relative_mse_floor(information, 4), bound / 0.5**2)


def test_theorem_1_is_strict_for_a_general_linear_encoder():
    encoder = torch.diag(torch.tensor([3.0, 1.0, 0.2, 0.05])).double()
    _, conditional_entropy, error = gaussian_channel(encoder, prior_std=0.5, noise_std=0.3)
    assert error > 1.5 * bounds.mse_lower_bound(conditional_entropy, 4)


@pytest.fixture(params=["spherical", "diag"])
def known_mixture(request):
    g = torch.Generator().manual_seed(3)
    mixture = GaussianMixture(num_components=2, num_classes=3, covariance_type=request.param).double()
    shape = (3, 2, 4) if request.param == "diag" else (3, 2)
    mixture.set_parameters(
        means=torch.randn(3, 2, 4, generator=g, dtype=torch.float64),
        variances=0.02 + 0.3 * torch.rand(*shape, generator=g, dtype=torch.float64),
        weights=torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.3, 0.7]]).double(),
        class_prior=torch.tensor([0.2, 0.5, 0.3]).double(),
    )
    return mixture


def noisy_entropy(mixture, noise_std, draws=100_000):
    """Monte Carlo entropy of the mixture with noise on top, and its standard error."""
    g = torch.Generator().manual_seed(1)
    clean, _ = mixture.sample(draws, generator=g)
    z = clean + noise_std * torch.randn(clean.shape, generator=g, dtype=torch.float64)
    flat = Mixture(
        mixture.means.flatten(0, 1)[None],
        mixture.variances.flatten(0, 1)[None] + noise_std**2,
        (mixture.class_prior[:, None] * mixture.weights).reshape(1, -1),
    )
    surprise = -log_prob(z, flat, torch.zeros(draws, dtype=torch.long))
    return surprise.mean(), surprise.std() / math.sqrt(draws)


@pytest.mark.parametrize("noise_std", [0.05, 0.5])
def test_huber_bound_lies_above_the_true_entropy(known_mixture, noise_std):
    entropy, se = noisy_entropy(known_mixture, noise_std)
    bound = bounds.entropy_upper_bound(known_mixture, noise_std)
    assert bound > entropy - 3 * se
    assert bound < entropy + 2  # tight to the entropy of six weights, so it is no vacuous bound
    noise_entropy = 4 * 0.5 * math.log(2 * math.pi * math.e * noise_std**2)
    torch.testing.assert_close(bounds.plugin_information(known_mixture, noise_std), bound - noise_entropy)


@pytest.mark.parametrize("noise_std", [0.05, 0.5])
def test_heldout_information_of_the_true_mixture_is_the_information(known_mixture, noise_std):
    entropy, se = noisy_entropy(known_mixture, noise_std)
    information = entropy - 4 * 0.5 * math.log(2 * math.pi * math.e * noise_std**2)
    features, _ = known_mixture.sample(50_000, generator=torch.Generator().manual_seed(9))
    estimate, standard_error = bounds.heldout_information(
        known_mixture, features, noise_std, generator=torch.Generator().manual_seed(2)
    )
    assert abs(estimate - information) < 4 * math.hypot(se, standard_error)
    assert 0 < standard_error < 0.1


def test_heldout_information_of_a_wrong_mixture_is_larger(known_mixture):
    features, _ = known_mixture.sample(20_000, generator=torch.Generator().manual_seed(9))
    right, _ = bounds.heldout_information(known_mixture, features, 0.3)
    wrong, _ = bounds.heldout_information(known_mixture, features + 0.5, 0.3)
    assert wrong > right + 0.5


@pytest.mark.parametrize("noise_std", [0.05, 0.5, torch.tensor([0.1, 0.2, 0.3, 0.9])])
def test_utility_is_the_mean_posterior_of_the_right_component_and_class(known_mixture, noise_std):
    features, component = known_mixture.sample(300, generator=torch.Generator().manual_seed(9))
    labels = component // 2
    found = bounds.utility(known_mixture, features, labels, noise_std, generator=torch.Generator().manual_seed(2))
    noise = torch.randn(features.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    variances = known_mixture.variances.view(3, 2, -1).expand(3, 2, 4) + torch.as_tensor(noise_std).double() ** 2
    of_component = of_class = 0.0
    for clean, z, label in zip(features, features + noise_std * noise, labels.tolist()):
        density = torch.zeros(3, 2, dtype=torch.float64)
        for c in range(3):
            for k in range(2):
                normal = torch.distributions.Normal(known_mixture.means[c, k], variances[c, k].sqrt())
                density[c, k] = normal.log_prob(z).sum().exp()
        joint = known_mixture.class_prior[:, None] * known_mixture.weights * density
        right = int((clean - known_mixture.means[label]).square().sum(1).argmin())
        of_component += joint[label, right] / joint.sum() / 300
        of_class += joint[label].sum() / joint.sum() / 300
    torch.testing.assert_close(found.component, of_component, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.label, of_class, rtol=1e-10, atol=0)


def test_utility_falls_from_certainty_to_the_prior_as_the_noise_grows(known_mixture):
    apart = GaussianMixture(num_components=2, num_classes=3, covariance_type="spherical").double()
    means = 10 * torch.arange(24.0).double().view(3, 2, 4)
    prior, weights = known_mixture.class_prior, known_mixture.weights
    apart.set_parameters(means=means, variances=torch.full((3, 2), 0.01), weights=weights, class_prior=prior)
    labels = torch.tensor([0, 1, 2, 2])
    for noise_std, component, label in ((0.01, 1.0, 1.0), (1e6, (0.1 + 0.45 + 0.09 + 0.21) / 4, (0.2 + 0.5 + 0.6) / 4)):
        found = bounds.utility(apart, means[labels, [0, 0, 0, 1]], labels, noise_std)
        assert found.component.item() == pytest.approx(component, abs=1e-4)
        assert found.label.item() == pytest.approx(label, abs=1e-4)
    absent = torch.tensor([0.4, 0.6, 0.0]).double()
    apart.set_parameters(means=means, variances=torch.full((3, 2), 0.01), weights=weights, class_prior=absent)
    assert bounds.utility(apart, means[2], torch.tensor([2, 2]), 0.5) == (
        0,
        0,
    )  # a class that the mixture does not know
    label_free = GaussianMixture(num_components=3).double().fit(torch.rand(30, 4).double())
    assert bounds.utility(label_free, torch.rand(8, 2, 2), None, 0.1).label == pytest.approx(1)


@pytest.mark.parametrize("count, noise_std, bits", [(64, 0.2, 91), (512, 0.1, 1203)])
def test_the_capacity_of_bounded_features_needs_their_number_and_noise_alone(count, noise_std, bits):
    capacity = bounds.channel_capacity(count, noise_std)
    assert round(float(capacity) / math.log(2)) == bits
    torch.testing.assert_close(bounds.channel_capacity(count, torch.full((count,), noise_std)), capacity)


def test_no_features_in_the_unit_interval_exceed_the_capacity():
    noise_std = torch.tensor([0.1, 0.2, 0.4, 2.0])
    features = torch.rand(2000, 4, generator=torch.Generator().manual_seed(0)).round()  # variance 1/4, the largest
    for kind in (features, 0.5 * features, features.roll(1, 0) * features):
        mixture = GaussianMixture(num_components=1, covariance_type="diag", reg_covar=0.0).fit(kind)
        assert (
            float(bounds.plugin_information(mixture, noise_std)) <= float(bounds.channel_capacity(4, noise_std)) + 1e-3
        )
    each = [float(bounds.channel_capacity(1, float(std))) for std in noise_std]
    assert float(bounds.channel_capacity(4, noise_std)) == pytest.approx(sum(each))


@pytest.mark.parametrize(
    "count, noise_std, message",
    [
        (0, 0.1, "num_features must be at least 1, got 0"),
        (4, 0.0, "noise_std must be a positive number"),
        (4, torch.ones(3), r"noise_std must be a number or have shape \[4\], got \(3,\)"),
    ],
)
def test_bad_capacities(count, noise_std, message):
    with pytest.raises(ValueError, match=message):
        bounds.channel_capacity(count, noise_std)


def test_noise_per_dimension(known_mixture):
    noise = torch.full((4,), 0.3)
    for bound in (bounds.entropy_upper_bound, bounds.plugin_information):
        torch.testing.assert_close(bound(known_mixture, noise), bound(known_mixture, 0.3), rtol=1e-6, atol=0)


def test_bad_input(known_mixture):
    with pytest.raises(RuntimeError, match="not fitted"):
        bounds.plugin_information(GaussianMixture(num_components=2), 0.1)
    with pytest.raises(ValueError, match="noise_std must be a positive number"):
        bounds.plugin_information(known_mixture, 0.0)
    with pytest.raises(ValueError, match=r"noise_std must be a number or have shape \[4\], got \(3,\)"):
        bounds.entropy_upper_bound(known_mixture, torch.ones(3))
    with pytest.raises(ValueError, match="dimension must be at least 1, got 0"):
        bounds.mse_lower_bound(1.0, 0)
    with pytest.raises(ValueError, match=r"N of at least 2, got \(1, 4\)"):
        bounds.heldout_information(known_mixture, torch.zeros(1, 4), 0.1)
    with pytest.raises(ValueError, match=r"N of at least 1, got \(0, 4\)"):
        bounds.utility(known_mixture, torch.zeros(0, 4), torch.zeros(0).long(), 0.1)
    with pytest.raises(ValueError, match="labels may be None only for one class, got a mixture of 3 classes"):
        bounds.utility(known_mixture, torch.zeros(2, 4), None, 0.1)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\), got 3 at index 1"):
        bounds.utility(known_mixture, torch.zeros(2, 4), torch.tensor([0, 3]), 0.1)


def test_the_upper_bound_holds_with_its_confidence_and_says_something():
    generator = torch.Generator().manual_seed(0)
    mixture = GaussianMixture(num_components=1).fit(torch.rand(2000, 1, generator=generator))
    grid = torch.linspace(-3, 4, 20_001, dtype=torch.float64)
    normal = torch.distributions.Normal(0, torch.tensor(0.1, dtype=torch.float64))
    density = normal.cdf(grid) - normal.cdf(grid - 1)  # uniform features with Gaussian noise
    entropy = -torch.trapezoid(torch.xlogy(density, density), grid)
    information = float(entropy - normal.entropy())
    found = [
        float(
            bounds.heldout_upper_bound(
                mixture, torch.rand(500, 1, generator=generator), 0.1, radius=1.0, delta=0.2, generator=generator
            )
        )
        for _ in range(100)
    ]
    assert sum(bound >= information for bound in found) >= 80
    assert max(found) < information + 0.5
    tighter = bounds.heldout_upper_bound(
        mixture, torch.rand(50_000, 1, generator=generator), 0.1, radius=1.0, generator=generator
    )
    assert information <= tighter < information + 0.1  # of which 0.04 is the mixture's misfit


def test_an_outlier_beyond_the_radius_is_refused():
    mixture = GaussianMixture(num_components=1).fit(torch.rand(50, 2))
    with pytest.raises(ValueError, match="within the radius 0.1 of the center"):
        bounds.heldout_upper_bound(mixture, torch.rand(50, 2), 0.1, radius=0.1)
    with pytest.raises(ValueError, match="delta and share must lie between 0 and 1"):
        bounds.heldout_upper_bound(mixture, torch.rand(50, 2), 0.1, radius=2.0, delta=0.0)


def test_several_releases_have_the_noise_of_their_mean(known_mixture):
    features, components = known_mixture.sample(50, generator=torch.Generator().manual_seed(0))
    labels = components // 2
    for measure in (
        bounds.plugin_information,
        bounds.entropy_upper_bound,
        lambda mixture, *noise, **more: bounds.channel_capacity(4, *noise, **more),
        lambda mixture, *noise, **more: bounds.heldout_information(
            mixture, features, *noise, generator=torch.Generator().manual_seed(0), **more
        )[0],
        lambda mixture, *noise, **more: (
            bounds.utility(mixture, features, labels, *noise, generator=torch.Generator().manual_seed(0), **more).label
        ),
        lambda mixture, *noise, **more: bounds.heldout_upper_bound(
            mixture, features, *noise, radius=99.0, generator=torch.Generator().manual_seed(0), **more
        ),
    ):
        torch.testing.assert_close(measure(known_mixture, 0.4, releases=4), measure(known_mixture, 0.2))


def test_fisher_information_of_a_linear_release_is_its_trace():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    images = torch.rand(400, 1, 3, 3, generator=generator, dtype=torch.float64)
    noise = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=torch.float64)
    found = bounds.fisher_information(
        lambda x: x.flatten(1) @ weights.T, images, noise, releases=2, draws=50, generator=generator
    )
    expected = 2 * (weights / noise[:, None]).square().sum() / 9
    assert found.shape == (400,)
    torch.testing.assert_close(found.mean(), expected, rtol=0.02, atol=0)
    assert not images.requires_grad
    with pytest.raises(ValueError, match="encoder must be differentiable"):
        bounds.fisher_information(lambda x: x.detach().flatten(1), images, 0.1)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda m, x: bounds.heldout_information(m, x.tolist(), 0.1),
            TypeError,
            "features must be a tensor .* got list",
        ),
        (
            lambda m, x: bounds.heldout_information(m, x.long(), 0.1),
            TypeError,
            "features must be a floating-point tensor",
        ),
        (
            lambda m, x: bounds.heldout_information(m, x[0], 0.1),
            ValueError,
            r"features must have shape \[N, ...\] .* \(4,\)",
        ),
        (
            lambda m, x: bounds.utility(m, x[:, :3], None, 0.1),
            ValueError,
            r"features must have shape .* D = 4 .* \(20, 3\)",
        ),
        (
            lambda m, x: bounds.plugin_information(None, 0.1),
            TypeError,
            "mixture must be a GaussianMixture, got NoneType",
        ),
        (
            lambda m, x: bounds.plugin_information(
                GaussianMixture(num_components=1, covariance_type="full").fit(x), 0.1
            ),
            ValueError,
            "mixture must have spherical or diag covariances, got 'full'",
        ),
        (lambda m, x: bounds.relative_mse_floor(1.0, 2.5), TypeError, "dimension must be an integer .* got 2.5"),
        (lambda m, x: bounds.channel_capacity("8", 0.1), TypeError, "num_features must be an integer .* got '8'"),
        (lambda m, x: bounds.plugin_information(m, math.inf), ValueError, "noise_std must be a positive number .* inf"),
    ],
)
def test_an_error_names_the_wrong_argument(call, error, message):
    x = torch.rand(20, 4)
    with pytest.raises(error, match=message):
        call(GaussianMixture(num_components=1).fit(x), x)
