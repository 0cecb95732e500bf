// row_map: a stable counting sort of slots by expert, in two launches (one where there are few slots: a block of up to
// 32 warps takes them all).
//
//   count  each block counts its slots of every expert                          -> workspace [blocks, experts]
//   place  each block sums that table: all of it to know where experts begin, the blocks before it to know where its
//   own
//          slots go; then its warps walk through their slots in order, 32 at a time. Lanes with the same expert find
//          each other by match_any, and their order among themselves is their order in the warp.
//
// Nothing depends on the order of blocks or warps, no counter has to be cleared first, and every output is written
// once. Bytes: ids twice, slot_to_row and row_to_slot once, 16 for each slot: 1 MB, 0.3 us, for 65536 slots. So what is
// to be kept small is launches (two, near 2 us each) and the chain of dependent steps: 64 blocks with 128 slots for
// each warp make 4 steps of match_any, and of a table of 64 x 128 counts each thread loads 8 times 16 bytes, all at
// once. The second launch starts early: until it needs the table it counts its own slots, beside the first one.
#include <algorithm>
#include <limits>

#include "kernels/launch.h"

namespace moe_overlap {
namespace {

constexpr int kMostWarps = 32;                      // of a block that holds all slots
constexpr int kTableWarps = 8;                      // of each of several blocks
constexpr int kStep = 4 * kWarp;                    // slots of a warp whose ids are loaded together
constexpr int64_t kFewSlots = kTableWarps * kStep;  // of a block, at least, where there are several
constexpr int64_t kOneBlockSlots = kMostWarps * kStep;
constexpr int64_t kMostBlocks = 256;
constexpr int kSharedInts = (48 << 10) / 4;  // what every GPU gives a block
constexpr int kTables = 3;                   // of place_kernel, beside the counts of its warps

struct Sort {
  const int32_t* ids;
  int64_t slots;
  int64_t slots_per_block;
  int32_t first;
  int32_t experts;
  int32_t align;
  int32_t capacity;
  int64_t num_rows;
  int32_t* block_counts;  // [blocks, experts]
  int32_t* tokens_per_expert;
  int32_t* offs;
  int32_t* slot_to_row;
  int32_t* row_to_slot;
};

__device__ inline int thread() { return static_cast<int>(threadIdx.x); }
__device__ inline int threads() { return static_cast<int>(blockDim.x); }
__device__ inline int warps() { return threads() / kWarp; }

// The slots of this warp: [begin, end).
struct Range {
  int64_t begin;
  int64_t end;
};
__device__ inline Range warp_range(const Sort& sort) {
  const int64_t slots = sort.slots_per_block / warps();
  const int64_t begin = int64_t{blockIdx.x} * sort.slots_per_block + warp_id() * slots;
  const int64_t end = begin + slots;
  return {begin, end < sort.slots ? end : sort.slots};
}

// Calls each(slot, expert, peers) for the slots of a warp in order, 32 at a time; `experts` is the expert of a slot
// that gets no row and of lanes past the end. `peers`: the lanes with the same expert.
template <typename Each>
__device__ inline void walk(const Sort& sort, const Range& range, const Each& each) {
  for (int64_t base = range.begin; base < range.end; base += kStep) {
    uint32_t expert[kStep / kWarp];
#pragma unroll
    for (int i = 0; i < kStep / kWarp; ++i) {
      const int64_t slot = base + i * kWarp + lane_id();
      // Unsigned, so that ids before `first`, -1 among them, are far beyond the last expert.
      const uint32_t local =
          slot < range.end ? static_cast<uint32_t>(sort.ids[slot]) - static_cast<uint32_t>(sort.first) : kAllLanes;
      expert[i] = local < static_cast<uint32_t>(sort.experts) ? local : static_cast<uint32_t>(sort.experts);
    }
#pragma unroll
    for (int i = 0; i < kStep / kWarp; ++i) {
      if (base + i * kWarp >= range.end) break;
      each(base + i * kWarp + lane_id(), static_cast<int>(expert[i]), match_any(expert[i]));
    }
  }
}

__device__ inline uint32_t lanes_before() { return (1u << lane_id()) - 1; }

// counts[warp][expert] of the block's slots; the block is in step afterwards.
__device__ inline void count_by_warp(const Sort& sort, int* counts) {
  for (int i = thread(); i < warps() * sort.experts; i += threads()) counts[i] = 0;
  sync_block();
  int* const mine = counts + warp_id() * sort.experts;
  walk(sort, warp_range(sort), [&](int64_t, int expert, uint32_t peers) {
    // One lane for each expert, so no two write to the same count.
    if (expert < sort.experts && (peers & lanes_before()) == 0) mine[expert] += count_bits(peers);
    sync_warp();
  });
  sync_block();
}

__global__ void __launch_bounds__(kTableWarps* kWarp) count_kernel(Sort sort) {
  let_next_launch_start();
  int* const counts = reinterpret_cast<int*>(dynamic_shared());
  count_by_warp(sort, counts);
  for (int expert = thread(); expert < sort.experts; expert += threads()) {
    int sum = 0;
    for (int warp = 0; warp < warps(); ++warp) sum += counts[warp * sort.experts + expert];
    sort.block_counts[element_offset(blockIdx.x, sort.experts, expert)] = sum;
  }
}

// Adds what the blocks counted to total[expert], and what those before this one did to before[expert]. The warps share
// the blocks out; sums of integers are the same in any order. N experts are loaded at once.
template <int N>
__device__ inline void sum_blocks(const Sort& sort, int* total, int* before) {
  const int blocks = static_cast<int>(gridDim.x), self = static_cast<int>(blockIdx.x);
  for (int expert = lane_id() * N; expert < sort.experts; expert += kWarp * N) {
    int all[N] = {}, earlier[N] = {};
#pragma unroll 8
    for (int block = warp_id(); block < blocks; block += warps()) {
      const auto count = load_vec<N>(sort.block_counts + element_offset(block, sort.experts, expert));
#pragma unroll
      for (int i = 0; i < N; ++i) {
        all[i] += count.v[i];
        earlier[i] += block < self ? count.v[i] : 0;
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      atomic_add(&total[expert + i], all[i]);
      atomic_add(&before[expert + i], earlier[i]);
    }
  }
}

// By one warp: total becomes the slots an expert keeps, begin its first row; begin[experts] is the end of the last one.
__device__ inline void scan_experts(const Sort& sort, int* total, int* begin) {
  int carry = 0;
  for (int base = 0; base < sort.experts; base += kWarp) {
    const int expert = base + lane_id();
    const bool inside = expert < sort.experts;
    const int slots = inside ? total[expert] : 0;
    const int kept = slots < sort.capacity ? slots : sort.capacity;
    const int padded = (kept + sort.align - 1) / sort.align * sort.align;
    int sum = padded;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = shfl_up(sum, step);
      sum += lane_id() >= step ? other : 0;
    }
    if (inside) {
      total[expert] = kept;
      begin[expert] = carry + sum - padded;
    }
    if (inside && blockIdx.x == 0) {
      sort.tokens_per_expert[expert] = kept;
      sort.offs[expert] = carry + sum;
    }
    carry += shfl_idx(sum, kWarp - 1);
  }
  if (lane_id() == 0) begin[sort.experts] = carry;
}

// counts[warp][expert] becomes the place, within the expert, of the warp's first slot.
__device__ inline void scan_warps(const Sort& sort, const int* before, int* counts) {
  for (int expert = thread(); expert < sort.experts; expert += threads()) {
    int place = before[expert];
    for (int warp = 0; warp < warps(); ++warp) {
      const int count = counts[warp * sort.experts + expert];
      counts[warp * sort.experts + expert] = place;
      place += count;
    }
  }
}

// -1 in the rows between an expert's last slot and the next expert, and after the last expert; blocks share them out.
__device__ inline void fill_padding(const Sort& sort, const int* kept, const int* begin) {
  const int blocks = static_cast<int>(gridDim.x);
  for (int expert = static_cast<int>(blockIdx.x); expert < sort.experts; expert += blocks) {
    for (int row = begin[expert] + kept[expert] + thread(); row < begin[expert + 1]; row += threads()) {
      sort.row_to_slot[row] = -1;
    }
  }
  for (int64_t row = begin[sort.experts] + int64_t{blockIdx.x} * threads() + thread(); row < sort.num_rows;
       row += int64_t{blocks} * threads()) {
    sort.row_to_slot[row] = -1;
  }
}

__global__ void __launch_bounds__(kMostWarps* kWarp, 1) place_kernel(Sort sort) {
  int* const counts = reinterpret_cast<int*>(dynamic_shared());                                   // [warps, experts]
  int* const total = counts + warps() * sort.experts;                                             // [experts]
  int* const before = total + sort.experts;                                                       // [experts]
  int* const begin = before + sort.experts;                                                       // [experts + 1]
  for (int expert = thread(); expert < 2 * sort.experts; expert += threads()) total[expert] = 0;  // and before
  count_by_warp(sort, counts);
  if (gridDim.x == 1) {
    for (int i = thread(); i < warps() * sort.experts; i += threads()) atomic_add(&total[i % sort.experts], counts[i]);
  } else {
    wait_for_launch_before();
    if (sort.experts % 4 == 0) {
      sum_blocks<4>(sort, total, before);
    } else {
      sum_blocks<1>(sort, total, before);
    }
  }
  sync_block();
  if (warp_id() == 0) scan_experts(sort, total, begin);
  scan_warps(sort, before, counts);
  sync_block();
  int* const places = counts + warp_id() * sort.experts;
  walk(sort, warp_range(sort), [&](int64_t slot, int expert, uint32_t peers) {
    int row = -1, place = 0;
    if (expert < sort.experts) {
      place = places[expert] + count_bits(peers & lanes_before());
      row = place < total[expert] ? begin[expert] + place : -1;
    }
    sync_warp();  // all have read before one writes
    if (expert < sort.experts && (peers & lanes_before()) == 0) places[expert] = place + count_bits(peers);
    sync_warp();
    if (slot < sort.slots) sort.slot_to_row[slot] = row;
    if (row >= 0) sort.row_to_slot[row] = static_cast<int32_t>(slot);
  });
  fill_padding(sort, total, begin);
}

int32_t to_int32(int64_t value) {
  return static_cast<int32_t>(std::min<int64_t>(value, std::numeric_limits<int32_t>::max()));
}

Sort sort_of(const RowMapArgs& args, const RowMapPlan& plan, void* workspace) {
  const int64_t experts = args.last - args.first;
  return {args.ids,
          args.slots,
          plan.slots_per_block,
          to_int32(args.first),
          to_int32(experts),
          to_int32(args.align),
          to_int32(args.capacity.value_or(std::numeric_limits<int32_t>::max())),
          row_map_rows(args.slots, experts, args.align),  // throws where int32 does not reach
          static_cast<int32_t*>(workspace),
          args.tokens_per_expert,
          args.offs,
          args.slot_to_row,
          args.row_to_slot};
}

}  // namespace

RowMapPlan row_map_plan(int64_t slots, int64_t experts) {
  if (experts > kMostRowMapExperts) {
    throw std::invalid_argument("row_map: " + std::to_string(experts) + " experts, the kernel takes " +
                                std::to_string(kMostRowMapExperts));
  }
  // One step for each warp, as long as the counts of each leave room for it; a power of two, which divides
  // slots_per_block.
  const bool one = slots <= kOneBlockSlots;
  int64_t warps = kTableWarps;
  while (one && warps * kStep < slots) warps *= 2;
  const int64_t in_one = warps * kStep;
  const auto place_ints = [&] { return (warps + kTables) * experts + 1; };
  while (warps > 1 && place_ints() > kSharedInts) warps /= 2;
  const int64_t most = std::clamp<int64_t>(ceil_div(slots, kFewSlots), 1, kMostBlocks);
  RowMapPlan plan;
  plan.slots_per_block =
      one ? in_one : std::max<int64_t>(checked_round_up(ceil_div(slots, most), kTableWarps * kWarp), kFewSlots);
  const int64_t blocks = std::max<int64_t>(ceil_div(slots, plan.slots_per_block), 1);
  const int block = static_cast<int>(warps * kWarp);
  plan.place = {blocks, block, static_cast<int>(place_ints() * 4)};
  plan.count = {blocks > 1 ? blocks : 0, block, static_cast<int>(warps * experts * 4)};
  plan.workspace_bytes = blocks > 1 ? blocks * experts * 4 : 0;
  return plan;
}

void row_map(const RowMapArgs& args, void* workspace, cudaStream_t stream) {
  const RowMapPlan plan = row_map_plan(args.slots, args.last - args.first);
  const Sort sort = sort_of(args, plan, workspace);
  if (plan.count.grid == 0) return launch(place_kernel, plan.place, stream, sort);  // not early: it reads ids at once
  launch(count_kernel, plan.count, stream, sort);
  launch_early(place_kernel, plan.place, stream, sort);
}

}  // namespace moe_overlap
