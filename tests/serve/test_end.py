"""The end of a server: its worker dies, or it is told to stop and the time is over."""

import json
import os
import select
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from threading import Event
from types import SimpleNamespace

from fastapi.testclient import TestClient

from lgvit_fast.deploy import Deployed
from lgvit_fast.serve import Settings, create_app, run
from lgvit_fast.serve.metrics import SHARED_FOLDER, _forget_the_dead
from tests.deploy import exports
from tests.serve.server import Server, picture


def forms(*files):
    return [("image", (f"{i}.png", data)) for i, data in enumerate(files)]


def test_when_the_worker_dies_all_who_wait_are_told(monkeypatch, caplog):
    died, calls = Event(), []
    app = create_app(
        Deployed(exports.folder(), threads=1),
        Settings(
            batch_size=5, max_wait_ms=60_000, timeout=10
        ),  # runs when the fifth image is there
        died=lambda: (calls.append(1), died.set()),
    )
    worker = app.state.service.worker

    def fault():
        raise SystemExit("a planted fault")  # no Exception: those are the image's own

    monkeypatch.setattr(worker._batcher, "step", fault)
    with TestClient(app) as client, ThreadPoolExecutor(3) as pool:
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        alone = [pool.submit(client.post, "/predict", content=picture(i)) for i in range(2)]
        several = pool.submit(client.post, "/predict", files=forms(*map(picture, range(3))))
        answers = [waiting.result() for waiting in alone]
        rows = [json.loads(line) for line in several.result().text.splitlines()]
        assert [answer.status_code for answer in answers] == [503, 503]
        assert [row["status"] for row in rows] == [503] * 3
        late = client.post("/predict", content=picture(0))
        assert late.status_code == 503
        for said in (*[a.json() for a in answers], *rows, late.json()):
            assert said["error"].startswith("the thread that runs the model died")
        assert died.wait(10) and calls == [1]
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 503
        assert client.get("/stats").json()["queue"] == worker.waiting == 0
    (record,) = [record for record in caplog.records if record.name.startswith("lgvit_fast.serve")]
    assert record.levelname == "CRITICAL" and "planted" in str(record.exc_info[1])


def test_one_of_several_processes_ends_with_its_worker_and_with_its_parent(monkeypatch):
    """Their supervisor looks at processes, not at /healthz."""
    told = {"folder": str(exports.folder()), "settings": Settings().to_json()}
    told |= {"runtime": "auto", "threads": 1, "hosts": None}
    monkeypatch.setenv(run._TOLD, json.dumps(told))
    gone, killed = Event(), Queue()
    monkeypatch.setattr(os, "kill", lambda *given: killed.put(given))
    parent = SimpleNamespace(join=gone.wait)
    monkeypatch.setattr(run, "parent_process", lambda: parent)
    worker = run.from_environment().state.service.worker
    monkeypatch.setattr(worker, "_take_in", lambda: 1 / 0)
    worker.start()
    assert killed.get(timeout=30) == (os.getpid(), signal.SIGTERM)
    assert killed.empty()
    gone.set()  # the process that started it
    assert killed.get(timeout=30) == (os.getpid(), signal.SIGTERM)


def test_a_stop_ends_in_time_whatever_is_left():
    server = Server(
        exports.folder(), "--stop-seconds", "1", "--max-wait-ms", "60000", "--timeout", "50"
    )
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    with ThreadPoolExecutor(2) as pool, socket.create_connection(address, 30) as uploading:
        uploading.sendall(head + b"Content-Length: 1000\r\n\r\npart of it")
        alone = pool.submit(server.predict, picture(0))
        several = pool.submit(server.predict, picture(1), picture(2))
        while server.client.get("/stats").json()["queue"] < 3:
            pass
        server.process.send_signal(signal.SIGTERM)
        answer = alone.result()
        assert answer.status_code == 503
        assert answer.json() == {"error": "the server is starting or stopping"}
        rows = [json.loads(line) for line in several.result().text.splitlines()]
        assert [row["status"] for row in rows] == [503, 503]
        assert b" 503 " in uploading.recv(4096)
        assert server.process.wait(30) == 0
    assert server.stop() == 0
    said = "".join(server.lines)
    assert "3 images without an answer after 1 s" in said and "Traceback" not in said


def test_a_client_that_reads_nothing_does_not_hold_the_stop():
    server = Server(exports.folder(), "--stop-seconds", "0.2")
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        deaf.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        deaf.setblocking(False)
        asked = b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100
        while select.select([], [deaf], [], 0.5)[1]:  # until the server has stopped reading, too
            deaf.send(asked)
        assert server.stop() == 0
    assert "Traceback" not in "".join(server.lines)


def test_gauges_of_processes_that_were_killed_are_dropped(tmp_path, monkeypatch):
    monkeypatch.setenv(SHARED_FOLDER, str(tmp_path))
    gone = 2**22 + 1  # beyond the largest number of a process
    kept = [f"counter_{gone}.db", f"gauge_livesum_{os.getpid()}.db"]
    for name in (*kept, f"gauge_livesum_{gone}.db", f"gauge_livemostrecent_{gone}.db"):
        (tmp_path / name).touch()
    _forget_the_dead(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
