#include "replication.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace moe_overlap {
namespace {

constexpr int64_t kTargets = 12;
constexpr int64_t kRefined = 4;
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

// The seats of a candidate, by rank's rows, and each expert's as a list: `next` of a seat, -1 at its end.
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
  }

  void move(size_t from, size_t to, int64_t rows) {
    all[from].rows -= rows;
    all[to].rows += rows;
    loads[static_cast<size_t>(all[from].rank)] -= rows;
    loads[static_cast<size_t>(all[to].rank)] += rows;
  }
};

class Decider {
 public:
  explicit Decider(const Load& load) : load_(load), of_rank_(static_cast<size_t>(load.ranks)) {
    const auto ranks = static_cast<size_t>(load.ranks);
    for (int64_t rank = 0; rank < load.ranks; ++rank) node_.push_back(rank / load.ranks_per_node);
    given_.all = load.seats;
    given_.next.assign(load.seats.size(), -1);
    given_.last.resize(static_cast<size_t>(load.experts));
    given_.loads.assign(ranks, 0);
    given_.spare = load.spare;
    for (size_t i = 0; i < load.seats.size(); ++i) {
      const Seat& seat = load.seats[i];
      given_.loads[static_cast<size_t>(seat.rank)] += seat.rows;
      of_rank_[static_cast<size_t>(seat.rank)].push_back(i);
      auto& end = given_.last[static_cast<size_t>(seat.expert)];
      if (i >= static_cast<size_t>(load.experts)) given_.next[static_cast<size_t>(end)] = static_cast<int64_t>(i);
      end = static_cast<int64_t>(i);
    }
    for (const PhaseCosts& phase : load.phases) {
      row_s_ += phase.row_s;
      for (size_t wire = 0; wire < kWires; ++wire) {
        crossing_s_[wire] += 2.0 * phase.exchange[wire].beta_s;
        copy_s_[wire] += phase.copy[wire].beta_s;
      }
    }
    order_.resize(ranks);
    std::iota(order_.begin(), order_.end(), size_t{0});
    std::stable_sort(order_.begin(), order_.end(),
                     [&](size_t a, size_t b) { return given_.loads[a] > given_.loads[b]; });
    for (auto* lanes : {&base_out_, &base_in_}) lanes->fill(Rows(ranks, 0));
    for (int64_t expert = 0; expert < load.experts; ++expert) {
      if (given_.next[static_cast<size_t>(expert)] < 0) add_home(expert, 1, base_out_, base_in_);
    }
  }

  Decision decide() {
    const Price left = priced(given_);
    Price best_price = left;
    std::vector<Seat> best = load_.seats;
    int64_t best_target = -1;
    int64_t best_copies = load_.most_copies;
    const int64_t most = *std::max_element(given_.loads.begin(), given_.loads.end());
    const int64_t total = std::accumulate(given_.loads.begin(), given_.loads.end(), int64_t{0});
    const int64_t mean = (total + load_.ranks - 1) / load_.ranks;
    std::vector<int64_t> targets;
    for (int64_t j = 0; j < kTargets; ++j) targets.push_back(mean + (most - mean) * j * j / (kTargets * kTargets));
    const auto attempt = [&](int64_t target, int64_t copies) {
      const Seats seats = fill(target, copies);
      const Price price = priced(seats);
      if (!(price.seconds < best_price.seconds * (1 - kTie))) return false;
      best_price = price;
      best = seats.all;
      return true;
    };
    const bool has_copies = load_.seats.size() > static_cast<size_t>(load_.experts);
    for (int pass = has_copies ? 0 : 1; pass < 2; ++pass) {
      const int64_t copies = pass == 0 ? 0 : load_.most_copies;
      for (int64_t j = kTargets - 1; j >= 0; --j) {
        if (!attempt(targets[static_cast<size_t>(j)], copies)) continue;
        best_target = j;
        best_copies = copies;
      }
    }
    if (best_target >= 0) {
      const int64_t low = targets[static_cast<size_t>(std::max(int64_t{0}, best_target - 1))];
      const int64_t high = best_target + 1 < kTargets ? targets[static_cast<size_t>(best_target + 1)] : most;
      for (int64_t i = 1; i <= kRefined; ++i) attempt(low + (high - low) * i / (kRefined + 1), best_copies);
    }
    if (!(best_price.seconds < left.seconds * (1 - load_.margin))) {
      return {left.seconds, left.seconds, true, load_.seats, left.relayed};
    }
    return {left.seconds, best_price.seconds, false, std::move(best), best_price.relayed};
  }

 private:
  using Lanes = std::array<Rows, kWires>;

  struct Price {
    double seconds;
    bool relayed;
  };

