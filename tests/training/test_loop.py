"""Whole runs: what each stage changes and leaves alone, what it writes, what stops it."""

import json
import logging
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import lgvit_fast
from lgvit_fast.checkpoints.files import load_weights
from lgvit_fast.data import BadImage, BadImageError, Batch, Batches, Digits, InputSpec, Loader
from lgvit_fast.training import loop, train, validate
from lgvit_fast.training.process import Process
from lgvit_fast.training.stages import Stage2

ONE_EPOCH = {"stage1": {"epochs": 1, "warmup_epochs": 0}, "stage2": {"epochs": 1}}


@pytest.fixture
def image_folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 256, (16, 16), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def on_folder(small_config, image_folder):
    """A run of one epoch on class folders, validated on the same."""
    fields = {"data": str(image_folder), "val_data": str(image_folder), "batch_size": 4}
    return lambda **more: small_config(**{**ONE_EPOCH, **fields, **more})


def weights_of(folder):
    tensors = load_weights(Path(folder) / "model.safetensors")
    heads = {name for name in tensors if name.startswith("exit_heads.")}
    return tensors, heads


# ------------------------------------------------------------------------------ what it learns


def test_both_stages_learn(small_config):
    config = small_config(
        stage="both",
        batch_size=64,
        save_every=0,
        stage1={"epochs": 6, "lr": 3e-3, "warmup_epochs": 1},
        stage2={"epochs": 3, "lr": 3e-3},
    )
    config.model_kwargs.update(proj_drop_rate=0.0, drop_path_rate=0.0)
    result = train(config)
    stage1, stage2 = result.stages["stage1"], result.stages["stage2"]
    assert stage1.accuracy.final > 0.5  # one class in ten by chance
    assert sum(stage2.accuracy.exits) > sum(stage1.accuracy.exits)
    assert stage2.accuracy.final == stage1.accuracy.final

    spec = InputSpec.of(result.model.backbone)
    source = Digits("validation", spec)
    loader = Loader(source, Batches(len(source), 100, training=False))
    assert validate(result.model, loader, torch.device("cpu")) == stage2.accuracy
    saved = lgvit_fast.LGViT.from_pretrained(stage2.best)
    images = source.__getitems__([(0, 0), (0, 1)]).images
    assert torch.equal(saved(images), result.model(images))


@pytest.mark.parametrize("ema", [None, 0.9], ids=["plain", "ema"])
def test_stage2_leaves_the_backbone_bit_identical(ema, small_config):
    config = small_config(stage="both", **ONE_EPOCH)
    config.stage2.ema_decay = ema
    result = train(config)
    before, heads = weights_of(result.stages["stage1"].best)
    after, _ = weights_of(result.stages["stage2"].best)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert changed <= heads
    assert {name for name in heads if name.endswith("weight")} <= changed


def test_a_frozen_backbone_is_in_eval_mode_without_gradients(small_config):
    config = small_config()
    model = lgvit_fast.create_model(
        config.model, exits=config.exits, num_classes=10, **config.model_kwargs
    ).train()
    objective = Stage2(model, config.stage2).train()
    assert not any(module.training for module in model.backbone.modules())
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    images = torch.randn(4, 1, 16, 16)
    loss, _ = objective(images, torch.arange(4), 0)
    loss.backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(parameter.grad is not None for parameter in model.exit_heads.parameters())
    # dropout and stochastic depth are off: the teacher says the same every time
    finals = [model.forward_exits(images).final for _ in range(2)]
    assert torch.equal(*finals)


def test_the_published_options_run(small_config):
    config = small_config(stage="both", **ONE_EPOCH)
    config.stage2.published = True
    assert "stage2" in train(config).stages


def test_ones_own_model_in_a_few_lines(small_config):
    backbone = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=3, num_heads=2
    )
    model = lgvit_fast.LGViT(backbone, exits=[2], num_classes=10)
    result = train(small_config(stage="both", **ONE_EPOCH), model)
    assert result.model is model
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())  # no longer frozen


@pytest.mark.parametrize(
    "fields",
    [
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"stage1": {"epochs": 1, "warmup_epochs": 0, "accumulate": 2}},
        {"stage1": {"epochs": 1, "warmup_epochs": 0, "strategy": "distillation"}},
        {"stage1": {"epochs": 1, "warmup_epochs": 0, "opt": "sgd", "sched": "poly"}},
        {"mixup": 0.8, "cutmix": 1.0},
        {"stage1": {"epochs": 1, "warmup_epochs": 0, "sched": "none"}},
        {"augment": False},
    ],
    ids=lambda fields: ", ".join(str(value) for value in fields.values())[-40:],
)
def test_options_run(fields, small_config):
    result = train(small_config(**{"stage1": ONE_EPOCH["stage1"], **fields}))
    assert 0 <= result.stages["stage1"].accuracy.final <= 1


