"""The device's side: images to messages with secure noise, and messages to a server."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cem_fast.deploy import draws
from cem_fast.deploy import manifest as manifests
from cem_fast.deploy.files import open_half

LONGEST = 2**24  # bytes of an answer that are read


class DeviceClient:
    """Runs the device half with draws of the system's secure generator, and sends its messages to a cloud server.

    A demonstration for loopback: there is neither TLS nor authentication.

    Args:
        folder: the folder with ``device.*`` and ``manifest.json``.
        address: address of the server, such as ``http://127.0.0.1:8000``; empty for messages alone.
        timeout: seconds to wait for an answer.

    Attributes:
        manifest: the description of the halves.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: the runtime of the format is not installed.
        ValueError: a file is damaged, or ``address`` is no HTTP address.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from cem_fast import defenses, deploy, models
        >>> model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=4)
        >>> defense = defenses.GaussianNoise(noise_std=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = deploy.export(model, defense, folder, image_shape=(1, 16, 16), format="pt2")
        ...     client = deploy.DeviceClient(folder)
        >>> image = torch.rand(1, 1, 16, 16)
        >>> client.message(image).shape, torch.equal(client.message(image), client.message(image))
        (torch.Size([1, 4, 4, 4]), False)
    """

    def __init__(self, folder: str | Path, address: str = "", timeout: float = 30.0):
        if address and (urlsplit(address).scheme != "http" or not urlsplit(address).hostname):
            raise ValueError(f"address must be as in http://127.0.0.1:8000, got {address!r}")
        self.manifest = manifests.read(folder)
        self.address, self.timeout = address.rstrip("/"), timeout
        self._device = open_half(Path(folder) / self.manifest.file("device"))
        if self.manifest.noise.source == "graph":
            torch.seed()

    def message(self, images: Tensor) -> Tensor:
        """Returns the messages of images, each with fresh noise.

        Args:
            images: ``[N, C, H, W]``, pixels in [0, 1].

        Raises:
            ValueError: the images have another shape or dtype.

        Example:
            >>> from cem_fast.deploy import DeviceClient
            >>> DeviceClient("nowhere")
            Traceback (most recent call last):
            FileNotFoundError: [Errno 2] no exported halves there: 'nowhere/manifest.json'
        """
        shape = self.manifest.image_shape
        if tuple(images.shape[1:]) != shape or not len(images) or images.dtype != torch.float32:
            raise ValueError(
                f"images must be float32 [N, {', '.join(map(str, shape))}], got {images.dtype} {list(images.shape)}"
            )
        return self._device(images, *draws.secure(self.manifest.random_inputs, len(images)))

    def classify(self, images: Tensor) -> Tensor:
        """Sends the messages of images to the server and returns its logits ``[N, num_classes]``.

        Args:
            images: ``[N, C, H, W]``, pixels in [0, 1].

        Raises:
            ConnectionError: there is no answer, or the server refuses the message.
            ValueError: the images have another shape or dtype, or there is no address.

        Example:
            >>> from cem_fast.deploy import DeviceClient
            >>> DeviceClient("nowhere", "ftp://127.0.0.1")
            Traceback (most recent call last):
            ValueError: address must be as in http://127.0.0.1:8000, got 'ftp://127.0.0.1'
        """
        if not self.address:
            raise ValueError("address must be that of a server to classify by, got ''")
        body = save({"message": self.message(images).contiguous()})
        request = urllib.request.Request(f"{self.address}/classify", data=body, method="POST")
        request.add_header("Content-Type", "application/octet-stream")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                content = answer.read(LONGEST)
        except urllib.error.HTTPError as error:
            raise ConnectionError(f"{self.address} refuses the message: {_text(error.read(LONGEST))}") from None
        except (urllib.error.URLError, TimeoutError) as error:
            raise ConnectionError(f"{self.address} does not answer: {getattr(error, 'reason', error)}") from None
        try:
            logits = load(content)["logits"]
        except (SafetensorError, KeyError) as error:
            raise ConnectionError(f"{self.address} answers with no logits: {error}") from None
        if tuple(logits.shape) != (len(images), self.manifest.num_classes):
            raise ConnectionError(f"{self.address} answers with logits of shape {list(logits.shape)}")
        return logits


def _text(content: bytes) -> str:
    """The error of a server's answer, printable."""
    try:
        text = str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        text = content.decode(errors="replace")
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:300]