  int64_t count(int64_t rank, int64_t expert) const { return load_.counts[rank * load_.experts + expert]; }

  size_t lane(int64_t one, int64_t other) const {
    return node_[static_cast<size_t>(one)] == node_[static_cast<size_t>(other)] ? kIntra : kInter;
  }

  // Rows of an expert on their way to its home, `sign` times.
  void add_home(int64_t expert, int64_t sign, Lanes& out, Lanes& into) const {
    const int64_t home = load_.seats[static_cast<size_t>(expert)].rank;
    for (int64_t source = 0; source < load_.ranks; ++source) {
      if (source == home) continue;
      const int64_t rows = sign * count(source, expert);
      const size_t wire = lane(source, home);
      out[wire][static_cast<size_t>(source)] += rows;
      into[wire][static_cast<size_t>(home)] += rows;
    }
  }

  // Rows of an expert on their way to its seats: those that stay on the rank first, then on the node.
  void add_split(const Seats& seats, int64_t expert, Lanes& out, Lanes& into) const {
    Rows left(static_cast<size_t>(load_.ranks));
    for (int64_t source = 0; source < load_.ranks; ++source) {
      left[static_cast<size_t>(source)] = count(source, expert);
    }
    std::vector<Seat> places;
    for (int64_t i = expert; i >= 0; i = seats.next[static_cast<size_t>(i)]) {
      places.push_back(seats.all[static_cast<size_t>(i)]);
    }
    const auto take = [&](int64_t source, Seat& place) {
      int64_t& own = left[static_cast<size_t>(source)];
      const int64_t rows = std::min(own, place.rows);
      own -= rows;
      place.rows -= rows;
      if (source == place.rank) return;
      const size_t wire = lane(source, place.rank);
      out[wire][static_cast<size_t>(source)] += rows;
      into[wire][static_cast<size_t>(place.rank)] += rows;
    };
    for (Seat& place : places) take(place.rank, place);
    for (Seat& place : places) {
      const int64_t first = place.rank / load_.ranks_per_node * load_.ranks_per_node;
      for (int64_t source = first; source < first + load_.ranks_per_node; ++source) take(source, place);
    }
    for (Seat& place : places) {
      for (int64_t source = 0; source < load_.ranks && place.rows > 0; ++source) take(source, place);
    }
  }

