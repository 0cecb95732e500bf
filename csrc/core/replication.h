// The decision whether a step's rows stay with the experts they have, move to existing copies of them, or whether
// experts' weights are copied to other ranks. The Python reference with the same results, and the reasons, are in
// moe_overlap/planning/replication.py.
#pragma once

#include <vector>

#include "copy_load.h"

namespace moe_overlap {

// seats: those given, with new rows, and behind them the new copies. relayed: weights go from rank to rank.
struct Decision {
  double left_s;
  double predicted_s;
  bool left;
  std::vector<Seat> seats;
  bool relayed;
};

// Throws std::invalid_argument as check_load does.
Decision decide(const Load& load);

}  // namespace moe_overlap
