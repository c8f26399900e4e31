"""Everyone whom a user might take instead, one small adapter each: what it computes, on the inputs of a problem.

An adapter prepares what a user would prepare once (parameters in its own layout) and returns what is timed. It raises
``ImportError`` where its package is missing and ``Skipped`` where the case is beyond it; whatever else it raises is its failure.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.compiler.config
from cem_fast.benchmarks import released
from cem_fast.benchmarks.cases import FITS, ITERATIONS, NOISE_STD, OPERATIONS, REG_COVAR, Case, Problem, start_of_em
from torch import Tensor

from cem_fast import CEMLoss, GaussianMixture
from cem_fast import functional as F
from cem_fast.ops import backend

OURS = "cem_fast"
LARGEST_BYTES = 1 << 30  # of an N x K x D intermediate
LARGEST_KEOPS = 128
PADDING = 16  # components that matrix products are padded to

# Features and labels to a scalar, or to one number a row.
Function = Callable[[Tensor, Tensor | None], Tensor]


class Skipped(Exception):
    """The case is beyond what a peer can do, with the reason."""


class Differentiable:
    """A function of the features: timed forward, backward and both; its results are the value and the gradient."""

    def __init__(self, problem: Problem, function: Function, *, differentiable: bool = True):
        self.problem, self.function, self.differentiable = problem, function, differentiable
        self.directions = ("forward", "backward", "both") if differentiable else ("forward",)
        self.output: Tensor | None = None

    def prepare(self, direction: str) -> Callable[[int], None]:
        def before(buffers: int) -> None:
            self.output = self.problem.leaves[buffers].grad = None
            if direction == "backward":
                self.forward(buffers)

        return before

    def call(self, direction: str) -> Callable[[int], None]:
        return {"forward": self.forward, "backward": self.backward, "both": self.both}[direction]

    def forward(self, buffers: int) -> None:
        rows = self.problem.leaves[buffers]
        self.output = self.function(rows if self.differentiable else rows.detach(), self.problem.sets[buffers][1])

    def backward(self, _: int) -> None:
        assert self.output is not None
        self.output.backward(self.problem.upstream.to(self.output.dtype))

    def both(self, buffers: int) -> None:
        self.forward(buffers)
        self.backward(buffers)

    def results(self) -> dict[str, Tensor]:
        """Of the last call, which was for the first buffers."""
        assert self.output is not None
        found = {"value": self.output.detach().reshape(self.problem.truth["value"].shape)}
        gradient = self.problem.leaves[0].grad
        return found if gradient is None else found | {"gradient": gradient}


class Operators:
    """The operators themselves, without Python's autograd about them: what one set of kernels takes."""

    directions = ("forward", "backward", "both")

    def __init__(self, problem: Problem, operators: dict[str, Callable[..., Any]]):
        self.problem, self.operators = problem, operators
        self.kept: tuple[Tensor, ...] = ()
        self.gradient: Tensor | None = None

    def prepare(self, direction: str) -> Callable[[int], None]:
        return self.forward if direction == "backward" else lambda _: None

    def call(self, direction: str) -> Callable[[int], None]:
        return {"forward": self.forward, "backward": self.backward, "both": self.both}[direction]

    def forward(self, buffers: int) -> None:
        p, (x, labels) = self.problem, self.problem.sets[buffers]
        if p.case.op == "mixture_log_prob":
            self.kept = self.operators["mixture_log_prob_fwd"](
                x, p.means, p.variances, p.weights, labels, p.case.K <= 64
            )
        elif p.case.op == "component_statistics":
            self.kept = self.operators["component_statistics_fwd"](x, p.means, labels, None, None, False, False)
        else:
            priors = (p.variances, p.weights, p.class_prior, p.num_samples, p.noise_variance)
            self.kept = self.operators["cem_fwd"](x, p.means, labels, *priors, *p.bound_options)

    def backward(self, buffers: int) -> None:
        p, (x, labels) = self.problem, self.problem.sets[buffers]
        if p.case.op == "mixture_log_prob":
            mixture = (p.means, p.variances, p.weights, labels)
            self.gradient = self.operators["mixture_log_prob_bwd"](p.upstream, x, *mixture, *self.kept)
            return
        slope, assignment = (p.upstream, self.kept[3]) if len(self.kept) == 4 else self.kept[1:]
        self.gradient = self.operators["component_statistics_bwd"](slope, None, x, p.means, labels, assignment)

    def both(self, buffers: int) -> None:
        self.forward(buffers)
        self.backward(buffers)

    def results(self) -> dict[str, Tensor]:
        value = self.kept[1] if self.problem.case.op == "component_statistics" else self.kept[0]
        return {"value": value} | ({} if self.gradient is None else {"gradient": self.gradient})


