#include "placement.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace moe_overlap {
namespace {

using Ints = std::vector<int64_t>;
constexpr int64_t kFree = -1;

size_t at(int64_t index) { return static_cast<size_t>(index); }

int64_t sum(const Ints& numbers) { return std::accumulate(numbers.begin(), numbers.end(), int64_t{0}); }

// One slot to be placed: an expert, its part of the expert's load, and the rank it has to be on.
struct Item {
  int64_t expert;
  double share;
  int64_t pinned;
};

// Items on packs with so much room each.
class Packing {
 public:
  Packing(const std::vector<Item>& items, const Ints& room, int64_t experts, bool distinct)
      : items_(items),
        room_(room),
        packs_(room.size()),
        load_(room.size(), 0.0),
        held_(room.size(), Ints(at(experts), 0)),
        distinct_(distinct) {}

  std::vector<std::vector<size_t>> run() {
    const bool pinned = std::any_of(items_.begin(), items_.end(), [](const Item& one) { return one.pinned != kFree; });
    const bool ones = std::all_of(room_.begin(), room_.end(), [](int64_t n) { return n == 1; });
    if (ones && !pinned) {
      for (size_t i = 0; i < items_.size(); ++i) put(i, i);
      return packs_;
    }
    std::vector<size_t> order;
    for (size_t i = 0; i < items_.size(); ++i) {
      if (items_[i].pinned != kFree) {
        put(i, at(items_[i].pinned));
      } else {
        order.push_back(i);
      }
    }
    std::stable_sort(order.begin(), order.end(),
                     [this](size_t a, size_t b) { return items_[a].share > items_[b].share; });
    for (const size_t i : order) put(i, lightest(i));
    if (distinct_) part_doubles();
    return packs_;
  }

 private:
  void put(size_t item, size_t pack) {
    packs_[pack].push_back(item);
    load_[pack] += items_[item].share;
    ++held_[pack][at(items_[item].expert)];
  }

  bool holds(size_t pack, size_t item) const { return held_[pack][at(items_[item].expert)] > 0; }

  size_t lightest(size_t item) const {
    size_t best = packs_.size();
    for (const bool any : {false, true}) {
      for (size_t pack = 0; pack < packs_.size(); ++pack) {
        if (static_cast<int64_t>(packs_[pack].size()) >= room_[pack]) continue;
        if (!any && distinct_ && holds(pack, item)) continue;
        if (best == packs_.size() || load_[pack] < load_[best]) best = pack;
      }
      if (best < packs_.size()) return best;
    }
    throw std::invalid_argument("more items than room");
  }

  // An expert that is twice on a rank changes places with one of another rank, the nearest in load.
  void part_doubles() {
    for (size_t pack = 0; pack < packs_.size(); ++pack) {
      for (size_t place = 0; place < packs_[pack].size(); ++place) {
        const size_t item = packs_[pack][place];
        if (held_[pack][at(items_[item].expert)] > 1 && items_[item].pinned == kFree) part(pack, place);
      }
    }
  }

  void part(size_t pack, size_t place) {
    const size_t item = packs_[pack][place];
    double least = std::numeric_limits<double>::infinity();
    size_t best_pack = pack;
    size_t best_place = place;
    for (size_t other = 0; other < packs_.size(); ++other) {
      if (other == pack || holds(other, item)) continue;
      for (size_t there = 0; there < packs_[other].size(); ++there) {
        const size_t candidate = packs_[other][there];
        if (items_[candidate].pinned != kFree || holds(pack, candidate)) continue;
        const double apart = std::fabs(items_[candidate].share - items_[item].share);
        if (apart < least) {
          least = apart;
          best_pack = other;
          best_place = there;
        }
      }
    }
    if (best_pack == pack) return;
    const size_t candidate = packs_[best_pack][best_place];
    std::swap(packs_[pack][place], packs_[best_pack][best_place]);
    --held_[pack][at(items_[item].expert)];
    ++held_[best_pack][at(items_[item].expert)];
    --held_[best_pack][at(items_[candidate].expert)];
    ++held_[pack][at(items_[candidate].expert)];
  }

