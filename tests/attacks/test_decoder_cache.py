"""The cache of fitted decoders: hits, misses, copies, and lifetime."""

from __future__ import annotations

import torch
from support.attacking import fitted
from torch.nn import functional as F

from cem_fast import attacks, defenses, training


def test_attacks_share_the_decoder_of_one_observer(faces, undefended_faces, monkeypatch):
    trained = []
    train = attacks.Decoder._train
    monkeypatch.setattr(attacks.Decoder, "_train", lambda self, *a: trained.append(self) or train(self, *a))
    observe = training.observer(undefended_faces[1], defenses.Bottleneck())
    first = fitted("decoder", faces, observe, epochs=2)
    generator = fitted("gan", faces, observe, epochs=2, gan_epochs=1)
    assert len(trained) == 1
    with torch.no_grad():
        generator.trained.network.mean.zero_()
    again = fitted("decoder", faces, observe, epochs=2)  # changes of a copy leave the cached one alone
    assert len(trained) == 1
    features = observe(faces.test.images)
    assert torch.equal(again.reconstruct(features), first.reconstruct(features))
    fitted("decoder", faces, observe, epochs=3)
    fitted("decoder", faces, observe, epochs=2, seed=1)
    fitted("decoder", faces, observe, epochs=2, loss="l1")
    fitted("decoder", faces, training.observer(undefended_faces[1], defenses.Bottleneck()), epochs=2)
    assert len(trained) == 5
    louder = [1.0]
    changing = lambda x: louder[0] * F.avg_pool2d(x, 4)  # noqa: E731
    for factor, expected in ((1.0, 6), (1.0, 6), (2.0, 7)):  # the network under attack has changed
        louder[0] = factor
        fitted("decoder", faces, changing, epochs=1)
        assert len(trained) == expected


def test_a_decoder_is_dropped_with_its_observer(faces):
    import gc

    from cem_fast.attacks.decoder_cache import _decoders

    observe = lambda x: F.avg_pool2d(x, 4)  # noqa: E731
    fitted("decoder", faces, observe, epochs=1)
    held = len(_decoders)
    del observe
    gc.collect()
    assert len(_decoders) == held - 1


class Slots:
    """A callable without weak references."""

    __slots__ = ()

    def __call__(self, images):
        return F.avg_pool2d(images, 4)


def test_any_callable_can_be_attacked(faces):
    assert fitted("decoder", faces, Slots(), epochs=1).reconstruct(Slots()(faces.test.images)).isfinite().all()
