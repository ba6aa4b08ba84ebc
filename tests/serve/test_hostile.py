"""Small files that would take much memory or time, images of every kind, and clients that mean harm."""

import contextlib
import io
import json
import socket
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image
from starlette.exceptions import HTTPException

from lgvit_fast.deploy import Deployed
from lgvit_fast.serve import Settings
from lgvit_fast.serve.run import _Protocol
from lgvit_fast.serve.uploads import FORMATS, Budget, NoRoom, Upload, read_image
from tests.deploy import exports
from tests.serve.server import Server, picture, serving


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def read():
    preprocessing = Deployed(exports.folder(), threads=1).manifest.preprocessing

    def read(data):
        return read_image(Upload(None, io.BytesIO(data)), preprocessing, Settings(max_pixels=10**6))

    return read


def tiff(tile):
    """8 x 8 pixels in a tile of `tile` x `tile`, compressed."""
    data = zlib.compress(bytes(tile * tile), 1)
    numbers = {256: 8, 257: 8, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile}
    numbers |= {324: 8, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, n) for tag, n in sorted(numbers.items()))
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    return head + data + struct.pack("<H", len(numbers)) + entries + bytes(4)


def many_scans(scans, hidden=b""):
    """A JPEG whose last scan is repeated: some bytes each, and a pass over all pixels."""
    data = encoded(Image.new("L", (64, 64)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + hidden + last * scans + data[-2:]


def wide_frame():
    """A GIF that says 8 x 8, with a frame of 2000 x 2000."""
    data = bytearray(encoded(Image.new("P", (2000, 2000)), "GIF"))
    data[6:10] = struct.pack("<HH", 8, 8)
    return bytes(data)


BOMBS = {
    "GIF": (wide_frame, 413, "more than 1000000 pixels"),
    "JPEG of many scans": (lambda: many_scans(101), 400, "over 100 scans"),
    "the same behind a marker": (lambda: many_scans(101, b"\xff\x01"), 400, "100 scans"),
    "TIFF": (lambda: tiff(1008), 413, "more than 1000000 pixels"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(read, name):
    make, status, message = BOMBS[name]
    with pytest.raises(HTTPException) as refused:
        read(make())
    assert refused.value.status_code == status and message in refused.value.detail


Image.init()


@pytest.mark.parametrize("form", [name for name in FORMATS if name in Image.SAVE])
def test_too_many_pixels_in_every_format(read, form):
    with pytest.raises(HTTPException) as refused:
        read(encoded(Image.new("L" if form == "TIFF" else "RGB", (1001, 1000)), form))
    assert refused.value.status_code == 413


def test_what_is_just_allowed_is_read(read):
    plain = read(encoded(Image.new("L", (64, 64)), "JPEG"))
    assert np.array_equal(read(many_scans(90)), plain)
    assert read(tiff(992)).shape == plain.shape


def test_every_kind_of_picture_is_read_as_it_is_seen(read):
    """Red above, blue below: palettes, CMYK, 16 bits, transparency, turned, animated, cut short."""
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20, :, 0] = pixels[20:, :, 2] = 255
    seen = Image.fromarray(pixels)
    want = read(encoded(seen, "PNG"))
    turned = Image.Exif()
    turned[0x0112] = 6
    clear = seen.convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 40, 20))
    white = seen.copy()
    white.paste((255, 255, 255), (0, 0, 40, 20))
    same = {
        "palette": encoded(seen.convert("P", palette=Image.Palette.ADAPTIVE), "GIF"),
        "animated": encoded(seen, "GIF", save_all=True, append_images=[Image.new("RGB", (40, 40))]),
        "animated PNG": encoded(seen, "PNG", save_all=True, append_images=[white]),
        "turned": encoded(seen.transpose(Image.Transpose.ROTATE_90), "PNG", exif=turned),
        "CMYK": encoded(seen.convert("CMYK"), "TIFF"),
    }
    for name, data in same.items():
        assert np.abs(read(data) - want).max() < 0.05, name
    assert np.array_equal(read(encoded(clear, "PNG")), read(encoded(white, "PNG")))
    cmyk = encoded(seen.convert("CMYK"), "JPEG", quality=95)
    assert np.abs(read(cmyk) - want)[:, :8].max() < 0.5
    grey = np.repeat(np.arange(40, dtype=np.uint16)[:, None] * 1600, 40, 1)
    small = Image.fromarray(np.rint(grey / 65535 * 255).astype(np.uint8))
    assert np.array_equal(read(encoded(Image.fromarray(grey), "PNG")), read(encoded(small, "PNG")))
    for form in ("PNG", "JPEG", "WEBP", "GIF", "TIFF"):
        data = encoded(seen, form)
        with pytest.raises(HTTPException) as refused:
            read(data[: len(data) // 2])
        assert refused.value.status_code == 400


def test_bytes_of_bodies_are_taken_as_they_come():
    """Clients that announce much and send nothing hold nothing."""
    budget = Budget(100)
    with budget.share(90), budget.share(90) as take:
        take(60)
        with pytest.raises(NoRoom):
            take(41)
        with pytest.raises(NoRoom), budget.share(41):
            pass
        with budget.share(40) as other:
            other(40)
    with budget.share(100) as take:
        take(100)


def test_a_client_that_stops_reading_is_closed(monkeypatch):
    """Unless it reads on in time."""
    calls = []

    class Handle:
        def cancel(self):
            calls.append("cancelled")

    protocol = object.__new__(_Protocol)
    protocol.transport = type("", (), {"abort": "abort"})
    protocol.flow = type("", (), {"pause_writing": print, "resume_writing": print})
    protocol.loop = type("", (), {"call_later": lambda *a: calls.append(a[-1]) or Handle()})()
    protocol.pause_writing()
    assert calls == ["abort"]
    protocol.resume_writing()
    assert calls == ["abort", "cancelled"]


@pytest.fixture(scope="module")
def server():
    with serving(exports.folder(), "--max-images", "4", "--max-upload-mb", "1") as made:
        yield made
        assert made.predict(picture(0)).status_code == 200


def form(*parts, kind="multipart/form-data; boundary=x"):
    """A request with these parts, each its head and its content."""
    body = b"".join(b"--x\r\n" + head + b"\r\n\r\n" + data + b"\r\n" for head, data in parts)
    return body + b"--x--\r\n", {"Content-Type": kind}


def file(name=b"a.png", field=b"image"):
    return b'Content-Disposition: form-data; name="' + field + b'"; filename="' + name + b'"'


FORMS = {
    "no bytes": (form((file(), b"")), 400),
    "a field of another name": (form((file(field=b"picture"), picture(0))), 400),
    "an empty name": (form((file(field=b""), picture(0))), 400),
    "a long text": (form((b'Content-Disposition: form-data; name="image"', bytes(2000))), 400),
    "a large part head": (form((file(b"a" * 10_000), picture(0))), 400),
    "no name": (form((b"Content-Type: image/png", picture(0))), 400),
    "many parts": (form(*[(file(), b"")] * 1000), 413),
    "no end": ((form((file(), picture(0)))[0][:-10], form()[1]), 400),
    "a strange charset": (
        form((file(rb"\ud800"), picture(0)), kind=form()[1]["Content-Type"] + "; charset=idna"),
        400,
    ),
    "a surrogate in the name": (
        form(
            (file(rb"\ud800"), picture(0)),
            kind=form()[1]["Content-Type"] + "; charset=unicode_escape",
        ),
        400,
    ),
    "a long boundary": (form(kind="multipart/form-data; boundary=" + "x" * 1000), 400),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_mean_harm(server, name):
    (body, headers), status = FORMS[name]
    answer = server.client.post("/predict", content=body, headers=headers)
    assert answer.status_code == status and answer.json()["error"]


def test_names_of_files_stay_within_their_line(server):
    name = '"}\n\r{"label": "x"}\u2028\x00<script>../../etc/passwd'
    body, headers = form((file(name.encode().replace(b'"', b'\\"')), picture(0)), (file(), b"no"))
    answer = server.client.post("/predict", content=body, headers=headers)
    if answer.status_code == 200:
        rows = [json.loads(line) for line in answer.text.splitlines()]
        assert sorted(row["image"] for row in rows) == [0, 1]
    else:
        assert answer.status_code == 400


def exchange(server, data):
    """What the server says to raw bytes."""
    with socket.create_connection(
        ("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30
    ) as line:
        line.sendall(data)
        found = b""
        while part := line.recv(2**16):
            found += part
        return found


HEAD = (
    b"POST /predict HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: image/png\r\n"
)
RAW = {
    "a head without end": (b"GET / HTTP/1.1\r\nA: " + b"a" * 100_000, b" 400 "),
    "two lengths": (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", b" 400 "),
    "no number": (HEAD + b"Content-Length: -5\r\n\r\nhello", b" 400 "),
    "a broken chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello", b" 400 "),
    "another path": (
        b"GET /..%2f..%2fpage.js HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b" 404 ",
    ),
    "two hosts": (
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\nConnection: close\r\n\r\n",
        b" 400 ",
    ),
}


@pytest.mark.parametrize("name", RAW)
def test_requests_that_are_no_good_http(server, name):
    data, status = RAW[name]
    assert status in exchange(server, data).splitlines()[0]


def test_requests_in_a_row_are_answered_in_order(server):
    data = picture(0)
    ask = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data)
    last = b"GET /model HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = exchange(server, (ask + data) * 3 + last)
    assert answer.count(b"HTTP/1.1 200 OK") == 4 and answer.count(b'"exit_layer"') == 3
    assert answer.rindex(b'"exit_layer"') < answer.index(b'"num_classes"')


def test_idle_connections_do_not_use_the_files_up():
    command = ("sh", "-c", 'ulimit -S -n 64 && exec "$@"', "sh", sys.executable, "-m", "lgvit_fast")
    server = Server(exports.folder(), command=(*command, "serve"))
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    try:
        with contextlib.ExitStack() as idle:
            for _ in range(100):
                idle.enter_context(socket.create_connection(address))
            large = picture(0, (800, 800), "BMP")  # on disk, while it comes
            assert server.predict(large).status_code == 200
            assert server.client.get("/").status_code == 200
    finally:
        assert server.stop() == 0


def test_the_page_may_not_be_framed(server):
    policy = server.client.get("/").headers["Content-Security-Policy"]
    for part in ("default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'"):
        assert part in policy
