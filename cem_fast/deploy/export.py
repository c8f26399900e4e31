"""Export of a split network: one file for the device, one for the cloud, and a manifest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cem_fast import cost
from cem_fast._support.files import check_target
from cem_fast._support.lookup import lookup
from cem_fast.defenses import Composed, Defense, NoDefense
from cem_fast.defenses.quantized import CODES, Code, message_code
from cem_fast.deploy import draws
from cem_fast.deploy import manifest as manifests
from cem_fast.deploy.files import PACKAGES, SUFFIXES, check_packages, digest, open_half, write_half
from cem_fast.deploy.halves import Cloud, Device
from cem_fast.deploy.manifest import Cost, Manifest, Noise, Preprocessing
from cem_fast.deploy.verify import verify
from cem_fast.experiments.build import build_parts
from cem_fast.experiments.saved_run import DESCRIPTION, load_run
from cem_fast.models.split import SplitModel

SOURCES = ("input", "graph")
REPEATED = (
    "noise must be input for {format}, got graph: a runtime repeats the first draws of a graph in every session, "
    "and the difference of two sessions' messages then has no noise"
)


def export(
    model: SplitModel,
    defense: Defense,
    folder: str | Path,
    *,
    image_shape: Sequence[int],
    format: str = "onnx",
    noise: str = "input",
    message: str = "float32",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] = (),
    run: str = "",
    undefended: SplitModel | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Writes ``device.*``, ``cloud.*`` and ``manifest.json``, and verifies that messages keep their noise.

    The device half maps images ``[N, C, H, W]`` in [0, 1] and standard random draws to messages: preprocessing, encoder, and everything
    that the defense does in use. It scales the draws. The cloud half maps messages to logits ``[N, num_classes]``. N is free.

    Args:
        model: the trained network.
        defense: its defense, one of the library or your own.
        folder: where to write; created if needed.
        image_shape: ``(C, H, W)``.
        format: ``onnx``, ``pt2`` for torch.export, or ``executorch`` for ExecuTorch, with batches of up to 64.
        noise: ``input`` for draws that the application passes in, from the secure generator of its platform; ``graph``, for ``pt2``
            only, for draws of torch's generator, which the application must seed with a secret.
        message: dtype of the numbers sent: ``float32``, ``float16``, or ``uint8`` over [-4 s, 1 + 4 s] for noise of standard deviation s.
        mean: mean of each channel that the network expects to be subtracted from pixels in [0, 1].
        std: standard deviation of each channel, the divisor.
        classes: names of the classes.
        run: digest of the run, for the manifest.
        undefended: the network without a defense, whose cost is stated next to this one's; None to leave it out.
        overwrite: whether to replace the halves of another network in the folder. Those of the same run are always replaced.

    Returns:
        The manifest.

    Raises:
        ImportError: a package of the extra ``deploy`` is missing.
        ValueError: an argument is out of range; a module or a random function cannot be exported, which the error names; or the
            exported half fails :func:`cem_fast.deploy.verify`.

    Example:
        >>> import tempfile
        >>> from cem_fast import defenses, deploy, models
        >>> model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=4)
        >>> defense = defenses.GaussianNoise(noise_std=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     manifest = deploy.export(model, defense, folder, image_shape=(1, 16, 16), format="pt2")
        >>> manifest.random_inputs[0].name, manifest.random_inputs[0].shape, manifest.cost.message_bytes
        ('noise', (4, 4, 4), 256)
    """
    suffix = lookup("format", format, SUFFIXES)
    lookup("noise", noise, dict.fromkeys(SOURCES))
    lookup("message", message, CODES)
    if format != "pt2" and noise == "graph":
        raise ValueError(REPEATED.format(format=format))
    if defense.secure and noise == "graph":
        raise ValueError("noise must be input for a defense with secure draws: a graph draws from torch's generator")
    shape = _checked_shape(image_shape)
    mean, std = (_checked_statistics(name, each, shape[0]) for name, each in (("mean", mean), ("std", std)))
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"classes must be a sequence of names, got {classes!r}")
    check_packages(format)
    _check_folder(Path(folder), suffix, run, overwrite)
    device = Device(model, defense, message_code(defense, message), mean=mean, std=std)
    cloud = Cloud(model, device.code)
    probe = draws.probes(shape, 2)
    inputs = draws.find(device.message, probe)
    inputs, variance = _measured(device, inputs, shape)
    with torch.no_grad():
        sent = device(probe, *draws.neutral(inputs, 2))
        logits = cloud(sent)
    if len(classes) not in (0, logits.shape[1]):
        raise ValueError(f"classes must have {logits.shape[1]} names, one for each logit, got {len(classes)}")
    taken = inputs if noise == "input" else []
    names = ["image", *(each.name for each in taken)]
    example = (probe, *draws.neutral(taken, 2)) if noise == "input" else (probe,)
    half: nn.Module = device if noise == "input" else _Drawing(device)
    source = noise if inputs else "none"
    with _replacing(Path(folder)) as place:
        files = [place / f"device{suffix}", place / f"cloud{suffix}"]
        write_half(half, example, files[0], inputs=names, output="message", random=noise == "graph")
        write_half(cloud, (sent,), files[1], inputs=["message"], output="logits")
        Manifest(
            format=format,
            image_shape=shape,
            message_shape=tuple(sent.shape[1:]),
            num_classes=logits.shape[1],
            classes=tuple(classes),
            message=message,
            message_range=(device.code.low, device.code.high) if message == "uint8" else None,
            preprocessing=Preprocessing(mean=mean, std=std),
            noise=Noise(source, _std(defense, inputs, variance, sent.shape[1:]), variance),
            random_inputs=tuple(taken),
            defense=tuple(
                type(part).__name__ for part in (defense.parts if isinstance(defense, Composed) else [defense])
            ),
            cost=_cost(model, device, probe, files[0], example),
            undefended=None if undefended is None else _undefended(undefended, probe, suffix),
            run=run,
            digests={file.name: digest(file) for file in files},
            versions=_versions(),
        ).save(place)
        return verify(place)


