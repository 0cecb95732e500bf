// Where the ops stand among the experts of a cut, and in which order its chunks are taken: the inside of the search.
// The Python reference that finds the same is moe_overlap/planning/interleavings.py.
#pragma once

#include <vector>

#include "two_lanes.h"

namespace moe_overlap {

// The best few orders of a cut, best first, when every duration of a lane is multiplied by its factor: what a dynamic
// programme over (chunks done, ops done) finds for several orders of the chunks. Those that take longer than limit_s
// between head and tail may be missing.
std::vector<Order> best_interleavings(const Cut& cut, double compute, double wire, double limit_s);

}  // namespace moe_overlap
