"""Calls that no operator may carry out, by name: each must end in an error raised by a check.

Shared by `test_hostile_arguments.py` and the fuzz (`tests/fuzz/ops_fuzz.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lgvit_fast.ops import compact_
from lgvit_fast.ops.attention import attention
from lgvit_fast.ops.depthwise import depthwise_gelu
from lgvit_fast.ops.exit_step import ExitRule, exit_step
from lgvit_fast.ops.gah import gah_pool
from lgvit_fast.ops.linear import PackedLinear, fastest
from lgvit_fast.ops.lph import LPHWeights, lph_pool

C, K, B = 16, 5, 3
HUGE = 2**62


def freed(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor whose storage was resized to 0."""
    tensor = torch.zeros(*shape, dtype=dtype)
    tensor.untyped_storage().resize_(0)
    return tensor


def short(*shape: int) -> Tensor:
    """A tensor whose storage lacks its last few bytes."""
    tensor = torch.zeros(*shape)
    tensor.untyped_storage().resize_(tensor.nbytes - 4)
    return tensor


def lph_arguments(**changed: object) -> dict[str, object]:
    arguments: dict[str, object] = {
        "tokens": torch.randn(B, 1 + 12, C),
        "height": 3,
        "width": 4,
        "num_prefix_tokens": 1,
        "weight": torch.randn(C, C),
        "bias": torch.randn(C),
        "scale": torch.randn(C),
        "shift": torch.randn(C),
        "depthwise_weight": torch.randn(C, 3, 3),
        "depthwise_bias": torch.randn(C),
    }
    return arguments | changed


def tail_arguments(**changed: object) -> dict[str, object]:
    arguments = lph_arguments()
    del arguments["weight"]
    return {"hidden": torch.randn(B, 1 + 12, C)} | arguments | changed


def gah_arguments(**changed: object) -> dict[str, object]:
    arguments: dict[str, object] = {
        "tokens": torch.randn(B, 1 + 12, C),
        "height": 3,
        "width": 4,
        "num_prefix_tokens": 1,
        "qk_weight": torch.randn(2 * C, C),
        "num_heads": 4,
        "stride": 2,
        "average": False,
    }
    return arguments | changed


def step_arguments(**changed: object) -> dict[str, object]:
    arguments: dict[str, object] = {
        "pooled": torch.randn(B, 2, C),
        "tokens": torch.randn(B, 13, C),
        "num_class_tokens": 1,
        "weight": torch.randn(K, 3 * C),
        "bias": torch.randn(K),
        "rule": 3,
        "threshold": 0.5,
        "patience": 1,
        "state": torch.zeros(B, 2, dtype=torch.int32),
    }
    return arguments | changed


def compact_arguments(**changed: object) -> dict[str, object]:
    arguments: dict[str, object] = {
        "tensors": [torch.arange(B * 4.0).view(B, 4), torch.arange(B)],
        "keep": torch.tensor([False, True, True]),
        "count": torch.zeros(1, dtype=torch.int64),
    }
    return arguments | changed


def end_exit_arguments(**changed: object) -> dict[str, object]:
    arguments: dict[str, object] = {
        "logits": torch.randn(B, K),
        "leave": torch.tensor([True, False, False]),
        "valid": torch.ones(B, dtype=torch.bool),
        "tokens": torch.randn(B, 4),
        "into": torch.zeros(B + 1, 4),
        "rows": torch.arange(B),
        "state": torch.zeros(B, 2, dtype=torch.int32),
        "answer": [
            torch.zeros(B, K),
            torch.zeros(B, dtype=torch.int64),
            torch.zeros(B, dtype=torch.int64),
            torch.zeros(B, dtype=torch.bool),
        ],
        "entering": torch.tensor([B]),
        "counts": [torch.zeros(1, dtype=torch.int64)],
        "scratch": torch.zeros(1, dtype=torch.int32),
        "index": 0,
        "layer": 1,
    }
    return arguments | changed


def answer_with(place: int, tensor: Tensor) -> dict[str, object]:
    """The answer with one of its tensors replaced."""
    answer: list[object] = list(end_exit_arguments()["answer"])  # type: ignore[call-overload]
    answer[place] = tensor
    return {"answer": answer}


