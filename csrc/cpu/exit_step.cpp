// exit_step on the CPU: the classifier's product by the library, then each image's softmax
// statistics and decision in one pass over its logits.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../checks.h"
#include "linear.h"
#include "vec.h"

namespace lgvit {
namespace {

using at::Tensor;

enum Rule { kNever, kConfidence, kEntropy, kPatience, kPatientConfident };  // as RuleKind in Python

// One more, as torch counts: past the largest number it goes on from the smallest.
int32_t next(int32_t run) { return static_cast<int32_t>(static_cast<uint32_t>(run) + 1); }

struct Statistics {
  bool valid;  // the softmax is a number
  float confidence;
  float entropy;
  int32_t prediction;
};

// Of one row of K logits; `exps` is scratch [K].
Statistics softmax_statistics(const float* logits, int64_t classes, float* exps) {
  const int64_t top = std::max_element(logits, logits + classes) - logits;
  const Vec largest(logits[top]);
  for (int64_t j = 0; j < classes; j += kLanes)
    store(exps + j, (load(logits + j, classes - j) - largest).exp(), classes - j);
  double total = 0, weighted = 0;  // sums of e and of e log e; 0 log 0 is 0
  for (int64_t j = 0; j < classes; ++j) {
    total += exps[j];
    if (exps[j] != 0) weighted += static_cast<double>(exps[j]) * (logits[j] - logits[top]);
  }
  return {!std::isnan(total), static_cast<float>(1 / total),
          static_cast<float>(std::log(total) - weighted / total), static_cast<int32_t>(top)};
}

// Whether the image leaves; updates its run length and last class.
bool decide(int64_t rule, double threshold, int64_t patience, const Statistics& image,
            int32_t* state) {
  int32_t& run = state[0];
  int32_t& last = state[1];
  const bool sure = image.valid && image.entropy < threshold;
  switch (rule) {
    case kConfidence: return image.valid && image.confidence > threshold;
    case kEntropy: return sure;
    case kPatience:
      run = !image.valid ? 0 : image.prediction == last ? next(run) : 1;
      last = image.valid ? image.prediction : -1;
      return run >= patience;
    case kPatientConfident:
      run = sure ? next(run) : 0;
      return run >= patience;
    default: return false;
  }
}

// The rows the classifier reads: pooled [B, M, C] float, then the first T tokens of each image.
template <typename T>
Tensor classifier_input(const Tensor& pooled, const Tensor& tokens, int64_t num_class_tokens) {
  const int64_t batch = pooled.size(0), channels = pooled.size(2), head = pooled.size(1) * channels;
  Tensor out = at::empty({batch, head + num_class_tokens * channels}, tokens.options());
  const float* means = pooled.const_data_ptr<float>();
  const T* rows = tokens.const_data_ptr<T>();
  T* target = out.mutable_data_ptr<T>();
  for (int64_t i = 0; i < batch; ++i) {
    target = std::copy_n(means + i * head, head, target);
    for (int64_t t = 0; t < num_class_tokens; ++t)
      target = std::copy_n(rows + i * tokens.stride(0) + t * tokens.stride(1), channels, target);
  }
  return out;
}

// logits [B, K] without the bias: adds it, and decides for each row.
template <typename T>
void decide_rows(const Tensor& logits, const Tensor& bias, int64_t rule, double threshold,
                 int64_t patience, const Tensor& state, const Tensor& leave, const Tensor& valid) {
  const int64_t batch = logits.size(0), classes = logits.size(1);
  T* rows = logits.mutable_data_ptr<T>();
  const float* biases = bias.const_data_ptr<float>();
  int32_t* states = state.mutable_data_ptr<int32_t>();
  bool* leaves = leave.mutable_data_ptr<bool>();
  bool* valids = valid.mutable_data_ptr<bool>();
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / classes);
  at::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> row(classes), exps(classes);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < classes; ++j) {
        T& logit = rows[i * classes + j];
        row[j] = logit = static_cast<T>(static_cast<float>(logit) + biases[j]);
      }
      const Statistics image = softmax_statistics(row.data(), classes, exps.data());
      valids[i] = image.valid;
      leaves[i] = decide(rule, threshold, patience, image, states + i * state.stride(0));
    }
  });
}

