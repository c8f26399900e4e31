"""Saving and loading a run, also from damaged or foreign files."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from support import tampered

import cem_fast
from cem_fast import training
from cem_fast._support.files import check_target, write_atomically
from cem_fast.experiments import saved_run
from cem_fast.experiments.attack import attack_model
from cem_fast.experiments.run import run


@pytest.fixture
def saved(finished, tmp_path):
    """A copy of a finished run with CEM."""
    return shutil.copytree(finished.run(cem=True), tmp_path / "run")


def tensor_file(folder, kind):
    return folder / json.loads((folder / saved_run.DESCRIPTION).read_text())["files"][kind]


def test_a_loaded_run_is_the_run_that_was_saved(saved):
    run = saved_run.load_run(saved)
    assert not run.model.training
    assert not run.defense.training
    assert run.config.defense == "noise"
    assert run.config.cem_weight == 0.35
    assert run.loss.is_fitted
    assert len(run.data.test) == 6
    features = training.clean_features(run.model, run.data.train.images)
    assert run.loss(features, run.data.train.labels) > 0
    entry, errors, _ = attack_model("ridge", run.model, run.defense, run.data, run.config)
    assert entry == run.description.record.attacks["ridge"]
    assert torch.equal(errors, run.measurements["mse.ridge"])
    assert run.measurements["pictures.original"].shape == (6, 1, 16, 16)


def test_load_run_is_public():
    assert cem_fast.load_run is saved_run.load_run


def test_networks_inside_a_defense_are_restored(tiny_grid, tmp_path):
    config = next(run for run in tiny_grid.runs() if run.defense == "noise")
    config = type(config)(**{**vars(config), "defense": "noise_arl"})
    run(config, tmp_path / "run", attack=False)
    loaded = saved_run.load_run(tmp_path / "run")
    proxy = loaded.defense.parts[0].proxy.state_dict()
    with torch.no_grad():
        checkpoint_weights = saved_run._read_tensors(tmp_path / "run", loaded.description, "weights")[0]
    assert proxy
    assert all(torch.equal(value, checkpoint_weights[f"defense.parts.0.proxy.{key}"]) for key, value in proxy.items())


def test_another_architecture_is_named_key_by_key(saved):
    path = saved / saved_run.DESCRIPTION
    description = json.loads(path.read_text())
    description["config"]["cut"] = 3
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"encoder's weights are of another architecture.*missing: 2\.") as raised:
        saved_run.load_run(saved)
    assert str(tensor_file(saved, "weights")) in str(raised.value)
    assert "\n" not in str(raised.value)
    description["config"].update(cut=2, bottleneck=4)
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"of another shape: .*\(8, 32, 3, 3\) for \(4, 32, 3, 3\)"):
        saved_run.load_run(saved)


@pytest.mark.parametrize("keep", [0, 7, 1000])
def test_a_truncated_file_is_named(saved, keep):
    path = tensor_file(saved, "weights")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"damaged, its {keep} bytes") as raised:
        saved_run.load_run(saved)
    assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize("length", [0x0280, 0x0580, 0x4B50])
def test_a_header_length_like_the_first_bytes_of_a_pickle_is_accepted(saved, length):
    path, padding = (
        tensor_file(saved, "measurements"),
        length - len('{"":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
    )
    content = safetensors.torch.save({"x" * padding: torch.ones(1)})
    assert int.from_bytes(content[:8], "little") == length
    path.unlink()
    name = f"measurements-{saved_run._digest(content)}.safetensors"
    path.with_name(name).write_bytes(content)
    description = json.loads((saved / "run.json").read_bytes())
    description["files"]["measurements"] = name
    (saved / "run.json").write_text(json.dumps(description))
    assert list(saved_run.read_measurements(saved).values()) == [torch.ones(1)]


def test_a_pickle_is_refused_and_never_run(saved, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    path = tensor_file(saved, "weights")
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="holds a pickle"):
        saved_run.load_run(saved)
    torch.save({"x": Evil()}, path)
    with pytest.raises(ValueError, match="holds a pickle"):
        saved_run.load_run(saved)
    assert not (tmp_path / "opened").exists()


def test_foreign_and_damaged_descriptions_are_named(saved):
    path = saved / saved_run.DESCRIPTION
    description = json.loads(path.read_text())
    path.write_text(path.read_text()[:-100])
    with pytest.raises(ValueError, match=r"run\.json: damaged, not readable as JSON"):
        saved_run.load_run(saved)
    path.write_text(json.dumps({**description, "schema": 99}))
    with pytest.raises(ValueError, match="expected a run of schema 1, got 99"):
        saved_run.load_run(saved)
    path.write_text(json.dumps({**description, "config": {**description["config"], "sigma": 1}}))
    with pytest.raises(ValueError, match=r"unknown keys \['sigma'\]"):
        saved_run.load_run(saved)
    path.write_text(json.dumps({**description, "files": {"weights": "../../etc/passwd"}}))
    with pytest.raises(ValueError, match="passwd: run.json names this file and it cannot be read"):
        saved_run.load_run(saved)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no finished run here"):
        saved_run.load_run(saved)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys
import torch
from cem_fast.experiments import saved_run

torch.set_num_threads(1)  # a fork does not inherit a pool of threads
folder, replace = sys.argv[1], os.replace
old = saved_run.load_run(folder)
before = {k: v.clone() for k, v in old.model.state_dict().items()}
for steps in range(3):
    child = os.fork()
    if child == 0:
        done = [0]

        def killing(source, target):
            if done[0] == steps:
                os.kill(os.getpid(), signal.SIGKILL)
            done[0] += 1
            replace(source, target)

        os.replace = killing
        with torch.no_grad():
            for value in old.model.parameters():
                value.add_(1 + steps)
        parts = {"model": old.model, "defense": old.defense, "loss": old.loss}
        measurements = {k: v + 1 for k, v in old.measurements.items()}
        saved_run.save_run(folder, **parts, measurements=measurements, description=old.description)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    now = saved_run.load_run(folder)
    assert all(torch.equal(v, before[k]) for k, v in now.model.state_dict().items()), steps
    assert now.measurements.keys() == old.measurements.keys()
print("intact")
"""


