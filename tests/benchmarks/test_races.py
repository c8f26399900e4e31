"""Comparisons on tiny shapes: correct contenders are timed; wrong, missing and failing ones become rows with a reason."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cem_fast.benchmarks import cases, machine, peers, released, startup, streams, suite, training
from cem_fast.benchmarks.cases import Case, Problem
from cem_fast.benchmarks.peers import OURS, Differentiable, Fit, Operators, Peer, plain_torch
from cem_fast.benchmarks.table import FAILED, MISSING, OK, SKIPPED, WRONG

from cem_fast.ops.library import OPERATORS

CPU = torch.device("cpu")
TINY = [
    Case("operations", "cem_official", 70, 9, 4, 3),
    Case("operations", "cem_paper", 70, 9, 4, 3),
    Case("operations", "cem_paper", 70, 9, 4, 3, "diag"),
    Case("operations", "mixture_log_prob", 70, 9, 4, 3, "diag"),
    Case("operations", "mixture_log_prob", 70, 9, 4, 3),
    Case("operations", "mixture_log_prob", 70, 9, 1, 20, "diag"),
    Case("operations", "component_statistics", 70, 9, 4, 3),
    Case("operations", "cem_paper", 70, 9, 4, 3, dtype="bfloat16", peers=cases.VECTORIZED),
    Case("fitting", "kmeans", 400, 9, 1, 3),
    Case("fitting", "kmeans", 400, 9, 4, 3),
    Case("fitting", "seeding", 400, 9, 1, 3),
    Case("fitting", "seeding", 400, 9, 4, 3),
    Case("fitting", "em", 400, 9, 1, 3, "spherical"),
    Case("fitting", "em", 400, 9, 4, 3, "tied", dtype="float64"),
    Case("fitting", "em", 400, 9, 4, 3, "full", dtype="float64"),
    Case("fitting", "em", 400, 9, 1, 3, "diag"),
    Case("fitting", "em", 400, 9, 4, 3, "diag"),
]
COMPILES = ("torch.compile", "pykeops")  # takes many seconds

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of third-party packages


@pytest.fixture(autouse=True)
def one_thread():
    with machine.pinned(1):
        yield


@pytest.fixture
def without_compilers(monkeypatch):
    monkeypatch.setattr(peers, "PEERS", [peer for peer in peers.PEERS if peer.name not in COMPILES])


def contend(monkeypatch, **builds):
    """Limits the peers to cem_fast and the given adapters."""
    others = [Peer(name, build, cases.OPERATIONS) for name, build in builds.items()]
    monkeypatch.setattr(peers, "PEERS", [peers.PEERS[0], *others])


@pytest.mark.parametrize("case", TINY, ids=lambda case: f"{case.op}-{case.covariance}-{case.C}-{case.dtype}")
def test_installed_contenders_are_correct(case, without_compilers):
    rows = suite.measure(case, CPU, budget_s=0, gflop_s=100.0)
    assert {row.status for row in rows} <= {OK, MISSING, SKIPPED}
    ours = [row for row in rows if row.contender == OURS]
    assert [row.direction for row in ours] == list(case.directions)
    for row in rows:
        if row.status == OK and row.direction != "copy":
            assert row.error <= row.allowed
            assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
            assert row.first_ms > 0
            assert row.share > 0
            assert row.bound in ("memory", "arithmetic")
    assert any(row.contender == suite.YARDSTICK for row in rows)


@pytest.mark.long
def test_torch_compile_is_correct_and_compiles_in_its_first_call(monkeypatch):
    monkeypatch.setattr(peers, "PEERS", [peer for peer in peers.PEERS if peer.name == "torch.compile"])
    case = Case("operations", "component_statistics", 70, 9, 4, 3)
    rows = [row for row in suite.measure(case, CPU, budget_s=0) if row.contender == "torch.compile"]
    assert [row.status for row in rows] == [OK] * 3, rows
    assert all(row.first_ms > 20 * row.p50_ms for row in rows)


def test_the_released_loop_equals_the_operation():
    """The operation itself is tested against float64 definitions elsewhere."""
    problem = Problem(TINY[0], CPU)
    (x, labels), mixture = problem.sets[0], (problem.means, problem.variances, problem.weights)
    value = released.loss(x, labels, *mixture, float(problem.num_samples), cases.NOISE_STD)
    assert float(value) == pytest.approx(float(problem.truth["value"]), rel=1e-5)
    means, variances, weights = released.fit(x, labels, problem.means)
    assert torch.allclose(weights.sum(1), torch.ones(4))
    for c in range(4):
        rows = x[labels == c]
        nearest = torch.cdist(rows, means[c]).argmin(1)
        for k in nearest.unique().tolist():
            assert torch.allclose(means[c, k], rows[nearest == k].mean(0), atol=1e-5)
            assert float(variances[c, k]) == pytest.approx(
                float((rows[nearest == k] - means[c, k]).square().mean()), rel=1e-4
            )


@pytest.mark.parametrize("fault", ["value", "gradient", "nan", "shape"])
def test_wrong_results_are_red_and_never_timed(fault, monkeypatch, capsys):
    case, ran = TINY[5], []

    def wrong(problem):
        right = plain_torch.eager(problem).function

        def function(x, labels):
            ran.append(fault)
            value = right(x, labels)
            if fault == "gradient":
                return value + 0.01 * (x - x.detach()).sum()
            return {"value": 1.01 * value, "nan": value * float("nan"), "shape": value.sum()[None].expand(3)}[fault]

        built = Differentiable(problem, function)
        if fault == "shape":
            built.backward = lambda _: None
            built.results = lambda: {"value": built.output}
        return built

    contend(monkeypatch, wrong=wrong, eager=plain_torch.eager)
    rows = {row.contender: row for row in suite.measure(case, CPU, budget_s=0)}
    assert rows["wrong"].status == WRONG
    assert rows["wrong"].p50_ms is None
    assert "off by" in rows["wrong"].note
    assert len(ran) == 1  # the check, no timing
    assert rows["eager"].status == rows[OURS].status == OK
    line, red = next((line, red) for line, red in suite._lines(list(rows.values())) if "wrong" in line)
    assert red
    assert "WRONG" in line


ITERATED = [case for case in TINY if case.op in ("kmeans", "em")]


@pytest.mark.parametrize("case", ITERATED, ids=lambda case: f"{case.op}-{case.covariance}-{case.C}")
def test_a_fit_with_fewer_iterations_is_wrong(case, monkeypatch):
    monkeypatch.setattr(peers.ours, "ITERATIONS", cases.ITERATIONS - 1)
    problem = Problem(case, CPU)
    fit = peers.ours.public_interface(problem)
    fit.run(0)
    assert problem.error(fit.results()) > case.allowed


def test_a_seeding_of_one_row_again_and_again_is_wrong():
    problem = Problem(Case("fitting", "seeding", 400, 9, 4, 3), CPU)
    x, labels = problem.sets[0]
    first = torch.stack([x[labels == c][:1].expand(3, -1) for c in range(4)])
    fit = Fit(problem, lambda: None, lambda _: (first,))
    fit.run(0)
    assert problem.error(fit.results()) > problem.case.allowed


def test_missing_failing_and_skipped_contenders_become_rows(monkeypatch):
    def missing(_):
        raise ImportError("No module named 'fast_mixtures'")

    def failing(_):
        raise RuntimeError("\nno kernel\nat line 3")

    def failing_later(problem):
        return Differentiable(problem, lambda x, labels: failing(x))

    def skipped(_):
        raise peers.Skipped("needs intermediates of 9 GiB")

    def failing_in_the_third_call(problem):
        calls, right = iter(range(100)), plain_torch.eager(problem).function
        return Differentiable(problem, lambda x, labels: right(x, labels) if next(calls) < 2 else failing(x))

    contend(monkeypatch, a=missing, b=failing, c=failing_later, d=skipped, e=failing_in_the_third_call)
    rows = {row.contender: row for row in suite.measure(TINY[0], CPU, budget_s=0)}
    assert (rows["a"].status, rows["a"].note) == (MISSING, "No module named 'fast_mixtures'")
    assert (rows["b"].status, rows["b"].note) == (FAILED, "RuntimeError: no kernel")
    assert (rows["c"].status, rows["c"].note) == (FAILED, "RuntimeError: no kernel")
    assert (rows["e"].status, rows["e"].note) == (FAILED, "RuntimeError: no kernel")
    assert (rows["d"].status, rows["d"].note) == (SKIPPED, "needs intermediates of 9 GiB")
    assert all(rows[name].p50_ms is None for name in "abcde")


def test_cases_with_large_intermediates_are_skipped():
    case = replace(TINY[5], N=100_000, D=1_000, K=100)

    class Sized:
        def __init__(self):
            self.case = case

    for build in (plain_torch.eager, plain_torch.mixture_same_family):
        with pytest.raises(peers.Skipped, match="needs intermediates of 37.3 GiB"):
            build(Sized())


def test_peers_on_a_gpu_include_each_set_of_kernels():
    cuda = torch.device("cuda")
    names = [peer.name for peer in peers.of(TINY[0], cuda)]
    assert names[:3] == [OURS, "cem_fast, Triton operators", "cem_fast, CUDA C++ operators"]
    assert {"torch eager", "torch.compile", "segmented GEMM", "released loop"} <= set(names)
    fits = [peer.name for peer in peers.of(TINY[8], cuda)]
    assert "flash-kmeans" in fits
    assert not {"scikit-learn", "faiss"} & set(fits)


@pytest.mark.parametrize("case", TINY[:8], ids=lambda case: f"{case.op}-{case.covariance}-{case.C}-{case.dtype}")
def test_operators_without_autograd_are_correct(case):
    problem = Problem(case, CPU)
    built = Operators(problem, OPERATORS)
    for direction in built.directions:
        built.prepare(direction)(0)
        built.call(direction)(0)
        assert problem.error(built.results()) <= case.allowed, direction


def test_cuda_operators_that_are_not_built_are_missing(monkeypatch):
    def not_built():
        raise OSError("the compiled CUDA kernels are not built: no CUDA toolkit")

    monkeypatch.setattr(peers.ours.backend, "cuda_operators", not_built)
    contend(monkeypatch, cuda=peers.ours.cuda_operators)
    rows = {row.contender: row for row in suite.measure(TINY[6], CPU, budget_s=0)}
    assert (rows["cuda"].status, rows["cuda"].note) == (
        MISSING,
        "the compiled CUDA kernels are not built: no CUDA toolkit",
    )


INTERPRETED = """
import warnings; warnings.simplefilter("ignore")
import torch
from cem_fast.benchmarks import cases, fma_triton, peers, suite
from cem_fast.benchmarks.cases import Case
peers.PEERS = [peers.PEERS[0], peers.Peer("cem_fast, Triton operators", peers.ours.triton_operators, cases.OPERATIONS)]
shapes = [("cem_official", 4, 3, "spherical"), ("cem_paper", 4, 3, "diag"), ("mixture_log_prob", 4, 3, "diag"),
          ("mixture_log_prob", 1, 3, "spherical"), ("component_statistics", 4, 3, "spherical"), ("kmeans", 4, 3, "spherical")]
