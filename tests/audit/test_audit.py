"""Audits from Python and from the command line."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cem_fast.audit import Audit, Judged, Limit, audit, find_noise, page, parts
from cem_fast.audit.limits import judge
from cem_fast.audit.targets import normalization
from cem_fast.cli.main import main
from cem_fast.data import Part, Splits, memory
from cem_fast.defenses import GaussianNoise

GENERATOR = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.rand(60, 3, 8, 8, generator=GENERATOR), torch.arange(60) % 2
MINE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x):
        assert not self.training
        return self.head(torch.relu(self.norm(self.stem(x))).mean((2, 3)))

def net():
    torch.manual_seed(0)
    return Net()

def pair():
    return nn.AvgPool2d(2), nn.Sequential(nn.Flatten(), nn.Linear(48, 2))

def broken():
    raise OSError("no weights")
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    for index, image in enumerate(IMAGES):
        part = "test" if index % 3 == 0 else "train"
        path = tmp_path / "photos" / part / str(int(LABELS[index])) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * image).byte().permute(1, 2, 0).numpy()).save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_status_and_files_follow_the_limits(place, capsys):
    base = ["audit", "mine.py:net", "--cut", "stem", "--data", "photos", "--noise-std", "0.1", "--attacks", "ridge"]
    assert main([*base, "--limit", "mse >= 0.5", "--limit", "psnr <= 90", "--folder", "one"]) == 3
    found = json.loads((place / "one/audit.json").read_text())
    assert not found["passed"]
    assert {each["limit"]: each["holds"] for each in found["limits"]} == {"mse >= 0.5": False, "psnr <= 90": True}
    assert (found["data"]["num_attacker"], found["data"]["num_victims"], found["data"]["num_classes"]) == (40, 20, 2)
    assert 0 <= found["accuracy"] <= 1
    assert found["information"]["heldout_nats"] < found["information"]["upper_nats"]
    assert found["information"]["unbiased_mse"] > 0
    assert "the limit mse >= 0.5 fails" in capsys.readouterr().err
    report = (place / "one/report.html").read_text()
    for words in ("Not all limits hold", "With 95% confidence, at most", "An unbiased attack"):
        assert words in report
    holds = ["--limit", "mse >= 1e-9", "--limit", "label <= 1.0", "--limit", "recognized <= 1"]
    assert main([*base, *holds, "--releases", "2", "--folder", "two"]) == 0


def test_weights_next_to_an_onnx_file_are_read_and_others_are_not(place, capsys):
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 3, 8, 8]) for name in "xy"]
    scale = onnx.numpy_helper.from_array(np.full((1, 3, 8, 8), 0.5, np.float32), "scale")
    graph = helper.make_graph([helper.make_node("Mul", ["x", "scale"], ["y"])], "mine", ends[:1], ends[1:], [scale])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, "mine.onnx", save_as_external_data=True, location="mine.data", size_threshold=0)
    command = ["audit", "mine.onnx", "--data", "photos", "--attacks", "ridge", "--folder", "onnx"]
    assert main(command) == 0
    content = (place / "mine.onnx").read_bytes()
    (place / "mine.onnx").write_bytes(content.replace(b"mine.data", b"../e.data"))
    assert main(command) == 2
    assert "not in a file next to it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["mine.py:nett"], "nearest is 'net'"),
        (["mine.py:net", "--cut", "stemm"], "nearest is 'stem'"),
        (["mine.py:net", "--limit", "msee >= 1"], "nearest is 'mse'"),
        (["mine.py:net", "--limit", "mse > 1"], "limit must be a metric"),
        (["mine.py:net", "--attacks", "ridg"], "nearest is 'ridge'"),
        (["mine.py:net", "--budget", "quik"], "nearest is 'quick'"),
        (["mine.py:broken"], "OSError: no weights"),
        (["nowhere.py:net"], "nowhere.py"),
        (["mine.py"], "target must be"),
        (["mine.py:net", "--normalize", "1,0"], "positive STD"),
        (["mine.py:net", "--device", "cuda:77"], "device 'cuda:77' is not there"),
        (["mine.py:net", "--noise-std", "1", "--find-noise", "mse >= 1"], "noise_std must be left out"),
    ],
)
def test_bad_input_is_status_2(place, capsys, arguments, message):
    assert main(["audit", *arguments, "--data", "photos"]) == 2
    assert message in capsys.readouterr().err


def test_a_limit_that_cannot_be_judged_is_refused_before_any_attack(monkeypatch):
    def missing(*_):
        raise ImportError("LPIPS needs the package lpips")

    monkeypatch.setattr("cem_fast.metrics.lpips", missing)
    monkeypatch.setattr("cem_fast.attacks.Ridge.fit", None)
    with pytest.raises(ValueError, match="a limit on lpips cannot be judged: LPIPS needs the package lpips"):
        audit(nn.AvgPool2d(2), IMAGES, attacks=["ridge"], limits=["lpips >= 0.1"])


def test_pairs_of_arrays_need_no_target(place, capsys):
    np.save("images.npy", IMAGES.numpy())
    np.save("features.npy", nn.functional.avg_pool2d(IMAGES, 2).flatten(1).numpy())
    pairs = ["audit", "--images", "images.npy", "--features", "features.npy", "--attacks", "ridge,nearest"]
    assert main(pairs) == 0
    found = json.loads((place / "runs/audit/audit.json").read_text())
    assert set(found["attacks"]) == {"ridge", "nearest"}
    assert found["label"] is None
    assert main([*pairs, "--limit", "label <= 0.5"]) == 2
    assert "needs labels" in capsys.readouterr().err
    np.save("features.npy", np.array([object()] * 60), allow_pickle=True)
    assert main(pairs) == 2


def test_exported_programs_are_targets(place):
    exported = torch.export.export(
        nn.Conv2d(3, 2, 3).eval(), (IMAGES[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    torch.export.save(exported, "mine.pt2")
    assert main(["audit", "mine.pt2", "--data", "photos", "--attacks", "ridge", "--folder", "pt2"]) == 0


def test_onnx_is_a_black_box(place, capsys):
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    helper, shape = onnx.helper, ["batch", 3, 8, 8]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "mine", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), "mine.onnx")
    base = ["audit", "mine.onnx", "--data", "photos", "--folder", "onnx"]
    assert main([*base, "--attacks", "ridge"]) == 0
    assert main([*base, "--attacks", "optimization"]) == 2
    assert "the attack optimization fails" in capsys.readouterr().err


@pytest.mark.long
def test_the_least_noise_keeps_the_limit(place, capsys):
    arguments = ["mine.py:pair", "--data", "photos", "--attacks", "ridge", "--find-noise", "mse >= 0.08"]
    assert main(["audit", *arguments, "--folder", "noise"]) == 0
    found = json.loads((place / "noise/audit.json").read_text())
    assert found["noise_std"] > 0
    printed = capsys.readouterr().out
    assert f"least noise with which mse >= 0.08 holds: {found['noise_std']:.4g}" in printed
    assert f"% at noise {found['noise_std']:.4g}, " in printed
    assert 0.08 <= found["limits"][0]["interval"][0] < 0.082


def test_no_noise_where_none_is_needed():
    empty = Audit(
        True, (Judged("mse >= 0", True, 1.0, (1.0, 1.0), "ridge"),), {}, (), {}, None, None, {}, {}, None, 0, 1, 0, {}
    )
    levels = []
    find_noise(lambda noise, every: (levels.append(noise), empty)[1], "mse >= 0", start=1.0)
    assert levels[-1] == 0


def test_a_limit_is_judged_at_the_unsafe_end_of_the_worst_attack():
    values = {"strong": torch.tensor([0.0, 0.4] * 50), "weak": torch.full((100,), 0.3)}
    verdict = judge(Limit.parse("mse >= 0.19"), values, seed=0)
    assert (verdict.attack, verdict.holds) == ("strong", False)
    assert verdict.interval[0] < 0.19 < verdict.value < verdict.interval[1]
    assert judge(Limit.parse("mse <= 0.35"), values, seed=0).attack == "weak"


def test_the_target_keeps_its_mode_dtype_and_preprocessing():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()).double()
    network.train()
    result = audit(network, IMAGES, LABELS, attacks=["ridge"], normalize=normalization("imagenet"))
    assert network.training
    assert network[0].num_batches_tracked == 0
    assert result.attacks["ridge"].mse < result.baseline["mean_image_mse"]
    assert result.target["digest"]


def test_features_that_say_nothing_leave_the_mean_image():
    result = audit(lambda x: torch.ones(len(x), 8), IMAGES, LABELS, attacks=["ridge", "decoder"], budget="quick")
    assert min(each.mse for each in result.attacks.values()) > 0.9 * result.baseline["mean_image_mse"]


def test_the_report_says_which_victims_the_attacker_holds():
    own, victims = (Part(IMAGES[rows], LABELS[rows], torch.arange(len(rows))) for rows in (range(40), range(37, 60)))
    for test, count, words in (
        (victims, 3, "3 of the 23 victims' images"),
        (victims[torch.arange(3, 23)], 0, "none of the 20 victims'"),
    ):
        result = audit(nn.AvgPool2d(2), Splits("mine", own, test, own, 2, ("a", "b")), attacks=["ridge"])
        assert result.data["num_shared"] == count
        assert words in page.render(result, command="").replace("&#39;", "'")


def test_noise_is_told_with_what_it_costs_in_accuracy():
    images = torch.cat([torch.rand(30, 1, 8, 8) * 0.4, 0.6 + torch.rand(30, 1, 8, 8) * 0.4])
    labels = torch.arange(60) // 30
    bright = nn.Linear(1, 2)
    bright.weight.data, bright.bias.data = torch.tensor([[-1.0], [1.0]]), torch.tensor([0.5, -0.5])
    encoder = nn.Sequential(nn.AvgPool2d(8), nn.Flatten())
    result = audit(encoder, images, labels, decoder=bright, noise_std=1.0, attacks=["ridge"])
    assert result.to_json()["clean_accuracy"] == 1
    assert result.accuracy < 0.9
    assert "100.0% without noise" in page.render(result, command="")


def test_a_defense_brings_its_own_noise():
    settings = {"defense": GaussianNoise(noise_std=0.25), "attacks": ["ridge"]}
    assert audit(nn.AvgPool2d(2), IMAGES, LABELS, **settings).noise_std == 0.25
    with pytest.raises(ValueError, match="noise_std must be 0 with a defense"):
        audit(nn.AvgPool2d(2), IMAGES, LABELS, noise_std=0.1, **settings)


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_a_data_set_or_its_loader_is_audited_as_its_images(workers):
    pairs = [(image, int(label)) for image, label in zip(IMAGES, LABELS)]
    source = pairs if workers is None else torch.utils.data.DataLoader(pairs, batch_size=7, num_workers=workers)
    result = audit(nn.AvgPool2d(2), source, attacks=["ridge"], budget="quick")
    assert result.data["digest"] == audit(nn.AvgPool2d(2), IMAGES, LABELS, attacks=["ridge"]).data["digest"]
    drawn = audit(nn.AvgPool2d(2), source, attacks=["ridge"], attacker_images=20, victims=10).data
    assert (drawn["num_attacker"], drawn["num_available"], drawn["num_victims"]) == (20, 48, 6)
    with pytest.raises(ValueError, match="labels must be left out"):
        audit(nn.AvgPool2d(2), source, LABELS, attacks=["ridge"])


def test_the_attacker_holds_what_fits_and_mirror_images(monkeypatch):
    monkeypatch.setattr(memory, "room", lambda image, features=(): 24)
    result = audit(nn.AvgPool2d(2), IMAGES, LABELS, attacks=["ridge"], mirror=True)
    assert (result.data["num_attacker"], result.data["num_available"]) == (12, 48)
    assert "holds 12 of 48 images of the same kind and their mirror images" in page.render(result, command="")
    own = memory.held(parts.split(IMAGES, LABELS, seed=0), 24, 5, mirror=True, seed=0).attacker
    assert torch.equal(own.images[12:], own.images[:12].flip(3))
    assert torch.equal(own.labels[12:], own.labels[:12])
    splits = parts.split(IMAGES, LABELS, seed=0)
    assert memory.held(splits, 24, 5, mirror=False, seed=0) is memory.held(splits, 24, 5, mirror=False, seed=0)
    with pytest.raises(ValueError, match="mirror needs an encoder"):
        audit(nn.functional.avg_pool2d(IMAGES, 2), IMAGES, LABELS, attacks=["ridge"], mirror=True)


def test_classes_are_named_before_the_audit(place, capsys):
    assert main(["audit", "mine.py:broken", "--data", "photos", "--attacker-images", "20"]) == 2
    printed = capsys.readouterr().out
    assert "photos: 2 classes (0, 1), images of 3x8x8" in printed
    assert "40 images for the attacker, of which 20 are read; 20 to rebuild" in printed


def test_it_is_said_how_many_images_are_read_and_held_and_why(place, capsys, monkeypatch):
    monkeypatch.setattr(memory, "MEMORY", memory.NUMBERS[0] * 4 * 3 * 8 * 8 * 20)  # 20 images
    command = ["audit", "mine.py:net", "--cut", "stem", "--data", "photos", "--attacks", "ridge"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "40 images for the attacker, of which 20 are read (what 2 GB hold if features are small; " in printed
    assert "the attacker holds 20 of 40 images: more do not fit into 2 GB with their features and what" in printed
    assert main([*command, "--attacker-images", "12"]) == 0
    assert "the attacker holds 12 of 40 images\n" in capsys.readouterr().out


PEAK = """
import resource, sys
import torch
from cem_fast.audit import audit
from cem_fast.data import memory

