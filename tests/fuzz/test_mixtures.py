"""Random sequences of calls on one GaussianMixture: fits, more rows, bad rows, copies, files; its densities after each."""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.fuzzing import IMPLEMENTATIONS, INTERPRETED, LAYOUTS, laid_out, quick, thorough, using
from torch import Tensor

from cem_fast import GaussianMixture

SIZES = st.integers(1, 40)
SEEDS = st.integers(0, 2**32 - 1)
NAN, INF = float("nan"), float("inf")


def log_joint(x: Tensor, mixture: GaussianMixture, labels: Tensor) -> Tensor:
    """``log w_k N(x; mu_k, Sigma_k)`` of each row's class ``[N, K]``, by matrices of D x D, float64."""
    means, weights = mixture.means.double(), mixture.weights.double()
    C, K, D = means.shape
    spread, eye = mixture.spread.double(), torch.eye(D, dtype=torch.float64)
    if mixture.covariance_type == "tied":
        matrices = spread.unsqueeze(1).expand(C, K, D, D)
    elif mixture.covariance_type == "full":
        matrices = spread
    else:
        matrices = spread.reshape(C, K, -1, 1) * eye
    deviation = x.double()[:, None] - means[labels]
    exponent = torch.einsum("nkd,nkde,nke->nk", deviation, torch.linalg.inv(matrices)[labels], deviation)
    constant = weights.log() - 0.5 * torch.logdet(2 * math.pi * matrices)
    return constant[labels] - 0.5 * exponent


