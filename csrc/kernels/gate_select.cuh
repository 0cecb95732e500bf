// The k best of a row of choices (scores, or what is in the same order) that lies in the registers of a few lanes.
//
// Taking the best one k times costs k passes over the row. Here the passes are few. A lane's values are cut into
// groups; the kMost-th largest of the groups' maxima is a lower limit for the kMost-th largest value (each of those
// groups holds one that large), and it comes from a sorting network over the maxima alone. With about 2 * kMost
// groups, 10.6 values reach it on average for kMost = 8 (8 of 16 groups have to be hit: 16/16 + 16/15 + ... + 16/9).
// They go to a list, and each of them counts those before it: its place in the result.
//
// In the list a value is a 64-bit key, its order as a float above, the id below: all keys differ, ties go to the lower
// id, and the order in the list does not matter. Rows with more than kListed values at the limit (mostly equal ones) or
// fewer than k above -inf take the best one k times after all.
#pragma once

#include <limits>

#include "kernels/device.cuh"

namespace moe_overlap {

// A row on kLanes lanes, kPerLane scores on each, as chunks of 4 neighbours dealt out in turn: 16-byte accesses, and
// the lanes' chunks lie side by side.
template <int kLanesOfRow, int kScoresPerLane>
struct Layout {
  static constexpr int kLanes = kLanesOfRow;
  static constexpr int kPerLane = kScoresPerLane;
  static constexpr int kWidth = kLanes * kPerLane;
  static constexpr int kThreads = kPerLane == 32 ? 256 : 512;  // of a block, at most
  static constexpr int kRows = kThreads / kLanes;              // of a block

  static __device__ inline int lane() { return static_cast<int>(threadIdx.x) % kLanes; }
  static __device__ inline int expert(int score) { return 4 * (score / 4 * kLanes + lane()) + score % 4; }
};

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();

// Larger means earlier: the higher value (-0 is 0), then the lower id.
__device__ inline int64_t sortable(uint32_t value_bits, uint32_t not_id) {
  const auto bits = static_cast<int32_t>(float_bits(bits_float(value_bits) + 0.0f));
  const int32_t order = bits ^ ((bits >> 31) & 0x7fffffff);
  return static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(order)) << 32 | not_id);
}

// The largest float below `limit`, kLowest at the least.
__device__ inline float just_below(float limit) {
  const uint32_t bits = float_bits(limit);
  const float below = bits_float(limit > 0.0f ? bits - 1 : limit < 0.0f ? bits + 1 : 0x80000001u);
  return limit > kLowest ? below : kLowest;
}

// A NaN makes both of them NaN, and in the end all of the row.
__device__ inline void order(float& larger, float& smaller) {
  const float a = larger, b = smaller;
  larger = max_nan(a, b);
  smaller = min_nan(a, b);
}

// The first N values, descending and then ascending, become descending.
template <int N, int kSize>
__device__ inline void merge(float (&value)[kSize]) {
#pragma unroll
  for (int stride = N / 2; stride > 0; stride /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if ((i & stride) == 0) order(value[i], value[i + stride]);
    }
  }
}

template <int N, int kSize>
__device__ inline void sort(float (&value)[kSize]) {
  static_assert(N == 1 || N == 2 || N == 4, "groups of a lane");
  if constexpr (N == 4) order(value[3], value[2]);
  if constexpr (N >= 2) order(value[0], value[1]);
  if constexpr (N == 4) merge<4>(value);
}

// The largest value of a row, NaN if it holds one, and a limit that at least kMost values reach (-inf if there are
// fewer).
struct Peaks {
  float most;
  float limit;
};

// best[0..N) of each lane, descending, are merged over the lanes that differ in the bits from kStep on.
template <typename Row, int kMost, int N, int kStep>
__device__ inline Peaks merge_lanes(float (&best)[kMost]) {
  if constexpr (kStep == Row::kLanes) {
    return {best[0], N == kMost ? best[kMost - 1] : -kInfinity};
  } else if constexpr (N < kMost) {
#pragma unroll
    for (int i = 0; i < N; ++i) best[2 * N - 1 - i] = shfl_xor(best[i], kStep);
    merge<2 * N>(best);
    return merge_lanes<Row, kMost, 2 * N, 2 * kStep>(best);
  } else {
    float other[kMost];
#pragma unroll
    for (int i = 0; i < kMost; ++i) other[i] = shfl_xor(best[kMost - 1 - i], kStep);
    float least = kInfinity;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      best[i] = max_nan(best[i], other[i]);
      least = min_nan(least, best[i]);
    }
    // The other lane's largest stands last.
    if constexpr (2 * kStep == Row::kLanes) return {max_nan(best[0], best[kMost - 1]), least};
    merge<kMost>(best);
    return merge_lanes<Row, kMost, kMost, 2 * kStep>(best);
  }
}

