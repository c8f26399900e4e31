"""Synchronized batch normalization, alone and in training on two processes."""

from __future__ import annotations

import pytest
import torch
from support import ranks_at_work
from torch import nn

from cem_fast._support.ranks import Ranks
from cem_fast.training.batch_norm import _Synchronized, synchronized


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The results of every case on two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(ranks_at_work.train_cases, (str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", ranks_at_work.CASES)
def test_two_processes_take_the_steps_of_one(together, name):
    state, history = ranks_at_work.train(name, None)
    first, second = (results[name] for results in together)
    assert all(torch.equal(first["state"][key], value) for key, value in second["state"].items())
    assert first["history"] == second["history"]
    assert first["kept"] == 2  # by the first process
    assert second["kept"] == 0
    if name in ranks_at_work.EXACT:
        for key, value in state.items():
            torch.testing.assert_close(
                first["state"][key], value, rtol=1e-8, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}"
            )
        figures = ("loss", "accuracy", "learning_rate")
        for entry, expected in zip(first["history"], history, strict=True):
            assert [entry[key] for key in figures] == pytest.approx([expected[key] for key in figures], rel=1e-6)
            assert (entry["cem"] or 0) == pytest.approx(expected["cem"] or 0, rel=1e-6)


def test_every_process_draws_its_own_noise_and_resumes_with_the_same_bits(together):
    assert not torch.equal(together[0]["noise"]["drawn"], together[1]["noise"]["drawn"])
    for results in together:
        resumed, whole = results["noise"]["resumed"], results["noise"]["state"]
        assert all(torch.equal(resumed[key], value) for key, value in whole.items())


def test_the_network_is_as_it_was_after_the_block():
    network = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm2d(3))

    class Two(Ranks):
        count = 2

    with synchronized(network, Two()):
        assert [type(module).__mro__[1] for module in (network[0], network[2])] == [_Synchronized] * 2
        assert type(network[1]) is nn.Linear
    assert [type(module) for module in network] == [nn.BatchNorm1d, nn.Linear, nn.BatchNorm2d]
    assert not any(hasattr(module, "ranks") for module in network)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_rank_with_all_rows_gives_torchs_batch_normalization(momentum):
    torch.manual_seed(0)
    ours, theirs = (nn.BatchNorm2d(3, momentum=momentum).double() for _ in range(2))
    ours.__class__ = type("Ours", (_Synchronized, nn.BatchNorm2d), {"ranks": Ranks()})
    for _ in range(2):
        x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [norm(each) for norm, each in zip((ours, theirs), inputs)]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            (output * x.cos()).sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
