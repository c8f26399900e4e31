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
            ("data.html", "torch.utils.data.DataLoader", "torch.utils.data.dataloader.DataLoader"),
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


INVENTORIES = {"python": PYTHON, "torch": TORCH, "numpy": NUMPY}


def lines(names: dict[str, tuple[str, str]]) -> str:
    """One line per name: name, domain and role, priority, page, and the name to show (``-`` for the same)."""
    return "".join(f"{name} py:{role} 1 {uri} -\n" for name, (role, uri) in sorted(names.items()))


if __name__ == "__main__":
    for project, names in INVENTORIES.items():
        head = (
            "Sphinx inventory version 2",
            f"Project: {project}",
            "Version: ",
            "The remainder of this file is compressed using zlib.",
        )
        content = "".join(f"# {line}\n" for line in head).encode() + zlib.compress(lines(names).encode(), 9)
        (HERE / f"{project}.inv").write_bytes(content)
