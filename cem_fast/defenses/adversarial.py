"""Adversarial representation learning: training of the encoder against a decoder that tries to invert it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cem_fast._support.counts import require_number
from cem_fast._support.eval_mode import in_eval_mode
from cem_fast._support.maps import as_maps
from cem_fast._support.seeding import seeded
from cem_fast.data.stored import moments
from cem_fast.defenses.base import Defense
from cem_fast.models.split import SplitModel


class ProxyDecoder(nn.Module):
    """Decoder from released features to images: the adversary inside the defense, separate from the attacker's networks.

    Its initial output is ``mean``, the mean of the training images, and the residual added to it is unbounded. Behind a Sigmoid, mostly
    black images would drive the whole output to black, where the gradient vanishes. Tokens are arranged as a grid of patches. Vectors
    first pass a linear layer to maps of at most 8x8 places.

    Args:
        feature_shape: shape of an image's features: maps ``(C, H, W)``, tokens ``(T, D)``, or a vector ``(D,)``.
        image_shape: ``(channels, height, width)`` of the images.
        width: channels of the first layer; later layers have half as many.

    Example:
        >>> import torch
        >>> from cem_fast.defenses.adversarial import ProxyDecoder
        >>> ProxyDecoder((8, 4, 4), (1, 16, 16))(torch.rand(2, 8, 4, 4)).shape
        torch.Size([2, 1, 16, 16])
    """

    mean: Tensor

    def __init__(self, feature_shape: Sequence[int], image_shape: Sequence[int], width: int = 32):
        super().__init__()
        self.image_shape, self.size = tuple(image_shape), list(image_shape[1:])
        channels, rows, columns = as_maps(torch.empty(1, *feature_shape), image_shape).shape[1:]
        self.first: nn.Module = nn.Conv2d(channels, width, 3, padding=1)
        if len(feature_shape) < 3 and rows * columns == 1:
            rows, columns = (min(8, math.ceil(side / 4)) for side in self.size)
            self.first = nn.Sequential(
                nn.Flatten(), nn.Linear(channels, width * rows * columns), nn.Unflatten(1, (width, rows, columns))
            )
        doublings = max(0, round(math.log2(image_shape[1] / rows)))
        widths = [width] + [width // 2] * doublings
        self.middle = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in zip(widths, widths[1:], strict=False)
        )
        self.last = nn.Conv2d(widths[-1], image_shape[0], 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]
        self.register_buffer("mean", torch.zeros(image_shape))

    def forward(self, released: Tensor) -> Tensor:
        hidden = F.relu(self.first(as_maps(released, self.image_shape)))
        for convolution in self.middle:
            hidden = F.relu(convolution(F.interpolate(hidden, scale_factor=2.0)))
        if list(hidden.shape[2:]) != self.size:
            hidden = F.interpolate(hidden, self.size)
        return self.mean + self.last(hidden)


class AdversarialRepresentation(Defense):
    """Adds ``weight * relu(1 - mse_proxy / variance)`` to the loss: the share of the images' variance that a proxy decoder explains.

    The proxy learns on the released features of training images, one Adam step after every step of the network. Relative to the variance
    of the images about their mean, its success has no unit, and the penalty is zero where the proxy is no better than the mean. Features
    are released unchanged.

    Args:
        adversary_weight: weight of the penalty, positive.
        seed: seed of the proxy's initial weights.

    Raises:
        ValueError: ``adversary_weight`` is not positive and finite.

    Source:
        Xiao et al., "Adversarial learning of privacy-preserving and task-oriented representations", AAAI 2020; Li et al., "ResSFL: a
        resistance transfer framework for defending model inversion attack in split federated learning", CVPR 2022.

    Example:
        >>> import torch
        >>> from cem_fast import defenses, models
        >>> model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=8)
        >>> defense = defenses.AdversarialRepresentation(adversary_weight=1.0)
        >>> images = torch.rand(4, 1, 16, 16)
        >>> defense.start(model, images)  # as training does
        >>> features = model.encoder(images)
        >>> released = defense.release(features)
        >>> torch.equal(released, features)
        True
        >>> defense.penalty(images, features, released, torch.tensor([0, 1, 2, 0])) >= 0
        tensor(True)
    """

    variance: Tensor
    keeps_range = True

    def __init__(self, *, adversary_weight: float, seed: int = 0):
        super().__init__()
        if not 0 < require_number("adversary_weight", adversary_weight) < math.inf:
            raise ValueError(f"adversary_weight must be positive and finite, got {adversary_weight}")
        self.adversary_weight = adversary_weight
        self.seed = seed
        self.register_buffer("variance", torch.ones(()))

    def attach(self, model: SplitModel, image_shape: torch.Size) -> None:
        with torch.no_grad(), in_eval_mode(model):
            features = model.encoder(torch.zeros(1, *image_shape, device=model.device))
        with seeded(self.seed, "proxy decoder"):
            self.proxy = ProxyDecoder(features.shape[1:], image_shape).to(model.device)

    def start(self, model: SplitModel, images: Tensor) -> None:
        super().start(model, images)
        self.optimizer = torch.optim.Adam(self.proxy.parameters(), lr=2e-3)
        self.proxy.mean, self.variance = moments(images)

    def penalty(self, images: Tensor, features: Tensor, released: Tensor, labels: Tensor) -> Tensor:
        self.proxy.requires_grad_(False)  # the gradient is for the encoder alone
        unexplained = F.mse_loss(self.proxy(released), images) / self.variance
        return self.adversary_weight * F.relu(1 - unexplained)

    def after_step(self, images: Tensor, released: Tensor) -> None:
        self.proxy.requires_grad_(True)
        self.optimizer.zero_grad()
        F.mse_loss(self.proxy(released), images).backward()
        self.ranks.average_gradients(self.proxy.parameters(), rows=len(images))
        self.optimizer.step()
