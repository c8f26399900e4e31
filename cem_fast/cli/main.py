"""The command ``cem-fast``: demo, train, attack, evaluate, figures, data, doctor, bench."""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt

from cem_fast import __version__
from cem_fast.config import GridConfig, RunConfig, SharedConfig
from cem_fast.data.root import DEFAULT as DEFAULT_ROOT
from cem_fast.data.root import VARIABLE as DATA_ROOT

if TYPE_CHECKING:
    from rich.console import Console

    from cem_fast.experiments.records import FrontierEntry, Pair, Results
    from cem_fast.experiments.results import Measured

DEMO = Path(__file__).parents[1] / "demo.yaml"
FLAGS = (
    *("address", "check", "config", "data_root", "device", "dry_run", "folder", "jobs", "resume"),
    *("compare", "only", "quick", "readme", "render", "save", "threads"),
)
RESETTABLE = (  # what `cem-fast attack` may change about the attacks on a saved run
    "attacks",
    "attack_decoder",
    "attack_dropout",
    "attack_loss",
    "attack_epochs",
    "attack_batch_size",
    "attack_gan_epochs",
    "attack_steps",
    "seed",
)


class Terminated(BaseException):
    """SIGTERM arrived."""


class Parser(ArgumentParser):
    """Says what is wrong in one line, names the nearest valid option, and exits with status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        line = " ".join(message.split())
        settings = {field.name for config in (RunConfig, GridConfig) for field in fields(config)} | set(FLAGS)
        if unknown := re.search(r"unrecognized arguments: --([\w-]+)|does not accept option '([\w.-]+)'", line):
            name = (unknown[1] or unknown[2]).replace("-", "_")
            known = name in settings
            line = (
                f"{name} is no setting of this command"
                if known
                else f"unknown setting {name!r}{_nearest(name, settings)}"
            )
        elif unknown := re.search(r"invalid choice: '(.*?)'", line):
            line = f"unknown command {unknown[1]!r}{_nearest(unknown[1], COMMANDS)}"
        elif missing := re.search(r"arguments are required: (.*)", line):
            names = re.sub(r"[a-z]+[.]", "", missing[1]).replace(", ", " and ")
            command = missing[1].partition(".")[0]
            line = f"{command} needs {names}: see cem-fast {command} --help"
        elif "subcommand" in line:
            line = f"expected one of the commands {', '.join(COMMANDS)}"
        elif wrong := re.fullmatch(
            r"Parser key \"(\w+)\": (?:Expected an? (.*?)\.? Got|.*Subtypes: \[(.*)\] Errors.* Given) value: (.*)", line
        ):
            line = f"{wrong[1]} must be {_kinds(wrong[2] or wrong[3])}, got {wrong[4]}"
        elif wrong := re.fullmatch(
            r"Parser key \"(\w+)\": Not of type NonNegativeInt: (?:.*: '(.*)'|(.*) does not .*)", line
        ):
            line = f"{wrong[1]} must be an integer of at least 0, got {wrong[2] or wrong[3]}"
        elif wrong := re.fullmatch(r"Parser key \"config\": (File does not exist|Path is not a file): (.*)", line):
            line = f"the file given as --config is not there, or is no file: {wrong[2]}"
        elif line.startswith("Problems parsing config:"):
            line = f"the file given as --config is not YAML:{line.partition(':')[2]}"
        elif line.startswith("Unexpected config:"):
            found = line.partition(":")[2].strip() or "nothing"
            line = f"the file given as --config must hold settings, one 'name: value' a line, got {found}"
        _fail(line)
        sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: what follows ``cem-fast``; None for this process's own.

    Returns:
        The exit status: 0; 1 when something went wrong on the way; 2 for a bad setting or bad input; 130 after Ctrl-C and 143 after
        SIGTERM, with finished runs kept.
    """
    signal.signal(signal.SIGTERM, _terminate)
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        try:
            parsed = _parser().parse_args(_normalized(arguments))
        except UnicodeDecodeError as error:
            raise ValueError(f"the file given as --config is not UTF-8 text: {error}") from error
        settings = parsed[parsed.subcommand]
        settings.command = shlex.join(["cem-fast", *arguments])
        if getattr(settings, "data_root", None) is not None:
            os.environ[DATA_ROOT] = settings.data_root  # where the processes of a grid look, too
        if parsed.subcommand != "train":
            _require_one_process()
        return COMMANDS[parsed.subcommand](settings)
    except KeyboardInterrupt:
        _fail(f"interrupted; {_kept(arguments)} is kept")
        return 130
    except Terminated:
        _fail(f"terminated; {_kept(arguments)} is kept")
        return 143
    except (ValueError, FileNotFoundError) as error:
        return _explain(error, status=2)
    except (FloatingPointError, OSError, MemoryError, ImportError) as error:
        return _explain(error, status=1)


