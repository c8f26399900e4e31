"""The CEM loss: a training penalty that raises the conditional entropy of the inputs, given the released features."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from cem_fast._support.counts import require_count, require_number
from cem_fast._support.eval_mode import in_eval_mode
from cem_fast._support.warn import warn
from cem_fast.mixture import GaussianMixture
from cem_fast.mixture.fitted import FOLLOWER, FittedModule
from cem_fast.mixture.rows import require_iterable_again
from cem_fast.ops import validate
from cem_fast.ops.entropy_bound import COVARIANCES, bound_options, evaluate, evaluate_step

PATIENCE = 2000  # training steps without a fit, more than most first epochs have


class CEMLoss(FittedModule):
    """Conditional entropy maximization: an estimate of the information in noisy features, as a loss to minimize.

    ``L_C = sum_ck pi_ck ( -log pi_ck + 1/2 sum_d log((v_ckd + s2) / s2) )``, an upper bound on ``I(z; zhat)``

    Minimizing ``L_C`` raises a lower bound on the mean squared error of every attack, up to the unknown entropy of the data.
    The computed value is an estimate of ``L_C``: the features of real networks are not exactly a Gaussian mixture. The bound
    holds for one release of features per input: n releases of one image average the noise down to ``noise_std / sqrt(n)``.

    Fit the loss to the clean features of the training set once per epoch. Each call then blends the batch into the fitted
    mixture (Eq. 5-6), evaluates Eq. 7 and returns a value with its gradient. Before the first fit, the loss is an exact
    zero, as in the first epoch of Algorithm 1; after 2,000 training steps without a fit, it warns once.
    The caller scales it: ``loss = task + weight * cem(features, labels)``; useful weights are 0.1 to 3.

    The paper clusters noisy features without labels. Its released code clusters clean features per class, as this class
    does; ``num_classes=1`` and ``labels=None`` cluster without labels.

    Args:
        num_classes: classes C; 1 allows ``labels=None``.
        num_components: mixture components K of each class.
        noise_std: standard deviation of the noise added to the released features; a number or a ``[D]`` tensor.
        covariance_type: ``spherical`` (one variance per component) or ``diag``.
        variant: ``paper`` (Eq. 5-7) or ``official`` (the formula of the authors' released code; spherical only).
        gradient: ``unbiased``, the minibatch gradient of Eq. 7 for every batch size; or ``literal``, the derivative of
            Eq. 5-7 as printed, which is ``batch / num_samples`` times that.
        reduction: ``mean`` divides by D (nats per feature), ``sum`` is Eq. 7 in nats.
        boost: factor on the batch's share in the blend; None is 1 for ``paper`` and 10 for ``official``.
        threshold: share of the noise variance below which ``official`` stops shrinking a variance.
        gamma: offset inside the logarithms of ``official``.
        check_finite: whether to raise on NaN or infinite features; waits for the device.
        check_labels: whether to raise on labels out of range on every device; waits for the device. Eager CPU calls always
            raise.
        process_group: torch.distributed group over which batch statistics are summed. At the first training step, ranks
            without a mixture take over that of the lowest rank that has one. Pickling leaves the group out.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a value that is not allowed.

    Loading a ``state_dict`` keeps ``noise_std``, and warns if the checkpoint has another one.

    Example:
        >>> import torch
        >>> from cem_fast import CEMLoss
        >>> encoder = torch.nn.Linear(8, 4)
        >>> images, labels = torch.rand(64, 8), torch.arange(64) % 2
        >>> cem = CEMLoss(num_classes=2, num_components=3, noise_std=0.1)
        >>> cem(encoder(images), labels).item()  # before the first fit
        0.0
        >>> cem = cem.fit(encoder(images), labels)
        >>> loss = cem(encoder(images), labels)  # times a weight, plus the loss of the task
        >>> loss.backward()
        >>> bool(loss > 0), encoder.weight.grad.shape
        (True, torch.Size([4, 8]))

    Source: Eq. 5-8 and Algorithm 1 of Xia et al., "Theoretical Insights in Model Inversion Robustness and Conditional
    Entropy Maximization for Collaborative Inference Systems", CVPR 2025.
    """

    always_double = frozenset({"num_samples", "noise_variance"})
    fitted_values = ("is_fitted",)
    num_samples: Tensor
    noise_variance: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        num_components: int = 5,
        noise_std: float | Tensor = 0.025,
        covariance_type: str = "spherical",
        variant: str = "paper",
        gradient: str = "unbiased",
        reduction: str = "mean",
        boost: float | None = None,
        threshold: float = 0.125,
        gamma: float = 0.01,
        check_finite: bool = False,
        check_labels: bool = False,
        process_group: torch.distributed.ProcessGroup | None = None,
    ):
        super().__init__()
        if covariance_type not in COVARIANCES:
            raise ValueError(f"covariance_type must be one of {', '.join(COVARIANCES)}, got {covariance_type!r}")
        std = validate.standard_deviation("noise_std", noise_std)
        per_dimension = covariance_type == "diag", std.dim() == 1
        self.options = bound_options(variant, gradient, reduction, boost, threshold, gamma, *per_dimension)
        self.check_finite, self.check_labels, self.process_group = check_finite, check_labels, process_group
        self.mixture = GaussianMixture(
            num_components=num_components,
            num_classes=num_classes,
            covariance_type=covariance_type,
            algorithm="kmeans",
            process_group=process_group,
        )
        self.mixture.rows_name = "features"
        self.register_buffer("noise_variance", std.square().reshape(-1))
        self.declare_fitted(num_samples=torch.zeros((), dtype=torch.float64))
        self.is_fitted = False
        self._steps_without_fit = 0
        self._checked: validate.Checked | None = None
        self._in_step = process_group is None  # whether all ranks of the group are known to have a mixture

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options._asdict().items())
        return f"noise_std={_range_of(self.noise_variance.sqrt())}, {options}"

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Loss of one batch.

        Args:
            features: clean encoder output ``[N, ...]``, before any noise; trailing dimensions are flattened.
            labels: class of each row ``[N]``, integer; None is allowed for one class.

        Returns:
            A scalar in nats (``reduction="sum"``) or nats per feature (``"mean"``).

        Raises:
            TypeError: features are not a floating-point tensor, or labels are not an integer one.
            ValueError: a shape, device, label or value does not fit.

        Example:
            >>> import torch
            >>> from cem_fast import CEMLoss
            >>> features = torch.tensor([[0.0, 0.0], [2.0, 2.0]])
            >>> cem = CEMLoss(num_classes=1, num_components=1, noise_std=1.0).fit(features)
            >>> cem(features)  # 1/2 log((1 + 1) / 1) for each of the two features
            tensor(0.3466)
        """
        # read from dictionaries, because this runs at every step and look-ups of a module are slow
        checked, noise, group = self._checked, self._buffers["noise_variance"], self.process_group
        mixture: GaussianMixture = self._modules["mixture"]  # type: ignore[assignment]
        if (
            checked is not None
            and checked.means is mixture.means
            and checked.noise_variance is noise
            and checked.options is self.options
            and self.is_fitted
            and (group is None or self._in_step)
            and not (self.check_finite or self.check_labels)
        ):
            rows = checked.rows(features, labels)
            if rows is not None:
                priors = (
                    mixture.variances,
                    mixture.weights,
                    mixture.class_prior,
                    self.num_samples,
                    checked.noise_variance,
                )
                if group is not None:
                    return evaluate(rows, labels, checked.means, priors, checked.arguments, group)
                return evaluate_step(rows, labels, checked.means, priors, checked.arguments)
        return self._checked_step(features, labels)

    def _checked_step(self, features: Tensor, labels: Tensor | None) -> Tensor:
        """Loss of a batch after all checks."""
        rows, mixture = self._rows(features), self.mixture
        # the fitted bound checks the range of labels itself
        check = validate.integer_labels if self.is_fitted else validate.labels
        labels = check(labels, rows.shape[0], mixture.num_classes, rows.device)
        if self.check_finite:
            self._require_finite(rows, labels)
        if self.check_labels and labels is not None:
            validate.label_range(labels, mixture.num_classes)
        if self.process_group is not None and not self._in_step and self.training and rows.requires_grad:
            self._share_fit(rows.device)
        if not self.is_fitted:
            self._count_step(rows)
            return rows.flatten()[:0].sum()
        validate.features(rows, mixture.means, "features")
        validate.noise_variance(self.noise_variance, rows.shape[1], "noise_std")
        self._checked = validate.Checked.of(rows, mixture.means, self.noise_variance, self.options)
        priors = mixture.variances, mixture.weights, mixture.class_prior, self.num_samples, self.noise_variance
        return evaluate(rows, labels, mixture.means, priors, self.options, self.process_group)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_checked": None}

    def fit(self, features: Tensor, labels: Tensor | None = None, *, max_iter: int = 50, tol: float = 1e-4) -> CEMLoss:
        """Fits the mixture to the clean features of the training set, starting from the last fit if there is one.

        Args:
            features: ``[N, ...]``, the whole training set's encoder output; trailing dimensions are flattened.
            labels: class of each row ``[N]``, integer; None is allowed for one class.
            max_iter: maximum number of Lloyd iterations.
            tol: the fit stops when the squared movement of the means is less than ``tol`` times the features' mean variance.

        Returns:
            The loss itself.

        Raises:
            TypeError: features are not a floating-point tensor, or labels are not an integer one.
            ValueError: a shape, device, label or value does not fit.

        Example:
            >>> import torch
            >>> from cem_fast import CEMLoss
            >>> features, labels = torch.rand(100, 4, 2, 2), torch.arange(100) % 10
            >>> cem = CEMLoss(num_classes=10, num_components=2).fit(features, labels)
            >>> cem.mixture.means.shape, int(cem.num_samples)
            (torch.Size([10, 2, 16]), 100)
        """
        rows = self._rows(features).detach()
        self._prepare(rows.shape[1], max_iter, tol)
        self.mixture.fit(rows, labels)
        self._set_num_samples(self.mixture.num_rows_)
        return self

    @torch.no_grad()
    def fit_loader(
        self,
        encoder: nn.Module,
        loader: Iterable[Any],
        *,
        max_iter: int = 50,
        tol: float = 1e-4,
        memory_budget: int = 1 << 30,
        on_pass: Callable[[int, int], None] | None = None,
        unpack: Callable[[Any], tuple[Tensor, Tensor | None]] | None = None,
    ) -> CEMLoss:
        """Fits the mixture to ``encoder(images)`` over a loader of ``(images, labels)`` batches, in evaluation mode.

        Images take the encoder's device and precision.

        Features are kept if they fit in half the budget; otherwise every iteration is one more pass of the encoder.
        If the fit is interrupted, the previous mixture stays.

        Args:
            encoder: the network on the user's device; the modes of its modules are restored.
            loader: yields the same ``(images, labels, ...)`` in every iteration over it, in any order. Entries after the
                labels are ignored, and with one class also the labels, which may be missing.
            max_iter: maximum number of Lloyd iterations.
            tol: as in ``fit``.
            memory_budget: bytes of features that may be kept.
            on_pass: called after each pass with the pass number, from 1, and the number of its images.
            unpack: returns images and labels of a batch of another form, such as ``lambda b: (b["image"], b["label"])``.

        Returns:
            The loss itself.

        Raises:
            TypeError: the loader can be iterated only once, or yields other batches.
            ValueError: the loader yields no batch.

        Example:
            >>> import torch
            >>> from cem_fast import CEMLoss
            >>> images, labels = torch.rand(60, 1, 6, 6), torch.arange(60) % 3
            >>> data = torch.utils.data.TensorDataset(images, labels)
            >>> loader = torch.utils.data.DataLoader(data, batch_size=20)
            >>> cem = CEMLoss(num_classes=3, num_components=2)
            >>> cem.fit_loader(torch.nn.Conv2d(1, 2, 3), loader).mixture.means.shape
            torch.Size([3, 2, 32])
        """
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder must be a torch.nn.Module, got {type(encoder).__name__}")
        require_iterable_again("loader", loader)
        with in_eval_mode(encoder):
            batches = _Encoded(self, encoder, loader, unpack or self._images_and_labels)
            self._prepare(batches.dimension(), max_iter, tol)
            self.mixture.fit_stream(batches, memory_budget=memory_budget, on_pass=on_pass)
        self._set_num_samples(self.mixture.num_rows_)
        return self

    @torch.no_grad()
    def gather(self, features: Tensor, labels: Tensor | None = None) -> None:
        """Adds a batch to the statistics of the next ``refit``: the cheapest fit, from features that training computes anyway.

        Args:
            features: clean encoder output ``[N, ...]``; trailing dimensions are flattened.
            labels: class of each row ``[N]``, integer; None is allowed for one class.

        Raises:
            RuntimeError: the loss has not been fitted yet, so there are no means to gather about.
            TypeError: features are not a floating-point tensor, or labels are not an integer one.
            ValueError: a shape, device or label does not fit.

        Example:
            >>> import torch
            >>> from cem_fast import CEMLoss
            >>> features, labels = torch.rand(40, 3), torch.arange(40) % 2
            >>> cem = CEMLoss(num_classes=2, num_components=2).fit(features, labels)
            >>> for rows, classes in zip(features.split(20), labels.split(20)):  # the batches of an epoch
            ...     cem.gather(rows, classes)
            >>> int(cem.refit().num_samples)
            40
        """
        self.mixture.gather(self._rows(features), labels)

    @torch.no_grad()
    def refit(self) -> CEMLoss:
        """Moves the mixture by one k-means iteration on the batches gathered since the last call.

        Returns:
            The loss itself.

        Raises:
            RuntimeError: no batch was gathered.

        Example:
            >>> import torch
            >>> from cem_fast import CEMLoss
            >>> cem = CEMLoss(num_classes=1, num_components=1).fit(torch.tensor([[1.0], [3.0]]))
            >>> cem.gather(torch.tensor([[4.0], [6.0]]))
            >>> cem.refit().mixture.means
            tensor([[[5.]]])
        """
        self.mixture.step()
        self._set_num_samples(self.mixture.num_rows_)
        return self

    def _prepare(self, dimension: int, max_iter: int, tol: float) -> None:
        require_count("max_iter", max_iter)
        if not require_number("tol", tol) >= 0:
            raise ValueError(f"tol must not be negative, got {tol}")
        mixture = self.mixture
        warm = mixture.is_fitted and mixture.means.shape[2] == dimension
        mixture.init = mixture.means.clone() if warm else "k-means++"
        mixture.max_iter, mixture.tol = max_iter, tol

    def load_mixture(
        self, *, means: Tensor, variances: Tensor, weights: Tensor, class_prior: Tensor, num_samples: int
    ) -> CEMLoss:
        """Sets the mixture instead of fitting it.

        Args:
            means: ``[C, K, D]``.
            variances: ``[C, K]`` (spherical) or ``[C, K, D]`` (diag), positive.
            weights: ``[C, K]``; rows sum to 1.
            class_prior: ``[C]``; sums to 1.
            num_samples: size of the training set.

        Returns:
            The loss itself.

        Raises:
            ValueError: a shape or value does not fit.

        Example:
            >>> import torch
            >>> from cem_fast import CEMLoss
            >>> cem, one = CEMLoss(num_classes=1, num_components=1, noise_std=1.0), torch.ones(1, 1)
            >>> mixture = dict(means=torch.zeros(1, 1, 2), variances=one, weights=one, class_prior=one[0])
            >>> cem.load_mixture(**mixture, num_samples=100)(torch.zeros(0, 2))  # 1/2 log 2 of an empty batch
            tensor(0.3466)
        """
        samples = num_samples if isinstance(num_samples, Tensor) else require_number("num_samples", num_samples)
        if not samples > 0:
            raise ValueError(f"num_samples must be positive, got {num_samples}")
        if not samples < math.inf:
            raise ValueError(f"num_samples must be finite, got {num_samples}")
        for name, value in (("weights", weights), ("class_prior", class_prior)):
            validate.tensor(name, value, "[C, K]" if name == "weights" else "[C]", 2 if name == "weights" else 1)
            worst = float((value.double().sum(-1) - 1).abs().max())
            if not worst < 1e-3:
                raise ValueError(f"{name} must sum to 1, got a sum that is off by {worst:.2g}")
        self.mixture.set_parameters(means=means, variances=variances, weights=weights, class_prior=class_prior)
        self._set_num_samples(num_samples)
        return self

    def _count_step(self, rows: Tensor) -> None:
        """Warns if the fit was forgotten; compiled code does not count, since each count would trigger a recompilation."""
        if torch.compiler.is_compiling() or not (self.training and rows.requires_grad):
            return
        self._steps_without_fit += 1
        if self._steps_without_fit & (self._steps_without_fit - 1) == 0 and bool(self.get_buffer(FOLLOWER)):
            raise RuntimeError(
                "rank 0 has a fitted CEMLoss, and this rank has not: fit or load it on every rank, or pass process_group, so that "
                "the ranks share the mixture"
            )
        if self._steps_without_fit == PATIENCE:
            warn(
                f"CEMLoss has been an exact zero for {PATIENCE:,} training steps, because it was never fitted: call fit(features, "
                "labels) or fit_loader(encoder, loader), usually once per epoch"
            )

    def _share_fit(self, device: torch.device) -> None:
        """Gives the mixture of the lowest rank that has one, say from a checkpoint, to all ranks of the group."""
        group, mixture = self.process_group, self.mixture
        assert group is not None
        ranks, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
        table = torch.zeros(ranks, 2, dtype=torch.int64, device=device)
        if self.is_fitted:
            table[rank, 0], table[rank, 1] = mixture.means.shape[2], mixture.means.element_size()
        torch.distributed.all_reduce(table, group=group)
        owners = [(of_rank, *row) for of_rank, row in enumerate(table.tolist()) if row[0]]
        if not owners:
            return
        owner, dimension, size = owners[0]
        mixture.to(device=device, dtype=torch.float64 if size == 8 else torch.float32)
        given = {"num_samples": self.num_samples.to(device)}
        for name in mixture.fitted_tensors:
            own = getattr(mixture, name)
            shape = [dimension if n == 0 else n for n in own.shape] if rank != owner else own.shape
            given[name] = own.clone() if rank == owner else own.new_empty(shape)
        source = torch.distributed.get_global_rank(group, owner)
        for value in given.values():
            torch.distributed.broadcast(value, source, group=group)
        num_samples = given.pop("num_samples")
        with torch.no_grad():
            mixture.set_parameters(**given)
            self._set_num_samples(num_samples)
        self._in_step = True

    def _set_num_samples(self, value: int | Tensor) -> None:
        self.num_samples.fill_(value)
        self.is_fitted = True
        self.mark_fitted()

    def _rows(self, features: Tensor) -> Tensor:
        validate.rows("features", features)
        return features if features.dim() == 2 else features.flatten(1)

    def _images_and_labels(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        several = isinstance(batch, (tuple, list))
        images, labels, *_ = (*batch, None, None) if several else (batch, None)
        needed = self.mixture.num_classes > 1 or labels is not None
        if isinstance(images, Tensor) and (isinstance(labels, Tensor) or not needed):
            return images, labels
        kind = type(batch).__name__
        got = f"a {kind} of {', '.join(type(part).__name__ for part in batch)}" if several else f"a {kind}"
        raise TypeError(
            f"loader must yield batches (images, labels) of two tensors, got {got}; pass unpack to take others apart"
        )

    @staticmethod
    def _require_finite(rows: Tensor, labels: Tensor | None) -> None:
        bad = ~torch.isfinite(rows.detach()).all(1)
        if bool(bad.any()):
            row = int(bad.int().argmax())
            of_class = "" if labels is None else f" of class {int(labels[row])}"
            raise ValueError(
                f"features must be finite, got NaN or infinity in {int(bad.sum())} rows, first row {row}{of_class}"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        num_samples, buffer = self.num_samples.clone(), self.noise_variance
        noise_variance = buffer.clone()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.noise_variance = buffer.copy_(noise_variance)
        if self.mixture.accepts(state_dict, prefix + "mixture."):
            self.is_fitted = float(self.num_samples) > 0
            if self.is_fitted:
                self.mark_fitted()
            loaded = state_dict.get(prefix + "noise_variance", noise_variance).to(noise_variance)
            if loaded.shape == noise_variance.shape and not torch.equal(loaded, noise_variance):
                warn(
                    f"the checkpoint has noise_std {_range_of(loaded.sqrt())}; this CEMLoss keeps its own, "
                    f"{_range_of(noise_variance.sqrt())}"
                )
        else:
            self.num_samples.copy_(num_samples)


def _range_of(values: Tensor) -> str:
    """A number, or the range of several."""
    low, high = values.min().item(), values.max().item()
    return f"{low:.4g}" if len(values) == 1 else f"{low:.4g} to {high:.4g}"


class _Encoded:
    """Batches of features: the batches of a loader, encoded again in every iteration."""

    def __init__(
        self,
        loss: CEMLoss,
        encoder: nn.Module,
        loader: Iterable[Any],
        unpack: Callable[[Any], tuple[Tensor, Tensor | None]],
    ):
        self.loss, self.encoder, self.loader, self.unpack = loss, encoder, loader, unpack
        self.like = next((p for p in encoder.parameters() if p.is_floating_point()), torch.empty(0))
        self.first_pass: Iterable[Any] | None = None  # begun by `dimension`

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        batches, self.first_pass = self.first_pass, None
        for batch in self.loader if batches is None else batches:
            images, labels = self.unpack(batch)
            rows = self.encode(images)
            keep = labels is not None and self.loss.mixture.num_classes > 1
            yield rows, cast(Tensor, labels).to(rows.device) if keep else None

    def encode(self, images: Tensor) -> Tensor:
        dtype = self.like.dtype if images.is_floating_point() and self.like.numel() else None
        return self.loss._rows(self.encoder(images.to(device=self.like.device, dtype=dtype)))

    def dimension(self) -> int:
        """Features of an image. The first pass starts with the batch that is read here: there may be no other pass."""
        batches = iter(self.loader)
        for first in batches:
            self.first_pass = itertools.chain([first], batches)
            return self.encode(self.unpack(first)[0][:1]).shape[1]
        raise ValueError("loader must yield at least one batch of (images, labels), got none")
