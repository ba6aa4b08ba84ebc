"""Exits learnt from the model's own answers: no labels, the backbone untouched, exact resume."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

import lgvit_fast
from lgvit_fast.checkpoints.files import load_weights, save_weights
from lgvit_fast.data import BadImageError
from lgvit_fast.training import DistillConfig, loop, run_distillation, token_cache
from lgvit_fast.training.config import distillation_stage
from lgvit_fast.training.distillation import FEWEST_IMAGES
from lgvit_fast.training.tokens import all_exits, ask_exits, run_backbone
from lgvit_fast.training.warm_start import warm_start
from tests.helpers import tiny_model, tiny_swin, tiny_vit

SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """64 pictures of coloured stripes at two depths, no classes."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(64):
        place = root / "deeper" if number % 2 else root
        place.mkdir(exist_ok=True)
        period, colour = rng.integers(2, 12), rng.integers(0, 256, 3)
        stripes = (np.add.outer(np.arange(40), number * np.arange(40)) // period) % 2
        pixels = (stripes[..., None] * colour + rng.integers(0, 40, (40, 40, 3))).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")
    return root


def teacher(seed=0):
    """A timm model whose answers depend on the image, on a backbone that is no noise to its head."""
    model = tiny_vit(seed=seed, num_classes=5)
    with torch.no_grad():
        model.head.weight.normal_(0, 1.0, generator=torch.Generator().manual_seed(seed))
        model.head.bias.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
    return model


QUICK = {
    "epochs": 2,
    "batch_size": 16,
    "val_fraction": 0.25,
    "workers": 0,
    "device": "cpu",
    "progress": False,
    "tensorboard": False,
    "save_every": 2,
    "log_every": 1,
}


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def agreement(model, folder, count=64):
    """Mean over exits of how often they answer as the full model, on the pictures."""
    spec = lgvit_fast.data.InputSpec.of(model.backbone)
    data = lgvit_fast.data.open_dataset(str(folder))
    source = lgvit_fast.data.ImageSource(data, lgvit_fast.data.eval_transform(spec), labelled=False)
    out = model.forward_exits(source.__getitems__([(0, i) for i in range(count)]).images)
    same = [(logits.argmax(-1) == out.final.argmax(-1)).float().mean() for logits in out.exits]
    return float(torch.stack(same).mean())


def test_backbone_untouched_and_agreement_rises(folder, tmp_path):
    backbone = teacher()
    before = weights_of(backbone)
    fresh = agreement(lgvit_fast.LGViT(backbone).eval(), folder)
    model = lgvit_fast.distill(
        backbone, folder, output=tmp_path / "out", **{**QUICK, "epochs": 4, "lr": 3e-3}
    )
    assert not model.training
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert agreement(model, folder) > max(0.75, fresh + 0.2)
    saved = lgvit_fast.LGViT.from_pretrained(tmp_path / "out")
    assert saved.policy == lgvit_fast.Confidence()
    theirs = weights_of(model)
    assert all(torch.equal(value, theirs[name]) for name, value in saved.state_dict().items())
    assert not saved.untrained_exits
    rows = [json.loads(r) for r in (tmp_path / "out/run/stage2/metrics.jsonl").open()]
    first, last = ([r for r in rows if r["kind"] == "validation"][place] for place in (0, -1))
    assert (first["epoch"], first["update"], last["epoch"]) == (0, 0, 4)
    assert sum(last["exit_agreement"]) >= sum(first["exit_agreement"])
    assert "final_accuracy" not in last
    assert all(row["ce"] == 0 for row in rows if row["kind"] == "train")


def config(folder, output, **fields):
    stage2 = distillation_stage(epochs=fields.pop("epochs", 2), lr=fields.pop("lr", 1e-3))
    quick = {name: value for name, value in QUICK.items() if name != "epochs"}
    return DistillConfig(
        **{"data": str(folder), **quick, **fields},
        output=str(output / "run"),
        stage2=stage2,
    )


HEADS = ["lph_full", "lph_light", "gah_2", "gah_3"]


def fresh():
    """A model whose exits were never trained, always the same."""
    torch.manual_seed(0)
    return lgvit_fast.LGViT(teacher(), exits=[1, 2, 3, 4], heads=HEADS).eval()


def run(made):
    """A whole run of a config."""
    return run_distillation(made, fresh())


def same_weights(one, other):
    """Largest difference of two saved models' weights; they have the same names."""
    one, other = (load_weights(Path(path) / "model.safetensors") for path in (one, other))
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


# ------------------------------------------------------------------------------------- the parts

MODELS = {
    "lgvit": lambda: lgvit_fast.LGViT(teacher(), exits=4),
    "average pooling": lambda: lgvit_fast.LGViT(teacher(), exits=4, pool="average"),
    **{
        heads: lambda heads=heads: lgvit_fast.LGViT(teacher(), exits=3, heads=heads)
        for heads in ("linear", "vit_ee", "conv", "attention", "mlp")
    },
    "deit": lambda: tiny_model("deit_tiny_distilled_patch16_224", exits=3),
    "swin": lambda: tiny_swin(exits=4),
}


def pictures(model, count, seed=0):
    size = lgvit_fast.data.InputSpec.of(model.backbone).size
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, size, mode="bilinear")


