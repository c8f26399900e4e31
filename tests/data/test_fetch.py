"""Downloads from a local server: resumed, verified, limited, and in place only when complete."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from support import twins

from cem_fast import data
from cem_fast.cli import main as cli
from cem_fast.data import cifar10, fashion_mnist, fetch, tiny_imagenet


@dataclass
class Server:
    """Files by name, faults of the server, and the requests that it received."""

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    lengths: bool = True
    stop_after: int | None = None  # bytes of a body after which the connection is closed
    hang_after: int | None = None  # bytes of a body after which the server stalls
    endless: bool = False  # whether bodies are endless
    sent: int = 0  # bytes sent of endless bodies
    reason: str | None = None  # reason phrase for a missing file
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    address: str = ""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        site: Server = self.server.site
        name, asked = self.path.lstrip("/"), self.headers.get("Range")
        site.asked.append((name, asked))
        if name not in site.files:
            return self.send_error(404, site.reason)
        body, start = site.files[name], 0
        if asked and site.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if site.lengths:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        body = body[start:]
        while site.endless and not site.released.is_set():
            try:
                self.wfile.write(bytes(1 << 16))
            except OSError:  # closed by the client
                return
            site.sent += 1 << 16
        if site.hang_after is not None:
            self.wfile.write(body[: site.hang_after])
            self.wfile.flush()
            site.released.wait(60)
        else:
            self.wfile.write(body[: site.stop_after])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    site = Server()
    site.released = threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        listener.site = site
        site.address = f"http://127.0.0.1:{listener.server_port}/"
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield site
        site.released.set()
        listener.shutdown()
        thread.join()


def tarred(folder, *, extra=()):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        archive.add(folder, folder.name)
        for member in extra:
            archive.addfile(member, io.BytesIO(b"x" * member.size))
    return stream.getvalue()


def zipped(folder, *, extra=()):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder.parent))
        for name in extra:
            archive.writestr(name, "x")
    return stream.getvalue()


def publish(module, server, monkeypatch, files):
    """Puts files on the server and their digests into the data set's source."""
    server.files.update(files)
    source = replace(
        module.SOURCE,
        files={name: fetch.PublishedFile(len(content), twins.md5(content)) for name, content in files.items()},
    )
    monkeypatch.setattr(module, "SOURCE", source)
    monkeypatch.setitem(data.SOURCES, module.NAME, source)
    return source


@pytest.fixture
def cifar(server, tmp_path, monkeypatch):
    """Source of a tiny CIFAR-10 on the server."""
    twins.cifar(cifar10, tmp_path / "published", monkeypatch)
    content = tarred(tmp_path / "published" / "cifar-10-batches-py")
    return publish(cifar10, server, monkeypatch, {"cifar-10-python.tar.gz": content})


def get(source, root, server, **settings):
    return fetch.fetch(source, root, address=server.address, **settings)


def test_an_archive_is_downloaded_unpacked_and_read(cifar, server, tmp_path, monkeypatch, capfd):
    root = tmp_path / "deep" / "root"
    monkeypatch.setenv("CEM_FAST_DATA", "elsewhere")
    command = ["data", "fetch", "cifar10", "--address", server.address, "--data-root", str(root)]
    assert cli.main(command) == 0
    out = capfd.readouterr().out
    assert out == f"cifar-10-python.tar.gz\ncifar10 is in {root}/cifar-10-batches-py\n"
    assert len(data.load("cifar10", fold=1, root=root).train) == 50
    assert [path.name for path in root.iterdir()] == ["cifar-10-batches-py"]
    assert cli.main(command) == 0
    assert "cifar10 is in" in (out := capfd.readouterr().out)
    assert "already: remove it to get it again" in out
    assert server.asked == [("cifar-10-python.tar.gz", None)]
    with pytest.raises(FileExistsError, match="exists already: remove it"):
        get(cifar, root, server)


def test_the_published_addresses():
    for module in (cifar10, fashion_mnist, tiny_imagenet):
        assert data.SOURCES[module.NAME] is module.SOURCE
        for name, (size, md5) in module.SOURCE.files.items():
            assert size > 0
            assert module.SOURCE.address.endswith("/")
            assert "/" not in name
            assert len(md5) == 32


