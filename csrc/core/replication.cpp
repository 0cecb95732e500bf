#include "replication.h"

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace moe_overlap {
namespace {

constexpr int64_t kTargets = 12;
constexpr std::array<int64_t, 4> kFewTargets{0, 2, 4, 7};
constexpr int64_t kRefined = 4;
constexpr int64_t kLeastTries = 16;
constexpr int64_t kWork = int64_t{1} << 14;
constexpr int kSweeps = 3;
constexpr double kTie = 1e-9;
constexpr size_t kInter = 0;
constexpr size_t kIntra = 1;

using Rows = std::vector<int64_t>;

void check(bool right, const char* what) {
  if (!right) throw std::invalid_argument(std::string("replication: ") + what);
}

void check_load(const Load& load) {
  check(load.ranks > 0 && load.experts > 0 && load.counts != nullptr, "counts must be [ranks, experts]");
  check(load.ranks_per_node > 0 && load.ranks % load.ranks_per_node == 0, "ranks_per_node must divide the ranks");
  check(load.spare.size() == static_cast<size_t>(load.ranks), "spare must have one entry per rank");
  check(load.seats.size() >= static_cast<size_t>(load.experts), "seats must begin with every expert's home");
  check(!load.phases.empty(), "phases must have an entry");
  Rows left(static_cast<size_t>(load.experts), 0);
  for (int64_t rank = 0; rank < load.ranks; ++rank) {
    for (int64_t expert = 0; expert < load.experts; ++expert) {
      const int64_t rows = load.counts[rank * load.experts + expert];
      check(rows >= 0, "counts must be at least 0");
      left[static_cast<size_t>(expert)] += rows;
    }
  }
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

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__extension__ using Wide = __int128;
constexpr int64_t kNarrow = int64_t{1} << 31;  // products of what is below fit into 64 bits

// `moved` of the `total`, each its part. Rows of many steps, which a controller adds up, may be more than 32 bits have.
void to_parts(Rows& of, int64_t moved, int64_t total) {
  int64_t end = 0;
  int64_t start = 0;
  for (int64_t& part : of) {
    end += part;
    const int64_t until = total < kNarrow ? moved * end / total : static_cast<int64_t>(Wide{moved} * end / total);
    part = until - start;
    start = until;
  }
}

// The seats of a candidate, the rows of each rank and the slots that it has left, and each expert's seats as a list:
// `next` of a seat, -1 at its end.
struct Seats {
  std::vector<Seat> all;
  Rows next;
  Rows last;   // by expert
  Rows loads;  // by rank
  Rows spare;

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

class Decider {
 public:
  explicit Decider(const Load& load)
      : load_(load),
        ranks_(static_cast<size_t>(load.ranks)),
        tries_(std::max(kLeastTries, kWork / (load.ranks * load.experts))) {
    for (int64_t rank = 0; rank < load.ranks; ++rank) node_.push_back(rank / load.ranks_per_node);
    nodes_ = static_cast<size_t>(load.ranks / load.ranks_per_node);
    wanted_.resize(static_cast<size_t>(load.experts) * ranks_);
    for (size_t rank = 0; rank < ranks_; ++rank) {
      for (size_t expert = 0; expert < static_cast<size_t>(load.experts); ++expert) {
        wanted_[expert * ranks_ + rank] = load.counts[rank * static_cast<size_t>(load.experts) + expert];
      }
    }
    given_ = linked(load.seats);
    for (const PhaseCosts& phase : load.phases) {
      row_s_ += phase.row_s;
      for (size_t wire = 0; wire < kWires; ++wire) {
        crossing_s_[wire] += 2.0 * phase.exchange[wire].beta_s;
        copy_s_[wire] += phase.copy[wire].beta_s;
      }
    }
    for (auto* lanes : {&base_out_, &base_in_}) lanes->fill(Rows(ranks_, 0));
    for (int64_t expert = 0; expert < load.experts; ++expert) {
      if (given_.next[static_cast<size_t>(expert)] < 0) add_home(expert, 1, base_out_, base_in_);
    }
  }

  Decision decide() {
    const Price left = priced(given_, std::numeric_limits<double>::infinity());
    best_price_ = left;
    best_ = load_.seats;
    const Rows all_targets = [] {
      Rows places(static_cast<size_t>(kTargets));
      std::iota(places.begin(), places.end(), int64_t{0});
      return places;
    }();
    const Rows few_targets(kFewTargets.begin(), kFewTargets.end());
    if (load_.seats.size() > static_cast<size_t>(load_.experts)) try_targets(given_, all_targets, 0);
    const auto wanted = node_copies();
    for (const size_t quarters : {size_t{0}, size_t{4}, size_t{2}, size_t{1}, size_t{3}}) {
      const size_t copies = wanted.size() * quarters / 4;
      if (copies > 0) {
        const Seats start = with_node_copies(wanted, copies);
        attempt(start);
        try_targets(start, few_targets, load_.most_copies - static_cast<int64_t>(copies));
      } else if (quarters == 0) {
        try_targets(given_, all_targets, load_.most_copies);
      }
    }
    while (tries_ > 0 && improved()) {
    }
    if (!(best_price_.seconds < left.seconds * (1 - load_.margin))) {
      return {left.seconds, left.seconds, true, load_.seats, left.relayed};
    }
    return {left.seconds, best_price_.seconds, false, std::move(best_), best_price_.relayed};
  }

 private:
  using Lanes = std::array<Rows, kWires>;

  struct Price {
    double seconds;
    bool relayed;
  };

  // Rows that go to another seat of their expert: `to` is a seat, or -1 for a new copy on `rank`.
  struct Move {
    size_t from;
    int64_t to;
    int64_t rank;
    int64_t rows;
  };

  struct NodeCopy {
    int64_t rows;
    int64_t expert;
    int64_t node;
    bool operator<(const NodeCopy& other) const {
      return std::tie(other.rows, expert, node) < std::tie(rows, other.expert, other.node);
    }
  };

  const int64_t* wanted(int64_t expert) const { return wanted_.data() + static_cast<size_t>(expert) * ranks_; }

  int64_t node_of(int64_t rank) const { return node_[static_cast<size_t>(rank)]; }

  int64_t wanted_in(int64_t node, int64_t expert) const {
    const int64_t* first = wanted(expert) + node * load_.ranks_per_node;
    return std::accumulate(first, first + load_.ranks_per_node, int64_t{0});
  }

  size_t lane(int64_t one, int64_t other) const { return node_of(one) == node_of(other) ? kIntra : kInter; }

  // The seats with what follows from them.
  Seats linked(const std::vector<Seat>& all) const {
    Seats seats;
    seats.all = all;
    seats.next.assign(all.size(), -1);
    seats.last.resize(static_cast<size_t>(load_.experts));
    seats.loads.assign(ranks_, 0);
    seats.spare = load_.spare;
    for (size_t i = 0; i < all.size(); ++i) {
      seats.loads[static_cast<size_t>(all[i].rank)] += all[i].rows;
      auto& end = seats.last[static_cast<size_t>(all[i].expert)];
      if (i >= static_cast<size_t>(load_.experts)) seats.next[static_cast<size_t>(end)] = static_cast<int64_t>(i);
      if (i >= load_.seats.size()) --seats.spare[static_cast<size_t>(all[i].rank)];
      end = static_cast<int64_t>(i);
    }
    return seats;
  }

  bool attempt(const Seats& seats) {
    if (tries_ == 0) return false;
    --tries_;
    const Price price = priced(seats, best_price_.seconds * (1 - kTie));
    if (!(price.seconds < best_price_.seconds * (1 - kTie))) return false;
    best_price_ = price;
    best_.clear();
    for (size_t i = 0; i < seats.all.size(); ++i) {
      if (i < load_.seats.size() || seats.all[i].rows != 0) best_.push_back(seats.all[i]);
    }
    return true;
  }

  void try_targets(const Seats& start, const Rows& places, int64_t most_copies) {
    std::vector<std::vector<size_t>> own(ranks_);
    for (size_t i = 0; i < start.all.size(); ++i) own[static_cast<size_t>(start.all[i].rank)].push_back(i);
    for (auto& seats : own) {
      std::stable_sort(seats.begin(), seats.end(),
                       [&](size_t a, size_t b) { return start.all[a].rows > start.all[b].rows; });
    }
    const auto attempt_at = [&](int64_t target) {
      if (tries_ == 0) return false;
      return attempt(fill(start, own, target, most_copies));
    };
    const int64_t most = *std::max_element(start.loads.begin(), start.loads.end());
    const int64_t mean = ceil_div(std::accumulate(start.loads.begin(), start.loads.end(), int64_t{0}), load_.ranks);
    int64_t fullest = 0;
    for (auto first = start.loads.begin(); first != start.loads.end(); first += load_.ranks_per_node) {
      const int64_t rows = std::accumulate(first, first + load_.ranks_per_node, int64_t{0});
      fullest = std::max(fullest, ceil_div(rows, load_.ranks_per_node));
    }
    Rows targets;
    for (const int64_t j : places) targets.push_back(mean + (most - mean) * j * j / (kTargets * kTargets));
    targets.push_back(most);
    int64_t low = -1;
    int64_t high = -1;
    for (size_t j = places.size(); j-- > 0;) {
      if (!attempt_at(targets[j])) continue;
      low = targets[j > 0 ? j - 1 : 0];
      high = targets[j + 1];
    }
    attempt_at(fullest);
    for (int64_t i = 1; i <= kRefined && low >= 0; ++i) attempt_at(low + (high - low) * i / (kRefined + 1));
  }

  // Rows of an expert on their way to its home, `sign` times.
  void add_home(int64_t expert, int64_t sign, Lanes& out, Lanes& into) const {
    const int64_t home = load_.seats[static_cast<size_t>(expert)].rank;
    const int64_t* rows = wanted(expert);
    const int64_t first = node_of(home) * load_.ranks_per_node;
    const int64_t last = first + load_.ranks_per_node;
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
    add(kInter, last, load_.ranks);
  }

  // Rows of an expert on their way to its seats: those that stay on the rank first, then on the node, evenly.
  void add_split(const Seats& seats, int64_t expert, Lanes& out, Lanes& into) const {
    left_.assign(wanted(expert), wanted(expert) + ranks_);
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
      const int64_t node = node_of(places_[i].rank);
      const auto same = [&](const Seat& place) { return node_of(place.rank) == node; };
      const auto here = places_.begin() + static_cast<std::ptrdiff_t>(i);
      if (std::none_of(places_.begin(), here, same)) stay(node, out, into);
    }
    for (size_t source = 0; source < ranks_; ++source) out[kInter][source] += left_[source];
    for (const Seat& place : places_) into[kInter][static_cast<size_t>(place.rank)] += place.rows;
  }

  // As many of the rows left in a node as there is room for there, from each source and to each place its part.
  void stay(int64_t node, Lanes& out, Lanes& into) const {
    const auto first = static_cast<size_t>(node * load_.ranks_per_node);
    const auto size = static_cast<size_t>(load_.ranks_per_node);
    sources_.assign(left_.begin() + static_cast<std::ptrdiff_t>(first),
                    left_.begin() + static_cast<std::ptrdiff_t>(first + size));
    rooms_.clear();
    for (const Seat& place : places_) {
      if (node_of(place.rank) == node) rooms_.push_back(place.rows);
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
      if (node_of(place.rank) != node) continue;
      place.rows -= rooms_[taken];
      into[kIntra][static_cast<size_t>(place.rank)] += rooms_[taken++];
    }
  }

  // At least `enough_s` where it is not less.
  Price priced(const Seats& seats, double enough_s) const {
    Lanes& out = out_;
    Lanes& into = in_;
    out = base_out_;
    into = base_in_;
    for (auto* lanes : {&copies_out_, &copies_in_}) {
      for (Rows& wire : *lanes) wire.assign(ranks_, 0);
    }
    std::vector<CopyOrder> orders;
    computed_.rows = seats.loads;
    computed_.copied.assign(ranks_, 0);
    computed_.experts.assign(ranks_, 0);
    for (size_t i = 0; i < seats.all.size(); ++i) {
      const Seat& seat = seats.all[i];
      if (seat.rows == 0) continue;
      ++computed_.experts[static_cast<size_t>(seat.rank)];
      if (i < static_cast<size_t>(load_.experts)) continue;
      computed_.copied[static_cast<size_t>(seat.rank)] += seat.rows;
      if (load_.refetched || i >= load_.seats.size()) {
        const int64_t home = load_.seats[static_cast<size_t>(seat.expert)].rank;
        const size_t wire = lane(home, seat.rank);
        ++copies_out_[wire][static_cast<size_t>(home)];
        ++copies_in_[wire][static_cast<size_t>(seat.rank)];
        orders.push_back({seat.expert, home, seat.rank});
      }
    }
    for (int64_t expert = 0; expert < load_.experts; ++expert) {
      if (seats.next[static_cast<size_t>(expert)] < 0) continue;
      if (given_.next[static_cast<size_t>(expert)] < 0) add_home(expert, -1, out, into);
      add_split(seats, expert, out, into);
    }
    Ports rows{};
    Ports copies{};
    for (size_t wire = 0; wire < kWires; ++wire) {
      for (size_t rank = 0; rank < ranks_; ++rank) {
        rows[wire] = std::max({rows[wire], out[wire][rank], into[wire][rank]});
        copies[wire] = std::max({copies[wire], copies_out_[wire][rank], copies_in_[wire][rank]});
      }
    }
    // Weights in these groups, where a phase relays them; gradients, and weights that it does not, from and to the
    // homes.
    const auto total_s = [&](const Ports* groups, size_t count) {
      double total = 0;
      for (const PhaseCosts& phase : load_.phases) {
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
    const double direct_s = total_s(&copies, 1);
    const double least_s = total_s(nullptr, 0);
    if (!(least_s < direct_s * (1 - kTie)) || !(least_s < enough_s)) return {direct_s, false};
    const auto groups = relayed_ports(std::move(orders), load_.ranks, load_.ranks_per_node, copies);
    if (!groups) return {direct_s, false};
    const double relayed_s = total_s(groups->data(), groups->size());
    if (relayed_s < direct_s * (1 - kTie)) return {relayed_s, true};
    return {direct_s, false};
  }

  // Copies that spare the wire between nodes most.
  std::vector<NodeCopy> node_copies() const {
    std::vector<NodeCopy> found;
    const auto priced_wire = [](const PhaseCosts& phase) { return phase.exchange[kInter].beta_s != 0; };
    if (std::none_of(load_.phases.begin(), load_.phases.end(), priced_wire)) return found;
    const auto experts = static_cast<size_t>(load_.experts);
    std::vector<bool> held(nodes_ * experts, false);
    for (const Seat& seat : load_.seats) {
      held[static_cast<size_t>(node_of(seat.rank)) * experts + static_cast<size_t>(seat.expert)] = true;
    }
    std::vector<NodeCopy> pairs;
    for (int64_t node = 0; node < static_cast<int64_t>(nodes_); ++node) {
      const int64_t first = node * load_.ranks_per_node;
      int64_t slots = 0;
      for (int64_t rank = first; rank < first + load_.ranks_per_node; ++rank) {
        slots += load_.spare[static_cast<size_t>(rank)];
      }
      pairs.clear();
      for (int64_t expert = 0; expert < load_.experts && slots > 0; ++expert) {
        if (held[static_cast<size_t>(node) * experts + static_cast<size_t>(expert)]) continue;
        const int64_t rows = wanted_in(node, expert);
        if (rows > 0) pairs.push_back({rows, expert, node});
      }
      const auto most = std::min(pairs.size(), static_cast<size_t>(slots));
      std::partial_sort(pairs.begin(), pairs.begin() + static_cast<std::ptrdiff_t>(most), pairs.end());
      found.insert(found.end(), pairs.begin(), pairs.begin() + static_cast<std::ptrdiff_t>(most));
    }
    std::sort(found.begin(), found.end());
    found.resize(std::min(found.size(), static_cast<size_t>(load_.most_copies)));
    return found;
  }

  Seats with_node_copies(const std::vector<NodeCopy>& copies, size_t count) const {
    Seats seats = given_;
    Rows got(ranks_, 0);
    for (size_t i = 0; i < count; ++i) {
      const int64_t first = copies[i].node * load_.ranks_per_node;
      int64_t to = -1;
      for (int64_t rank = first; rank < first + load_.ranks_per_node; ++rank) {
        const auto place = static_cast<size_t>(rank);
        if (got[place] >= load_.spare[place]) continue;
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

  // own: the seats of each rank, those with most rows first.
  const Seats& fill(const Seats& start, const std::vector<std::vector<size_t>>& own, int64_t target,
                    int64_t most_copies) const {
    Seats& seats = filled_;
    seats = start;
    std::vector<size_t>& order = order_;
    order.clear();
    for (size_t rank = 0; rank < ranks_; ++rank) {
      if (seats.loads[rank] > target) order.push_back(rank);
    }
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return start.loads[a] > start.loads[b]; });
    Rows& open = open_;
    for (const size_t rank : order) {
      open.clear();
      for (int64_t to = 0; to < load_.ranks && most_copies > 0; ++to) {
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
      }
    }
    return seats;
  }

  // Rows of one of a rank's `own` seats that gain most elsewhere: 0 where there are none. open: ranks that may take
  // copies.
  Move best_move(const Seats& seats, const std::vector<size_t>& own, const Rows& open, int64_t target) const {
    Move best{0, -1, -1, 0};
    if (own.empty()) return best;
    const int64_t rank = seats.all[own.front()].rank;
    const int64_t excess = seats.loads[static_cast<size_t>(rank)] - target;
    const double most_s = row_s_ + std::max(crossing_s_[kInter], crossing_s_[kIntra]);
    double best_gain_s = 0;
    const auto offer = [&](const Move& move, double gain_s) {
      if (best.rows > 0 && !(gain_s > best_gain_s)) return;
      best = move;
      best_gain_s = gain_s;
    };
    for (const size_t i : own) {
      const Seat& seat = seats.all[i];
      if (seat.rows == 0 || (best.rows > 0 && !(most_s * static_cast<double>(seat.rows) > best_gain_s))) continue;
      ++mark_;
      marks_.resize(ranks_, 0);
      for (int64_t j = seat.expert; j >= 0; j = seats.next[static_cast<size_t>(j)]) {
        const Seat& other = seats.all[static_cast<size_t>(j)];
        marks_[static_cast<size_t>(other.rank)] = mark_;
        const int64_t moved = std::min({seat.rows, excess, target - seats.load_of(other)});
        if (static_cast<size_t>(j) == i || moved <= 0) continue;
        offer({i, j, other.rank, moved}, (row_s_ - crossing_s_[lane(rank, other.rank)]) * static_cast<double>(moved));
      }
      const int64_t home = load_.seats[static_cast<size_t>(seat.expert)].rank;
      const int64_t* rows = wanted(seat.expert);
      for (const int64_t to : open) {
        const auto place = static_cast<size_t>(to);
        const int64_t room = target - seats.loads[place];
        if (seats.spare[place] < 1 || room < 1 || marks_[place] == mark_) continue;
        const int64_t moved = std::min({seat.rows, std::max(excess, rows[to]), room});
        const double stays = static_cast<double>(std::min(rows[to], moved));
        offer({i, -1, to, moved},
              row_s_ * static_cast<double>(moved) + crossing_s_[lane(rank, to)] * stays - copy_s_[lane(home, to)]);
      }
    }
    return best;
  }

  // The rows of each expert shared out anew inside each node, so that its ranks have equally many.
  void level(Seats& seats) const {
    std::vector<std::vector<size_t>> shared;
    for (int64_t expert = 0; expert < load_.experts; ++expert) {
      if (seats.next[static_cast<size_t>(expert)] < 0) continue;
      std::map<int64_t, std::vector<size_t>> groups;
      for (int64_t i = expert; i >= 0; i = seats.next[static_cast<size_t>(i)]) {
        const auto seat = static_cast<size_t>(i);
        groups[node_of(seats.all[seat].rank)].push_back(seat);
      }
      for (auto& [node, group] : groups) {
        if (group.size() > 1) shared.push_back(std::move(group));
      }
    }
    std::vector<std::pair<int64_t, size_t>> others;
    for (int sweep = 0; sweep < kSweeps; ++sweep) {
      for (const auto& group : shared) {
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
        for (int64_t place = 0; place < static_cast<int64_t>(others.size()); ++place) {
          const auto& [below, i] = others[static_cast<size_t>(place)];
          const int64_t taken = place < count ? height - below + (place < more ? 1 : 0) : 0;
          seats.loads[static_cast<size_t>(seats.all[i].rank)] += taken - seats.all[i].rows;
          seats.all[i].rows = taken;
        }
      }
    }
  }

  // When the rows of seat i go to another one of its expert and node, else to the home.
  std::vector<Seat> inherited(const std::vector<Seat>& seats, size_t i) const {
    auto heir = static_cast<size_t>(seats[i].expert);
    for (size_t j = 0; j < seats.size(); ++j) {
      if (j == i || seats[j].expert != seats[i].expert || lane(seats[j].rank, seats[i].rank) != kIntra) continue;
      heir = j;
      break;
    }
    std::vector<Seat> found = seats;
    found[heir].rows += seats[i].rows;
    return found;
  }

  bool levelled(const std::vector<Seat>& all) {
    Seats seats = linked(all);
    level(seats);
    return attempt(seats);
  }

  // Whether seats that differ little from the best are better: the first of those is the best then.
  bool improved() {
    const Seats now = linked(best_);
    const std::vector<Seat> seats = best_;
    const auto given = load_.seats.size();
    std::vector<int64_t> emptiest(ranks_);
    std::iota(emptiest.begin(), emptiest.end(), int64_t{0});
    std::stable_sort(emptiest.begin(), emptiest.end(), [&](int64_t a, int64_t b) {
      return now.loads[static_cast<size_t>(a)] < now.loads[static_cast<size_t>(b)];
    });
    std::vector<bool> taken(static_cast<size_t>(load_.experts) * ranks_, false);
    const auto has = [&](int64_t expert, int64_t rank) {
      return taken[static_cast<size_t>(expert) * ranks_ + static_cast<size_t>(rank)];
    };
    for (const Seat& seat : seats) {
      taken[static_cast<size_t>(seat.expert) * ranks_ + static_cast<size_t>(seat.rank)] = true;
    }
    if (levelled(seats)) return true;
    // Without one of the new copies.
    std::vector<size_t> order(seats.size() - given);
    std::iota(order.begin(), order.end(), given);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return seats[a].rows < seats[b].rows; });
    for (const size_t i : order) {
      if (tries_ == 0) return false;
      std::vector<Seat> fewer = inherited(seats, i);
      fewer.erase(fewer.begin() + static_cast<std::ptrdiff_t>(i));
      if (levelled(fewer)) return true;
    }
    order.resize(seats.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      return std::make_pair(now.load_of(seats[a]), seats[a].rows) >
             std::make_pair(now.load_of(seats[b]), seats[b].rows);
    });
    // With one more, off the fullest ranks.
    const bool may_grow = static_cast<int64_t>(seats.size() - given) < load_.most_copies;
    for (const size_t i : may_grow ? order : std::vector<size_t>{}) {
      const Seat& seat = seats[i];
      for (const int64_t to : emptiest) {
        if (tries_ == 0) return false;
        if (now.spare[static_cast<size_t>(to)] < 1 || has(seat.expert, to)) continue;
        const int64_t half = (now.load_of(seat) - now.loads[static_cast<size_t>(to)]) / 2;
        const bool near = lane(seat.rank, to) == kIntra;
        const int64_t moved = std::min(seat.rows, near ? half : wanted_in(node_of(to), seat.expert));
        if (moved <= 0) continue;
        std::vector<Seat> more = seats;
        more[i].rows -= moved;
        more.push_back({seat.expert, to, moved});
        if (levelled(more)) return true;
      }
    }
    // With one elsewhere.
    for (size_t i = given; i < seats.size(); ++i) {
      for (const int64_t to : emptiest) {
        if (tries_ == 0) return false;
        if (now.spare[static_cast<size_t>(to)] < 1 || has(seats[i].expert, to)) continue;
        std::vector<Seat> other = seats;
        other[i].rank = to;
        if (levelled(other)) return true;
      }
    }
    // With one for another one of its node.
    for (const size_t i : order) {
      for (size_t j = given; j < seats.size(); ++j) {
        if (tries_ == 0) return false;
        const int64_t more = now.load_of(seats[i]) - now.load_of(seats[j]);
        const int64_t moved = std::min(seats[i].rows, (more + seats[j].rows) / 2);
        if (lane(seats[i].rank, seats[j].rank) != kIntra || has(seats[i].expert, seats[j].rank)) continue;
        if (more <= 0 || moved <= 0) continue;
        std::vector<Seat> other = inherited(seats, j);
        other[i].rows -= moved;
        other[j] = {seats[i].expert, seats[j].rank, moved};
        if (levelled(other)) return true;
      }
    }
    return false;
  }

  const Load& load_;
  size_t ranks_;
  size_t nodes_ = 0;
  int64_t tries_;
  Rows node_;         // of each rank
  Rows wanted_;       // load_.counts by expert and rank
  double row_s_ = 0;  // of all phases: a row's compute, its crossings, and a copy, by wire
  std::array<double, kWires> crossing_s_{};
  std::array<double, kWires> copy_s_{};
  Seats given_;
  Lanes base_out_;  // by wire and rank, of experts with one seat
  Lanes base_in_;
  Price best_price_{};
  std::vector<Seat> best_;

  // Room that every candidate uses anew.
  mutable Rows left_;
  mutable Rows sources_;
  mutable Rows rooms_;
  mutable std::vector<Seat> places_;
  mutable Lanes out_;
  mutable Lanes in_;
  mutable Lanes copies_out_;
  mutable Lanes copies_in_;
  mutable Computed computed_;
  mutable Seats filled_;
  mutable std::vector<size_t> order_;
  mutable Rows open_;
  mutable Rows marks_;
  mutable int64_t mark_ = 0;
};

}  // namespace

double PhaseCosts::copies_s(const Ports& copies) const {
  double most = 0;
  for (size_t wire = 0; wire < kWires; ++wire) {
    if (copies[wire] == 0) continue;
    most = std::max(most, copy[wire].alpha_s + copy[wire].beta_s * static_cast<double>(copies[wire]));
  }
  return most;
}

double PhaseCosts::in_turn_s(const Computed& computed) const {
  double inputs_s = 0;
  double copies_s = 0;
  double homes_s = 0;
  for (size_t rank = 0; rank < computed.rows.size(); ++rank) {
    const auto n = static_cast<double>(computed.rows[rank]);
    const auto copied = static_cast<double>(computed.copied[rank]);
    inputs_s = std::max(
        inputs_s, (row_s - wgrad_row_s) * n + expert_s * static_cast<double>(computed.experts[rank]));
    copies_s = std::max(copies_s, wgrad_row_s * copied);
    homes_s = std::max(homes_s, wgrad_row_s * (n - copied));
  }
  return inputs_s + copies_s + homes_s;
}

double PhaseCosts::last_gradients_s(const Computed& computed, double copy_s) const {
  double most = 0;
  for (size_t rank = 0; rank < computed.rows.size(); ++rank) {
    const auto n = static_cast<double>(computed.rows[rank]);
    const auto copied = static_cast<double>(computed.copied[rank]);
    const double before =
        (row_s - wgrad_row_s) * n + expert_s * static_cast<double>(computed.experts[rank]) + wgrad_row_s * copied;
    most = std::max(most, before + std::max(wgrad_row_s * (n - copied) + beside_s, copy_s));
  }
  return most;
}

double PhaseCosts::window_s(const Computed& computed, const Ports& rows, double copy_s) const {
  double busy_s = 0;
  for (size_t rank = 0; rank < computed.rows.size(); ++rank) {
    busy_s = std::max(busy_s, row_s * static_cast<double>(computed.rows[rank]) +
                                  expert_s * static_cast<double>(computed.experts[rank]));
  }
  double wire_s = 0;
  for (size_t wire = 0; wire < kWires; ++wire) {
    if (rows[wire] != 0) {
      const Line& sent = exchange[wire];
      wire_s = std::max(wire_s, 2.0 * (chunks * sent.alpha_s + sent.beta_s * static_cast<double>(rows[wire])));
    }
  }
  const bool copied = std::any_of(computed.copied.begin(), computed.copied.end(), [](auto rows) { return rows != 0; });
  const bool in_turn = wgrad_row_s != 0 && copied && (joined || exposed_copies);
  const double through_s = in_turn ? in_turn_s(computed) : busy_s;
  if (joined) return through_s + wire_s + beside_s + copy_s;
  const double exposed_s = exposed_copies ? copy_s : 0;
  copy_s -= exposed_s;
  const double moved_s = wire_s + copy_s;
  const double chunk_s = wire_s / (2 * chunks);
  if (wgrad_row_s == 0) {
    const double before_s = std::max(beside_s, copy_s + 2 * chunk_s);
    return std::max(busy_s + before_s, moved_s + busy_s / chunks) + exposed_s;
  }
  const double dgrad_s = busy_s * (1 - wgrad_row_s / row_s);
  double total_s = std::max(through_s + std::max(beside_s, chunk_s), moved_s + dgrad_s / chunks);
  if (copy_s != 0) {
    total_s = std::max(total_s, last_gradients_s(computed, copy_s) + std::max(chunk_s - beside_s, 0.0));
  }
  return total_s + exposed_s;
}

Decision decide(const Load& load) {
  check_load(load);
  return Decider(load).decide();
}

}  // namespace moe_overlap
