"""Every Triton launcher against the reference in float64, in the interpreter, through all its ways to find rows and share work."""

import contextlib
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from cem_fast.kernels import _configs, _grouping, _launch
from cem_fast.kernels.operators import OPERATORS
from support import far
from support.definitions import Mixture, draw
from support.interpreter import watching
from support.tolerances import RELATIVE, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from cem_fast.ops import reference

ops = torch.ops.cem_fast

long = pytest.mark.long

# N, D, C, K, and the way through the kernels that the shape takes
SHAPES = {
    "scanned": (20, 18, 3, 3),
    "one_element": (1, 1, 1, 1),
    "tile_edges": (65, 33, 1, 2),
    "component_edge": (9, 6, 1, 17),
    "empty_classes": (5, 70, 40, 2),
    "split": (3, 1025, 1, 1),
    "split_classes": (70, 1030, 2, 3),
    "resident": (33, 144, 1, 2),
    "sorted_by_pairs": (520, 3, 2, 2),
    "sorted_by_counting": (8300, 2, 3, 2),
    "many_components": (12, 5, 2, 70),
    "uneven": (150, 5, 4, 2),
}
QUICK = {
    ("scanned", torch.float64, True),
    ("scanned", torch.float32, False),
    ("tile_edges", torch.float16, False),
    ("component_edge", torch.float32, True),
    ("split", torch.bfloat16, True),
    ("resident", torch.float32, True),
    ("sorted_by_pairs", torch.float32, True),
}


def case(shape, diag, dtype):
    x, labels, mixture = draw(*SHAPES[shape], diag=diag)
    if shape == "uneven":
        labels = torch.where(torch.arange(len(x)) < 140, 2, 0)
    parameters = dtype if dtype == torch.float64 else torch.float32
    return x.to(dtype), labels, mixture.to(parameters)


def check(operator, dtype, *arguments):
    """Runs an operator on kernels, and the reference on the same numbers in float64; returns what the kernels give."""
    exact = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments]
    with watching() as seen:
        got = getattr(ops, operator)(*arguments)
    per_row = [t for t in arguments if isinstance(t, torch.Tensor) and t.dtype == torch.int64]
    assert seen.launches or not per_row[0].numel()
    want = getattr(reference, operator)(*exact)
    for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, want)), strict=True):
        if b.dtype == torch.int64:
            assert torch.equal(a, b)
        else:
            assert a.is_contiguous()
            assert relative_error(a, b) < RELATIVE[dtype]
    return got


def check_all(x, labels, mixture, dtype):
    means, variances, weights = mixture
    diag, parameters = variances.dim() == 3, means.dtype
    counts, *_, assignment = check("component_statistics_fwd", parameters, x, means, labels, None, None, diag, not diag)
    assert counts.dtype == parameters
    check("component_statistics_fwd", parameters, x, means, labels, variances, weights, False, True)
    slope, scale = torch.rand_like(variances), torch.tensor(1.5, dtype=parameters)
    for factor in (scale, None):
        dx = check("component_statistics_bwd", dtype, slope, factor, x, means, labels, assignment)
        assert dx.dtype == x.dtype
    log_prob, r = check("mixture_log_prob_fwd", parameters, x, *mixture, labels, True)
    grad = torch.rand_like(log_prob)
    for kept in (r, r[:, :0]):
        check("mixture_log_prob_bwd", dtype, grad, x, *mixture, labels, log_prob, kept)
        check("mixture_moments", parameters, grad, x, *mixture, labels, log_prob, kept)


@pytest.mark.parametrize(
    "shape, dtype, diag",
    [
        pytest.param(*chosen, marks=() if chosen in QUICK else long, id=f"{chosen[0]}-{chosen[1]}-{'diag' * chosen[2]}")
        for chosen in itertools.product(SHAPES, RELATIVE, (False, True))
    ],
)
def test_against_the_reference(shape, dtype, diag):
    check_all(*case(shape, diag, dtype), dtype)


@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
@pytest.mark.parametrize("width", far.WIDTHS)
def test_features_too_large_to_square_have_right_densities_and_gradients(width, diag):
    far.check_densities(ops, width, diag=diag)


