// Overflow-checked 64-bit arithmetic for offsets: wherever an index meets a stride, a wrapped product would read or
// write somewhere else without a word. Header only, no dependencies.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#define MOE_OVERLAP_DEVICE __host__ __device__
#else
#define MOE_OVERLAP_DEVICE
#endif

namespace moe_overlap {

[[noreturn]] inline void throw_overflow(const char* operation, int64_t a, int64_t b) {
  throw std::overflow_error("64-bit offset overflow: " + std::to_string(a) + " " + operation + " " + std::to_string(b));
}

inline int64_t checked_add(int64_t a, int64_t b) {
  int64_t result = 0;
  if (__builtin_add_overflow(a, b, &result)) throw_overflow("+", a, b);
  return result;
}

inline int64_t checked_mul(int64_t a, int64_t b) {
  int64_t result = 0;
  if (__builtin_mul_overflow(a, b, &result)) throw_overflow("*", a, b);
  return result;
}

// The smallest multiple of `align` (>= 1) that is not below `value` (>= 0).
inline int64_t checked_round_up(int64_t value, int64_t align) {
  return checked_mul(checked_add(value, align - 1) / align, align);
}

// The offset of (row, column) in a row-major buffer: row * stride + column.
inline int64_t checked_offset(int64_t row, int64_t stride, int64_t column) {
  return checked_add(checked_mul(row, stride), column);
}

// The same offset inside a kernel, where nothing can throw: the host has checked the largest one (checked_mul of rows
// and stride) before the launch. 64 bits whatever the types of the arguments.
MOE_OVERLAP_DEVICE inline int64_t element_offset(int64_t row, int64_t stride, int64_t column = 0) {
  return row * stride + column;
}

}  // namespace moe_overlap