_GRID = [
    {"num_prefix_tokens": -1, "height": 14, "width": 1},
    {"num_prefix_tokens": -(2**63), "height": 1, "width": 13},
    {"height": -3, "width": -4},
    {"height": 0},
    {"height": 2**32, "width": 2**32, "num_prefix_tokens": 13},
    {"height": HUGE, "width": 4, "num_prefix_tokens": 13},
    {"height": 4},
    {"tokens": torch.randn(13, C)},
    {"tokens": torch.randn(B, 13, 0)},
    {"tokens": torch.randn(B, 13, C).half()},
    {"tokens": torch.randn(B, 13, C).double()},
    {"tokens": torch.ones(B, 13, C, dtype=torch.int32)},
    {"tokens": freed(B, 13, C)},
    {"tokens": short(B, 13, C)},
    {"tokens": torch.zeros(1).expand(1, 13, 2**56)},
    {"tokens": torch.randn(B, 13, C).to_sparse()},
]
_LPH = [
    *_GRID,
    *({"weight": w} for w in (torch.randn(C, C - 1), torch.randn(C - 1, C), torch.randn(C))),
    {"weight": torch.randn(C, C).bfloat16()},
    {"weight": freed(C, C)},
    {"weight": torch.randn(C, C, device="meta")},
    *(
        {name: bad}
        for name in ("bias", "scale", "shift", "depthwise_bias")
        for bad in (torch.randn(C - 1), torch.randn(C).double(), freed(C))
    ),
    {"scale": None},
    {"shift": None},
    {"depthwise_bias": None},
    {"depthwise_weight": None},
    {"depthwise_weight": torch.randn(C, 3)},
    {"depthwise_weight": torch.randn(9, C)},
]
_TAIL = [
    *_GRID,
    *(change for change in _LPH[len(_GRID) :] if "weight" not in change),
    *({"hidden": h} for h in (torch.randn(B, 12, C), freed(B, 13, C), short(B, 13, C))),
    {"hidden": torch.randn(B, 13, C).half()},
    {"hidden": torch.randn(B, 13, 2 * C)[..., ::2]},
    {"tokens": torch.randn(B, C, 13).transpose(1, 2)},
    {"bias": torch.randn(C).half()},
    {"scale": torch.randn(2 * C)[::2]},
    {"depthwise_weight": torch.randn(3, 3, C).permute(2, 0, 1)},
]
_GAH = [
    *_GRID,
    *(
        {"qk_weight": torch.randn(n, k)}
        for n, k in ((3 * C, C), (2 * C, C - 1), (C, 2 * C), (0, C))
    ),
    {"qk_weight": torch.randn(2 * C * C)},
    {"qk_weight": torch.randn(2 * C, C).bfloat16()},
    {"qk_weight": freed(2 * C, C)},
    *({"num_heads": heads} for heads in (0, -4, 3, C + 1, HUGE)),
    {"stride": 0},
    {"stride": -1},
    {"tokens": torch.randn(B, 13, 0), "qk_weight": torch.randn(0, 0)},
]
_STEP = [
    *({"num_class_tokens": count} for count in (-1, -3, 2, 14, HUGE, -HUGE)),
    {"num_class_tokens": -1, "weight": torch.randn(K, C)},
    {"num_class_tokens": 14, "weight": torch.randn(K, 16 * C)},
    *({"bias": bias} for bias in (torch.randn(K - 1), torch.randn(0), torch.randn(()), freed(K))),
    {"bias": torch.randn(1, K)},
    *({"weight": w} for w in (torch.randn(0, 3 * C), torch.randn(K, C), torch.randn(K * 3 * C))),
    {"weight": torch.randn(K, 3 * C).half()},
    {"weight": freed(K, 3 * C)},
    {"weight": torch.randn(0, 3 * C), "bias": torch.randn(0)},
    *({"pooled": p} for p in (torch.randn(B, C), torch.randn(B + 1, 2, C), freed(B, 2, C))),
    {"pooled": torch.randn(B, 2, 0), "tokens": torch.randn(B, 13, 0), "weight": torch.randn(K, 0)},
    *(
        {"tokens": t}
        for t in (torch.randn(B, 13, C + 1), torch.randn(B - 1, 13, C), freed(B, 13, C))
    ),
    {"tokens": torch.randn(B, C)},
    *(
        {"state": state}
        for state in (
            torch.zeros(B, 2, dtype=torch.int64),
            torch.zeros(B, 1, dtype=torch.int32),
            torch.zeros(B - 1, 2, dtype=torch.int32),
            torch.zeros(2 * B, dtype=torch.int32),
            torch.zeros(2, B, dtype=torch.int32).t(),
            torch.zeros(1, 2, dtype=torch.int32).expand(B, 2),
            torch.zeros(B + 1, dtype=torch.int32).as_strided((B, 2), (1, 1)),
            freed(B, 2, dtype=torch.int32),
        )
    ),
    *({"rule": rule} for rule in (-1, 5, HUGE)),
    {"patience": 0},
    {"patience": -1},
]
_BUFFER = torch.zeros(64)
_FLAGS = torch.tensor([False, True, True])
_COUNT = torch.zeros(B, dtype=torch.int64)
_COMPACT = [
    {"keep": torch.tensor([0, 1, 1])},
    {"keep": torch.tensor(True)},
    {"keep": freed(B, dtype=torch.bool)},
    {"keep": torch.tensor([False, True])},
    {"count": torch.zeros(0, dtype=torch.int64)},
    {"count": torch.zeros(2, dtype=torch.int64)},
    {"count": torch.zeros(1)},
    {"count": freed(1, dtype=torch.int64)},
    {"tensors": [freed(B, 4)]},
    {"tensors": [short(B, 4)]},
    {"tensors": [torch.zeros(())]},
    {"tensors": [torch.zeros(B, 4), torch.zeros(B - 1)]},
    {"tensors": [torch.zeros(1, 4).expand(B, 4)]},
    {"tensors": [torch.zeros(B, 8)[:, ::2]]},
    {"tensors": [torch.zeros(B, 1).expand(B, 2**56)]},
    {"tensors": [_BUFFER[:12].view(B, 4), _BUFFER[2:14].view(B, 4)]},
    {"tensors": [_BUFFER[:12].view(B, 4), _BUFFER[:12].view(B, 4)]},
    {"tensors": [_FLAGS], "keep": _FLAGS},
    {"tensors": [_COUNT], "count": _COUNT[1:2]},
    {"tensors": [torch.zeros(B, 4).to_sparse()]},
    {"tensors": [torch.zeros(B, 4, device="meta")]},
]
_END_EXIT = [
    *(
        {name: tensor}
        for name in ("logits", "tokens", "into", "state")
        for tensor in (
            freed(B, 4),
            short(B, 4),
            torch.zeros(()),
            torch.zeros(B - 1, 4),
            torch.zeros(1, 4).expand(B, 4),
            torch.zeros(B, 8)[:, ::2],
            torch.zeros(B, 1).expand(B, 2**56),
            torch.zeros(B, 4).to_sparse(),
        )
    ),
    *({name: freed(B, dtype=torch.bool)} for name in ("leave", "valid")),
    *({name: torch.ones(B + 1, dtype=torch.bool)} for name in ("leave", "valid")),
    *({name: torch.ones(2 * B, dtype=torch.bool)[::2]} for name in ("leave", "valid")),
    *({"rows": rows} for rows in (freed(B, dtype=torch.int64), torch.zeros(1).long().expand(B))),
    *({"rows": torch.tensor([0, row, 1])} for row in (-1, B, HUGE, -HUGE)),
    *({"entering": torch.tensor([count])} for count in (-1, B + 1, HUGE, -HUGE)),
    *({"entering": t} for t in (torch.zeros(1), torch.arange(2), freed(1, dtype=torch.int64))),
    *({"counts": [t]} for t in (torch.zeros(1), _COUNT, freed(1, dtype=torch.int64))),
    *({"scratch": t} for t in (torch.zeros(1), freed(1, dtype=torch.int32))),
    {"answer": []},
    answer_with(0, torch.zeros(B, K + 1)),
    answer_with(0, torch.zeros(B, K).double()),
    answer_with(0, torch.zeros(B - 1, K)),
    answer_with(0, freed(B, K)),
    answer_with(0, torch.zeros(1, K).expand(B, K)),
    *(answer_with(place, torch.zeros(B)) for place in (1, 2, 3)),
    *(answer_with(place, freed(B, dtype=torch.int64)) for place in (1, 2)),
    answer_with(3, freed(B, dtype=torch.bool)),
    answer_with(1, torch.zeros(B - 1, dtype=torch.int64)),
    {"tokens": _BUFFER[:12].view(B, 4), "into": _BUFFER[8:24].view(B + 1, 4)},
    {"tokens": _BUFFER[:12].view(B, 4), "state": _BUFFER[11:17].view(B, 2)},
    {"logits": _BUFFER[:15].view(B, K), "tokens": _BUFFER[14:26].view(B, 4)},
    {"rows": _COUNT, "counts": [_COUNT[2:3]]},
    {"leave": _FLAGS} | answer_with(3, _FLAGS),
]


