// A step whose copies are decided on, and who computes what in it. The Python reference is
// moe_overlap/planning/copy_load.py.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "copy_costs.h"

namespace moe_overlap {

using Counts = std::vector<int64_t>;

constexpr size_t kInter = 0;
constexpr size_t kIntra = 1;
constexpr double kTie = 1e-9;

// `rows` of `expert` are computed on `rank`.
struct Seat {
  int64_t expert;
  int64_t rank;
  int64_t rows;
  bool operator==(const Seat& other) const {
    return expert == other.expert && rank == other.rank && rows == other.rows;
  }
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

// Throws std::invalid_argument for lists of wrong lengths and for ranks, experts and rows that cannot be.
void check_load(const Load& load);

// The seats of a candidate, the rows of each rank and the slots that it has left, and each expert's seats as a list:
// `next` of a seat, -1 at its end.
struct Seats {
  std::vector<Seat> all;
  Counts next;
  Counts last;   // by expert
  Counts loads;  // by rank
  Counts spare;

  void append(int64_t expert, int64_t rank) {
    all.push_back({expert, rank, 0});
    next.push_back(-1);
    auto& end = last[static_cast<size_t>(expert)];
    next[static_cast<size_t>(end)] = static_cast<int64_t>(all.size()) - 1;
    end = static_cast<int64_t>(all.size()) - 1;
    --spare[static_cast<size_t>(rank)];
  }

  void move(size_t from, size_t to, int64_t rows) {
    all[from].rows -= rows;
    all[to].rows += rows;
    loads[static_cast<size_t>(all[from].rank)] -= rows;
    loads[static_cast<size_t>(all[to].rank)] += rows;
  }

  int64_t load_of(const Seat& seat) const { return loads[static_cast<size_t>(seat.rank)]; }
};

// A load with what follows from it once for all candidates.
class LoadView {
 public:
  explicit LoadView(const Load& load);

  const Load& load;
  size_t ranks;
  size_t nodes;
  Seats given;
  // Of all phases: a row's compute, its crossings, and a copy, by wire.
  double row_s = 0;
  std::array<double, kWires> crossing_s{};
  std::array<double, kWires> copy_s{};

  // [ranks]: rows of their tokens for the expert.
  const int64_t* wanted(int64_t expert) const { return wanted_.data() + static_cast<size_t>(expert) * ranks; }

  // By one rank, at most.
  int64_t most_wanted(int64_t expert) const { return most_wanted_[static_cast<size_t>(expert)]; }

  int64_t node_of(int64_t rank) const { return node_[static_cast<size_t>(rank)]; }

  int64_t wanted_in(int64_t node, int64_t expert) const {
    const int64_t* first = wanted(expert) + node * load.ranks_per_node;
    return std::accumulate(first, first + load.ranks_per_node, int64_t{0});
  }

  size_t lane(int64_t one, int64_t other) const { return node_of(one) == node_of(other) ? kIntra : kInter; }

  // `seats` become these, with what follows from them.
  void link(const std::vector<Seat>& all, Seats& seats) const;

 private:
  Counts node_;         // of each rank
  Counts wanted_;       // load.counts by expert and rank
  Counts most_wanted_;  // by expert
};

}  // namespace moe_overlap
