"""What `cem-fast doctor --device cuda --check` does on a GPU, on interpreted kernels."""

import pytest
import torch
from support.interpreter import watching

from cem_fast.cli import doctor
from cem_fast.ops import library


@pytest.mark.long
def test_every_operation_agrees():
    with watching() as seen:
        found = list(doctor.compare(torch.device("cpu")))
    assert {name for name, _, _ in found} == set(library.SCHEMAS)
    assert {name: error for name, dtype, error in found if error > doctor.TOLERANCE[dtype]} == {}
    assert seen.launches["global_moments_kernel"] > 0
