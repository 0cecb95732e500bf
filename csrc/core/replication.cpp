#include "replication.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <tuple>
#include <utility>

#include "copy_candidates.h"
#include "copy_price.h"

namespace moe_overlap {
namespace {

constexpr int64_t kTargets = 12;
constexpr std::array<int64_t, 4> kFewTargets{0, 2, 4, 7};
constexpr std::array<int64_t, 4> kNearTargets{0, 1, 2, 3};
constexpr int64_t kRefined = 4;
constexpr std::array<int64_t, 3> kPorts{0, 1, 2};     // uses of a port between nodes
constexpr std::array<int64_t, 4> kAbove{0, 1, 2, 4};  // targets above the mean, in 32nds of it
constexpr Limits kUnlimited{0, 0};                    // of levelled rows
constexpr int64_t kLeastTries = 12;
constexpr int64_t kManyTries = 40;
constexpr int64_t kWork = 18'000;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Decider {
 public:
  explicit Decider(const Load& load)
      : view_(load),
        pricer_(view_),
        candidates_(view_),
        tries_(std::max(kLeastTries, kWork / (load.ranks * load.experts))),
        many_(tries_ >= kManyTries) {}

  Decision decide() {
    const Price left = pricer_.priced(view_.given, std::numeric_limits<double>::infinity());
    best_price_ = left;
    best_ = view_.load.seats;
    Counts targets(kNearTargets.begin(), kNearTargets.end());
    if (many_) {
      targets.resize(static_cast<size_t>(kTargets));
      std::iota(targets.begin(), targets.end(), int64_t{0});
    }
    if (view_.load.seats.size() > static_cast<size_t>(view_.load.experts)) try_targets(view_.given, targets, 0);
    try_targets(view_.given, targets, view_.load.most_copies);
    if (many_) {
      try_ports();
      try_nodes();
    }
    while (tries_ > 0 && improved()) {
    }
    if (!(best_price_.seconds < left.seconds * (1 - view_.load.margin))) {
      return {left.seconds, left.seconds, true, view_.load.seats, left.relayed};
    }
    return {left.seconds, best_price_.seconds, false, std::move(best_), best_price_.relayed};
  }

 private:
  bool attempt(const Seats& seats, const Limits& limits) {
    if (tries_ == 0) return false;
    --tries_;
    const Price price = pricer_.priced(seats, best_price_.seconds * (1 - kTie));
    if (!(price.seconds < best_price_.seconds * (1 - kTie))) return false;
    best_price_ = price;
    limits_ = limits;
    best_.clear();
    for (size_t i = 0; i < seats.all.size(); ++i) {
      if (i < view_.load.seats.size() || seats.all[i].rows != 0) best_.push_back(seats.all[i]);
    }
    return true;
  }

  void try_targets(const Seats& start, const Counts& places, int64_t most_copies) {
    if (tries_ == 0) return;
    const auto own = candidates_.giving(start, kUnlimited);
    const auto attempt_at = [&](int64_t target) {
      if (tries_ == 0) return false;
      return attempt(candidates_.fill(start, own, {target, target}, most_copies), kUnlimited);
    };
    const int64_t most = *std::max_element(start.loads.begin(), start.loads.end());
    const int64_t mean =
        ceil_div(std::accumulate(start.loads.begin(), start.loads.end(), int64_t{0}), view_.load.ranks);
    Counts targets;
    for (const int64_t j : places) targets.push_back(mean + (most - mean) * j * j / (kTargets * kTargets));
    targets.push_back(most);
    int64_t low = -1;
    int64_t high = -1;
    for (size_t j = places.size(); j-- > 0;) {
      if (!attempt_at(targets[j])) continue;
      low = targets[j > 0 ? j - 1 : 0];
      high = targets[j + 1];
    }
    attempt_at(fullest_node(start));
    const int64_t refined = many_ ? kRefined : 1;
    for (int64_t i = 1; i <= refined && low >= 0; ++i) attempt_at(low + (high - low) * i / (refined + 1));
  }

  // The mean of its ranks' rows.
  int64_t fullest_node(const Seats& seats) const {
    int64_t fullest = 0;
    for (auto first = seats.loads.begin(); first != seats.loads.end(); first += view_.load.ranks_per_node) {
      const int64_t rows = std::accumulate(first, first + view_.load.ranks_per_node, int64_t{0});
      fullest = std::max(fullest, ceil_div(rows, view_.load.ranks_per_node));
    }
    return fullest;
  }

