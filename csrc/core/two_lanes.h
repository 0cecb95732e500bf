// A window's actions on two lanes, compute and wire, and their exact simulation, for one way of cutting its exchange.
// The Python reference with the same doubles is in moe_overlap/planning/search.py and moe_overlap/planning/copied.py.
#pragma once

#include <cstdint>
#include <vector>

namespace moe_overlap {

// Durations in seconds: head, then per chunk a first exchange, experts and a second exchange, then the tail; ops stand
// anywhere between head and tail, deferred work after the last experts. issue_s is the compute lane's time of starting
// an exchange, and again of waiting for it. A deduplicated step has one exchange more, of ids and weights: in front of
// the first exchange (`ahead_s`, no entry or one) or in front of the last one (`last_s`, likewise); its chunks are
// taken in their own order, and its first op is done before deferred work. The slowdowns (>= 1) stretch a lane while
// the other one is busy. In a step with copies of experts `fetch_s` has the groups of their weights (Wf), in a forward,
// or `return_s` the one exchange of their gradients (Wg), in a backward; no search takes either.
struct Cut {
  double head_s;
  double tail_s;
  double issue_s;
  double compute_slowdown;
  double wire_slowdown;
  std::vector<double> ops_s;
  std::vector<double> first_s;
  std::vector<double> experts_s;
  std::vector<double> second_s;
  std::vector<double> deferred_s;
  std::vector<double> ahead_s = {};
  std::vector<double> last_s = {};
  std::vector<double> fetch_s = {};
  std::vector<double> return_s = {};

  bool deduplicated() const { return !ahead_s.empty() || !last_s.empty(); }
};

// The chunks as they are taken, and where the ops stand: ops_before[i] of them before the experts of the i-th chunk
// taken, the rest after the last.
struct Order {
  std::vector<int64_t> chunk_order;
  std::vector<int64_t> ops_before;
};

// The exact event simulation of one order of this cut: seconds from the start of the head, or of the first weights, to
// the end of the tail, or of the last gradients.
// Throws std::invalid_argument for a cut of which something is missing, negative or not finite.
double makespan_s(const Cut& cut, const Order& order, bool joined);

// Throws as makespan_s does.
void check_cut(const Cut& cut);

// makespan_s of a cut and an order that are known to be right; or infinity, where it is more than the limit.
double simulated_s(const Cut& cut, const Order& order, bool joined, double limit_s);

}  // namespace moe_overlap
