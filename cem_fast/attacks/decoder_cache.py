"""Networks that were trained a moment ago: attacks that start from a decoder share one instead of training it again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from copy import deepcopy
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from cem_fast.attacks.base import Observe

# forgotten together with the observer, which stands for the network and the defense under attack
_networks: WeakKeyDictionary[Observe, dict[str, nn.Module]] = WeakKeyDictionary()


def recent(observe: Observe, settings: object, *tensors: Tensor, train: Callable[[], nn.Module]) -> nn.Module:
    """Returns a copy of the network that was trained for the same observer from the same settings and tensors, or trains it.

    Args:
        observe: what the network was trained to invert.
        settings: everything that its training depends on besides the tensors; compared by its ``repr``.
        tensors: the images, and features observed of them: a network under attack that has changed since is noticed by them.
        train: trains the network, which must depend on the above alone.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    try:
        known = _networks.setdefault(observe, {})
    except TypeError:  # a callable that cannot be a key: nothing to share
        return train()
    if digest.digest() not in known:
        known[digest.digest()] = train()
    return deepcopy(known[digest.digest()])
