// Seats that may be better: copies for the wire's sake, rows handed over down to a target, rows levelled inside nodes.
// As moe_overlap/planning/copy_candidates.py.
#pragma once

#include <tuple>
#include <utility>
#include <vector>

#include "copy_load.h"

namespace moe_overlap {

// A copy of an expert somewhere in a node that has none, and the rows that it keeps there. Those with most come first.
struct NodeCopy {
  int64_t rows;
  int64_t expert;
  int64_t node;
  bool operator<(const NodeCopy& other) const {
    return std::tie(other.rows, expert, node) < std::tie(rows, other.expert, other.node);
  }
};

class Candidates {
 public:
  explicit Candidates(const LoadView& view) : view_(view) {}

  // Copies that spare the wire between nodes most.
  std::vector<NodeCopy> node_copies() const;
  Seats with_node_copies(const std::vector<NodeCopy>& copies, size_t count) const;
  // When no rank keeps more than `target` rows that another one can take over. own: the seats of each rank, those with
  // most rows first. The result is overwritten by the next call.
  const Seats& fill(const Seats& start, const std::vector<std::vector<size_t>>& own, int64_t target,
                    int64_t most_copies) const;
  // The rows of each expert shared out anew inside each node, so that its ranks have equally many. The result is
  // overwritten by the next call.
  const Seats& level(const std::vector<Seat>& all) const;
  // When the rows of seat i go to another one of its expert and node, else to the home.
  std::vector<Seat> inherited(const std::vector<Seat>& seats, size_t i) const;

 private:
  // Rows that go to another seat of their expert: `to` is a seat, or -1 for a new copy on `rank`.
  struct Move {
    size_t from;
    int64_t to;
    int64_t rank;
    int64_t rows;
  };

  // Rows of one of a rank's `own` seats that gain most elsewhere: 0 where there are none. open: ranks that may take
  // copies.
  Move best_move(const Seats& seats, const std::vector<size_t>& own, const Counts& open, int64_t target) const;

  const LoadView& view_;

  // Room that every candidate uses anew.
  mutable Seats filled_;
  mutable Seats levelled_;
  mutable std::vector<size_t> of_expert_;
  mutable std::vector<std::vector<size_t>> shared_;
  mutable std::vector<std::pair<int64_t, size_t>> others_;
  mutable std::vector<size_t> order_;
  mutable Counts open_;
  mutable Counts marks_;
  mutable int64_t mark_ = 0;
};

}  // namespace moe_overlap
