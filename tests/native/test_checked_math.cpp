#include <cstdint>
#include <limits>

#include "check.h"
#include "core/checked_math.h"

using namespace moe_overlap;

constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
constexpr int64_t kMin = std::numeric_limits<int64_t>::min();

TEST(checked_add_at_the_limits) {
  CHECK(checked_add(kMax - 1, 1) == kMax);
  CHECK(checked_add(kMin, kMax) == -1);
  CHECK_THROWS(checked_add(kMax, 1), std::overflow_error, "9223372036854775807 + 1");
  CHECK_THROWS(checked_add(kMin, -1), std::overflow_error, "overflow");
}

TEST(checked_mul_at_the_limits) {
  CHECK(checked_mul(int64_t{1} << 31, int64_t{1} << 31) == int64_t{1} << 62);
  CHECK(checked_mul(kMax, 1) == kMax);
  CHECK_THROWS(checked_mul(int64_t{1} << 32, int64_t{1} << 31), std::overflow_error, "*");
  CHECK_THROWS(checked_mul(kMin, -1), std::overflow_error, "overflow");
}

TEST(checked_offset_passes_32_bits) {
  // hidden 7168, top-8: more than 2^31 elements at 37450 tokens.
  CHECK(checked_offset(37450 * 8, 7168, 5) == int64_t{2147532805});
  CHECK_THROWS(checked_offset(int64_t{1} << 40, int64_t{1} << 40, 0), std::overflow_error, "overflow");
}

TEST(checked_round_up_to_a_multiple) {
  CHECK(checked_round_up(0, 16) == 0);
  CHECK(checked_round_up(1, 16) == 16);
  CHECK(checked_round_up(16, 16) == 16);
  CHECK(checked_round_up(7, 1) == 7);
  CHECK_THROWS(checked_round_up(kMax - 1, 16), std::overflow_error, "overflow");
}
