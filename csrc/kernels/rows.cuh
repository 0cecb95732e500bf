// What permute, combine and pack share: how threads are laid over rows.
//
// All are bound by memory, so the layout has one aim: every access of a row is 16 bytes wide and coalesced, and there
// are enough of them in flight. A block of 256 threads takes 256 / threads_per_row rows; a thread takes every
// threads_per_row-th word of its row. Where rows are few (decoding), several blocks share a row in interleaved parts.
#pragma once

#include <algorithm>
#include <limits>

#include "kernels/launch.h"

namespace moe_overlap {

constexpr int kRowThreads = 256;
// Blocks below which a row is split: two for each multiprocessor of the largest chip in use.
constexpr int64_t kFewBlocks = 264;
// Slots of a token that are in flight together, each in registers of its own.
constexpr int kSlotsAtOnce = 8;

// The length of a row as kernels take it: in 32 bits, so that row * length is one multiplication, with a 64-bit result.
inline int row_length(int64_t length) {
  if (length > std::numeric_limits<int>::max()) {
    throw std::invalid_argument("rows of " + std::to_string(length) + " entries: at most 2^31 - 1");
  }
  return static_cast<int>(length);
}

// The tiling of `rows` rows of `words` accesses each. A row uses the number of threads that leaves the fewest idle, and
// of those the largest: 896 words (7168 elements of 2 bytes) take 7 rounds of 128 threads, not 3.5 of 256.
inline RowTiling row_tiling(int64_t rows, int64_t words, bool may_split) {
  if (rows == 0 || words == 0) return {};
  row_length(words);
  RowTiling tiling;
  int64_t least = 0;
  for (int threads = kRowThreads; threads >= kWarp; threads /= 2) {
    const int64_t covered = checked_mul(ceil_div(words, threads), threads);
    if (least != 0 && covered >= least) continue;
    least = covered;
    tiling.threads_per_row = threads;
  }
  const int64_t blocks = ceil_div(rows, kRowThreads / tiling.threads_per_row);
  const int64_t rounds = ceil_div(words, tiling.threads_per_row);
  tiling.splits = may_split ? static_cast<int>(std::min(rounds, ceil_div(kFewBlocks, blocks))) : 1;
  tiling.launch = {checked_mul(blocks, tiling.splits), kRowThreads, 0};
  return tiling;
}

// Where this thread stands: its row, its first word there and the distance to the next one. The first `skipped` blocks
// of the launch have no rows.
struct RowPlace {
  int64_t row;
  int first;
  int step;
};
__device__ inline RowPlace row_place(int threads_per_row, int splits, int skipped = 0) {
  const int thread = static_cast<int>(threadIdx.x);
  const unsigned index = blockIdx.x - static_cast<unsigned>(skipped);
  const int split = static_cast<int>(index) % splits;
  const int64_t block = index / static_cast<unsigned>(splits);
  return {block * (kRowThreads / threads_per_row) + thread / threads_per_row,
          split * threads_per_row + thread % threads_per_row, splits * threads_per_row};
}

// Up to kSlots entries of a token's slots from `first` on; -1 past the end and for entries that are no row.
template <int kSlots>
__device__ inline void load_rows(const int32_t* slot_to_row, int64_t first, int64_t k, int64_t num_rows,
                                 int32_t (&row)[kSlots]) {
#pragma unroll
  for (int j = 0; j < kSlots; ++j) {
    const int32_t entry = first + j < k ? slot_to_row[first + j] : -1;
    row[j] = entry < num_rows ? entry : -1;
  }
}

// The widest access (16, 4 or 2 bytes) that rows of `row_bytes` at these addresses allow.
inline int access_bytes(int64_t row_bytes, const void* one, const void* other) {
  for (const int bytes : {16, 4}) {
    if (row_bytes % bytes == 0 && aligned(one, bytes) && aligned(other, bytes)) return bytes;
  }
  return 2;
}

// Calls run(Word{}) with a type of `bytes` bytes.
template <typename Run>
void with_word(int bytes, const Run& run) {
  switch (bytes) {
    case 16:
      return run(Bytes16{});
    case 4:
      return run(uint32_t{});
    default:
      return run(uint16_t{});
  }
}

}  // namespace moe_overlap
