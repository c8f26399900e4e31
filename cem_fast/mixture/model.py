"""Gaussian mixtures of all classes at once: fits of whole data sets or of pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from cem_fast._support.counts import require_number
from cem_fast.mixture import fitting
from cem_fast.mixture.arrays import numpy_too, rows_of, tensor_of
from cem_fast.mixture.exchange import FITTED, ExchangedMixture
from cem_fast.mixture.fitting import Moments, Settings
from cem_fast.mixture.rows import Chunk, Rows, Stream, class_sizes, draw_sample, require_iterable_again
from cem_fast.mixture.selection import Selection, validate_selection
from cem_fast.ops import validate


class GaussianMixture(ExchangedMixture):
    """One Gaussian mixture per class, all fitted together; ``num_classes=1`` is an ordinary mixture.

    ``p(x | c) = sum_k w_ck N(x; mu_ck, v_ck)`` and ``p(x) = sum_c prior_c p(x | c)``

    With several classes, a method called with ``labels=None`` uses ``p(x)``, a mixture of all ``C K`` components.
    Component ``k`` of class ``c`` then has the index ``c K + k``.

    Args:
        num_components: components K of each class.
        num_classes: classes C.
        covariance_type: ``diag`` (``variances [C, K, D]``), ``spherical`` (``variances [C, K]``), ``full``
            (``covariances [C, K, D, D]``) or ``tied`` (one per class, ``covariances [C, D, D]``). The last two need EM
            and are kept in float64.
        algorithm: ``em`` or ``kmeans`` (Lloyd; each row belongs to its nearest mean).
        init: ``k-means++`` or ``random`` rows (EM then starts from a k-means fit), or initial means ``[C, K, D]``.
        init_variances: initial variances or covariances of EM; estimated from the initial means if None.
        init_weights: initial weights ``[C, K]`` of EM; estimated from the initial means if None.
        num_init: restarts; the best one is kept for each class.
        max_iter: maximum number of iterations of one restart.
        tol: EM stops when the mean log-likelihood gains less (nats). k-means stops when the squared movement of the means,
            summed over dimensions, is less than ``tol`` times the mean variance of the features.
        reg_covar: added to every variance, in squared units of x.
        generator: source of randomness of the initial means.
        process_group: torch.distributed group over which fits sum their statistics; each rank then passes its own rows.

    Attributes:
        means: ``[C, K, D]``.
        variances: ``[C, K]`` (spherical) or ``[C, K, D]`` (diag).
        covariances: ``[C, K, D, D]`` (full) or ``[C, D, D]`` (tied).
        weights: ``[C, K]``; rows sum to 1.
        class_prior: ``[C]``; sums to 1.
        counts: rows of each component ``[C, K]``.
        num_rows_: number of fitted rows, on all ranks; the rounded sum of their sample weights if they have any.
        n_iter_: iterations of the last fit.
        converged_: whether the last fit converged.
        lower_bound_: mean log-likelihood of the last fit (EM), or its negative mean squared distance to the nearest mean
            (k-means).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a value that is not allowed.

    Example:
        >>> import torch
        >>> from cem_fast import GaussianMixture
        >>> x = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> mixture = GaussianMixture(num_components=2, algorithm="kmeans").fit(x)
        >>> mixture.means.flatten().sort().values
        tensor([ 0.5000, 10.5000])

    Source: the GMM step of Algorithm 1 of Xia et al., CVPR 2025; k-means++ by Arthur and Vassilvitskii, SODA 2007, in the
    greedy form; methods have the meaning of scikit-learn's GaussianMixture.
    """

    fitted_values = FITTED
    rows_name = "x"  # in errors
    unit_means = False  # set by KMeans for directions
    selection_: Selection | None = None

    def __init__(
        self,
        *,
        num_components: int,
        num_classes: int = 1,
        covariance_type: str = "diag",
        algorithm: str = "em",
        init: str | Tensor = "k-means++",
        init_variances: Tensor | None = None,
        init_weights: Tensor | None = None,
        num_init: int = 1,
        max_iter: int = 100,
        tol: float = 1e-3,
        reg_covar: float = 1e-6,
        generator: torch.Generator | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
    ):
        Settings(  # raises if a setting is not allowed
            num_components=num_components,
            num_classes=num_classes,
            covariance_type=covariance_type,
            algorithm=algorithm,
            init=init,
            init_variances=init_variances,
            init_weights=init_weights,
            num_init=num_init,
            max_iter=max_iter,
            tol=tol,
            reg_covar=reg_covar,
            generator=generator,
        )
        super().__init__(num_components, num_classes, covariance_type, algorithm)
        self.init, self.init_variances, self.init_weights = init, init_variances, init_weights
        self.num_init, self.max_iter, self.tol, self.reg_covar = num_init, max_iter, float(tol), float(reg_covar)
        self.generator, self.process_group = generator, process_group
        self._gathered: Moments | None = None
        self.num_rows_, self.n_iter_, self.converged_, self.lower_bound_ = 0, 0, False, -math.inf

    @numpy_too
    @torch.no_grad()
    def fit(self, x: Tensor, labels: Tensor | None = None, sample_weight: Tensor | None = None) -> GaussianMixture:
        """Fits the mixture to rows, replacing the previous fit.

        The mixture takes the rows' device and dtype (float32 for half types, float64 for covariance matrices). Classes
        without rows get prior 0. Components beyond a class's distinct rows get weight 0, with one warning. With a process
        group, the rows are this rank's shard, possibly empty, and all ranks get the same bits. If the fit is interrupted,
        the previous parameters stay.

        Args:
            x: rows ``[N, D]``.
            labels: class of each row ``[N]``, integer; None is allowed for one class.
            sample_weight: how many rows each row counts for ``[N]``; 0 leaves it out; 1 if None.

        Returns:
            The mixture itself.

        Raises:
            TypeError: x is not a floating-point tensor, or labels are not an integer one.
            ValueError: a shape, device, label or value does not fit.
            RuntimeError: a rank of the process group has ended or does not answer.

        Example:
            >>> import torch
            >>> from cem_fast import GaussianMixture
            >>> x, labels = torch.tensor([[1.0], [3.0], [7.0], [9.0]]), torch.tensor([0, 0, 1, 1])
            >>> mixture = GaussianMixture(num_components=1, num_classes=2).fit(x, labels)
            >>> mixture.means.flatten(), mixture.class_prior
            (tensor([2., 8.]), tensor([0.5000, 0.5000]))
        """
        chunk = self._rows(x, labels, sample_weight)
        return self._fit(Rows([chunk], self.process_group, self.rows_name, sample_weight is not None))

    @numpy_too
    @torch.no_grad()
    def fit_predict(self, x: Tensor, labels: Tensor | None = None, sample_weight: Tensor | None = None) -> Tensor:
        """Fits the mixture to rows and returns their components; arguments as ``fit``.

        Returns:
            Components ``[N]``, int64, as ``predict`` gives them.

        Example:
            >>> import torch
            >>> from cem_fast import GaussianMixture
            >>> start = torch.tensor([[[0.0], [10.0]]])
            >>> x = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
            >>> GaussianMixture(num_components=2, init=start).fit_predict(x)
            tensor([0, 0, 1, 1])
        """
        return self.fit(x, labels, sample_weight).predict(x, labels)

    @numpy_too
    @torch.no_grad()
    def select(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        sample_weight: Tensor | None = None,
        *,
        num_components: Iterable[int] = range(1, 11),
        criterion: str = "bic",
    ) -> GaussianMixture:
        """Fits mixtures with several numbers of components and returns the one with the lowest criterion.

        All have the other settings of this mixture, which stays as it is. Of equal values, the first wins.

        Args:
            x: rows ``[N, D]``.
            labels: class of each row ``[N]``, integer; None is allowed for one class.
            sample_weight: how many rows each row counts for ``[N]``; 0 leaves it out; 1 if None.
            num_components: the numbers to try.
            criterion: ``bic`` or ``aic``.

        Returns:
            The fitted mixture. Its ``selection_`` holds the criterion of each number, and draws it with ``plot``.

        Raises:
            ValueError: there is nothing to try, the criterion is another one, or initial parameters are given.

        Example:
            >>> import torch
            >>> from cem_fast import GaussianMixture
            >>> g = torch.Generator().manual_seed(0)
            >>> x = torch.randn(300, 2, generator=g) + 8 * (torch.arange(300) % 3).unsqueeze(1)
            >>> chosen = GaussianMixture(num_components=1, generator=g).select(x, num_components=range(1, 5))
            >>> chosen.num_components, list(chosen.selection_.values)
            (3, [1, 2, 3, 4])

        Source: Schwarz, "Estimating the dimension of a model", Annals of Statistics 1978 (BIC); Akaike, "A new look at the
        statistical model identification", IEEE Transactions on Automatic Control 1974 (AIC).
        """
        fitted = {
            number: self._unfitted(num_components=number).fit(x, labels, sample_weight)
            for number in validate_selection(self, num_components, criterion)
        }
        values = {number: getattr(mixture, criterion)(x, labels, sample_weight) for number, mixture in fitted.items()}
        selection = Selection(criterion, values)
        chosen = fitted[selection.chosen]
        chosen.selection_ = selection
        return chosen

    @torch.no_grad()
    def fit_stream(
        self,
        batches: Iterable[Any],
        *,
        memory_budget: int = 1 << 30,
        on_pass: Callable[[int, int], None] | None = None,
    ) -> GaussianMixture:
        """Fits the mixture to batches that need not fit in memory together, replacing the previous fit.

        The first pass draws a uniform sample of each class; a fit to the sample gives the initial parameters. Each iteration
        is then one more pass over all batches. If all rows fit in the budget, they are kept and there is no second pass.

        Args:
            batches: ``x [n, D]`` alone, or ``(x, labels [n] or None, sample_weight [n] or None)`` of which the last ones may
                be left out; each iteration over them must give the same rows, in any order.
            memory_budget: bytes of rows and labels that may be kept, in addition to one batch, its work space and the
                parameters.
            on_pass: called after each pass with the pass number, from 1, and the number of its rows.

        Returns:
            The mixture itself.

        Raises:
            TypeError: batches can be iterated only once, or a tensor has the wrong dtype.
            ValueError: a shape, device, label or value does not fit.

        Example:
            >>> import torch
            >>> from cem_fast import GaussianMixture
            >>> batches = [(torch.tensor([[1.0], [3.0]]), None), (torch.tensor([[5.0]]), None)]
            >>> GaussianMixture(num_components=1).fit_stream(batches).means
            tensor([[[3.]]])
        """
        require_iterable_again("batches", batches)
        if require_number("memory_budget", memory_budget) < 0:
            raise ValueError(f"memory_budget must not be negative, got {memory_budget}")
        name = "batches" if self.rows_name == "x" else "loader"
        stream = Stream(lambda: (self._batch(batch) for batch in batches), on_pass, name)
        sample, sizes, complete = draw_sample(stream, self.num_classes, memory_budget, self.generator)
        weighted = any(chunk.mass is not None for chunk in sample)
        kept = Rows(sample, self.process_group, self.rows_name, weighted)
        rows = kept if complete else Rows(stream, self.process_group, self.rows_name, weighted)
        return self._fit(rows, sample=kept, sizes=sizes)

    def _unfitted(self, **changed: Any) -> GaussianMixture:
        """A mixture with the same settings but for the changed ones."""
        settings = vars(self._settings()) | changed
        settings.pop("unit_means")
        fresh = GaussianMixture(**settings, process_group=self.process_group)
        fresh.unit_means, fresh.rows_name = self.unit_means, self.rows_name
        return fresh

    def _settings(self) -> Settings:
        return Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})

    def _fit(self, rows: Rows, sample: Rows | None = None, sizes: Tensor | None = None) -> GaussianMixture:
        best, per_class = fitting.fit(rows, self._settings(), sample=sample, sizes=sizes)
        dtype, total, present = best.means.dtype, float(per_class.sum()), per_class > 0
        if (self.means.device, self.means.dtype) != (best.means.device, dtype):
            with torch.inference_mode(False):  # buffers made in inference mode could never be used in training
                self.to(device=best.means.device, dtype=dtype)
        self.num_rows_ = round(total)
        self.n_iter_, self.converged_ = int(best.n_iter.max()), bool(best.converged[present].all())
        self.lower_bound_ = float((best.score[present] * per_class[present]).sum() / total)
        self.set_parameters(
            means=best.means,
            variances=best.variances,
            weights=best.weights,
            class_prior=(per_class / total).to(dtype),
            counts=best.counts.to(dtype),
        )
        return self

    @numpy_too
    @torch.no_grad()
    def partial_fit(
        self, x: Tensor, labels: Tensor | None = None, sample_weight: Tensor | None = None
    ) -> GaussianMixture:
        """Adds rows to a fit without reading the earlier rows again.

        ``n' = n + sum r,  mu' = mu + sum r (x - mu) / n',  v' = (n v + sum r (x - mu)^2) / n' - (mu' - mu)^2``

        Responsibilities r are those of the parameters before the call (k-means: the nearest mean). Classes that appear for
        the first time are fitted to this batch. Memory does not grow with the number of calls.

        Args:
            x: rows ``[n, D]``.
            labels: class of each row ``[n]``, integer; None is allowed for one class.
            sample_weight: how many rows each row counts for ``[n]``; 0 leaves it out; 1 if None.

        Returns:
            The mixture itself.

        Raises:
            TypeError: x is not a floating-point tensor, or labels are not an integer one.
            ValueError: a shape, device, label or value does not fit, or the mixture has covariance matrices.
            RuntimeError: the parameters were set without counts.

        Example:
            >>> import torch
            >>> from cem_fast import GaussianMixture
            >>> mixture = GaussianMixture(num_components=1).fit(torch.tensor([[1.0], [3.0]]))
            >>> mixture.partial_fit(torch.tensor([[8.0]])).means
            tensor([[[4.]]])

        Source: the pairwise update of Chan, Golub and LeVeque, 1983, applied to each component.
        """
        self._require_variances("partial_fit")
        chunk = self._rows(x, labels, sample_weight)
        rows = Rows([chunk], self.process_group, self.rows_name, sample_weight is not None)
        if not self.is_fitted:
            return self._fit(rows)
        validate.features(chunk.x, self.means, self.rows_name)
        seen = self.counts.double()
        if not bool(seen.any()):
            raise RuntimeError(
                "partial_fit needs the counts of the earlier rows, got parameters without counts: "
                "pass counts to set_parameters, or num_rows to from_sklearn"
            )
        per_class = rows.reduce(class_sizes(rows, self.num_classes, self.means.device))
        new = (seen.sum(1) == 0) & (per_class > 0)
        if bool(new.any()):
            self._adopt(rows, new)
        n, s1, s2 = self._moments(rows)
        fitting.require_finite(rows, s2)
        n = torch.where(new.unsqueeze(1), 0.0, n)  # part of the mixture since they were adopted
        seen = self.counts.double()
        self._move(seen, (n, s1, s2))
        self.num_rows_ += round(float(per_class.sum()))
        return self

    @numpy_too
    @torch.no_grad()
    def gather(self, x: Tensor, labels: Tensor | None = None, sample_weight: Tensor | None = None) -> None:
        """Adds rows to the statistics that the next ``step`` uses, taken about the current parameters.

        Args:
            x: rows ``[n, D]``.
            labels: class of each row ``[n]``, integer; None is allowed for one class.
            sample_weight: how many rows each row counts for ``[n]``; 0 leaves it out; 1 if None.

        Raises:
            RuntimeError: the mixture is not fitted, so there are no parameters to gather about.
            TypeError: x is not a floating-point tensor, or labels are not an integer one.
            ValueError: a shape, device or label does not fit, or the mixture has covariance matrices. Labels on a GPU are
                checked by ``step``, because a check would wait for the device.

        Example:
            >>> import torch
            >>> from cem_fast import GaussianMixture
            >>> mixture = GaussianMixture(num_components=1).fit(torch.tensor([[1.0], [3.0]]))
            >>> for batch in torch.tensor([[[4.0], [5.0]], [[6.0], [9.0]]]):
            ...     mixture.gather(batch)
            >>> mixture.step().means
            tensor([[[6.]]])
        """
        self._require_variances("gather")
        self._components(labels)
        chunk = self._rows(x, labels, sample_weight, wait=False)
        validate.features(chunk.x, self.means, self.rows_name)
        added = self._moments(Rows([chunk]))
        if self._gathered is not None:
            added = tuple(a + b for a, b in zip(self._gathered, added))
        self._gathered = added

    @torch.no_grad()
    def step(self) -> GaussianMixture:
        """One iteration of k-means or EM on the rows gathered since the last step, by all ranks of the process group.

        Components without rows keep their means and variances and get weight 0.

        Returns:
            The mixture itself.

        Raises:
            RuntimeError: no rows were gathered.
            ValueError: gathered rows are not finite, labels are out of range, or the mixture has covariance matrices.

        Example:
            >>> import torch
            >>> from cem_fast import GaussianMixture
            >>> mixture = GaussianMixture(num_components=1).fit(torch.tensor([[1.0], [3.0]]))
            >>> mixture.gather(torch.tensor([[4.0], [6.0]]))
            >>> mixture.step().num_rows_
            2
        """
        self._require_variances("step")
        self._components(None)
        rows, nothing = Rows([], self.process_group), (self.means[:, :, 0], self.means, self.variances)
        gathered = self._gathered or tuple(torch.zeros_like(t, dtype=torch.float64) for t in nothing)
        n, s1, s2 = (rows.reduce(part) for part in gathered)  # a rank without rows takes part, or the others would wait
        self._gathered = None
        if not bool(n.any()):
            raise RuntimeError("nothing to step on: call gather(x, labels) first")
        if not bool(s2.isfinite().all()):
            if self.algorithm == "kmeans" and bool(n.isnan().any()):  # rows that are not finite still count
                raise ValueError(f"gathered labels must lie in [0, {self.num_classes}), got others")
            raise ValueError("gathered rows must be finite, got NaN or infinity, or labels out of range")
        self._move(torch.zeros_like(n), (n, s1, s2))
        self.num_rows_ = round(float(n.sum()))
        return self

    def _require_variances(self, method: str) -> None:
        if self.matrices:
            raise ValueError(f"{method} needs spherical or diag covariances, got {self.covariance_type!r}")

    def _moments(self, rows: Rows) -> Moments:
        """``sum r``, ``sum r (x - mu)`` and ``sum r (x - mu)^2`` about the current parameters."""
        if self.algorithm == "em":
            n, s1, s2, _ = fitting.soft_statistics(rows, self.means, self.variances, self.weights)
            return n, s1, s2
        diag = self.covariance_type == "diag"
        n, s2, sums = fitting.hard_statistics(rows, self.means, per_dimension=diag, sums=True)
        return n, sums - n.unsqueeze(-1) * self.means.double(), s2

    def _move(self, seen: Tensor, moments: Moments) -> None:
        """Updates the parameters, which stand for ``seen [C, K]`` rows, by moments of more rows about the means."""
        moved = fitting.moved(self.means, self.variances, self.weights, seen, moments, self.reg_covar)
        if self.unit_means:
            moved["means"] = fitting.directions(moved["means"], self.means.double())
        count = seen + moments[0]
        per_class = count.sum(1)
        self.set_parameters(**moved, class_prior=per_class / per_class.sum(), counts=count)

    def _adopt(self, rows: Rows, classes: Tensor) -> None:
        """Fits classes without earlier rows; the other classes keep their parameters."""
        fresh = self._unfitted(init="k-means++", init_variances=None, init_weights=None, num_init=1)
        fresh._fit(rows)
        for name in ("means", "variances", "weights", "counts"):
            mine, theirs = getattr(self, name), getattr(fresh, name)
            mine.copy_(torch.where(classes.view(-1, *[1] * (mine.dim() - 1)), theirs, mine))

    def _batch(self, batch: Any) -> Chunk:
        """Checked rows of a stream: ``x`` alone, or with labels and sample weights."""
        parts = list(batch) if isinstance(batch, (tuple, list)) else [batch]
        if not 1 <= len(parts) <= 3:
            raise ValueError(f"batches must hold x, labels and sample_weight at most, got {len(parts)} parts")
        x, labels, sample_weight = (*parts, None, None)[:3]
        labels, sample_weight = tensor_of(labels), tensor_of(sample_weight)
        return self._rows(rows_of(x), labels, sample_weight, wait=False)

    def _rows(self, x: Tensor, labels: Tensor | None, sample_weight: Tensor | None = None, wait: bool = True) -> Chunk:
        """Checked rows; without ``wait``, labels on a GPU are not read."""
        validate.tensor(self.rows_name, x, "[N, D]", 2)
        if not x.is_floating_point():
            raise TypeError(f"{self.rows_name} must be a floating-point tensor, got {x.dtype}")
        if x.shape[1] == 0:
            raise ValueError(f"{self.rows_name} must have at least one feature, got {tuple(x.shape)}")
        labels = validate.integer_labels(labels, len(x), self.num_classes, x.device)
        if labels is not None and (wait or validate.is_readable(labels)):
            validate.label_range(labels, self.num_classes)
        # rounded to single precision, a thin covariance matrix would be indefinite
        x = x.detach().double() if self.matrices else x.detach()
        if sample_weight is None:
            return Chunk(x, labels)
        mass = validate.sample_weight(sample_weight, len(x), x.device)
        if not bool((mass > 0).all()):
            kept = (mass > 0).nonzero().squeeze(1)
            x, labels, mass = x[kept], None if labels is None else labels[kept], mass[kept]
        return Chunk(x, labels, mass.to(x.dtype if x.dtype in validate.PARAMETER_DTYPES else torch.float32))
