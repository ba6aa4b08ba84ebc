// gah_pool on the CPU: pool the grid, one library GEMM for queries and keys, then in one pass for each
// image and head the scores, their softmax, its mean over the queries and the mean token under these
// weights. What lies between them stays in the caches.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../checks.h"
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

// A row to float; fetches the row `ahead` meanwhile, which lies too far off for the hardware to guess.
template <typename T>
void widen(const T* x, int64_t count, const T* ahead, float* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    __builtin_prefetch(ahead + i);
    store(out + i, load(x + i, count - i), count - i);
  }
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

// One head's attention over the n tokens of an image, its working memory kept from image to image.
// Keys lie transposed, a column for each token, so that a vector holds the scores of its tokens.
class MeanAttention {
 public:
  MeanAttention(int64_t n, int64_t head_dim)
      : n_(n), head_dim_(head_dim), columns_(at::divup(n, kVecs * kLanes) * kVecs * kLanes),
        query_(kRows * head_dim), keys_(head_dim * columns_), scores_(kRows * columns_),
        weights_(n) {}

  // Mean over the queries of softmax(query key^T / sqrt(head_dim)) -> [n]. Query and key [n, head_dim]
  // have rows `stride` apart.
  template <typename T>
  const float* weights(const T* query, const T* key, int64_t stride) {
    for (int64_t j = 0; j < n_; ++j) {
      widen(key + j * stride, head_dim_, key + std::min(j + kAhead, n_ - 1) * stride, query_.data());
      for (int64_t d = 0; d < head_dim_; ++d) keys_[d * columns_ + j] = query_[d];
    }
    std::fill(weights_.begin(), weights_.end(), 0.0f);
    for (int64_t i = 0; i < n_; i += kRows) {
      const int64_t rows = std::min(kRows, n_ - i);
      for (int64_t r = i; r < i + rows; ++r)
        widen(query + r * stride, head_dim_, query + std::min(r + kAhead, n_ - 1) * stride,
              &query_[(r - i) * head_dim_]);
      score();
      for (int64_t r = 0; r < rows; ++r) add_softmax(&scores_[r * columns_]);
    }
    return weights_.data();
  }

 private:
  static constexpr int64_t kRows = 4, kVecs = 2;  // queries and vectors of keys at a time
  static constexpr int64_t kAhead = 8;            // rows

  void score() {
    for (int64_t j = 0; j < columns_; j += kVecs * kLanes) {
      Vec sum[kRows][kVecs];
      for (auto& row : sum)
        for (Vec& lanes : row) lanes = Vec(0.0f);
      for (int64_t d = 0; d < head_dim_; ++d) {
        const float* keys = &keys_[d * columns_ + j];
        for (int64_t v = 0; v < kVecs; ++v)
          for (int64_t r = 0; r < kRows; ++r)
            sum[r][v] = fmadd(Vec(query_[r * head_dim_ + d]), load(keys + v * kLanes), sum[r][v]);
      }
      for (int64_t r = 0; r < kRows; ++r)
        for (int64_t v = 0; v < kVecs; ++v)
          sum[r][v].store(&scores_[r * columns_ + j + v * kLanes]);
    }
  }

  // Adds softmax(row / sqrt(head_dim)) / n to the weights; the row is overwritten.
  void add_softmax(float* row) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim_));
    const float largest = at::vec::reduce_all<float>(
        [](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, row, n_);
    const Vec scales(scale), offset(-scale * largest);
    for (int64_t j = 0; j < n_; j += kLanes)
      store(row + j, fmadd(load(row + j), scales, offset).exp_u20(), n_ - j);
    const float total =
        at::vec::reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, row, n_);
    const Vec share(1.0f / (total * static_cast<float>(n_)));
    for (int64_t j = 0; j < n_; j += kLanes)
      store(&weights_[j], fmadd(load(row + j), share, load(&weights_[j], n_ - j)), n_ - j);
  }

  int64_t n_, head_dim_, columns_;
  std::vector<float> query_, keys_, scores_, weights_;
};

