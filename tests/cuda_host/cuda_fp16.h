// As much of CUDA's half precision as csrc/stable/cuda/*_kernel.cu needs, on the host.
#pragma once

#include <bit>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }

inline float __half2float(__half half) {
  const uint32_t sign = uint32_t(half.bits & 0x8000u) << 16, rest = half.bits & 0x7fffu;
  const uint32_t special = rest >= 0x7c00u ? 0x70000000u : 0u;  // infinities and NaN have all exponent bits
  const float scaled = std::bit_cast<float>(rest << 13 | special);
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(special ? scaled : scaled * 0x1p112f));
}
