// A program that runs the kernels on random batches with interleaved blocks, for ThreadSanitizer. Whether
// the results are right is asked by the tests that Python drives; here only what must hold in any case.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "kernels.cpp"

namespace {

std::mt19937_64 draw(0);

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(draw); }

// [B, ...] as bytes, at an offset and with gaps that decide the width of the accesses.
struct Buffer {
  std::vector<char> bytes;
  HostRows rows;

  Buffer(int64_t batch, int64_t row, int64_t grain)
      : bytes(size_t(batch + 1) * (row + grain)), rows{bytes.data() + grain, row + grain, row} {
    std::iota(bytes.begin(), bytes.end(), 0);
  }
};

void check(bool condition, const char* what) {
  if (condition) return;
  std::printf("%s: %s\n", what, problem());
  std::exit(2);
}

void one_compaction(int batch, int multiprocessors) {
  const int64_t grain = int64_t(1) << between(0, 4);
  Buffer tokens(batch, grain * between(1, 40), grain), state(batch, 8, 8);
  std::vector<uint8_t> keep(batch);
  for (auto& flag : keep) flag = between(0, 1);
  const HostRows tensors[] = {tokens.rows, state.rows};
  int64_t count = -1;
  check(compact(tensors, 2, keep.data(), 1, batch, &count, multiprocessors) == 0, "compact");
  check(count == std::accumulate(keep.begin(), keep.end(), int64_t(0)), "compact: count");
}

void one_exit(int batch, bool to_another, int multiprocessors) {
  const int64_t grain = int64_t(1) << between(0, 4), row = grain * between(1, 40);
  Buffer tokens(batch, row, grain), into(batch, row, grain), state(batch, 8, 8);
  Buffer logits(batch, 2 * between(1, 40), 2), answer(batch, logits.rows.bytes, 2);
  std::vector<uint8_t> leave(batch), valid(batch), nonfinite(batch);
  std::vector<int64_t> rows(batch), exit_index(batch), exit_layer(batch);
  std::iota(rows.begin(), rows.end(), 0);
  std::shuffle(rows.begin(), rows.end(), draw);
  const int64_t entering = between(0, batch);
  int64_t counts[2] = {-1, -1}, stay = 0;
  for (int i = 0; i < batch; ++i) {
    leave[i] = between(0, 1);
    valid[i] = between(0, 1);
    stay += i < entering && !leave[i];
  }
  uint32_t finished = 0;
  const HostEndExit arguments{batch, &entering, leave.data(), valid.data(), rows.data(), logits.rows,
                              answer.rows, batch, exit_index.data(), exit_layer.data(), nonfinite.data(),
                              1, 2, tokens.rows, to_another ? into.rows : HostRows{}, state.rows,
                              {&counts[0], &counts[1]}, &finished};
  check(end_exit(&arguments, multiprocessors) == 0, "end_exit");
  check(counts[0] == stay && counts[1] == stay, "end_exit: counts");
  check(finished == 0, "end_exit: finished");
}

// Of the full or the light head, on a grid that several warps of a block share.
void one_tail(int batch, bool full) {
  const int height = 5, width = 14, channels = 70, count = height * width;
  std::vector<float> hidden(batch * count * channels, 1.0f), tokens(hidden), vector(9 * channels, 1.0f);
  std::vector<float> pooled(batch * 2 * channels);
  const auto map = [&](const std::vector<float>& data) {
    return lgvit::Map{data.data(), int64_t(count) * channels, channels};
  };
  const float* given = full ? vector.data() : nullptr;
  const lgvit::LphTailArgs arguments{lgvit::Scalar::float32, map(hidden), map(tokens), vector.data(),
                                     given, given, given, given, pooled.data(), batch, height, width, channels};
  check(lph_tail(&arguments, 4) == 0, "lph_tail");
  for (int image = 0; image < batch; ++image)
    check(std::abs(pooled[(image * 2 + 1) * channels] - 1.0f) < 1e-5f, "lph_tail: mean token");
}

}  // namespace

// The argument: the number of a fault.
int main(int count, char** arguments) {
  if (count > 1) set_fault(std::atoi(arguments[1]));
  for (int seed = 0; seed < 2; ++seed) {
    for (int batch : {33, 300}) {
      set_schedule(int(cuda_host::Order::interleaved), seed, 2);
      one_compaction(batch, 1);
      one_exit(batch, false, 1);
      one_exit(batch, true, 1);
    }
    one_tail(2, true);
    one_tail(2, false);
  }
  std::puts("no race");
}