def test_a_zip_is_downloaded_unpacked_and_read(server, tmp_path, monkeypatch):
    folder = twins.tiny(tmp_path / "published", monkeypatch)
    source = publish(tiny_imagenet, server, monkeypatch, {"tiny-imagenet-200.zip": zipped(folder)})
    assert get(source, tmp_path, server) == tmp_path / "tiny-imagenet-200"
    assert len(data.load("tiny_imagenet", fold=1, root=tmp_path).test) == 6


def test_single_files_are_downloaded_and_read(server, tmp_path, monkeypatch):
    twins.fashion(tmp_path / "published")
    files = {path.name: path.read_bytes() for path in (tmp_path / "published").iterdir()}
    source = publish(fashion_mnist, server, monkeypatch, files)
    missing = files.popitem()[0]
    content = server.files.pop(missing)
    with pytest.raises(OSError, match=f"cannot download .*{missing}: HTTP Error 404: Not Found"):
        get(source, tmp_path, server)
    assert not (tmp_path / "fashion-mnist").exists()
    server.files[missing] = content
    server.asked.clear()
    get(source, tmp_path, server)
    assert server.asked[0] == (missing, None)  # the other files are not requested again
    assert len(data.load("fashion_mnist", fold=1, root=tmp_path).train) == 20


@pytest.mark.parametrize("lengths", [True, False])
def test_a_broken_download_continues(lengths, cifar, server, tmp_path):
    server.stop_after, server.lengths = 1000, lengths
    message = "the connection ended after 1,000 of .*; 1,000 bytes are kept, and the same command continues from there"
    if not lengths:  # without a length, only the digest reveals the truncation
        message = "gave 1,000 bytes with md5 .*: not the published file, and removed"
    with pytest.raises(OSError, match=message):
        get(cifar, tmp_path, server)
    assert not (tmp_path / cifar.folder).exists()
    server.stop_after, heard = None, []
    get(cifar, tmp_path, server, on_bytes=lambda *event: heard.append(event))
    assert server.asked[-1] == ("cifar-10-python.tar.gz", "bytes=1000-" if lengths else None)
    size = len(server.files["cifar-10-python.tar.gz"])
    assert heard[0] == ("cifar-10-python.tar.gz", 1000 if lengths else 0, size if lengths else None)
    assert heard[-1][1] == size
    assert len(data.load("cifar10", fold=1, root=tmp_path).train) == 50


def test_a_server_without_ranges_sends_everything_again(cifar, server, tmp_path):
    server.stop_after, server.ranges = 1000, False
    with pytest.raises(OSError, match="1,000 bytes are kept"):
        get(cifar, tmp_path, server)
    server.stop_after = None
    get(cifar, tmp_path, server)
    assert len(data.load("cifar10", fold=1, root=tmp_path).train) == 50


def test_a_whole_part_is_not_downloaded_again(cifar, server, tmp_path):
    files = tmp_path / f".{cifar.folder}.fetching" / "files"
    files.mkdir(parents=True)
    (files / "cifar-10-python.tar.gz.part").write_bytes(server.files["cifar-10-python.tar.gz"])
    get(cifar, tmp_path, server)
    assert (tmp_path / cifar.folder).is_dir()


def test_another_file_under_the_same_name_is_removed(cifar, server, tmp_path):
    right = server.files["cifar-10-python.tar.gz"]
    server.files["cifar-10-python.tar.gz"] = b"<html>moved</html>"
    with pytest.raises(OSError, match=r"gave 18 bytes with md5 \w+, expected \w+: not the published file, and removed"):
        get(cifar, tmp_path, server)
    assert not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / cifar.folder).exists()
    server.files["cifar-10-python.tar.gz"] = right
    get(cifar, tmp_path, server)
    assert server.asked[-1] == ("cifar-10-python.tar.gz", None)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