def demo(settings: Namespace) -> int:
    """Trains, attacks and reports on real faces, afresh every time."""
    changes = ["--seeds", f"[{','.join(map(str, settings.seeds))}]"] if settings.seeds else []
    return _run_grid(_read_grid(DEMO, *changes), settings, fresh=True)


def evaluate(settings: Namespace) -> int:
    """Runs a grid and reports on it."""
    return _run_grid(_build(GridConfig, settings), settings, fresh=False)


def train(settings: Namespace) -> int:
    """Trains one model and saves it; under torchrun, all of its processes train it together."""
    from cem_fast._support import ranks
    from cem_fast.experiments.grid import check
    from cem_fast.experiments.run import check_run_folder, is_finished, run

    config, device, first = _build(RunConfig, settings), _device(settings.device), ranks.rank() == 0
    check([config])
    if first:
        check_run_folder(settings.folder, config)
    if settings.dry_run:
        return _show_plan(config, [config], settings.folder, attack=False) if first else 0
    console = _console()
    console.quiet = not first
    with ranks.together(device) as (group, own_device):
        if settings.resume and is_finished(config, settings.folder):
            _say(console, f"{settings.folder} holds the finished run of these settings")
            return 0
        with _watch(console) as watch:
            watch.started(0, 1, config)
            record = run(
                config,
                settings.folder,
                device=own_device,
                attack=False,
                on_stage=partial(watch.stage, 0),
                resume=settings.resume,
                process_group=group,
            )
    if record is not None:
        console.print(f"accuracy {record.accuracy:.1%} on {record.num_test} test images", highlight=False)
        console.print(f"saved in {settings.folder}: attack it with cem-fast attack {settings.folder}", highlight=False)
    return 0


def attack(settings: Namespace) -> int:
    """Attacks a saved run again, with any attack and its own budget."""
    from rich.table import Table

    from cem_fast import attacks, training
    from cem_fast._support.lookup import lookup
    from cem_fast.experiments import saved_run
    from cem_fast.experiments.attack import attack_model
    from cem_fast.experiments.build import build_attack

    run = saved_run.load_run(settings.run, device=_device(settings.device))
    asked = {key: getattr(settings, key) for key in RESETTABLE}
    config = replace(run.config, **{key: value for key, value in asked.items() if value is not None})
    for name in config.attacks:
        lookup("attack", name, dict.fromkeys(attacks.names()))
    saved, baseline = run.description.record.attacks, run.description.baseline
    console = _console()
    for name in config.attacks:
        console.print(build_attack(name, config, run.data).overview(), markup=False, highlight=False)
    table = Table(title=f"{_escape(config)}: {len(run.data.victims)} images under attack", title_justify="left")
    for column in ("attack", "MSE", "half the budget", "PSNR, dB", "SSIM", "recognized", "when trained"):
        table.add_column(column, justify="left" if column == "attack" else "right")
    observe = training.observer(run.model, run.defense)
    with _watch(console) as watch:
        for name in config.attacks:
            outcome, _, _ = attack_model(
                name, run.model, run.defense, run.data, config, observe=observe, on_stage=partial(watch.stage, 0)
            )
            half, before = outcome.mse_half_budget, saved.get(name)
            table.add_row(
                name,
                f"{outcome.mse:.5f}",
                "-" if half is None else f"{half:.5f}",
                f"{outcome.psnr:.2f}",
                f"{outcome.ssim:.3f}",
                f"{outcome.recognized:.0%}",
                "-" if before is None else f"{before.mse:.5f}",
            )
    console.print(table)
    console.print(f"class mean {baseline.class_mean_mse:.5f}, mean image {baseline.mean_image_mse:.5f}")
    return 0


