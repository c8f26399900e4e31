"""The cloud's side: logits of messages over HTTP, for a demonstration on loopback."""

from __future__ import annotations

import logging
import socket
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cem_fast._support.text import one_line
from cem_fast.defenses.quantized import CODES
from cem_fast.deploy import manifest as manifests
from cem_fast.deploy.files import open_half

MESSAGES = 64  # in one request
HEADER = 4096  # bytes around the numbers of a body
LOG = logging.getLogger("uvicorn.error")


class Refused(Exception):
    """A request that is answered with a status of 4xx and the name of the wrong field, or with 500 if the network fails."""

    def __init__(self, status: int, field: str, reason: str):
        super().__init__(reason)
        self.status, self.field, self.reason = status, field, reason


class CloudServer:
    """Serves the cloud half: ``POST /classify`` takes safetensors with ``message`` and returns safetensors with ``logits``.

    A demonstration for loopback: there is neither TLS nor authentication. A body of more than 64 messages is refused before it is
    read, as is a request beyond ``requests`` at a time.

    Args:
        folder: the folder with ``cloud.*`` and ``manifest.json``.
        host: address to listen on.
        port: port to listen on; 0 for a free one.
        requests: greatest number of requests at a time.

    Attributes:
        app: the FastAPI application, for another server.
        manifest: the description of the halves.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: a package of the extra ``serve`` is missing.
        ValueError: a file is damaged, or the half does not fit the manifest.

    Example:
        >>> from cem_fast.deploy import CloudServer
        >>> CloudServer("nowhere")
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] no exported halves there: 'nowhere/manifest.json'
    """

    def __init__(self, folder: str | Path, *, host: str = "127.0.0.1", port: int = 8000, requests: int = 64):
        self.manifest = manifests.read(folder)
        self._cloud = open_half(Path(folder) / self.manifest.file("cloud"))
        self.limit = MESSAGES * self.manifest.cost.message_bytes + HEADER
        self._require_half(Path(folder) / self.manifest.file("cloud"))
        try:
            import fastapi  # noqa: F401
            import uvicorn
        except ImportError as error:
            raise ImportError(f"the server needs {error.name}: pip install fastapi uvicorn") from error
        self.app = self._application()
        settings = uvicorn.Config(
            self.app, host=host, port=port, limit_concurrency=requests, log_level="warning", access_log=False
        )
        self._server = uvicorn.Server(settings)
        self._thread: threading.Thread | None = None

    def logits(self, body: bytes) -> bytes:
        """Returns the answer to the body of a request; raises :class:`cem_fast.deploy.server.Refused` for one that is not valid.

        Args:
            body: safetensors with one tensor, ``message``.
        """
        try:
            tensors = load(body)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise Refused(400, "body", f"not safetensors: {str(error)[:100]}") from None
        if set(tensors) != {"message"}:
            raise Refused(422, "message", f"expected one tensor, message, got {sorted(tensors)[:5]}")
        message = tensors["message"]
        self._check(message)
        try:
            logits = self._classified(message)
        except Exception as error:  # each runtime has its own classes
            LOG.error("the cloud half fails: %s", one_line(str(error)))
            raise Refused(500, "message", "the cloud half fails for these messages") from None
        return save({"logits": logits.contiguous()})

    def start(self) -> str:
        """Serves in a thread of its own; returns the address once it accepts requests.

        Raises:
            OSError: the port is taken.
        """
        settings = self._server.config
        try:
            listening = socket.create_server((settings.host, settings.port), backlog=settings.backlog)
        except OSError as error:
            raise OSError(
                f"the port {settings.port} of {settings.host} cannot be served on: {error.strerror}"
            ) from None
        self._thread = threading.Thread(target=self._server.run, args=([listening],), daemon=True)
        self._thread.start()
        while not self._server.started:
            self._thread.join(0.01)
            if not self._thread.is_alive():
                raise OSError(f"the server on the port {settings.port} of {settings.host} has ended")
        host, port = listening.getsockname()[:2]
        return f"http://{host}:{port}"

    def wait(self) -> None:
        """Waits until the server ends."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(0.2)

    def stop(self) -> None:
        """Ends a server that was started, after the requests under way."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()

    def _classified(self, message: Tensor) -> Tensor:
        logits, shape = self._cloud(message), (len(message), self.manifest.num_classes)
        if tuple(logits.shape) != shape or logits.dtype != torch.float32:
            raise ValueError(f"expected float32 logits {list(shape)}, got {logits.dtype} {list(logits.shape)}")
        return logits

    def _require_half(self, path: Path) -> None:
        """Fails if the cloud half does not take the messages of the manifest."""
        try:
            self._classified(torch.zeros(1, *self.manifest.message_shape, dtype=CODES[self.manifest.message]))
        except Exception as error:  # each runtime has its own classes
            raise ValueError(f"{path} does not fit {manifests.NAME}: {one_line(str(error))}") from None

    def _check(self, message: Tensor) -> None:
        expected, dtype = self.manifest.message_shape, CODES[self.manifest.message]
        if message.dtype != dtype:
            raise Refused(422, "message", f"expected {dtype}, got {message.dtype}")
        if tuple(message.shape[1:]) != expected or message.dim() != 1 + len(expected):
            raise Refused(
                422, "message", f"expected the shape [N, {', '.join(map(str, expected))}], got {list(message.shape)}"
            )
        if not 1 <= len(message) <= MESSAGES:
            raise Refused(413, "message", f"expected 1 to {MESSAGES} messages, got {len(message)}")
        if message.is_floating_point() and not message.isfinite().all():
            raise Refused(422, "message", "expected finite numbers")

    def _application(self) -> Any:
        from fastapi import FastAPI, Request, Response
        from fastapi.concurrency import run_in_threadpool
        from fastapi.responses import JSONResponse
        from starlette.requests import ClientDisconnect

        app = FastAPI(title="cem_fast cloud half", docs_url=None, redoc_url=None, openapi_url=None)

        async def classify(request: Request) -> Response:
            body = bytearray()
            try:
                if int(request.headers.get("content-length") or 0) > self.limit:
                    raise Refused(413, "body", f"expected at most {self.limit} bytes")
                async for part in request.stream():
                    body += part
                    if len(body) > self.limit:
                        raise Refused(413, "body", f"expected at most {self.limit} bytes")
                answer = await run_in_threadpool(self.logits, bytes(body))
            except ClientDisconnect:
                return Response(status_code=400)  # to nobody
            except Refused as error:
                return JSONResponse({"field": error.field, "error": error.reason}, status_code=error.status)
            return Response(answer, media_type="application/octet-stream")

        app.add_route("/classify", classify, methods=["POST"])
        return app