def _operator(name: str, arguments: Callable[..., dict[str, object]], changed: dict[str, object]):
    return lambda: getattr(torch.ops.lgvit_fast, name)(**arguments(**changed))


def _lph(changed: dict[str, object], backend: str) -> object:
    a = lph_arguments(**changed)
    names = LPHWeights._fields
    weights = LPHWeights(**{name: a[name] for name in names})
    return lph_pool(
        a["tokens"], (a["height"], a["width"]), a["num_prefix_tokens"], weights, backend=backend
    )


def _gah(changed: dict[str, object], backend: str) -> object:
    a = gah_arguments(**changed)
    grid, pool = (a["height"], a["width"]), "average" if a["average"] else "subsample"
    weight = a["qk_weight"]
    return gah_pool(
        a["tokens"],
        grid,
        a["num_prefix_tokens"],
        weight,
        a["num_heads"],
        a["stride"],
        pool,
        backend=backend,
    )


def _step(changed: dict[str, object], backend: str) -> object:
    a = step_arguments(**changed)
    rule = ExitRule(a.pop("rule"), a.pop("threshold"), a.pop("patience"))
    return exit_step(**a, rule=rule, backend=backend)


def _compact(changed: dict[str, object], backend: str) -> object:
    a = compact_arguments(**changed)
    return compact_(a["tensors"][0], a["keep"], *a["tensors"][1:], backend=backend)


