"""The command ``cem-fast audit``: its flags, and what it does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from cem_fast.cli import console as consoles
from cem_fast.cli import device as devices
from cem_fast.cli.console import fail, say
from cem_fast.cli.parser import Argument, Option

if TYPE_CHECKING:
    from rich.console import Console

    from cem_fast.audit import Audit
    from cem_fast.data import Splits
    from cem_fast.experiments.watch import Watcher

FAILED = 3  # exit status where a limit does not hold


def flags() -> list[click.Parameter]:
    """The flags of the command."""
    limit = "limit such as 'mse >= 0.01' on mse, psnr, ssim, lpips, recognized or label; repeatable"
    return [
        Argument("target", "file.py:callable, package.module:callable, model.pt2, model.onnx or a saved run", False),
        Option("data", "folder of images with one sub-folder per class, or a data set's name", str | None),
        Option("images", ".npy file of images [N, C, H, W], for pairs without a target", str | None),
        Option("features", ".npy file of their released features", str | None),
        Option("labels", ".npy file of their classes", str | None),
        Option("cut", "module behind which the target is cut, such as layer1", str | None),
        Option("noise_std", "standard deviation of Gaussian noise on the features", float, 0.0),
        Option("releases", "messages of each image that the attacker sees", int, 1, at_least=1),
        Option("attacks", "attacks to try; those of the budget if left out", tuple[str, ...] | None),
        click.Option(["--limit"], multiple=True, metavar="LIMIT", help=limit),
        Option("find_noise", "find the least noise with which this limit holds", str | None),
        Option("budget", "quick, standard or thorough", str, "quick"),
        Option("victims", "images under attack, at most", int, 1000, at_least=2),
        Option(
            "attacker_images",
            "images that the attacker holds, at most; as many as fit into 2 GB if left out",
            int | None,
        ),
        Option("mirror", "let the attacker also learn from mirror images of its own", bool, False),
        Option("size", "side in pixels that images are resized to; their own if left out", int | None, at_least=8),
        Option("normalize", "imagenet or MEAN,STD; the target's own preprocessing if left out", str | None),
        Option("seed", "seed of all random choices", int, 0, at_least=0),
        Option("device", "where a network in Python and the attacks compute: cpu, cuda, cuda:1, ...", str, "cpu"),
    ]


def run(*, folder: str, limit: tuple[str, ...], find_noise: str | None, command: str, **values: Any) -> int:
    """Audits, writes the files, and prints the verdict."""
    from cem_fast.audit import Limit, page
    from cem_fast.audit.audit import chosen
    from cem_fast.audit.noise import find_noise as search

    limits = [*limit, *([find_noise] if find_noise else [])]
    for each in limits:
        Limit.parse(each)
    chosen(values["attacks"], values["budget"])
    page.check(folder)
    values["device"] = devices.find(values["device"])
    console = consoles.make()
    if find_noise and values["noise_std"]:
        raise ValueError("noise_std must be left out with find_noise, which finds it")
    with consoles.watch(console) as watch:
        on_stage: Watcher = lambda *stage: watch.stage(0, *stage)  # noqa: E731
        audited, scale = _prepared(
            limits=limits, searches=find_noise is not None, on_stage=on_stage, console=console, **values
        )
        result = search(audited, find_noise, start=scale()) if find_noise else audited(values["noise_std"], True)
    written = page.write(result, folder, command=command)
    show(console, result, drawn=values["attacker_images"] is not None)
    if find_noise:
        say(console, f"least noise with which {find_noise} holds: {result.noise_std:.4g}")
    say(console, f"report: {written}")
    return 0 if result.passed else FAILED


def show(console: Console, result: Audit, *, drawn: bool) -> None:
    """Prints the attacks and the verdict on every limit; ``drawn`` if the user said how many images the attacker holds."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("attack", "MSE", "half the budget", "PSNR, dB", "SSIM", "recognized", "seconds"):
        table.add_column(column, justify="left" if column == "attack" else "right")
    for name, each in result.attacks.items():
        table.add_row(
            name,
            f"{each.mse:.5f}",
            "-" if each.mse_half_budget is None else f"{each.mse_half_budget:.5f}",
            f"{each.psnr:.2f}",
            f"{each.ssim:.3f}",
            "-" if each.recognized is None else f"{each.recognized:.0%}",
            f"{each.seconds:.1f}",
        )
    console.print(table)
    baseline, count = result.baseline, result.data
    mirrored = " and their mirror images" if count["mirror"] else ""
    fewer = count["num_attacker"] < count["num_available"] and not drawn
    why = ": more do not fit into 2 GB with their features and what attacks make of them" if fewer else ""
    say(console, f"the attacker holds {count['num_attacker']} of {count['num_available']} images{mirrored}{why}")
    say(console, f"class mean {baseline['class_mean_mse']:.5f}, mean image {baseline['mean_image_mse']:.5f}")
    if result.label:
        by_chance = f"(by chance {result.label['chance']:.1%})"
        say(console, f"label read from the features: {result.label['share']:.1%} right {by_chance}")
    if result.accuracy is not None:
        without = f", {result.clean_accuracy:.1%} without" if result.noise_std else ""
        say(console, f"accuracy {result.accuracy:.1%} at noise {result.noise_std:.4g}{without}")
    for verdict in result.limits:
        low, high = verdict.interval
        words = f"{verdict.value:.4g} under {verdict.attack}, 95% interval {low:.4g} to {high:.4g}"
        if verdict.holds:
            say(console, f"holds: {verdict.limit} ({words})")
        else:
            fail(f"the limit {verdict.limit} fails: {words}")


