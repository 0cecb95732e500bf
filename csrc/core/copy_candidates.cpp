#include "copy_candidates.h"

#include <algorithm>
#include <utility>

namespace moe_overlap {
namespace {

constexpr int kSweeps = 3;

}  // namespace

std::vector<NodeCopy> Candidates::lacking() const {
  const auto experts = static_cast<size_t>(view_.load.experts);
  std::vector<bool> held(view_.nodes * experts, false);
  for (const Seat& seat : view_.load.seats) {
    held[static_cast<size_t>(view_.node_of(seat.rank)) * experts + static_cast<size_t>(seat.expert)] = true;
  }
  std::vector<NodeCopy> found;
  for (int64_t node = 0; node < static_cast<int64_t>(view_.nodes); ++node) {
    for (int64_t expert = 0; expert < view_.load.experts; ++expert) {
      if (held[static_cast<size_t>(node) * experts + static_cast<size_t>(expert)]) continue;
      const int64_t rows = view_.wanted_in(node, expert);
      if (rows > 0) found.push_back({rows, expert, node});
    }
  }
  return found;
}

Seats Candidates::node_copies(int64_t most_copies, int64_t ports, int64_t copied, int64_t in_node) const {
  if (!lacking_) lacking_ = lacking();
  std::vector<NodeCopy> heap = *lacking_;
  const auto later = [](const NodeCopy& a, const NodeCopy& b) { return b < a; };
  std::make_heap(heap.begin(), heap.end(), later);
  Seats seats = view_.given;
  Counts sent(view_.ranks, 0);
  Counts got(view_.ranks, 0);
  Counts room(view_.ranks, copied);
  Counts nodes(view_.nodes, 0);
  for (size_t rank = 0; rank < view_.ranks; ++rank) {
    nodes[static_cast<size_t>(view_.node_of(static_cast<int64_t>(rank)))] += seats.loads[rank];
  }
  while (!heap.empty() && most_copies > 0) {
    std::pop_heap(heap.begin(), heap.end(), later);
    NodeCopy one = heap.back();
    heap.pop_back();
    const auto expert = static_cast<size_t>(one.expert);
    const auto home = static_cast<size_t>(view_.load.seats[expert].rank);
    if (sent[home] >= ports) continue;
    const int64_t first = one.node * view_.load.ranks_per_node;
    int64_t to = -1;
    for (int64_t rank = first; rank < first + view_.load.ranks_per_node; ++rank) {
      const auto place = static_cast<size_t>(rank);
      if (got[place] >= std::min(ports, view_.load.spare[place])) continue;
      bool taken = false;
      for (auto i = static_cast<int64_t>(expert); i >= 0; i = seats.next[static_cast<size_t>(i)]) {
        taken = taken || seats.all[static_cast<size_t>(i)].rank == rank;
      }
      if (taken) continue;
      const auto best = static_cast<size_t>(to);
      if (to < 0 || std::tie(got[place], seats.loads[place]) < std::tie(got[best], seats.loads[best])) to = rank;
    }
    if (to < 0) continue;
    const auto taker = static_cast<size_t>(to);
    const auto node = static_cast<size_t>(one.node);
    const int64_t moved = std::min({one.rows, seats.all[expert].rows, room[taker], in_node - nodes[node]});
    if (moved <= 0) continue;
    one.rows -= moved;
    --most_copies;
    ++sent[home];
    ++got[taker];
    room[taker] -= moved;
    nodes[static_cast<size_t>(view_.node_of(view_.load.seats[expert].rank))] -= moved;
    nodes[node] += moved;
    seats.append(one.expert, to);
    seats.move(expert, seats.all.size() - 1, moved);
    if (one.rows == 0) continue;
    heap.push_back(one);
    std::push_heap(heap.begin(), heap.end(), later);
  }
  return seats;
}

int64_t Candidates::most_kept(const Seats& seats, int64_t target) const {
  Counts homes(view_.ranks, 0);
  for (size_t i = 0; is_home(i); ++i) homes[static_cast<size_t>(seats.all[i].rank)] += seats.all[i].rows;
  const int64_t size = view_.load.ranks_per_node;
  int64_t most = target;
  for (int64_t first = 0; first < view_.load.ranks; first += size) {
    const auto begin = homes.begin() + static_cast<std::ptrdiff_t>(first);
    std::sort(begin, begin + static_cast<std::ptrdiff_t>(size));
    const auto loads = seats.loads.begin() + static_cast<std::ptrdiff_t>(first);
    const int64_t rows = std::accumulate(loads, loads + static_cast<std::ptrdiff_t>(size), int64_t{0});
    const int64_t free = std::max(int64_t{0}, size * target - rows);
    int64_t below = 0;
    for (int64_t count = 1; count <= size; ++count) {
      below += begin[count - 1];
      if (count < size && count * begin[count] - below <= free) continue;
      most = std::min(most, (free + below) / count);
      break;
    }
  }
  return most;
}

std::vector<std::vector<size_t>> Candidates::giving(const Seats& start, const Limits& limits) const {
  std::vector<std::vector<size_t>> own(view_.ranks);
  for (size_t i = 0; i < start.all.size(); ++i) {
    if (limits.kept < 0 || is_home(i)) own[static_cast<size_t>(start.all[i].rank)].push_back(i);
  }
  for (auto& seats : own) {
    std::stable_sort(seats.begin(), seats.end(),
                     [&](size_t a, size_t b) { return start.all[a].rows > start.all[b].rows; });
  }
  return own;
}

const Seats& Candidates::fill(const Seats& start, const std::vector<std::vector<size_t>>& own, const Limits& limits,
                              int64_t most_copies) const {
  Seats& seats = filled_;
  seats = start;
  const bool by_kind = limits.kept >= 0;
  const int64_t limit = by_kind ? limits.kept : limits.target;
  copied_.assign(view_.ranks, 0);
  for (size_t i = static_cast<size_t>(view_.load.experts); i < seats.all.size(); ++i) {
    copied_[static_cast<size_t>(seats.all[i].rank)] += seats.all[i].rows;
  }
  gives_ = seats.loads;
  room_.resize(view_.ranks);
  std::vector<size_t>& order = order_;
  order.clear();
  for (size_t rank = 0; rank < view_.ranks; ++rank) {
    if (by_kind) gives_[rank] -= copied_[rank];
    room_[rank] = room_of(seats.loads, rank, limits);
    if (gives_[rank] > limit) order.push_back(rank);
  }
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return gives_[a] > gives_[b]; });
  Counts& open = open_;
  for (const size_t rank : order) {
    open.clear();
    for (int64_t to = 0; to < view_.load.ranks && most_copies > 0; ++to) {
      const auto place = static_cast<size_t>(to);
      if (seats.spare[place] > 0 && room_[place] > 0) open.push_back(to);
    }
    while (gives_[rank] > limit) {
      if (most_copies <= 0) open.clear();
      const Move found = best_move(seats, own[rank], open, gives_[rank] - limit, limits);
      if (found.rows == 0) break;
      size_t to = static_cast<size_t>(found.to);
      if (found.to < 0) {
        to = seats.all.size();
        seats.append(seats.all[found.from].expert, found.rank);
        --most_copies;
      }
      seats.move(found.from, to, found.rows);
      const auto taker = static_cast<size_t>(found.rank);
      if (!is_home(found.from)) copied_[rank] -= found.rows;
      if (!is_home(to)) copied_[taker] += found.rows;
      gives_[rank] -= found.rows;
      if (!by_kind) gives_[taker] += found.rows;
      room_[rank] = room_of(seats.loads, rank, limits);
      room_[taker] = room_of(seats.loads, taker, limits);
      if (seats.spare[taker] < 1 || room_[taker] <= 0) {
        open.erase(std::remove(open.begin(), open.end(), found.rank), open.end());
      }
    }
  }
  return seats;
}

