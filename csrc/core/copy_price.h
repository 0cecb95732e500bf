// Seconds of a candidate: rows of every rank, rows and copies that leave and enter each rank on both wires. As `price`
// in moe_overlap/planning/replication.py.
#pragma once

#include "copy_load.h"

namespace moe_overlap {

// relayed: weights go from rank to rank.
struct Price {
  double seconds;
  bool relayed;
};

class Pricer {
 public:
  explicit Pricer(const LoadView& view);

  // At least `enough_s` where it is not less.
  Price priced(const Seats& seats, double enough_s) const;

 private:
  using Lanes = std::array<Counts, kWires>;

  // Rows of an expert on their way to its home, `sign` times.
  void add_home(int64_t expert, int64_t sign, Lanes& out, Lanes& into) const;
  // Rows of an expert on their way to its seats: those that stay on the rank first, then on the node, evenly.
  void add_split(const Seats& seats, int64_t expert, Lanes& out, Lanes& into) const;
  // As many of the rows left in a node as there is room for there, from each source and to each place its part.
  void stay(int64_t node, Lanes& out, Lanes& into) const;

  const LoadView& view_;
  Lanes base_out_;  // by wire and rank, of experts with one seat
  Lanes base_in_;

  // Room that every candidate uses anew.
  mutable Counts left_;
  mutable Counts sources_;
  mutable Counts rooms_;
  mutable std::vector<Seat> places_;
  mutable Lanes out_;
  mutable Lanes in_;
  mutable Lanes copies_out_;
  mutable Lanes copies_in_;
  mutable Computed computed_;
};

}  // namespace moe_overlap