def _load(
    source: str, size: int | None, seed: int, values: dict[str, Any], on_stage: Watcher, console: Console
) -> Splits:
    """Loads the images, as many as fit, and prints what they are."""
    from cem_fast import data as sets
    from cem_fast.cli.progress import about
    from cem_fast.data.memory import MEMORY, NUMBERS

    splits = sets.load(
        source,
        fold=0,
        image_size=size,
        seed=seed,
        at_most=(values["attacker_images"], values["victims"]),
        memory=MEMORY // NUMBERS[0],
        on_step=lambda done, total: on_stage("images", done, total),
    )
    say(console, about(splits))
    count, read = splits.num_available or len(splits.train), len(splits.train)
    fitting = read < count and values["attacker_images"] is None
    why = " (what 2 GB hold if features are small; the attacker holds what fits with its features)" if fitting else ""
    say(console, f"{count} images for the attacker, of which {read} are read{why}; {len(splits.test)} to rebuild")
    return splits


def _prepared(
    *,
    target: str | None,
    data: str | None,
    images: str | None,
    features: str | None,
    labels: str | None,
    cut: str | None,
    normalize: str | None,
    size: int | None,
    attacks: tuple[str, ...] | None,
    limits: list[str],
    searches: bool,
    on_stage: Watcher,
    console: Console,
    noise_std: float,
    seed: int,
    **settings: Any,
) -> tuple[Any, Any]:
    """A function that audits at a noise level, by all attacks or by ``ridge`` for the last limit alone; and the features' scale."""
    from pathlib import Path

    import torch

    from cem_fast.audit import Target, audit, load_target
    from cem_fast.audit.targets import normalization, read_array
    from cem_fast.experiments import saved_run

    del settings["data_root"], settings["skip_corrupt"]
    shared: dict[str, Any] = {"on_stage": on_stage, "seed": seed, **settings}
    if target is None:
        if images is None or features is None or data is not None or cut is not None or normalize is not None:
            raise ValueError(
                "without a target, an audit needs images and features, and takes no data, cut or normalize"
            )
        classes = None if labels is None else read_array(labels)
        given, sent = read_array(images), read_array(features).float()
        if len(given) != len(sent):
            raise ValueError(f"images and features must be as many, got {len(given)} and {len(sent)}")
        shared |= {"name": f"pairs of {Path(images).name} and {Path(features).name}", "encoder": sent}
        shared |= {"images": given, "labels": classes}
        scale = lambda: float(sent.std()) + 1e-6  # noqa: E731
    elif images is not None or features is not None or labels is not None:
        raise ValueError("images, features and labels are for pairs without a target: give its images by data")
    elif Path(target, saved_run.DESCRIPTION).is_file():
        if cut is not None or normalize is not None or noise_std or searches:
            raise ValueError(
                "a saved run has its own cut, preprocessing and noise: leave out cut, normalize, noise_std and find_noise"
            )
        loaded = saved_run.load_run(target)
        loaded.defense.secure = False  # an evaluation repeats its draws from the seed
        splits: Splits = loaded.data if data is None else _load(data, size, seed, settings, on_stage, console)
        shared |= {
            "defense": loaded.defense,
            "encoder": loaded.model.encoder,
            "decoder": loaded.model.decoder,
            "images": splits,
            "name": target,
        }
        scale = lambda: 0.0  # noqa: E731
    else:
        if data is None:
            raise ValueError("a target needs data: a folder of images, or a data set's name")
        splits = _load(data, size, seed, settings, on_stage, console)
        wanted = normalization(normalize)
        probe = splits.victims.images[:2]
        found = load_target(target, cut=cut, example=probe, normalization=wanted)
        shared |= {"encoder": found.encoder, "decoder": found.decoder, "name": found.name, "digest": found.digest}
        shared |= {"images": splits, "normalize": wanted}

        def scale() -> float:
            with torch.no_grad():
                return float(Target(found.encoder, wanted).eval()(splits.victims.images[:256]).std()) + 1e-6

    def audited(noise: float, every: bool) -> Audit:
        if every:
            return audit(**shared, noise_std=noise, attacks=attacks, limits=limits)
        return audit(**shared, noise_std=noise, attacks=("ridge",), limits=limits[-1:], verdicts_only=True)

    return audited, scale
