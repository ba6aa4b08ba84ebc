"""A report as one HTML page: no network, no script or style but its own, every name escaped."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from string import Template

from PIL import Image

from lgvit_fast.clock import Spread
from lgvit_fast.evaluation.report.charts import exits_chart, speed_chart, tradeoff_chart
from lgvit_fast.evaluation.report.make import Report, Sample
from lgvit_fast.evaluation.report.rows import ENGINES, Row
from lgvit_fast.evaluation.report.verdict import signed
from lgvit_fast.text import printable

__all__ = ["page"]

_PICTURE = 96  # pixels, of the longer side


def page(report: Report) -> str:
    """The page, to be written as UTF-8."""
    here = files(__package__)
    style, script = (here.joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    images = len(report.recording)
    sizes = list(dict.fromkeys(size for row in report.rows for size in row.ms))
    data = f"{images:,} images of {report.data}" if report.data else f"{images:,} images"
    parts = {
        "style": style,
        "script": script,
        "style_hash": _hash(style),
        "script_hash": _hash(script),
        "title": _text(f"Early exit or not: {report.name}"),
        "name": _text(report.name),
        "subtitle": _text(f"{data}, {report.recording.num_classes} classes"),
        "verdicts": "".join(
            f'<div class="verdict{" use" if verdict.use_early_exit else ""}">'
            f"<b>Batch {verdict.batch_size}</b><h3>{_prose(verdict.headline)}</h3>"
            f"{''.join(f'<p>{_prose(line)}</p>' for line in verdict.sentences)}</div>"
            for verdict in report.verdicts
        ),
        "notes": "".join(f'<p class="quiet">{_text(note)}</p>' for note in report.notes),
        "table": _table(report.rows, sizes),
        "tradeoff": _tradeoff(report),
        "exits": _exits(report),
        "policy": _text(str(report.chosen.policy)),
        "exits_note": ""
        if report.certificate is None
        else '<span class="key chosen">where the calibration images left</span>',
        "speeds": "".join(_speed(report, size) for size in sizes),
        "certificate": _certificate(report),
        "samples": _samples(report),
        "method": _method(report),
        "left_out": _left_out(report),
    }
    return Template(here.joinpath("page.html").read_text("utf-8")).substitute(parts)


def _text(words: str) -> str:
    """Words as HTML: markup escaped, control characters and lone surrogates spelt out."""
    return escape(printable(words))


def _prose(words: str) -> str:
    """Our own sentences: as `_text`, and what stands between backticks is code."""
    return re.sub("`([a-z -]+)`", r"<code>\1</code>", _text(words))


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _table(rows: Iterable[Row], sizes: list[int]) -> str:
    header = ["Way", "Accuracy", "Points to full"]
    header += [*(f"ms, batch {size}" for size in sizes), "Layer ratio"]
    rows = list(rows)
    base = {
        size: min(
            row.ms[size].median
            for row in rows
            if not row.way.early and not row.way.rival and row.way.precision == "float32"
        )
        for size in sizes
    }
    lines = []
    for row in rows:
        kind = "rival" if row.way.rival else "early" if row.way.early else "full"
        early = " (early exit)" if row.way.early and row.way.rival else ""
        low, high = row.accuracy_interval
        least, most = row.drop_interval
        cells = [
            _cell(row.way.model + early, f"{ENGINES[row.way.engine]}, {row.way.precision}"),
            _cell(
                f"{100 * row.accuracy:.1f} %", f"{100 * low:.1f} to {100 * high:.1f}", row.accuracy
            ),
            _cell(signed(-row.drop), f"{signed(-most)} to {signed(-least)}", -row.drop),
            *(_time(row.ms[size], base[size]) for size in sizes),
            _cell(f"{row.layer_ratio:.2f}×", value=row.layer_ratio),
        ]
        lines.append(f'<tr class="{kind}">{"".join(cells)}</tr>')
    heads = "".join(
        f'<th scope="col"><button type="button">{_text(word)}</button></th>' for word in header
    )
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
        '<p class="quiet">Times are milliseconds an image. Small print: 95 % intervals; of times the'
        " speed relative to the full model on its fastest runtime in float32, and the quartiles of the"
        " rounds. Click a heading to sort.</p>"
    )


def _cell(words: str, small: str = "", value: float | None = None) -> str:
    data = "" if value is None else f' data-value="{value:.6g}"'
    return f"<td{data}>{_text(words)}{f'<small>{_text(small)}</small>' if small else ''}</td>"


def _time(ms: Spread, base: float) -> str:
    small = f"{base / ms.median:.2f}× ({ms.low:.3g} to {ms.high:.3g})"
    return _cell(f"{ms.median:.3g}", small, ms.median)


def _tradeoff(report: Report) -> str:
    recording = report.recording
    depth = recording.layers[-1]
    fixed = [
        (depth / layer, accuracy)
        for layer, accuracy in zip(recording.layers, recording.accuracies, strict=True)
    ]
    return tradeoff_chart(report.points, report.chosen, fixed, recording.final_accuracy)


def _exits(report: Report) -> str:
    expected = None
    if report.certificate is not None:
        counts = report.certificate.exit_counts
        expected = [count / sum(counts) for count in counts]
    return exits_chart(report.recording.layers, report.chosen.shares, expected)


def _speed(report: Report, size: int) -> str:
    keys = [("full", "the full model"), ("early", "early exit")]
    if any(row.way.rival for row in report.rows):
        keys.append(("rival", "rivals"))
    if any(row.way.precision == "int8" for row in report.rows):
        keys.append(("int8", "in int8"))
    legend = " ".join(f'<span class="key {kind}">{words}</span>' for kind, words in keys)
    return (
        f"<figure><h2>Accuracy against time, batch {size}</h2>{speed_chart(report.rows, size)}"
        f"<figcaption>{legend}</figcaption></figure>"
    )


def _certificate(report: Report) -> str:
    certificate = report.certificate
    if certificate is None:
        return (
            f"<p>Nothing: no certificate goes with {_text(str(report.chosen.policy))}. The figures here"
            " are those of the images above. <code>lgvit-fast calibrate</code> chooses a policy with a"
            " guarantee.</p>"
        )
    counts = [round(share * report.chosen.images) for share in report.chosen.shares]
    return (
        f"<p>{_text(str(certificate))}</p><p>{_text(str(certificate.check(counts)))}.</p>"
        '<p class="quiet">The guarantee is over draws of the calibration images, and speaks only of'
        " images like them.</p>"
    )


def _samples(report: Report) -> str:
    layers, parts = report.recording.layers, []
    for exit, layer in enumerate(layers):
        here = [sample for sample in report.samples if sample.exit == exit]
        if not here:
            continue
        last = exit == len(layers) - 1
        where = "final classifier" if last else f"block {layer}, {report.heads[exit]}"
        share, right = report.chosen.shares[exit], report.chosen.exit_accuracy[exit] or 0.0
        parts.append(
            f'<div class="exit"><h3>{_text(where)} <small>{100 * share:.1f} % leave here,'
            f" {100 * right:.1f} % of them right</small></h3>"
            f'<div class="strip">{"".join(_sample(sample, report) for sample in here)}</div></div>'
        )
    return "".join(parts)


def _sample(sample: Sample, report: Report) -> str:
    target, answer = (report.class_names[k] for k in (sample.target, sample.prediction))
    wrong = sample.target != sample.prediction
    name = printable(sample.name)
    file = name.rsplit("/", 1)[-1]
    alt = f"{file}: {target}" + (f", answered {answer}" if wrong else "")
    small = ' class="small"' if max(sample.picture.shape[1:]) < _PICTURE else ""
    return (
        f"<figure{' class=' + chr(34) + 'wrong' + chr(34) if wrong else ''}>"
        f'<img{small} src="{_data_uri(sample, report)}" alt="{_text(alt)}" title="{_text(name)}">'
        f'<span class="answer" title="{_text(answer)}">{_text(answer)}</span>'
        f"{f'<span>is {_text(target)}</span>' if wrong else ''}"
        f'<span class="file">{_text(file)}</span></figure>'
    )


def _data_uri(sample: Sample, report: Report) -> str:
    from lgvit_fast.evaluation.plots import denormalise

    pixels = (denormalise(sample.picture[None], report.spec)[0] * 255).round().byte().numpy()
    image = Image.fromarray(pixels)
    image.thumbnail((_PICTURE, _PICTURE))
    kind = "png" if max(image.size) <= 48 else "jpeg"
    file = io.BytesIO()
    image.save(file, kind, optimize=True, **({"quality": 80} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _method(report: Report) -> str:
    machine = report.machine
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"])
    facts = {
        "processor": f"{machine['processor']}, {machine['cores']} cores",
        "instruction sets": ", ".join(machine["instructions"]) or "not known",
        "threads": str(machine["threads"]),
        "GPU": gpus or "none",
        "versions": ", ".join(
            f"{name} {machine[name]}"
            for name in ("lgvit_fast", "torch", "timm", "onnxruntime", "openvino", "python")
            if machine.get(name)
        ),
        "timed": f"{report.timed} of the images, {report.rounds} rounds; medians",
    }
    rows = "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in facts.items())
    bad = [f"{image.name}: {image.reason}" for image in report.recording.bad]
    unreadable = ""
    if bad:
        shown = "".join(f"<li>{_text(line)}</li>" for line in bad[:20])
        unreadable = f"<p>{len(bad)} files could not be read:</p><ul>{shown}</ul>"
    return (
        "<p>Each way answers all the images itself, in a process of its own; the processes take turns"
        " against the clock and are stopped while it is not theirs. The full model runs without exit"
        " heads; <code>lgvit_fast.Engine</code> makes it faster without early exit, too. The layer"
        " ratio is what early exit would gain if heads and bookkeeping cost nothing."
        " int8 of a dense model on ONNX Runtime is its dynamic quantization, whose answers can depend"
        " on the other images of a batch; on OpenVINO it has scales a row, as early exit in int8 has."
        f"</p><dl>{rows}</dl>{unreadable}"
    )


def _left_out(report: Report) -> str:
    if not report.left_out:
        return ""
    ways: dict[str, list[str]] = {}
    for way, reason in report.left_out:
        ways.setdefault(reason, []).append(str(way))
    lines = "".join(f"<li>{_text('; '.join(w) + ': ' + why)}</li>" for why, w in ways.items())
    return f"<p>Not measured:</p><ul>{lines}</ul>"
