#include "search.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace moe_overlap {
namespace {

constexpr size_t kComp = 0;
constexpr size_t kWire = 1;
constexpr size_t kKept = 4;       // how many interleavings are simulated
constexpr size_t kAllOrders = 4;  // up to so many chunks every order of them is tried; beyond,
constexpr size_t kMoves = 640;    // so many moves, divided by the number of chunks

using Indices = std::vector<int64_t>;
// Compute-lane time, wire time, runs of ops so far, ops_before of the chunks done.
using Label = std::tuple<double, double, int64_t, Indices>;
// Predicted seconds between head and tail, chunks out of turn, runs of ops, chunk_order, ops_before.
using End = std::tuple<double, bool, int64_t, Indices, Indices>;

void check_cut(const Cut& cut) {
  const size_t chunks = cut.first_s.size();
  if (chunks == 0 || cut.experts_s.size() != chunks || cut.second_s.size() != chunks) {
    throw std::invalid_argument("first_s, experts_s and second_s must have one entry per chunk, got " +
                                std::to_string(chunks) + ", " + std::to_string(cut.experts_s.size()) + " and " +
                                std::to_string(cut.second_s.size()));
  }
  if (cut.ahead_s.size() + cut.last_s.size() > 1) {
    throw std::invalid_argument("ahead_s and last_s must have one entry together, or none, got " +
                                std::to_string(cut.ahead_s.size()) + " and " + std::to_string(cut.last_s.size()));
  }
  if (cut.deduplicated() && cut.ops_s.empty()) {
    throw std::invalid_argument("ops_s must have an entry where ahead_s or last_s has one");
  }
  if (cut.fetch_s.size() > 2 || cut.return_s.size() > 1) {
    throw std::invalid_argument("fetch_s must have two entries at most and return_s one, got " +
                                std::to_string(cut.fetch_s.size()) + " and " + std::to_string(cut.return_s.size()));
  }
  const auto check = [](double seconds) {
    if (!std::isfinite(seconds) || seconds < 0) {
      throw std::invalid_argument("durations must be finite numbers of seconds >= 0");
    }
  };
  for (const double seconds : {cut.head_s, cut.tail_s, cut.issue_s}) check(seconds);
  for (const auto* durations_s : {&cut.ops_s, &cut.first_s, &cut.experts_s, &cut.second_s, &cut.deferred_s,
                                  &cut.ahead_s, &cut.last_s, &cut.fetch_s, &cut.return_s}) {
    for (const double seconds : *durations_s) check(seconds);
  }
  for (const double factor : {cut.compute_slowdown, cut.wire_slowdown}) {
    if (!std::isfinite(factor) || factor < 1) {
      throw std::invalid_argument("a slowdown must be a finite factor >= 1");
    }
  }
}

void check_order(const Cut& cut, const Order& order) {
  const size_t chunks = cut.first_s.size();
  bool fits = order.chunk_order.size() == chunks && order.ops_before.size() == chunks;
  for (size_t place = 0; fits && place < chunks; ++place) {
    const int64_t chunk = order.chunk_order[place];
    const int64_t before = order.ops_before[place];
    fits = chunk >= 0 && chunk < static_cast<int64_t>(chunks) && before >= 0 &&
           before <= static_cast<int64_t>(cut.ops_s.size());
  }
  if (!fits) throw std::invalid_argument("chunk_order and ops_before must have one entry per chunk, within the cut");
}

// The actions of a schedule on two lanes, in issue order, and their exact simulation: `simulate` with as few steps as two
// lanes need, and the same doubles. A lane runs its actions one at a time, so of the other lane's an action waits for
// one at most: a transfer for its start, and what reads it for the transfer.
class Program {
 public:
  Program(const Cut& cut, bool joined)
      : issue_s_(cut.issue_s), factor_{cut.compute_slowdown, cut.wire_slowdown}, joined_(joined) {}

  void compute(double seconds) { lanes_[kComp].push_back({seconds, 0}); }

  // An exchange: its start on the compute lane and its transfer. Returns the transfer, for `wait`.
  size_t exchange(double seconds) {
    compute(issue_s_);
    lanes_[kWire].push_back({seconds, lanes_[kComp].size()});
    const size_t transfer = lanes_[kWire].size();
    if (joined_) lanes_[kComp].push_back({issue_s_, transfer});
    return transfer;
  }

  void wait(size_t transfer) {
    if (!joined_) lanes_[kComp].push_back({issue_s_, transfer});
  }

  double makespan_s() const { return factor_[kComp] == 1 && factor_[kWire] == 1 ? at_full_speed() : slowed(); }

 private:
  struct Task {
    double seconds;
    size_t needs;  // so many of the other lane's have to be over
  };

