#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "core/search.h"
#include "core/simulate.h"

using moe_overlap::Asked;
using moe_overlap::Cut;
using moe_overlap::makespan_s;
using moe_overlap::Placement;

namespace {

constexpr double kRounding = 1e-12;  // sums of a few dozen durations, taken in different orders
#ifdef MOE_OVERLAP_SLOW_BUILD
constexpr int kShare = 100;  // under sanitizers, one window of so many
#else
constexpr int kShare = 1;
#endif

// Every candidate of one cut.
std::vector<Placement> search_cut(const Cut& cut) { return moe_overlap::search({Asked{cut}}, 0)[0]; }

double best_s(const Cut& cut) {
  double best = INFINITY;
  for (const Placement& placement : search_cut(cut)) best = std::min(best, placement.predicted_s);
  return best;
}

// Every order in which the actions of a window can be issued, found depth first: first exchanges, experts and second
// exchanges in any order of the chunks (each its own), ops and deferred work anywhere they may stand. Nothing of the
// reasons that make the search's space small is used, but of chunks that do not differ the lower numbers go first. What
// cannot end before `limit_s` is cut off.
class EveryOrder {
 public:
  EveryOrder(const Cut& cut, double limit_s) : cut_(cut), best_s_(limit_s), comp_s_(cut.head_s) {
    const size_t chunks = cut.first_s.size();
    arrived_.assign(chunks, kNotYet);
    computed_.assign(chunks, false);
    back_.assign(chunks, kNotYet);
    comp_left_s_ = cut.tail_s;
    for (const double op_s : cut.ops_s) comp_left_s_ += op_s;
    for (const double deferred_s : cut.deferred_s) comp_left_s_ += deferred_s;
    for (size_t c = 0; c < chunks; ++c) {
      comp_left_s_ += cut.experts_s[c] + 4 * cut.issue_s;  // two starts, two waits
      wire_left_s_ += cut.first_s[c] + cut.second_s[c];
      equal_ = equal_ && cut.first_s[c] == cut.first_s[0] && cut.experts_s[c] == cut.experts_s[0] &&
               cut.second_s[c] == cut.second_s[0];
    }
  }

  // The shortest makespan, or the limit where all are longer.
  double run() {
    visit();
    return best_s_;
  }

 private:
  static constexpr double kNotYet = -1;

  void visit() {
    if (comp_s_ + comp_left_s_ >= best_s_ || wire_s_ + wire_left_s_ + cut_.issue_s + cut_.tail_s >= best_s_) return;
    bool complete = op_ == cut_.ops_s.size() && group_ == cut_.deferred_s.size();
    bool all_computed = true;
    for (size_t c = 0; c < back_.size(); ++c) {
      complete = complete && back_[c] != kNotYet;
      all_computed = all_computed && computed_[c];
      if (arrived_[c] == kNotYet && !(equal_ && c > 0 && arrived_[c - 1] == kNotYet)) {
        exchange(cut_.first_s[c], arrived_[c]);
      }
      if (!computed_[c] && arrived_[c] != kNotYet) experts(c);
      if (computed_[c] && back_[c] == kNotYet) exchange(cut_.second_s[c], back_[c]);
    }
    if (op_ < cut_.ops_s.size()) compute(cut_.ops_s[op_], op_);
    if (all_computed && group_ < cut_.deferred_s.size()) compute(cut_.deferred_s[group_], group_);
    if (complete) finish();
  }

  void finish() {
    std::vector<double> arrivals = back_;
    std::sort(arrivals.begin(), arrivals.end());
    double end_s = comp_s_;
    for (const double arrival_s : arrivals) end_s = std::max(end_s, arrival_s) + cut_.issue_s;
    best_s_ = std::min(best_s_, end_s + cut_.tail_s);
  }

