"""Exported halves: two files that compute what PyTorch computes, and a check that notices noise that is none."""

from __future__ import annotations

import importlib
import json
import shutil

import pytest
import torch
from cem_fast.benchmarks import quantization
from support.command_line import status
from torch import nn

from cem_fast import SplitModel, cost, defenses, deploy, load_run, models, training
from cem_fast.config import RunConfig
from cem_fast.deploy import draws, export, verify
from cem_fast.deploy import manifest as manifests
from cem_fast.deploy.files import digest, open_half
from cem_fast.experiments.build import build_parts
from cem_fast.experiments.saved_run import save_run

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
SHAPE = (1, 16, 16)
PRIVACY = {"privacy_epsilon": 200.0, "privacy_clip": 10.0}


def network() -> SplitModel:
    torch.manual_seed(0)
    return models.build("slim", image_shape=SHAPE, num_classes=3, cut=2, bottleneck=4).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The halves of dropout and noise, in ONNX."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    defense = defenses.build("dropout", noise_std=0.1, dropout_rate=0.3)
    deploy.export(network(), defense, folder, image_shape=SHAPE, classes=("a", "b", "c"))
    return folder


@pytest.fixture
def copied(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "out")
    return tmp_path / "out"


def tamper(folder, change) -> None:
    """Changes manifest.json or the device half, and the digest with it."""
    path = folder / manifests.NAME
    entries = json.loads(path.read_text())
    change(entries)
    entries["digests"] = {name: digest(folder / name) for name in entries["digests"]}
    path.write_text(json.dumps(entries, indent=1))


def test_halves_compute_what_pytorch_computes(exported):
    manifest = manifests.read(exported)
    device, cloud = open_half(exported / "device.onnx"), open_half(exported / "cloud.onnx")
    assert sorted(path.name for path in exported.iterdir()) == ["cloud.onnx", "device.onnx", "manifest.json"]
    model, defense = network(), defenses.build("dropout", noise_std=0.1, dropout_rate=0.3)
    for count in (1, 7):
        images = torch.rand(count, *SHAPE)
        drawn = draws.seeded(manifest.random_inputs, count, seed=1)
        with torch.no_grad(), draws.Draws(drawn):
            expected = defense.release(model.encoder(images))
        message = device(images, *drawn)
        assert torch.allclose(message, expected, atol=1e-5)
        assert torch.allclose(cloud(message), model.decoder(expected), atol=1e-4)


def test_the_manifest_describes_the_halves(exported):
    manifest = manifests.read(exported)
    assert manifest.classes == ("a", "b", "c")
    assert [(each.name, each.distribution, each.shape) for each in manifest.random_inputs] == [
        ("uniform", "uniform", (4, 4, 4)),
        ("noise", "normal", (4, 4, 4)),
    ]
    assert manifest.noise.std == 0.1
    assert manifest.cost.message_bytes == 4 * 64
    assert manifest.cost.parameters == sum(p.numel() for p in network().encoder.parameters())


