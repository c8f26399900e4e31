"""Autograd functions with a low call overhead, and gradients that cannot be differentiated again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def is_transformed() -> bool:
    """Whether torch is compiling or transforming the running code.

    Example:
        >>> import torch
        >>> from cem_fast.ops.autograd import is_transformed
        >>> is_transformed(), torch.vmap(lambda x: x + is_transformed())(torch.zeros(1))
        (False, tensor([1.]))
    """
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


class Function(torch.autograd.Function):
    """Autograd function in the style that transforms need (``forward`` without ctx, ``setup_context``), called by ``call``.

    In this style, each ``apply`` inspects the signature of ``forward``, which takes longer than the work on a small batch. Eager
    mode therefore calls ``eager``, the same function in the older style.

    Example:
        >>> import torch
        >>> from cem_fast.ops.autograd import Function, call
        >>> class Double(Function):
        ...     @staticmethod
        ...     def forward(x):
        ...         return 2 * x
        ...
        ...     @staticmethod
        ...     def setup_context(ctx, inputs, output):
        ...         pass
        ...
        ...     @staticmethod
        ...     def backward(ctx, grad):
        ...         return 2 * grad
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> torch.autograd.grad(call(Double, x), x)
        (tensor(2.),)
    """

    generate_vmap_rule = True
    eager: type[torch.autograd.Function]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

        methods = {"forward": staticmethod(cls._eager_forward()), "backward": staticmethod(cls.backward)}
        cls.eager = type(cls.__name__, (torch.autograd.Function,), methods)

    @classmethod
    def _eager_forward(cls) -> Callable[..., Any]:
        compute, setup_context = cls.forward, cls.setup_context

        def forward(ctx: Any, *args: Any) -> Any:
            output = compute(*args)
            setup_context(ctx, args, output)
            return output

        return forward


class FirstOutput(Function):
    """Autograd function whose outputs after the first are used by its backward only; eager mode keeps them out of the graph.

    Subclasses give ``forward`` and ``backward``, as in the example of ``Function``, and ``save``, which stores what the
    backward needs.
    """

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Stores what the backward needs, in the context."""
        raise NotImplementedError

    def __init_subclass__(cls, **kwargs: Any) -> None:
        save = cls.save

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            ctx.mark_non_differentiable(*output[1:])
            save(ctx, inputs, output)

        cls.setup_context = staticmethod(setup_context)  # type: ignore[method-assign]
        super().__init_subclass__(**kwargs)

    @classmethod
    def _eager_forward(cls) -> Callable[..., Any]:
        compute, save = cls.forward, cls.save

        def forward(ctx: Any, *args: Any) -> Any:
            output = compute(*args)
            save(ctx, args, output)
            return output[0]

        return forward


class Gradient(Function):
    """Gradient of an operation: a subclass gives ``forward``, and ``backward`` raises.

    ``once_differentiable`` is not enough: nested ``torch.func.grad`` would silently return zeros.

    Example:
        >>> import torch
        >>> from cem_fast import functional
        >>> x = torch.zeros(1, 1, requires_grad=True)
        >>> y = functional.mixture_log_prob(x, torch.ones(1, 1, 1), torch.ones(1, 1), torch.ones(1, 1))
        >>> (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        >>> torch.autograd.grad(dx.sum(), x)
        Traceback (most recent call last):
        RuntimeError: operations of cem_fast are differentiable once: their gradients have no gradient
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("operations of cem_fast are differentiable once: their gradients have no gradient")


def call(function: type[Function], *args: Any) -> Any:
    """``function.apply(*args)`` with a low call overhead; ``Function`` has an example."""
    return function.apply(*args) if is_transformed() else function.eager.apply(*args)


def call_first(function: type[FirstOutput], *args: Any) -> Any:
    """First output of ``function.apply(*args)``, with a low call overhead."""
    return function.apply(*args)[0] if is_transformed() else function.eager.apply(*args)


def call_gradient(function: type[Gradient], *args: Any) -> Any:
    """Gradient, as a node of the graph only if a graph of gradients is requested."""
    return call(function, *args) if torch.is_grad_enabled() else function.forward(*args)