  void exchange(double seconds, double& end_s) {
    const double comp_s = comp_s_, wire_s = wire_s_, comp_left_s = comp_left_s_, wire_left_s = wire_left_s_;
    comp_s_ += cut_.issue_s;
    wire_s_ = end_s = std::max(wire_s_, comp_s_) + seconds;
    comp_left_s_ -= cut_.issue_s;
    wire_left_s_ -= seconds;
    visit();
    end_s = kNotYet;
    comp_s_ = comp_s, wire_s_ = wire_s, comp_left_s_ = comp_left_s, wire_left_s_ = wire_left_s;
  }

  void experts(size_t c) {
    const double comp_s = comp_s_, comp_left_s = comp_left_s_;
    comp_s_ = std::max(comp_s_, arrived_[c]) + cut_.issue_s + cut_.experts_s[c];
    comp_left_s_ -= cut_.issue_s + cut_.experts_s[c];
    computed_[c] = true;
    visit();
    computed_[c] = false;
    comp_s_ = comp_s, comp_left_s_ = comp_left_s;
  }

  void compute(double seconds, size_t& next) {
    const double comp_s = comp_s_, comp_left_s = comp_left_s_;
    comp_s_ += seconds;
    comp_left_s_ -= seconds;
    ++next;
    visit();
    --next;
    comp_s_ = comp_s, comp_left_s_ = comp_left_s;
  }

  const Cut& cut_;
  double best_s_;
  double comp_s_, wire_s_ = 0;
  double comp_left_s_, wire_left_s_ = 0;
  std::vector<double> arrived_, back_;
  std::vector<bool> computed_;
  size_t op_ = 0, group_ = 0;
  bool equal_ = true;
};

class RandomCuts {
 public:
  explicit RandomCuts(uint64_t seed) : random_(seed) {}

  double uniform() { return std::uniform_real_distribution<double>(0, 1)(random_); }
  size_t below(size_t count) { return random_() % count; }

  // Zero, one, or anything between: ties and gaps of length zero are where such searches go wrong.
  double seconds() {
    const size_t kind = below(8);
    return kind < 2 ? static_cast<double>(kind) : uniform();
  }

  Cut cut(size_t max_chunks, size_t max_ops) {
    Cut cut{seconds(), seconds(), 0, 1, 1, {}, {}, {}, {}, {}};
    const double first_s = seconds(), experts_s = seconds(), second_s = seconds();
    const size_t skew = below(3);  // equal chunks, chunks of different sizes, or anything
    for (size_t c = 1 + below(max_chunks); c > 0; --c) {
      const double size = skew == 0 ? 1 : 0.25 + uniform();
      cut.first_s.push_back(skew == 2 ? seconds() : first_s * size);
      cut.experts_s.push_back(skew == 2 ? seconds() : experts_s * size);
      cut.second_s.push_back(skew == 2 ? seconds() : second_s * size);
    }
    for (size_t ops = below(max_ops + 1); ops > 0; --ops) cut.ops_s.push_back(seconds());
    for (size_t groups = below(3); groups > 0; --groups) cut.deferred_s.push_back(seconds());
    return cut;
  }

  // The same where starts and waits cost time and lanes slow each other down.
  Cut slowed(size_t max_chunks, size_t max_ops) {
    Cut found = below(3) == 0 ? deduplicated(max_chunks, max_ops) : cut(max_chunks, max_ops);
    if (below(2) == 0) found.issue_s = 0.1 * uniform();
    if (below(2) == 0) found.compute_slowdown = 1 + uniform();
    if (below(2) == 0) found.wire_slowdown = 1 + uniform();
    return found;
  }

  // The same of a deduplicated step, forward or backward.
  Cut deduplicated(size_t max_chunks, size_t max_ops) {
    Cut found = cut(max_chunks, max_ops);
    found.ops_s.insert(found.ops_s.begin(), seconds());
    (below(2) == 0 ? found.ahead_s : found.last_s).push_back(seconds());
    return found;
  }

 private:
  std::mt19937_64 random_;
};

}  // namespace

