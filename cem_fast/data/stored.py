"""Images in a file on disk, read as they are needed."""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterator
from copy import copy
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

MEMORY = 2_000_000_000  # bytes of float32 images that are held in memory; images that need more stay in a file
CHUNK = 256  # images that are read at once
AT_ONCE = 1 << 24  # bytes of one call
# the header that np.save writes for four axes; matched to the byte, since evaluating it would trust the file
HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '(\|u1|<f4)', 'fortran_order': False, 'shape': "
    rb"\((\d{1,10}), (\d{1,5}), (\d{1,6}), (\d{1,6})\), \} *\n",
    re.DOTALL,
)
ADVICE = "needs images in memory, and these are in a file: take as many as fit, such as images[:1000]"
Index = int | slice | Tensor


class StoredImages:
    """Images ``[N, C, H, W]`` in a ``.npy`` file, indexed like the float32 tensor in [0, 1] that would hold all of them.

    An index reads its images alone, and gives the bits of that tensor. Numbers of type uint8 are divided by 255. Memory holds one index
    of 8 bytes per image.

    Args:
        file: the file, open for reading. It may be closed afterwards, and lose its name.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds anything but images, or has another size than its header says.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from cem_fast.data.stored import StoredImages
        >>> with tempfile.TemporaryFile() as file:
        ...     np.save(file, np.full((3, 1, 2, 2), 51, np.uint8))
        ...     images = StoredImages(file)
        ...     print(len(images), images[1].flatten(), images.only(slice(1, 3)).shape)
        3 tensor([0.2000, 0.2000, 0.2000, 0.2000]) torch.Size([2, 1, 2, 2])
    """

    dtype = torch.float32

    def __init__(self, file: IO[bytes]):
        file.flush()
        self.name, self.file = file.name, _File(file.fileno())
        found = os.fstat(file.fileno())
        header = HEADER.match(self.file.read(256, 0)) if stat.S_ISREG(found.st_mode) else None
        if header is None:
            raise ValueError("expected a .npy file of images [N, C, H, W], uint8 or float32")
        self.start = header.end()
        self.kind = np.dtype(header[2].decode())
        count, *size = (int(number) for number in header.groups()[2:])
        self.size = tuple(size)
        if found.st_size != self.start + count * self._stride or self.start != 10 + int.from_bytes(header[1], "little"):
            raise ValueError(f"expected {count} images of {self._stride} bytes, got a file of {found.st_size} bytes")
        self.rows = torch.arange(count)
        self.device = torch.device("cpu")

    @property
    def _stride(self) -> int:
        return math.prod(self.size) * self.kind.itemsize

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that would hold all images."""
        return torch.Size((len(self.rows), *self.size))

    @property
    def nbytes(self) -> int:
        """Bytes of the float32 tensor that would hold all images."""
        return 4 * math.prod(self.shape)

    def __len__(self) -> int:
        return len(self.rows)

    def dim(self) -> int:
        """Number of axes."""
        return 4

    def is_floating_point(self) -> bool:
        """Whether an index gives floating-point numbers."""
        return True

    def __getitem__(self, index: Index) -> Tensor:
        rows = self._chosen(index)
        images = torch.from_numpy(self._read(rows.reshape(-1).numpy()))
        floats = images.float().div_(255) if self.kind == np.uint8 else images
        return floats.view(*rows.shape, *self.size).to(self.device)

    def only(self, index: slice | Tensor) -> StoredImages:
        """Some of the images, not yet read.

        Args:
            index: which.
        """
        return self._with(self._chosen(index))

    def to(self, device: str | torch.device) -> StoredImages:
        """The same images, which an index reads to a device.

        Args:
            device: the device.
        """
        found = self._with(self.rows)
        found.device = torch.device(device)
        return found

    def split(self, count: int) -> Iterator[Tensor]:
        """The images as tensors of at most so many, read one at a time.

        Args:
            count: images of a tensor.
        """
        return (self[slice(start, start + count)] for start in range(0, len(self), count))

    def grey(self, file: IO[bytes]) -> StoredImages:
        """The first channel of all images, copied to another file.

        Args:
            file: the other file, empty.
        """
        begin(file, (len(self), 1, *self.size[1:]), self.kind.str)
        for rows in self.rows.split(CHUNK):
            file.write(self._read(rows.numpy())[:, :1].tobytes())
        return StoredImages(file)

    def as_tensor(self) -> Tensor:
        """The images themselves; type checkers take them for a tensor, whose place they take where it is only indexed."""
        return cast(Tensor, self)

    def tensor_split(self, count: int) -> tuple[StoredImages, ...]:
        """As many parts, as ``torch.tensor_split`` divides, not yet read.

        Args:
            count: number of parts.
        """
        return tuple(self._with(rows) for rows in self.rows.tensor_split(count))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError(f"{getattr(function, '__name__', function)} {ADVICE}")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name} {ADVICE}")

    def _with(self, rows: Tensor) -> StoredImages:
        found = copy(self)
        found.rows = rows
        return found

    def _chosen(self, index: Index) -> Tensor:
        return self.rows[index.to("cpu") if isinstance(index, Tensor) else index]

    def _read(self, rows: np.ndarray) -> np.ndarray:
        """Images of the file, of its own type; neighbors are read together."""
        images = np.empty((len(rows), *self.size), self.kind)
        ends = [*(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)] if len(rows) else []
        begin = 0
        for end in ends:
            into = images[begin:end].reshape(-1).view(np.uint8)
            at, done = self.start + int(rows[begin]) * self._stride, 0
            while done < len(into):
                count = self.file.read_into(into[done : done + AT_ONCE], at + done)
                if not count:
                    raise OSError("the file of decoded images was cut short while it was in use: start again")
                done += count
            begin = end
        return images


class _File:
    """A file's own descriptor, closed with the last images that read it."""

    def __init__(self, descriptor: int):
        self.descriptor = os.dup(descriptor)

    def __del__(self) -> None:
        os.close(self.descriptor)

    # several processes may share the descriptor, and with it the position that other calls read from

    def read(self, count: int, at: int) -> bytes:
        return os.pread(self.descriptor, count, at)

    def read_into(self, buffer: np.ndarray, at: int) -> int:
        return os.preadv(self.descriptor, [buffer.data], at)