  // Copies between nodes by how often a port is used for them, then copies inside nodes, with rows levelled.
  void try_ports() {
    const int64_t rows = std::accumulate(view_.given.loads.begin(), view_.given.loads.end(), int64_t{0});
    const int64_t mean = ceil_div(rows, view_.load.ranks);
    std::vector<Seat> before;
    for (const int64_t ports : kPorts) {
      if (ports == 0 && view_.load.ranks_per_node == 1) continue;
      if (tries_ == 0) return;
      const Seats free = candidates_.node_copies(view_.load.most_copies, ports, rows, rows);
      if (free.all == before) return;
      before = free.all;
      Counts targets;
      if (ports == 0) targets.push_back(fullest_node(free));
      for (const int64_t j : kAbove) targets.push_back(mean + mean * j / 32);
      for (const int64_t target : targets) {
        if (tries_ == 0) return;
        for (const auto& [limits, in_node] : port_limits(free, target, ports, rows)) {
          const Seats start = candidates_.node_copies(view_.load.most_copies, ports, limits.copied, in_node);
          const auto more = view_.load.most_copies - static_cast<int64_t>(start.all.size() - view_.load.seats.size());
          const Seats& seats = candidates_.fill(start, candidates_.giving(start, limits), limits, more);
          if (seats.all.size() > view_.load.seats.size()) levelled(seats.all, limits);
        }
      }
    }
  }

  // Copies that spare the wire between nodes most, and parts of these.
  void try_nodes() {
    const int64_t rows = std::accumulate(view_.given.loads.begin(), view_.given.loads.end(), int64_t{0});
    const auto given = static_cast<int64_t>(view_.load.seats.size());
    const Counts few_targets(kFewTargets.begin(), kFewTargets.end());
    int64_t copies = view_.load.most_copies;
    for (const int64_t quarters : {4, 2, 1, 3}) {
      if (tries_ == 0) return;
      const Seats start = candidates_.node_copies(copies * quarters / 4, view_.load.experts, rows, rows);
      if (quarters == 4) copies = static_cast<int64_t>(start.all.size()) - given;
      if (static_cast<int64_t>(start.all.size()) == given) continue;
      attempt(start, kUnlimited);
      try_targets(start, few_targets, view_.load.most_copies - (static_cast<int64_t>(start.all.size()) - given));
    }
  }

  // Limits of ranks, and rows of nodes.
  std::vector<std::pair<Limits, int64_t>> port_limits(const Seats& free, int64_t target, int64_t ports,
                                                      int64_t rows) const {
    const auto& phases = view_.load.phases;
    const auto in_turn = [](const PhaseCosts& phase) { return phase.waits_in_turn(); };
    std::vector<std::pair<Limits, int64_t>> found;
    if (std::any_of(phases.begin(), phases.end(), in_turn)) {
      int64_t kept = candidates_.most_kept(free, target);
      kept = candidates_.most_kept(candidates_.node_copies(view_.load.most_copies, ports, target - kept, rows), target);
      found.push_back({{target, target - kept, kept, true}, rows});
      if (kept > 0) found.push_back({{target, target - kept / 2, kept / 2, true}, rows});
      return found;
    }
    double hidden = 0;
    for (const PhaseCosts& phase : phases) {
      if (!(phase.wgrad_row_s > 0) || ports == 0) continue;
      const PhaseCosts::Line& copy = phase.copy[kInter];
      hidden = std::max(hidden, (copy.alpha_s + copy.beta_s * static_cast<double>(ports)) / phase.wgrad_row_s);
    }
    const bool some = 0 < hidden && hidden < static_cast<double>(target);
    const auto within = [&](double part, int64_t in_node) {
      const auto home = some ? static_cast<int64_t>(part * hidden) : 0;
      found.push_back({{target, target - home, -1, true}, in_node});
    };
    within(1, rows);
    if (ports > 0) within(1, view_.load.ranks_per_node * target);
    if (some) within(0.75, view_.load.ranks_per_node * target);
    return found;
  }

  // As `attempt`, with rows levelled inside nodes; the best itself takes no try.
  bool levelled(const std::vector<Seat>& all) { return levelled(all, limits_); }

  bool levelled(const std::vector<Seat>& all, const Limits& given) {
    const Limits limits = given;
    const Seats& seats = candidates_.level(all, limits);
    return !(seats.all == best_) && attempt(seats, limits);
  }