  const std::vector<Item>& items_;
  const Ints& room_;
  std::vector<std::vector<size_t>> packs_;
  std::vector<double> load_;
  std::vector<Ints> held_;
  bool distinct_;
};

// One item for each of `experts`, then the replicas that `count` adds, as `extra` orders them.
std::vector<Item> items_of(const Ints& experts, const Ints& extra, const Ints& count, const std::vector<double>& load,
                           const Ints& homes) {
  std::vector<Item> items;
  for (size_t i = 0; i < experts.size(); ++i) {
    const int64_t home = homes.empty() ? kFree : homes[at(experts[i])];
    items.push_back({experts[i], load[at(experts[i])] / static_cast<double>(count[i]), home});
  }
  for (const int64_t i : extra) {
    items.push_back({experts[at(i)], load[at(experts[at(i)])] / static_cast<double>(count[at(i)]), kFree});
  }
  return items;
}

void append(const std::vector<Item>& items, const std::vector<std::vector<size_t>>& packs, Ints& found) {
  for (const auto& pack : packs) {
    for (const size_t item : pack) found.push_back(items[item].expert);
  }
}

// Ranks with any slot: more replicas of an expert would share a rank.
int64_t most_replicas(const Ints& slots) {
  return std::max<int64_t>(1, std::count_if(slots.begin(), slots.end(), [](int64_t n) { return n > 0; }));
}

// The experts in the order of their nodes: groups, packed by load, as many on each node.
Ints by_nodes(const std::vector<double>& load, int64_t nodes, int64_t groups) {
  const int64_t experts = static_cast<int64_t>(load.size());
  const int64_t size = experts / groups;
  std::vector<Item> items;
  for (int64_t group = 0; group < groups; ++group) {
    double total = 0.0;
    for (int64_t i = 0; i < size; ++i) total += load[at(group * size + i)];
    items.push_back({group, total, kFree});
  }
  const Ints room(at(nodes), groups / nodes);
  Ints order;
  append(items, Packing(items, room, groups, false).run(), order);
  Ints found;
  for (const int64_t group : order) {
    for (int64_t i = 0; i < size; ++i) found.push_back(group * size + i);
  }
  return found;
}

// The index for which better(i, best) holds over all others, of those that may be taken, else of all; ties: the first.
template <class May, class Better>
size_t best_of(size_t count, const May& may, const Better& better) {
  size_t best = count;
  for (const bool any : {false, true}) {
    for (size_t i = 0; i < count; ++i) {
      if ((any || may(i)) && (best == count || better(i, best))) best = i;
    }
    if (best < count) break;
  }
  return best;
}

void check(const Demand& demand) {
  if (demand.load.empty() || demand.slots.empty() || sum(demand.slots) < static_cast<int64_t>(demand.load.size())) {
    throw std::invalid_argument("as many slots as experts at least, and one of each");
  }
  if (!demand.homes.empty() && demand.homes.size() != demand.load.size()) {
    throw std::invalid_argument("a home for each expert, or none");
  }
}

}  // namespace

std::vector<int64_t> eplb(const Demand& demand, int64_t nodes, int64_t groups, bool distinct) {
  check(demand);
  const int64_t experts = static_cast<int64_t>(demand.load.size());
  const int64_t ranks = static_cast<int64_t>(demand.slots.size());
  if (nodes != 1 && !demand.homes.empty()) throw std::invalid_argument("one node where homes stay");
  if (nodes < 1 || groups < 1 || ranks % nodes || experts % groups || groups % nodes) {
    throw std::invalid_argument("groups that divide the experts, and nodes that divide groups and ranks");
  }
  const Ints order = by_nodes(demand.load, nodes, groups);
  Ints found;
  for (int64_t node = 0; node < nodes; ++node) {
    const Ints own(order.begin() + node * (experts / nodes), order.begin() + (node + 1) * (experts / nodes));
    const Ints slots(demand.slots.begin() + node * (ranks / nodes),
                     demand.slots.begin() + (node + 1) * (ranks / nodes));
    if (sum(slots) < experts / nodes) throw std::invalid_argument("a node with fewer slots than experts");
    const int64_t most = distinct ? most_replicas(slots) : std::numeric_limits<int64_t>::max();
    Ints count(own.size(), 1);
    Ints extra;
    for (int64_t more = sum(slots) - experts / nodes; more > 0; --more) {
      const auto share = [&](size_t i) { return demand.load[at(own[i])] / static_cast<double>(count[i]); };
      const size_t best = best_of(
          own.size(), [&](size_t i) { return count[i] < most; },
          [&](size_t i, size_t j) { return share(i) > share(j); });
      ++count[best];
      extra.push_back(static_cast<int64_t>(best));
    }
    const auto items = items_of(own, extra, count, demand.load, demand.homes);
    append(items, Packing(items, slots, experts, distinct).run(), found);
  }
  return found;
}

