"""Sparse coding architecture: a layer of the encoder that reduces feature maps to a sparse combination of patterns."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cem_fast._support.counts import require_number
from cem_fast._support.seeding import seeded
from cem_fast.defenses.base import Defense
from cem_fast.defenses.insertion import insert_layer
from cem_fast.models.split import SplitModel

GRID = 8  # frequencies per axis at which the dictionary's gain is measured
STEP = 1.6  # times the inverse of the gain; the competition converges below 2


class SparseCoding(nn.Module):
    """Replaces feature maps by a sparse combination of learned patterns, ``x' = D a``.

    The code a approximately minimizes ``1/2 |x - D a|^2 + t |a|_1``, by a few steps of the locally competitive algorithm. Neurons with
    potentials u are driven by the input and inhibited by similar active neurons: ``u += step (D^T x - (D^T D - I) a - u)`` with
    ``a = sign(u) max(|u| - t, 0)``, from ``u = 0``. D is convolutional: every neuron's pattern, of unit norm, is repeated at every
    position. The threshold ``t = threshold * rms(x)`` is relative to each image's features, so that small features have a code too. The
    step is the largest that the greatest gain of ``D^T D`` allows. D is initialized close to a tight frame, for which few steps suffice.

    Args:
        channels: channels of the feature maps.
        threshold: potential above which a neuron is active, in root mean squares of an image's features.
        overcompleteness: neurons per channel at every position.
        iterations: steps of the competition.
        kernel_size: side of the patterns in positions, odd.

    Source:
        Rozell et al., "Sparse coding via thresholding and local competition in neural circuits", Neural Computation 2008, Eq. 3 and 4.

    Example:
        >>> import torch
        >>> from cem_fast.defenses.sca import SparseCoding
        >>> layer = SparseCoding(4, threshold=0.5)
        >>> layer(torch.rand(2, 4, 8, 8)).shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(
        self, channels: int, *, threshold: float, overcompleteness: int = 2, iterations: int = 8, kernel_size: int = 3
    ):
        super().__init__()
        self.threshold, self.iterations = threshold, iterations
        neurons, middle = overcompleteness * channels, kernel_size // 2
        patterns = 0.1 * torch.randn(neurons, channels, kernel_size, kernel_size)
        patterns[:, :, middle, middle] = neurons**0.5 * nn.init.orthogonal_(torch.empty(neurons, channels))
        self.patterns = nn.Parameter(patterns)

    def dictionary(self) -> Tensor:
        """Returns the patterns with unit norm, ``[neurons, channels, k, k]``.

        Example:
            >>> from cem_fast.defenses.sca import SparseCoding
            >>> SparseCoding(4, threshold=0.5).dictionary().shape
            torch.Size([8, 4, 3, 3])
        """
        return self.patterns / torch.linalg.vector_norm(self.patterns, dim=(1, 2, 3), keepdim=True)

    def code(self, features: Tensor) -> Tensor:
        """Returns the sparse code of feature maps, ``[N, neurons, H, W]``.

        Args:
            features: ``[N, channels, H, W]``.

        Example:
            >>> import torch
            >>> from cem_fast.defenses.sca import SparseCoding
            >>> code = SparseCoding(4, threshold=0.5).code(torch.rand(2, 4, 8, 8))
            >>> code.shape, bool((code == 0).any())
            (torch.Size([2, 8, 8, 8]), True)
        """
        return self._code(features, self.dictionary())

    def forward(self, features: Tensor) -> Tensor:
        dictionary = self.dictionary()
        return self._combine(self._code(features, dictionary), dictionary)

    def frozen(self) -> nn.Module:
        """Returns this layer for use alone: the dictionary and its gain are constants, which every exporter accepts.

        Example:
            >>> import torch
            >>> from cem_fast.defenses.sca import SparseCoding
            >>> layer, features = SparseCoding(4, threshold=0.5), torch.rand(2, 4, 8, 8)
            >>> torch.allclose(layer.frozen()(features), layer(features), atol=1e-5)
            True
        """
        return _FrozenSparseCoding(self)

    def _code(self, features: Tensor, dictionary: Tensor, gain: float | Tensor | None = None) -> Tensor:
        norms = torch.linalg.vector_norm(features, dim=(1, 2, 3), keepdim=True) / features.shape[1:].numel() ** 0.5
        scale = norms.clamp_min(torch.finfo(features.dtype).tiny)
        features = features / scale
        step = STEP / (_gain(dictionary.detach()) if gain is None else gain)
        potentials = step * F.conv2d(features, dictionary, padding="same")
        active = F.softshrink(potentials, self.threshold)
        for _ in range(self.iterations - 1):
            residual = features - self._combine(active, dictionary)
            driven = F.conv2d(residual, dictionary, padding="same")
            potentials = potentials + step * (driven + active - potentials)
            active = F.softshrink(potentials, self.threshold)
        return scale * active

    @staticmethod
    def _combine(code: Tensor, dictionary: Tensor) -> Tensor:
        return F.conv_transpose2d(code, dictionary, padding=dictionary.shape[-1] // 2)


class _FrozenSparseCoding(nn.Module):
    """A trained layer with a constant dictionary."""

    def __init__(self, layer: SparseCoding):
        super().__init__()
        self.layer = layer
        self.register_buffer("dictionary", layer.dictionary().detach().clone())
        self.gain = float(_gain(layer.dictionary().detach()))

    def forward(self, features: Tensor) -> Tensor:
        dictionary = self.get_buffer("dictionary")
        return self.layer._combine(self.layer._code(features, dictionary, self.gain), dictionary)


class SparseCodingArchitecture(Defense):
    """Inserts a layer of sparse coding before the encoder's last module, trained with the network; features are released unchanged.

    Args:
        sparse_threshold: potential above which a neuron is active, positive, in root mean squares of an image's features.
        seed: seed of the layer's initial patterns.

    Raises:
        ValueError: ``sparse_threshold`` is not positive.

    Source:
        Dibbo et al., "Improving robustness to model inversion attacks via sparse coding architectures", ECCV 2024.

    Example:
        >>> import torch
        >>> from cem_fast import defenses, models
        >>> model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=8)
        >>> defense = defenses.SparseCodingArchitecture(sparse_threshold=0.5)
        >>> defense.start(model, torch.rand(4, 1, 16, 16))  # as training does
        >>> type(model.encoder[-2]).__name__
        'SparseCoding'
        >>> defense.release(model.encoder(torch.rand(2, 1, 16, 16))).shape
        torch.Size([2, 8, 4, 4])
    """

    keeps_range = True

    def __init__(self, *, sparse_threshold: float, seed: int = 0):
        super().__init__()
        if not 0 < require_number("sparse_threshold", sparse_threshold) < math.inf:
            raise ValueError(f"sparse_threshold must be positive and finite, got {sparse_threshold}")
        self.sparse_threshold = sparse_threshold
        self.seed = seed

    def attach(self, model: SplitModel, image_shape: torch.Size) -> None:
        with seeded(self.seed, "sparse coding"):
            insert_layer(
                model,
                image_shape,
                SparseCoding,
                lambda channels: SparseCoding(channels, threshold=self.sparse_threshold),
            )


def _gain(dictionary: Tensor) -> Tensor:
    """The greatest gain of ``D^T D``: the largest squared singular value of D over all frequencies."""
    spectrum = torch.fft.fft2(dictionary, s=(GRID, GRID)).permute(2, 3, 0, 1)  # [GRID, GRID, neurons, channels]
    return torch.linalg.eigvalsh(spectrum.mH @ spectrum).amax()