@pytest.mark.usefixtures("heeds_ctrl_c")
def test_an_interrupted_download_can_be_resumed(number, code, cifar, server, tmp_path):
    server.hang_after = 2000
    command = [sys.executable, "-m", "cem_fast", "data", "fetch", "cifar10", "--address", server.address]
    process = subprocess.Popen(
        [*command, "--data-root", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout.readline() == "cifar-10-python.tar.gz\n"
    time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    if number != signal.SIGKILL:
        assert err.count("\n") == 1
        assert "what has been downloaded is kept" in err
    assert not (tmp_path / cifar.folder).exists()
    server.hang_after = None
    get(cifar, tmp_path, server)
    assert len(data.load("cifar10", fold=1, root=tmp_path).train) == 50


def test_a_partly_unpacked_archive_never_gets_its_name(cifar, server, tmp_path, monkeypatch):
    write = tarfile.TarFile.makefile

    def stopped(self, member, place):
        if member.name.endswith("data_batch_4"):
            raise KeyboardInterrupt
        write(self, member, place)

    with monkeypatch.context() as patched:
        patched.setattr(tarfile.TarFile, "makefile", stopped)
        with pytest.raises(KeyboardInterrupt):
            get(cifar, tmp_path, server)
    assert len(list(tmp_path.glob(".*/unpacked/cifar-10-batches-py/*"))) > 1
    assert not (tmp_path / cifar.folder).exists()
    get(cifar, tmp_path, server)
    assert len(server.asked) == 1
    assert len(data.load("cifar10", fold=1, root=tmp_path).train) == 50
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def member(name, *, kind=tarfile.REGTYPE, link=""):
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, link, 0 if link else 1
    return made


@pytest.mark.parametrize(
    "extra",
    [
        member("../escaped"),
        member("cifar-10-batches-py/../../escaped"),
        member("cifar-10-batches-py/link", kind=tarfile.SYMTYPE, link="/etc/passwd"),
        member("cifar-10-batches-py/device", kind=tarfile.CHRTYPE),
    ],
)
def test_a_tar_that_reaches_outside_is_refused(extra, server, tmp_path, monkeypatch):
    twins.cifar(cifar10, tmp_path / "published", monkeypatch)
    content = tarred(tmp_path / "published" / "cifar-10-batches-py", extra=[extra])
    source = publish(cifar10, server, monkeypatch, {"cifar-10-python.tar.gz": content})
    root = tmp_path / "root"
    with pytest.raises(ValueError, match=r"cannot unpack .*cifar-10-python\.tar\.gz: "):
        get(source, root, server)
    assert not (root / source.folder).exists()
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("extra", ["../escaped", "/tmp/escaped", "tiny-imagenet-200/../../escaped"])
def test_a_zip_that_reaches_outside_is_refused(extra, server, tmp_path, monkeypatch):
    folder = twins.tiny(tmp_path / "published", monkeypatch)
    content = zipped(folder, extra=[extra])
    source = publish(tiny_imagenet, server, monkeypatch, {"tiny-imagenet-200.zip": content})
    root = tmp_path / "root"
    with pytest.raises(ValueError, match=r"cannot unpack .*\.zip: '.*escaped' would land outside of the folder"):
        get(source, root, server)
    assert not (root / source.folder).exists()
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("content", [b"not an archive", b"\x1f\x8b damaged", b""])
@pytest.mark.parametrize("module", [cifar10, tiny_imagenet])
def test_an_archive_that_cannot_be_opened_is_named(content, module, server, tmp_path, monkeypatch):
    (name,) = module.SOURCE.files
    source = publish(module, server, monkeypatch, {name: content})
    with pytest.raises(ValueError, match=f"cannot unpack .*{name}: "):
        get(source, tmp_path, server)
    assert not (tmp_path / source.folder).exists()


def test_an_archive_of_something_else_is_named(server, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    source = publish(cifar10, server, monkeypatch, {"cifar-10-python.tar.gz": tarred(tmp_path / "other")})
    with pytest.raises(ValueError, match=r"must hold a folder cifar-10-batches-py, got none"):
        get(source, tmp_path / "root", server)


@pytest.mark.parametrize("lengths", [True, False])
def test_an_endless_body_is_cut_off_at_the_published_size(lengths, cifar, server, tmp_path):
    server.lengths, server.endless = False, True
    (published,) = cifar.files.values()
    with pytest.raises(
        OSError, match=f"gave more than {published.size:,} bytes with .*: not the published file, and removed"
    ):
        get(cifar, tmp_path, server)
    assert not list(tmp_path.rglob("*.part"))
    assert server.sent < 1 << 26
    server.endless, server.lengths = False, lengths
    get(cifar, tmp_path, server)
    assert (tmp_path / cifar.folder).is_dir()


def test_a_part_that_is_too_long_is_downloaded_again(cifar, server, tmp_path):
    files = tmp_path / f".{cifar.folder}.fetching" / "files"
    files.mkdir(parents=True)
    (files / "cifar-10-python.tar.gz.part").write_bytes(server.files["cifar-10-python.tar.gz"] + b"x")
    get(cifar, tmp_path, server)
    assert server.asked == [("cifar-10-python.tar.gz", None)]


def test_a_longer_file_than_the_published_one_is_removed(cifar, server, tmp_path):
    server.files["cifar-10-python.tar.gz"] += bytes(5000)
    with pytest.raises(OSError, match=r"gave more than [\d,]+ bytes with .*: not the published file, and removed"):
        get(cifar, tmp_path, server)
    assert not list(tmp_path.rglob("*.part"))


def test_control_characters_of_a_server_are_escaped(cifar, server, tmp_path):
    server.files.clear()
    server.reason = "gone\x1b[2J\x1b]0;title\x07"
    with pytest.raises(OSError, match=r"Error 404: gone\\x1b\[2J\\x1b\]0;title\\x07; 0 bytes") as raised:
        get(cifar, tmp_path, server)
    assert str(raised.value).isprintable()


def test_control_characters_of_an_archive_are_escaped(server, tmp_path, monkeypatch):
    folder = twins.tiny(tmp_path / "published", monkeypatch)
    content = zipped(folder, extra=["../\x1b[2Jescaped"])
    source = publish(tiny_imagenet, server, monkeypatch, {"tiny-imagenet-200.zip": content})
    with pytest.raises(ValueError, match="would land outside of the folder") as raised:
        get(source, tmp_path / "root", server)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "cifar-10-python.tar.gz.part"])
def test_a_fifo_in_the_place_of_a_download_is_named(name, cifar, server, tmp_path):
    files = tmp_path / f".{cifar.folder}.fetching" / "files"
    files.mkdir(parents=True)
    os.mkfifo(files / name)
    with pytest.raises(ValueError, match=f"{name} must be a regular file, got a FIFO"):
        get(cifar, tmp_path, server)


def test_a_second_process_is_refused(cifar, server, tmp_path):
    server.hang_after = 10
    started, errors = threading.Event(), []

    def fetch_first():
        try:
            get(cifar, tmp_path, server, on_bytes=lambda *_: started.set())
        except OSError as error:
            errors.append(str(error))

    first = threading.Thread(target=fetch_first)
    first.start()
    assert started.wait(30)
    with pytest.raises(OSError, match="another process is downloading to"):
        get(cifar, tmp_path, server)
    server.released.set()
    first.join(30)
    assert "the connection ended after 10 of" in errors[0]  # the error of the first process


def test_addresses_that_are_not_of_the_web(cifar, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("CEM_FAST_DATA", str(tmp_path))
    for address in ("file:///etc", "ftp://host/", "here", ""):
        assert cli.main(["data", "fetch", "cifar10", "--address", address]) == 2
        assert f"address must begin with http:// or https://, got '{address}'" in capfd.readouterr().err
    assert cli.main(["data", "fetch", "cifar10", "--address", "http://127.0.0.1:9/"]) == 1
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "Connection refused; 0 bytes are kept" in err
    assert "cannot download http://127.0.0.1:9/cifar-10-python.tar.gz: " in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["fetch", "cifar1"], "unknown data set to fetch 'cifar1': expected one of cifar10, cifar100,"),
        (["fetch", "facescrub"], "facescrub: its photographs have no public archive: ask its authors"),
        (["fech", "cifar10"], "unknown action 'fech': expected one of fetch, prepare"),
        (["prepare", "cifar10"], "unknown data set to prepare 'cifar10': expected one of facescrub"),
        (["fetch", "cifar10", "--adress", "x"], "unknown setting 'adress'; did you mean 'address'?"),
        (["fetch"], "data needs name: see cem-fast data --help"),
    ],
)
def test_bad_requests(arguments, message, capfd):
    try:
        status = cli.main(["data", *arguments])
    except SystemExit as stop:
        status = stop.code
    out, err = capfd.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_progress_on_a_terminal(cifar, server, tmp_path, monkeypatch):
    from rich.console import Console

    stream = io.StringIO()
    monkeypatch.setattr("cem_fast.cli.console.make", lambda: Console(file=stream, force_terminal=True, width=120))
    monkeypatch.setenv("CEM_FAST_DATA", str(tmp_path))
    assert cli.main(["data", "fetch", "cifar10", "--address", server.address]) == 0
    shown = stream.getvalue()
    assert "cifar-10-python.tar.gz" in shown
    assert "MB" in shown or "kB" in shown
