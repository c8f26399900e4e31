"""The posterior mean of the attacker's images, given messages."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cem_fast.attacks.view import View

NEAREST = 16  # images whose likelihood is computed; that of the others is negligible
TEMPERATURES = (1.0, 4.0, 16.0, 64.0, 256.0)
MOST = 8192  # images, at most, that are kept
CHUNK = 512  # messages compared together


class Neighbors:
    """Computes ``sum_j w_j x_j`` over the attacker's images, ``w_j`` proportional to ``p(messages | x_j)^(1/T)``.

    The temperature T minimizes the error on the attacker's images, each left out in turn. It is above 1 where the images are far apart
    compared with the noise.

    Args:
        view: the network under attack.
        images: the attacker's images ``[N, C, H, W]``.

    Example:
        >>> import torch
        >>> from cem_fast.attacks.inversion.neighbors import Neighbors
        >>> from cem_fast.attacks.view import View
        >>> images = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> view = View(lambda x: x + 0.01 * torch.randn(x.shape), images)
        >>> neighbors = Neighbors(view, images)
        >>> bool((neighbors(view.messages(images)) - images).abs().max() < 0.05)
        True
    """

    def __init__(self, view: View, images: Tensor):
        self.view, self.images = view, images[:MOST].contiguous()
        self.features = view.features(self.images).flatten(1)
        self.shape = view.features(self.images[:1]).shape[1:]
        self.temperature = 1.0
        if len(self.images) > 1:
            judges = torch.arange(min(len(self.images), CHUNK), device=images.device)
            messages, errors = view.messages(self.images[judges]), []
            for self.temperature in TEMPERATURES:
                errors.append(float((self(messages, own=judges) - self.images[judges]).square().mean()))
            self.temperature = TEMPERATURES[errors.index(min(errors))]

    def __call__(self, messages: Tensor, own: Tensor | None = None) -> Tensor:
        """Returns the posterior means ``[N, C, H, W]``.

        Args:
            messages: ``[R, N, ...]``.
            own: for messages of the attacker's own images, their indices ``[N]``, which are left out.
        """
        parts = [] if own is None else own.split(CHUNK)
        return torch.cat(
            [self._mean(z, parts[i] if parts else None) for i, z in enumerate(messages.split(CHUNK, dim=1))]
        )

    def _mean(self, messages: Tensor, own: Tensor | None) -> Tensor:
        distances = torch.cdist(self.view.pooled(messages).flatten(1).float(), self.features.float())
        if own is not None and len(self.images) > 1:
            inside = own < len(self.images)
            distances[inside.nonzero()[:, 0], own[inside]] = torch.inf
        count = max(1, min(NEAREST, len(self.images) - (own is not None)))
        nearest = distances.topk(count, largest=False).indices  # [N, count]
        rows = messages.repeat_interleave(count, dim=1)
        density = self.view.log_density(rows, self.features[nearest.flatten()].unflatten(1, self.shape))
        weights = torch.softmax(density.view_as(nearest) / self.temperature, 1)
        pixels = F.embedding_bag(nearest, self.images.flatten(1), per_sample_weights=weights, mode="sum")
        return pixels.view(-1, *self.images.shape[1:])
