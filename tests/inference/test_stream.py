import dataclasses
import gc
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lgvit_fast
from lgvit_fast.inference import Engine, stream, streaming
from tests.fuzz import stream_fuzz
from tests.helpers import images, tiny_model

NUM_EXITS = 3
POOL = images(64)


@pytest.fixture(scope="module")
def model():
    return tiny_model(exits=[2, 3, 5])


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, graphs=False)


def loader(sizes, fail_after=None, error=ValueError):
    """Batches of these sizes with their numbers as targets; fails before a given batch."""
    start = 0
    for i, size in enumerate(sizes):
        if i == fail_after:
            raise error("the loader broke")
        yield POOL[start : start + size], list(range(start, start + size))
        start += size


def assert_answers(answers, model, policy, count, order="input"):
    """Every image once, and with the answer of `infer`."""
    indices = [a.index for a in answers]
    assert sorted(indices) == list(range(count))
    if order == "input":
        assert indices == list(range(count))
    assert [a.target for a in answers] == indices
    if not count:
        return
    expected = model.infer(POOL[:count], policy.part(0, count))
    assert [a.exit_index for a in answers] == expected.exit_index[indices].tolist()
    assert [a.exit_layer for a in answers] == expected.exit_layer[indices].tolist()
    assert [a.nonfinite for a in answers] == expected.nonfinite[indices].tolist()
    got = torch.stack([a.logits for a in answers])
    torch.testing.assert_close(got, expected.logits[indices], atol=1e-4, rtol=1e-4)


def test_a_copy_to_the_device_is_over_before_the_loader_is_asked_again(engine, monkeypatch):
    """From pinned memory a copy that nobody waits for reads what the loader writes there next."""

    class Copy:
        is_over = False

        def synchronize(self):
            self.is_over = True

    copies = []
    monkeypatch.setattr(streaming, "mark", lambda device: copies.append(Copy()) or copies[-1])

    def batches():
        for batch in loader([3, 2, 2]):
            assert all(copy.is_over for copy in copies)
            yield batch

    assert len(list(stream(engine, batches(), batch_size=2))) == 7
    assert len(copies) == 3


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_image_is_answered_once_with_the_answer_of_infer(model, engine, data):
    sizes = data.draw(st.lists(st.integers(0, 9), max_size=7), label="loader")
    count = sum(sizes)
    script = data.draw(st.lists(st.integers(0, NUM_EXITS), min_size=count, max_size=count))
    policy = data.draw(
        st.sampled_from([lgvit_fast.Replay(script), lgvit_fast.Patience(2),
                         lgvit_fast.Confidence(0.5), lgvit_fast.PatientConfident(1.5, 2)])
    )  # fmt: skip
    fail_after = data.draw(st.none() | st.integers(0, 7), label="fail after")
    order = data.draw(st.sampled_from(["input", "completion"]))
    if fail_after is not None and fail_after < len(sizes):
        count = sum(sizes[:fail_after])
    else:
        fail_after = None
    running = stream(
        engine,
        loader(sizes, fail_after),
        batch_size=data.draw(st.integers(1, 8), label="batch size"),
        order=order,
        policy=policy,
        max_wait=data.draw(st.sampled_from([None, 0.0, 0.001, 60.0]), label="max wait"),
        max_pending=data.draw(st.none() | st.integers(1, 40), label="max pending"),
    )
    answers = []
    if fail_after is None:
        answers.extend(running)
    else:
        with pytest.raises(ValueError, match="the loader broke"):
            for answer in running:
                answers.append(answer)
    assert list(running) == []
    assert_answers(answers, model, policy, count, order)


