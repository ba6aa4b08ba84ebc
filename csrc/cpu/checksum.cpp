// Each 4-byte word goes through one round of xxHash32 in one of kWords lanes, which is a bijection of
// the word and of the lane. The hashes of blocks are chained. One thread: threads of torch that have just
// worked go on spinning, which slows a runtime whose own threads work next.
#include "checksum.h"

#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "../checks.h"

namespace lgvit {
namespace {

constexpr int64_t kWords = 64;            // lanes
constexpr int64_t kBlockBytes = 1 << 17;

void round(uint32_t* lanes, const char* data) {
  uint32_t words[kWords];
  std::memcpy(words, data, sizeof(words));
  for (int64_t i = 0; i < kWords; ++i) {
    const uint32_t sum = lanes[i] + words[i] * 0x85EBCA77u;
    lanes[i] = (sum << 13 | sum >> 19) * 0x9E3779B1u;
  }
}

uint64_t mix(uint64_t hash, uint64_t value) {  // splitmix64's finish of both
  uint64_t z = (hash ^ value) + 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

uint64_t hash_block(const char* data, int64_t bytes) {
  constexpr int64_t kStep = kWords * sizeof(uint32_t);
  uint32_t lanes[kWords];
  for (int64_t i = 0; i < kWords; ++i) lanes[i] = static_cast<uint32_t>(i) * 0xC2B2AE3Du;
  int64_t at = 0;
  for (; at + kStep <= bytes; at += kStep) round(lanes, data + at);
  if (at < bytes) {
    char rest[kStep] = {};
    std::memcpy(rest, data + at, bytes - at);
    round(lanes, rest);
  }
  uint64_t hash = bytes;
  for (int64_t i = 0; i < kWords; i += 2)
    hash = mix(hash, lanes[i] | static_cast<uint64_t>(lanes[i + 1]) << 32);
  return hash;
}

int64_t checksum_op(const at::Tensor& tensor) {
  check_memory("tensor", tensor);
  TORCH_CHECK_VALUE(tensor.is_contiguous(), "tensor has strides ", tensor.strides(),
                    ", expected contiguous");
  return checksum(tensor);
}

}  // namespace

int64_t checksum(const at::Tensor& tensor) {
  const int64_t bytes = tensor.numel() * tensor.element_size();
  if (bytes == 0) return 0;
  const char* data = static_cast<const char*>(tensor.const_data_ptr());
  uint64_t hash = 0;
  for (int64_t at = 0; at < bytes; at += kBlockBytes)
    hash = mix(hash, hash_block(data + at, std::min(kBlockBytes, bytes - at)));
  return static_cast<int64_t>(hash);
}

}  // namespace lgvit

TORCH_LIBRARY_IMPL(lgvit_fast, CPU, m) { m.impl("checksum", lgvit::checksum_op); }
