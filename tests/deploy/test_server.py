"""A device and a cloud over loopback: logits for messages, and a 4xx with the field's name for everything else."""

from __future__ import annotations

import http.client
import json
import resource
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
import torch
from cem_fast.benchmarks import serving
from safetensors.torch import save

from cem_fast import defenses, deploy, models
from cem_fast.deploy import CloudServer, DeviceClient, client, draws
from cem_fast.deploy.files import open_half

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


def test_two_hundred_malformed_requests_leave_the_server_alive_and_small(address):
    valid = message(2, 4, 4, 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for body in serving.malformed(valid, 200):
        assert 400 <= post(address, body)[0] < 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KB
    assert post(address, valid)[0] == 200


@pytest.mark.long
def test_the_server_of_a_load_test_answers_all_and_stays_small(place, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["serving", str(place[0])])
    assert serving.main() == 0
    printed = capsys.readouterr().out
    assert "2000 requests, 8 at a time, no error" in printed
    assert "200 malformed requests: 200 answered with 4xx, the server lives" in printed


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


@contextmanager
def answering(*answers: bytes):
    """A server that reads one request each and answers with these bytes; yields its address and the requests."""
    requests: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            for answer in answers:
                connection, _ = listening.accept()
                with connection:
                    requests.append(connection.recv(1 << 16))
                    connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", requests


def http_answer(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


LOGITS = torch.tensor([[1.0, 2.0, 3.0]])


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", "does not answer: Remote end closed connection"),
        (b"\x00\x01 nonsense\r\n\r\n", "does not answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", "answers with no logits"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "does not answer: IncompleteRead"),
        (http_answer(b"hello"), "answers with no logits"),
        (http_answer(save({"other": LOGITS})), "answers with no logits"),
        (http_answer(save({"logits": LOGITS.double()})), "must answer with finite float32 logits"),
        (http_answer(save({"logits": LOGITS.long()})), "must answer with finite float32 logits"),
        (http_answer(save({"logits": LOGITS[:, :2].contiguous()})), r"must answer with finite float32 logits \[1, 3\]"),
        (http_answer(save({"logits": LOGITS / 0})), "must answer with finite float32 logits"),
        (http_answer(b"a\x1b[2J\nline", status="503 Busy"), r"refuses the message: a\\x1b\[2J line"),
        (http_answer(b"", status="204 Nothing"), "refuses the message: status 204"),
    ],
)
def test_an_answer_without_logits_is_one_line(place, answer, error):
    with answering(answer) as (address, _), pytest.raises(ConnectionError, match=error) as raised:
        DeviceClient(place[0], address, timeout=10).classify(torch.rand(1, *SHAPE))
    assert str(raised.value).isprintable()
    assert str(raised.value).startswith(address)


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"])
def test_a_message_does_not_follow_a_redirection(place, status):
    with answering(http_answer(save({"logits": LOGITS}))) as (elsewhere, received):
        redirection = http_answer(b"", status=status, headers=f"Location: {elsewhere}/classify\r\n")
        with answering(redirection) as (address, _), pytest.raises(ConnectionError, match="refuses the message"):
            DeviceClient(place[0], address).classify(torch.rand(1, *SHAPE))
    assert received == []


def test_a_message_does_not_pass_through_a_proxy(place, address, monkeypatch):
    with answering(http_answer(save({"logits": LOGITS}))) as (proxy, received):
        monkeypatch.setenv("http_proxy", proxy)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert DeviceClient(place[0], address).classify(torch.rand(1, *SHAPE)).shape == (1, 3)
    assert received == []


@pytest.mark.parametrize(
    "wrong", ["ftp://h", "127.0.0.1:80", "http://", "http://h:port", "http://h:99999", "http://me@h", "http://h?a", "h"]
)
def test_a_wrong_address_is_named(place, wrong):
    with pytest.raises(ValueError, match="address must be as in"):
        DeviceClient(place[0], wrong)


def test_the_noise_given_gives_the_logits_of_pytorch(place, address):
    folder, model = place
    client, images = DeviceClient(folder, address), torch.rand(4, *SHAPE)
    drawn = draws.seeded(client.manifest.random_inputs, 4, seed=0)
    logits = client.send(open_half(folder / "device.pt2")(images, *drawn))
    with torch.no_grad():
        expected = model.decoder(model.encoder(images) + 0.01 * drawn[0])
    assert torch.allclose(logits, expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"messages must be torch.float32 \[N, 4, 4, 4\]"):
        client.send(drawn[0].double())


def test_a_network_that_fails_is_status_500_without_a_traceback(place, capfd):
    server = CloudServer(place[0], port=0)
    address = server.start()

    def fail(message):
        raise RuntimeError("secret path\nof the cloud")

    server._cloud, works = fail, server._cloud
    try:
        status, content = post(address, message(1, 4, 4, 4))
        server._cloud = lambda messages: messages.double()
        again, _ = post(address, message(1, 4, 4, 4))
        server._cloud = works
        assert post(address, message(1, 4, 4, 4))[0] == 200
    finally:
        server.stop()
    assert (status, again) == (500, 500)
    assert json.loads(content) == {"field": "message", "error": "the cloud half fails for these messages"}
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_device_that_hangs_up_leaves_no_traceback(place, capfd):
    server = CloudServer(place[0], port=0)
    address = server.start()
    try:
        with socket.create_connection(tuple(urlsplit(address).netloc.split(":"))) as connection:
            connection.sendall(b"POST /classify HTTP/1.1\r\nHost: h\r\nContent-Length: 999\r\n\r\nabc")
        assert post(address, message(1, 4, 4, 4))[0] == 200
    finally:
        server.stop()
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_cloud_half_of_another_network_is_refused_at_the_start(place, tmp_path):
    shutil.copytree(place[0], tmp_path / "out")
    path = tmp_path / "out/manifest.json"
    entries = json.loads(path.read_text())
    entries.update(message_shape=[4, 4, 8], cost={**entries["cost"], "message_bytes": 512})
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"cloud\.pt2 does not fit manifest\.json"):
        CloudServer(tmp_path / "out")
    with pytest.raises(ValueError, match=r"messages must be torch.float32 \[N, 4, 4, 8\], got"):
        DeviceClient(tmp_path / "out").message(torch.rand(1, *SHAPE))


def test_a_taken_port_is_named(place, address):
    with pytest.raises(OSError, match=f"the port {urlsplit(address).port} of 127.0.0.1"):
        CloudServer(place[0], port=urlsplit(address).port).start()


def test_a_refusal_that_is_nested_deeply_is_shown_as_text():
    assert client._text(b"[" * 100_000) == "[" * 300
