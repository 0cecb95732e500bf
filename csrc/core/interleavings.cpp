#include "interleavings.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <tuple>
#include <utility>

namespace moe_overlap {
namespace {

constexpr size_t kKept = 4;          // how many interleavings are handed on
constexpr size_t kAllOrders = 4;     // up to so many chunks every order of them is tried; beyond,
constexpr size_t kMoves = 640;       // so many moves, divided by the number of chunks
constexpr double kRounding = 1e-12;  // relative: more than what sums of the same durations in two orders differ by
constexpr double kNever = std::numeric_limits<double>::infinity();
constexpr int32_t kNone = -1;

using Indices = std::vector<int64_t>;
// Predicted seconds between head and tail, chunks out of turn, runs of ops, chunk_order, ops_before.
using End = std::tuple<double, bool, int64_t, Indices, Indices>;

Indices in_turn(size_t chunks) {
  Indices order(chunks);
  std::iota(order.begin(), order.end(), int64_t{0});
  return order;
}

// Johnson's rule for jobs with two stages: those with the shorter first stage, shortest first stage first, then the
// others, longest second stage first.
Indices johnson(const std::vector<std::pair<double, double>>& stages_s) {
  const auto rank = [&](int64_t job) {
    const auto [before_s, after_s] = stages_s[static_cast<size_t>(job)];
    return before_s < after_s ? std::make_tuple(false, before_s, job) : std::make_tuple(true, -after_s, job);
  };
  Indices order = in_turn(stages_s.size());
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return rank(a) < rank(b); });
  return order;
}

// Shortest first, longest first, and both ends towards the longest in the middle.
std::vector<Indices> by_total(const std::vector<double>& totals_s) {
  const auto total_s = [&](int64_t job) { return totals_s[static_cast<size_t>(job)]; };
  Indices rising = in_turn(totals_s.size());
  Indices falling = rising;
  std::sort(rising.begin(), rising.end(),
            [&](int64_t a, int64_t b) { return std::make_pair(total_s(a), a) < std::make_pair(total_s(b), b); });
  std::sort(falling.begin(), falling.end(),
            [&](int64_t a, int64_t b) { return std::make_pair(-total_s(a), a) < std::make_pair(-total_s(b), b); });
  Indices pyramid;
  for (size_t i = 0; i < rising.size(); i += 2) pyramid.push_back(rising[i]);
  const size_t odd = rising.size() / 2;
  for (size_t i = 0; i < odd; ++i) pyramid.push_back(rising[2 * (odd - i) - 1]);
  return {std::move(rising), std::move(falling), std::move(pyramid)};
}

bool equal_chunks(const Cut& cut) {
  const auto all_same = [](const std::vector<double>& values) {
    return std::all_of(values.begin(), values.end(), [&](double value) { return value == values[0]; });
  };
  return all_same(cut.first_s) && all_same(cut.experts_s) && all_same(cut.second_s);
}

bool in_turn_only(const Cut& cut) { return cut.deduplicated() || equal_chunks(cut); }

// The orders of the chunks to begin with, their own first.
std::vector<Indices> chunk_orders(const Cut& cut) {
  const size_t chunks = cut.first_s.size();
  std::vector<Indices> orders{in_turn(chunks)};
  if (in_turn_only(cut)) return orders;
  if (chunks <= kAllOrders) {
    Indices next = orders[0];
    while (std::next_permutation(next.begin(), next.end())) orders.push_back(next);
    return orders;
  }
  std::vector<std::pair<double, double>> outward, homeward, both;
  std::vector<double> totals_s;
  for (size_t c = 0; c < chunks; ++c) {
    outward.emplace_back(cut.first_s[c], cut.experts_s[c]);
    homeward.emplace_back(cut.experts_s[c], cut.second_s[c]);
    both.emplace_back(cut.first_s[c] + cut.experts_s[c], cut.experts_s[c] + cut.second_s[c]);
    totals_s.push_back(cut.first_s[c] + cut.experts_s[c] + cut.second_s[c]);
  }
  std::vector<Indices> more{johnson(outward), johnson(homeward), johnson(both)};
  for (Indices& order : by_total(totals_s)) more.push_back(std::move(order));
  for (Indices& order : more) {
    if (std::find(orders.begin(), orders.end(), order) == orders.end()) orders.push_back(std::move(order));
  }
  return orders;
}

