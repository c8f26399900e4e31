"""The compiled CPU kernels against the reference: every operator, dtype, instruction set and thread count."""

import itertools
import mmap
import os
import subprocess
import sys

import pytest
import torch
from support import far
from support.definitions import draw
from support.tolerances import RELATIVE, relative_error

from cem_fast.ops import backend, reference

pytestmark = pytest.mark.skipif(backend.CPU is None, reason="the compiled kernels are not in force")

OPS = torch.ops.cem_fast
# N, D, C, K: one of each; odd and tiny; a chunk and a bit; more classes than rows; many components; long classes
SHAPES = [
    (1, 1, 1, 1),
    (37, 3, 4, 5),
    (65, 17, 2, 7),
    (90, 641, 3, 3),
    (5, 70, 40, 2),
    (30, 33, 1, 130),
    (2100, 33, 2, 3),
    (0, 5, 2, 3),
]
# more components and dimensions than are packed at once, with few and with many blocks of rows
LARGER_THAN_PACKED = [(9, 800, 2, 33), (30, 800, 24, 33)]
DTYPES = list(RELATIVE)


@pytest.fixture(params=backend.CAPABILITIES)
def capability(request):
    in_force = backend.CPU.capability
    try:
        backend.CPU.select(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    backend.CPU.select(in_force)


def exact(arguments):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]


def mixture_case(shape, diag, dtype):
    """Features, mixture and labels; half features come with float32 parameters."""
    x, labels, mixture = draw(*shape, diag=diag)
    parameters = torch.promote_types(dtype, torch.float32)
    return x.to(dtype), *mixture.to(parameters), labels


def bound_arguments(dtype, classes, dimension, num_samples, *, official=False, per_dimension_noise=False, boost=1.0):
    prior = torch.rand(classes, dtype=dtype) + 0.1
    noise = torch.rand(dimension if per_dimension_noise else 1, dtype=torch.float64) * 0.01 + 0.001
    samples = torch.tensor(float(num_samples), dtype=torch.float64)
    return [prior / prior.sum(), samples, noise, official, boost, True, True, 0.125, 0.01]


def agree(name, arguments, dtype, factor=1.0):
    """Runs one operator and its reference on the same values in float64; returns both results."""
    found = getattr(OPS, name)(*arguments)
    wanted = getattr(reference, name)(*exact(arguments))
    pairs = [(found, wanted)] if isinstance(found, torch.Tensor) else list(zip(found, wanted, strict=True))
    for got, want in pairs:
        assert got.shape == want.shape
        if want.is_floating_point():
            assert got.dtype == (dtype if got.shape == arguments[0].shape and name.endswith("bwd") else got.dtype)
            assert relative_error(got, want) <= factor * RELATIVE[dtype if name.endswith("bwd") else parameter(dtype)]
        else:
            assert torch.equal(got, want)
    return found


def parameter(dtype):
    return torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
