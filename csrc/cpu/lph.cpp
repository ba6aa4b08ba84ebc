// lph_pool on the CPU: one library GEMM, then everything after it in one pass that writes nothing
// but the pooled vectors. A task is one image and one block of channels; the depthwise step keeps
// three rows of the grid in a ring that stays in the first-level cache.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <vector>

#include "../checks.h"
#include "linear.h"
#include "vec.h"

namespace lgvit {
namespace {

using at::Tensor;
using at::vec::fmadd;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kVecs = 4;
constexpr int64_t kBlock = kVecs * kLanes;  // channels of a task

// A head's vectors and depthwise taps for one block of channels.
struct Weights {
  float bias[kBlock] = {};
  float scale[kBlock] = {};
  float shift[kBlock] = {};
  float taps[9][kBlock] = {};
  float depthwise_bias[kBlock] = {};
};

template <typename T>
struct Task {
  const T* hidden;  // [N, C] of one image, the GEMM's output
  const T* tokens;  // [N, C]
  float* pooled;    // [2, C]
  int64_t height;
  int64_t width;
  int64_t channels;  // from one token to the next
  int64_t count;     // channels of this block
};

template <typename T>
Vec load_channels(const T* data, int64_t vec, int64_t count) {
  return load(data + vec * kLanes, count - vec * kLanes);
}

// out = mean over N tokens of f(x), channel by channel.
template <typename T, typename F>
void mean(const Task<T>& task, const T* x, float* out, const F& f) {
  const int64_t tokens = task.height * task.width;
  Vec sum[kVecs];
  for (int64_t v = 0; v < kVecs; ++v) sum[v] = Vec(0.0f);
  for (int64_t i = 0; i < tokens; ++i)
    for (int64_t v = 0; v < kVecs; ++v)
      sum[v] = sum[v] + f(load_channels(x + i * task.channels, v, task.count), v);
  const Vec share(1.0f / static_cast<float>(tokens));
  for (int64_t v = 0; v < kVecs; ++v)
    store(out + v * kLanes, sum[v] * share, task.count - v * kLanes);
}

// One row of the grid through bias, gelu and affine into the ring, whose two outer columns stay 0.
template <typename T>
void activate_row(const Task<T>& task, const Weights& weights, int64_t row, float* out) {
  const T* x = task.hidden + row * task.width * task.channels;
  for (int64_t j = 0; j < task.width; ++j, x += task.channels) {
    for (int64_t v = 0; v < kVecs; ++v) {
      const Vec u = gelu(load_channels(x, v, task.count) + load(weights.bias + v * kLanes));
      fmadd(u, load(weights.scale + v * kLanes), load(weights.shift + v * kLanes))
          .store(out + (j + 1) * kBlock + v * kLanes);
    }
  }
}

// Depthwise step on one vector of channels of a row of the grid, given the rows above, at and below;
// gelu, and the sum over the row.
Vec depthwise_row(const Weights& weights, int64_t width, const float* above, const float* at,
                  const float* below, int64_t vec) {
  Vec tap[9];
  for (int64_t k = 0; k < 9; ++k) tap[k] = load(weights.taps[k] + vec * kLanes);
  const Vec bias = load(weights.depthwise_bias + vec * kLanes);
  const auto column = [&](const float* row, int64_t j) {
    return load(row + j * kBlock + vec * kLanes);
  };
  Vec a0 = column(above, 0), a1 = column(at, 0), a2 = column(below, 0);
  Vec b0 = column(above, 1), b1 = column(at, 1), b2 = column(below, 1);
  Vec sum(0.0f);
  for (int64_t j = 2; j < width + 2; ++j) {
    const Vec c0 = column(above, j), c1 = column(at, j), c2 = column(below, j);
    const Vec left = fmadd(a2, tap[6], fmadd(a1, tap[3], fmadd(a0, tap[0], bias)));
    const Vec middle = fmadd(b2, tap[7], fmadd(b1, tap[4], b0 * tap[1]));
    const Vec right = fmadd(c2, tap[8], fmadd(c1, tap[5], c0 * tap[2]));
    sum = sum + gelu(left + (middle + right));
    a0 = b0, a1 = b1, a2 = b2;
    b0 = c0, b1 = c1, b2 = c2;
  }
  return sum;
}

// `ring`: four rows of width + 2 columns of kBlock zeros; the last row stays 0.
template <typename T>
void pool_full(const Task<T>& task, const Weights& weights, float* ring) {
  const int64_t line = (task.width + 2) * kBlock;
  float* zeros = ring + 3 * line;
  Vec sum[kVecs];
  for (int64_t v = 0; v < kVecs; ++v) sum[v] = Vec(0.0f);
  const float* above = zeros;
  float* at = ring;
  activate_row(task, weights, 0, at);
  for (int64_t i = 0; i < task.height; ++i) {
    float* below = zeros;
    if (i + 1 < task.height) {
      below = ring + (i + 1) % 3 * line;
      activate_row(task, weights, i + 1, below);
    }
    for (int64_t v = 0; v < kVecs; ++v)
      sum[v] = sum[v] + depthwise_row(weights, task.width, above, at, below, v);
    above = at;
    at = below;
  }
  const Vec share(1.0f / static_cast<float>(task.height * task.width));
  for (int64_t v = 0; v < kVecs; ++v)
    store(task.pooled + v * kLanes, sum[v] * share, task.count - v * kLanes);
}

struct HeadVectors {
  Tensor bias, scale, shift, depthwise_weight, depthwise_bias;