@settings(max_examples=12, deadline=None)
@given(
    interrupts=st.sets(st.integers(0, 60), max_size=8),
    size=st.integers(1, 8),
    order=st.sampled_from(["input", "completion"]),
)
def test_interrupts_lose_nothing(model, engine, interrupts, size, order):
    """A policy that is interrupted in the middle of a segment stands for a user's Ctrl-C."""
    calls = 0

    class Interrupted(lgvit_fast.Patience):
        def decide(self, step, state, exit_index):
            nonlocal calls
            calls += 1
            if calls in interrupts:
                raise KeyboardInterrupt
            return step

    running = stream(engine, loader([8, 8, 8]), size, order=order, policy=Interrupted(2))
    answers = []
    while True:
        try:
            answers.append(next(running))
        except KeyboardInterrupt:
            continue
        except StopIteration:
            break
    assert_answers(answers, model, lgvit_fast.Patience(2), 24, order)


def test_an_interrupted_loader_still_delivers_what_it_gave(model, engine):
    given = loader([8, 8, 8], fail_after=2, error=KeyboardInterrupt)
    running = stream(engine, given, 4, policy=lgvit_fast.Patience(2))
    answers = []
    with pytest.raises(KeyboardInterrupt):
        for answer in running:
            answers.append(answer)
    with pytest.raises(RuntimeError, match="the loader was interrupted") as caught:
        for answer in running:
            answers.append(answer)
    assert "after 16 images" in caught.value.__notes__[0]
    assert list(running) == []
    assert_answers(answers, model, lgvit_fast.Patience(2), 16)


@torch.no_grad()
def test_close_gives_the_finished_ones(model, engine):
    script = [3] + [0] * 15  # the first holds all others back
    with stream(engine, loader([16]), 4, policy=lgvit_fast.Replay(script)) as running:
        while not running._state.held:
            running._advance()
        rest = running.close()
        assert rest and all(a.index > 0 and a.exit_index == 0 for a in rest)
        assert list(running) == []
        assert running.close() == []


def test_back_pressure(engine):
    """The loader is asked only when there is room: never far ahead of the answers."""
    asked = 0

    def counting():
        nonlocal asked
        for start in range(0, 64, 4):
            asked += 4
            yield POOL[start : start + 4]

    answers = stream(engine, counting(), 4, order="completion", policy=lgvit_fast.Confidence(0.0))
    for count, _ in enumerate(answers):
        assert asked - count <= 4


@torch.no_grad()
@pytest.mark.parametrize("max_pending", [1, 8, 24])
def test_held_back_answers_are_bounded(engine, max_pending):
    script = lgvit_fast.Replay([3] + [0] * 63)
    running = stream(engine, loader([4] * 16), 4, policy=script, max_pending=max_pending)
    most = 0
    while running._advance():
        most = max(most, len(running._state.held))
    assert 0 < most <= max_pending + 8


def test_full_batches_in_the_middle_of_a_stream(engine):
    script = lgvit_fast.Replay([0, 1, 2, 3] * 16)
    running = stream(engine, loader([4] * 16), 4, policy=script, max_pending=64)
    assert len(list(running)) == 64
    report = running.report()
    assert [s.images for s in report.segments] == [64, 48, 32, 16]
    assert [s.mean_batch for s in report.segments] == [4, 4, 4, 4]
    assert report.forced == 0
    assert "mean batch" in str(report)


def test_max_wait_answers_while_the_loader_is_stuck(engine):
    """Three images of a batch of 8 are answered although the rest does not come."""
    stuck = threading.Event()

    def slow():
        yield POOL[:3]
        stuck.wait(30)
        yield POOL[3:5]

    running = stream(engine, slow(), 8, max_wait=0.01, policy=lgvit_fast.Confidence(0.0))
    assert [next(running).index for _ in range(3)] == [0, 1, 2]
    assert not stuck.is_set()
    stuck.set()
    assert [a.index for a in running] == [3, 4]


def test_reading_threads_end(engine):
    def endless():
        while True:
            yield POOL[:4]

    before = threading.active_count()
    closed = stream(engine, endless(), 4, max_wait=1.0)
    next(closed)
    closed.close()
    dropped = stream(engine, endless(), 4, max_wait=1.0)
    next(dropped)
    del dropped
    gc.collect()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() == before


