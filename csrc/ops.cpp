// Every operator of the library by schema. Implementations register themselves: csrc/cpu for the
// CPU (compiled once for each instruction set), csrc/cuda for CUDA. Fake implementations, autograd
// and argument checks with good messages are in Python, beside the reference.
#include <torch/library.h>

TORCH_LIBRARY(lgvit_fast, m) {
  // Moves the rows of each tensor [B, ...] that `keep` [B] marks to the front, the same way in all,
  // and writes their number to `count` [1] int64 (CUDA: in pinned memory or on the device).
  m.def("compact_(Tensor(a!)[] tensors, Tensor keep, Tensor(b!) count) -> ()");

  // The heads' ops of lgvit_fast/ops, which say what they compute, with their arguments flattened.
  m.def(
      "lph_pool_cpp(Tensor tokens, int height, int width, int num_prefix_tokens, Tensor weight,"
      " Tensor bias, Tensor? scale, Tensor? shift, Tensor? depthwise_weight,"
      " Tensor? depthwise_bias) -> Tensor");
  m.def(
      "gah_pool_cpp(Tensor tokens, int height, int width, int num_prefix_tokens, Tensor qkv_weight,"
      " int num_heads, int stride, bool average) -> Tensor");
  m.def(
      "exit_step_cpp(Tensor pooled, Tensor tokens, int num_class_tokens, Tensor weight,"
      " Tensor bias, int rule, float threshold, int patience, Tensor(a!) state)"
      " -> (Tensor logits, Tensor leave, Tensor valid)");

  // Name of the GEMM that linear layers [N, K] of a dtype run on: "linear", "conv" or "packed".
  m.def("linear_choice(int n, int k, ScalarType dtype) -> str");
}
