// Where experts go: how many replicas of each, on which ranks, and which expert belongs to which seat. Integers and
// doubles in, integers out. The Python reference with the same results is moe_overlap/placement/packing.py, which also
// says where the algorithms are from.
#pragma once

#include <cstdint>
#include <vector>

namespace moe_overlap {

// What a layer asks for. load: of each expert; slots: of each rank; homes: the rank of each expert's home, which gets
// one of its slots, or empty; nodes: of equally many ranks in a row.
struct Demand {
  std::vector<double> load;
  std::vector<int64_t> slots;
  std::vector<int64_t> homes;
};

// The experts of each rank's slots, rank by rank. EPLB: `groups` of experts in a row go to a node together; 1 node: no
// groups. distinct: no expert twice on a rank, where that is possible.
std::vector<int64_t> eplb(const Demand& demand, int64_t nodes, int64_t groups, bool distinct);

// SYMI's numbers of replicas; contiguous: slots are filled expert by expert, else packed by load, distinct.
std::vector<int64_t> proportional(const Demand& demand, bool contiguous);

// The column of each row with the least sum of costs, cost [rows][columns], no column twice.
// Throws std::invalid_argument where rows are of different lengths or there are more of them than columns.
std::vector<int64_t> assign(const std::vector<std::vector<int64_t>>& cost);

}  // namespace moe_overlap