def figures(settings: Namespace) -> int:
    """Draws one of the paper's figures: leakage (Fig. 3), sweeps (Fig. 4), utility (Eq. 4) or cost (Table 9)."""
    from cem_fast.report import figures as pictures

    folder = Path(settings.source)
    grid = None if folder.is_dir() else _read_grid(folder)
    if grid is not None:
        folder = Path(settings.folder or f"runs/{grid.name}")
    elif settings.folder:
        raise ValueError(f"folder is for the runs of a YAML file, and {folder} is a folder of results already")
    target = settings.save or folder
    pictures.check(settings.figure, target)
    if grid is not None:
        settings.folder = str(folder)
        _run_grid(grid, settings, fresh=False)
    if not settings.dry_run:
        for path in pictures.write(settings.figure, folder, target):
            _say(_console(), f"written: {path}")
    return 0


def data(settings: Namespace) -> int:
    """Gets a data set: cem-fast data fetch cifar10, or cem-fast data prepare facescrub."""
    from cem_fast import data as sets
    from cem_fast._support.lookup import lookup
    from cem_fast.cli import progress
    from cem_fast.data import facescrub
    from cem_fast.data.fetch import fetch

    lookup("action", settings.action, dict.fromkeys(("fetch", "prepare")))
    root, console = sets.data_root(), _console()
    if settings.action == "prepare":
        lookup("data set to prepare", settings.name, {facescrub.NAME: None})
        with progress.counted(console) as count:
            folder, number, unreadable = facescrub.prepare(root, partial(count, "photographs"))
        if unreadable:
            named = ", ".join(unreadable[:3]) + (", ..." if len(unreadable) > 3 else "")
            _say(console, f"left out {len(unreadable)} files that cannot be read: {named}")
        _say(console, f"{number} photographs are in {folder}")
        return 0
    if settings.name == facescrub.NAME:
        raise ValueError(f"{facescrub.NAME}: {facescrub.HOW.format(raw=root / facescrub.FOLDER / 'raw')}")
    source = lookup("data set to fetch", settings.name, sets.SOURCES)
    if (root / source.folder).exists():
        _say(console, f"{settings.name} is in {root / source.folder} already: remove it to get it again")
        return 0
    with progress.counted(console, of_bytes=True) as count:
        folder = fetch(source, root, address=settings.address, on_bytes=count)
    _say(console, f"{settings.name} is in {folder}")
    return 0


def doctor(settings: Namespace) -> int:
    """Says which implementation of every operation is in force, and why."""
    from cem_fast.cli import doctor as clinic

    return clinic.examine(_console(), device=_device(settings.device), check=settings.check)


def bench(settings: Namespace) -> int:
    """Times operations, fits and training beside the libraries that one might take instead, and records it."""
    from cem_fast.benchmarks import machine

    device = _device(settings.device)
    if not settings.render:
        machine.keep_large_blocks()
    from cem_fast.benchmarks import suite

    files = {
        name: None if getattr(settings, name) is None else Path(getattr(settings, name))
        for name in ("readme", "compare")
    }
    measuring = partial(
        suite.run,
        groups=tuple(settings.only),
        quick=settings.quick,
        threads=settings.threads,
        command=settings.command,
    )
    return suite.main(
        _console(),
        device=device,
        folder=Path(settings.save),
        measuring=None if settings.render else measuring,
        **files,
    )


COMMANDS = {
    "demo": demo,
    "train": train,
    "attack": attack,
    "evaluate": evaluate,
    "figures": figures,
    "data": data,
    "doctor": doctor,
    "bench": bench,
}


