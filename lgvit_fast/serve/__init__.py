"""An exported model behind HTTP: each image is answered when it leaves. Needs the extra `serve`."""

from lgvit_fast.serve.app import create_app
from lgvit_fast.serve.settings import Settings

__all__ = ["Settings", "create_app"]
