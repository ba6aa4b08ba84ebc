"""`manifest.json` of an exported model: what the graphs cannot say, checked field by field.

The folder may come from a stranger. Every field is validated, and a graph is handed on only as bytes
whose length and hash are those of the manifest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lgvit_fast import policies
from lgvit_fast.deploy.onnx_file import check_onnx
from lgvit_fast.deploy.preprocess import INTERPOLATIONS, Preprocessing
from lgvit_fast.policies import Policy
from lgvit_fast.runtimes.loaders import FORMATS

__all__ = ["MANIFEST", "PRECISIONS", "Manifest", "SegmentFile", "is_exported", "write_segment"]

MANIFEST = "manifest.json"
VERSION = 1
PRECISIONS = ("float32", "int8")
_FORMAT = "lgvit_fast.deployed"
_LARGEST_MANIFEST = 64 * 2**20  # bytes; class names are the bulk of it


@dataclass(frozen=True)
class SegmentFile:
    """A file of the folder: its plain name, SHA-256 in hexadecimal, and length in bytes."""

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """An exported model.

    Attributes:
        layers: the block after which each exit sits, from 1; the last entry is the depth L.
        heads: names of the E exits' heads.
        num_classes: K.
        class_names: K names, or None.
        policy: when an image leaves unless a call says otherwise; None where it cannot be saved.
        certificate: what is known of the policy's accuracy, as json types, or None.
        preprocessing: how images become inputs.
        precision: one of `PRECISIONS`.
        opset: of the ONNX graphs; None in another format.
        segments: the E + 1 graphs in order; in format "executorch" the one program.
        made_with: versions of what made it, for the reader.
        file_format: of these files, one of `lgvit_fast.runtimes.loaders.FORMATS`.
        int8: what was measured when it was made int8, as json types; None in float32.
    """

    layers: tuple[int, ...]
    heads: tuple[str, ...]
    num_classes: int
    class_names: tuple[str, ...] | None
    policy: Policy | None
    certificate: dict[str, Any] | None
    preprocessing: Preprocessing
    precision: str
    opset: int | None
    segments: tuple[SegmentFile, ...]
    made_with: dict[str, str]
    file_format: str = "onnx"
    int8: dict[str, Any] | None = None

    @property
    def num_exits(self) -> int:
        """E."""
        return len(self.layers) - 1

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `manifest.json` into a folder."""
        policy = None if self.policy is None else policies.to_dict(self.policy)
        content = {"format": _FORMAT, "version": VERSION, **_plain(self), "policy": policy}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        Path(folder, MANIFEST).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Manifest:
        """Read and validate the manifest of a folder.

        Raises:
            FileNotFoundError: no folder, or no manifest in it.
            ValueError: another version, or a field that is missing or cannot be.
        """
        path = Path(folder, MANIFEST)
        if not path.is_file():
            raise FileNotFoundError(
                f"no exported model in {os.fspath(folder)!r}: {MANIFEST} not found"
                " (`lgvit-fast export MODEL FOLDER` makes one)"
            )
        if path.stat().st_size > _LARGEST_MANIFEST:
            raise ValueError(f"{path} is larger than {_LARGEST_MANIFEST} bytes")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not json: {error}") from None
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"{path} is no manifest of an exported model: no format {_FORMAT!r}")
        if content.get("version") != VERSION:
            raise ValueError(
                f"{path} has version {content.get('version')!r}, this lgvit_fast reads version"
                f" {VERSION}: export the model anew with it, or install the lgvit_fast that made it"
            )
        return _parse(content, path)

    def read(self, folder: str | os.PathLike[str], index: int) -> bytes:
        """The bytes of a file of `segments`, verified.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: another length or hash than the manifest says, or a tensor kept in another file.
        """
        segment = self.segments[index]
        path = Path(folder, segment.file)
        again = "copy the folder again or export the model anew"
        try:
            about = path.stat()
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} is missing: {again}") from None
        if not stat.S_ISREG(about.st_mode) or about.st_size != segment.bytes:
            raise ValueError(
                f"{path} has {about.st_size} bytes, {MANIFEST} says {segment.bytes}: it is truncated"
                f" or another file; {again}"
            )
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != segment.sha256:
            raise ValueError(f"{path} does not have the SHA-256 that {MANIFEST} says; {again}")
        if self.file_format == "onnx":
            try:
                check_onnx(data)
            except ValueError as error:
                raise ValueError(f"{path} is refused: {error}") from None
        return data


