"""Networks of any kind, cut at a named module."""

import pytest
import torch
from torch import nn

from cem_fast import SplitModel, models
from cem_fast.models import advice, graphs

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.norm(self.one(x)))
        out = self.two(out)
        out += x
        return self.relu(out)


class Residual(nn.Module):
    """Residual blocks, arithmetic and sizes in ``forward``."""

    def __init__(self):
        super().__init__()
        self.stem, self.layer1, self.layer2 = nn.Conv2d(3, 4, 3, padding=1), Block(), Block()
        self.head = nn.Linear(4 * 64, 5)

    def forward(self, x):
        count, _, height, width = x.shape
        assert_ = torch._assert
        assert_(height == 8, "images must be 8 pixels high")
        x = self.layer2(self.layer1(torch.relu(self.stem((x - 0.5) / 0.25))))
        return self.head(x.reshape(count, 4 * height * width))


class Branching(Residual):
    """Control flow that depends on the pixels, which torch.fx cannot trace."""

    def forward(self, x):
        if x.mean() > 2:
            x = x / 255
        return super().forward(x)


class Sized(Residual):
    """Control flow that depends on the size, which torch.export can trace."""

    def forward(self, x):
        for _ in range(x.shape[2] // 4):
            x = x * 0.9
        return super().forward(x)


class Tokens(nn.Module):
    """A transformer with a class token."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.first = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.second = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return {"logits": self.head(self.second(self.first(x))[:, 0])}


def seeded(kind):
    torch.manual_seed(0)
    return kind().eval()


@pytest.mark.parametrize(
    "kind, cut, shape",
    [
        (Residual, "layer1", (4, 8, 8)),
        (Residual, "layer1.one", None),
        (Sized, "layer2", (4, 8, 8)),
        (Branching, "layer1", (4, 8, 8)),
        (Tokens, "first", (5, 8)),
        (Tokens, "embed", (8, 2, 2)),
    ],
)
def test_the_halves_compute_what_the_network_does(kind, cut, shape):
    network = seeded(kind)
    if shape is None:
        with pytest.raises(ValueError, match=r"skip connection from .* passes by 'layer1.one'; cut at 'layer1'"):
            SplitModel.from_module(network, cut=cut, example=IMAGES)
        return
    model = SplitModel.from_module(network, cut=cut, example=IMAGES[:2])
    wanted = network(IMAGES)
    wanted = wanted["logits"] if isinstance(wanted, dict) else wanted
    assert tuple(model.encoder(IMAGES).shape) == (4, *shape)
    torch.testing.assert_close(model(IMAGES), wanted)
    torch.testing.assert_close(model(IMAGES[:1]), wanted[:1])
    own = {id(p) for p in network.parameters()}
    assert {id(p) for p in model.parameters()} <= own


class Skipping(Residual):
    """A skip connection outside of any block."""

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head((x + self.layer1(x)).flatten(1))


def test_a_skip_connection_is_named_by_the_module_that_it_comes_from():
    with pytest.raises(ValueError, match="a skip connection from stem passes by 'layer1'"):
        SplitModel.from_module(seeded(Skipping), cut="layer1", example=IMAGES)


def test_a_skip_connection_is_named_where_nothing_can_be_traced():
    with pytest.raises(ValueError, match="skip connection passes by 'layer1.one'"):
        SplitModel.from_module(seeded(Branching), cut="layer1.one", example=IMAGES)


def test_an_unknown_cut_names_the_nearest():
    with pytest.raises(ValueError, match="unknown cut 'layer3'.*the nearest is 'layer[12]'"):
        SplitModel.from_module(seeded(Residual), cut="layer3", example=IMAGES)


def test_half_networks_train_and_take_a_bottleneck():
    model = SplitModel.from_module(seeded(Residual), cut="layer1", example=IMAGES, bottleneck=2).train()
    assert model.encoder(IMAGES).shape == (4, 2, 8, 8)
    model(IMAGES).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="needs feature maps"):
        SplitModel.from_module(seeded(Tokens), cut="first", example=IMAGES, bottleneck=2)


def test_cuts_count_parameters_multiplications_and_bytes():
    network = seeded(Residual)
    found = {cut.name: cut for cut in models.cuts(network, IMAGES[:2])}
    assert list(found) == ["stem", "layer1", "layer2"]
    first = found["layer1"]
    assert first.shape == (4, 8, 8)
    assert first.bytes == 4 * 64 * 4
    assert first.parameters == sum(p.numel() for m in (network.stem, network.layer1) for p in m.parameters())
    assert first.multiplications == 64 * 9 * (3 * 4 + 2 * 4 * 4)


def test_cuts_are_listed_where_nothing_can_be_traced():
    names = [cut.name for cut in models.cuts(seeded(Branching), IMAGES)]
    assert {"stem", "layer1", "layer2"} <= set(names)


@pytest.mark.parametrize(
    "name, cut", [("resnet18", "layer1"), ("vgg11", "features.4"), ("mobilenet_v3_small", "features.2")]
)
def test_networks_of_torchvision(name, cut):
    torchvision = pytest.importorskip("torchvision")
    network, images = getattr(torchvision.models, name)(num_classes=7).eval(), torch.rand(2, 3, 64, 64)
    model = SplitModel.from_module(network, cut=cut, example=images)
    torch.testing.assert_close(model(images), network(images))
    assert cut in {each.name for each in models.cuts(network, images)}


@pytest.mark.parametrize("library, name, cut", [("torchvision", "vit_b_16", "encoder.layers.encoder_layer_1")])
def test_a_vision_transformer_of_torchvision(library, name, cut):
    network = getattr(pytest.importorskip(library).models, name)(num_classes=7).eval()
    images = torch.rand(2, 3, 224, 224)
    model = SplitModel.from_module(network, cut=cut, example=images)
    assert model.encoder(images).shape == (2, 197, 768)
    torch.testing.assert_close(model(images), network(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name, cut", [("resnet18", "layer1"), ("convnext_atto", "stages.0"), ("vit_tiny_patch16_224", "blocks.1")]
)
def test_networks_of_timm(name, cut):
    timm = pytest.importorskip("timm")
    network, images = timm.create_model(name, pretrained=False, num_classes=7).eval(), torch.rand(2, 3, 224, 224)
    model = SplitModel.from_module(network, cut=cut, example=images)
    torch.testing.assert_close(model(images), network(images), rtol=1e-3, atol=1e-3)


def test_a_vision_transformer_of_hugging_face():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=7,
    )
    network, images = transformers.ViTForImageClassification(config).eval(), torch.rand(2, 3, 32, 32)
    (cut,) = [name for name, _ in network.named_modules() if name.endswith((".layer.1", ".layers.1"))]
    model = SplitModel.from_module(network, cut=cut, example=images)
    assert model.encoder(images).shape == (2, 17, 32)
    assert model(torch.rand(5, 3, 32, 32)).shape == (5, 7)  # another batch than the example's
    torch.testing.assert_close(model(images), network(images).logits)
    assert cut in {each.name for each in models.cuts(network, images)}


class Masked(nn.Module):
    """A mask made from the batch's size, an optional argument, and a value that nothing uses."""

    def __init__(self, expands: bool):
        super().__init__()
        self.expands, self.first, self.second = expands, nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("places", torch.linspace(0, 1, 8))

    def forward(self, x, mask=None):
        x = x.flatten(1)[:, :8]
        keep = self.places > 0.2
        keep = keep.expand(x.shape[0], 8) if self.expands else keep
        x = self.first(x).masked_fill(~keep, 0)
        _unused = x.max(1)[1]
        x = x if mask is None else x * mask
        return self.second(x).masked_fill(~keep, 0)


@pytest.mark.parametrize("trace", ["_by_fx", "_by_export"])
def test_masks_and_optional_arguments_do_not_cross_a_cut(trace, monkeypatch):
    other = {"_by_fx": "_by_export", "_by_export": "_by_fx"}[trace]
    monkeypatch.setattr(graphs, other, None)
    network, images = Masked(expands=trace == "_by_export").eval(), torch.rand(3, 1, 4, 4)
    model = SplitModel.from_module(network, cut="first", example=images)
    assert isinstance(model.decoder, torch.fx.GraphModule)
    more = torch.rand(5, 1, 4, 4)
    torch.testing.assert_close(model(more), network(more))
    assert [cut.name for cut in models.cuts(network, images)] == ["first", "second"]


def test_labels_advise_where_to_cut(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    images = labels[:, None, None, None] + 0.1 * torch.randn(200, 1, 4, 4, generator=generator)
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 4), nn.Linear(4, 2))
    monkeypatch.setattr(advice, "CHUNK", 30)
    first, *_, last = models.cuts(network, images, labels, noise=0.5)
    assert (first.name, last.name) == ("0", "2")
    own = torch.arange(200) % 5 != 4
    features = images.flatten(1).double()
    expected = sum(
        (features[own & (labels == c)] - features[own & (labels == c)].mean(0)).square().sum() for c in (0, 1)
    )
    assert first.radius == pytest.approx(float(expected / own.sum()), rel=1e-9)
    noise = 0.5 * features[own].std()  # of nearly equal variances: one bit of the class, and 16 Gaussian channels
    assert first.information == pytest.approx(0.69 + 8 * float((1 + 0.01 / noise**2).log()), abs=0.6)
    assert last.information < first.information
    monkeypatch.setattr(advice, "MEMORY", 1)  # one cut per pass
    assert models.cuts(network, images, labels, noise=0.5)[0] == first
    assert models.cuts(network, images)[0].radius is None
    with pytest.raises(ValueError, match="labels must be integers of at least 10 images"):
        models.cuts(network, images, labels[:7])
