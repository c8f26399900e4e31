"""Encoders under audit: callables, exported programs, ONNX files, and pairs of arrays."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cem_fast._support.files import expanded, require_regular
from cem_fast._support.lookup import lookup
from cem_fast._support.text import one_line
from cem_fast.data.splits import fingerprints
from cem_fast.deploy.files import check_packages, digest, onnx_function, read_onnx
from cem_fast.models.cutting import logits
from cem_fast.models.split import SplitModel

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
Normalization = tuple[tuple[float, ...], tuple[float, ...]]


class Target(nn.Module):
    """An encoder with its preprocessing, its dtype and its device: from images in [0, 1] to float32 features.

    Args:
        encoder: a module or any function of images; a function is a black box if its result has no gradient.
        normalization: mean and standard deviation of each channel, or one for all; None for the encoder's own.

    Example:
        >>> import torch
        >>> from cem_fast.audit import Target
        >>> Target(lambda x: x.flatten(1).half())(torch.rand(2, 1, 4, 4)).dtype
        torch.float32
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Callable[[Tensor], Any], normalization: Normalization | None = None):
        super().__init__()
        self.encoder = encoder if isinstance(encoder, nn.Module) else _Function(encoder)
        mean, std = normalization or ((0.0,), (1.0,))
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        self.normalizes = normalization is not None

    def forward(self, images: Tensor) -> Tensor:
        if self.normalizes:
            if len(self.mean) not in (1, images.shape[1]):
                raise ValueError(f"normalize must give {images.shape[1]} channels, got {len(self.mean)}")
            images = (images - self.mean.to(images.device)) / self.std.to(images.device)
        like = next((p for p in self.encoder.parameters() if p.is_floating_point()), images)
        return logits(self.encoder(images.to(like.device, like.dtype))).float()

    def digest(self) -> str:
        """Digest of the weights, 16 hexadecimal digits; empty for a function without any."""
        found = hashlib.sha256()
        state = self.encoder.state_dict()
        for name, value in state.items():
            if isinstance(value, Tensor):
                content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
                found.update(name.encode() + content)
        return found.hexdigest()[:16] if state else ""


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]):
        super().__init__()
        self.function = (function,)  # a tuple: a function that is a module of torch.export cannot change its mode

    def forward(self, images: Tensor) -> Any:
        return self.function[0](images)


class Pairs(nn.Module):
    """Images and their released features, without the encoder: a table.

    Args:
        images: ``[N, C, H, W]``, float32; of equal images, the first counts.
        features: their features ``[N, ...]``, as they were released.

    Example:
        >>> import torch
        >>> from cem_fast.audit import Pairs
        >>> images = torch.rand(3, 1, 4, 4)
        >>> Pairs(images, torch.arange(3.0)[:, None])(images[1:])
        tensor([[1.],
                [2.]])
    """

    def __init__(self, images: Tensor, features: Tensor):
        super().__init__()
        self.features = features
        self.rows: dict[bytes, int] = {}
        for row, key in enumerate(fingerprints(images)):
            self.rows.setdefault(key, row)

    def forward(self, images: Tensor) -> Tensor:
        try:
            rows = [self.rows[key] for key in fingerprints(images)]
        except KeyError:
            raise ValueError(
                "pairs without an encoder have no features of other images: use attacks that learn from pairs, such as ridge and decoder"
            ) from None
        return self.features[torch.tensor(rows, dtype=torch.int64)].to(images.device)


@dataclass(frozen=True)
class Loaded:
    """An encoder under audit and what came with it.

    Args:
        encoder: module or function of images.
        decoder: the rest of the network; None if it did not come.
        name: how the target was named.
        digest: digest of its file; empty for code.

    Example:
        >>> from cem_fast.audit.targets import Loaded
        >>> Loaded(abs, None, "abs", "").name
        'abs'
    """

    encoder: Callable[[Tensor], Any]
    decoder: nn.Module | None
    name: str
    digest: str


def load_target(name: str, *, cut: str | None, example: Tensor, normalization: Normalization | None) -> Loaded:
    """Loads a target of the command line.

    ``file.py:callable`` and ``package.module:callable`` are run, with the rights of the user. So is what a ``.pt2`` file
    holds. An ONNX file is data.

    Args:
        name: the target.
        cut: module behind which its network is cut; None for an encoder.
        example: images ``[N, C, H, W]`` in [0, 1].
        normalization: as of :class:`Target`.

    Raises:
        ValueError: there is no such target, it fails, or it is no network.

    Example:
        >>> import torch
        >>> from cem_fast.audit import load_target
        >>> load_target("torch.nn:Flatten", cut=None, example=torch.rand(1, 1, 4, 4), normalization=None).encoder
        Flatten(start_dim=1, end_dim=-1)
    """
    path = expanded(name)
    if path.suffix in (".pt2", ".onnx"):
        if cut is not None:
            raise ValueError(f"cut needs a network in Python, got the file {name}")
        require_regular(path)
        encoder = _onnx(path) if path.suffix == ".onnx" else _exported(path)
        return Loaded(encoder, None, name, digest(path)[:16])
    made = _called(name)
    encoder, decoder = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not callable(encoder):
        raise ValueError(f"{name} must give a network, an encoder, or a pair of encoder and decoder, got {encoder!r}")
    if cut is None:
        return Loaded(encoder, decoder, name, "")
    if not isinstance(encoder, nn.Module) or decoder is not None:
        raise ValueError(f"cut needs a target that gives one nn.Module, got {type(encoder).__name__}")
    whole = Target(encoder.eval(), normalization)
    like = next(encoder.parameters(), example)
    prepared = (example - whole.mean) / whole.std if whole.normalizes else example
    split = SplitModel.from_module(encoder, cut, prepared.to(like.device, like.dtype))
    return Loaded(split.encoder, split.decoder, f"{name} cut at {cut}", "")