def test_accumulated_batches_equal_one_large_batch(small_config, metrics):
    """Without BatchNorm in the loss (even updates are the final classifier alone)."""
    rows = []
    for name, size, accumulate in (("one", 256, 1), ("two", 128, 2)):
        config = small_config(
            name,
            batch_size=size,
            stage1={"epochs": 1, "warmup_epochs": 0, "accumulate": accumulate},
        )
        config.model_kwargs.update(proj_drop_rate=0.0, drop_path_rate=0.0)
        train(config)
        rows.append(metrics(Path(config.output) / "stage1")[0])
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)


# ------------------------------------------------------------------------------ what it writes


def test_files_of_a_run(small_config, metrics):
    config = small_config(stage="both", tensorboard=True, **ONE_EPOCH)
    train(config)
    output = Path(config.output)
    assert json.loads((output / "config.json").read_text()) == config.to_dict()
    for stage in ("stage1", "stage2"):
        kinds = [row["kind"] for row in metrics(output / stage)]
        assert kinds == ["train"] * 5 + ["validation"]
        assert list((output / stage / "tensorboard").glob("events*"))
        assert not list(output.rglob("*.pt")) + list(output.rglob("*.pkl"))
    first, last = metrics(output / "stage2")[0], metrics(output / "stage2")[-1]
    assert {"loss", "ce", "kd", "hete", "homo_local", "homo_global", "lr", "epoch"} <= first.keys()
    assert len(last["exit_accuracy"]) == 3


