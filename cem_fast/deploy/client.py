"""The device's side: images to messages with secure noise, and messages to a server."""

from __future__ import annotations

import http.client
import json
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cem_fast._support.text import one_line
from cem_fast.defenses.quantized import CODES
from cem_fast.deploy import draws
from cem_fast.deploy import manifest as manifests
from cem_fast.deploy.files import open_half

LONGEST = 2**24  # bytes of an answer that are read


class DeviceClient:
    """Runs the device half with draws of the system's secure generator, and sends its messages to a cloud server.

    A demonstration for loopback: there is neither TLS nor authentication. Messages go to the address alone: redirections are not
    followed, and proxies of the environment are not used.

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
        self._place = _place(address) if address else None
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
        message = self._device(images, *draws.secure(self.manifest.random_inputs, len(images)))
        self._require_messages(message)
        return message

    def classify(self, images: Tensor) -> Tensor:
        """Sends the messages of images to the server and returns its logits ``[N, num_classes]``.

        Args:
            images: ``[N, C, H, W]``, pixels in [0, 1].

        Raises:
            ConnectionError: there is no answer, or none with the logits of these messages.
            ValueError: the images have another shape or dtype, or there is no address.

        Example:
            >>> from cem_fast.deploy import DeviceClient
            >>> DeviceClient("nowhere", "ftp://127.0.0.1")
            Traceback (most recent call last):
            ValueError: address must be as in http://127.0.0.1:8000, got 'ftp://127.0.0.1'
        """
        return self.send(self.message(images))

    def send(self, messages: Tensor) -> Tensor:
        """Sends messages to the server and returns its logits ``[N, num_classes]``.

        Args:
            messages: ``[N, ...]`` of the shape and dtype of the manifest.

        Raises:
            ConnectionError: there is no answer, or none with the logits of these messages.
            ValueError: the messages have another shape or dtype, or there is no address.

        Example:
            >>> from cem_fast.deploy import DeviceClient
            >>> DeviceClient("nowhere", "http://127.0.0.1:port")
            Traceback (most recent call last):
            ValueError: address must be as in http://127.0.0.1:8000, got 'http://127.0.0.1:port'
        """
        if self._place is None:
            raise ValueError("address must be that of a server to classify by, got ''")
        self._require_messages(messages)
        status, content = self._post(save({"message": messages.contiguous()}))
        if status != 200:
            raise ConnectionError(f"{self.address} refuses the message: {_text(content) or f'status {status}'}")
        try:
            logits = load(content)["logits"]
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ConnectionError(f"{self.address} answers with no logits: {one_line(str(error))}") from None
        shape = (len(messages), self.manifest.num_classes)
        if tuple(logits.shape) != shape or logits.dtype != torch.float32 or not logits.isfinite().all():
            raise ConnectionError(
                f"{self.address} must answer with finite float32 logits {list(shape)}, got {logits.dtype} {list(logits.shape)}"
            )
        return logits

    def _post(self, body: bytes) -> tuple[int, bytes]:
        """Status and content of the answer to a request with this body."""
        assert self._place is not None
        host, port, path = self._place
        connection = http.client.HTTPConnection(host, port, timeout=self.timeout)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/octet-stream"})
            answer = connection.getresponse()
            return answer.status, answer.read(LONGEST)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ConnectionError(f"{self.address} does not answer: {one_line(str(reason))}") from None
        finally:
            connection.close()

    def _require_messages(self, messages: Tensor) -> None:
        shape, dtype = self.manifest.message_shape, CODES[self.manifest.message]
        if tuple(messages.shape[1:]) != shape or not len(messages) or messages.dtype != dtype:
            raise ValueError(
                f"messages must be {dtype} [N, {', '.join(map(str, shape))}], got {messages.dtype} {list(messages.shape)}"
            )


def _place(address: str) -> tuple[str, int, str]:
    """Host, port and path of an address."""
    with suppress(ValueError):  # of a port that is no number
        parts = urlsplit(address)
        port = 80 if parts.port is None else parts.port
        if parts.scheme == "http" and parts.hostname and not (parts.username or parts.query or parts.fragment):
            return parts.hostname, port, f"{parts.path.rstrip('/')}/classify"
    raise ValueError(f"address must be as in http://127.0.0.1:8000, got {address!r}")


def _text(content: bytes) -> str:
    """The error of a server's answer, printable."""
    try:
        text = str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        text = content.decode(errors="replace")
    return one_line(text)