std::vector<int64_t> proportional(const Demand& demand, bool contiguous) {
  check(demand);
  const size_t experts = demand.load.size();
  const int64_t slots = sum(demand.slots);
  const int64_t most = contiguous ? std::numeric_limits<int64_t>::max() : most_replicas(demand.slots);
  double total = 0.0;
  for (const double one : demand.load) total += one;
  std::vector<double> goal(experts);
  Ints count(experts);
  for (size_t e = 0; e < experts; ++e) {
    goal[e] = total > 0.0 ? demand.load[e] / total * static_cast<double>(slots)
                          : static_cast<double>(slots) / static_cast<double>(experts);
    count[e] = std::min(most, static_cast<int64_t>(std::floor(std::max(goal[e], 1.0))));
  }
  const auto over = [&](size_t e) { return static_cast<double>(count[e]) - goal[e]; };
  int64_t given = sum(count);
  for (; given > slots; --given) {
    const size_t best =
        best_of(experts, [&](size_t e) { return count[e] > 1; }, [&](size_t e, size_t f) { return over(e) > over(f); });
    --count[best];
  }
  for (; given < slots; ++given) {
    const size_t best = best_of(
        experts, [&](size_t e) { return count[e] < most; }, [&](size_t e, size_t f) { return over(e) < over(f); });
    ++count[best];
  }
  Ints found;
  if (contiguous) {
    for (size_t e = 0; e < experts; ++e) found.insert(found.end(), at(count[e]), static_cast<int64_t>(e));
    return found;
  }
  Ints all(experts);
  std::iota(all.begin(), all.end(), int64_t{0});
  Ints extra;
  for (size_t e = 0; e < experts; ++e) extra.insert(extra.end(), at(count[e] - 1), static_cast<int64_t>(e));
  const auto items = items_of(all, extra, count, demand.load, demand.homes);
  append(items, Packing(items, demand.slots, static_cast<int64_t>(experts), true).run(), found);
  return found;
}

// The Hungarian method with potentials: rows enter one by one along a shortest augmenting path.
std::vector<int64_t> assign(const std::vector<std::vector<int64_t>>& cost) {
  const size_t rows = cost.size();
  const size_t columns = rows ? cost[0].size() : 0;
  for (const auto& row : cost) {
    if (row.size() != columns || columns < rows) throw std::invalid_argument("a column for every row, of one length");
  }
  constexpr int64_t kFar = std::numeric_limits<int64_t>::max();
  Ints of_row(rows + 1, 0), of_column(columns + 1, 0), row_in(columns + 1, 0), before(columns + 1, 0);
  for (size_t row = 1; row <= rows; ++row) {
    row_in[0] = static_cast<int64_t>(row);
    size_t column = 0;
    Ints least(columns + 1, kFar);
    std::vector<char> done(columns + 1, 0);
    do {
      done[column] = 1;
      const size_t here = at(row_in[column]);
      int64_t step = kFar;
      size_t next = 0;
      for (size_t j = 1; j <= columns; ++j) {
        if (done[j]) continue;
        const int64_t reduced = cost[here - 1][j - 1] - of_row[here] - of_column[j];
        if (reduced < least[j]) {
          least[j] = reduced;
          before[j] = static_cast<int64_t>(column);
        }
        if (least[j] < step) {
          step = least[j];
          next = j;
        }
      }
      for (size_t j = 0; j <= columns; ++j) {
        if (done[j]) {
          of_row[at(row_in[j])] += step;
          of_column[j] -= step;
        } else if (least[j] != kFar) {
          least[j] -= step;
        }
      }
      column = next;
    } while (row_in[column] != 0);
    while (column != 0) {
      const size_t previous = at(before[column]);
      row_in[column] = row_in[previous];
      column = previous;
    }
  }
  Ints found(rows, 0);
  for (size_t j = 1; j <= columns; ++j) {
    if (row_in[j] != 0) found[at(row_in[j] - 1)] = static_cast<int64_t>(j - 1);
  }
  return found;
}

}  // namespace moe_overlap
