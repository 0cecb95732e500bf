// row_map on one thread: a stable counting sort of (token, k) slots by expert. The contract and the reference stand in
// moe_overlap/ops/row_map.py; both give the same integers.
#pragma once

#include <cstdint>
#include <optional>

namespace moe_overlap {

struct RowMapArgs {
  // in
  const int32_t* ids;  // [slots]; an id outside [first, last) is a slot without a row
  int64_t slots;       // T * K
  int64_t first;
  int64_t last;
  int64_t align;                    // >= 1: the rows of each expert begin at a multiple of this
  std::optional<int64_t> capacity;  // >= 0: an expert keeps its first slots
  // out
  int32_t* tokens_per_expert;  // [last - first]
  int32_t* offs;               // [last - first] inclusive ends, with padding
  int32_t* slot_to_row;        // [slots], -1 = no row
  int32_t* row_to_slot;        // [row_map_rows(...)], -1 = padding
};

// The most rows that `slots` slots of `experts` experts can take. Throws std::overflow_error where an int32 row number
// does not reach.
int64_t row_map_rows(int64_t slots, int64_t experts, int64_t align);

void row_map(const RowMapArgs& args);

}  // namespace moe_overlap
