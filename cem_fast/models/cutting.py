"""Cuts of any network: their list, and the two halves of the network at one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from cem_fast._support.eval_mode import in_eval_mode
from cem_fast._support.lookup import lookup
from cem_fast.models.advice import EVERY, spreads
from cem_fast.models.graphs import Graph, Untraceable


@dataclass(frozen=True)
class Cut:
    """A place where one value leaves the device.

    Args:
        name: the module whose result it is; of several modules with this result, the outermost.
        shape: shape of the features of one image, without the batch.
        parameters: parameters on the device.
        multiplications: multiplications of the device for one image, of convolutions and matrices.
        bytes: bytes of the features of one image.
        radius: R_c^2, the mean squared distance of features from the mean of their class; None without labels.
        information: held-out estimate of an upper bound on the information about an image, in nats, with noise in units of the features'
            own standard deviation; None without labels.

    Example:
        >>> from cem_fast.models import Cut
        >>> Cut("layer1", (64, 56, 56), 157504, 580_000_000, 802816).bytes
        802816
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    multiplications: int
    bytes: int
    radius: float | None = None
    information: float | None = None


def cuts(network: nn.Module, example: Tensor, labels: Tensor | None = None, *, noise: float = 0.1) -> tuple[Cut, ...]:
    """Lists the modules of a network behind which it can be cut: only their result is used after them.

    The network is traced by torch.fx, or by torch.export. For one that neither traces, all modules are listed whose result is a tensor, and
    a skip connection shows only in :meth:`cem_fast.SplitModel.from_module`.

    With labels, images of all classes advise where to cut: features that are close to the mean of their class, and carry little
    information with noise on top, are hard to invert.

    Args:
        network: a network from images to logits; it is examined in eval mode.
        example: images ``[N, C, H, W]``, on the device and with the dtype that the network takes.
        labels: classes of the images ``[N]``; of N >= 10 images, every fifth is held out for the information. None for no advice.
        noise: standard deviation of the noise for the information, in units of that of the features.

    Returns:
        The cuts, in the order of computation.

    Raises:
        ValueError: ``example`` holds no image, or labels or noise do not fit.

    Source:
        "Golden Partition Zone", arXiv 2506.15412 (the radius as a guide to the cut).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from cem_fast import models
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        >>> for cut in models.cuts(network, torch.rand(2, 1, 8, 8)):
        ...     print(cut.name, cut.shape, cut.parameters, cut.multiplications, cut.bytes)
        0 (4, 6, 6) 40 1296 576
        1 (4, 6, 6) 40 1296 576
        2 (144,) 40 1296 576
    """
    _require_images(example)
    found = _listed(network, example)
    if labels is None or not found:
        return found
    if labels.shape != example.shape[:1] or labels.is_floating_point() or len(labels) < 2 * EVERY or not noise > 0:
        raise ValueError(
            f"labels must be integers of at least {2 * EVERY} images and noise positive, got {tuple(labels.shape)} for "
            f"{len(example)} images and {noise}"
        )
    sizes = [math.prod(cut.shape) for cut in found]
    measured = spreads(network, [cut.name for cut in found], sizes, example, labels, noise=noise)
    return tuple(replace(cut, radius=each.radius, information=each.information) for cut, each in zip(found, measured))


def _listed(network: nn.Module, example: Tensor) -> tuple[Cut, ...]:
    try:
        graph = Graph(network, example)
    except Untraceable:
        return tuple(_observed(network, example))
    found: dict[Any, Cut] = {}
    for name, node in graph.by_module.items():
        value = graph.values[node]
        if value.shape is None or node is graph.result or len(graph.crossing(node)) > 1:
            continue
        if node not in found or len(name) < len(found[node].name):
            multiplications = sum(graph.values[each].multiplications for each in graph.before(node))
            found[node] = Cut(name, value.shape, graph.parameters(node), multiplications, value.bytes)
    return tuple(found.values())


def divide(network: nn.Module, cut: str, example: Tensor) -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    """The halves of a network at a cut, with its parameters, and the shape of the features of one image.

    Args:
        network: a network from images to logits.
        cut: name of a module, such as ``layer1`` or ``features.4``; if it is called several times, the last call counts.
        example: images ``[N, C, H, W]``.

    Raises:
        ValueError: there is no such module, its result is no batch of numbers, or further values cross the cut.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from cem_fast.models.cutting import divide
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        >>> encoder, decoder, shape = divide(network, "1", torch.rand(2, 1, 8, 8))
        >>> shape, decoder(encoder(torch.rand(5, 1, 8, 8))).shape
        ((4, 6, 6), torch.Size([5, 3]))
    """
    _require_images(example)
    lookup("cut", cut, dict.fromkeys(name for name, _ in network.named_modules() if name))
    with in_eval_mode(network), torch.no_grad():
        expected = logits(network(example))
    try:
        graph = Graph(network, example)
        if cut in graph.by_module:
            return *_by_graph(graph, network, cut, example, expected), _shape_of(graph, cut)
    except Untraceable:
        pass
    return _by_hooks(network, cut, example, expected)


def logits(result: Any) -> Tensor:
    """The tensor in a network's result: itself, ``logits`` of an object or a mapping, or the first of a sequence.

    Args:
        result: the result.

    Raises:
        TypeError: there is none.

    Example:
        >>> import torch
        >>> from cem_fast.models.cutting import logits
        >>> logits((torch.ones(2), None))
        tensor([1., 1.])
    """
    found = result.get("logits", result) if isinstance(result, dict) else getattr(result, "logits", result)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise TypeError(f"a tensor is expected from the network, got {type(found).__name__}")
    return found


def _shape_of(graph: Graph, cut: str) -> tuple[int, ...]:
    shape = graph.values[graph.by_module[cut]].shape
    assert shape is not None
    return shape


