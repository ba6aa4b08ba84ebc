// gah_pool on the CPU: pool the grid, one library GEMM for queries and keys, then for each image and
// head the attention scores (library), and in one pass their softmax, its mean over the queries and
// the mean token under these weights. The value projection sees one vector for each image and head.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "linear.h"
#include "vec.h"

namespace lgvit {
namespace {

using at::Tensor;
using at::vec::fmadd;

void narrow_to(const float* x, float* out, int64_t count) { std::copy_n(x, count, out); }

void narrow_to(const float* x, at::BFloat16* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = x[i];
}

// tokens [B, P + H * W, C], last stride 1 -> [B, ceil(H / r) * ceil(W / r), C]: every r-th row and
// column, or the mean of what lies inside each r x r window.
template <typename T>
Tensor pool_grid(const Tensor& tokens, int64_t prefix, int64_t height, int64_t width,
                 int64_t stride, bool average) {
  const int64_t batch = tokens.size(0), channels = tokens.size(2);
  const int64_t out_height = at::divup(height, stride), out_width = at::divup(width, stride);
  Tensor out = at::empty({batch, out_height * out_width, channels}, tokens.options());
  const T* x = tokens.const_data_ptr<T>();
  T* y = out.mutable_data_ptr<T>();
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / (out_width * channels));
  at::parallel_for(0, batch * out_height, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(average ? channels : 0);
    for (int64_t line = begin; line < end; ++line) {
      const T* image = x + line / out_height * tokens.stride(0) + prefix * tokens.stride(1);
      const int64_t top = line % out_height * stride;
      const int64_t bottom = std::min(top + stride, height);
      for (int64_t column = 0; column < out_width; ++column) {
        T* target = y + (line * out_width + column) * channels;
        const int64_t left = column * stride, right = std::min(left + stride, width);
        const auto token = [&](int64_t i, int64_t j) {
          return image + (i * width + j) * tokens.stride(1);
        };
        if (!average) {
          std::memcpy(target, token(top, left), channels * sizeof(T));
          continue;
        }
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (int64_t i = top; i < bottom; ++i)
          for (int64_t j = left; j < right; ++j)
            for (int64_t c = 0; c < channels; ++c) sum[c] += token(i, j)[c];
        const float share = 1.0f / static_cast<float>((bottom - top) * (right - left));
        for (float& value : sum) value *= share;
        narrow_to(sum.data(), target, channels);
      }
    }
  });
  return out;
}

// Mean over the rows of softmax(scale * scores): scores [n, n] -> weights [n]; `row` is scratch [n].
void mean_attention(const float* scores, int64_t n, float scale, float* row, float* weights) {
  std::fill_n(weights, n, 0.0f);
  for (int64_t i = 0; i < n; ++i, scores += n) {
    const float largest = at::vec::reduce_all<float>(
        [](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, scores, n);
    const Vec scales(scale), offset(-scale * largest);
    for (int64_t j = 0; j < n; j += kLanes)
      store(row + j, fmadd(load(scores + j, n - j), scales, offset).exp_u20(), n - j);
    const float total =
        at::vec::reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, row, n);
    const Vec share(1.0f / (total * static_cast<float>(n)));
    for (int64_t j = 0; j < n; j += kLanes)
      store(weights + j, fmadd(load(row + j, n - j), share, load(weights + j, n - j)), n - j);
  }
}

// out [C] = sum over the n tokens of weights [n] times tokens [n, C].
template <typename T>
void weighted_token(const float* weights, const T* tokens, int64_t n, int64_t channels,
                    float* out) {
  constexpr int64_t kVecs = 8;
  for (int64_t c = 0; c < channels; c += kVecs * kLanes) {
    Vec sum[kVecs];
    for (int64_t v = 0; v < kVecs; ++v) sum[v] = Vec(0.0f);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t v = 0; v < kVecs; ++v) {
        const int64_t at = c + v * kLanes;
        sum[v] = fmadd(Vec(weights[i]), load(tokens + i * channels + at, channels - at), sum[v]);
      }
    for (int64_t v = 0; v < kVecs; ++v)
      store(out + c + v * kLanes, sum[v], channels - c - v * kLanes);
  }
}