TEST(search_refuses_lists_of_different_lengths) {
  CHECK_THROWS(search_cut(Cut{0, 0, 0, 1, 1, {}, {}, {}, {}, {}}), std::invalid_argument, "one entry per chunk");
  CHECK_THROWS(search_cut(Cut{0, 0, 0, 1, 1, {}, {1, 2}, {1}, {1, 2}, {}}), std::invalid_argument, "got 2, 1 and 2");
  CHECK_THROWS(search_cut(Cut{0, 0, 0, 1, 1, {}, {1}, {-1}, {1}, {}}), std::invalid_argument, "seconds >= 0");
  CHECK_THROWS(search_cut(Cut{0, 0, 0, 1, 1, {NAN, 1}, {1, 2}, {NAN, 1}, {1, 1}, {}}), std::invalid_argument,
               "seconds >= 0");
  CHECK_THROWS(search_cut(Cut{0, 0, 0, 1, 1, {1}, {1}, {1}, {1}, {}, {1}, {1}}), std::invalid_argument, "got 1 and 1");
  CHECK_THROWS(search_cut(Cut{0, 0, 0, 1, 1, {1}, {1}, {1}, {1}, {}, {1, 1}, {}}), std::invalid_argument,
               "got 2 and 0");
  CHECK_THROWS(search_cut(Cut{0, 0, 0, 1, 1, {}, {1}, {1}, {1}, {}, {}, {1}}), std::invalid_argument, "ops_s");
  CHECK_THROWS(search_cut(Cut{0, 0, 0, 1, 1, {1}, {1}, {1}, {1}, {}, {NAN}, {}}), std::invalid_argument,
               "seconds >= 0");
  CHECK_THROWS(search_cut(Cut{0, 0, 0, 1, 1, {}, {1}, {1}, {1}, {}, {}, {}, {1}, {}}), std::invalid_argument, "copies");
  CHECK_THROWS(search_cut(Cut{0, 0, 0, 0.5, 1, {}, {1}, {1}, {1}, {}}), std::invalid_argument, "factor >= 1");
}

TEST(search_figures_are_simulations_of_the_orders_beside_them) {
  RandomCuts random(2);
  for (int round = 0; round < 300; ++round) {
    Cut cut = round % 2 == 0 ? random.cut(6, 4) : random.deduplicated(6, 4);
    cut.issue_s = 0.1 * random.uniform();
    cut.wire_slowdown = 1 + random.uniform();
    for (const Placement& placement : search_cut(cut)) {
      CHECK(placement.predicted_s == makespan_s(cut, placement.order, placement.joined));
      const auto& order = placement.order.chunk_order;
      CHECK(!cut.deduplicated() || std::is_sorted(order.begin(), order.end()));
    }
  }
}

// With a limit what is left out is slower than so many others, by more than what counts as equal. All else is the same.
TEST(search_with_a_limit_leaves_out_what_is_slower) {
  RandomCuts random(6);
  size_t left_out = 0;
  for (int round = 0; round < 20000 / kShare; ++round) {
    std::vector<Asked> asked;
    for (size_t cuts = 1 + random.below(5); cuts > 0; --cuts) {
      asked.push_back({random.slowed(round % 50 == 0 ? 16 : 5, 4), random.below(4) > 0, random.below(4) > 0});
    }
    const size_t limit = 1 + random.below(20);
    const auto every = search(asked, 0), found = search(asked, limit);
    std::vector<double> seconds;
    for (const auto& placements : every) {
      for (const Placement& placement : placements) seconds.push_back(placement.predicted_s);
    }
    std::sort(seconds.begin(), seconds.end());
    const double last_s = limit < seconds.size() ? seconds[limit - 1] * (1 + 2e-9) : INFINITY;
    for (size_t i = 0; i < asked.size(); ++i) {
      size_t next = 0;
      for (const Placement& placement : every[i]) {
        const bool same = next < found[i].size() && found[i][next].predicted_s == placement.predicted_s &&
                          found[i][next].joined == placement.joined &&
                          found[i][next].order.chunk_order == placement.order.chunk_order &&
                          found[i][next].order.ops_before == placement.order.ops_before;
        CHECK(same || placement.predicted_s > last_s);
        next += same;
        left_out += !same;
      }
      CHECK(next == found[i].size());
    }
  }
  CHECK(left_out > 100000 / kShare);
}

