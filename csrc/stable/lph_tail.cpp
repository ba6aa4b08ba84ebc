// lph_tail on the CPU, plainly: what the CUDA kernel computes. The heads of a CPU run on csrc/cpu/lph.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <optional>
#include <vector>

#include "lph_tail.h"

namespace {

using torch::stable::Tensor;

double gelu(double x) { return 0.5 * x * (1.0 + std::erf(x * M_SQRT1_2)); }

// One image and channel: the mean of what follows the GEMM.
template <typename T>
double mean_hidden(const lgvit::LphTail& tail, const T* hidden, int64_t stride, int64_t channel) {
  const int64_t height = tail.height, width = tail.width, count = height * width;
  const auto at = [&](const std::optional<Tensor>& vector, int64_t i) {
    return double(vector->const_data_ptr<float>()[i]);
  };
  std::vector<double> u(count);
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    u[i] = gelu(double(hidden[i * stride]) + at(tail.bias, channel));
    if (tail.full()) u[i] = u[i] * at(tail.scale, channel) + at(tail.shift, channel);
    sum += u[i];
  }
  if (!tail.full()) return sum / double(count);
  sum = 0.0;
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < width; ++x) {
      double z = at(tail.depthwise_bias, channel);
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t v = y + tap / 3 - 1, w = x + tap % 3 - 1;
        if (v >= 0 && v < height && w >= 0 && w < width)
          z += u[v * width + w] * at(tail.depthwise_weight, channel * 9 + tap);
      }
      sum += gelu(z);
    }
  return sum / double(count);
}

template <typename T>
void means(const lgvit::LphTail& tail, float* pooled) {
  const int64_t channels = tail.channels(), count = tail.height * tail.width;
  const auto first = [&](const Tensor& map, int64_t image, int64_t channel) {
    return static_cast<const T*>(map.const_data_ptr()) + image * map.stride(0) +
           tail.num_prefix_tokens * map.stride(1) + channel;
  };
  for (int64_t image = 0; image < tail.batch(); ++image)
    for (int64_t channel = 0; channel < channels; ++channel) {
      float* out = pooled + image * 2 * channels + channel;
      out[0] = float(mean_hidden(tail, first(tail.hidden, image, channel), tail.hidden.stride(1), channel));
      const T* tokens = first(tail.tokens, image, channel);
      double sum = 0.0;
      for (int64_t i = 0; i < count; ++i) sum += double(tokens[i * tail.tokens.stride(1)]);
      out[channels] = float(sum / double(count));
    }
}

Tensor lph_tail(const Tensor& hidden, const Tensor& tokens, int64_t height, int64_t width,
                int64_t num_prefix_tokens, const Tensor& bias, const std::optional<Tensor>& scale,
                const std::optional<Tensor>& shift, const std::optional<Tensor>& depthwise_weight,
                const std::optional<Tensor>& depthwise_bias) {
  const lgvit::LphTail tail{hidden, tokens, height, width, num_prefix_tokens, bias, scale, shift,
                            depthwise_weight, depthwise_bias};
  tail.check();
  Tensor pooled = tail.pooled();
  float* out = pooled.mutable_data_ptr<float>();
  switch (tokens.scalar_type()) {
    case lgvit::ScalarType::BFloat16: means<torch::headeronly::BFloat16>(tail, out); break;
    case lgvit::ScalarType::Half: means<torch::headeronly::Half>(tail, out); break;
    default: means<float>(tail, out);
  }
  return pooled;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lgvit_fast, CPU, m) { m.impl("lph_tail", TORCH_BOX(&lph_tail)); }
