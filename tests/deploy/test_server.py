"""A device and a cloud over loopback: logits for messages, and a 4xx with the field's name for everything else."""

from __future__ import annotations

import http.client
import json
import random
import resource
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import save

from cem_fast import defenses, deploy, models
from cem_fast.deploy import CloudServer, DeviceClient

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
SHAPE = (1, 16, 16)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    torch.manual_seed(0)
    model = models.build("slim", image_shape=SHAPE, num_classes=3, cut=2, bottleneck=4).eval()
    folder = tmp_path_factory.mktemp("served")
    deploy.export(model, defenses.GaussianNoise(noise_std=0.01), folder, image_shape=SHAPE, format="pt2")
    return folder, model


@pytest.fixture(scope="module")
def address(place):
    server = CloudServer(place[0], port=0)
    yield server.start()
    server.stop()


def post(address: str, body: bytes, path: str = "/classify", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    connection.request("POST", path, body=body, headers=headers)
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def message(*shape: int, dtype: torch.dtype = torch.float32) -> bytes:
    return save({"message": torch.zeros(*shape).to(dtype)})


def test_a_device_and_a_cloud_classify(place, address):
    folder, model = place
    client, images = DeviceClient(folder, address), torch.rand(4, *SHAPE)
    with torch.no_grad():
        assert torch.allclose(client.classify(images), model(images), atol=0.2)
    with ThreadPoolExecutor(8) as pool:
        logits = list(pool.map(lambda _: client.classify(images[:1]), range(40)))
    assert all(each.shape == (1, 3) for each in logits)
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b"", 400, "body"),
        (b"hello", 400, "body"),
        (b"\xff" * 64, 400, "body"),
        (message(1, 4, 4, 4)[:-3], 400, "body"),
        (save({"image": torch.zeros(1, 4, 4, 4)}), 422, "message"),
        (save({"message": torch.zeros(1, 4, 4, 4), "more": torch.zeros(1)}), 422, "message"),
        (message(1, 4, 4, 5), 422, "message"),
        (message(64), 422, "message"),
        (message(0, 4, 4, 4), 413, "message"),
        (message(1, 4, 4, 4, dtype=torch.float64), 422, "message"),
        (save({"message": torch.full((1, 4, 4, 4), float("nan"))}), 422, "message"),
        (message(65, 4, 4, 4), 413, "message"),
        (message(400, 4, 4, 4), 413, "body"),
    ],
)
def test_a_malformed_request_is_refused_by_the_name_of_its_field(address, body, status, field):
    found, content = post(address, body)
    assert found == status
    answer = json.loads(content)
    assert answer["field"] == field
    assert "Traceback" not in answer["error"]


def test_two_hundred_malformed_requests_leave_the_server_alive_and_small(place, address):
    draw, valid = random.Random(0), message(2, 4, 4, 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(200):
        body = bytearray(valid)
        for _ in range(draw.randrange(1, 6)):
            body[draw.randrange(80)] = draw.randrange(256)
        status, _ = post(address, bytes(body[: draw.randrange(1, len(body))]))
        assert 400 <= status < 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KB
    assert post(address, valid)[0] == 200


def test_other_paths_and_methods_are_refused(address):
    assert post(address, b"", path="/nothing")[0] == 404
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    connection.request("GET", "/classify")
    assert connection.getresponse().status == 405
    connection.close()


def test_a_client_names_what_is_wrong(place, address):
    folder, _ = place
    client = DeviceClient(folder, address)
    with pytest.raises(ValueError, match=r"images must be float32 \[N, 1, 16, 16\]"):
        client.classify(torch.rand(1, 1, 8, 8))
    with pytest.raises(ConnectionError, match="refuses the message: expected 1 to 64 messages"):
        client.classify(torch.rand(65, *SHAPE))
    with pytest.raises(ConnectionError, match="does not answer"):
        DeviceClient(folder, "http://127.0.0.1:9").classify(torch.rand(1, *SHAPE))
    with pytest.raises(ValueError, match="address must be that of a server"):
        DeviceClient(folder).classify(torch.rand(1, *SHAPE))


def test_a_taken_port_is_named(place, address):
    with pytest.raises(OSError, match=f"the port {urlsplit(address).port} of 127.0.0.1"):
        CloudServer(place[0], port=urlsplit(address).port).start()