def test_progress_shows_loss_throughput_and_time_left(small_config, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train(small_config(progress=True, **ONE_EPOCH))
    shown = capsys.readouterr().err
    assert "images/s" in shown
    assert "loss" in shown
    assert "update/s" in shown
    assert "epoch 1: final 0." in shown


# -------------------------------------------------------------------- where stage 2 starts from


def test_stage2_without_stage1(small_config):
    with pytest.raises(FileNotFoundError, match="starts from a stage 1 model, and there is none"):
        train(small_config(stage="2"))


@pytest.mark.parametrize("source", ["best", loop.CHECKPOINT], ids=["model folder", "checkpoint"])
def test_stage2_takes_a_stage1_model_or_checkpoint(source, small_config):
    first = small_config("first", **ONE_EPOCH)
    expected = train(first).stages["stage1"].accuracy.final
    origin = str(Path(first.output) / "stage1" / source)
    result = train(small_config("second", stage="2", stage1_from=origin, **ONE_EPOCH))
    assert result.stages["stage2"].accuracy.final == expected


@pytest.mark.parametrize("source", ["best", loop.CHECKPOINT], ids=["model folder", "checkpoint"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exits": [1, 2]}, r"holds another model: .*exits: "),
        ({"num_classes": 12}, r"num_classes: 10 in the checkpoint, now 12"),
        ({"model": "vit_small_patch16_224"}, r"backbone.name: 'vit_tiny_patch16_224' in the check"),
    ],
    ids=["exits", "classes", "backbone"],
)
def test_stage2_refuses_another_model(fields, message, source, small_config):
    first = small_config("first", **ONE_EPOCH)
    train(first)
    origin = str(Path(first.output) / "stage1" / source)
    with pytest.raises(ValueError, match=message):
        train(small_config("second", stage="2", stage1_from=origin, **{**ONE_EPOCH, **fields}))


def test_stage2_refuses_a_stage2_checkpoint(small_config):
    first = small_config("first", stage="both", **ONE_EPOCH)
    train(first)
    origin = str(Path(first.output) / "stage2" / loop.CHECKPOINT)
    with pytest.raises(ValueError, match="is a checkpoint of stage2, not of stage1"):
        train(small_config("second", stage="2", stage1_from=origin, **ONE_EPOCH))


# --------------------------------------------------------------------------------- what stops it


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_stops_training_with_its_name(workers, on_folder, image_folder):
    bad = image_folder / "a" / "3.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(BadImageError, match=rf"cannot read {bad}: "):
        train(on_folder(workers=workers))


def test_bad_images_can_be_skipped_and_are_counted(on_folder, image_folder, caplog):
    (image_folder / "b" / "5.png").write_bytes(b"GIF89a?")
    config = on_folder(skip_bad_images=True, batch_size=24)
    with caplog.at_level(logging.WARNING):
        result = train(config)
    assert result.stages["stage1"].bad_images == 1
    assert "5.png" in caplog.text
    assert "stage1 left out 1 unreadable images" in caplog.text


def test_no_readable_image_at_all_stops(on_folder, image_folder):
    for path in image_folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(BadImageError, match="no batch of epoch 1 holds a readable image"):
        train(on_folder(skip_bad_images=True))


def test_no_readable_validation_image_stops(on_folder, image_folder, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "0.png").write_bytes(b"")
    with pytest.raises(BadImageError, match="no validation image can be read; the first: "):
        train(on_folder(skip_bad_images=True, val_data=str(tmp_path / "val")))


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_batches_without_a_readable_image_are_left_out(accumulate, on_folder, image_folder):
    """23 of 24 images are bad: of six batches of four, five are empty and one holds one image."""
    for path in sorted(image_folder.rglob("*.png"))[1:]:
        path.write_bytes(b"")
    stage = {"epochs": 2, "warmup_epochs": 0, "accumulate": accumulate}
    result = train(on_folder(skip_bad_images=True, stage1=stage, mixup=0.8, cutmix=1.0))
    assert result.stages["stage1"].bad_images == 46
    assert all(tensor.isfinite().all() for tensor in result.model.state_dict().values())


def test_an_empty_batch_changes_nothing_of_an_accumulated_update(small_config, monkeypatch):
    """The update is that of the batches that hold images, wherever the empty one stands."""
    weights = []
    for empty in (None, 0, 1, 2):
        asked = iter(range(1000))

        class Source(Digits):
            def __getitems__(self, keys):
                batch = super().__getitems__(keys)
                if self.augment and next(asked) == empty:  # noqa: B023
                    return Batch(torch.empty(0), batch.targets[:0], [BadImage("x.png", "bad")])
                return Batch(self.images[:128].repeat(1, 1, 2, 2), self.targets[:128], [])

        monkeypatch.setattr("lgvit_fast.training.datasets.Digits", Source)
        config = small_config(
            f"without {empty}",
            skip_bad_images=True,
            batch_size=450,
            stage1={"epochs": 1, "warmup_epochs": 0, "accumulate": 3, "opt": "sgd", "lr": 1e-2},
        )
        config.model_kwargs.update(proj_drop_rate=0.0, drop_path_rate=0.0)
        train(config)
        path = Path(config.output) / "stage1" / "best" / "model.safetensors"
        weights.append(load_weights(path)["head.weight"])
    assert len(Source("train", InputSpec(1, (16, 16), (0.5,), (0.5,)))) // 450 == 3
    for changed in weights[1:]:
        torch.testing.assert_close(changed, weights[0], rtol=1e-4, atol=1e-6)


def test_mixup_of_one_image_is_that_image(small_config):
    config = small_config(mixup=0.8, cutmix=1.0)
    model = lgvit_fast.create_model(
        config.model, exits=config.exits, num_classes=10, **config.model_kwargs
    )
    source = Digits("train", InputSpec.of(model.backbone))
    run = loop._StageRun("stage1", model, (source, source), config, Process.start("cpu"))
    for count in (1, 3, 4):
        images, targets = torch.randn(count, 1, 16, 16), torch.arange(count)
        mixed, soft = run._mix(images.clone(), targets)
        assert mixed.shape == images.shape and soft.shape == (count, 10)
        torch.testing.assert_close(soft.sum(1), torch.ones(count))
    one, soft = run._mix(images[:1].clone(), targets[:1])
    torch.testing.assert_close(one, images[:1])
    assert int(soft.argmax()) == 0


def test_a_loss_that_is_not_finite_stops(small_config):
    config = small_config(stage1={"epochs": 1, "warmup_epochs": 0, "lr": 1e30, "clip_grad": None})
    with pytest.raises(FloatingPointError, match=r"the loss is nan after \d updates of stage1"):
        train(config)


def test_too_few_classes(small_config):
    with pytest.raises(ValueError, match="the model has 7 classes, the images 10"):
        train(small_config(num_classes=7))


def test_workers_change_no_result(on_folder, metrics):
    runs = [on_folder(output=str(workers), workers=workers) for workers in (0, 2)]
    for config in runs:
        train(config)
    left, right = (metrics(Path(config.output) / "stage1") for config in runs)
    assert left == right
    assert replace(runs[0], output="", workers=9) == replace(runs[1], output="", workers=9)


DISTRIBUTED = """
import sys
import torch
from lgvit_fast.training import Stage1Config, TrainConfig, run

torch.set_num_threads(1)
config = TrainConfig(
    data=sys.argv[1], val_data=sys.argv[1], output=sys.argv[2], model="vit_tiny_patch16_224",
    model_kwargs={"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
    exits=[1], batch_size=1, workers=0, tensorboard=False, progress=False, device="cpu", stage="1",
    skip_bad_images=True, stage1=Stage1Config(epochs=1, warmup_epochs=0, accumulate=2),
)
train_stage = run.train_stage


def compare(name, model, *more):
    # the weights as training left them: afterwards every process loads the best ones
    before = model.backbone.head.weight.detach().clone()
    result = train_stage(name, model, *more)
    sums = torch.stack([p.detach().double().sum() for p in model.parameters()])
    seen = [torch.zeros_like(sums) for _ in range(2)]
    torch.distributed.all_gather(seen, sums)
    trained = not torch.equal(before, model.backbone.head.weight)
    print("SAME" if trained and torch.equal(*seen) else "DIFFERENT", flush=True)
    return result


run.train_stage = compare
run.train(config)
"""


@pytest.mark.timeout(120)
def test_processes_stay_in_step_when_one_has_no_image(image_folder, tmp_path):
    """Half of the images are bad, so that at batch 1 one process or the other often has none."""
    for path in sorted(image_folder.rglob("*.png"))[::2]:
        path.write_bytes(b"")
    script = tmp_path / "run.py"
    script.write_text(DISTRIBUTED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(image_folder), str(tmp_path / "run")],
            env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        outputs = [process.communicate(timeout=100) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (out, err) in zip(running, outputs, strict=True):
        assert process.returncode == 0, err[-2000:]
        assert "SAME" in out
