// Copies of experts that go from rank to rank, in two groups: how many pass through the busiest port of each. The
// Python reference with the same numbers, which also says who sends what, and why, is moe_overlap/agreement/relays.py.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace moe_overlap {

constexpr size_t kWires = 2;   // inter, intra
constexpr size_t kGroups = 2;  // of copies that are relayed

using Ports = std::array<int64_t, kWires>;  // copies through the busiest port, by wire

// A copy that is wanted: of an expert whose home is on another rank, on `rank`.
struct CopyOrder {
  int64_t expert;
  int64_t home;
  int64_t rank;
};

// Nothing where no port gets less to do by two groups than by `direct`, from the homes in one. No two copies of an
// expert on one rank; ranks and experts are within their numbers.
std::optional<std::array<Ports, kGroups>> relayed_ports(std::vector<CopyOrder> copies, int64_t ranks,
                                                        int64_t ranks_per_node, const Ports& direct);

}  // namespace moe_overlap