class Fit:
    """A fit from the given start; its results are the parameters, which come out of it in any array type."""

    directions = ("fit",)

    def __init__(self, problem: Problem, fit: Callable[[], Any], parameters: Callable[[Any], Sequence[Any]]):
        self.problem, self.fit, self.parameters = problem, fit, parameters
        self.fitted: Any = None

    def prepare(self, _: str) -> Callable[[int], None]:
        return lambda _: None

    def call(self, _: str) -> Callable[[int], None]:
        return self.run

    def run(self, _: int) -> None:
        self.fitted = self.fit()

    def results(self) -> dict[str, Tensor]:
        p = self.problem
        shapes = (p.start.shape, p.start.shape, p.weights.shape)
        given = zip(("means", "variances", "weights"), self.parameters(self.fitted), shapes)
        return {name: torch.as_tensor(t).reshape(shape) for name, t, shape in given}


Built = Differentiable | Operators | Fit


@dataclass(frozen=True)
class Peer:
    """One contender.

    Args:
        name: what the tables call it.
        build: the adapter.
        operations: the operations it offers.
        package: the distribution whose version it is; None for torch's own.
        settles: whether threads of its own go on spinning after a call.
        devices: where it runs.
    """

    name: str
    build: Callable[[Problem], Built]
    operations: tuple[str, ...]
    package: str | None = None
    settles: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")


# ---- ours


def ours(problem: Problem) -> Built:
    case = problem.case
    if case.op in FITS:
        return _our_fit(problem)
    if case.op == "mixture_log_prob":
        mixture = (problem.means, problem.variances, problem.weights)
        return Differentiable(problem, lambda x, labels: F.mixture_log_prob(x, *mixture, labels))
    if case.op == "component_statistics":
        return Differentiable(problem, lambda x, labels: F.component_statistics(x, problem.means, labels).scatter)
    loss = CEMLoss(
        num_classes=case.C,
        num_components=case.K,
        noise_std=NOISE_STD,
        covariance_type=case.covariance,
        variant=case.op.removeprefix("cem_"),
    )
    loss.to(problem.device).load_mixture(
        means=problem.means,
        variances=problem.variances,
        weights=problem.weights,
        class_prior=problem.class_prior,
        num_samples=int(problem.num_samples),
    )
    return Differentiable(problem, loss)


def _our_fit(problem: Problem) -> Fit:
    case, (x, labels) = problem.case, problem.sets[0]
    settings: dict[str, Any] = {
        "num_components": case.K,
        "num_classes": case.C,
        "covariance_type": case.covariance,
        "algorithm": case.op,
        "init": problem.start,
        "max_iter": ITERATIONS,
        "tol": 0.0,
        "reg_covar": REG_COVAR,
    }
    if case.op == "em":
        settings["init_variances"], settings["init_weights"] = start_of_em(problem)
    return Fit(
        problem,
        lambda: GaussianMixture(**settings).fit(x, labels),
        lambda m: (m.means, m.variances, m.weights) if case.op == "em" else (m.means,),
    )


def triton_operators(problem: Problem) -> Built:
    from cem_fast.kernels.operators import OPERATORS

    return Operators(problem, OPERATORS)


def cuda_operators(problem: Problem) -> Built:
    try:
        operators = backend.cuda_operators()
    except OSError as error:
        raise ImportError(str(error)) from error
    return Operators(problem, dict(operators))


# ---- plain torch


def rows_of_class(labels: Tensor | None, x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.int64, device=x.device) if labels is None else labels


