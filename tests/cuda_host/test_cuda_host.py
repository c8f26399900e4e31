"""The CUDA kernels, run on the host, against the float64 reference; under the sanitizers in ``run.py``."""

import math
import shutil
import subprocess
import sys

import pytest
import torch
from cuda_host.host import SOURCES, Failure, Host, barriers, build
from cuda_host.problems import GLOBAL_SHAPES, SHAPES, Problem, allowed, expected, problems
from support import far
from support.error_budget import sums_at_an_offset
from support.tolerances import relative_error

from cem_fast.ops import library

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("c++") is None, reason="the kernels are compiled by a C++ compiler on Linux"
)


@pytest.fixture(scope="module")
def program(objects):
    return build(objects, "-O1", "-DCUDA_HOST_FIBERS")


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
        assert torch.equal(found.isnan(), wanted.isnan()), problem.name
        assert relative_error(found.nan_to_num(), wanted.nan_to_num()) <= allowed(problem, found), problem.name


@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_operator(host, shape, diag):
    for problem in problems(shape, torch.float32, diag):
        agree(host, problem)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_type_of_features(host, dtype):
    for diag in (False, True):
        for shape in (SHAPES[1], (75, 64, 3, 5)):
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


@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
@pytest.mark.parametrize("shape", GLOBAL_SHAPES, ids=str)
def test_one_class_without_labels(host, shape, diag):
    for problem in problems(shape, torch.float32, diag, labeled=False):
        if "log_prob" in problem.name or shape[0] < 10:
            agree(host, problem)


def test_sums_keep_a_small_spread_about_a_large_offset(host):
    assert sums_at_an_offset(host.component_statistics_fwd) <= torch.finfo(torch.float32).eps


def test_nan_features_are_assigned_as_torch_does(host):
    x, means = torch.tensor([[0.0, torch.nan], [1.0, 2.0]]), torch.tensor([[[5.0, 5.0], [1.0, 2.0]]])
    agree(host, Problem("component_statistics_fwd", [x, means, None, None, None, False, False]))


@pytest.mark.parametrize("components", [3, 21])
@pytest.mark.parametrize("width", far.WIDTHS)
def test_features_too_large_to_square_have_right_densities_and_gradients(host, width, components):
    for diag in (False, True):
        far.check_densities(host, width, diag=diag, components=components)


@pytest.mark.parametrize("components", [3, 21])
@pytest.mark.parametrize("width", far.WIDTHS)
def test_rows_too_far_to_square_go_to_the_nearest_mean(host, width, components):
    far.check_nearest(host, width, components=components)


@pytest.mark.parametrize("width", far.WIDTHS)
def test_kmeans_moves_means_to_rows_too_far_to_square(host, width):
    x, means = far.case(width)
    problem = Problem("kmeans", [x, means, None, 1, 1e-4, False])
    found, wanted = run(host, problem), expected(problem)
    assert relative_error(found[0], wanted[0]) < allowed(problem, found[0])
    assert torch.equal(found[1], wanted[1].float())


def test_em_on_features_too_large_to_square(host):
    x, means = torch.tensor([[0.0], [-2e19], [2e19]]), torch.tensor([[[-2e19], [2e19]]])
    mixture = means, torch.full((1, 2), 1e38), torch.full((1, 2), 0.5)
    agree(host, Problem("expectation_maximization", [x, *mixture, None, 1, 1e-2, 0.0]))


@pytest.mark.parametrize("rows, labeled, launches", [(50, True, 2), (70, True, 2), (150, True, 4), (150, False, 2)])
def test_a_step_of_the_loss_is_few_launches(host, rows, labeled, launches):
    """One a direction for few rows, which are found among all or sorted by the same launch, or for one class."""
    for diag in (False, True):
        for problem in problems((rows, 40, 3 if labeled else 1, 2), torch.float32, diag, labeled=labeled):
            if problem.name in ("cem_fwd", "component_statistics_bwd"):
                run(host, problem)
                assert host.last_launches == (launches - 1 if problem.name == "cem_fwd" else 1)


