"""Files of strangers: damaged, hostile and special ones give a result or an error that names the file, soon and in little memory."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from cem_fast.benchmarks import table
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import mutations
from support.fuzzing import quick, thorough

from cem_fast import GaussianMixture
from cem_fast.audit import targets
from cem_fast.cli import parser
from cem_fast.config import GridConfig, RunConfig
from cem_fast.data import Part, Splits, cifar, fashion_mnist, fetch
from cem_fast.data.images import read_all
from cem_fast.deploy import manifest
from cem_fast.experiments import results, saved_run
from cem_fast.experiments.records import Baseline, Results
from cem_fast.experiments.run import run
from cem_fast.report import page
from cem_fast.training.resume import Snapshot
from cem_fast.tune import Targets, Trial, Tuned, search

SECONDS, MEBIBYTES = 60, 1500  # many times what a reader needs on a busy machine
REFUSALS = (ValueError, OSError, click.ClickException)


@pytest.fixture(scope="module", autouse=True)
def little_memory():
    """Fails if all readers together have grown the process by more than they may."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit < MEBIBYTES


@dataclass(frozen=True, repr=False)
class Reader:
    """A file in a folder of valid files, and the function that reads the folder."""

    folder: Path
    file: str
    read: Callable[[Path], object]

    def __repr__(self) -> str:
        return self.file

    @property
    def content(self) -> bytes:
        return (self.folder / self.file).read_bytes()


