"""Every operator of both GPU backends against the float64 reference, on a CUDA device.

Where Triton interprets its kernels (``TRITON_INTERPRET=1``), theirs run on the CPU, on the smallest shapes.
"""

import importlib
import importlib.util
import os
import warnings

import pytest
import torch
from cuda_host.problems import SHAPES, expected
from cuda_host.problems import problems as problems_on
from support.tolerances import RELATIVE, relative_error

from cem_fast.ops import backend, library

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
ON_GPU = DEVICE == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="there is no CUDA device"),
]
LARGE = [(4099, 515, 10, 5), (130, 16384, 3, 2), (3000, 70, 1, 300), (20_000, 65, 30, 3)]
# Responsibilities, and what follows from them, are exponentials of log-densities: 16,384 dimensions add up to some 1e4 nats, of which
# float32 holds 1e-3. Relative to the norm of all responsibilities that was seen to be 6e-5 (torch's own float32: 3e-5).
NATS = {(130, 16384, 3, 2): {"mixture_log_prob_fwd": 2e-4, "mixture_log_prob_bwd": 2e-4, "mixture_moments": 2e-4}}
LABELED = SHAPES + LARGE if ON_GPU else SHAPES[:2]
# one class without labels; the larger ones by matrix products
GLOBAL = [(7, 31, 1, 34), (40, 64, 1, 130), *([(3000, 512, 1, 1000)] if ON_GPU else [])]


@pytest.fixture(params=["cuda", "triton"])
def operators(request):
    if request.param == "triton":
        if importlib.util.find_spec("triton") is None:
            pytest.skip("triton is not installed")
        triton = importlib.import_module("cem_fast.kernels.operators").OPERATORS
        assert set(triton) == set(library.EVERYWHERE)
        return triton
    if not ON_GPU:
        pytest.skip("only Triton's kernels are interpreted")
    try:
        compiled = backend.cuda_operators()
    except OSError as error:
        pytest.skip(str(error))
    assert set(compiled) == set(library.ON_CUDA)
    return compiled


def problems(operators, *arguments, **options):
    """Problems for these operators on the device, where their references take seconds instead of minutes."""
    return [p for p in problems_on(*arguments, device=DEVICE, **options) if p.name in operators]


def run(operators, problem):
    arguments = [on_device(a) for a in problem.arguments]
    results = operators[problem.name](*arguments)
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)


def on_device(argument):
    return argument.to(DEVICE) if isinstance(argument, torch.Tensor) else argument


def agree(operators, problem, shape=None):
    results, again = run(operators, problem), run(operators, problem)
    nats = NATS.get(shape, {}).get(problem.name, 0) if problem.arguments[0].dtype != torch.float64 else 0
    for found, repeated, wanted in zip(results, again, expected(problem), strict=True):
        assert found.device.type == DEVICE
        assert torch.equal(found.nan_to_num(), repeated.nan_to_num()), f"{problem.name}: other bits on another run"
        found, wanted = found.cpu(), wanted.cpu()
        if not wanted.is_floating_point():
            assert torch.equal(found, wanted), problem.name
            continue
        assert torch.equal(found.isnan(), wanted.isnan()), problem.name
        allowed = nats + 2 * RELATIVE[found.dtype]
        assert relative_error(found.nan_to_num(), wanted.nan_to_num()) <= allowed, problem.name


@pytest.mark.parametrize("dtype", list(RELATIVE), ids=str)
@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
@pytest.mark.parametrize("shape", LABELED, ids=str)
def test_every_operator(operators, shape, diag, dtype):
    for problem in problems(operators, shape, dtype, diag):
        agree(operators, problem, shape)


@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
def test_labels_out_of_range(operators, diag):
    for problem in problems(operators, SHAPES[1], torch.float32, diag, bad_labels=True):
        agree(operators, problem)


@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
@pytest.mark.parametrize("shape", GLOBAL, ids=str)
def test_one_class_without_labels(operators, shape, diag):
    for problem in problems(operators, shape, torch.float32, diag, labeled=False):
        agree(operators, problem)


@pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device")
@pytest.mark.parametrize("rows", [130, 8300], ids=["searched", "sorted"])
def test_a_step_of_the_loss_in_a_cuda_graph(operators, rows):
    step = of(operators, "cem_fwd", rows)
    arguments = [a.cuda() if isinstance(a, torch.Tensor) else a for a in step.arguments]
    x, means, labels = arguments[:3]

    def run_step():
        value, slope, assignment = operators["cem_fwd"](*arguments)
        return value, operators["component_statistics_bwd"](slope, torch.ones_like(value), x, means, labels, assignment)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run_step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_step()
    x.copy_(x.flip(0))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run_step()))


def of(operators, name, rows=130):
    return next(p for p in problems(operators, (rows, 33, 3, 3), torch.float32, True) if p.name == name)


@pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device")
def test_sorts_on_several_streams_keep_apart(operators):
    """Blocks of a sort share out its rows; those of another call, which runs at the same time, must not take part."""
    step = of(operators, "cem_fwd", 8300)
    arguments = [a.cuda() if isinstance(a, torch.Tensor) else a for a in step.arguments]
    wanted = operators["cem_fwd"](*arguments)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = []
    for i in range(40):
        with torch.cuda.stream(streams[i % 4]):
            found.append(operators["cem_fwd"](*arguments))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for results in found for a, b in zip(results, wanted, strict=True))


@pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device")
def test_on_the_current_stream(operators):
    """The features arrive late, on a stream of their own; on any other, the kernels would not wait for them."""
    problem = of(operators, "component_statistics_fwd")
    x, *rest = [a.cuda() if isinstance(a, torch.Tensor) else a for a in problem.arguments]
    operators[problem.name](x, *rest)
    late = torch.full_like(x, torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        results = operators[problem.name](late, *rest)
    torch.cuda.synchronize()
    for found, wanted in zip(results, expected(problem), strict=True):
        assert relative_error(found, wanted) <= 2 * RELATIVE[torch.float32]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices")
def test_on_a_device_that_is_not_the_current_one(operators):
    for problem in problems(operators, SHAPES[2], torch.float32, True):
        arguments = [a.to("cuda:1") if isinstance(a, torch.Tensor) else a for a in problem.arguments]
        with torch.cuda.device(0):
            results = operators[problem.name](*arguments)
            assert torch.cuda.current_device() == 0
        for found, wanted in zip((results,) if isinstance(results, torch.Tensor) else results, expected(problem)):
            assert found.device == torch.device("cuda:1")
            assert relative_error(found.cpu().nan_to_num(), wanted.nan_to_num()) <= 2 * RELATIVE[torch.float32]


@pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device")
def test_a_step_of_the_loss_never_waits_for_the_device(operators):
    step = of(operators, "cem_fwd")
    arguments = [a.cuda() if isinstance(a, torch.Tensor) else a for a in step.arguments]
    operators["cem_fwd"](*arguments)  # compiled
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*prototype feature")
            torch.cuda.set_sync_debug_mode("error")
        value, slope, assignment = operators["cem_fwd"](*arguments)
        x, means, labels = arguments[:3]
        operators["component_statistics_bwd"](slope, torch.ones_like(value), x, means, labels, assignment)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device")
@pytest.mark.parametrize("name", ["component_statistics_fwd", "component_statistics_bwd", "mixture_log_prob_fwd"])
def test_rows_that_lie_further_apart_than_32_bits_reach(operators, name, monkeypatch):
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("6 GiB of memory are not free on the device")
    apart = 2**30
    problem = next(p for p in problems(operators, (3, 5, 1, 2), torch.bfloat16, True) if p.name == name)
    place = next(
        i for i, a in enumerate(problem.arguments) if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16
    )
    x = problem.arguments[place]
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    far = torch.empty(2 * apart + 5, dtype=x.dtype, device="cuda").as_strided(x.shape, (apart, 1)).copy_(x)
    there = [*problem.arguments[:place], far, *problem.arguments[place + 1 :]]
    for one, other in zip(run(operators, problem), run(operators, problem._replace(arguments=there)), strict=True):
        assert torch.equal(one, other)
