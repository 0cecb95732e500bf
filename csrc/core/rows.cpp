#include "rows.h"

#include <algorithm>

namespace moe_overlap::cpu {

// One of each compilation, in csrc/core/row_kernels.cpp; CMakeLists.txt says which there are.
namespace baseline {
extern const RowKernels kernels;
}
#ifdef MOE_OVERLAP_X86
namespace avx2 {
extern const RowKernels kernels;
}
namespace avx512 {
extern const RowKernels kernels;
}
#endif

std::vector<const RowKernels*> row_kernels() {
  std::vector<const RowKernels*> found;
#ifdef MOE_OVERLAP_X86
  // Asks the system too: whether it saves the wide registers.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    found.push_back(&avx512::kernels);
  }
  if (__builtin_cpu_supports("avx2")) found.push_back(&avx2::kernels);
#endif
  found.push_back(&baseline::kernels);
  return found;
}

int64_t mark_rows(const int32_t* slot_to_row, int64_t slots, int64_t rows, uint8_t* used) {
  std::fill_n(used, rows, uint8_t{0});
  int64_t twice = -1;
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t row = slot_to_row[slot];
    if (row < 0) continue;
    if (used[row] != 0) twice = row;
    used[row] = 1;
  }
  return twice;
}

void copy_to_rows(const void* x, const int32_t* slot_to_row, int64_t k, int64_t row_bytes, void* out,
                  int64_t first_token, int64_t end_token) {
  for (int64_t token = first_token; token < end_token; ++token) {
    const char* const from = static_cast<const char*>(x) + token * row_bytes;
    for (int64_t slot = token * k; slot < (token + 1) * k; ++slot) {
      if (slot_to_row[slot] < 0) continue;
      std::copy_n(from, row_bytes, static_cast<char*>(out) + slot_to_row[slot] * row_bytes);
    }
  }
}

void clear_unused_rows(const uint8_t* used, int64_t row_bytes, void* out, int64_t first_row, int64_t end_row) {
  for (int64_t row = first_row; row < end_row; ++row) {
    if (used[row] == 0) std::fill_n(static_cast<char*>(out) + row * row_bytes, row_bytes, char{0});
  }
}

}  // namespace moe_overlap::cpu
