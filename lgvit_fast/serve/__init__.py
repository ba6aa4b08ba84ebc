"""An exported model behind HTTP: each image is answered when it leaves. Needs the extra `serve`.

`create_app` is imported when first used: the settings need nothing that is not installed anyway.
"""

from typing import TYPE_CHECKING, Any

from lgvit_fast.serve.settings import Settings

if TYPE_CHECKING:
    from lgvit_fast.serve.app import create_app

__all__ = ["Settings", "create_app"]


def __getattr__(name: str) -> Any:
    if name != "create_app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lgvit_fast.serve.app import create_app

    return create_app
