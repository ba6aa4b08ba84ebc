"""What is said of an image, in json."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from lgvit_fast.evidence import log_softmax
from lgvit_fast.runtimes.continuous import Finished

__all__ = ["Answer", "Class", "Failure", "answer", "failure"]


class Class(BaseModel):
    """One of the likeliest classes."""

    label: str = Field(description="the class's name, or its number where the model has no names")
    class_index: int
    probability: float = Field(description="softmax at the exit where the image left")


class Answer(BaseModel):
    """An image's answer."""

    image: int = Field(description="its place in the request, from 0")
    name: str | None = Field(description="the file's name in the form")
    label: str
    class_index: int
    confidence: float
    top: list[Class] = Field(description="the likeliest classes, the first being the answer")
    exit_index: int = Field(description="the exit it left at, from 0; E for the final classifier")
    exit_layer: int = Field(description="the block after which it left, from 1")
    queued_ms: float = Field(description="milliseconds it waited")
    computed_ms: float = Field(description="milliseconds of the runs it was part of")
    policy: str = Field(description="the rule under which it left")


class Failure(BaseModel):
    """Why an image, or a request, was not answered."""

    error: str
    status: int | None = Field(None, description="HTTP status it would have alone")
    image: int | None = Field(None, description="its place in a request of several")
    name: str | None = None


def answer(
    place: int,
    name: str | None,
    finished: Finished,
    policy: object,
    names: Sequence[str] | None,
    k: int,
) -> Answer:
    """The answer of an image that a model has finished.

    Raises:
        HTTPException: 500 its graph failed, or its logits are no numbers.
    """
    if finished.error is not None or finished.logits is None:
        raise HTTPException(500, "the model failed on this image")
    if finished.nonfinite:
        raise HTTPException(500, "the model's logits are not finite for this image")
    probabilities = np.exp(log_softmax(finished.logits[None]))[0]
    likeliest = np.argsort(-finished.logits, kind="stable")[:k].tolist()
    top = [
        Class(
            label=names[number] if names else str(number),
            class_index=number,
            probability=round(float(probabilities[number]), 6),
        )
        for number in likeliest
    ]
    return Answer(
        image=place,
        name=name,
        label=top[0].label,
        class_index=top[0].class_index,
        confidence=top[0].probability,
        top=top,
        exit_index=finished.exit_index,
        exit_layer=finished.exit_layer,
        queued_ms=round(1000 * finished.queued, 3),
        computed_ms=round(1000 * finished.computed, 3),
        policy=str(policy),
    )


def failure(place: int, name: str | None, error: HTTPException) -> Failure:
    """The same of an image without an answer."""
    return Failure(error=error.detail, status=error.status_code, image=place, name=name)
