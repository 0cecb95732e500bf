// Exact event simulation of a schedule: durations, lanes and dependencies in, start and end of every action out.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

namespace moe_overlap {

struct Interval {
  double start_s;
  double end_s;
};

// Actions are numbered in issue order. Action i takes duration_s[i] seconds on lane lane_of_action[i] and needs the
// actions deps[i] to have ended. A lane runs its actions in issue order, one at a time. So
//   start[i] = max(0, end of the previous action of its lane, end of every dependency),   end[i] = start[i] +
//   duration_s[i].
// Dependencies may point forward in issue order (an exchange issued early on another lane).
//
// With `slowdown` (lane -> factor >= 1) the actions of a lane take so many times longer while any other lane is busy.
// Time then advances from event to event; where every factor is 1 the formula above gives the result.
//
// Throws std::invalid_argument for lists of different lengths, a duration that is negative or not finite, a dependency
// that is no action, a factor below 1, and for a deadlock: the message names the first action in issue order that can
// never start.
std::vector<Interval> simulate(const std::vector<int64_t>& lane_of_action, const std::vector<double>& duration_s,
                               const std::vector<std::vector<int64_t>>& deps,
                               const std::map<int64_t, double>& slowdown = {});

}  // namespace moe_overlap
