// The rows of an output that no slot points to, for permute and the backward of combine.
#pragma once

#include "kernels/rows.cuh"

namespace moe_overlap {

// The rows of an output that some slot points to are marked by the thread that holds the row's first word, ...
__device__ inline void mark_used(uint8_t* used, const int32_t (&row)[kSlotsAtOnce]) {
#pragma unroll
  for (int j = 0; j < kSlotsAtOnce; ++j) {
    if (row[j] >= 0) used[row[j]] = 1;
  }
}

// ... and a second, short launch zeroes the others: it reads one byte for each row where all are used. Neither the map
// by row nor the ends of the experts are known to these operators, and clearing the whole output first would add a
// write of all of it, near a half of the time.
constexpr int kClearRowsPerWarp = 8;

template <typename Word>
__global__ void __launch_bounds__(kRowThreads)
    clear_unused_kernel(const uint8_t* used, int64_t num_rows, int words, Word* out) {
  const int64_t first = (int64_t{blockIdx.x} * (kRowThreads / kWarp) + warp_id()) * kClearRowsPerWarp;
  const int64_t mine = first + lane_id();
  const bool clear_mine = lane_id() < kClearRowsPerWarp && mine < num_rows && used[mine] == 0;
  const uint32_t unused = ballot(clear_mine);
#pragma unroll 1
  for (int j = 0; j < kClearRowsPerWarp; ++j) {
    if (((unused >> j) & 1) == 0) continue;
    Word* const row = out + element_offset(first + j, words);
    for (int64_t word = lane_id(); word < words; word += kWarp) row[word] = Word{};
  }
}

inline void clear_unused(const uint8_t* used, int64_t num_rows, int64_t row_bytes, void* out, cudaStream_t stream) {
  const LaunchConfig config{ceil_div(num_rows, kClearRowsPerWarp * (kRowThreads / kWarp)), kRowThreads, 0};
  with_word(access_bytes(row_bytes, out, out), [&](auto word) {
    using Word = decltype(word);
    const int words = row_length(row_bytes / int64_t{sizeof(Word)});
    launch(clear_unused_kernel<Word>, config, stream, used, num_rows, words, static_cast<Word*>(out));
  });
}

}  // namespace moe_overlap