def test_kill_during_a_save_leaves_the_old_run(saved):
    done = subprocess.run([sys.executable, "-c", KILLED, str(saved)], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "intact", done.stderr
    leftovers = [path for path in saved.iterdir() if path.name.endswith(".tmp")]
    assert leftovers, "the kill should have come before the last rename"
    run = saved_run.load_run(saved)
    parts = {"model": run.model, "defense": run.defense, "loss": run.loss}
    saved_run.save_run(saved, **parts, measurements=run.measurements, description=run.description)
    assert sorted(path.suffix for path in saved.iterdir()) == [".json", ".safetensors", ".safetensors"]


def save_again(run, folder):
    parts = {"model": run.model, "defense": run.defense, "loss": run.loss}
    saved_run.save_run(folder, **parts, measurements=run.measurements, description=run.description)


def test_other_files_in_the_folder_are_left_alone(saved):
    others = ["llama.safetensors", "weights-mine.safetensors", ".notes.tmp", ".run.json.tmp"]
    leftovers = [f"weights-{16 * 'a'}.safetensors", ".run.json.123.tmp"]
    before = {path.name for path in saved.iterdir()}
    for name in others + leftovers:
        (saved / name).write_text("precious")
    save_again(saved_run.load_run(saved), saved)
    assert {path.name for path in saved.iterdir()} == before | set(others)
    assert all((saved / name).read_text() == "precious" for name in others)


def test_a_foreign_description_is_never_overwritten(saved, tmp_path):
    run, folder = saved_run.load_run(saved), tmp_path / "mine"
    folder.mkdir()
    (folder / "run.json").write_text("keep")
    with pytest.raises(ValueError, match=r"mine/run\.json was not written by cem_fast and is left alone"):
        save_again(run, folder)
    assert [path.name for path in folder.iterdir()] == ["run.json"]
    assert (folder / "run.json").read_text() == "keep"
    with pytest.raises(ValueError, match="folder must be the path of a folder, got ''"):
        save_again(run, "")


@pytest.mark.parametrize("target", ["file", "file/below", "/proc/nope"])
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, target):
    (tmp_path / "file").write_text("keep")
    with pytest.raises(ValueError, match=f"folder must be one that can be written to, got '.*{target}'"):
        check_target(tmp_path / target, {saved_run.DESCRIPTION: saved_run.MARK})
    check_target(tmp_path / "a/b", {saved_run.DESCRIPTION: saved_run.MARK})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


SAVED_AT_ONCE = """
import os, sys
import torch
from cem_fast.experiments import saved_run

torch.set_num_threads(1)  # a fork does not inherit a pool of threads
os.fsync = lambda _: None  # slow, and nothing here outlives the machine
run, folder = saved_run.load_run(sys.argv[1]), sys.argv[1]
parts = {"model": run.model, "defense": run.defense, "loss": run.loss}
run.measurements  # read now: once there are several writers, this file is gone any moment
children = []
for child in range(3):
    children.append(os.fork())
    if children[-1] == 0:
        for step in range(20):
            measured = {k: v + child + 10 * step for k, v in run.measurements.items()}
            saved_run.save_run(folder, **parts, measurements=measured, description=run.description)
        os._exit(0)
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
saved_run.load_run(folder).measurements
print("intact")
"""


