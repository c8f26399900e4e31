"""The README and the documentation: code runs, commands parse, paths and links exist, and the README stays short."""

from __future__ import annotations

import re
import runpy
import shlex
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from cem_fast.cli import main as cli
from cem_fast.cli.commands import COMMANDS
from cem_fast.config import GridConfig, RunConfig, described

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
PATH = re.compile(r"(?<![\w./<-])((?:cem_fast|kernels|csrc|tests|benchmarks|docs)/[\w./-]*[\w/])")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    return [code for language, code in FENCE.findall(page.read_text()) if language in languages]


def commands() -> list[str]:
    """Every line of a shell block that begins with ``cem-fast``, without its comment, continued lines joined."""
    found = {}
    for page in PAGES:
        for block in blocks(page, "sh", ""):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("cem-fast "):
                    found[" ".join(line.split(" #")[0].split())] = None
    return list(found)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with two classes of ten small color images each, and a saved run of them, under the names that the pages use."""
    place = tmp_path_factory.mktemp("documentation")
    g = torch.Generator().manual_seed(0)
    for label, brightness in (("dark", 60), ("light", 180)):
        folder = place / "path/to/folder" / label
        folder.mkdir(parents=True)
        for i in range(10):
            pixels = brightness + torch.randint(0, 50, (48, 48, 3), generator=g)
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        settings = ["--data", "path/to/folder", "--epochs", "1", "--image_size", "16", "--noise-draws", "1"]
        assert cli.main(["train", *settings, "--folder", "runs/train"]) == 0
    return place


@pytest.fixture(scope="module")
def shell(workplace, tmp_path_factory):
    """A folder without runs in which the commands of the pages find their files."""
    place = tmp_path_factory.mktemp("shell")
    (place / "path").symlink_to(workplace / "path")
    (place / "photographs").symlink_to("path/to/folder")
    (place / "cem_fast").symlink_to(ROOT / "cem_fast")
    (place / "mine.yaml").write_text(blocks(ROOT / "docs/guide/command-line.md", "yaml")[0])
    return place


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_python_blocks_run_in_order(page, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    names: dict[str, object] = {"__name__": "__main__"}
    for code in blocks(page, "python"):
        exec(compile(code, name(page), "exec"), names)  # the pages are part of the project


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line, shell, monkeypatch, capsys):
    monkeypatch.chdir(shell)
    arguments = shlex.split(line)[1:]
    flags = {flag for param in COMMANDS[arguments[0]].params for flag in param.opts}
    assert {each for each in arguments if each.startswith("--")} <= flags
    needs_data = re.search(r"--data (\S+)", line)
    bundled = needs_data is None or needs_data[1] in ("faces", "digits", "photographs", "path/to/folder")
    if arguments[0] in ("train", "evaluate"):
        # a plan reads the images, which only bundled data has here
        check = "--dry-run" if bundled and not re.search("fashion|cifar", line) else "--print-config"
        plan = [*arguments, *([] if check in arguments else [check])]
        assert cli.main(plan) == 0, capsys.readouterr().err


def test_pages_name_commands_of_every_kind():
    assert {line.split()[1] for line in commands()} >= {
        "train",
        "attack",
        "evaluate",
        "figures",
        "data",
        "doctor",
        "bench",
    }


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_and_links_exist(page):
    text = page.read_text()
    for path in PATH.findall(text):
        assert (ROOT / path).exists(), f"{name(page)} names {path}"
    for link in LINK.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        assert (page.parent / link).exists(), f"{name(page)} links to {link}"


def test_every_command_has_its_flags():
    page = (ROOT / "docs/guide/command-line.md").read_text()
    assert re.findall(r"^## (.+)\n\n```\{flags\} (\w+)", page, re.MULTILINE) == [(name, name) for name in COMMANDS]


def test_inventories_are_those_of_their_script():
    """After a change, run ``python docs/_inventories/make.py``."""
    script = runpy.run_path(str(ROOT / "docs/_inventories/make.py"))
    for project, names in script["INVENTORIES"].items():
        *_, compressed = (ROOT / f"docs/_inventories/{project}.inv").read_bytes().split(b"\n", 4)
        assert zlib.decompress(compressed).decode() == script["lines"](names)


def test_the_layers_are_those_that_are_checked():
    """The diagram and the contract of import-linter name the same parts from top to bottom."""
    contract = re.search(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)[1]
    layers = [set(re.findall(r"cem_fast\.(\w+)", line)) for line in contract.splitlines()]
    diagram = blocks(ROOT / "docs/internals/architecture.md", "")[0].splitlines()
    shown = [set(re.findall(r"cem_fast/(\w+)", line)) for line in diagram]
    parts = [part for layer in layers for part in sorted(layer) if part != "__main__"]
    rows = {part: next((row for row, names in enumerate(shown) if part in names), None) for part in parts}
    assert None not in rows.values(), rows
    assert list(rows.values()) == sorted(rows.values())


def test_the_readme_is_short_and_starts_with_what_is_needed():
    text = README.read_text()
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 1400
    start = "\n".join(text.splitlines()[:45])
    assert "pip install" in start
    assert "CEMLoss(" in start


def test_every_setting_is_in_one_table():
    page = (ROOT / "docs/guide/settings.md").read_text()
    shown = re.findall(r"^```\{settings\} (\w+)\n(.*)\n", page, re.MULTILINE)
    groups = {(config.__name__, s.group) for config in (RunConfig, GridConfig) for s in described(config).values()}
    shared = {group for _, group in groups} - {"run", "grid"}
    assert sorted(shown) == sorted(
        [("RunConfig", "run"), ("GridConfig", "grid"), *(("RunConfig", group) for group in shared)]
    )


def test_tests_that_are_named_exist():
    text = (ROOT / "docs" / "internals" / "testing.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)`: `(test_\w+)`", text)
    assert len(named) > 50
    assert [each for each in named if f"def {each[1]}(" not in (ROOT / each[0]).read_text()] == []
