#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "core/simulate.h"

using moe_overlap::Interval;
using moe_overlap::simulate;

using Lanes = std::vector<int64_t>;
using Seconds = std::vector<double>;
using Deps = std::vector<std::vector<int64_t>>;

TEST(simulate_nothing) { CHECK(simulate({}, {}, {}).empty()); }

TEST(simulate_a_lane_runs_in_issue_order) {
  const auto t = simulate({0, 0, 1}, {1.0, 2.0, 0.5}, {{}, {}, {0}});
  CHECK(t[0].start_s == 0.0 && t[0].end_s == 1.0);
  CHECK(t[1].start_s == 1.0 && t[1].end_s == 3.0);
  CHECK(t[2].start_s == 1.0 && t[2].end_s == 1.5);
}

// Two chunks: D0 D1 C0 C1 on the wire, E0 E1 on compute. T(r) = max{2ra, 2a+re, (r+1)a+e} with r = 2.
TEST(simulate_two_chunks_equals_the_closed_form) {
  for (const double e : {0.25, 1.0, 4.0}) {
    const double a = 1.0;
    const Lanes lanes{1, 0, 1, 0, 1, 1};  // D0 E0 D1 E1 C0 C1
    const auto t = simulate(lanes, {a, e, a, e, a, a}, {{}, {0}, {}, {2}, {1}, {3}});
    CHECK(t[5].end_s == std::fmax(4 * a, std::fmax(2 * a + 2 * e, 3 * a + e)));
  }
}

TEST(simulate_a_dependency_may_point_forward) {
  const auto t = simulate({0, 1}, {1.0, 2.0}, {{1}, {}});
  CHECK(t[0].start_s == 2.0 && t[0].end_s == 3.0);
}

TEST(simulate_names_the_first_stuck_action) {
  CHECK_THROWS(simulate({0, 0, 1}, {1.0, 1.0, 1.0}, {{}, {2}, {1}}), std::invalid_argument,
               "deadlock: action 1 (lane 0) never starts, it waits for action 2");
  CHECK_THROWS(simulate({0, 0}, {1.0, 1.0}, {{1}, {}}), std::invalid_argument,
               "deadlock: action 0 (lane 0) never starts, it waits for action 1");
  CHECK_THROWS(simulate({0}, {1.0}, {{0}}), std::invalid_argument, "deadlock: action 0");
}

TEST(simulate_refuses_bad_arguments) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK_THROWS(simulate({0, 0}, {1.0}, {{}, {}}), std::invalid_argument, "got 2, 1 and 2");
  CHECK_THROWS(simulate({0}, {-1.0}, {{}}), std::invalid_argument, "duration_s of action 0");
  CHECK_THROWS(simulate({0}, {nan}, {{}}), std::invalid_argument, "duration_s of action 0");
  CHECK_THROWS(simulate({0, 1}, {1.0, 1.0}, {{}, {2}}), std::invalid_argument, "depends on action 2");
  CHECK_THROWS(simulate({0}, {1.0}, {{-1}}), std::invalid_argument, "depends on action -1");
}

// Property: every start is the latest of its predecessors' ends, and no two actions of a lane overlap.
TEST(simulate_random_schedules_start_as_early_as_allowed) {
  std::mt19937_64 random(1);
  for (int round = 0; round < 200; ++round) {
    const size_t count = 1 + random() % 30;
    Lanes lanes(count);
    Seconds seconds(count);
    Deps deps(count);
    for (size_t i = 0; i < count; ++i) {
      lanes[i] = static_cast<int64_t>(random() % 3);
      seconds[i] = static_cast<double>(random() % 8) / 4;
      for (size_t d = 0; i > 0 && d < random() % 3; ++d) deps[i].push_back(static_cast<int64_t>(random() % i));
    }
    const auto t = simulate(lanes, seconds, deps);
    for (size_t i = 0; i < count; ++i) {
      double earliest = 0;
      for (const int64_t dep : deps[i]) earliest = std::fmax(earliest, t[static_cast<size_t>(dep)].end_s);
      for (size_t j = 0; j < i; ++j) {
        if (lanes[j] == lanes[i]) earliest = std::fmax(earliest, t[j].end_s);
      }
      CHECK(t[i].start_s == earliest);
      CHECK(t[i].end_s == earliest + seconds[i]);
    }
  }
}
