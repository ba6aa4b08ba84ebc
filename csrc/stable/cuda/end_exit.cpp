// end_exit_ for CUDA tensors: turns tensors into rows of bytes and launches on the current stream.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../end_exit.h"
#include "end_exit_kernel.h"
#include "launch.h"

namespace {

using torch::stable::Tensor;

void end_exit_(const Tensor& logits, const Tensor& leave, const Tensor& valid, const Tensor& tokens,
               const std::optional<Tensor>& into, const Tensor& rows, const Tensor& state,
               const std::vector<Tensor>& answer, const std::optional<Tensor>& entering,
               const std::vector<Tensor>& counts, const std::optional<Tensor>& scratch, int64_t index,
               int64_t layer) {
  const lgvit::EndExit exit{logits, leave, valid, tokens, into, rows, state, answer, entering, counts,
                            scratch};
  exit.check();
  lgvit::check_on_gpu("leave", leave);
  LGVIT_CHECK_VALUE(counts.size() <= 2, "counts has ", counts.size(), " tensors, expected at most 2");
  for (const Tensor& count : counts) lgvit::check_count_reachable(count, leave);
  LGVIT_CHECK_VALUE(scratch.has_value(), "scratch is missing, a CUDA device needs it");
  const lgvit::Launch launch(leave);

  lgvit::EndExitArgs args{};
  args.batch = int(exit.batch());
  args.entering = entering ? entering->const_data_ptr<int64_t>() : nullptr;
  args.leave = static_cast<const uint8_t*>(leave.const_data_ptr());
  args.valid = static_cast<const uint8_t*>(valid.const_data_ptr());
  args.rows = rows.mutable_data_ptr<int64_t>();
  std::tie(args.logits, args.answer_logits) = lgvit::as_rows_alike(logits, answer[0]);
  args.answers = answer[1].size(0);
  args.exit_index = answer[1].mutable_data_ptr<int64_t>();
  args.exit_layer = answer[2].mutable_data_ptr<int64_t>();
  args.nonfinite = static_cast<uint8_t*>(answer[3].mutable_data_ptr());
  args.index = index;
  args.layer = layer;
  if (into) {
    std::tie(args.tokens, args.into) = lgvit::as_rows_alike(tokens, *into);
  } else {
    args.tokens = lgvit::as_rows(tokens);
  }
  args.state = lgvit::as_rows(state);
  for (size_t i = 0; i < counts.size(); ++i) args.counts[i] = counts[i].mutable_data_ptr<int64_t>();
  args.finished = static_cast<uint32_t*>(scratch->mutable_data_ptr());
  STD_CUDA_CHECK(lgvit::launch_end_exit(args, launch.multiprocessors, launch.stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lgvit_fast, CUDA, m) { m.impl("end_exit_", TORCH_BOX(&end_exit_)); }
