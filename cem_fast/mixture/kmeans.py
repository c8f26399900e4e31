"""k-means of all classes at once, with scikit-learn's names and meanings, on the fits of ``GaussianMixture``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cem_fast._support import optional
from cem_fast._support.counts import require_count
from cem_fast.mixture.arrays import array_of, numpy_too, rows_of
from cem_fast.mixture.model import GaussianMixture
from cem_fast.mixture.rows import class_totals, require_iterable_again
from cem_fast.mixture.seeding import squared_distance
from cem_fast.ops import validate
from cem_fast.ops.fits import by_class

METRICS = ("euclidean", "cosine")


def directions(x: Any) -> Any:
    """Rows scaled to length 1; zeros stay zeros. Anything but a matrix of floating-point numbers stays as it is."""
    if not isinstance(x, Tensor) or x.layout is not torch.strided or not x.is_floating_point() or x.dim() != 2:
        return x
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    if x.shape[1] == 0:
        return x
    # relative to the largest entry: squares of the entries themselves may overflow
    x = x / x.abs().amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return x / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


class Directions:
    """Batches of a stream, with rows scaled to length 1."""

    def __init__(self, batches: Iterable[Any]):
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            x, *rest = batch if isinstance(batch, (tuple, list)) else (batch,)
            yield (directions(rows_of(x)), *rest)


class KMeans(nn.Module):
    """k-means: each row belongs to its nearest center, and each center is the mean of its rows.

    ``inertia = sum_n min_k |x_n - mu_k|^2``; with ``metric="cosine"``, rows and centers are scaled to length 1, and
    ``inertia = sum_n min_k (1 - x_n . mu_k)``

    With several classes, each class has its own clusters, and all are fitted together. A method called without labels then
    uses all ``C K`` clusters, and cluster ``k`` of class ``c`` has the index ``c K + k``.

    Args:
        num_clusters: clusters K of each class.
        num_classes: classes C.
        metric: ``euclidean``, or ``cosine`` for directions, where the length of rows has no effect.
        init: ``k-means++`` (greedy), ``random`` rows, or centers ``[K, D]`` (``[C, K, D]`` for several classes).
        num_init: restarts; the one with the lowest inertia is kept for each class.
        max_iter: maximum number of iterations of one restart.
        tol: a restart stops when the squared movement of the centers, summed over dimensions, is at most ``tol`` times the mean
            variance of the features.
        generator: source of randomness of the initial centers.
        process_group: torch.distributed group over which fits sum their statistics; each rank then passes its own rows.

    Attributes:
        cluster_centers_: ``[K, D]``, or ``[C, K, D]`` for several classes; a NumPy array after a fit to NumPy arrays.
        inertia_: sum over the rows of the last fit, weighted by their sample weights.
        n_iter_: iterations of the last fit.
        mixture: the ``GaussianMixture`` of the clusters, with their variances and weights; ``mixture.save`` writes a file.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a value that is not allowed.

    Example:
        >>> import torch
        >>> from cem_fast import KMeans
        >>> x = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> kmeans = KMeans(num_clusters=2, init=x[[0, 3]]).fit(x)
        >>> kmeans.cluster_centers_.flatten(), kmeans.predict(x), kmeans.inertia_
        (tensor([ 0.5000, 10.5000]), tensor([0, 0, 1, 1]), 1.0)

    Source: Lloyd, "Least squares quantization in PCM", IEEE Transactions on Information Theory 1982; Dhillon and Modha,
    "Concept decompositions for large sparse text data using clustering", Machine Learning 2001 (cosine); methods have the
    meaning of scikit-learn's KMeans.
    """

    fitted_on_arrays = False

    def __init__(
        self,
        *,
        num_clusters: int,
        num_classes: int = 1,
        metric: str = "euclidean",
        init: str | Tensor | np.ndarray[Any, Any] = "k-means++",
        num_init: int = 1,
        max_iter: int = 300,
        tol: float = 1e-4,
        generator: torch.Generator | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
    ):
        super().__init__()
        require_count("num_clusters", num_clusters)
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
        start = rows_of(init)
        if isinstance(start, Tensor) and start.dim() == 2 and num_classes == 1:
            start = start.unsqueeze(0)
        if isinstance(start, Tensor) and start.dim() == 3 and metric == "cosine":
            start = directions(start.flatten(0, 1)).view(start.shape)
        self.num_clusters, self.num_classes, self.metric = num_clusters, num_classes, metric
        self.mixture = GaussianMixture(
            num_components=num_clusters,
            num_classes=num_classes,
            covariance_type="spherical",
            algorithm="kmeans",
            init=start,
            num_init=num_init,
            max_iter=max_iter,
            tol=tol,
            generator=generator,
            process_group=process_group,
        )
        self.mixture.unit_means = metric == "cosine"

    def extra_repr(self) -> str:
        return f"num_clusters={self.num_clusters}, num_classes={self.num_classes}, metric={self.metric!r}"

    @property
    def is_fitted(self) -> bool:
        """Whether there are centers, fitted or loaded."""
        return self.mixture.is_fitted

    @property
    def means(self) -> Tensor:
        """The centers ``[C, K, D]``, also of one class."""
        return self.mixture.means

    @property
    def cluster_centers_(self) -> Any:
        """Centers ``[K, D]``, or ``[C, K, D]`` for several classes."""
        self.mixture._components(None)
        centers = self.means if self.num_classes > 1 else self.means[0]
        return array_of(centers) if self.fitted_on_arrays else centers

    @property
    def inertia_(self) -> float:
        """Sum over the rows of the last fit of the squared distance to their centers, or of 1 - cosine."""
        self.mixture._components(None)
        if self.mixture.lower_bound_ == -math.inf:
            raise RuntimeError("inertia_ needs a fit, got centers from a state_dict, which does not hold it")
        total = -self.mixture.lower_bound_ * float(self.mixture.counts.double().sum())
        return total / 2 if self.metric == "cosine" else total

    @property
    def n_iter_(self) -> int:
        """Iterations of the last fit."""
        return self.mixture.n_iter_

    def _rows(self, x: Any) -> Any:
        return directions(x) if self.metric == "cosine" else x

    @numpy_too
    def fit(self, x: Tensor, labels: Tensor | None = None, sample_weight: Tensor | None = None) -> KMeans:
        """Fits the centers to rows, replacing the previous fit.

        Args:
            x: rows ``[N, D]``.
            labels: class of each row ``[N]``, integer; None is allowed for one class.
            sample_weight: how many rows each row counts for ``[N]``; 0 leaves it out; 1 if None.

        Returns:
            The model itself.

        Raises:
            TypeError: x is not a floating-point tensor, or labels are not an integer one.
            ValueError: a shape, device, label or value does not fit.
            RuntimeError: a rank of the process group has ended or does not answer.

        Example:
            >>> import torch
            >>> from cem_fast import KMeans
            >>> x, weight = torch.tensor([[0.0], [1.0]]), torch.tensor([1.0, 3.0])
            >>> KMeans(num_clusters=1).fit(x, sample_weight=weight).cluster_centers_
            tensor([[0.7500]])
        """
        self.mixture.fit(self._rows(x), labels, sample_weight)
        return self

    @numpy_too
    def fit_predict(self, x: Tensor, labels: Tensor | None = None, sample_weight: Tensor | None = None) -> Tensor:
        """Fits the centers to rows and returns the cluster of each row, ``[N]``; arguments as ``fit``.

        Example:
            >>> import torch
            >>> from cem_fast import KMeans
            >>> x = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
            >>> KMeans(num_clusters=2, init=x[[3, 0]]).fit_predict(x)
            tensor([1, 1, 0, 0])
        """
        return self.fit(x, labels, sample_weight).predict(x, labels)

    @numpy_too
    def partial_fit(self, x: Tensor, labels: Tensor | None = None, sample_weight: Tensor | None = None) -> KMeans:
        """Adds rows to a fit without reading the earlier rows again; arguments as ``fit``.

        Each row goes to the nearest of the centers before the call. Every center becomes the mean of all its rows so far.

        Example:
            >>> import torch
            >>> from cem_fast import KMeans
            >>> kmeans = KMeans(num_clusters=1).fit(torch.tensor([[1.0], [3.0]]))
            >>> kmeans.partial_fit(torch.tensor([[8.0]])).cluster_centers_
            tensor([[4.]])
        """
        self.mixture.partial_fit(self._rows(x), labels, sample_weight)
        return self

    def fit_stream(
        self,
        batches: Iterable[Any],
        *,
        memory_budget: int = 1 << 30,
        on_pass: Callable[[int, int], None] | None = None,
    ) -> KMeans:
        """Fits the centers to batches that need not fit in memory together; arguments as ``GaussianMixture.fit_stream``.

        Example:
            >>> import torch
            >>> from cem_fast import KMeans
            >>> KMeans(num_clusters=1).fit_stream([torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0]])]).cluster_centers_
            tensor([[3.]])
        """
        require_iterable_again("batches", batches)
        scaled = Directions(batches) if self.metric == "cosine" else batches
        self.mixture.fit_stream(scaled, memory_budget=memory_budget, on_pass=on_pass)
        return self

    @numpy_too
    def predict(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Cluster of each row: that of the nearest center, the lowest index if there are several.

        Args:
            x: rows ``[N, D]``.
            labels: class of each row ``[N]``, integer, or None.

        Returns:
            Clusters ``[N]``, int64: ``k`` within the row's class, or ``c K + k`` without labels.

        Raises:
            RuntimeError: the model is not fitted.
            TypeError: an argument has the wrong dtype.
            ValueError: a shape, device or label does not fit, or rows are not finite.

        Example:
            >>> import torch
            >>> from cem_fast import KMeans
            >>> kmeans = KMeans(num_clusters=2, init=torch.tensor([[0.0], [10.0]])).fit(torch.tensor([[0.0], [10.0]]))
            >>> kmeans.predict(torch.tensor([[2.0], [9.0], [5.0]]))
            tensor([0, 1, 0])
        """
        return self.mixture.predict(self._rows(x), labels)

    @numpy_too
    @torch.no_grad()
    def transform(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Distance (cosine: 1 - cosine) of each row to every center of its class; arguments as ``predict``.

        Returns:
            Distances ``[N, K]``, or ``[N, C K]`` without labels.

        Example:
            >>> import torch
            >>> from cem_fast import KMeans
            >>> kmeans = KMeans(num_clusters=2, init=torch.tensor([[0.0], [10.0]])).fit(torch.tensor([[0.0], [10.0]]))
            >>> kmeans.transform(torch.tensor([[2.0]]))
            tensor([[2., 8.]])
        """
        x = self._rows(x)
        means = self.mixture._components(labels)[0]
        validate.features(x, means)
        validate.finite("x", x)
        labels = validate.labels(labels, len(x), len(means), x.device)
        x, distances = x.to(means.dtype), means.new_empty(len(x), means.shape[1])
        for c, rows in by_class(labels, len(means)):
            distances[rows] = torch.cdist(x[rows], means[c], compute_mode="donot_use_mm_for_euclid_dist")
        return distances.square() / 2 if self.metric == "cosine" else distances

    @numpy_too
    @torch.no_grad()
    def score(self, x: Tensor, labels: Tensor | None = None, sample_weight: Tensor | None = None) -> float:
        """Negative inertia of rows; arguments as ``fit``.

        Example:
            >>> import torch
            >>> from cem_fast import KMeans
            >>> KMeans(num_clusters=1).fit(torch.tensor([[1.0], [3.0]])).score(torch.tensor([[1.0], [4.0]]))
            -5.0
        """
        x = self._rows(x)
        cluster = self.mixture.predict(x, labels)
        if labels is not None:
            cluster = cluster + labels * self.num_clusters
        squares = squared_distance(x, self.means.flatten(0, 1), cluster).double()
        if sample_weight is not None:
            squares = squares * validate.sample_weight(sample_weight, len(x), x.device)
        total = -float(class_totals(squares, torch.zeros_like(cluster), 1))
        return total / 2 if self.metric == "cosine" else total

    def to_sklearn(self, class_index: int = 0) -> Any:
        """Converts the clusters of one class to a fitted ``sklearn.cluster.KMeans``, which predicts; needs scikit-learn.

        Raises:
            RuntimeError: the model is not fitted.
            ValueError: there is no such class, or the metric is cosine.

        Example:
            >>> import torch
            >>> from cem_fast import KMeans
            >>> KMeans(num_clusters=1).fit(torch.tensor([[1.0], [3.0]])).to_sklearn().cluster_centers_
            array([[2.]], dtype=float32)
        """
        self.mixture.require_class(class_index)
        if self.metric == "cosine":
            raise ValueError("to_sklearn needs metric='euclidean', got 'cosine', which scikit-learn's KMeans lacks")
        model = optional.load("sklearn.cluster", "to_sklearn", "scikit-learn").KMeans(self.num_clusters)
        model.cluster_centers_ = array_of(self.means[class_index])
        model.n_features_in_, model.n_iter_, model.inertia_ = self.means.shape[2], self.n_iter_, self.inertia_
        model._n_threads, model._n_features_out = 1, self.num_clusters  # which its methods read
        return model

    @classmethod
    def from_sklearn(cls, model: Any) -> KMeans:
        """Converts a fitted ``sklearn.cluster.KMeans`` to a model of one class.

        Raises:
            ValueError: the model is not fitted.

        Example:
            >>> import sklearn.cluster
            >>> from cem_fast import KMeans
            >>> KMeans.from_sklearn(sklearn.cluster.KMeans(1).fit([[1.0], [3.0]])).cluster_centers_
            tensor([[2.]], dtype=torch.float64)
        """
        if not hasattr(model, "cluster_centers_"):
            raise ValueError("model must be a fitted sklearn.cluster.KMeans, got one that is not fitted")
        means = torch.as_tensor(model.cluster_centers_).unsqueeze(0)
        K = means.shape[1]
        counts = torch.bincount(torch.as_tensor(model.labels_).long(), minlength=K).to(means).unsqueeze(0)
        kmeans = cls(num_clusters=K, max_iter=model.max_iter, tol=model.tol).to(means.dtype)
        variance = torch.full((1, K), max(model.inertia_ / (counts.sum() * means.shape[2]), kmeans.mixture.reg_covar))
        kmeans.mixture.set_parameters(
            means=means,
            variances=variance.to(means),
            weights=counts / counts.sum(),
            class_prior=means.new_ones(1),
            counts=counts,
        )
        kmeans.mixture.num_rows_, kmeans.mixture.n_iter_ = int(counts.sum()), model.n_iter_
        kmeans.mixture.lower_bound_ = -float(model.inertia_) / max(1, int(counts.sum()))
        return kmeans