void check(const Tensor& pooled, const Tensor& tokens, int64_t num_class_tokens,
           const Tensor& weight, const Tensor& bias, int64_t rule, int64_t patience,
           const Tensor& state) {
  check_memory("pooled", pooled);
  check_memory("tokens", tokens);
  check_compute_dtype("weight", weight);
  TORCH_CHECK_VALUE(pooled.dim() == 3 && pooled.is_floating_point(), "pooled is ",
                    pooled.scalar_type(), " ", pooled.sizes(), ", expected floating [B, M, C]");
  const int64_t batch = pooled.size(0), vectors = pooled.size(1), channels = pooled.size(2);
  check_channels("pooled", channels);
  TORCH_CHECK_VALUE(tokens.dim() == 3 && tokens.is_floating_point() && tokens.size(0) == batch &&
                        tokens.size(2) == channels,
                    "tokens is ", tokens.scalar_type(), " ", tokens.sizes(),
                    ", expected floating [", batch, ", P + N, ", channels, "] as pooled");
  TORCH_CHECK_VALUE(num_class_tokens >= 0 && num_class_tokens <= tokens.size(1),
                    "num_class_tokens is ", num_class_tokens, ", expected 0 to ", tokens.size(1),
                    ", the rows of tokens");
  int64_t read = 0, columns = 0;
  TORCH_CHECK_VALUE(!__builtin_add_overflow(vectors, num_class_tokens, &read) &&
                        !mul_overflows(read, channels, columns),
                    "pooled has shape ", pooled.sizes(), ": too large");
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) == columns,
                    "weight has shape ", weight.sizes(), ", expected [K, ", columns, "], K > 0");
  check_memory("bias", bias);
  TORCH_CHECK_VALUE(bias.is_floating_point(), "bias is ", bias.scalar_type(),
                    ", expected a floating dtype");
  check_shape("bias", bias, {weight.size(0)});
  for (const Tensor& tensor : {tokens, weight, bias})
    TORCH_CHECK_VALUE(tensor.device() == pooled.device(), "a tensor is on ", tensor.device(),
                      ", pooled on ", pooled.device());
  check_like("state", state, at::kInt, pooled.device());
  check_shape("state", state, {batch, 2});
  TORCH_CHECK_VALUE(batch == 0 || (state.stride(1) == 1 && (batch == 1 || state.stride(0) >= 2)),
                    "state has strides ", state.strides(), ", expected contiguous rows apart");
  TORCH_CHECK_VALUE(rule >= kNever && rule <= kPatientConfident, "rule is ", rule,
                    ", expected 0 to 4");
  TORCH_CHECK_VALUE(rule < kPatience || patience > 0, "patience is ", patience,
                    ", expected at least 1");
}

std::tuple<Tensor, Tensor, Tensor> exit_step(const Tensor& pooled, const Tensor& tokens,
                                             int64_t num_class_tokens, const Tensor& weight,
                                             const Tensor& bias, int64_t rule, double threshold,
                                             int64_t patience, Tensor& state) {
  const PlainKernels plain;
  check(pooled, tokens, num_class_tokens, weight, bias, rule, patience, state);
  const int64_t batch = pooled.size(0);
  const bool half = weight.scalar_type() == at::kBFloat16;
  const Tensor means = pooled.to(at::kFloat).contiguous();
  Tensor rows = tokens.to(weight.scalar_type());
  if (rows.stride(2) != 1) rows = rows.contiguous();
  const Tensor vectors = half ? classifier_input<at::BFloat16>(means, rows, num_class_tokens)
                              : classifier_input<float>(means, rows, num_class_tokens);
  const Tensor logits = at::linear(vectors, weight);
  const Tensor leave = at::empty({batch}, logits.options().dtype(at::kBool));
  const Tensor valid = at::empty_like(leave);
  const Tensor biases = bias.to(at::kFloat).contiguous();
  const auto run = half ? decide_rows<at::BFloat16> : decide_rows<float>;
  run(logits, biases, rule, threshold, patience, state, leave, valid);
  return {logits, leave, valid};
}

}  // namespace
}  // namespace lgvit

TORCH_LIBRARY_IMPL(lgvit_fast, CPU, m) { m.impl("exit_step_cpp", lgvit::exit_step); }