def _parser() -> Parser:
    parser = Parser(
        prog="cem-fast",
        description="Conditional entropy maximization against model inversion attacks.",
        version=__version__,
    )
    commands = parser.add_subcommands()
    for name, function in COMMANDS.items():
        command = Parser(description=function.__doc__)
        if name == "train":
            _add_settings(command, RunConfig)
            command.add_argument("--folder", type=str, default="runs/train", help="where to save the run")
            text = (
                "go on from the latest epoch of a training run of these settings that was interrupted, if there is one"
            )
            command.add_argument("--resume", action="store_true", help=text)
        elif name == "attack":
            shared = _described(RunConfig)
            command.add_argument("run", type=str, help="folder of a saved run")
            for key, (hint, _, text) in shared.items():
                if key in RESETTABLE:
                    text = "seed of every random choice of the attacks" if key == "seed" else text
                    text += "; the run's own if left out"
                    command.add_argument(f"--{key.replace('_', '-')}", type=hint | None, default=None, help=text)
        elif name == "evaluate":
            _add_settings(command, GridConfig)
            command.add_argument(
                "--folder", type=str | None, default=None, help="where to save; runs/<name> if left out"
            )
        elif name == "demo":
            command.add_argument("--seeds", type=tuple[int, ...] | None, default=None, help="seeds, one run each")
            command.add_argument("--folder", type=str | None, default=None, help="where to save; runs/demo if left out")
        elif name == "figures":
            command.add_argument("figure", type=str, help="leakage, sweeps, utility or cost")
            text = "folder of a grid's results, or a grid's YAML file: what has not been run of it is run first"
            command.add_argument("source", type=str, help=text)
            text = "where to write the picture and its table; beside the results if left out"
            command.add_argument("--save", type=str | None, default=None, help=text)
            text = "where the runs of a YAML file go; runs/<name> if left out"
            command.add_argument("--folder", type=str | None, default=None, help=text)
        elif name == "data":
            text = (
                "fetch downloads a published data set, goes on where an earlier download stopped, and checks every file; "
                "prepare makes 48x48 photographs of raw ones"
            )
            command.add_argument("action", type=str, help=text)
            text = (
                "to fetch: cifar10 or cifar100 (170 MB each), tiny_imagenet (250 MB), fashion_mnist (31 MB); to prepare: facescrub, "
                "whose photographs its authors give out"
            )
            command.add_argument("name", type=str, help=text)
            text = "address to fetch from, such as that of a mirror, which must hold the published files; their own if left out"
            command.add_argument("--address", type=str | None, default=None, help=text)
        elif name == "doctor":
            command.add_argument("--check", action="store_true", help="compare every operation with the reference")
        else:
            _add_choices_of_bench(command)
        if name in ("demo", "evaluate", "figures"):
            text = "runs at a time, each on its share of the cores; 0 for one run a core, or one in all on a GPU"
            command.add_argument("--jobs", type=NonNegativeInt, default=0, help=text)
        if name in ("demo", "train", "evaluate", "figures"):
            command.add_argument(
                "--dry-run", action="store_true", help="show the settings and the planned runs, and stop"
            )
        if name in ("train", "attack", "evaluate", "figures", "data"):
            text = (
                f"folder of downloaded data sets; the environment variable {DATA_ROOT}, or {DEFAULT_ROOT}, if left out"
            )
            command.add_argument("--data-root", type=str | None, default=None, help=text)
        if name != "data":
            command.add_argument("--device", type=str, default="cpu", help="where to compute: cpu, cuda, cuda:1, ...")
        commands.add_subcommand(name, command, help=function.__doc__)
    return parser


def _add_choices_of_bench(parser: Parser) -> None:
    parser.add_argument("--quick", action="store_true", help="few shapes and few rounds: about 2 minutes")
    text = "groups to measure: operations, scaling, fitting, training, startup; all if left out"
    parser.add_argument("--only", type=tuple[str, ...], default=(), help=text)
    parser.add_argument("--threads", type=NonNegativeInt, default=0, help="threads of the CPU; 0 for all cores")
    parser.add_argument("--save", type=str, default="runs/bench", help="folder whose table gets the rows appended")
    text = "Markdown file with a section for the figures, between markers"
    parser.add_argument("--readme", type=str | None, default=None, help=text)
    text = "an earlier table: what became slower than its last run, beyond the noise, is listed, and is status 1 if it is ours"
    parser.add_argument("--compare", type=str | None, default=None, help=text)
    text = "measure nothing: write the report of the rows that are there"
    parser.add_argument("--render", action="store_true", help=text)


def _add_settings(parser: Parser, config: type[SharedConfig]) -> None:
    parser.add_argument("--config", action="config", help="YAML file of settings; flags after it take precedence")
    for key, (hint, default, text) in _described(config).items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=hint, default=default, help=text)


def _described(config: type[SharedConfig]) -> dict[str, tuple[Any, Any, str]]:
    """Type, default and description of every setting; the descriptions are those of the docstrings."""
    texts = {}
    for cls in config.__mro__[:-1]:
        entries = re.findall(r"^ {8}(\w+): (.+(?:\n {12}.+)*)", cls.__doc__, re.MULTILINE)
        texts |= {key: " ".join(text.split()).replace("``", "").rstrip(".") for key, text in entries}
    hints = get_type_hints(config)
    defaults = config()
    return {f.name: (hints[f.name], getattr(defaults, f.name), texts[f.name]) for f in fields(config)}


