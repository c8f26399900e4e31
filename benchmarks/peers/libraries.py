"""Other libraries: pykeops, scikit-learn, scikit-learn-intelex, faiss, flash-kmeans and torchgmm."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from cem_fast.benchmarks.cases import ITERATIONS, REG_COVAR, Problem, start_of_em
from cem_fast.benchmarks.peers.adapters import Built, Differentiable, Fit, Skipped, by_class, fit_by_class
from torch import Tensor

LARGEST_KEOPS = 128


def pykeops(problem: Problem) -> Built:
    """Lazy tensors of pykeops, one mixture per class."""
    if problem.case.D > LARGEST_KEOPS:
        raise Skipped(f"unrolls its loop over D: compiles for minutes beyond {LARGEST_KEOPS}")
    with contextlib.redirect_stdout(io.StringIO()):  # drops its list of missing compilers
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
    """scikit-learn: k-means, EM, and log-densities without a gradient."""
    from sklearn.cluster import KMeans
    from sklearn.mixture import GaussianMixture as Mixture

    case = problem.case
    if case.op in ("kmeans", "seeding"):
        return _kmeans_by_class(problem, _lloyd(KMeans, problem))
    if case.op == "em":
        return _sklearn_em(problem, Mixture, Tensor.numpy)
    if not case.diag:
        raise Skipped("its spherical mixtures are not timed")

    def mixture(means: Tensor, variances: Tensor, weights: Tensor) -> Callable[[Tensor], Tensor]:
        m = Mixture(case.K, covariance_type="diag")
        m.means_, m.covariances_, m.weights_ = means.numpy(), variances.numpy(), weights.numpy()
        m.precisions_cholesky_ = 1 / np.sqrt(m.covariances_)
        return lambda rows: torch.from_numpy(m.score_samples(rows.numpy()))

    functions = [mixture(*one) for one in zip(problem.means, problem.variances, problem.weights)]
    return Differentiable(problem, by_class(functions), differentiable=False)


def scikit_learn_array_api(problem: Problem) -> Built:
    """EM of scikit-learn on torch tensors, by its array API."""
    os.environ["SCIPY_ARRAY_API"] = "1"  # which scikit-learn asks for
    from sklearn import config_context
    from sklearn.mixture import GaussianMixture as Mixture

    class OnTensors(Mixture):  # type: ignore[misc]
        def fit(self, rows: Tensor) -> Any:
            with config_context(array_api_dispatch=True):
                return super().fit(rows)

    return _sklearn_em(problem, OnTensors, lambda tensor: tensor)


def _sklearn_em(problem: Problem, kind: Any, array: Callable[[Tensor], Any]) -> Fit:
    variances, weights = start_of_em(problem)
    matrices = problem.case.covariance in ("tied", "full")
    precisions = torch.linalg.inv(variances) if matrices else variances.reciprocal()

    def fit(rows: Tensor, c: int) -> Any:
        return kind(
            problem.case.K,
            covariance_type=problem.case.covariance,
            init_params="random",  # not used: all parameters are given
            means_init=array(problem.start[c]),
            precisions_init=array(precisions[c]),
            weights_init=array(weights[c]),
            max_iter=ITERATIONS,
            tol=0.0,
            reg_covar=REG_COVAR,
        ).fit(array(rows))

    return fit_by_class(problem, fit, lambda m: (m.means_, m.covariances_, m.weights_))


def scikit_learn_intelex(problem: Problem) -> Built:
    """k-means of scikit-learn-intelex."""
    from sklearnex.cluster import KMeans

    return _kmeans_by_class(problem, _lloyd(KMeans, problem))


def _lloyd(kind: Any, problem: Problem) -> Callable[[Tensor, Tensor], Any]:
    seeding = problem.case.op == "seeding"

    def fit(rows: Tensor, start: Tensor) -> Any:
        of = {"init": "k-means++", "max_iter": 1} if seeding else {"init": start.numpy(), "max_iter": ITERATIONS}
        settings = {"n_init": 1, "tol": 0.0, "algorithm": "lloyd", "random_state": 0}
        return kind(len(start), **of, **settings).fit(rows.numpy()).cluster_centers_

    return fit


def faiss(problem: Problem) -> Built:
    """k-means of faiss."""
    import faiss as package

    package.omp_set_num_threads(torch.get_num_threads())

    def fit(rows: Tensor, start: Tensor) -> Any:
        few, many = 1, 1 << 30  # limits of rows per centroid that never drop a row
        k, d = start.shape
        kmeans = package.Kmeans(d, k, niter=ITERATIONS, min_points_per_centroid=few, max_points_per_centroid=many)
        kmeans.train(rows.numpy(), init_centroids=start.numpy())
        return kmeans.centroids

    return _kmeans_by_class(problem, fit)


def flash_kmeans(problem: Problem) -> Built:
    """k-means of flash-kmeans: Triton kernels on CUDA, torch on the CPU."""
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
    """EM and log-densities of torchgmm."""
    from torchgmm.bayes.gmm.model import GaussianMixtureModel, GaussianMixtureModelConfig

    case = problem.case
    if not case.diag:
        raise Skipped(f"its {case.covariance} mixtures are not timed")

    def model_of(means: Tensor, variances: Tensor, weights: Tensor) -> Any:
        model = GaussianMixtureModel(GaussianMixtureModelConfig(case.K, case.D, "diag")).to(problem.device)
        model.means.copy_(means)
        model.precisions_cholesky.copy_(variances.rsqrt())
        model.component_probs.copy_(weights)
        return model

    if case.op == "em":
        return _torchgmm_em(problem, model_of)
    models = [model_of(*one) for one in zip(problem.means, problem.variances, problem.weights)]

    def log_prob_of(model: Any) -> Callable[[Tensor], Tensor]:
        return lambda rows: model(rows)[1]

    return Differentiable(problem, by_class([log_prob_of(model) for model in models]))


def _torchgmm_em(problem: Problem, model_of: Callable[[Tensor, Tensor, Tensor], Any]) -> Fit:
    import pytorch_lightning
    from torchgmm.base.data import DataLoader, collate_tensor, dataset_from_tensors
    from torchgmm.bayes.gmm.lightning_module import GaussianMixtureLightningModule

    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    variances, weights = start_of_em(problem)

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

    return fit_by_class(problem, fit, lambda m: (m.means, m.covariances, m.component_probs))


def _kmeans_by_class(problem: Problem, fit: Callable[[Tensor, Tensor], Any]) -> Fit:
    return fit_by_class(problem, lambda rows, c: fit(rows, problem.start[c]), lambda means: (means,))
