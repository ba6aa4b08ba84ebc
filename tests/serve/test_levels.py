"""Thresholds under load stay on the path that a certificate vouches for."""

import dataclasses
import json
import shutil
from collections import deque

import numpy as np
import pytest

import lgvit_fast
from lgvit_fast import policies
from lgvit_fast.deploy import Deployed
from lgvit_fast.deploy.manifest import Manifest
from lgvit_fast.policies import Confidence, Learned, Patience
from lgvit_fast.serve import Settings, create_app
from lgvit_fast.serve.levels import Levels, certified_policies
from tests.deploy import exports
from tests.evaluation.test_calibration import recording  # noqa: F401 (a fixture)
from tests.serve.server import picture, serving


def test_bolder_when_answers_would_be_late_and_cautious_again_when_calm():
    levels = Levels([Confidence(t) for t in (0.9, 0.8, 0.7)], slo=1.0)
    assert levels.choose(waiting=1000) == 0  # nothing is known of the cost yet
    for _ in range(200):
        levels.answered(0.1)
    assert [levels.choose(waiting) for waiting in (3, 5, 8, 1000)] == [0, 1, 2, 2]
    assert [levels.choose(waiting) for waiting in (8, 5, 3, 1)] == [2, 2, 1, 0]


@pytest.mark.parametrize("load", [9, 12.5, 14, 16, 20])
def test_a_steady_load_settles(load):
    """Two minutes of one server, by its own clock: images cost less under bolder policies."""
    rates = (10, 11, 12, 13.5, 15, 16.5, 17.5, 18)  # images a second under each
    levels = Levels([Confidence(1 - place / 10) for place in range(8)], slo=2.0)
    queue, chosen, waited = deque(), [], []
    now = arrival = 0.0
    while now < 120:
        while arrival <= now:
            queue.append((arrival, levels.choose(len(queue))))
            arrival += 1 / load
        if not queue:
            now = arrival
            continue
        batch = [queue.popleft() for _ in range(min(4, len(queue)))]
        cost = sum(1 / rates[level] for _, level in batch)
        now += cost
        for came, level in batch:
            levels.answered(cost / len(batch))
            if came > 60:
                chosen.append(level)
                waited.append(now - came)
    if load < rates[-1]:
        assert max(chosen) - min(chosen) <= 2 and max(waited) < 2.0
    if load < rates[0]:
        assert set(chosen) == {0}
    if load > rates[-1]:  # the floor of the certificate is the end
        assert set(chosen) == {7}


def test_without_a_limit_the_model_s_own_policy_stays():
    levels = Levels([Confidence(0.7)], slo=None)
    levels.answered(10.0)
    assert levels.choose(waiting=1000) == 0


@pytest.mark.parametrize("kind", ["confidence", "entropy", "patience", "learned"])
def test_the_path_of_a_certificate(recording, kind):  # noqa: F811
    made = lgvit_fast.calibrate(recording, max_drop=2, kind=kind)
    path = made.certificate.policies()
    assert path[-1] == made.policy and len(path) == len(made.certificate.path) >= 1
    chosen = certified_policies(made.policy, made.certificate)
    assert chosen[0] == path[0] and chosen[-1] == made.policy and len(chosen) <= 8
    assert all(policy in path for policy in chosen)
    assert isinstance(path[0], Learned | Patience) or len({p.threshold for p in path}) == len(path)


def test_a_certificate_of_before_paths_has_none(recording):  # noqa: F811
    made = lgvit_fast.calibrate(recording, max_drop=2)
    saved = made.certificate.to_dict()
    del saved["path"]
    old = lgvit_fast.Certificate.from_dict(saved)
    assert old.path == ()
    with pytest.raises(ValueError, match="slo_ms needs a model whose certificate has a path"):
        certified_policies(made.policy, old)
    other = dataclasses.replace(made.certificate, path=(0.9, 0.1234))
    with pytest.raises(ValueError, match="path ends at"):
        other.policies()


@pytest.fixture(scope="module")
def with_path(tmp_path_factory):
    """The exported model with a certificate of its exits, as a calibration would leave it."""
    folder = tmp_path_factory.mktemp("certified") / "model"
    shutil.copytree(exports.folder(), folder)
    manifest = Manifest.load(folder)
    policy = Confidence(0.16)
    certificate = lgvit_fast.Certificate(
        goal="max_drop",
        limit=1.0,
        bound=1.0,
        confidence=0.95,
        policy=policies.to_dict(policy),
        layers=manifest.layers,
        num_classes=7,
        images=100,
        selection_images=100,
        method="",
        seed=0,
        exit_counts=(20, 20, 20, 20, 20),
        data="",
        date="2026-01-01",
        path=(1.0, 0.5, 0.2, 0.16),
    )
    dataclasses.replace(manifest, policy=policy, certificate=certificate.to_dict()).save(folder)
    return folder


def test_a_server_under_load_says_which_thresholds_it_used(with_path):
    with serving(with_path, "--slo-ms", "1", "--batch-size", "4") as server:
        calm = server.predict(picture(0)).json()["policy"]
        assert calm == "Confidence(threshold=1.0)"
        files = [picture(seed) for seed in range(60)]
        rows = [server.predict(*files).text for _ in range(2)]
        used = {policy for text in rows for policy in _policies(text)}
        assert "Confidence(threshold=0.16)" in used
        assert used <= {f"Confidence(threshold={t})" for t in (1.0, 0.5, 0.2, 0.16)}
        text = server.client.get("/metrics").text
        assert "lgvit_drift " in text and "lgvit_drift_evidence " in text


def _policies(text):
    return [json.loads(line)["policy"] for line in text.splitlines()]


def test_settings_are_checked(with_path):
    for name, value in (("batch_size", 0), ("queue", 1.5), ("timeout", 0), ("slo_ms", -1)):
        with pytest.raises(ValueError, match=name):
            Settings(**{name: value})
    assert Settings.from_json(Settings(slo_ms=5).to_json()) == Settings(slo_ms=5)
    app = create_app(Deployed(with_path, threads=1), Settings(slo_ms=5))
    assert app.title == "lgvit_fast" and np.isfinite(Settings().timeout)
