// gate_topk: scores, the k best experts, their weights and the counts of every expert in one pass, and the backward in
// another, one launch each. A row of logits lies in the registers of 4 to 32 lanes, so that a warp takes up to 8 rows;
// gate_select.cuh says how the best are found, gate_counts.cuh how the blocks add their counts without a launch before
// it to set them to zero.
//
// Bytes: logits once, weights and ids once; at [16384, 128] and k = 8 9.4 MB, 2.2 us at 4.3 TB/s. All the rest has to
// fit beside it, so instructions are what counts: 660 for the four rows of a warp on sm_90 (in the SASS of nvcc 13.0),
// 165 for a row: load 15, limit 25, sum of exponentials 18, count and list 42, places 35, weights and stores 30. At
// four in a cycle on 132 multiprocessors at 1.755 GHz that is 2.9 us for 16384 rows; about half of them are for the
// integer unit, which takes two in a cycle: 2.8 us. 32 warps are resident with 64 registers, all 16384 rows at once.
// Taking the maximum k times needs some 240 instructions of the integer unit for a row: 8.5 us.
#include <algorithm>

#include "kernels/gate_counts.cuh"
#include "kernels/gate_select.cuh"
#include "kernels/launch.h"

namespace moe_overlap {
namespace {

constexpr float kTiny = 1e-20f;  // as in the reference
constexpr float kLog2E = 1.44269504f;
constexpr int kBadLogits = 1;
// A block counts in its own memory first and then adds to the counts of all: fewer blocks, fewer additions there.
constexpr int64_t kMostGateBlocks = 132 * 8;

// The shared memory of one row: its scores, or the list of select(). 16 bytes more, to lie in other banks than the
// next.
template <typename Row, int kMost>
constexpr int kBoardBytes =
    16 + (4 * Row::kWidth > 8 * kListed<Row, kMost> ? 4 * Row::kWidth : 8 * kListed<Row, kMost>);

// Four neighbours, from the i-th value of a lane on; -inf past the end of the row. `own` is where the lane's first
// value stands.
template <typename Row>
__device__ inline Vec<float, 4> load_chunk(const float* own, int i, int experts, bool vector) {
  Vec<float, 4> chunk;
  const float* const from = own + i * Row::kLanes;
  if (vector && Row::expert(i) < experts) return load_vec<4>(from);
#pragma unroll
  for (int j = 0; j < 4; ++j) chunk.v[j] = !vector && Row::expert(i) + j < experts ? from[j] : -kInfinity;
  return chunk;
}

template <typename Row>
__device__ inline void load_row(const float* row, int experts, bool vector, float (&x)[Row::kPerLane]) {
#pragma unroll
  for (int i = 0; i < Row::kPerLane; i += 4) {
    const auto chunk = load_chunk<Row>(row + Row::expert(0), i, experts, vector);
#pragma unroll
    for (int j = 0; j < 4; ++j) x[i + j] = chunk.v[j];
  }
}

// The largest of the row, NaN if there is one.
template <typename Row>
__device__ inline float row_max(const float (&x)[Row::kPerLane]) {
  float most = x[0];
#pragma unroll
  for (int i = 1; i < Row::kPerLane; ++i) most = max_nan(most, x[i]);
#pragma unroll
  for (int step = 1; step < Row::kLanes; step *= 2) most = max_nan(most, shfl_xor(most, step));
  return most;
}

template <typename Row>
__device__ inline float row_sum(const float (&x)[Row::kPerLane]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < Row::kPerLane; ++i) sum += x[i];
  return warp_sum(sum, Row::kLanes);
}

// The sum over the row of exp(x - most). Errors of single terms (2^-22 of each) stay that small in the sum, so the fast
// exponential will do: 4 instructions for a term, 10 with the accurate one.
template <typename Row>
__device__ inline float sum_exp(float most, const float (&x)[Row::kPerLane]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < Row::kPerLane; ++i) sum += exp2_fast((x[i] - most) * kLog2E);
  return warp_sum(sum, Row::kLanes);
}

__device__ inline float sigmoid(float x) { return divide_fast(1.0f, 1.0f + exp_f32(-x)); }

