"""Errors of reconstructed images, and the confidence interval of a gain."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from cem_fast._support import optional
from cem_fast._support.counts import require_count

CHUNK, PIXELS = (
    256,
    256 * 64 * 64 * 3,
)  # images and their numbers at a time, where a measure needs many times their memory


def mse(reconstructed: Tensor, images: Tensor) -> Tensor:
    """Mean squared error of every image.

    Args:
        reconstructed: ``[N, C, H, W]`` in [0, 1].
        images: ``[N, C, H, W]`` in [0, 1].

    Returns:
        ``[N]``.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: the shapes differ, or there is no image.

    Example:
        >>> import torch
        >>> from cem_fast import metrics
        >>> metrics.mse(torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4))
        tensor([1., 1.])
    """
    _check(reconstructed, images)
    return (reconstructed - images).square().flatten(1).mean(1)


def psnr(reconstructed: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of every image, ``-10 log10(MSE)`` in dB for a peak of 1.

    Average the ratios, not the errors: the ratio of a mean error differs from the mean ratio. Identical images give 100 dB.

    Args:
        reconstructed: ``[N, C, H, W]`` in [0, 1].
        images: ``[N, C, H, W]`` in [0, 1].

    Returns:
        ``[N]``, in dB.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: the shapes differ, or there is no image.

    Example:
        >>> import torch
        >>> from cem_fast import metrics
        >>> metrics.psnr(torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.1))
        tensor([20.])
    """
    return -10 * torch.log10(mse(reconstructed, images).clamp_min(1e-10))


def ssim(reconstructed: Tensor, images: Tensor) -> Tensor:
    """Structural similarity of every image, with the standard 11x11 Gaussian window of standard deviation 1.5 and no padding.

    For images smaller than the window, its side is the largest odd number that fits.

    Args:
        reconstructed: ``[N, C, H, W]`` in [0, 1].
        images: ``[N, C, H, W]`` in [0, 1].

    Returns:
        ``[N]``, 1 for identical images.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: the shapes differ, or there is no image.
        ImportError: ``pytorch_msssim`` is not installed.

    Source:
        Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP 2004.

    Example:
        >>> import torch
        >>> from cem_fast import metrics
        >>> images = torch.rand(2, 3, 16, 16)
        >>> metrics.ssim(images, images)
        tensor([1., 1.])
    """
    _check(reconstructed, images)
    package = optional.load("pytorch_msssim", "SSIM", "pytorch-msssim")
    side = min(11, *images.shape[2:])
    window = side if side % 2 else side - 1

    def similarity(reconstructed: Tensor, images: Tensor) -> Tensor:
        found: Tensor = package.ssim(
            reconstructed.float(), images.float(), data_range=1.0, size_average=False, win_size=window
        )
        return found

    return _by_chunks(similarity, reconstructed, images)


def ssim_paper(reconstructed: Tensor, images: Tensor) -> Tensor:
    """Structural similarity of every image as computed by the paper: the 11x11 window extends over borders padded with zeros.

    Not comparable to :func:`cem_fast.metrics.ssim`: it is higher, as the padding of both images is equal. Use it only for comparison with
    the paper's figures.

    Args:
        reconstructed: ``[N, C, H, W]`` in [0, 1].
        images: ``[N, C, H, W]`` in [0, 1].

    Returns:
        ``[N]``, 1 for identical images.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: the shapes differ, or there is no image.

    Source:
        Xia et al., CVPR 2025 (their evaluation); Wang et al., "Image quality assessment: from error visibility to structural similarity",
        IEEE TIP 2004.

    Example:
        >>> import torch
        >>> from cem_fast import metrics
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> x, y = torch.rand(2, 1, 1, 16, 16)
        >>> metrics.ssim_paper(x, y) > metrics.ssim(x, y)
        tensor([True])
    """
    _check(reconstructed, images)
    taps = torch.exp(-(torch.arange(-5, 6, device=images.device) ** 2) / (2 * 1.5**2))
    window = (torch.outer(taps, taps) / taps.sum() ** 2)[None, None]

    def similarity(reconstructed: Tensor, images: Tensor) -> Tensor:
        x, y = reconstructed.float().flatten(0, 1)[:, None], images.float().flatten(0, 1)[:, None]
        mean_x, mean_y, xx, yy, xy = F.conv2d(torch.cat([x, y, x * x, y * y, x * y]), window, padding=5).chunk(5)
        variances = xx - mean_x**2 + yy - mean_y**2
        covariance = xy - mean_x * mean_y
        squares = mean_x**2 + mean_y**2
        values = (2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4) / ((squares + 1e-4) * (variances + 9e-4))
        return values.view(len(images), -1).mean(1)

    return _by_chunks(similarity, reconstructed, images)


