// gate_topk on a CPU: for each token the k experts of the highest values, best first, equals by the lower id; and its
// backward. The contract and the reference stand in moe_overlap/ops/gate.py; both have the same bits.
#pragma once

#include <cstdint>

namespace moe_overlap {

template <typename Float>
struct GateArgs {
  // in
  const Float* logits;  // [T, E]: a row of which the greatest is NaN, +inf or -inf gets no experts
  const Float* choice;  // [T, E]: what is compared; NaN counts as above everything
  int64_t experts;      // E
  int64_t k;            // 1 <= k <= kept_groups * E / groups
  int64_t groups;       // divides E
  int64_t kept_groups;  // 1 <= kept_groups <= groups: those of the greatest sums of their `summed` best values
  int64_t summed;       // 1 or 2; never more than E / groups are summed
  // out
  int32_t* ids;  // [T, k], -1 in rows without experts
};

// The tokens [first, end).
template <typename Float>
void choose_experts(const GateArgs<Float>& args, int64_t first, int64_t end);

// How often each of `experts` experts is among the ids; returns whether one of them is -1.
bool count_chosen(const int32_t* ids, int64_t slots, int64_t experts, int32_t* counts);

template <typename Float>
struct GateGradientArgs {
  // in
  const int32_t* ids;     // [T, k], -1 in rows without experts
  const Float* chosen;    // [T, k]: gradients of the chosen scores
  const Float* scores;    // [T, E] of a softmax over all experts, or null: then chosen are gradients of the logits
  const Float* weighted;  // [T]: sum of chosen times scores; read with scores alone
  int64_t experts;
  int64_t k;
  // out
  Float* logits;  // [T, E] gradients
};

// The tokens [first, end).
template <typename Float>
void gate_gradient(const GateGradientArgs<Float>& args, int64_t first, int64_t end);

}  // namespace moe_overlap
