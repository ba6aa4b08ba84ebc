"""A data set of image files to a table of answers, with Ray Data."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lgvit_fast.data.suffixes import image_files
from lgvit_fast.deploy import Answers, Deployed
from lgvit_fast.policies import Policy
from lgvit_fast.scale.threads import reserved_threads

if TYPE_CHECKING:
    import pyarrow
    from numpy.typing import NDArray

__all__ = ["Predictor", "predict"]

_ACTORS_A_WRITER = 8  # each writer is a process of its own, and answers take far longer than rows


class Predictor:
    """Answers batches of image files, one row an image: for `Dataset.map_batches`.

    Each actor of Ray holds the model, warm. Files are untrusted: they are opened as
    `lgvit_fast.data.open_image` does, and one that is no readable image is a row with an error.

        files = ray.data.read_binary_files("s3://bucket/photos", include_paths=True)
        answers = files.map_batches(
            Predictor, fn_constructor_args=("exported",), batch_size=32, num_cpus=2,
            compute=ray.data.ActorPoolStrategy(size=4),
        )
        answers.write_parquet("s3://bucket/answers")

    Args:
        folder: what `lgvit_fast.export` wrote, as a path on the machine where the actor runs.
        policy: when an image leaves; None takes the model's own.
        runtime: as for `Deployed`.
        threads: None takes as many as Ray reserved processors for the actor (`num_cpus`).
        top_k: classes in an answer, at most K; with more than one the rows have a column `top`.

    Raises:
        Exception: as `Deployed`; and ValueError for a `top_k` below 1.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        policy: Policy | None = None,
        runtime: str = "auto",
        threads: int | None = None,
        top_k: int = 1,
    ) -> None:
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"top_k={top_k!r}, expected an integer of at least 1")
        self.deployed = Deployed(folder, runtime, threads or reserved_threads())
        if policy is not None:
            self.deployed.policy = policy
        self._top_k = top_k
        self._schema = _schema(top_k)
        preprocessing = self.deployed.manifest.preprocessing
        self._read = preprocessing.read
        shape = (1, preprocessing.channels, *preprocessing.size)
        self.deployed.forward_exits(np.zeros(shape, np.float32))  # the first run allocates

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> pyarrow.Table:
        """Answer a batch.

        Args:
            batch: `path` `[B]`, names of files; `bytes` `[B]`, their contents. Without `bytes` the
                files are read here.

        Returns:
            B rows in the same order: path, label, class_index, confidence, exit_index, exit_layer and
            error. Either error is null or all but path and error are. `label` is the class's name, or
            its number where the model has no names. `top` is a list of label, class_index, probability.
        """
        import pyarrow

        rows: list[dict[str, Any]] = [{"path": str(path)} for path in batch["path"]]
        sources = map(io.BytesIO, batch["bytes"]) if "bytes" in batch else batch["path"]
        images, answered = [], []
        for row, source in zip(rows, sources, strict=True):
            try:
                images.append(self._read(source))
                answered.append(row)
            except Exception as error:  # whatever a decoder raises is a bad image
                text = str(error).replace(repr(source), repr(row["path"]))
                row["error"] = f"{type(error).__name__}: {text}"
        if images:
            self._describe(answered, self.deployed(np.stack(images)))
        return pyarrow.Table.from_pylist(rows, schema=self._schema)

    def _describe(self, rows: Sequence[dict[str, Any]], answers: Answers) -> None:
        """Write answers into their rows."""
        names = self.deployed.class_names
        probabilities, classes = (part.tolist() for part in answers.topk(self._top_k))
        for i, row in enumerate(rows):
            if answers.nonfinite[i]:
                row["error"] = "the model's logits are not finite for this image"
                continue
            top = [
                {
                    "label": names[number] if names else str(number),
                    "class_index": number,
                    "probability": probability,
                }
                for number, probability in zip(classes[i], probabilities[i], strict=True)
            ]
            row["label"], row["class_index"], row["confidence"] = top[0].values()
            row["exit_index"] = int(answers.exit_index[i])
            row["exit_layer"] = int(answers.exit_layer[i])
            row["top"] = top


def predict(
    folder: str | os.PathLike[str],
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str,
    *,
    actors: int | None = None,
    threads: int = 1,
    batch_size: int = 32,
    **options: Any,
) -> None:
    """Answer image files on the cluster that Ray is connected to, and write the rows as Parquet.

    Every machine must see the model, the images and the output under these names. Each file given is
    one row of the output, in any order, also where Ray has to repeat what a lost process did.

    Args:
        folder: see `Predictor`.
        images: a folder, of which every image file in it and below is taken; or a list of files.
        output: a folder that does not exist yet, or an address that Ray Data can write to.
        actors: processes, each with the whole model; None takes as many as the cluster has room for.
        threads: of each actor; as many processors are reserved for it.
        batch_size: images that an actor answers together.
        options: policy, runtime and top_k of `Predictor`.

    Raises:
        FileNotFoundError: a folder without images.
        ValueError: an empty list, or a name that is not UTF-8; or the output, not on this machine,
            exists already.
        FileExistsError: the output exists already.
    """
    paths = _names(image_files(images) if isinstance(images, str | os.PathLike) else images)
    if os.path.exists(output):  # `mode` below looks at any address, but when images are answered
        raise FileExistsError(f"output {output!r} exists, expected a new folder")
    import ray

    if not ray.is_initialized():
        ray.init()
    if actors is None:
        actors = max(1, int(ray.cluster_resources()["CPU"]) // threads)
    answers = ray.data.from_items([{"path": path} for path in paths]).map_batches(
        Predictor,
        fn_constructor_args=(os.fspath(folder),),
        fn_constructor_kwargs=options,
        batch_size=batch_size,
        num_cpus=threads,
        compute=ray.data.ActorPoolStrategy(size=actors),
    )
    answers.write_parquet(
        output,
        mode="error",
        concurrency=-(-actors // _ACTORS_A_WRITER),
        ray_remote_args={"num_cpus": 0},  # actors may hold every processor; writing needs little
    )


def _names(files: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The files' names, which a table can hold."""
    names = [os.fspath(file) for file in files]
    if not names:
        raise ValueError("images is empty, expected a folder or a list of files")
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name!r} is not UTF-8, as a name in Parquet has to be") from None
    return names


def _schema(top_k: int) -> pyarrow.Schema:
    """The same for every batch, one without a single answer too."""
    import pyarrow

    fields = {
        "path": pyarrow.string(),
        "label": pyarrow.string(),
        "class_index": pyarrow.int64(),
        "confidence": pyarrow.float32(),
        "exit_index": pyarrow.int64(),
        "exit_layer": pyarrow.int64(),
        "error": pyarrow.string(),
    }
    if top_k > 1:
        one = {"label": fields["label"], "class_index": pyarrow.int64()}
        fields["top"] = pyarrow.list_(pyarrow.struct({**one, "probability": pyarrow.float32()}))
    return pyarrow.schema(fields)
