"""The decoder attack: convergence, losses, and batch sizes."""

from __future__ import annotations

import pytest
import torch
from support.attacking import build, error_at_half_budget

from cem_fast import attacks, metrics
from cem_fast._support.maps import as_maps
from cem_fast.attacks.decoder import Decoder


def test_half_budget_tells_a_converged_decoder_from_an_unconverged_one(small_faces, untrained):
    def noisy(images):
        features = torch.sigmoid(untrained(images))
        return features + 0.1 * torch.randn_like(features)

    settings = {"batch_size": 64, "dropout": 0.1}  # as in the evaluation
    assert (
        error_at_half_budget(build("decoder", small_faces.image_shape, epochs=120, **settings), small_faces, noisy)
        < 1.03
    )
    assert (
        error_at_half_budget(build("decoder", small_faces.image_shape, epochs=10, **settings), small_faces, noisy)
        > 1.03
    )


@pytest.mark.parametrize("network", ["res_norm", "conv_norm", "plain"])
def test_published_decoders_learn(small_faces, untrained, network):
    few = small_faces.attacker[torch.arange(0, 320, 10)]
    attack = Decoder(image_shape=small_faces.image_shape, decoder=network, epochs=15, batch_size=8)
    attack.fit(untrained, few.images, few.labels)
    error = metrics.mse(attack.reconstruct(untrained(few.images)), few.images).mean()
    assert error < 0.6 * few.images.var(0).mean()


@pytest.mark.parametrize("kind", ["tokens", "vectors"])
@pytest.mark.parametrize("network", ["slim", "plain"])
def test_decoders_learn_from_tokens_and_vectors(small_faces, kind, network):
    few = small_faces.attacker[torch.arange(0, 320, 10)]
    patches = torch.nn.functional.unfold(few.images, 4, stride=4).transpose(1, 2)
    mixed = patches @ torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    features = mixed if kind == "tokens" else mixed.flatten(1)
    attack = Decoder(image_shape=small_faces.image_shape, decoder=network, dropout=0.0, epochs=30, batch_size=8)
    attack.fit(lambda images: features, few.images, few.labels)
    error = metrics.mse(attack.reconstruct(features), few.images).mean()
    assert error < 0.6 * few.images.var(0).mean()


def test_each_loss_minimizes_its_own_measure(small_faces, untrained):
    rebuilt = {}
    for loss in attacks.loss_names():
        attack = build("decoder", small_faces.image_shape, epochs=40, loss=loss)
        attack.fit(untrained, small_faces.attacker.images, small_faces.attacker.labels)
        rebuilt[loss] = attack.reconstruct(untrained(small_faces.attacker.images))
    truth = small_faces.attacker.images
    measures = {
        "mse": lambda x: metrics.mse(x, truth).mean(),
        "ssim": lambda x: -metrics.ssim(x, truth).mean(),
        "l1": lambda x: (x - truth).abs().mean(),
    }
    for loss, measure in measures.items():
        assert min(rebuilt, key=lambda other: measure(rebuilt[other])) == loss


@pytest.mark.parametrize("count", [2, 3, 5])
def test_no_batch_is_a_single_image(count):
    images = torch.rand(count, 1, 8, 8)
    attack = Decoder(image_shape=(1, 8, 8), epochs=2, batch_size=2)
    attack.fit(torch.clone, images, torch.zeros(count, dtype=torch.int64))
    assert attack.reconstruct(images).isfinite().all()


@pytest.mark.parametrize(
    "tokens, image_shape, grid",
    [(6, (3, 24, 16), (3, 2)), (8, (1, 8, 64), (1, 8)), (7, (3, 30, 22), (3, 2)), (16, (3, 32, 32), (4, 4))],
    ids=["tall", "one row", "cropped, with a class token", "square"],
)
def test_tokens_become_maps_of_their_patches(tokens, image_shape, grid):
    places = torch.rand(2, tokens, 3)
    arranged = as_maps(places, image_shape)
    rows, columns = grid
    assert arranged.shape[2:] == grid
    assert torch.equal(arranged[:, :3].flatten(2).mT, places[:, tokens - rows * columns :])
