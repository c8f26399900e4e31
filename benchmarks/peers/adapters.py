"""Adapters: one object for each way to compute a case, with the calls that are timed and the results that are checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cem_fast.benchmarks.cases import Problem, judged, start_of_em
from torch import Tensor

# Features and labels to a scalar, or to one number per row.
Function = Callable[[Tensor, Tensor | None], Tensor]


class Skipped(Exception):
    """A case that a peer cannot compute; the message is the reason."""


class _Passes:
    """Forward, backward or both; subclasses define the first two."""

    directions: tuple[str, ...] = ("forward", "backward", "both")

    def call(self, direction: str) -> Callable[[int], None]:
        return {"forward": self.forward, "backward": self.backward, "both": self.both}[direction]

    def forward(self, buffers: int) -> None:
        raise NotImplementedError

    def backward(self, buffers: int) -> None:
        raise NotImplementedError

    def both(self, buffers: int) -> None:
        self.forward(buffers)
        self.backward(buffers)


class Differentiable(_Passes):
    """A function of the features under autograd; the results are its value and its gradient."""

    def __init__(self, problem: Problem, function: Function, *, differentiable: bool = True):
        self.problem, self.function, self.differentiable = problem, function, differentiable
        if not differentiable:
            self.directions = ("forward",)
        self.output: Tensor | None = None

    def prepare(self, direction: str) -> Callable[[int], None]:
        def before(buffers: int) -> None:
            self.output = self.problem.leaves[buffers].grad = None
            if direction == "backward":
                self.forward(buffers)

        return before

    def forward(self, buffers: int) -> None:
        rows = self.problem.leaves[buffers]
        self.output = self.function(rows if self.differentiable else rows.detach(), self.problem.sets[buffers][1])

    def backward(self, buffers: int) -> None:
        assert self.output is not None
        self.output.backward(self.problem.upstream.to(self.output.dtype))

    def results(self) -> dict[str, Tensor]:
        """Results of the last call, which used buffers 0."""
        assert self.output is not None
        found = {"value": self.output.detach().reshape(self.problem.truth["value"].shape)}
        gradient = self.problem.leaves[0].grad
        return found if gradient is None else found | {"gradient": gradient}


class Operators(_Passes):
    """Dispatcher operators called directly, without autograd: the time of the kernels of one backend."""

    def __init__(self, problem: Problem, operators: dict[str, Callable[..., Any]]):
        self.problem, self.operators = problem, operators
        self.kept: tuple[Tensor, ...] = ()
        self.gradient: Tensor | None = None

    def prepare(self, direction: str) -> Callable[[int], None]:
        return self.forward if direction == "backward" else lambda _: None

    def forward(self, buffers: int) -> None:
        p, (x, labels) = self.problem, self.problem.sets[buffers]
        if p.case.op == "mixture_log_prob":
            self.kept = self.operators["mixture_log_prob_fwd"](
                x, p.means, p.variances, p.weights, labels, p.case.K <= 64
            )
        elif p.case.op == "component_statistics":
            self.kept = self.operators["component_statistics_fwd"](x, p.means, labels, None, None, False, False)
        else:
            priors = (p.variances, p.weights, p.class_prior, p.num_samples, p.noise_variance)
            self.kept = self.operators["cem_fwd"](x, p.means, labels, *priors, *p.bound_options)

    def backward(self, buffers: int) -> None:
        p, (x, labels) = self.problem, self.problem.sets[buffers]
        if p.case.op == "mixture_log_prob":
            mixture = (p.means, p.variances, p.weights, labels)
            self.gradient = self.operators["mixture_log_prob_bwd"](p.upstream, x, *mixture, *self.kept)
            return
        slope, assignment = (p.upstream, self.kept[3]) if len(self.kept) == 4 else self.kept[1:]
        self.gradient = self.operators["component_statistics_bwd"](slope, None, x, p.means, labels, assignment)

    def results(self) -> dict[str, Tensor]:
        value = self.kept[1] if self.problem.case.op == "component_statistics" else self.kept[0]
        return {"value": value} | ({} if self.gradient is None else {"gradient": self.gradient})


class Fit:
    """A fit from the given start; the results are its parameters, converted from any array type."""

    directions: tuple[str, ...] = ("fit",)

    def __init__(self, problem: Problem, fit: Callable[[], Any], parameters: Callable[[Any], Sequence[Any]]):
        self.problem, self.fit, self.parameters = problem, fit, parameters
        self.fitted: Any = None

    def prepare(self, _: str) -> Callable[[int], None]:
        return lambda _: None

    def call(self, _: str) -> Callable[[int], None]:
        return self.run

    def run(self, _: int) -> None:
        self.fitted = self.fit()

    def results(self) -> dict[str, Tensor]:
        p = self.problem
        shapes = (p.start.shape, *(start.shape for start in start_of_em(p)))
        given = zip(("means", "variances", "weights"), self.parameters(self.fitted), shapes)
        return judged(p, {name: torch.as_tensor(t).reshape(shape) for name, t, shape in given})


Built = Differentiable | Operators | Fit


@dataclass(frozen=True)
class Peer:
    """An implementation that takes part in comparisons.

    Args:
        name: its name in tables.
        build: prepares a problem; raises ``ImportError`` if a package is missing and ``Skipped`` if the case is out of reach.
        operations: the operations that it implements.
        package: the distribution whose version is recorded; None for torch itself.
        settles: whether its threads keep spinning after a call.
        devices: the device types that it supports.
    """

    name: str
    build: Callable[[Problem], Built]
    operations: tuple[str, ...]
    package: str | None = None
    settles: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")


def by_class(of_class: Sequence[Callable[[Tensor], Tensor]]) -> Function:
    """One function per class, applied to the rows of its class: rows are sorted, split, and put back in order."""

    def function(x: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None:
            return of_class[0](x)
        order = labels.argsort()
        sizes = torch.bincount(labels, minlength=len(of_class)).tolist()
        parts = [each(rows) for each, rows in zip(of_class, x[order].split(sizes)) if len(rows) > 0]
        return torch.cat(parts)[order.argsort()]

    return function


def fit_by_class(
    problem: Problem, fit: Callable[[Tensor, int], Any], parameters: Callable[[Any], Sequence[Any]]
) -> Fit:
    """The same fit for every class in turn, as users of a library without classes write it."""
    x, labels = problem.sets[0]

    def all_classes() -> list[Any]:
        if labels is None:
            return [fit(x, 0)]
        sizes = torch.bincount(labels, minlength=problem.case.C).tolist()
        return [fit(rows, c) for c, rows in enumerate(x[labels.argsort()].split(sizes))]

    def stacked(fitted: list[Any]) -> Sequence[Tensor]:
        columns = zip(*(parameters(one) for one in fitted))
        return [torch.stack([torch.as_tensor(t) for t in column]) for column in columns]

    return Fit(problem, all_classes, stacked)
