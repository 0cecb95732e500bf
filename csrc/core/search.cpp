#include "search.h"

#include <algorithm>
#include <numeric>
#include <tuple>
#include <utility>

namespace moe_overlap {
namespace {

constexpr size_t kKept = 4;       // how many interleavings are simulated
constexpr size_t kAllOrders = 4;  // up to so many chunks every order of them is tried; beyond,
constexpr size_t kMoves = 640;    // so many moves, divided by the number of chunks

using Indices = std::vector<int64_t>;
// Compute-lane time, wire time, runs of ops so far, ops_before of the chunks done.
using Label = std::tuple<double, double, int64_t, Indices>;
// Predicted seconds between head and tail, chunks out of turn, runs of ops, chunk_order, ops_before.
using End = std::tuple<double, bool, int64_t, Indices, Indices>;

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

}  // namespace

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
