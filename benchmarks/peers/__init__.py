"""Alternatives that a user might choose instead, each behind a small adapter.

An adapter prepares the parameters in its own layout once and returns the calls that are timed. It raises ``ImportError``
if its package is missing and ``Skipped`` if the case is out of reach. Every other exception counts as a failure.
"""

from __future__ import annotations

import torch
from cem_fast.benchmarks.cases import FITS, OPERATIONS, Case
from cem_fast.benchmarks.peers import libraries, ours, plain_torch
from cem_fast.benchmarks.peers.adapters import Built, Differentiable, Fit, Operators, Peer, Skipped

__all__ = ["OURS", "PEERS", "Built", "Differentiable", "Fit", "Operators", "Peer", "Skipped", "of"]

OURS = "cem_fast"
LIKELIHOOD = ("mixture_log_prob",)
PEERS = [
    Peer(OURS, ours.public_interface, (*OPERATIONS, *FITS), "cem_fast"),
    Peer("cem_fast, Triton operators", ours.triton_operators, OPERATIONS, "triton", devices=("cuda",)),
    Peer("cem_fast, CUDA C++ operators", ours.cuda_operators, OPERATIONS, "cem_fast", devices=("cuda",)),
    Peer("torch eager", plain_torch.eager, OPERATIONS),
    Peer("torch.compile", plain_torch.compiled, OPERATIONS),
    Peer("segmented GEMM", plain_torch.segmented_gemm, OPERATIONS),
    Peer("released loop", plain_torch.released_loop, ("cem_official",)),
    Peer("MixtureSameFamily", plain_torch.mixture_same_family, LIKELIHOOD),
    Peer("pykeops", libraries.pykeops, LIKELIHOOD, "pykeops"),
    Peer("torchgmm", libraries.torchgmm, (*LIKELIHOOD, "em"), "torchgmm"),
    Peer("scikit-learn", libraries.scikit_learn, (*LIKELIHOOD, *FITS), "scikit-learn", settles=True, devices=("cpu",)),
    Peer("scikit-learn, array API", libraries.scikit_learn_array_api, ("em",), "scikit-learn"),
    Peer(
        "scikit-learn-intelex",
        libraries.scikit_learn_intelex,
        ("kmeans", "seeding"),
        "scikit-learn-intelex",
        settles=True,
        devices=("cpu",),
    ),
    Peer("faiss", libraries.faiss, ("kmeans",), "faiss-cpu", settles=True, devices=("cpu",)),
    Peer("flash-kmeans", libraries.flash_kmeans, ("kmeans",), "flash-kmeans"),
]


def of(case: Case, device: torch.device) -> list[Peer]:
    """Peers that take part in a case on a device, this library first.

    Example:
        >>> import torch
        >>> from cem_fast.benchmarks import cases, peers
        >>> case = cases.Case("operations", "cem_official", N=128, D=512, C=10, K=5)
        >>> [peer.name for peer in peers.of(case, torch.device("cpu"))]
        ['cem_fast', 'torch eager', 'torch.compile', 'segmented GEMM', 'released loop']
    """
    return [
        peer
        for peer in PEERS
        if case.op in peer.operations
        and device.type in peer.devices
        and (peer.name.startswith(OURS) or not case.peers or peer.name in case.peers)
    ]
