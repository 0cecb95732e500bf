// Seats that may be better: copies for the wire's sake, rows handed over down to a target, rows levelled inside nodes.
// As moe_overlap/planning/copy_candidates.py.
#pragma once

#include <algorithm>
#include <optional>
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

// Of a rank's rows: `target` together, `copied` at copies, and `kept` at homes: -1, as many as the target has, or where
// ranks wait in turn what the other two leave. inside: new copies on the home's node alone.
struct Limits {
  int64_t target;
  int64_t copied;
  int64_t kept = -1;
  bool inside = false;
};

class Candidates {
 public:
  explicit Candidates(const LoadView& view) : view_(view) {}

  // Those given with copies on nodes that lack an expert, at most `ports` from each rank and to each, where `copied`
  // rows of them are computed, and on nodes that then have at most `in_node`.
  Seats node_copies(int64_t most_copies, int64_t ports, int64_t copied, int64_t in_node) const;
  // The most rows that ranks may keep at homes, for those above it to find room at copies of their node's ranks.
  int64_t most_kept(const Seats& seats, int64_t target) const;
  // The seats of each rank that rows are taken from, those with most rows first.
  std::vector<std::vector<size_t>> giving(const Seats& start, const Limits& limits) const;
  // When no rank keeps more rows than the limits allow that another one can take over. own: what `giving` says. The
  // result is overwritten by the next call.
  const Seats& fill(const Seats& start, const std::vector<std::vector<size_t>>& own, const Limits& limits,
                    int64_t most_copies) const;
  // The rows of each expert shared out anew inside each node, so that its ranks are equally far from their limits. The
  // result is overwritten by the next call.
  const Seats& level(const std::vector<Seat>& all, const Limits& limits) const;
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

  bool is_home(size_t i) const { return i < static_cast<size_t>(view_.load.experts); }
  // Rows that a rank may take over at copies, from `loads` and `copied_`.
  int64_t room_of(const Counts& loads, size_t rank, const Limits& limits) const {
    const int64_t left = limits.copied - copied_[rank];
    return limits.kept >= 0 ? left : std::min(left, limits.target - loads[rank]);
  }
  // The nodes that lack an expert, with their rows for it.
  std::vector<NodeCopy> lacking() const;
  // Rows of one of a rank's `own` seats that gain most elsewhere: 0 where there are none. open: ranks that may take
  // copies.
  Move best_move(const Seats& seats, const std::vector<size_t>& own, const Counts& open, int64_t excess,
                 const Limits& limits) const;

  const LoadView& view_;

  mutable std::optional<std::vector<NodeCopy>> lacking_;

  // Room that every candidate uses anew.
  mutable Seats filled_;
  mutable Seats levelled_;
  mutable std::vector<size_t> of_expert_;
  mutable std::vector<std::vector<size_t>> shared_;
  mutable std::vector<std::pair<int64_t, size_t>> others_;
  mutable std::vector<size_t> order_;
  mutable Counts open_;
  mutable Counts gives_;  // by rank, where ranks wait in turn: rows at homes
  mutable Counts copied_;
  mutable Counts room_;
  mutable Counts homes_;
  mutable Counts marks_;
  mutable int64_t mark_ = 0;
};

}  // namespace moe_overlap
