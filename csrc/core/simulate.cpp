#include "simulate.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace moe_overlap {
namespace {

using std::to_string;

constexpr int64_t kNone = -1;

void check_arguments(const std::vector<int64_t>& lane_of_action, const std::vector<double>& duration_s,
                     const std::vector<std::vector<int64_t>>& deps) {
  const size_t count = lane_of_action.size();
  if (duration_s.size() != count || deps.size() != count) {
    throw std::invalid_argument("lane_of_action, duration_s and deps must have one entry for each action, got " +
                                to_string(count) + ", " + to_string(duration_s.size()) + " and " +
                                to_string(deps.size()));
  }
  for (size_t i = 0; i < count; ++i) {
    if (!std::isfinite(duration_s[i]) || duration_s[i] < 0) {
      throw std::invalid_argument("duration_s of action " + to_string(i) +
                                  ": expected a finite number of seconds >= 0");
    }
    for (const int64_t dep : deps[i]) {
      if (dep < 0 || dep >= static_cast<int64_t>(count)) {
        throw std::invalid_argument("action " + to_string(i) + " depends on action " + to_string(dep) +
                                    ": expected 0 to " + to_string(static_cast<int64_t>(count) - 1));
      }
    }
  }
}

// For each action, the action before it on its lane (kNone for the first).
std::vector<int64_t> lane_predecessors(const std::vector<int64_t>& lane_of_action) {
  std::unordered_map<int64_t, int64_t> last_of_lane;
  std::vector<int64_t> before(lane_of_action.size(), kNone);
  for (size_t i = 0; i < lane_of_action.size(); ++i) {
    const auto [entry, first] = last_of_lane.try_emplace(lane_of_action[i], kNone);
    before[i] = entry->second;
    entry->second = static_cast<int64_t>(i);
  }
  return before;
}

// The first action that did not run waits for a dependency: its lane predecessor has a lower number, so it did run.
[[noreturn]] void throw_deadlock(const std::vector<int64_t>& lane_of_action,
                                 const std::vector<std::vector<int64_t>>& deps, const std::vector<int64_t>& waiting) {
  for (size_t i = 0; i < waiting.size(); ++i) {
    if (waiting[i] == 0) continue;
    const auto stuck =
        std::find_if(deps[i].begin(), deps[i].end(), [&](int64_t d) { return waiting[static_cast<size_t>(d)] != 0; });
    throw std::invalid_argument("deadlock: action " + to_string(i) + " (lane " + to_string(lane_of_action[i]) +
                                ") never starts, it waits for action " + to_string(*stuck));
  }
  throw std::logic_error("throw_deadlock called although every action ran");
}

}  // namespace

std::vector<Interval> simulate(const std::vector<int64_t>& lane_of_action, const std::vector<double>& duration_s,
                               const std::vector<std::vector<int64_t>>& deps) {
  check_arguments(lane_of_action, duration_s, deps);
  const size_t count = lane_of_action.size();
  const std::vector<int64_t> before = lane_predecessors(lane_of_action);

  std::vector<std::vector<int64_t>> successors(count);
  std::vector<int64_t> waiting(count, 0);  // predecessors that have not ended
  for (size_t i = 0; i < count; ++i) {
    waiting[i] = static_cast<int64_t>(deps[i].size());
    for (const int64_t dep : deps[i]) successors[static_cast<size_t>(dep)].push_back(static_cast<int64_t>(i));
    if (before[i] != kNone) {
      ++waiting[i];
      successors[static_cast<size_t>(before[i])].push_back(static_cast<int64_t>(i));
    }
  }

  // The times are a maximum over predecessors, so any order that respects them gives the same numbers.
  std::vector<Interval> times(count, Interval{0.0, 0.0});
  std::vector<size_t> ready;
  for (size_t i = 0; i < count; ++i) {
    if (waiting[i] == 0) ready.push_back(i);
  }
  size_t done = 0;
  while (!ready.empty()) {
    const size_t i = ready.back();
    ready.pop_back();
    ++done;
    times[i].end_s = times[i].start_s + duration_s[i];
    for (const int64_t successor : successors[i]) {
      const auto next = static_cast<size_t>(successor);
      times[next].start_s = std::max(times[next].start_s, times[i].end_s);
      if (--waiting[next] == 0) ready.push_back(next);
    }
  }
  if (done != count) throw_deadlock(lane_of_action, deps, waiting);
  return times;
}

}  // namespace moe_overlap
