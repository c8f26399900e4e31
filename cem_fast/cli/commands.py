"""The commands: a function and its flags each. Importable without torch."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from cem_fast.cli import audit as audits
from cem_fast.cli import console as consoles
from cem_fast.cli import device as devices
from cem_fast.cli import torchrun
from cem_fast.cli.console import fail, say
from cem_fast.cli.parser import Argument, Command, Option, build, plain, read_grid, settings
from cem_fast.config import SEARCHED, GridConfig, RunConfig, described

DEMO = Path(__file__).parents[1] / "demo.yaml"
# the names in cem_fast.data.root, which imports torch
DATA_ROOT = "CEM_FAST_DATA"
SKIP_CORRUPT = "CEM_FAST_SKIP_CORRUPT"
RESETTABLE = (  # settings of a saved run that `cem-fast attack` can replace
    "attacks",
    "attack_decoder",
    "attack_dropout",
    "attack_loss",
    "attack_epochs",
    "attack_batch_size",
    "attack_gan_epochs",
    "attack_steps",
    "attack_budget",
    "attack_releases",
    "seed",
)
COMMANDS: dict[str, Command] = {}
Function = TypeVar("Function", bound=Callable[..., int])


def _command(*params: click.Parameter) -> Callable[[Function], Function]:
    """Register a function as the command of its name."""

    def register(function: Function) -> Function:
        command = Command(function, params)
        COMMANDS[str(command.name)] = command
        return function

    return register


def _folder(default: str | None, text: str) -> Option:
    return Option("folder", text, str | None if default is None else str, default)


def _jobs() -> Option:
    text = "runs at a time, each on its share of the cores; 0 for one per core, one on a GPU, or what a cluster has room for"
    return Option("jobs", text, int, 0, at_least=0)


def _cluster() -> tuple[Option, Option]:
    text = "address of a Ray cluster that does the runs, HOST:PORT or auto; its machines share the folders"
    gpus = "GPUs of a run on the cluster, such as 0.5; if left out, 1 with --device cuda, else 0"
    return Option("cluster", text, str | None), Option("gpus_per_run", gpus, float | None)


def _dry_run() -> Option:
    return Option("dry_run", "show the settings and the planned runs, and stop", bool, False)


def _data_root() -> Option:
    text = f"folder of downloaded data sets; without it the environment variable {DATA_ROOT}, or ~/.cache/cem_fast"
    return Option("data_root", text, str | None)


def _skip_corrupt() -> Option:
    return Option("skip_corrupt", "leave out files of a folder that cannot be read as images", bool, False)


def _device() -> Option:
    return Option("device", "where to compute: cpu, cuda, cuda:1, ...", str, "cpu")


@_command(
    Option("seeds", "seeds, one run each", tuple[int, ...] | None),
    _folder(None, "where to save; runs/demo if left out"),
    _jobs(),
    _dry_run(),
    _device(),
)
def demo(seeds: tuple[int, ...] | None, **values: Any) -> int:
    """Train, attack and report on real faces, from scratch every time."""
    return _run_grid(read_grid(DEMO, **{} if seeds is None else {"seeds": seeds}), fresh=True, **values)


@_command(
    *settings(RunConfig),
    _folder("runs/train", "where to save the run"),
    Option(
        "resume",
        "continue an interrupted training of these settings from its latest epoch, if there is one",
        bool,
        False,
    ),
    _dry_run(),
    _data_root(),
    _skip_corrupt(),
    _device(),
)
def train(folder: str, resume: bool, dry_run: bool, device: str, **values: Any) -> int:
    """Train one model and save it; under torchrun, all processes train it together."""
    from cem_fast.experiments.grid import check
    from cem_fast.experiments.run import check_run_folder, is_finished, run

    config: RunConfig = build(RunConfig, values)
    place, first = devices.find(device), torchrun.rank() == 0
    console = consoles.make()
    console.quiet = not first
    with consoles.watch(console) as watch:
        check([config], watch)
    if first:
        check_run_folder(folder, config)
    if dry_run:
        return consoles.show_plan(config, [config], folder, attack=False) if first else 0
    with torchrun.together(place) as (group, own_place):
        if resume and is_finished(config, folder):
            say(console, f"{folder} holds the finished run of these settings")
            return 0
        with consoles.watch(console) as watch:
            watch.started(0, 1, config)
            record = run(
                config,
                folder,
                device=own_place,
                attack=False,
                on_stage=partial(watch.stage, 0),
                resume=resume,
                process_group=group,
            )
    if record is not None:
        console.print(f"accuracy {record.accuracy:.1%} on {record.num_test} test images")
        console.print(f"saved in {folder}: attack it with cem-fast attack {shlex.quote(folder)}")
    return 0


def _resettable() -> list[click.Parameter]:
    found = described(RunConfig)
    seed = replace(found["seed"], text="seed of all random choices of the attacks")
    chosen = [seed if name == "seed" else found[name] for name in RESETTABLE]
    return [Option(s.name, f"{plain(s.text)} (default: the run's own)", s.kind | None) for s in chosen]


@_command(
    Argument("run", "folder of a saved run"),
    *_resettable(),
    Option("data_from", "folder of the run's images, if it has moved since the training", str | None),
    _data_root(),
    _skip_corrupt(),
    _device(),
)
def attack(run: str, data_from: str | None, device: str, **values: Any) -> int:
    """Attack a saved run again, with any attack and its own budget."""
    from rich.table import Table

    from cem_fast import attacks, training
    from cem_fast._support.lookup import lookup
    from cem_fast.cli.progress import describe
    from cem_fast.experiments import saved_run
    from cem_fast.experiments.attack import attack_model, in_memory, infer
    from cem_fast.experiments.build import build_attack

    loaded = saved_run.load_run(run, device=devices.find(device), data_from=data_from)
    loaded.defense.secure = False  # an evaluation repeats its draws from the seed
    asked = {key: values[key] for key in RESETTABLE if values[key] is not None}
    config = replace(loaded.config, **asked)
    for name in config.attacks:
        lookup("attack", name, dict.fromkeys(attacks.names()))
    saved, baseline = loaded.description.record.attacks, loaded.description.baseline
    console = consoles.make()
    images, draws = in_memory(loaded.data, loaded.model)
    for name in config.attacks:
        say(console, build_attack(name, config, images, draws=draws).overview())
    table = Table(title=f"{describe(config)}: {len(images.victims)} images under attack", title_justify="left")
    for column in ("attack", "MSE", "half the budget", "PSNR, dB", "SSIM", "recognized", "when trained", "seconds"):
        table.add_column(column, justify="left" if column == "attack" else "right")
    observe = training.observer(loaded.model, loaded.defense)
    with consoles.watch(console) as watch:
        for name in config.attacks:
            start = time.perf_counter()
            outcome, _, _ = attack_model(
                name,
                loaded.model,
                loaded.defense,
                images,
                config,
                observe=observe,
                draws=draws,
                on_stage=partial(watch.stage, 0),
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
                f"{time.perf_counter() - start:.1f}",
            )
        inferred = infer(
            loaded.model,
            loaded.defense,
            images,
            seed=config.seed,
            observe=observe,
            on_stage=partial(watch.stage, 0),
        )
    console.print(table)
    for name, rate in inferred.items():
        console.print(f"{name} read from the features: {rate.share:.1%} right (by chance {rate.chance:.1%})")
    console.print(f"class mean {baseline.class_mean_mse:.5f}, mean image {baseline.mean_image_mse:.5f}")
    return 0


@_command(
    *settings(GridConfig),
    _folder(None, "where to save; runs/<name> if left out"),
    _jobs(),
    *_cluster(),
    _dry_run(),
    _data_root(),
    _skip_corrupt(),
    _device(),
)
def evaluate(dry_run: bool, command: str, **values: Any) -> int:
    """Run a grid and report on it."""
    places = {name: values.pop(name) for name in ("folder", "jobs", "device", "cluster", "gpus_per_run")}
    grid: GridConfig = build(GridConfig, values)
    return _run_grid(grid, dry_run=dry_run, command=command, fresh=False, **places)


@_command(
    Argument("figure", "leakage, sweeps, utility or cost"),
    Argument("source", "folder of a grid's results, or a grid's YAML file, whose missing runs are run first"),
    Option("save", "folder of the picture and its table; that of the results if left out", str | None),
    _folder(None, "where the runs of a YAML file go; runs/<name> if left out"),
    _jobs(),
    _dry_run(),
    _data_root(),
    _skip_corrupt(),
    _device(),
)
def figures(
    figure: str, source: str, save: str | None, folder: str | None, dry_run: bool, command: str, **values: Any
) -> int:
    """Draw one of the paper's figures: leakage (Fig. 3), sweeps (Fig. 4), utility (Eq. 4) or cost (Table 9)."""
    from cem_fast.report import figures as pictures

    results = Path(source)
    if not results.exists():
        raise ValueError(f"source must be a folder of results or a grid's YAML file, and {source!r} is not there")
    grid = None if results.is_dir() else read_grid(results)
    if grid is not None:
        results = Path(folder or f"runs/{grid.name}")
    elif folder:
        raise ValueError(f"folder is for the runs of a YAML file, and {results} is a folder of results already")
    target = save or results
    pictures.check(figure, target)
    if grid is not None:
        _run_grid(grid, folder=str(results), dry_run=dry_run, command=command, fresh=False, **values)
    if not dry_run:
        for path in pictures.write(figure, results, target):
            say(consoles.make(), f"written: {path}")
    return 0