// The best ends so far, best first. What is met twice counts twice.
class Best {
 public:
  explicit Best(double limit_s) : limit_s_(limit_s) {}

  // No end that takes longer is among the best, or asked for.
  double limit_s() const { return ends_.size() < kKept ? limit_s_ : std::min(limit_s_, std::get<0>(ends_.back())); }

  void add(End end) {
    ends_.insert(std::upper_bound(ends_.begin(), ends_.end(), end), std::move(end));
    if (ends_.size() > kKept) ends_.pop_back();
  }

  const std::vector<End>& ends() const { return ends_; }

 private:
  double limit_s_;
  std::vector<End> ends_;
};

// The dynamic programme over (chunks done, ops done) of one order of the chunks after another. A label is dropped where
// another one is as early or earlier on both lanes, and where nothing that begins with it can be among the best.
class Programme {
 public:
  Programme(const Cut& cut, double compute, double wire)
      : cut_(cut),
        compute_(compute),
        issue_s_(cut.issue_s * compute),
        chunks_(cut.first_s.size()),
        ops_s_(cut.ops_s),
        last_s_(cut.last_s),
        ops_left_s_(cut.ops_s.size() + 1),
        labels_(cut.ops_s.size() + 1),
        rest_(chunks_ + 1) {
    for (double& op_s : ops_s_) op_s *= compute;
    for (double& exchange_s : last_s_) exchange_s *= wire;
    for (size_t op = ops_s_.size(); op > 0; --op) ops_left_s_[op - 1] = ops_left_s_[op] + ops_s_[op - 1];
    for (size_t c = 0; c < chunks_; ++c) {
      first_s_.push_back(cut.first_s[c] * wire);
      experts_s_.push_back(cut.experts_s[c] * compute);
      second_s_.push_back(cut.second_s[c] * wire);
    }
    for (const double exchange_s : cut.ahead_s) ahead_s_.push_back(exchange_s * wire);
  }

  // Seconds that no end of this order is below.
  double least_s(const Indices& order) {
    begin(order);
    return at_least_s(labels_[0][0], 0, 0);
  }

  // Adds the ends of this order that are among the best, and returns the seconds of the first of them: more than the
  // limit, or never, where there is none.
  double run(const Indices& order, Best& best) {
    begin(order);
    limit_s_ = best.limit_s() * (1 + kRounding);
    if (at_least_s(labels_[0][0], 0, 0) > limit_s_) return kNever;
    for (size_t place = 0; place < chunks_; ++place) {
      take_ops(place);
      for (size_t done = 0; done < labels_.size(); ++done) take(order, place, done);
    }
    return finish(order, best);
  }

 private:
  struct Label {
    double comp_s;
    double wire_s;
    int64_t runs;  // of ops, so far
    int32_t step;  // the last chunk done, in `steps_`
  };
  // A chunk done, and how many ops before it: `ops_before` from its end.
  struct Step {
    int32_t previous;
    int32_t before;
  };
  // What is left from a place on, with no other op, takes at least the most of these: after the wire's time, after the
  // compute lane's, and from the beginning, as rows arrive; and after the compute lane's, without any wait for rows.
  struct Rest {
    double wire_s;
    double comp_s;
    double total_s;
    double busy_s;
  };

  // The lanes when all first exchanges are started, when these have arrived, and what is left after each place.
  void begin(const Indices& order) {
    double comp_s = 0, wire_s = 0;
    ahead_at_s_.clear();
    arrived_s_.clear();
    steps_.clear();
    for (const double exchange_s : ahead_s_) {
      comp_s += issue_s_;
      wire_s = std::max(wire_s, comp_s) + exchange_s;
      ahead_at_s_.push_back(wire_s);
    }
    for (const int64_t chunk : order) {
      comp_s += issue_s_;
      wire_s = std::max(wire_s, comp_s) + first_s_[static_cast<size_t>(chunk)];
      arrived_s_.push_back(wire_s);
    }
    for (std::vector<Label>& labels : labels_) labels.clear();
    labels_[0].push_back({comp_s, wire_s, 0, kNone});
    double after_s = waits() * issue_s_;
    for (const double deferred_s : cut_.deferred_s) after_s += deferred_s * compute_;
    Rest rest{issue_s_, after_s, 0, after_s};
    rest_[chunks_] = rest;
    for (size_t place = chunks_; place > 0; --place) {
      const auto chunk = static_cast<size_t>(order[place - 1]);
      const double experts_s = issue_s_ + experts_s_[chunk] + issue_s_;
      rest.wire_s += second_s_[chunk];
      rest.comp_s = experts_s + std::max(rest.wire_s, rest.comp_s);
      rest.total_s = std::max(rest.total_s, arrived_s_[place - 1] + rest.comp_s);
      rest.busy_s += experts_s;
      rest_[place - 1] = rest;
    }
  }