// The score of one expert; `most` is the largest logit of the row, or of the chosen ones for kTopkSoftmax, whose result
// still has to be divided by the sum over those.
__device__ inline float score_of(Score score, float logit, float most, float sum) {
  if (score == Score::kSigmoid) return sigmoid(logit);
  const float e = exp_f32(logit - most);
  return score == Score::kSoftmax ? divide_fast(e, sum) : e;
}

// -inf for the experts outside the topk_group best groups, while an expert inside is worth more, be it ever so little.
// A group is worth its best choice, with a bias the sum of its two best. One lane for a group: it reads the group's
// places on the board, starting at another bank than its neighbours, leaves the worth in the first of them, counts the
// better groups, and then marks all places.
template <typename Row>
__device__ inline void drop_groups(const GateArgs& args, float* board, float (&choice)[Row::kPerLane]) {
#pragma unroll
  for (int i = 0; i < Row::kPerLane; i += 4) {
    store_vec(board + Row::expert(i), Vec<float, 4>{{choice[i], choice[i + 1], choice[i + 2], choice[i + 3]}});
  }
  sync_warp();
  const int size = args.experts / args.n_group;
  for (int group = Row::lane(); group < args.n_group; group += Row::kLanes) {
    float best = -kInfinity, second = -kInfinity;
    for (int n = 0, i = group % size; n < size; ++n, i = i + 1 == size ? 0 : i + 1) {
      const float value = board[group * size + i];
      second = fmaxf(second, fminf(best, value));
      best = fmaxf(best, value);
    }
    board[group * size] = args.bias != nullptr && size > 1 ? best + second : best;
  }
  sync_warp();
  uint32_t dropped = 0;
  for (int group = Row::lane(), n = 0; group < args.n_group; group += Row::kLanes, ++n) {
    const float worth = board[group * size];
    int better = 0;
    for (int i = 0; i < args.n_group; ++i) {
      const float other = board[i * size];
      better += other > worth || (other == worth && i < group);
    }
    dropped |= static_cast<uint32_t>(better >= args.topk_group) << n;
  }
  sync_warp();
  for (int group = Row::lane(), n = 0; group < args.n_group; group += Row::kLanes, ++n) {
    const float mark = ((dropped >> n) & 1) != 0 ? -1.0f : 1.0f;
    for (int k = 0, i = group % size; k < size; ++k, i = i + 1 == size ? 0 : i + 1) board[group * size + i] = mark;
  }
  sync_warp();
#pragma unroll
  for (int i = 0; i < Row::kPerLane; i += 4) {
    const auto mark = load_vec<4>(board + Row::expert(i));
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // past the end of the row the board still holds -inf
      choice[i + j] = mark.v[j] > 0.0f ? fmaxf(choice[i + j], kLowest) : -kInfinity;
    }
  }
  sync_warp();  // the board becomes the list
}

// Logits in x become what the experts are chosen by where there is a bias: the score plus the bias. Without one the
// score is a rising function of the logit, and the logits decide: no rounding can tie or swap two experts.
template <typename Row>
__device__ inline void add_bias(const GateArgs& args, bool vector, float most, float sum, float (&x)[Row::kPerLane]) {
  if (args.score != Score::kTopkSoftmax) {
#pragma unroll
    for (int i = 0; i < Row::kPerLane; ++i) x[i] = score_of(args.score, x[i], most, sum);
  }
#pragma unroll
  for (int i = 0; i < Row::kPerLane; i += 4) {
    const auto bias = load_chunk<Row>(args.bias + Row::expert(0), i, args.experts, vector);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float choice = x[i + j] + bias.v[j];
      x[i + j] = choice == choice ? choice : kInfinity;  // a NaN of the bias comes first, as it does in a sort
    }
  }
}

