#include "search.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "interleavings.h"

namespace moe_overlap {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();
constexpr double kTie = 1e-8;  // relative: more than what the caller takes for equal
constexpr double kFar = 1e6;   // times the best, where differences still count; for the caller they end far beyond

double sum(const std::vector<double>& values) { return std::accumulate(values.begin(), values.end(), 0.0); }

double least(const std::vector<double>& values) { return *std::min_element(values.begin(), values.end()); }

// Seconds that no order of a cut is below. The experts wait for a first exchange and are followed by a second one, and
// each lane has its work. While both lanes are busy, for x seconds, they do x / compute and x / wire seconds of it, and
// what is left of both takes its time: work + x * (1 - 1 / compute - 1 / wire) in all, where x is at most what the lane
// with less work has.
double at_least_s(const Cut& cut) {
  const auto exchanges = static_cast<double>(2 * cut.first_s.size() + cut.ahead_s.size() + cut.last_s.size());
  const double comp_s = sum(cut.ops_s) + sum(cut.experts_s) + sum(cut.deferred_s) + 2 * exchanges * cut.issue_s;
  const double wire_s = sum(cut.first_s) + sum(cut.second_s) + sum(cut.ahead_s) + sum(cut.last_s);
  const double gain = std::max(0.0, 1 / cut.compute_slowdown + 1 / cut.wire_slowdown - 1);
  const double both_s = std::min(comp_s * cut.compute_slowdown, wire_s * cut.wire_slowdown);
  const double through_s = least(cut.first_s) + sum(cut.experts_s) + least(cut.second_s);
  const double lanes_s = comp_s + wire_s - both_s * gain;
  const double ends_s = std::max(wire_s, through_s) + 2 * cut.issue_s;
  return (cut.head_s + std::max(lanes_s, ends_s) + cut.tail_s) * (1 - kTie);
}

// The fastest so far of all cuts.
class Fastest {
 public:
  // least_s: what none is below. Nothing is left out where the limit is 0.
  Fastest(size_t limit, double least_s) : limit_(limit), least_s_(least_s) {}

  void add(double seconds) {
    if (limit_ == 0) return;
    seconds_.push_back(seconds);
    std::push_heap(seconds_.begin(), seconds_.end());
    if (seconds_.size() <= limit_) return;
    std::pop_heap(seconds_.begin(), seconds_.end());
    seconds_.pop_back();
  }

  // What takes longer is not asked for.
  double limit_s() const {
    const bool enough = limit_ > 0 && seconds_.size() == limit_ && seconds_.front() < kFar * least_s_;
    return enough ? seconds_.front() * (1 + kTie) : kNever;
  }

 private:
  size_t limit_;
  double least_s_;
  std::vector<double> seconds_;  // a heap, its most in front
};

std::vector<int64_t> in_turn(const Cut& cut) {
  std::vector<int64_t> order(cut.first_s.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  return order;
}

// The first K ops in front of all experts, for every K.
std::vector<Order> slots_of(const Cut& cut) {
  std::vector<Order> orders;
  for (size_t slot = 0; slot <= cut.ops_s.size(); ++slot) {
    orders.push_back({in_turn(cut), std::vector<int64_t>(cut.first_s.size(), static_cast<int64_t>(slot))});
  }
  return orders;
}

void add_new(std::vector<Order>& orders, std::vector<Order> more) {
  for (Order& order : more) {
    const auto same = [&](const Order& other) {
      return other.chunk_order == order.chunk_order && other.ops_before == order.ops_before;
    };
    if (std::none_of(orders.begin(), orders.end(), same)) orders.push_back(std::move(order));
  }
}

void add_joined(const Cut& cut, Fastest& fastest, std::vector<Placement>& found) {
  Order order{in_turn(cut), std::vector<int64_t>(cut.first_s.size(), 0)};
  const double seconds = simulated_s(cut, order, true, fastest.limit_s());
  if (seconds == kNever) return;
  fastest.add(seconds);
  found.push_back({seconds, true, std::move(order)});
}

void add_overlapped(const Cut& cut, Fastest& fastest, std::vector<Placement>& found) {
  std::vector<Order> orders = slots_of(cut);
  const size_t slots = orders.size();
  // What takes longer than the limit at full speed takes longer.
  std::vector<Order> at_full_speed = best_interleavings(cut, 1, 1, fastest.limit_s() - cut.head_s - cut.tail_s);
  if (at_full_speed.empty()) return;
  add_new(orders, std::move(at_full_speed));
  if (cut.compute_slowdown != 1 || cut.wire_slowdown != 1) {
    add_new(orders, best_interleavings(cut, cut.compute_slowdown, cut.wire_slowdown, kNever));
  }
  std::vector<double> seconds(orders.size(), kNever);
  const auto simulate = [&](size_t first, size_t end) {
    for (size_t i = first; i < end; ++i) {
      seconds[i] = simulated_s(cut, orders[i], false, fastest.limit_s());
      if (seconds[i] < kNever) fastest.add(seconds[i]);
    }
  };
  simulate(slots, orders.size());  // mostly the fastest ones, which spare the others
  simulate(0, slots);
  for (size_t i = 0; i < orders.size(); ++i) {
    if (seconds[i] < kNever) found.push_back({seconds[i], false, std::move(orders[i])});
  }
}

}  // namespace

std::vector<std::vector<Placement>> search(const std::vector<Asked>& asked, size_t limit) {
  std::vector<std::pair<double, size_t>> order;  // what may be the fastest first: it spares the others
  for (size_t i = 0; i < asked.size(); ++i) {
    check_cut(asked[i].cut);
    if (!asked[i].cut.fetch_s.empty() || !asked[i].cut.return_s.empty()) {
      throw std::invalid_argument("fetch_s and return_s are of a step with copies, whose orders are not searched");
    }
    order.emplace_back(at_least_s(asked[i].cut), i);
  }
  std::sort(order.begin(), order.end());
  Fastest fastest(limit, order.empty() ? 0 : order[0].first);
  std::vector<std::vector<Placement>> found(asked.size());
  for (const auto& [least_s, i] : order) {
    if (least_s > fastest.limit_s()) continue;
    if (asked[i].joined) add_joined(asked[i].cut, fastest, found[i]);
    if (asked[i].overlapped) add_overlapped(asked[i].cut, fastest, found[i]);
  }
  const double limit_s = fastest.limit_s();
  for (std::vector<Placement>& placements : found) {
    const auto slower = [limit_s](const Placement& placement) { return placement.predicted_s > limit_s; };
    placements.erase(std::remove_if(placements.begin(), placements.end(), slower), placements.end());
  }
  return found;
}

}  // namespace moe_overlap
