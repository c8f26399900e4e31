"""Two data-parallel ranks compute the step of one process, for every division of the batch."""

import pytest
import torch
from support import two_ranks
from support.definitions import draw


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    torch.multiprocessing.spawn(two_ranks.train, (str(folder),), nprocs=2)
    return torch.load(folder / "rank0.pt", weights_only=True)


@pytest.mark.parametrize("case", range(len(two_ranks.CASES)), ids=[str(c) for c in two_ranks.CASES])
def test_two_ranks_equal_one_process(results, case):
    sizes, covariance_type, variant = two_ranks.CASES[case]
    encoder, loss = two_ranks.model_and_loss(None, covariance_type, variant)
    x, labels, _ = draw(sum(sizes), 6, 3, 2, diag=False)
    value = loss(encoder(x), labels)
    value.backward()
    got_value, got_grad = results[case]
    torch.testing.assert_close(got_value, value.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(got_grad, encoder.weight.grad, rtol=1e-10, atol=1e-14)


def test_a_mixture_loaded_by_rank_0_alone_serves_all_ranks_or_is_refused(tmp_path):
    torch.multiprocessing.spawn(two_ranks.load_on_rank_0, (str(tmp_path),), nprocs=2)
    (first, alone), (second, refused) = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    encoder, loss = two_ranks.model_and_loss(None, "spherical", "paper")
    x, labels, _ = draw(20, 6, 3, 2, diag=False)
    features = encoder(x).detach()
    assert first == second == pytest.approx(float(loss(features, labels)), rel=1e-10)
    assert alone == pytest.approx(float(loss(features[:10], labels[:10])), rel=1e-10)
    assert "rank 0 has a fitted CEMLoss, and this rank has not" in refused