// tokens [B, n, C] and query_key [B, n, 2C] float -> each head's mean token [heads, B, C] float.
template <typename T>
Tensor attend(const Tensor& tokens, const Tensor& query_key, int64_t heads) {
  const int64_t batch = tokens.size(0), n = tokens.size(1), channels = tokens.size(2);
  const int64_t head_dim = channels / heads;
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  const Tensor by_head = query_key.view({batch, n, 2, heads, head_dim}).permute({2, 0, 3, 1, 4});
  const Tensor query = by_head[0], key = by_head[1].transpose(-2, -1);
  Tensor gathered = at::empty({heads, batch, channels}, query_key.options());
  const T* x = tokens.const_data_ptr<T>();
  float* out = gathered.mutable_data_ptr<float>();
  // Images run in parallel; of a single image, the library's product and the heads do.
  at::parallel_for(0, batch, 1, [&](int64_t first, int64_t last) {
    const c10::InferenceMode inference;  // a worker thread starts without the caller's settings
    const PlainKernels plain;
    Tensor scores = at::empty({heads, n, n}, query_key.options());
    for (int64_t image = first; image < last; ++image) {
      at::bmm_out(scores, query[image], key[image]);
      at::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
        std::vector<float> row(n), weights(n);
        for (int64_t head = begin; head < end; ++head) {
          mean_attention(scores.const_data_ptr<float>() + head * n * n, n, scale, row.data(),
                         weights.data());
          weighted_token(weights.data(), x + image * n * channels, n, channels,
                         out + (head * batch + image) * channels);
        }
      });
    }
  });
  return gathered;
}

template <typename T>
Tensor pool(const Tensor& tokens, int64_t prefix, int64_t height, int64_t width,
            const Tensor& qkv_weight, int64_t heads, int64_t stride, bool average) {
  const int64_t batch = tokens.size(0), channels = tokens.size(2), head_dim = channels / heads;
  const Tensor s = pool_grid<T>(tokens, prefix, height, width, stride, average);
  const Tensor query_key = fast_linear(s.view({-1, channels}), qkv_weight, 2 * channels)
                               .view({batch, -1, 2 * channels});
  const Tensor gathered = attend<T>(s, query_key.to(at::kFloat), heads).to(tokens.scalar_type());
  const Tensor values = qkv_weight.narrow(0, 2 * channels, channels)
                            .view({heads, head_dim, channels})
                            .transpose(1, 2);
  return at::bmm(gathered, values).transpose(0, 1).reshape({batch, 1, channels}).to(at::kFloat);
}

Tensor gah_pool(const Tensor& tokens, int64_t height, int64_t width, int64_t num_prefix_tokens,
                const Tensor& qkv_weight, int64_t num_heads, int64_t stride, bool average) {
  const PlainKernels plain;
  TORCH_CHECK_VALUE(tokens.dim() == 3 && height > 0 && width > 0 &&
                        tokens.size(1) == num_prefix_tokens + height * width,
                    "tokens must be [B, ", num_prefix_tokens, " + ", height, " * ", width,
                    ", C], got ", tokens.sizes());
  TORCH_CHECK_VALUE(num_heads > 0 && tokens.size(2) % num_heads == 0 && stride > 0,
                    "num_heads must divide the width and stride be positive, got ", num_heads,
                    " and ", stride);
  const int64_t batch = tokens.size(0), channels = tokens.size(2);
  if (batch == 0) return at::empty({0, 1, channels}, tokens.options().dtype(at::kFloat));
  const Tensor x = tokens.stride(2) == 1 ? tokens : tokens.contiguous();
  const Tensor weight = qkv_weight.contiguous();
  const auto run = x.scalar_type() == at::kBFloat16 ? pool<at::BFloat16> : pool<float>;
  return run(x, num_prefix_tokens, height, width, weight, num_heads, stride, average);
}

}  // namespace
}  // namespace lgvit

TORCH_LIBRARY_IMPL(lgvit_fast, CPU, m) { m.impl("gah_pool_cpp", lgvit::gah_pool); }
