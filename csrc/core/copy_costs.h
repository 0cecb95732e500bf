// What it costs to leave rows, to send them, and to copy experts' weights. The Python reference with the same doubles,
// and the reasons, are in moe_overlap/planning/copy_costs.py.
#pragma once

#include <array>
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

  // Whether all ranks of a backward wait for the weight gradients of copies, then for those of homes.
  bool waits_in_turn() const { return wgrad_row_s > 0 && (joined || exposed_copies); }
  // Of one exchange of copies.
  double copies_s(const Ports& copies) const;
  double window_s(const Computed& computed, const Ports& rows, double copy_s) const;
  // Of a backward in which all ranks wait for the input gradients, for the weight gradients of copies, and for those of
  // homes: each time for the slowest.
  double in_turn_s(const Computed& computed) const;
  // Until the gradients of copies are home, from the first of a rank's rows on.
  double last_gradients_s(const Computed& computed, double copy_s) const;
};

}  // namespace moe_overlap