@pytest.mark.parametrize("width", far.WIDTHS)
def test_rows_too_far_to_square_go_to_the_nearest_mean(width):
    far.check_nearest(ops, width)


def test_far_components_in_every_tile_and_near_ones_among_them():
    far.check_nearest(ops, 3, components=21)
    far.check_densities(ops, 3, diag=False, components=21)


@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
@pytest.mark.parametrize(
    "shape", [(300, 20, 1, 2), (600, 3, 3, 2), *(pytest.param((700, 150, 2, 17), marks=long),)], ids=str
)
def test_segments_of_several_tiles(shape, diag, monkeypatch):
    monkeypatch.setattr(_configs, "DEFAULT_MULTIPROCESSORS", 1)
    x, labels, mixture = draw(*shape, diag=diag)
    labels = labels if shape[2] > 1 else None
    check_all(x.float(), labels, mixture.to(torch.float32), torch.float32)
    groups = _grouping.group(labels, *shape[::2], 64, mixture.means)
    assert groups.segment_size(64, 1, mixture.means) > 64


@pytest.mark.parametrize(
    "rows, width, least, most",
    [
        (65_536, 2560, 264, 528),  # two to four per multiprocessor
        (1 << 20, 102_400, 264, 528),
        (65_536, 512_000, 132, 264),  # so wide that partial results are to fit
        (4096, 2560, 64, 64),  # all there are
    ],
)
def test_number_of_segments(rows, width, least, most):
    groups = _grouping.group(None, rows, 1, 64, torch.zeros(1))
    assert least <= groups.segments(groups.segment_size(64, width, torch.zeros(1))) <= most


def test_a_kernel_that_a_capture_cannot_load_is_an_error(monkeypatch):
    def run(**_):
        raise RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing")

    fake = SimpleNamespace(name="some_kernel", version=lambda _: SimpleNamespace(run=run), in_order=lambda _: ())
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    like = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    for capturing, message in ((True, "^some_kernel .* same shapes, types and strides"), (False, "^Triton Error")):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        with pytest.raises(RuntimeError, match=message):
            _launch.launch(fake, 5, _configs.config("reduce", 4), like)


def strided(t):
    """The same values, every other element of a storage full of NaN, and off any address that is a multiple of 16."""
    storage = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), float("nan"), dtype=t.dtype)
    view = storage[..., 1::2]
    return view.copy_(t)


def padded(t):
    """The same values among NaN, rows apart."""
    storage = torch.full((t.shape[0] + 2, *t.shape[1:-1], t.shape[-1] + 12), float("nan"), dtype=t.dtype)
    view = storage[1:-1, ..., : t.shape[-1]]
    return view.copy_(t)


@pytest.mark.parametrize("layout", [strided, padded], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "shape", ["scanned", pytest.param("sorted_by_pairs", marks=long), pytest.param("split", marks=long)]
)
def test_layouts_and_padding_of_nan(shape, layout):
    x, labels, mixture = case(shape, True, torch.float32)
    check_all(layout(x), labels, Mixture(*(layout(t) for t in mixture)), torch.float32)


@pytest.mark.parametrize("operator", ["component_statistics_fwd", "mixture_log_prob_fwd"])
def test_rows_that_lie_further_apart_than_32_bits_reach(operator, monkeypatch):
    apart = 2**30
    x, labels, mixture = case("scanned", True, torch.bfloat16)
    x, labels = x[:3], labels[:3]
    # only the pages of the rows ever exist
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    far = torch.empty(2 * apart + x.shape[1], dtype=x.dtype).as_strided(x.shape, (apart, 1)).copy_(x)
    if operator == "component_statistics_fwd":
        check(operator, torch.float32, far, mixture.means, labels, None, None, True, True)
    else:
        check(operator, torch.float32, far, *mixture, labels, False)


