"""Load on a cloud server of exported halves: latency of a device's requests over loopback, and malformed ones.

Usage: ``python -m cem_fast.benchmarks.serving OUT [--requests 2000] [--workers 8] [--malformed 200]``, with the folder of
``cem-fast export``. The server is a process of its own.
"""

from __future__ import annotations

import argparse
import http.client
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import torch
from safetensors.torch import save

from cem_fast.deploy import DeviceClient

WARM = 200  # requests before the first measurement of memory
GROWTH = 16.0  # MiB that the server may grow by


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, int]]:
    """Address and process of a server of exported halves."""
    command = [sys.executable, "-m", "cem_fast", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://[\d.:]+", server.stdout.readline())
            if found is None:
                raise OSError(f"no server of {folder} has started")
            yield found[0], server.pid
        finally:
            server.terminate()


def latencies(client: DeviceClient, *, requests: int, workers: int) -> list[float]:
    """Times of requests of one message each, in milliseconds, in ascending order.

    Args:
        client: the device.
        requests: number of requests.
        workers: requests at a time.
    """
    image = torch.rand(1, *client.manifest.image_shape)

    def timed(_: int) -> float:
        start = time.perf_counter()
        client.classify(image)
        return 1e3 * (time.perf_counter() - start)

    with ThreadPoolExecutor(workers) as pool:
        return sorted(pool.map(timed, range(requests)))


def malformed(valid: bytes, count: int, seed: int = 0) -> list[bytes]:
    """Bodies of requests that are cut short, with up to five bytes of the header replaced.

    Args:
        valid: a valid body.
        count: number of bodies.
        seed: seed of the choices.
    """
    draw, found = random.Random(seed), []
    for _ in range(count):
        body = bytearray(valid)
        for _ in range(draw.randrange(6)):
            body[draw.randrange(80)] = draw.randrange(256)
        found.append(bytes(body[: draw.randrange(len(body))]))
    return found


def status(address: str, body: bytes) -> int:
    """Status of the answer to a request with this body.

    Args:
        address: address of the server.
        body: what is sent.
    """
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    try:
        connection.request("POST", "/classify", body)
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def memory(process: int) -> float:
    """Resident memory of a process in MiB.

    Args:
        process: its id.
    """
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(process)], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def main() -> int:
    """Print latencies, statuses and memory; 1 if a malformed request is not answered with 4xx, or memory grows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--malformed", type=int, default=200)
    options = parser.parse_args()
    with serving(options.folder) as (address, process):
        client = DeviceClient(options.folder, address)
        latencies(client, requests=WARM, workers=options.workers)
        before, start = memory(process), time.perf_counter()
        found = latencies(client, requests=options.requests, workers=options.workers)
        seconds, after = time.perf_counter() - start, memory(process)
        cuts = statistics.quantiles(found, n=100)
        print(f"{len(found)} requests, {options.workers} at a time, no error, {len(found) / seconds:.0f} a second")
        print(f"latency: p50 {cuts[49]:.2f} ms, p95 {cuts[94]:.2f} ms, p99 {cuts[98]:.2f} ms")
        valid = save({"message": client.message(torch.rand(2, *client.manifest.image_shape))})
        statuses = [status(address, body) for body in malformed(valid, options.malformed)]
        refused = sum(400 <= each < 500 for each in statuses)
        alive, end = status(address, valid) == 200, memory(process)
    print(
        f"{len(statuses)} malformed requests: {refused} answered with 4xx, the server {'lives' if alive else 'is gone'}"
    )
    print(
        f"memory of the server: {before:.1f} MiB before, {after:.1f} MiB after the requests, {end:.1f} MiB at the end"
    )
    return int(not alive or refused < len(statuses) or end - before > GROWTH)


if __name__ == "__main__":
    sys.exit(main())
