"""Builds the compiled parts of cem_fast; everything else about the package is in pyproject.toml.

CEM_FAST_CPP=auto|0|1: build them if possible (and record why not), leave them out, or fail if they do not build without a
warning.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

CPP = os.environ.get("CEM_FAST_CPP", "auto")
if CPP not in ("auto", "0", "1"):
    raise SystemExit(f"CEM_FAST_CPP must be auto, 0 or 1, got {CPP!r}")

FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra"]
FLAGS += ["-Werror"] if CPP == "1" else []
# other people's headers are system headers: their warnings are not ours to treat as errors
HEADERS = [*include_paths(), pybind11.get_include(), sysconfig.get_paths()["include"]]
SYSTEM = [argument for path in HEADERS for argument in ("-isystem", path)]

EXTENSIONS = [
    # the oldest torch release whose stable ABI is enough: one library serves it and every later one
    Extension(
        "cem_fast._C_cpu",
        sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
        depends=[str(path) for path in Path("csrc/cpu").glob("*.h")],
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
        extra_compile_args=FLAGS + SYSTEM,
        library_dirs=library_paths(),
        libraries=["torch_cpu", "c10"],
        language="c++",
    ),
    Extension(
        "cem_fast._C",
        ["csrc/module.cpp"],
        define_macros=[("CEM_FAST_FLAGS", f'"{" ".join(FLAGS)}"'), ("CEM_FAST_TORCH", f'"{torch.__version__}"')],
        extra_compile_args=FLAGS + SYSTEM,
        language="c++",
    ),
]


class Build(BuildExtension):
    """Leaves a package that works without its compiled parts, and says why, where they cannot be built."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        self.record = Path("." if in_place else self.build_lib, "cem_fast", "_not_built.txt")
        self.record.unlink(missing_ok=True)
        super().run()

    def build_extensions(self) -> None:
        compiler = self.compiler.compiler_cxx[0]
        if CPP == "0":
            return self.leave_out("left out on request (CEM_FAST_CPP=0 at installation)")
        try:
            super().build_extensions()
        except Exception as error:
            if CPP == "1":
                raise
            missing = shutil.which(compiler) is None
            self.leave_out(f"no C++ compiler ({compiler} not found)" if missing else f"{compiler} failed: {error}")

    def leave_out(self, reason: str) -> None:
        self.extensions = []
        self.record.parent.mkdir(parents=True, exist_ok=True)
        self.record.write_text(reason.splitlines()[0] + "\n")


setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": Build})
