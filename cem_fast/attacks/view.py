"""How an attack sees a network: messages, features before the defense, and the likelihood of messages."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from cem_fast.attacks.base import Observe, as_messages

DRAWS = 8  # calls of a plain callable that estimate its noise, and the features before it
PROBES = 256  # images, at most, on which noise and gradients are tried
QUIET = 1e-2  # standard deviation that stands for no noise, in units of the features' own


@runtime_checkable
class Known(Protocol):
    """An observer that gives the features before the defense and the density of released ones.

    :class:`cem_fast.training.Observer` is one. Any function of images can be attacked, too; see :class:`View`.

    Example:
        >>> import torch
        >>> from cem_fast.attacks.view import Known
        >>> isinstance(torch.clone, Known)
        False
    """

    def __call__(self, images: Tensor) -> Tensor:
        """Returns released features ``[N, ...]``, with fresh noise at every call."""

    def features(self, images: Tensor) -> Tensor:
        """Returns the features before the defense ``[N, ...]``, differentiable if the images require a gradient."""

    def log_density(self, released: Tensor, features: Tensor) -> Tensor:
        """Returns ``log p(released | features)``, ``[N]``; raises NotImplementedError if there is none."""

    def only_adds_noise(self, features: Tensor) -> bool:
        """Whether the release is not random but for Gaussian noise that is added last."""


class View:
    """A network under attack: what the attacker observes and what it knows of the noise.

    An observer of :func:`cem_fast.training.observer` gives features and exact likelihoods. Of any other callable, features are estimated
    as the mean of repeated calls, and the noise as Gaussian with the variance of those calls, feature by feature. So is a release without
    a density, such as one without noise, whose standard deviation is then that of a weak noise.

    Args:
        observe: function from images ``[N, C, H, W]`` to released features ``[N, ...]``.
        images: images of the attacker, from which the noise is estimated.
        releases: messages of one image, used jointly.

    Attributes:
        averaged: function from images to the mean of the messages of each, for attacks that learn from one.
        differentiable: whether features have a gradient with respect to the images.
        exact: whether the likelihood is the defense's own.
        simple: whether the noise is Gaussian and added last, or estimated as such.
        scale: standard deviation of the features before the defense, over images and features.
        information: mean squared derivative of the log-likelihood with respect to a feature; ``1 / s**2`` for Gaussian noise.

    Example:
        >>> import torch
        >>> from cem_fast.attacks.view import View
        >>> images = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> view = View(lambda x: x.flatten(1) + 0.1 * torch.randn(len(x), 16), images, releases=2)
        >>> view.differentiable, view.exact
        (True, False)
        >>> messages = view.messages(images)
        >>> messages.shape, view.pooled(messages).shape
        (torch.Size([2, 64, 16]), torch.Size([64, 16]))
        >>> view.log_density(messages, view.features(images)).shape
        torch.Size([64])
    """

    def __init__(self, observe: Observe, images: Tensor, *, releases: int = 1):
        self.observe, self.releases = observe, releases
        self.averaged = observe if releases == 1 else Averaged(observe, releases)
        probe = images[:PROBES].detach()
        with torch.no_grad():
            looks = torch.stack([observe(probe) for _ in range(DRAWS)])
            self.exact = isinstance(observe, Known)
            features = self.features(probe)
            if isinstance(observe, Known):
                try:
                    observe.log_density(looks[0], features)
                except NotImplementedError:
                    self.exact = False
        deviation = features.float().flatten(1).std(0, correction=0) if len(probe) > 1 else features.new_zeros(1)
        self.scale = float(deviation.square().mean().sqrt()) + 1e-12
        self._estimate_noise(looks.float())
        self.simple = not self.exact or (isinstance(observe, Known) and observe.only_adds_noise(features))
        slopes = self.score(looks[:1], features) if self.exact else 1 / self.noise_std
        self.information = float(slopes.square().mean())
        self.differentiable = self._has_gradient(probe[:2])

    def messages(self, images: Tensor) -> Tensor:
        """Returns ``releases`` messages of every image, ``[R, N, ...]``, with independent noise.

        Args:
            images: ``[N, C, H, W]``.
        """
        return torch.stack([self.observe(images) for _ in range(self.releases)])

    def received(self, features: Tensor) -> Tensor:
        """Returns the features given to ``reconstruct`` as messages ``[R, N, ...]``.

        Args:
            features: ``[N, ...]`` for one release, ``[R, N, ...]`` for more.

        Raises:
            ValueError: the number of releases is another.
        """
        return as_messages(features, self.releases)

    @staticmethod
    def pooled(messages: Tensor) -> Tensor:
        """Returns the mean of the messages of every image, ``[N, ...]``: what networks learn from.

        Args:
            messages: ``[R, N, ...]``.
        """
        return messages[0] if len(messages) == 1 else messages.mean(0)

    def features(self, images: Tensor) -> Tensor:
        """Returns the features before the defense ``[N, ...]``, or their estimate, differentiable if the images require a gradient.

        Args:
            images: ``[N, C, H, W]``.
        """
        if isinstance(self.observe, Known):
            return self.observe.features(images)
        return torch.stack([self.observe(images) for _ in range(DRAWS)]).mean(0)

    def log_density(self, messages: Tensor, features: Tensor) -> Tensor:
        """Returns the log-likelihood of the messages of every image, ``[N]``, the sum over independent releases.

        Args:
            messages: ``[R, N, ...]``.
            features: features before the defense, ``[N, ...]``.
        """
        if self.exact:
            assert isinstance(self.observe, Known)
            return torch.stack([self.observe.log_density(message, features) for message in messages]).sum(0)
        deviations = (messages - features) / self.noise_std
        constant = (self.noise_std.log() + 0.5 * math.log(2 * math.pi)).sum() * len(messages)
        return -0.5 * deviations.square().flatten(2).sum((0, 2)) - constant

    def score(self, messages: Tensor, features: Tensor) -> Tensor:
        """Returns the derivative of the log-likelihood with respect to the features, ``[N, ...]``.

        Args:
            messages: ``[R, N, ...]``.
            features: features before the defense, ``[N, ...]``.
        """
        with torch.enable_grad():
            place = features.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.log_density(messages, place).sum(), place)
        return slope

    def _estimate_noise(self, looks: Tensor) -> None:
        """Standard deviation of every feature's noise, from repeated observations ``[draws, N, ...]`` of the same images."""
        variance = looks.var(0).mean(0)
        floor = max(QUIET * self.scale, 0.1 * float(variance.mean().sqrt()))
        self.noise_std = variance.sqrt().clamp_min(floor)
        self.noise_variance = float(variance.mean())

    def _has_gradient(self, images: Tensor) -> bool:
        with torch.enable_grad():
            pixels = images.clone().requires_grad_()
            features = self.features(pixels)
            if not features.requires_grad:
                return False
            try:
                slope = torch.autograd.grad(features.sum(), pixels, allow_unused=True)[0]
            except RuntimeError:  # an operation without a derivative
                return False
        return slope is not None and bool(slope.isfinite().all()) and bool(slope.any())


class Averaged:
    """The mean of several observations of the same images, for attacks that learn from one message.

    Args:
        observe: function from images to released features.
        releases: observations in the mean.

    Example:
        >>> import torch
        >>> from cem_fast.attacks.view import Averaged
        >>> observe = Averaged(lambda x: x + torch.randn_like(x), 100)
        >>> observe(torch.zeros(1, 1, 32, 32)).std() < 0.2
        tensor(True)
    """

    def __init__(self, observe: Observe, releases: int):
        self.observe, self.releases = observe, releases

    def __call__(self, images: Tensor) -> Tensor:
        return torch.stack([self.observe(images) for _ in range(self.releases)]).mean(0)