Candidates::Move Candidates::best_move(const Seats& seats, const std::vector<size_t>& own, const Counts& open,
                                       int64_t excess, const Limits& limits) const {
  Move best{0, -1, -1, 0};
  if (own.empty()) return best;
  const int64_t rank = seats.all[own.front()].rank;
  int64_t most_room = 0;
  for (const int64_t to : open) most_room = std::max(most_room, room_[static_cast<size_t>(to)]);
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
      int64_t room = room_[static_cast<size_t>(other.rank)];
      if (is_home(static_cast<size_t>(j))) room = limits.kept >= 0 ? 0 : limits.target - seats.load_of(other);
      const int64_t moved = std::min({seat.rows, excess, room});
      if (static_cast<size_t>(j) == i || moved <= 0) continue;
      offer({i, j, other.rank, moved}, (row_s - crossing_s[view_.lane(rank, other.rank)]) * static_cast<double>(moved));
    }
    const int64_t home = view_.load.seats[static_cast<size_t>(seat.expert)].rank;
    const int64_t* rows = view_.wanted(seat.expert);
    for (const int64_t to : open) {
      const auto place = static_cast<size_t>(to);
      if (marks_[place] == mark_ || (limits.inside && view_.lane(home, to) == kInter)) continue;
      const int64_t moved = std::min({seat.rows, std::max(excess, rows[to]), room_[place]});
      const auto stays = static_cast<double>(std::min(rows[to], moved));
      const double gain_s =
          row_s * static_cast<double>(moved) + crossing_s[view_.lane(rank, to)] * stays - copy_s[view_.lane(home, to)];
      offer({i, -1, to, moved}, gain_s);
    }
  }
  return best;
}

