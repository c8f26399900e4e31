"""A flow of images given a message: samples of the posterior, and its mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cem_fast._support.learning_rate import falling, one_cycle
from cem_fast._support.seeding import seeded
from cem_fast.attacks.base import (
    QUERIES,
    Attack,
    Observe,
    Standardizer,
    counted,
    hold_out,
    in_chunks,
    knowing,
    require_fitted,
    require_images,
    require_positive,
)
from cem_fast.attacks.decoder import Decoder
from cem_fast.attacks.flow_network import FlowNetwork
from cem_fast.attacks.kernel_ridge import KernelRidge
from cem_fast.attacks.view import View
from cem_fast.attacks.warps import are_mirrored, warped

BATCH = 32  # images per training step
RATE = 3e-3  # peak learning rate
AT_START = 0.25  # share of the training examples at time 0, where the answer is the posterior mean
LEAST = 6  # images, so that four fifths of them suffice for kernel ridge


class Prior(Protocol):
    """A flow model of images, such as a pretrained one.

    Example:
        >>> import torch
        >>> from cem_fast.attacks.flow import Prior
        >>> def standard_normal(noisy, time):  # of images whose pixels, scaled to [-1, 1], are independent standard normal
        ...     t = time.view(-1, 1, 1, 1)
        ...     return noisy * (2 * t - 1) / (t**2 + (1 - t) ** 2)
        >>> prior: Prior = standard_normal
        >>> prior(torch.zeros(2, 1, 8, 8), torch.tensor([0.0, 0.5])).shape
        torch.Size([2, 1, 8, 8])
    """

    def __call__(self, noisy: Tensor, time: Tensor, /) -> Tensor:
        """Returns the velocity ``E[y - e | (1 - t) e + t y]``, with ``y = 2 x - 1`` an image in [-1, 1] and standard normal ``e``.

        Args:
            noisy: ``(1 - t) e + t y``, ``[N, C, H, W]``.
            time: t in [0, 1), ``[N]``.
        """


@dataclass(kw_only=True, eq=False)
class Flow(Attack):
    """Samples the posterior of an image given its message by flow matching; ``reconstruct`` returns the mean.

    Without ``prior``, a small network is trained on the attacker's images, with fresh noise and warped smoothly if that helps kernel ridge
    regression. It estimates ``E[x | (1 - t) e + t x, z]`` from the noisy image, the message ``z``, its reconstructions by the decoder
    attack (from maps) and by kernel ridge regression, and the slope of ``log p(z | x)`` at the first of these where the encoder is
    differentiable. At ``t = 0`` this is the posterior mean. Samples follow the velocity ``(E[x | x_t, z] - x_t) / (1 - t)`` from noise to
    an image.

    With ``prior``, samples follow its velocity with every estimate ``E[y | y_t]`` moved to
    ``argmin_y || y - E[y | y_t] ||^2 / 2 r_t^2 - log p(z | y)``, and the mean is that of ``samples`` of them. ``r_t^2`` is the variance of
    an image given ``y_t``, if its pixels were independent and Gaussian. The likelihood is that of the defense, or estimated.

    Args:
        image_shape: ``(channels, height, width)`` of the images.
        decoder: the decoder attack, not yet fitted; used if features are maps.
        steps: training steps.
        prior: a flow model of images to use instead of one trained on the attacker's images.
        samples: samples whose mean is the answer under ``prior``.
        points: points in time of a sample.
        corrections: steps of Adam per point toward the likelihood under ``prior``.
        releases: messages of one image, used jointly.
        seed: seed of initial weights, order, warps and noise.

    Raises:
        ValueError: a count is not positive.

    Source:
        Lipman et al., "Flow matching for generative modeling", ICLR 2023; Putzky and Welling, "Recurrent inference machines for solving
        inverse problems", 2017 (the slope as an input); Pokle et al., "Training-free linear image inverses via flows", TMLR 2024, and Zhu
        et al., "Denoising diffusion models for plug-and-play image restoration", CVPR workshops 2023 (the guidance); as attacks: Lei et
        al., "DRAG: data reconstruction attack using guided diffusion", ICML 2025, and "FIA-Flow", 2025.

    Example:
        >>> import torch
        >>> from cem_fast import attacks
        >>> images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> def observe(images):
        ...     return torch.nn.functional.avg_pool2d(images, 2)
        >>> attack = attacks.build("flow", image_shape=(1, 8, 8), epochs=2, flow_steps=2)
        >>> attack.fit(observe, images, torch.zeros(16, dtype=torch.int64))
        >>> attack.reconstruct(observe(images)).shape, attack.sample(observe(images)).shape
        (torch.Size([16, 1, 8, 8]), torch.Size([16, 1, 8, 8]))
    """

    name = "flow"

    image_shape: tuple[int, int, int]
    decoder: Decoder
    steps: int = 800
    prior: Prior | None = None
    samples: int = 8
    points: int = 30
    corrections: int = 10
    releases: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "steps", "samples", "points", "corrections", "releases")
        self.knowledge = knowing(f"{QUERIES}; besides, differentiates through the encoder if it can", self.releases)

    @property
    def budget(self) -> str:
        if self.prior is not None:
            return (
                f"{counted(self.samples, 'sample')} of a given flow model, {counted(self.points, 'point')} in time each"
            )
        return f"{counted(self.steps, 'training step')} of a flow model of its images, {BATCH} images each; {self.decoder.budget}"

    def half_budget(self) -> Flow | None:
        """Returns an unfitted copy with half the training steps, or half the samples of a given model; None for one."""
        key = "steps" if self.prior is None else "samples"
        count = getattr(self, key)
        return replace(self, **{key: count // 2}) if count > 1 else None

    def fit(self, observe: Observe, images: Tensor, labels: Tensor) -> None:
        """Trains the flow; see :meth:`cem_fast.attacks.Attack.fit`.

        Raises:
            ValueError: there are fewer than 6 images, or there is a ``prior`` and features have no gradient.
        """
        require_images(self, images, LEAST)
        with seeded(self.seed, "flow attack"):
            self.view = View(observe, images, releases=self.releases)
            self.mean = images.mean(0)
            self.spread = float((images - self.mean).square().mean().sqrt()) + 1e-6
            if self.prior is not None:
                if not self.view.differentiable:
                    raise ValueError(
                        "a prior needs features that are differentiable with respect to the images, got some without a gradient"
                    )
                return
            self.standardize = Standardizer(self.view.averaged(images))
            ridge = KernelRidge(image_shape=self.image_shape, seed=self.seed)
            of_maps = [replace(self.decoder)] if self.standardize.mean.dim() == 3 else []
            self.starts: list[Attack] = [*of_maps, ridge]
            for start in self.starts:
                start.fit(self.view.averaged, images, labels)
            held_out, rest = hold_out(images, seed=self.seed)
            mirror = are_mirrored(images, held_out=held_out, rest=rest)
            self._train(images, fresh=partial(warped, mirror=mirror) if ridge.warp else torch.clone)

    def _train(self, images: Tensor, *, fresh: Callable[[Tensor], Tensor]) -> None:
        given, shape = len(self.starts) + self.view.differentiable, tuple(self.standardize.mean.shape)
        network = FlowNetwork(self.image_shape, shape, given=given).to(images.device)
        averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
        optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-2, fused=True)
        rates = one_cycle(optimizer, steps=self.steps, warmup=0.1)
        order: list[Tensor] = []
        for step in range(self.steps):
            if not order:
                order = list(torch.randperm(len(images), device=images.device).split(BATCH))
            batch = fresh(images[order.pop()])
            known = self._known(self.view.messages(batch))
            clean, time = self._scaled(batch), torch.rand(len(batch), device=batch.device)
            time = time * (torch.rand_like(time) >= AT_START)
            loss = F.mse_loss(network(_mixed(torch.randn_like(clean), clean, time), time, *known), clean)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
            averaged.update_parameters(network)
            self.on_step(step + 1, self.steps)
        self.network = averaged.module.eval()

    def reconstruct(self, features: Tensor) -> Tensor:
        with seeded(self.seed, "flow attack on released features"):
            if self.prior is None:
                return self._in_chunks(features, self._posterior_mean)
            return torch.stack([self._in_chunks(features, self._guided) for _ in range(self.samples)]).mean(0)

    def sample(self, features: Tensor) -> Tensor:
        """Draws one image from the posterior of each, sharper than the mean and with a higher squared error.

        Args:
            features: as for :meth:`reconstruct`.

        Returns:
            Images ``[N, C, H, W]`` in [0, 1].

        Raises:
            RuntimeError: ``fit`` was not called.
        """
        with seeded(self.seed, "sample of the flow attack"):
            return self._in_chunks(features, self._followed if self.prior is None else self._guided)

    def _in_chunks(self, features: Tensor, rebuild: Callable[[Tensor], Tensor]) -> Tensor:
        require_fitted(self, "view" if self.prior is not None else "network")
        return in_chunks(self.view.received(features), rebuild, self.image_shape)

    def _scaled(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.spread

    def _known(self, messages: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What the network sees of messages ``[R, N, ...]``: their mean, reconstructions, and the slope at the first."""
        pooled = self.view.pooled(messages)
        rebuilt = [start.reconstruct(pooled) for start in self.starts]
        given = [self._scaled(each) for each in rebuilt]
        if self.view.differentiable:
            given.append(self._slope(messages, rebuilt[0]))
        return self.standardize(pooled), given

    @torch.enable_grad()
    def _slope(self, messages: Tensor, images: Tensor) -> Tensor:
        """Gradient of the log-likelihood with respect to the images ``[N, C, H, W]``."""
        pixels = images.detach().requires_grad_()
        likelihood = self.view.log_density(messages, self.view.features(pixels))
        return torch.autograd.grad(likelihood.sum(), pixels)[0]

    def _posterior_mean(self, messages: Tensor) -> Tensor:
        known = self._known(messages)
        with torch.no_grad():
            noise = torch.randn_like(known[1][0])
            return self.mean + self.spread * self.network(noise, noise.new_zeros(len(noise)), *known)

    def _followed(self, messages: Tensor) -> Tensor:
        """A sample of the trained flow."""
        known = self._known(messages)
        with torch.no_grad():
            return self.mean + self.spread * self._integrated(
                torch.randn_like(known[1][0]), lambda noisy, time: self.network(noisy, time, *known)
            )

    def _guided(self, messages: Tensor) -> Tensor:
        """A sample of the prior, guided by the likelihood."""
        assert self.prior is not None
        prior = self.prior
        variance = (2 * self.spread) ** 2

        def estimate(noisy: Tensor, time: Tensor) -> Tensor:
            t = float(time[0])
            with torch.no_grad():
                expected = noisy + (1 - t) * prior(noisy, time)
            # variance of an image given the noisy one
            left = variance * (1 - t) ** 2 / ((1 - t) ** 2 + variance * t**2)
            return self._moved(expected, left**0.5, messages)

        start = torch.randn(messages.shape[1], *self.image_shape, device=messages.device)
        return (self._integrated(start, estimate) + 1) / 2

    def _moved(self, start: Tensor, deviation: float, messages: Tensor) -> Tensor:
        """``start``, in [-1, 1], moved to the most probable place given the messages, if it is Gaussian with this deviation."""
        # in units of the deviation, to which Adam's step sizes are suited
        moves = torch.zeros_like(start).requires_grad_()
        optimizer = torch.optim.Adam([moves], lr=0.3, betas=(0.8, 0.95))
        rates = falling(optimizer, steps=self.corrections)
        with torch.enable_grad():
            for _ in range(self.corrections):
                pixels = (start + deviation * moves + 1) / 2
                likelihood = self.view.log_density(messages, self.view.features(pixels))
                (moves.grad,) = torch.autograd.grad(moves.square().sum() / 2 - likelihood.sum(), moves)
                optimizer.step()
                rates.step()
        return (start + deviation * moves).detach()

    def _integrated(self, noisy: Tensor, estimate: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Euler's method from noise at time 0 to an image at time 1, given estimates of the image."""
        for point in range(self.points):
            time = noisy.new_full((len(noisy),), point / self.points)
            noisy = noisy + (estimate(noisy, time) - noisy) / (self.points - point)
        return noisy


def _mixed(noise: Tensor, images: Tensor, time: Tensor) -> Tensor:
    share = time.view(-1, 1, 1, 1)
    return (1 - share) * noise + share * images
