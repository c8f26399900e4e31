"""Saving and loading one run: tensors in safetensors, everything else in JSON, committed in a single step.

A run's folder holds ``run.json`` and the tensor files that it names. The name of a tensor file contains the digest of its content, so a
save never touches the files of the previous one. Replacing ``run.json`` switches the folder from the old run to the new one. No pickle is
ever opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cem_fast import data
from cem_fast._support import typed_json
from cem_fast._support.files import MIB, check_target, expanded, read_bytes, require_path, write_atomically
from cem_fast.config import RunConfig
from cem_fast.data import Splits
from cem_fast.defenses import Defense
from cem_fast.experiments.build import build_loss, build_networks
from cem_fast.experiments.records import SCHEMA, Description
from cem_fast.loss import CEMLoss
from cem_fast.models.split import SplitModel
from cem_fast.training import resume

DESCRIPTION = "run.json"
MARK = f'{{\n "schema": {SCHEMA},\n "config": {{'.encode()  # start of the run.json of a run
TENSORS = r"(weights|measurements)-[0-9a-f]{16}\.safetensors"
TRAINING = re.escape(resume.NAME)
LARGEST = 8192 * MIB  # of a tensor file
OWN = re.compile(rf"{TENSORS}|{TRAINING}|\.({TENSORS}|{TRAINING}|{re.escape(DESCRIPTION)})\.\d+\.tmp")


@dataclass
class Run:
    """A finished run, ready to be used or attacked again.

    Attributes:
        path: folder of the run.
        config: its settings.
        model: trained network, in eval mode.
        defense: trained defense, in eval mode.
        loss: CEM loss whose mixture is fitted to the features of the trained network before the noise; None without noise.
        description: content of ``run.json``.
        data_from: folder of its images, if it has moved since.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.data import Part, Splits
        >>> from cem_fast.experiments.run import run
        >>> from cem_fast.experiments.saved_run import load_run
        >>> part = Part(torch.rand(8, 1, 16, 16), torch.arange(8) % 2, torch.arange(8))
        >>> splits = Splits("tiny", part, part, part, 2, ("a", "b"))
        >>> config = RunConfig(defense="bottleneck", noise_std=0.0, epochs=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = run(config, folder, splits=splits, attack=False)
        ...     loaded = load_run(folder)
        >>> loaded.config.defense, loaded.description.num_classes, loaded.loss
        ('bottleneck', 2, None)
    """

    path: Path
    config: RunConfig
    model: SplitModel
    defense: Defense
    loss: CEMLoss | None
    description: Description = field(repr=False)
    data_from: str | None = None

    @cached_property
    def data(self) -> Splits:
        """The images that the run was trained and tested on, read on first use.

        Raises:
            FileNotFoundError: their folder is not there, relative to the current directory.
            ValueError: they have changed since, so a test image may have been trained on.
        """
        name = self.data_from or self.config.data
        if name not in data.names() and not expanded(name).is_dir():
            raise FileNotFoundError(
                f"{self.path} was trained on the images in {self.config.data!r}, and there is no folder {name!r} below {Path.cwd()}: "
                "--data-from names their folder now"
            )
        own = self.config
        splits = data.load(name, fold=own.fold, image_size=own.image_size, validation=own.validation)
        splits = splits.under(own.protocol)
        expected, found = self.description.identity.images, splits.digest()
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
    model: SplitModel,
    defense: Defense,
    loss: CEMLoss | None,
    measurements: Mapping[str, Tensor],
    description: Description,
) -> None:
    """Saves a run. If the process dies, the folder holds either the whole old run or the whole new one.

    Other files in the folder are left alone. If several processes save to one folder at once, the last one wins.

    Args:
        folder: where to save; created if needed.
        model: trained network.
        defense: trained defense.
        loss: fitted CEM loss, or None.
        measurements: tensors by name, measured per image.
        description: settings and results; ``files`` is replaced.

    Raises:
        ValueError: the folder cannot be written to, or holds another program's ``run.json``.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.data import Part, Splits
        >>> from cem_fast.experiments.run import run
        >>> from cem_fast.experiments.saved_run import load_run, save_run
        >>> part = Part(torch.rand(8, 1, 16, 16), torch.arange(8) % 2, torch.arange(8))
        >>> splits = Splits("tiny", part, part, part, 2, ("a", "b"))
        >>> config = RunConfig(defense="bottleneck", noise_std=0.0, epochs=1)
        >>> with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as copy:
        ...     _ = run(config, folder, splits=splits, attack=False)
        ...     old = load_run(folder)
        ...     parts = {"model": old.model, "defense": old.defense, "loss": old.loss}
        ...     save_run(copy, **parts, measurements=old.measurements, description=old.description)
        ...     load_run(copy).description == old.description
        True
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
        document = replace(description, files=names).to_json()
        write_atomically(folder / DESCRIPTION, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
        for path in folder.iterdir():
            if OWN.fullmatch(path.name) and path.name not in names.values():
                path.unlink()


def load_run(path: str | Path, *, device: str | torch.device = "cpu", data_from: str | None = None) -> Run:
    """Loads a run that ``cem-fast`` or :func:`cem_fast.experiments.run.run` saved.

    Args:
        path: folder of the run.
        device: device of its networks.
        data_from: folder of its images, if it has moved since.

    Returns:
        The run, its networks in eval mode, its defense with secure draws if its settings ask for them.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        TypeError: path is no path.
        ValueError: a file is damaged, is of another kind (a pickle is refused), or does not fit the architecture of the settings.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from cem_fast import load_run
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.data import Part, Splits
        >>> from cem_fast.experiments.run import run
        >>> part = Part(torch.rand(8, 1, 16, 16), torch.arange(8) % 2, torch.arange(8))
        >>> splits = Splits("tiny", part, part, part, 2, ("a", "b"))
        >>> config = RunConfig(defense="bottleneck", noise_std=0.0, epochs=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = run(config, folder, splits=splits, attack=False)
        ...     loaded = load_run(folder)
        >>> loaded.model(splits.test.images).shape
        torch.Size([8, 2])
    """
    require_path("path", path)
    folder = Path(path)
    description = read_description(folder)
    weights, source = _read_tensors(folder, description, "weights")
    if wrong := sorted(key for key, value in weights.items() if not bool(value.isfinite().all())):
        raise ValueError(f"{source}: weights must be finite, got NaN or infinity in {wrong[0]}")
    _require_loss(folder, description, weights)
    shapes = {key: value.shape for key, value in weights.items()}
    with torch.device("meta"):  # without memory, until the sizes of run.json are known to be those of the weights
        model, defense = _networks(folder, description, shapes)
    for part, module in (("encoder", model.encoder), ("decoder", model.decoder), ("defense", defense)):
        _require_match(module, _of(part, weights), part, source)
    model, defense = _networks(folder, description, shapes)
    loss = build_loss(description.config, num_classes=description.num_classes)
    for part, module in _parts(model, defense, loss):
        _restore(module, _of(part, weights), part, source)
        module.to(device).eval()
    defense.secure = description.config.secure
    return Run(folder, description.config, model.eval(), defense, loss, description, data_from)


def read_description(folder: str | Path) -> Description:
    """Reads the ``run.json`` of a run's folder.

    Args:
        folder: folder of the run.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, of another schema, or an entry is missing or of another type.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.data import Part, Splits
        >>> from cem_fast.experiments import saved_run
        >>> from cem_fast.experiments.run import run
        >>> part = Part(torch.rand(8, 1, 16, 16), torch.arange(8) % 2, torch.arange(8))
        >>> splits = Splits("tiny", part, part, part, 2, ("a", "b"))
        >>> config = RunConfig(defense="bottleneck", noise_std=0.0, epochs=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = run(config, folder, splits=splits, attack=False)
        ...     saved_run.read_description(folder).image_shape
        (1, 16, 16)
    """
    return typed_json.read(Description, _read_document(folder), Path(folder) / DESCRIPTION)


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Reads only the settings of a run's ``run.json``, also those of a newer version.

    Args:
        folder: folder of the run.

    Returns:
        The settings as they are in the file.

    Raises:
        FileNotFoundError: there is no ``run.json``.
        ValueError: it is not JSON, of another schema, or has no settings.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.data import Part, Splits
        >>> from cem_fast.experiments import saved_run
        >>> from cem_fast.experiments.run import run
        >>> part = Part(torch.rand(8, 1, 16, 16), torch.arange(8) % 2, torch.arange(8))
        >>> splits = Splits("tiny", part, part, part, 2, ("a", "b"))
        >>> config = RunConfig(defense="bottleneck", noise_std=0.0, epochs=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = run(config, folder, splits=splits, attack=False)
        ...     saved_run.read_settings(folder)["epochs"]
        1
    """
    return typed_json.read(dict[str, Any], _read_document(folder).get("config"), Path(folder) / DESCRIPTION, "config")


def read_measurements(folder: str | Path) -> dict[str, Tensor]:
    """Reads what a run measured per image; see :func:`cem_fast.experiments.run.run`.

    Args:
        folder: folder of the run.

    Returns:
        Tensors by name.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: a file is damaged.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.data import Part, Splits
        >>> from cem_fast.experiments import saved_run
        >>> from cem_fast.experiments.run import run
        >>> part = Part(torch.rand(8, 1, 16, 16), torch.arange(8) % 2, torch.arange(8))
        >>> splits = Splits("tiny", part, part, part, 2, ("a", "b"))
        >>> config = RunConfig(defense="bottleneck", noise_std=0.0, epochs=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = run(config, folder, splits=splits, attack=False)
        ...     saved_run.read_measurements(folder)["correct"].shape
        torch.Size([8])
    """
    return _read_tensors(Path(folder), read_description(folder), "measurements")[0]


def _read_document(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / DESCRIPTION
    try:
        return typed_json.load_document(path, f"a run of schema {SCHEMA}", SCHEMA)
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder}: no finished run here (expected a file {DESCRIPTION})") from None
    except NotADirectoryError:
        raise ValueError(f"{folder}: expected the folder of a run, got a file") from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time save to a folder: another one would remove the files of an unfinished save as leftovers."""
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


def _of(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one part, by their names in its state dict."""
    return {key[len(part) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{part}.")}


def _networks(folder: Path, description: Description, shapes: Mapping[str, torch.Size]) -> tuple[SplitModel, Defense]:
    """The network and the defense of a run, with the shapes that its training gave them."""
    shape = description.image_shape
    try:
        model, defense = build_networks(description.config, image_shape=shape, num_classes=description.num_classes)
        defense.attach(model, torch.Size(shape))
    except (TypeError, ValueError, RuntimeError) as error:  # torch's own complaint about a size is a RuntimeError
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder / DESCRIPTION}: not the description of a run: {reason}") from error
    defense.reshape(model, shapes)
    return model, defense


def _require_loss(folder: Path, description: Description, weights: Mapping[str, Tensor]) -> None:
    """Requires the classes, components and noise of run.json in the weights of the loss, if there is a loss."""
    config = description.config
    wanted = (description.num_classes if config.cem_by_class else 1, config.cem_components)
    found = weights["loss.mixture.weights"].shape if "loss.mixture.weights" in weights else wanted
    if config.noise_std > 0 and tuple(found) != wanted:
        raise ValueError(
            f"{folder / DESCRIPTION}: num_classes and cem_components ask for a mixture of shape {wanted}, and the weights hold one of "
            f"{tuple(found)}"
        )
    noise = weights.get("loss.noise_variance", torch.tensor(float("nan")))
    expected = torch.tensor([config.noise_std], dtype=torch.float64).square()
    if config.noise_std > 0 and noise.shape == (1,) and not torch.equal(noise.double(), expected):
        raise ValueError(
            f"{folder / DESCRIPTION}: noise_std is {config.noise_std}, and the weights are those of a loss with noise_std "
            f"{noise.sqrt().item():g}"
        )


def _read_tensors(folder: Path, description: Description, kind: str) -> tuple[dict[str, Tensor], Path]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    if kind not in description.files:
        raise ValueError(f"{folder / DESCRIPTION}: files.{kind} is missing")
    path = folder / Path(description.files[kind]).name
    try:
        content = read_bytes(path, at_most=LARGEST)
    except OSError as error:
        raise ValueError(f"{path}: {DESCRIPTION} names this file and it cannot be read ({error.strerror})") from None
    # a safetensors file may begin with the same bytes, the length of its header, but then a brace follows
    if content[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK") and content[8:9] != b"{":
        raise ValueError(f"{path}: holds a pickle, which may run any code and is never opened; expected safetensors")
    if _digest(content) not in path.name:
        raise ValueError(f"{path}: damaged, its {len(content)} bytes are not those that were saved")
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
    for name, value in tensors.items():
        if value.is_complex():  # would lose its imaginary part on the way into a module
            raise ValueError(f"{path}: {name} must hold real numbers, got {value.dtype}")
    return tensors, path


def _restore(module: nn.Module, state: dict[str, Tensor], part: str, source: Path) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError:
        _require_match(module, state, part, source)
        raise


def _require_match(module: nn.Module, state: Mapping[str, Tensor], part: str, source: Path) -> None:
    """Requires the names, shapes and types of a module's tensors; it may be on the meta device."""
    expected = module.state_dict()
    both = sorted(expected.keys() & state.keys())
    kinds = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "of another shape": [
            f"{key} {tuple(state[key].shape)} for {tuple(expected[key].shape)}"
            for key in both
            if state[key].shape != expected[key].shape
        ],
        "of another type": [key for key in both if state[key].dtype != expected[key].dtype],
    }
    if found := "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in kinds.items() if keys):
        raise ValueError(
            f"{source}: the {part}'s weights are of another architecture than the settings, image_shape and num_classes of {DESCRIPTION} "
            f"({found})"
        )