def export_run(
    run: str | Path,
    folder: str | Path,
    *,
    format: str = "onnx",
    noise: str = "input",
    message: str = "float32",
    overwrite: bool = False,
) -> Manifest:
    """Exports a saved run, with the names of its classes and the cost of the network without its defense.

    Args:
        run: folder of the saved run.
        folder: where to write; created if needed.
        format: as for :func:`cem_fast.deploy.export`.
        noise: likewise.
        message: likewise.
        overwrite: likewise.

    Returns:
        The manifest.

    Raises:
        FileNotFoundError: there is no run.
        ImportError: a package of the extra ``deploy`` is missing.
        ValueError: as for :func:`cem_fast.deploy.export`.

    Example:
        >>> from cem_fast import deploy
        >>> deploy.export_run("nowhere", "out")
        Traceback (most recent call last):
        FileNotFoundError: nowhere: no finished run here (expected a file run.json)
    """
    saved = load_run(run)
    shape = saved.description.image_shape
    plain = replace(saved.config, defense="none", noise_std=0.0, cem_weight=0.0)
    undefended, _, _ = build_parts(plain, image_shape=shape, num_classes=saved.description.num_classes)
    classes: Sequence[str] = ()
    with suppress(FileNotFoundError, ImportError):  # the images may be elsewhere
        classes = saved.data.class_names
    return export(
        saved.model,
        saved.defense,
        folder,
        image_shape=shape,
        format=format,
        noise=noise,
        message=message,
        classes=classes,
        run=digest(saved.path / DESCRIPTION),
        undefended=undefended,
        overwrite=overwrite,
    )


def _checked_shape(image_shape: Sequence[int]) -> tuple[int, int, int]:
    sides = tuple(image_shape) if isinstance(image_shape, Sequence) else ()
    whole = all(isinstance(side, Integral) and not isinstance(side, bool) and side > 0 for side in sides)
    if len(sides) != 3 or not whole:
        raise ValueError(f"image_shape must be (C, H, W), got {image_shape!r}")
    channels, height, width = map(int, sides)
    if channels * height * width > manifests.MOST:
        raise ValueError(f"image_shape must hold at most {manifests.MOST} numbers, got {image_shape!r}")
    return channels, height, width


