"""KMeans: scikit-learn's meanings, directions, many classes, streams, arrays."""

import copy

import numpy as np
import pytest
import torch
from support.blobs import blobs

from cem_fast import GaussianMixture, KMeans

sklearn = pytest.importorskip("sklearn.cluster")


def rows(n=500, dimension=5, clusters=4, seed=0):
    x, _, component, centers = blobs(n, dimension, 1, clusters, spread=0.8, seed=seed)
    return x.double(), component, centers[0].double() + 0.3


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_means_the_same_as_in_scikit_learn(dtype, weighted):
    x, _, start = rows()
    x, start = x.to(dtype), start.to(dtype)
    weight = torch.rand(len(x), generator=torch.Generator().manual_seed(1)) + 0.1 if weighted else None
    ours = KMeans(num_clusters=4, init=start, max_iter=50, tol=0.0).fit(x, sample_weight=weight)
    options = dict(init=start.numpy(), n_init=1, max_iter=50, tol=0.0, algorithm="lloyd")
    theirs = sklearn.KMeans(4, **options).fit(x.numpy(), sample_weight=None if weight is None else weight.numpy())
    close = dict(rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-5)
    torch.testing.assert_close(ours.cluster_centers_, torch.from_numpy(theirs.cluster_centers_), **close)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-5)
    assert ours.predict(x).tolist() == theirs.labels_.tolist()
    torch.testing.assert_close(ours.transform(x), torch.from_numpy(theirs.transform(x.numpy())), **close)
    weight = None if weight is None else weight.to(dtype)
    assert ours.score(x, sample_weight=weight) == pytest.approx(-ours.inertia_, rel=1e-5)


def test_a_looser_tolerance_stops_as_early_as_in_scikit_learn():
    x, _, start = rows(seed=3)
    for tol in (1.0, 1e-1, 1e-2):
        ours = KMeans(num_clusters=4, init=start + 1, tol=tol).fit(x)
        theirs = sklearn.KMeans(4, init=(start + 1).numpy(), n_init=1, tol=tol, algorithm="lloyd").fit(x.numpy())
        assert ours.n_iter_ == theirs.n_iter_


def test_restarts_keep_the_lowest_inertia():
    x, _, _ = rows(clusters=8)
    for init in ("random", "k-means++"):
        one, many = (
            KMeans(num_clusters=8, init=init, num_init=n, generator=torch.Generator().manual_seed(0)).fit(x)
            for n in (1, 8)
        )
        assert many.inertia_ <= one.inertia_
        assert many.inertia_ == pytest.approx(-many.score(x))


def test_seeding_is_as_good_as_in_scikit_learn():
    x, _, _ = rows(n=1000, clusters=10)
    ours = [KMeans(num_clusters=10, generator=torch.Generator().manual_seed(i)).fit(x).inertia_ for i in range(10)]
    theirs = [sklearn.KMeans(10, n_init=1, random_state=i).fit(x.numpy()).inertia_ for i in range(10)]
    assert np.median(ours) < 1.1 * np.median(theirs)


def test_ties_go_to_the_lowest_index():
    start = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    kmeans = KMeans(num_clusters=3, init=start, max_iter=1).fit(start)
    assert kmeans.predict(torch.zeros(5, 2)).tolist() == [0] * 5


def test_an_empty_cluster_moves_onto_the_farthest_row():
    x = torch.tensor([[0.0], [0.5], [10.0], [10.5], [30.0]])
    ours = KMeans(num_clusters=3, init=torch.tensor([[0.0], [10.0], [-1000.0]]), tol=0.0).fit(x)
    assert ours.cluster_centers_.flatten().sort().values.tolist() == [0.25, 10.25, 30.0]
    assert ours.inertia_ == 0.25


def test_fewer_distinct_rows_than_clusters():
    x = torch.tensor([[1.0], [2.0]]).repeat(5, 1)
    with pytest.warns(UserWarning, match="fewer distinct rows"):
        kmeans = KMeans(num_clusters=3).fit(x)
    assert kmeans.inertia_ == 0
    assert len(kmeans.predict(x).unique()) == 2


