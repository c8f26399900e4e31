"""Random cases of the operations: shapes, types, memory layouts, hard values and implementations; settings of hypothesis."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import ModuleType

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from cem_fast.mixture import density, fitting
from cem_fast.ops import backend, component_statistics, entropy_bound, log_prob, reference
from cem_fast.ops.library import OPERATORS

SHARE = float(os.environ.get("SHARE", "1"))
INTERPRETED = backend.TRITON == "CPU"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "transposed", "every second", "inside", "expanded")
# center of the features, standard deviation of a component, distance of components in standard deviations
PLACES = (
    (0.0, 0.3, 3.0),
    (1000.0, 1e-3, 1.0),
    (1.0, 0.01, 0.3),
    (0.0, 1.0, 100.0),
    (0.0, 1e-12, 1.0),
    (0.0, 1e12, 1.0),
)
_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def quick(examples: int) -> settings:
    """The same examples in every run, for `make test`; a failing one is not shrunk, which takes minutes."""
    phases = (Phase.explicit, Phase.generate)
    return settings(max_examples=1 if INTERPRETED else examples, derandomize=True, phases=phases, **_COMMON)


def thorough(examples: int) -> settings:
    """Other examples in every run, for `make check`; a failing one is printed with the line that repeats it."""
    share = SHARE / 50 if INTERPRETED else SHARE  # the interpreter takes seconds an example
    return settings(max_examples=max(1, round(share * examples)), print_blob=True, **_COMMON)


def _implementations() -> list[str]:
    if INTERPRETED:
        return ["triton"]
    found = ["reference"]
    if backend.CPU is None:
        return found
    in_force = backend.CPU.capability
    for name in backend.CAPABILITIES:
        with suppress(RuntimeError):  # not of this processor
            backend.CPU.select(name)
            found.append(name)
    backend.CPU.select(in_force)
    return found


IMPLEMENTATIONS = _implementations()


@contextmanager
def using(implementation: str) -> Iterator[None]:
    """Runs the block on one instruction set, or on the reference."""
    if implementation == "reference":
        modules = (log_prob, component_statistics, entropy_bound, density, fitting)
        with _replaced(modules, {operator: getattr(reference, name) for name, operator in OPERATORS.items()}):
            yield
    elif implementation == "triton":
        yield
    else:
        in_force = backend.CPU.capability
        backend.CPU.select(implementation)
        try:
            yield
        finally:
            backend.CPU.select(in_force)


@contextmanager
def _replaced(modules: tuple[ModuleType, ...], by: dict) -> Iterator[None]:
    before = [(module, dict(vars(module))) for module in modules]
    for module, names in before:
        for name, value in names.items():
            if callable(value) and value.__class__ is next(iter(by)).__class__ and value in by:
                setattr(module, name, by[value])
    try:
        yield
    finally:
        for module, names in before:
            vars(module).update(names)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Runs the block on a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def laid_out(value: Tensor, layout: str) -> Tensor:
    """The values in another memory layout, next to NaN; expanded ones are all equal to the first."""
    if layout == "transposed" and value.dim() > 1:
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded" and len(value):
        return value[:1].expand_as(value)
    filler = float("nan") if value.is_floating_point() else 99
    if layout == "every second":
        wide = torch.full((*value.shape[:-1], 2 * value.shape[-1]), filler, dtype=value.dtype)[..., ::2]
        return wide.copy_(value)
    if layout == "inside":
        wide = torch.full([size + 3 for size in value.shape], filler, dtype=value.dtype)
        return wide[tuple(slice(1, 1 + size) for size in value.shape)].copy_(value)
    return value.contiguous()


@dataclass(repr=False)
class Case:
    """Arguments of an operation, and what runs it. ``repr`` gives what a person needs to see."""

    implementation: str
    shape: tuple[int, int, int, int]  # N, D, C, K
    dtype: torch.dtype
    diag: bool
    place: tuple[float, float, float]
    layouts: tuple[str, ...]  # of x, means, variances, weights, labels
    twins: float  # share of the components that have the first one's mean
    idle: bool  # some components have weight 0
    seed: int
    x: Tensor
    labels: Tensor | None
    means: Tensor
    variances: Tensor
    weights: Tensor
    generator: torch.Generator

    def __repr__(self) -> str:
        return "Case(" + ", ".join(f"{k}={v}" for k, v in vars(self).items() if not isinstance(v, Tensor)) + ")"

    @property
    def classes(self) -> Tensor:
        """Labels as int64, zeros if there are none."""
        return torch.zeros(len(self.x), dtype=torch.int64) if self.labels is None else self.labels.long()

    def uniform(self, *shape: int) -> Tensor:
        """Further random numbers of the case, float64."""
        return torch.rand(*shape, dtype=torch.float64, generator=self.generator)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small cases, and one in twenty with one size up to 700."""
    most = {"N": 40, "D": 70, "C": 5, "K": 12}
    if INTERPRETED:
        most = {"N": 9, "D": 9, "C": 3, "K": 5}
    elif draw(st.integers(0, 19)) == 7:
        most = dict(zip(most, (9, 9, 3, 5))) | {draw(st.sampled_from("NDCK")): 700}
    shape = tuple(draw(st.integers(0 if key == "N" else 1, largest)) for key, largest in most.items())
    layouts = tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(5))
    return make_case(
        draw(st.sampled_from(IMPLEMENTATIONS)),
        shape,
        draw(st.sampled_from(DTYPES)),
        draw(st.booleans()),
        draw(st.sampled_from(PLACES)),
        layouts,
        draw(st.sampled_from((0.0, 0.0, 0.5, 1.0))),
        draw(st.sampled_from((False, False, True))),
        draw(st.integers(0, 2**32 - 1)),
        label_type=draw(st.sampled_from((torch.int64, torch.int32, torch.int16, torch.uint8))),
        without_labels=draw(st.booleans()),
    )


def make_case(
    implementation, shape, dtype, diag, place, layouts, twins, idle, seed, *, label_type, without_labels
) -> Case:
    """Rows close to components of a mixture."""
    N, D, C, K = shape
    center, spread, separation = place if dtype != torch.float16 else (1.0, 0.1, 3.0)
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, dtype=torch.float64, generator=generator)

    parameters = torch.promote_types(dtype, torch.float32)
    labels = torch.randint(0, min(C, torch.iinfo(label_type).max + 1), (N,), generator=generator)
    means = center + spread * separation * normal(C, K, D)
    means[:, uniform(K) < twins] = means[:, :1].clone()
    x = means[labels, torch.randint(0, K, (N,), generator=generator)] + spread * normal(N, D)
    variances = spread**2 * (0.5 + uniform(*((C, K, D) if diag else (C, K))))
    weights = uniform(C, K) + 0.2
    if idle:
        weights[:, 1:][uniform(C, K - 1) < 0.4] = 0
    weights = weights / weights.sum(1, keepdim=True)
    values = x.to(dtype), means.to(parameters), variances.to(parameters), weights.to(parameters), labels.to(label_type)
    x, means, variances, weights, labels = (laid_out(value, how) for value, how in zip(values, layouts))
    return Case(
        implementation,
        shape,
        dtype,
        diag,
        place,
        layouts,
        twins,
        idle,
        seed,
        x,
        None if without_labels and C == 1 else labels,
        means,
        variances,
        weights,
        generator,
    )