def eager_log_prob(x: Tensor, labels: Tensor | None, means: Tensor, variances: Tensor, weights: Tensor) -> Tensor:
    y = rows_of_class(labels, x)
    v = variances if variances.dim() == 3 else variances.unsqueeze(-1).expand_as(means)
    exponent = ((x.to(means.dtype)[:, None] - means[y]).square() / v[y]).sum(-1)
    constant = weights.log() - 0.5 * torch.log(2 * math.pi * v).sum(-1)
    return torch.logsumexp(constant[y] - 0.5 * exponent, 1)


def nearest_directly(x: Tensor, labels: Tensor, means: Tensor) -> Tensor:
    return (x[:, None] - means[labels]).square().sum(-1).argmin(1)


def batch_statistics(
    x: Tensor, labels: Tensor | None, means: Tensor, nearest: Callable[[Tensor, Tensor], Tensor], diag: bool
) -> tuple[Tensor, Tensor]:
    """Counts ``[C, K]`` and scatter ``[C, K]`` or ``[C, K, D]`` about the nearest means, by gather and ``index_add``."""
    C, K, D = means.shape
    x, y = x.to(means.dtype), rows_of_class(labels, x)
    index = y * K + nearest(x.detach(), y)
    square = (x - means.reshape(C * K, D)[index]).square()
    square = square if diag else square.sum(1)
    scatter = square.new_zeros(C * K, *square.shape[1:]).index_add(0, index, square)
    counts = square.new_zeros(C * K).index_add(0, index, square.new_ones(len(x)))
    return counts.view(C, K), scatter.view(C, K, *square.shape[1:])


def paper_bound(counts: Tensor, scatter: Tensor, rows: int, D: int, problem: Problem) -> Tensor:
    """Eq. 5-7 of the paper per feature, with the gradient of a minibatch of Eq. 7."""
    total, s2 = problem.num_samples.to(counts.dtype), problem.noise_variance.to(counts.dtype)
    scatter = scatter.detach() + (total / rows) * (scatter - scatter.detach())
    mass = problem.class_prior[:, None] * problem.weights * (total - rows) + counts
    blend, pi, n = counts / mass, mass / total, counts.clamp_min(1)
    if scatter.dim() == 2:
        v = (1 - blend) * problem.variances + blend * scatter / (n * D)
        entropy = 0.5 * D * torch.log((v + s2) / s2)
    else:
        v = (1 - blend)[..., None] * problem.variances + blend[..., None] * scatter / n[..., None]
        entropy = 0.5 * torch.log((v + s2) / s2).sum(-1)
    return (pi * (entropy - pi.log())).sum() / D


def released_bound(counts: Tensor, scatter: Tensor, D: int, problem: Problem) -> Tensor:
    """The hinge of the released code, vectorized."""
    C, n = len(counts), counts.clamp_min(1)
    blend = released.BOOST * counts / (problem.weights * (problem.num_samples / C).to(counts.dtype))
    blend = torch.where(blend < 1, blend, 0.99)
    v = (1 - blend) * problem.variances + blend * scatter / (n * D)
    floor = math.log(released.THRESHOLD * NOISE_STD**2 + released.GAMMA)
    hinge = torch.relu(torch.log(v + released.GAMMA) - floor) * problem.weights * (counts > 0)
    return hinge.sum() / (counts.sum(1) > 0).sum()


def vectorized(problem: Problem, nearest: Callable[[Tensor, Tensor], Tensor]) -> Function:
    """The operation in plain torch, but for how the nearest means are found."""
    case, means = problem.case, problem.means

    def function(x: Tensor, labels: Tensor | None) -> Tensor:
        counts, scatter = batch_statistics(x, labels, means, nearest, case.diag)
        if case.op == "component_statistics":
            return scatter
        if case.op == "cem_paper":
            return paper_bound(counts, scatter, case.N, case.D, problem)
        return released_bound(counts, scatter, case.D, problem)

    return function


def _eager(problem: Problem) -> Function:
    if problem.case.op == "mixture_log_prob":
        mixture = (problem.means, problem.variances, problem.weights)
        return lambda x, labels: eager_log_prob(x, labels, *mixture)
    return vectorized(problem, lambda x, y: nearest_directly(x, y, problem.means))


def eager(problem: Problem) -> Built:
    _require_memory(problem.case.N, problem)
    return Differentiable(problem, _eager(problem))


