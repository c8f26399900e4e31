"""Random calls of the operations against their float64 definitions, in every layout, type and implementation.

An error may be three times that of the definition in the same type: some inputs lose digits in any order of computation.
"""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import definitions
from support.definitions import Mixture
from support.fuzzing import INTERPRETED, Case, cases, laid_out, quick, thorough, threads, using
from torch import Tensor

from cem_fast import CEMLoss, functional

RELATIVE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def close(got: Tensor, truth: Tensor, *rounded: Tensor, magnitude: float = 0.0, terms: int = 1) -> bool:
    """Whether a result is as accurate as its type allows.

    ``rounded`` are results that rounding may give; ``magnitude`` is that of terms that may cancel; ``terms`` are summed one by one.
    """
    if got.shape != truth.shape or not bool(got.isfinite().all()):
        return False
    error, *natural = (float((value.double() - truth).norm()) for value in (got, *rounded))
    size = float(truth.norm()) + magnitude * truth.numel() ** 0.5
    relative = RELATIVE[got.dtype] + terms * torch.finfo(torch.promote_types(got.dtype, torch.float32)).eps / 2
    return error <= 3 * max(natural) + relative * size + torch.finfo(got.dtype).tiny * truth.numel() ** 0.5


def computed(case: Case, function, *leaves: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of a function and gradients of its first output, checked to have the same bits on two threads."""

    def run() -> tuple[list[Tensor], list[Tensor]]:
        inputs = [leaf.detach().requires_grad_() for leaf in leaves]
        outputs = [output for output in function(*inputs) if output is not None]
        weight = torch.linspace(-1, 2, outputs[0].numel(), dtype=outputs[0].dtype).view_as(outputs[0])
        return outputs, list(torch.autograd.grad((outputs[0] * weight).sum(), inputs))

    with using(case.implementation):
        found = run()
        if case.implementation not in ("reference", "triton"):
            with threads(2):
                again = run()
            assert all(map(torch.equal, chain(*found), chain(*again))), "other bits on two threads"
    return [output.detach() for output in found[0]], found[1]


def defined(function, leaves: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients by a definition in one type."""
    inputs = [leaf.detach().to(dtype, copy=True).contiguous().requires_grad_() for leaf in leaves]
    value = function(*inputs) + 0 * sum(each.sum() for each in inputs)  # on the graph of every input
    weight = torch.linspace(-1, 2, value.numel(), dtype=dtype).view_as(value)
    return value.detach(), list(torch.autograd.grad((value * weight).sum(), inputs))


def log_prob(case: Case) -> None:
    leaves = case.x, case.means, case.variances, case.weights
    (value,), gradients = computed(
        case, lambda *inputs: (functional.mixture_log_prob(*inputs, labels=case.labels),), *leaves
    )

    def definition(x, means, variances, weights):
        return definitions.log_prob(x, Mixture(means, variances, weights), case.classes)

    truth, eager = (defined(definition, leaves, dtype) for dtype in (torch.float64, case.means.dtype))
    # one rounding of a variance has the same sign in all dimensions; those of its quotients cancel
    moved = 1 + torch.finfo(case.means.dtype).eps * torch.linspace(-1, 1, case.shape[3], dtype=torch.float64)
    other = case.variances.double() * moved.view(-1, *[1] * (case.variances.dim() - 2))
    other = defined(definition, (case.x, case.means, other, case.weights), torch.float64)
    assert value.dtype == case.means.dtype
    assert close(value, truth[0], eager[0], other[0], magnitude=case.shape[1] + 1, terms=max(case.shape))
    used = case.weights > 0  # of the others, the definition has no gradient
    for name, leaf, got, right, *rounded in zip(
        ("x", "means", "variances", "weights"), leaves, gradients, truth[1], eager[1], other[1]
    ):
        assert got.dtype == leaf.dtype, name
        if name == "weights":
            assert bool((got[~used] == 0).all())
            got, right, rounded = got[used], right[used], [value[used] for value in rounded]
        right = right.nan_to_num(0.0) if name == "weights" else right
        assert close(got, right, *rounded, terms=max(case.shape)), f"gradient of {name}"


def statistics(case: Case, posterior: bool, per_dimension: bool) -> None:
    extra = {"variances": case.variances, "weights": case.weights, "assignment": "posterior"} if posterior else {}

    def run(x):
        found = functional.component_statistics(
            x, case.means, case.labels, per_dimension=per_dimension, sums=True, **extra
        )
        return found.scatter, found.counts, found.assignment, found.sums

    (scatter, counts, assignment, sums), (dx,) = computed(case, run, case.x)
    means, variances, weights = (value.double() for value in (case.means, case.variances, case.weights))
    x, classes, (_, _, C, K) = case.x.double(), case.classes, case.shape
    assert bool(((assignment >= 0) & (assignment < K)).all())
    _best(case, assignment, means, variances, weights, posterior)
    member = torch.nn.functional.one_hot(classes * K + assignment, C * K).view(-1, C, K)
    assert torch.equal(counts.double(), member.sum(0).double())

    def definition(x, means, member):
        full = torch.einsum("nck,nckd->ckd", member, (x[:, None, None] - means).square())
        return full if per_dimension else full.sum(-1)

    truth, eager = (
        defined(lambda rows, t=t: definition(rows, case.means.to(t), member.to(t)), (case.x,), t)
        for t in (torch.float64, case.means.dtype)
    )
    terms = max(case.shape)
    assert close(scatter, truth[0], eager[0], terms=terms)
    assert close(dx, truth[1][0], eager[1][0])
    assert dx.dtype == case.x.dtype
    totals, summed = (torch.einsum("nck,nd->ckd", member.to(t), x.to(t)) for t in (torch.float64, case.means.dtype))
    # sums of deviations, to which the means are added as often as there are rows
    deviations = torch.einsum("nck,nckd->ckd", member.double(), (x[:, None, None] - means).abs())
    assert close(sums, totals, summed, magnitude=float(deviations.norm()) / deviations.numel() ** 0.5, terms=terms)


def _best(case: Case, assignment: Tensor, means: Tensor, variances: Tensor, weights: Tensor, posterior: bool) -> None:
    """Requires the best component of every row up to rounding, and of identical ones the first."""
    if not len(assignment):
        return
    x, classes = case.x.double(), case.classes
    square = (x[:, None] - means[classes]).square()
    if posterior:
        v = variances if variances.dim() == 3 else variances.unsqueeze(-1).expand_as(means)
        exponent = (square / v[classes]).sum(-1)
        cost = 0.5 * (exponent + torch.log(v[classes]).sum(-1)) - torch.log(weights[classes])
        slack = 1e-3 + 1e-4 * exponent.amin(1)
    else:
        cost = square.sum(-1)
        slack = 1e-3 * cost.amin(1)
    if case.means.dtype == torch.float64:
        slack = 1e-6 * slack
    chosen = cost.gather(1, assignment[:, None])[:, 0]
    assert bool((chosen <= cost.amin(1) + slack).all()), "not the best component"
    own = means[classes, assignment][:, None] == means[classes]
    same = own.all(-1)
    if posterior:
        v = variances.flatten(2) if variances.dim() == 3 else variances.unsqueeze(-1)
        same &= (v[classes, assignment][:, None] == v[classes]).all(-1)
        same &= weights[classes, assignment][:, None] == weights[classes]
    assert torch.equal(same.int().argmax(1), assignment), "a tie did not go to the lowest component"


def bound(case: Case, options: dict, through_loss: bool) -> None:
    N, D, C, K = case.shape
    official = options["variant"] == "official"
    variances = case.variances.reshape(C, K, -1)[:, :, 0].contiguous() if official else case.variances
    prior = case.uniform(C) + 0.1
    prior = (prior / prior.sum()).to(case.means.dtype)
    spread = float(variances.double().mean())
    noise = spread * (0.1 + case.uniform(1 if official or options.pop("scalar_noise") else D))
    options.pop("scalar_noise", None)
    total = torch.tensor(options.pop("ratio") * (N + 0.37) + 0.63, dtype=torch.float64)
    with using(case.implementation):
        chosen = functional.component_statistics(case.x, case.means, case.labels).assignment

    if through_loss:
        loss = CEMLoss(
            num_classes=C,
            num_components=K,
            noise_std=noise.sqrt() if len(noise) > 1 else float(noise.sqrt()),
            covariance_type="diag" if variances.dim() == 3 else "spherical",
            **options,
        ).to(case.means.dtype)
        loss.load_mixture(means=case.means, variances=variances, weights=case.weights, class_prior=prior, num_samples=1)
        loss.num_samples.copy_(total)
        noise, prior = loss.noise_variance, loss.mixture.class_prior

        def run(x):
            maps = laid_out(x.view(N, D, 1, 1), "contiguous").contiguous(memory_format=torch.channels_last)
            return (loss(maps if case.seed % 2 else x, case.labels),)
    else:

        def run(x):
            fixed = {"num_samples": total, "noise_variance": noise}
            return (
                functional.conditional_entropy_bound(
                    x, case.means, variances, case.weights, prior, case.labels, **fixed, **options
                ),
            )

    (value,), (dx,) = computed(case, run, case.x)
    scale = 1 / D if options["reduction"] == "mean" and not official else 1.0

    def definition(x):
        t = x.dtype
        mixture = Mixture(case.means, variances, case.weights).to(t)
        if official:
            terms = {"threshold": options["threshold"], "gamma": options["gamma"]}
            return definitions.official_hinge(
                x, case.classes, mixture, float(total), noise.to(t), chosen=chosen, **terms
            )
        unbiased = options["gradient"] == "unbiased"
        return scale * definitions.paper_bound(
            x,
            case.classes,
            mixture,
            prior.to(t),
            float(total),
            noise.to(t),
            boost=options["boost"],
            unbiased=unbiased,
            chosen=chosen,
        )

    truth, eager = (defined(definition, (case.x,), t) for t in (torch.float64, case.means.dtype))
    assert value.dtype == case.means.dtype
    assert dx.dtype == case.x.dtype
    assert close(value, truth[0], eager[0], magnitude=1.0, terms=max(case.shape))
    assert close(dx, truth[1][0], eager[1][0], terms=max(case.shape))


def bound_options() -> st.SearchStrategy[dict]:
    paper = {
        "variant": st.just("paper"),
        "gradient": st.sampled_from(("unbiased", "literal")),
        "reduction": st.sampled_from(("mean", "sum")),
        "boost": st.sampled_from((1.0, 1.7, 10.0)),
        "scalar_noise": st.booleans(),
    }
    official = {
        "variant": st.just("official"),
        "gradient": st.sampled_from(("unbiased", "literal")),
        "reduction": st.just("mean"),
        "threshold": st.sampled_from((0.125, 2.0)),
        "gamma": st.sampled_from((0.01, 1e-4)),
    }
    ratio = {"ratio": st.sampled_from((0.5, 1.0, 3.0, 100.0))}
    return st.fixed_dictionaries(paper | ratio) | st.fixed_dictionaries(official | ratio)


@quick(700)
@given(cases())
def test_log_likelihoods_and_their_gradients(case):
    log_prob(case)


@quick(650)
@given(cases(), st.booleans(), st.booleans())
def test_statistics_and_ties(case, posterior, per_dimension):
    statistics(case, posterior, per_dimension)


@quick(600)
@given(cases(), bound_options(), st.booleans())
def test_the_bound_and_the_loss(case, options, through_loss):
    bound(case, dict(options), through_loss)


@pytest.mark.long
@pytest.mark.timeout(7200)
@thorough(17_000)
@given(cases())
def test_other_log_likelihoods_and_their_gradients(case):
    log_prob(case)


@pytest.mark.long
@pytest.mark.timeout(7200)
@thorough(16_000)
@given(cases(), st.booleans(), st.booleans())
def test_other_statistics_and_ties(case, posterior, per_dimension):
    statistics(case, posterior, per_dimension)


@pytest.mark.long
@pytest.mark.timeout(7200)
@thorough(16_000)
@given(cases(), bound_options(), st.booleans())
def test_other_bounds_and_losses(case, options, through_loss):
    bound(case, dict(options), through_loss)


@pytest.mark.skipif(INTERPRETED, reason="tests the fuzzer")
def test_a_wrong_result_is_found():
    truth = torch.ones(10, dtype=torch.float64)
    assert close(truth.float(), truth, truth.float())
    assert not close(truth.float() * 1.0001, truth, truth.float())
    assert not close(truth.float() * float("nan"), truth, truth.float())
