"""PATROL: a deeper encoder, pruned to stay small, and trained against a proxy decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cem_fast._support import optional
from cem_fast._support.counts import require_number
from cem_fast._support.eval_mode import in_eval_mode
from cem_fast._support.seeding import seeded
from cem_fast.defenses.insertion import insert_layer
from cem_fast.defenses.ressfl import ResSFL
from cem_fast.models.split import SplitModel

if TYPE_CHECKING:
    from torch_pruning.dependency import DependencyGraph, Group

NUM_JUDGES = 256  # training images, at most, whose loss ranks the channels


class ExtraConvolution(nn.Sequential):
    """One more convolution, with batch normalization and ReLU, that keeps the shape of the features.

    Args:
        channels: channels of its input and output.

    Example:
        >>> import torch
        >>> from cem_fast.defenses.patrol import ExtraConvolution
        >>> ExtraConvolution(8)(torch.rand(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, channels: int):
        super().__init__(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())


class Patrol(ResSFL):
    """ResSFL on an encoder with one more convolution, whose least important channels are pruned halfway through training.

    A channel's importance is the first-order change of the cross-entropy of training images without it: ``sum |w dL/dw|`` over all weights
    removed with it. The released features keep their channels and are released unchanged. A pruned network is saved with its shapes;
    loading narrows a new one to them.

    Args:
        adversary_weight: weight of the penalty, positive.
        ssim_threshold: structural similarity, below 1, up to which a reconstruction has no penalty.
        pruned_channels: share of the channels of every layer of the encoder that are pruned, at least one per layer.
        seed: seed of the initial weights of the proxy and of the extra convolution.

    Raises:
        ValueError: a setting is out of range.
        ImportError: ``torch_pruning`` is missing or does not load.

    Source:
        Ding et al., "PATROL: privacy-oriented pruning for collaborative inference against model inversion attacks", WACV 2024; Fang et al.,
        "DepGraph: towards any structural pruning", CVPR 2023; Molchanov et al., "Importance estimation for neural network pruning", CVPR
        2019.

    Example:
        >>> import torch
        >>> from cem_fast import defenses, models
        >>> model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=8)
        >>> defense = defenses.Patrol(adversary_weight=1.0, ssim_threshold=0.3, pruned_channels=0.25)
        >>> images, labels = torch.rand(6, 1, 16, 16), torch.arange(6) % 3
        >>> defense.start(model, images)  # as training does; features are released unchanged
        >>> defense.before_epoch(model, images, labels, epoch=5, epochs=10)
        >>> [layer.out_channels for layer in model.encoder.modules() if isinstance(layer, torch.nn.Conv2d)]
        [12, 24, 24, 8]
    """

    def __init__(self, *, adversary_weight: float, ssim_threshold: float, pruned_channels: float, seed: int = 0):
        super().__init__(adversary_weight=adversary_weight, ssim_threshold=ssim_threshold, seed=seed)
        if not 0 < require_number("pruned_channels", pruned_channels) < 1:
            raise ValueError(f"pruned_channels must be between 0 and 1, got {pruned_channels}")
        optional.load("torch_pruning", "the defense patrol", "torch-pruning")
        self.pruned_channels = pruned_channels

    def attach(self, model: SplitModel, image_shape: torch.Size) -> None:
        with seeded(self.seed, "extra convolution"):
            insert_layer(model, image_shape, ExtraConvolution, ExtraConvolution)
        super().attach(model, image_shape)

    def reshape(self, model: SplitModel, shapes: Mapping[str, torch.Size]) -> None:
        for name, module in model.encoder.named_modules():
            for key, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                shape = shapes.get(f"encoder.{name}.{key}", value.shape)
                if len(shape) == value.dim() and all(0 < new <= old for new, old in zip(shape, value.shape)):
                    value.data = value.data[tuple(slice(size) for size in shape)].clone()
            _count_channels(module)
        model.encoder.to(memory_format=torch.channels_last)

    def before_epoch(self, model: SplitModel, images: Tensor, labels: Tensor, *, epoch: int, epochs: int) -> None:
        if epoch != epochs // 2:
            return
        import torch_pruning

        encoder = model.encoder
        judges = slice(None, None, -(-len(images) // NUM_JUDGES))  # over all images, which may be sorted by class
        layers = [module for module in encoder.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        with in_eval_mode(model), torch.enable_grad():
            graph = torch_pruning.DependencyGraph()
            graph.build_dependency(
                encoder, images[:1], forward_fn=lambda network, inputs: network(inputs), verbose=False
            )
            model.zero_grad()
            F.cross_entropy(model(images[judges]), labels[judges]).backward()
        importance = torch_pruning.importance.GroupTaylorImportance()
        groups = list(graph.get_all_groups(ignored_layers=layers[-1:], root_module_types=[nn.Conv2d]))
        for group in groups:
            if not all(_is_narrowed(dependency.target.module) for dependency, _ in group):
                continue  # layers with other parameters, such as a sparse code, keep their channels
            _leave_out_padding(graph, group)
            scores = importance(group)
            least = [
                channel
                for channels in _sharing_layers(group)
                for channel in sorted(channels, key=scores.__getitem__)[: self._count(len(channels))]
            ]
            if least:
                root = group[0].dep
                pruned = graph.get_pruning_group(root.target.module, root.handler, idxs=least)
                _leave_out_padding(graph, pruned)
                pruned.prune()
        model.zero_grad()
        encoder.to(memory_format=torch.channels_last)

    def _count(self, channels: int) -> int:
        """Number of pruned channels of a layer."""
        return min(max(1, round(self.pruned_channels * channels)), channels - 1)


def _leave_out_padding(graph: DependencyGraph, group: Group) -> None:
    """Removes from a group the channels that its layers lack: a widening shortcut has padded its output with zeros."""
    for item in group:
        layer, takes = item.dep.target.module, graph.is_in_channel_pruning_fn(item.dep.handler)
        width = (graph.get_in_channels if takes else graph.get_out_channels)(layer)
        if width is not None:
            own = [(index, root) for index, root in zip(item.idxs, item.root_idxs, strict=True) if index < width]
            item.idxs[:], item.root_idxs[:] = [index for index, _ in own], [root for _, root in own]


def _sharing_layers(group: Group) -> list[list[int]]:
    """The channels of a group's first layer, by the set of other layers that lose channels with them."""
    layers: dict[int, list[int]] = {channel: [] for channel in group[0].idxs}
    for index, item in enumerate(group):
        for channel in set(item.root_idxs):
            layers[channel].append(index)
    together: dict[tuple[int, ...], list[int]] = {}
    for channel, indices in layers.items():
        together.setdefault(tuple(indices), []).append(channel)
    return list(together.values())


def _is_narrowed(module: nn.Module | nn.Parameter) -> bool:
    """Whether a module can lose channels, or has no parameters."""
    known = isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear)
    return known or (isinstance(module, nn.Module) and not list(module.parameters()))


def _count_channels(module: nn.Module) -> None:
    """Sets a module's numbers of channels to those of its weights."""
    if isinstance(module, nn.Conv2d):
        if module.groups > 1 and module.weight.shape[1] == 1:  # depthwise: as many groups as channels
            module.groups = len(module.weight)
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.BatchNorm2d) and module.affine:
        module.num_features = len(module.weight)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
