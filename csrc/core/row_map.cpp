#include "row_map.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "checked_math.h"

namespace moe_overlap {
namespace {

// The expert of a slot counted from `first`, or `experts` for a slot without a row.
inline size_t local_expert(int32_t id, int64_t first, int64_t last) {
  return static_cast<size_t>(id >= first && id < last ? id - first : last - first);
}

}  // namespace

int64_t row_map_rows(int64_t slots, int64_t experts, int64_t align) {
  const int64_t most = checked_add(slots, checked_mul(experts, align - 1));
  if (std::max(most, slots) > std::numeric_limits<int32_t>::max()) {
    throw std::overflow_error("row_map: " + std::to_string(most) + " rows do not fit int32 row numbers");
  }
  return most / align * align;
}

void row_map(const RowMapArgs& args) {
  const int64_t num_rows = row_map_rows(args.slots, args.last - args.first, args.align);
  const auto experts = static_cast<size_t>(args.last - args.first);

  std::vector<int64_t> count(experts + 1, 0);
  for (int64_t slot = 0; slot < args.slots; ++slot) ++count[local_expert(args.ids[slot], args.first, args.last)];

  // next[e]: the row of the next slot of expert e; limit[e]: the end of its rows. The last entry takes no rows.
  std::vector<int64_t> next(experts + 1, 0), limit(experts + 1, 0);
  int64_t end = 0;
  for (size_t e = 0; e < experts; ++e) {
    const int64_t kept = args.capacity ? std::min(count[e], *args.capacity) : count[e];
    next[e] = end;
    limit[e] = end + kept;
    end += checked_round_up(kept, args.align);
    args.tokens_per_expert[e] = static_cast<int32_t>(kept);
    args.offs[e] = static_cast<int32_t>(end);
  }

  std::fill_n(args.row_to_slot, num_rows, -1);
  for (int64_t slot = 0; slot < args.slots; ++slot) {
    const size_t e = local_expert(args.ids[slot], args.first, args.last);
    const bool placed = next[e] < limit[e];
    args.slot_to_row[slot] = placed ? static_cast<int32_t>(next[e]) : -1;
    if (placed) args.row_to_slot[next[e]++] = static_cast<int32_t>(slot);
  }
}

}  // namespace moe_overlap
