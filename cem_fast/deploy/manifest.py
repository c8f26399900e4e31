"""The description of two exported halves, ``manifest.json``."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from cem_fast._support import typed_json
from cem_fast._support.files import write_atomically
from cem_fast.defenses.quantized import CODES
from cem_fast.deploy.draws import RandomInput
from cem_fast.deploy.files import SUFFIXES

NAME = "manifest.json"
SCHEMA = 1
MARK = f'{{\n "schema": {SCHEMA},\n "made_by": "cem_fast'.encode()
MOST = 2**24  # numbers in an image, a message, the logits, or all random inputs


@dataclass(frozen=True)
class Preprocessing:
    """What the device half does to an image before the encoder: ``(image - mean) / std``.

    Args:
        low: least value of a pixel.
        high: greatest value of a pixel.
        mean: mean of each channel; None for 0.
        std: standard deviation of each channel; None for 1.

    Example:
        >>> from cem_fast.deploy.manifest import Preprocessing
        >>> Preprocessing().high
        1.0
    """

    low: float = 0.0
    high: float = 1.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.std is not None and not min(self.std, default=1.0) > 0:
            raise ValueError(f"std must be positive, got {list(self.std)}")


@dataclass(frozen=True)
class Noise:
    """The randomness of a message.

    Args:
        source: ``input`` for draws that the application passes in, ``graph`` for draws of torch's generator, ``none``.
        std: standard deviation of the noise, a number or one per number of the message; measured if the defense states none.
        variance: mean variance of the numbers of a message over messages of the probe image.

    Example:
        >>> from cem_fast.deploy.manifest import Noise
        >>> Noise("input", 0.1, 0.01).source
        'input'
    """

    source: str
    std: float | tuple[float, ...]
    variance: float

    def __post_init__(self) -> None:
        if self.source not in ("input", "graph", "none"):
            raise ValueError(f"source must be input, graph or none, got {self.source!r}")
        least = min(self.std, default=0.0) if isinstance(self.std, tuple) else self.std
        if not (least >= 0 and self.variance >= 0):
            raise ValueError(f"std and variance must be at least 0, got {least} and {self.variance}")


@dataclass(frozen=True)
class Cost:
    """Cost of the device half for one image.

    Args:
        parameters: trainable numbers of the encoder.
        multiplications: multiplications of encoder and defense, in convolutions and matrix products.
        milliseconds: median time of the exported half on the exporting machine's CPU.
        message_bytes: bytes of one message.

    Example:
        >>> from cem_fast.deploy.manifest import Cost
        >>> Cost(100, 2000, 0.1, 256).message_bytes
        256
    """

    parameters: int
    multiplications: int
    milliseconds: float
    message_bytes: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")


@dataclass(frozen=True)
class Manifest:
    """What an application needs to know of ``device.*`` and ``cloud.*``.

    Args:
        format: ``onnx``, ``pt2`` or ``executorch``.
        image_shape: ``(C, H, W)``.
        message_shape: shape of one message.
        num_classes: number of logits.
        classes: names of the classes, by index; empty if there are none.
        message: dtype of the numbers of a message: ``float32``, ``float16`` or ``uint8``.
        message_range: values of the codes 0 and 255 of ``uint8``; None for the others.
        preprocessing: done inside the device half.
        noise: the randomness of a message.
        random_inputs: inputs of the device half after the image, standard draws; empty where the graph draws.
        defense: names of the defense's parts.
        cost: cost of the device half.
        undefended: cost of the device half of the same network without a defense; None if unknown.
        run: digest of the run's description; empty without a run.
        digests: SHA-256 of each file.
        versions: versions of the packages that exported.

    Raises:
        ValueError: an entry is out of range.

    Example:
        >>> from cem_fast.deploy.manifest import Cost, Manifest, Noise, Preprocessing
        >>> noise = Noise("input", 0.1, 0.01)
        >>> shapes = {"image_shape": (1, 16, 16), "message_shape": (4, 4, 4), "num_classes": 3, "classes": ()}
        >>> message = {"message": "float32", "message_range": None}
        >>> manifest = Manifest(
        ...     format="onnx", **shapes, **message, preprocessing=Preprocessing(), noise=noise, random_inputs=(),
        ...     defense=("GaussianNoise",), cost=Cost(1, 1, 1.0, 256), run="", digests={}, versions={},
        ... )
        >>> manifest.file("device")
        'device.onnx'
    """

    format: str
    image_shape: tuple[int, ...]
    message_shape: tuple[int, ...]
    num_classes: int
    classes: tuple[str, ...]
    message: str
    message_range: tuple[float, float] | None
    preprocessing: Preprocessing
    noise: Noise
    random_inputs: tuple[RandomInput, ...]
    defense: tuple[str, ...]
    cost: Cost
    run: str
    digests: dict[str, str]
    versions: dict[str, str]
    undefended: Cost | None = None

    def __post_init__(self) -> None:
        if self.format not in SUFFIXES:
            raise ValueError(f"format must be {', '.join(SUFFIXES)}, got {self.format!r}")
        if self.message not in CODES:
            raise ValueError(f"message must be {', '.join(CODES)}, got {self.message!r}")
        for name, shape in (
            ("image_shape", self.image_shape),
            ("message_shape", self.message_shape),
            ("num_classes", (self.num_classes,)),
            *(("random_inputs", each.shape) for each in self.random_inputs),
        ):
            numbers = 1
            for side in shape:
                numbers *= side
                if not 0 < side <= MOST or numbers > MOST:
                    raise ValueError(f"{name} must be positive and hold at most {MOST} numbers, got {list(shape)}")
        if len(self.image_shape) != 3:
            raise ValueError(f"image_shape must be (C, H, W), got {list(self.image_shape)}")
        self._check_lengths()
        self._check_random_inputs()
        low, high = self.message_range or (0.0, 0.0)
        if (low < high) != (self.message == "uint8"):
            raise ValueError(f"message_range must be [low, high] for uint8 alone, got {self.message_range}")

    def _check_lengths(self) -> None:
        """Fails if an entry does not fit the shapes, from which limits of the server are derived."""
        numbers = math.prod(self.message_shape)
        expected = numbers * CODES[self.message].itemsize
        if self.cost.message_bytes != expected:
            raise ValueError(
                f"cost.message_bytes must be {expected} for {numbers} numbers of {self.message}, got {self.cost.message_bytes}"
            )
        channels, stated = self.image_shape[0], self.noise.std
        for name, values, length in (
            ("classes", self.classes or None, self.num_classes),
            ("noise.std", stated if isinstance(stated, tuple) else None, numbers),
            ("preprocessing.mean", self.preprocessing.mean, channels),
            ("preprocessing.std", self.preprocessing.std, channels),
        ):
            if values is not None and len(values) != length:
                raise ValueError(f"{name} must have {length} entries, got {len(values)}")

    def _check_random_inputs(self) -> None:
        names = [each.name for each in self.random_inputs]
        if any(not re.fullmatch(r"[a-z_0-9]{1,40}", name) for name in names):
            raise ValueError("the names of random_inputs must be of a to z, 0 to 9 and _")
        if len({"image", *names}) <= len(names):
            raise ValueError(f"the names of random_inputs must differ, also from image, got {names}")
        numbers = sum(math.prod(each.shape) for each in self.random_inputs)
        if numbers > MOST:
            raise ValueError(f"random_inputs must hold at most {MOST} numbers in all, got {numbers}")
        if names and self.noise.source != "input":
            raise ValueError(f"noise.source must be input for random_inputs, got {self.noise.source!r}")

    def file(self, half: str) -> str:
        """Name of the file of a half.

        Args:
            half: ``device`` or ``cloud``.

        """
        return half + SUFFIXES[self.format]

    def save(self, folder: str | Path) -> None:
        """Write ``manifest.json``."""
        text = json.dumps({"schema": SCHEMA, "made_by": "cem_fast", **asdict(self)}, indent=1, allow_nan=False)
        write_atomically(Path(folder) / NAME, text.encode())


def read(folder: str | Path) -> Manifest:
    """Read and check ``manifest.json``.

    Args:
        folder: the folder of the exported halves.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, or an entry is wrong; the error names it.

    Example:
        >>> from cem_fast.deploy import manifest
        >>> manifest.read("nowhere")
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] no exported halves there: 'nowhere/manifest.json'
    """
    path = Path(folder) / NAME
    if not path.is_file():
        raise FileNotFoundError(2, "no exported halves there", str(path))
    entries = typed_json.load_document(path, f"exported halves of schema {SCHEMA}", SCHEMA)
    return typed_json.read(Manifest, entries, path)
