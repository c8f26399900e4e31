"""Saving and loading one run: tensors in safetensors, everything else in JSON, committed in a single step.

A run's folder holds ``run.json`` and the tensor files that it names. A tensor file carries the digest of its content in its name, so a new
save never touches the files of the old one: replacing ``run.json`` is the one moment at which the folder changes from the old run to the
new. Nothing here ever opens a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cem_fast import data
from cem_fast._support.files import check_target, write_atomically
from cem_fast.config import RunConfig
from cem_fast.experiments.build import build_parts
from cem_fast.loss import CEMLoss
from cem_fast.models.split import SplitModel
from cem_fast.training import resume

if TYPE_CHECKING:
    from cem_fast.data import Splits
    from cem_fast.defenses.base import Defense

SCHEMA = 1
DESCRIPTION = "run.json"
MARK = f'{{\n "schema": {SCHEMA},\n "config": {{'.encode()  # what the run.json of a run begins with
TENSORS = r"(weights|measurements)-[0-9a-f]{16}\.safetensors"
TRAINING = re.escape(resume.NAME)
OWN = re.compile(rf"{TENSORS}|{TRAINING}|\.({TENSORS}|{TRAINING}|{re.escape(DESCRIPTION)})\.\d+\.tmp")


@dataclass
class Run:
    """A finished run, ready to be used or attacked again.

    Attributes:
        path: the run's folder.
        config: its settings.
        model: the trained network, in eval mode.
        defense: the trained defense, in eval mode.
        loss: the CEM loss whose mixture was fitted to what the trained network releases, before the noise; None without noise.
        description: everything else that ``run.json`` holds (``record``, ``history``, ``identity``, ``source``, ...).
    """

    path: Path
    config: RunConfig
    model: SplitModel
    defense: Defense
    loss: CEMLoss | None
    description: dict[str, Any] = field(repr=False)

    @cached_property
    def data(self) -> Splits:
        """The images the run was trained and tested on, read when first asked for.

        Raises:
            FileNotFoundError: their folder is not where it was, seen from the current directory.
            ValueError: they have changed since: what is a test image now may have been trained on.
        """
        name = self.config.data
        if name not in data.names() and not Path(name).expanduser().is_dir():
            raise FileNotFoundError(
                f"{self.path} was trained on the images in {name!r}, and there is no such folder below {Path.cwd()}"
            )
        splits = data.load(name, fold=self.config.fold, image_size=self.config.image_size).under(self.config.protocol)
        expected, found = entry(self.path, self.description, dict, "identity").get("images"), splits.digest()
        if found != expected:
            raise ValueError(
                f"{self.path} was trained on other images than {name!r} holds now: expected digest {expected}, got {found}"
            )
        return splits

    @cached_property
    def measurements(self) -> dict[str, Tensor]:
        """Per-image errors and a few pictures; see :func:`cem_fast.experiments.run.run`."""
        return read_measurements(self.path)


def save_run(
    folder: str | Path,
    *,
    config: RunConfig,
    model: SplitModel,
    defense: Defense,
    loss: CEMLoss | None,
    measurements: Mapping[str, Tensor],
    description: Mapping[str, Any],
) -> None:
    """Saves a run; whenever the process dies, the folder holds either the whole old run or the whole new one.

    Other files in the folder are left alone; of several processes that save to one folder at once, the last one counts.

    Args:
        folder: where to; created if needed.
        config: the run's settings.
        model: the trained network.
        defense: the trained defense.
        loss: the fitted CEM loss, or None.
        measurements: name -> tensor, what the run measured per image.
        description: what else ``run.json`` shall hold; ``image_shape`` and ``num_classes`` are needed to load the run.

    Raises:
        ValueError: the folder cannot be written to, or holds a ``run.json`` that is not of a run.
    """
    from safetensors.torch import save

    check_target(folder, {DESCRIPTION: MARK})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"{part}.{key}": value for part, module in _parts(model, defense, loss) for key, value in _state(module)}
    names = {}
    with _locked(folder):
        for kind, tensors in {"weights": weights, "measurements": dict(measurements)}.items():
            content = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
            names[kind] = f"{kind}-{_digest(content)}.safetensors"
            write_atomically(folder / names[kind], content)
        document = {"schema": SCHEMA, "config": config.to_json(), **description, "files": names}
        write_atomically(folder / DESCRIPTION, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
        for path in folder.iterdir():
            if OWN.fullmatch(path.name) and path.name not in names.values():
                path.unlink()


def load_run(path: str | Path, *, device: str | torch.device = "cpu") -> Run:
    """Loads a run that ``cem-fast`` or :func:`cem_fast.experiments.run.run` saved.

    Args:
        path: the run's folder.
        device: where its networks shall be.

    Returns:
        The run, its networks in eval mode.

    Raises:
        FileNotFoundError: there is no finished run in that folder.
        ValueError: a file is damaged, is not what it should be (a pickle is refused), or does not fit the architecture that the settings
            describe.
    """
    folder = Path(path)
    description = read_description(folder)
    shape, num_classes = entry(folder, description, list, "image_shape"), entry(folder, description, int, "num_classes")
    settings = entry(folder, description, dict, "config")
    try:
        config = RunConfig.from_json(settings)
        if len(shape) != 3 or not all(isinstance(side, int) and side > 0 for side in shape):
            raise ValueError(f"image_shape must be three positive sizes, got {shape}")
        model, defense, loss = build_parts(config, image_shape=tuple(shape), num_classes=num_classes)
        defense.attach(model, torch.Size(shape))
    except (TypeError, ValueError, RuntimeError) as error:  # torch's own complaint about a size is a RuntimeError
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder / DESCRIPTION}: not the description of a run: {reason}") from error
    weights, source = _read_tensors(folder, description, "weights")
    defense.reshape(model, {key: value.shape for key, value in weights.items()})
    for part, module in _parts(model, defense, loss):
        prefix = part + "."
        _restore(module, {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}, part, source)
        module.to(device).eval()
    return Run(folder, config, model.eval(), defense, loss, description)


def read_description(folder: str | Path) -> dict[str, Any]:
    """Reads the ``run.json`` of a run's folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, or not of this version.
    """
    path = Path(folder) / DESCRIPTION
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder}: no finished run here (expected a file {DESCRIPTION})") from None
    except NotADirectoryError:
        raise ValueError(f"{folder}: expected the folder of a run, got a file") from None
    except ValueError as error:
        raise ValueError(f"{path}: damaged, not readable as JSON ({error})") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise ValueError(f"{path}: expected a run of schema {SCHEMA}, got {found!r}")
    return document


def entry(folder: Path, description: Mapping[str, Any], kind: type, *keys: str) -> Any:
    """``description[key][...]`` of a ``run.json``, which anyone may have edited.

    Args:
        folder: the run's folder, for the error.
        description: what its ``run.json`` holds.
        kind: what the entry must be an instance of.
        keys: where it is.

    Raises:
        ValueError: it is missing or of another kind.
    """
    value: Any = description
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, kind):
        names = {dict: "an object", list: "a list", str: "a string", int: "an integer", float: "a number"}
        raise ValueError(f"{folder / DESCRIPTION}: {'.'.join(keys)} must be {names[kind]}, got {value!r}")
    return value


def read_measurements(folder: str | Path) -> dict[str, Tensor]:
    """Reads what a run measured per image.

    Raises:
        FileNotFoundError: there is no finished run in that folder.
        ValueError: a file is damaged.
    """
    return _read_tensors(Path(folder), read_description(folder), "measurements")[0]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time save to a folder: the next one would take the files of an unfinished save for leftovers."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _parts(model: SplitModel, defense: nn.Module, loss: nn.Module | None) -> list[tuple[str, nn.Module]]:
    parts = [("encoder", model.encoder), ("decoder", model.decoder), ("defense", defense)]
    return parts if loss is None else [*parts, ("loss", loss)]


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.state_dict().items())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _read_tensors(folder: Path, description: Mapping[str, Any], kind: str) -> tuple[dict[str, Tensor], Path]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / Path(entry(folder, description, str, "files", kind)).name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {DESCRIPTION} names this file and it cannot be read ({error.strerror})") from None
    # a safetensors file may begin with the same bytes, the length of its header, but then a brace follows
    if content[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK") and content[8:9] != b"{":
        raise ValueError(f"{path}: holds a pickle, which may run any code and is never opened; expected safetensors")
    if _digest(content) not in path.name:
        raise ValueError(f"{path}: damaged, its {len(content)} bytes are not those that were saved")
    try:
        return load(content), path
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None


def _restore(module: nn.Module, state: dict[str, Tensor], part: str, source: Path) -> None:
    expected = module.state_dict()
    try:
        module.load_state_dict(state)
    except RuntimeError:
        missing = sorted(expected.keys() - state.keys())
        unexpected = sorted(state.keys() - expected.keys())
        shapes = [
            f"{key} {tuple(state[key].shape)} for {tuple(expected[key].shape)}"
            for key in sorted(expected.keys() & state.keys())
            if state[key].shape != expected[key].shape
        ]
        kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        found = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in kinds.items() if keys)
        raise ValueError(
            f"{source}: the {part}'s weights are of another architecture than its settings ({found})"
        ) from None
