"""Whatever the tests of a file launch is in the list that is compiled ahead of time."""

import pytest
from cem_fast.kernels import _aot
from support.interpreter import watching


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
