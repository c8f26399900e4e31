"""What CEM adds to a training epoch of the paper's VGG11: the loss in every step, and one refit of the mixture.

usage: python benchmarks/training_epoch.py [--images 10000] [--batch-size 128] [--save FILE.json]

Two copies of the network train on the same batches, one with CEM and one without, step by step in turn, so that whatever else
the machine does falls on both. The refit is timed both ways: on the features that the epoch computed anyway, and with an
encoder pass of its own over all images.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

import cem_fast
from cem_fast import CEMLoss, models
from cem_fast.training import clean_features

NOISE_STD = 0.025
REFITS = 5


def timed(function, *args):
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    images = torch.rand(arguments.images, 3, 32, 32)
    labels = torch.randint(0, 10, (arguments.images,))
    plain = models.build("vgg11", image_shape=(3, 32, 32), num_classes=10, cut=2, bottleneck=8)
    networks = {"plain": plain, "cem": copy.deepcopy(plain)}
    optimizers = {
        name: torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        for name, net in networks.items()
    }
    cem = CEMLoss(num_classes=10, num_components=5, noise_std=NOISE_STD)
    cold, _ = timed(cem.fit, clean_features(networks["cem"], images), labels)
    kept = []

    def step(name: str, rows: slice) -> None:
        x, y = images[rows], labels[rows]
        features = networks[name].encoder(x)
        logits = networks[name].decoder(features + NOISE_STD * torch.randn_like(features))
        loss = F.cross_entropy(logits, y)
        if name == "cem":
            kept.append(features.detach())
            loss = loss + cem(features, y)
        optimizers[name].zero_grad()
        loss.backward()
        optimizers[name].step()

    starts = range(0, arguments.images, arguments.batch_size)
    times: dict[str, list[float]] = {"plain": [], "cem": []}
    for index, start in enumerate(starts):
        for name in ("plain", "cem") if index % 2 else ("cem", "plain"):
            times[name].append(timed(step, name, slice(start, start + arguments.batch_size))[0])
        print(f"step {index + 1} of {len(starts)}", end="\r", file=sys.stderr)
    reused, passes = [], []
    for _ in range(REFITS):
        # each refit starts where the last epoch's mixture ended, as in training
        mixture = copy.deepcopy(cem.state_dict())
        reused.append(timed(lambda: cem.fit(torch.cat(kept), labels))[0])
        cem.load_state_dict(mixture)
        passes.append(timed(lambda: cem.fit(clean_features(networks["cem"], images), labels))[0])
        cem.load_state_dict(mixture)

    def overhead(refit: list[float]) -> float:
        per_step = statistics.median(with_cem - without for with_cem, without in zip(times["cem"], times["plain"]))
        return (len(starts) * per_step + statistics.median(refit)) / sum(times["plain"])

    results = {
        "command": "python benchmarks/training_epoch.py " + " ".join(sys.argv[1:]),
        "network": "vgg11, cut 2, bottleneck 8, 32x32, 10 classes; CEM with 5 spherical components a class",
        "images": arguments.images,
        "batch_size": arguments.batch_size,
        "plain_epoch_s": sum(times["plain"]),
        "cem_epoch_s": sum(times["cem"]),
        "step_difference_ms": 1e3 * statistics.median(a - b for a, b in zip(times["cem"], times["plain"])),
        "first_fit_ms": 1e3 * cold,
        "refit_on_kept_features_ms": 1e3 * statistics.median(reused),
        "refit_with_encoder_pass_ms": 1e3 * statistics.median(passes),
        "overhead_on_kept_features": overhead(reused),
        "overhead_with_encoder_pass": overhead(passes),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "backend": cem_fast.backends()["on CPU tensors"],
    }
    for key, value in results.items():
        print(f"{key:28s} {value:.4g}" if isinstance(value, float) else f"{key:28s} {value}")
    if arguments.save:
        arguments.save.parent.mkdir(parents=True, exist_ok=True)
        arguments.save.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