def test_many_classes_are_fits_of_their_own():
    x, labels, _, centers = blobs(spread=1.0)
    x, start = x.double(), centers.double() + 0.1
    weight = torch.rand(len(x), generator=torch.Generator().manual_seed(0)).double()
    for w in (None, weight):
        together = KMeans(num_clusters=2, num_classes=3, init=start, max_iter=20).fit(x, labels, w)
        assert together.cluster_centers_.shape == (3, 2, 5)
        inertia = 0.0
        for c in range(3):
            own = labels == c
            alone = KMeans(num_clusters=2, init=start[c], max_iter=20).fit(
                x[own], sample_weight=w if w is None else w[own]
            )
            torch.testing.assert_close(together.cluster_centers_[c], alone.cluster_centers_)
            assert torch.equal(together.predict(x, labels)[own], alone.predict(x[own]))
            torch.testing.assert_close(together.transform(x, labels)[own], alone.transform(x[own]))
            inertia += alone.inertia_
        assert together.inertia_ == pytest.approx(inertia)
        assert together.score(x, labels, w) == pytest.approx(-inertia)
    joint = together.transform(x)
    assert joint.shape == (len(x), 6)
    assert torch.equal(joint.argmin(1), together.predict(x))


def test_cosine_is_k_means_on_directions():
    x, _, start = rows()
    unit = torch.nn.functional.normalize(x, dim=1)
    scale = torch.rand(len(x), 1, generator=torch.Generator().manual_seed(0)).double() + 0.1
    ours = KMeans(num_clusters=4, metric="cosine", init=start * 7, max_iter=30, tol=0.0).fit(x)
    scaled = KMeans(num_clusters=4, metric="cosine", init=start, max_iter=30, tol=0.0).fit(x * scale)
    torch.testing.assert_close(ours.cluster_centers_, scaled.cluster_centers_)
    assert torch.equal(ours.predict(x), scaled.predict(x * scale))
    torch.testing.assert_close(ours.cluster_centers_.norm(dim=1), torch.ones(4).double())
    torch.testing.assert_close(ours.transform(x), 1 - unit @ ours.cluster_centers_.T, rtol=1e-7, atol=1e-9)
    own = torch.stack([unit[ours.predict(x) == k].sum(0) for k in range(4)])
    torch.testing.assert_close(ours.cluster_centers_, torch.nn.functional.normalize(own, dim=1))
    assert ours.inertia_ == pytest.approx(float(ours.transform(x).min(1).values.sum()))
    assert ours.score(x) == pytest.approx(-ours.inertia_)
    huge = KMeans(num_clusters=4, metric="cosine", init=start.float(), max_iter=30, tol=0.0).fit(x.float() * 1e30)
    torch.testing.assert_close(huge.cluster_centers_, ours.cluster_centers_.float(), rtol=1e-4, atol=1e-4)


def test_opposite_directions_leave_a_center_in_place():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    kmeans = KMeans(num_clusters=1, metric="cosine", init=torch.tensor([[0.0, 2.0]])).fit(x)
    assert kmeans.cluster_centers_.tolist() == [[0.0, 1.0]]
    assert kmeans.inertia_ == 2.0
    assert kmeans.predict(torch.zeros(1, 2)).tolist() == [0]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_streams_and_later_rows(metric):
    x, _, start = rows()
    options = dict(num_clusters=4, metric=metric, init=start, max_iter=10, tol=0.0)
    whole = KMeans(**options).fit(x)
    for budget in (1 << 30, 3000):
        streamed = KMeans(**options).double().fit_stream(list(x.split(80)), memory_budget=budget)
        torch.testing.assert_close(streamed.cluster_centers_, whole.cluster_centers_)
        assert streamed.inertia_ == pytest.approx(whole.inertia_)
    with pytest.raises(TypeError, match="batches must be iterable more than once"):
        KMeans(**options).fit_stream(iter([x]))
    one = KMeans(num_clusters=1, metric=metric)
    for part in x.split(100):
        one.partial_fit(part)
    if metric == "euclidean":
        torch.testing.assert_close(one.cluster_centers_[0], x.mean(0))
    else:
        torch.testing.assert_close(one.cluster_centers_.norm(), torch.ones(()).double())