def write_segment(path: Path, data: bytes) -> SegmentFile:
    """Write a graph to disk, and describe the file."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return SegmentFile(path.name, hashlib.sha256(data).hexdigest(), len(data))


def is_exported(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an exported model."""
    return Path(folder, MANIFEST).is_file()


def _plain(manifest: Manifest) -> dict[str, Any]:
    fields = {f.name: getattr(manifest, f.name) for f in dataclasses.fields(manifest)}
    fields["preprocessing"] = dataclasses.asdict(manifest.preprocessing)
    fields["segments"] = [dataclasses.asdict(segment) for segment in manifest.segments]
    return fields


def _parse(content: dict[str, Any], path: Path) -> Manifest:
    field = _Fields(content, str(path))
    layers = field.items("layers", _is_count)
    if list(layers) != sorted(set(layers)):
        raise field.wrong("layers", "increasing block numbers")
    count = len(layers)
    num_classes = field("num_classes", _is_count)
    names = None
    if content.get("class_names") is not None:
        names = field.items("class_names", _is_text, num_classes)
    inner = _Fields(field("preprocessing", _is_object), f"{path}: preprocessing")
    channels = inner("channels", _is_count)
    size = inner.items("size", _is_count, 2)
    preprocessing = Preprocessing(
        channels,
        (size[0], size[1]),
        tuple(map(float, inner.items("mean", _is_number, channels))),
        tuple(map(float, inner.items("std", _is_positive, channels))),
        inner("interpolation", lambda value: value in INTERPOLATIONS),
        float(inner("crop_pct", _is_positive)),
    )
    file_format = "onnx"  # what has no such field is older than the other formats
    if "file_format" in content:
        file_format = field("file_format", _is_format)
    is_onnx = file_format == "onnx"
    policy = None
    if content.get("policy") is not None:
        try:
            policy = policies.from_dict(content["policy"])
            policy.check(count - 1)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return Manifest(
        layers,
        field.items("heads", _is_text, count - 1),
        num_classes,
        names,
        policy,
        None if content.get("certificate") is None else field("certificate", _is_object),
        preprocessing,
        field("precision", lambda value: value in PRECISIONS),
        field("opset", _is_count) if is_onnx else None,
        tuple(
            _segment(value, path)
            for value in field.items("segments", _is_object, count if is_onnx else 1)
        ),
        {str(key): str(value) for key, value in field("made_with", _is_object).items()},
        file_format,
        None if content.get("int8") is None else field("int8", _is_object),
    )


def _segment(content: dict[str, Any], path: Path) -> SegmentFile:
    field = _Fields(content, f"{path}: segments")
    return SegmentFile(
        field("file", _is_plain_name), field("sha256", _is_sha256), field("bytes", _is_count)
    )


class _Fields:
    """The fields of a json object, each asked for with what it must be."""

    def __init__(self, content: dict[str, Any], source: str) -> None:
        self.content, self.source = content, source

    def __call__(self, name: str, valid: Callable[[Any], bool]) -> Any:
        if name not in self.content:
            raise ValueError(f"{self.source} has no field {name!r}")
        if not valid(self.content[name]):
            raise self.wrong(name, _EXPECTED.get(valid, "another value"))
        return self.content[name]

    def items(self, name: str, valid: Callable[[Any], bool], count: int | None = None) -> Any:
        """A list, as a tuple; of `count` entries, or any positive number of them."""
        values = self(name, lambda value: isinstance(value, list))
        if (len(values) != count if count is not None else not values) or not all(
            valid(value) for value in values
        ):
            how_many = "some" if count is None else f"{count}"
            raise self.wrong(name, f"a list of {how_many} entries, each {_EXPECTED[valid]}")
        return tuple(values)

    def wrong(self, name: str, expected: str) -> ValueError:
        given = repr(self.content[name])
        given = given if len(given) <= 80 else f"{given[:77]}..."
        return ValueError(f"{self.source} has {name} = {given}, expected {expected}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**53


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_format(value: Any) -> bool:
    return isinstance(value, str) and value in FORMATS


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_plain_name(value: Any) -> bool:
    return (
        isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", value) is not None
    )


_EXPECTED: dict[Callable[[Any], bool], str] = {
    _is_count: "an integer of at least 1",
    _is_number: "a number",
    _is_positive: "a positive number",
    _is_text: "a text",
    _is_object: "an object",
    _is_format: f"one of {', '.join(FORMATS)}",
    _is_sha256: "64 hexadecimal digits",
    _is_plain_name: "the plain name of a file in the folder",
}
