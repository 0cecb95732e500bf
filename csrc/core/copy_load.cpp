#include "copy_load.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace moe_overlap {
namespace {

void check(bool right, const char* what) {
  if (!right) throw std::invalid_argument(std::string("replication: ") + what);
}

}  // namespace

void check_load(const Load& load) {
  check(load.ranks > 0 && load.experts > 0 && load.counts != nullptr, "counts must be [ranks, experts]");
  check(load.ranks_per_node > 0 && load.ranks % load.ranks_per_node == 0, "ranks_per_node must divide the ranks");
  check(load.spare.size() == static_cast<size_t>(load.ranks), "spare must have one entry per rank");
  check(load.seats.size() >= static_cast<size_t>(load.experts), "seats must begin with every expert's home");
  check(!load.phases.empty(), "phases must have an entry");
  const auto experts = static_cast<size_t>(load.experts);
  Counts left(experts, 0);
  int64_t least = 0;
  for (size_t rank = 0; rank < static_cast<size_t>(load.ranks); ++rank) {
    const int64_t* rows = load.counts + rank * experts;
    for (size_t expert = 0; expert < experts; ++expert) {
      left[expert] += rows[expert];
      least = std::min(least, rows[expert]);
    }
  }
  check(least >= 0, "counts must be at least 0");
  for (size_t i = 0; i < load.seats.size(); ++i) {
    const Seat& seat = load.seats[i];
    check(seat.expert >= 0 && seat.expert < load.experts && seat.rank >= 0 && seat.rank < load.ranks && seat.rows >= 0,
          "seats must be of known experts and ranks");
    check(i >= static_cast<size_t>(load.experts) || seat.expert == static_cast<int64_t>(i),
          "seats must begin with every expert's home");
    left[static_cast<size_t>(seat.expert)] -= seat.rows;
  }
  check(std::all_of(left.begin(), left.end(), [](int64_t rows) { return rows == 0; }), "seats must have all rows");
}

LoadView::LoadView(const Load& given_load)
    : load(given_load),
      ranks(static_cast<size_t>(load.ranks)),
      nodes(static_cast<size_t>(load.ranks / load.ranks_per_node)) {
  for (int64_t rank = 0; rank < load.ranks; ++rank) node_.push_back(rank / load.ranks_per_node);
  const auto experts = static_cast<size_t>(load.experts);
  wanted_.resize(experts * ranks);
  constexpr size_t kAtOnce = 8;  // numbers of a cache line
  for (size_t first = 0; first < experts; first += kAtOnce) {
    const size_t last = std::min(first + kAtOnce, experts);
    for (size_t rank = 0; rank < ranks; ++rank) {
      for (size_t expert = first; expert < last; ++expert) {
        wanted_[expert * ranks + rank] = load.counts[rank * experts + expert];
      }
    }
  }
  for (int64_t expert = 0; expert < load.experts; ++expert) {
    most_wanted_.push_back(*std::max_element(wanted(expert), wanted(expert) + ranks));
  }
  link(load.seats, given);
  for (const PhaseCosts& phase : load.phases) {
    row_s += phase.row_s;
    for (size_t wire = 0; wire < kWires; ++wire) {
      crossing_s[wire] += 2.0 * phase.exchange[wire].beta_s;
      copy_s[wire] += phase.copy[wire].beta_s;
    }
  }
}

void LoadView::link(const std::vector<Seat>& all, Seats& seats) const {
  seats.all = all;
  seats.next.assign(all.size(), -1);
  seats.last.resize(static_cast<size_t>(load.experts));
  seats.loads.assign(ranks, 0);
  seats.spare = load.spare;
  for (size_t i = 0; i < all.size(); ++i) {
    seats.loads[static_cast<size_t>(all[i].rank)] += all[i].rows;
    auto& end = seats.last[static_cast<size_t>(all[i].expert)];
    if (i >= static_cast<size_t>(load.experts)) seats.next[static_cast<size_t>(end)] = static_cast<int64_t>(i);
    if (i >= load.seats.size()) --seats.spare[static_cast<size_t>(all[i].rank)];
    end = static_cast<int64_t>(i);
  }
}

}  // namespace moe_overlap
