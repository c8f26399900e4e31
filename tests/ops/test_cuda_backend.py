"""What is known of the compiled CUDA kernels without a GPU: that they load, and who is told what where they cannot."""

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cem_fast.ops import agreement, backend, library, reference

BUILT = next(backend.PACKAGE.glob("_C_cuda.*"), None) is not None and torch.version.cuda is not None
needs_library = pytest.mark.skipif(not BUILT, reason="the CUDA kernels are not built")


def described(**variables):
    code = "import cem_fast; print(cem_fast.backends()['on CUDA tensors'])"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CEM_FAST_")}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**environment, **variables}, check=False
    )


@needs_library
def test_every_operator_is_there_and_has_a_shape():
    operators = backend.cuda_operators()
    assert set(operators) == set(library.ON_CUDA)
    for name in operators:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cem_fast_cuda::{name}", "CUDA")
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"cem_fast_cuda::{name}", "CPU")
    x, means = torch.empty(5, 3, device="meta"), torch.empty(2, 4, 3, device="meta")
    labels = torch.empty(5, dtype=torch.int64, device="meta")
    counts, scatter, sums, assignment = operators["component_statistics_fwd"](x, means, labels, None, None, True, True)
    assert (counts.shape, scatter.shape, sums.shape, assignment.shape) == ((2, 4), (2, 4, 3), (2, 4, 3), (5,))


SOURCE = Path(__file__).resolve().parents[2]
SETUP = SOURCE / "setup.py"
# What an installation asks nvcc for; nothing is compiled.
PLAN = """
import setuptools
setuptools.setup = lambda ext_modules, **_: print(*(extension.name for extension in ext_modules))
exec(open("setup.py").read())
from torch.utils.cpp_extension import _get_cuda_arch_flags
print(*_get_cuda_arch_flags())
"""


