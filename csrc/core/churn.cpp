#include "churn.h"

#include <algorithm>
#include <stdexcept>

#include "placement.h"

namespace moe_overlap {
namespace {

using Ints = std::vector<int64_t>;
constexpr int64_t kNever = int64_t{1} << 30;

size_t at(int64_t index) { return static_cast<size_t>(index); }

// Where each rank's slots begin, and where the last one's end.
Ints offsets(const Ints& slots) {
  Ints found(slots.size() + 1, 0);
  for (size_t rank = 0; rank < slots.size(); ++rank) found[rank + 1] = found[rank] + slots[rank];
  return found;
}

// For each rank and expert, whether the rank has it.
std::vector<std::vector<char>> held(const Map& map, int64_t experts) {
  const Ints first = offsets(map.slots);
  std::vector<std::vector<char>> found(map.slots.size(), std::vector<char>(at(experts), 0));
  for (size_t rank = 0; rank < map.slots.size(); ++rank) {
    for (int64_t slot = first[rank]; slot < first[rank + 1]; ++slot) found[rank][at(map.experts[at(slot)])] = 1;
  }
  return found;
}

// What staying saves when rank b gets what a is to have: minus the experts of a that b has.
int64_t cost(const Map& wanted, const Ints& first, const std::vector<std::vector<char>>& has, int64_t a, int64_t b) {
  if (wanted.slots[at(a)] != wanted.slots[at(b)]) return kNever;
  int64_t stays = 0;
  for (int64_t slot = first[at(a)]; slot < first[at(a) + 1]; ++slot) {
    const int64_t expert = wanted.experts[at(slot)];
    const auto begin = wanted.experts.begin() + first[at(a)];
    const bool again = std::find(begin, wanted.experts.begin() + slot, expert) != wanted.experts.begin() + slot;
    stays += !again && has[at(b)][at(expert)];
  }
  return -stays;
}

// The same lists, on the ranks that have most of them already: ranks of a node change places, then nodes.
void interchange(Map& wanted, const Map& old, int64_t experts, int64_t size) {
  const auto ranks = static_cast<int64_t>(wanted.slots.size());
  const int64_t nodes = ranks / size;
  const Ints first = offsets(wanted.slots);
  const auto has = held(old, experts);
  std::vector<std::vector<Ints>> best(at(nodes), std::vector<Ints>(at(nodes)));
  std::vector<Ints> whole(at(nodes), Ints(at(nodes), 0));
  for (int64_t a = 0; a < nodes; ++a) {
    for (int64_t b = 0; b < nodes; ++b) {
      std::vector<Ints> part(at(size), Ints(at(size)));
      for (int64_t i = 0; i < size; ++i) {
        for (int64_t j = 0; j < size; ++j) part[at(i)][at(j)] = cost(wanted, first, has, a * size + i, b * size + j);
      }
      best[at(a)][at(b)] = assign(part);
      for (size_t i = 0; i < part.size(); ++i) whole[at(a)][at(b)] += part[i][at(best[at(a)][at(b)][i])];
    }
  }
  Ints from(at(ranks));
  const Ints of_node = assign(whole);
  for (int64_t a = 0; a < nodes; ++a) {
    const int64_t b = of_node[at(a)];
    for (int64_t i = 0; i < size; ++i) from[at(b * size + best[at(a)][at(b)][at(i)])] = a * size + i;
  }
  Map found;
  for (const int64_t rank : from) {
    found.slots.push_back(wanted.slots[at(rank)]);
    found.experts.insert(found.experts.end(), wanted.experts.begin() + first[at(rank)],
                         wanted.experts.begin() + first[at(rank) + 1]);
  }
  wanted = std::move(found);
}

// The experts of one rank, those that are in `old` too at the same place.
void in_place(int64_t* wanted, int64_t count, const int64_t* old, int64_t old_count, Ints& left) {
  Ints found(at(count), -1);
  for (int64_t i = 0; i < count; ++i) ++left[at(wanted[i])];
  for (int64_t i = 0; i < std::min(count, old_count); ++i) {
    if (left[at(old[i])] == 0) continue;
    found[at(i)] = old[i];
    --left[at(old[i])];
  }
  int64_t next = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (left[at(wanted[i])] == 0) continue;
    --left[at(wanted[i])];
    while (found[at(next)] >= 0) ++next;
    found[at(next)] = wanted[i];
  }
  std::copy(found.begin(), found.end(), wanted);
}

void check(const Map& map, int64_t experts) {
  for (const int64_t expert : map.experts) {
    if (expert < 0 || expert >= experts) throw std::invalid_argument("kept: experts that have a home");
  }
  if (offsets(map.slots).back() != static_cast<int64_t>(map.experts.size())) {
    throw std::invalid_argument("kept: an expert for each slot");
  }
}

}  // namespace

Kept kept(Map wanted, const Map& old, const std::vector<int64_t>& old_homes, int64_t node_size) {
  const auto experts = static_cast<int64_t>(old_homes.size());
  check(wanted, experts);
  check(old, experts);
  const size_t ranks = wanted.slots.size();
  if (old.slots.size() != ranks || node_size < 0 || (node_size > 0 && static_cast<int64_t>(ranks) % node_size)) {
    throw std::invalid_argument("kept: maps of as many ranks, and nodes that divide them");
  }
  if (node_size > 0) interchange(wanted, old, experts, node_size);
  const Ints first = offsets(wanted.slots);
  const Ints before = offsets(old.slots);
  Ints left(at(experts), 0);
  Ints homes(at(experts), -1);
  std::vector<char> stays(at(experts), 0);
  for (size_t rank = 0; rank < ranks; ++rank) {
    in_place(wanted.experts.data() + first[rank], wanted.slots[rank], old.experts.data() + before[rank],
             old.slots[rank], left);
    for (int64_t slot = first[rank]; slot < first[rank + 1]; ++slot) {
      const size_t expert = at(wanted.experts[at(slot)]);
      const bool own = old_homes[expert] == static_cast<int64_t>(rank);
      if (homes[expert] < 0 || (own && !stays[expert])) homes[expert] = slot;
      stays[expert] = stays[expert] || own;
    }
  }
  if (std::find(homes.begin(), homes.end(), -1) != homes.end()) {
    throw std::invalid_argument("kept: a slot for every expert");
  }
  return {std::move(wanted.experts), std::move(homes), std::move(wanted.slots)};
}

}  // namespace moe_overlap
