// The k best of a row of scores that lies in the registers of a few lanes.
//
// Taking the best one k times costs k passes over the row: 8 rounds of 6 instructions for each of 128 scores. Here the
// passes are few. A lane's scores are cut into groups; the kMost-th largest of the groups' maxima is a lower limit for
// the kMost-th largest score (each of those groups holds a score that large), and it comes from a sorting network over
// 2 * kMost values instead of all. With about 2 * kMost groups, 10.6 scores pass it on average for kMost = 8 (8 of 16
// groups have to be hit: 16/16 + 16/15 + ... + 16/9). They go to a list, and each of them counts those before it: its
// place in the result. All keys of a row differ, so the order in the list does not matter.
//
// Scores are compared as signed integers in the order of the floats, which leaves no case for NaN to break. Ties go to
// the lower id: it is part of the key. Rows with more than kListed scores at or above the limit (mostly equal ones)
// take the best one k times after all.
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

// Below every key of a score.
constexpr int32_t kAbsent = std::numeric_limits<int32_t>::min();

// The order of floats, as signed integers. -0 has to be made +0 before.
__device__ inline int32_t ordered(float value) {
  const auto bits = static_cast<int32_t>(float_bits(value));
  const int32_t key = bits ^ ((bits >> 31) & 0x7fffffff);
  return key > kAbsent ? key : kAbsent + 1;
}

// Larger means earlier: the higher score, then the lower id.
__device__ inline uint64_t full_key(int32_t key, int expert) {
  return uint64_t{static_cast<uint32_t>(key) ^ 0x80000000u} << 32 | ~static_cast<uint32_t>(expert);
}
__device__ inline int expert_of(uint64_t key) { return static_cast<int>(~static_cast<uint32_t>(key)); }

__device__ inline void order(int32_t& larger, int32_t& smaller) {
  const int32_t a = larger, b = smaller;
  larger = a > b ? a : b;
  smaller = a > b ? b : a;
}

// The first N values, descending and then ascending, become descending.
template <int N, int kSize>
__device__ inline void merge(int32_t (&value)[kSize]) {
#pragma unroll
  for (int stride = N / 2; stride > 0; stride /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if ((i & stride) == 0) order(value[i], value[i + stride]);
    }
  }
}

template <int N, int kSize>
__device__ inline void sort(int32_t (&value)[kSize]) {
  static_assert(N == 1 || N == 2 || N == 4, "groups of a lane");
  if constexpr (N == 4) order(value[3], value[2]);
  if constexpr (N >= 2) order(value[0], value[1]);
  if constexpr (N == 4) merge<4>(value);
}

// best[0..N) of each lane, descending, over the lanes that differ in the bits below kStep: the result is the kMost-th
// largest over the row's lanes, kAbsent if there are fewer.
template <typename Row, int kMost, int N, int kStep>
__device__ inline int32_t merge_lanes(int32_t (&best)[kMost]) {
  if constexpr (kStep == Row::kLanes) {
    return N == kMost ? best[kMost - 1] : kAbsent;
  } else if constexpr (N < kMost) {
#pragma unroll
    for (int i = 0; i < N; ++i) best[2 * N - 1 - i] = shfl_xor(best[i], kStep);
    merge<2 * N>(best);
    return merge_lanes<Row, kMost, 2 * N, 2 * kStep>(best);
  } else {
    int32_t other[kMost];
#pragma unroll
    for (int i = 0; i < kMost; ++i) other[i] = shfl_xor(best[kMost - 1 - i], kStep);
    int32_t least = best[0] > other[0] ? best[0] : other[0];
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      best[i] = best[i] > other[i] ? best[i] : other[i];
      least = best[i] < least ? best[i] : least;
    }
    if constexpr (2 * kStep == Row::kLanes) return least;
    merge<kMost>(best);
    return merge_lanes<Row, kMost, kMost, 2 * kStep>(best);
  }
}