  Price priced(const Seats& seats) const {
    const auto ranks = static_cast<size_t>(load_.ranks);
    Lanes out = base_out_;
    Lanes into = base_in_;
    Lanes copies_out{Rows(ranks, 0), Rows(ranks, 0)};
    Lanes copies_in = copies_out;
    std::vector<CopyOrder> orders;
    Computed computed{seats.loads, Rows(ranks, 0), Rows(ranks, 0)};
    for (size_t i = 0; i < seats.all.size(); ++i) {
      const Seat& seat = seats.all[i];
      if (seat.rows == 0) continue;
      ++computed.experts[static_cast<size_t>(seat.rank)];
      const bool copy = i >= static_cast<size_t>(load_.experts);
      if (copy) computed.copied[static_cast<size_t>(seat.rank)] += seat.rows;
      if (copy && (load_.refetched || i >= load_.seats.size())) {
        const int64_t home = load_.seats[static_cast<size_t>(seat.expert)].rank;
        const size_t wire = lane(home, seat.rank);
        ++copies_out[wire][static_cast<size_t>(home)];
        ++copies_in[wire][static_cast<size_t>(seat.rank)];
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
      for (size_t rank = 0; rank < ranks; ++rank) {
        rows[wire] = std::max({rows[wire], out[wire][rank], into[wire][rank]});
        copies[wire] = std::max({copies[wire], copies_out[wire][rank], copies_in[wire][rank]});
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
        total += phase.window_s(computed, rows, copy_s);
      }
      return total;
    };
    const double direct_s = total_s(&copies, 1);
    if (!(total_s(nullptr, 0) < direct_s * (1 - kTie))) return {direct_s, false};
    const auto groups = relayed_ports(std::move(orders), load_.ranks, load_.ranks_per_node, copies);
    if (!groups) return {direct_s, false};
    const double relayed_s = total_s(groups->data(), groups->size());
    if (relayed_s < direct_s * (1 - kTie)) return {relayed_s, true};
    return {direct_s, false};
  }

  Seats fill(int64_t target, int64_t most_copies) const {
    Seats seats = given_;
    for (const size_t rank : order_) {
      if (seats.loads[rank] <= target) break;
      to_existing(seats, rank, target);
      most_copies -= to_copies(seats, rank, target, most_copies);
    }
    return seats;
  }

  void to_existing(Seats& seats, size_t rank, int64_t target) const {
    for (const size_t i : of_rank_[rank]) {
      for (int64_t j = seats.all[i].expert; j >= 0; j = seats.next[static_cast<size_t>(j)]) {
        const auto to = static_cast<size_t>(j);
        if (to == i) continue;
        const int64_t moved = std::min({seats.all[i].rows, seats.loads[rank] - target,
                                        target - seats.loads[static_cast<size_t>(seats.all[to].rank)]});
        if (moved > 0) seats.move(i, to, moved);
      }
    }
  }

  int64_t to_copies(Seats& seats, size_t rank, int64_t target, int64_t most_copies) const {
    int64_t made = 0;
    std::vector<bool> stuck(of_rank_[rank].size(), false);
    while (seats.loads[rank] > target && made < most_copies) {
      int64_t largest = -1;
      for (size_t own = 0; own < stuck.size(); ++own) {
        const int64_t rows = seats.all[of_rank_[rank][own]].rows;
        if (stuck[own] || rows == 0) continue;
        if (largest < 0 || rows > seats.all[of_rank_[rank][static_cast<size_t>(largest)]].rows) {
          largest = static_cast<int64_t>(own);
        }
      }
      if (largest < 0) break;
      const size_t from = of_rank_[rank][static_cast<size_t>(largest)];
      const int64_t to = best_rank(seats, from, target);
      if (to < 0) {
        stuck[static_cast<size_t>(largest)] = true;
        continue;
      }
      const int64_t own = count(to, seats.all[from].expert);
      const int64_t moved = std::min({seats.all[from].rows, std::max(seats.loads[rank] - target, own),
                                      target - seats.loads[static_cast<size_t>(to)]});
      seats.append(seats.all[from].expert, to);
      --seats.spare[static_cast<size_t>(to)];
      ++made;
      seats.move(from, seats.all.size() - 1, moved);
    }
    return made;
  }

  // Where a copy of the expert of this seat gains most; -1: nowhere.
  int64_t best_rank(const Seats& seats, size_t from, int64_t target) const {
    const Seat& seat = seats.all[from];
    const int64_t home = load_.seats[static_cast<size_t>(seat.expert)].rank;
    std::vector<bool> taken(static_cast<size_t>(load_.ranks), false);
    for (int64_t i = seat.expert; i >= 0; i = seats.next[static_cast<size_t>(i)]) {
      taken[static_cast<size_t>(seats.all[static_cast<size_t>(i)].rank)] = true;
    }
    const int64_t excess = seats.loads[static_cast<size_t>(seat.rank)] - target;
    int64_t best = -1;
    double best_gain_s = 0;
    for (int64_t to = 0; to < load_.ranks; ++to) {
      const auto place = static_cast<size_t>(to);
      const int64_t room = target - seats.loads[place];
      if (seats.spare[place] < 1 || room < 1 || taken[place]) continue;
      const int64_t moved = std::min({seat.rows, std::max(excess, count(to, seat.expert)), room});
      const int64_t own = std::min(count(to, seat.expert), moved);
      const size_t wire = lane(seat.rank, to);
      const size_t copied = lane(home, to);
      const double gain_s =
          row_s_ * static_cast<double>(moved) + crossing_s_[wire] * static_cast<double>(own) - copy_s_[copied];
      if (best < 0 || gain_s > best_gain_s) {
        best = to;
        best_gain_s = gain_s;
      }
    }
    return best;
  }

  const Load& load_;
  Rows node_;         // of each rank
  double row_s_ = 0;  // of all phases: a row's compute, its crossings, and a copy, by wire
  std::array<double, kWires> crossing_s_{};
  std::array<double, kWires> copy_s_{};
  std::vector<std::vector<size_t>> of_rank_;  // the given seats on a rank
  std::vector<size_t> order_;                 // ranks, the fullest first
  Seats given_;
  Lanes base_out_;  // by wire and rank, of experts with one seat
  Lanes base_in_;
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
  if (joined) return busy_s + wire_s + beside_s + copy_s;
  const double exposed_s = exposed_copies ? copy_s : 0;
  copy_s -= exposed_s;
  const double moved_s = wire_s + copy_s;
  const double chunk_s = wire_s / (2 * chunks);
  if (wgrad_row_s == 0) {
    const double before_s = std::max(beside_s, copy_s + 2 * chunk_s);
    return std::max(busy_s + before_s, moved_s + busy_s / chunks) + exposed_s;
  }
  const double dgrad_s = busy_s * (1 - wgrad_row_s / row_s);
  double total_s = std::max(busy_s + std::max(beside_s, chunk_s), moved_s + dgrad_s / chunks);
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
