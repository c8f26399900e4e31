"""Training in the middle, kept so that it can go on after an interruption: one file of tensors and JSON, never a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cem_fast._support.files import write_atomically

NAME = "training.safetensors"


@dataclass
class Snapshot:
    """The file that holds a training run after its latest epoch.

    Args:
        folder: where the file is; created when there is something to keep.
        identity: what the training depends on, as JSON: only a file that was written for the same can be continued.
        resume: whether to go on from the file that is there; otherwise it is replaced after the first epoch.
        beside: records of the caller's own that are kept with the training, and are put back into this list when it goes on.
    """

    folder: str | Path
    identity: Mapping[str, Any]
    resume: bool = True
    beside: list[dict[str, Any]] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return Path(self.folder) / NAME

    def save(self, state: Mapping[str, Any]) -> None:
        """Replaces the file in a single step.

        Args:
            state: nested dictionaries and lists of tensors, numbers, strings and None.
        """
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        outline = {"identity": self.identity, "beside": self.beside, "state": _outline(state, tensors)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, save(tensors, {"training": json.dumps(outline)}))

    def load(self) -> dict[str, Any] | None:
        """Returns what :meth:`save` was given, on the CPU; None where there is nothing to go on from, or nothing is to be resumed.

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
        """The identity that the file was written for; an empty one where there is no file, or a damaged one."""
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
            with safe_open(self.path, framework="pt") as file:
                outline = json.loads((file.metadata() or {})["training"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if not isinstance(outline["identity"], dict) or not isinstance(outline["beside"], list):
                raise TypeError("identity and beside are of another kind")
            _filled(outline["state"], tensors)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is damaged, or no training that was interrupted ({error})") from None
        return outline, tensors

    def fits(self) -> bool:
        """Whether :meth:`load` would find a training run that can go on."""
        try:
            return self.load() is not None
        except ValueError:
            return False


def _outline(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A tree without its tensors, which are numbered and collected; JSON has no integer keys, so a dictionary becomes pairs."""
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
    """Where what was found differs from what is wanted: ``epochs was 40 and is 50``."""
    return "; ".join(
        f"{key} was {found.get(key)!r} and is {wanted.get(key)!r}"
        for key in dict.fromkeys([*found, *wanted])
        if found.get(key) != wanted.get(key)
    )


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's global generators that training on a device draws from."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Puts torch's global generators into the states that :func:`random_state` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