@pytest.mark.parametrize("rows", [50, 70], ids=["searched", "sorted in turns"])
def test_calls_follow_each_other(host, rows):
    """Counters of finished blocks are ready for the next call, and for the one after that."""
    for problem in problems((rows, 33, 3, 3), torch.float32, True):
        first, *others = [run(host, problem) for _ in range(4)]
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True)), problem.name


@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
@pytest.mark.parametrize("shape", [(70, 65, 2, 9), (72, 5, 3, 2), (300, 5, 2, 3)], ids=str)
def test_blocks_that_run_at_the_same_time(program, shape, diag):
    """Some wait for others, or add up what others have written."""
    with Host(program, CUDA_HOST_PROCESSES="3") as host:
        for problem in problems(shape, torch.float32, diag):
            if problem.name not in library.FITS["cuda"]:
                agree(host, problem)


def blobs(classes, components, rows, dimension):
    """Rows about the components of every class but the last, which has none; and means a little off."""
    generator = torch.Generator().manual_seed(0)
    centers = 10 * torch.rand(classes, components, dimension, generator=generator)
    labels = torch.randint(max(1, classes - 1), (rows,), generator=generator)
    of = torch.randint(components, (rows,), generator=generator)
    x = centers[labels, of] + torch.randn(rows, dimension, generator=generator) * (0.2 + labels.unsqueeze(1))
    return x, centers + torch.randn(centers.shape, generator=generator), labels


@pytest.mark.parametrize("shape", [(3, 4, 200, 5), (1, 11, 150, 40)], ids=str)
def test_kmeans_until_every_class_rests(host, shape):
    x, means, labels = blobs(*shape)
    means[0, 1] = 1e3  # no row is near
    problem = Problem("kmeans", [x, means, labels, 60, 1e-4, True])
    agree(host, problem)
    *_, iterations, rests = run(host, problem)
    assert rests.all()
    assert 2 < iterations.max() < 60
    assert shape[0] == 1 or len(iterations.unique()) == shape[0]


@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
@pytest.mark.parametrize("shape", [(3, 3, 200, 5), (1, 70, 150, 6)], ids=str)
def test_em_until_every_class_rests(host, shape, diag):
    x, means, labels = (t.double() if t.is_floating_point() else t for t in blobs(*shape))
    variances = torch.ones_like(means) if diag else torch.ones_like(means[..., 0])
    weights = torch.full_like(means[..., 0], 1 / shape[1])
    problem = Problem("expectation_maximization", [x, means, variances, weights, labels, 60, 1e-2, 1e-2])
    agree(host, problem)
    *_, iterations, rests = run(host, problem)
    assert rests.all()
    assert 2 < iterations.max() < 60


@pytest.mark.parametrize("fit", ["kmeans", "expectation_maximization"])
def test_an_iteration_is_three_launches_and_no_wait(host, fit):
    x, means, labels = blobs(2, 3, 32, 5)
    spread = [torch.ones_like(means[..., 0]), torch.full_like(means[..., 0], 1 / 3)] if fit != "kmeans" else []
    launches, waits = [], []
    for iterations in (1, 2, 4, 8, 100):
        arguments = [x, means, *spread, labels, iterations, 0.0, *([False] if fit == "kmeans" else [1e-2])]
        run(host, Problem(fit, arguments))
        launches.append(host.last_launches)
        waits.append(host.last_waits)
    first = launches[0] - 3
    assert launches[:4] == [first + 3 * iterations for iterations in (1, 2, 4, 8)]
    # before it returns, for copies under way; and for a round while the next one runs
    assert waits[:4] == [2, 2, 2, 3]
    # the host stops at the end of a round after the one in which the last class came to rest
    if fit == "kmeans":
        assert launches[4] < first + 3 * 100


def test_the_order_of_blocks_changes_no_bit(host, program):
    with Host(program, CUDA_HOST_REVERSE="1") as reversed_host:
        cases = [*problems((130, 33, 3, 3), torch.float32, True), *problems((50, 33, 2, 3), torch.float32, True)]
        for problem in [*cases, *problems((130, 33, 1, 3), torch.float32, False, labeled=False)]:
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
