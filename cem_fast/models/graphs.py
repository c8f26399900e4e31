"""Networks as graphs of values, and the two sides of a value."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from cem_fast._support.eval_mode import in_eval_mode


class Untraceable(Exception):
    """A network whose graph is not known, or whose graph computes something else."""


@dataclass(frozen=True)
class Value:
    """A value of the graph for an example of two images.

    Args:
        node: its node.
        modules: the modules that compute it, outermost first.
        shape: shape for one image; None if it is no batch of numbers.
        bytes: bytes of one image.
        multiplications: multiplications of its node for one image.
        scalar: a constant, ``batch`` for the number of images, a tuple of these, or None for another value.
    """

    node: fx.Node
    modules: tuple[str, ...]
    shape: tuple[int, ...] | None
    bytes: int
    multiplications: int
    scalar: Any = None


class Graph:
    """The graph of a network in eval mode, by torch.fx, or by torch.export where torch.fx cannot trace it.

    Args:
        network: the network.
        example: images ``[N, C, H, W]``.

    Raises:
        Untraceable: neither can.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from cem_fast.models.graphs import Graph
        >>> graph = Graph(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), torch.rand(2, 1, 8, 8))
        >>> [(value.modules, value.shape) for value in graph.values.values()][1:]
        [(('0',), (2, 6, 6)), (('1',), (2, 6, 6))]
    """

    def __init__(self, network: nn.Module, example: Tensor):
        if not (self._trace(_by_fx, network, example) or self._trace(_by_export, network, example)):
            raise Untraceable("neither torch.fx nor torch.export can trace the network")

    def _trace(self, trace: Callable[[nn.Module, Tensor], fx.GraphModule], network: nn.Module, example: Tensor) -> bool:
        try:
            with in_eval_mode(network):
                self.traced = trace(network, example)
                self._evaluate(example)
        except Exception:  # tracers raise errors of any kind
            return False
        return True

    def _evaluate(self, example: Tensor) -> None:
        _drop_assertions(self.traced.graph)
        self.traced.graph.eliminate_dead_code()  # such as the weights of an attention, which would seem to be used
        batches = [example[:1].expand(count, *example.shape[1:]).contiguous() for count in (2, 3)]
        twice, thrice = (_Recorder(self.traced) for _ in batches)
        with torch.no_grad():
            for recorder, batch in zip((twice, thrice), batches):
                recorder.run(batch)
        self.values = {
            node: _value(node, twice.found[node], thrice.found[node], twice.flops[node] // 4)
            for node in self.traced.graph.nodes
            if node.op != "output"
        }

    @cached_property
    def by_module(self) -> dict[str, fx.Node]:
        """The node of the last value that leaves each module, in the order of computation."""
        found = {}
        for node, value in self.values.items():
            for name in value.modules:
                if any(user not in self.values or name not in self.values[user].modules for user in node.users):
                    found[name] = node
        order = {node: index for index, node in enumerate(self.traced.graph.nodes)}
        return dict(sorted(found.items(), key=lambda item: order[item[1]]))

    @property
    def result(self) -> fx.Node | None:
        """The node of the network's result."""
        (output,) = (node for node in self.traced.graph.nodes if node.op == "output")
        return _first_node(output.args[0])

    def before(self, node: fx.Node) -> set[fx.Node]:
        """A value and everything that it is computed from.

        Args:
            node: node of the value.
        """
        found, left = {node}, [node]
        while left:
            new = [each for each in left.pop().all_input_nodes if each not in found]
            found.update(new)
            left.extend(new)
        return found

    def crossing(self, node: fx.Node) -> list[fx.Node]:
        """The values that both sides of a cut behind a node use, the cut itself first; but for fixed ones.

        Args:
            node: node of the cut.
        """
        device = self.before(node)
        needed = {old for each in self._behind(device) for old in each.all_input_nodes}
        used = [each for each in self.traced.graph.nodes if each in device & needed - self.fixed and each is not node]
        return [node, *used]

    @cached_property
    def fixed(self) -> set[fx.Node]:
        """Values that depend on no pixel: constants, sizes, and what is computed from them."""
        found: set[fx.Node] = set()
        for node, value in self.values.items():
            computed = node.op.startswith("call") and found.issuperset(node.all_input_nodes)
            if computed or node.op == "get_attr" or value.scalar is not None:
                found.add(node)
        return found

    def _behind(self, device: set[fx.Node]) -> list[fx.Node]:
        """The nodes that are computed behind a cut, in their order; the output is one of them."""
        return [each for each in self.traced.graph.nodes if each not in device and each not in self.fixed]

    def parameters(self, node: fx.Node) -> int:
        """Number of parameters that a value depends on.

        Args:
            node: node of the value.
        """
        found = {}
        for each in self.before(node):
            if each.op == "call_module":
                found.update({id(p): p.numel() for p in self.traced.get_submodule(str(each.target)).parameters()})
            elif each.op == "get_attr":
                value = _attribute(self.traced, str(each.target))
                if isinstance(value, nn.Parameter):
                    found[id(value)] = value.numel()
        return sum(found.values())

    def halves(self, node: fx.Node) -> tuple[fx.GraphModule, fx.GraphModule]:
        """The networks in front of a value and behind it, with the parameters of the network.

        Args:
            node: node of the value.
        """
        device = self.before(node)
        front, behind = fx.Graph(), fx.Graph()
        kept: dict[fx.Node, fx.Node] = {}
        for each in self.traced.graph.nodes:
            if each in device:
                kept[each] = front.node_copy(each, lambda old: kept[old])
        front.output(kept[node])
        known: dict[fx.Node, Any] = {node: behind.placeholder("features")}

        def place(old: fx.Node) -> None:
            """Rebuilds a fixed value behind the cut."""
            if old in known:
                return
            if (scalar := self.values[old].scalar) is not None:
                known[old] = _rebuilt(behind, known[node], scalar)
                return
            for each in old.all_input_nodes:
                place(each)
            known[old] = _copied(behind, old, known)

        for each in self._behind(device):
            if each.op == "output":
                behind.output(known[_require(self.result)])
                continue
            for old in each.all_input_nodes:
                place(old)
            known[each] = _copied(behind, each, known)
        for unused in [n for n in reversed(front.nodes) if n.op == "get_attr" and not n.users]:
            front.erase_node(unused)
        return fx.GraphModule(self.traced, front, "Encoder"), fx.GraphModule(self.traced, behind, "Decoder")