def test_a_loader_of_tensors_is_a_stream():
    x, _, start = rows()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=64, shuffle=True)
    options = dict(num_clusters=4, init=start, max_iter=10, tol=0.0)
    streamed = KMeans(**options).double().fit_stream(loader, memory_budget=2000)
    torch.testing.assert_close(streamed.cluster_centers_, KMeans(**options).fit(x).cluster_centers_)


def test_arrays_give_arrays():
    x, _, start = rows()
    tensors = KMeans(num_clusters=4, init=start).fit(x)
    arrays = KMeans(num_clusters=4, init=start.numpy()).fit(x.numpy())
    for got, wanted in (
        (arrays.cluster_centers_, tensors.cluster_centers_),
        (arrays.predict(x.numpy()), tensors.predict(x)),
        (arrays.transform(x.float().numpy()), tensors.transform(x.float().double())),
        (arrays.fit_predict(x.numpy()), tensors.predict(x)),
    ):
        assert isinstance(got, np.ndarray)
        np.testing.assert_array_equal(got, wanted.numpy())
    assert isinstance(arrays.predict(x), torch.Tensor)
    assert isinstance(arrays.fit(x).cluster_centers_, torch.Tensor)
    whole = KMeans(num_clusters=2).fit(np.array([[0, 0], [0, 1], [9, 9]]), sample_weight=np.array([1, 1, 2]))
    assert whole.predict(np.array([[0, 0], [9, 9]])).dtype == np.int64
    assert sorted(whole.cluster_centers_.sum(1)) == [0.5, 18.0]


def test_layout_and_copies_do_not_matter():
    x, _, start = rows()
    kmeans = KMeans(num_clusters=4, init=start).fit(x)
    transposed = KMeans(num_clusters=4, init=start.T.contiguous().T).fit(x.T.contiguous().T)
    assert torch.equal(transposed.cluster_centers_, kmeans.cluster_centers_)
    restored = KMeans(num_clusters=4)
    restored.load_state_dict(kmeans.state_dict())
    for other in (copy.deepcopy(kmeans), restored.double()):
        assert torch.equal(other.predict(x), kmeans.predict(x))


