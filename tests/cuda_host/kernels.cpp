// The kernels of csrc/stable/cuda as functions that ctypes can call. build.py puts the rewritten sources
// beside a copy of this file.
#include <algorithm>

#include "compact_kernel.cc"
#include "end_exit_kernel.cc"
#include "lph_tail_kernel.cc"

namespace {

// A tensor [B, ...] as Python describes it.
struct HostRows {
  char* data;
  int64_t stride, bytes;  // of a row
};

uint32_t width_of(const HostRows& rows) { return lgvit::access_width(rows.data, rows.stride, rows.bytes); }

lgvit::Rows as_rows(const HostRows& rows, uint32_t width) {
  return {rows.data, rows.stride, uint32_t(rows.bytes / width), width};
}

lgvit::Rows as_rows(const HostRows& rows) { return as_rows(rows, width_of(rows)); }

}  // namespace

extern "C" {

void set_schedule(int order, uint64_t seed, int resident) {
  cuda_host::schedule = {cuda_host::Order(order), seed, resident};
}

void set_fault(int fault) { cuda_host::fault = fault; }

const char* problem() { return cuda_host::problem(); }

int compact(const HostRows* tensors, int num_tensors, const uint8_t* keep, int64_t keep_stride, int batch,
            int64_t* count, int multiprocessors) {
  lgvit::CompactArgs args{};
  for (int i = 0; i < num_tensors; ++i) args.tensors[i] = as_rows(tensors[i]);
  args.num_tensors = num_tensors;
  args.keep = keep;
  args.keep_stride = keep_stride;
  args.batch = batch;
  args.count = count;
  return lgvit::launch_compact(args, multiprocessors, nullptr);
}

struct HostEndExit {
  int64_t batch;
  const int64_t* entering;
  const uint8_t *leave, *valid;
  int64_t* rows;
  HostRows logits, answer_logits;
  int64_t answers;
  int64_t *exit_index, *exit_layer;
  uint8_t* nonfinite;
  int64_t index, layer;
  HostRows tokens, into, state;
  int64_t* counts[2];
  uint32_t* finished;
};

int end_exit(const HostEndExit* host, int multiprocessors) {
  lgvit::EndExitArgs args{};
  args.batch = int(host->batch);
  args.entering = host->entering;
  args.leave = host->leave;
  args.valid = host->valid;
  args.rows = host->rows;
  const uint32_t width = std::min(width_of(host->logits), width_of(host->answer_logits));
  args.logits = as_rows(host->logits, width);
  args.answer_logits = as_rows(host->answer_logits, width);
  args.answers = host->answers;
  args.exit_index = host->exit_index;
  args.exit_layer = host->exit_layer;
  args.nonfinite = host->nonfinite;
  args.index = host->index;
  args.layer = host->layer;
  args.tokens = as_rows(host->tokens);
  if (host->into.data) {
    const uint32_t both = std::min(width_of(host->tokens), width_of(host->into));
    args.tokens = as_rows(host->tokens, both);
    args.into = as_rows(host->into, both);
  }
  args.state = as_rows(host->state);
  std::copy_n(host->counts, 2, args.counts);
  args.finished = host->finished;
  return lgvit::launch_end_exit(args, multiprocessors, nullptr);
}

int lph_tail(const lgvit::LphTailArgs* args, int multiprocessors) {
  return lgvit::launch_lph_tail(*args, multiprocessors, nullptr);
}

// The normal distribution function as the kernels for 16-bit types have it.
void half_phi(const float* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = lgvit::Half::phi(in[i]);
}
}
