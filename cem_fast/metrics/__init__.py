"""Errors of reconstructed images, accuracy, and confidence intervals of gains."""

from cem_fast.metrics.images import accuracy, lpips, mse, paired_bootstrap, psnr, ssim, ssim_paper

__all__ = ["accuracy", "lpips", "mse", "paired_bootstrap", "psnr", "ssim", "ssim_paper"]
