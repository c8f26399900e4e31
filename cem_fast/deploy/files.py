"""Files of exported halves: written by torch's exporters, opened by the runtime of their format."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cem_fast._support.files import require_regular, write_atomically

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "executorch": ".pte"}
PACKAGES = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "pt2": (), "executorch": ("executorch",)}
LARGEST_BATCH = 64  # of executorch, which reserves memory for it
LIMIT = 2**31 - 2**20  # bytes of a file of protocol buffers


def write_half(
    half: nn.Module, example: Sequence[Tensor], path: Path, *, inputs: Sequence[str], output: str, random: bool = False
) -> None:
    """Writes one half as a file with a free batch size.

    Args:
        half: a module of one tensor, or of one tensor and several more as ``*args``.
        example: its inputs, two rows each.
        path: the file, which ends in ``.onnx``, ``.pt2`` or ``.pte``.
        inputs: names of the inputs.
        output: name of the output.
        random: whether the graph may draw.

    Raises:
        ImportError: a package of the extra ``deploy`` is missing.
        ValueError: the half cannot be exported, draws by itself, or is too large for one file.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from cem_fast.deploy.files import open_half, write_half
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "half.pt2")
        ...     write_half(torch.nn.ReLU(), [torch.rand(2, 3)], path, inputs=["x"], output="y")
        ...     open_half(path)(torch.tensor([[-1.0, 0.0, 2.0]]))
        tensor([[0., 0., 2.]])
    """
    format = _format(path)
    check_packages(format)
    size = sum(each.numel() * each.element_size() for each in (*half.parameters(), *half.buffers()))
    if size > LIMIT:
        raise ValueError(f"{path.stem} has {size / 2**30:.1f} GB of weights, and one file holds less than 2 GB")
    rows = {0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH if format == "executorch" else None)}
    first, *draws = example
    shapes: tuple[object, ...] = (rows, tuple(rows for _ in draws)) if draws else (rows,)
    with _quiet():
        try:
            program = torch.export.export(half, (first, *draws), dynamic_shapes=shapes, strict=False)
            drawing = sorted({str(node.target) for node in program.graph.nodes if _draws(node.target)})
            if drawing and not random:
                raise ValueError(f"its graph draws by {', '.join(drawing)}, and would repeat itself")
            write: dict[str, Callable[[torch.export.ExportedProgram], bytes]] = {
                "onnx": partial(_onnx, inputs=inputs, output=output),
                "pt2": _pt2,
                "executorch": _executorch,
            }
            content = write[format](program)
        except Exception as error:  # the exporters' own classes differ between releases
            raise ValueError(f"the {path.stem} half cannot be exported to {format}: {_reason(error)}") from error
    write_atomically(path, content)


def open_half(path: str | Path) -> Callable[..., Tensor]:
    """Opens an exported half.

    A file of ``pt2`` is a torch program and comes with code: open one that you exported, or that you trust as you trust a package.

    Args:
        path: ``.onnx``, ``.pt2`` or ``.pte``.

    Returns:
        A function of tensors, with a batch of any size.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the runtime is not installed.
        ValueError: the file is damaged, or reads other files.

    Example:
        >>> from cem_fast.deploy.files import open_half
        >>> open_half("nowhere/device.onnx")
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] no such half: 'nowhere/device.onnx'
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(2, "no such half", str(path))
    format = _format(path)
    check_packages(format)
    try:
        return {"onnx": _open_onnx, "pt2": _open_pt2, "executorch": _open_executorch}[format](path)
    except Exception as error:  # each runtime has its own classes
        raise ValueError(f"{path} cannot be opened: {_reason(error)}") from error


