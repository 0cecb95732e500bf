// The decision whether a step's rows stay with the experts they have, move to existing copies of them, or whether
// experts' weights are copied to other ranks. The Python reference with the same results, and the reasons, are in
// moe_overlap/planning/replication.py.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "relays.h"

namespace moe_overlap {

// What the ranks compute: rows, those of them at copies, experts that have rows.
struct Computed {
  std::vector<int64_t> rows;
  std::vector<int64_t> copied;
  std::vector<int64_t> experts;
};

// Seconds of one phase; see PhaseCosts in moe_overlap/planning/copy_costs.py.
struct PhaseCosts {
  struct Line {
    double alpha_s;
    double beta_s;
  };
  double row_s;
  double wgrad_row_s;
  double expert_s;
  std::array<Line, kWires> exchange;
  std::array<Line, kWires> copy;
  double beside_s;
  double chunks;
  bool joined;
  bool exposed_copies;
  bool relays;

  // Of one exchange of copies.
  double copies_s(const Ports& copies) const;
  double window_s(const Computed& computed, const Ports& rows, double copy_s) const;
  // Of a backward in which all ranks wait for the input gradients, for the weight gradients of copies, and for those of
  // homes: each time for the slowest.
  double in_turn_s(const Computed& computed) const;
  // Until the gradients of copies are home, from the first of a rank's rows on.
  double last_gradients_s(const Computed& computed, double copy_s) const;
};

// `rows` of `expert` are computed on `rank`.
struct Seat {
  int64_t expert;
  int64_t rank;
  int64_t rows;
};

// counts[rank * experts + expert]: rows of the rank's tokens for the expert. seats: where they are computed as things
// are, the home of every expert first, in the order of the experts. spare[rank]: slots for further copies.
// refetched: existing copies are fetched in every step as well. margin: by what part a change has to be faster.
struct Load {
  int64_t ranks;
  int64_t experts;
  int64_t ranks_per_node;
  const int64_t* counts;
  std::vector<Seat> seats;
  std::vector<int64_t> spare;
  bool refetched;
  std::vector<PhaseCosts> phases;
  int64_t most_copies;
  double margin;
};

// seats: those given, with new rows, and behind them the new copies. relayed: weights go from rank to rank.
struct Decision {
  double left_s;
  double predicted_s;
  bool left;
  std::vector<Seat> seats;
  bool relayed;
};

// Throws std::invalid_argument for lists of wrong lengths and for ranks, experts and rows that cannot be.
Decision decide(const Load& load);

}  // namespace moe_overlap
