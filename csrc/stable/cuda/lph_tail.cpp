// lph_tail for CUDA tensors: launches on the current stream.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>

#include "../lph_tail.h"
#include "launch.h"
#include "lph_tail_kernel.h"

namespace {

using torch::stable::Tensor;

lgvit::Scalar scalar_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case lgvit::ScalarType::BFloat16: return lgvit::Scalar::bfloat16;
    case lgvit::ScalarType::Half: return lgvit::Scalar::float16;
    default: return lgvit::Scalar::float32;
  }
}

// The patches of tokens [B, P + N, C].
lgvit::Map patches(const Tensor& tensor, int64_t num_prefix_tokens) {
  const auto* data = static_cast<const char*>(tensor.const_data_ptr());
  return {data + num_prefix_tokens * tensor.stride(1) * int64_t(tensor.element_size()), tensor.stride(0),
          tensor.stride(1)};
}

Tensor lph_tail(const Tensor& hidden, const Tensor& tokens, int64_t height, int64_t width,
                int64_t num_prefix_tokens, const Tensor& bias, const std::optional<Tensor>& scale,
                const std::optional<Tensor>& shift, const std::optional<Tensor>& depthwise_weight,
                const std::optional<Tensor>& depthwise_bias) {
  const lgvit::LphTail tail{hidden, tokens, height, width, num_prefix_tokens, bias, scale, shift,
                            depthwise_weight, depthwise_bias};
  tail.check();
  LGVIT_CHECK_VALUE(tokens.is_cuda() && hidden.device() == tokens.device(), "hidden is on ",
                    lgvit::device_text(hidden), ", tokens on ", lgvit::device_text(tokens),
                    ", expected the same CUDA device");
  LGVIT_CHECK_VALUE(tail.batch() * (tail.channels() / 64 + 1) <= std::numeric_limits<int32_t>::max(),
                    "tokens has shape ", lgvit::shape_text(tokens), ", too large for one launch");
  const lgvit::Launch launch(tokens);
  Tensor pooled = tail.pooled();
  if (tail.batch() == 0) return pooled;
  const auto data = [](const std::optional<Tensor>& vector) {
    return vector ? vector->const_data_ptr<float>() : nullptr;
  };
  lgvit::LphTailArgs args{};
  args.type = scalar_of(tokens);
  args.hidden = patches(hidden, num_prefix_tokens);
  args.tokens = patches(tokens, num_prefix_tokens);
  args.bias = bias.const_data_ptr<float>();
  args.scale = data(scale);
  args.shift = data(shift);
  args.taps = data(depthwise_weight);
  args.depthwise_bias = data(depthwise_bias);
  args.pooled = pooled.mutable_data_ptr<float>();
  args.batch = tail.batch();
  args.height = int(height);
  args.width = int(width);
  args.channels = int(tail.channels());
  STD_CUDA_CHECK(lgvit::launch_lph_tail(args, launch.multiprocessors, launch.stream));
  return pooled;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lgvit_fast, CUDA, m) { m.impl("lph_tail", TORCH_BOX(&lph_tail)); }