def test_saves_to_one_folder_at_once_do_not_remove_each_others_files(saved):
    done = subprocess.run(
        [sys.executable, "-c", SAVED_AT_ONCE, str(saved)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "intact", done.stderr
    assert len(list(saved.iterdir())) == 3


def test_only_the_images_of_the_run_are_its_data(saved, tiny_images, tmp_path, monkeypatch):
    images = shutil.copytree(tiny_images, tmp_path / "images")
    path = saved / saved_run.DESCRIPTION
    description = json.loads(path.read_text())
    description["config"]["data"] = "images"
    path.write_text(json.dumps(description))
    with pytest.raises(FileNotFoundError, match="was trained on the images in 'images', .* --data-from names"):
        _ = saved_run.load_run(saved).data
    assert len(saved_run.load_run(saved, data_from=str(images)).data.test) == 6  # they have moved
    monkeypatch.chdir(tmp_path)
    assert len(saved_run.load_run(saved).data.test) == 6
    shutil.copy(images / "left" / "0.png", images / "right" / "new.png")
    with pytest.raises(ValueError, match="was trained on other images than 'images' holds now"):
        _ = saved_run.load_run(saved).data


@pytest.mark.parametrize("wrong", tampered.VALUES)
def test_a_run_loads_or_is_refused_whatever_its_description(saved, wrong):
    path = saved / saved_run.DESCRIPTION
    description = json.loads(path.read_text())
    at_top, refusals = 0, []
    for place in tampered.places(description):
        path.write_text(json.dumps(tampered.changed(description, place, wrong)))
        shallow = place[0] in ("config", "image_shape", "num_classes", "files", "identity", "schema")
        at_top += shallow
        try:
            if shallow:
                run = saved_run.load_run(saved)
                _ = run.measurements, run.data
            else:  # does not decide what is built
                saved_run.read_description(saved)
        except (ValueError, FileNotFoundError) as error:
            refusals.append(str(error))
    assert len(refusals) > at_top / 2
    assert not [message for message in refusals if "\n" in message]


LOADED_WITHIN = """
import resource, sys
from cem_fast.experiments import saved_run

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
try:
    saved_run.load_run(sys.argv[1])
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "place, value, message",
    [
        (("num_classes",), 10**9, "num_classes"),
        (("config", "cem_components"), 10**9, "cem_components"),
        (("config", "bottleneck"), 10**7, "the encoder's weights are of another architecture"),
        (("image_shape",), [1, 100_000, 100_000], "image_shape must be three sizes from 1 to 2048"),
        (("image_shape",), [2048, 2048, 2048], "the encoder's weights are of another architecture"),
    ],
)
def test_nothing_of_the_size_in_a_description_is_allocated(saved, place, value, message):
    path = saved / saved_run.DESCRIPTION
    path.write_text(json.dumps(tampered.changed(json.loads(path.read_text()), place, value)))
    done = subprocess.run(
        [sys.executable, "-c", LOADED_WITHIN, str(saved)], capture_output=True, text=True, timeout=120
    )
    assert message in done.stdout, done.stderr[-300:]


@pytest.mark.parametrize("kind", ["weights", "measurements", "run.json"])
@pytest.mark.parametrize("source", ["/dev/zero", "fifo"])
def test_links_to_devices_and_fifos_are_refused(saved, kind, source):
    path = saved / kind if kind == "run.json" else tensor_file(saved, kind)
    path.unlink()
    if source == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(source)
    with pytest.raises(ValueError, match=f"{path.name} must be a regular file"):
        _ = saved_run.load_run(saved).measurements


def test_weights_that_are_no_numbers_are_refused(saved):
    path = tensor_file(saved, "weights")
    weights = safetensors.torch.load_file(path)
    first, noise = "encoder.0.0.weight", "loss.noise_variance"
    for name, value, message in (
        (first, torch.full_like(weights[first], float("nan")), "weights must be finite, got NaN or infinity in"),
        (first, weights[first].double(), "of another type: 0.0.weight"),
        (first, weights[first].to(torch.complex64), f"{first} must hold real numbers, got torch.complex64"),
        (noise, weights[noise].to(torch.complex64), f"{noise} must hold real numbers, got torch.complex64"),
    ):
        content = safetensors.torch.save({**weights, name: value})
        name = f"weights-{saved_run._digest(content)}.safetensors"
        (saved / name).write_bytes(content)
        description = json.loads((saved / "run.json").read_bytes())
        description["files"]["weights"] = name
        (saved / "run.json").write_text(json.dumps(description))
        with pytest.raises(ValueError, match=message):
            saved_run.load_run(saved)
