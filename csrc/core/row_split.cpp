#include "row_split.h"

#include <algorithm>
#include <stdexcept>

namespace moe_overlap {
namespace {

__extension__ using Wide = __int128;
constexpr int64_t kNarrow = int64_t{1} << 31;  // products of what is below fit into 64 bits

// The rows of one expert: those of each source that are left, and the room that is left at each of its seats.
class Expert {
 public:
  Expert(std::vector<SplitRows>& found, int64_t ranks, int64_t ranks_per_node)
      : found_(found), ranks_(static_cast<size_t>(ranks)), size_(static_cast<size_t>(ranks_per_node)) {}

  // column: every experts-th entry is the number of rows of a rank. numbers: the expert's seats.
  void split(const int64_t* column, int64_t experts, const std::vector<Seat>& seats, const Counts& numbers) {
    left_.clear();
    for (size_t rank = 0; rank < ranks_; ++rank) left_.push_back(column[rank * static_cast<size_t>(experts)]);
    numbers_ = numbers;
    places_.clear();
    for (const int64_t number : numbers) places_.push_back(seats[static_cast<size_t>(number)]);
    for (size_t j = 0; j < places_.size(); ++j) {
      const auto rank = static_cast<size_t>(places_[j].rank);
      take(rank, j, std::min(left_[rank], places_[j].rows));
    }
    for (size_t first = 0; first < ranks_; first += size_) spread(first, first + size_);
    spread(0, ranks_);
  }

 private:
  void take(size_t source, size_t j, int64_t rows) {
    if (rows == 0) return;
    left_[source] -= rows;
    places_[j].rows -= rows;
    found_.push_back({static_cast<int64_t>(source), numbers_[j], rows});
  }

  // As many rows as there is room for, from each of these sources and to each seat on them its part.
  void spread(size_t first, size_t last) {
    here_.clear();
    taken_.clear();
    for (size_t j = 0; j < places_.size(); ++j) {
      const auto rank = static_cast<size_t>(places_[j].rank);
      if (rank < first || rank >= last) continue;
      here_.push_back(j);
      taken_.push_back(places_[j].rows);
    }
    given_.assign(left_.begin() + static_cast<std::ptrdiff_t>(first),
                  left_.begin() + static_cast<std::ptrdiff_t>(last));
    const int64_t wanted = std::accumulate(given_.begin(), given_.end(), int64_t{0});
    const int64_t room = std::accumulate(taken_.begin(), taken_.end(), int64_t{0});
    const int64_t moved = std::min(wanted, room);
    if (moved == 0) return;
    to_parts(given_, moved, wanted);
    to_parts(taken_, moved, room);
    size_t source = 0;
    for (size_t i = 0; i < here_.size(); ++i) {
      while (taken_[i] > 0) {
        const int64_t rows = std::min(taken_[i], given_[source]);
        take(first + source, here_[i], rows);
        taken_[i] -= rows;
        given_[source] -= rows;
        if (given_[source] == 0) ++source;
      }
    }
  }

  std::vector<SplitRows>& found_;
  size_t ranks_;
  size_t size_;
  Counts left_;
  Counts numbers_;
  std::vector<Seat> places_;
  std::vector<size_t> here_;
  Counts given_;
  Counts taken_;
};

}  // namespace

// Rows of many steps, which a controller adds up, may be more than 32 bits have.
void to_parts(Counts& of, int64_t moved, int64_t total) {
  int64_t end = 0;
  int64_t start = 0;
  for (int64_t& part : of) {
    end += part;
    const int64_t until = total < kNarrow ? moved * end / total : static_cast<int64_t>(Wide{moved} * end / total);
    part = until - start;
    start = until;
  }
}

std::vector<SplitRows> split_rows(const int64_t* counts, int64_t ranks, int64_t experts, const std::vector<Seat>& seats,
                                  int64_t ranks_per_node) {
  if (ranks < 1 || experts < 1 || ranks_per_node < 1 || ranks % ranks_per_node != 0) {
    throw std::invalid_argument("split_rows: counts must be [ranks, experts], of whole nodes");
  }
  std::vector<Counts> numbers(static_cast<size_t>(experts));
  Counts rows(static_cast<size_t>(experts), 0);
  for (size_t i = 0; i < seats.size(); ++i) {
    const Seat& seat = seats[i];
    if (seat.expert < 0 || seat.expert >= experts || seat.rank < 0 || seat.rank >= ranks || seat.rows < 0) {
      throw std::invalid_argument("split_rows: seats must be of known experts and ranks");
    }
    numbers[static_cast<size_t>(seat.expert)].push_back(static_cast<int64_t>(i));
    rows[static_cast<size_t>(seat.expert)] += seat.rows;
  }
  std::vector<SplitRows> found;
  Expert one(found, ranks, ranks_per_node);
  for (int64_t expert = 0; expert < experts; ++expert) {
    const Counts& own = numbers[static_cast<size_t>(expert)];
    if (own.size() < 2) continue;
    for (int64_t rank = 0; rank < ranks; ++rank) rows[static_cast<size_t>(expert)] -= counts[rank * experts + expert];
    if (rows[static_cast<size_t>(expert)] != 0) {
      throw std::invalid_argument("split_rows: seats must have all rows of their expert");
    }
    one.split(counts + expert, experts, seats, own);
  }
  return found;
}

}  // namespace moe_overlap
