// A new placement that keeps what can stay of the one before. The Python reference with the same results is
// `kept_reference` in moe_overlap/placement/churn.py.
#pragma once

#include <cstdint>
#include <vector>

namespace moe_overlap {

// The experts of all slots, rank by rank, of which slots[r] lie on rank r.
struct Map {
  std::vector<int64_t> experts;
  std::vector<int64_t> slots;
};

// homes: the slot of each expert's home.
struct Kept {
  std::vector<int64_t> experts;
  std::vector<int64_t> homes;
  std::vector<int64_t> slots;
};

// `wanted` in an order in which slots that stay keep their place, and the homes, each on its rank of `old_homes` where
// the expert still is, else where its first slot is. node_size: ranks of a node, and nodes, may change what they want
// where they have as many slots, so that most of it is there already; 0: each keeps its own.
// Throws std::invalid_argument for maps of different ranks, or experts without a slot.
Kept kept(Map wanted, const Map& old, const std::vector<int64_t>& old_homes, int64_t node_size);

}  // namespace moe_overlap
