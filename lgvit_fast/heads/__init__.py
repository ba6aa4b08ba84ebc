"""Exit heads: local perception, global aggregation, and where they sit."""

from lgvit_fast.heads.exit_head import ExitHead
from lgvit_fast.heads.gah import GlobalAggregationHead
from lgvit_fast.heads.layout import ExitSpec, resolve_exits
from lgvit_fast.heads.lph import LocalPerceptionHead

__all__ = [
    "ExitHead",
    "ExitSpec",
    "GlobalAggregationHead",
    "LocalPerceptionHead",
    "resolve_exits",
]
