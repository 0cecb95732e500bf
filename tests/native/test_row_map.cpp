#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "check.h"
#include "core/row_map.h"

using moe_overlap::row_map;
using moe_overlap::row_map_rows;
using moe_overlap::RowMapArgs;

using Ints = std::vector<int32_t>;

struct Result {
  Ints tokens_per_expert, offs, slot_to_row, row_to_slot;
};

static Result run(const Ints& ids, int64_t first, int64_t last, int64_t align = 1,
                  std::optional<int64_t> capacity = std::nullopt) {
  const auto experts = static_cast<size_t>(last - first);
  const int64_t slots = static_cast<int64_t>(ids.size());
  Result r{Ints(experts, 99), Ints(experts, 99), Ints(ids.size(), 99),
           Ints(static_cast<size_t>(row_map_rows(slots, last - first, align)), 99)};
  row_map(RowMapArgs{ids.data(), slots, first, last, align, capacity, r.tokens_per_expert.data(), r.offs.data(),
                     r.slot_to_row.data(), r.row_to_slot.data()});
  return r;
}

TEST(row_map_of_the_worked_example) {
  const Result r = run({2, 0, 0, -1, 2, 2}, 0, 3);
  CHECK((r.tokens_per_expert == Ints{2, 0, 3}));
  CHECK((r.offs == Ints{2, 2, 5}));
  CHECK((r.slot_to_row == Ints{2, 0, 1, -1, 3, 4}));
  CHECK((r.row_to_slot == Ints{1, 2, 0, 4, 5, -1}));
}

TEST(row_map_of_some_experts_only) {
  const Result r = run({2, 0, 0, -1, 2, 1}, 1, 3);
  CHECK((r.tokens_per_expert == Ints{1, 2}));
  CHECK((r.offs == Ints{1, 3}));
  CHECK((r.slot_to_row == Ints{1, -1, -1, -1, 2, 0}));
  CHECK((r.row_to_slot == Ints{5, 0, 4, -1, -1, -1}));
}

TEST(row_map_aligned_and_with_capacity) {
  const Result r = run({1, 1, 0, 1}, 0, 2, 4, 2);
  CHECK((r.tokens_per_expert == Ints{1, 2}));
  CHECK((r.offs == Ints{4, 8}));
  CHECK((r.slot_to_row == Ints{4, 5, 0, -1}));
  CHECK((r.row_to_slot == Ints{2, -1, -1, -1, 0, 1, -1, -1}));
}

TEST(row_map_of_nothing) {
  const Result r = run({}, 0, 2, 8);
  CHECK((r.tokens_per_expert == Ints{0, 0}));
  CHECK((r.offs == Ints{0, 0}));
  CHECK(run({0, 1}, 1, 1).slot_to_row == (Ints{-1, -1}));
}

TEST(row_map_rows_beyond_int32_are_refused) {
  const int64_t most = std::numeric_limits<int32_t>::max();
  CHECK(row_map_rows(most, 8, 1) == most);
  CHECK_THROWS(row_map_rows(most + 1, 8, 1), std::overflow_error, "int32");
  CHECK_THROWS(row_map_rows(1, most, 1 << 30), std::overflow_error, "int32");
  CHECK_THROWS(row_map_rows(1, int64_t{1} << 40, int64_t{1} << 40), std::overflow_error, "overflow");
}
