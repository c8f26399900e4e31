"""The inversion attack: a decoder, a learned correction, and the most probable image, each checked on held-out images."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from cem_fast._support.seeding import seeded
from cem_fast.attacks.base import (
    QUERIES,
    Attack,
    Observe,
    counted,
    hold_out,
    in_chunks,
    knowing,
    require_fitted,
    require_images,
    require_positive,
    rows_in_memory,
)
from cem_fast.attacks.inversion.prior import Errors, most_probable
from cem_fast.attacks.inversion.training import Lessons, Scene, train
from cem_fast.attacks.kernel_ridge import KernelRidge
from cem_fast.attacks.view import View
from cem_fast.attacks.warps import are_mirrored, warped

LEAST = 6  # images, two of which are held out for the choices of the last stage
JUDGES = 128  # maximum number of held-out images on which the last stage is chosen
JUDGED = 1 << 16  # maximum number of their values
FEWEST_JUDGES = 32  # images that are used whatever their size
ERRORS = 1024  # held-out images, at most, that are reconstructed for the choices and the covariance
WEIGHTS = (2.0, 1.0, 0.5, 0.25)  # of the prior, the easiest search first; 1 is that of Bayes' rule
ALWAYS = 48  # images of a training step, whatever memory they need
REFIT = 0.4  # steps on all images, in units of those without the held-out fifth


@dataclass(kw_only=True, eq=False)
class Inversion(Attack):
    """Three stages, each of which starts from the result of the one before and is skipped where ``stages`` ends.

    1. A decoder, trained on warped images with fresh noise: ``x0 = linear(z) + decoder(z, E[x | z], linear(z))``. The second input is the
       mean of the attacker's images under the likelihood of the noise. The third is a ridge regression, left out beyond 2,048 features.
    2. A correction, one unrolled step of inference: ``x1 = x0 + gate corrector(z, z - f(x0), x0, J^T (z - f(x0)))`` with f the encoder and
       J its Jacobian at x0. Under noise other than Gaussian, the score of the likelihood replaces the difference.
    3. The most probable image: ``x2 = x1 + share (argmin_x -log p(z | x) + weight / 2 (x - x1)^T S^-1 (x - x1) - x1)``, with the exact
       likelihood of the defense, and S the covariance of the errors of the stages before on held-out images.

    Between stages 2 and 3, ``x1`` is averaged with kernel ridge regression, whose errors are of another kind. That weight, gate, weight of
    the prior and share are chosen on a held-out fifth of the attacker's images, from which the networks have not learned. The networks
    then continue to learn, from all images. An encoder without gradients leaves stage 1.

    Args:
        image_shape: ``(channels, height, width)`` of the images.
        decoder_steps: training steps of the decoder.
        corrector_steps: training steps of the corrector.
        map_steps: steps of L-BFGS on each image in stage 3, at most.
        batch_size: images per training step; those beyond 48 are left out where they need more than about 512 MB.
        stages: last stage, 1 to 3.
        seed: seed of all random numbers.
        releases: messages of each image, used jointly.

    Attributes:
        errors: after the fit, mean squared error on held-out images after every stage.

    Raises:
        ValueError: an argument is out of range.

    Source:
        Dosovitskiy and Brox, "Inverting visual representations with convolutional networks", CVPR 2016 (stage 1); Adler and Oktem,
        "Solving ill-posed inverse problems using iterative deep neural networks", Inverse Problems 2017 (stage 2); He, Zhang and Lee,
        "Model inversion attacks against collaborative inference", ACSAC 2019 (the likelihood of stage 3).

    Example:
        >>> import torch
        >>> from cem_fast import attacks
        >>> images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> def observe(images):
        ...     return torch.nn.functional.avg_pool2d(images, 2)
        >>> attack = attacks.Inversion(image_shape=(1, 8, 8), decoder_steps=2, corrector_steps=2, map_steps=2)
        >>> attack.fit(observe, images, torch.zeros(16, dtype=torch.int64))
        >>> attack.reconstruct(observe(images)).shape
        torch.Size([16, 1, 8, 8])
        >>> list(attack.errors)
        ['decoder', 'correction', 'with kernel ridge', 'most probable']
    """

    name = "inversion"
    knowledge = f"{QUERIES}; besides, knows the likelihood of the noise and differentiates through the encoder"

    image_shape: tuple[int, int, int]
    decoder_steps: int = 1000
    corrector_steps: int = 160
    map_steps: int = 600
    batch_size: int = 96
    stages: int = 3
    seed: int = 0
    releases: int = 1

    def __post_init__(self) -> None:
        require_positive(self, "decoder_steps", "corrector_steps", "map_steps", "batch_size", "stages", "releases")
        if self.stages > 3:
            raise ValueError(f"stages must be at most 3, got {self.stages}")
        self.knowledge = knowing(self.knowledge, self.releases)

    @property
    def budget(self) -> str:
        parts = (
            f"{counted(self.decoder_steps, 'step')} of a decoder, {counted(self._batch, 'image')} each",
            f"{counted(self.corrector_steps, 'step')} of a corrector",
            f"at most {counted(self.map_steps, 'step')} of L-BFGS on each image",
        )
        return ", ".join(parts[: self.stages])

    @property
    def _batch(self) -> int:
        """Images per training step."""
        return min(self.batch_size, max(ALWAYS, rows_in_memory(self.image_shape)))

    def half_budget(self) -> Inversion | None:
        """Returns an unfitted copy with half the steps of every stage; None for one step."""
        if min(self.decoder_steps, self.corrector_steps, self.map_steps) < 2:
            return None
        return replace(
            self,
            decoder_steps=self.decoder_steps // 2,
            corrector_steps=self.corrector_steps // 2,
            map_steps=self.map_steps // 2,
        )

    def fit(self, observe: Observe, images: Tensor, labels: Tensor) -> None:
        """Trains the networks and chooses the settings of all stages; see :meth:`cem_fast.attacks.Attack.fit`.

        Raises:
            ValueError: there are fewer than 6 images.
        """
        require_images(self, images, LEAST)
        held_out, rest = hold_out(images, seed=self.seed)
        with seeded(self.seed, "inversion attack"), torch.no_grad():
            self.view = View(observe, images, releases=self.releases)
            if self.stages > 1 and not self.view.differentiable:
                warnings.warn("the features have no gradient: the inversion attack ends with its decoder", stacklevel=2)
                self.stages = 1
            self.mirror = are_mirrored(images, held_out=held_out, rest=rest)
            self.scene = Scene(self.view, images[rest], mirror=self.mirror)
            self._total = self._steps(1 + REFIT)
            self._done = 0
            self._train(images[rest], 1.0)
            self.kernel = self._kernel(images[rest], labels[rest])
            self._choose(images[held_out])
            self.scene.learn_from(images)
            self._train(images, REFIT)
            self.kernel = self._kernel(images, labels)

    def reconstruct(self, features: Tensor) -> Tensor:
        require_fitted(self, "scene")
        messages = self.view.received(features)
        with seeded(self.seed, "inversion attack on released features"), torch.no_grad():
            return in_chunks(messages, self._reconstructed, self.image_shape)

    def _reconstructed(self, messages: Tensor) -> Tensor:
        images = self._before_last(messages)
        if self.stages < 3 or not self.share:
            return images
        [best] = most_probable(
            self.view, messages, images, self.covariance, weights=[self.weight], steps=self.map_steps
        )
        return images + self.share * (best - images)

    def _before_last(self, messages: Tensor) -> Tensor:
        """Reconstructions of the first two stages, averaged with kernel ridge regression."""
        images = self.scene.decoded(messages)
        if self.stages > 1 and self.gate:
            images = images + self.gate * (self.scene.corrected(messages, images) - images)
        return images + self.mix * (self._smooth(messages) - images)

    def _smooth(self, messages: Tensor) -> Tensor:
        """Reconstructions by kernel ridge regression."""
        return self.kernel.reconstruct(self.view.pooled(messages))

    def _kernel(self, images: Tensor, labels: Tensor) -> KernelRidge:
        kernel = KernelRidge(image_shape=self.image_shape, seed=self.seed)
        kernel.fit(self.view.averaged, images, labels)
        return kernel

    def _steps(self, share: float) -> int:
        return round(share * self.decoder_steps) + (self.stages > 1) * round(share * self.corrector_steps)

    @torch.enable_grad()
    def _train(self, images: Tensor, share: float) -> None:
        """Trains the networks on images, for a share of the steps; the second time, at a lower rate."""
        scene = self.scene
        lessons = Lessons(view=self.view, images=images, mirror=self.mirror, batch_size=self._batch)

        def decoder_loss() -> Tensor:
            truth, messages, own = lessons.batch()
            return F.mse_loss(scene.decoded(messages, own), truth) / scene.spread**2

        def corrector_loss() -> Tensor:
            truth, messages, own = lessons.batch()
            with torch.no_grad():
                start = scene.decoded(messages, own)
            return F.mse_loss(scene.corrected(messages, start), truth) / scene.spread**2

        rate = 3e-3 if share == 1 else 1e-3
        plans = [
            (scene.decoder, decoder_loss, self.decoder_steps),
            (scene.corrector, corrector_loss, self.corrector_steps),
        ]
        for network, loss, steps in plans[: min(self.stages, 2)]:
            train(network, loss, steps=max(1, round(share * steps)), learning_rate=rate, on_step=self._step)

    def _step(self) -> None:
        self._done += 1
        self.on_step(min(self._done, self._total), self._total)

    def _choose(self, images: Tensor) -> None:
        """Chooses the gate of stage 2, and weight and share of stage 3, on held-out images; and keeps the error of every stage."""
        self.gate, self.share, self.weight = 1.0, 0.0, 1.0
        images = images[:ERRORS]
        copies = max(1, min(16, ERRORS // len(images)))
        looks = torch.cat([images] + [warped(images, mirror=self.mirror) for _ in range(copies - 1)])
        messages = self.view.messages(looks)
        before, kept = self.scene.decoded(messages), slice(len(images))
        self.errors = {"decoder": _error(before[kept], images)}
        if self.stages > 1:
            corrected = self.scene.corrected(messages, before)
            self.gate = _share(before[kept], corrected[kept], images)
            before = before + self.gate * (corrected - before)
            self.errors["correction"] = _error(before[kept], images)
        smooth = self._smooth(messages)
        self.mix = _share(before[kept], smooth[kept], images)
        before = before + self.mix * (smooth - before)
        self.errors["with kernel ridge"] = _error(before[kept], images)
        if self.stages > 2:
            judges = min(len(images), JUDGES, max(FEWEST_JUDGES, JUDGED // images[0].numel()))
            self._choose_prior(images[:judges], messages[:, :judges], looks, before, len(images))

    def _choose_prior(self, judges: Tensor, messages: Tensor, looks: Tensor, before: Tensor, count: int) -> None:
        """Chooses weight and share; each half of the judges by the covariance of the errors of the other half."""
        half = torch.arange(len(looks), device=looks.device) % count % 2
        ends = torch.empty(len(WEIGHTS), *judges.shape, device=judges.device)
        for side in (0, 1):
            covariance = Errors((looks - before)[half != side])
            rows = (torch.arange(len(judges), device=judges.device) % 2 == side).nonzero()[:, 0]
            found = most_probable(
                self.view, messages[:, rows], before[rows], covariance, weights=WEIGHTS, steps=self.map_steps
            )
            ends[:, rows] = torch.stack(found)
        start = before[: len(judges)]
        shares = [_share(start, end, judges) for end in ends]
        left = [_error(start + share * (end - start), judges) for share, end in zip(shares, ends)]
        best = left.index(min(left))
        self.weight, self.share = WEIGHTS[best], shares[best]
        self.errors["most probable"] = self.errors["with kernel ridge"] * left[best] / (_error(start, judges) + 1e-12)
        self.covariance = Errors(looks - before)


def _share(start: Tensor, end: Tensor, images: Tensor) -> float:
    """The share in [0, 1] of the way from start to end that is closest to the images; 0 if the end diverged."""
    move = end - start
    best = (move * (images - start)).sum() / (move.square().sum() + 1e-30)
    return float(best.nan_to_num(nan=0.0).clamp(0, 1))


def _error(rebuilt: Tensor, images: Tensor) -> float:
    return float((rebuilt.clamp(0, 1) - images).square().mean())
