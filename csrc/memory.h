// Whether a tensor's elements lie in its storage, in plain integers: both interfaces of torch ask it
// (csrc/checks.h and csrc/stable/checks.h). Asked before any pointer is taken.
#pragma once

#include <cstdint>
#include <sstream>
#include <string>

namespace lgvit {

inline bool mul_overflows(int64_t a, int64_t b, int64_t& out) {
  return __builtin_mul_overflow(a, b, &out);
}

inline std::string list_text(const int64_t* values, int64_t count) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < count; ++i) out << (i ? ", " : "") << values[i];
  out << ']';
  return out.str();
}

// Elements of a strided tensor, and bytes of its storage.
struct Memory {
  const int64_t* sizes;
  const int64_t* strides;
  int64_t dim;
  int64_t offset;    // elements
  int64_t itemsize;  // bytes
  uint64_t storage;  // bytes

  // What is wrong, as a message that follows the tensor's name; empty if nothing. Has elements.
  std::string problem() const {
    int64_t end = 0;  // elements from the tensor's first to its last
    for (int64_t i = 0; i < dim; ++i) {
      int64_t step = 0;
      if (mul_overflows(sizes[i] - 1, strides[i], step) || __builtin_add_overflow(end, step, &end))
        return " has sizes " + list_text(sizes, dim) + " and strides " + list_text(strides, dim) +
               " that overflow";
    }
    int64_t bytes = 0;
    if (!__builtin_add_overflow(end, 1, &bytes) && !__builtin_add_overflow(offset, bytes, &bytes) &&
        !mul_overflows(bytes, itemsize, bytes) && static_cast<uint64_t>(bytes) <= storage)
      return "";
    return " needs more memory than its storage has (" + std::to_string(storage) +
           " bytes): was the storage resized?";
  }
};

}  // namespace lgvit
