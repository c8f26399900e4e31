"""Autograd functions that cost little to call, and gradients that refuse to be differentiated again."""

from __future__ import annotations

from typing import Any

import torch


def _is_transformed() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


class Function(torch.autograd.Function):
    """An autograd function in the style that transforms need (``forward`` without ctx, ``setup_context``), called by :func:`call`.

    In that style ``apply`` inspects the signature of ``forward`` at every call, which takes longer than a small batch does. Eager
    mode therefore calls a twin in the older style.
    """

    generate_vmap_rule = True
    eager: type[torch.autograd.Function]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

        def forward(ctx: Any, *args: Any) -> Any:
            output = cls.forward(*args)
            cls.setup_context(ctx, args, output)
            return cls.returned(output)

        methods = {"forward": staticmethod(forward), "backward": staticmethod(cls.backward)}
        cls.eager = type(cls.__name__, (torch.autograd.Function,), methods)

    @staticmethod
    def returned(output: Any) -> Any:
        """What the eager twin returns of the output of ``forward``."""
        return output


class FirstOutput(Function):
    """An autograd function whose outputs after the first only serve its backward: eager mode keeps them out of the graph."""

    @staticmethod
    def returned(output: Any) -> Any:
        return output[0]


class Gradient(Function):
    """The gradient of an operation: a subclass gives ``forward``, and its own backward raises.

    ``once_differentiable`` is not enough: nested ``torch.func.grad`` would silently return zeros.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("operations of cem_fast are differentiable once: their gradients have no gradient")


def call(function: type[Function], *args: Any) -> Any:
    """What ``function.apply`` returns."""
    return function.apply(*args) if _is_transformed() else function.eager.apply(*args)


def call_first(function: type[FirstOutput], *args: Any) -> Any:
    """The first of what ``function.apply`` returns."""
    return function.apply(*args)[0] if _is_transformed() else function.eager.apply(*args)


def call_gradient(function: type[Gradient], *args: Any) -> Any:
    """The gradient, as a node of the graph only where a graph of gradients is asked for."""
    return call(function, *args) if torch.is_grad_enabled() else function.forward(*args)
