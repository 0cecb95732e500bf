// The search for the fastest order of a window's actions, for one way of cutting its exchange. The Python reference
// with the same doubles, and the reasons why this space is enough, are in moe_overlap/planning/search.py and
// moe_overlap/planning/interleavings.py.
#pragma once

#include <vector>

#include "two_lanes.h"

namespace moe_overlap {

// `joined`: every exchange is waited for where it starts.
struct Placement {
  double predicted_s;
  bool joined;
  Order order;
};

// The joined placement, all of the first K ops before the experts for every K, and the best interleavings of a dynamic
// programme over (chunks done, ops done) for several orders of the chunks, each simulated.
// Throws std::invalid_argument as makespan_s does.
std::vector<Placement> search(const Cut& cut);

}  // namespace moe_overlap