class _Recorder(fx.Interpreter):
    """Runs a graph, and keeps every value and the floating-point operations of every node."""

    def __init__(self, traced: fx.GraphModule):
        super().__init__(traced)
        self.found: dict[fx.Node, Any] = {}
        self.flops: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = super().run_node(n)
        self.flops[n] = counter.get_total_flops()
        # an operation in place may change a value later: only its shape and type are kept
        self.found[n] = torch.empty_like(result, device="meta") if isinstance(result, Tensor) else result
        return result


def _by_fx(network: nn.Module, example: Tensor) -> fx.GraphModule:
    _, *further = inspect.signature(network.forward).parameters.values()
    defaults = {each.name: each.default for each in further if each.default is not each.empty}
    return fx.symbolic_trace(network, concrete_args=defaults)


def _by_export(network: nn.Module, example: Tensor) -> fx.GraphModule:
    images = example if len(example) > 1 else example.repeat(2, *[1] * (example.dim() - 1))
    rows = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(network, (images,), dynamic_shapes=rows, strict=False)
    traced: fx.GraphModule = program.module(check_guards=False)
    return traced


def _value(node: fx.Node, twice: Any, thrice: Any, multiplications: int) -> Value:
    stack = node.meta.get("nn_module_stack") or {}
    modules = tuple(dict.fromkeys(name for name, _ in stack.values() if name))
    if isinstance(twice, Tensor):
        batched = twice.dim() > 1 and (len(twice), len(thrice)) == (2, 3) and twice.shape[1:] == thrice.shape[1:]
        if not batched:
            return Value(node, modules, None, 0, multiplications)
        shape = tuple(twice.shape[1:])
        size = math.prod(shape) * twice.element_size() if twice.is_floating_point() else 0
        return Value(node, modules, shape if size else None, size, multiplications)
    return Value(node, modules, None, 0, multiplications, _scalar(twice, thrice))


def _scalar(twice: Any, thrice: Any) -> Any:
    """A constant, ``batch`` for the number of images, a tuple of these, or None for another value."""
    if isinstance(twice, tuple):
        parts = tuple(_scalar(*each) for each in zip(twice, thrice))
        return None if None in parts else parts
    if isinstance(twice, int | float | bool | str | torch.dtype | torch.device):
        return twice if twice == thrice else "batch" if (twice, thrice) == (2, 3) else None
    return None


def _rebuilt(graph: fx.Graph, features: fx.Node, scalar: Any) -> Any:
    """A constant or a size of the batch, in a graph that starts from features."""
    if isinstance(scalar, tuple):
        return tuple(_rebuilt(graph, features, each) for each in scalar)
    return graph.call_method("size", (features, 0)) if scalar == "batch" else scalar


def _copied(graph: fx.Graph, node: fx.Node, known: dict[fx.Node, Any]) -> fx.Node:
    """A node of the same operation in another graph, where some arguments are constants."""

    def new(argument: Any) -> Any:
        return known[argument] if isinstance(argument, fx.Node) else argument

    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), new)
    made = graph.create_node(node.op, node.target, args, kwargs, node.name)
    made.meta = dict(node.meta)
    return made


def _drop_assertions(graph: fx.Graph) -> None:
    """Removes assertions on sizes, and what only they use."""
    left = [
        node
        for node in graph.nodes
        if not node.users
        and node.op.startswith("call")
        and ("assert" in str(node.target) or "guard" in str(node.target))
    ]
    while left:
        node = left.pop()
        inputs = node.all_input_nodes
        graph.erase_node(node)
        left += [each for each in dict.fromkeys(inputs) if not each.users and each.op != "placeholder"]


def _first_node(result: Any) -> fx.Node | None:
    """The logits of a result: a value, or the first one of a structure; under ``logits``, where it has names."""
    if isinstance(result, fx.Node):
        return result
    if isinstance(result, dict):
        return _first_node(result.get("logits", list(result.values())))
    if isinstance(result, Sequence):
        return next(iter(_nodes(result)), None)
    return None


def _nodes(results: Sequence[Any]) -> Iterator[fx.Node]:
    for each in results:
        if (node := _first_node(each)) is not None:
            yield node


def _attribute(root: nn.Module, path: str) -> Any:
    found: Any = root
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _require(node: fx.Node | None) -> fx.Node:
    if node is None:
        raise Untraceable("the network returns no tensor")
    return node
