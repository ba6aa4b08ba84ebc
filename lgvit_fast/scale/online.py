"""The server of `lgvit_fast.serve` on several replicas, with Ray Serve."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from lgvit_fast.deploy import Deployed
from lgvit_fast.scale.threads import reserved_threads

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

    from lgvit_fast.serve import Settings

__all__ = ["check_alive", "serve_deployment"]


def serve_deployment(
    folder: str | os.PathLike[str],
    *,
    settings: Settings | None = None,
    runtime: str = "auto",
    threads: int | None = None,
    **options: Any,
) -> Application:
    """An application for `ray.serve.run`: the routes of `lgvit_fast.serve.create_app`.

    Each replica has the model and the worker thread that batches continuously; answers to several
    images are streamed through Ray's proxy. A replica whose worker has died is replaced.

    Args:
        folder: an exported model, as a path on the machines where replicas run.
        settings: limits and batching of each replica; None takes the defaults.
        runtime: as for `Deployed`.
        threads: None takes as many as Ray reserves processors for a replica.
        options: of `ray.serve.deployment`: num_replicas, autoscaling_config, ray_actor_options, ...
            Unless given, max_ongoing_requests is twice `settings.queue`, so that a replica itself
            refuses what it has no room for, with 429 and Retry-After, and
            graceful_shutdown_timeout_s is `settings.stop_seconds`.
    """
    from ray import serve

    from lgvit_fast.serve import Settings, create_app

    limits = settings or Settings()
    path = os.fspath(folder)

    def build() -> FastAPI:  # in each replica
        return create_app(Deployed(path, runtime, threads or reserved_threads()), limits)

    @serve.ingress(build)
    class Replica:
        app: FastAPI  # set by `serve.ingress`

        def check_health(self) -> None:
            """Called by Ray now and then; a replica for which it raises is replaced."""
            check_alive(self.app)

    defaults = {
        "name": "lgvit",
        "max_ongoing_requests": 2 * limits.queue,
        "graceful_shutdown_timeout_s": limits.stop_seconds,
    }
    return serve.deployment(**{**defaults, **options})(Replica).bind()


def check_alive(app: FastAPI) -> None:
    """Raise RuntimeError unless the worker of a started application can answer."""
    if not app.state.service.worker.alive:
        raise RuntimeError("the worker thread has died")
