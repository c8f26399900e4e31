"""ResSFL: adversarial learning against a pretrained proxy decoder, by structural similarity."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from cem_fast import metrics
from cem_fast._support.counts import require_count, require_number
from cem_fast.defenses.adversarial import AdversarialRepresentation
from cem_fast.models.split import SplitModel

BATCH = 32  # images per step of the proxy before training


class ResSFL(AdversarialRepresentation):
    """Adds ``weight * relu(mean SSIM(proxy(released), images) - threshold)`` to the loss, for a proxy decoder of released features.

    Before training, the proxy learns to invert the initial encoder, on the clean features of training images. During training it takes
    one step after every step of the network, as in :class:`cem_fast.defenses.AdversarialRepresentation`. Features are released unchanged.

    Args:
        adversary_weight: weight of the penalty, positive.
        ssim_threshold: structural similarity, below 1, up to which a reconstruction has no penalty.
        seed: seed of the proxy's initial weights.
        pretraining: passes of the proxy over the training images before training.

    Raises:
        ValueError: ``adversary_weight`` is not positive and finite, ``ssim_threshold`` is not below 1, or ``pretraining`` is negative.

    Source:
        Li et al., "ResSFL: a resistance transfer framework for defending model inversion attack in split federated learning", CVPR 2022;
        the threshold is that of Xia et al., CVPR 2025.

    Example:
        >>> import torch
        >>> from cem_fast import defenses, models
        >>> model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=8)
        >>> defense = defenses.ResSFL(adversary_weight=1.0, ssim_threshold=0.3, pretraining=1)
        >>> images = torch.rand(4, 1, 16, 16)
        >>> defense.start(model, images)  # as training does
        >>> features = model.encoder(images)
        >>> released = defense.release(features)
        >>> torch.equal(released, features)
        True
        >>> defense.penalty(images, features, released, torch.tensor([0, 1, 2, 0])) >= 0
        tensor(True)
    """

    def __init__(self, *, adversary_weight: float, ssim_threshold: float, seed: int = 0, pretraining: int = 10):
        super().__init__(adversary_weight=adversary_weight, seed=seed)
        if not -1 <= require_number("ssim_threshold", ssim_threshold) < 1:
            raise ValueError(f"ssim_threshold must be at least -1 and below 1, got {ssim_threshold}")
        require_count("pretraining", pretraining, 0)
        self.ssim_threshold = ssim_threshold
        self.pretraining = pretraining

    def start(self, model: SplitModel, images: Tensor) -> None:
        super().start(model, images)
        encoder = copy.deepcopy(model.encoder).train()  # a copy: in training mode its running statistics change
        for _ in range(self.pretraining):
            for batch in torch.randperm(len(images), device=images.device).split(BATCH):
                with torch.no_grad():
                    features = encoder(images[batch])
                self.after_step(images[batch], features)

    def penalty(self, images: Tensor, features: Tensor, released: Tensor, labels: Tensor) -> Tensor:
        self.proxy.requires_grad_(False)  # the gradient is for the encoder alone
        similarity = metrics.ssim(self.proxy(released), images).mean()
        return self.adversary_weight * F.relu(similarity - self.ssim_threshold)
