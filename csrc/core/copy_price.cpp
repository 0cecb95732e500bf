#include "copy_price.h"

#include <algorithm>
#include <utility>

#include "row_split.h"

namespace moe_overlap {
Pricer::Pricer(const LoadView& view) : view_(view) {
  for (auto* lanes : {&base_out_, &base_in_}) lanes->fill(Counts(view.ranks, 0));
  for (int64_t expert = 0; expert < view.load.experts; ++expert) {
    if (view.given.next[static_cast<size_t>(expert)] < 0) add_home(expert, 1, base_out_, base_in_);
  }
}

void Pricer::add_home(int64_t expert, int64_t sign, Lanes& out, Lanes& into) const {
  const int64_t home = view_.load.seats[static_cast<size_t>(expert)].rank;
  const int64_t* rows = view_.wanted(expert);
  const int64_t first = view_.node_of(home) * view_.load.ranks_per_node;
  const int64_t last = first + view_.load.ranks_per_node;
  const auto add = [&](size_t wire, int64_t from, int64_t until) {
    int64_t entered = 0;
    for (int64_t source = from; source < until; ++source) {
      out[wire][static_cast<size_t>(source)] += sign * rows[source];
      entered += rows[source];
    }
    into[wire][static_cast<size_t>(home)] += sign * entered;
  };
  add(kInter, 0, first);
  add(kIntra, first, home);
  add(kIntra, home + 1, last);
  add(kInter, last, view_.load.ranks);
}

void Pricer::add_split(const Seats& seats, int64_t expert, Lanes& out, Lanes& into) const {
  left_.assign(view_.wanted(expert), view_.wanted(expert) + view_.ranks);
  places_.clear();
  for (int64_t i = expert; i >= 0; i = seats.next[static_cast<size_t>(i)]) {
    Seat place = seats.all[static_cast<size_t>(i)];
    int64_t& own = left_[static_cast<size_t>(place.rank)];
    const int64_t rows = std::min(own, place.rows);
    own -= rows;
    place.rows -= rows;
    places_.push_back(place);
  }
  for (size_t i = 0; i < places_.size(); ++i) {
    const int64_t node = view_.node_of(places_[i].rank);
    const auto same = [&](const Seat& place) { return view_.node_of(place.rank) == node; };
    const auto here = places_.begin() + static_cast<std::ptrdiff_t>(i);
    if (std::none_of(places_.begin(), here, same)) stay(node, out, into);
  }
  for (size_t source = 0; source < view_.ranks; ++source) out[kInter][source] += left_[source];
  for (const Seat& place : places_) into[kInter][static_cast<size_t>(place.rank)] += place.rows;
}

void Pricer::stay(int64_t node, Lanes& out, Lanes& into) const {
  const auto first = static_cast<size_t>(node * view_.load.ranks_per_node);
  const auto size = static_cast<size_t>(view_.load.ranks_per_node);
  sources_.assign(left_.begin() + static_cast<std::ptrdiff_t>(first),
                  left_.begin() + static_cast<std::ptrdiff_t>(first + size));
  rooms_.clear();
  for (const Seat& place : places_) {
    if (view_.node_of(place.rank) == node) rooms_.push_back(place.rows);
  }
  const int64_t rows = std::accumulate(sources_.begin(), sources_.end(), int64_t{0});
  const int64_t room = std::accumulate(rooms_.begin(), rooms_.end(), int64_t{0});
  const int64_t moved = std::min(rows, room);
  if (moved == 0) return;
  if (moved < rows) to_parts(sources_, moved, rows);
  if (moved < room) to_parts(rooms_, moved, room);
  for (size_t i = 0; i < size; ++i) {
    left_[first + i] -= sources_[i];
    out[kIntra][first + i] += sources_[i];
  }
  size_t taken = 0;
  for (Seat& place : places_) {
    if (view_.node_of(place.rank) != node) continue;
    place.rows -= rooms_[taken];
    into[kIntra][static_cast<size_t>(place.rank)] += rooms_[taken++];
  }
}

Price Pricer::priced(const Seats& seats, double enough_s) const {
  Lanes& out = out_;
  Lanes& into = in_;
  for (auto* lanes : {&copies_out_, &copies_in_}) {
    for (Counts& wire : *lanes) wire.assign(view_.ranks, 0);
  }
  std::vector<CopyOrder> orders;
  orders.reserve(seats.all.size() - static_cast<size_t>(view_.load.experts));
  computed_.rows = seats.loads;
  computed_.copied.assign(view_.ranks, 0);
  computed_.experts.assign(view_.ranks, 0);
  for (size_t i = 0; i < seats.all.size(); ++i) {
    const Seat& seat = seats.all[i];
    if (seat.rows == 0) continue;
    ++computed_.experts[static_cast<size_t>(seat.rank)];
    if (i < static_cast<size_t>(view_.load.experts)) continue;
    computed_.copied[static_cast<size_t>(seat.rank)] += seat.rows;
    if (view_.load.refetched || i >= view_.load.seats.size()) {
      const int64_t home = view_.load.seats[static_cast<size_t>(seat.expert)].rank;
      const size_t wire = view_.lane(home, seat.rank);
      ++copies_out_[wire][static_cast<size_t>(home)];
      ++copies_in_[wire][static_cast<size_t>(seat.rank)];
      orders.push_back({seat.expert, home, seat.rank});
    }
  }
  Ports rows{};
  Ports copies{};
  for (size_t wire = 0; wire < kWires; ++wire) {
    for (size_t rank = 0; rank < view_.ranks; ++rank) {
      copies[wire] = std::max({copies[wire], copies_out_[wire][rank], copies_in_[wire][rank]});
    }
  }
  // Weights in these groups, where a phase relays them; gradients, and weights that it does not, from and to the
  // homes.
  const auto total_s = [&](const Ports* groups, size_t count) {
    double total = 0;
    for (const PhaseCosts& phase : view_.load.phases) {
      double copy_s = 0;
      if (phase.relays) {
        for (size_t group = 0; group < count; ++group) copy_s += phase.copies_s(groups[group]);
      } else {
        copy_s += phase.copies_s(copies);
      }
      total += phase.window_s(computed_, rows, copy_s);
    }
    return total;
  };
  // Relayed or not, what a node lacks comes to it from another one.
  const Ports fewest{std::min<int64_t>(copies[kInter], 1), 0};
  const double unsent_s = total_s(&fewest, 1);  // if no row took time
  if (!(unsent_s < enough_s)) return {unsent_s, false};
  out = base_out_;
  into = base_in_;
  for (int64_t expert = 0; expert < view_.load.experts; ++expert) {
    if (seats.next[static_cast<size_t>(expert)] < 0) continue;
    if (view_.given.next[static_cast<size_t>(expert)] < 0) add_home(expert, -1, out, into);
    add_split(seats, expert, out, into);
  }
  for (size_t wire = 0; wire < kWires; ++wire) {
    for (size_t rank = 0; rank < view_.ranks; ++rank) {
      rows[wire] = std::max({rows[wire], out[wire][rank], into[wire][rank]});
    }
  }
  const double direct_s = total_s(&copies, 1);
  const double least_s = total_s(&fewest, 1);
  if (!(least_s < direct_s * (1 - kTie)) || !(least_s < enough_s)) return {direct_s, false};
  const auto groups = relayed_ports(std::move(orders), view_.load.ranks, view_.load.ranks_per_node, copies);
  if (!groups) return {direct_s, false};
  const double relayed_s = total_s(groups->data(), groups->size());
  if (relayed_s < direct_s * (1 - kTie)) return {relayed_s, true};
  return {direct_s, false};
}

}  // namespace moe_overlap
