"""Inference cost of the two halves of a network: parameters, multiplications and the median time per batch.

usage: python benchmarks/inference_cost.py [--model vgg11] [--cut 2] [--bottleneck 8] [--side 32] [--classes 10]
                                           [--batch-size 128] [--passes 100] [--device cpu]

The defaults are the network and the batch size of the paper, which reports 0.085 M parameters and 21.9 M multiplications on the
device, 9.78 M parameters in total and 133.59 M multiplications in the cloud.
"""

from __future__ import annotations

import argparse

import torch

from cem_fast import cost, models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.names(), default="vgg11")
    parser.add_argument("--cut", type=int, default=2)
    parser.add_argument("--bottleneck", type=lambda text: int(text) if text.isdecimal() else text, default=8)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--passes", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    shape = (3, arguments.side, arguments.side)
    model = models.build(
        arguments.model,
        image_shape=shape,
        num_classes=arguments.classes,
        cut=arguments.cut,
        bottleneck=arguments.bottleneck,
    ).to(arguments.device)
    images = torch.rand(arguments.batch_size, *shape, device=arguments.device)
    found = cost.measure(model, images, passes=arguments.passes)
    print(f"{'part':8} {'parameters, M':>14} {'multiplications, M':>19} {'batch, ms':>10}")
    for part, name in (("encoder", "device"), ("decoder", "cloud")):
        each = found[part]
        print(f"{name:8} {each.parameters / 1e6:14.3f} {each.macs / 1e6:19.2f} {1e3 * each.seconds:10.2f}")
    print(f"torch {torch.__version__}, {arguments.device}, {torch.get_num_threads()} threads, batches of {len(images)}")


if __name__ == "__main__":
    main()
