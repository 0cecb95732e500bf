// The search for the fastest order of a window's actions, for every way of cutting its exchange. The Python reference
// with the same doubles, and the reasons why this space is enough, are in moe_overlap/planning/search.py and
// moe_overlap/planning/interleavings.py.
#pragma once

#include <cstddef>
#include <vector>

#include "two_lanes.h"

namespace moe_overlap {

// `joined`: every exchange is waited for where it starts.
struct Placement {
  double predicted_s;
  bool joined;
  Order order;
};

// One way of cutting the exchange, and whether its joined placement is asked for, and its others.
struct Asked {
  Cut cut;
  bool joined = true;
  bool overlapped = true;
};

// For each cut the joined placement, all of the first K ops before the experts for every K, and the best interleavings
// of a dynamic programme over (chunks done, ops done) for several orders of the chunks, each simulated. With a limit
// above 0 those that so many others are faster than, by more than rounding, may be missing.
// Throws std::invalid_argument as makespan_s does, and for a cut with copies of experts.
std::vector<std::vector<Placement>> search(const std::vector<Asked>& asked, size_t limit);

}  // namespace moe_overlap
