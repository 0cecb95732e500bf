#include "relays.h"

#include <algorithm>
#include <utility>

namespace moe_overlap {
namespace {

constexpr size_t kInter = 0;
constexpr size_t kIntra = 1;

// The copies of one expert.
struct Orders {
  CopyOrder* first;
  CopyOrder* last;

  CopyOrder* begin() const { return first; }
  CopyOrder* end() const { return last; }
  size_t size() const { return static_cast<size_t>(last - first); }
  int64_t home() const { return first->home; }
};

// Copies by group, wire, direction and rank, and the most of each group and wire.
class Loads {
 public:
  using Most = std::array<Ports, kGroups>;

  Loads(int64_t ranks, int64_t ranks_per_node)
      : ranks_(static_cast<size_t>(ranks)), of_(kGroups * kWires * 2 * ranks_, 0) {
    node_.reserve(ranks_);
    for (int64_t rank = 0; rank < ranks; ++rank) node_.push_back(rank / ranks_per_node);
  }

  const Most& most() const { return most_; }

  Ports cost() const { return {most_[0][kInter] + most_[1][kInter], most_[0][kIntra] + most_[1][kIntra]}; }

  // The copies of one expert, the first `first` from its home in group 0, the others in group 1.
  void send(const Orders& orders, size_t first) {
    holders_.assign(1, orders.home());
    sent_.clear();
    size_t number = 0;
    for (const CopyOrder& one : orders) {
      const bool later = number++ >= first;
      add(later ? 1 : 0, later ? nearest(one.rank) : orders.home(), one.rank);
      if (!later) holders_.push_back(one.rank);
    }
  }

  // What `send` would cost.
  Ports cost_of(const Orders& orders, size_t first) {
    const Most before = most_;
    send(orders, first);
    const Ports found = cost();
    for (const size_t place : sent_) --of_[place];
    most_ = before;
    return found;
  }

  int64_t node_of(int64_t rank) const { return node_[static_cast<size_t>(rank)]; }

 private:
  size_t wire(int64_t one, int64_t other) const { return node_of(one) == node_of(other) ? kIntra : kInter; }

  size_t place(size_t group, size_t wire, size_t direction, int64_t rank) const {
    return ((group * kWires + wire) * 2 + direction) * ranks_ + static_cast<size_t>(rank);
  }

  void add(size_t group, int64_t sender, int64_t rank) {
    const size_t lane = wire(sender, rank);
    for (const size_t at : {place(group, lane, 0, sender), place(group, lane, 1, rank)}) {
      sent_.push_back(at);
      most_[group][lane] = std::max(most_[group][lane], ++of_[at]);
    }
  }

  // Of those that have the expert, one of the same node if there is one, with least to do; the first of those that tie.
  int64_t nearest(int64_t rank) const {
    int64_t best = holders_.front();
    bool best_far = wire(best, rank) == kInter;
    int64_t best_load = of_[place(1, wire(best, rank), 0, best)];
    for (const int64_t holder : holders_) {
      const size_t lane = wire(holder, rank);
      const bool far = lane == kInter;
      const int64_t load = of_[place(1, lane, 0, holder)];
      if (far < best_far || (far == best_far && load < best_load)) {
        best = holder;
        best_far = far;
        best_load = load;
      }
    }
    return best;
  }

  size_t ranks_;
  std::vector<int64_t> node_;  // of each rank
  std::vector<int64_t> of_;
  Most most_{};
  std::vector<int64_t> holders_;
  std::vector<size_t> sent_;
};

// One rank of each other node, the first from the home's place in its own, then the others, both in the order of a ring
// that begins at the home; how many of the first there are.
size_t first_to_last(const Orders& orders, const Loads& loads, int64_t ranks_per_node) {
  const int64_t home = orders.home();
  const int64_t node = loads.node_of(home);
  if (orders.size() == 1) return loads.node_of(orders.first->rank) == node ? 0 : 1;
  std::sort(orders.begin(), orders.end(), [home](const CopyOrder& a, const CopyOrder& b) {
    return (a.rank < home) != (b.rank < home) ? b.rank < home : a.rank < b.rank;
  });
  const auto away = [&](const CopyOrder& one) {
    const int64_t places = one.rank - loads.node_of(one.rank) * ranks_per_node - (home - node * ranks_per_node);
    return places < 0 ? places + ranks_per_node : places;
  };
  std::vector<CopyOrder> heads;
  for (const CopyOrder& one : orders) {
    if (loads.node_of(one.rank) == node) continue;
    const auto nearer = [&](const CopyOrder& other) {
      return loads.node_of(other.rank) == loads.node_of(one.rank) && away(other) < away(one);
    };
    if (std::none_of(orders.begin(), orders.end(), nearer)) heads.push_back(one);
  }
  std::stable_partition(orders.begin(), orders.end(), [&](const CopyOrder& one) {
    return std::any_of(heads.begin(), heads.end(), [&](const CopyOrder& head) { return head.rank == one.rank; });
  });
  return heads.size();
}

// isqrt(count + 1) - 1: the best first group of one expert alone.
size_t best_alone(size_t count) {
  size_t root = 1;
  while ((root + 1) * (root + 1) <= count + 1) ++root;
  return root - 1;
}

}  // namespace

std::optional<std::array<Ports, kGroups>> relayed_ports(std::vector<CopyOrder> copies, int64_t ranks,
                                                        int64_t ranks_per_node, const Ports& direct) {
  std::stable_sort(copies.begin(), copies.end(),
                   [](const CopyOrder& a, const CopyOrder& b) { return a.expert < b.expert; });
  std::vector<Orders> experts;
  for (CopyOrder& one : copies) {
    if (experts.empty() || experts.back().first->expert != one.expert) experts.push_back({&one, &one});
    ++experts.back().last;
  }
  std::stable_sort(experts.begin(), experts.end(), [](const auto& a, const auto& b) { return a.size() > b.size(); });
  if (experts.empty() || experts.front().size() < 2) return std::nullopt;
  Loads loads(ranks, ranks_per_node);
  for (const Orders& orders : experts) {
    const size_t nodes = first_to_last(orders, loads, ranks_per_node);
    const size_t count = orders.size();
    const size_t alone = best_alone(count);
    std::array<size_t, 5> choices{0, alone, std::min(count, alone + 1), nodes, count};
    std::sort(choices.begin(), choices.end());
    size_t best = 0;
    Ports best_cost = loads.cost_of(orders, 0);
    for (size_t i = 1; i < choices.size(); ++i) {
      const size_t first = choices[i];
      if (first == choices[i - 1]) continue;
      const Ports cost = loads.cost_of(orders, first);
      if (cost < best_cost) {
        best = first;
        best_cost = cost;
      }
    }
    loads.send(orders, best);
  }
  if (!(loads.cost() < direct)) return std::nullopt;
  return loads.most();
}

}  // namespace moe_overlap