def test_conversion_both_ways():
    x, _, _ = rows()
    theirs = sklearn.KMeans(4, n_init=1, random_state=0).fit(x.numpy())
    ours = KMeans.from_sklearn(theirs)
    assert ours.predict(x).tolist() == theirs.labels_.tolist()
    assert ours.inertia_ == pytest.approx(theirs.inertia_)
    again = ours.to_sklearn()
    assert again.predict(x.numpy()).tolist() == theirs.labels_.tolist()
    np.testing.assert_array_equal(again.transform(x.numpy()), theirs.transform(x.numpy()))
    ours.partial_fit(x[:10])
    assert ours.mixture.num_rows_ == 510
    with pytest.raises(ValueError, match="model must be a fitted sklearn.cluster.KMeans"):
        KMeans.from_sklearn(sklearn.KMeans(2))
    with pytest.raises(ValueError, match="to_sklearn needs metric='euclidean'"):
        KMeans(num_clusters=2, metric="cosine").fit(x).to_sklearn()


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(num_clusters=0), ValueError, "num_clusters must be at least 1, got 0"),
        (dict(num_clusters=2, metric="l1"), ValueError, "metric must be one of euclidean, cosine, got 'l1'"),
        (dict(num_clusters=2, init="corners"), ValueError, "init must be 'k-means..', 'random' or a tensor"),
        (dict(num_clusters=2, init=3), TypeError, "init must be .* got int"),
        (dict(num_clusters=2, num_init=0), ValueError, "num_init must be at least 1, got 0"),
        (dict(num_clusters=2, tol=-1.0), ValueError, "tol must be finite and not negative"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        KMeans(**options)


def test_bad_rows():
    x, _, start = rows()
    for metric in ("euclidean", "cosine"):
        kmeans = KMeans(num_clusters=4, metric=metric)
        for method in ("predict", "transform", "score"):
            with pytest.raises(RuntimeError, match="not fitted"):
                getattr(kmeans, method)(x)
        with pytest.raises(RuntimeError, match="not fitted"):
            _ = kmeans.cluster_centers_
        with pytest.raises(ValueError, match=r"x must have shape \[N, D\], got \(5,\)"):
            kmeans.fit(x[0])
        with pytest.raises(TypeError, match="x must be a floating-point tensor, got torch.int64"):
            kmeans.fit(x.long())
        with pytest.raises(ValueError, match="x must be finite"):
            kmeans.fit(x.index_fill(0, torch.tensor([3]), torch.nan))
        with pytest.raises(ValueError, match="x must have at least one feature"):
            kmeans.fit(x[:, :0])
        kmeans.fit(x)
        with pytest.raises(ValueError, match="with D = 5 as in means"):
            kmeans.predict(x[:, :3])
        with pytest.raises(ValueError, match="x must be finite"):
            kmeans.transform(x.index_fill(0, torch.tensor([3]), torch.inf))
    with pytest.raises(ValueError, match=r"init must have shape \[C, K, D\] = \(1, 3, 5\), got \(1, 4, 5\)"):
        KMeans(num_clusters=3, init=start).fit(x)


# ---- the same names in GaussianMixture


def test_scores_and_components_of_a_mixture():
    x, _, start = rows()
    weight = torch.arange(len(x)) % 3
    mixture = GaussianMixture(num_components=4, init=start[None])
    assert torch.equal(mixture.fit_predict(x), mixture.predict(x))
    assert mixture.score(x) == pytest.approx(float(mixture.score_samples(x).mean()))
    many = x.repeat_interleave(weight, 0)
    for name in ("score", "aic", "bic"):
        assert getattr(mixture, name)(x, None, weight) == pytest.approx(getattr(mixture, name)(many))
    for name in ("predict", "predict_proba", "score_samples", "fit_predict"):
        assert isinstance(getattr(mixture, name)(x.numpy()), np.ndarray)
    assert isinstance(mixture.bic(x.numpy()), float)


@pytest.mark.parametrize("criterion", ["bic", "aic"])
@pytest.mark.parametrize("kind", ["spherical", "diag", "tied", "full"])
def test_select_finds_the_number_of_clusters(kind, criterion):
    x, _, _ = rows(n=900, clusters=3)
    template = GaussianMixture(
        num_components=1, covariance_type=kind, num_init=2, generator=torch.Generator().manual_seed(0)
    )
    chosen = template.select(x, num_components=range(1, 5), criterion=criterion)
    assert chosen.num_components == 3 or criterion == "aic"
    assert chosen.num_components == chosen.selection_.chosen
    assert chosen.selection_.values[chosen.num_components] == pytest.approx(getattr(chosen, criterion)(x))
    assert chosen.num_init == 2
    assert not template.is_fitted
    (line, _) = chosen.selection_.plot().get_lines()
    assert line.get_xdata().tolist() == [1, 2, 3, 4]


def test_select_with_classes_weights_and_arrays():
    x, labels, _, _ = blobs(spread=0.5)
    template = GaussianMixture(num_components=1, num_classes=3, generator=torch.Generator().manual_seed(0), num_init=3)
    weight = torch.ones(len(x))
    chosen = template.select(x, labels, weight, num_components=(1, 2, 3))
    assert chosen.num_components == 2
    assert template.select(x.numpy(), labels.numpy(), num_components=[2]).num_components == 2


def test_bad_selections():
    x, _, start = rows()
    with pytest.raises(ValueError, match="num_components must hold at least one"):
        GaussianMixture(num_components=1).select(x, num_components=[])
    with pytest.raises(ValueError, match="criterion must be one of bic, aic, got 'icl'"):
        GaussianMixture(num_components=1).select(x, criterion="icl")
    with pytest.raises(ValueError, match="select needs init='k-means..' or 'random', got initial parameters"):
        GaussianMixture(num_components=4, init=start[None]).select(x)
