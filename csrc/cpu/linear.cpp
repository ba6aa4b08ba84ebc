// Torch has several GEMMs on a CPU, and `linear` does not always take the fastest: in float32 it
// calls MKL, which is slower than oneDNN on processors that are not Intel's. The choice is made by
// a measurement, once for each weight shape, dtype and number of threads:
//   linear  at::linear
//   conv    at::conv2d with a 1x1 kernel on the channels-last view: oneDNN
//   packed  oneDNN with the weight in its own blocked layout, packed once and kept
// The choice does not depend on M, so an image's answer does not depend on its batch.
// LGVIT_LINEAR=linear|conv|packed overrides it; packed gives way to linear where it cannot run.
#include "linear.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <tuple>

#include "checksum.h"

namespace lgvit {
namespace {

using at::Tensor;

enum class Gemm { kLinear, kConv, kPacked };
constexpr std::array kNames = {"linear", "conv", "packed"};  // by preference where they tie

Tensor pack(const Tensor& weight) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("mkldnn::_reorder_linear_weight", "")
          .typed<Tensor(const Tensor&, std::optional<c10::SymInt>)>();
  return op.call(weight, std::nullopt);
}

Tensor packed_linear(const Tensor& x, const Tensor& packed) {
  using Scalars = c10::List<std::optional<at::Scalar>>;
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
          .typed<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&,
                        std::string_view, Scalars, std::optional<std::string_view>)>();
  return op.call(x, packed, std::nullopt, "none", Scalars(), "");
}

Tensor conv_linear(const Tensor& x, const Tensor& weight) {
  const int64_t m = x.size(0), k = x.size(1), n = weight.size(0);
  const Tensor map = x.view({1, 1, m, k}).permute({0, 3, 1, 2});
  return at::conv2d(map, weight.view({n, k, 1, 1})).permute({0, 2, 3, 1}).reshape({m, n});
}

// Weights in oneDNN's layout. An entry serves as long as its weight lives and is not written to: the
// checksum of the whole weight sees also what escapes the version counter, as writes through `.data`
// do and all to an inference tensor.
class PackedWeights {
 public:
  Tensor get(const Tensor& weight, int64_t n) {
    c10::StorageImpl* storage = weight.storage().unsafeGetStorageImpl();
    const Key key{storage, weight.storage_offset(), n, weight.size(1)};
    const State state{weight.const_data_ptr(), checksum(weight)};
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = entries_.find(key);
    if (found != entries_.end() && !found->second.storage.expired() &&
        found->second.state == state)
      return found->second.packed;
    for (auto it = entries_.begin(); it != entries_.end();)
      it = it->second.storage.expired() ? entries_.erase(it) : std::next(it);
    const Entry entry{weight.storage().getWeakStorageImpl(), state, pack(weight.narrow(0, 0, n))};
    return entries_.insert_or_assign(key, entry).first->second.packed;
  }

 private:
  using Key = std::tuple<c10::StorageImpl*, int64_t, int64_t, int64_t>;
  using State = std::tuple<const void*, int64_t>;  // address, checksum
  struct Entry {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    State state;
    Tensor packed;
  };
  std::mutex mutex_;
  std::map<Key, Entry> entries_;
};

PackedWeights& packed_weights() {
  static auto* weights = new PackedWeights();  // never destroyed: threads may outlive main
  return *weights;
}

// Whether oneDNN can pack weights of a dtype here: bfloat16 needs instructions that not all have.
bool can_pack(at::ScalarType dtype) {
  static std::mutex mutex;
  static auto* answers = new std::map<at::ScalarType, bool>();
  std::lock_guard<std::mutex> lock(mutex);
  const auto [place, fresh] = answers->try_emplace(dtype, false);
  if (fresh) {
    try {
      const Tensor ones = at::ones({8, 8}, dtype);
      packed_linear(ones, pack(ones));
      place->second = true;
    } catch (const std::exception&) {
    }
  }
  return place->second;
}

