// What the CPU and the CUDA implementation of lph_tail share: its arguments, checked, and its result.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <limits>
#include <optional>
#include <string>

#include "checks.h"

namespace lgvit {

using torch::headeronly::ScalarType;

// The arguments of lph_tail, as csrc/stable/ops.cpp describes them.
struct LphTail {
  Tensor hidden, tokens;
  int64_t height, width, num_prefix_tokens;
  Tensor bias;
  std::optional<Tensor> scale, shift, depthwise_weight, depthwise_bias;

  int64_t batch() const { return tokens.size(0); }
  int64_t channels() const { return tokens.size(2); }
  bool full() const { return depthwise_weight.has_value(); }

  void check() const {
    check_map("tokens", tokens);
    check_map("hidden", hidden);
    const ScalarType type = tokens.scalar_type();
    LGVIT_CHECK_VALUE(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                      "tokens is ", type, ", expected float32, bfloat16 or float16");
    LGVIT_CHECK_VALUE(hidden.scalar_type() == type && shape_text(hidden) == shape_text(tokens), "hidden is ",
                      hidden.scalar_type(), " ", shape_text(hidden), ", tokens ", type, " ",
                      shape_text(tokens));
    int64_t patches = 0, all = 0;
    LGVIT_CHECK_VALUE(height > 0 && width > 0 && num_prefix_tokens >= 0 &&
                          !mul_overflows(height, width, patches) &&
                          !__builtin_add_overflow(patches, num_prefix_tokens, &all) && all == tokens.size(1),
                      "tokens has ", tokens.size(1), " rows an image, expected ", num_prefix_tokens,
                      " prefix tokens + ", height, " x ", width, " patches");
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    LGVIT_CHECK_VALUE(all <= kMost / 2 && channels() <= kMost / 32 && batch() <= kMost,
                      "tokens has shape ", shape_text(tokens), ", too large in a dimension");
    check_vector("bias", bias, {channels()});
    if (full()) check_vector("depthwise_weight", *depthwise_weight, {channels(), 3, 3});
    check_optional("scale", scale);
    check_optional("shift", shift);
    check_optional("depthwise_bias", depthwise_bias);
  }

  // Fresh memory for the means, [B, 2, C] float32.
  Tensor pooled() const {
    return torch::stable::new_empty(tokens, std::array<int64_t, 3>{batch(), 2, channels()}, ScalarType::Float);
  }

 private:
  static void check_map(const std::string& name, const Tensor& tensor) {
    check_memory(name, tensor);
    LGVIT_CHECK_VALUE(tensor.dim() == 3 && tensor.size(2) > 0, name, " has shape ", shape_text(tensor),
                      ", expected [B, P + N, C]");
    LGVIT_CHECK_VALUE(tensor.numel() == 0 || tensor.size(2) == 1 || tensor.stride(2) == 1, name,
                      ": channels must be contiguous, got strides ", stride_text(tensor));
  }

  void check_vector(const std::string& name, const Tensor& tensor, const std::vector<int64_t>& shape) const {
    check_memory(name, tensor);
    LGVIT_CHECK_VALUE(
        tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() &&
            shape_text(tensor) == list_text(shape.data(), int64_t(shape.size())),
        name, " is ", tensor.scalar_type(), " ", shape_text(tensor), " with strides ", stride_text(tensor),
        ", expected float32 ", list_text(shape.data(), int64_t(shape.size())), ", contiguous");
    LGVIT_CHECK_VALUE(tensor.device() == tokens.device(), name, " is on ", device_text(tensor),
                      ", tokens on ", device_text(tokens));
  }

  void check_optional(const std::string& name, const std::optional<Tensor>& vector) const {
    LGVIT_CHECK_VALUE(vector.has_value() == full(), name, full() ? " is missing" : " is given without",
                      full() ? ", depthwise_weight is given" : " depthwise_weight");
    if (vector) check_vector(name, *vector, {channels()});
  }
};

}  // namespace lgvit
