"""What an attacker observes of a network under a defense."""

from __future__ import annotations

import torch
from torch import Tensor

from cem_fast.defenses.base import Defense, require_seeded
from cem_fast.models.split import SplitModel
from cem_fast.training.measure import clean_features, encoded


class Observer:
    """A network and its defense, as an attacker observes them; made by :func:`cem_fast.training.observer`.

    Called with images ``[N, C, H, W]``, it returns released features ``[N, ...]``, with fresh noise at every call. The attacker also knows
    the encoder and the distribution of the noise: :meth:`features` and :meth:`log_likelihood`.

    The encoder is not random, so repeated observations of the same tensor share one pass through it. Images that require a gradient get
    one, through the encoder and the defense; several observations of the same tensor then share one backward pass.

    Args:
        model: the network, which must not change while it is observed.
        defense: the defense, whose ``release`` is called.

    Example:
        >>> import torch
        >>> from cem_fast import defenses, models, training
        >>> model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=4)
        >>> observe = training.observer(model, defenses.GaussianNoise(noise_std=0.1))
        >>> images = torch.rand(5, 1, 16, 16)
        >>> released = observe(images)
        >>> (released - observe.features(images)).std() < 0.2
        tensor(True)
        >>> observe.log_likelihood(released, images).shape
        torch.Size([5])
    """

    def __init__(self, model: SplitModel, defense: Defense):
        require_seeded(defense)
        self.model, self.defense = model, defense
        self._last: tuple[Tensor, int, Tensor] | None = None  # images, their version, and their features

    def __call__(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(images.requires_grad and torch.is_grad_enabled()):
            return self.defense.release(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Returns the features before the defense, differentiable if the images require a gradient.

        Args:
            images: ``[N, C, H, W]``.

        Returns:
            ``[N, ...]``.

        Raises:
            FloatingPointError: a feature of images without a gradient is not finite.
        """
        differentiated = images.requires_grad and torch.is_grad_enabled()
        with torch.set_grad_enabled(differentiated):
            if images.is_inference():  # such tensors have no version
                return clean_features(self.model, images)
            if self._last is not None:
                known, version, features = self._last
                if known is images and version == images._version and features.requires_grad == differentiated:
                    return features
            features = encoded(self.model, images) if differentiated else clean_features(self.model, images)
            if features.requires_grad:
                features.register_hook(self._forget)
            self._last = (images, images._version, features)
            return features

    def log_likelihood(self, released: Tensor, images: Tensor) -> Tensor:
        """Returns ``log p(released | images)``, exact and differentiable with respect to the images.

        Args:
            released: released features ``[N, ...]``, one message of each image.
            images: ``[N, C, H, W]``.

        Returns:
            ``[N]``, in nats.

        Raises:
            NotImplementedError: the release has no density, or the defense does not know it.
        """
        return self.log_density(released, self.features(images))

    def log_density(self, released: Tensor, features: Tensor) -> Tensor:
        """Returns ``log p(released | features)``: :meth:`log_likelihood` of images whose features are known.

        Args:
            released: released features ``[N, ...]``.
            features: features before the defense, ``[N, ...]``.

        Returns:
            ``[N]``, in nats.

        Raises:
            NotImplementedError: the release has no density, or the defense does not know it.
        """
        return self.defense.log_likelihood(released, features)

    def only_adds_noise(self, features: Tensor) -> bool:
        """Whether the defense is not random but for the Gaussian noise that it adds last.

        Args:
            features: features before the defense, ``[N, ...]``.
        """
        return self.defense.only_adds_noise(features)

    def _forget(self, _: Tensor) -> None:
        """Drops features whose graph a backward pass is about to free."""
        self._last = None


def observer(model: SplitModel, defense: Defense) -> Observer:
    """Returns what an attacker observes: images ``[N, C, H, W]`` -> released features, with fresh noise at every call.

    The mean of ``n`` observations of one image has the noise of ``noise_std / sqrt(n)``: a device must not release an image twice.

    Args:
        model: the network, which must not change while it is observed.
        defense: the defense, whose ``release`` is called.

    Returns:
        The observer, a function of images that also knows the features before the defense and the likelihood of released ones.

    Example:
        >>> import torch
        >>> from cem_fast import defenses, models, training
        >>> model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=4)
        >>> observe = training.observer(model, defenses.GaussianNoise(noise_std=0.1))
        >>> images = torch.rand(5, 1, 16, 16)
        >>> torch.equal(observe(images), observe(images))
        False
    """
    return Observer(model, defense)
