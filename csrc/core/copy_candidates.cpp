#include "copy_candidates.h"

#include <algorithm>
#include <utility>

namespace moe_overlap {
namespace {

constexpr int kSweeps = 3;

}  // namespace

std::vector<NodeCopy> Candidates::node_copies() const {
  std::vector<NodeCopy> found;
  const auto priced_wire = [](const PhaseCosts& phase) { return phase.exchange[kInter].beta_s != 0; };
  if (std::none_of(view_.load.phases.begin(), view_.load.phases.end(), priced_wire)) return found;
  const auto experts = static_cast<size_t>(view_.load.experts);
  std::vector<bool> held(view_.nodes * experts, false);
  for (const Seat& seat : view_.load.seats) {
    held[static_cast<size_t>(view_.node_of(seat.rank)) * experts + static_cast<size_t>(seat.expert)] = true;
  }
  std::vector<NodeCopy> pairs;
  for (int64_t node = 0; node < static_cast<int64_t>(view_.nodes); ++node) {
    const int64_t first = node * view_.load.ranks_per_node;
    int64_t slots = 0;
    for (int64_t rank = first; rank < first + view_.load.ranks_per_node; ++rank) {
      slots += view_.load.spare[static_cast<size_t>(rank)];
    }
    pairs.clear();
    for (int64_t expert = 0; expert < view_.load.experts && slots > 0; ++expert) {
      if (held[static_cast<size_t>(node) * experts + static_cast<size_t>(expert)]) continue;
      const int64_t rows = view_.wanted_in(node, expert);
      if (rows > 0) pairs.push_back({rows, expert, node});
    }
    const auto most = std::min(pairs.size(), static_cast<size_t>(slots));
    std::partial_sort(pairs.begin(), pairs.begin() + static_cast<std::ptrdiff_t>(most), pairs.end());
    found.insert(found.end(), pairs.begin(), pairs.begin() + static_cast<std::ptrdiff_t>(most));
  }
  std::sort(found.begin(), found.end());
  found.resize(std::min(found.size(), static_cast<size_t>(view_.load.most_copies)));
  return found;
}

Seats Candidates::with_node_copies(const std::vector<NodeCopy>& copies, size_t count) const {
  Seats seats = view_.given;
  Counts got(view_.ranks, 0);
  for (size_t i = 0; i < count; ++i) {
    const int64_t first = copies[i].node * view_.load.ranks_per_node;
    int64_t to = -1;
    for (int64_t rank = first; rank < first + view_.load.ranks_per_node; ++rank) {
      const auto place = static_cast<size_t>(rank);
      if (got[place] >= view_.load.spare[place]) continue;
      const auto best = static_cast<size_t>(to);
      if (to < 0 || std::tie(got[place], seats.loads[place]) < std::tie(got[best], seats.loads[best])) to = rank;
    }
    const auto home = static_cast<size_t>(copies[i].expert);
    ++got[static_cast<size_t>(to)];
    seats.append(copies[i].expert, to);
    seats.move(home, seats.all.size() - 1, std::min(copies[i].rows, seats.all[home].rows));
  }
  return seats;
}

const Seats& Candidates::fill(const Seats& start, const std::vector<std::vector<size_t>>& own, int64_t target,
                              int64_t most_copies) const {
  Seats& seats = filled_;
  seats = start;
  std::vector<size_t>& order = order_;
  order.clear();
  for (size_t rank = 0; rank < view_.ranks; ++rank) {
    if (seats.loads[rank] > target) order.push_back(rank);
  }
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return start.loads[a] > start.loads[b]; });
  Counts& open = open_;
  for (const size_t rank : order) {
    open.clear();
    for (int64_t to = 0; to < view_.load.ranks && most_copies > 0; ++to) {
      const auto place = static_cast<size_t>(to);
      if (seats.spare[place] > 0 && seats.loads[place] < target) open.push_back(to);
    }
    while (seats.loads[rank] > target) {
      if (most_copies <= 0) open.clear();
      const Move found = best_move(seats, own[rank], open, target);
      if (found.rows == 0) break;
      size_t to = static_cast<size_t>(found.to);
      if (found.to < 0) {
        to = seats.all.size();
        seats.append(seats.all[found.from].expert, found.rank);
        --most_copies;
      }
      seats.move(found.from, to, found.rows);
      const auto taker = static_cast<size_t>(found.rank);
      if (seats.spare[taker] < 1 || seats.loads[taker] >= target) {
        open.erase(std::remove(open.begin(), open.end(), found.rank), open.end());
      }
    }
  }
  return seats;
}

