"""How well an image is rebuilt, and how sure a difference is."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def mse(reconstructed: Tensor, images: Tensor) -> Tensor:
    """Mean squared error of every image.

    Args:
        reconstructed: ``[N, C, H, W]`` in [0, 1].
        images: ``[N, C, H, W]`` in [0, 1].

    Returns:
        ``[N]``.

    Raises:
        ValueError: the shapes differ, or there is no image.
    """
    _check(reconstructed, images)
    return (reconstructed - images).square().flatten(1).mean(1)


def psnr(reconstructed: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of every image, ``-10 log10(MSE)`` in dB for a peak of 1.

    Average over images, not over errors: the ratio of a mean error is not the mean of the ratios. Identical images give 100 dB.

    Args:
        reconstructed: ``[N, C, H, W]`` in [0, 1].
        images: ``[N, C, H, W]`` in [0, 1].

    Returns:
        ``[N]``, in dB.

    Raises:
        ValueError: the shapes differ, or there is no image.
    """
    return -10 * torch.log10(mse(reconstructed, images).clamp_min(1e-10))


def ssim(reconstructed: Tensor, images: Tensor) -> Tensor:
    """Structural similarity of every image, with the standard 11x11 Gaussian window of standard deviation 1.5 and no padding.

    On images smaller than the window, the window shrinks to the largest odd side that fits.

    Args:
        reconstructed: ``[N, C, H, W]`` in [0, 1].
        images: ``[N, C, H, W]`` in [0, 1].

    Returns:
        ``[N]``, 1 for identical images.

    Raises:
        ValueError: the shapes differ, or there is no image.
        ImportError: ``pytorch_msssim`` is not installed.

    Source:
        Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP 2004.
    """
    _check(reconstructed, images)
    try:
        from pytorch_msssim import ssim as windowed_ssim
    except ImportError as error:
        raise ImportError("SSIM needs the package pytorch_msssim: pip install pytorch-msssim") from error
    side = min(11, *images.shape[2:])
    window = side if side % 2 else side - 1
    return windowed_ssim(reconstructed.float(), images.float(), data_range=1.0, size_average=False, win_size=window)


def ssim_paper(reconstructed: Tensor, images: Tensor) -> Tensor:
    """Structural similarity of every image as the paper computes it: the 11x11 window slides over borders padded with zeros.

    Not comparable to :func:`ssim`: padding agrees with itself, so that this one is higher. Give it beside the paper's figures only.

    Args:
        reconstructed: ``[N, C, H, W]`` in [0, 1].
        images: ``[N, C, H, W]`` in [0, 1].

    Returns:
        ``[N]``, 1 for identical images.

    Raises:
        ValueError: the shapes differ, or there is no image.

    Source:
        Xia et al., CVPR 2025 (their evaluation); Wang et al., "Image quality assessment: from error visibility to structural similarity",
        IEEE TIP 2004.
    """
    _check(reconstructed, images)
    x, y = reconstructed.float().flatten(0, 1)[:, None], images.float().flatten(0, 1)[:, None]
    taps = torch.exp(-(torch.arange(-5, 6, device=x.device) ** 2) / (2 * 1.5**2))
    window = (torch.outer(taps, taps) / taps.sum() ** 2)[None, None]
    mean_x, mean_y, xx, yy, xy = F.conv2d(torch.cat([x, y, x * x, y * y, x * y]), window, padding=5).chunk(5)
    variances = xx - mean_x**2 + yy - mean_y**2
    covariance = xy - mean_x * mean_y
    squares = mean_x**2 + mean_y**2
    values = (2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4) / ((squares + 1e-4) * (variances + 9e-4))
    return values.view(len(images), -1).mean(1)


def lpips(reconstructed: Tensor, images: Tensor) -> Tensor:
    """Perceptual distance of every image, between the activations of a pretrained AlexNet; the first call downloads its weights.

    Args:
        reconstructed: ``[N, C, H, W]`` in [0, 1], C = 1 or 3.
        images: ``[N, C, H, W]`` in [0, 1].

    Returns:
        ``[N]``, 0 for identical images.

    Raises:
        ValueError: the shapes differ, there is no image, or the channels are neither one nor three.
        ImportError: the package ``lpips`` or what it needs is not installed.

    Source:
        Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric", CVPR 2018.
    """
    _check(reconstructed, images)
    if images.shape[1] not in (1, 3):
        raise ValueError(f"LPIPS needs images of 1 or 3 channels, got {images.shape[1]}")
    try:
        from lpips import LPIPS
    except ImportError as error:
        raise ImportError(f"LPIPS needs the package lpips ({error}): pip install 'cem_fast[lpips]'") from error
    distance = LPIPS(net="alex", verbose=False).to(images.device)
    colors = (batch.float().expand(-1, 3, -1, -1) for batch in (reconstructed, images))
    with torch.no_grad():
        return distance(*colors, normalize=True).flatten()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the rows whose largest logit is the label's.

    Args:
        logits: ``[N, C]``.
        labels: ``[N]`` int64.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: the lengths differ, or there is no row.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"logits [N, C] and labels [N] must agree with N > 0, got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    return float((logits.argmax(1) == labels).double().mean())


def paired_bootstrap(
    values_off: Tensor, values_on: Tensor, groups: Tensor, *, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """The gain ``mean(on) / mean(off) - 1`` with its 95% percentile interval over resampled groups.

    A resample draws as many groups as there are, with replacement, and keeps all images of a group together and in pairs.

    Args:
        values_off: ``[N]``, an error per image without CEM.
        values_on: ``[N]``, the error of the same images with it.
        groups: ``[N]`` int64, the group of every image (the person, or the image itself).
        num_resamples: number of resamples.
        seed: seed of the resamples.

    Returns:
        ``(gain, low, high)``.

    Raises:
        ValueError: the lengths differ, there is no image, or the errors without CEM sum to zero.

    Source:
        Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 1979.
    """
    off, on, groups = (torch.as_tensor(v) for v in (values_off, values_on, groups))
    if off.dim() != 1 or not off.shape == on.shape == groups.shape or not len(off):
        raise ValueError(
            f"values_off, values_on and groups must be [N] with N > 0, got {tuple(off.shape)}, {tuple(on.shape)} and {tuple(groups.shape)}"
        )
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}")
    if not math.isfinite(float(off.sum())) or float(off.sum()) <= 0:
        raise ValueError(f"values_off must have a positive, finite sum, got {float(off.sum())}")
    _, index = torch.unique(groups, return_inverse=True)
    count = int(index.max()) + 1
    totals = torch.zeros(2, count, dtype=torch.float64).index_add_(1, index, torch.stack([off.double(), on.double()]))
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(count, (num_resamples, count), generator=generator)
    resampled = totals[:, draws].sum(2)  # every image counts in both sums, so the ratio of sums is the ratio of means
    gains = resampled[1] / resampled[0] - 1
    low, high = torch.quantile(gains, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(totals[1].sum() / totals[0].sum() - 1), low, high


def _check(reconstructed: Tensor, images: Tensor) -> None:
    if reconstructed.shape != images.shape or images.dim() != 4 or not len(images):
        raise ValueError(
            f"reconstructed and images must both be [N, C, H, W] with N > 0, got {tuple(reconstructed.shape)} and {tuple(images.shape)}"
        )