class Mixtures(RuleBasedStateMachine):
    """One mixture, and all rows that it stands for."""

    @initialize(
        components=st.integers(1, 4),
        classes=st.integers(1, 3),
        kind=st.sampled_from(("spherical", "diag", "tied", "full")),
        kmeans=st.booleans(),
        dtype=st.sampled_from((torch.float32, torch.float64)),
        dimension=st.integers(1, 9),
        implementation=st.sampled_from(IMPLEMENTATIONS),
    )
    def declare(self, components, classes, kind, kmeans, dtype, dimension, implementation):
        self.matrices = kind in ("tied", "full")
        self.settings = {
            "num_components": components,
            "num_classes": classes,
            "covariance_type": kind,
            "algorithm": "kmeans" if kmeans and not self.matrices else "em",
            "reg_covar": 1e-3,
            "max_iter": 5,
        }
        self.mixture = GaussianMixture(**self.settings)
        self.dtype, self.dimension, self.implementation = dtype, dimension, implementation
        self.seen: list[tuple[Tensor, Tensor]] = []

    def rows(self, number: int, seed: int, layout: str = "contiguous") -> tuple[Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(number, self.dimension, generator=generator, dtype=torch.float64).to(self.dtype)
        labels = torch.randint(0, self.settings["num_classes"], (number,), generator=generator)
        return laid_out(x + labels[:, None], layout), labels if self.settings["num_classes"] > 1 else None

    def call(self, method: str, *arguments) -> None:
        with warnings.catch_warnings(), using(self.implementation):
            warnings.simplefilter("ignore")  # of fewer rows than components
            getattr(self.mixture, method)(*arguments)

    def remember(self, x: Tensor, labels: Tensor | None, *, fresh: bool = False) -> None:
        self.seen = ([] if fresh else self.seen) + [
            (x, torch.zeros(len(x), dtype=torch.int64) if labels is None else labels)
        ]

    @rule(number=SIZES, seed=SEEDS, layout=st.sampled_from(LAYOUTS))
    def fit(self, number, seed, layout):
        x, labels = self.rows(number, seed, layout)
        self.call("fit", x, labels)
        self.remember(x, labels, fresh=True)
        assert self.mixture.num_rows_ == number

    @precondition(lambda self: not self.matrices)
    @rule(number=SIZES, seed=SEEDS)
    def partial_fit(self, number, seed):
        x, labels = self.rows(number, seed)
        self.call("partial_fit", x, labels)
        self.remember(x, labels)

    @precondition(lambda self: self.mixture.is_fitted and not self.matrices)
    @rule(number=SIZES, seed=SEEDS)
    def step(self, number, seed):
        x, labels = self.rows(number, seed)
        for rows in torch.arange(number).split(7):
            self.call("gather", x[rows], None if labels is None else labels[rows])
        self.call("step")
        self.remember(x, labels, fresh=True)

    @rule(fault=st.sampled_from(("nan", "infinity", "width", "labels", "length", "dtype", "none")), seed=SEEDS)
    def refuse(self, fault, seed):
        x, labels = self.rows(6, seed)
        before = copy.deepcopy(self.mixture.state_dict())
        labels = torch.zeros(6, dtype=torch.int64) if labels is None else labels
        if fault in ("nan", "infinity"):
            x[3, 0] = NAN if fault == "nan" else INF
        x = {"width": x[:, :0], "dtype": x.long(), "none": x[:0]}.get(fault, x)
        labels = {"labels": labels - 9, "length": labels[:5], "none": labels[:0]}.get(fault, labels)
        for method in (
            ("fit",) if self.matrices or not self.mixture.is_fitted or fault == "none" else ("fit", "partial_fit")
        ):
            with pytest.raises((ValueError, TypeError)):
                self.call(method, x, labels)
            after = self.mixture.state_dict()
            assert before.keys() == after.keys()
            assert all(torch.equal(before[key], after[key]) for key in before), f"{method} changed the mixture"

    @rule(how=st.sampled_from(("file", "state", "deepcopy", "half")))
    def replace(self, how):
        before = copy.deepcopy(self.mixture.state_dict())
        if how == "file":
            with tempfile.TemporaryDirectory() as folder:
                self.mixture.save(Path(folder) / "mixture")
                self.mixture = GaussianMixture.load(Path(folder) / "mixture")
        elif how == "state":
            other = GaussianMixture(**self.settings).to(self.mixture.means.dtype)
            other.load_state_dict(before)
            other.num_rows_ = self.mixture.num_rows_
            self.mixture = other
        elif how == "deepcopy":
            self.mixture = copy.deepcopy(self.mixture)
        else:
            self.mixture.half().bfloat16()
        after = self.mixture.state_dict()
        assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)

    @invariant()
    def parameters_are_those_of_a_mixture(self):
        mixture = getattr(self, "mixture", None)
        if mixture is None or not mixture.is_fitted:
            return
        assert all(bool(value.isfinite().all()) for value in mixture.state_dict().values() if value.is_floating_point())
        assert abs(float(mixture.class_prior.sum()) - 1) < 1e-5
        present = mixture.class_prior > 0
        assert bool(((mixture.weights[present].sum(1) - 1).abs() < 1e-5).all())
        assert bool((mixture.weights >= 0).all())
        assert abs(float(mixture.counts.sum()) - mixture.num_rows_) < 1e-3 * (1 + mixture.num_rows_)
        if not self.matrices:
            assert bool((mixture.variances >= 0.99e-3).all())
        if self.seen and self.settings["num_components"] == 1:
            x, labels = (torch.cat(parts) for parts in zip(*self.seen))
            for c in range(self.settings["num_classes"]):
                rows = x[labels == c].double()
                if len(rows):
                    assert torch.allclose(mixture.means[c, 0].double(), rows.mean(0), atol=1e-4), (
                        "mean of one component"
                    )

    @invariant()
    def densities_are_those_of_the_parameters(self):
        mixture = getattr(self, "mixture", None)
        if mixture is None or not mixture.is_fitted:
            return
        x, labels = self.rows(5, 1)
        x = x.to(mixture.means.dtype)
        classes = torch.zeros(5, dtype=torch.int64) if labels is None else labels
        present = mixture.class_prior[classes] > 0
        joint = log_joint(x, mixture, classes)
        scale = 1e-3 if mixture.means.dtype == torch.float32 else 1e-7
        with using(self.implementation):
            scores, proba, chosen = (
                method(x, labels) for method in (mixture.score_samples, mixture.predict_proba, mixture.predict)
            )
        truth = joint.logsumexp(1)
        assert bool(((scores.double() - truth).abs() <= scale * (1 + truth.abs()))[present].all())
        slack = scale * (1 + joint.abs().nan_to_num(posinf=0).amax(1))  # of the exponents
        assert bool(((proba.double() - joint.softmax(1)).abs() <= slack[:, None])[present].all())
        if mixture.algorithm == "em":
            assert bool((joint.gather(1, chosen[:, None])[:, 0] >= joint.amax(1) - slack)[present].all())


def test_a_mixture_stays_sound_through_any_sequence_of_calls():
    run_state_machine_as_test(Mixtures, settings=settings(quick(50), stateful_step_count=12))


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.skipif(INTERPRETED, reason="fits take minutes in the interpreter")
def test_a_mixture_stays_sound_through_other_sequences_of_calls():
    run_state_machine_as_test(Mixtures, settings=settings(thorough(1000), stateful_step_count=20))