def test_frozen_noise_is_noticed(copied):
    model = onnx.load(str(copied / "device.onnx"))
    frozen = onnx.helper.make_tensor("frozen", onnx.TensorProto.FLOAT, [1, 4, 4, 4], [0.25] * 64)
    model.graph.initializer.append(frozen)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "noise":
                node.input[index] = "frozen"
    onnx.save(model, str(copied / "device.onnx"))
    tamper(copied, lambda entries: None)
    with pytest.raises(ValueError, match="the noise of the input noise has no effect"):
        verify(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries: entries["noise"].update(std=0.2), "the noise has a standard deviation of 0"),
        (lambda entries: entries["noise"].update(std=0.0), "the noise has a standard deviation of 0"),
        (lambda entries: entries["noise"].update(std=-0.1), "std and variance must be at least 0"),
        (lambda entries: entries["noise"].update(variance=float("nan")), "noise.variance must be finite"),
        (lambda entries: entries.update(image_shape=[1, 4096, 4096]), r"device\.onnx"),
        (lambda entries: entries["random_inputs"][1].update(shape=[2**23]), r"device\.onnx"),
        (
            lambda entries: [each.update(shape=[2**23, 2]) for each in entries["random_inputs"]],
            "random_inputs must hold at most 16777216 numbers in all",
        ),
        (lambda entries: entries["random_inputs"][0].update(name="noise"), "names of random_inputs must differ"),
        (lambda entries: entries["random_inputs"][0].update(name="image"), "names of random_inputs must differ"),
        (lambda entries: entries["random_inputs"][0].update(variance=-1), "variance must be at least 0"),
        (lambda entries: entries["noise"].update(source="none"), "noise.source must be input for random_inputs"),
        (
            lambda entries: (entries.update(message="float16"), entries["cost"].update(message_bytes=128)),
            "messages must have the dtype torch.float16",
        ),
        (lambda entries: entries.update(message="float16"), "cost.message_bytes must be 128 for 64 numbers"),
        (lambda entries: entries["cost"].update(message_bytes=2**40), "cost.message_bytes must be 256"),
        (lambda entries: entries["cost"].update(milliseconds=-1.0), "milliseconds must be at least 0"),
        (lambda entries: entries.update(classes=["a", "b"]), "classes must have 3 entries, got 2"),
        (lambda entries: entries["noise"].update(std=[0.1, 0.1]), "noise.std must have 64 entries, got 2"),
        (lambda entries: entries["preprocessing"].update(mean=[0.1, 0.1]), "preprocessing.mean must have 1 entries"),
        (lambda entries: entries["preprocessing"].update(std=[]), "preprocessing.std must have 1 entries, got 0"),
        (lambda entries: entries["preprocessing"].update(std=[0.0]), "std must be positive"),
        (lambda entries: entries.update(message_range=[0.0, 1.0]), "message_range must be .* for uint8 alone"),
        (lambda entries: entries.update(image_shape=[1, 256]), r"image_shape must be \(C, H, W\)"),
        (lambda entries: entries["noise"].update(variance=0.5), "the noise of the messages has a variance"),
        (lambda entries: entries["random_inputs"][0].update(variance=0.5), "the noise of the input uniform"),
        (lambda entries: entries["random_inputs"][1].update(variance=0.02), "the noise of the input noise"),
        (lambda entries: entries.update(num_classes=4, classes=[]), "must return 4 finite logits"),
        (lambda entries: entries.update(message_shape=[4, 2, 8]), "messages must have the shape"),
        (
            lambda entries: entries.update(image_shape=[1, 2**20, 2**20]),
            "image_shape must be positive and hold at most",
        ),
        (lambda entries: entries.update(format="exe"), "format must be onnx, pt2, executorch"),
        (lambda entries: entries.update(random_inputs=[]), "takes image, uniform, noise"),
        (lambda entries: entries.pop("noise"), "noise"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(copied, change, message):
    tamper(copied, change)
    with pytest.raises(ValueError, match=message):
        verify(copied)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dropout", {"dropout_rate": 0.97}),
        ("local_dp", {**PRIVACY, "privacy_mechanism": "laplace", "privacy_delta": 0.0}),
        ("local_dp", {**PRIVACY, "privacy_mechanism": "gaussian", "privacy_delta": 1e-4}),
    ],
)
def test_noise_of_heavy_tails_and_two_noises_are_verified(tmp_path, name, settings):
    defense = defenses.build(name, noise_std=0.1, **settings)
    manifest = export(network(), defense, tmp_path, image_shape=SHAPE, format="pt2")
    normal = [each.variance for each in manifest.random_inputs if each.distribution == "normal"]
    assert manifest.noise.std == pytest.approx(sum(normal) ** 0.5, rel=0.1)
    for _ in range(5):
        verify(tmp_path)