@pytest.mark.parametrize("name", MODELS)
def test_asking_kept_tokens_is_asking_images(name):
    model = MODELS[name]().eval()
    images = pictures(model, 3)
    whole = model.forward_exits(images, features=True)
    kept = run_backbone(model, images)
    parts = ask_exits(model, kept)
    assert torch.equal(parts.final, whole.final)
    assert torch.equal(parts.last_tokens, whole.last_tokens)
    for one, other in zip(
        (*parts.exits, *parts.features), (*whole.exits, *whole.features), strict=True
    ):
        assert torch.equal(one, other)
    assert torch.equal(all_exits(model, kept).exits[0], all_exits(model, images).exits[0])
    if name == "lgvit":  # a global head reads fewer patches
        assert kept.exits[-1].shape[1] < kept.exits[0].shape[1]


@pytest.mark.parametrize("name", MODELS)
def test_a_warm_start_agrees_at_every_exit(name):
    """On images that the fit has not seen; and only exits that were never trained change."""
    model = MODELS[name]()
    with torch.no_grad():
        for head in model.exit_heads:
            head.reset_classifiers(model.num_classes)
    model.eval()
    backbone = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    images = pictures(model, 64, seed=1)

    def distance():
        """Of the exits' logits to the model's, over that of a constant answer."""
        with torch.no_grad():
            out = model.forward_exits(images)
        spread = (out.final - out.final.mean(0)).square().mean()
        return [float((x - out.final).square().mean() / spread) for x in out.exits]

    cold = distance()
    parts = pictures(model, 512, seed=2).split(128)
    fitted = warm_start(model, (run_backbone(model, part, last=False) for part in parts))
    assert fitted == tuple(spec.layer for spec in model.exits)
    warm = distance()
    assert all(after < min(before, 0.9) for after, before in zip(warm, cold, strict=True)), (
        warm,
        cold,
    )
    assert all(torch.equal(v, backbone[k]) for k, v in model.backbone.state_dict().items())
    before = weights_of(model)
    assert warm_start(model, iter(())) == ()  # all are trained now
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_warm_start_needs_images_and_finite_logits():
    model = lgvit_fast.LGViT(teacher(), exits=2).eval()
    with pytest.raises(ValueError, match="no image to fit"):
        warm_start(model, iter(()))
    with torch.no_grad():
        model.backbone.head.bias[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinities"):
        warm_start(model, [run_backbone(model, pictures(model, 2))])


# ---------------------------------------------------------------------------- images of any kind


class Items:
    """A data set whose labels nobody can read."""

    class Secret:
        def __getattr__(self, name):
            raise AssertionError("the label was looked at")

        def __int__(self):
            raise AssertionError("the label was read")

    def __init__(self, folder, kind):
        self.files, self.kind = sorted(Path(folder).rglob("*.png")), kind

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        image = Image.open(self.files[index]).convert("RGB")
        if self.kind == "tensors":
            pixels = np.asarray(image.resize((SIZE, SIZE)), dtype=np.float32)
            return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)
        return image if self.kind == "images" else (image, self.Secret())


