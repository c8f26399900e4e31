"""Model inversion attacks: those of the CEM paper, attacks that start from them, and controls.

"The strongest attack" of a report is the strongest of these; a stronger one may exist. Each image under attack is observed once, unless an
attack is built for several releases: the mean of ``n`` releases with independent noise has an ``n``-th of the noise's variance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cem_fast._support.counts import require_count
from cem_fast._support.lookup import lookup
from cem_fast.attacks.base import Attack
from cem_fast.attacks.budgets import budget_names, budgeted
from cem_fast.attacks.decoder import DECODERS, LOSSES, Decoder
from cem_fast.attacks.ensemble import Ensemble
from cem_fast.attacks.flow import Flow, Prior
from cem_fast.attacks.gan import Gan
from cem_fast.attacks.inversion import Inversion
from cem_fast.attacks.joint import Joint
from cem_fast.attacks.kernel_ridge import KernelRidge
from cem_fast.attacks.nearest import Nearest
from cem_fast.attacks.optimization import Optimization
from cem_fast.attacks.ridge import Ridge
from cem_fast.attacks.view import View

__all__ = [
    "Attack",
    "Decoder",
    "Ensemble",
    "Flow",
    "Gan",
    "Inversion",
    "Joint",
    "KernelRidge",
    "Nearest",
    "Optimization",
    "Prior",
    "Ridge",
    "View",
    "budget_names",
    "build",
    "decoder_names",
    "loss_names",
    "names",
]

_NAMES = tuple(cls.name for cls in (Decoder, Ridge, Nearest, Ensemble, Optimization, Gan, KernelRidge, Inversion, Flow))


def names() -> tuple[str, ...]:
    """Names of the attacks that :func:`cem_fast.attacks.build` accepts.

    Example:
        >>> from cem_fast import attacks
        >>> attacks.names()
        ('decoder', 'ridge', 'nearest', 'ensemble', 'optimization', 'gan', 'kernel_ridge', 'inversion', 'flow')
    """
    return _NAMES


def decoder_names() -> tuple[str, ...]:
    """Names of the decoder attack's networks.

    Example:
        >>> from cem_fast import attacks
        >>> attacks.decoder_names()
        ('slim', 'res_norm', 'conv_norm', 'plain')
    """
    return tuple(DECODERS)


def loss_names() -> tuple[str, ...]:
    """Names of the decoder attack's losses.

    Example:
        >>> from cem_fast import attacks
        >>> attacks.loss_names()
        ('mse', 'ssim', 'l1')
    """
    return tuple(LOSSES)


def build(
    name: str,
    *,
    image_shape: tuple[int, int, int],
    seed: int = 0,
    budget: str = "standard",
    releases: int = 1,
    decoder: str = "slim",
    dropout: float = 0.3,
    loss: str = "mse",
    batch_size: int = 32,
    prior: Prior | None = None,
    **settings: int,
) -> Attack:
    """Builds an attack by name.

    Args:
        name: one of :func:`cem_fast.attacks.names`.
        image_shape: ``(channels, height, width)`` of the images.
        seed: seed of all random numbers of the attack.
        budget: ``quick``, ``standard`` or ``thorough``: computation of the attack.
        releases: messages of each image, with independent noise, that the attack uses jointly. ``reconstruct`` takes ``[N, ...]`` for
            one, ``[releases, N, ...]`` for more.
        decoder: network of the decoder attack, one of :func:`cem_fast.attacks.decoder_names`.
        dropout: fraction of the hidden features that the network ``slim`` drops in training.
        loss: loss of the decoder attack, one of :func:`cem_fast.attacks.loss_names`.
        batch_size: images per step of the decoder attack and of the gan attack.
        prior: flow model of images that the flow attack uses instead of training one.
        **settings: single settings in place of the budget's. ``epochs``: passes of the decoder attack over the attacker's images, also if
            another attack starts from it. ``gan_epochs``: passes of the gan attack. ``steps``: steps of the optimization attack.
            ``flow_steps``: training steps of the flow attack. ``decoder_steps``, ``corrector_steps``, ``map_steps``, ``stages``: arguments
            of :class:`Inversion`, and ``inversion_batch`` its ``batch_size``. ``draws``: observations of each of the attacker's images,
            for ridge, kernel_ridge and nearest. Those that the attack does not use are ignored.

    Returns:
        The attack, not yet fitted.

    Raises:
        ValueError: a name is unknown, or an argument is out of range.

    Example:
        >>> import torch
        >>> from cem_fast import attacks
        >>> images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> def observe(images):
        ...     return torch.nn.functional.avg_pool2d(images, 2)
        >>> attack = attacks.build("decoder", image_shape=(1, 8, 8), epochs=2)
        >>> attack.fit(observe, images, torch.zeros(16, dtype=torch.int64))
        >>> attack.reconstruct(observe(images)).shape
        torch.Size([16, 1, 8, 8])
        >>> attack.budget
        "2 epochs of the network 'slim' on its images, minimizing mse"
    """
    require_count("releases", releases)
    known = budgeted(budget, {})
    for key in settings:
        lookup("setting", key, known)
    amounts = budgeted(budget, settings)

    def start() -> Decoder:
        return Decoder(
            image_shape=image_shape,
            epochs=amounts["epochs"],
            decoder=decoder,
            dropout=dropout,
            loss=loss,
            batch_size=batch_size,
            seed=seed,
        )

    common: dict[str, Any] = {"image_shape": image_shape, "seed": seed}
    # attacks that learn from one message, given the mean of several
    of_one: dict[str, Callable[[], Attack]] = {
        Decoder.name: start,
        Ridge.name: lambda: Ridge(draws=amounts["draws"], **common),
        KernelRidge.name: lambda: KernelRidge(draws=amounts["draws"], **common),
        Nearest.name: lambda: Nearest(draws=amounts["draws"], **common),
        Ensemble.name: lambda: Ensemble(decoder=start(), **common),
        Gan.name: lambda: Gan(decoder=start(), epochs=amounts["gan_epochs"], **common),
    }
    # attacks that use several messages by themselves
    of_many: dict[str, Callable[[], Attack]] = {
        Inversion.name: lambda: Inversion(
            **{key: amounts[key] for key in ("decoder_steps", "corrector_steps", "map_steps", "stages")},
            batch_size=amounts["inversion_batch"],
            releases=releases,
            **common,
        ),
        Optimization.name: lambda: Optimization(decoder=start(), steps=amounts["steps"], releases=releases, **common),
        Flow.name: lambda: Flow(decoder=start(), steps=amounts["flow_steps"], prior=prior, releases=releases, **common),
    }
    attack = lookup("attack", name, {key: (of_one | of_many)[key] for key in _NAMES})()
    return attack if releases == 1 or name in of_many else Joint(attack=attack, releases=releases)
