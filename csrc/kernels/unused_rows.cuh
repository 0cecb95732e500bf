// The rows of an output that no slot points to, for permute and the backward of combine: the first `clearing` blocks of
// the launch that writes the others set them to zero, beside the blocks that copy.
//
// Neither the map by row nor the ends of the experts are known to these operators, and clearing the whole output first
// would add a write of all of it, near a half of the time. So each of these blocks reads the whole map by slot, which
// lies in the L2 cache, and keeps a bit for each row of its own. Rows are dealt out to the blocks in turn, as unused
// ones mostly lie side by side (padding, what comes after the last expert).
#pragma once

#include "kernels/rows.cuh"

namespace moe_overlap {

// So many blocks write about as fast as the memory takes it, where most rows are unused.
constexpr int64_t kMostClearing = 64;
// Reading the map costs slots * 4 bytes for each block, against slots * row_bytes of the copy: 1/16 at most, ...
constexpr int64_t kBytesPerClearing = 64;
// ... unless there are more rows than bits in 32 KiB for each of them.
constexpr int64_t kMostBoardRows = 8 * (32 << 10);

// Adds to a tiling the blocks that clear, a power of two of them and no more than there are rows.
inline RowTiling with_clearing(RowTiling tiling, int64_t num_rows, int64_t row_bytes) {
  if (num_rows == 0 || row_bytes == 0) return tiling;
  const int64_t wanted = std::min({kMostClearing, row_bytes / kBytesPerClearing, num_rows / kWarp});
  tiling.clearing = 1;
  while (2 * tiling.clearing <= wanted || ceil_div(num_rows, tiling.clearing) > kMostBoardRows) tiling.clearing *= 2;
  tiling.launch.grid += tiling.clearing;
  tiling.launch.block = kRowThreads;
  tiling.launch.shared_bytes = static_cast<int>(4 * ceil_div(ceil_div(num_rows, tiling.clearing), kWarp));
  return tiling;
}

// Sets the bits of this block's rows that are in the map. N entries arrive in one access, and there are N * k of them.
template <int N>
__device__ inline void mark_used(const int32_t* slot_to_row, int64_t slots, int64_t num_rows, int clearing,
                                 int* board) {
  constexpr int kAtOnce = 4;
  const int shift = 31 - leading_zeros(static_cast<uint32_t>(clearing));
  for (int64_t first = int64_t{threadIdx.x} * N; first < slots; first += kRowThreads * N * kAtOnce) {
    Vec<int32_t, N> rows[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t slot = first + j * kRowThreads * N;
#pragma unroll
      for (int i = 0; i < N; ++i) rows[j].v[i] = -1;
      if (slot < slots) rows[j] = load_vec<N>(slot_to_row + slot);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int row = rows[j].v[i];
        if (row < 0 || row >= num_rows || (row & (clearing - 1)) != static_cast<int>(blockIdx.x)) continue;
        const int mine = row >> shift;
        atomic_or(&board[mine / kWarp], static_cast<int>(1u << mine % kWarp));
      }
    }
  }
}

// By all threads of the blocks below `clearing`. `words` of each row.
template <typename Word>
__device__ inline void clear_unused(const int32_t* slot_to_row, int64_t slots, int64_t num_rows, int clearing,
                                    int words, Word* out) {
  int* const board = reinterpret_cast<int*>(dynamic_shared());  // a bit for the rows b, b + clearing, ... of block b
  const int64_t rows = (num_rows - blockIdx.x + clearing - 1) / clearing;
  const int entries = static_cast<int>((rows + kWarp - 1) / kWarp);
  for (int entry = static_cast<int>(threadIdx.x); entry < entries; entry += kRowThreads) {
    const int64_t left = rows - int64_t{entry} * kWarp;  // bits past the last row are set: nothing to clear there
    board[entry] = left >= kWarp ? 0 : static_cast<int>(kAllLanes << left);
  }
  sync_block();
  if (slots % 4 == 0 && reinterpret_cast<uintptr_t>(slot_to_row) % 16 == 0) {
    mark_used<4>(slot_to_row, slots, num_rows, clearing, board);
  } else {
    mark_used<1>(slot_to_row, slots, num_rows, clearing, board);
  }
  sync_block();
  for (int entry = 0; entry < entries; ++entry) {
    // Every eighth bit is this warp's.
    uint32_t unused = ~static_cast<uint32_t>(board[entry]) & (0x01010101u << warp_id());
    while (unused != 0) {
      const int bit = 31 - leading_zeros(unused);
      unused ^= 1u << bit;
      Word* const row = out + element_offset((int64_t{entry} * kWarp + bit) * clearing + blockIdx.x, words);
      for (int64_t word = lane_id(); word < words; word += kWarp) row[word] = Word{};
    }
  }
}

}  // namespace moe_overlap
