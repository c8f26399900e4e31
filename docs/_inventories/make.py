"""Writes the inventories with which references to other projects are resolved.

    python docs/_inventories/make.py

Each inventory lists only the names that the documentation refers to, so the files stay small and a build needs no network. To add a
name that a build reports as unknown, add it below next to the page that documents it, and run this script again.
"""

import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent

ERRORS = [
    *("ValueError", "TypeError", "RuntimeError", "FileNotFoundError", "FloatingPointError", "ImportError", "OSError"),
    *("KeyError", "IndexError", "MemoryError", "NotImplementedError"),
]
ABSTRACT = ["Callable", "Iterable", "Iterator", "Mapping", "Sequence", "Collection"]

PYTHON = {
    **{name: ("class", f"library/functions.html#{name}") for name in ("bool", "int", "float", "object", "type")},
    **{
        name: ("class", f"library/stdtypes.html#{name}")
        for name in ("str", "bytes", "tuple", "list", "dict", "set", "range")
    },
    **{name: ("exception", f"library/exceptions.html#{name}") for name in ERRORS},
    **{
        f"collections.abc.{name}": ("class", f"library/collections.abc.html#collections.abc.{name}")
        for name in ABSTRACT
    },
    "None": ("data", "library/constants.html#None"),
    "pathlib.Path": ("class", "library/pathlib.html#pathlib.Path"),
    "Path": ("class", "library/pathlib.html#pathlib.Path"),
    "typing.Any": ("data", "library/typing.html#typing.Any"),
    "typing.NamedTuple": ("class", "library/typing.html#typing.NamedTuple"),
    "typing.Protocol": ("class", "library/typing.html#typing.Protocol"),
}

# an annotation may name a class as it is imported, or by the module that defines it
TORCH = {
    **{
        name: ("class", f"{page}#{shown}")
        for page, shown, *names in (
            ("tensors.html", "torch.Tensor", "torch.Tensor", "torch._tensor.Tensor", "Tensor"),
            ("tensor_attributes.html", "torch.dtype", "torch.dtype"),
            ("tensor_attributes.html", "torch.device", "torch.device"),
            ("size.html", "torch.Size", "torch.Size"),
            ("generated/torch.Generator.html", "torch.Generator", "torch.Generator", "torch._C.Generator"),
            ("generated/torch.nn.Module.html", "torch.nn.Module", "torch.nn.Module", "torch.nn.modules.module.Module"),
            (
                "generated/torch.nn.Sequential.html",
                "torch.nn.Sequential",
                "torch.nn.Sequential",
                "torch.nn.modules.container.Sequential",
            ),
            ("data.html", "torch.utils.data.Dataset", "torch.utils.data.Dataset", "torch.utils.data.dataset.Dataset"),
            ("optim.html", "torch.optim.Optimizer", "torch.optim.Optimizer", "torch.optim.optimizer.Optimizer"),
            (
                "distributed.html",
                "torch.distributed.ProcessGroup",
                "torch.distributed.ProcessGroup",
                "ProcessGroup",
                "torch.distributed.distributed_c10d.ProcessGroup",
            ),
        )
        for name in names
    }
}

NUMPY = {"numpy.ndarray": ("class", "reference/generated/numpy.ndarray.html#numpy.ndarray")}


def write(project: str, names: dict[str, tuple[str, str]]) -> None:
    """Writes one inventory: four lines of text, then a compressed line per name."""
    head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n# The remainder of this file is compressed using zlib.\n"
    lines = "".join(f"{name} py:{role} 1 {uri} -\n" for name, (role, uri) in sorted(names.items()))
    (HERE / f"{project}.inv").write_bytes(head.encode() + zlib.compress(lines.encode(), 9))


if __name__ == "__main__":
    write("python", PYTHON)
    write("torch", TORCH)
    write("numpy", NUMPY)