@pytest.mark.parametrize("shape", SHAPES + LARGER_THAN_PACKED, ids=str)
def test_log_prob_and_moments(capability, shape, diag, dtype):
    arguments = mixture_case(shape, diag, dtype)
    grad = torch.rand(shape[0], dtype=parameter(dtype)) - 0.3
    for keep in (True, False):
        kept = agree("mixture_log_prob_fwd", [*arguments, keep], dtype, factor=2)
        agree("mixture_log_prob_bwd", [grad, *arguments, *kept], dtype, factor=2)
        agree("mixture_moments", [grad, *arguments, *kept], dtype, factor=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics(capability, shape, dtype):
    for diag in (False, True):
        x, means, variances, weights, labels = mixture_case(shape, diag, dtype)
        for posterior, per_dimension, sums in itertools.product((False, True), repeat=3):
            spread = (variances, weights) if posterior else (None, None)
            _, scatter, _, assignment = agree(
                "component_statistics_fwd", [x, means, labels, *spread, per_dimension, sums], dtype
            )
            grad, scale = torch.rand_like(scatter) - 0.5, torch.rand((), dtype=means.dtype)
            for factor in (None, scale):
                agree("component_statistics_bwd", [grad, factor, x, means, labels, assignment], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bound(capability, shape, dtype):
    N, D, C, _ = shape
    for diag, official, per_dimension_noise, total, boost in (
        (False, False, False, 40 * N + 1, 1.0),
        (False, False, True, max(N, 1), 1.0),
        (True, False, True, N // 2 + 1, 3.0),
        (True, False, False, 40 * N + 1, 1.0),
        (False, True, False, 40 * N + 1, 10.0),
    ):
        x, means, variances, weights, labels = mixture_case(shape, diag, dtype)
        weights = weights / weights.sum(1, keepdim=True)
        options = bound_arguments(
            means.dtype, C, D, total, official=official, per_dimension_noise=per_dimension_noise, boost=boost
        )
        agree("cem_fwd", [x, means, labels, variances, weights, *options], dtype)
        counts, scatter, *_ = reference.component_statistics_fwd(x, means, labels, None, None, diag, False)
        agree("entropy_bound", [counts, scatter, D, variances, weights, *options], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bound_of_extreme_variances(capability, dtype):
    """One logarithm serves eight factors: tiny ratios keep their digits, huge ones do not overflow, zero is zero."""
    C, K, D = 1, 2, 33
    for scale in (1e-30, 1e-12, 1.0, 1e12, 1e30):
        variances = (torch.rand(C, K, D, dtype=torch.float64) * scale).to(dtype)
        variances[0, 1, 5] = 0
        counts, scatter = torch.zeros(C, K, dtype=dtype), torch.zeros(C, K, D, dtype=dtype)
        weights = torch.full((C, K), 0.5, dtype=dtype)
        agree(
            "entropy_bound",
            [counts, scatter, D, variances, weights, *bound_arguments(dtype, C, D, 10)],
            dtype,
        )


def test_all_capabilities_assign_alike():
    x, means, variances, weights, labels = mixture_case((300, 100, 3, 9), True, torch.float64)
    in_force, results = backend.CPU.capability, []
    for name in backend.CAPABILITIES:
        try:
            backend.CPU.select(name)
        except RuntimeError:
            continue
        results.append(OPS.component_statistics_fwd(x, means, labels, variances, weights, True, True))
    backend.CPU.select(in_force)
    for found in results[1:]:
        assert torch.equal(found[3], results[0][3])
        assert relative_error(found[1], results[0][1]) < 1e-14


@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
@pytest.mark.parametrize("shape", [(3001, 513, 10, 5), (700, 40, 1, 90), (40, 3000, 2, 6)], ids=str)
def test_same_bits_for_every_thread_count_and_run(shape, diag):
    x, means, variances, weights, labels = mixture_case(shape, diag, torch.float32)
    weights = weights / weights.sum(1, keepdim=True)
    options = bound_arguments(torch.float32, shape[2], shape[1], 50_000)
    grad, one = torch.rand(shape[0]), torch.tensor(1.0)

    def run():
        value, slope, assignment = OPS.cem_fwd(x, means, labels, variances, weights, *options)
        kept = OPS.mixture_log_prob_fwd(x, means, variances, weights, labels, shape[3] <= 64)
        mixture = (x, means, variances, weights, labels)
        return [
            value,
            slope,
            OPS.component_statistics_bwd(slope, one, x, means, labels, assignment),
            *OPS.component_statistics_fwd(x, means, labels, variances, weights, True, True),
            *kept,
            OPS.mixture_log_prob_bwd(grad, *mixture, *kept),
            *OPS.mixture_moments(grad, *mixture, *kept),
        ]

    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 5, 5):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


def test_large_gradients_are_stored_past_the_caches(capability):
    """Sizes on both sides of the threshold, aligned and not, take different stores and must agree."""
    for rows, dimension in ((9000, 512), (9000, 513), (40, 512)):
        for dtype in (torch.float32, torch.bfloat16):
            x, labels = torch.rand(rows, dimension).to(dtype), torch.randint(0, 3, (rows,))
            means, grad = torch.rand(3, 2, dimension), torch.rand(3, 2)
            assignment = torch.randint(0, 2, (rows,))
            agree("component_statistics_bwd", [grad, None, x, means, labels, assignment], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset, scale", [(0.0, 1.0), (1e3, 1.0), (1e6, 1.0), (0.0, 1e-20), (0.0, 1e-22)])
@pytest.mark.parametrize("components, dimension", [(16, 8), (61, 16), (40, 64)])
@pytest.mark.usefixtures("capability")
def test_rows_between_two_means_are_assigned_together_as_they_are_alone(components, dimension, offset, scale, dtype):
    torch.manual_seed(0)
    means = (torch.randn(1, components, dimension) + offset).to(dtype)
    pairs = torch.randint(components, (500, 2))
    x = means[0, pairs].mean(1)
    x[:250] += torch.randn(250, dimension).to(dtype) * 1e-6 * (1 + offset)
    means[0, 1::7] = means[0, 0]  # equal means
    means, x = means * scale, x * scale  # small ones have squares that lose digits
    together = OPS.component_statistics_fwd(x, means, None, None, None, False, False)[3]
    alone = [OPS.component_statistics_fwd(row, means, None, None, None, False, False)[3] for row in x.split(1)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("spoiled", ["row", "mean"])
@pytest.mark.usefixtures("capability")
def test_numbers_that_are_not_finite_spoil_no_other_row(spoiled):
    torch.manual_seed(0)
    means, x = torch.randn(1, 20, 9), torch.randn(300, 9)
    right = OPS.component_statistics_fwd(x, means, None, None, None, False, False)[3]
    if spoiled == "row":
        x[7, 3], x[40, 0] = float("inf"), float("nan")
        others = torch.arange(300).gt(40)
    else:
        means[0, 19, 2] = float("inf")
        others = right != 19
    found = OPS.component_statistics_fwd(x, means, None, None, None, False, False)[3]
    assert torch.equal(found[others], right[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_ties_go_to_the_lowest_component(capability, dtype):
    """Equal means at every place of a register tile, in tiles of every width, and in different blocks."""
    parameter = torch.float32 if dtype == torch.bfloat16 else dtype
    for K in (2, 3, 4, 5, 6, 11, 66, 70):
        for D in (1, 17, 31, 63, 700):
            means = torch.rand(1, 1, D, dtype=parameter).expand(1, K, D).contiguous()
            x = torch.rand(101, D).to(dtype)
            variances, weights = torch.full((1, K), 0.5).to(parameter), torch.full((1, K), 1 / K).to(parameter)
            for spread in ((None, None), (variances, weights), (variances.unsqueeze(-1).expand(1, K, D), weights)):
                assert OPS.component_statistics_fwd(x, means, None, *spread, False, False)[3].eq(0).all()
            means[0, 0] += 100
            assert OPS.component_statistics_fwd(x, means, None, None, None, False, False)[3].eq(1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("components", [3, 130])
def test_values_that_are_not_finite_propagate_as_in_the_reference(capability, components, bad):
    for diag in (False, True):
        x, means, variances, weights, labels = mixture_case((20, 9, 2, components), diag, torch.float32)
        x[4, 7] = bad
        arguments = [x, means, variances, weights, labels]
        kept = OPS.mixture_log_prob_fwd(*arguments, True)
        wanted = reference.mixture_log_prob_fwd(*arguments, True)
        torch.testing.assert_close(kept[0], wanted[0], equal_nan=True, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(kept[1], wanted[1], equal_nan=True, rtol=1e-4, atol=1e-4)
        dx = OPS.mixture_log_prob_bwd(torch.ones(20), *arguments, *kept)
        assert torch.isfinite(dx[torch.arange(20) != 4]).all()
        found = OPS.component_statistics_fwd(x, means, labels, None, None, diag, True)
        expected = reference.component_statistics_fwd(x, means, labels, None, None, diag, True)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-5, atol=1e-5)
        grad = torch.ones_like(found[1])
        dx = OPS.component_statistics_bwd(grad, None, x, means, labels, found[3])
        expected = reference.component_statistics_bwd(grad, None, x, means, labels, found[3])
        torch.testing.assert_close(dx, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("classes", [1, 3])
def test_labels_out_of_range_give_nan_and_read_nothing_else(capability, classes):
    for diag in (False, True):
        x, means, variances, weights, labels = mixture_case((30, 9, classes, 3), diag, torch.float32)
        labels[2], labels[7], labels[29] = -1, classes, 2**62
        bad = (labels < 0) | (labels >= classes)
        kept = OPS.mixture_log_prob_fwd(x, means, variances, weights, labels, True)
        assert torch.equal(kept[0].isnan(), bad)
        dx = OPS.mixture_log_prob_bwd(torch.ones(30), x, means, variances, weights, labels, *kept)
        assert torch.equal(dx.isnan().all(1), bad)
        assert torch.equal(dx.isnan().any(1), bad)
        moments = OPS.mixture_moments(torch.ones(30), x, means, variances, weights, labels, *kept)
        assert all(m.isnan().all() for m in moments)
        *statistics, assignment = OPS.component_statistics_fwd(x, means, labels, None, None, diag, True)
        assert all(s.isnan().all() for s in statistics)
        assert torch.equal(assignment < 0, bad)
        dx = OPS.component_statistics_bwd(torch.ones_like(statistics[1]), None, x, means, labels, assignment)
        assert torch.equal(dx.isnan().all(1), bad)
        value, slope, _ = OPS.cem_fwd(
            x, means, labels, variances, weights, *bound_arguments(torch.float32, classes, 9, 100)
        )
        assert value.isnan()
        assert slope.isnan().all()


def test_strided_input_equals_contiguous(capability):
    x, means, variances, weights, labels = mixture_case((40, 33, 3, 4), True, torch.float32)
    wide = torch.full((40, 50), float("nan"))
    wide[:, 5:38] = x
    variants = {
        "columns of a wider tensor": wide[:, 5:38],
        "transposed": x.t().contiguous().t(),
        "every second row": torch.stack([x, torch.full_like(x, float("nan"))], 1).flatten(0, 1)[::2],
        "one row, expanded": x[:1].expand(40, 33),
    }
    for name, features in variants.items():
        assert not features.is_contiguous(), name
        dense = features.contiguous()
        kept = OPS.mixture_log_prob_fwd(dense, means, variances, weights, labels, True)
        strided = OPS.mixture_log_prob_fwd(
            features,
            means.transpose(0, 1).contiguous().transpose(0, 1),
            variances.transpose(1, 2).contiguous().transpose(1, 2),
            weights.t().contiguous().t(),
            torch.stack([labels, labels], 1)[:, 0],
            True,
        )
        assert all(torch.equal(a, b) for a, b in zip(kept, strided)), name
        grad = torch.ones(()).expand(40)
        rows = (grad, features, means, variances, weights, labels, *kept)
        dx = OPS.mixture_log_prob_bwd(*rows)
        assert torch.equal(dx, OPS.mixture_log_prob_bwd(grad, dense, *rows[2:])), name
        assert torch.equal(
            OPS.component_statistics_fwd(features, means, labels, None, None, True, True)[1],
            OPS.component_statistics_fwd(dense, means, labels, None, None, True, True)[1],
        ), name


def test_half_gradients_round_to_nearest_even(capability):
    """The same bits as torch's own rounding of the float32 gradient, subnormal and overflowing ones included."""
    rows = 4096
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(rows, 19).to(dtype)
        assignment, means = torch.zeros(rows, dtype=torch.int64), torch.zeros(1, 1, 19)
        for scale in (1e-7, 1e-5, 1.0, 3e4, float("nan")):
            dx = OPS.component_statistics_bwd(torch.full((1, 1), scale), None, x, means, None, assignment)
            exact = x.float() * torch.tensor(2.0 * scale)
            torch.testing.assert_close(dx, exact.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_every_half_number_is_read_exactly(capability):
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 32)
        assignment = torch.zeros(x.shape[0], dtype=torch.int64)
        dx = OPS.component_statistics_bwd(torch.full((1, 1), 0.5), None, x, torch.zeros(1, 1, 32), None, assignment)
        torch.testing.assert_close(dx, x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs address space without memory behind it")
def test_offsets_beyond_2_to_the_31_elements(capability):
    """Rows and means that lie further apart than 32 bits reach; only the pages touched take memory."""
    far, dimension, classes = 2**31, 1024, 2**21 + 1
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python names since 3.11 only
    memory = torch.frombuffer(mmap.mmap(-1, 4 * (far + dimension), flags=flags), dtype=torch.float32)
    memory[far:] = torch.rand(dimension)
    labels, zeros = torch.tensor([0, classes - 1, 0]), torch.zeros(3, 1, dimension)

    rows = memory.as_strided((3, dimension), (far // 2, 1))
    found = OPS.component_statistics_fwd(rows, zeros[:1], None, None, None, True, True)
    assert torch.equal(found[2][0, 0], memory[far:])
    dx = OPS.component_statistics_bwd(torch.full((1, 1), 0.5), None, rows, zeros[:1], None, found[3])
    assert torch.equal(dx, rows)

    means = memory.view(classes, 1, dimension)
    x = memory[far:].expand(3, dimension)
    counts, scatter, _, assignment = OPS.component_statistics_fwd(x, means, labels, None, None, False, False)
    assert counts[0, 0] == 2
    assert counts[-1, 0] == 1
    assert scatter[-1, 0] == 0
    assert relative_error(scatter[0], 2 * x[0].square().sum().view(1)) < 1e-6
    dx = OPS.component_statistics_bwd(torch.full((classes, 1), 0.5), None, x, means, labels, assignment)
    assert torch.equal(dx, x * torch.tensor([[1.0], [0.0], [1.0]]))


def test_too_many_rows_are_refused():
    with pytest.raises(RuntimeError, match="fewer than 2\\^31 rows"):
        OPS.component_statistics_fwd(
            torch.zeros(1, 1).expand(2**31, 1), torch.zeros(1, 1, 1), None, None, None, False, False
        )


def test_operators_outside_their_domain_are_refused():
    x, means, variances, weights, labels = mixture_case((6, 4, 2, 3), True, torch.float32)
    for message, arguments in {
        "parameters must be": [x, means.double(), variances, weights, labels, True],
        "x must be float32": [x.int(), means, variances, weights, labels, True],
        "labels must be int64": [x, means, variances, weights, labels[:5], True],
        "labels may be left out": [x, means, variances, weights, None, True],
        "expected 6 elements": [x, means, variances, weights[:1], labels, True],
        "x must be \\[N, D\\]": [x[:, :3], means, variances, weights, labels, True],
    }.items():
        with pytest.raises(RuntimeError, match=message):
            OPS.mixture_log_prob_fwd(*arguments)


def environment(**variables):
    return {k: v for k, v in os.environ.items() if not k.startswith("CEM_FAST")} | variables


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, "compiled ("),
        ({"CEM_FAST_CPU_CAPABILITY": "default"}, "compiled (default): CEM_FAST_CPU_CAPABILITY=default"),
        ({"CEM_FAST_BACKEND": "reference"}, "reference: CEM_FAST_BACKEND=reference"),
    ],
    ids=str,
)
def test_choice_by_environment(variables, expected):
    """What is in force, or one line that says why not."""
    code = "import cem_fast.ops.backend as b; print(b.describe()['on CPU tensors'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(**variables), check=False
    )
    assert expected in done.stdout, done.stderr


@pytest.mark.parametrize(
    "variable, value, message",
    [
        (
            "CEM_FAST_BACKEND",
            "tritn",
            "value of CEM_FAST_BACKEND 'tritn': expected one of auto, triton, cuda, cpu, reference; the nearest is 'triton'",
        ),
        (
            "CEM_FAST_CPU_CAPABILITY",
            "avx521",
            "value of CEM_FAST_CPU_CAPABILITY 'avx521': expected one of default, avx2, avx512; the nearest is 'avx512'",
        ),
    ],
)
def test_unknown_choice(variable, value, message, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        backend.choose()


@pytest.mark.parametrize(
    "variables, message",
    [
        (
            {"CEM_FAST_BACKEND": "reference", "CEM_FAST_CPU_CAPABILITY": "avx2"},
            "CEM_FAST_CPU_CAPABILITY=avx2 needs the compiled kernels, got CEM_FAST_BACKEND=reference",
        ),
    ],
    ids=str,
)
def test_impossible_choice(variables, message, monkeypatch):
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(RuntimeError, match=message):
        backend.choose()


def test_missing_library_names_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "PACKAGE", tmp_path)
    monkeypatch.setenv("CEM_FAST_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="not built: the package was not installed with its extensions"):
        backend.choose()
    (tmp_path / "_not_built_cpp.txt").write_text("no C++ compiler (g++ not found)\n")
    with pytest.raises(RuntimeError, match="not built: no C\\+\\+ compiler"):
        backend.choose()
    monkeypatch.setenv("CEM_FAST_BACKEND", "auto")
    requested, library, reason = backend.choose()
    assert (requested, library) == ("auto", None)
    assert "no C++ compiler" in reason


def test_capability_that_this_build_lacks():
    in_force = backend.CPU.capability
    with pytest.raises(RuntimeError, match="CPU capability 'avx1024' is not available"):
        backend.CPU.select("avx1024")
    assert backend.CPU.capability == in_force


@pytest.mark.parametrize("classes, components, dimension", [(0, 2, 3), (1, 0, 3), (1, 2, 0)])
def test_operators_refuse_mixtures_without_parameters(classes, components, dimension):
    x, labels = torch.zeros(4, dimension), torch.zeros(4, dtype=torch.int64)
    means, weights = torch.zeros(classes, components, dimension), torch.ones(classes, components)
    for call in (
        lambda: torch.ops.cem_fast.mixture_log_prob_fwd(x, means, means, weights, labels, True),
        lambda: torch.ops.cem_fast.mixture_statistics(x, means, means, weights, labels),
        lambda: torch.ops.cem_fast.component_statistics_fwd(x, means, labels, None, None, True, True),
        lambda: torch.ops.cem_fast.kmeans(x, means, labels, 3, 0.0, False),
    ):
        with pytest.raises(RuntimeError, match="means must have at least one class, component and dimension"):
            call()


@pytest.mark.parametrize("width", far.WIDTHS)
def test_features_too_large_to_square_on_every_instruction_set(capability, width):
    for components in (3, 6, 66):
        far.check_nearest(OPS, width, components=components)
        for diag in (False, True):
            far.check_densities(OPS, width, diag=diag, components=components)
