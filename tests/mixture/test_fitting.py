"""Fits of data in pieces: streams, later rows, gathered statistics, and shards of several processes."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import two_ranks
from support.blobs import blobs
from support.definitions import draw
from torch.utils._python_dispatch import TorchDispatchMode

import cem_fast
from cem_fast import CEMLoss, GaussianMixture
from cem_fast.mixture import fitting
from cem_fast.mixture import rows as row_chunks
from cem_fast.mixture.rows import Stream, draw_sample
from cem_fast.ops import reference, validate

OPS = torch.ops.cem_fast


def same_mixture(a, b, rtol=1e-10):
    for name in ("means", "variances", "weights", "class_prior", "counts"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("classes", [2, 12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_dimension", [False, True])
def test_compiled_kmeans_equals_the_reference(classes, dtype, per_dimension):
    if cem_fast.backends()["on CPU tensors"].startswith("reference"):
        pytest.skip("compares the compiled operator")
    x, labels, _, _ = blobs(rows=700, dimension=37, classes=classes, components=4, spread=2.0)
    x = x.to(dtype)
    means = torch.stack([x[labels == c][:4] for c in range(classes)]).to(torch.promote_types(dtype, torch.float32))
    means[1, 2] = 1e4  # no row is near: moves onto the farthest row
    got = OPS.kmeans(x, means, labels, 5, 1e-3, per_dimension)
    truth = cem_fast.ops.reference.kmeans(x.double(), means.double(), labels, 5, 1e-3, per_dimension)
    rtol = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-4}[dtype]
    for a, b in zip(got, truth):
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=rtol)
    assert (got[1] > 0).all()


@pytest.mark.parametrize("classes", [2, 9])
@pytest.mark.parametrize("max_iter", [1, 2, 3])
def test_kmeans_stops_after_the_iterations_asked_for(classes, max_iter):
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat(200)
    x = torch.randn(len(labels), 3, generator=g, dtype=torch.float64)
    means = torch.stack([x[labels == c][:6] for c in range(classes)])
    got = OPS.kmeans(x, means, labels, max_iter, 0.0, False)
    truth = reference.kmeans(x, means, labels, max_iter, 0.0, False)
    for a, b in zip(got, truth):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("components", [2, 7, 70])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_rows_skipped_by_their_bounds_get_the_nearest_component(components, dtype, offset):
    """One iteration searches all rows; later iterations search only rows whose bounds do not decide."""
    classes, rows = 10, 150
    g = torch.Generator().manual_seed(components)
    labels = torch.arange(classes).repeat(rows)
    x = torch.randn(classes * rows, 6, generator=g, dtype=torch.float64) * (1e-3 if offset else 1) + offset
    x[::5] = x[0]  # many equal rows, hence ties
    x = x.to(dtype)
    means = torch.stack([x[labels == c][:components] for c in range(classes)])
    at_once = OPS.kmeans(x, means, labels, 30, 0.0, False)
    for _ in range(30):
        means, counts, scatter, *_ = OPS.kmeans(x, means, labels, 1, 0.0, False)
    eps = torch.finfo(dtype).eps
    assert torch.equal(at_once[1], counts)
    torch.testing.assert_close(at_once[0], means, rtol=64 * eps, atol=64 * eps)
    torch.testing.assert_close(at_once[2], scatter, rtol=1e-3 if offset else 64 * eps, atol=64 * eps)
    assert (at_once[4] == 1).all()  # converged means do not move at all


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("far", [1e6, 1e10, 1e15])
def test_a_far_row_that_changes_its_component_costs_no_precision(far, dtype):
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(8).repeat(51)
    x = torch.randn(408, 4, generator=g, dtype=torch.float64)
    x[:8] = far
    x = x.to(dtype)
    means = torch.stack([x[labels == c][[1, 1, 2, 3]] for c in range(8)])  # the double one moves onto the far row
    means, counts, *_ = OPS.kmeans(x, means, labels, 50, 0.0, False)
    assignment = OPS.component_statistics_fwd(x, means, labels, None, None, False, False)[3]
    index = labels * 4 + assignment
    sums = torch.zeros(32, 4, dtype=torch.float64).index_add_(0, index, x.double()).view(8, 4, 4)
    assert torch.equal(counts.flatten(), torch.bincount(index, minlength=32).to(dtype))
    torch.testing.assert_close(means.double(), sums / counts.unsqueeze(-1).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("components", [3, 70])
@pytest.mark.parametrize("diag", [False, True])
def test_compiled_e_step_equals_the_reference(diag, components, dtype):
    if cem_fast.backends()["on CPU tensors"].startswith("reference"):
        pytest.skip("compares the compiled operator")
    x, labels, mixture = draw(300, 19, 4, components, diag=diag)
    x, parameters = x.to(dtype), [t.to(torch.promote_types(dtype, torch.float32)) for t in mixture]
    got = OPS.mixture_statistics(x, *parameters, labels)
    truth = cem_fast.ops.reference.mixture_statistics(x.double(), *(t.double() for t in parameters), labels)
    rtol = 1e-10 if dtype == torch.float64 else 1e-4
    for a, b in zip(got, truth):
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=rtol)
    labels[7] = -1
    assert all(t.isnan().all() for t in OPS.mixture_statistics(x, *parameters, labels))


def test_operators_of_the_fit_pass_opcheck_and_fold_under_vmap():
    x, labels, mixture = draw(30, 5, 3, 2, diag=True)
    batch = torch.stack([x, x + 1])
    for operator, *rest in (
        (OPS.kmeans.default, mixture.means, labels, 3, 0.0, False),
        (OPS.mixture_statistics.default, *mixture, labels),
    ):
        torch.library.opcheck(operator, (x, *rest))
        folded = torch.vmap(lambda rows, operator=operator, rest=rest: operator(rows, *rest))(batch)
        for index, rows in enumerate(batch):
            for a, b in zip(folded, operator(rows, *rest)):
                torch.testing.assert_close(a[index], b)


def test_kmeans_stops_for_each_class_separately():
    x, labels, _, _ = blobs(rows=900, classes=9, components=3, spread=1.5)
    together = GaussianMixture(num_components=3, num_classes=9, algorithm="kmeans", max_iter=40)
    together.init = torch.stack([x[labels == c][:3] for c in range(9)])
    together.fit(x, labels)
    for c in range(9):
        alone = GaussianMixture(num_components=3, algorithm="kmeans", max_iter=40, init=together.init[c : c + 1])
        alone.fit(x[labels == c])
        torch.testing.assert_close(alone.means[0], together.means[c], rtol=1e-5, atol=1e-6)
    iterations = OPS.kmeans(x, together.init, labels, 40, 1e-3, False)[3]
    assert len(set(iterations.tolist())) > 1


def test_bad_labels_poison_the_operator():
    x, labels, _, centers = blobs()
    labels[3] = 9
    means, counts, scatter, _, _ = OPS.kmeans(x, centers.contiguous(), labels, 3, 0.0, False)
    assert all(t.isnan().all() for t in (means, counts, scatter))


def batches_of(x, labels, size):
    return [(x[i : i + size], labels[i : i + size]) for i in range(0, len(x), size)]


@pytest.mark.parametrize("algorithm", ["kmeans", "em"])
@pytest.mark.parametrize("covariance_type", ["spherical", "diag"])
def test_a_stream_gives_the_fit_of_all_its_rows(algorithm, covariance_type):
    x, labels, _, centers = blobs(spread=1.0)
    x = x.double()
    options = dict(num_components=2, num_classes=3, algorithm=algorithm, covariance_type=covariance_type)
    start = centers.double() + 0.1
    whole = GaussianMixture(**options, init=start, max_iter=6, tol=0.0).fit(x, labels)
    for budget in (1 << 30, 2000):  # all rows fit; a small sample does
        streamed = GaussianMixture(**options, init=start, max_iter=6, tol=0.0).double()
        passes = []
        streamed.fit_stream(
            batches_of(x, labels, 64), memory_budget=budget, on_pass=lambda *seen, to=passes: to.append(seen)
        )
        assert passes[0] == (1, 600)
        assert (len(passes) > 1) == (budget == 2000)
        if algorithm == "kmeans" or budget > 2000:
            same_mixture(streamed, whole, rtol=1e-9)
        assert streamed.num_rows_ == 600
        assert streamed.counts.sum() == pytest.approx(600)


def test_a_sample_is_uniform_and_keeps_to_its_budget():
    x = torch.arange(9000, dtype=torch.float64).unsqueeze(1).expand(9000, 4)
    labels = (torch.arange(9000) % 10 == 0).long()  # 900 rows of class 1
    stream = Stream(lambda: iter(batches_of(x, labels, 500)))
    held, sizes, complete = draw_sample(stream, 2, 22_000, torch.Generator().manual_seed(0))
    assert not complete
    assert sizes.tolist() == [8100, 900]
    kept, of = (torch.cat(part) for part in zip(*(chunk[:2] for chunk in held)))
    assert kept.numel() * 8 + of.numel() * 8 <= 16_000
    for c in (0, 1):
        rows = kept[of == c][:, 0]
        assert len(rows) == 62  # a quarter of the budget; each row has features, a label and a random key: 44 bytes
        assert len(rows.unique()) == len(rows)
        assert rows.mean() == pytest.approx(4500, abs=900)


def test_a_stream_must_be_iterable_again_and_hold_rows():
    mixture = GaussianMixture(num_components=1)
    with pytest.raises(TypeError, match="batches must be iterable more than once .* got an iterator"):
        mixture.fit_stream(iter([(torch.rand(4, 2), None)]))
    with pytest.raises(TypeError, match="batches must be iterable more than once .* got NoneType"):
        mixture.fit_stream(None)
    with pytest.raises(ValueError, match="batches must agree in features, got 2 and then 3 of a row"):
        mixture.fit_stream([torch.rand(4, 2), torch.rand(4, 3)])
    sizes = iter(range(4, 100))

    class Growing:
        def __iter__(self):
            return iter([torch.rand(next(sizes), 2)])

    with pytest.raises(ValueError, match="batches must give the same rows in every iteration .* got 4 and then 5"):
        mixture.fit_stream(Growing(), memory_budget=1)
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        mixture.fit_stream([])


@pytest.mark.parametrize("covariance_type", ["spherical", "diag"])
def test_later_rows_update_a_single_gaussian_exactly(covariance_type):
    x = torch.randn(500, 4, dtype=torch.float64) * 3 + 100
    options = dict(num_components=1, covariance_type=covariance_type)
    whole = GaussianMixture(**options).fit(x)
    pieces = GaussianMixture(**options)
    for part in x.split([7, 200, 1, 292]):
        pieces.partial_fit(part)
    same_mixture(pieces, whole)
    assert pieces.num_rows_ == 500


@pytest.mark.parametrize("algorithm", ["kmeans", "em"])
def test_later_rows_may_bring_new_classes(algorithm):
    x, labels, _, centers = blobs(spread=0.05)
    mixture = GaussianMixture(num_components=2, num_classes=3, algorithm=algorithm)
    first = labels < 2
    mixture.fit(x[first], labels[first])
    assert mixture.class_prior[2] == 0
    for part, of in batches_of(x, labels, 100):
        mixture.partial_fit(part, of)
    assert torch.cdist(mixture.means, centers).min(2).values.max() < 0.05
    torch.testing.assert_close(mixture.weights.sum(1), torch.ones(3))
    assert mixture.num_rows_ == int(first.sum()) + 600


def test_gathered_statistics_make_one_iteration():
    x, labels, _, centers = blobs(spread=1.0)
    x = x.double()
    options = dict(num_components=2, num_classes=3, covariance_type="diag")
    for algorithm in ("kmeans", "em"):
        start = GaussianMixture(**options, algorithm=algorithm, init=centers.double(), max_iter=1, tol=0.0)
        start.fit(x, labels)
        given = {}
        if algorithm == "em":
            given = dict(init_variances=start.variances.clone(), init_weights=start.weights.clone())
        one = GaussianMixture(
            **options, algorithm=algorithm, init=start.means.clone(), max_iter=1, tol=0.0, **given
        ).fit(x, labels)
        for part, of in batches_of(x, labels, 50):
            start.gather(part, of)
        start.step()
        torch.testing.assert_close(start.means, one.means, rtol=1e-10, atol=1e-12)
        if algorithm == "em":
            torch.testing.assert_close(start.variances, one.variances, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(start.weights, one.weights, rtol=1e-10, atol=1e-12)
        with pytest.raises(RuntimeError, match="call gather"):
            start.step()


def test_loss_refits_from_gathered_features():
    x, labels, _, _ = blobs(spread=1.0)
    loss = CEMLoss(num_classes=3, num_components=2, noise_std=0.1)
    with pytest.raises(RuntimeError, match="not fitted"):
        loss.gather(x, labels)
    loss.fit(x, labels)
    before = loss.mixture.means.clone()
    loss.gather(x[:400] + 0.5, labels[:400])
    loss.refit()
    assert loss.num_samples == 400
    assert not torch.equal(before, loss.mixture.means)
    assert loss(x, labels).isfinite()


class Interrupted:
    """Batches that raise KeyboardInterrupt in a later pass."""

    def __init__(self, batches, passes):
        self.batches, self.passes = batches, passes

    def __iter__(self):
        self.passes -= 1
        yield self.batches[0]
        if self.passes < 0:
            raise KeyboardInterrupt
        yield from self.batches[1:]


def test_an_interrupted_fit_keeps_the_previous_mixture():
    x, labels, _, _ = blobs(spread=1.0)
    encoder = torch.nn.Sequential(torch.nn.BatchNorm1d(5), torch.nn.Dropout())
    encoder.train()[0].eval()
    loss = CEMLoss(num_classes=3, num_components=2)
    loss.fit_loader(encoder, batches_of(x, labels, 100))
    assert encoder.training
    assert encoder[1].training
    assert not encoder[0].training
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    seen = []
    with pytest.raises(KeyboardInterrupt):
        loss.fit_loader(
            encoder,
            Interrupted(batches_of(x + 1, labels, 100), passes=4),
            memory_budget=1000,
            on_pass=lambda *args: seen.append(args),
        )
    assert seen[0] == (1, 600)
    for name, value in loss.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert encoder[1].training


@pytest.mark.parametrize("magnitude", [1e-6, 1e4, 1e15])
@pytest.mark.parametrize("algorithm", ["kmeans", "em"])
def test_magnitudes(magnitude, algorithm):
    x, labels, _, centers = blobs(spread=0.05)
    mixture = GaussianMixture(num_components=2, num_classes=3, algorithm=algorithm, reg_covar=0.0)
    mixture.fit(x * magnitude, labels)
    assert torch.cdist(mixture.means / magnitude, centers).min(2).values.max() < 0.05
    assert mixture.score_samples(x * magnitude, labels).isfinite().all()


def test_magnitudes_whose_squares_overflow_are_refused():
    x, labels, _, _ = blobs()
    for algorithm in ("kmeans", "em"):
        with pytest.raises(ValueError, match="x must be small enough that squared distances are finite"):
            GaussianMixture(num_components=2, num_classes=3, algorithm=algorithm).fit(x * 1e37, labels)


@pytest.fixture(scope="module")
def folder_of_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    torch.multiprocessing.spawn(two_ranks.fit, (str(folder),), nprocs=2)
    return folder


@pytest.fixture
def shards(folder_of_shards):
    return [torch.load(folder_of_shards / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", range(len(two_ranks.WEIGHTED)))
def test_shards_take_sample_weights(folder_of_shards, case):
    weighted = [torch.load(folder_of_shards / f"weighted{rank}.pt", weights_only=True) for rank in (0, 1)]
    x, labels, mixture = two_ranks.fit_problem(None, *two_ranks.WEIGHTED[case])
    mixture.fit(x, labels, two_ranks.repeats_of(x))
    for name, value in weighted[0][case].items():
        assert torch.equal(value, weighted[1][case][name]), f"the ranks differ in {name}"
        torch.testing.assert_close(value, mixture.state_dict()[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", range(len(two_ranks.FITS)), ids=[str(c) for c in two_ranks.FITS])
def test_shards_give_the_fit_of_one_process(shards, case):
    sizes, algorithm, covariance_type, init = two_ranks.FITS[case]
    x, labels, mixture = two_ranks.fit_problem(None, sizes, algorithm, covariance_type, init)
    mixture.fit(x, labels)
    for name, value in shards[0][case].items():
        assert torch.equal(value, shards[1][case][name]), f"the ranks differ in {name}"
        torch.testing.assert_close(value, mixture.state_dict()[name], rtol=1e-10, atol=1e-12)


def test_step_with_a_rank_without_rows(shards):
    x, labels, mixture = two_ranks.fit_problem(None, *two_ranks.FITS[-1][:1], "em", "diag", "given")
    mixture.fit(x, labels)
    mixture.gather(x + 0.1, labels)
    for name, value in mixture.step().state_dict().items():
        assert torch.equal(shards[0][-1][name], shards[1][-1][name]), f"the ranks differ in {name}"
        torch.testing.assert_close(shards[0][-1][name], value, rtol=1e-10, atol=1e-12)


def test_launched_by_torchrun(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [*launch, "-m", "support.two_ranks", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(two_ranks.__file__).parents[1])}
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    x, labels, alone = two_ranks.fit_problem(None, (200, 100), "em", "diag", "k-means++")
    alone.fit(x, labels)
    ranks = [GaussianMixture.load(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1)]
    for name, value in alone.state_dict().items():
        assert torch.equal(ranks[0].state_dict()[name], ranks[1].state_dict()[name])
        torch.testing.assert_close(ranks[0].state_dict()[name], value, rtol=1e-10, atol=1e-12)


def test_a_rank_that_ends_is_reported(tmp_path):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [context.Process(target=two_ranks.lose_a_rank, args=(r, str(tmp_path), answers)) for r in (0, 1)]
    for process in ranks:
        process.start()
    message = answers.get(timeout=60)
    for process in ranks:
        process.join(30)
    assert "rank 0 of 2 cannot sum its statistics with the others: a rank has ended" in message


@pytest.mark.parametrize("rows", [1, 1023, 1024, 5000])
def test_sums_on_a_gpu_are_those_of_the_cpu(rows):
    values, labels = torch.rand(rows, dtype=torch.float64), torch.randint(7, (rows,))
    torch.testing.assert_close(row_chunks.blocked_running_sum(values), values.cumsum(0))
    totals = row_chunks.ordered_totals(values, labels, 9)
    torch.testing.assert_close(totals, torch.zeros(9, dtype=torch.float64).index_add_(0, labels, values))
    labels[0] = 9
    assert row_chunks.ordered_totals(values, labels, 9).isnan().any()


class NoWait(TorchDispatchMode):
    """Fails where the host would wait for a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "bincount", "is_nonzero", "equal")
        assert function.overloadpacket.__name__ not in waits
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("algorithm", ["kmeans", "em"])
def test_gathering_on_a_gpu_waits_for_nothing_and_a_step_reports_labels(algorithm, monkeypatch):
    x, labels = torch.rand(40, 3), torch.arange(40) % 2
    mixture = GaussianMixture(num_components=2, num_classes=2, algorithm=algorithm, covariance_type="diag").fit(
        x, labels
    )
    monkeypatch.setattr(validate, "is_readable", lambda value: False)
    with NoWait():
        mixture.gather(x, labels)
    mixture.step()
    monkeypatch.setattr(fitting, "_MIXTURE_STATISTICS", reference.mixture_statistics)  # as on a GPU
    mixture.gather(x, labels + (torch.arange(40) == 7) * 2)
    wanted = (
        "gathered labels must lie in .0, 2.*" if algorithm == "kmeans" else "gathered rows must be finite, .* labels"
    )
    with pytest.raises(ValueError, match=wanted):
        mixture.step()


def test_a_stream_on_a_gpu_waits_once_a_pass_and_reports_labels(monkeypatch):
    batches = [(torch.rand(20, 3), torch.arange(20) % 2) for _ in range(3)]
    monkeypatch.setattr(validate, "is_readable", lambda value: False)
    monkeypatch.setattr(row_chunks, "class_totals", row_chunks.ordered_totals)
    whole = GaussianMixture(num_components=2, num_classes=2)
    waits = []

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            waits.append(function.overloadpacket.__name__ == "_local_scalar_dense")
            return function(*args, **(kwargs or {}))

    with Counted():
        stream = Stream(lambda: (whole._rows(*batch, wait=False) for batch in batches))
        _, sizes, complete = draw_sample(stream, 2, 1 << 20, None)
    assert complete
    assert sizes.tolist() == [30, 30]
    assert sum(waits) == 1
    batches[1][1][3] = 2
    with pytest.raises(ValueError, match="labels must lie in .0, 2., got others in a batch"):
        whole.fit_stream(batches)
