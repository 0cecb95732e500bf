#include "replication.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "copy_candidates.h"
#include "copy_price.h"

namespace moe_overlap {
namespace {

constexpr int64_t kTargets = 12;
constexpr std::array<int64_t, 4> kFewTargets{0, 2, 4, 7};
constexpr int64_t kRefined = 4;
constexpr int64_t kLeastTries = 16;
constexpr int64_t kWork = int64_t{1} << 14;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Decider {
 public:
  explicit Decider(const Load& load)
      : view_(load),
        pricer_(view_),
        candidates_(view_),
        tries_(std::max(kLeastTries, kWork / (load.ranks * load.experts))) {}

  Decision decide() {
    const Price left = pricer_.priced(view_.given, std::numeric_limits<double>::infinity());
    best_price_ = left;
    best_ = view_.load.seats;
    const Counts all_targets = [] {
      Counts places(static_cast<size_t>(kTargets));
      std::iota(places.begin(), places.end(), int64_t{0});
      return places;
    }();
    const Counts few_targets(kFewTargets.begin(), kFewTargets.end());
    if (view_.load.seats.size() > static_cast<size_t>(view_.load.experts)) try_targets(view_.given, all_targets, 0);
    try_targets(view_.given, all_targets, view_.load.most_copies);
    const auto wanted = tries_ > 0 ? candidates_.node_copies() : std::vector<NodeCopy>{};
    for (const size_t quarters : {4, 2, 1, 3}) {
      const size_t copies = wanted.size() * quarters / 4;
      if (copies == 0 || tries_ == 0) continue;
      const Seats start = candidates_.with_node_copies(wanted, copies);
      attempt(start);
      try_targets(start, few_targets, view_.load.most_copies - static_cast<int64_t>(copies));
    }
    while (tries_ > 0 && improved()) {
    }
    if (!(best_price_.seconds < left.seconds * (1 - view_.load.margin))) {
      return {left.seconds, left.seconds, true, view_.load.seats, left.relayed};
    }
    return {left.seconds, best_price_.seconds, false, std::move(best_), best_price_.relayed};
  }

 private:
  bool attempt(const Seats& seats) {
    if (tries_ == 0) return false;
    --tries_;
    const Price price = pricer_.priced(seats, best_price_.seconds * (1 - kTie));
    if (!(price.seconds < best_price_.seconds * (1 - kTie))) return false;
    best_price_ = price;
    best_.clear();
    for (size_t i = 0; i < seats.all.size(); ++i) {
      if (i < view_.load.seats.size() || seats.all[i].rows != 0) best_.push_back(seats.all[i]);
    }
    return true;
  }

  void try_targets(const Seats& start, const Counts& places, int64_t most_copies) {
    if (tries_ == 0) return;
    std::vector<std::vector<size_t>> own(view_.ranks);
    for (size_t i = 0; i < start.all.size(); ++i) own[static_cast<size_t>(start.all[i].rank)].push_back(i);
    for (auto& seats : own) {
      std::stable_sort(seats.begin(), seats.end(),
                       [&](size_t a, size_t b) { return start.all[a].rows > start.all[b].rows; });
    }
    const auto attempt_at = [&](int64_t target) {
      if (tries_ == 0) return false;
      return attempt(candidates_.fill(start, own, target, most_copies));
    };
    const int64_t most = *std::max_element(start.loads.begin(), start.loads.end());
    const int64_t mean =
        ceil_div(std::accumulate(start.loads.begin(), start.loads.end(), int64_t{0}), view_.load.ranks);
    int64_t fullest = 0;
    for (auto first = start.loads.begin(); first != start.loads.end(); first += view_.load.ranks_per_node) {
      const int64_t rows = std::accumulate(first, first + view_.load.ranks_per_node, int64_t{0});
      fullest = std::max(fullest, ceil_div(rows, view_.load.ranks_per_node));
    }
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
    attempt_at(fullest);
    for (int64_t i = 1; i <= kRefined && low >= 0; ++i) attempt_at(low + (high - low) * i / (kRefined + 1));
  }

  bool levelled(const std::vector<Seat>& all) {
    Seats seats = view_.linked(all);
    candidates_.level(seats);
    return attempt(seats);
  }

  // Whether seats that differ little from the best are better: the first of those is the best then.
  bool improved() {
    const Seats now = view_.linked(best_);
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
    std::vector<size_t> order(seats.size() - given);
    std::iota(order.begin(), order.end(), given);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return seats[a].rows < seats[b].rows; });
    for (const size_t i : order) {
      if (tries_ == 0) return false;
      std::vector<Seat> fewer = candidates_.inherited(seats, i);
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
  Price best_price_{};
  std::vector<Seat> best_;
};

}  // namespace

Decision decide(const Load& load) {
  check_load(load);
  return Decider(load).decide();
}

}  // namespace moe_overlap