def lpips(reconstructed: Tensor, images: Tensor) -> Tensor:
    """Perceptual distance of every image: the distance of activations of a pretrained AlexNet.

    The first call downloads the network's weights.

    Args:
        reconstructed: ``[N, C, H, W]`` in [0, 1], C = 1 or 3.
        images: ``[N, C, H, W]`` in [0, 1].

    Returns:
        ``[N]``, 0 for identical images.

    Raises:
        ValueError: the shapes differ, there is no image, or the number of channels is neither 1 nor 3.
        ImportError: the package ``lpips`` or one of its dependencies is not installed.
        RuntimeError: the weights are not there and cannot be downloaded.

    Source:
        Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric", CVPR 2018.

    Example:
        >>> import torch
        >>> from cem_fast import metrics
        >>> metrics.lpips(torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8))
        Traceback (most recent call last):
            ...
        ValueError: LPIPS needs images of 1 or 3 channels, got 2
    """
    _check(reconstructed, images)
    if images.shape[1] not in (1, 3):
        raise ValueError(f"LPIPS needs images of 1 or 3 channels, got {images.shape[1]}")
    package = optional.load("lpips", "LPIPS", "lpips")
    try:
        distance = package.LPIPS(net="alex", verbose=False).to(images.device)
    except OSError as error:
        raise RuntimeError(
            f"the weights of LPIPS cannot be downloaded ({error}): run it once with a network, or copy alexnet-owt-7be5be79.pth to "
            f"{torch.hub.get_dir()}/checkpoints"
        ) from error

    @torch.no_grad()
    def distances(reconstructed: Tensor, images: Tensor) -> Tensor:
        colors = (batch.float().expand(-1, 3, -1, -1) for batch in (reconstructed, images))
        found: Tensor = distance(*colors, normalize=True).flatten()
        return found

    return _by_chunks(distances, reconstructed, images)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the rows whose largest logit is that of the label.

    Args:
        logits: ``[N, C]``.
        labels: ``[N]`` int64.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: the lengths differ, or there is no row.

    Example:
        >>> import torch
        >>> from cem_fast import metrics
        >>> metrics.accuracy(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0]))
        0.5
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

    A resample draws as many groups as there are, with replacement. Images of a group stay together, and the two errors of an image too.

    Args:
        values_off: ``[N]``, error of every image without CEM.
        values_on: ``[N]``, error of the same images with CEM.
        groups: ``[N]`` int64, the group of every image (the person, or the image itself).
        num_resamples: number of resamples, at least 1.
        seed: seed of the resamples.

    Returns:
        ``(gain, low, high)``.

    Raises:
        ValueError: the lengths differ, there is no image, or the errors without CEM sum to zero.

    Source:
        Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 1979.

    Example:
        >>> import torch
        >>> from cem_fast import metrics
        >>> off = torch.tensor([1.0, 2.0, 3.0])
        >>> metrics.paired_bootstrap(off, 1.5 * off, torch.arange(3))
        (0.5, 0.5, 0.5)
    """
    off, on, groups = (torch.as_tensor(v) for v in (values_off, values_on, groups))
    if off.dim() != 1 or not off.shape == on.shape == groups.shape or not len(off):
        raise ValueError(
            f"values_off, values_on and groups must be [N] with N > 0, got {tuple(off.shape)}, {tuple(on.shape)} and {tuple(groups.shape)}"
        )
    require_count("num_resamples", num_resamples)
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


def _by_chunks(measure: Callable[[Tensor, Tensor], Tensor], reconstructed: Tensor, images: Tensor) -> Tensor:
    """A measure of every image, on some images at a time: all of them would need gigabytes."""
    count = max(1, min(CHUNK, PIXELS // max(1, images[0].numel())))
    return torch.cat([measure(x, y) for x, y in zip(reconstructed.split(count), images.split(count))])


def _check(reconstructed: Tensor, images: Tensor) -> None:
    for name, value in (("reconstructed", reconstructed), ("images", images)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor [N, C, H, W], got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor of numbers in [0, 1], got {value.dtype}")
    if reconstructed.shape != images.shape or images.dim() != 4 or not len(images):
        raise ValueError(
            f"reconstructed and images must both be [N, C, H, W] with N > 0, got {tuple(reconstructed.shape)} and {tuple(images.shape)}"
        )
