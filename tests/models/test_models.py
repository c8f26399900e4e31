"""Networks: published sizes, bounded features, and the split of a user's own network."""

from __future__ import annotations

import pytest
import torch
from support import made_up
from torch import nn

from cem_fast import cost, models
from cem_fast.attacks.networks import ResNormDecoder
from cem_fast.config import RunConfig
from cem_fast.experiments import saved_run
from cem_fast.experiments.build import build_parts
from cem_fast.models import Bottleneck, DenseBottleneck
from cem_fast.models.dense import DenseCompress
from cem_fast.models.resnet import BasicBlock
from cem_fast.models.split import SplitModel

ARCHITECTURES = [name for name in models.names() if not name.endswith("_relu")]


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def convolutional(module: nn.Module) -> int:
    """Parameters outside the fully connected layers."""
    return size(module) - sum(size(layer) for layer in module.modules() if isinstance(layer, nn.Linear))


def test_published_parameter_counts():
    model = models.build("vgg11", image_shape=(3, 32, 32), num_classes=10, cut=2, bottleneck=8)
    assert model.encoder(torch.rand(2, 3, 32, 32)).shape == (2, 8, 8, 8)
    assert size(model.encoder) == 85_256
    assert round(size(model) / 1e6, 3) == 9.775
    assert size(ResNormDecoder((8, 8, 8), torch.rand(2, 3, 32, 32))) == 711_539