// Weights, ids and counts of a token from its winners. Lane l takes the places l, l + kLanes, ...
template <typename Row, int kMost>
__device__ inline void store_winners(const GateArgs& args, int64_t token, bool good, const float* logits, float most,
                                     float sum, const int* winners, int* histogram) {
  constexpr int kMine = (kMost + Row::kLanes - 1) / Row::kLanes;
  int expert[kMine];
  float score[kMine];
  float chosen_most = -kInfinity;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int place = Row::lane() + i * Row::kLanes;
    expert[i] = good && place < args.k ? winners[place] : -1;
    score[i] = expert[i] >= 0 ? logits[expert[i]] : -kInfinity;
    chosen_most = fmaxf(chosen_most, score[i]);
  }
  if (args.score == Score::kTopkSoftmax) {
#pragma unroll
    for (int step = 1; step < Row::kLanes; step *= 2) chosen_most = fmaxf(chosen_most, shfl_xor(chosen_most, step));
    most = chosen_most;
  }
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    score[i] = expert[i] >= 0 ? score_of(args.score, score[i], most, sum) : 0.0f;
    total += score[i];
  }
  total = warp_sum(total, Row::kLanes);
  if (args.score != Score::kTopkSoftmax) total = args.renormalize ? total + kTiny : 1.0f;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int place = Row::lane() + i * Row::kLanes;
    if (place >= args.k || token >= args.tokens) continue;
    const int64_t slot = element_offset(token, args.k, place);
    args.weights[slot] = good ? divide_fast(score[i], total) * args.scale : 0.0f;
    args.ids[slot] = expert[i];
    if (good) atomic_add(&histogram[expert[i]], 1);
  }
}

template <typename Row, int kMost>
__global__ void __launch_bounds__(Row::kThreads, kMost == 8 ? 2 : 1) gate_kernel(GateArgs args, bool vector) {
  constexpr int kBoard = kBoardBytes<Row, kMost> / 16;
  SHARED_ARRAY(Bytes16, boards, Row::kRows * kBoard);
  SHARED_ARRAY(int, all_winners, Row::kRows* kMost);
  SHARED_ARRAY(int, histogram, Row::kWidth + 1);  // and, at its end, whether a row was not usable
  SHARED_ARRAY(int, ready, 1);  // whether the counts are known to be zero; of thread 0, which has no register for it
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int rows = threads / Row::kLanes, row = thread / Row::kLanes;
  Bytes16* const board = boards + row * kBoard;
  int* const winners = all_winners + row * kMost;
  for (int i = thread; i <= args.experts; i += threads) histogram[i] = 0;
  if (thread == 0) *ready = 0;
  sync_block();
  // The first block has no rows: it is at the end at once, and so the one that sets the counts to zero.
  const int64_t begin = blockIdx.x > 0 ? (int64_t{blockIdx.x} - 1) * rows : args.tokens;
  for (int64_t first = begin; first < args.tokens; first += (int64_t{gridDim.x} - 1) * rows) {
    // Lanes without a token work on the last one, as all of a warp take part in its shuffles, and store nothing.
    const int64_t token = first + row;
    const float* const logits =
        args.logits + element_offset(token < args.tokens ? token : args.tokens - 1, args.experts);
    float x[Row::kPerLane];
    load_row<Row>(logits, args.experts, vector, x);
    const bool grouped = args.topk_group < args.n_group, plain = args.bias == nullptr && !grouped;
    float most = 0.0f, sum = 1.0f;
    if (!plain) {
      most = row_max<Row>(x);
      if (args.score == Score::kSoftmax) sum = sum_exp<Row>(most, x);
      if (args.bias != nullptr) add_bias<Row>(args, vector, most, sum, x);
      if (grouped) drop_groups<Row>(args, reinterpret_cast<float*>(board), x);
    }
    const Peaks peaks = find_peaks<Row, kMost>(x);
    if (plain) {
      most = peaks.most;
      if (args.score == Score::kSoftmax) sum = sum_exp<Row>(most, x);
    }
    const bool good = most > -kInfinity && most < kInfinity;
    // Asked here, the answer of the L2 cache comes while the other warps work; after the rows all would wait for it.
    if (thread == 0) *ready = counts_ready(args) ? 1 : 0;
    find_winners<Row, kMost>(x, peaks.limit, good, args.k, reinterpret_cast<uint64_t*>(board), winners);
    store_winners<Row, kMost>(args, token, good, logits, most, sum, winners, histogram);
    if (!good && token < args.tokens && Row::lane() == 0) atomic_or(&histogram[args.experts], kBadLogits);
  }
  int before = 0;
  if (warp_id() == 0) before = wait_for_counts(args, *ready != 0);
  sync_block();
  for (int i = thread; i < args.experts; i += threads) {
    if (histogram[i] != 0) atomic_add(&args.counts[i], histogram[i]);
  }
  if (thread == 0) {
    if (histogram[args.experts] != 0) atomic_or(args.status, histogram[args.experts]);
    leave_counts(args, before);
  }
}