class Photos:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = torch.full((3, 64, 64), index % 256, dtype=torch.uint8)
        image[0, 0, 0] = index // 256
        return image, index % 2

torch.set_num_threads(1)
memory.MEMORY = 60_000_000
encoder = torch.nn.Sequential(torch.nn.AvgPool2d(8))
result = audit(encoder, Photos(int(sys.argv[1])), attacks=["ridge"], budget="quick", verdicts_only=True)
print(result.data["num_available"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


@pytest.mark.long
def test_memory_does_not_grow_with_the_number_of_images():
    peaks = []
    for count in (300, 30_000):  # all of the latter would need 1.4 GB
        done = subprocess.run([sys.executable, "-c", PEAK, str(count)], capture_output=True, text=True, check=True)
        available, peak = map(int, done.stdout.split())
        assert available > count // 2
        peaks.append(peak)
    assert peaks[1] < peaks[0] + 100


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"noise_std": 10**400}, "noise_std must be from 0 to 1e.18, got 1000"),
        ({"noise_std": float("nan")}, "noise_std must be from 0 to 1e.18, got nan"),
        ({"seed": 10**400}, "seed must be from 0 to 2..63 - 1, got 1000"),
        ({"releases": 0}, "releases must be at least 1"),
        ({"labels": LABELS.float()}, "labels must be .* integers of at least 0, got torch.float32"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        audit(nn.AvgPool2d(2), IMAGES, **{"labels": LABELS, "attacks": ["ridge"], **settings})
