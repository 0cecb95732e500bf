#include "two_lanes.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

namespace moe_overlap {
namespace {

constexpr size_t kComp = 0;
constexpr size_t kWire = 1;
constexpr size_t kMoreExchanges = 4;  // beside the first and the second ones: ids and weights, and copies
constexpr double kRounding = 1e-12;   // relative: more than what sums of the same durations in two orders differ by
constexpr double kNever = std::numeric_limits<double>::infinity();

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

// The actions of a schedule on two lanes, in issue order, and their exact simulation: `simulate` with as few steps as
// two lanes need, and the same doubles. A lane runs its actions one at a time, so of the other lane's an action waits
// for one at most: a transfer for its start, and what reads it for the transfer. At full speed an action's end follows
// as soon as it is issued; where lanes slow each other down all of them have to be known.
class Program {
 public:
  Program(const Cut& cut, bool joined)
      : issue_s_(cut.issue_s),
        factor_{cut.compute_slowdown, cut.wire_slowdown},
        slowed_(factor_[kComp] != 1 || factor_[kWire] != 1),
        joined_(joined) {
    const size_t exchanges = 2 * cut.first_s.size() + kMoreExchanges;
    arrived_s_.reserve(exchanges);
    if (!slowed_) return;
    lanes_[kWire].reserve(exchanges);
    lanes_[kComp].reserve(2 * exchanges + cut.first_s.size() + cut.ops_s.size() + cut.deferred_s.size() + 3);
  }

  void compute(double seconds) { run(seconds, 0); }

  // An exchange: its start on the compute lane and its transfer. Returns the transfer, for `wait`.
  size_t exchange(double seconds) {
    compute(issue_s_);
    if (slowed_) lanes_[kWire].push_back({seconds, lanes_[kComp].size()});
    wire_s_ = std::max(wire_s_, comp_s_) + seconds;
    arrived_s_.push_back(wire_s_);
    const size_t transfer = arrived_s_.size();
    if (joined_) run(issue_s_, transfer);
    return transfer;
  }

  void wait(size_t transfer) {
    if (!joined_) run(issue_s_, transfer);
  }

  // Infinity where that is more than the limit.
  double makespan_s(double limit_s) const {
    const double at_full_speed_s = std::max(comp_s_, wire_s_);
    if (!(at_full_speed_s <= limit_s * (1 + kRounding))) return kNever;
    return slowed_ ? slowed_s() : at_full_speed_s;
  }

 private:
  struct Task {
    double seconds;
    size_t needs;  // so many of the other lane's have to be over
  };

  // On the compute lane. A start is a maximum over what it needs.
  void run(double seconds, size_t needs) {
    if (slowed_) lanes_[kComp].push_back({seconds, needs});
    if (needs > 0) comp_s_ = std::max(comp_s_, arrived_s_[needs - 1]);
    comp_s_ += seconds;
  }

  // From event to event, between which every rate is constant.
  double slowed_s() const {
    std::array<size_t, 2> over{};    // tasks of each lane
    std::array<double, 2> left_s{};  // of the one that runs, at full speed
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
  bool slowed_;
  bool joined_;
  double comp_s_ = 0, wire_s_ = 0;  // of what is issued, at full speed
  std::vector<double> arrived_s_;   // by transfer
  std::array<std::vector<Task>, 2> lanes_;
};

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

}  // namespace

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

double simulated_s(const Cut& cut, const Order& order, bool joined, double limit_s) {
  Program program(cut, joined);
  Weights weights(cut, order, program);
  program.compute(cut.head_s);
  weights.begin_second(0);
  std::vector<size_t> ahead, first, second;
  first.reserve(order.chunk_order.size());
  second.reserve(order.chunk_order.size() + cut.last_s.size());
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
  return program.makespan_s(limit_s);
}

double makespan_s(const Cut& cut, const Order& order, bool joined) {
  check_cut(cut);
  check_order(cut, order);
  return simulated_s(cut, order, joined, kNever);
}

}  // namespace moe_overlap