def test_a_bad_batch_comes_after_the_answers_before_it(engine):
    answers = []
    with pytest.raises(ValueError, match="31 x 32") as caught:
        for answer in stream(engine, [POOL[:5], images(2, (31, 32)), POOL[:5]], 4):
            answers.append(answer.index)
    assert answers == [0, 1, 2, 3, 4]
    assert "after 5 images" in caught.value.__notes__[0]


def test_a_nan_image_is_flagged_and_alone(engine):
    batch = POOL[:6].clone()
    batch[4] = float("nan")
    answers = list(stream(engine, [batch], 4, policy=lgvit_fast.Confidence(0.0)))
    assert [a.nonfinite for a in answers] == [False] * 4 + [True, False]
    assert [a.exit_index for a in answers] == [0] * 4 + [3, 0]


def test_the_model_may_change_between_but_not_under_images():
    model = tiny_model(exits=[2, 3, 5])
    engine = Engine(model, graphs=False)
    script = lgvit_fast.Replay([0] * 4 + [0, 0, 1, 2] * 3)
    running = stream(engine, loader([4] * 4), 4, policy=script)
    for _ in range(4):
        next(running)
    with torch.no_grad():
        model.backbone.head.bias.add_(1.0)  # nobody is on the way
    next(running)
    with torch.no_grad():
        model.backbone.head.bias.add_(1.0)
    with pytest.raises(RuntimeError, match="changed while 2 images"):
        list(running)


def test_threads_share_a_stream(model, engine):
    running = stream(engine, loader([4] * 16), 4, policy=lgvit_fast.Patience(2))
    answers = []

    def work():
        for answer in running:
            answers.append(answer)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_answers(sorted(answers, key=lambda a: a.index), model, lgvit_fast.Patience(2), 64)


def test_images_of_several_sizes():
    model = tiny_model(exits=[2, 3], dynamic_img_size=True)
    batches = [images(3, size, seed=i) for i, size in enumerate([(32, 32), (48, 32), (32, 32)])]
    answers = list(stream(model, batches, 4, policy=lgvit_fast.Patience(2)))
    expected = torch.cat([model.infer(b, lgvit_fast.Patience(2)).logits for b in batches])
    got = torch.stack([a.logits for a in answers])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_targets(engine):
    plain = list(stream(engine, [POOL[:2]], 4))
    assert [a.target for a in plain] == [None, None]
    labelled = list(stream(engine, [(POOL[:2], torch.tensor([5, 6]))], 4))
    assert [int(a.target) for a in labelled] == [5, 6]
    named = list(stream(engine, [[POOL[:2], [5, 6], ["a", "b"]]], 4))
    assert [a.target for a in named] == [(5, "a"), (6, "b")]
    with pytest.raises(ValueError, match="2 images came with"):
        list(stream(engine, [(POOL[:2], [1, 2, 3])], 4))


