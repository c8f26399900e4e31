"""Checks of exported halves by what they do: messages of one image differ, by the noise that the manifest states."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cem_fast.defenses.quantized import CODES, Code
from cem_fast.deploy import draws
from cem_fast.deploy import manifest as manifests
from cem_fast.deploy.files import digest, open_half
from cem_fast.deploy.manifest import Manifest

DEVIATIONS = 8  # standard errors within which a variance must be of the stated one, which has an error too
SLACK = 0.02  # relative, for rounding


def verify(folder: str | Path) -> Manifest:
    """Checks the noise of exported halves by running them.

    Every random input alone, and all together, must change the messages of one image by the variance that the manifest states, within
    chi-square bounds, which are wider for heavy tails. A half that draws by itself must not repeat itself in a second session or a
    second process.

    Args:
        folder: the folder that :func:`cem_fast.deploy.export` wrote.

    Returns:
        The manifest.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: the runtime of the format is not installed.
        ValueError: the noise is missing, frozen, repeated or of another variance; a file differs from its digest; or a half answers
            with another shape.

    Example:
        >>> import tempfile
        >>> from cem_fast import defenses, deploy, models
        >>> model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=4)
        >>> defense = defenses.GaussianNoise(noise_std=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = deploy.export(model, defense, folder, image_shape=(1, 16, 16), format="pt2")
        ...     deploy.verify(folder).noise.source
        'input'
    """
    folder = Path(folder)
    manifest = manifests.read(folder)
    device, cloud = (open_half(folder / manifest.file(half)) for half in ("device", "cloud"))
    _check_shape(device, manifest)
    messages = _checked(device, manifest)
    if manifest.noise.source == "graph":
        _check_sessions(folder / manifest.file("device"), manifest, device)
    logits = cloud(messages[:2])
    if tuple(logits.shape) != (2, manifest.num_classes) or not logits.isfinite().all():
        raise ValueError(
            f"{manifest.file('cloud')} must return {manifest.num_classes} finite logits a message, got the shape {list(logits.shape)}"
        )
    for name in (manifest.file("device"), manifest.file("cloud")):
        if manifest.digests.get(name) != digest(folder / name):
            raise ValueError(f"{folder / name} has changed since it was exported: its digest is another one")
    return manifest


def _check_shape(device: Callable[..., Tensor], manifest: Manifest) -> None:
    """Fails if one message has another shape or dtype, before a batch of the stated size is made."""
    probe, inputs = draws.probes(manifest.image_shape, 1), manifest.random_inputs
    message = device(probe, *draws.neutral(inputs, 1))
    for name, found, expected in (
        ("shape", [*message.shape[1:]], [*manifest.message_shape]),
        ("dtype", message.dtype, CODES[manifest.message]),
    ):
        if found != expected:
            raise ValueError(
                f"messages must have the {name} {expected}, {manifest.file('device')} returns the {name} {found}"
            )


def _checked(device: Callable[..., Tensor], manifest: Manifest) -> Tensor:
    """Messages of the probe image with fresh draws, after every random input was checked alone and with the others."""
    inputs, count = manifest.random_inputs, draws.copies(manifest.image_shape)
    probe = draws.probes(manifest.image_shape, count)
    drawn, still = draws.seeded(inputs, count, secrets.randbits(62)), draws.neutral(inputs, count)
    normal = []
    for index, each in enumerate(inputs):
        alone = device(probe, *still[:index], drawn[index], *still[index + 1 :])
        found = _check(_decoded(alone, manifest), each.variance, f"the noise of the input {each.name}")
        normal += [found] if each.distribution == draws.NORMAL else []
    messages = device(probe, *drawn)
    whole = _check(_decoded(messages, manifest), manifest.noise.variance, "the noise of the messages")
    if inputs and whole == 0:
        raise ValueError("the noise of the messages has no effect: all messages of one image are equal")
    stated = torch.as_tensor(manifest.noise.std).square().mean().item()
    if normal and manifest.message == "float32" and not 0.8 * stated < sum(normal) < 1.25 * stated:
        raise ValueError(
            f"the noise has a standard deviation of {sum(normal) ** 0.5:.4g}, and {manifests.NAME} states {stated**0.5:.4g}"
        )
    return messages


def _check(messages: Tensor, stated: float, name: str) -> float:
    """The variance of messages of one image; it must be the stated one."""
    found = draws.variance(messages)
    bound = DEVIATIONS * draws.spread(messages) + SLACK
    if stated > 0 and found == 0:
        raise ValueError(f"{name} has no effect: it is frozen, and whoever sees two messages can subtract it")
    if not abs(found - stated) <= bound * stated:
        raise ValueError(f"{name} has a variance of {found:.4g}, expected {stated:.4g} within {bound:.0%}")
    return found


def _decoded(messages: Tensor, manifest: Manifest) -> Tensor:
    low, high = manifest.message_range or (0.0, 1.0)
    return Code(manifest.message, low, high).decode(messages)


def _check_sessions(path: Path, manifest: Manifest, device: Callable[..., Tensor]) -> None:
    """Fails if a graph that draws repeats a message: at once, in a second session, or in another process."""
    probe = draws.probes(manifest.image_shape, 1)
    torch.seed()
    messages: list[Tensor] = [device(probe), device(probe), open_half(path)(probe)]
    code = (  # the probe image, without this package
        "import sys, torch\n"
        "image = torch.rand([int(side) for side in sys.argv[2:]], generator=torch.Generator().manual_seed(0))\n"
        "torch.seed()\n"
        "print(*torch.export.load(sys.argv[1]).module()(image[None]).flatten()[:64].tolist())\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(path), *map(str, manifest.image_shape)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise ValueError(f"{path} does not run in another process: {done.stderr.strip().splitlines()[-1]}")
    messages.append(torch.tensor([float(word) for word in done.stdout.split()]))
    _check_differ([each.flatten()[:64].float() for each in messages])


def _check_differ(messages: Sequence[Tensor]) -> None:
    for index, one in enumerate(messages):
        for other in messages[index + 1 :]:
            if torch.allclose(one, other):
                raise ValueError("the noise repeats itself in a second session or process")