  // A start is a maximum over what it needs.
  double at_full_speed() const {
    std::array<std::vector<double>, 2> end_s{{{0.0}, {0.0}}};  // of so many of a lane
    for (bool moved = true; moved;) {
      moved = false;
      for (const size_t lane : {kComp, kWire}) {
        const std::vector<double>& other = end_s[1 - lane];
        std::vector<double>& own = end_s[lane];
        while (own.size() <= lanes_[lane].size() && lanes_[lane][own.size() - 1].needs < other.size()) {
          const Task& task = lanes_[lane][own.size() - 1];
          own.push_back(std::max(own.back(), other[task.needs]) + task.seconds);
          moved = true;
        }
      }
    }
    return std::max(end_s[kComp].back(), end_s[kWire].back());
  }

  // From event to event, between which every rate is constant.
  double slowed() const {
    std::array<size_t, 2> over{};        // tasks of each lane
    std::array<double, 2> left_s{};      // of the one that runs, at full speed
    std::array<bool, 2> running{};
    double now_s = 0.0;
    while (true) {
      for (bool moved = true; moved;) {
        moved = false;
        for (const size_t lane : {kComp, kWire}) {
          if (running[lane] && left_s[lane] == 0) {
            running[lane] = false;
            ++over[lane];
            moved = true;
          }
          if (running[lane] || over[lane] == lanes_[lane].size()) continue;
          const Task& next = lanes_[lane][over[lane]];
          if (next.needs > over[1 - lane]) continue;
          running[lane] = moved = true;
          left_s[lane] = next.seconds;
        }
      }
      if (!running[kComp] && !running[kWire]) return now_s;
      const bool both = running[kComp] && running[kWire];
      const auto rate = [&](size_t lane) { return both ? factor_[lane] : 1.0; };
      double step_s = std::numeric_limits<double>::infinity();
      for (const size_t lane : {kComp, kWire}) {
        if (running[lane]) step_s = std::min(step_s, left_s[lane] * rate(lane));
      }
      for (const size_t lane : {kComp, kWire}) {
        if (!running[lane]) continue;
        const bool ends = left_s[lane] * rate(lane) == step_s;
        left_s[lane] = ends ? 0.0 : std::max(left_s[lane] - step_s / rate(lane), 0.0);
      }
      now_s += step_s;
    }
  }