  double waits() const { return static_cast<double>(chunks_ + last_s_.size()); }

  double at_least_s(const Label& label, size_t place, size_t done) const {
    const Rest& rest = rest_[place];
    return std::max(std::max(label.wire_s + rest.wire_s, label.comp_s + rest.comp_s),
                    std::max(rest.total_s, label.comp_s + ops_left_s_[done] + rest.busy_s));
  }

  bool hopeless(const Label& label, size_t place, size_t done) const {
    return at_least_s(label, place, done) > limit_s_;
  }

  // As `ops_before` of the two compare.
  int32_t compared(int32_t one, int32_t other) const {
    if (one == other) return 0;
    const Step &a = steps_[static_cast<size_t>(one)], &b = steps_[static_cast<size_t>(other)];
    const int32_t first = compared(a.previous, b.previous);
    return first != 0 ? first : a.before - b.before;
  }

  // Keeps those labels for which no other is as early or earlier on both lanes.
  void keep_unbeaten(std::vector<Label>& labels) const {
    if (labels.size() < 2) return;
    const auto earlier = [this](const Label& a, const Label& b) {
      if (a.comp_s != b.comp_s) return a.comp_s < b.comp_s;
      if (a.wire_s != b.wire_s) return a.wire_s < b.wire_s;
      if (a.runs != b.runs) return a.runs < b.runs;
      return compared(a.step, b.step) < 0;
    };
    if (!std::is_sorted(labels.begin(), labels.end(), earlier)) std::sort(labels.begin(), labels.end(), earlier);
    size_t kept = 0;
    for (const Label& label : labels) {
      if (kept == 0 || label.wire_s < labels[kept - 1].wire_s) labels[kept++] = label;
    }
    labels.resize(kept);
  }

  // Every number of ops in front of the experts of a place.
  void take_ops(size_t place) {
    for (size_t op = 0; op < ops_s_.size(); ++op) {
      std::vector<Label>& after = labels_[op + 1];
      const size_t known = after.size();
      for (Label later : labels_[op]) {
        later.comp_s += ops_s_[op];
        if (!hopeless(later, place, op + 1)) after.push_back(later);
      }
      if (after.size() != known) keep_unbeaten(after);
    }
  }

  // The experts of a place and the start of its second exchange, where so many ops are done.
  void take(const Indices& order, size_t place, size_t done) {
    const auto chunk = static_cast<size_t>(order[place]);
    std::vector<Label>& labels = labels_[done];
    const auto before = static_cast<int32_t>(done);
    size_t kept = 0;
    for (Label label : labels) {
      if (place == 0) {
        for (const double at_s : ahead_at_s_) label.comp_s = std::max(label.comp_s, at_s) + issue_s_;
      }
      double end_s = std::max(label.comp_s, arrived_s_[place]) + issue_s_ + experts_s_[chunk];
      if (place + 1 == chunks_) {
        for (const double exchange_s : last_s_) {
          end_s += issue_s_;
          label.wire_s = std::max(label.wire_s, end_s) + exchange_s;
        }
      }
      label.comp_s = end_s + issue_s_;
      label.wire_s = std::max(label.wire_s, label.comp_s) + second_s_[chunk];
      if (hopeless(label, place + 1, done)) continue;
      label.runs += before > (label.step == kNone ? 0 : steps_[static_cast<size_t>(label.step)].before);
      steps_.push_back({label.step, before});
      label.step = static_cast<int32_t>(steps_.size()) - 1;
      labels[kept++] = label;
    }
    labels.resize(kept);
    keep_unbeaten(labels);
  }