// The gradient with respect to the scores of the chosen experts (to their logits, for the two scores that depend on
// nothing else), written to the board at their ids; returns sum(gradient * score) over them.
template <typename Row>
__device__ inline float spread_gradients(const GateBackwardArgs& args, int64_t token, const float* logits, float most,
                                         float sum, float* board) {
  constexpr int kMine = (kMostGateK + Row::kLanes - 1) / Row::kLanes;
  int expert[kMine];
  float score[kMine], gradient[kMine];
  float chosen_most = -kInfinity;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int place = Row::lane() + i * Row::kLanes;
    const int64_t slot = element_offset(token, args.k, place);
    expert[i] = place < args.k ? args.ids[slot] : -1;
    if (expert[i] >= args.experts) expert[i] = -1;
    score[i] = expert[i] >= 0 ? logits[expert[i]] : -kInfinity;
    gradient[i] = expert[i] >= 0 ? args.dweights[slot] * args.scale : 0.0f;
    chosen_most = fmaxf(chosen_most, score[i]);
  }
  const bool over_chosen = args.score == Score::kTopkSoftmax;
  if (over_chosen) {
#pragma unroll
    for (int step = 1; step < Row::kLanes; step *= 2) chosen_most = fmaxf(chosen_most, shfl_xor(chosen_most, step));
    most = chosen_most;
  }
  float total = 0.0f, dot = 0.0f;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    score[i] = expert[i] >= 0 ? score_of(args.score, score[i], most, sum) : 0.0f;
    total += score[i];
    dot += gradient[i] * score[i];
  }
  total = warp_sum(total, Row::kLanes);
  dot = warp_sum(dot, Row::kLanes);
  if (over_chosen || args.renormalize) {
    // w = u / s with s = sum(u): du = (dw - sum(dw * u) / s) / s
    if (!over_chosen) total += kTiny;
    float rest = 0.0f;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      gradient[i] = expert[i] >= 0 ? divide_fast(gradient[i] - divide_fast(dot, total), total) : 0.0f;
      rest += gradient[i] * score[i];
    }
    dot = warp_sum(rest, Row::kLanes);
  }
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    if (over_chosen) gradient[i] *= score[i];
    if (args.score == Score::kSigmoid) gradient[i] *= score[i] * (1.0f - score[i]);
    if (expert[i] >= 0) board[expert[i]] = gradient[i];
  }
  return dot;
}

template <typename Row>
__global__ void __launch_bounds__(Row::kThreads) gate_backward_kernel(GateBackwardArgs args, bool vector) {
  constexpr int kBoard = (Row::kWidth + 4) / 4;
  SHARED_ARRAY(Bytes16, boards, Row::kRows * kBoard);
  const int rows = static_cast<int>(blockDim.x) / Row::kLanes, row = static_cast<int>(threadIdx.x) / Row::kLanes;
  float* const board = reinterpret_cast<float*>(boards + row * kBoard);
  for (int64_t first = int64_t{blockIdx.x} * rows; first < args.tokens; first += int64_t{gridDim.x} * rows) {
    const bool inside = first + row < args.tokens;
    const int64_t token = inside ? first + row : args.tokens - 1;
    const float* const logits = args.logits + element_offset(token, args.experts);
    float x[Row::kPerLane];
    float most = 0.0f, sum = 1.0f;
    const bool dense = args.score == Score::kSoftmax;  // every logit has a gradient
    if (dense) {
      load_row<Row>(logits, args.experts, vector, x);
      most = row_max<Row>(x);
#pragma unroll
      for (int i = 0; i < Row::kPerLane; ++i) x[i] = exp_f32(x[i] - most);
      sum = row_sum<Row>(x);
    }
#pragma unroll
    for (int i = 0; i < Row::kPerLane; i += 4) store_vec(board + Row::expert(i), Vec<float, 4>{});
    sync_warp();
    const float dot = spread_gradients<Row>(args, token, logits, most, sum, board);
    sync_warp();
    const bool good = args.ids[element_offset(token, args.k)] >= 0;
    const float share = divide_fast(1.0f, sum);
    float* const out = args.dlogits + element_offset(token, args.experts);
#pragma unroll
    for (int i = 0; i < Row::kPerLane; i += 4) {
      auto chunk = load_vec<4>(board + Row::expert(i));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (dense) chunk.v[j] = x[i + j] * share * (chunk.v[j] - dot);
        if (!good) chunk.v[j] = 0.0f;
        if (inside && !vector && Row::expert(i + j) < args.experts) out[Row::expert(i + j)] = chunk.v[j];
      }
      if (inside && vector && Row::expert(i) < args.experts) store_vec(out + Row::expert(i), chunk);
    }
    sync_warp();  // the board is cleared for the next token
  }
}