@_command(
    Argument(
        "action",
        "fetch downloads a published data set, continues an interrupted download, and checks every file; "
        "prepare makes 48x48 photographs of raw ones",
    ),
    Argument(
        "name",
        "to fetch: cifar10 or cifar100 (170 MB each), tiny_imagenet (250 MB), fashion_mnist (31 MB); to prepare: facescrub, "
        "whose authors give out the photographs",
    ),
    Option("address", "address of a mirror with the published files; the official one if left out", str | None),
    _data_root(),
)
def data(action: str, name: str, address: str | None, **_: object) -> int:
    """Get a data set: cem-fast data fetch cifar10, or cem-fast data prepare facescrub."""
    from cem_fast import data as sets
    from cem_fast._support.lookup import lookup
    from cem_fast.cli import progress
    from cem_fast.data import facescrub
    from cem_fast.data.fetch import fetch

    lookup("action", action, dict.fromkeys(("fetch", "prepare")))
    root, console = sets.data_root(), consoles.make()
    if action == "prepare":
        lookup("data set to prepare", name, {facescrub.NAME: None})
        with progress.counted(console) as count:
            folder, number, unreadable = facescrub.prepare(root, partial(count, "photographs"))
        if unreadable:
            named = ", ".join(unreadable[:3]) + (", ..." if len(unreadable) > 3 else "")
            say(console, f"left out {len(unreadable)} files that cannot be read: {named}")
        say(console, f"{number} photographs are in {folder}")
        return 0
    if name == facescrub.NAME:
        raise ValueError(f"{facescrub.NAME}: {facescrub.HOW.format(raw=root / facescrub.FOLDER / 'raw')}")
    source = lookup("data set to fetch", name, sets.SOURCES)
    if (root / source.folder).exists():
        say(console, f"{name} is in {root / source.folder} already: remove it to get it again")
        return 0
    with progress.counted(console, of_bytes=True) as count:
        folder = fetch(source, root, address=address, on_bytes=count)
    say(console, f"{name} is in {folder}")
    return 0