def test_noise_of_each_channel_is_stated_for_each_number(tmp_path):
    class Scaled(defenses.Defense):
        noise_std = torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None, None]

        def __init__(self):
            super().__init__()
            self.mix = nn.Conv2d(4, 4, 1)

        def release(self, features):
            return self.mix(features) + self.noise_std * torch.randn_like(features)

    manifest = export(network(), Scaled(), tmp_path, image_shape=SHAPE, format="pt2")
    assert manifest.noise.std == pytest.approx(torch.tensor([0.1, 0.2, 0.3, 0.4]).repeat_interleave(16).tolist())
    encoder = cost.measure(network(), torch.rand(1, *SHAPE), passes=1)["encoder"]
    assert manifest.cost.multiplications == encoder.macs + 16 * 4 * 4  # with those of the defense


def test_numbers_that_are_not_finite_are_noticed(tmp_path):
    model = network()
    next(model.encoder.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="messages must be finite"):
        export(model, defenses.GaussianNoise(noise_std=0.1), tmp_path, image_shape=SHAPE, format="pt2")


def test_a_graph_of_a_secure_defense_is_refused(tmp_path):
    defense = defenses.GaussianNoise(noise_std=0.1, secure=True)
    with pytest.raises(ValueError, match="noise must be input for a defense with secure draws"):
        export(network(), defense, tmp_path, image_shape=SHAPE, format="pt2", noise="graph")
    manifest = export(network(), defense, tmp_path, image_shape=SHAPE, format="pt2")
    assert [each.name for each in manifest.random_inputs] == ["noise"]


def test_a_changed_file_is_noticed(copied):
    shutil.copy(copied / "device.onnx", copied / "old")
    model = onnx.load(str(copied / "cloud.onnx"))
    model.doc_string = "changed"
    onnx.save(model, str(copied / "cloud.onnx"))
    with pytest.raises(ValueError, match=r"cloud\.onnx has changed since it was exported"):
        verify(copied)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"{"])
def test_a_damaged_file_is_named(copied, content):
    (copied / "device.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"device\.onnx"):
        verify(copied)


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100_000, '{"schema": 1}', '{"schema": 2}'])
def test_a_damaged_manifest_is_named(tmp_path, content):
    (tmp_path / manifests.NAME).write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        verify(tmp_path)


@pytest.mark.parametrize("message", ["float16", "uint8"])
def test_small_messages_keep_their_noise(tmp_path, message):
    defense = defenses.GaussianNoise(noise_std=0.1)
    manifest = export(network(), defense, tmp_path, image_shape=SHAPE, format="pt2", message=message)
    assert manifest.cost.message_bytes == {"float16": 128, "uint8": 64}[message]
    device, cloud = open_half(tmp_path / "device.pt2"), open_half(tmp_path / "cloud.pt2")
    images = torch.rand(5, *SHAPE)
    sent = device(images, torch.zeros(5, 4, 4, 4))
    assert sent.dtype == getattr(torch, message)
    model = network()
    with torch.no_grad():
        assert torch.allclose(cloud(sent), model(images), atol=0.02)


def test_halves_run_on_executorch(tmp_path):
    pytest.importorskip("executorch", exc_type=ImportError)
    defense = defenses.build("dropout", noise_std=0.1, dropout_rate=0.3)
    manifest = export(network(), defense, tmp_path, image_shape=SHAPE, format="executorch")
    device, cloud = open_half(tmp_path / "device.pte"), open_half(tmp_path / "cloud.pte")
    images = torch.rand(70, *SHAPE)
    drawn, model = draws.seeded(manifest.random_inputs, 70, seed=1), network()
    with torch.no_grad(), draws.Draws(drawn):
        expected = defense.release(model.encoder(images))
    assert torch.allclose(device(images, *drawn), expected, atol=1e-5)
    assert torch.allclose(cloud(expected), model.decoder(expected), atol=1e-4)


def test_noise_of_the_graph_does_not_repeat(tmp_path):
    defense = defenses.GaussianNoise(noise_std=0.1)
    manifest = export(network(), defense, tmp_path, image_shape=SHAPE, format="pt2", noise="graph")
    assert (manifest.noise.source, manifest.random_inputs) == ("graph", ())
    client = deploy.DeviceClient(tmp_path)
    image = torch.rand(1, *SHAPE)
    assert not torch.equal(client.message(image), client.message(image))


