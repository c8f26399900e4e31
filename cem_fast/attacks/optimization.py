"""Gradient descent on the pixels until the encoder's features match the observed ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cem_fast._support.learning_rate import falling
from cem_fast._support.seeding import seeded
from cem_fast.attacks.base import (
    QUERIES,
    Attack,
    Observe,
    counted,
    hold_out,
    knowing,
    require_fitted,
    require_images,
    require_positive,
    rows_in_memory,
)
from cem_fast.attacks.decoder import Decoder
from cem_fast.attacks.view import View
from cem_fast.functional import mixture_log_prob
from cem_fast.mixture import GaussianMixture

JUDGES = 32  # maximum number of held-out images on which the recipe is chosen
COMPONENTS = 32  # maximum number of components in the mixture of features
LEAST = 6  # images, one of which is held out


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of the descent on the pixels.

    Args:
        start: ``decoder``, the reconstruction of the decoder attack, or ``mean``, the mean image.
        step_size: size of the first steps, in units of a pixel's range.
        smoothness: weight of the total variation.
        mixture: weight of the mixture's log-likelihood; 1 is the weight of Bayes' rule if the noise is Gaussian.

    Example:
        >>> from cem_fast.attacks.optimization import Recipe
        >>> Recipe(start="mean", step_size=0.1, smoothness=2.0)
        Recipe(start='mean', step_size=0.1, smoothness=2.0, mixture=0.0)
    """

    start: str
    step_size: float
    smoothness: float
    mixture: float = 0.0


RECIPES = (
    Recipe(start="decoder", step_size=0.03, smoothness=1.0),
    Recipe(start="decoder", step_size=0.03, smoothness=4.0),
    Recipe(start="decoder", step_size=0.01, smoothness=4.0),
    Recipe(start="decoder", step_size=0.03, smoothness=4.0, mixture=1.0),
    Recipe(start="mean", step_size=0.1, smoothness=2.0),
)