def _checked_statistics(name: str, values: Sequence[float] | None, channels: int) -> tuple[float, ...] | None:
    """The mean or the standard deviation of each channel as numbers."""
    if values is None:
        return None
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        found = ()
    if len(found) != channels:
        raise ValueError(f"{name} must have one number for each of {channels} channels, got {values!r}")
    if not all(map(math.isfinite, found)):
        raise ValueError(f"{name} must be finite, got {list(found)}")
    if name == "std" and min(found) <= 0:
        raise ValueError(f"std must be positive, got {list(found)}")
    return found


def _check_folder(folder: Path, suffix: str, run: str, overwrite: bool) -> None:
    """Fails early if halves could not be written, or would replace files that are not of the same run."""
    check_target(folder, {manifests.NAME: manifests.MARK})
    if overwrite:
        return
    held: Manifest | None = None
    with suppress(FileNotFoundError, ValueError):  # absent or unreadable
        held = manifests.read(folder)
    if held is not None and not (run and held.run == run):
        raise ValueError(f"{folder} holds the halves of another network: choose another folder, or set overwrite")
    for file in (folder / f"{half}{suffix}" for half in ("device", "cloud")):
        if file.exists() and (held is None or held.digests.get(file.name) != digest(file)):
            raise ValueError(
                f"{file} is not of an export that {manifests.NAME} describes: choose another folder, or set overwrite"
            )


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder for new halves, which replace those in ``folder`` if the block succeeds."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as name:
        yield Path(name)
        for path in sorted(Path(name).iterdir(), key=lambda path: path.name == manifests.NAME):
            path.replace(folder / path.name)


class _Drawing(nn.Module):
    """The device half with draws of torch's generator in its graph."""

    def __init__(self, device: Device):
        super().__init__()
        self.device = device

    def forward(self, images: Tensor) -> Tensor:
        return self.device.message(images)


@torch.no_grad()
def _measured(
    device: Device, inputs: Sequence[draws.RandomInput], shape: Sequence[int]
) -> tuple[list[draws.RandomInput], float]:
    """The random inputs with the variance that each alone causes, and the variance that all cause together."""
    count = draws.copies(shape)
    probe, drawn, still = draws.probes(shape, count), draws.seeded(inputs, count, seed=0), draws.neutral(inputs, count)
    found = []
    for index, each in enumerate(inputs):
        alone = [*still[:index], drawn[index], *still[index + 1 :]]
        found.append(replace(each, variance=draws.variance(device.code.decode(device(probe, *alone)))))
    return found, draws.variance(device.code.decode(device(probe, *drawn)))


def _std(
    defense: Defense, inputs: Sequence[draws.RandomInput], variance: float, shape: torch.Size
) -> float | tuple[float, ...]:
    """Standard deviation of the noise: the defense's own where it is the only normal draw, the measured one otherwise."""
    normal = [each.variance for each in inputs if each.distribution == draws.NORMAL]
    stated = torch.as_tensor(defense.noise_std, dtype=torch.float64)
    if len(normal) == 1 and stated.any():
        return stated.item() if stated.dim() == 0 else tuple(stated.expand(shape).flatten().tolist())
    return math.sqrt(sum(normal) or variance)


def _cost(model: SplitModel, device: Device, probe: Tensor, path: Path, example: tuple[Tensor, ...]) -> Cost:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        device.message(probe[:1])
    half, times = open_half(path), []
    with torch.no_grad():
        sent = half(*example)
    for _ in range(12):
        start = time.perf_counter()
        half(*(each[:1] for each in example))
        times.append(time.perf_counter() - start)
    milliseconds = 1e3 * statistics.median(times[2:])
    multiplications = counter.get_total_flops() // 2
    return Cost(cost.parameters(model.encoder), multiplications, milliseconds, sent[0].numel() * sent.element_size())


def _undefended(model: SplitModel, probe: Tensor, suffix: str) -> Cost:
    device = Device(model, NoDefense(), Code())
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, f"device{suffix}")
        write_half(device, (probe,), path, inputs=["image"], output="message")
        return _cost(model, device, probe, path, (probe,))


def _versions() -> dict[str, str]:
    packages = ["cem_fast", "torch", *(name for names in PACKAGES.values() for name in names)]
    return {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name) is not None}
