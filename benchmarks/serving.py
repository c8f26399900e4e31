"""Load on a cloud server of exported halves: latency of a device's requests over loopback.

Usage: ``python -m cem_fast.benchmarks.serving OUT [--requests 2000] [--workers 8]``, with the folder of ``cem-fast export``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from cem_fast.deploy import CloudServer, DeviceClient


def latencies(folder: Path, *, requests: int, workers: int) -> list[float]:
    """Times of requests of one message each, in milliseconds, in ascending order.

    Args:
        folder: the exported halves.
        requests: number of requests.
        workers: requests at a time.
    """
    server = CloudServer(folder, port=0)
    client = DeviceClient(folder, server.start())
    image = torch.rand(1, *client.manifest.image_shape)

    def timed(_: int) -> float:
        start = time.perf_counter()
        client.classify(image)
        return 1e3 * (time.perf_counter() - start)

    try:
        with ThreadPoolExecutor(workers) as pool:
            return sorted(pool.map(timed, range(requests)))
    finally:
        server.stop()


def main() -> None:
    """Print the median and the tail."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=8)
    options = parser.parse_args()
    start = time.perf_counter()
    found = latencies(options.folder, requests=options.requests, workers=options.workers)
    seconds = time.perf_counter() - start
    cuts = statistics.quantiles(found, n=100)
    print(f"{len(found)} requests, {options.workers} at a time, no error, {len(found) / seconds:.0f} a second")
    print(f"latency: p50 {cuts[49]:.2f} ms, p95 {cuts[94]:.2f} ms, p99 {cuts[98]:.2f} ms")


if __name__ == "__main__":
    main()
