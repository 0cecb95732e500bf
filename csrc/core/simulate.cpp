#include "simulate.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace moe_overlap {
namespace {

using std::to_string;

constexpr int64_t kNone = -1;

using Slowdown = std::map<int64_t, double>;

void check_arguments(const std::vector<int64_t>& lane_of_action, const std::vector<double>& duration_s,
                     const std::vector<std::vector<int64_t>>& deps, const Slowdown& slowdown) {
  const size_t count = lane_of_action.size();
  if (duration_s.size() != count || deps.size() != count) {
    throw std::invalid_argument("lane_of_action, duration_s and deps must have one entry for each action, got " +
                                to_string(count) + ", " + to_string(duration_s.size()) + " and " +
                                to_string(deps.size()));
  }
  for (size_t i = 0; i < count; ++i) {
    if (!std::isfinite(duration_s[i]) || duration_s[i] < 0) {
      throw std::invalid_argument("duration_s of action " + to_string(i) +
                                  ": expected a finite number of seconds >= 0");
    }
    for (const int64_t dep : deps[i]) {
      if (dep < 0 || dep >= static_cast<int64_t>(count)) {
        throw std::invalid_argument("action " + to_string(i) + " depends on action " + to_string(dep) +
                                    ": expected 0 to " + to_string(static_cast<int64_t>(count) - 1));
      }
    }
  }
  for (const auto& [lane, factor] : slowdown) {
    if (!std::isfinite(factor) || factor < 1) {
      throw std::invalid_argument("slowdown of lane " + to_string(lane) + ": expected a finite factor >= 1");
    }
  }
}

// For each action, the action before it on its lane (kNone for the first).
std::vector<int64_t> lane_predecessors(const std::vector<int64_t>& lane_of_action) {
  std::unordered_map<int64_t, int64_t> last_of_lane;
  std::vector<int64_t> before(lane_of_action.size(), kNone);
  for (size_t i = 0; i < lane_of_action.size(); ++i) {
    const auto [entry, first] = last_of_lane.try_emplace(lane_of_action[i], kNone);
    before[i] = entry->second;
    entry->second = static_cast<int64_t>(i);
  }
  return before;
}

// The first action that did not run waits for a dependency: its lane predecessor has a lower number, so it did run.
[[noreturn]] void throw_deadlock(const std::vector<int64_t>& lane_of_action,
                                 const std::vector<std::vector<int64_t>>& deps, const std::vector<int64_t>& waiting) {
  for (size_t i = 0; i < waiting.size(); ++i) {
    if (waiting[i] == 0) continue;
    const auto stuck =
        std::find_if(deps[i].begin(), deps[i].end(), [&](int64_t d) { return waiting[static_cast<size_t>(d)] != 0; });
    throw std::invalid_argument("deadlock: action " + to_string(i) + " (lane " + to_string(lane_of_action[i]) +
                                ") never starts, it waits for action " + to_string(*stuck));
  }
  throw std::logic_error("throw_deadlock called although every action ran");
}

// What runs after what: dependencies and the order of a lane.
struct Graph {
  std::vector<std::vector<size_t>> successors;
  std::vector<int64_t> waiting;  // predecessors of each action that have not ended
};

Graph make_graph(const std::vector<int64_t>& lane_of_action, const std::vector<std::vector<int64_t>>& deps) {
  const size_t count = lane_of_action.size();
  const std::vector<int64_t> before = lane_predecessors(lane_of_action);
  Graph graph{std::vector<std::vector<size_t>>(count), std::vector<int64_t>(count, 0)};
  for (size_t i = 0; i < count; ++i) {
    graph.waiting[i] = static_cast<int64_t>(deps[i].size());
    for (const int64_t dep : deps[i]) graph.successors[static_cast<size_t>(dep)].push_back(i);
    if (before[i] != kNone) {
      ++graph.waiting[i];
      graph.successors[static_cast<size_t>(before[i])].push_back(i);
    }
  }
  return graph;
}

std::vector<size_t> without_predecessors(const Graph& graph) {
  std::vector<size_t> ready;
  for (size_t i = 0; i < graph.waiting.size(); ++i) {
    if (graph.waiting[i] == 0) ready.push_back(i);
  }
  return ready;
}

// Full speed: a start is a maximum over predecessors, so any order that respects them gives the same numbers.
std::vector<Interval> run(const std::vector<double>& duration_s, Graph& graph) {
  std::vector<Interval> times(duration_s.size(), Interval{0.0, 0.0});
  std::vector<size_t> ready = without_predecessors(graph);
  while (!ready.empty()) {
    const size_t i = ready.back();
    ready.pop_back();
    times[i].end_s = times[i].start_s + duration_s[i];
    for (const size_t next : graph.successors[i]) {
      times[next].start_s = std::max(times[next].start_s, times[i].end_s);
      if (--graph.waiting[next] == 0) ready.push_back(next);
    }
  }
  return times;
}

// Event by event. A lane's actions are chained, so at most one of each runs: two running are on two lanes.
std::vector<Interval> run_with_slowdown(const std::vector<double>& duration_s, const std::vector<double>& factor,
                                        Graph& graph) {
  std::vector<Interval> times(duration_s.size(), Interval{0.0, 0.0});
  std::vector<double> left_s = duration_s;  // at full speed
  std::vector<size_t> running = without_predecessors(graph);
  double now_s = 0.0;
  while (!running.empty()) {
    const auto first_ended =
        std::stable_partition(running.begin(), running.end(), [&](size_t i) { return left_s[i] != 0; });
    if (first_ended == running.end()) {
      const bool alone = running.size() == 1;
      const auto rate = [&](size_t i) { return alone ? 1.0 : factor[i]; };
      double step_s = left_s[running[0]] * rate(running[0]);
      for (const size_t i : running) step_s = std::min(step_s, left_s[i] * rate(i));
      for (const size_t i : running) {
        left_s[i] = left_s[i] * rate(i) == step_s ? 0.0 : std::max(left_s[i] - step_s / rate(i), 0.0);
      }
      now_s += step_s;
      continue;
    }
    const std::vector<size_t> ended(first_ended, running.end());
    running.erase(first_ended, running.end());
    for (const size_t i : ended) {
      times[i].end_s = now_s;
      for (const size_t next : graph.successors[i]) {
        if (--graph.waiting[next] == 0) {
          times[next].start_s = now_s;
          running.push_back(next);
        }
      }
    }
  }
  return times;
}

}  // namespace

std::vector<Interval> simulate(const std::vector<int64_t>& lane_of_action, const std::vector<double>& duration_s,
                               const std::vector<std::vector<int64_t>>& deps, const Slowdown& slowdown) {
  check_arguments(lane_of_action, duration_s, deps, slowdown);
  Graph graph = make_graph(lane_of_action, deps);
  const bool full_speed =
      std::all_of(slowdown.begin(), slowdown.end(), [](const auto& entry) { return entry.second == 1.0; });
  std::vector<Interval> times;
  if (full_speed) {
    times = run(duration_s, graph);
  } else {
    std::vector<double> factor(lane_of_action.size(), 1.0);
    for (size_t i = 0; i < factor.size(); ++i) {
      if (const auto entry = slowdown.find(lane_of_action[i]); entry != slowdown.end()) factor[i] = entry->second;
    }
    times = run_with_slowdown(duration_s, factor, graph);
  }
  if (std::any_of(graph.waiting.begin(), graph.waiting.end(), [](int64_t left) { return left != 0; })) {
    throw_deadlock(lane_of_action, deps, graph.waiting);
  }
  return times;
}

}  // namespace moe_overlap
