"""FaceScrub: photographs of 530 people, resized to 48x48 pixels once and read from there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cem_fast.data.files import files_in, folders_in
from cem_fast.data.images import (
    eight_bits,
    is_of_unknown_range,
    opened,
    pixels,
    read_all,
    require_bright,
    upright,
)
from cem_fast.data.root import VARIABLE
from cem_fast.data.splits import Splits, published

NAME = "facescrub"
CREDIT = "FaceScrub: Ng and Winkler, 'A data-driven approach to cleaning large face datasets', ICIP 2014."
FOLDER = "facescrub-dataset"
SIDE = 48
PARTS = ("train", "validate")
UNREADABLE = "unreadable.txt"
HOW = (
    "its photographs have no public archive: ask its authors (http://vintage.winklerbros.net/facescrub.html), lay them out as "
    "{raw}/{{train,validate}}/First_Last/*.jpg, and run `cem-fast data prepare facescrub`"
)


def load(root: Path, *, image_size: int | None) -> Splits:
    """Reads the prepared photographs, one class per person, with the training part ``train`` and the test part ``validate``.

    Args:
        root: parent of ``facescrub-dataset``.
        image_size: side in pixels that the images are resized to; None for 48.

    Returns:
        The splits, grouped by person.

    Raises:
        FileNotFoundError: the photographs are missing, or have not been prepared.
        ValueError: a photograph is damaged, or a part lacks a person.

    Example:
        >>> from pathlib import Path
        >>> from cem_fast.data import facescrub
        >>> try:
        ...     facescrub.load(Path("nowhere"), image_size=None)
        ... except FileNotFoundError as error:
        ...     print(str(error).split(":")[0])
        facescrub is not there, no nowhere/facescrub-dataset/48x48
    """
    folder = root / FOLDER / f"{SIDE}x{SIDE}"
    if not folder.is_dir():
        raw = root / FOLDER / "raw"
        how = f"`cem-fast data prepare {NAME}` makes it of {raw}" if raw.is_dir() else HOW.format(raw=raw)
        raise FileNotFoundError(
            f"{NAME} is not there, no {folder}: {how}; --data-root or {VARIABLE} names another root"
        )
    people = {part: _people(folder / part) for part in PARTS}
    everybody = sorted({person for part in PARTS for person in people[part]})
    for part in PARTS:
        if absent := [person for person in everybody if not people[part].get(person)]:
            raise ValueError(
                f"{folder / part} must hold photographs of all {len(everybody)} people, got none of {absent[0]}, one of {len(absent)}"
            )
    train, test = (_read(people[part], everybody, image_size or SIDE) for part in PARTS)
    names = [person.replace("_", " ") for person in everybody]
    return published(NAME, train, test, class_names=names, credit=CREDIT, mirrored=True, unit="people")


def prepare(root: Path, on_file: Callable[[int, int], None] = lambda done, total: None) -> tuple[Path, int, list[str]]:
    """Writes 48x48 copies of the raw photographs; their folder appears only when it is complete.

    The photographs are resized to squares, with antialiasing, and stored as color JPEGs under the same names. Unreadable files are skipped
    and listed in ``48x48/unreadable.txt``.

    Args:
        root: parent of ``facescrub-dataset/raw``.
        on_file: callback with the number of files done and of all files.

    Returns:
        The new folder, its number of photographs, and the unreadable files, relative to ``raw``.

    Raises:
        FileExistsError: the folder exists already.
        FileNotFoundError: there are no raw photographs.
        ValueError: no file can be read.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from cem_fast.data import facescrub
        >>> with tempfile.TemporaryDirectory() as root:
        ...     person = Path(root) / "facescrub-dataset" / "raw" / "train" / "Ada_Lovelace"
        ...     person.mkdir(parents=True)
        ...     Image.new("RGB", (60, 80)).save(person / "1.jpg")
        ...     folder, number, unreadable = facescrub.prepare(Path(root))
        >>> folder.name, number, unreadable
        ('48x48', 1, [])
    """
    raw, folder = root / FOLDER / "raw", root / FOLDER / f"{SIDE}x{SIDE}"
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: remove it to prepare it again")
    files = [file for part in PARTS for person in _people(raw / part).values() for file in person]
    if not files:
        raise FileNotFoundError(f"no photographs in {raw}: {HOW.format(raw=raw)}")
    staged = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    unreadable = []
    try:
        for done, file in enumerate(files, start=1):
            place = staged / file.relative_to(raw)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                with opened(file) as image:
                    if is_of_unknown_range(image):
                        require_bright(pixels(image, "L")[None], file.name)
                    photograph = eight_bits(upright(image))
            except ValueError:
                unreadable.append(file.relative_to(raw).as_posix())
            else:
                photograph.resize((SIDE, SIDE), Image.Resampling.BILINEAR).save(place, format="JPEG", quality=95)
            on_file(done, len(files))
        if len(unreadable) == len(files):
            raise ValueError(f"none of the {len(files)} files in {raw} can be read as an image, not even {files[0]}")
        (staged / UNREADABLE).write_text("".join(f"{name}\n" for name in unreadable), encoding="utf-8")
        os.rename(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return folder, len(files) - len(unreadable), unreadable


def _people(folder: Path) -> dict[str, list[Path]]:
    """Photographs by the person's name; empty if there is no such folder."""
    if not folder.is_dir():
        return {}
    return {person.name: files_in(person) for person in folders_in(folder)}


def _read(people: dict[str, list[Path]], everybody: list[str], size: int) -> tuple[Tensor, Tensor]:
    files = [(file, label) for label, person in enumerate(everybody) for file in people[person]]
    return read_all([file for file, _ in files], size, "RGB"), torch.tensor([label for _, label in files])
