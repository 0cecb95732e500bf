// Who sends which rows of an expert to which of its seats. The Python reference, which also says why, is `split_rows`
// in moe_overlap/planning/replication.py.
#pragma once

#include "copy_load.h"

namespace moe_overlap {

// `rows` that `source` has for the expert of a seat, by its number in the list of seats.
struct SplitRows {
  int64_t source;
  int64_t seat;
  int64_t rows;
};

// `moved` of the `total`, each its part of it.
void to_parts(Counts& of, int64_t moved, int64_t total);

// Of all experts with several seats. counts[rank * experts + expert]; the seats of an expert have all of its rows.
// Throws std::invalid_argument for what cannot be.
std::vector<SplitRows> split_rows(const int64_t* counts, int64_t ranks, int64_t experts, const std::vector<Seat>& seats,
                                  int64_t ranks_per_node);

}  // namespace moe_overlap