@pytest.mark.parametrize(
    "name, count, published",
    [
        # the networks for ImageNet have three fully connected layers of their own, 123,642,856 in all
        ("vgg11", convolutional, 132_868_840 - 123_642_856),
        ("vgg11_nobn", convolutional, 132_863_336 - 123_642_856),
        ("vgg13", convolutional, 133_053_736 - 123_642_856),
        ("vgg13_nobn", convolutional, 133_047_848 - 123_642_856),
        ("resnet20", size, 269_722),
        ("resnet32", size, 464_154),
        ("mobilenet_v2", size, 3_504_872 - 1280 * 990 - 990),  # 10 classes in place of 1000
    ],
)
def test_published_sizes_of_whole_networks(name, count, published):
    for variant in (name, f"{name}_relu"):
        model = models.build(variant, image_shape=(3, 32, 32), num_classes=10, cut=1, bottleneck=0)
        assert count(model) == published


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("bottleneck", [0, 8, "noRELU_K5C8S2"])
def test_features_are_bounded_and_logits_follow_from_them(name, bottleneck):
    model = models.build(name, image_shape=(1, 48, 48), num_classes=5, cut=2, bottleneck=bottleneck).eval()
    with torch.no_grad():
        model.encoder[0][0].weight *= 1e3  # however large the weights are
        features = model.encoder(torch.rand(2, 1, 48, 48))
        if not name.endswith("_relu"):
            assert 0 <= features.min() < features.max() <= 1
        elif bottleneck == "noRELU_K5C8S2":
            assert features.min() < 0
        else:
            assert 0 == features.min() < features.max()
        logits = model.decoder(features)
    assert logits.shape == (2, 5)
    if bottleneck:
        assert features.shape[1] == 8


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 64, 64)])
def test_every_network_learns(name, shape):
    torch.manual_seed(0)
    model = models.build(name, image_shape=shape, num_classes=3, cut=2, bottleneck="C4S1").double()
    model.decoder.apply(lambda module: module.eval() if isinstance(module, nn.Dropout) else None)
    images, labels = torch.rand(2, *shape, dtype=torch.float64), torch.tensor([0, 1])
    before = {key: value.clone() for key, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    # a bias before a normalization has no influence, and so hardly a gradient
    weights = {key for key, value in before.items() if value.dim() > 1}
    assert all(not torch.equal(value, before[key]) for key, value in model.named_parameters() if key in weights)


@pytest.mark.parametrize("name", ["slim", "resnet20", "mobilenet_v2"])
@pytest.mark.parametrize("bottleneck", [0, "K5C8S2", "D32R4G4"])
def test_networks_take_images_that_are_not_square(name, bottleneck):
    model = models.build(name, image_shape=(3, 32, 48), num_classes=5, cut=2, bottleneck=bottleneck).eval()
    assert model(torch.rand(2, 3, 32, 48)).shape == (2, 5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_network_is_saved_and_loaded(name, tmp_path):
    config = RunConfig(model=name, bottleneck="noRELU_C4S2", data="digits")
    model, defense, loss = build_parts(config, image_shape=(1, 32, 32), num_classes=3)
    model.eval()
    description = made_up.description(config, image_shape=(1, 32, 32), num_classes=3)
    saved_run.save_run(tmp_path, model=model, defense=defense, loss=loss, measurements={}, description=description)
    images = torch.rand(2, 1, 32, 32)
    loaded = saved_run.load_run(tmp_path)
    assert loaded.config == config
    with torch.no_grad():
        assert torch.equal(loaded.model(images), model(images))


@pytest.mark.parametrize(
    "name, cuts",
    [("vgg11", 7), ("vgg13", 9), ("resnet20", 9), ("resnet32", 15), ("mobilenet_v2", 18)],
)
def test_every_cut_computes_the_same_network(name, cuts):
    whole = models.build(name, image_shape=(1, 32, 32), num_classes=3, cut=cuts, bottleneck=0)
    assert len(whole.encoder) == cuts
    with pytest.raises(ValueError, match=f"cut must be between 1 and {cuts} stages, got {cuts + 1}"):
        models.build(name, image_shape=(1, 32, 32), num_classes=3, cut=cuts + 1, bottleneck=0)


def test_a_residual_block_by_hand():
    block = BasicBlock(2, 3, stride=2).eval()
    images = torch.rand(1, 2, 5, 5)
    shortcut = torch.zeros(1, 3, 3, 3)
    shortcut[:, :2] = images[:, :, ::2, ::2]
    torch.testing.assert_close(block(images) - block.residual(images), shortcut)


@pytest.mark.parametrize(
    "text, expected",
    [
        (0, None),
        (8, Bottleneck(8)),
        ("C8S1", Bottleneck(8)),
        ("noRELU_C8S1", Bottleneck(8, relu=False)),
        ("K5C12S2", Bottleneck(12, stride=2, kernel=5)),
        ("noRELU_K1C4S1", Bottleneck(4, kernel=1, relu=False)),
        ("D64", DenseBottleneck(64)),
        ("D64P4", DenseBottleneck(64, pool=4)),
        ("D64R16", DenseBottleneck(64, rank=16)),
        ("D64G4", DenseBottleneck(64, groups=4)),
        ("D64K5C8S4", DenseBottleneck(64, convolution=Bottleneck(8, stride=4, kernel=5))),
        ("noRELU_D32P2R2G16", DenseBottleneck(32, pool=2, rank=2, groups=16, relu=False)),
    ],
)
def test_the_grammar_of_bottlenecks(text, expected):
    assert Bottleneck.parse(text) == expected


def test_a_number_of_channels_means_its_long_form():
    torch.manual_seed(0)
    short = models.build("slim", image_shape=(1, 32, 32), num_classes=3, cut=2, bottleneck=8)
    torch.manual_seed(0)
    long = models.build("slim", image_shape=(1, 32, 32), num_classes=3, cut=2, bottleneck="C8S1")
    assert repr(short) == repr(long)
    assert all(torch.equal(a, b) for a, b in zip(short.state_dict().values(), long.state_dict().values()))


@pytest.mark.parametrize(
    "text, device, cloud",
    [
        ("C4S1", ["Conv2d", "ReLU"], ["Conv2d", "ReLU"]),
        ("noRELU_C4S1", ["Conv2d"], ["Conv2d"]),
        ("noRELU_K5C4S2", ["Conv2d"], ["ConvTranspose2d"]),
    ],
)
def test_networks_of_the_grammar(text, device, cloud):
    def kinds(modules):
        return [type(module).__name__ for module in modules]

    relu = models.build("resnet20_relu", image_shape=(1, 32, 32), num_classes=3, cut=2, bottleneck=text)
    assert kinds(relu.encoder[-1]) == device
    assert kinds(relu.decoder[0]) == cloud
    sigmoid = models.build("resnet20", image_shape=(1, 32, 32), num_classes=3, cut=2, bottleneck=text)
    assert kinds(sigmoid.encoder[-1]) == ["Conv2d", "Sigmoid"]
    assert kinds(sigmoid.decoder[0]) == cloud
    kernel = 5 if "K5" in text else 3
    assert sigmoid.encoder[-1][0].kernel_size == sigmoid.decoder[0][0].kernel_size == (kernel, kernel)


@pytest.mark.parametrize("stride, kernel", [(1, 1), (2, 3), (4, 5), (8, 9)])
def test_the_cloud_restores_the_sides(stride, kernel):
    model = models.build("resnet20", image_shape=(1, 32, 16), num_classes=3, cut=2, bottleneck=f"K{kernel}C4S{stride}")
    features = model.encoder(torch.rand(2, 1, 32, 16))
    assert features.shape == (2, 4, 32 // stride, 16 // stride)
    assert model.decoder[0](features).shape == (2, 16, 32, 16)


@pytest.mark.parametrize(
    "text, message",
    [
        ("8", r"\[noRELU_\]\[Kk\]CcSs as in noRELU_K3C8S1, .*got '8'; the nearest is 'C8S1'"),
        ("C8", "got 'C8'; the nearest is 'C8S1'"),
        ("c8s1", "got 'c8s1'; the nearest is 'C8S1'"),
        ("D64p4", "as in D64P4, got 'D64p4'; the nearest is 'D64P4'"),
        ("D64G4R16", "the nearest is 'D64R16G4'"),
        ("norelu_d64", "the nearest is 'noRELU_D64'"),
        ("dense", "the nearest is 'D64'"),
        ("D0", "at least 1 number, and have a pool of at least 1, got 'D0'"),
        ("D64P0", "at least 1 number, and have a pool of at least 1, got 'D64P0'"),
        ("D64G2", "a square number of groups that divides its numbers, got 'D64G2'"),
        ("D64G9", "a square number of groups that divides its numbers, got 'D64G9'"),
        ("D64R17G4", "a rank from 1 to its numbers per group, 16, got 'D64R17G4'"),
        ("D64R0", "a rank from 1 to its numbers per group, 64, got 'D64R0'"),
        ("D64K4C8S4", "an odd window no smaller than its stride, got 'D64K4C8S4'"),
        ("D64P3", "the stride or pool of the bottleneck, 3, must divide the features' sides, got 8x8 features"),
        ("D64P4G16", "the groups per side of the bottleneck, 16, must divide the features' sides, got 8x8 features"),
        ("noRELU_C8S1 ", "got 'noRELU_C8S1 '"),
        ("C12345S1", "got 'C12345S1'"),
        ("C0S1", "at least 1 channel and a stride of at least 1, got 'C0S1'"),
        ("C8S0", "at least 1 channel and a stride of at least 1, got 'C8S0'"),
        ("K4C8S1", "an odd window no smaller than its stride, got 'K4C8S1'"),
        ("K3C8S4", "an odd window no smaller than its stride, got 'K3C8S4'"),
        ("C8S3", "must divide the features' sides, got 8x8 features"),
    ],
)
def test_bad_bottlenecks(text, message):
    with pytest.raises(ValueError, match=message):
        models.build("vgg11", image_shape=(3, 32, 32), num_classes=10, cut=2, bottleneck=text)


@pytest.mark.parametrize(
    "name, cut, text",
    [
        *(("slim", 2, text) for text in ("D32", "D32P2", "D32R4", "D32G4", "D32K3C4S2", "noRELU_D32P2R4G4")),
        ("slim_relu", 3, "D32"),
        ("vgg11_nobn", 3, "D32G4"),
        ("resnet20", 4, "D32P4"),
        ("mobilenet_v2", 9, "D32R4"),
    ],
)
def test_a_dense_bottleneck_sends_few_numbers_of_any_network_at_any_cut(name, cut, text):
    model = models.build(name, image_shape=(1, 32, 32), num_classes=5, cut=cut, bottleneck=text)
    images = torch.rand(4, 1, 32, 32)
    features = model.encoder(images)
    assert features.shape == (4, 32, 1, 1)
    assert 0 <= features.min() < features.max()
    assert features.max() < 1 or name.endswith("relu")
    assert model.decoder[0](features).shape == nn.Sequential(*list(model.encoder)[:-1])(images).shape
    loss = nn.functional.cross_entropy(model(images), torch.arange(4))
    loss.backward()
    assert all(weights.grad.abs().sum() > 0 for weights in model.parameters() if weights.dim() > 1)


@pytest.mark.parametrize(
    "text, macs, weights",
    [
        ("D64", 64 * 4608, 64 * 4608),
        ("D64P4", 64 * 288, 64 * 288),
        ("D64R16", 16 * 4608 + 64 * 16, 16 * 4608 + 64 * 16),
        ("D64G4", 16 * 4608, 16 * 4608),
        ("D64K5C8S4", 9 * 8 * 32 * 25 + 64 * 72, 8 * 32 * 25 + 8 + 64 * 72),
    ],
)
def test_the_cost_of_a_dense_bottleneck_is_counted(text, macs, weights):
    """32 channels of 12x12 positions: 72 multiplications per feature for the paper's bottleneck of 8 channels."""

    def costs(bottleneck):
        model = models.build("slim", image_shape=(1, 48, 48), num_classes=5, cut=2, bottleneck=bottleneck)
        return cost.measure(model, torch.rand(1, 1, 48, 48), passes=1)

    bare, paper, dense = costs(0), costs(8), costs(text)
    assert dense["encoder"].macs - bare["encoder"].macs == macs
    assert dense["encoder"].parameters - bare["encoder"].parameters == weights + 2 * 64
    assert dense["encoder"].macs <= paper["encoder"].macs
    in_the_cloud = 4608 * 64 // (4 if "G4" in text else 1)
    assert dense["decoder"].macs - bare["decoder"].macs == in_the_cloud
    assert dense["decoder"].parameters - bare["decoder"].parameters == in_the_cloud + 4608


def test_each_number_of_a_dense_bottleneck_sees_its_square_of_positions():
    device = DenseCompress((2, 8, 8), DenseBottleneck(8, groups=4)).eval()
    for place in ((0, 0), (5, 2), (3, 7), (7, 7)):
        maps = torch.zeros(1, 2, 8, 8)
        maps[0, 1, place[0], place[1]] = 1.0
        changed = (device(maps) != device(torch.zeros(1, 2, 8, 8))).flatten()
        square = 2 * (place[0] // 4) + place[1] // 4
        assert changed.nonzero().flatten().tolist() == [2 * square, 2 * square + 1]


@pytest.mark.parametrize("text", ["D16", "D16P2", "D16R4", "D16G4", "D16R2G4", "D16K3C4S2"])
def test_normalization_folds_into_the_weights_for_use(text):
    torch.manual_seed(0)
    device = DenseCompress((3, 8, 8), Bottleneck.parse(text)).double()
    for _ in range(3):
        device(torch.rand(20, 3, 8, 8, dtype=torch.float64))
    nn.init.normal_(next(m for m in device if isinstance(m, nn.BatchNorm1d)).weight)
    maps = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    before = device.frozen()(maps)
    assert not any(isinstance(layer, nn.BatchNorm1d) for layer in device.frozen())
    torch.testing.assert_close(before, device.eval()(maps))


@pytest.mark.parametrize("text", ["C8", "D64p4", -1])
def test_a_bad_bottleneck_is_refused_with_the_settings(text):
    with pytest.raises(ValueError, match=f"bottleneck must be .*got {text!r}"):
        RunConfig(bottleneck=text)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "vgg12"}, "unknown model 'vgg12': .*the nearest is 'vgg1[13]'"),
        ({"cut": 0}, "cut must be between 1 and 3 stages, got 0"),
        ({"cut": 4}, "cut must be between 1 and 3 stages, got 4"),
        ({"bottleneck": -1}, "bottleneck must be a number of channels or 0, got -1"),
        ({"image_shape": (1, 8, 8)}, "at least 16x16 pixels for this network, got 8x8"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
    ],
)
def test_bad_requests(change, message):
    settings = {"name": "slim", "image_shape": (1, 32, 32), "num_classes": 10, "cut": 2, "bottleneck": 8, **change}
    with pytest.raises(ValueError, match=message):
        models.build(settings.pop("name"), **settings)


def own_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3)
    )


