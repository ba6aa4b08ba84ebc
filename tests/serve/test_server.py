"""A real server process and a real client."""

import concurrent.futures
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import zlib

import httpx
import pytest
from PIL import Image

from lgvit_fast.deploy import Deployed
from lgvit_fast.serve.uploads import FORMATS
from tests.deploy import exports
from tests.serve.server import Server, picture, serving

LIMITS = ["--max-upload-mb", "1", "--max-images", "8", "--max-pixels", "1000000", "--queue", "24"]
LIMITS += ["--timeout", "3", "--top-k", "3"]


@pytest.fixture(scope="module")
def server():
    with serving(exports.folder(), *LIMITS) as made:
        yield made
        assert made.client.get("/healthz").status_code == 200  # after all that was done to it


@pytest.fixture(scope="module")
def deployed():
    return Deployed(exports.folder(), threads=1)


def expected(deployed, data):
    array = deployed.manifest.preprocessing.read(io.BytesIO(data))
    return deployed(array[None])


def test_one_image_as_the_body_and_in_a_form(server, deployed):
    data = picture(1)
    want = expected(deployed, data)
    raw = server.client.post("/predict", content=data, headers={"Content-Type": "image/png"})
    form = server.predict(data)
    for answer in (raw, form):
        assert answer.status_code == 200
        found = answer.json()
        assert found["class_index"] == want.prediction[0]
        assert found["label"] == f"class {want.prediction[0]}"
        assert found["exit_layer"] == want.exit_layer[0]
        assert found["exit_index"] == want.exit_index[0]
        assert found["confidence"] == pytest.approx(want.confidence[0], abs=1e-4)
        assert len(found["top"]) == 3 and found["top"][0]["label"] == found["label"]
        assert found["queued_ms"] >= 0 and found["computed_ms"] > 0
        assert found["policy"] == "Entropy(threshold=0.7)"
    assert raw.json()["name"] is None and form.json()["name"] == "0.png"


def test_several_images_come_as_lines_each_with_its_own_fate(server, deployed):
    files = [picture(seed, form=form) for seed, form in enumerate(("PNG", "JPEG", "WEBP", "BMP"))]
    files.insert(2, b"no image at all")
    answer = server.predict(*files)
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    rows = {row["image"]: row for row in map(json.loads, answer.text.splitlines())}
    assert sorted(rows) == [0, 1, 2, 3, 4]
    assert rows[2] == {
        "image": 2,
        "name": "2.png",
        "status": 400,
        "error": "not a readable image: cut short, or no image",
    }
    for place in (0, 1, 3, 4):
        assert rows[place]["class_index"] == expected(deployed, files[place]).prediction[0]


def test_an_easy_image_is_answered_before_a_hard_one(server, deployed):
    """Lines come when images leave, not in the order of the request."""
    layers = {seed: int(expected(deployed, picture(seed)).exit_layer[0]) for seed in range(40)}
    hard = max(layers, key=layers.get)
    easy = [seed for seed in layers if layers[seed] == min(layers.values())][:4]
    assert layers[hard] > layers[easy[0]]
    answer = server.predict(*map(picture, [hard, *easy]))
    assert [json.loads(line)["image"] for line in answer.text.splitlines()][-1] == 0


