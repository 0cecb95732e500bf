#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "core/gate.h"

using moe_overlap::choose_experts;
using moe_overlap::count_chosen;
using moe_overlap::GateArgs;

using Ints = std::vector<int32_t>;

template <typename Float>
static Ints chosen(const std::vector<Float>& logits, int64_t experts, int64_t k, int64_t groups = 1,
                   int64_t kept_groups = 1, int64_t summed = 1) {
  const int64_t tokens = static_cast<int64_t>(logits.size()) / experts;
  Ints ids(static_cast<size_t>(tokens * k), 99);
  choose_experts(GateArgs<Float>{logits.data(), logits.data(), experts, k, groups, kept_groups, summed, ids.data()}, 0,
                 tokens);
  return ids;
}

static const float kInf = std::numeric_limits<float>::infinity();
static const float kNan = std::numeric_limits<float>::quiet_NaN();

TEST(gate_takes_the_best_first_and_the_lower_id_of_equals) {
  CHECK((chosen<float>({1, 3, 2, 3, 0, 0, 0, 0}, 4, 2) == Ints{1, 3, 0, 1}));
  CHECK((chosen<double>({1, 3, 2, 3}, 4, 4) == Ints{1, 3, 2, 0}));
  CHECK((chosen<float>({-kInf, 1, -kInf, -kInf}, 4, 3) == Ints{1, 0, 2}));
}

TEST(gate_of_bad_rows_chooses_nothing) {
  CHECK((chosen<float>({kNan, 1, kInf, 1, -kInf, -kInf, 0, 1}, 2, 1) == Ints{-1, -1, -1, 1}));
  Ints counts(2, 99);
  const Ints ids{-1, 1, 1, 0};
  CHECK(count_chosen(ids.data(), 4, 2, counts.data()));
  CHECK((counts == Ints{1, 2}));
  CHECK(!count_chosen(ids.data() + 1, 3, 2, counts.data()));
}

TEST(gate_keeps_the_best_groups) {
  const std::vector<float> row{5, 0, 0, 4, 4, 0};  // groups of two: best 5, 4, 4; sums of two 5, 4, 4
  CHECK((chosen<float>(row, 6, 3, 3, 2) == Ints{0, 3, 1}));
  CHECK((chosen<float>({5, -9, 3, 3, 1, 1}, 6, 2, 3, 1, 2) == Ints{2, 3}));
  // An expert at -inf of a group that stays comes before all of other groups.
  CHECK((chosen<float>({1, 1, 9, -kInf}, 4, 2, 2, 1) == Ints{2, 3}));
}

TEST(gate_of_many_experts_equals_a_sort) {
  const int64_t experts = 100;
  std::vector<double> row;
  for (int64_t e = 0; e < experts; ++e) row.push_back(static_cast<double>(e * 37 % 50));  // each value twice
  for (const int64_t k : {1, 31, 32, 33, 100}) {
    const Ints ids = chosen<double>(row, experts, k);
    for (size_t place = 1; place < ids.size(); ++place) {
      const double left = row[static_cast<size_t>(ids[place - 1])], right = row[static_cast<size_t>(ids[place])];
      CHECK(left > right || (left == right && ids[place - 1] < ids[place]));
    }
    CHECK(row[static_cast<size_t>(ids.front())] == 49);
    CHECK(row[static_cast<size_t>(ids.back())] == static_cast<double>(49 - (k - 1) / 2));
  }
}