@_command(Option("check", "compare every operation with the reference", bool, False), _device())
def doctor(check: bool, device: str, **_: object) -> int:
    """Show the implementation of every operation that is in use, and why."""
    from cem_fast.cli.doctor import examine

    return examine(device=devices.find(device), check=check)


@_command(
    Option("quick", "few shapes and few rounds: about 2 minutes", bool, False),
    Option(
        "only",
        "groups to measure: operations, scaling, fitting, training, startup; all if left out",
        tuple[str, ...],
        (),
    ),
    Option("threads", "threads of the CPU; 0 for all cores", int, 0, at_least=0),
    Option("save", "folder of the table that the results are appended to", str, "runs/bench"),
    Option("readme", "Markdown file with a section for the figures, between markers", str | None),
    Option(
        "compare",
        "an earlier table; lists what became slower beyond the noise, with status 1 if it is ours",
        str | None,
    ),
    Option("render", "measure nothing, and write the report of the table", bool, False),
    _device(),
)
def bench(
    quick: bool,
    only: tuple[str, ...],
    threads: int,
    save: str,
    render: bool,
    device: str,
    command: str,
    **files: str | None,
) -> int:
    """Time operations, fits and training against other libraries, and record the results."""
    from cem_fast.benchmarks import machine

    place = devices.find(device)
    if not render:
        machine.keep_large_blocks()
    from cem_fast.benchmarks import suite

    measuring = partial(suite.run, groups=only, quick=quick, threads=threads, command=command)
    return suite.main(
        consoles.make(),
        device=place,
        folder=Path(save),
        measuring=None if render else measuring,
        **{name: None if path is None else Path(path) for name, path in files.items()},
    )


