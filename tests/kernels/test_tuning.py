"""When a kernel is tuned, and when not: the tuner and the GPU are played by others."""

from types import SimpleNamespace

import pytest
import torch
import triton

from lgvit_fast.kernels import depthwise, gah, lph, tuning


@pytest.fixture
def kernel(monkeypatch):
    """A kernel with three candidates, of which Triton would find the last fastest."""
    state = SimpleNamespace(ran=[], tuned=[], device=0, capturing=False)

    def autotune(candidates, key, **kwargs):
        def run(*args, **named):
            state.tuned.append([config.num_warps for config in candidates])

        return lambda fn: SimpleNamespace(run=run, best_config=candidates[-1])

    monkeypatch.setattr(triton, "autotune", autotune)
    monkeypatch.setattr(tuning, "device_at", lambda index: tuning.Device(100, 90))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    fn = SimpleNamespace(
        arg_names=["x", "size"], run=lambda *args, num_warps, **kw: state.ran.append(num_warps)
    )
    configs = [triton.Config({}, num_warps=warps) for warps in (8, 4, 2)]
    fits = lambda config, args, device: config.num_warps * 20 <= device.shared  # noqa: E731
    state.kernel = tuning.autotune(configs, key=["size"], fits=fits)(fn)
    return state


def test_a_kernel_is_tuned_once_for_each_key_dtype_and_device(kernel):
    x = torch.zeros(1)
    for size in (1, 1, 2, 1):
        kernel.kernel[(1,)](x, size=size)
    assert kernel.tuned == [[4, 2]] * 2 and kernel.ran == [2] * 4  # eight warps do not fit
    kernel.kernel[(1,)](x.bfloat16(), size=1)
    kernel.device = 1
    kernel.kernel[(1,)](x, size=1)
    assert len(kernel.tuned) == 4


def test_nothing_is_tuned_while_a_graph_is_captured(kernel):
    x, kernel.capturing = torch.zeros(1), True
    kernel.kernel[(1,)](x, size=1)
    assert kernel.tuned == [] and kernel.ran == [4]  # the first that fits
    kernel.capturing = False
    kernel.kernel[(1,)](x, size=1)
    kernel.capturing = True
    kernel.kernel[(1,)](x, size=1)
    assert len(kernel.tuned) == 1 and kernel.ran == [4, 2, 2]


def test_rows_stand_in_the_key_of_every_tuned_kernel():
    modules = (depthwise, gah, lph)
    tuned = [v for m in modules for v in vars(m).values() if isinstance(v, tuning.Tuned)]
    assert len(tuned) == 6 and all("size" in kernel.key for kernel in tuned)
    assert len({tuning.size_class(batch * 196) for batch in (1, 16, 256)}) == 3
    assert tuning.size_class(0) == tuning.size_class(1) == 0