  double finish(const Indices& order, Best& best) const {
    const bool out_of_turn = !std::is_sorted(order.begin(), order.end());
    double first_s = kNever;
    for (size_t done = 0; done < labels_.size(); ++done) {
      for (const Label& label : labels_[done]) {
        double end_s = label.comp_s;
        for (size_t op = done; op < ops_s_.size(); ++op) end_s += ops_s_[op];
        for (const double deferred_s : cut_.deferred_s) end_s += deferred_s * compute_;
        // Then a wait for each second exchange, all but the last of them mostly while that one is under way.
        end_s = std::max(end_s + waits() * issue_s_, label.wire_s + issue_s_);
        first_s = std::min(first_s, end_s);
        if (end_s > best.limit_s()) continue;
        best.add({end_s, out_of_turn, label.runs + (done < ops_s_.size()), order, ops_before(label.step)});
      }
    }
    return first_s;
  }

  Indices ops_before(int32_t step) const {
    Indices found(chunks_);
    for (size_t place = chunks_; place > 0; --place) {
      found[place - 1] = steps_[static_cast<size_t>(step)].before;
      step = steps_[static_cast<size_t>(step)].previous;
    }
    return found;
  }

  const Cut& cut_;
  double compute_;
  double issue_s_;
  size_t chunks_;
  std::vector<double> ops_s_, last_s_, ops_left_s_, first_s_, experts_s_, second_s_, ahead_s_;
  double limit_s_ = kNever;
  std::vector<double> ahead_at_s_, arrived_s_;
  std::vector<std::vector<Label>> labels_;  // by ops done
  std::vector<Step> steps_;
  std::vector<Rest> rest_;  // by place
};

// (From where, to where) of every move of one chunk, near ones first; to the next place it is the same both ways.
std::vector<std::pair<size_t, size_t>> moves(size_t chunks) {
  std::vector<std::pair<size_t, size_t>> found;
  for (size_t distance = 1; distance < chunks; ++distance) {
    for (size_t i = 0; i + distance < chunks; ++i) {
      found.emplace_back(i, i + distance);
      if (distance > 1) found.emplace_back(i + distance, i);
    }
  }
  return found;
}

void move_chunk(Indices& order, size_t source, size_t target) {
  const auto at = [&](size_t place) { return order.begin() + static_cast<std::ptrdiff_t>(place); };
  if (source < target) {
    std::rotate(at(source), at(source + 1), at(target + 1));
  } else {
    std::rotate(at(target), at(source), at(source + 1));
  }
}

// What is met on the way from the best order by moves of one chunk, near ones first, each kept if it helps.
void add_ends_after_moves(Programme& programme, Best& best) {
  double best_s = std::get<0>(best.ends()[0]);
  Indices order = std::get<3>(best.ends()[0]);
  const std::vector<std::pair<size_t, size_t>> every_move = moves(order.size());
  size_t left = kMoves / order.size();
  for (bool improved = true; improved;) {
    improved = false;
    for (const auto& [source, target] : every_move) {
      if (left-- == 0) return;
      move_chunk(order, source, target);
      const double moved_s = programme.run(order, best);
      if (moved_s < best_s) {
        best_s = moved_s;
        improved = true;
      } else {
        move_chunk(order, target, source);
      }
    }
  }
}

}  // namespace

std::vector<Order> best_interleavings(const Cut& cut, double compute, double wire, double limit_s) {
  Programme programme(cut, compute, wire);
  const bool moved = cut.first_s.size() > kAllOrders && !in_turn_only(cut);  // from the best, however long it takes
  Best best(moved ? kNever : limit_s * (1 + kRounding));
  std::vector<std::pair<double, Indices>> orders;  // those that may be short first: they spare the others
  for (Indices& order : chunk_orders(cut)) {
    const double least_s = programme.least_s(order);
    orders.emplace_back(least_s, std::move(order));
  }
  std::sort(orders.begin(), orders.end());
  for (const auto& [least_s, order] : orders) programme.run(order, best);
  if (moved) add_ends_after_moves(programme, best);
  std::vector<Order> found;
  for (const End& end : best.ends()) found.push_back({std::get<3>(end), std::get<4>(end)});
  return found;
}

}  // namespace moe_overlap
