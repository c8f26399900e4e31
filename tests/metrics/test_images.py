"""Errors of images against their definitions, and the bootstrap against known answers."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch

from cem_fast import metrics


def test_psnr_is_averaged_over_images_not_errors():
    truth = torch.zeros(2, 1, 4, 4)
    rebuilt = torch.stack([torch.full((1, 4, 4), 0.1), torch.full((1, 4, 4), 0.5)])
    assert metrics.mse(rebuilt, truth).tolist() == pytest.approx([0.01, 0.25])
    assert metrics.psnr(rebuilt, truth).tolist() == pytest.approx([20.0, -10 * math.log10(0.25)])
    assert metrics.psnr(truth, truth).tolist() == pytest.approx([100.0, 100.0])


def test_nan_stays_nan():
    images = torch.zeros(2, 1, 4, 4)
    broken = images.clone()
    broken[1] = torch.nan
    assert metrics.mse(broken, images).isnan().tolist() == [False, True]
    assert metrics.psnr(broken, images).isnan().tolist() == [False, True]


@pytest.mark.parametrize("side", [6, 11, 24])
def test_ssim_is_the_windowed_definition(side):
    torch.manual_seed(0)
    x = torch.rand(2, 1, side, side, dtype=torch.float32)
    y = (x + 0.2 * torch.rand_like(x)).clamp(0, 1)
    window = min(11, side - 1 + side % 2)
    taps = torch.exp(-((torch.arange(window) - window // 2) ** 2) / (2 * 1.5**2))
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    blur = lambda v: torch.nn.functional.conv2d(v, kernel[None, None])  # noqa: E731
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    expected = ((2 * mx * my + c1) / (mx**2 + my**2 + c1) * (2 * cov + c2) / (vx + vy + c2)).flatten(1).mean(1)
    torch.testing.assert_close(metrics.ssim(x, y), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics.ssim(x, x), torch.ones(2))


def test_the_papers_ssim_is_the_padded_definition():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 20, 24)
    y = (x + 0.2 * torch.rand_like(x)).clamp(0, 1)
    taps = torch.exp(-((torch.arange(11) - 5) ** 2) / (2 * 1.5**2))
    kernel = (torch.outer(taps, taps) / taps.sum() ** 2).double()

    def blur(image):
        padded = torch.zeros(30, 34, dtype=torch.float64)
        padded[5:25, 5:29] = image
        return torch.tensor([[(padded[i : i + 11, j : j + 11] * kernel).sum() for j in range(24)] for i in range(20)])

    expected = []
    for a, b in zip(x[0].double(), y[0].double()):
        ma, mb = blur(a), blur(b)
        va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
        c1, c2 = 0.01**2, 0.03**2
        expected.append(((2 * ma * mb + c1) / (ma**2 + mb**2 + c1) * (2 * cov + c2) / (va + vb + c2)).mean())
    assert metrics.ssim_paper(y, x)[0].item() == pytest.approx(torch.stack(expected).mean().item(), abs=1e-5)
    torch.testing.assert_close(metrics.ssim_paper(x, x), torch.ones(2))
    assert metrics.ssim_paper(torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4)).shape == (2,)


def test_padding_raises_the_papers_ssim():
    torch.manual_seed(0)
    images = torch.rand(8, 3, 32, 32)
    noisy = (images + 0.1 * torch.randn_like(images)).clamp(0, 1)
    assert (metrics.ssim_paper(noisy, images) > metrics.ssim(noisy, images) + 0.002).all()


class LargestResult(torch.overrides.TorchFunctionMode):
    """Size in bytes of the largest tensor that is computed inside the block, apart from views of some tensors."""

    def __init__(self, *viewed):
        super().__init__()
        self.viewed, self.bytes = {tensor.untyped_storage().data_ptr() for tensor in viewed}, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in self.viewed:
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


def test_the_papers_ssim_of_many_images_needs_little_memory_and_gives_the_bits_of_each_alone():
    x, y = torch.rand(2, 2048, 1, 12, 12)
    with LargestResult(x) as largest:
        found = metrics.ssim_paper(x, y)
    assert largest.bytes < x.nbytes
    alone = [metrics.ssim_paper(x[index : index + 1], y[index : index + 1]) for index in range(0, 2048, 100)]
    assert torch.equal(found[::100], torch.cat(alone))


def test_lpips_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match="needs the package lpips: pip install lpips"):
        metrics.lpips(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        metrics.lpips(torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8))


def test_lpips_without_its_weights(monkeypatch):
    def offline(**settings):
        raise OSError("no route to host")

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=offline))
    with pytest.raises(RuntimeError, match=r"weights of LPIPS cannot be downloaded \(no route to host\).*checkpoints"):
        metrics.lpips(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))


def test_lpips_gives_its_package_three_channels_in_zero_to_one(monkeypatch):
    class LPIPS(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert net == "alex"

        def forward(self, x, y, normalize):
            assert normalize  # the package expects [-1, 1] unless told otherwise
            assert x.shape[1] == y.shape[1] == 3
            return (x - y).abs().mean((1, 2, 3), keepdim=True)

    module = types.ModuleType("lpips")
    module.LPIPS = LPIPS
    monkeypatch.setitem(sys.modules, "lpips", module)
    images = torch.rand(3, 1, 8, 8)
    assert metrics.lpips(images, images).tolist() == [0, 0, 0]
    assert metrics.lpips(images.clamp_max(0.5) + 0.5, images.clamp_max(0.5)).tolist() == pytest.approx([0.5] * 3)


def test_ssim_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_msssim", None)
    with pytest.raises(ImportError, match="pip install pytorch-msssim"):
        metrics.ssim(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))


def test_accuracy():
    assert metrics.accuracy(torch.tensor([[2.0, 1], [0, 1], [5, 4]]), torch.tensor([0, 0, 0])) == pytest.approx(2 / 3)


def test_bootstrap_of_a_constant_ratio_is_exact():
    off = torch.rand(40) + 0.1
    gain, low, high = metrics.paired_bootstrap(off, 1.5 * off, torch.arange(40), num_resamples=200, seed=0)
    assert (gain, low, high) == pytest.approx((0.5, 0.5, 0.5))


def test_bootstrap_interval_covers_as_often_as_it_says():
    torch.manual_seed(0)
    covered = 0
    for seed in range(200):
        off = 1 + 0.3 * torch.randn(60)
        on = 1.4 * off + 0.4 * torch.randn(60)
        _, low, high = metrics.paired_bootstrap(off, on, torch.arange(60), num_resamples=300, seed=seed)
        covered += low <= 0.4 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_bootstrap_resamples_groups_whole():
    torch.manual_seed(0)
    person = torch.arange(10).repeat_interleave(20)
    off = torch.ones(200)
    on = 1 + torch.rand(10)[person]  # all that varies, varies between people
    _, low, high = metrics.paired_bootstrap(off, on, person, num_resamples=2000, seed=1)
    _, narrow_low, narrow_high = metrics.paired_bootstrap(off, on, torch.arange(200), num_resamples=2000, seed=1)
    assert high - low > 3 * (narrow_high - narrow_low)


def test_bootstrap_depends_only_on_the_seed():
    off, on, groups = torch.rand(30) + 0.1, torch.rand(30), torch.arange(30)
    first = metrics.paired_bootstrap(off, on, groups, num_resamples=100, seed=3)
    assert first == metrics.paired_bootstrap(off, on, groups, num_resamples=100, seed=3)
    assert first[1:] != metrics.paired_bootstrap(off, on, groups, num_resamples=100, seed=4)[1:]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: metrics.mse(torch.zeros(0, 1, 4, 4), torch.zeros(0, 1, 4, 4)), "with N > 0"),
        (
            lambda: metrics.psnr(torch.zeros(2, 1, 4, 4), torch.zeros(3, 1, 4, 4)),
            r"got \(2, 1, 4, 4\) and \(3, 1, 4, 4\)",
        ),
        (lambda: metrics.ssim(torch.zeros(4, 4), torch.zeros(4, 4)), r"must both be \[N, C, H, W\]"),
        (lambda: metrics.accuracy(torch.zeros(2, 3), torch.zeros(3)), r"got \(2, 3\) and \(3,\)"),
        (lambda: metrics.paired_bootstrap(torch.ones(2), torch.ones(3), torch.arange(2)), r"must be \[N\]"),
        (lambda: metrics.paired_bootstrap(torch.zeros(2), torch.ones(2), torch.arange(2)), "positive, finite sum"),
        (
            lambda: metrics.paired_bootstrap(torch.ones(2), torch.ones(2), torch.arange(2), num_resamples=0),
            "at least 1, got 0",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("measure", [metrics.mse, metrics.psnr, metrics.ssim, metrics.ssim_paper])
def test_images_of_another_type_are_named(measure):
    levels = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"images must be .* numbers in \[0, 1\], got torch.uint8"):
        measure(levels / 255, levels)
    with pytest.raises(TypeError, match="reconstructed must be a tensor .* got NoneType"):
        measure(None, levels / 255)
