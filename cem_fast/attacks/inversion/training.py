"""Training of the networks of the inversion attack, and what they see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cem_fast._support.learning_rate import one_cycle
from cem_fast.attacks.base import Standardizer
from cem_fast.attacks.inversion.linear import Linear
from cem_fast.attacks.inversion.neighbors import Neighbors
from cem_fast.attacks.inversion.networks import Painter
from cem_fast.attacks.view import View
from cem_fast.attacks.warps import warped

PLENTY = 800  # number of the attacker's images at which half of a batch is warped; of fewer images, more
WEIGHT_DECAY = 0.02


@dataclass(kw_only=True)
class Lessons:
    """The attacker's images to learn from: random batches with fresh noise, warped the more often the fewer images there are.

    Args:
        view: the network under attack.
        images: ``[N, C, H, W]``.
        mirror: whether mirrored images are images of the same kind.
        batch_size: images per batch, at most.
    """

    view: View
    images: Tensor
    mirror: bool
    batch_size: int

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns images ``[B, C, H, W]``, their messages ``[R, B, ...]`` and the indices of the images that they are made of ``[B]``."""
        count = min(self.batch_size, len(self.images))
        chosen = torch.randperm(len(self.images), device=self.images.device)[:count]
        images = self.images[chosen]
        plain = torch.rand(count, 1, 1, 1, device=images.device) < len(self.images) / (len(self.images) + PLENTY)
        images = torch.where(plain, images, warped(images, mirror=self.mirror))
        with torch.no_grad():
            return images, self.view.messages(images), chosen


class Scene(nn.Module):
    """What the networks see of messages, in the units that suit them; and the networks of both stages.

    Args:
        view: the network under attack.
        images: the attacker's images ``[N, C, H, W]`` to learn from.
        mirror: whether mirrored images are images of the same kind.
    """

    def __init__(self, view: View, images: Tensor, *, mirror: bool):
        super().__init__()
        self.view, self.neighbors = view, Neighbors(view, images)
        self.slope_size: float | None = None  # root mean square of J^T score where the corrector starts to learn
        self.mean = images.mean(0)
        self.spread = float((images - self.mean).square().mean().sqrt()) + 1e-6
        pooled = view.averaged(images)
        self.standardize = Standardizer(pooled)
        shape, size = pooled.shape[1:], (images.shape[1], images.shape[2], images.shape[3])
        self.linear: Linear | None = None
        if Linear.fits(pooled[0].numel(), images[0].numel()):
            self.linear = Linear(self.seen, images, self.mean, mirror=mirror)
        self.decoder = Painter(shape, size, guides=2 if self.linear else 1).to(images.device)
        joined = (2 * shape[0], *shape[1:]) if len(shape) == 3 else (2 * pooled[0].numel(),)
        self.corrector = Painter(joined, size, guides=2).to(images.device)

    def learn_from(self, images: Tensor) -> None:
        """Uses the posterior mean of other images.

        Args:
            images: ``[N, C, H, W]``.
        """
        self.neighbors = Neighbors(self.view, images)

    def decoded(self, messages: Tensor, own: Tensor | None = None) -> Tensor:
        """Returns the decoder's images ``[N, C, H, W]``: ``linear(z) + spread * network(z, E[x | z], linear(z))``.

        Args:
            messages: ``[R, N, ...]``.
            own: for messages of the images that the network learns from, their indices ``[N]``.
        """
        guide = (self.neighbors(messages, own) - self.mean) / self.spread
        features = self.standardize(self.view.pooled(messages))
        if self.linear is None:
            return self.mean + self.spread * self.decoder(features, guide)
        start = self.linear(features)
        guides = torch.cat([guide, start / self.spread], 1)
        return self.mean + start + self.spread * self.decoder(features, guides)

    def corrected(self, messages: Tensor, images: Tensor) -> Tensor:
        """Returns corrected images ``[N, C, H, W]``.

        Args:
            messages: ``[R, N, ...]``.
            images: the reconstruction to correct, ``[N, C, H, W]``.
        """
        residual, slope = self._misfit(messages, images)
        features = self.standardize(self.view.pooled(messages))
        joined = torch.cat([features, residual], 1) if features.dim() == 4 else torch.cat([features, residual], -1)
        if features.dim() != 4:
            joined = torch.cat([features.flatten(1), residual.flatten(1)], 1)
        seen = torch.cat([(images - self.mean) / self.spread, slope], 1)
        return images + self.spread * self.corrector(joined, seen)

    def seen(self, images: Tensor) -> Tensor:
        """Returns the standardized mean of fresh messages of images, ``[N, ...]``.

        Args:
            images: ``[N, C, H, W]``.
        """
        return self.standardize(self.view.averaged(images))

    @torch.enable_grad()
    def _misfit(self, messages: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Score ``d log p / df`` in units of the features, and its product with the encoder's Jacobian, scaled to a variance near 1."""
        pixels = images.detach().requires_grad_()
        features = self.view.features(pixels)
        score = self.view.score(messages, features) / (self.view.information * self.view.releases)
        (slope,) = torch.autograd.grad(features, pixels, score.to(features.dtype))
        if self.slope_size is None:
            self.slope_size = float(slope.square().mean().sqrt()) + 1e-12
        return (score / self.standardize.scale).detach(), (slope / self.slope_size).detach()


def train(
    network: nn.Module,
    loss: Callable[[], Tensor],
    *,
    steps: int,
    learning_rate: float,
    on_step: Callable[[], None],
) -> None:
    """Minimizes a loss by AdamW with a warm-up and a cosine; the network ends with the moving average of its weights.

    Args:
        network: the network, changed in place and left in eval mode.
        loss: function that draws a batch and returns its loss.
        steps: steps of AdamW.
        learning_rate: greatest learning rate.
        on_step: called after every step.

    Source:
        Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019; Polyak and Juditsky, "Acceleration of stochastic
        approximation by averaging", SIAM Journal on Control and Optimization 1992.
    """
    network.train()
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(min(0.995, 1 - 10 / (steps + 10))))
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    rates = one_cycle(optimizer, steps=steps, warmup=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rates.step()
        average.update_parameters(network)
        on_step()
    network.load_state_dict(average.module.state_dict())
    network.eval()