@dataclass(kw_only=True, eq=False)
class Optimization(Attack):
    """Minimizes ``E || observe(x) - z ||^2 / (D v) + smoothness TV(x) - mixture (2 s2 / (D v)) log p(observe(x))`` over the pixels.

    The expectation is over the defense's randomness, with fresh draws at every step. ``v`` is the mean variance of the D features, ``s2``
    that of their noise. ``p`` is a Gaussian mixture fitted to the features of the attacker's images. Adam starts from the mean image or
    from the reconstruction of the decoder attack. The result is ``start + share (x - start)``.

    Where the defense does more than add Gaussian noise, such as dropout, and its likelihood is known, the first term is
    ``-(2 / (I D v)) log p(z | x)`` and needs no draws. ``I`` is the mean Fisher information of a feature, ``1 / s2`` for Gaussian noise.

    The recipe and the step share are chosen on a held-out fifth of the attacker's images; decoder and mixture are then refitted on all of
    them. The share is the least-squares solution in [0, 1], so the error on the held-out images never exceeds that of the start.

    Args:
        image_shape: ``(channels, height, width)`` of the images.
        decoder: the decoder attack, not yet fitted.
        steps: steps of Adam.
        draws: draws of the defense's randomness per step.
        seed: seed of the held-out fifth and of the draws.
        releases: messages of each image, used jointly.

    Raises:
        ValueError: ``steps``, ``draws`` or ``releases`` is not positive.

    Source:
        Mahendran and Vedaldi, "Understanding deep image representations by inverting them", CVPR 2015; He, Zhang and Lee, "Model
        inversion attacks against collaborative inference", ACSAC 2019; Athalye et al., "Synthesizing robust adversarial examples", ICML
        2018 (the expectation over the randomness).

    Example:
        >>> import torch
        >>> from cem_fast import attacks
        >>> images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> def observe(images):
        ...     return torch.nn.functional.avg_pool2d(images, 2)
        >>> decoder = attacks.Decoder(image_shape=(1, 8, 8), epochs=2)
        >>> attack = attacks.Optimization(image_shape=(1, 8, 8), decoder=decoder, steps=2)
        >>> attack.fit(observe, images, torch.zeros(16, dtype=torch.int64))
        >>> attack.reconstruct(observe(images)).shape
        torch.Size([16, 1, 8, 8])
    """

    name = "optimization"
    knowledge = f"{QUERIES}; besides, differentiates through the encoder and the defense"

    image_shape: tuple[int, int, int]
    decoder: Decoder
    steps: int = 120
    draws: int = 2
    seed: int = 0
    releases: int = 1

    def __post_init__(self) -> None:
        require_positive(self, "steps", "draws", "releases")
        self.knowledge = knowing(self.knowledge, self.releases)

    @property
    def budget(self) -> str:
        steps, draws = counted(self.steps, "step"), counted(self.draws, "draw")
        return f"{steps} of Adam on the pixels of each image, {draws} each; {self.decoder.budget}"

    def half_budget(self) -> Optimization | None:
        """Returns an unfitted copy with half the steps; None for one. The decoder has an entry of its own."""
        return replace(self, steps=self.steps // 2) if self.steps > 1 else None

    def fit(self, observe: Observe, images: Tensor, labels: Tensor) -> None:
        """Chooses the recipe and trains the decoder; see :meth:`cem_fast.attacks.Attack.fit`.

        Raises:
            ValueError: there are fewer than 6 images, or the features have no gradient.
        """
        require_images(self, images, LEAST)
        with seeded(self.seed, "optimization attack's view"):
            self.view = View(observe, images, releases=self.releases)
        observe = self.observe = self.view.averaged
        held_out, rest = hold_out(images, seed=self.seed)
        with seeded(self.seed, "optimization attack"):
            self._look(observe, images[rest])
            recipes = [r for r in RECIPES if not r.mixture or self.noise_variance > 0]
            secret = images[held_out[:JUDGES]]
            messages = self.view.messages(secret)
            features = self.view.pooled(messages)
            decoder = self._trained(observe, images[rest], labels[rest])
            starts = torch.cat([self._start(r, decoder, features) for r in recipes])
            moved = self._moved(starts, torch.cat([messages] * len(recipes), 1), recipes)
            outcomes = [
                _judged(r, start, end - start, secret)
                for r, start, end in zip(recipes, starts.chunk(len(recipes)), moved.chunk(len(recipes)))
            ]
            self._look(observe, images)
        self.recipe, self.share, self.error_of_start, self.error = min(outcomes, key=lambda outcome: outcome[-1])
        self.trained = self._trained(observe, images, labels)

    def reconstruct(self, features: Tensor) -> Tensor:
        require_fitted(self, "trained")
        messages = self.view.received(features)
        start = self._start(self.recipe, self.trained, self.view.pooled(messages))
        if self.share == 0:
            return start
        with seeded(self.seed, "optimization attack on released features"):
            rows = rows_in_memory(self.image_shape)
            moved = [
                self._moved(s, z, [self.recipe])
                for s, z in zip(start.split(rows), messages.split(rows, dim=1), strict=True)
            ]
        return (start + self.share * (torch.cat(moved) - start)).clamp(0, 1)

    def _look(self, observe: Observe, images: Tensor) -> None:
        """Estimates the mean image, the variances of features and of their noise, and the mixture of features."""
        self.mean_image = images.mean(0)
        with torch.no_grad():
            looks = torch.stack([observe(images).flatten(1) for _ in range(4)])
        means = looks.mean(0)
        self.variance = float(means.var(0, correction=0).mean()) + 1e-12
        self.noise_variance = float(looks.var(0).mean())
        components = max(1, min(COMPONENTS, len(images) // 8))
        mixture = GaussianMixture(
            num_components=components,
            covariance_type="spherical",
            algorithm="kmeans",
            generator=torch.Generator(device=images.device).manual_seed(self.seed),
        )
        mixture.to(images.device).fit(means.float())
        # a floor for components of few images
        self.mixture = mixture.means, mixture.variances.clamp_min(0.1 * self.variance), mixture.weights

    def _trained(self, observe: Observe, images: Tensor, labels: Tensor) -> Decoder:
        decoder = replace(self.decoder)
        decoder.fit(observe, images, labels)
        return decoder

    def _start(self, recipe: Recipe, decoder: Decoder, features: Tensor) -> Tensor:
        if recipe.start == "decoder":
            return decoder.reconstruct(features)
        return self.mean_image.expand(len(features), *self.image_shape)

    @torch.enable_grad()
    def _moved(self, start: Tensor, messages: Tensor, recipes: list[Recipe]) -> Tensor:
        """Optimized images ``[N, C, H, W]`` of messages ``[R, N, ...]``; the rows are divided equally among the recipes, in order."""

        def each(key: str) -> Tensor:
            values = torch.tensor([getattr(r, key) for r in recipes], device=start.device)
            return values.repeat_interleave(len(start) // len(recipes))

        direct = self.view.exact and not self.view.simple
        spread = 1 / (self.view.information * self.releases) if direct else self.noise_variance
        smoothness, prior = each("smoothness"), each("mixture") * 2 * spread / self.variance
        features = self.view.pooled(messages)
        step_size = each("step_size").view(-1, 1, 1, 1)
        # Adam has one step size for all rows: optimize in units of each recipe's own.
        moves = torch.zeros_like(start, memory_format=torch.contiguous_format).requires_grad_()
        optimizer = torch.optim.Adam([moves], lr=1.0, betas=(0.9, 0.99))
        rates = falling(optimizer, steps=self.steps)
        for _ in range(self.steps):
            pixels = start + step_size * moves
            objective = smoothness * _total_variation(pixels)
            draws = 1 if direct else self.draws
            for _ in range(draws):
                seen = self.view.features(pixels) if direct else self.observe(pixels)
                if not seen.requires_grad:
                    raise ValueError(
                        "the optimization attack needs features that are differentiable with respect to the images, got some "
                        "without a gradient: let it pass straight through whatever the defense rounds or detaches"
                    )
                if direct:
                    misfit = -2 * spread * self.view.log_density(messages, seen) / (self.variance * seen[0].numel())
                else:
                    misfit = (seen - features).square().flatten(1).mean(1) / self.variance
                if prior.any():
                    likelihood = mixture_log_prob(seen.flatten(1).float(), *self.mixture) / seen[0].numel()
                    misfit = misfit - prior * likelihood
                objective = objective + misfit / draws
            (moves.grad,) = torch.autograd.grad(objective.sum(), moves)
            optimizer.step()
            rates.step()
        return (start + step_size * moves).detach()


def _judged(recipe: Recipe, start: Tensor, move: Tensor, images: Tensor) -> tuple[Recipe, float, float, float]:
    """A recipe, the best share of its move, and the errors of its start and of its result."""
    wanted = images - start
    best = (move * wanted).sum() / (move.square().sum() + 1e-30)
    share = float(best.nan_to_num(nan=0.0).clamp(0, 1))  # discards pixels that diverged
    answer = (start + share * move).clamp(0, 1) if share else start
    return recipe, share, float(wanted.square().mean()), float((answer - images).square().mean())


def _total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighboring pixels ``[N]``, down and to the right."""
    down, right = images.diff(dim=2), images.diff(dim=3)
    return down.abs().flatten(1).mean(1) + right.abs().flatten(1).mean(1)
