"""What the CUDA kernels need, as ptxas says it."""

import os
import shutil

import pytest

from benchmarks import cuda_table

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN5lgvit12_GLOBAL__N_115end_exit_kernelILb1EEEvNS_11EndExitArgsE' for 'sm_90'
ptxas info    : Function properties for _ZN5lgvit12_GLOBAL__N_115end_exit_kernelILb1EEEvNS_11EndExitArgsE
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 70 registers, used 1 barriers, 32808 bytes smem
ptxas info    : Compiling entry function '_ZN5lgvit12_GLOBAL__N_114compact_kernelENS_11CompactArgsE' for 'sm_90'
ptxas info    : Function properties for _ZN5lgvit12_GLOBAL__N_114compact_kernelENS_11CompactArgsE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 62 registers, used 1 barriers, 16420 bytes smem, 776 bytes cmem[0]
"""  # noqa: E501


def test_the_report_of_ptxas_is_read():
    exit_, compact = cuda_table.parse(REPORT, 90, {})
    assert exit_ == ("end_exit_, into another buffer", 90, 70, 12, 32808, None)
    assert compact == ("compact_", 90, 62, 0, 16420, None)
    assert cuda_table.violations([exit_, compact]) == [
        "end_exit_, into another buffer on sm_90: 12 bytes of registers spill",
        "end_exit_, into another buffer on sm_90: 70 registers, budget 64",
    ]


def test_the_docs_have_a_table_of_every_kernel():
    table = cuda_table.DOCS.read_text().split(cuda_table.MARKS[0])[1].split(cuda_table.MARKS[1])[0]
    for kernel in cuda_table.kernels():
        assert f"| {kernel.name} | " in table


@pytest.mark.skipif(
    not (os.environ.get("CUDA_HOME") or shutil.which("nvcc")), reason="nvcc is not installed"
)
def test_the_kernels_keep_to_the_budget():
    uses = cuda_table.compile_for(90)
    assert {use.kernel for use in uses} == {kernel.name for kernel in cuda_table.kernels()}
    assert cuda_table.violations(uses) == []
    tails = [use.instructions for use in uses if use.kernel.startswith("lph_tail: full")]
    assert all(rate is not None and 30 < rate < 120 for rate in tails)