Candidates::Move Candidates::best_move(const Seats& seats, const std::vector<size_t>& own, const Counts& open,
                                       int64_t target) const {
  Move best{0, -1, -1, 0};
  if (own.empty()) return best;
  const int64_t rank = seats.all[own.front()].rank;
  const int64_t excess = seats.loads[static_cast<size_t>(rank)] - target;
  int64_t most_room = 0;
  for (const int64_t to : open) most_room = std::max(most_room, target - seats.loads[static_cast<size_t>(to)]);
  // What the loop over ranks reads, in registers: it is most of a decision for many experts.
  const double row_s = view_.row_s;
  const std::array<double, kWires> crossing_s = view_.crossing_s;
  const std::array<double, kWires> copy_s = view_.copy_s;
  const double most_crossing_s = std::max(crossing_s[kInter], crossing_s[kIntra]);
  double best_gain_s = 0;
  const auto offer = [&](const Move& move, double gain_s) {
    if (best.rows > 0 && !(gain_s > best_gain_s)) return;
    best = move;
    best_gain_s = gain_s;
  };
  // No move of the seat's rows gains more.
  const auto bound_s = [&](const Seat& seat) {
    const int64_t wanted = view_.most_wanted(seat.expert);
    const int64_t moved = std::min(seat.rows, std::max(excess, std::min(wanted, most_room)));
    return row_s * static_cast<double>(moved) + most_crossing_s * static_cast<double>(std::min(wanted, moved));
  };
  for (const size_t i : own) {
    const Seat& seat = seats.all[i];
    if (seat.rows == 0 || (best.rows > 0 && !(bound_s(seat) > best_gain_s))) continue;
    ++mark_;
    marks_.resize(view_.ranks, 0);
    for (int64_t j = seat.expert; j >= 0; j = seats.next[static_cast<size_t>(j)]) {
      const Seat& other = seats.all[static_cast<size_t>(j)];
      marks_[static_cast<size_t>(other.rank)] = mark_;
      const int64_t moved = std::min({seat.rows, excess, target - seats.load_of(other)});
      if (static_cast<size_t>(j) == i || moved <= 0) continue;
      offer({i, j, other.rank, moved}, (row_s - crossing_s[view_.lane(rank, other.rank)]) * static_cast<double>(moved));
    }
    const int64_t home = view_.load.seats[static_cast<size_t>(seat.expert)].rank;
    const int64_t* rows = view_.wanted(seat.expert);
    for (const int64_t to : open) {
      const auto place = static_cast<size_t>(to);
      if (marks_[place] == mark_) continue;
      const int64_t moved = std::min({seat.rows, std::max(excess, rows[to]), target - seats.loads[place]});
      const auto stays = static_cast<double>(std::min(rows[to], moved));
      const double gain_s =
          row_s * static_cast<double>(moved) + crossing_s[view_.lane(rank, to)] * stays - copy_s[view_.lane(home, to)];
      offer({i, -1, to, moved}, gain_s);
    }
  }
  return best;
}

const Seats& Candidates::level(const std::vector<Seat>& all) const {
  Seats& seats = levelled_;
  view_.link(all, seats);
  // Seats of one expert in one node, where there are several.
  size_t groups = 0;
  for (int64_t expert = 0; expert < view_.load.experts; ++expert) {
    if (seats.next[static_cast<size_t>(expert)] < 0) continue;
    of_expert_.clear();
    for (int64_t i = expert; i >= 0; i = seats.next[static_cast<size_t>(i)])
      of_expert_.push_back(static_cast<size_t>(i));
    const auto node = [&](size_t i) { return view_.node_of(seats.all[i].rank); };
    std::stable_sort(of_expert_.begin(), of_expert_.end(), [&](size_t a, size_t b) { return node(a) < node(b); });
    for (auto first = of_expert_.begin(); first != of_expert_.end();) {
      const auto last = std::find_if(first, of_expert_.end(), [&](size_t i) { return node(i) != node(*first); });
      if (last - first > 1) {
        shared_.resize(std::max(shared_.size(), groups + 1));
        shared_[groups++].assign(first, last);
      }
      first = last;
    }
  }
  auto& others = others_;
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    for (size_t place = 0; place < groups; ++place) {
      const auto& group = shared_[place];
      int64_t rows = 0;
      int64_t held = 0;
      others.clear();
      for (const size_t i : group) {
        rows += seats.all[i].rows;
        others.emplace_back(seats.load_of(seats.all[i]) - seats.all[i].rows, i);
        held += others.back().first;
      }
      std::sort(others.begin(), others.end());
      auto count = static_cast<int64_t>(others.size());
      while (count > 1 && (held + rows) / count < others[static_cast<size_t>(count - 1)].first) {
        held -= others[static_cast<size_t>(--count)].first;
      }
      const int64_t height = (held + rows) / count;
      const int64_t more = (held + rows) % count;
      for (int64_t number = 0; number < static_cast<int64_t>(others.size()); ++number) {
        const auto& [below, i] = others[static_cast<size_t>(number)];
        const int64_t taken = number < count ? height - below + (number < more ? 1 : 0) : 0;
        seats.loads[static_cast<size_t>(seats.all[i].rank)] += taken - seats.all[i].rows;
        seats.all[i].rows = taken;
      }
    }
  }
  return seats;
}

std::vector<Seat> Candidates::inherited(const std::vector<Seat>& seats, size_t i) const {
  auto heir = static_cast<size_t>(seats[i].expert);
  for (size_t j = 0; j < seats.size(); ++j) {
    if (j == i || seats[j].expert != seats[i].expert || view_.lane(seats[j].rank, seats[i].rank) != kIntra) continue;
    heir = j;
    break;
  }
  std::vector<Seat> found = seats;
  found[heir].rows += seats[i].rows;
  return found;
}

}  // namespace moe_overlap
