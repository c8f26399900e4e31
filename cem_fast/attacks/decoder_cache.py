"""A cache of fitted decoders, so that attacks that start from the same decoder train it once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from copy import deepcopy
from weakref import WeakKeyDictionary

from torch import Tensor

from cem_fast.attacks.base import Observe
from cem_fast.attacks.networks import DecoderNetwork

# An observer stands for the network and the defense under attack. Its decoders are dropped together with it.
_decoders: WeakKeyDictionary[Observe, dict[bytes, DecoderNetwork]] = WeakKeyDictionary()


def cached_decoder(
    observe: Observe, settings: object, *tensors: Tensor, train: Callable[[], DecoderNetwork]
) -> DecoderNetwork:
    """Returns a copy of the decoder trained for this observer, these settings and these tensors; trains it on the first call.

    Args:
        observe: function that the decoder inverts. A callable that cannot be held weakly or hashed disables the cache.
        settings: all other settings of the training; compared by their ``repr``.
        tensors: images, and features observed from them. A change of the network under attack changes the features.
        train: trains the decoder; its result must depend on the other arguments alone.

    Returns:
        A copy that the caller may change.

    Example:
        >>> import torch
        >>> from cem_fast.attacks.decoder_cache import cached_decoder
        >>> from cem_fast.attacks.networks import SlimDecoder
        >>> images, trained = torch.zeros(2, 1, 8, 8), []
        >>> def observe(images):
        ...     return images[:, :, ::2, ::2]
        >>> def train():
        ...     trained.append("once")
        ...     return SlimDecoder((1, 4, 4), images)
        >>> first = cached_decoder(observe, {"epochs": 3}, images, train=train)
        >>> again = cached_decoder(observe, {"epochs": 3}, images, train=train)
        >>> trained, again is first
        (['once'], False)
    """
    digest = hashlib.sha256(repr(settings).encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    key = digest.digest()
    try:
        known = _decoders.setdefault(observe, {})
    except TypeError:
        return train()
    if key not in known:
        known[key] = train()
    return deepcopy(known[key])
