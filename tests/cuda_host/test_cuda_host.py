"""The CUDA kernels, run on the host, against the float64 reference; under the sanitizers in ``run.py``."""

import math
import shutil
import subprocess
import sys

import pytest
import torch
from cuda_host.host import SOURCES, Failure, Host, barriers, build
from cuda_host.problems import SHAPES, Problem, expected, problems
from support.error_budget import sums_at_an_offset
from support.tolerances import RELATIVE, relative_error

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("c++") is None, reason="the kernels are compiled by a C++ compiler on Linux"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build(tmp_path_factory.mktemp("cuda_host"), "-O1", "-DCUDA_HOST_FIBERS")


@pytest.fixture(scope="module")
def host(program):
    with Host(program) as running:
        yield running


def run(host: Host, problem: Problem) -> tuple[torch.Tensor, ...]:
    results = getattr(host, problem.name)(*problem.arguments)
    return (results,) if isinstance(results, torch.Tensor) else results


def agree(host: Host, problem: Problem) -> None:
    for found, wanted in zip(run(host, problem), expected(problem), strict=True):
        if not wanted.is_floating_point():
            assert torch.equal(found, wanted), problem.name
            continue
        allowed = RELATIVE[found.dtype]
        assert torch.equal(found.isnan(), wanted.isnan()), problem.name
        assert relative_error(found.nan_to_num(), wanted.nan_to_num()) <= allowed, problem.name


@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_operator(host, shape, diag):
    for problem in problems(shape, torch.float32, diag):
        agree(host, problem)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_type_of_features(host, dtype):
    for diag in (False, True):
        for shape in (SHAPES[1], (45, 64, 3, 5)):
            for problem in problems(shape, dtype, diag):
                agree(host, problem)


@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
def test_labels_out_of_range_poison_what_they_touch(host, diag):
    for problem in problems(SHAPES[1], torch.float32, diag, bad_labels=True):
        agree(host, problem)


@pytest.mark.parametrize("noise", [torch.full((1,), 1e-6), torch.full((2,), 1e-6)], ids=["one noise", "noises"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 2)], ids=["spherical", "diag"])
def test_a_small_variance_survives_the_blend_with_a_large_one(host, shape, noise):
    x, mean, one = torch.tensor([[1e-3, -1e-3], [-1e-3, 1e-3]]), torch.zeros(1, 1, 2), torch.ones(1, 1)
    samples = torch.tensor(2.0, dtype=torch.float64)
    priors = (torch.full(shape, 100.0), one, torch.ones(1), samples, noise.double())
    value, slope, _ = host.cem_fwd(x, mean, None, *priors, False, 1.0, True, True, 0.125, 0.01)
    torch.testing.assert_close(value, torch.tensor(0.5 * math.log(2)))
    torch.testing.assert_close(slope, torch.full(shape, 0.5 / 2 / 2 / 2e-6))


def test_one_class_without_labels(host):
    for problem in problems(SHAPES[5], torch.float32, True, labeled=False):
        agree(host, problem)


def test_sums_keep_a_small_spread_about_a_large_offset(host):
    assert sums_at_an_offset(host.component_statistics_fwd) <= torch.finfo(torch.float32).eps


def test_nan_features_are_assigned_as_torch_does(host):
    x, means = torch.tensor([[0.0, torch.nan], [1.0, 2.0]]), torch.tensor([[[5.0, 5.0], [1.0, 2.0]]])
    agree(host, Problem("component_statistics_fwd", [x, means, None, None, None, False, False]))


def test_a_step_of_the_loss_is_eight_launches(host):
    for diag in (False, True):
        launches = 0
        for problem in problems((150, 40, 3, 2), torch.float32, diag):
            if problem.name in ("cem_fwd", "component_statistics_bwd") and problem.arguments[1] is not None:
                run(host, problem)
                launches = max(launches, host.last_launches) if problem.name == "cem_fwd" else launches
        assert launches + 1 == 8


def test_the_order_of_blocks_changes_no_bit(host, program):
    with Host(program, CUDA_HOST_REVERSE="1") as reversed_host:
        for problem in problems((130, 33, 3, 3), torch.float32, True):
            for one, other in zip(run(host, problem), run(reversed_host, problem), strict=True):
                assert torch.equal(one.nan_to_num(), other.nan_to_num()), problem.name


def test_a_barrier_that_is_missing_shows(program):
    """ThreadSanitizer sees each of them, in ``run.py``; here a tile that is read too early must give wrong results."""
    complete = [barrier for barrier in barriers() if barrier.startswith("distance.cuh")][1]

    def run_broken() -> None:
        with Host(program, CUDA_HOST_SKIP=complete) as broken:
            for problem in problems(SHAPES[2], torch.float32, True):
                agree(broken, problem)

    with pytest.raises((AssertionError, Failure)):
        run_broken()


def test_the_device_code_knows_nothing_of_torch():
    included = subprocess.run(["grep", "-l", "#include.*torch", *SOURCES.glob("*.cu*")], capture_output=True, text=True)
    assert included.stdout == ""
