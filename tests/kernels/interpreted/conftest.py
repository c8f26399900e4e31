"""Whatever the tests of a file launch is in the list that is compiled ahead of time."""

import numpy
import pytest
import triton
from cem_fast.kernels import _aot
from support.interpreter import watching


def pytest_configure(config):
    """Triton 3.6 makes numbers of arrays of one element: NumPy warns of that up to 2.3, and refuses it from 2.4 on."""
    if tuple(map(int, triton.__version__.split(".")[:2])) > (3, 6):
        return
    if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        raise pytest.UsageError(
            f"Triton {triton.__version__} interprets kernels with NumPy below 2.4 only, found {numpy.__version__}"
        )
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.fixture(autouse=True, scope="module")
def listed():
    known = {
        (
            case.name,
            bool(case.attrs),
            tuple((name, kind) for name, kind in case.signature.items() if kind != "constexpr"),
            tuple(sorted(case.constexprs.items())),
        )
        for case in _aot.cases()
    }
    with watching() as seen:
        yield
    assert seen.launches
    assert seen.configurations <= known