// out [C] = sum over the n tokens of weights [n] times tokens [n, C].
template <typename T>
void weighted_token(const float* weights, const T* tokens, int64_t n, int64_t channels,
                    float* out) {
  constexpr int64_t kVecs = 8;
  const auto block = [&](int64_t c, const auto& load_at) {
    Vec sum[kVecs];
    for (Vec& lanes : sum) lanes = Vec(0.0f);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t v = 0; v < kVecs; ++v)
        sum[v] = fmadd(Vec(weights[i]), load_at(tokens + i * channels, c + v * kLanes), sum[v]);
    for (int64_t v = 0; v < kVecs; ++v)
      store(out + c + v * kLanes, sum[v], channels - c - v * kLanes);
  };
  int64_t c = 0;
  for (; c + kVecs * kLanes <= channels; c += kVecs * kLanes)
    block(c, [](const T* row, int64_t at) { return load(row + at); });
  if (c < channels)
    block(c, [&](const T* row, int64_t at) { return load(row + at, channels - at); });
}

// tokens [B, n, C] and query_key [B, n, 2C] -> pooled [B, heads, C]. A task is one head of an image.
template <typename T>
Tensor attend(const Tensor& tokens, const Tensor& query_key, int64_t heads) {
  const int64_t batch = tokens.size(0), n = tokens.size(1), channels = tokens.size(2);
  const int64_t head_dim = channels / heads;
  Tensor pooled = at::empty({batch, heads, channels}, tokens.options());
  const T* x = tokens.const_data_ptr<T>();
  const T* qk = query_key.const_data_ptr<T>();
  T* out = pooled.mutable_data_ptr<T>();
  at::parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
    MeanAttention attention(n, head_dim);
    std::vector<float> mean(channels);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / heads, head = task % heads;
      const T* query = qk + image * n * 2 * channels + head * head_dim;
      weighted_token(attention.weights(query, query + channels, 2 * channels),
                     x + image * n * channels, n, channels, mean.data());
      narrow_to(mean.data(), out + task * channels, channels);
    }
  });
  return pooled;
}

template <typename T>
Tensor pool(const Tensor& tokens, int64_t prefix, int64_t height, int64_t width,
            const Tensor& weight, int64_t heads, int64_t stride, bool average) {
  const int64_t batch = tokens.size(0), channels = tokens.size(2);
  const Tensor s = pool_grid<T>(tokens, prefix, height, width, stride, average);
  const Tensor query_key = fast_linear(s.view({-1, channels}), weight, 2 * channels)
                               .view({batch, -1, 2 * channels});
  return attend<T>(s, query_key, heads);
}

Tensor gah_pool(const Tensor& tokens, int64_t height, int64_t width, int64_t num_prefix_tokens,
                const Tensor& qk_weight, int64_t num_heads, int64_t stride, bool average) {
  const PlainKernels plain;
  check_tokens(tokens, num_prefix_tokens, height, width);
  const int64_t batch = tokens.size(0), channels = tokens.size(2);
  TORCH_CHECK_VALUE(num_heads > 0 && channels % num_heads == 0, "num_heads is ", num_heads,
                    ", expected a divisor of the width ", channels);
  TORCH_CHECK_VALUE(stride > 0, "stride is ", stride, ", expected at least 1");
  check_like("qk_weight", qk_weight, tokens.scalar_type(), tokens.device());
  check_shape("qk_weight", qk_weight, {2 * channels, channels});
  stride = std::min(stride, std::max(height, width));  // beyond, one window holds all
  if (batch == 0) return at::empty({0, num_heads, channels}, tokens.options());
  const Tensor x = tokens.stride(2) == 1 ? tokens : tokens.contiguous();
  const Tensor weight = qk_weight.contiguous();
  const auto run = x.scalar_type() == at::kBFloat16 ? pool<at::BFloat16> : pool<float>;
  return run(x, num_prefix_tokens, height, width, weight, num_heads, stride, average);
}

}  // namespace
}  // namespace lgvit

TORCH_LIBRARY_IMPL(lgvit_fast, CPU, m) { m.impl("gah_pool_cpp", lgvit::gah_pool); }
