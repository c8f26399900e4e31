"""The launchers of the CUDA kernels, register.cpp unchanged, on the host: torch's tensors in and out, the device's guard, its
current stream, and what is refused."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from cuda_host.host import HERE, Launchers, build_library
from cuda_host.problems import SHAPES, Problem, allowed, expected, problems
from support.tolerances import relative_error

from cem_fast import GaussianMixture
from cem_fast.mixture import fitting
from cem_fast.ops import agreement, library, reference

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("c++") is None, reason="the kernels are compiled by a C++ compiler on Linux"
)


@pytest.fixture(scope="module")
def path(objects):
    return build_library(objects, "-O1", "-DCUDA_HOST_FIBERS")


@pytest.fixture(scope="module")
def launchers(path):
    return Launchers(path)


def run(launchers, problem):
    results = getattr(launchers, problem.name)(*problem.arguments)
    return (results,) if isinstance(results, torch.Tensor) else results


def agree(launchers, problem):
    for found, wanted in zip(run(launchers, problem), expected(problem), strict=True):
        assert found.is_contiguous()
        assert found.shape == wanted.shape
        if not wanted.is_floating_point():
            assert torch.equal(found, wanted), problem.name
            continue
        assert torch.equal(found.isnan(), wanted.isnan()), problem.name
        assert relative_error(found.nan_to_num(), wanted.nan_to_num()) <= allowed(problem, found), problem.name


@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], (9, 3, 2, 70), SHAPES[-1]], ids=str)
def test_every_operator(launchers, shape, diag):
    seen = set()
    for problem in problems(shape, torch.float32, diag):
        seen.add(problem.name)
        agree(launchers, problem)
    assert seen == set(library.ON_CUDA)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_type_of_features(launchers, dtype):
    for problem in problems(SHAPES[1], dtype, True):
        agree(launchers, problem)
        gradient = problem.name.endswith("_bwd")
        parameter = torch.promote_types(dtype, torch.float32)
        kinds = {t.dtype for t in run(launchers, problem) if t.is_floating_point()}
        sums = {torch.float64} if problem.name == "expectation_maximization" else set()  # rows and log-likelihoods
        assert kinds == {dtype if gradient else parameter} | sums


def scattered(argument):
    """The same numbers, no two of them neighbors."""
    if not isinstance(argument, torch.Tensor) or argument.dim() == 0:
        return argument
    room = argument.new_full((*argument.shape, 3), 77)
    room[..., 1] = argument
    return room[..., 1]


@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
def test_elements_that_lie_apart(launchers, diag):
    for problem in problems(SHAPES[1], torch.float32, diag):
        apart = Problem(problem.name, [scattered(argument) for argument in problem.arguments])
        for one, other in zip(run(launchers, problem), run(launchers, apart), strict=True):
            assert torch.equal(one, other), problem.name


def test_columns_of_a_transposed_matrix(launchers):
    for problem in problems((37, 16, 4, 5), torch.float32, True):
        turned = [
            a.t().contiguous().t() if isinstance(a, torch.Tensor) and a.dim() == 2 else a for a in problem.arguments
        ]
        agree(launchers, Problem(problem.name, turned))


@pytest.mark.parametrize("operator", ["component_statistics_fwd", "component_statistics_bwd", "mixture_log_prob_fwd"])
def test_rows_that_lie_further_apart_than_32_bits_reach(launchers, operator, monkeypatch):
    apart = 2**30
    problem = next(p for p in problems((3, 5, 1, 2), torch.bfloat16, True) if p.name == operator)
    place = next(
        i for i, a in enumerate(problem.arguments) if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16
    )
    x = problem.arguments[place]
    # only the pages of the rows ever exist
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    far = torch.empty(2 * apart + 5, dtype=torch.bfloat16).as_strided(x.shape, (apart, 1)).copy_(x)
    there = [*problem.arguments[:place], far, *problem.arguments[place + 1 :]]
    for one, other in zip(run(launchers, problem), run(launchers, Problem(operator, there)), strict=True):
        assert torch.equal(one, other)


OTHERS = [torch.float64, torch.float16, torch.bfloat16]  # minutes; test_every_type_of_features is quicker
COMPARED = [torch.float32, *(pytest.param(dtype, marks=pytest.mark.long) for dtype in OTHERS)]


@pytest.mark.parametrize("dtype", COMPARED, ids=str)
def test_what_is_compared_on_a_users_device(launchers, dtype):
    for name in library.ON_CUDA:
        error = agreement.error(name, getattr(launchers, name), dtype, torch.device("cpu"))
        assert error <= agreement.TOLERANCE[dtype], name


@pytest.mark.parametrize("algorithm", ["kmeans", "em"])
@pytest.mark.parametrize("covariance_type", ["spherical", "diag"])
def test_a_mixture_that_the_kernels_fit(launchers, algorithm, covariance_type, monkeypatch):
    x, labels = torch.rand(90, 4) + 3 * torch.arange(90).unsqueeze(1) % 7, torch.arange(90) % 2
    settings = dict(num_components=3, num_classes=2, covariance_type=covariance_type, algorithm=algorithm)

    def fitted():
        return GaussianMixture(**settings, generator=torch.Generator().manual_seed(0)).fit(x, labels)

    wanted = fitted()
    monkeypatch.setattr(fitting, "WHOLE_FITS", {(name, "cpu") for name in library.FITS["cuda"]})
    monkeypatch.setattr(fitting, "_KMEANS", launchers.kmeans)
    monkeypatch.setattr(fitting, "_EXPECTATION_MAXIMIZATION", launchers.expectation_maximization)
    found = fitted()
    for one, other in zip(found.buffers(), wanted.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert (found.n_iter_, found.converged_) == (wanted.n_iter_, wanted.converged_)
    x[3, 2] = torch.nan
    with pytest.raises(ValueError, match="x must be finite, got 1 rows with NaN or infinity"):
        fitted()


@pytest.mark.parametrize("rows", [20, 70], ids=["searched", "sorted in turns"])
def test_a_graph_has_counters_of_its_own(launchers, rows):
    """It may run at any time, next to calls that count in shared places."""
    for problem in problems((rows, 5, 2, 2), torch.float32, False):
        if problem.name in library.FITS["cuda"]:  # never captured: the host reads how many classes still move
            continue
        launchers.fills()
        eager = run(launchers, problem)
        assert launchers.fills() == 0
        with launchers.capturing():
            captured = run(launchers, problem)
        counts = problem.name in ("cem_fwd", "component_statistics_fwd", "entropy_bound")
        assert launchers.fills() == int(counts), problem.name
        assert all(torch.equal(one, other) for one, other in zip(eager, captured, strict=True))


@pytest.mark.parametrize("components", [22, 44])
def test_shared_memory_beyond_the_default_is_asked_for(launchers, components):
    """Static memory counts, too: 47 KB on top of it are more than the default of 48 KB."""
    arguments = [torch.rand(3, 512), torch.rand(1, components, 512), None, None, None, False, False]
    found, wanted = launchers.component_statistics_fwd(*arguments), reference.component_statistics_fwd(*arguments)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


# The package's operators, where these launchers are those of CPU tensors; prints how many calls Python served.
SERVED = """
import sys, torch
from cem_fast.ops import backend, library, reference
from cuda_host.host import Launchers
compiled, asked = Launchers(sys.argv[1]).library, []