def outcome(reader: Reader, place: Callable[[Path], None], *, named: bool = True) -> str | None:
    """Puts something else in the place of a reader's file, reads, and returns the refusal; None if there is a result."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "strange"
        shutil.copytree(reader.folder, folder)
        place(folder / reader.file)
        start = time.monotonic()
        try:
            reader.read(folder)
            return None
        except REFUSALS as error:
            message = error.format_message() if isinstance(error, click.ClickException) else str(error)
            assert not named or "strange" in message or "--config" in message, f"names no file: {message[:300]!r}"
            return message
        finally:
            assert time.monotonic() - start < SECONDS


def outcome_of(reader: Reader, content: bytes, *, named: bool = True) -> str | None:
    return outcome(reader, lambda path: path.write_bytes(content), named=named)


def with_digest(folder: Path, kind: str, content: bytes) -> None:
    """Puts a tensor file into a run under the name that its content demands, so that the damage is not found by its digest."""
    description = json.loads((folder / "run.json").read_bytes())
    name = f"{kind}-{saved_run._digest(content)}.safetensors"
    (folder / name).write_bytes(content)
    description["files"][kind] = name
    (folder / "run.json").write_text(json.dumps(description))


def _load_whole_run(folder: Path) -> None:
    loaded = saved_run.load_run(folder)
    assert all(bool(value.isfinite().all()) for value in loaded.model.state_dict().values())
    _ = loaded.measurements


@pytest.fixture(scope="module")
def readers(tmp_path_factory) -> dict[str, Reader]:
    """Valid files of every kind, and their readers."""
    root = tmp_path_factory.mktemp("valid")
    torch.manual_seed(0)
    part = Part(torch.rand(8, 1, 16, 16), torch.arange(8) % 2, torch.arange(8))
    splits = Splits("tiny", part, part, part, 2, ("a", "b"))
    config = RunConfig(epochs=2, cem_weight=0.3, cem_components=1, noise_draws=1, attacks=("nearest",), image_size=16)
    record = run(config, root / "grid" / "runs" / "one", splits=splits).at("runs/one")
    kept = Results("cem-fast evaluate", None, {"torch": "2"}, {"tiny": Baseline(0.1, 0.1)}, (record,), (), ())
    (root / "grid" / "results.json").write_text(json.dumps(kept.to_json()))
    shutil.copytree(root / "grid" / "runs" / "one", root / "run")
    for folder in ("mixture", "training", "settings", "images", "archives", "idx", "pickle", "table", "manifest"):
        (root / folder).mkdir()
    GaussianMixture(num_components=2).fit(torch.rand(9, 3)).save(root / "mixture" / "m.safetensors")
    Snapshot(root / "training", {"epochs": 2}).save({"history": [1, {"a": torch.ones(2)}], "rates": None})
    grid = {
        "name": "grid",
        "data": ["faces"],
        "defenses": ["noise", {"defense": "dropout", "noise_std": 0.2}],
        "seeds": [0],
    }
    (root / "settings" / "grid.yaml").write_text(yaml.safe_dump(grid))
    pixels = np.arange(768, dtype=np.uint8).reshape(16, 16, 3)
    for kind in ("png", "jpg", "gif", "bmp", "tif", "webp", "ppm"):
        Image.fromarray(pixels).save(root / "images" / f"image.{kind}")
    with tarfile.open(root / "archives" / "a.tar.gz", "w:gz") as file:
        file.add(root / "settings", "folder")
    with zipfile.ZipFile(root / "archives" / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.write(root / "settings" / "grid.yaml", "folder/grid.yaml")
    import gzip

    (root / "idx" / "i.gz").write_bytes(gzip.compress(bytes((0, 0, 8, 1)) + (9).to_bytes(4, "big") + bytes(9)))
    (root / "pickle" / "p").write_bytes(pickle.dumps({"data": np.zeros((2, 3), np.uint8), "labels": [3, 1]}))
    manifest.Manifest(
        format="onnx",
        image_shape=(1, 16, 16),
        message_shape=(4, 4, 4),
        num_classes=2,
        classes=("a", "b"),
        message="uint8",
        message_range=(0.0, 1.0),
        preprocessing=manifest.Preprocessing(),
        noise=manifest.Noise("input", 0.1, 0.01),
        random_inputs=(),
        defense=("GaussianNoise",),
        cost=manifest.Cost(1, 1, 1.0, 64),
        run="",
        digests={"device.onnx": "00"},
        versions={},
    ).save(root / "manifest")
    for folder in ("tune", "array"):
        (root / folder).mkdir()
    np.save(root / "array" / "a.npy", np.arange(12.0).reshape(3, 4))
    searched = Tuned(Targets(), config, (), (Trial(config, "done", 64, 1000, 0.9, 0.1),))
    (root / "tune" / search.TUNED).write_text(json.dumps(searched.to_json()))
    fields = {field: "" for field in table.Run.__dataclass_fields__}
    table.append(root / "table", table.Run(**fields), [table.Row("operations", "cem_paper", "cem_fast", p50_ms=1.5)])

    def unpack(name: str) -> Callable[[Path], object]:
        return lambda folder: fetch._unpack(folder / name, folder / "unpacked")

    def read_pickle(folder: Path) -> object:
        md5 = hashlib.md5((folder / "p").read_bytes()).hexdigest()
        return cifar.read_pickle(folder / "p", md5, name="cifar10")

    found = {
        "run.json": Reader(root / "run", "run.json", _load_whole_run),
        "results.json": Reader(root / "grid", "results.json", results.read),
        "report": Reader(root / "grid", "results.json", page.write),
        "mixture": Reader(root / "mixture", "m.safetensors", lambda f: GaussianMixture.load(f / "m.safetensors")),
        "training": Reader(root / "training", "training.safetensors", lambda f: Snapshot(f, {"epochs": 2}).load()),
        "settings": Reader(root / "settings", "grid.yaml", lambda f: parser.read_grid(f / "grid.yaml").runs()),
        "tar": Reader(root / "archives", "a.tar.gz", unpack("a.tar.gz")),
        "zip": Reader(root / "archives", "a.zip", unpack("a.zip")),
        "idx": Reader(root / "idx", "i.gz", lambda f: fashion_mnist.read_idx(f / "i.gz", 1)),
        "pickle": Reader(root / "pickle", "p", read_pickle),
        "manifest": Reader(root / "manifest", manifest.NAME, manifest.read),
        "array": Reader(root / "array", "a.npy", lambda f: targets.read_array(f / "a.npy")),
        "tune.json": Reader(root / "tune", search.TUNED, lambda f: search._held(f, config)),
        "table": Reader(root / "table", table.FILE, lambda f: table.read(f / table.FILE)),
    }
    for path in (root / "images").iterdir():
        found[path.suffix] = Reader(root / "images", path.name, lambda f, n=path.name: read_all([f / n], 8, "RGB"))
    return found


IMAGES = (".png", ".jpg", ".gif", ".bmp", ".tif", ".webp", ".ppm")
DAMAGED = (
    "mixture",
    "training",
    "settings",
    "tar",
    "zip",
    "idx",
    "pickle",
    "table",
    "manifest",
    "tune.json",
    "array",
    "run.json",
    "results.json",
    *IMAGES,
)


def test_valid_files_are_read(readers):
    for name, reader in readers.items():
        assert outcome_of(reader, reader.content) is None, name


def damage(readers: dict[str, Reader], data: st.DataObject) -> None:
    reader = readers[data.draw(st.sampled_from(DAMAGED))]
    outcome_of(reader, data.draw(mutations.damaged(reader.content)), named=reader.file != "grid.yaml")


def edit(readers: dict[str, Reader], data: st.DataObject) -> None:
    reader = readers[
        data.draw(
            st.sampled_from(("run.json", "run.json", "manifest", "tune.json", "results.json", "results.json", "report"))
        )
    ]
    outcome_of(reader, data.draw(mutations.documents(json.loads(reader.content))))


def edit_metadata(readers: dict[str, Reader], data: st.DataObject) -> None:
    """Safetensors with other metadata, other tensors, or both."""
    name, key = data.draw(st.sampled_from((("mixture", "gaussian_mixture"), ("training", "training"))))
    reader = readers[name]
    with safetensors.safe_open(reader.folder / reader.file, framework="pt") as file:
        valid, tensors = file.metadata()[key], {each: file.get_tensor(each) for each in file.keys()}  # noqa: SIM118
    text = data.draw(st.just(valid.encode()) | mutations.documents(json.loads(valid))).decode(errors="replace")
    outcome_of(reader, safetensors.torch.save(_other(tensors, data), {key: text}))


def edit_tensors(readers: dict[str, Reader], data: st.DataObject) -> None:
    """Runs whose tensor files are damaged or hold other tensors, with the right digest."""
    name, kind = data.draw(
        st.sampled_from((("run.json", "weights"), ("run.json", "measurements"), ("report", "measurements")))
    )
    reader = readers[name]
    inside = "" if name == "run.json" else "runs/one"
    (path,) = (reader.folder / inside).glob(f"{kind}-*")
    content = path.read_bytes()
    if data.draw(st.booleans()):
        content = data.draw(mutations.damaged(content))
    else:
        content = safetensors.torch.save(_other(safetensors.torch.load(content), data))
    outcome(reader, lambda file: with_digest(file.parent / inside, kind, content))


def _other(tensors: dict[str, torch.Tensor], data: st.DataObject) -> dict[str, torch.Tensor]:
    name = data.draw(st.sampled_from(sorted(tensors)))
    value = tensors[name]
    change = data.draw(
        st.sampled_from(("same", "gone", "nan", "negative", "integers", "longer", "flat", "empty", "half", "complex"))
    )
    if change == "gone":
        return {key: each for key, each in tensors.items() if key != name}
    new = {
        "nan": lambda: torch.full_like(value, float("nan")) if value.is_floating_point() else value,
        "negative": lambda: -value - 1,
        "integers": lambda: value.long(),
        "longer": lambda: torch.cat([value, value]) if value.dim() else value.expand(3).clone(),
        "flat": lambda: value.flatten(),
        "empty": lambda: value[..., :0].clone() if value.dim() else value.new_zeros(0),
        "half": lambda: value.half(),
        "complex": lambda: value.to(torch.complex64),
    }.get(change, lambda: value)()
    return tensors | {name: new}


def edit_settings(readers: dict[str, Reader], text: str) -> None:
    outcome_of(readers["settings"], text.encode(errors="replace"), named=False)  # the setting is named


ODD_VALUES = (
    *(
        "3",
        "-1",
        "1e400",
        "0x" + "f" * 90,
        ".nan",
        "~",
        "[]",
        "[1, [2]]",
        "{a: 1}",
        "true",
        "noise",
        "faces",
        "[0.1, x]",
    ),
    *("!!int x", "!!float x", "!!bool x", "!!timestamp x", "!!binary x", "!!set {a}", "!!python/name:os.system"),
    *("&a [*a]", "*a", "|\n  x", '"\\e[2J"', "2001-01-01", "1:2:3", "[" * 3000, "'", "%", "\x00", "1" + "0" * 5000),
    *(
        "&b {defense: *b}",
        "{defense: noise, epochs: [1]}",
        "[{defense: noise, x: 1}]",
        f"[{', '.join(map(str, range(20)))}]",
    ),
)


def settings_texts() -> st.SearchStrategy[str]:
    """YAML of settings: known names with odd values, tags, aliases, and text of any kind."""
    names = st.sampled_from([*GridConfig.__dataclass_fields__, "config", "defence", "<<", "?", "- x"])
    values = st.sampled_from(ODD_VALUES)
    lines = st.lists(st.builds("{}: {}".format, names, values), min_size=1, max_size=4).map("\n".join)
    return lines | lines | st.text(max_size=60)


@quick(70)
@given(st.data())
def test_damaged_files(readers, data):
    damage(readers, data)


@quick(70)
@given(st.data())
def test_edited_descriptions_and_results(readers, data):
    edit(readers, data)


@quick(50)
@given(st.data())
def test_edited_tensor_files(readers, data):
    edit_metadata(readers, data)


@quick(40)
@given(st.data())
def test_runs_with_other_tensors(readers, data):
    edit_tensors(readers, data)


@quick(70)
@given(settings_texts())
def test_settings_of_any_text(readers, text):
    edit_settings(readers, text)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("how", [damage, edit, edit_metadata, edit_tensors])
def test_other_damage(readers, how):
    thorough(3000)(given(st.data())(lambda data: how(readers, data)))()


@pytest.mark.long
@pytest.mark.timeout(7200)
@thorough(3000)
@given(settings_texts())
def test_other_settings_of_any_text(readers, text):
    edit_settings(readers, text)


SPECIAL = {
    "a FIFO": os.mkfifo,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a folder": lambda path: path.mkdir(),
    "an empty file": lambda path: path.touch(),
    "a sparse file of 1 TB": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
}


@pytest.mark.parametrize("special", SPECIAL)
def test_special_files_are_refused(readers, special):
    def place(path: Path) -> None:
        path.unlink()
        SPECIAL[special](path)

    for name, reader in readers.items():
        if name == "pickle" or (
            name in ("tar", "zip", "table") and special.startswith(("a FIFO", "a link to a d", "a sparse"))
        ):
            continue  # files that this package has written or verified; the digest of a pickle is checked first
        refusal = outcome(reader, place)
        assert refusal is not None or (
            name in ("training", "tune.json") and special in ("a dangling link", "a link to itself")
        ), name


SHAPES = {
    "of petabytes": "(1000000000, 3, 1000, 1000)",
    "beyond 64 bits": "(1" + "0" * 4000 + ",)",
    "nested": "(" * 3000,
    "of signs": "-" * 5000 + "1",
    "negative": "(-1, 3)",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_an_array_of_a_hostile_shape_is_refused(readers, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {SHAPES[shape]}, }}\n".encode()
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    assert "cannot be read" in (outcome_of(readers["array"], content) or "")


MEMBERS = {
    "above": ("../outside", tarfile.REGTYPE, ""),
    "absolute": ("/tmp/outside-of-cem-fast", tarfile.REGTYPE, ""),
    "link above": ("folder/link", tarfile.SYMTYPE, "../../outside"),
    "hard link above": ("folder/link", tarfile.LNKTYPE, "../../outside"),
    "device": ("folder/device", tarfile.CHRTYPE, ""),
}


@pytest.mark.parametrize("member", MEMBERS)
def test_an_archive_writes_nothing_outside(member, tmp_path):
    name, kind, target = MEMBERS[member]
    (tmp_path / "outside").write_text("mine")
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as file:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        file.addfile(info)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "strange.tar.gz").write_bytes(content.getvalue())
    with suppress(ValueError):
        fetch._unpack(tmp_path / "in" / "strange.tar.gz", tmp_path / "in" / "unpacked")
    assert (tmp_path / "outside").read_text() == "mine"
    assert not Path("/tmp/outside-of-cem-fast").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"in", "outside"}