  // The new copies: those at the ends of the wires with most of them first, and of those the ones with fewest rows.
  std::vector<size_t> copies_to_spare(const std::vector<Seat>& seats) const {
    std::array<Counts, kWires> sent;
    std::array<Counts, kWires> got;
    for (auto* ports : {&sent, &got}) ports->fill(Counts(view_.ranks, 0));
    const auto home_of = [&](size_t i) { return view_.load.seats[static_cast<size_t>(seats[i].expert)].rank; };
    const auto wire_of = [&](size_t i) { return view_.lane(home_of(i), seats[i].rank); };
    std::vector<size_t> found(seats.size() - view_.load.seats.size());
    std::iota(found.begin(), found.end(), view_.load.seats.size());
    for (const size_t i : found) {
      ++sent[wire_of(i)][static_cast<size_t>(home_of(i))];
      ++got[wire_of(i)][static_cast<size_t>(seats[i].rank)];
    }
    const auto key = [&](size_t i) {
      const size_t wire = wire_of(i);
      const auto most =
          std::max(sent[wire][static_cast<size_t>(home_of(i))], got[wire][static_cast<size_t>(seats[i].rank)]);
      return std::make_tuple(wire, -most, seats[i].rows);
    };
    std::stable_sort(found.begin(), found.end(), [&](size_t a, size_t b) { return key(a) < key(b); });
    return found;
  }

  // Whether seats that differ little from the best are better: the first of those is the best then.
  bool improved() {
    Seats now;
    view_.link(best_, now);
    const std::vector<Seat> seats = best_;
    const auto given = view_.load.seats.size();
    std::vector<int64_t> emptiest(view_.ranks);
    std::iota(emptiest.begin(), emptiest.end(), int64_t{0});
    std::stable_sort(emptiest.begin(), emptiest.end(), [&](int64_t a, int64_t b) {
      return now.loads[static_cast<size_t>(a)] < now.loads[static_cast<size_t>(b)];
    });
    std::vector<bool> taken(static_cast<size_t>(view_.load.experts) * view_.ranks, false);
    const auto has = [&](int64_t expert, int64_t rank) {
      return taken[static_cast<size_t>(expert) * view_.ranks + static_cast<size_t>(rank)];
    };
    for (const Seat& seat : seats) {
      taken[static_cast<size_t>(seat.expert) * view_.ranks + static_cast<size_t>(seat.rank)] = true;
    }
    if (levelled(seats)) return true;
    // Without one of the new copies.
    for (const size_t i : copies_to_spare(seats)) {
      if (tries_ == 0) return false;
      std::vector<Seat> fewer = candidates_.inherited(seats, i);
      fewer.erase(fewer.begin() + static_cast<std::ptrdiff_t>(i));
      if (levelled(fewer)) return true;
    }
    std::vector<size_t> order(seats.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      return std::make_pair(now.load_of(seats[a]), seats[a].rows) >
             std::make_pair(now.load_of(seats[b]), seats[b].rows);
    });
    // With one more, off the fullest ranks.
    const bool may_grow = static_cast<int64_t>(seats.size() - given) < view_.load.most_copies;
    for (const size_t i : may_grow ? order : std::vector<size_t>{}) {
      const Seat& seat = seats[i];
      for (const int64_t to : emptiest) {
        if (tries_ == 0) return false;
        if (now.spare[static_cast<size_t>(to)] < 1 || has(seat.expert, to)) continue;
        const int64_t half = (now.load_of(seat) - now.loads[static_cast<size_t>(to)]) / 2;
        const bool near = view_.lane(seat.rank, to) == kIntra;
        const int64_t moved = std::min(seat.rows, near ? half : view_.wanted_in(view_.node_of(to), seat.expert));
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
        if (view_.lane(seats[i].rank, seats[j].rank) != kIntra || has(seats[i].expert, seats[j].rank)) continue;
        if (more <= 0 || moved <= 0) continue;
        std::vector<Seat> other = candidates_.inherited(seats, j);
        other[i].rows -= moved;
        other[j] = {seats[i].expert, seats[j].rank, moved};
        if (levelled(other)) return true;
      }
    }
    return false;
  }

  LoadView view_;
  Pricer pricer_;
  Candidates candidates_;
  int64_t tries_;
  bool many_;  // enough for the whole; else targets near the mean are tried, and what differs little from the best
  Price best_price_{};
  Limits limits_ = kUnlimited;
  std::vector<Seat> best_;
};

}  // namespace

Decision decide(const Load& load) {
  check_load(load);
  return Decider(load).decide();
}

}  // namespace moe_overlap