template <typename Row, int kMost>
__device__ inline Peaks find_peaks(const float (&value)[Row::kPerLane]) {
  constexpr int kWanted = 2 * kMost / Row::kLanes, kChunks = Row::kPerLane / 4;
  constexpr int kGroups = kWanted < 1 ? 1 : kWanted < kChunks ? kWanted : kChunks;
  constexpr int kSize = Row::kPerLane / kGroups;
  float best[kMost];
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    best[group] = value[group * kSize];
#pragma unroll
    for (int i = 1; i < kSize; ++i) best[group] = max_nan(best[group], value[group * kSize + i]);
  }
  sort<kGroups>(best);
  return merge_lanes<Row, kMost, kGroups, 1>(best);
}

// The k best of `total` listed values: winners[place] = expert. Each lane ranks two at a time.
template <typename Row>
__device__ inline void rank_listed(uint64_t* list, int total, int k, int* winners) {
  for (int i = Row::lane(); i < total; i += Row::kLanes) {
    list[i] = static_cast<uint64_t>(sortable(static_cast<uint32_t>(list[i] >> 32), static_cast<uint32_t>(list[i])));
  }
  sync_warp();
  const auto key = [&](int i) { return static_cast<int64_t>(list[i]); };
  const auto expert = [](int64_t sorted) { return static_cast<int>(~static_cast<uint32_t>(sorted)); };
  for (int first = Row::lane(); first < total; first += 2 * Row::kLanes) {
    const int second = first + Row::kLanes;
    const int64_t one = key(first), other = second < total ? key(second) : 0;
    int place_one = 0, place_other = 0;
    for (int i = 0; i < total; ++i) {
      place_one += key(i) > one;
      place_other += key(i) > other;
    }
    if (place_one < k) winners[place_one] = expert(one);
    if (second < total && place_other < k) winners[place_other] = expert(other);
  }
}

// The best, k times: the highest value, then the lowest id that has it. Values that were taken become NaN, which fmaxf
// passes over and which equals nothing.
template <typename Row>
__device__ inline void take_best(float (&value)[Row::kPerLane], int k, int* winners) {
#pragma unroll 1
  for (int place = 0; place < k; ++place) {
    float best = value[0];
#pragma unroll
    for (int i = 1; i < Row::kPerLane; ++i) best = fmaxf(best, value[i]);
#pragma unroll
    for (int step = 1; step < Row::kLanes; step *= 2) best = fmaxf(best, shfl_xor(best, step));
    int expert = Row::kWidth;
#pragma unroll
    for (int i = Row::kPerLane - 1; i >= 0; --i) expert = value[i] == best ? Row::expert(i) : expert;
#pragma unroll
    for (int step = 1; step < Row::kLanes; step *= 2) {
      const int other = shfl_xor(expert, step);
      expert = expert < other ? expert : other;
    }
#pragma unroll
    for (int i = 0; i < Row::kPerLane; ++i) value[i] = Row::expert(i) == expert ? bits_float(0x7fffffffu) : value[i];
    if (Row::lane() == 0) winners[place] = expert;
  }
}

template <typename Row, int kMost>
constexpr int kListed = 4 * kMost < Row::kWidth ? 4 * kMost : Row::kWidth;

// The k <= kMost best of the row, in order: winners[place] = expert. The values are not NaN (else what is written is
// without a meaning, and the row is not `good`), -inf past the end of the row, and there are k before it. `list` has
// room for kListed keys; both are the row's own shared memory, and the lanes of the warp are in step afterwards.
template <typename Row, int kMost>
__device__ inline void find_winners(float (&value)[Row::kPerLane], float limit, bool good, int k, uint64_t* list,
                                    int* winners) {
  // value >= limit, as value > below: the sign of the difference, which is exact, counts it.
  const float below = just_below(limit);
  int mine = 0;
#pragma unroll
  for (int i = 0; i < Row::kPerLane; ++i) mine += static_cast<int>(float_bits(below - value[i]) >> 31);
  int end = mine;
#pragma unroll
  for (int step = 1; step < Row::kLanes; step *= 2) {
    const int other = shfl_up(end, step, Row::kLanes);
    end += Row::lane() >= step ? other : 0;
  }
  const int total = shfl_idx(end, Row::kLanes - 1, Row::kLanes);
  const bool fits = total <= kListed<Row, kMost>;
  if (ballot(good && (!fits || total < k)) == 0) {
    int at = end - mine;
#pragma unroll
    for (int i = 0; i < Row::kPerLane; ++i) {
      if (value[i] > below && fits) {
        list[at] = uint64_t{float_bits(value[i])} << 32 | ~static_cast<uint32_t>(Row::expert(i));
      }
      at += static_cast<int>(float_bits(below - value[i]) >> 31);
    }
    sync_warp();
    rank_listed<Row>(list, fits ? total : 0, k, winners);
  } else {
    take_best<Row>(value, k, winners);
  }
  sync_warp();
}

}  // namespace moe_overlap
