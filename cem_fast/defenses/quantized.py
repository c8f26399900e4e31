"""Numbers of a message as they are sent, and a defense that releases them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cem_fast.defenses.base import Defense, released, require_defense
from cem_fast.models.split import SplitModel

CODES = {"float32": torch.float32, "float16": torch.float16, "uint8": torch.uint8}
LEVELS = 255


class Code(nn.Module):
    """The numbers of a message as they are sent.

    ``uint8``: ``q = round(255 (z - low) / (high - low))``, clipped to 0...255; ``float16``: the nearest number.

    Args:
        dtype: ``float32``, ``float16`` or ``uint8``.
        low: least value of ``uint8``.
        high: greatest value of ``uint8``.

    Raises:
        ValueError: the dtype is unknown, or the range is empty.

    Example:
        >>> import torch
        >>> from cem_fast.defenses.quantized import Code
        >>> code = Code("uint8", low=0.0, high=1.0)
        >>> code.encode(torch.tensor([0.0, 0.5, 2.0]))
        tensor([  0, 128, 255], dtype=torch.uint8)
        >>> code.decode(code.encode(torch.tensor([0.2])))
        tensor([0.2000])
    """

    def __init__(self, dtype: str = "float32", low: float = 0.0, high: float = 1.0):
        super().__init__()
        if dtype not in CODES:
            raise ValueError(f"message must be {', '.join(CODES)}, got {dtype!r}")
        if not low < high:
            raise ValueError(f"the range of a message must not be empty, got [{low}, {high}]")
        self.dtype, self.low, self.high = dtype, low, high

    @property
    def step(self) -> float:
        """Distance of two values of ``uint8``."""
        return (self.high - self.low) / LEVELS

    def encode(self, released: Tensor) -> Tensor:
        """Returns the numbers to send.

        Args:
            released: released features, floating point.
        """
        if self.dtype == "uint8":
            return (
                torch.round((released - self.low) * (LEVELS / (self.high - self.low))).clamp(0, LEVELS).to(torch.uint8)
            )
        return released.to(CODES[self.dtype])

    def decode(self, sent: Tensor) -> Tensor:
        """Returns the features of a message, float32.

        Args:
            sent: numbers of a message.
        """
        return sent.float() * self.step + self.low if self.dtype == "uint8" else sent.float()

    forward = decode


def message_code(defense: Defense, dtype: str) -> Code:
    """The code of a defense's messages: features in [0, 1], with room for four standard deviations of its noise.

    Args:
        defense: the defense.
        dtype: ``float32``, ``float16`` or ``uint8``.

    Returns:
        A code over ``[-4 s, 1 + 4 s]``.

    Example:
        >>> from cem_fast import defenses
        >>> from cem_fast.defenses.quantized import message_code
        >>> code = message_code(defenses.GaussianNoise(noise_std=0.1), "uint8")
        >>> code.low, code.high
        (-0.4, 1.4)
    """
    std = torch.as_tensor(defense.noise_std, dtype=torch.float64).amax().item()
    return Code(dtype, low=-4 * std, high=1 + 4 * std)


class Quantized(Defense):
    """Releases another defense's features as a message carries them, for accuracy and attacks on a finished network.

    ``p(q | f) = Phi((b - f) / s) - Phi((a - f) / s)`` for the interval ``[a, b]`` that ``uint8`` rounds to q.

    Args:
        defense: the defense of the network.
        message: ``float32``, ``float16`` or ``uint8``.

    Raises:
        TypeError: ``defense`` is no defense.
        ValueError: the dtype is unknown.

    Example:
        >>> import torch
        >>> from cem_fast import defenses
        >>> quantized = defenses.Quantized(defenses.GaussianNoise(noise_std=0.1), message="uint8")
        >>> released = quantized.release(torch.rand(100, 16))
        >>> len(released.unique()) <= 256
        True
        >>> quantized.log_likelihood(torch.full((1, 1), 1.4), torch.full((1, 1), 1.4)).exp()  # the last code
        tensor([0.5141])
    """

    def __init__(self, defense: Defense, *, message: str):
        super().__init__()
        self.defense = require_defense("defense", defense)
        self.code = message_code(defense, message)
        self.uses_bottleneck = defense.uses_bottleneck
        self.noise_std = defense.noise_std

    @property
    def secure(self) -> bool:
        return self.defense.secure

    @secure.setter
    def secure(self, value: bool) -> None:
        self.defense.secure = value

    def attach(self, model: SplitModel, image_shape: torch.Size) -> None:
        self.defense.attach(model, image_shape)

    def reshape(self, model: SplitModel, shapes: Mapping[str, torch.Size]) -> None:
        self.defense.reshape(model, shapes)

    def release(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.code.decode(self.code.encode(released(self.defense, features, generator)))

    def before_noise(self, features: Tensor) -> Tensor:
        return self.defense.before_noise(features)

    def log_likelihood(self, released: Tensor, features: Tensor, *, noise_std: float = 0.0) -> Tensor:
        """Returns the log-probability of the numbers sent.

        It is exact for ``uint8`` after Gaussian noise. Elsewhere it is the density of the other defense at the value sent, times the step,
        which is close for steps far below the noise.

        See :meth:`cem_fast.defenses.Defense.log_likelihood`.
        """
        if self.code.dtype != "uint8":
            return self.defense.log_likelihood(released, features, noise_std=noise_std)
        if noise_std or not self.defense.only_adds_noise(features):
            step = torch.tensor(self.code.step).log() * released[0].numel()
            return self.defense.log_likelihood(released, features, noise_std=noise_std) + step
        if not torch.as_tensor(self.noise_std).amin() > 0:
            raise NotImplementedError(f"the defense {type(self.defense).__name__} releases features without noise")
        center, half = self.defense.before_noise(features), self.code.step / 2
        above = torch.where(released > self.code.high - half, torch.inf, released + half)
        below = torch.where(released < self.code.low + half, -torch.inf, released - half)
        mass = _log_mass((below - center) / self.noise_std, (above - center) / self.noise_std)
        return mass.flatten(1).sum(1)


def _log_mass(low: Tensor, high: Tensor) -> Tensor:
    """``log(Phi(high) - Phi(low))`` for ``low < high``, on the side of the mean where both are negative."""
    flip = low + high > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    upper, lower = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return upper + torch.log1p(-(lower - upper).exp().clamp(max=1 - 1e-7))
