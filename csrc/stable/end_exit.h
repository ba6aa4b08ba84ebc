// What the CPU and the CUDA implementation of end_exit_ share: its arguments, checked.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "rows.h"

namespace lgvit {

// The arguments of end_exit_, as csrc/stable/ops.cpp describes them.
struct EndExit {
  Tensor logits, leave, valid;
  Tensor tokens;
  std::optional<Tensor> into;
  Tensor rows, state;
  std::vector<Tensor> answer;  // logits, exit index, exit layer, nonfinite
  std::optional<Tensor> entering;
  std::vector<Tensor> counts;
  std::optional<Tensor> scratch;

  int64_t batch() const { return leave.size(0); }

  void check() const {
    check_memory("leave", leave);
    LGVIT_CHECK_VALUE(leave.dim() == 1, "leave must be bool [B], got ", shape_text(leave));
    check_vector("leave", leave, ScalarType::Bool, batch());
    check_vector("valid", valid, ScalarType::Bool, batch());
    check_vector("rows", rows, ScalarType::Long, batch());
    check_rows("logits", logits, batch());
    check_rows("tokens", tokens, batch());
    check_rows("state", state, batch());
    LGVIT_CHECK_VALUE(answer.size() == 4, "answer has ", answer.size(),
                      " tensors, expected logits, exit_index, exit_layer and nonfinite");
    const int64_t answers = answer[0].dim() ? answer[0].size(0) : 0;
    check_rows("answer logits", answer[0], answers);
    LGVIT_CHECK_VALUE(logits.dim() == 2 && answer[0].dim() == 2 && logits.size(1) == answer[0].size(1) &&
                          logits.scalar_type() == answer[0].scalar_type(),
                      "logits are ", logits.scalar_type(), " ", shape_text(logits), ", the answer's ",
                      answer[0].scalar_type(), " ", shape_text(answer[0]));
    check_vector("exit_index", answer[1], ScalarType::Long, answers);
    check_vector("exit_layer", answer[2], ScalarType::Long, answers);
    check_vector("nonfinite", answer[3], ScalarType::Bool, answers);
    if (into) {
      const int64_t rows_into = into->dim() ? into->size(0) : 0;
      check_rows("into", *into, rows_into);
      LGVIT_CHECK_VALUE(rows_into >= batch() && into->scalar_type() == tokens.scalar_type() &&
                            shape_text(*into, 1) == shape_text(tokens, 1),
                        "into is ", into->scalar_type(), " ", shape_text(*into), ", expected at least as"
                        " many rows as tokens, which is ", tokens.scalar_type(), " ", shape_text(tokens));
    }
    for (const Tensor& count : counts) check_single("count", count, ScalarType::Long);
    if (entering) check_single("entering", *entering, ScalarType::Long);
    if (scratch) check_single("scratch", *scratch, ScalarType::Int);
    check_devices();
    check_overlaps();
  }

 private:
  static std::string shape_text(const Tensor& tensor, int64_t from = 0) {
    return list_text(tensor.sizes().data() + from, tensor.dim() - from);
  }

  static void check_vector(const std::string& name, const Tensor& tensor, ScalarType type, int64_t length) {
    check_memory(name, tensor);
    LGVIT_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == length && tensor.scalar_type() == type &&
                          (length < 2 || tensor.stride(0) == 1),
                      name, " is ", tensor.scalar_type(), " ", shape_text(tensor), ", expected ", type,
                      " [", length, "], contiguous");
  }

  static void check_single(const std::string& name, const Tensor& tensor, ScalarType type) {
    check_memory(name, tensor);
    LGVIT_CHECK_VALUE(tensor.numel() == 1 && tensor.scalar_type() == type, name, " is ",
                      tensor.scalar_type(), " ", shape_text(tensor), ", expected ", type, " [1]");
  }

  template <typename F>
  void for_each_on_device(const F& f) const {
    f("logits", logits);
    f("valid", valid);
    f("tokens", tokens);
    f("rows", rows);
    f("state", state);
    for (const Tensor& tensor : answer) f("answer", tensor);
    if (into) f("into", *into);
    if (entering) f("entering", *entering);
    if (scratch) f("scratch", *scratch);
  }

  void check_devices() const {
    for_each_on_device([&](const char* name, const Tensor& tensor) {
      LGVIT_CHECK_VALUE(tensor.device() == leave.device(), name, " is on ", device_text(tensor),
                        ", leave on ", device_text(leave));
    });
  }

  // What is written shares no memory with anything else.
  void check_overlaps() const {
    std::vector<Span> written, read;
    written.emplace_back("tokens", tokens);
    written.emplace_back("rows", rows);
    written.emplace_back("state", state);
    for (const Tensor& tensor : answer) written.emplace_back("the answer", tensor);
    for (const Tensor& tensor : counts) written.emplace_back("count", tensor);
    if (into) written.emplace_back("into", *into);
    if (scratch) written.emplace_back("scratch", *scratch);
    read.emplace_back("logits", logits);
    read.emplace_back("leave", leave);
    read.emplace_back("valid", valid);
    if (entering) read.emplace_back("entering", *entering);
    for (size_t i = 0; i < written.size(); ++i) {
      for (size_t j = i + 1; j < written.size(); ++j) check_apart(written[i], written[j]);
      for (const Span& other : read) check_apart(written[i], other);
    }
  }

  static void check_apart(const Span& one, const Span& other) {
    LGVIT_CHECK_VALUE(!one.meets(other), one.name, " and ", other.name, " share memory");
  }
};

}  // namespace lgvit