def _other() -> dict[str, Callable[[], object]]:
    layer = PackedLinear(torch.randn(6, 8), gemm="linear")
    taps, bias = torch.randn(C, 3, 3), torch.randn(C)
    return {
        "fastest-5-0": lambda: fastest(5, 0, torch.float32),
        "fastest-0-5": lambda: fastest(0, 5, torch.float32),
        "fastest-negative": lambda: fastest(-5, 5, torch.float32),
        "linear_choice-5-0": lambda: torch.ops.lgvit_fast.linear_choice(5, 0, torch.float32),
        "linear_choice-int": lambda: torch.ops.lgvit_fast.linear_choice(5, 5, torch.int32),
        "PackedLinear-no-columns": lambda: PackedLinear(torch.randn(5, 0)),
        "PackedLinear-no-rows": lambda: PackedLinear(torch.randn(0, 5)),
        "PackedLinear-freed": lambda: PackedLinear(freed(5, 5)),
        "PackedLinear-bias-freed": lambda: PackedLinear(torch.randn(5, 5), freed(5)),
        "PackedLinear-x-columns": lambda: layer(torch.randn(3, 7)),
        "PackedLinear-x-dtype": lambda: layer(torch.randn(3, 8).double()),
        "PackedLinear-x-scalar": lambda: layer(torch.randn(())),
        "attention-no-channels": lambda: attention(torch.randn(2, 3, 0), 1),
        "attention-freed": lambda: attention(freed(2, 3, 12), 2),
        "depthwise-freed": lambda: depthwise_gelu(freed(B, 12, C), (3, 4), taps, bias),
        "depthwise-negative": lambda: depthwise_gelu(torch.randn(B, 12, C), (-3, -4), taps, bias),
    }


def _on_meta(changed: dict[str, object]) -> bool:
    values = [
        v for value in changed.values() for v in (value if isinstance(value, list) else [value])
    ]
    return any(isinstance(v, Tensor) and v.is_meta for v in values)


def cases(native: bool = True) -> dict[str, Callable[[], object]]:
    """Every hostile call by name. `native`: those of the compiled operators too."""
    table = _other() if native else {k: v for k, v in _other().items() if "linear_choice" not in k}
    backends = ("torch", "cpp") if native else ("torch",)
    of_op = {
        "lph_pool": ("lph_pool_cpp", lph_arguments, _LPH, _lph),
        "lph_tail": ("lph_tail", tail_arguments, _TAIL, None),
        "gah_pool": ("gah_pool_cpp", gah_arguments, _GAH, _gah),
        "exit_step": ("exit_step_cpp", step_arguments, _STEP, _step),
        "compact_": ("compact_", compact_arguments, _COMPACT, _compact),
        "end_exit_": ("end_exit_", end_exit_arguments, _END_EXIT, None),
    }
    for op, (name, arguments, changes, public) in of_op.items():
        for i, changed in enumerate(changes):
            label = f"{op}-{i}-{'+'.join(changed)}"
            if native and not _on_meta(changed):  # there the operators only tell shapes
                table[f"operator-{label}"] = _operator(name, arguments, changed)
            if (
                public is None
                or "count" in changed
                or any(
                    isinstance(v, Tensor) and v.dtype in (torch.float16, torch.float64)
                    for v in changed.values()
                )
            ):
                continue  # the public functions have no such argument, or take these dtypes
            for backend in backends:
                table[f"{backend}-{label}"] = (
                    lambda public=public, changed=changed, backend=backend: public(changed, backend)
                )
    return table