@_command(
    Argument("run", "folder of a saved run; left out with --verify", required=False),
    Option("folder", "where to write device.*, cloud.* and manifest.json", str, "runs/export"),
    Option("format", "onnx, pt2 (torch.export) or executorch", str, "onnx"),
    Option(
        "noise",
        "input: the application passes standard draws in; graph: the graph draws (pt2 alone)",
        str,
        "input",
    ),
    Option("message", "numbers that are sent: float32, float16 or uint8", str, "float32"),
    Option("overwrite", "replace the halves of another network in the folder", bool, False),
    Option("verify", "folder of exported halves whose noise is checked; nothing is exported", str | None),
    _data_root(),
)
def export(run: str | None, folder: str, verify: str | None, **values: Any) -> int:
    """Write the device half and the cloud half of a saved run as two files, and verify their noise."""
    from cem_fast import deploy

    if (run is None) == (verify is None):
        raise ValueError("export takes the folder of a saved run, or --verify with the folder of exported halves")
    if run is None:
        manifest = deploy.verify(str(verify))
    else:
        manifest = deploy.export_run(
            run, folder, **{key: values[key] for key in ("format", "noise", "message", "overwrite")}
        )
    consoles.show_export(consoles.make(), manifest, str(verify if run is None else folder))
    return 0


@_command(
    Argument("folder", "folder of exported halves"),
    Option("port", "port of loopback to listen on", int, 8000, at_least=0),
)
def serve(folder: str, port: int, **_: object) -> int:
    """Serve the cloud half of exported halves on loopback, without TLS: a demonstration."""
    from cem_fast.deploy import CloudServer

    server = CloudServer(folder, port=port)
    address = server.start()
    say(consoles.make(), f"serving {folder} on {address}; Ctrl-C ends it")
    try:
        server.wait()
    finally:
        server.stop()
    return 0


@_command(
    # what is chosen by a weak attack may resist that attack alone
    *settings(RunConfig, hidden=SEARCHED, attacks=("kernel_ridge", "inversion")),
    Option("max_accuracy_loss", "accuracy that may be lost against the best level of plain noise", float, 0.01),
    Option("min_mse", "least error of the strongest attack", float, 0.0),
    Option("max_bytes", "most bytes of a message", int | None, at_least=1),
    Option("max_device_macs", "most multiplications of the device for an image", int | None, at_least=1),
    Option("trials", "number of trials", int, 60, at_least=1),
    _folder("runs/tune", "where to save the runs, tune.json, pareto.png and best.yaml"),
    _jobs(),
    *_cluster(),
    _data_root(),
    _device(),
)
def tune(
    folder: str,
    trials: int,
    jobs: int,
    device: str,
    cluster: str | None,
    gpus_per_run: float | None,
    command: str,
    **values: Any,
) -> int:
    """Search settings for a target; the same command continues an interrupted search."""
    from dataclasses import fields

    from cem_fast import tune as tuning

    console = consoles.make()
    targets = tuning.Targets(**{each.name: values.pop(each.name) for each in fields(tuning.Targets)})
    place = devices.place(device, jobs, cluster, gpus_per_run)
    config: RunConfig = build(RunConfig, values)
    with consoles.watch(console, tuning.search.varied(config)) as watch:
        tuned = tuning.tune(config, folder, targets, trials=trials, watch=watch, **place)
    consoles.show_tuned(console, tuned, folder)
    return 0 if tuned.best is not None else 1


@_command(
    *audits.flags(), _folder("runs/audit", "where to write audit.json and report.html"), _data_root(), _skip_corrupt()
)
def audit(**values: Any) -> int:
    """Audit an encoder: what could be rebuilt from what it sends, and is that within limits?"""
    return audits.run(**values)


def _run_grid(
    grid: GridConfig,
    *,
    folder: str | None,
    jobs: int,
    dry_run: bool,
    device: str,
    command: str,
    fresh: bool,
    cluster: str | None = None,
    gpus_per_run: float | None = None,
    **_: object,
) -> int:
    """Run a grid and report on it; with ``fresh``, without the runs that are on disk."""
    from cem_fast._support.files import check_target
    from cem_fast.cli import progress
    from cem_fast.experiments.grid import check, check_folder, evaluate
    from cem_fast.experiments.results import load_runs
    from cem_fast.report import page as report

    place = devices.place(device, jobs, cluster, gpus_per_run)
    folder = f"runs/{grid.name}" if folder is None else folder
    check_target(folder, {report.PAGE: report.MARK})
    if dry_run:
        check(grid.runs())
        check_folder(folder, grid.runs())
        return consoles.show_plan(grid, grid.runs(), folder)
    console = consoles.make()
    with consoles.watch(console, grid.runs()) as watch:
        results = evaluate(grid, folder, fresh=fresh, command=command, watch=watch, **place)
    if results.runs:
        page = report.write(folder)
        consoles.show_results(console, results, load_runs(folder, results))
        say(console, f"report: {page}")
    for entry in results.failed:
        run = progress.describe(entry.config, grid.runs())
        fail(f"{run} failed, and is tried again by the same command: {entry.reason}")
    return 1 if results.failed else 0