  double issue_s_;
  std::array<double, 2> factor_;
  bool joined_;
  std::array<std::vector<Task>, 2> lanes_;
};

// Those labels for which no other is as early or earlier on both lanes.
std::vector<Label> unbeaten(std::vector<Label> labels) {
  std::sort(labels.begin(), labels.end());
  std::vector<Label> kept;
  for (Label& label : labels) {
    if (kept.empty() || std::get<1>(label) < std::get<1>(kept.back())) kept.push_back(std::move(label));
  }
  return kept;
}

// One chunk as the dynamic programme takes it: when the exchanges that are waited for before its experts have arrived,
// its own after the others, and which ones are started between these and its second exchange.
struct Taken {
  std::vector<double> ahead_at_s;
  double arrival_s;
  double experts_s;
  std::vector<double> between_s;
  double second_s;
};

// The labels after the experts of a chunk and the start of its second exchange, from those before, by ops done.
std::vector<Label> with_experts(const std::vector<Label>& labels, int64_t done, double issue_s, const Taken& chunk) {
  std::vector<Label> after;
  for (const auto& [known_comp_s, known_wire_s, runs, before] : labels) {
    double comp_s = known_comp_s;
    for (const double at_s : chunk.ahead_at_s) comp_s = std::max(comp_s, at_s) + issue_s;
    double end_s = std::max(comp_s, chunk.arrival_s) + issue_s + chunk.experts_s;
    double wire_s = known_wire_s;
    for (const double exchange_s : chunk.between_s) {
      end_s += issue_s;
      wire_s = std::max(wire_s, end_s) + exchange_s;
    }
    end_s += issue_s;
    const bool started = done > (before.empty() ? 0 : before.back());
    Indices extended = before;
    extended.push_back(done);
    after.emplace_back(end_s, std::max(wire_s, end_s) + chunk.second_s, runs + started, std::move(extended));
  }
  return unbeaten(std::move(after));
}

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

// The orders of the chunks to begin with, their own first.
std::vector<Indices> chunk_orders(const Cut& cut) {
  const size_t chunks = cut.first_s.size();
  std::vector<Indices> orders{in_turn(chunks)};
  if (cut.deduplicated() || equal_chunks(cut)) return orders;
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

// When each first exchange has arrived, by place in the order, what is ahead of them in `ahead_at_s`, and the lanes
// after all of them are started.
std::vector<double> arrivals(const Cut& cut, const Indices& order, double issue_s, double wire, double& comp_s,
                             double& wire_s, std::vector<double>& ahead_at_s) {
  std::vector<double> arrived_s;
  for (const double exchange_s : cut.ahead_s) {
    comp_s += issue_s;
    wire_s = std::max(wire_s, comp_s) + exchange_s * wire;
    ahead_at_s.push_back(wire_s);
  }
  for (const int64_t chunk : order) {
    comp_s += issue_s;
    wire_s = std::max(wire_s, comp_s) + cut.first_s[static_cast<size_t>(chunk)] * wire;
    arrived_s.push_back(wire_s);
  }
  return arrived_s;
}

// What the dynamic programme finds for one order of the chunks when every duration of a lane is multiplied by its
// factor.
void add_ends(const Cut& cut, double compute, double wire, const Indices& order, std::vector<End>& ends) {
  const double issue_s = cut.issue_s * compute;
  const size_t num_ops = cut.ops_s.size();
  double comp_s = 0;
  double wire_s = 0;
  std::vector<double> ahead_at_s;
  const std::vector<double> arrived_s = arrivals(cut, order, issue_s, wire, comp_s, wire_s, ahead_at_s);
  std::vector<std::vector<Label>> labels(num_ops + 1);  // by ops done
  labels[0].emplace_back(comp_s, wire_s, 0, Indices{});
  std::vector<double> last_s = cut.last_s;
  for (double& exchange_s : last_s) exchange_s *= wire;
  for (size_t place = 0; place < order.size(); ++place) {
    for (size_t op = 0; op < num_ops; ++op) {
      for (Label later : labels[op]) {
        std::get<0>(later) += cut.ops_s[op] * compute;
        labels[op + 1].push_back(std::move(later));
      }
      labels[op + 1] = unbeaten(std::move(labels[op + 1]));
    }
    const auto chunk = static_cast<size_t>(order[place]);
    const Taken taken{place == 0 ? ahead_at_s : std::vector<double>{}, arrived_s[place], cut.experts_s[chunk] * compute,
                      place + 1 == order.size() ? last_s : std::vector<double>{}, cut.second_s[chunk] * wire};
    for (size_t done = 0; done <= num_ops; ++done) {
      labels[done] = with_experts(labels[done], static_cast<int64_t>(done), issue_s, taken);
    }
  }
  const bool out_of_turn = !std::is_sorted(order.begin(), order.end());
  for (size_t done = 0; done <= num_ops; ++done) {
    for (auto& [label_comp_s, label_wire_s, runs, before] : labels[done]) {
      double end_s = label_comp_s;
      for (size_t op = done; op < num_ops; ++op) end_s += cut.ops_s[op] * compute;
      for (const double deferred_s : cut.deferred_s) end_s += deferred_s * compute;
      // Then a wait for each second exchange, all but the last of them mostly while that one is under way.
      const auto waits = static_cast<double>(order.size() + cut.last_s.size());
      end_s = std::max(end_s + waits * issue_s, label_wire_s + issue_s);
      ends.emplace_back(end_s, out_of_turn, runs + (done < num_ops), order, std::move(before));
    }
  }
}

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
void add_ends_after_moves(const Cut& cut, double compute, double wire, std::vector<End>& ends) {
  const End& best = *std::min_element(ends.begin(), ends.end());
  double best_s = std::get<0>(best);
  Indices order = std::get<3>(best);
  size_t left = kMoves / order.size();
  for (bool improved = true; improved;) {
    improved = false;
    for (const auto& [source, target] : moves(order.size())) {
      if (left-- == 0) return;
      move_chunk(order, source, target);
      const size_t known = ends.size();
      add_ends(cut, compute, wire, order, ends);
      double moved_s = std::get<0>(ends[known]);
      for (size_t end = known; end < ends.size(); ++end) moved_s = std::min(moved_s, std::get<0>(ends[end]));
      if (moved_s < best_s) {
        best_s = moved_s;
        improved = true;
      } else {
        move_chunk(order, target, source);
      }
    }
  }
}

std::vector<Order> best_interleavings(const Cut& cut, double compute, double wire) {
  std::vector<End> ends;
  for (const Indices& order : chunk_orders(cut)) add_ends(cut, compute, wire, order, ends);
  const bool in_turn_only = cut.deduplicated() || equal_chunks(cut);
  if (cut.first_s.size() > kAllOrders && !in_turn_only) add_ends_after_moves(cut, compute, wire, ends);
  std::sort(ends.begin(), ends.end());
  std::vector<Order> best;
  for (size_t i = 0; i < std::min(kKept, ends.size()); ++i) {
    best.push_back({std::move(std::get<3>(ends[i])), std::move(std::get<4>(ends[i]))});
  }
  return best;
}

// The weights of copies (Wf) in a program: who waits for them, and when.
class Weights {
 public:
  // The second group begins when the first has been waited for: behind the head, or, where several ops stand before the
  // first experts, in their middle. The first op of a deduplicated step reads the weights itself.
  Weights(const Cut& cut, const Order& order, Program& program) : groups_s_(cut.fetch_s), program_(program) {
    const int64_t before = cut.deduplicated() ? 0 : order.ops_before[0];
    middle_ = groups_s_.size() > 1 && before > 1 ? before / 2 : 0;
    if (!groups_s_.empty()) pending_.push_back(program.exchange(groups_s_[0]));
  }

  // Where so many ops have been done, 0 being right behind the head.
  void begin_second(int64_t done) {
    if (groups_s_.size() < 2 || done != middle_) return;
    wait();
    pending_.push_back(program_.exchange(groups_s_[1]));
  }

  // Waited for behind the rows of the first experts, as they began behind these.
  bool late() const { return middle_ > 0; }

  void wait() {
    for (const size_t transfer : pending_) program_.wait(transfer);
    pending_.clear();
  }

 private:
  const std::vector<double>& groups_s_;
  Program& program_;
  int64_t middle_;
  std::vector<size_t> pending_;
};

// One order of a cut that was checked.
double simulated_s(const Cut& cut, const Order& order, bool joined) {
  Program program(cut, joined);
  Weights weights(cut, order, program);
  program.compute(cut.head_s);
  weights.begin_second(0);
  std::vector<size_t> ahead, first, second;
  for (const double seconds : cut.ahead_s) ahead.push_back(program.exchange(seconds));
  for (const int64_t chunk : order.chunk_order) {
    first.push_back(program.exchange(cut.first_s[static_cast<size_t>(chunk)]));
  }
  int64_t done = 0;
  const auto next_op = [&] {
    if (cut.deduplicated() && done == 0) weights.wait();
    program.compute(cut.ops_s[static_cast<size_t>(done++)]);
  };
  for (size_t place = 0; place < order.chunk_order.size(); ++place) {
    const auto chunk = static_cast<size_t>(order.chunk_order[place]);
    while (done < order.ops_before[place]) {
      next_op();
      if (place == 0) weights.begin_second(done);
    }
    if (place == 0) {
      if (!weights.late()) weights.wait();
      for (const size_t transfer : ahead) program.wait(transfer);
    }
    program.wait(first[place]);
    weights.wait();
    program.compute(cut.experts_s[chunk]);
    if (place + 1 == order.chunk_order.size()) {
      for (const double seconds : cut.last_s) second.push_back(program.exchange(seconds));
    }
    second.push_back(program.exchange(cut.second_s[chunk]));
  }
  if (cut.deduplicated() && done == 0) next_op();
  std::vector<size_t> returned;
  for (const double seconds : cut.return_s) {
    program.compute(0);  // Wd, whose rows are in the figures of the deferred work
    returned.push_back(program.exchange(seconds));
  }
  for (const double seconds : cut.deferred_s) program.compute(seconds);
  while (done < static_cast<int64_t>(cut.ops_s.size())) next_op();
  for (const size_t transfer : second) program.wait(transfer);
  program.compute(cut.tail_s);
  for (const size_t transfer : returned) program.wait(transfer);
  return program.makespan_s();
}

}  // namespace

double makespan_s(const Cut& cut, const Order& order, bool joined) {
  check_cut(cut);
  check_order(cut, order);
  return simulated_s(cut, order, joined);
}

std::vector<Placement> search(const Cut& cut) {
  check_cut(cut);
  const Indices chunk_order = in_turn(cut.first_s.size());
  std::vector<Order> orders;
  for (size_t slot = 0; slot <= cut.ops_s.size(); ++slot) {
    orders.push_back({chunk_order, Indices(chunk_order.size(), static_cast<int64_t>(slot))});
  }
  const auto add_new = [&orders](std::vector<Order> more) {
    for (Order& order : more) {
      const auto same = [&](const Order& other) {
        return other.chunk_order == order.chunk_order && other.ops_before == order.ops_before;
      };
      if (std::none_of(orders.begin(), orders.end(), same)) orders.push_back(std::move(order));
    }
  };
  std::vector<Placement> found{{simulated_s(cut, orders[0], true), true, orders[0]}};
  add_new(best_interleavings(cut, 1, 1));
  if (cut.compute_slowdown != 1 || cut.wire_slowdown != 1) {
    add_new(best_interleavings(cut, cut.compute_slowdown, cut.wire_slowdown));
  }
  for (const Order& order : orders) found.push_back({simulated_s(cut, order, false), false, order});
  return found;
}

}  // namespace moe_overlap
