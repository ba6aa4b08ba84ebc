// Matrix products by the fastest GEMM that torch has on this processor.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>

namespace lgvit {

// Inside an op: the torch functions it calls record no gradient and do not autocast.
struct PlainKernels {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// x [M, K] times the transpose of the first n rows of weight [*, K] -> [M, n], in their dtype.
// Both are contiguous, not empty, and checked. What is prepared from the weight is kept until its
// storage is freed or its contents change, so it should be the caller's own tensor.
at::Tensor fast_linear(const at::Tensor& x, const at::Tensor& weight, int64_t n);

}  // namespace lgvit