class Waits(TorchDispatchMode):
    """Notes what waits for a device: numbers and sizes that only its memory knows."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", ["scanned", "sorted_by_pairs", pytest.param("sorted_by_counting", marks=long)])
def test_launchers_never_wait_for_the_device(shape):
    x, labels, mixture = case(shape, True, torch.float32)
    C = mixture.means.shape[0]
    scalars = torch.tensor(500.0, dtype=torch.float64), torch.tensor([0.01], dtype=torch.float64)
    priors = (mixture.variances, mixture.weights, torch.full((C,), 1 / C), *scalars)
    with Waits() as noted:
        _, slope, assignment = OPERATORS["cem_fwd"](x, mixture.means, labels, *priors, False, 1.0, True, True, 0.1, 0.1)
        OPERATORS["component_statistics_bwd"](slope, scalars[0].float(), x, mixture.means, labels, assignment)
        log_prob, r = OPERATORS["mixture_log_prob_fwd"](x, *mixture, labels, False)
        OPERATORS["mixture_log_prob_bwd"](log_prob, x, *mixture, labels, log_prob, r)
        OPERATORS["mixture_moments"](log_prob, x, *mixture, labels, log_prob, r)
    assert noted.seen == set()
    with Waits() as noted:
        log_prob.sum().item()
    assert noted.seen


def test_a_launch_is_on_the_device_of_its_tensors(monkeypatch):
    """A device that is not the current one; the current stream of whatever device is current is Triton's own choice."""
    current = [0]

    @contextlib.contextmanager
    def device(wanted):
        current.append(wanted.index)
        yield
        current.pop()

    launched = []

    def run(*given, grid, **_):
        launched.append((current[-1], given, grid))

    fake = SimpleNamespace(version=lambda _: SimpleNamespace(run=run), in_order=lambda arguments: arguments.values())
    monkeypatch.setattr(torch.cuda, "device", device)
    like = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    _launch.launch(fake, 5, _configs.config("reduce", 4), like, size=7)
    assert launched == [(1, (7,), (5,))]
    assert current == [0]


@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
def test_no_rows(diag):
    x, labels, mixture = case("scanned", diag, torch.float32)
    check_all(x[:0], labels[:0], mixture, torch.float32)


@pytest.mark.parametrize("shape", ["scanned", "sorted_by_pairs", pytest.param("split", marks=long)])
def test_labels_out_of_range(shape):
    x, labels, mixture = case(shape, True, torch.float64)
    C = SHAPES[shape][2]
    labels[[1, -1]] = torch.tensor([-3, C])
    stray = (labels < 0) | (labels >= C)
    counts, scatter, sums, assignment = ops.component_statistics_fwd(x, mixture.means, labels, None, None, True, True)
    assert all(t.isnan().all() for t in (counts, scatter, sums))
    assert torch.equal(assignment == -1, stray)
    dx = ops.component_statistics_bwd(torch.ones_like(scatter), None, x, mixture.means, labels, assignment)
    assert torch.equal(dx.isnan().all(1), stray)
    log_prob, _ = ops.mixture_log_prob_fwd(x, *mixture, labels, False)
    assert torch.equal(log_prob.isnan(), stray)


@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
def test_bits_do_not_depend_on_the_rest_of_the_batch_or_on_the_run(diag):
    x, labels, mixture = case("sorted_by_pairs", diag, torch.float32)
    whole, _ = ops.mixture_log_prob_fwd(x, *mixture, labels, False)
    part, _ = ops.mixture_log_prob_fwd(x[:100], *mixture, labels[:100], False)
    assert torch.equal(whole[:100], part)
    runs = [ops.component_statistics_fwd(x, mixture.means, labels, None, None, diag, True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("N, C", [(600, 3), (700, 50), (1000, 1)])
def test_counting_sorts_stably(N, C, monkeypatch):
    monkeypatch.setattr(_configs, "PAIRWISE_SORT_ROWS", 512)
    monkeypatch.setattr(_configs, "COUNTED_ROWS", 128)
    labels = torch.randint(-1, C + 1, (N,))
    with watching() as seen:
        groups = _grouping.group(labels, N, C, 64, torch.zeros(1))
    assert seen.launches == {"count_kernel": 1, "place_kernel": 1}
    placed, order = torch.sort(torch.where((labels >= 0) & (labels < C), labels, C), stable=True)
    assert torch.equal(groups.index, order)
    assert torch.equal(groups.offsets, torch.searchsorted(placed, torch.arange(C + 2)))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=long)], ids=str)
