"""One local Ray cluster of real processes: a data set answered offline, and replicas behind HTTP."""

import contextlib
import json
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from lgvit_fast import scale
from lgvit_fast.deploy import Deployed
from lgvit_fast.scale.online import check_alive
from tests.deploy import exports

ray = pytest.importorskip("ray")

COLUMNS = ["path", "label", "class_index", "confidence", "exit_index", "exit_layer", "error"]


@pytest.fixture(scope="module")
def cluster():
    """Processors, as Ray counts them, for two actors, and later for two replicas."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 * 2**20,
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 21 images, one of them twice, and three files that are none."""
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for number in range(20):
        pixels = noise.integers(0, 256, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    (folder / "below").mkdir()
    (folder / "below" / "_copy.png").write_bytes((folder / "00.png").read_bytes())
    (folder / "cut.png").write_bytes((folder / "01.png").read_bytes()[:500])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("no image")
    return folder


BAD = {"cut.png", "empty.jpg", "text.jpg"}


def check(rows, photos, times=1):
    """Each file has a row, the errors are where they belong, and the answers are `Deployed`'s."""
    files = sorted(str(path) for path in photos.rglob("*.*"))
    assert sorted(row["path"] for row in rows) == sorted(files * times)
    bad = [row for row in rows if row["error"] is not None]
    assert {os.path.basename(row["path"]) for row in bad} == BAD
    for row in bad:
        assert all(row[name] is None for name in COLUMNS[1:-1])
        assert "0x" not in row["error"]
    good = [row for row in rows if row["error"] is None]
    deployed = Deployed(exports.folder(), threads=1)
    expected = deployed.predict([row["path"] for row in good])
    assert [row["class_index"] for row in good] == expected.prediction.tolist()
    assert [row["exit_index"] for row in good] == expected.exit_index.tolist()
    assert [row["exit_layer"] for row in good] == expected.exit_layer.tolist()
    assert [row["confidence"] for row in good] == pytest.approx(expected.confidence, abs=1e-5)
    assert [row["label"] for row in good] == [f"class {row['class_index']}" for row in good]
    assert len(set(expected.exit_index.tolist())) > 1


@pytest.mark.parametrize(
    ("images", "output", "error", "text"),
    [
        ([], "new", ValueError, "images is empty"),
        (["a\udcff.png"], "new", ValueError, "not UTF-8"),
        ("nothing", "new", FileNotFoundError, "no images in the folder 'nothing'"),
        (["a.png"], ".", FileExistsError, "expected a new folder"),  # rows would be there twice
    ],
    ids=["empty", "name", "folder", "output"],
)
def test_what_cannot_be_done_is_said_at_once(images, output, error, text):
    with pytest.raises(error, match=text):
        scale.predict("exported", images, output)


def test_a_folder_becomes_parquet(cluster, photos, tmp_path):
    import pyarrow.parquet

    output = str(tmp_path / "answers")
    scale.predict(exports.folder(), photos, output, batch_size=4)
    table = pyarrow.parquet.read_table(output)
    assert table.column_names == COLUMNS
    check(table.to_pylist(), photos)


def test_an_actor_that_dies_costs_no_row_and_repeats_none(cluster, photos, tmp_path):
    class Dying(scale.Predictor):
        def __call__(self, batch):
            answers = super().__call__(batch)
            assert not {"torch", "timm"} & set(sys.modules)
            try:
                (tmp_path / "died").mkdir()
            except FileExistsError:
                return answers
            os._exit(1)

    files = ray.data.read_binary_files(
        sorted(map(str, photos.rglob("*.*"))) * 2, include_paths=True
    )
    answers = files.map_batches(
        Dying,
        fn_constructor_args=(str(exports.folder()),),
        fn_constructor_kwargs={"top_k": 3},
        batch_size=8,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    rows = answers.take_all()
    assert (tmp_path / "died").exists()
    check(rows, photos, times=2)
    for row in rows:
        if row["error"] is None:
            best, *others = row["top"]
            assert [row["label"], row["class_index"], row["confidence"]] == list(best.values())
            assert len(others) == 2


class TestServe:
    @pytest.fixture(scope="class")
    def address(self, cluster):
        pytest.importorskip("fastapi")
        from ray import serve

        from lgvit_fast.serve import Settings

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        # two images run at once, and one waits, so that it is there when its replica is killed
        settings = Settings(batch_size=2, max_wait_ms=2000, queue=8)
        deployment = scale.serve_deployment(exports.folder(), settings=settings, num_replicas=2)
        serve.run(deployment, name="model")
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()

    def test_the_routes_of_the_server(self, address, photos):
        import requests

        deployed = Deployed(exports.folder(), threads=1)
        expected = deployed.predict([photos / "03.png", photos / "04.png"])
        one = requests.post(f"{address}/predict", (photos / "03.png").read_bytes())
        assert one.status_code == 200
        assert one.json()["class_index"] == expected.prediction[0]
        assert one.json()["exit_layer"] == expected.exit_layer[0]
        several = [
            ("image", (name, (photos / name).read_bytes()))
            for name in ("03.png", "04.png", "cut.png")
        ]
        with requests.post(f"{address}/predict", files=several, stream=True) as response:
            assert response.headers["content-type"].startswith("application/x-ndjson")
            assert "content-length" not in response.headers
            lines = sorted(map(json.loads, response.iter_lines()), key=lambda line: line["image"])
        assert [line.get("class_index") for line in lines] == [*expected.prediction, None]
        assert lines[2]["status"] == 400
        bad = requests.post(f"{address}/predict", b"no image")
        assert bad.status_code == 400 and bad.json()["error"]
        assert requests.get(f"{address}/model").json()["num_classes"] == 7

    def test_a_full_replica_s_429_reaches_the_client(self, address, photos):
        import requests

        files = [("image", ("03.png", (photos / "03.png").read_bytes()))] * 9  # of 8 places
        answer = requests.post(f"{address}/predict", files=files)
        assert answer.status_code == 429 and answer.json() == {"error": "the queue is full"}
        assert int(answer.headers["Retry-After"]) >= 1

    def test_a_request_ends_with_its_replica_and_the_next_is_answered(self, address, photos):
        import requests

        image = (photos / "03.png").read_bytes()
        first, second = replicas()
        ray.kill(first)
        files = [("image", ("03.png", image))] * 2
        for _ in range(10):  # the proxy does not know yet that it is gone
            answer = requests.post(f"{address}/predict", files=files)
            assert answer.status_code == 200
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(requests.post, f"{address}/predict", image)
            while requests.get(f"{address}/stats").json()["queue"] != 1:
                assert not waiting.done()
            ray.kill(second)
            with contextlib.suppress(requests.ConnectionError):
                assert waiting.result(30).status_code >= 500
        answer = requests.post(f"{address}/predict", files=files)
        assert answer.status_code == 200 and len(answer.text.splitlines()) == 2

    def test_ray_asks_after_the_worker(self, address):
        from fastapi.testclient import TestClient
        from ray import serve

        from lgvit_fast.serve import create_app

        serve.get_app_handle("model").check_health.remote().result()
        app = create_app(Deployed(exports.folder(), threads=1))
        with TestClient(app):
            check_alive(app)
        with pytest.raises(RuntimeError, match="worker"):
            check_alive(app)


def replicas():
    """The actors of the application's replicas."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [ray.get_actor(**actor) for actor in actors if "REPLICA" in actor["name"]]