// Ids and weights are in front of all rows, the rows that stay fill their time and the dispatch's; and the other way
// round.
TEST(search_of_deduplicated_cuts_by_hand) {
  const Cut forward{1, 1, 0, 1, 1, {3, 4}, {3}, {2}, {4}, {}, {0.5}, {}};
  CHECK(best_s(forward) == 1 + 3.5 + 2 + 4 + 1);
  const Cut backward{1, 1, 0, 1, 1, {4}, {1}, {2}, {3}, {1}, {}, {0.5}};
  CHECK(best_s(backward) == 1 + 1 + 2 + 5 + 1);
  const Cut started{1, 1, 0.25, 1, 1, {0}, {3}, {2}, {4}, {}, {0.5}, {}};
  // The second start lies beside the ids on the wire, and the wait for these beside the rows.
  CHECK(best_s(started) == 1 + 0.25 + 0.5 + 3 + 0.25 + 2 + 0.25 + 4 + 0.25 + 1);
}

// The limit given to EveryOrder is just above the search's figure. So it returns that limit where the figure is better
// than any order is, and something lower where an order is better: either fails.
TEST(search_misses_nothing_among_all_orders_of_100000_windows) {
  RandomCuts random(3);
  double worst = 0;
  for (int round = 0; round < 100000 / kShare; ++round) {
    const Cut cut = random.cut(3, 3);
    const double found_s = best_s(cut);
    const double limit_s = found_s * (1 + 1e-9) + 1e-9;
    const double shortest_s = EveryOrder(cut, limit_s).run();
    CHECK(shortest_s < limit_s);
    CHECK(std::fabs(found_s - shortest_s) <= kRounding * (1 + shortest_s));
    worst = std::max(worst, found_s - shortest_s);
  }
  std::printf("      longest found minus shortest possible: %.2g s of windows of about 3 s\n", worst);
}

TEST(search_misses_nothing_with_four_chunks) {
  RandomCuts random(4);
  for (int round = 0; round < 1000 / kShare; ++round) {
    const Cut cut = random.cut(4, 2);
    const double found_s = best_s(cut);
    const double limit_s = found_s * (1 + 1e-9) + 1e-9;
    const double shortest_s = EveryOrder(cut, limit_s).run();
    CHECK(shortest_s < limit_s);
    CHECK(std::fabs(found_s - shortest_s) <= kRounding * (1 + shortest_s));
  }
}

// What starting and waiting costs can make it worth while to start a first exchange later. The bound is of the module's
// first rule; the figure printed is what that means where it costs up to 2 % of an exchange.
TEST(search_with_issue_costs_stays_within_its_bound) {
  RandomCuts random(5);
  double worst = 0;
  for (int round = 0; round < 20000 / kShare; ++round) {
    Cut cut = random.cut(3, 3);
    cut.issue_s = round % 2 == 0 ? 0.5 * random.uniform() : 0.01 * random.uniform();
    const double found_s = best_s(cut);
    const double limit_s = found_s * (1 + 1e-9) + 1e-9;
    const double shortest_s = EveryOrder(cut, limit_s).run();
    CHECK(shortest_s < limit_s);
    const double bound_s = 2 * static_cast<double>(cut.first_s.size() - 1) * cut.issue_s;
    CHECK(found_s <= shortest_s + bound_s + kRounding * (1 + shortest_s));
    if (round % 2 == 1) worst = std::max(worst, found_s / shortest_s - 1);
  }
  std::printf("      worst of the small issue costs: %.2f %% above the shortest\n", 100 * worst);
}