def test_noise_of_a_seeded_graph_is_refused(tmp_path):
    class Repeating(defenses.Defense):
        noise_std = 0.1

        def release(self, features):
            return features + 0.1 * torch.ones_like(features).cumsum(-1).sin()

    manifest = export(network(), Repeating(), tmp_path, image_shape=SHAPE, format="pt2")
    entries = json.loads((tmp_path / manifests.NAME).read_text())
    assert manifest.noise.source == "none"
    entries["noise"] = {"source": "graph", "std": 0.1, "variance": 0.01}
    (tmp_path / manifests.NAME).write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="the noise of the messages has no effect"):
        verify(tmp_path)


class Drawing(nn.Module):
    """A layer with randomness of its own that no function of torch announces."""

    def forward(self, features):
        return torch.ops.aten.bernoulli.p(features, 0.5)


class Deciding(nn.Module):
    """A layer that depends on the values of the features."""

    def forward(self, features):
        return features * 2 if features.sum() > 0 else features


@pytest.mark.parametrize(
    ("layer", "message"), [(Drawing(), "draw by torch's functions"), (Deciding(), "device half cannot be exported")]
)
def test_what_cannot_be_exported_is_named(tmp_path, layer, message):
    model = network()
    model.encoder.append(layer)
    with pytest.raises(ValueError, match=message):
        export(model, defenses.NoDefense(), tmp_path, image_shape=SHAPE, format="pt2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "onnx", "noise": "graph"}, "repeats the first draws of a graph in every session"),
        ({"format": "onx"}, "onnx"),
        ({"noise": "inputs"}, "input"),
        ({"message": "int8"}, "uint8"),
        ({"image_shape": (16, 16)}, r"image_shape must be \(C, H, W\)"),
        ({"image_shape": 16}, r"image_shape must be \(C, H, W\), got 16"),
        ({"image_shape": (1, 16.5, 16)}, r"image_shape must be \(C, H, W\)"),
        ({"image_shape": (1, 10**6, 10**6)}, "image_shape must hold at most"),
        ({"mean": [0.5, 0.5]}, "mean must have one number for each of 1 channels"),
        ({"mean": 0.5}, "mean must have one number for each of 1 channels, got 0.5"),
        ({"mean": "a"}, "mean must have one number for each of 1 channels, got 'a'"),
        ({"mean": [float("nan")]}, "mean must be finite"),
        ({"std": [float("nan")]}, "std must be finite"),
        ({"std": [float("inf")]}, "std must be finite"),
        ({"std": [0.0]}, "std must be positive"),
        ({"classes": "abc"}, "classes must be a sequence of names, got 'abc'"),
        ({"classes": (1, 2, 3)}, "classes must be a sequence of names"),
        ({"classes": ("a", "b")}, "classes must have 3 names, one for each logit, got 2"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        export(network(), defenses.NoDefense(), tmp_path / "out", **{"image_shape": SHAPE, **settings})
    assert not (tmp_path / "out").exists()


def test_another_programs_manifest_is_left_alone(tmp_path):
    (tmp_path / manifests.NAME).write_text('{"name": "a web page"}')
    with pytest.raises(ValueError, match="was not written by cem_fast"):
        export(network(), defenses.NoDefense(), tmp_path, image_shape=SHAPE)


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_halves_of_another_network_are_kept_unless_meant(copied):
    tamper(copied, lambda entries: entries.update(run="one"))
    before = files(copied)
    for run in ("two", ""):
        with pytest.raises(ValueError, match="holds the halves of another network"):
            export(network(), defenses.NoDefense(), copied, image_shape=SHAPE, run=run)
    assert files(copied) == before
    export(network(), defenses.NoDefense(), copied, image_shape=SHAPE, run="one")
    assert manifests.read(copied).noise.source == "none"


@pytest.mark.parametrize("name", ["device.pt2", "cloud.pt2"])
def test_a_file_that_is_not_of_the_export_is_left_alone(tmp_path, name):
    settings = {"image_shape": SHAPE, "format": "pt2"}
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"{name} is not of an export"):
        export(network(), defenses.NoDefense(), tmp_path, **settings)
    assert files(tmp_path) == {name: b"mine"}


def test_an_export_that_fails_keeps_the_one_before(copied, monkeypatch):
    before = files(copied)

    def fail(folder):
        raise ValueError("the noise is frozen")

    monkeypatch.setattr(importlib.import_module("cem_fast.deploy.export"), "verify", fail)
    with pytest.raises(ValueError, match="the noise is frozen"):
        export(network(), defenses.NoDefense(), copied, image_shape=SHAPE, format="pt2", overwrite=True)
    assert files(copied) == before


def test_a_saved_run_is_exported_by_the_command_line(finished, tmp_path, capsys):
    run, out = finished.run(cem=True), tmp_path / "out"
    assert status("export", str(run), "--folder", str(out), "--format", "pt2") == 0
    printed = capsys.readouterr().out
    assert "without a defense" in printed
    assert f"halves: {out}/device.pt2 and {out}/cloud.pt2" in printed
    assert manifests.read(out).classes == load_run(run).data.class_names
    assert status("export", "--verify", str(out)) == 0
    assert "noise: from the inputs noise (normal)" in capsys.readouterr().out


def test_the_digest_of_the_run_changes_with_its_weights(finished, tmp_path, monkeypatch):
    module, copy = importlib.import_module("cem_fast.deploy.export"), tmp_path / "run"
    monkeypatch.setattr(module, "export", lambda *_, run, **__: run)
    path = finished.run(cem=True)
    shutil.copytree(path, copy)
    before = load_run(copy)
    assert module.export_run(copy, "out") == module.export_run(path, "out") == digest(path / "run.json")
    next(before.model.decoder.parameters()).data[0] += 1e-3
    parts = {"model": before.model, "defense": before.defense, "loss": before.loss}
    save_run(copy, **parts, measurements=before.measurements, description=before.description)
    assert module.export_run(copy, "out") != module.export_run(path, "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "export takes the folder of a saved run, or --verify"),
        (("a", "--verify", "b"), "export takes the folder of a saved run, or --verify"),
        (("--verify", "nowhere"), "no exported halves there"),
        (("nowhere",), "nowhere"),
    ],
)
def test_wrong_arguments_of_the_command_are_one_line(arguments, message, capsys):
    assert status("export", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_cost_of_smaller_messages_is_printed(finished, monkeypatch, capsys):
    run = finished.run(cem=True)
    monkeypatch.setattr("sys.argv", ["quantization", str(run), "--attacks", "ridge"])
    quantization.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["float32", "float16", "uint8"]
    sizes = [int(row[1].replace(",", "")) for row in rows]
    assert sizes == [4 * sizes[2], 2 * sizes[2], sizes[2]]
    errors = [float(row[3]) for row in rows]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    assert errors[2] == pytest.approx(errors[0], rel=0.2)
    assert errors[2] != errors[0]


@pytest.mark.long
@pytest.mark.parametrize("name", defenses.names())
def test_every_defense_keeps_its_accuracy_through_onnxruntime(name, undefended_faces, tmp_path):
    faces, _ = undefended_faces
    config = RunConfig(defense=name, noise_std=0.1, epochs=6, image_size=24, seed=0)
    model, defense, _ = build_parts(config, image_shape=faces.image_shape, num_classes=40)
    training.train(model, faces, defense, config=config)
    model, defense = model.eval(), defense.eval()
    manifest = deploy.export(model, defense, tmp_path, image_shape=faces.image_shape)
    device, cloud = open_half(tmp_path / "device.onnx"), open_half(tmp_path / "cloud.onnx")
    images, labels = faces.test.images, faces.test.labels
    drawn = draws.seeded(manifest.random_inputs, len(images), seed=0)
    logits = cloud(device(images, *drawn))
    with torch.no_grad(), draws.Draws(drawn):
        expected = model.decoder(defense.release(model.encoder(images)))
    assert torch.allclose(logits, expected, rtol=0, atol=1e-4)
    assert (logits.argmax(1) == labels).double().mean() == (expected.argmax(1) == labels).double().mean()