Tensor run(Gemm gemm, const Tensor& x, const Tensor& weight, int64_t n) {
  switch (gemm) {
    case Gemm::kLinear: return at::linear(x, weight.narrow(0, 0, n));
    case Gemm::kConv: return conv_linear(x, weight.narrow(0, 0, n));
    case Gemm::kPacked: return packed_linear(x, packed_weights().get(weight, n));
  }
  TORCH_INTERNAL_ASSERT(false);
}

// Seconds of a call: the least of a few, after one to warm up.
template <typename F>
double seconds(const F& call) {
  using Clock = std::chrono::steady_clock;
  call();
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i < 7; ++i) {
    const auto start = Clock::now();
    call();
    least = std::min(least, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return least;
}

Gemm measure(int64_t n, int64_t k, at::ScalarType dtype) {
  constexpr int64_t kRows = 256;         // about one image
  constexpr int64_t kLargest = 1 << 28;  // numbers of a weight; measuring takes as much memory
  constexpr double kMargin = 0.97;       // a later candidate must be this much faster
  if (k > kLargest / n) return Gemm::kLinear;
  const auto pattern = [&](int64_t rows, int64_t period) {
    const Tensor steps = at::arange(rows * k, at::kFloat).remainder(period);
    return (steps / period - 0.5).view({rows, k}).to(dtype);
  };
  const Tensor x = pattern(kRows, 17), weight = pattern(n, 23);
  const Tensor expected = at::linear(x, weight);
  const double tolerance =
      (dtype == at::kFloat ? 1e-4 : 2e-2) * expected.abs().max().item<double>();
  Gemm best = Gemm::kLinear;
  double least = seconds([&] { at::linear(x, weight); });
  for (const Gemm gemm : {Gemm::kConv, Gemm::kPacked}) {
    try {
      if (!((run(gemm, x, weight, n) - expected).abs().max().item<double>() <= tolerance)) continue;
      const double time = seconds([&] { run(gemm, x, weight, n); });
      if (time < kMargin * least) {
        best = gemm;
        least = time;
      }
    } catch (const std::exception&) {
      // This torch or this processor does not have it.
    }
  }
  return best;
}

Gemm choose(int64_t n, int64_t k, at::ScalarType dtype) {
  if (const char* name = std::getenv("LGVIT_LINEAR"); name && *name) {
    for (size_t i = 0; i < kNames.size(); ++i) {
      const Gemm gemm = static_cast<Gemm>(i);
      if (std::string(name) == kNames[i])
        return gemm == Gemm::kPacked && !can_pack(dtype) ? Gemm::kLinear : gemm;
    }
    TORCH_CHECK_VALUE(false, "LGVIT_LINEAR must be linear, conv or packed; got ", name);
  }
  static std::mutex mutex;
  static auto* chosen = new std::map<std::tuple<int64_t, int64_t, at::ScalarType, int>, Gemm>();
  std::lock_guard<std::mutex> lock(mutex);
  const auto [place, fresh] =
      chosen->try_emplace({n, k, dtype, at::get_num_threads()}, Gemm::kLinear);
  if (fresh) place->second = measure(n, k, dtype);
  return place->second;
}

std::string linear_choice(int64_t n, int64_t k, at::ScalarType dtype) {
  const PlainKernels plain;
  TORCH_CHECK_VALUE(n > 0 && k > 0, "a weight [", n, ", ", k, "] has no numbers");
  TORCH_CHECK_VALUE(at::isFloatingType(dtype), "dtype is ", dtype, ", expected a floating dtype");
  return kNames[static_cast<size_t>(choose(n, k, dtype))];
}

}  // namespace

Tensor fast_linear(const Tensor& x, const Tensor& weight, int64_t n) {
  if (x.size(0) == 0) return x.new_empty({0, n});
  return run(choose(n, weight.size(1), x.scalar_type()), x, weight, n);
}

}  // namespace lgvit

TORCH_LIBRARY_IMPL(lgvit_fast, CompositeExplicitAutograd, m) {
  m.impl("linear_choice", lgvit::linear_choice);
}
