"""Optional packages that are missing or broken."""

import sys

import pytest
import torch

from cem_fast import GaussianMixture, metrics
from cem_fast._support import optional


def test_a_missing_package_comes_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match="^LPIPS needs the package lpips: pip install lpips$"):
        metrics.lpips(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
    mixture = GaussianMixture(num_components=1).fit(torch.rand(5, 2))
    with pytest.raises(ImportError, match="^to_sklearn needs the package sklearn: pip install scikit-learn$"):
        mixture.to_sklearn()


@pytest.mark.parametrize(
    "content, reason",
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", "RuntimeError: operator torchvision::nms"),
        ("import package_of_nobody", "ModuleNotFoundError: No module named 'package_of_nobody'"),
        ("def", "SyntaxError: invalid syntax"),
    ],
)
def test_a_broken_package_is_named_with_the_reason(content, reason, tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    expected = r"this needs the package broken_package, which fails in its import \(" + reason
    with pytest.raises(ImportError, match=expected):
        optional.load("broken_package", "this", "broken-package")