def test_images_are_converted_to_the_models_dtype(engine, model):
    answers = list(stream(engine, [POOL[:3].double()], 4))
    assert answers[0].logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"order": "random"}, "order='random'"),
        ({"max_wait": -1.0}, "max_wait=-1.0"),
        ({"max_pending": 0}, "max_pending=0"),
        ({"policy": "sure"}, "policy='sure'"),
        ({"policy": lgvit_fast.Confidence([0.5])}, "3 exits"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_arguments(model, options, match):
    with pytest.raises(ValueError, match=match):
        stream(model, [], **options)


# ------------------------------------------------------------------- interrupts, broken loaders


@pytest.mark.parametrize(
    "case",
    [
        stream_fuzz.Case(order="input"),
        stream_fuzz.Case(order="completion", generator=True),
        stream_fuzz.Case(threaded=True, error=TimeoutError),
    ],
    ids=["list", "generator", "thread"],
)
def test_an_interrupt_at_any_bytecode_loses_nothing(case):
    """At each bytecode of the stream's code in turn; then the stream goes on."""
    assert stream_fuzz.walk(dataclasses.replace(case, sizes=(2, 1), batch_size=2)) > 1000


def test_random_interrupts_lose_nothing():
    found = stream_fuzz.run(120, seed=5)
    assert found["failures"] == 0
    assert found["interrupts"] > 100 and found["images"] > 500


@pytest.mark.parametrize("max_wait", [None, 60.0], ids=["pulled", "threaded"])
def test_an_interrupted_generator_is_no_end_of_the_data(engine, max_wait):
    broken = loader([5, 5, 5], fail_after=2, error=KeyboardInterrupt)
    running = stream(engine, broken, 4, max_wait=max_wait)
    answers, errors = [], []
    while True:
        try:
            answers.append(next(running).index)
        except StopIteration:
            break
        except BaseException as error:
            errors.append(error)
    assert answers == list(range(10))
    assert [type(error) for error in errors] == [KeyboardInterrupt, RuntimeError]
    assert "the loader was interrupted and cannot be read on" in str(errors[1])
    assert errors[1].__notes__ == ["in a stream, after 10 images"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("max_wait", [None, 0.01], ids=["pulled", "threaded"])
@pytest.mark.parametrize(
    ("item", "match"),
    [
        (None, "the loader gave None, expected images"),
        ("cat.png", "the loader gave str, expected images"),
        ((), "the loader gave tuple of nothing, expected images"),
        ([None, 1], "the loader gave list of None, int, expected images"),
        (torch.tensor(3.0), "the loader gave Tensor, expected images"),
        ((POOL[:2], 7), r"2 images came with \['int'\] targets"),
        ({"image": POOL[:2], "depth": POOL[:2]}, r"the keys \['image', 'depth'\], expected one of"),
        ({"label": [1]}, r"the keys \['label'\], expected one of 'image', 'images', 'pixel_val"),
        ({"image": POOL[:2], "label": [1]}, r"2 images came with \[1\] targets"),
    ],
    ids=str,
)
def test_wrong_items_end_in_an_error(engine, item, match, max_wait):
    running = stream(engine, [POOL[:3], item, POOL[:3]], 4, max_wait=max_wait)
    answers = []
    with pytest.raises(ValueError, match=match) as caught:
        for answer in running:
            answers.append(answer.index)
    assert answers == [0, 1, 2]
    assert caught.value.__notes__ == ["in a stream, after 3 images"]
    assert list(running) == []


@pytest.mark.parametrize("names", [("image", "label"), ("pixel_values", "labels")])
def test_dict_batches(engine, model, names):
    batches = [dict(zip(names, batch, strict=True)) for batch in loader([5, 3])]
    answers = list(stream(engine, batches, 4, policy=lgvit_fast.Patience(2)))
    assert_answers(answers, model, lgvit_fast.Patience(2), 8)
    assert [a.target for a in stream(engine, [{"images": POOL[:2]}], 4)] == [None, None]


@pytest.mark.timeout(60)
def test_a_batch_that_always_fails_ends_the_stream(engine):
    class Failing(lgvit_fast.Confidence):
        def decide(self, step, state, exit_index):
            if exit_index == 1:
                raise OSError("no answer")
            every_other = state[:, 0] < torch.arange(len(state)) % 2
            return step if exit_index else step._replace(leave=every_other)

    running = stream(engine, loader([4, 4, 4]), 4, order="completion", policy=Failing(0.5))
    answers, errors = [], []
    while True:
        try:
            answers.append(next(running).index)
        except StopIteration:
            break
        except Exception as error:
            errors.append(error)
    assert len(errors) <= 10
    assert all(isinstance(error, OSError) for error in errors[:-1])
    given_up = 12 - len(answers)
    assert 0 < given_up <= 12
    assert f"8 times in a row and stops: {len(answers)} images were answered" in str(errors[-1])
    assert "OSError: no answer" in str(errors[-1])


@pytest.mark.parametrize("max_wait", [None, 60.0], ids=["pulled", "threaded"])
def test_a_loader_that_cannot_be_iterated(engine, max_wait):
    running = stream(engine, 3, 4, max_wait=max_wait)
    errors = []
    for _ in range(20):
        try:
            next(running)
        except StopIteration:
            break
        except (TypeError, RuntimeError) as error:
            errors.append(error)
    else:
        pytest.fail("it does not end")
    assert "'int' object is not iterable" in str(errors[0])
