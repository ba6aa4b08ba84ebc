// Channels as vectors: loads that widen to float, and the exact (erf) gelu.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>

namespace lgvit {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();

inline Vec load(const float* data) { return Vec::loadu(data); }

inline Vec load(const at::BFloat16* data) {
  Vec out;
  at::vec::load_fp32_from_bf16(data, out);
  return out;
}

// The first `count` lanes from `data`, zeros after them; reads nothing past `data + count`.
inline Vec load(const float* data, int64_t count) {
  if (count >= kLanes) return load(data);
  return count > 0 ? Vec::loadu(data, count) : Vec(0.0f);
}

inline Vec load(const at::BFloat16* data, int64_t count) {
  if (count >= kLanes) return load(data);
  at::BFloat16 lanes[kLanes] = {};
  std::copy_n(data, std::max<int64_t>(count, 0), lanes);
  return load(lanes);
}

inline void store(float* data, const Vec& value, int64_t count) {
  if (count > 0) value.store(data, static_cast<int>(std::min(count, kLanes)));
}

// x Phi(x). Phi(x) - 1/2 is x times a rational function of x^2, fitted for the smallest largest
// error (8.4e-8) on [-5.2, 5.2]; beyond, Phi is 0 or 1 to that precision.
inline Vec gelu(const Vec& x) {
  using at::vec::fmadd;
  const Vec c = at::vec::clamp(x, Vec(-5.2f), Vec(5.2f));
  const Vec z = c * c;
  Vec p = fmadd(Vec(-1.616472115e-08f), z, Vec(5.374391260e-06f));
  p = fmadd(p, z, Vec(4.118029628e-04f));
  p = fmadd(p, z, Vec(6.080689348e-03f));
  p = fmadd(p, z, Vec(6.027740747e-02f));
  p = fmadd(p, z, Vec(3.989417420e-01f));
  Vec q = fmadd(Vec(1.383255646e-04f), z, Vec(3.253413796e-03f));
  q = fmadd(q, z, Vec(4.321711251e-02f));
  q = fmadd(q, z, Vec(3.177508325e-01f));
  q = fmadd(q, z, Vec(1.0f));
  return x * fmadd(c, p / q, Vec(0.5f));
}

}  // namespace lgvit
