"""The Triton kernels on CPU tensors, in a process where Triton interprets them; and wrong kernels, which must be noticed."""

import pytest

pytest.importorskip("triton")

import proofs
from proofs import INTERPRETED, interpreted, is_caught


@pytest.mark.timeout(1800)  # a minute and a half on an idle machine
def test_kernels_in_the_interpreter():
    status, output = interpreted(str(INTERPRETED), "-m", "not long")
    assert status == 0, output


def test_a_proof_that_fails_on_the_right_kernels_notices_nothing(monkeypatch):
    monkeypatch.setattr(proofs, "interpreted", lambda *_, **__: (1, "numpy is too new"))
    proofs.holds.cache_clear()
    caught, output = is_caught("x read twice")
    proofs.holds.cache_clear()
    assert not caught
    assert "numpy is too new" in output


def test_a_wrong_kernel_is_noticed():  # proofs.py tries the others
    caught, output = is_caught("gradient with the wrong sign")
    assert caught, output
