// Every operator of the library by schema. Implementations register themselves: csrc/cpu for the
// CPU (compiled once for each instruction set), csrc/cuda for CUDA. Fake implementations, autograd
// and argument checks with good messages are in Python, beside the reference.
#include <torch/library.h>

TORCH_LIBRARY(lgvit_fast, m) {
  // Moves the rows of each tensor [B, ...] that `keep` [B] marks to the front, the same way in all,
  // and writes their number to `count` [1] int64 (CUDA: in pinned memory or on the device).
  m.def("compact_(Tensor(a!)[] tensors, Tensor keep, Tensor(b!) count) -> ()");
}