@pytest.mark.parametrize("rows", [0, 20])
@pytest.mark.parametrize("noise_per_dimension", [False, True])
@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
def test_entropy_bound(diag, noise_per_dimension, rows, dtype):
    x, labels, mixture = case("scanned", diag, dtype)
    x, labels = x[:rows], labels[:rows]
    _, D, C, _ = SHAPES["scanned"]
    noise = torch.rand(D if noise_per_dimension else 1, dtype=torch.float64) + 0.01
    prior = torch.rand(C).to(dtype)
    priors = (mixture.variances, mixture.weights, prior / prior.sum(), torch.tensor(500.0, dtype=torch.float64), noise)
    variants = [(False, True, True), (False, False, False)]
    if not diag and not noise_per_dimension:
        variants.append((True, True, True))
    for official, unbiased, mean in variants:
        options = (official, 10.0 if official else 1.0, unbiased, mean, 0.125, 0.01)
        check("cem_fwd", dtype, x, mixture.means, labels, *priors, *options)
        counts, scatter, _, _ = reference.component_statistics_fwd(x, mixture.means, labels, None, None, diag, False)
        check("entropy_bound", dtype, counts, scatter, D, *priors, *options)


def bounds(x, means, labels, variances, weights, samples, noise):
    """Value and slope by both ways: in one operator, and from statistics."""
    C, _, D = means.shape
    prior = torch.full((C,), 1 / C)
    priors = (variances, weights, prior, torch.tensor(float(samples), dtype=torch.float64), noise.double())
    options = (False, 1.0, True, True, 0.125, 0.01)
    diag = variances.dim() == 3
    counts, scatter, _, _ = reference.component_statistics_fwd(x, means, labels, None, None, diag, False)
    yield check("cem_fwd", torch.float32, x, means, labels, *priors, *options)[:2]
    yield check("entropy_bound", torch.float32, counts, scatter, D, *priors, *options)


SPREADS = list(itertools.product([False, True], [False, True]))


@pytest.mark.parametrize(
    "rows, fitted", [(25, 7), pytest.param(25, 14, marks=long), pytest.param(38, 21, marks=long), (42, 27)]
)
@pytest.mark.parametrize("diag, noise_per_dimension", SPREADS)
def test_fewer_samples_than_rows_and_classes_without_rows(rows, fitted, diag, noise_per_dimension):
    """The rounding of ``num_samples - b rows`` must not make the weight of an unseen component negative."""
    x, _, (means, variances, weights) = draw(rows, 5, 3, 4, diag=diag)
    mixture = Mixture(means, variances, weights).to(torch.float32)
    noise = torch.full((5 if noise_per_dimension else 1,), 0.0025)
    labels = torch.zeros(rows, dtype=torch.int64)
    for value, slope in bounds(x.float(), mixture.means, labels, mixture.variances, mixture.weights, fitted, noise):
        assert value.isfinite()
        assert slope.isfinite().all()


@pytest.mark.parametrize("rows, fitted", [(2, 2), (2, 2.0001)])
@pytest.mark.parametrize("diag, noise_per_dimension", SPREADS)
def test_a_small_variance_survives_the_blend_with_a_large_one(rows, fitted, diag, noise_per_dimension):
    x = torch.tensor([[1e-3, -1e-3], [-1e-3, 1e-3]])
    variances = torch.full((1, 1, 2) if diag else (1, 1), 100.0)
    noise = torch.full((2 if noise_per_dimension else 1,), 1e-6)
    for value, slope in bounds(x, torch.zeros(1, 1, 2), None, variances, torch.ones(1, 1), fitted, noise):
        if rows == fitted:
            torch.testing.assert_close(value, torch.tensor(0.5 * math.log(2)))
            torch.testing.assert_close(slope, torch.full_like(slope, 0.5 / 2 / rows / 2e-6))


def test_numbers_that_are_zero_ask_for_no_other_kernel():
    x, labels, mixture = case("one_element", False, torch.float32)
    scalars = torch.tensor(500.0, dtype=torch.float64), torch.tensor([0.01], dtype=torch.float64)
    priors = (mixture.variances, mixture.weights, torch.ones(1), *scalars)
    for threshold, gamma in ((0.125, 0.0), (0.0, 0.01)):
        check("cem_fwd", torch.float32, x, mixture.means, labels, *priors, True, 10.0, True, True, threshold, gamma)