def test_a_split_network_computes_the_same():
    network, images = own_network(), torch.rand(4, 1, 8, 8)
    for cut in range(1, len(network)):
        model = SplitModel.from_sequential(network, cut)
        assert torch.equal(model(images), network(images))
        assert len(model.encoder) == cut


def test_bottleneck_in_a_users_network():
    model = SplitModel.from_sequential(own_network(), cut=2, bottleneck=4)
    features = model.encoder(torch.rand(4, 1, 8, 8))
    assert features.shape == (4, 4, 8, 8)
    assert 0 < features.min() < features.max() < 1
    assert model(torch.rand(4, 1, 8, 8)).shape == (4, 3)
    model = SplitModel.from_sequential(own_network(), cut=2, bottleneck="K5C4S2")
    assert model.encoder(torch.rand(4, 1, 8, 8)).shape == (4, 4, 4, 4)
    assert model(torch.rand(4, 1, 8, 8)).shape == (4, 3)


def test_bad_cuts():
    with pytest.raises(TypeError, match="network must be an nn.Sequential, got Linear"):
        SplitModel.from_sequential(nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="cut must be between 1 and 4 for 5 modules, got 5"):
        SplitModel.from_sequential(own_network(), 5)
    with pytest.raises(ValueError, match="bottleneck must be a number of channels or 0, got -2"):
        SplitModel.from_sequential(own_network(), 2, -2)
    with pytest.raises(ValueError, match="needs a Conv2d before the cut, got none in the first 1 modules"):
        SplitModel.from_sequential(nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)), 1, 4)
    with pytest.raises(ValueError, match=r"needs feature maps \[N, C, H, W\] at the cut, got a Flatten after"):
        SplitModel.from_sequential(own_network(), 4, 2)


