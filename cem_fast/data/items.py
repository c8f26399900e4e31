"""Items of map-style data sets as tensors."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import IO, Any, Protocol

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from cem_fast.data import cache, stored
from cem_fast.data.images import is_grey, is_of_unknown_range, pixels, require_bright
from cem_fast.data.stored import StoredImages

CHANNELS = (1, 3, 4)  # of ordinary images: grey, color, and color with transparency


class LabeledImages(Protocol):
    """Interface of a map-style data set of pairs (image, label): a ``torch.utils.data.Dataset`` with a length, or a list.

    Example:
        >>> import torch
        >>> from cem_fast.data.items import LabeledImages
        >>> pairs: LabeledImages = [(torch.rand(1, 8, 8), 0), (torch.rand(1, 8, 8), 1)]
        >>> len(pairs)
        2
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def dataset_of(source: LabeledImages | DataLoader[Any]) -> Any:
    """The data set itself, or that of a loader.

    Args:
        source: the data set or its loader.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from cem_fast.data.items import dataset_of
        >>> dataset_of(DataLoader([1, 2])), dataset_of([1, 2])
        ([1, 2], [1, 2])
    """
    return source.dataset if isinstance(source, DataLoader) else source


def chosen_items(source: LabeledImages | DataLoader[Any], indices: Sequence[int]) -> Iterable[Any]:
    """Items of a data set, or of a loader's, which its processes read; the loader's batches and order are ignored.

    Args:
        source: the data set or its loader.
        indices: which items, in this order.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from cem_fast.data.items import chosen_items
        >>> list(chosen_items(DataLoader(["a", "b", "c"], batch_size=3, shuffle=True), [2, 0]))
        ['c', 'a']
    """
    if not isinstance(source, DataLoader):
        return (source[index] for index in indices)
    return DataLoader(
        Subset(source.dataset, indices),
        batch_size=None,
        num_workers=source.num_workers,
        collate_fn=_unchanged,
        generator=torch.Generator(),  # or a seed would be drawn from the caller's random numbers
    )


def _unchanged(item: Any) -> Any:
    return item


def read_items(items: Iterable[Any], argument: str, count: int = 0) -> tuple[Tensor, Tensor]:
    """Reads pairs of an image and an integer label.

    Args:
        items: the pairs; see :meth:`cem_fast.data.Splits.from_datasets` for the images.
        argument: their name in errors.
        count: number of items whose images stay in a file if they do not fit into memory; 0 to hold all.

    Returns:
        Images ``[N, C, H, W]`` float32 in [0, 1] and labels ``[N]`` int64.

    Raises:
        TypeError: an item is no such pair.
        ValueError: there is none, shapes differ, pixels lie outside [0, 1], or a label is negative. Or there is no place for a file.

    Example:
        >>> import numpy as np
        >>> from cem_fast.data.items import read_items
        >>> images, labels = read_items([(np.zeros((8, 8, 3), np.uint8), 1)], "photos")
        >>> images.shape, labels
        (torch.Size([1, 3, 8, 8]), tensor([1]))
    """
    images: list[Tensor] = []
    labels: list[int] = []
    brightest: list[Tensor] = []  # of images of unknown range
    file: IO[bytes] | None = None
    with ExitStack() as scratch:
        for index, item in enumerate(items):
            image, label = _read_item(item, f"{argument}[{index}]")
            if not images:
                images.append(image)
                needed = 4 * count * image.numel()
                if needed > stored.MEMORY:
                    file = scratch.enter_context(cache.scratch(needed))
                    stored.begin(file, (count, *image.shape), "<f4")
            elif file is None:
                images.append(image)
            if image.shape != images[0].shape:
                raise ValueError(
                    f"{argument}[{index}] must have the shape of {argument}[0] {tuple(images[0].shape)}, got {tuple(image.shape)}"
                )
            if file is not None:
                file.write(image.contiguous().numpy().tobytes())
            labels.append(label)
            if isinstance(item[0], Image) and is_of_unknown_range(item[0]):
                brightest.append(image.max())
        if not images:
            raise ValueError(f"{argument} must hold at least one image, got an empty dataset")
        require_bright(torch.stack(brightest) if brightest else torch.empty(0), argument)
        found = torch.stack(images) if file is None else StoredImages(file).as_tensor()
    return found, torch.tensor(labels)


def _read_item(item: Any, where: str) -> tuple[Tensor, int]:
    """The image ``[C, H, W]`` float32 and the label of an item."""
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise TypeError(f"{where} must be a pair (image, label), got {type(item).__name__}")
    try:
        label = operator.index(item[1])
    except TypeError:
        raise TypeError(f"the label of {where} must be an integer, got {item[1]!r}") from None
    if label < 0:
        raise ValueError(f"the label of {where} must not be negative, got {label}")
    return _to_tensor(item[0], where), label


def require_channels_first(shape: Sequence[int], what: str) -> None:
    """Raises if the shape of an image looks like ``[H, W, C]``.

    Args:
        shape: the shape.
        what: name of the images, for the error.

    Raises:
        ValueError: it does.

    Example:
        >>> from cem_fast.data.items import require_channels_first
        >>> require_channels_first((3, 32, 32), "photos")
    """
    channels, _, last = shape
    if channels not in CHANNELS and last in CHANNELS:
        raise ValueError(
            f"{what} must have shape [C, H, W], got {tuple(shape)}, which looks like [H, W, C]: permute the channels to the front"
        )


def _to_tensor(image: object, where: str) -> Tensor:
    if isinstance(image, Image):
        try:
            return pixels(image, "L" if is_grey(image) else "RGB")
        except ValueError as error:
            raise ValueError(f"cannot read the image of {where}: {error}") from None
    if not isinstance(image, Tensor):
        array = np.asarray(image)
        if array.dtype == object or array.ndim not in (2, 3):
            raise TypeError(
                f"the image of {where} must be a tensor, an array or a PIL image, got {type(image).__name__}"
            )
        if array.ndim == 3 and array.shape[2] not in CHANNELS and array.shape[0] in CHANNELS:
            raise ValueError(
                f"the array of {where} must have shape [H, W, C], got {array.shape}, which looks like [C, H, W]: pass it as a tensor"
            )
        image = torch.from_numpy(np.array(array))
        image = image if image.dim() == 2 else image.permute(2, 0, 1)
    if image.dim() == 2:
        image = image[None]
    if image.dim() != 3:
        raise ValueError(f"the image of {where} must have shape [C, H, W], got {tuple(image.shape)}")
    require_channels_first(image.shape, f"the image of {where}")
    if image.dtype == torch.uint8:
        return image.float() / 255
    image = image.float()
    low, high = image.aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"pixels of {where} must lie in [0, 1], got {float(low):.3g} to {float(high):.3g}: leave out the normalization"
        )
    return image
