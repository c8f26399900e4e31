"""Buffers that keep their precision when a model is cast to a half type."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class FullPrecisionBuffers(nn.Module):
    """A module whose floating-point buffers follow ``.to``, ``.float`` and ``.double`` but never become half.

    Means and variances rounded to 8 or 11 bits do not describe the mixture, so ``model.half()`` and ``model.bfloat16()``
    move them without rounding. Buffers named in ``always_double`` stay float64.
    """

    always_double: frozenset[str] = frozenset()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FullPrecisionBuffers:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            assert new is not None
            if old.is_floating_point() and (
                name in self.always_double or new.dtype not in (torch.float32, torch.float64)
            ):
                self._buffers[name] = old.to(device=new.device)
        return self
