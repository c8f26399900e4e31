"""Errors of reconstructed images, and whether they are recognized."""

from cem_fast.metrics.images import accuracy, lpips, mse, paired_bootstrap, psnr, ssim, ssim_paper

__all__ = ["accuracy", "lpips", "mse", "paired_bootstrap", "psnr", "ssim", "ssim_paper"]
