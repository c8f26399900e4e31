"""The base class of defenses: a map from features to released features, with an optional training penalty."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cem_fast._support.ranks import Ranks
from cem_fast._support.seeding import seeded
from cem_fast.defenses import secure
from cem_fast.models.split import SplitModel

COPIES = 32  # of a row, in which a random defense shows


class Defense(nn.Module):
    """A defense that changes nothing; subclasses override what they need.

    The training loop calls ``start`` once, ``before_epoch`` at the start of every epoch, then for every batch ``penalty`` and, after the
    optimizer's step, ``after_step``. All features that leave the device, in training, in testing and under attack, pass through
    ``release``. A saved network is rebuilt by ``attach`` and ``reshape``. For training to continue after an interruption, state between
    two epochs must be in parameters, buffers and optimizers that ``start`` makes and keeps as attributes.

    Attributes:
        uses_bottleneck: whether the network is built with a bottleneck at the cut, as for all defenses of the paper's tables.
        keeps_range: whether ``before_noise`` maps features in [0, 1] to [0, 1], so that their capacity is known.
        noise_std: standard deviation of the Gaussian noise that ``release`` adds last, to the result of ``before_noise``.
        secure: whether draws come from the operating system's secure generator; assignable at any time. Evaluations refuse it, since
            they repeat their draws from a seed.
        ranks: the processes that train together; each gives ``penalty`` and ``after_step`` its share of a batch.

    Example:
        >>> import torch
        >>> from cem_fast import defenses
        >>> class Rounding(defenses.Defense):
        ...     def release(self, features):
        ...         return features.round(decimals=1)
        >>> Rounding().release(torch.tensor([[0.12, 0.98]]))
        tensor([[0.1000, 1.0000]])
    """

    uses_bottleneck: bool = True
    keeps_range: bool = False
    noise_std: float = 0.0
    secure: bool = False
    ranks: Ranks = Ranks()

    def attach(self, model: SplitModel, image_shape: torch.Size) -> None:
        """Builds the defense's own networks, and changes the model if the defense does; a second call changes nothing.

        Args:
            model: the network, on the device to train on.
            image_shape: ``(channels, height, width)`` of the images.
        """

    def reshape(self, model: SplitModel, shapes: Mapping[str, torch.Size]) -> None:
        """Changes the model to the shapes that this defense gave it in an earlier training.

        Args:
            model: the network, attached.
            shapes: shape of every tensor, by its name in the model's ``state_dict``.
        """

    def start(self, model: SplitModel, images: Tensor) -> None:
        """Attaches the defense and prepares it for training.

        Args:
            model: the network, on the device to train on.
            images: the training images ``[N, C, H, W]``.
        """
        self.attach(model, images.shape[1:])

    def before_epoch(self, model: SplitModel, images: Tensor, labels: Tensor, *, epoch: int, epochs: int) -> None:
        """May change the network before an epoch; the optimizer then follows its new parameters.

        Args:
            model: the network.
            images: the training images ``[N, C, H, W]``.
            labels: their classes ``[N]``, int64.
            epoch: the epoch that begins, from 0.
            epochs: number of epochs.
        """

    def release(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Returns the features that leave the device, and so reach the cloud and an attacker.

        A subclass may leave ``generator`` out.

        Args:
            features: output of the encoder, ``[N, ...]``.
            generator: generator of the draws, on the device of the features; None for torch's own.

        Returns:
            Features of the same shape.

        Raises:
            ValueError: a generator is given to a defense with ``secure``.
        """
        return features

    def normal_like(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Returns standard normal draws of the shape of features, for ``release``: secure ones where ``secure`` is set.

        Args:
            features: any shape.
            generator: as for ``release``.
        """
        if self.is_secure(generator):
            return secure.normal(features.shape).to(features)
        if generator is None:
            return torch.randn_like(features)
        return torch.empty_like(features).normal_(generator=generator)

    def uniform_like(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Returns uniform draws on [0, 1) of the shape of features, likewise.

        Args:
            features: any shape.
            generator: as for ``release``.
        """
        if self.is_secure(generator):
            return secure.uniform(features.shape, features.dtype).to(features.device)
        return torch.empty_like(features).uniform_(generator=generator)

    def is_secure(self, generator: torch.Generator | None) -> bool:
        """Whether draws are secure; refuses a generator for them.

        Args:
            generator: as for ``release``.
        """
        if self.secure and generator is not None:
            raise ValueError("generator must be None where secure is set: secure draws have no seed")
        return self.secure

    def before_noise(self, features: Tensor) -> Tensor:
        """Returns the features before the Gaussian noise that ``release`` adds last.

        Args:
            features: output of the encoder, ``[N, ...]``.
        """
        return self.release(features)

    def only_adds_noise(self, features: Tensor) -> bool:
        """Whether ``release`` is not random but for the Gaussian noise that it adds last: copies of one row stay equal before it.

        Args:
            features: output of the encoder, ``[N, ...]``, at least one row.
        """
        copies = self.before_noise(features[:1].detach().repeat(COPIES, *[1] * (features.dim() - 1)))
        return torch.equal(copies, copies[:1].expand_as(copies))

    def log_likelihood(self, released: Tensor, features: Tensor, *, noise_std: float = 0.0) -> Tensor:
        """Returns ``log p(released | features)``, the density of one release: what an attacker knows of the noise.

        The default is ``sum log N(released; before_noise(features), noise_std**2)``. It is exact for defenses whose only randomness is the
        Gaussian noise that ``release`` adds last. Others override it.

        Args:
            released: released features ``[N, ...]``.
            features: output of the encoder, ``[N, ...]``. The result is differentiable with respect to them.
            noise_std: standard deviation of Gaussian noise added to the release afterwards, by a later part of
                :class:`cem_fast.defenses.Composed`.

        Returns:
            ``[N]``, in nats.

        Raises:
            NotImplementedError: the release has no density, for lack of noise, or it is random in a way that this method does not know.

        Example:
            >>> import torch
            >>> from cem_fast import defenses
            >>> defense = defenses.GaussianNoise(noise_std=0.5)
            >>> defense.log_likelihood(torch.zeros(1, 3), torch.zeros(1, 3))  # -3 log(0.5 sqrt(2 pi))
            tensor([-0.6774])
        """
        if not self.only_adds_noise(features):
            raise NotImplementedError(
                f"the defense {type(self).__name__} releases features at random: its likelihood needs a log_likelihood of its own"
            )
        std = math.hypot(self.noise_std, noise_std)
        if std == 0:
            raise NotImplementedError(
                f"the defense {type(self).__name__} releases features without noise: no density exists"
            )
        return gaussian_log_density(released - self.before_noise(features), std).flatten(1).sum(1)

    def penalty(self, images: Tensor, features: Tensor, released: Tensor, labels: Tensor) -> Tensor | float:
        """Returns the term that this defense adds to the training loss of one batch.

        Args:
            images: the batch ``[N, C, H, W]``.
            features: their clean features ``[N, ...]``.
            released: their released features ``[N, ...]``.
            labels: their classes ``[N]``, int64.
        """
        return 0.0

    def after_step(self, images: Tensor, released: Tensor) -> None:
        """Updates the defense's own networks after the model's step.

        Args:
            images: the batch ``[N, C, H, W]``.
            released: their released features ``[N, ...]``, detached.
        """

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Returns the optimizers of this defense and its parts, by the names of their attributes."""
        return {
            f"defense.{name}.{key}": value
            for name, module in self.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, torch.optim.Optimizer)
        }

    @contextmanager
    def trained_over(self, ranks: Ranks) -> Iterator[None]:
        """Sets ``ranks`` of this defense and its parts inside the block."""
        parts = [module for module in self.modules() if isinstance(module, Defense)]
        for part in parts:
            part.ranks = ranks
        try:
            yield
        finally:
            for part in parts:
                del part.ranks


def released(defense: Defense, features: Tensor, generator: torch.Generator | None) -> Tensor:
    """Returns ``defense.release(features, generator)``; a ``release`` of features alone draws from a seed of the generator.

    Args:
        defense: the defense.
        features: ``[N, ...]``.
        generator: as for :meth:`cem_fast.defenses.Defense.release`.

    Example:
        >>> import torch
        >>> from cem_fast import defenses
        >>> from cem_fast.defenses.base import released
        >>> noise = defenses.GaussianNoise(noise_std=0.1)
        >>> one, two = (released(noise, torch.zeros(1, 3), torch.Generator().manual_seed(0)) for _ in range(2))
        >>> torch.equal(one, two)
        True
    """
    if generator is None:
        return defense.release(features)
    if "generator" in inspect.signature(defense.release).parameters:
        return defense.release(features, generator)
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
    with seeded(int(seed)):
        return defense.release(features)


def require_defense(name: str, value: object) -> Defense:
    """Raises unless a value is a defense, and returns it.

    Args:
        name: name of the argument, for the error.
        value: the value.

    Raises:
        TypeError: the value is no defense.

    Example:
        >>> from cem_fast.defenses.base import require_defense
        >>> require_defense("defense", 3)
        Traceback (most recent call last):
        TypeError: defense must be a cem_fast.defenses.Defense, got int
    """
    if not isinstance(value, Defense):
        raise TypeError(f"{name} must be a cem_fast.defenses.Defense, got {type(value).__name__}")
    return value


def require_seeded(defense: Defense) -> None:
    """Fails for a defense with secure draws, which no seed repeats.

    Args:
        defense: the defense to evaluate.

    Raises:
        ValueError: ``secure`` is set for it or one of its parts.

    Example:
        >>> from cem_fast import defenses
        >>> from cem_fast.defenses.base import require_seeded
        >>> require_seeded(defenses.GaussianNoise(noise_std=0.1, secure=True))
        Traceback (most recent call last):
        ValueError: secure must be False in evaluations, whose draws repeat from a seed: GaussianNoise
    """
    for part in defense.modules():
        if isinstance(part, Defense) and part.secure:
            raise ValueError(
                f"secure must be False in evaluations, whose draws repeat from a seed: {type(part).__name__}"
            )


def gaussian_log_density(deviations: Tensor, std: float) -> Tensor:
    """Returns ``log N(deviations; 0, std**2)``, element by element.

    Args:
        deviations: any shape.
        std: standard deviation, positive.

    Example:
        >>> import torch
        >>> from cem_fast.defenses.base import gaussian_log_density
        >>> gaussian_log_density(torch.tensor([0.0, 1.0]), 1.0)
        tensor([-0.9189, -1.4189])
    """
    return -0.5 * (deviations / std).square() - math.log(std * math.sqrt(2 * math.pi))
