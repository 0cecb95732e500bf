#include "copy_costs.h"

#include <algorithm>

namespace moe_overlap {

double PhaseCosts::copies_s(const Ports& copies) const {
  double most = 0;
  for (size_t wire = 0; wire < kWires; ++wire) {
    if (copies[wire] == 0) continue;
    most = std::max(most, copy[wire].alpha_s + copy[wire].beta_s * static_cast<double>(copies[wire]));
  }
  return most;
}

double PhaseCosts::in_turn_s(const Computed& computed) const {
  double inputs_s = 0;
  double copies_s = 0;
  double homes_s = 0;
  for (size_t rank = 0; rank < computed.rows.size(); ++rank) {
    const auto n = static_cast<double>(computed.rows[rank]);
    const auto copied = static_cast<double>(computed.copied[rank]);
    inputs_s = std::max(inputs_s, (row_s - wgrad_row_s) * n + expert_s * static_cast<double>(computed.experts[rank]));
    copies_s = std::max(copies_s, wgrad_row_s * copied);
    homes_s = std::max(homes_s, wgrad_row_s * (n - copied));
  }
  return inputs_s + copies_s + homes_s;
}

double PhaseCosts::last_gradients_s(const Computed& computed, double copy_s) const {
  double most = 0;
  for (size_t rank = 0; rank < computed.rows.size(); ++rank) {
    const auto n = static_cast<double>(computed.rows[rank]);
    const auto copied = static_cast<double>(computed.copied[rank]);
    const double before =
        (row_s - wgrad_row_s) * n + expert_s * static_cast<double>(computed.experts[rank]) + wgrad_row_s * copied;
    most = std::max(most, before + std::max(wgrad_row_s * (n - copied) + beside_s, copy_s));
  }
  return most;
}

double PhaseCosts::window_s(const Computed& computed, const Ports& rows, double copy_s) const {
  double busy_s = 0;
  for (size_t rank = 0; rank < computed.rows.size(); ++rank) {
    busy_s = std::max(busy_s, row_s * static_cast<double>(computed.rows[rank]) +
                                  expert_s * static_cast<double>(computed.experts[rank]));
  }
  double wire_s = 0;
  for (size_t wire = 0; wire < kWires; ++wire) {
    if (rows[wire] != 0) {
      const Line& sent = exchange[wire];
      wire_s = std::max(wire_s, 2.0 * (chunks * sent.alpha_s + sent.beta_s * static_cast<double>(rows[wire])));
    }
  }
  const bool copied = std::any_of(computed.copied.begin(), computed.copied.end(), [](int64_t n) { return n != 0; });
  const double through_s = waits_in_turn() && copied ? in_turn_s(computed) : busy_s;
  if (joined) return through_s + wire_s + beside_s + copy_s;
  const double exposed_s = exposed_copies ? copy_s : 0;
  copy_s -= exposed_s;
  const double moved_s = wire_s + copy_s;
  const double chunk_s = wire_s / (2 * chunks);
  if (wgrad_row_s == 0) {
    const double before_s = std::max(beside_s, copy_s + 2 * chunk_s);
    return std::max(busy_s + before_s, moved_s + busy_s / chunks) + exposed_s;
  }
  const double dgrad_s = busy_s * (1 - wgrad_row_s / row_s);
  double total_s = std::max(through_s + std::max(beside_s, chunk_s), moved_s + dgrad_s / chunks);
  if (copy_s != 0) {
    total_s = std::max(total_s, last_gradients_s(computed, copy_s) + std::max(chunk_s - beside_s, 0.0));
  }
  return total_s + exposed_s;
}

}  // namespace moe_overlap
