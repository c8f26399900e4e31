import torch

from cem_fast.attacks.inversion.lbfgs import MEMORY, lbfgs


def rosenbrock(x, rows=None):
    """A narrow, curved valley for each row, lowest at (1, 1)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        values = (1 - x[:, 0]) ** 2 + 100 * (x[:, 1] - x[:, 0] ** 2) ** 2
        (slopes,) = torch.autograd.grad(values.sum(), x)
    return values.detach(), slopes


def test_a_curved_valley_is_followed_to_its_end():
    start = torch.tensor([[-1.2, 1.0], [0.0, 0.0], [2.0, -2.0], [1.0, 1.0]], dtype=torch.float64)
    found = lbfgs(rosenbrock, start, steps=120, tolerance=0)
    torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=1e-6)


def test_ill_conditioned_rows_come_close():
    curvature = torch.logspace(0, 4, MEMORY, dtype=torch.float64)

    def bowl(x, rows=None):
        return (0.5 * curvature * x**2).sum(1), curvature * x

    start = torch.ones(3, MEMORY, dtype=torch.float64)
    assert (bowl(lbfgs(bowl, start, steps=120, tolerance=0))[0] < 1e-5 * bowl(start)[0]).all()


def test_a_row_is_independent_of_the_others():
    start = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    together = lbfgs(rosenbrock, start, steps=25, tolerance=0)
    for row, found in zip(start, together):
        assert torch.equal(lbfgs(rosenbrock, row[None], steps=25, tolerance=0)[0], found)


def test_rows_without_a_finite_value_stay_where_they_are():
    start = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    alone = lbfgs(rosenbrock, start, steps=25, tolerance=0)

    def broken(x, rows):
        values, slopes = rosenbrock(x)
        bad = rows % 2 == 1
        return values.where(~bad, torch.nan), slopes.where(~bad[:, None], torch.inf)

    found = lbfgs(broken, start, steps=25, tolerance=0)
    assert torch.equal(found[1::2], start[1::2])
    assert torch.equal(found[::2], alone[::2])


def test_every_step_lowers_the_value():
    start = torch.randn(16, 2, generator=torch.Generator().manual_seed(1)) * 3
    values = [rosenbrock(lbfgs(rosenbrock, start, steps=steps, tolerance=0))[0] for steps in range(30)]
    assert all((after <= before).all() for before, after in zip(values, values[1:]))


def test_a_row_that_comes_no_further_ends_and_is_evaluated_no_more():
    start = torch.tensor([[1.0, 1.0], [-1.2, 1.0], [0.9, 0.8], [2.0, -2.0]], dtype=torch.float64)
    evaluated = torch.zeros(4, dtype=torch.int64)

    def counted(x, rows):
        evaluated[rows] += 1
        return rosenbrock(x)

    found = lbfgs(counted, start, steps=10_000, tolerance=1e-9)
    torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=1e-3)
    assert evaluated[0] == 11 < evaluated[1] < 200
    for row, end in zip(start, found):
        assert torch.equal(lbfgs(rosenbrock, row[None], steps=10_000, tolerance=1e-9)[0], end)