def _read_grid(path: Path, *changes: str) -> GridConfig:
    parser = Parser()
    _add_settings(parser, GridConfig)
    return _build(GridConfig, parser.parse_args(["--config", str(path), *changes]))


def _build(config: type[RunConfig] | type[GridConfig], settings: Namespace) -> Any:
    try:
        return config(**{field.name: getattr(settings, field.name) for field in fields(config)})
    except TypeError as error:  # a null in the YAML file, which the parser lets pass
        raise ValueError(str(error)) from None


def _normalized(arguments: Sequence[str]) -> list[str]:
    """Accepts ``--noise_std`` for ``--noise-std``, and ``--seeds 0,1`` or ``--seeds 0`` for ``--seeds [0,1]``."""
    hints = get_type_hints(RunConfig if arguments[:1] in (["train"], ["attack"]) else GridConfig)
    lists = {
        f"--{key.replace('_', '-')}": get_args(hint)[0] for key, hint in hints.items() if get_origin(hint) is tuple
    }
    lists |= {"--only": str} if arguments[:1] == ["bench"] else {}
    found: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag.startswith("--") and not flag.startswith("--print"):
            flag = flag.replace("_", "-")
        if equals and flag in lists:
            value = _as_list(value, lists[flag])
        if not equals and found and found[-1] in lists:
            flag = _as_list(argument, lists[found[-1]])
        found.append(flag + equals + value)
    return found


def _as_list(text: str, kind: type) -> str:
    if text.startswith("["):
        return text
    if str in (kind, *get_args(kind)) and text:  # quoted, because YAML reads a folder called 2024 as a number
        text = ",".join(json.dumps(item.strip(), ensure_ascii=False) for item in text.split(","))
    return f"[{text}]"


def _run_grid(grid: GridConfig, settings: Namespace, *, fresh: bool) -> int:
    from cem_fast._support.files import check_target
    from cem_fast.cli import progress
    from cem_fast.experiments import workers
    from cem_fast.experiments.grid import check, check_folder, evaluate
    from cem_fast.experiments.results import load_runs
    from cem_fast.report import page as report

    device = _device(settings.device)
    folder = f"runs/{grid.name}" if settings.folder is None else settings.folder
    check_target(folder, {report.PAGE: report.MARK})
    if settings.dry_run:
        check(grid.runs())
        check_folder(folder, grid.runs())
        return _show_plan(grid, grid.runs(), folder)
    # a second thread hardly speeds up one small run on the CPU; a second run does
    jobs = settings.jobs or (workers.num_cores() if device.type == "cpu" else 1)
    console = _console()
    with _watch(console) as watch:
        results = evaluate(grid, folder, device=device, jobs=jobs, fresh=fresh, command=settings.command, watch=watch)
    if results.runs:
        page = report.write(folder)
        _show_results(console, results, load_runs(folder, results))
        _say(console, f"report: {page}")
    for entry in results.failed:
        run = progress.describe(entry.config)
        _fail(f"{run} failed, and is tried again by the same command: {entry.reason}")
    return 1 if results.failed else 0