// At least kMost scores of the row are not below this (all that there are, if there are fewer).
template <typename Row, int kMost>
__device__ inline int32_t lower_limit(const int32_t (&key)[Row::kPerLane]) {
  constexpr int kWanted = 2 * kMost / Row::kLanes, kChunks = Row::kPerLane / 4;
  constexpr int kGroups = kWanted < 1 ? 1 : kWanted < kChunks ? kWanted : kChunks;
  constexpr int kSize = Row::kPerLane / kGroups;
  int32_t best[kMost];
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    best[group] = key[group * kSize];
#pragma unroll
    for (int i = 1; i < kSize; ++i) {
      const int32_t other = key[group * kSize + i];
      best[group] = best[group] > other ? best[group] : other;
    }
  }
  sort<kGroups>(best);
  const int32_t limit = merge_lanes<Row, kMost, kGroups, 1>(best);
  return limit > kAbsent ? limit : kAbsent + 1;
}

// The k best of `total` listed keys: winners[place] = expert. Each lane ranks two keys at a time.
template <typename Row>
__device__ inline void rank_listed(const uint64_t* list, int total, int k, int* winners) {
  for (int first = Row::lane(); first < total; first += 2 * Row::kLanes) {
    const int second = first + Row::kLanes;
    const uint64_t one = list[first], other = second < total ? list[second] : 0;
    int place_one = 0, place_other = 0;
    for (int i = 0; i < total; ++i) {
      const uint64_t key = list[i];
      place_one += key > one;
      place_other += key > other;
    }
    if (place_one < k) winners[place_one] = expert_of(one);
    if (second < total && place_other < k) winners[place_other] = expert_of(other);
  }
}

// The best, k times: the highest key, then the lowest id that has it. Keys that were taken become kAbsent.
template <typename Row>
__device__ inline void take_best(int32_t (&key)[Row::kPerLane], int k, int* winners) {
#pragma unroll 1
  for (int place = 0; place < k; ++place) {
    int32_t best = key[0];
#pragma unroll
    for (int i = 1; i < Row::kPerLane; ++i) best = best > key[i] ? best : key[i];
#pragma unroll
    for (int step = 1; step < Row::kLanes; step *= 2) {
      const int32_t other = shfl_xor(best, step);
      best = best > other ? best : other;
    }
    int expert = Row::kWidth;
#pragma unroll
    for (int i = Row::kPerLane - 1; i >= 0; --i) expert = key[i] == best ? Row::expert(i) : expert;
#pragma unroll
    for (int step = 1; step < Row::kLanes; step *= 2) {
      const int other = shfl_xor(expert, step);
      expert = expert < other ? expert : other;
    }
#pragma unroll
    for (int i = 0; i < Row::kPerLane; ++i) key[i] = Row::expert(i) == expert ? kAbsent : key[i];
    if (Row::lane() == 0) winners[place] = expert;
  }
}

template <typename Row, int kMost>
constexpr int kListed = 4 * kMost < Row::kWidth ? 4 * kMost : Row::kWidth;

// The k <= kMost best scores of the row, in order: winners[place] = expert. Keys of places without an expert are
// kAbsent and there are at least k others. `list` has room for kListed keys; both are the row's own shared memory, and
// the lanes of the warp are in step afterwards.
template <typename Row, int kMost>
__device__ inline void select(int32_t (&key)[Row::kPerLane], int k, uint64_t* list, int* winners) {
  const int32_t limit = lower_limit<Row, kMost>(key);
  int mine = 0;
#pragma unroll
  for (int i = 0; i < Row::kPerLane; ++i) mine += key[i] >= limit;
  int end = mine;
#pragma unroll
  for (int step = 1; step < Row::kLanes; step *= 2) {
    const int other = shfl_up(end, step, Row::kLanes);
    end += Row::lane() >= step ? other : 0;
  }
  const int total = shfl_idx(end, Row::kLanes - 1, Row::kLanes);
  if (ballot(total > kListed<Row, kMost>) == 0) {
    int at = end - mine;
#pragma unroll
    for (int i = 0; i < Row::kPerLane; ++i) {
      if (key[i] >= limit) list[at++] = full_key(key[i], Row::expert(i));
    }
    sync_warp();
    rank_listed<Row>(list, total, k, winners);
  } else {
    take_best<Row>(key, k, winners);
  }
  sync_warp();
}

}  // namespace moe_overlap