@pytest.mark.parametrize(
    "last, channels",
    [
        (nn.ConvTranspose2d(8, 3, 2, stride=2), 3),
        (nn.PixelShuffle(2), 2),
        (nn.PixelUnshuffle(2), 32),
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), 8),
    ],
)
def test_a_bottleneck_fits_every_last_layer_of_maps(last, channels):
    network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), last, nn.Flatten(), nn.LazyLinear(3))
    model = SplitModel.from_sequential(network, cut=2, bottleneck=4)
    assert model.encoder[2][0].in_channels == channels
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 3)


def test_a_dense_bottleneck_in_a_users_network():
    model = SplitModel.from_sequential(own_network(), cut=2, bottleneck="D16", image_shape=(1, 12, 12))
    assert model.encoder(torch.rand(5, 1, 12, 12)).shape == (5, 16, 1, 1)
    assert model(torch.rand(5, 1, 12, 12)).shape == (5, 3)
    with pytest.raises(ValueError, match="image_shape must be given for a dense bottleneck, .*got None"):
        SplitModel.from_sequential(own_network(), cut=2, bottleneck="D16")


@pytest.mark.parametrize("text", ["D8", "D8R2G4"])
def test_a_dense_bottleneck_is_exported_for_any_batch(text):
    model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=text).eval()
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(model, (torch.rand(2, 1, 16, 16),), dynamic_shapes=shapes).module()
    images = torch.rand(5, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(exported(images), model(images))
