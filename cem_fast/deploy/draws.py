"""Random draws of a forward pass as inputs of it, so that an exported graph holds no generator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cem_fast.defenses.secure import normal, uniform

NORMAL, UNIFORM = "normal", "uniform"
NEUTRAL = {NORMAL: 0.0, UNIFORM: 0.5}  # the value at which a draw has no effect, or the median one


@dataclass(frozen=True)
class RandomInput:
    """A random input of the device half.

    Args:
        name: name of the input in the graph.
        distribution: ``normal`` for N(0, 1), ``uniform`` for [0, 1).
        shape: shape for one message, without the batch.
        variance: mean variance of a message that this input alone causes, for the probe image.

    Example:
        >>> from cem_fast.deploy.draws import RandomInput
        >>> RandomInput("noise", "normal", (8, 12, 12), 0.01).shape
        (8, 12, 12)
    """

    name: str
    distribution: str
    shape: tuple[int, ...]
    variance: float = 0.0

    def __post_init__(self) -> None:
        if self.distribution not in NEUTRAL:
            raise ValueError(f"distribution must be {NORMAL} or {UNIFORM}, got {self.distribution!r}")
        if not all(side > 0 for side in self.shape):
            raise ValueError(f"shape must have positive sides, got {self.shape}")
        if not self.variance >= 0:
            raise ValueError(f"variance must be at least 0, got {self.variance}")


class Draws(TorchFunctionMode):
    """Replaces the random functions of torch inside the block by given standard draws.

    Without ``inputs`` the draws are made by the generator of torch, and only recorded. Functions that draw from another distribution
    transform a standard draw: dropout and ``bernoulli`` compare a uniform draw with the rate, ``exponential_`` takes ``-log(1 - u)``.

    Args:
        inputs: the standard draws in the order of use, ``[N, ...]`` each; None to record.

    Attributes:
        recorded: distribution and shape ``[N, ...]`` of every draw so far.

    Raises:
        ValueError: a random function has no such form; the error names it.

    Example:
        >>> import torch
        >>> from cem_fast.deploy.draws import Draws
        >>> with Draws() as draws:
        ...     _ = torch.randn_like(torch.zeros(5, 3))
        >>> draws.recorded
        [('normal', (5, 3))]
        >>> with Draws([torch.full((5, 3), 0.25)]):
        ...     print(torch.randn_like(torch.zeros(5, 3))[0])
        tensor([0.2500, 0.2500, 0.2500])
    """

    def __init__(self, inputs: Sequence[Tensor] | None = None):
        super().__init__()
        self.inputs = None if inputs is None else list(inputs)
        self.recorded: list[tuple[str, tuple[int, ...]]] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if handler := _HANDLERS.get(function):
            return handler(self, *args, **kwargs)
        name = getattr(function, "__name__", str(function))
        if name in _REFUSED:
            raise ValueError(
                f"the random function torch.{name} cannot be exported: draw by {', '.join(_NAMES)} instead"
            )
        return function(*args, **kwargs)

    def standard(self, distribution: str, like: Tensor) -> Tensor:
        """Returns the next standard draw.

        Args:
            distribution: ``normal`` or ``uniform``.
            like: a tensor of the shape and dtype.
        """
        self.recorded.append((distribution, tuple(like.shape)))
        if self.inputs is None:
            with torch._C.DisableTorchFunction():
                return torch.randn_like(like) if distribution == NORMAL else torch.rand_like(like)
        return self.inputs[len(self.recorded) - 1].to(like.dtype)


def _shaped(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """An empty tensor of the size, dtype and device of a factory call."""
    size = kwargs.get("size", args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
    return torch.empty(size, dtype=kwargs.get("dtype"), device=kwargs.get("device"))


def _randn(draws: Draws, *args: Any, **kwargs: Any) -> Tensor:
    return draws.standard(NORMAL, _shaped(args, kwargs))


def _rand(draws: Draws, *args: Any, **kwargs: Any) -> Tensor:
    return draws.standard(UNIFORM, _shaped(args, kwargs))


def _randn_like(draws: Draws, like: Tensor, **_: Any) -> Tensor:
    return draws.standard(NORMAL, like)


def _rand_like(draws: Draws, like: Tensor, **_: Any) -> Tensor:
    return draws.standard(UNIFORM, like)


def _normal(draws: Draws, mean: Any = 0.0, std: Any = 1.0, *rest: Any, **kwargs: Any) -> Tensor:
    if not isinstance(mean, Tensor) and not isinstance(std, Tensor):
        like = _shaped(rest[:1], kwargs)
    else:
        like = mean + torch.zeros_like(std) if isinstance(mean, Tensor) and isinstance(std, Tensor) else mean
        like = like if isinstance(like, Tensor) else std
    return mean + std * draws.standard(NORMAL, like)


def _normal_(draws: Draws, like: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
    return like.copy_(mean + std * draws.standard(NORMAL, like))


def _uniform_(draws: Draws, like: Tensor, low: float = 0.0, high: float = 1.0, **kwargs: Any) -> Tensor:
    low, high = kwargs.get("from", low), kwargs.get("to", high)
    return like.copy_(low + (high - low) * draws.standard(UNIFORM, like))


def _exponential_(draws: Draws, like: Tensor, rate: float = 1.0, **kwargs: Any) -> Tensor:
    rate = kwargs.get("lambd", rate)
    return like.copy_(-torch.log1p(-draws.standard(UNIFORM, like)) / rate)


def _bernoulli(draws: Draws, share: Tensor, **_: Any) -> Tensor:
    return (draws.standard(UNIFORM, share) < share).to(share.dtype)


def _dropout(draws: Draws, values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0:
        return values
    kept = draws.standard(UNIFORM, values) >= p
    return torch.where(kept, values / (1 - p), torch.zeros_like(values))


_HANDLERS: dict[Any, Callable[..., Tensor]] = {
    torch.randn: _randn,
    torch.rand: _rand,
    torch.randn_like: _randn_like,
    torch.rand_like: _rand_like,
    torch.normal: _normal,
    torch.bernoulli: _bernoulli,
    torch.Tensor.normal_: _normal_,
    torch.Tensor.uniform_: _uniform_,
    torch.Tensor.exponential_: _exponential_,
    F.dropout: _dropout,
}
_NAMES = sorted({handled.__name__ for handled in _HANDLERS})
_REFUSED = {
    "alpha_dropout", "bernoulli_", "binomial", "cauchy_", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout",
    "geometric_", "gumbel_softmax", "log_normal_", "multinomial", "poisson", "randint", "randint_like", "random_", "randperm", "rrelu",
}  # fmt: skip


def find(function: Callable[[Tensor], Tensor], images: Tensor) -> list[RandomInput]:
    """Finds the random draws of a function of a batch.

    Args:
        function: images ``[N, ...]`` -> messages ``[N, ...]``.
        images: at least two images ``[N, ...]``.

    Returns:
        One input for each draw, in the order of use.

    Raises:
        ValueError: a random function cannot be replaced, draws are shared by a batch, or other packages draw.

    Example:
        >>> import torch
        >>> from cem_fast import defenses
        >>> from cem_fast.deploy import draws
        >>> draws.find(defenses.GaussianNoise(noise_std=0.1).release, torch.rand(2, 3, 4))
        [RandomInput(name='noise', distribution='normal', shape=(3, 4), variance=0.0)]
    """
    with torch.no_grad(), Draws() as draws:
        function(images)
    found: list[RandomInput] = []
    for distribution, shape in draws.recorded:
        if len(shape) < 2 or shape[0] != len(images):
            raise ValueError(
                f"every draw must have the shape [N, ...] of a batch, got a {distribution} draw of shape {list(shape)} for "
                f"{len(images)} images: messages would share it"
            )
        same = sum(each.distribution == distribution for each in found)
        name = {NORMAL: "noise", UNIFORM: "uniform"}[distribution] + (f"_{same + 1}" if same else "")
        found.append(RandomInput(name, distribution, shape[1:]))
    with torch.no_grad(), Draws(neutral(found, len(images))):
        first = function(images)
    if not first.isfinite().all():
        raise ValueError("messages must be finite, got NaN or infinity for the probe image")
    with torch.no_grad(), Draws(neutral(found, len(images))):
        if not torch.equal(first, function(images)):
            raise ValueError(
                "messages differ at given draws of torch: draw by torch's functions, so that an export finds them"
            )
    return found


def probes(shape: Sequence[int], count: int) -> Tensor:
    """Copies of the probe image, ``[count, C, H, W]`` in [0, 1]: a fixed pattern on which messages are measured.

    Args:
        shape: ``(C, H, W)``.
        count: number of copies.

    Example:
        >>> from cem_fast.deploy.draws import probes
        >>> probes((1, 4, 4), 3).shape
        torch.Size([3, 1, 4, 4])
    """
    image = torch.rand(tuple(shape), generator=torch.Generator().manual_seed(0))
    return image.expand(count, *shape).contiguous()


def copies(shape: Sequence[int]) -> int:
    """Number of messages of the probe image that a measurement takes: fewer for large images, whose messages are long.

    Args:
        shape: ``(C, H, W)``.

    Example:
        >>> from cem_fast.deploy.draws import copies
        >>> copies((3, 48, 48)), copies((3, 224, 224))
        (65, 27)
    """
    return max(9, min(65, 2**22 // math.prod(shape)))


def neutral(inputs: Sequence[RandomInput], count: int) -> list[Tensor]:
    """Returns draws without an effect: zeros for normal ones, one half for uniform ones.

    Args:
        inputs: the random inputs.
        count: messages in the batch.

    Example:
        >>> from cem_fast.deploy.draws import RandomInput, neutral
        >>> neutral([RandomInput("noise", "normal", (2,))], 1)
        [tensor([[0., 0.]])]
    """
    return [torch.full((count, *each.shape), NEUTRAL[each.distribution]) for each in inputs]


def seeded(inputs: Sequence[RandomInput], count: int, seed: int) -> list[Tensor]:
    """Returns standard draws of a seeded generator, for measurements; never for messages of a user.

    Args:
        inputs: the random inputs.
        count: messages in the batch.
        seed: seed of the generator.

    Example:
        >>> from cem_fast.deploy.draws import RandomInput, seeded
        >>> seeded([RandomInput("uniform", "uniform", (2,))], 3, seed=0)[0].shape
        torch.Size([3, 2])
    """
    generator = torch.Generator().manual_seed(seed)
    make = {NORMAL: torch.randn, UNIFORM: torch.rand}
    return [make[each.distribution]((count, *each.shape), generator=generator) for each in inputs]


def secure(inputs: Sequence[RandomInput], count: int) -> list[Tensor]:
    """Returns standard draws of the system's secure generator, for messages of a user.

    Args:
        inputs: the random inputs of the manifest.
        count: messages in the batch.

    Returns:
        float32 ``[count, *shape]`` each.

    Example:
        >>> from cem_fast.deploy import draws
        >>> draws.secure([draws.RandomInput("noise", "normal", (4,))], 2)[0].shape
        torch.Size([2, 4])
    """
    make = {NORMAL: lambda shape: normal(shape).float(), UNIFORM: lambda shape: uniform(shape, torch.float32)}
    return [make[each.distribution]((count, *each.shape)) for each in inputs]


def variance(messages: Tensor) -> float:
    """Mean over a message's numbers of their variance over messages of one image.

    Args:
        messages: ``[R, ...]``, R messages of one image, R at least 2.

    Example:
        >>> import torch
        >>> from cem_fast.deploy.draws import variance
        >>> variance(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
        1.0
    """
    return float(messages.double().flatten(1).var(0).mean())


def spread(messages: Tensor) -> float:
    """Relative standard error of :func:`variance`: that of Gaussian noise, ``sqrt(2 / (numbers (R - 1)))``, or the observed one if greater.

    Heavy tails, such as those of Laplace noise or of dropped features, make it greater.

    Args:
        messages: ``[R, ...]``, R messages of one image, R at least 2.

    Example:
        >>> import torch
        >>> from cem_fast.deploy.draws import spread
        >>> round(spread(torch.randn(65, 512, generator=torch.Generator().manual_seed(0))), 3)
        0.008
    """
    rows = messages.double().flatten(1)
    squares = (rows - rows.mean(0)).square().mean(1)
    observed = float(squares.std() / (squares.mean().clamp_min(1e-300) * math.sqrt(len(rows))))
    return max(observed, math.sqrt(2 / (rows.shape[1] * (len(rows) - 1))))