const Seats& Candidates::level(const std::vector<Seat>& all, const Limits& limits) const {
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
  homes_.assign(view_.ranks, 0);
  for (size_t i = 0; is_home(i); ++i) homes_[static_cast<size_t>(seats.all[i].rank)] += seats.all[i].rows;
  // Of a seat's rank, without the seat's rows.
  const auto height = [&](size_t i) {
    const Seat& seat = seats.all[i];
    const int64_t homes = homes_[static_cast<size_t>(seat.rank)];
    const int64_t rows = seats.load_of(seat);
    const int64_t copied = rows - homes + limits.target - limits.copied;
    if (limits.kept >= 0) return (is_home(i) ? homes + limits.target - limits.kept : copied) - seat.rows;
    return (is_home(i) ? rows : std::max(rows, copied)) - seat.rows;
  };
  auto& others = others_;
  bool changed = true;
  for (int sweep = 0; sweep < kSweeps && changed; ++sweep) {
    changed = false;
    for (size_t place = 0; place < groups; ++place) {
      const auto& group = shared_[place];
      int64_t rows = 0;
      int64_t held = 0;
      others.clear();
      for (const size_t i : group) {
        rows += seats.all[i].rows;
        others.emplace_back(height(i), i);
        held += others.back().first;
      }
      std::sort(others.begin(), others.end());
      auto count = static_cast<int64_t>(others.size());
      while (count > 1 && (held + rows) / count < others[static_cast<size_t>(count - 1)].first) {
        held -= others[static_cast<size_t>(--count)].first;
      }
      const int64_t even = (held + rows) / count;
      const int64_t more = (held + rows) % count;
      for (int64_t number = 0; number < static_cast<int64_t>(others.size()); ++number) {
        const auto& [below, i] = others[static_cast<size_t>(number)];
        const int64_t taken = number < count ? even - below + (number < more ? 1 : 0) : 0;
        changed = changed || taken != seats.all[i].rows;
        if (is_home(i)) homes_[static_cast<size_t>(seats.all[i].rank)] += taken - seats.all[i].rows;
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
