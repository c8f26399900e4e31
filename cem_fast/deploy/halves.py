"""The two halves of a network as modules of tensors alone: images to messages, and messages to logits."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from cem_fast.defenses import Defense
from cem_fast.defenses.quantized import Code
from cem_fast.deploy.draws import Draws
from cem_fast.models.split import SplitModel


class Device(nn.Module):
    """The half on the device: preprocessing, encoder, everything that the defense does in use, and the code of the message.

    Args:
        model: the network; copied.
        defense: the defense; copied.
        code: the code of the message.
        mean: mean of each channel of the images, subtracted; None for images that are used as they are.
        std: standard deviation of each channel, the divisor; None likewise.

    Example:
        >>> import torch
        >>> from cem_fast import defenses, models
        >>> from cem_fast.defenses.quantized import Code
        >>> from cem_fast.deploy.halves import Device
        >>> model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=4)
        >>> device = Device(model, defenses.GaussianNoise(noise_std=0.1), Code())
        >>> device(torch.rand(2, 1, 16, 16), torch.zeros(2, 4, 4, 4)).shape
        torch.Size([2, 4, 4, 4])
    """

    def __init__(
        self,
        model: SplitModel,
        defense: Defense,
        code: Code,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__()
        self.encoder = frozen(model.encoder)
        self.defense = cast("Defense", frozen(defense))
        self.defense.secure = False  # the application passes secure draws in
        self.code = code
        self.mean: Tensor | None
        self.std: Tensor | None
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, None if values is None else torch.tensor(values).view(-1, 1, 1))
        self.eval()

    def forward(self, images: Tensor, *draws: Tensor) -> Tensor:
        with Draws(draws):
            return self.message(images)

    def message(self, images: Tensor) -> Tensor:
        """Returns the messages of images ``[N, C, H, W]`` in [0, 1], with draws of torch's generator."""
        if self.mean is not None:
            images = images - self.mean
        if self.std is not None:
            images = images / self.std
        return self.code.encode(self.defense.release(self.encoder(images)))


class Cloud(nn.Module):
    """The half in the cloud: messages to logits.

    Args:
        model: the network; copied.
        code: the code of the message.

    Example:
        >>> import torch
        >>> from cem_fast import models
        >>> from cem_fast.defenses.quantized import Code
        >>> from cem_fast.deploy.halves import Cloud
        >>> model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=4)
        >>> Cloud(model, Code())(torch.rand(2, 4, 4, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, model: SplitModel, code: Code):
        super().__init__()
        self.decoder = frozen(model.decoder)
        self.code = code
        self.eval()

    def forward(self, messages: Tensor) -> Tensor:
        return self.decoder(self.code.decode(messages))


def frozen(module: nn.Module) -> nn.Module:
    """Returns a copy for use alone, on the CPU: no gradients, and every module with a method ``frozen`` replaced by its result.

    Args:
        module: the module, which stays as it is.

    Example:
        >>> from torch import nn
        >>> from cem_fast.deploy.halves import frozen
        >>> frozen(nn.Linear(2, 2)).weight.requires_grad
        False
    """
    module = copy.deepcopy(module).cpu().eval().requires_grad_(False)
    for weight in module.parameters():  # runtimes on devices take the default order of dimensions alone
        weight.data = torch.empty(weight.shape, dtype=weight.dtype).copy_(weight)
    for name, part in list(module.named_modules()):
        freeze: Any = getattr(part, "frozen", None)
        if name and callable(freeze):
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, freeze())
    return module
