"""The profile of a GPU, as far as it needs none: what is called, how it is shown, and what is said without a GPU."""

import pytest
import torch
from cem_fast.benchmarks import gpu_profile
from cem_fast.benchmarks.gpu_profile import Shape

from cem_fast.ops import reference


def test_without_a_gpu_it_says_so_in_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_profile.main(["--save", str(tmp_path / "profile.txt")]) == 1
    assert capsys.readouterr().out == "gpu_profile.py: no GPU\n"
    assert not list(tmp_path.iterdir())


def test_an_unknown_case_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu_profile.main(["--case", "cem"])
    assert "invalid choice: 'cem'" in capsys.readouterr().err


@pytest.mark.parametrize("case", list(gpu_profile.CASES))
def test_every_case_runs(case, monkeypatch):
    """On a small shape and on plain torch."""
    diag = gpu_profile.CASES[case].diag
    monkeypatch.setitem(gpu_profile.CASES, case, Shape(40, 8, 1 if "cem" not in case else 3, 4, diag))
    names = ("cem_fwd", "component_statistics_bwd", "mixture_log_prob_fwd", "mixture_log_prob_bwd", "kmeans")
    operators = {name: getattr(reference, name) for name in (*names, "expectation_maximization")}
    call = gpu_profile.call_of(case, operators, "cpu")
    result = call(2) if "iteration" in case else call()
    if "iteration" not in case:
        assert result.shape == (40, 8)
        assert result.isfinite().all()


def test_a_failure_becomes_a_line_and_predictions_stand_next_to_times(monkeypatch):
    def graph_us(call):
        if call == "wrong":
            raise RuntimeError("no kernel image\nfor this device")
        return 20.0

    case = "cem 65536x512 C100"
    monkeypatch.setattr(gpu_profile, "graph_us", graph_us)
    monkeypatch.setattr(gpu_profile, "call_of", lambda case, operators, device: operators)
    monkeypatch.setattr(gpu_profile, "predictions", lambda: {case: 110.0})
    first, second = gpu_profile.measure([case], {"auto": "right", "triton": "wrong"}, tb_s=4.0)
    assert (first.us, first.predicted_us) == (20.0, 110.0)
    assert first.share == pytest.approx(gpu_profile.least_bytes(case) / 4e6 / 20)
    assert second.note == "RuntimeError: no kernel image"
    assert second.note in gpu_profile.table([first, second]).splitlines()[2]


def test_the_counters_of_ncu_are_one_line_for_each_kernel():
    text = """==PROF== Connected to process 1
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","place_kernel(Sort)","gpu__time_duration.sum","us","3.5"
"0","place_kernel(Sort)","launch__grid_size","","64"
"1","sum_kernel","gpu__time_duration.sum","us","2"
"""
    first, second = gpu_profile.counted(text).splitlines()
    assert first.split()[:2] == ["0", "place_kernel"]
    assert "3.5 us (gpu__time_duration.sum), 64  (launch__grid_size)" in first
    assert second.split()[:2] == ["1", "sum_kernel"]


def test_without_ncu_there_are_no_counters(monkeypatch):
    monkeypatch.setattr(gpu_profile.shutil, "which", lambda name: None)
    assert gpu_profile.counters(["cem 128x512 C10"]) == "ncu is not installed: no counters"


def test_predictions_are_those_of_the_table(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_profile, "PREDICTED", tmp_path / "none.csv")
    assert gpu_profile.predictions() == {}
    (tmp_path / "some.csv").write_text("case,version,device_us\na,now,1.5\na,0.1,9\n")
    monkeypatch.setattr(gpu_profile, "PREDICTED", tmp_path / "some.csv")
    assert gpu_profile.predictions() == {"a": 1.5}