// Calls run(Layout{}) with the layout for rows of `experts` logits.
template <typename Run>
auto with_layout(int experts, const Run& run) {
  if (experts <= 32) return run(Layout<4, 8>{});
  if (experts <= 64) return run(Layout<8, 8>{});
  if (experts <= 128) return run(Layout<8, 16>{});
  if (experts <= 256) return run(Layout<16, 16>{});
  if (experts <= 512) return run(Layout<32, 16>{});
  return run(Layout<32, 32>{});
}

// Whole warps, and no more than the tokens need; beyond kMostGateBlocks each block takes several rounds.
LaunchConfig config_of(int64_t tokens, int experts) {
  if (tokens == 0) return {0, kWarp, 0};
  return with_layout(experts, [&](auto layout) {
    using Row = decltype(layout);
    const int64_t threads = checked_round_up(checked_mul(tokens, Row::kLanes), kWarp);
    const int block = static_cast<int>(std::min<int64_t>(threads, Row::kThreads));
    return LaunchConfig{std::min(ceil_div(tokens, block / Row::kLanes), kMostGateBlocks), block, 0};
  });
}

template <typename Args>
void check_sizes(const Args& args) {
  if (args.experts < 1 || args.experts > kMostGateExperts || args.k < 1 || args.k > kMostGateK) {
    throw std::invalid_argument("gate_topk: " + std::to_string(args.experts) +
                                " experts and k = " + std::to_string(args.k) + ", the kernel takes " +
                                std::to_string(kMostGateExperts) + " and " + std::to_string(kMostGateK));
  }
  checked_mul(args.tokens, std::max(args.experts, args.k));
}

}  // namespace

// One block more than the rows need, also where there are no rows.
LaunchConfig gate_config(const GateArgs& args) {
  LaunchConfig config = config_of(args.tokens, args.experts);
  ++config.grid;
  return config;
}
LaunchConfig gate_config(const GateBackwardArgs& args) { return config_of(args.tokens, args.experts); }

void gate_topk(const GateArgs& args, cudaStream_t stream) {
  check_sizes(args);
  if (args.nonce == 0) throw std::invalid_argument("gate_topk: nonce = 0, which marks a workspace that nobody uses");
  const bool vector = args.experts % 4 == 0 && aligned(args.logits, 16) && aligned(args.bias, 16);
  with_layout(args.experts, [&](auto layout) {
    using Row = decltype(layout);
    const auto kernel = args.k <= 8 ? gate_kernel<Row, 8> : gate_kernel<Row, 16>;
    launch(kernel, gate_config(args), stream, args, vector);
  });
}

void gate_topk_backward(const GateBackwardArgs& args, cudaStream_t stream) {
  check_sizes(args);
  const bool vector = args.experts % 4 == 0 && aligned(args.logits, 16) && aligned(args.dlogits, 16);
  with_layout(args.experts, [&](auto layout) {
    launch(gate_backward_kernel<decltype(layout)>, gate_config(args), stream, args, vector);
  });
}

}  // namespace moe_overlap