def choose(*arguments):
    asked.append(arguments)
    return reference.component_statistics_fwd(*arguments)

name, cpu = "component_statistics_fwd", torch.device("cpu")
backend.serve_compiled(compiled, name, choose, "CPU")
x, means, labels = torch.rand(9, 4), torch.rand(2, 3, 4), torch.arange(9) % 2
statistics = library.OPERATORS[name]

def call(dtype=torch.float32):
    found = statistics(x.to(dtype), means, labels, None, None, True, False)
    for one, other in zip(found, reference.component_statistics_fwd(x.to(dtype), means, labels, None, None, True, False)):
        torch.testing.assert_close(one, other)
    print(len(asked))

call()
backend.note_agreement(compiled, name, cpu, torch.float32)
call()
call(torch.bfloat16)  # another kernel
backend.note_agreement(compiled, name, cpu, torch.float32, False)
call()
statistics(x.to(torch.int64), means.to(torch.int64), labels, None, None, True, False)
print(len(asked))
"""


def test_python_serves_only_what_has_not_agreed(path):
    environment = {**os.environ, "CEM_FAST_BACKEND": "reference"}
    environment["PYTHONPATH"] = str(HERE.parent)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SERVED, path],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.stdout.split() == ["1", "1", "2", "3", "4"], done.stderr


X, MEANS, LABELS = torch.rand(9, 4), torch.rand(2, 3, 4), torch.arange(9) % 2


@pytest.mark.parametrize(
    "x, means, labels, message",
    [
        (X, MEANS[..., :3], LABELS, "x must be .N, D. and means .C, K, D."),
        (X, MEANS.double(), LABELS, "parameters must be float64 with float64 features"),
        (X, MEANS, LABELS[:5], "labels must be int64 .N."),
        (X, MEANS, LABELS.int(), "labels must be int64 .N."),
        (X, MEANS, None, "labels may be left out for one class only"),
        (X.to(torch.complex64), MEANS, LABELS, "x must be float32, float64, bfloat16 or float16"),
        (torch.zeros(1, 1).expand(2**31, 1), torch.zeros(1, 1, 1), None, "x must have fewer than 2.31 rows"),
    ],
)
def test_what_would_read_out_of_bounds_is_refused(launchers, x, means, labels, message):
    with pytest.raises(RuntimeError, match=message):
        launchers.component_statistics_fwd(x, means, labels, None, None, False, False)


@pytest.mark.parametrize("launches", [0, 2])
def test_a_launch_that_fails_is_an_error(launchers, launches):
    many = [torch.rand(90, 4), MEANS, torch.arange(90) % 2, None, None, False, False]
    launchers.fail_after(launches)
    with pytest.raises(RuntimeError, match="CUDA: unspecified launch failure"):
        launchers.component_statistics_fwd(*many)
    launchers.component_statistics_fwd(*many)
