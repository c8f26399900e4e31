"""Builds the compiled parts of cem_fast; everything else about the package is in pyproject.toml.

CEM_FAST_CPP=auto|0|1: build the C++ parts if possible (and record why not), leave them out, or fail if they do not build
without a warning. CEM_FAST_CUDA=auto|0|1: the same of the CUDA kernels, which need nvcc and a torch with CUDA but no GPU;
TORCH_CUDA_ARCH_LIST says for which devices.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, include_paths, library_paths


def requested(variable: str) -> str:
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{variable} must be auto, 0 or 1, got {value!r}")
    return value


CPP, CUDA = requested("CEM_FAST_CPP"), requested("CEM_FAST_CUDA")

FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden,-Wall,-Wextra"]
NVCC_FLAGS += ["-Werror=all-warnings"] if CUDA == "1" else []
# other people's headers are system headers: their warnings are not ours to treat as errors
HEADERS = [*include_paths(), pybind11.get_include(), sysconfig.get_paths()["include"]]
SYSTEM = [argument for path in HEADERS for argument in ("-isystem", path)]
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# the oldest torch release whose stable ABI is enough: one library serves it and every later one
STABLE_ABI = [("TORCH_TARGET_VERSION", "0x020b000000000000")]


def flags(choice: str) -> list[str]:
    return FLAGS + (["-Werror"] if choice == "1" else []) + SYSTEM


EXTENSIONS = [
    Extension(
        "cem_fast._C_cpu",
        sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
        depends=[str(path) for folder in ("common", "cpu") for path in Path("csrc", folder).glob("*.h")],
        define_macros=STABLE_ABI,
        extra_compile_args=flags(CPP),
        library_dirs=library_paths(),
        libraries=["torch_cpu", "c10"],
        language="c++",
    ),
    Extension(
        "cem_fast._C",
        ["csrc/module.cpp"],
        define_macros=[("CEM_FAST_FLAGS", f'"{" ".join(FLAGS)}"'), ("CEM_FAST_TORCH", f'"{torch.__version__}"')],
        extra_compile_args=flags(CPP),
        language="c++",
    ),
]


def cuda_extension() -> Extension:
    """The CUDA kernels, for every device that this nvcc knows unless others are asked for.

    Raises:
        RuntimeError: they cannot be built here, with the reason.
    """
    if torch.version.cuda is None:
        raise RuntimeError(f"torch {torch.__version__} has no CUDA")
    nvcc = CUDA_HOME and shutil.which("nvcc", path=str(Path(CUDA_HOME, "bin")))
    if not nvcc:
        raise RuntimeError("no CUDA toolkit (nvcc not found)")
    release = re.search(r"release (\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        raise RuntimeError(f"{nvcc} is of another CUDA release than torch's {torch.version.cuda}")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    built = [a for a in ARCHITECTURES if f"compute_{a.replace('.', '')}" in known]
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(built) + "+PTX")
    return Extension(
        "cem_fast._C_cuda",
        sorted(str(path) for path in Path("csrc/cuda").iterdir() if path.suffix in (".cu", ".cpp")),
        depends=[str(path) for folder in ("common", "cuda") for path in Path("csrc", folder).glob("*.*h")],
        define_macros=STABLE_ABI,
        extra_compile_args={"cxx": flags(CUDA), "nvcc": NVCC_FLAGS},
        library_dirs=library_paths(),
        libraries=["torch_cpu", "torch_cuda", "c10"],  # with torch_cuda comes the CUDA runtime that torch uses
        language="c++",
    )


NO_CUDA = None  # why not
try:
    if CUDA == "0":
        raise RuntimeError("left out on request (CEM_FAST_CUDA=0 at installation)")
    # the last, so that its failure leaves the others built
    EXTENSIONS.append(cuda_extension())
except RuntimeError as error:
    if CUDA == "1":
        raise SystemExit(f"CEM_FAST_CUDA=1: {error}") from None
    NO_CUDA = str(error)


@contextmanager
def shown_later(said: list[str]) -> Iterator[None]:
    """Appends the lines that compilers print in the block to a list, and prints them after it."""
    sys.stdout.flush()
    sys.stderr.flush()
    outputs = {number: os.dup(number) for number in (1, 2)}
    with tempfile.TemporaryFile() as file:
        for number in outputs:
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, output in outputs.items():
                os.dup2(output, number)
                os.close(output)
            file.seek(0)
            text = file.read().decode(errors="replace")
            sys.stderr.write(text)
            said += text.splitlines()


def cause(error: Exception, said: list[str]) -> str:
    """The first error of a compiler, or what the build says if there is none."""
    return next((line.strip() for line in said if re.search(r"\berror\b|\bError\b", line)), str(error))


class Build(BuildExtension):
    """Leaves a package that works without its compiled parts, and says why, where they cannot be built."""

    def run(self) -> None:
        self.failed: list[Extension] = []
        in_place = self.inplace or self.editable_mode
        self.folder = Path("." if in_place else self.build_lib, "cem_fast")
        for part in ("cpp", "cuda"):
            self.record(part).unlink(missing_ok=True)
        super().run()

    def build_extensions(self) -> None:
        compiler = self.compiler.compiler_cxx[0]
        if CPP == "0":
            self.extensions = []
            self.leave_out("cpp", "left out on request (CEM_FAST_CPP=0 at installation)")
            return self.leave_out("cuda", "left out with the C++ parts (CEM_FAST_CPP=0 at installation)")
        if NO_CUDA is not None:
            self.leave_out("cuda", NO_CUDA)
        said: list[str] = []
        try:
            with shown_later(said):
                super().build_extensions()
        except Exception as error:
            if CPP == "1":
                raise
            missing = shutil.which(compiler) is None
            reason = (
                f"no C++ compiler ({compiler} not found)" if missing else f"{compiler} failed: {cause(error, said)}"
            )
            self.extensions = []
            self.leave_out("cpp", reason)
            self.leave_out("cuda", reason)
        self.extensions = [extension for extension in self.extensions if extension not in self.failed]

    def build_extension(self, extension: Extension) -> None:
        said: list[str] = []
        try:
            with shown_later(said):
                super().build_extension(extension)
        except Exception as error:
            if extension.name != "cem_fast._C_cuda":
                raise
            if CUDA == "1":
                raise SystemExit(f"CEM_FAST_CUDA=1: {cause(error, said)}") from error
            self.failed.append(extension)
            self.leave_out("cuda", f"nvcc failed: {cause(error, said)}")

    def record(self, part: str) -> Path:
        return self.folder / f"_not_built_{part}.txt"

    def leave_out(self, part: str, reason: str) -> None:
        """Records why a part was not built, and removes its libraries of an earlier build."""
        for name in {"cpp": ("_C", "_C_cpu"), "cuda": ("_C_cuda",)}[part]:
            Path(self.get_ext_fullpath(f"cem_fast.{name}")).unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.record(part).write_text(reason.splitlines()[0] + "\n")


setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": Build})
