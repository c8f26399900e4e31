"""Snapshots of a training run, from which it continues after an interruption: one file of tensors and JSON, without pickles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cem_fast._support import typed_json
from cem_fast._support.files import require_regular, write_atomically

NAME = "training.safetensors"


@dataclass
class Snapshot:
    """The file that holds a training run after its latest epoch.

    Args:
        folder: folder of the file, created by the first ``save``.
        identity: JSON of everything that the training depends on; only a file with an equal identity can be continued.
        resume: whether to continue from an existing file; otherwise it is replaced after the first epoch.
        beside: the caller's records, saved with the training and restored into this list by ``load``.

    Example:
        >>> import tempfile
        >>> from cem_fast.training.resume import Snapshot
        >>> folder = tempfile.TemporaryDirectory()
        >>> snapshot = Snapshot(folder.name, {"epochs": 4})
        >>> snapshot.load(), snapshot.fits()
        (None, False)
        >>> snapshot.save({"history": [1, 2]})
        >>> snapshot.load(), snapshot.fits(), snapshot.owner()
        ({'history': [1, 2]}, True, {'epochs': 4})
        >>> folder.cleanup()
    """

    folder: str | Path
    identity: Mapping[str, Any]
    resume: bool = True
    beside: list[dict[str, Any]] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """Path of the file."""
        return Path(self.folder) / NAME

    def save(self, state: Mapping[str, Any]) -> None:
        """Replaces the file atomically.

        Args:
            state: nested dictionaries and lists of tensors, numbers, strings and None.
        """
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        outline = {"identity": self.identity, "beside": self.beside, "state": _outline(state, tensors)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, save(tensors, {"training": json.dumps(outline)}))

    def load(self) -> dict[str, Any] | None:
        """Returns the state given to ``save``, on the CPU; None without a file, or if ``resume`` is false.

        Raises:
            ValueError: the file is damaged, or belongs to another training run.
        """
        found = self._read() if self.resume else None
        if found is None:
            return None
        outline, tensors = found
        wanted = json.loads(json.dumps(self.identity))
        if outline["identity"] != wanted:
            raise ValueError(f"{self.path} cannot be continued: {difference(outline['identity'], wanted)}")
        self.beside[:] = outline["beside"]
        return _filled(outline["state"], tensors)

    def owner(self) -> dict[str, Any]:
        """Returns the identity of the file; an empty one if the file is missing or damaged."""
        try:
            found = self._read()
        except ValueError:
            return {}
        return {} if found is None else found[0]["identity"]

    def _read(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return None
        try:
            require_regular(self.path)
            with safe_open(self.path, framework="pt") as file:
                outline = typed_json.parse((file.metadata() or {})["training"], "its metadata")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if not isinstance(outline["identity"], dict) or not isinstance(outline["beside"], list):
                raise TypeError("identity or beside has the wrong type")
            _filled(outline["state"], tensors)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{self.path} is damaged, or no training that was interrupted ({error})") from None
        return outline, tensors

    def fits(self) -> bool:
        """Whether ``load`` would return a state."""
        try:
            return self.load() is not None
        except ValueError:
            return False


def _outline(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The JSON of a tree: tensors become numbers and are collected; dictionaries become pairs, as JSON has no integer keys."""
    if isinstance(value, Tensor):
        tensors[str(len(tensors))] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": str(len(tensors) - 1)}
    if isinstance(value, Mapping):
        return {"pairs": [[key, _outline(each, tensors)] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        return [_outline(each, tensors) for each in value]
    return value


def _filled(outline: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(outline, list):
        return [_filled(each, tensors) for each in outline]
    if isinstance(outline, dict):
        if "tensor" in outline:
            return tensors[outline["tensor"]]
        return {key: _filled(each, tensors) for key, each in outline["pairs"]}
    return outline


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Describes how a found identity differs from the wanted one.

    Args:
        found: the identity of a file.
        wanted: the identity of this training.

    Example:
        >>> from cem_fast.training.resume import difference
        >>> difference({"epochs": 40, "seed": 0}, {"epochs": 50, "seed": 0})
        'epochs was 40 and is 50'
    """
    return "; ".join(
        f"{key} was {found.get(key)!r} and is {wanted.get(key)!r}"
        for key in dict.fromkeys([*found, *wanted])
        if found.get(key) != wanted.get(key)
    )


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Returns the states of torch's global generators for a device.

    Args:
        device: the device of the training.

    Example:
        >>> import torch
        >>> from cem_fast.training.resume import random_state, set_random_state
        >>> device = torch.device("cpu")
        >>> state = random_state(device)
        >>> first = torch.rand(3)
        >>> set_random_state(state, device)
        >>> torch.equal(torch.rand(3), first)
        True
    """
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Restores the states of torch's global generators.

    Args:
        states: the result of :func:`cem_fast.training.resume.random_state`.
        device: the device of the training.

    Example:
        >>> import torch
        >>> from cem_fast.training.resume import random_state, set_random_state
        >>> device = torch.device("cpu")
        >>> set_random_state(random_state(device), device)
    """
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
