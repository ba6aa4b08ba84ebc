// The operators that torch's stable ABI can express, by schema: one binary serves every torch from
// TORCH_TARGET_VERSION on (setup.py). No header of csrc/stable includes ATen or c10. Without
// csrc/dispatch.cpp, lgvit_fast/_autograd_kernels.py has their autograd kernels.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(lgvit_fast, m) {
  // Moves the rows of each tensor [B, ...] that `keep` [B] marks to the front, the same way in all,
  // and writes their number to `count` [1] int64 (CUDA: in pinned memory or on the device).
  m.def("compact_(Tensor(a!)[] tensors, Tensor keep, Tensor(b!) count) -> ()");

  // All that follows an exit's decision: writes the answers of the images that leave and packs the
  // others into the first rows, the same way in tokens, rows and state. lgvit_fast/ops/end_exit.py
  // says what each argument is. No allocation and no wait: fit for a CUDA graph.
  m.def(
      "end_exit_(Tensor logits, Tensor leave, Tensor valid, Tensor(a!) tokens, Tensor(b!)? into,"
      " Tensor(c!) rows, Tensor(d!) state, Tensor(e!)[] answer, Tensor? entering, Tensor(f!)[] counts,"
      " Tensor(g!)? scratch, int index, int layer) -> ()");

  // What a local perception head does after its GEMM, down to the means [B, 2, C] float32: `hidden` is
  // the tokens [B, P + N, C] times its weight, without the bias. lgvit_fast/ops/lph.py says what each
  // argument is; vectors are float32. No wait: fit for a CUDA graph.
  m.def(
      "lph_tail(Tensor hidden, Tensor tokens, int height, int width, int num_prefix_tokens, Tensor bias,"
      " Tensor? scale, Tensor? shift, Tensor? depthwise_weight, Tensor? depthwise_bias) -> Tensor");
}
