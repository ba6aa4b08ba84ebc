// end_exit_ on the CPU.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "end_exit.h"

namespace {

using torch::stable::Tensor;

// How many rows hold images; the rest is padding.
int64_t count_entering(const lgvit::EndExit& exit) {
  if (!exit.entering) return exit.batch();
  const int64_t entering = *exit.entering->const_data_ptr<int64_t>();
  LGVIT_CHECK_VALUE(0 <= entering && entering <= exit.batch(), "entering is ", entering, ", expected 0 to ",
                    exit.batch());
  return entering;
}

void write_answers(const lgvit::EndExit& exit, int64_t entering, int64_t index, int64_t layer) {
  const auto* leave = static_cast<const uint8_t*>(exit.leave.const_data_ptr());
  const auto* valid = static_cast<const uint8_t*>(exit.valid.const_data_ptr());
  const auto* rows = exit.rows.const_data_ptr<int64_t>();
  const int64_t answers = exit.answer[1].size(0);
  for (int64_t i = 0; i < entering; ++i)
    LGVIT_CHECK_VALUE(0 <= rows[i] && rows[i] < answers, "rows holds ", rows[i], ", there are ", answers,
                      " answers");
  auto* exit_index = exit.answer[1].mutable_data_ptr<int64_t>();
  auto* exit_layer = exit.answer[2].mutable_data_ptr<int64_t>();
  auto* nonfinite = static_cast<uint8_t*>(exit.answer[3].mutable_data_ptr());
  std::vector<std::pair<int64_t, int64_t>> leavers;
  for (int64_t i = 0; i < entering; ++i) {
    const int64_t row = rows[i];
    if (!valid[i]) nonfinite[row] = 1;
    if (!leave[i]) continue;
    exit_index[row] = index;
    exit_layer[row] = layer;
    leavers.emplace_back(i, row);
  }
  lgvit::copy_rows(lgvit::row_bytes(exit.logits), lgvit::row_bytes(exit.answer[0]), leavers);
}

void end_exit_(const Tensor& logits, const Tensor& leave, const Tensor& valid, const Tensor& tokens,
               const std::optional<Tensor>& into, const Tensor& rows, const Tensor& state,
               const std::vector<Tensor>& answer, const std::optional<Tensor>& entering,
               const std::vector<Tensor>& counts, const std::optional<Tensor>& scratch, int64_t index,
               int64_t layer) {
  const lgvit::EndExit exit{logits, leave, valid, tokens, into, rows, state, answer, entering, counts,
                            scratch};
  exit.check();
  const int64_t images = count_entering(exit);
  write_answers(exit, images, index, layer);

  const auto* gone = static_cast<const uint8_t*>(leave.const_data_ptr());
  const lgvit::Moves moves(images, [&](int64_t row) { return gone[row] == 0; });
  for (const Tensor& moved : {rows, state}) {
    const lgvit::RowBytes bytes = lgvit::row_bytes(moved);
    lgvit::copy_rows(bytes, bytes, moves.pairs);
  }
  const lgvit::RowBytes from = lgvit::row_bytes(tokens);
  if (!into) {
    lgvit::copy_rows(from, from, moves.pairs);
  } else {
    std::vector<std::pair<int64_t, int64_t>> pairs(moves.survivors);
    for (int64_t i = 0; i < moves.survivors; ++i) pairs[i] = {i, i};
    for (const auto& [survivor, hole] : moves.pairs) pairs[hole] = {survivor, hole};
    lgvit::copy_rows(from, lgvit::row_bytes(*into), pairs);
  }
  for (const Tensor& count : counts) *count.mutable_data_ptr<int64_t>() = moves.survivors;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lgvit_fast, CPU, m) { m.impl("end_exit_", TORCH_BOX(&end_exit_)); }
