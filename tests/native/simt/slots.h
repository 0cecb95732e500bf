// Random slot_to_row maps for the tests of permute and combine.
#pragma once

#include <algorithm>
#include <numeric>

#include "cases.h"

namespace cases {

// Each row has at most one slot. Some slots have no row, some rows no slot, at times none or all of them; a few maps
// hold entries past the end, which the kernels are not to follow.
struct Slots {
  explicit Slots(Random& random);
  int64_t tokens, k, num_rows;
  Buffer<int32_t> slot_to_row;  // [tokens, k]
};

inline Slots::Slots(Random& random)
    : tokens(random.chance(0.05) ? 0 : random.range(1, random.chance(0.3) ? 14 : 5)),
      k(random.pick(std::vector<int64_t>{1, 2, 3, 6, 8, 8, 9, 16, 17})),
      num_rows(random.chance(0.05) ? 0 : tokens * k + (random.chance(0.5) ? 0 : random.range(0, 70))),
      slot_to_row(tokens * k, random.pick(std::vector<int64_t>{0, 0, 4})) {
  const float unused = random.pick(std::vector<float>{0.0f, 0.0f, 0.3f, 1.0f});
  std::vector<int32_t> rows(static_cast<size_t>(num_rows));
  std::iota(rows.begin(), rows.end(), 0);
  std::shuffle(rows.begin(), rows.end(), random.bits());
  size_t next = 0;
  for (int64_t slot = 0; slot < tokens * k; ++slot) {
    const bool none = next == rows.size() || random.chance(unused);
    slot_to_row[slot] = none ? -1 : rows[next++];
    if (none && random.chance(0.05)) slot_to_row[slot] = static_cast<int32_t>(num_rows);
  }
}

// Elements of a row: less and more than a warp, with and without 16-byte accesses, and where there are few rows more
// than one round of a block.
inline int64_t random_width(Random& random, const Slots& slots) {
  std::vector<int64_t> widths{0, 1, 3, 4, 7, 8, 16, 24, 31, 40, 64};
  if (slots.tokens * slots.k <= 60) widths.insert(widths.end(), {72, 96, 100, 256, 264, 520, 1032});
  if (slots.tokens * slots.k <= 16) widths.insert(widths.end(), {1032, 2304});
  return random.pick(widths);
}

}  // namespace cases