def _show_plan(config: RunConfig | GridConfig, plan: list[RunConfig], folder: str, *, attack: bool = True) -> int:
    """Prints the settings and what the runs will do, in counts: how long that takes depends on the machine."""
    from dataclasses import asdict

    import yaml

    from cem_fast.cli import progress
    from cem_fast.experiments.build import load_data

    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}
    print(yaml.safe_dump(settings, sort_keys=False), end="")
    trained = attacked = 0
    for index, run in enumerate(plan):
        splits = load_data(run.data, run.fold, run.image_size, run.protocol)
        trained += run.epochs * len(splits.train)
        if attack and {"decoder", "ensemble", "optimization", "gan"} & set(run.attacks):
            attacked += (run.attack_epochs + run.attack_epochs // 2) * len(splits.attacker)
        print(
            f"[{index + 1}/{len(plan)}] {progress.describe(run)}: {len(splits.train)} training, {len(splits.test)} test images"
        )
    attacks = f" and {attacked:,} for the decoder attacks" if attack else ""
    print(f"in all {trained:,} images to train on{attacks}, counting every epoch; nothing was run")
    print(f"the results would go to {folder}")
    return 0


def _show_results(console: Console, results: Results, runs: list[Measured]) -> None:
    from rich import box
    from rich.table import Table

    from cem_fast.experiments.results import make_rows

    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title="the strongest attack of every run: mean over runs ± their standard deviation",
        title_justify="left",
    )
    for column in ("data", "defense", "noise", "runs", "accuracy, %", "attack MSE", "/ class mean", "PSNR", "SSIM"):
        justify = "left" if column in ("data", "defense") else "right"
        table.add_column(column, justify=justify, no_wrap=console.width >= 100 and column != "defense")
    rows = make_rows(runs)
    for row in rows:
        class_mean = results.baseline[row.data].class_mean_mse
        table.add_row(
            row.data,
            row.short_name,
            f"{row.noise_std:g}",
            str(row.num_runs),
            f"{100 * row.accuracy.mean:.1f} ± {100 * row.accuracy.deviation:.1f}",
            f"{row.mse.mean:.5f} ± {row.mse.deviation:.5f}",
            f"{row.mse.mean / class_mean:.0%}",
            f"{row.psnr.mean:.2f}",
            f"{row.ssim.mean:.3f}",
        )
    for data, baseline in results.baseline.items():
        controls = {"class mean, the label alone": baseline.class_mean_mse, "mean image": baseline.mean_image_mse}
        for title, error in controls.items():
            share = f"{error / baseline.class_mean_mse:.0%}"
            table.add_row(data, title, "", "", "", f"{error:.5f}", share, "", "", style="dim")
    console.print(table)
    cells = {row.record.cell: row for row in rows}

    def name(entry: Pair | FrontierEntry) -> str:
        """What a gain is about: ``faces / noise + CEM at noise 0.1``."""
        row = cells[results.runs[entry.run].cell]
        return f"{row.data} / {row.short_name} at noise {row.noise_std:g}"

    gains = {"at the same noise": results.pairs, "over plain noise at equal accuracy": results.frontier}
    for title, entries in gains.items():
        for entry in entries:
            low, high = entry.interval
            _say(
                console,
                f"{name(entry)}, {title}: strongest attack's MSE {entry.gain:+.0%} "
                f"(95% interval {low:+.0%} to {high:+.0%})",
            )
    measured = {entry.run for entry in results.frontier}
    for entry in results.pairs:
        if entry.run not in measured:
            _say(
                console,
                f"{name(entry)}, over plain noise at equal accuracy: not measured in this grid "
                "(needs --noise-levels that reach its accuracy)",
            )


def _require_one_process() -> None:
    from cem_fast._support import ranks

    if ranks.count() > 1:
        raise ValueError("torchrun starts cem-fast train alone; the other commands share the cores by --jobs")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _kept(arguments: Sequence[str]) -> str:
    kept = {
        "train": "the training up to its latest epoch, from which --resume goes on,",
        "data": "what has been downloaded",
        "bench": "every race that had ended",
    }
    return kept.get("".join(arguments[:1]), "every run that had finished")


def _escape(config: RunConfig) -> str:
    from rich.markup import escape

    from cem_fast.cli.progress import describe

    return escape(describe(config))


def _console() -> Console:
    from rich.console import Console

    # A pipe has no width of its own: wide enough for the table, whatever reads it.
    return Console() if sys.stdout.isatty() else Console(width=118)


def _watch(console: Console) -> Any:
    from cem_fast.cli.progress import Bars, Lines

    return (Bars if console.is_terminal else Lines)(console)


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:<index>, got {name!r}") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise ValueError(f"device {name!r} is not there: this PyTorch sees {count} CUDA devices")
    elif device.type != "cpu":
        raise ValueError(f"device must be cpu, cuda or cuda:<index>, got {name!r}")
    return device


def _nearest(name: str, options: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, options, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _kinds(text: str) -> str:
    """``int or null`` for the classes that an error of jsonargparse lists."""
    names = {"tuple": "list", "NoneType": "null"}
    return " or ".join(names.get(kind, kind) for kind in re.findall(r"(?:<class '|\b(?=tuple\[))(\w+)", text)) or text


def _terminate(*_: object) -> NoReturn:
    raise Terminated


def _fail(message: str) -> None:
    print(f"cem-fast: {message}", file=sys.stderr)


def _explain(error: BaseException, *, status: int) -> int:
    if os.environ.get("CEM_FAST_DEBUG") == "1":
        traceback.print_exception(error)
    named = isinstance(error, OSError) and error.filename is not None
    text = f"{error.filename}: {error.strerror}" if named else str(error)
    _fail(" ".join(text.split()) or type(error).__name__)
    return status