  bool full() const { return depthwise_weight.defined(); }

  void copy(int64_t first, int64_t count, Weights& out) const {
    const auto at = [&](const Tensor& vector) { return vector.const_data_ptr<float>() + first; };
    std::copy_n(at(bias), count, out.bias);
    if (!full()) return;
    std::copy_n(at(scale), count, out.scale);
    std::copy_n(at(shift), count, out.shift);
    std::copy_n(at(depthwise_bias), count, out.depthwise_bias);
    const float* taps = depthwise_weight.const_data_ptr<float>() + first * 9;
    for (int64_t c = 0; c < count; ++c)
      for (int64_t k = 0; k < 9; ++k) out.taps[k][c] = taps[c * 9 + k];
  }
};

template <typename T>
void pool(const Tensor& hidden, const Tensor& tokens, int64_t height, int64_t width,
          const HeadVectors& head, Tensor& pooled) {
  const int64_t batch = tokens.size(0), rows = tokens.size(1), channels = tokens.size(2);
  const int64_t patches = height * width, prefix = rows - patches;
  const int64_t blocks = at::divup(channels, kBlock);
  const T* u = hidden.const_data_ptr<T>();
  const T* x = tokens.const_data_ptr<T>();
  float* out = pooled.mutable_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / (patches * kBlock));
  at::parallel_for(0, blocks * batch, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> ring(head.full() ? 4 * (width + 2) * kBlock : 0);
    Weights weights;
    for (int64_t t = begin; t < end; ++t) {
      // The images of one block of channels follow each other: its weights are read once.
      const int64_t image = t % batch, first = t / batch * kBlock;
      const int64_t count = std::min(kBlock, channels - first);
      if (t == begin || image == 0) head.copy(first, count, weights);
      const int64_t offset = (image * rows + prefix) * channels + first;
      const Task<T> task{u + offset, x + offset, out + image * 2 * channels + first, height,
                         width,      channels,   count};
      if (head.full())
        pool_full(task, weights, ring.data());
      else
        mean(task, task.hidden, task.pooled,
             [&](const Vec& v, int64_t i) { return gelu(v + load(weights.bias + i * kLanes)); });
      mean(task, task.tokens, task.pooled + channels, [](const Vec& v, int64_t) { return v; });
    }
  });
}

Tensor lph_pool(const Tensor& tokens, int64_t height, int64_t width, int64_t num_prefix_tokens,
                const Tensor& weight, const Tensor& bias, const MaybeTensor& scale,
                const MaybeTensor& shift, const MaybeTensor& depthwise_weight,
                const MaybeTensor& depthwise_bias) {
  const PlainKernels plain;
  check_tokens(tokens, num_prefix_tokens, height, width);
  const int64_t channels = tokens.size(2);
  check_like("weight", weight, tokens.scalar_type(), tokens.device());
  check_shape("weight", weight, {channels, channels});
  const auto vector = [&](const char* name, const MaybeTensor& tensor, at::IntArrayRef shape) {
    TORCH_CHECK_VALUE(tensor, name, " is missing: the full head needs scale, shift,",
                      " depthwise_weight and depthwise_bias");
    check_like(name, *tensor, at::kFloat, tokens.device());
    check_shape(name, *tensor, shape);
    return tensor->contiguous();
  };
  HeadVectors head{vector("bias", bias, {channels}), {}, {}, {}, {}};
  if (depthwise_weight) {
    head.scale = vector("scale", scale, {channels});
    head.shift = vector("shift", shift, {channels});
    head.depthwise_weight = vector("depthwise_weight", depthwise_weight, {channels, 3, 3});
    head.depthwise_bias = vector("depthwise_bias", depthwise_bias, {channels});
  } else {
    TORCH_CHECK_VALUE(!scale && !shift && !depthwise_bias,
                      "depthwise_weight is missing, the full head needs it; the light one takes bias alone");
  }
  const Tensor x = tokens.contiguous();
  // The prefix tokens go through the GEMM too: cheaper than a copy without them.
  const Tensor hidden = fast_linear(x.view({-1, channels}), weight.contiguous(), channels);
  Tensor pooled = at::empty({x.size(0), 2, channels}, x.options().dtype(at::kFloat));
  if (x.scalar_type() == at::kBFloat16)
    pool<at::BFloat16>(hidden, x, height, width, head, pooled);
  else
    pool<float>(hidden, x, height, width, head, pooled);
  return pooled;
}

}  // namespace
}  // namespace lgvit

TORCH_LIBRARY_IMPL(lgvit_fast, CPU, m) { m.impl("lph_pool_cpp", lgvit::lph_pool); }
