"""The Triton kernels on CPU tensors, in a process where Triton interprets them; and wrong kernels, which must be noticed."""

import pytest

pytest.importorskip("triton")

from proofs import INTERPRETED, interpreted, is_caught


def test_kernels_in_the_interpreter():
    status, output = interpreted(str(INTERPRETED), "-m", "not long")
    assert status == 0, output


@pytest.mark.parametrize("wrong", ["gradient with the wrong sign", "x read twice"])
def test_wrong_kernels_are_noticed(wrong):
    caught, output = is_caught(wrong)
    assert caught, output
