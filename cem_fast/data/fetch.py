"""Downloads of published data sets: resumable, verified, and moved to their folder when complete."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cem_fast._support.files import require_regular
from cem_fast._support.text import printable

CHUNK = 1 << 20
TIMEOUT = 60  # seconds without a byte

Watcher = Callable[[str, int, int | None], None]  # file, bytes so far, total bytes if the server declares them


class PublishedFile(NamedTuple):
    """A published file.

    Args:
        size: bytes of the file; a download stops beyond them.
        md5: digest of the file.

    Example:
        >>> from cem_fast.data.fetch import PublishedFile
        >>> PublishedFile(size=5, md5="5d41402abc4b2a76b9719d911017c592").size
        5
    """

    size: int
    md5: str


@dataclass(frozen=True)
class Source:
    """Address and files of a published data set.

    Args:
        address: prefix of the files' addresses.
        files: size and md5 by name: one archive (.tar.gz or .zip) that contains ``folder``, or the files of ``folder``.
        folder: folder of the data set below the data root.

    Example:
        >>> from cem_fast import data
        >>> source = data.SOURCES["cifar10"]
        >>> source.folder, list(source.files)
        ('cifar-10-batches-py', ['cifar-10-python.tar.gz'])
    """

    address: str
    files: Mapping[str, PublishedFile]
    folder: str


def fetch(
    source: Source, root: Path, *, address: str | None = None, on_bytes: Watcher = lambda file, done, total: None
) -> Path:
    """Downloads and unpacks a data set; its folder appears only when it is complete and verified.

    An interrupted download stays in a hidden folder next to it, from which the next call continues.

    Args:
        source: the data set.
        root: parent of the data set's folder; created if needed.
        address: address of a mirror; None for ``source.address``.
        on_bytes: callback with the name of the file, its bytes so far, and its total bytes if the server declares them.

    Returns:
        The data set's folder.

    Raises:
        FileExistsError: the folder exists already.
        OSError: a file cannot be downloaded, is not the published one, or the disk is full.
        ValueError: ``address`` does not begin with ``http``, or the archive cannot be unpacked or contains something else.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from cem_fast import data
        >>> from cem_fast.data.fetch import fetch
        >>> with tempfile.TemporaryDirectory() as root:
        ...     fetch(data.SOURCES["cifar10"], Path(root), address="ftp://mirror")
        Traceback (most recent call last):
        ...
        ValueError: address must begin with http:// or https://, got 'ftp://mirror'
    """
    address = source.address if address is None else address
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"address must begin with http:// or https://, got {address!r}")
    target = root / source.folder
    if target.exists():
        raise FileExistsError(f"{target} exists already: remove it to download it again")
    working = root / f".{source.folder}.fetching"
    files = working / "files"
    files.mkdir(parents=True, exist_ok=True)
    with _alone(working):
        for name, published in source.files.items():
            _download(f"{address.rstrip('/')}/{name}", files / name, published, on_bytes)
        result = files
        if archives := [files / name for name in source.files if name.endswith((".tar.gz", ".zip"))]:
            (archive,), unpacked = archives, working / "unpacked"
            shutil.rmtree(unpacked, ignore_errors=True)  # of an interrupted call
            _unpack(archive, unpacked)
            result = unpacked / source.folder
            if not result.is_dir():
                raise ValueError(f"{archive} must hold a folder {source.folder}, got none")
        os.rename(result, target)
        shutil.rmtree(working)
    return target


def _download(url: str, path: Path, published: PublishedFile, on_bytes: Watcher) -> None:
    if path.exists():  # only verified files have their full name
        require_regular(path)
        return
    part = path.with_name(f"{path.name}.part")
    if part.exists():
        require_regular(part)
    shown = printable(url)
    try:
        _continue(url, part, published.size, on_bytes)
    except (OSError, http.client.HTTPException) as error:
        kept = part.stat().st_size if part.exists() else 0
        reason = error.reason if type(error) is urllib.error.URLError else error
        raise OSError(
            f"cannot download {shown}: {printable(str(reason))}; {kept:,} bytes are kept, and the same command continues from there"
        ) from error
    with open(part, "rb") as file:
        found = hashlib.md5(usedforsecurity=False)
        while content := file.read(CHUNK):
            found.update(content)
    if found.hexdigest() != published.md5:
        size = part.stat().st_size
        part.unlink()
        gave = f"more than {published.size:,} bytes" if size > published.size else f"{size:,} bytes"
        raise OSError(
            f"{shown} gave {gave} with md5 {found.hexdigest()}, expected {published.md5}: not the published file, and removed"
        )
    os.rename(part, path)


def _continue(url: str, part: Path, most: int, on_bytes: Watcher) -> None:
    """Downloads the missing bytes of a file, at most one more than ``most``: a body may be endless."""
    have = part.stat().st_size if part.exists() else 0
    if have > most:
        have = 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:  # nothing is missing
            return
        raise
    with response:
        # a server without support for ranges sends the whole file
        continued = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if response.status == 206 and not continued:
            part.unlink()
            raise http.client.HTTPException(f"the server sent {response.headers.get('Content-Range')!r} of the file")
        have = have if continued else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length and length.isdecimal() else None
        with open(part, "ab" if continued else "wb") as file:
            on_bytes(part.stem, have, total)
            while have <= most and (content := response.read(min(CHUNK, most + 1 - have))):
                file.write(content)
                have += len(content)
                on_bytes(part.stem, have, total)
        if total is not None and have < min(total, most):
            raise ConnectionError(f"the connection ended after {have:,} of {total:,} bytes")


def _unpack(archive: Path, folder: Path) -> None:
    folder.mkdir()
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as file:
                for path in map(PurePosixPath, file.namelist()):
                    if path.is_absolute() or ".." in path.parts:
                        raise ValueError(f"'{path}' would land outside of the folder")
                file.extractall(folder)
        else:
            if not hasattr(tarfile, "data_filter"):
                raise ValueError("this Python is too old to unpack it safely: 3.10.12, 3.11.4 or newer is needed")
            with tarfile.open(archive) as file:
                file.extractall(folder, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise ValueError(f"cannot unpack {archive}: {printable(str(error))}") from error
    except OSError as error:  # of the disk, or of an impossible offset in the archive
        raise OSError(f"cannot unpack {archive}: {printable(str(error))}") from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Locks a folder against other processes.

    Raises:
        OSError: another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"another process is downloading to {folder}") from None
        yield
    finally:
        os.close(handle)
