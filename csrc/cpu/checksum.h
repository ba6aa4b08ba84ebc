// A number that tells whether memory still holds what it held.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace lgvit {

// Of a dense tensor's bytes in order; it is contiguous. A change of one 4-byte word always changes
// it, any other change but for a chance of about 2^-64.
int64_t checksum(const at::Tensor& tensor);

}  // namespace lgvit