def normalization(text: str | None) -> Normalization | None:
    """Reads ``imagenet``, ``MEAN,STD``, or the means and then the standard deviations of all channels.

    Args:
        text: the text; None for no normalization.

    Raises:
        ValueError: it is none of these.

    Example:
        >>> from cem_fast.audit.targets import normalization
        >>> normalization("0.5,0.25")
        ((0.5,), (0.25,))
    """
    if text is None or text == "imagenet":
        return IMAGENET if text else None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    half = len(numbers) // 2
    if not numbers or len(numbers) % 2 or not all(np.isfinite(numbers)) or min(numbers[half:]) <= 0:
        raise ValueError(f"normalize must be imagenet or MEAN,STD with a positive STD, got {text!r}")
    return numbers[:half], numbers[half:]


def read_array(path: str | Path) -> Tensor:
    """Reads a ``.npy`` file of numbers, never a pickle.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, or holds other values or NaN.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from cem_fast.audit.targets import read_array
        >>> with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        ...     np.save(file.name, np.arange(3))
        ...     read_array(file.name)
        tensor([0, 1, 2])
    """
    require_regular(Path(path))
    try:
        found = np.load(path, allow_pickle=False)
        if not isinstance(found, np.ndarray) or found.dtype.kind not in "uif":
            raise ValueError("it must hold an array of numbers")
        values = torch.from_numpy(np.ascontiguousarray(found.astype(found.dtype.newbyteorder("="), copy=False)))
    except Exception as error:  # a header is parsed as Python, whose parser raises many kinds
        raise ValueError(f"{path} cannot be read: {one_line(str(error) or type(error).__name__)}") from None
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{path} must hold finite numbers, got NaN or infinity")
    return values


def _exported(path: Path) -> Callable[[Tensor], Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(path).module()
    except Exception as error:  # the loader's errors are of many kinds
        raise ValueError(f"{path} is no exported program ({str(error).splitlines()[0][:200]})") from error
    return lambda images: program(images)  # not as a module: exported programs cannot change their mode


def _onnx(path: Path) -> Callable[[Tensor], Any]:
    check_packages("onnx")
    try:
        return onnx_function(read_onnx(path, neighbors=True), path.name)
    except Exception as error:  # each package has its own classes
        raise ValueError(f"{path} cannot be opened: {str(error).splitlines()[0][:200]}") from error


def _called(name: str) -> Any:
    """The object that ``place:attribute`` names; a function or a class is called, unless it is a module already."""
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise ValueError(
            f"target must be file.py:callable, package.module:callable, a .pt2 or .onnx file, or the folder of a saved run, got {name!r}"
        )
    try:
        module = _imported(place)
    except FileNotFoundError:
        raise
    except Exception as error:  # the user's code
        raise ValueError(f"{place} cannot be imported: {type(error).__name__}: {error}") from error
    options = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
    found = lookup(f"callable of {place}", attribute, options or {attribute: None})
    if isinstance(found, nn.Module):
        return found
    assert found is not None
    try:
        return found()
    except Exception as error:  # the user's code
        raise ValueError(f"{name} fails: {type(error).__name__}: {error}") from error


def _imported(place: str) -> Any:
    if not place.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))
        try:
            return importlib.import_module(place)
        finally:
            sys.path.remove(str(Path.cwd()))
    path = expanded(place)
    require_regular(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def as_images(values: Tensor, source: Sequence[str] | str) -> Tensor:
    """Images ``[N, C, H, W]`` float32 in [0, 1], from uint8 or floating-point numbers.

    Args:
        values: the numbers.
        source: where they are from, for the error.

    Raises:
        ValueError: the shape or the range is another.

    Example:
        >>> import torch
        >>> from cem_fast.audit.targets import as_images
        >>> as_images(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8), "images").max()
        tensor(1.)
    """
    if values.dim() != 4 or not len(values):
        raise ValueError(f"{source} must hold images [N, C, H, W], got shape {tuple(values.shape)}")
    images = values.float() / 255 if values.dtype == torch.uint8 else values.float()
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{source} must hold pixels in [0, 1] or uint8, got {float(low):.3g} to {float(high):.3g}")
    return images