@pytest.mark.parametrize("kind", ["images", "labelled", "tensors", "loader"])
def test_data_sets_and_loaders(kind, folder, tmp_path):
    data = Items(folder, "labelled" if kind == "loader" else kind)
    if kind == "loader":
        data = DataLoader(data, batch_size=7)
    model = lgvit_fast.distill(teacher(), data, output=tmp_path, exits=2, **{**QUICK, "epochs": 1})
    assert not model.untrained_exits


def test_classes_change_nothing(folder, tmp_path):
    """The same pictures in the same order, all in one folder or in two with names of classes."""
    for name, place in (("one", lambda i: ""), ("two", lambda i: "ab"[i >= 32])):
        for number, file in enumerate(sorted(folder.rglob("*.png"))):
            target = tmp_path / name / place(number) / f"{number:03}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
        run(config(tmp_path / name, tmp_path / f"{name}-out", epochs=1))
    assert same_weights(tmp_path / "one-out", tmp_path / "two-out") == 0


def test_a_stream_is_refused(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    for data in (Stream(), DataLoader(Stream()), 7):
        with pytest.raises(ValueError, match=r"images is a .*, expected a path, a data set"):
            lgvit_fast.distill(teacher(), data, output=tmp_path)


# ------------------------------------------------------------------------- the cache, and resuming


def test_cached_tokens_train_the_same_exits(folder, tmp_path):
    """Without augmentation; float16 is all that differs."""
    outputs = []
    for name, cache in (("images", None), ("cache", 10**8)):
        fields = {"augment": False, "epochs": 3, "cache": cache}
        outputs.append(run(config(folder, tmp_path / name, **fields)))
        assert not (tmp_path / name / "run" / "tokens").exists()
    images = pictures(outputs[0].model, 16)
    one, other = (torch.stack(done.model.forward_exits(images).exits) for done in outputs)
    assert 0 < (one - other).abs().max() < 0.02 * one.std()
    assert outputs[0].agreement == pytest.approx(outputs[1].agreement, abs=0.1)


@pytest.mark.parametrize("cache", [None, 10**8], ids=["images", "cache"])
def test_an_interrupted_run_goes_on_exactly(cache, folder, tmp_path, monkeypatch):
    fields = {"cache": cache, "epochs": 2}
    run(config(folder, tmp_path / "whole", **fields))
    original = loop._StageRun._update

    def stop(self, batches, count):
        if self.progress.update == 4:
            raise KeyboardInterrupt
        return original(self, batches, count)

    stopped = config(folder, tmp_path / "stopped", **fields)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(loop._StageRun, "_update", stop)
        run(stopped)
    with pytest.raises(FileExistsError, match="holds a run; resume it"):
        run(stopped)
    built = []
    monkeypatch.setattr(token_cache, "_build", lambda *args: built.append(args))
    run(replace(stopped, resume=True))
    assert not built  # what the first attempt had computed was taken
    assert same_weights(tmp_path / "whole", tmp_path / "stopped") == 0
    run(replace(stopped, resume=True))  # a finished one: nothing to compute
    assert not built


@pytest.mark.parametrize("cache", [None, 10**8], ids=["images", "cache"])
def test_in_bfloat16(cache, folder, tmp_path):
    done = run(config(folder, tmp_path, epochs=1, cache=cache, precision="bf16"))
    assert not done.model.untrained_exits


def test_a_resumed_run_wants_the_same_backbone(folder, tmp_path):
    stopped = config(folder, tmp_path / "out", epochs=1)
    run(stopped)
    other = lgvit_fast.LGViT(teacher(seed=1), exits=[1, 2, 3, 4], heads=HEADS)
    with pytest.raises(ValueError, match=r"cannot resume .*, it differs in backbone: "):
        run_distillation(replace(stopped, resume=True, init=None), other)


@pytest.fixture
def kept(folder, tmp_path):
    """A finished run whose cache was kept, and its config."""
    made = config(folder, tmp_path / "first", epochs=1, cache=10**8)
    made.cache_folder = str(tmp_path / "tokens")
    run(made)
    return made


def again(made, name, **fields):
    return replace(made, output=str(Path(made.output).parents[1] / name / "run"), **fields)


def test_a_kept_cache_serves_the_next_run(kept, monkeypatch):
    monkeypatch.setattr(token_cache, "_build", None)  # cannot be called
    run(again(kept, "second"))
    first, second = (Path(kept.output).parents[1] / name for name in ("first", "second"))
    assert same_weights(first, second) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("weights", "is a cache of something else: backbone: "),
        ("exits", "is a cache of something else: exits: "),
        ("images", "is a cache of something else: images in"),
        ("mirror", "is a cache of something else: variants: 2 in the checkpoint, now 1"),
    ],
)
def test_a_cache_of_something_else_is_refused(change, message, kept, tmp_path, folder):
    model, fields = lgvit_fast.LGViT(teacher(), exits=[1, 2, 3, 4], heads=HEADS), {}
    if change == "weights":
        with torch.no_grad():
            model.backbone.blocks[2].mlp.fc1.bias[3] += 1e-3
    elif change == "exits":
        model = lgvit_fast.LGViT(teacher(), exits=[1, 2], heads=HEADS[:2])
    elif change == "images":
        for number, file in enumerate(sorted(folder.rglob("*.png"))):
            (tmp_path / "others").mkdir(exist_ok=True)
            (tmp_path / "others" / f"{number}.png").write_bytes(file.read_bytes())
        fields["data"] = str(tmp_path / "others")
    else:
        fields["hflip"] = 0.0
    with pytest.raises(ValueError, match=message):
        run_distillation(again(kept, "second", init=None, **fields), model)