for op, C, K, covariance in shapes:
    for row in suite.measure(Case("operations", op, 24, 9, C, K, covariance), torch.device("cpu"), budget_s=0):
        print(row.op, "|", row.contender, "|", row.status, "|", row.p50_ms, row.first_ms, "|", row.error)
out = torch.empty(2 * fma_triton.BLOCK)
fma_triton.fma_kernel[(2,)](out, 3, fma_triton.BLOCK)
x = torch.arange(fma_triton.BLOCK) / fma_triton.BLOCK
chains = [x + k for k in range(fma_triton.CHAINS)]
for _ in range(3):
    chains = [chain * (0.5 + x / 4) + 1 for chain in chains]
print("fma", torch.allclose(out, sum(chains).repeat(2), rtol=1e-5))
"""


def test_the_gpu_path_runs_in_tritons_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CEM_FAST_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    *lines, fma = done.stdout.strip().splitlines()
    assert fma == "fma True"
    ours = [line.split(" | ") for line in lines if "| cem_fast" in line]
    assert len(ours) == 6 + 5
    for _, _, status, times, error in ours:
        assert status == "interpreted"
        assert times == "None None"
        assert float(error) < 1e-3


def test_training_is_timed_with_and_without_cem(monkeypatch):
    monkeypatch.setattr(training, "BATCH", 20)
    monkeypatch.setattr(training, "IMAGES", {True: 40})
    monkeypatch.setattr(training, "REFITS", 1)
    monkeypatch.setattr(released, "ITERATIONS", 1)
    found = {(row.contender, row.direction): row for row in training.measure(CPU, quick=True)}
    assert set(found) == {
        *((name, training.STEP) for name in (training.PLAIN, training.OURS, training.RELEASED)),
        *((name, training.ADDED) for name in (training.OURS, training.RELEASED)),
        *((name, training.REFIT) for name in (training.OURS, training.RELEASED)),
        (training.OURS, training.REFIT_OWN_PASS),
    }
    assert found[training.PLAIN, training.STEP].rounds == 2  # the first batch warms up


def test_the_released_loop_trains_with_the_sum_of_both_gradients():
    """Two backward passes with kept encoder gradients equal one backward of the sum."""
    torch.manual_seed(0)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = torch.nn.Linear(6, 4), torch.nn.Linear(4, 3)

    x, y = torch.rand(5, 6), torch.randint(3, (5,))
    one, two = Network(), Network()
    two.load_state_dict(one.state_dict())

    def penalty(features, _):
        return features.square().sum()

    for name, network in ((training.OURS, one), (training.RELEASED, two)):
        torch.manual_seed(1)
        training._Step(name, network).run(x, y, penalty)
    for a, b in zip(one.parameters(), two.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


def test_refits_are_timed_and_the_memory_of_streams_is_measured(monkeypatch):
    monkeypatch.setattr(streams, "EPOCH", {True: (200, 6)})
    monkeypatch.setattr(streams, "BATCH", 500)
    monkeypatch.setattr(streams, "BATCHES", {True: (1, 3)})
    refit, *of_streams = streams.measure(CPU, quick=True)
    assert (refit.op, refit.N, refit.D, refit.rounds) == ("refit", 200, 6, streams.REFITS[True])
    assert [row.N for row in of_streams] == [500, 1_500]
    assert all(row.peak_mib is None or row.peak_mib >= 0 for row in of_streams)


def test_startup_is_timed_in_new_processes(monkeypatch):
    monkeypatch.setattr(startup, "PROCESSES", {True: 1})
    rows = startup.measure("cpu", quick=True)
    assert [row.contender for row in rows] == list(startup.STAGES)
    assert all(row.p50_ms > 0 for row in rows)
    monkeypatch.setattr(startup, "PROGRAM", "raise SystemExit('no such device')")
    with pytest.raises(RuntimeError, match="a new process failed: no such device"):
        startup.measure("cpu", quick=True)


def test_quick_and_full_have_the_same_groups_and_three_decades():
    for name, group in cases.GROUPS.items():
        full, quick = list(group(False)), list(group(True))
        assert {case.op for case in quick} <= {case.op for case in full}
        for axis in "NDCK":
            if name != "operations":
                sizes = [getattr(case, axis) for case in full if case.axis == axis]
                assert max(sizes) >= 1_000 * min(sizes)
