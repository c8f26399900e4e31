"""Table 9 and more: the cost of both parts of a network at inference, and of an epoch of training with CEM."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cem_fast.cost import measure, measure_training, message_bytes
from cem_fast.experiments.results import Row
from cem_fast.experiments.saved_run import Run, load_run, read_description
from cem_fast.report.figures import cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH, PASSES = 128, 30
NEEDS = "it needs attacked runs"
COLUMNS = (
    "data", "model", "cut", "image_shape", "defenses", "bottleneck", "message_bytes",
    *(f"{part}_{key}" for part in ("device", "cloud") for key in ("parameters", "macs", "ms")),
    "plain_epoch_s", "cem_epoch_s", "off_trained_s", "on_trained_s",
)  # fmt: skip


def table(rows: Sequence[Row], folder: Path) -> list[dict[str, Any]]:
    """A line per network and images; see :func:`cem_fast.cost.measure` and :func:`cem_fast.cost.measure_training`.

    ``plain_epoch_s`` and ``cem_epoch_s`` are times of epochs over the training images, measured here. They are None if no cell of the
    network has noise. ``off_trained_s`` and ``on_trained_s`` are medians of the epochs that the runs recorded, without CEM and with it.
    These also depend on the defense and on other load of the machine. All times are of one machine: compare those of one table only.

    Args:
        rows: the cells.
        folder: folder of the grid.

    Raises:
        FileNotFoundError: the images are not where they were.
        ValueError: a run is damaged, or its images have changed.

    Example:
        >>> from pathlib import Path
        >>> from cem_fast.report.figures import cost
        >>> cost.table([], Path())
        []
    """
    cells: dict[str, list[Row]] = {}
    runs: dict[str, Run] = {}
    for row in rows:
        run = load_run(folder / str(row.record.checkpoint))
        network = f"{row.data} {list(run.description.image_shape)} {run.model}"
        cells.setdefault(network, []).append(row)
        if network not in runs or runs[network].loss is None:
            runs[network] = run
    return [_line(runs[network], cells[network], folder) for network in cells]


def _line(run: Run, rows: Sequence[Row], folder: Path) -> dict[str, Any]:
    shape, config, images = run.description.image_shape, run.config, run.data.train
    line: dict[str, Any] = {
        "data": rows[0].data,
        "model": config.model,
        "cut": config.cut,
        "image_shape": "x".join(map(str, shape)),
    }
    line["defenses"] = " ".join(dict.fromkeys(row.config.defense for row in rows))
    line |= {"bottleneck": config.bottleneck, "message_bytes": message_bytes(run.model, shape)}
    found = measure(run.model, torch.rand(BATCH, *shape), passes=PASSES)
    for name, part in (("device", found["encoder"]), ("cloud", found["decoder"])):
        line |= {f"{name}_parameters": part.parameters, f"{name}_macs": part.macs, f"{name}_ms": 1e3 * part.seconds}
    line |= {"plain_epoch_s": None, "cem_epoch_s": None}
    if run.loss is not None:
        cost = measure_training(run.model, run.loss, images.images, images.labels, batch_size=config.batch_size)
        steps = -(-len(images) // config.batch_size)
        line |= dict(zip(("plain_epoch_s", "cem_epoch_s"), cost.epoch(steps)))
    for name in ("off", "on"):
        line[f"{name}_trained_s"] = _trained([row for row in rows if (row.role == "on") == (name == "on")], folder)
    return line


def _trained(rows: Sequence[Row], folder: Path) -> float | None:
    """The median epoch that the runs recorded, without the first, in which CEM does nothing yet."""
    paths = [folder / str(run.record.checkpoint) for row in rows for run in row.runs]
    seconds = [entry.seconds for path in paths for entry in read_description(path).history[1:]]
    return statistics.median(seconds) if seconds else None


def size(table: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Width and height of the picture in inches: a row per network.

    Args:
        table: result of :func:`table`.

    Example:
        >>> from cem_fast.report.figures import cost
        >>> cost.size([{}, {}])
        (11.5, 2.8)
    """
    return 11.5, 1.3 + 0.75 * len(table)


def draw(picture: Figure, table: Sequence[Mapping[str, Any]], colors: Mapping[str, str]) -> None:
    """Draws the cost of every network on the device and in the cloud, and of an epoch of its training without CEM and with it.

    Args:
        picture: the figure to draw on.
        table: result of :func:`table`.
        colors: colors of roles and texts.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from cem_fast.report.charts import COLORS
        >>> from cem_fast.report.figures import cost
        >>> line = dict.fromkeys(cost.COLUMNS, 1.0) | {"data": "faces", "image_shape": "1x16x16", "defenses": "noise"}
        >>> cost.draw(picture := Figure(), [line], COLORS["light"])
        >>> len(picture.axes)
        3
    """
    panels = picture.subplots(1, 3, sharey=True)
    pairs = [
        ("million multiplications an image", 1e-6, {"device_macs": "device", "cloud_macs": "cloud"}),
        (f"ms for {BATCH} images", 1.0, {"device_ms": "device", "cloud_ms": "cloud"}),
        ("s for an epoch of training", 1.0, {"plain_epoch_s": cell.ROLES["off"], "cem_epoch_s": cell.ROLES["on"]}),
    ]
    shades = {"device": colors["text"], "cloud": colors["faint"]}
    shades |= {cell.ROLES[role]: colors[role] for role in ("off", "on")}
    for axes, (label, scale, bars) in zip(panels, pairs):
        for offset, (key, name) in zip((-0.18, 0.18), bars.items()):
            heights = [height + offset for height, line in enumerate(table) if line[key] is not None]
            lengths = [scale * line[key] for line in table if line[key] is not None]
            drawn = axes.barh(heights, lengths, 0.32, color=shades[name], label=name)
            axes.bar_label(drawn, fmt=" {:.3g}", fontsize=8.5, color=colors["text"])
        axes.set_xlabel(label)
        axes.margins(x=0.18)
        axes.grid(axis="x", color=colors["grid"], linewidth=0.8)
        axes.tick_params(axis="y", length=0)
        style = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2}
        axes.legend(frameon=False, fontsize=9, labelcolor=colors["text"], **style)
    panels[0].set_yticks(range(len(table)), [_name(line, table) for line in table])
    panels[0].set_ylim(len(table) - 0.5, -0.5)


def _name(line: Mapping[str, Any], table: Sequence[Mapping[str, Any]]) -> str:
    """Name of a network, with its data if there are several, its bottleneck, and its defenses if these change the network."""
    names = [f"{line['model']}, cut {line['cut']}, bottleneck {line['bottleneck']}"]
    names.append(f"{line['image_shape']}, sends {line['message_bytes']:,} bytes")
    if len({each["data"] for each in table}) > 1:
        names.insert(0, line["data"])
    network = ("data", "model", "cut", "image_shape", "bottleneck")
    alike = [each for each in table if all(each[key] == line[key] for key in network)]
    return "\n".join([*names, *([line["defenses"]] if len(alike) > 1 else [])])
