"""A folder of compiled kernels, one for all processes of a test run."""

import os

import pytest


@pytest.fixture(scope="session")
def objects(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "objects_of_cuda_host"
    folder.mkdir(exist_ok=True)
    return folder