@pytest.mark.parametrize("damage", ["torn", "no facts", "nonsense"])
def test_a_cache_that_is_not_whole_is_made_anew(damage, kept):
    part = Path(kept.cache_folder) / "training"
    if damage == "torn":
        (part / "rows.bin").write_bytes((part / "rows.bin").read_bytes()[:-1])
    elif damage == "no facts":
        (part / "cache.json").unlink()
    else:
        (part / "cache.json").write_text('{"format": "lgvit-fast token cache 1"}')
    run(again(kept, "second"))
    first, second = (Path(kept.output).parents[1] / name for name in ("first", "second"))
    assert same_weights(first, second) == 0


def test_a_damaged_row_is_named(kept):
    rows = Path(kept.cache_folder) / "training" / "rows.bin"
    data = np.fromfile(rows, np.uint8)
    data[::1000] ^= 1
    data.tofile(rows)
    with pytest.raises(
        ValueError, match=r"is damaged: row \d+ does not match its checksum; remove"
    ):
        run(again(kept, "second"))


def test_a_cache_that_is_too_small(folder, tmp_path):
    with pytest.raises(ValueError, match=r"cache is 1000 bytes, but .* take \d+ rows of \d+ bytes"):
        run(config(folder, tmp_path, cache=1000))


def test_tokens_beyond_float16(folder, tmp_path):
    backbone = teacher()
    with torch.no_grad():
        backbone.blocks[1].mlp.fc2.bias[0] = 1e6
    with pytest.raises(ValueError, match="beyond the range of float16"):
        lgvit_fast.distill(backbone, folder, output=tmp_path, cache=10**8, **QUICK)


# --------------------------------------------------------------------------------- the policy


def test_the_policy_is_calibrated_on_images_that_chose_nothing(folder, tmp_path):
    made = config(folder, tmp_path, epochs=1, val_fraction=0.5, min_agreement=50.0)
    done = run(made)
    assert done.calibration.certificate.goal == "min_agreement"
    assert done.images + done.calibration.certificate.images <= 32
    model = lgvit_fast.LGViT.from_pretrained(tmp_path)
    assert model.certificate == done.model.certificate
    assert model.policy == done.calibration.policy