def bomb():
    """A small PNG that says it has 100,000 x 100,000 pixels."""
    file = io.BytesIO()
    Image.new("1", (8, 8)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


FORM = "multipart/form-data; boundary=x"
BAD = {
    "no body": (b"", "image/png", 400, "the body is empty"),
    "not an image": (b"hello", "image/png", 400, "not a readable image"),
    "truncated": (picture(0)[:150], "image/png", 400, "not a readable image"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "image/x-eps", 400, "not a readable image"),
    "wrong type": (picture(0), "text/plain", 415, "content type 'text/plain'"),
    "too large": (b"x" * 2**21, "image/png", 413, "larger than 1 MiB"),
    "too many pixels": (bomb(), "image/png", 413, "more than 1000000 pixels"),
    "one very long side": (picture(0, (2000, 2)), "image/png", 400, "one side is over 250"),
    "no boundary": (b"x", "multipart/form-data", 400, "boundary"),
    "a broken form": (b"no form", FORM, 400, "Invalid multipart"),
    "a form without an image": (b"--x--\r\n", FORM, 400, "a form without an image"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies(server, name):
    body, kind, status, message = BAD[name]
    answer = server.client.post("/predict", content=body, headers={"Content-Type": kind})
    assert answer.status_code == status and message in answer.json()["error"]


def test_bad_forms(server):
    other = server.client.post("/predict", files={"picture": picture(0)})
    assert other.status_code == 400 and "['picture']" in other.json()["error"]
    text = server.client.post("/predict", data={"image": "text"}, files={"image": picture(0)})
    assert text.status_code == 400
    many = server.predict(*[picture(0)] * 9)
    assert many.status_code == 413 and "Too many files" in many.json()["error"]


def test_a_body_without_a_length_is_counted(server):
    def parts():
        for _ in range(40):
            yield b"x" * 2**16

    answer = server.client.post("/predict", content=parts(), headers={"Content-Type": "image/png"})
    assert answer.status_code == 413
    data = picture(3)
    chunks = (data[i : i + 50] for i in range(0, len(data), 50))
    answer = server.client.post("/predict", content=chunks, headers={"Content-Type": "image/png"})
    assert answer.status_code == 200


def test_a_gigabyte_is_refused_before_it_is_sent(server):
    with raw(server) as connection:
        connection.sendall(head(2**30))
        assert b" 413 " in connection.recv(4096)


def test_a_client_that_is_too_slow(server):
    with raw(server) as connection:
        connection.sendall(head(1000) + b"part of the body")
        assert b" 408 " in connection.recv(4096)


def test_a_client_that_goes_away_leaves_its_place(server):
    for _ in range(30):  # more than the queue has places
        with raw(server) as connection:
            data = picture(1)
            connection.sendall(head(len(data)) + data)
    deadline = time.monotonic() + 20
    while server.client.get("/stats").json()["queue"]:
        assert time.monotonic() < deadline
    assert server.predict(*map(picture, range(8))).status_code == 200


def test_paths_methods_and_hosts(server):
    assert server.client.get("/nothing").status_code == 404
    assert server.client.get("/predict").status_code == 405
    for host in (
        "evil.example",
        "localhost@evil.example",
        "localhost.evil.example:80",
        "[::2]",
        "",
    ):
        elsewhere = server.client.get("/model", headers={"Host": host})
        assert elsewhere.status_code == 400
        assert elsewhere.json()["error"].startswith(f"the host is {host!r}, expected one of")
    for host in ("LOCALHOST", "127.0.0.1:1", "[::1]:8000"):
        assert server.client.get("/model", headers={"Host": host}).status_code == 200


def test_a_full_queue_says_when_to_come_back(server):
    statuses, retry = [], []
    with httpx.Client(base_url=server.url, timeout=30) as client:
        form = [("image", (f"{i}.png", picture(i))) for i in range(8)]
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            for answer in pool.map(lambda _: client.post("/predict", files=form), range(36)):
                statuses.append(answer.status_code)
                if answer.status_code == 429:
                    retry.append(int(answer.headers["Retry-After"]))
                else:
                    assert len(answer.text.splitlines()) == 8
    assert set(statuses) == {200, 429} and min(retry) >= 1


def test_what_is_counted(server):
    before = server.client.get("/stats").json()
    server.predict(*map(picture, range(5)))
    after = server.client.get("/stats").json()
    assert after["answered"] == before["answered"] + 5 == sum(after["exits"])
    text = server.client.get("/metrics").text
    exits = [float(line.split()[-1]) for line in text.splitlines() if "lgvit_images_total{" in line]
    assert sum(exits) == after["answered"]
    for name in (
        "lgvit_requests_total",
        "lgvit_errors_total",
        "lgvit_request_seconds_bucket",
        "lgvit_queued_seconds_bucket",
        "lgvit_batch_images_bucket",
        "lgvit_queue_images",
    ):
        assert name in text
    about = server.client.get("/model").json()
    assert about["layers"] == [1, 2, 3, 4, 5] and about["num_classes"] == 7


def test_openapi_describes_what_is_answered(server):
    described = server.client.get("/openapi.json").json()
    body = described["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert set(body) == {"multipart/form-data", "application/octet-stream"}
    assert set(server.predict(picture(0)).json()) == set(
        described["components"]["schemas"]["Answer"]["properties"]
    )
    page = server.client.get("/docs").text
    assert "swagger" in page and "://" not in page.replace("http://www.w3.org", "")


def test_stopping_answers_what_was_accepted():
    server = Server(exports.folder(), "--max-wait-ms", "1000", "--batch-size", "64")
    form = [("image", (f"{i}.png", picture(i))) for i in range(6)]
    with httpx.stream("POST", f"{server.url}/predict", files=form, timeout=30) as answer:
        assert server.stop() == 0
        assert len(list(answer.iter_lines())) == 6


def test_the_loopback_address_of_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no ::1: {error}")
    with serving(exports.folder(), "--host", "::1") as server:
        assert re.fullmatch(r"http://\[::1\]:\d+", server.url)
        for path in ("/", "/page.js", "/page.css", "/model", "/stats"):
            assert server.client.get(path).status_code == 200
        assert server.predict(picture(0)).status_code == 200
        assert server.client.get("/", headers={"Host": "evil.example"}).status_code == 400


def test_what_cannot_be_served(tmp_path):
    def complaint(*arguments):
        command = [sys.executable, "-m", "lgvit_fast", "serve", *map(str, arguments)]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert found.returncode, found.stderr
        return found.stderr

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "cannot listen on 127.0.0.1" in complaint(exports.folder(), "--port", port)
    assert "no exported model in" in complaint(tmp_path)
    damaged = tmp_path / "damaged"
    shutil.copytree(exports.folder(), damaged)
    next(damaged.glob("segment_0.*")).write_bytes(b"x")
    assert "truncated" in complaint(damaged, "--port", "0", "--workers", "2")
    assert "slo_ms needs a model whose certificate has a path" in complaint(
        exports.folder(), "--port", "0", "--slo-ms", "50"
    )


def test_formats_are_those_of_the_web():
    assert "EPS" not in FORMATS and "JPEG" in FORMATS
    Image.init()
    assert set(FORMATS) & set(Image.ID) >= {"BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"}


def raw(server):
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30)


def head(length):
    return (
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
        + f"Content-Length: {length}\r\n\r\n".encode()
    )
