"""The HTTP interface: a FastAPI application around the worker."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from lgvit_fast._version import __version__
from lgvit_fast.deploy import Deployed
from lgvit_fast.runtimes.continuous import Finished
from lgvit_fast.serve.answers import Answer, Failure, answer, failure
from lgvit_fast.serve.hosts import AllowedHosts
from lgvit_fast.serve.levels import Levels, certified_policies
from lgvit_fast.serve.metrics import CONTENT_TYPE, Metrics
from lgvit_fast.serve.settings import Settings
from lgvit_fast.serve.uploads import FIELD, Budget, NoRoom, Upload, declared, read_image, uploads
from lgvit_fast.serve.worker import Job, Worker

__all__ = ["create_app"]

_logger = logging.getLogger(__name__)
_PAGE = Path(__file__).parent / "page"
_READERS = 4  # images that are decoded at once: each takes up to some 12 bytes a pixel
_BODIES = 8  # largest bodies that are held at once
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:;"
    " connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_DIED = "the thread that runs the model died, and the process must be started anew"
_GONE = 499  # what nginx calls a client that has closed its connection; nobody reads it


def create_app(
    deployed: Deployed,
    settings: Settings | None = None,
    *,
    allowed_hosts: Sequence[str] | None = None,
    died: Callable[[], object] = lambda: None,
) -> FastAPI:
    """A model behind HTTP: POST /predict, a page at /, metrics, health and OpenAPI.

    The model is warmed up when the application starts, and what was accepted is answered before it
    ends. Nobody else may call `deployed` in between, for its graphs' sake. Should the thread that runs
    the model die, all that wait get 503, and so do /healthz and /readyz from then on.

    Args:
        deployed: the model.
        settings: limits and batching; None takes the defaults.
        allowed_hosts: names that requests may give as their host; None allows any.
        died: called once, from another thread, if the thread that runs the model dies.

    Raises:
        ValueError: `slo_ms` without a certificate that has a path.
    """
    settings = settings or Settings()
    service = Service(deployed, settings, died)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(service.worker.start)
        service.ready = True
        try:
            yield
        finally:
            service.ready = False
            await asyncio.to_thread(service.close)

    app = FastAPIOffline(redoc_url=None, title="lgvit_fast", version=__version__, lifespan=lifespan)
    app.state.service = service
    if allowed_hosts is not None:
        app.add_middleware(AllowedHosts, hosts=allowed_hosts)

    @app.exception_handler(HTTPException)
    async def explain(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def hide(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": "the server failed on this request"}, 500)

    body = {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": [FIELD],
                "properties": {
                    FIELD: {"type": "array", "items": {"type": "string", "format": "binary"}}
                },
            }
        },
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    }
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": Failure} for status in (400, 408, 413, 415, 429, 500, 503, 504)
    }

    @app.post(
        "/predict",
        response_model=Answer,
        responses=errors,
        openapi_extra={"requestBody": {"required": True, "content": body}},
    )
    async def predict(request: Request) -> Response:
        """Classify one image, or several: then a line of json each, as soon as it is there."""
        return await service.predict(request)

    @app.get("/healthz")
    def healthz() -> Response:
        """Whether the process can answer; if not, start it anew."""
        return _status("ok" if service.worker.failure is None else _DIED)

    @app.get("/readyz")
    def readyz() -> Response:
        """Whether to send images here."""
        return _status("ok" if service.open else "not ready")

    @app.get("/metrics")
    def metrics() -> Response:
        """For Prometheus."""
        return Response(service.measured(), media_type=CONTENT_TYPE)

    @app.get("/model")
    def model() -> dict[str, Any]:
        """What is served."""
        return service.about()

    @app.get("/stats")
    def stats() -> dict[str, Any]:
        """What the server has answered, all processes of it together."""
        return service.metrics.totals()

    @app.get("/", include_in_schema=False)
    def index() -> Response:
        return _static("index.html")

    @app.get("/page.js", include_in_schema=False)
    def script() -> Response:
        return _static("page.js")

    @app.get("/page.css", include_in_schema=False)
    def style() -> Response:
        return _static("page.css")

    return app


class Service:
    """What the routes share: the worker, its counts, and the way of a request."""

    def __init__(self, deployed: Deployed, settings: Settings, died: Callable[[], object]) -> None:
        self.deployed, self.settings = deployed, settings
        policies = (
            [deployed.policy]
            if settings.slo_ms is None
            else certified_policies(deployed.policy, deployed.certificate)
        )
        slo = None if settings.slo_ms is None else settings.slo_ms / 1000
        self.metrics = metrics = Metrics(deployed.manifest.layers, deployed.certificate)
        batcher = deployed.batcher(
            settings.batch_size, settings.max_wait_ms / 1000, policies, self._ran
        )
        levels = Levels(policies, slo)
        self.worker = Worker(deployed, batcher, levels, settings.queue, metrics.queue.set, died)
        self.ready = False
        self._end: float | None = None  # of the time to stop within, by time.monotonic
        self._uploading: set[asyncio.Timeout] = set()
        self._budget = Budget(_BODIES * settings.max_upload)
        readers = min(_READERS, len(os.sched_getaffinity(0)))
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="lgvit-read")

    @property
    def open(self) -> bool:
        """Whether images are accepted."""
        return self.ready and self.worker.failure is None

    def stop_soon(self) -> None:
        """The server was told to stop: from now on the time runs. Called in its event loop."""
        if self._end is None:
            self._end = time.monotonic() + self.settings.stop_seconds
            asyncio.get_running_loop().call_later(self.settings.stop_seconds, self._cut_off)

    def _cut_off(self) -> None:
        """The time is over: whoever waits gets 503."""
        self.ready = False
        if images := self.worker.waiting:
            _logger.warning(
                "stopping: %d images without an answer after %g s",
                images,
                self.settings.stop_seconds,
            )
        for limit in self._uploading:
            if not limit.expired():  # a body that is too late anyway
                limit.reschedule(0)
        self.worker.end()

    def close(self) -> None:
        """Answer what was accepted, in the time that is left, then end."""
        left = self.settings.stop_seconds if self._end is None else self._end - time.monotonic()
        self.worker.stop(max(0.0, left))
        self._readers.shutdown(cancel_futures=True)

    def about(self) -> dict[str, Any]:
        """The model and the limits, as json types."""
        manifest, settings = self.deployed.manifest, self.settings
        certificate = self.deployed.certificate
        return {
            "layers": manifest.layers,
            "heads": manifest.heads,
            "num_classes": manifest.num_classes,
            "size": manifest.preprocessing.size,
            "policy": str(self.deployed.policy),
            "certificate": None if certificate is None else str(certificate),
            "precision": manifest.precision,
            "runtime": self.deployed.runtime,
            "batch_size": settings.batch_size,
            "top_k": min(settings.top_k, manifest.num_classes),
            "max_images": settings.max_images,
            "max_upload_mb": settings.max_upload_mb,
        }

    def measured(self) -> bytes:
        """The metrics' page."""
        return self.metrics.page()

    def _ran(self, place: int, images: int, seconds: float) -> None:
        """Count a run of a segment."""
        self.metrics.ran(place, images)
        self.metrics.level.set(self.worker.levels.level)

    async def predict(self, request: Request) -> Response:
        """The way of a request: body -> places -> pixels -> worker -> answers."""
        began = time.perf_counter()
        status, lines = 500, False
        try:
            response = await self._predict(request)
            status = response.status_code
            if lines := isinstance(response, _Lines):
                response.ended = lambda: self._count(status, began)
            return response
        except ClientDisconnect:  # in the middle of its body
            return Response(status_code=(status := _GONE))
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            if not lines:
                self._count(status, began)

    def _count(self, status: int, began: float) -> None:
        """Count a request whose answer has ended."""
        self.metrics.requests.labels(status).inc()
        self.metrics.latency.observe(time.perf_counter() - began)

    async def _predict(self, request: Request) -> Response:
        if not self.open:
            raise self._unavailable()
        limit = asyncio.timeout(self.settings.timeout)
        self._uploading.add(limit)
        try:
            with self._budget.share(declared(request, self.settings)) as take:
                async with limit:
                    files = await uploads(request, self.settings, take)
        except NoRoom:
            raise self._busy() from None
        except TimeoutError:
            if not self.open:
                raise self._unavailable() from None
            late = f"the body took more than {self.settings.timeout:g} s"
            raise HTTPException(408, late) from None
        finally:
            self._uploading.discard(limit)
        if not self.worker.reserve(len(files)):
            for upload in files:
                upload.file.close()
            raise self._busy() if self.open else self._unavailable()
        answers = self._answers(files)
        await anext(answers)  # closing a generator that has not begun would not clean up
        if len(files) == 1:
            return await self._one(request, answers)
        return _Lines(answers)

    async def _one(self, request: Request, answers: AsyncGenerator[Answer | Failure]) -> Response:
        """The only answer, unless the client goes first."""
        gone = asyncio.create_task(_disconnected(request))
        async with aclosing(answers):
            first = asyncio.ensure_future(anext(answers))
            await asyncio.wait({first, gone}, return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            if not first.done():
                first.cancel()
                with suppress(asyncio.CancelledError):
                    await first
                return Response(status_code=_GONE)
        found = first.result()
        if isinstance(found, Failure):
            return JSONResponse({"error": found.error}, found.status or 500)
        return Response(found.model_dump_json(), media_type="application/json")

    async def _answers(self, files: Sequence[Upload]) -> AsyncGenerator[Answer | Failure]:
        """An answer for each file, which has a place reserved, in the order they are finished."""
        loop = asyncio.get_running_loop()
        results: asyncio.Queue[tuple[int, Finished | HTTPException | None]] = asyncio.Queue()
        jobs: dict[int, Job] = {}  # handed to the worker, which gives their places back
        missing = dict(enumerate(files))

        def tell(place: int, found: Finished | HTTPException | None) -> None:
            results.put_nowait((place, found))

        async def read(place: int, upload: Upload) -> None:
            try:
                image = await loop.run_in_executor(
                    self._readers,
                    read_image,
                    upload,
                    self.deployed.manifest.preprocessing,
                    self.settings,
                )
            except HTTPException as error:
                tell(place, error)
                return
            jobs[place] = Job(image, lambda found: loop.call_soon_threadsafe(tell, place, found))
            self.worker.submit(jobs[place])

        readers = [asyncio.create_task(read(*item)) for item in missing.items()]
        deadline = loop.time() + self.settings.timeout
        try:
            yield None  # type: ignore[misc]  # begun
            while missing:
                try:
                    async with asyncio.timeout_at(deadline):
                        place, found = await results.get()
                except TimeoutError:
                    break
                yield self._said(place, missing.pop(place).name, found)
            for place, upload in missing.items():
                late = HTTPException(504, f"no answer within {self.settings.timeout:g} s")
                yield self._said(place, upload.name, late)
        finally:
            for task in readers:
                task.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
            self.worker.give_up({job for place, job in jobs.items() if place in missing})
            self.worker.release(len(files) - len(jobs))
            for upload in files:
                upload.file.close()

    def _said(
        self, place: int, name: str | None, found: Finished | HTTPException | None
    ) -> Answer | Failure:
        """What is said of an image, which is counted."""
        try:
            if found is None:
                raise self._unavailable()
            if isinstance(found, HTTPException):
                raise found
            policy = self.worker.levels.policies[found.policy]
            said = answer(
                place, name, found, policy, self.deployed.class_names, self.settings.top_k
            )
        except HTTPException as error:
            self.metrics.errors.labels(error.status_code).inc()
            return failure(place, name, error)
        if found.policy == len(self.worker.levels.policies) - 1:
            self.metrics.certified.labels(found.exit_layer).inc()
        self.metrics.exits.labels(found.exit_layer).inc()
        self.metrics.queued.observe(found.queued)
        self.metrics.computed.observe(found.computed)
        return said

    def _unavailable(self) -> HTTPException:
        died = self.worker.failure is not None
        return HTTPException(503, _DIED if died else "the server is starting or stopping")

    def _busy(self) -> HTTPException:
        seconds = max(1, math.ceil(self.worker.retry_after))
        return HTTPException(429, "the queue is full", {"Retry-After": str(seconds)})


class _Lines(StreamingResponse):
    """Answers as lines of json. What is not answered when the client goes is given up."""

    def __init__(self, answers: AsyncGenerator[Answer | Failure]) -> None:
        lines = (
            found.model_dump_json(exclude_none=isinstance(found, Failure)) + "\n"
            async for found in answers
        )
        super().__init__(lines, media_type="application/x-ndjson")
        self._answers = answers
        self.ended: Callable[[], None] = lambda: None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answers.aclose()
            self.ended()


async def _disconnected(request: Request) -> None:
    """Wait until the client has closed its connection; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _status(text: str) -> JSONResponse:
    return JSONResponse({"status": text}, 200 if text == "ok" else 503)


def _static(name: str) -> Response:
    headers = {"Content-Security-Policy": _CSP, "X-Content-Type-Options": "nosniff"}
    return FileResponse(_PAGE / name, headers=headers)