def test_too_few_images_to_certify_is_said_before_training(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"min_agreement=99 cannot be shown .*; 16 images are held"
    ):
        run(config(folder, tmp_path, min_agreement=99.0))
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------ bad input


def test_too_few_pictures(folder, tmp_path):
    (tmp_path / "ten").mkdir()
    with pytest.raises(ValueError, match="no images in"):
        run(config(tmp_path / "ten", tmp_path))
    for number, file in enumerate(sorted(folder.rglob("*.png"))[:10]):
        (tmp_path / "ten" / f"{number}.png").write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=f"images are 10 in all, .* at least {FEWEST_IMAGES}"):
        run(config(tmp_path / "ten", tmp_path))


@pytest.mark.parametrize("cache", [None, 10**8], ids=["images", "cache"])
def test_a_picture_smaller_than_a_patch(cache, folder, tmp_path):
    for number, file in enumerate(sorted(folder.rglob("*.png"))):
        (tmp_path / "small").mkdir(exist_ok=True)
        (tmp_path / "small" / f"{number}.png").write_bytes(file.read_bytes())
    Image.new("RGB", (40, 7)).save(tmp_path / "small" / "tiny.png")
    fields = {"epochs": 1, "cache": cache, "augment": False}
    with pytest.raises(BadImageError, match=r"tiny.png: .* 7 x 40 pixels, expected at least 8 x 8"):
        run(config(tmp_path / "small", tmp_path / "a", **fields))
    done = run(config(tmp_path / "small", tmp_path / "b", skip_bad_images=True, **fields))
    assert done.images in (15, 16)


def test_an_untrained_classifier_is_warned_of(folder, tmp_path, caplog):
    for bias, warned in ((0.0, True), (0.5, False)):
        backbone = tiny_vit()
        torch.nn.init.constant_(backbone.head.bias, bias)
        caplog.clear()
        options = {**QUICK, "epochs": 1, "exits": 2}
        lgvit_fast.distill(backbone, folder, output=tmp_path / str(bias), **options)
        assert ("classifier seems untrained" in caplog.text) is warned


def test_classifiers_that_do_not_fit(folder, tmp_path):
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 2}
    weights = teacher().state_dict()

    def distil(**changes):
        tensors = {k: v for k, v in {**weights, **changes}.items() if v is not None}
        save_weights(tmp_path / "w.safetensors", tensors)
        lgvit_fast.distill(
            "vit_tiny_patch16_224",
            folder,
            weights=tmp_path / "w.safetensors",
            model_kwargs=arguments,
            output=tmp_path / "out",
            **{**QUICK, "epochs": 1, "exits": 2},
        )

    name = "vit_tiny_patch16_224"
    with pytest.raises(ValueError, match=f"does not fit timm's {name}: .*head.bias"):
        distil(**{"head.bias": torch.zeros(4)})
    with pytest.raises(ValueError, match=f"does not fit timm's {name}: .*head.weight"):
        distil(**{"head.weight": torch.zeros(5, 16)})
    with pytest.raises(ValueError, match="has no classifier"):
        distil(**{"head.weight": None, "head.bias": None})
    distil()


def test_what_makes_no_sense(folder, tmp_path):
    with pytest.raises(ValueError, match="model is a int, expected a model"):
        lgvit_fast.distill(3, folder, output=tmp_path)
    with pytest.raises(ValueError, match="weights is given, but model is a model"):
        lgvit_fast.distill(teacher(), folder, output=tmp_path, weights="w.safetensors")
    with pytest.raises(ValueError, match="has its own: leave them out"):
        lgvit_fast.distill(tiny_model(exits=2), folder, output=tmp_path, exits=3)
    for fields in ({"mixup": 0.2}, {"recipe": "lgvit"}, {"stage": "1"}, {"cache": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(fields))} is "):
            DistillConfig(**fields)
    with pytest.raises(ValueError, match="cache_folder is given, but not cache"):
        DistillConfig(cache_folder="tokens")