def planned(**variables):
    """The extensions that an installation would build, and the devices and the virtual ones that it would build for."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"} | variables
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLAN],
        capture_output=True,
        text=True,
        check=True,
        cwd=SOURCE,
        env=environment,
    )
    extensions, flags = done.stdout.splitlines()
    return extensions.split(), set(re.findall(r"code=sm_(\d+)", flags)), set(re.findall(r"code=compute_(\d+)", flags))


can_build = pytest.mark.skipif(
    not SETUP.exists() or torch.version.cuda is None or shutil.which("nvcc") is None,
    reason="there is no source tree, no nvcc or no torch with CUDA",
)


@can_build
def test_an_installation_builds_for_every_device_and_for_later_ones():
    extensions, devices, virtual = planned()
    assert "cem_fast._C_cuda" in extensions
    assert {"75", "80", "86", "89", "90"} <= devices
    assert virtual == {max(devices, key=int)}


@can_build
def test_an_installation_builds_for_the_devices_that_are_asked_for():
    assert planned(TORCH_CUDA_ARCH_LIST="8.6;9.0+PTX")[1:] == ({"86", "90"}, {"90"})


@can_build
def test_an_installation_leaves_the_cuda_kernels_out_on_request():
    assert "cem_fast._C_cuda" not in planned(CEM_FAST_CUDA="0", TORCH_CUDA_ARCH_LIST="9.0")[0]


@needs_library
@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"CEM_FAST_BACKEND": "cuda"}, "compiled: CEM_FAST_BACKEND=cuda"),
        ({"CEM_FAST_BACKEND": "cpu"}, "reference: triton CEM_FAST_BACKEND=cpu; cuda CEM_FAST_BACKEND=cpu"),
    ],
    ids=str,
)
def test_choice_by_environment(variables, expected):
    done = described(**variables)
    assert done.stdout.startswith(expected), done.stderr


@needs_library
def test_asking_for_them_puts_them_on_cuda_and_leaves_the_cpu_alone():
    code = (
        "import torch, cem_fast.ops\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print(has('cem_fast::cem_fwd', 'CUDA'), cem_fast.backends()['on CPU tensors'])"
    )
    environment = {**os.environ, "CEM_FAST_BACKEND": "cuda"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    built = any(backend.PACKAGE.glob("_C_cpu.*"))
    assert done.stdout.startswith("True compiled" if built else "True reference")


@pytest.mark.parametrize(
    "version, record, message",
    [
        (None, None, "CEM_FAST_BACKEND=cuda: this build of torch has no CUDA"),
        ("13.0", None, "are not built: the package was not installed with its extensions"),
        ("13.0", "no CUDA toolkit (nvcc not found)", "are not built: no CUDA toolkit"),
    ],
)
def test_asking_for_what_is_not_there_names_the_reason(version, record, message, monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "PACKAGE", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", version)
    for cached in ("cuda_library", "cuda_operators"):
        monkeypatch.setattr(backend, cached, getattr(backend, cached).__wrapped__)
    if record is not None:
        (tmp_path / "_not_built_cuda.txt").write_text(record + "\n")
    with pytest.raises(RuntimeError, match=message):
        backend._load_cuda("cuda")
    serves, reason = backend._load_cuda("auto")
    assert not serves
    assert (record or ("no CUDA" if version is None else "not installed with its extensions")) in reason


@needs_library
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cpu_tensors_are_refused():
    with pytest.raises(NotImplementedError, match="cem_fast_cuda::component_statistics_fwd"):
        backend.cuda_operators()["component_statistics_fwd"](
            torch.ones(2, 2), torch.ones(1, 1, 2), None, None, None, False, False
        )


@needs_library
@pytest.mark.parametrize("triton", [True, False])
def test_left_to_itself_it_takes_the_fastest_that_is_there(triton):
    code = (
        "import sys, torch\n"
        f"if not {triton}: sys.modules['triton'] = None\n"
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        f"util.find_spec = lambda name: None if name == 'triton' and not {triton} else find(name)\n"
        "import cem_fast.ops\n"
        "print(torch._C._dispatch_has_kernel_for_dispatch_key('cem_fast::cem_fwd', 'CUDA'), "
        "cem_fast.backends()['on CUDA tensors'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CEM_FAST_", "TRITON_"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    wanted = "compiled for component_statistics_fwd, component_statistics_bwd, entropy_bound, cem_fwd "
    wanted += "and mixtures of 128 components or more, which is faster there; "
    wanted += "triton for the rest; compared with the reference at first use"
    assert done.stdout.startswith(
        f"True {wanted}" if triton else "True compiled: built for this package; compared with"
    )


@pytest.mark.parametrize("name", backend.COMPILED_FIRST_IF_LARGE)
@pytest.mark.parametrize(
    "components, dimension, labeled, kept, dtype, is_large",
    [
        (128, 32, False, False, torch.float32, True),
        (128, 32, False, False, torch.bfloat16, True),
        (127, 32, False, False, torch.float32, False),
        (128, 31, False, False, torch.float32, False),
        (128, 32, True, False, torch.float32, False),
        (128, 32, False, True, torch.float32, False),
        (128, 32, False, False, torch.float64, False),
    ],
)
def test_a_large_mixture_has_kernels_of_its_own(name, components, dimension, labeled, kept, dtype, is_large):
    x, means, labels = torch.empty(3, dimension, dtype=dtype), torch.empty(1, components, dimension), torch.zeros(3)
    mixture = [x, means, torch.empty(1, components), torch.empty(1, components), labels if labeled else None]
    ends = {"mixture_log_prob_fwd": [kept], "mixture_log_prob_bwd": [torch.empty(3), torch.empty(3, kept * components)]}
    arguments = [*([torch.empty(3)] if name.endswith("_bwd") else []), *mixture, *ends[name]]
    assert backend._by_size(name, lambda *_: True, lambda *_: False)(*arguments) is is_large


@pytest.mark.skipif(not SETUP.exists(), reason="there is no source tree")
def test_what_is_large_is_that_of_the_kernels():
    code = (SOURCE / "csrc/cuda/global_mixture.cu").read_text()
    limits = backend.LARGE_COMPONENTS, backend.LARGE_DIMENSIONS
    assert f"kFewestComponents = {limits[0]};\nconstexpr int64_t kFewestDimensions = {limits[1]};" in code


X = (torch.rand(9, 4), torch.rand(2, 3, 4), torch.arange(9) % 2)


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_kernel_that_disagrees_with_the_reference_is_not_used(fault):
    calls = []

    def kernel(*args):
        calls.append(args)
        if fault == "raises":
            raise OSError("no such instruction")
        counts, scatter, sums, assignment = reference.component_statistics_fwd(*args)
        return counts, scatter * 1.001, sums, assignment

    serve = backend._once_it_agrees("component_statistics_fwd", kernel)
    with pytest.warns(UserWarning, match="the kernel of component_statistics_fwd .* on cpu and is not used there"):
        found = serve(*X, None, None, False, False)
    compared = len(calls)
    assert compared > 0
    for a, b in zip(found, reference.component_statistics_fwd(*X, None, None, False, False)):
        assert torch.equal(a, b)
    serve(*X, None, None, False, False)
    assert len(calls) == compared


def test_a_second_kernel_serves_where_the_first_is_wrong():
    def absent(*args):
        raise RuntimeError("no kernel image is available for execution on the device")

    calls = []

    def right(*args):
        calls.append(args)
        return reference.component_statistics_fwd(*args)

    serve = backend._once_it_agrees("component_statistics_fwd", absent, right)
    with pytest.warns(UserWarning, match="no kernel image .* is not used there; another kernel is tried"):
        serve(*X, None, None, False, False)
    compared = len(calls)
    serve(*X, None, None, False, False)
    assert len(calls) == compared + 1 > 2


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory")
FULL_DISK = OSError(errno.ENOSPC, "No space left on device")
TRITON_MEMORY = RuntimeError("Triton Error [CUDA]: out of memory")


@pytest.mark.parametrize("failure", [NO_MEMORY, FULL_DISK, TRITON_MEMORY], ids=["memory", "disk", "triton"])
def test_a_comparison_that_the_machine_prevented_is_repeated(failure):
    prevented = [True]

    def kernel(*args):
        if prevented:
            raise failure
        calls.append(args)
        return reference.component_statistics_fwd(*args)

    calls = []
    serve = backend._once_it_agrees("component_statistics_fwd", kernel)
    wanted = reference.component_statistics_fwd(*X, None, None, False, False)
    with pytest.warns(UserWarning, match="component_statistics_fwd could not be compared on cpu .* compares again"):
        found = serve(*X, None, None, False, False)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    prevented.clear()
    serve(*X, None, None, False, False)
    assert len(calls) > 1


def test_every_type_of_features_is_compared():
    calls = []

    def kernel(*args):
        calls.append(args[0].dtype)
        if args[0].dtype == torch.bfloat16:
            raise ValueError("no such type")
        return reference.component_statistics_fwd(*args)

    serve = backend._once_it_agrees("component_statistics_fwd", kernel)
    x, *rest = X
    serve(x, *rest, None, None, False, False)
    assert set(calls) == {torch.float32}
    with pytest.warns(UserWarning, match="failed .ValueError: no such type. on cpu and is not used there"):
        serve(x.bfloat16(), *rest, None, None, False, False)


def test_the_comparison_covers_the_versions_that_serve():
    """Sizes that are a multiple of 16, one that is not, and rows by scanning, by pairs and by counting."""
    shapes = [args[0].shape for name, args in agreement._cases(torch.float32) if name == "cem_fwd"]
    assert {(259, 67), (259, 64), (600, 512), (8300, 16)} <= {tuple(shape) for shape in shapes}


def test_a_kernel_that_agrees_is_compared_once():
    calls = []

    def kernel(*args):
        calls.append(args)
        return reference.component_statistics_fwd(*args)

    serve = backend._once_it_agrees("component_statistics_fwd", kernel)
    serve(*X, None, None, False, False)
    compared = len(calls)
    serve(*X, None, None, False, False)
    assert len(calls) == compared + 1 > 2