def check_packages(format: str) -> None:
    """Fails if the packages of a format are not installed.

    Args:
        format: ``onnx``, ``pt2`` or ``executorch``.

    Raises:
        ImportError: one is missing; the error says how to install it.

    Example:
        >>> from cem_fast.deploy.files import check_packages
        >>> check_packages("pt2")
    """
    missing = [name for name in PACKAGES[format] if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"the format {format} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def digest(path: Path) -> str:
    """SHA-256 of a file.

    Args:
        path: the file.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from cem_fast.deploy.files import digest
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "empty").write_bytes(b"")
        ...     digest(Path(folder, "empty"))[:8]
        'e3b0c442'
    """
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def _draws(target: object) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def _onnx(program: torch.export.ExportedProgram, inputs: Sequence[str], output: str) -> bytes:
    made = torch.onnx.export(
        program, dynamo=True, input_names=list(inputs), output_names=[output], external_data=False, verbose=False
    )
    if made is None:
        raise ValueError("torch.onnx.export returned nothing")
    content: bytes = made.model_proto.SerializeToString()
    return content


def _pt2(program: torch.export.ExportedProgram) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _open_onnx(path: Path) -> Callable[..., Tensor]:
    return onnx_function(read_onnx(path), path.name)


def read_onnx(path: Path, *, neighbors: bool = False) -> bytes:
    """Reads an ONNX model with all of its tensors, also those of subgraphs, functions, attributes and sparse initializers.

    Args:
        path: the file.
        neighbors: whether tensors may be in regular files next to it; links are refused.

    Returns:
        The model, with no tensor in another file.

    Raises:
        ValueError: a tensor is in a file that must not be read.

    Example:
        >>> from pathlib import Path
        >>> from cem_fast.deploy.files import read_onnx
        >>> read_onnx(Path("nowhere.onnx"))
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.onnx'
    """
    require_regular(path)
    content = path.read_bytes()
    import onnx

    model = onnx.load_model_from_string(content)
    outside = list(_outside(model))
    if not outside:
        return content
    if not neighbors:
        raise ValueError(f"its weights are in other files, such as {outside[0]!r}")
    for location in outside:
        file = path.parent / location
        if Path(location).name != location or file.is_symlink() or not file.is_file():
            raise ValueError(f"its weights are not in a file next to it, but in {location!r}")
    onnx.load_external_data_for_model(model, str(path.parent))
    if left := list(_outside(model)):
        raise ValueError(f"its weights in {left[0]!r} are of a kind that is read from the model's own file only")
    return model.SerializeToString()


def _outside(message: Any) -> Iterator[str]:
    """Locations of the tensors in other files, wherever in a protocol buffer they are; empty for one that is not named."""
    if message.DESCRIPTOR.full_name == "onnx.TensorProto":
        named = [entry.value for entry in message.external_data if entry.key == "location"]
        if message.data_location == message.EXTERNAL or named:
            yield from named or [""]
        return
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for each in [value] if hasattr(value, "DESCRIPTOR") else value:
                yield from _outside(each)


def onnx_function(content: bytes, name: str) -> Callable[..., Tensor]:
    """Returns a function of tensors that runs an ONNX model on the CPU, without gradients.

    Args:
        content: the model with its weights.
        name: its name, for errors.

    Example:
        >>> from cem_fast.deploy.files import onnx_function
        >>> try:
        ...     onnx_function(b"", "empty.onnx")
        ... except Exception:  # the runtime's own classes, or ImportError without it
        ...     print("no model")
        no model
    """
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*tensors: Tensor) -> Tensor:
        if len(tensors) != len(names):
            raise ValueError(f"{name} takes {', '.join(names)}, got {len(tensors)} tensors")
        feed: dict[str, Any] = {key: tensor.detach().numpy() for key, tensor in zip(names, tensors)}
        try:
            return torch.from_numpy(session.run(None, feed)[0])
        except Exception as error:  # the runtime's own classes
            raise ValueError(f"{name} does not run: {_reason(error)}") from error

    return run


def _open_pt2(path: Path) -> Callable[..., Tensor]:
    with _quiet():
        program = torch.export.load(path).module()

    def run(*tensors: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = program(*tensors)
        return found

    return run


def _executorch(program: torch.export.ExportedProgram) -> bytes:
    from executorch.exir import to_edge_transform_and_lower

    content: bytes = to_edge_transform_and_lower(program).to_executorch().buffer
    return content


def _open_executorch(path: Path) -> Callable[..., Tensor]:
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(str(path))
    method = program.load_method("forward")

    def run(*tensors: Tensor) -> Tensor:
        parts = zip(*(tensor.split(LARGEST_BATCH) for tensor in tensors))
        return torch.cat([method.execute([each.contiguous() for each in part])[0].clone() for part in parts])

    return run


def _format(path: Path) -> str:
    for format, suffix in SUFFIXES.items():
        if path.suffix == suffix:
            return format
    raise ValueError(f"{path} must end in {', '.join(SUFFIXES.values())}")


def _reason(error: BaseException) -> str:
    """The cause of an exporter's error in one line, without its advice to developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporters' progress, warnings and log messages from the user, who gets one error or none."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), open(os.devnull, "w") as null:
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(null):
                yield
    finally:
        logging.disable(before)