def _require_memory(rows: int, problem: Problem) -> None:
    size = 4 * rows * problem.case.K * problem.case.D
    if size > LARGEST_BYTES:
        raise Skipped(f"needs intermediates of {size / 2**30:.1f} GiB")


def compiled(problem: Problem) -> Built:
    torch._dynamo.reset()
    return Differentiable(problem, torch.compile(_eager(problem), dynamic=False))


def by_class(of_class: Sequence[Callable[[Tensor], Tensor]]) -> Function:
    """One function a class, each on the rows of its class: sorted, cut into segments, and put back in order."""

    def function(x: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None:
            return of_class[0](x)
        order = labels.argsort()
        sizes = torch.bincount(labels, minlength=len(of_class)).tolist()
        parts = [each(rows) for each, rows in zip(of_class, x[order].split(sizes)) if len(rows) > 0]
        return torch.cat(parts)[order.argsort()]

    return function


def padded(components: Tensor, value: float = 0.0) -> Tensor:
    """Rows ``[K, ...]`` padded to what matrix products like."""
    extra = -len(components) % PADDING
    return torch.cat([components, components.new_full((extra, *components.shape[1:]), value)])


def segmented_gemm(problem: Problem) -> Built:
    """``(x - mu)^2 / v`` as a product of ``[x^2, x]`` with ``[1 / v, -2 mu / v]``, class by class, about the mean of the means."""
    means = problem.means
    center = means.mean((0, 1))

    def nearest_of(mu: Tensor) -> Callable[[Tensor], Tensor]:
        product, constant = padded(mu - center).T.contiguous(), padded(0.5 * (mu - center).square().sum(1), math.inf)
        return lambda rows: (constant - (rows - center) @ product).argmin(1)

    def log_prob_of(mu: Tensor, v: Tensor, w: Tensor) -> Callable[[Tensor], Tensor]:
        v, mu = v if v.dim() == 2 else v[:, None].expand_as(mu), mu - center
        constant = padded(w.log() - 0.5 * (mu.square() / v + torch.log(2 * math.pi * v)).sum(1), -math.inf)
        squares, products = padded(-0.5 / v).T.contiguous(), padded(mu / v).T.contiguous()

        def log_prob(rows: Tensor) -> Tensor:
            rows = rows.to(mu.dtype) - center
            return torch.logsumexp(rows.square() @ squares + rows @ products + constant, 1)

        return log_prob

    if problem.case.op == "mixture_log_prob":
        function = by_class([log_prob_of(*one) for one in zip(means, problem.variances, problem.weights)])
    else:
        function = vectorized(problem, by_class([nearest_of(mu) for mu in means]))
    return Differentiable(problem, function)


def mixture_same_family(problem: Problem) -> Built:
    from torch import distributions as d

    _require_memory(problem.case.N // problem.case.C, problem)
    v = problem.variances if problem.case.diag else problem.variances.unsqueeze(-1).expand_as(problem.means)
    families = [
        d.MixtureSameFamily(
            d.Categorical(weights, validate_args=False),
            d.Independent(d.Normal(means, scales, validate_args=False), 1, validate_args=False),
            validate_args=False,
        )
        for means, scales, weights in zip(problem.means, v.sqrt(), problem.weights)
    ]
    return Differentiable(problem, by_class([family.log_prob for family in families]))


def released_loop(problem: Problem) -> Built:
    mixture = (problem.means, problem.variances, problem.weights, float(problem.num_samples), NOISE_STD)
    return Differentiable(problem, lambda x, labels: released.loss(x, rows_of_class(labels, x), *mixture))


# ---- other libraries


def pykeops(problem: Problem) -> Built:
    if problem.case.D > LARGEST_KEOPS:
        raise Skipped(f"unrolls its loop over D: compiles for minutes beyond {LARGEST_KEOPS}")
    with contextlib.redirect_stdout(io.StringIO()):  # it says at length what it did not find
        import pykeops as package
        from pykeops.torch import LazyTensor

    package.set_verbose(False)
    v = problem.variances if problem.case.diag else problem.variances.unsqueeze(-1).expand_as(problem.means)

    def log_prob_of(means: Tensor, v: Tensor, weights: Tensor) -> Callable[[Tensor], Tensor]:
        constant = weights.log() - 0.5 * torch.log(2 * math.pi * v).sum(1)
        mu, precision, constant = (
            LazyTensor(means[None]),
            LazyTensor(v.reciprocal()[None]),
            LazyTensor(constant[None, :, None]),
        )

        def log_prob(rows: Tensor) -> Tensor:
            x = LazyTensor(rows[:, None].contiguous())
            return (constant - 0.5 * ((x - mu).square() * precision).sum(-1)).logsumexp(1).squeeze(-1)

        return log_prob

    return Differentiable(problem, by_class([log_prob_of(*one) for one in zip(problem.means, v, problem.weights)]))


def scikit_learn(problem: Problem) -> Built:
    from sklearn.cluster import KMeans
    from sklearn.mixture import GaussianMixture as Mixture

    case = problem.case
    if case.op == "kmeans":
        return _kmeans_by_class(problem, _sklearn_kmeans(KMeans))
    if case.op == "em":
        start, (variances, weights) = problem.start.numpy(), (t.numpy() for t in start_of_em(problem))

        def fit(rows: Tensor, c: int) -> Any:
            return Mixture(
                case.K,
                covariance_type="diag",
                means_init=start[c],
                precisions_init=1 / variances[c],
                weights_init=weights[c],
                max_iter=ITERATIONS,
                tol=0.0,
                reg_covar=REG_COVAR,
            ).fit(rows.numpy())

        return _fit_by_class(problem, fit, lambda m: (m.means_, m.covariances_, m.weights_))
    if not case.diag:
        raise Skipped("its spherical mixtures are not timed")

    def mixture(means: Tensor, variances: Tensor, weights: Tensor) -> Callable[[Tensor], Tensor]:
        m = Mixture(case.K, covariance_type="diag")
        m.means_, m.covariances_, m.weights_ = means.numpy(), variances.numpy(), weights.numpy()
        m.precisions_cholesky_ = 1 / np.sqrt(m.covariances_)
        return lambda rows: torch.from_numpy(m.score_samples(rows.numpy()))

    functions = [mixture(*one) for one in zip(problem.means, problem.variances, problem.weights)]
    return Differentiable(problem, by_class(functions), differentiable=False)


def scikit_learn_intelex(problem: Problem) -> Built:
    from sklearnex.cluster import KMeans

    return _kmeans_by_class(problem, _sklearn_kmeans(KMeans))


def _sklearn_kmeans(kind: Any) -> Callable[[Tensor, Tensor], Any]:
    def fit(rows: Tensor, start: Tensor) -> Any:
        options = {"init": start.numpy(), "n_init": 1, "max_iter": ITERATIONS, "tol": 0.0, "algorithm": "lloyd"}
        return kind(len(start), **options).fit(rows.numpy()).cluster_centers_

    return fit


def faiss(problem: Problem) -> Built:
    import faiss as package

    package.omp_set_num_threads(torch.get_num_threads())

    def fit(rows: Tensor, start: Tensor) -> Any:
        few, many = 1, 1 << 30  # rows a centroid: all rows are used, however many
        k, d = start.shape
        kmeans = package.Kmeans(d, k, niter=ITERATIONS, min_points_per_centroid=few, max_points_per_centroid=many)
        kmeans.train(rows.numpy(), init_centroids=start.numpy())
        return kmeans.centroids

    return _kmeans_by_class(problem, fit)


def flash_kmeans(problem: Problem) -> Built:
    if problem.device.type == "cuda":
        from flash_kmeans import batch_kmeans_Euclid as kmeans
    else:
        from flash_kmeans.torch_fallback import batch_kmeans_Euclid_torch_native as kmeans

    def fit(rows: Tensor, start: Tensor) -> Tensor:
        _, centers, _ = kmeans(
            rows[None], len(start), max_iters=ITERATIONS, tol=0.0, init_centroids=start[None].clone()
        )
        return centers[0]

    return _kmeans_by_class(problem, fit)


def torchgmm(problem: Problem) -> Built:
    from torchgmm.bayes.gmm.model import GaussianMixtureModel, GaussianMixtureModelConfig

    case = problem.case
    if case.op != "em" and not case.diag:
        raise Skipped("its spherical mixtures are not timed")

    def model_of(means: Tensor, variances: Tensor, weights: Tensor) -> Any:
        model = GaussianMixtureModel(GaussianMixtureModelConfig(case.K, case.D, "diag")).to(problem.device)
        model.means.copy_(means)
        model.precisions_cholesky.copy_(variances.rsqrt())
        model.component_probs.copy_(weights)
        return model

    if case.op != "em":
        models = [model_of(*one) for one in zip(problem.means, problem.variances, problem.weights)]
        return Differentiable(problem, by_class([lambda rows, m=m: m(rows)[1] for m in models]))
    variances, weights = start_of_em(problem)
    import logging

    import pytorch_lightning
    from torchgmm.base.data import DataLoader, collate_tensor, dataset_from_tensors
    from torchgmm.bayes.gmm.lightning_module import GaussianMixtureLightningModule

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    def fit(rows: Tensor, c: int) -> Any:
        model = model_of(problem.start[c], variances[c], weights[c])
        module = GaussianMixtureLightningModule(model, convergence_tolerance=0, covariance_regularization=REG_COVAR)
        trainer = pytorch_lightning.Trainer(
            max_epochs=ITERATIONS,
            accelerator="gpu" if rows.is_cuda else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
        )
        loader = DataLoader(dataset_from_tensors(rows), batch_size=len(rows), collate_fn=collate_tensor)
        trainer.fit(module, loader)
        return model

    return _fit_by_class(problem, fit, lambda m: (m.means, m.covariances, m.component_probs))


def _kmeans_by_class(problem: Problem, fit: Callable[[Tensor, Tensor], Any]) -> Fit:
    return _fit_by_class(problem, lambda rows, c: fit(rows, problem.start[c]), lambda means: (means,))


def _fit_by_class(
    problem: Problem, fit: Callable[[Tensor, int], Any], parameters: Callable[[Any], Sequence[Any]]
) -> Fit:
    """The same fit for every class, one after the other: what a user of a library without classes writes."""
    x, labels = problem.sets[0]

    def all_classes() -> list[Any]:
        if labels is None:
            return [fit(x, 0)]
        sizes = torch.bincount(labels, minlength=problem.case.C).tolist()
        return [fit(rows, c) for c, rows in enumerate(x[labels.argsort()].split(sizes))]

    def stacked(fitted: list[Any]) -> Sequence[Tensor]:
        columns = zip(*(parameters(one) for one in fitted))
        return [torch.stack([torch.as_tensor(t) for t in column]) for column in columns]

    return Fit(problem, all_classes, stacked)


LIKELIHOOD = ("mixture_log_prob",)
PEERS = [
    Peer(OURS, ours, (*OPERATIONS, *FITS), "cem_fast"),
    Peer("cem_fast, Triton operators", triton_operators, OPERATIONS, "triton", devices=("cuda",)),
    Peer("cem_fast, CUDA C++ operators", cuda_operators, OPERATIONS, "cem_fast", devices=("cuda",)),
    Peer("torch eager", eager, OPERATIONS),
    Peer("torch.compile", compiled, OPERATIONS),
    Peer("segmented GEMM", segmented_gemm, OPERATIONS),
    Peer("released loop", released_loop, ("cem_official",)),
    Peer("MixtureSameFamily", mixture_same_family, LIKELIHOOD),
    Peer("pykeops", pykeops, LIKELIHOOD, "pykeops"),
    Peer("torchgmm", torchgmm, (*LIKELIHOOD, "em"), "torchgmm"),
    Peer("scikit-learn", scikit_learn, (*LIKELIHOOD, *FITS), "scikit-learn", settles=True, devices=("cpu",)),
    Peer(
        "scikit-learn-intelex",
        scikit_learn_intelex,
        ("kmeans",),
        "scikit-learn-intelex",
        settles=True,
        devices=("cpu",),
    ),
    Peer("faiss", faiss, ("kmeans",), "faiss-cpu", settles=True, devices=("cpu",)),
    Peer("flash-kmeans", flash_kmeans, ("kmeans",), "flash-kmeans"),
]


def of(case: Case, device: torch.device) -> list[Peer]:
    """Who takes part in a case on a device; ours first."""
    return [
        peer
        for peer in PEERS
        if case.op in peer.operations
        and device.type in peer.devices
        and (peer.name.startswith(OURS) or not case.peers or peer.name in case.peers)
    ]