def _by_graph(
    graph: Graph, network: nn.Module, cut: str, example: Tensor, expected: Tensor
) -> tuple[nn.Module, nn.Module]:
    node = graph.by_module[cut]
    if graph.values[node].shape is None:
        raise ValueError(f"cut must be a module whose result is a batch of numbers [N, ...], and {cut!r} gives another")
    _, *others = graph.crossing(node)
    if others:
        raise ValueError(_crossed(graph, cut, [_origin(graph, each) for each in others]))
    encoder, decoder = graph.halves(node)
    for half in (encoder, decoder):
        half.train(network.training)
    with in_eval_mode(encoder, decoder), torch.no_grad():
        again = decoder(encoder(example))
    if not _close(again, expected):
        raise Untraceable("the traced halves compute something else")
    return encoder, decoder


def _origin(graph: Graph, node: fx.Node) -> str:
    """The last module that a value went through."""
    while not graph.values[node].modules and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return graph.values[node].modules[-1] if graph.values[node].modules else "the input"


def _crossed(graph: Graph, cut: str, others: list[str]) -> str:
    """Names the values that pass a cut by, and the nearest cut that has none."""
    parents = [cut.rpartition(".")[0]]
    while parents[-1]:
        parents.append(parents[-1].rpartition(".")[0])
    whole = [p for p in parents if p in graph.by_module and len(graph.crossing(graph.by_module[p])) == 1]
    advice = f"; cut at {whole[0]!r}" if whole else "; models.cuts lists the cuts"
    return f"one value must cross a cut, and a skip connection from {', '.join(dict.fromkeys(others))} passes by {cut!r}{advice}"


class _Stop(Exception):
    def __init__(self, value: Any):
        self.value = value


class _Front(nn.Module):
    """The encoder: the network, stopped behind the last call of a module."""

    def __init__(self, network: nn.Module, cut: str, calls: int):
        super().__init__()
        self.network, self.cut, self.calls = network, cut, calls

    def forward(self, images: Tensor) -> Tensor:
        left = self.calls

        def stop(*arguments: Any) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise _Stop(arguments[-1])

        with _hooked(self.network, self.cut, stop):
            try:
                self.network(images)
            except _Stop as stopped:
                return logits(stopped.value)
        raise RuntimeError(f"the network did not call {self.cut!r} {self.calls} times")


class _Behind(nn.Module):
    """The decoder: the network on blank images, with the result of a module's last call replaced."""

    blank: Tensor

    def __init__(self, network: nn.Module, cut: str, calls: int, blank: Tensor):
        super().__init__()
        self.network, self.cut, self.calls = network, cut, calls
        self.register_buffer("blank", blank, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        left = self.calls

        def replace(*arguments: Any) -> Any:
            nonlocal left
            left -= 1
            result = arguments[-1]
            if left:
                return None
            return (features, *result[1:]) if isinstance(result, tuple) else features

        with _hooked(self.network, self.cut, replace):
            return logits(self.network(self.blank.expand(len(features), *self.blank.shape[1:])))


def _by_hooks(
    network: nn.Module, cut: str, example: Tensor, expected: Tensor
) -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    with in_eval_mode(network), torch.no_grad(), _hooked(network, cut, count):
        network(example)
    if not calls:
        raise ValueError(f"cut must be a module that the network calls, and {cut!r} is not called")
    encoder = _Front(network, cut, calls).train(network.training)
    decoder = _Behind(network, cut, calls, torch.zeros_like(example[:1])).train(network.training)
    with in_eval_mode(network), torch.no_grad():
        try:
            features = encoder(example)
        except TypeError:
            raise ValueError(f"cut must be a module whose result is a tensor, and that of {cut!r} is none") from None
        again = decoder(features)
    if not _close(again, expected):
        raise ValueError(
            f"one value must cross a cut, and a skip connection passes by {cut!r}: the result depends on the input in another way, too"
        )
    return encoder, decoder, tuple(features.shape[1:])


def _observed(network: nn.Module, example: Tensor) -> Iterator[Cut]:
    """Cuts of a network that cannot be traced, from one call: the last result of every module."""
    found: dict[str, tuple[Tensor, int, int]] = {}
    used: dict[int, int] = {}
    counter = FlopCounterMode(display=False)

    def keep(name: str) -> Any:
        def hook(module: nn.Module, _: Any, result: Any) -> None:
            used.update({id(p): p.numel() for p in module.parameters()})
            if isinstance(result, Tensor) and result.is_floating_point() and result.dim() > 1:
                found.pop(name, None)
                found[name] = result, sum(used.values()), counter.get_total_flops()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in network.named_modules() if name]
    try:
        with in_eval_mode(network), torch.no_grad(), counter:
            last = logits(network(example))
    finally:
        for handle in handles:
            handle.remove()
    by_result: dict[int, Cut] = {}
    for name, (result, parameters, flops) in found.items():
        if result is last or len(result) != len(example):
            continue
        size = result[0].numel() * result.element_size()
        known = by_result.get(id(result))
        if known is None or len(name) < len(known.name):
            by_result[id(result)] = Cut(name, tuple(result.shape[1:]), parameters, flops // (2 * len(example)), size)
    yield from by_result.values()


@contextmanager
def _hooked(network: nn.Module, name: str, hook: Any) -> Iterator[None]:
    handle = network.get_submodule(name).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _close(found: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-3 * float(expected.float().abs().max()) + 1e-6
    return found.shape == expected.shape and bool((found.float() - expected.float()).abs().max() <= tolerance)


def _require_images(example: Tensor) -> None:
    if not isinstance(example, Tensor) or example.dim() < 2 or not len(example):
        shape = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(f"example must be at least one image [N, C, H, W], got {shape}")