def begin(file: IO[bytes], shape: tuple[int, ...], kind: str) -> None:
    """Writes the header of a file of images, whose bytes are to follow.

    Args:
        file: the empty file.
        shape: ``[N, C, H, W]`` of all images.
        kind: ``|u1`` for uint8 or ``<f4`` for float32.

    Example:
        >>> import tempfile
        >>> from cem_fast.data import stored
        >>> with tempfile.TemporaryFile() as file:
        ...     stored.begin(file, (2, 1, 1, 3), "|u1")
        ...     _ = file.write(bytes([0, 51, 102, 153, 204, 255]))
        ...     print(stored.StoredImages(file)[:].flatten())
        tensor([0.0000, 0.2000, 0.4000, 0.6000, 0.8000, 1.0000])
    """
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})


def taken(images: Tensor, index: slice | Tensor) -> Tensor:
    """Some of the images; those in a file are not read.

    Args:
        images: a tensor ``[N, C, H, W]``, or images in a file.
        index: which.

    Example:
        >>> import torch
        >>> from cem_fast.data.stored import taken
        >>> taken(torch.zeros(3, 1, 2, 2), slice(2)).shape
        torch.Size([2, 1, 2, 2])
    """
    return images.only(index).as_tensor() if isinstance(images, StoredImages) else images[index]


def moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """The mean image, and the variance of all pixels about it.

    Args:
        images: a tensor ``[N, C, H, W]``, or images in a file.

    Returns:
        The mean ``[C, H, W]`` and the variance, a number.

    Example:
        >>> import torch
        >>> from cem_fast.data.stored import moments
        >>> moments(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1))
        (tensor([[[0.5000]]]), tensor(0.2500))
    """
    if not isinstance(images, StoredImages):
        mean = images.mean(0)
        return mean, (images - mean).square().mean()
    sums = torch.zeros(2, *images.size, dtype=torch.float64, device=images.device)
    for part in images.split(CHUNK):
        sums += torch.stack([part.double().sum(0), part.double().square().sum(0)])
    mean, squares = sums / len(images)
    return mean.float(), (squares - mean.square()).mean().float()
