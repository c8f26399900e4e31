"""Downloading a data set from where it is published: resumed, verified, and in its place whole or not at all."""

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

from cem_fast.data.files import require_regular

CHUNK = 1 << 20
TIMEOUT = 60  # seconds without a byte

Watcher = Callable[[str, int, int | None], None]  # file, bytes so far, bytes in all where the server says so


class Published(NamedTuple):
    """A published file.

    Args:
        size: its bytes; a download stops beyond them.
        md5: its digest.
    """

    size: int
    md5: str


@dataclass(frozen=True)
class Source:
    """Where a data set is published.

    Args:
        address: what the names of its files are appended to.
        files: name -> size and md5; one archive (.tar.gz or .zip) that holds ``folder``, or the files that belong into it.
        folder: what the data set is called below the data root.
    """

    address: str
    files: Mapping[str, Published]
    folder: str


def fetch(
    source: Source, root: Path, *, address: str | None = None, on_bytes: Watcher = lambda file, done, total: None
) -> Path:
    """Downloads a data set; its folder appears under its name when everything in it is verified and unpacked.

    Everything until then lies in a hidden folder beside it, where the next call finds what has been downloaded and goes on.

    Args:
        source: the data set.
        root: the folder that it goes to; made if needed.
        address: a mirror of the published files to take the place of ``source.address``.
        on_bytes: hears the file, the bytes that are there and the bytes in all, None where the server does not say.

    Returns:
        The data set's folder.

    Raises:
        FileExistsError: it is there already.
        OSError: a file cannot be downloaded, is not the published one, or the disk is full.
        ValueError: ``address`` is not of the web, or the archive cannot be unpacked or holds something else.
    """
    address = source.address if address is None else address
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"address must begin with http:// or https://, got {address!r}")
    target = root / source.folder
    if target.exists():
        raise FileExistsError(f"{target} is there already: remove it to get it again")
    working = root / f".{source.folder}.fetching"
    files = working / "files"
    files.mkdir(parents=True, exist_ok=True)
    with _alone(working):
        for name, published in source.files.items():
            _download(f"{address.rstrip('/')}/{name}", files / name, published, on_bytes)
        result = files
        if archives := [files / name for name in source.files if name.endswith((".tar.gz", ".zip"))]:
            (archive,), unpacked = archives, working / "unpacked"
            shutil.rmtree(unpacked, ignore_errors=True)  # of a call that did not come to its end
            _unpack(archive, unpacked)
            result = unpacked / source.folder
            if not result.is_dir():
                raise ValueError(f"{archive} must hold a folder {source.folder}, got none")
        os.rename(result, target)
        shutil.rmtree(working)
    return target


def _download(url: str, path: Path, published: Published, on_bytes: Watcher) -> None:
    if path.exists():  # only verified files have their full name
        require_regular(path)
        return
    part = path.with_name(f"{path.name}.part")
    if part.exists():
        require_regular(part)
    url = printable(url)
    try:
        _continue(url, part, published.size, on_bytes)
    except (OSError, http.client.HTTPException) as error:
        kept = part.stat().st_size if part.exists() else 0
        reason = error.reason if type(error) is urllib.error.URLError else error
        raise OSError(
            f"cannot download {url}: {printable(str(reason))}; {kept:,} bytes are kept, and the same command goes on from there"
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
            f"{url} gave {gave} with md5 {found.hexdigest()}, expected {published.md5}: not the published file, and removed"
        )
    os.rename(part, path)


def _continue(url: str, part: Path, most: int, on_bytes: Watcher) -> None:
    """Downloads what is still missing of a file; stops beyond ``most`` bytes, where the body may be endless."""
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
        # a server that knows no ranges sends everything
        goes_on = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if response.status == 206 and not goes_on:
            part.unlink()
            raise http.client.HTTPException(f"the server sent {response.headers.get('Content-Range')!r} of the file")
        have = have if goes_on else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length and length.isdecimal() else None
        with open(part, "ab" if goes_on else "wb") as file:
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


def printable(text: str) -> str:
    """Text from a server with its control characters escaped, so that it cannot command the terminal.

    Args:
        text: the text.

    Example:
        >>> from cem_fast.data.fetch import printable
        >>> printable("Not Found\x1b[2J")
        'Not Found\\\\x1b[2J'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps a second process from writing to the same files.

    Raises:
        OSError: another process is at it.
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
