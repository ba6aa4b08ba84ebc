"""Streams that replay full batches from graphs; on the CPU, where nothing is captured."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

import lgvit_fast
from lgvit_fast.inference import Engine, stream
from lgvit_fast.inference import engine as engine_module
from lgvit_fast.inference.graphs import CaptureError
from tests.helpers import images, tiny_model, tiny_swin
from tests.inference.test_stream_runs import Device

POLICIES = [
    lgvit_fast.Confidence(0.5),
    lgvit_fast.Entropy(1.0),
    lgvit_fast.Patience(2),
    lgvit_fast.PatientConfident(0.5, 2),
    lgvit_fast.Replay([0, 1, 3, 3, 2, 3, 1, 3] * 5),
]
MOST_BEFORE = 3  # operations of the host in a run before its replay
MODELS = {"vit": (tiny_model, (32, 32), 1), "swin": (tiny_swin, (48, 48), 4)}  # and token shapes


@pytest.fixture
def counts(monkeypatch):
    """Captures and replays, counted."""
    found, capture = Counter(), engine_module.capture_eager

    def counted(work, pool, side):
        found["captures"] += 1
        step = capture(work, pool, side)
        return lambda: (found.update(replays=1), step())

    monkeypatch.setattr(engine_module, "capture_eager", counted)
    return found


def replaying(model, batch_size=4, **options):
    return Engine(model, max_batch=batch_size, graphs="eager", **options)


def assert_answers(answers, model, given, policy):
    answers = sorted(answers, key=lambda answer: answer.index)
    expected = model.infer(given, policy)
    assert [a.exit_index for a in answers] == expected.exit_index.tolist()
    got = torch.stack([a.logits for a in answers])
    torch.testing.assert_close(got, expected.logits, atol=1e-4, rtol=1e-4)


def run_to_end(model, script, batch_size=4, **options):
    """The answers of a stream on graphs are those of `infer`; the stream."""
    given, policy = images(len(script)), lgvit_fast.Replay(script)
    running = stream(
        replaying(model), given.split(batch_size), batch_size, policy=policy, **options
    )
    assert_answers(list(running), model, given, policy)
    return running


@pytest.mark.parametrize("kind", MODELS)
def test_answers_are_those_of_infer(kind, counts, monkeypatch):
    make, size, shapes = MODELS[kind]
    model, given = make(exits=[2, 4, 6] if kind == "swin" else [2, 3, 5]), images(40, size)
    engine = replaying(model)
    for policy in POLICIES:
        for late, backend in ((False, "torch"), (True, "auto")):
            with monkeypatch.context() as patch, lgvit_fast.ops.backend(backend):
                if late:
                    Device(patch)
                counts.clear()
                running = stream(engine, given.split(8), 4, order="completion", policy=policy)
                assert_answers(running, model, given, policy)
            report, answers = running.report(), 1 + late
            assert report.graphs <= 4 * answers  # one of a segment and an answer
            assert len(running._slots._written) <= shapes * answers
            assert 4 <= counts["replays"] < sum(s.runs for s in report.segments) - report.forced


def test_captures_and_replays_are_counted(counts):
    running = run_to_end(tiny_model(exits=[2, 3]), [2] * 12 + [0, 0, 1, 1] * 2 + [2])
    runs = [segment.runs for segment in running.report().segments]
    assert runs == [6, 5, 4] and running.report().forced == 3
    # The first run of a segment, and the one image left over, are launched kernel by kernel.
    assert counts == {"captures": 3, "replays": (5 - 1) + (4 - 1) + (3 - 1)}
    assert running.report().graphs == 3
    assert running.report().graph_bytes > 4 * 17 * 32 * 4  # tokens of a batch
    assert "3 graphs" in str(running.report())


def test_slots_that_grow_in_mid_stream(counts):
    """Three wait for the second segment when four others join them."""
    running = run_to_end(tiny_model(exits=[2, 3]), [1] * 16 + [1, 1, 1, 0] + [2] * 16)
    (tokens,) = running._slots._tokens.values()
    assert len(tokens) == 8
    assert counts["captures"] == 2 + 3  # of two segments before, of all three after


def test_images_of_another_size(counts):
    model = tiny_model(exits=[2], dynamic_img_size=True)
    batches = [images(12, size) for size in ((32, 32), (48, 32), (32, 48))]
    never = lgvit_fast.Confidence(1.0)
    answers = list(stream(replaying(model), batches, 4, policy=never))
    expected = torch.cat([model.infer(batch, never).logits for batch in batches])
    got = torch.stack([answer.logits for answer in answers])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert counts == {"captures": 3 * 2, "replays": 3 * 2 * 2}


@torch.no_grad()
def test_weights_that_change_between_images():
    model = tiny_model(exits=[2, 3])
    given, policy = images(32), lgvit_fast.Replay([0, 1, 2, 2] * 8)

    def batches():
        yield given[:16]
        model.backbone.blocks[0].mlp.fc1.weight.mul_(1.5)
        yield given[16:]

    running = stream(replaying(model), batches(), 4, policy=policy)
    before = model.infer(given, policy).logits[:16]
    first = [next(running) for _ in range(16)]
    graphs = dict(running._slots._graphs.steps)
    torch.testing.assert_close(torch.stack([a.logits for a in first]), before, atol=1e-4, rtol=1e-4)
    rest = list(running)
    after = model.infer(given, policy).logits
    torch.testing.assert_close(
        torch.stack([a.logits for a in rest]), after[16:], atol=1e-4, rtol=1e-4
    )
    assert not torch.allclose(before, after[:16], atol=1e-2)
    assert graphs and running._slots._graphs.steps
    assert not set(graphs.values()) & set(running._slots._graphs.steps.values())


@pytest.mark.parametrize("asked", [False, True], ids=["tried", "asked for"])
def test_a_capture_that_fails(monkeypatch, caplog, asked):
    """The second segment cannot be captured, while images wait in slots."""
    captured = []

    def capture(work, pool, side):
        captured.append(work)
        if len(captured) > 1:
            raise CaptureError("a head waits for the device")
        return work

    monkeypatch.setattr(engine_module, "capture_eager", capture)
    model, given = tiny_model(exits=[2, 3]), images(24)
    engine, policy = replaying(model), lgvit_fast.Replay([2, 1, 0] * 8)
    monkeypatch.setattr(engine, "_may_launch", not asked)  # as with graphs=None
    running = stream(engine, given.split(4), 4, order="completion", policy=policy)
    if asked:
        for _ in range(8):
            with pytest.raises(CaptureError, match="a head waits"):
                list(running)
        with pytest.raises(RuntimeError, match=r"failed 8 times in a row.*a head waits"):
            list(running)
        return
    assert_answers(running, model, given, policy)
    report = running.report()
    assert len(captured) == 2 and not report.graphs
    assert report.graphs_off == "a head waits for the device"
    assert "CUDA graphs are off: a head waits" in caplog.text
    assert "no graphs: a head waits" in str(report)


@torch.no_grad()
def test_a_replay_takes_few_operations():
    """Before the replay the ledger goes to the device, after it the ledger comes back."""
    engine, policy = replaying(tiny_model(exits=[2, 3]), 8), lgvit_fast.Confidence(1.0)
    running = stream(engine, [images(32)], 8, policy=policy)
    next(running)
    slots, (answer,) = running._slots, running._answers

    def replay():
        with record_function("replay"):
            pass

    for place, segment in enumerate(engine.segments):
        launch = partial(slots.launch, place, segment, range(8), policy, answer)
        launch()
        (key,) = (key for key in slots._graphs.steps if key[0] == place)
        slots._graphs.steps[key] = replay
        with profile(activities=[ProfilerActivity.CPU]) as found:
            launch()
        events = sorted(found.events(), key=lambda event: event.time_range.start)
        names = [event.name for event in events]
        before, after = names[: names.index("replay")], names[names.index("replay") :]
        assert 1 <= len(before) <= MOST_BEFORE and before.count("aten::copy_") == 1, before
        assert after.count("aten::copy_") == 1, after
