"""A network split into an encoder on the user's device and a decoder in the cloud."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cem_fast._support.bottleneck import Bottleneck
from cem_fast.models.cutting import divide
from cem_fast.models.halves import halves


class SplitModel(nn.Module):
    """A network split in two: ``forward(x) = decoder(encoder(x))``.

    Args:
        encoder: the part on the user's device, from images to features.
        decoder: the part in the cloud, from released features to logits.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from cem_fast import SplitModel
        >>> encoder = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sigmoid())
        >>> model = SplitModel(encoder, nn.Sequential(nn.Flatten(), nn.Linear(72, 3)))
        >>> model(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 3])
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        for name, part in (("encoder", encoder), ("decoder", decoder)):
            if not isinstance(part, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, got {type(part).__name__}")
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images))

    @property
    def device(self) -> torch.device:
        """Device of the parameters; the CPU if there are none.

        Example:
            >>> from torch import nn
            >>> from cem_fast import SplitModel
            >>> SplitModel(nn.Identity(), nn.Flatten()).device
            device(type='cpu')
        """
        first = next(self.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    @classmethod
    def from_sequential(
        cls,
        network: nn.Sequential,
        cut: int,
        bottleneck: int | str = 0,
        *,
        image_shape: tuple[int, int, int] | None = None,
    ) -> SplitModel:
        """Splits any ``nn.Sequential`` in two; the modules are shared, not copied.

        Noise of a fixed standard deviation protects only features of a bounded scale. A bottleneck bounds them by its Sigmoid; without
        one, end the encoder in a bounded activation. The stride of a bottleneck must divide the sides of the features at the cut.

        Args:
            network: modules from images to logits.
            cut: number of modules on the user's device, 1 to ``len(network) - 1``.
            bottleneck: channels of the released features, or a notation such as ``K5C8S2`` or ``D64``, see
                :meth:`cem_fast.models.Bottleneck.parse`; 0 for no bottleneck.
            image_shape: ``(channels, height, width)`` of the images; a dense bottleneck (``D64``) needs it.

        Returns:
            ``SplitModel(network[:cut], network[cut:])``, with the two halves of the bottleneck between them.

        Raises:
            TypeError: ``network`` is not an ``nn.Sequential``.
            ValueError: ``cut`` is out of range, there is a bottleneck but the encoder does not end in feature maps ``[N, C, H, W]``
                of a convolution, or a dense bottleneck has no ``image_shape``.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from cem_fast import SplitModel
            >>> network = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 3))
            >>> model = SplitModel.from_sequential(network, cut=2, bottleneck=4)
            >>> model.encoder(torch.rand(5, 1, 8, 8)).shape
            torch.Size([5, 4, 6, 6])
        """
        if not isinstance(network, nn.Sequential):
            raise TypeError(f"network must be an nn.Sequential, got {type(network).__name__}")
        if not 1 <= cut < len(network):
            raise ValueError(f"cut must be between 1 and {len(network) - 1} for {len(network)} modules, got {cut}")
        encoder, decoder = list(network[:cut]), list(network[cut:])
        if shape := Bottleneck.parse(bottleneck):
            compress, expand = halves(shape, nn.Sequential(*encoder), _channels(encoder), image_shape)
            encoder.append(compress)
            decoder.insert(0, expand)
        return cls(nn.Sequential(*encoder), nn.Sequential(*decoder))

    @classmethod
    def from_module(cls, network: nn.Module, cut: str, example: Tensor, bottleneck: int | str = 0) -> SplitModel:
        """Splits any network behind a module; parameters are shared, not copied.

        The network is traced by torch.fx, or by torch.export. Where neither can, hooks stop it at the cut and continue it from there;
        both halves then hold the whole network. Functional dropout is traced in eval mode, and stays off.

        Args:
            network: a network from images to logits.
            cut: name of the module whose result leaves the device, such as ``layer1`` or ``features.4``; see
                :func:`cem_fast.models.cuts`.
            example: images ``[N, C, H, W]``, on the device and with the dtype that the network takes.
            bottleneck: channels of the released features, or a notation such as ``K5C8S2`` or ``D64``, see
                :meth:`cem_fast.models.Bottleneck.parse`; 0 for no bottleneck.

        Returns:
            The split network, which computes what the network does, apart from a bottleneck.

        Raises:
            ValueError: there is no such module, its result is no batch of numbers, or further values cross the cut, such as a skip
                connection. Or there is a bottleneck, and the features are no maps.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from cem_fast import SplitModel
            >>> class Network(nn.Module):
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.first, self.last = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)
            ...
            ...     def forward(self, images):
            ...         return self.last(torch.relu(self.first(images)).mean((2, 3)))
            >>> network, images = Network(), torch.rand(2, 1, 8, 8)
            >>> model = SplitModel.from_module(network, cut="first", example=images)
            >>> model.encoder(images).shape, torch.allclose(model(images), network(images))
            (torch.Size([2, 4, 6, 6]), True)
        """
        encoder, decoder, shape = divide(network, cut, example)
        if parsed := Bottleneck.parse(bottleneck):
            if len(shape) != 3:
                raise ValueError(f"a bottleneck needs feature maps [N, C, H, W] at the cut, got {('N', *shape)}")
            compress, expand = halves(parsed, nn.Identity(), shape[0], (shape[0], shape[1], shape[2]))
            encoder, decoder = nn.Sequential(encoder, compress), nn.Sequential(expand, decoder)
        return cls(encoder, decoder)


def _channels(encoder: Sequence[nn.Module]) -> int:
    """Channels of the feature maps at the end of an encoder."""
    channels, flattened = 0, None
    for module in (m for part in encoder for m in part.modules()):
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            channels, flattened = module.out_channels, None
        elif isinstance(module, nn.PixelShuffle):
            channels //= module.upscale_factor**2
        elif isinstance(module, nn.PixelUnshuffle):
            channels *= module.downscale_factor**2
        elif isinstance(module, nn.Flatten | nn.Linear):
            flattened = type(module).__name__
    if flattened:
        raise ValueError(
            f"a bottleneck needs feature maps [N, C, H, W] at the cut, got a {flattened} after the last Conv2d"
        )
    if not channels:
        raise ValueError(f"a bottleneck needs a Conv2d before the cut, got none in the first {len(encoder)} modules")
    return channels
