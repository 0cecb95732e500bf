// The SIMT harness: CUDA kernels as plain C++ on one host thread. Each GPU thread is a fiber; barriers and warp
// operations are the points where fibers meet; which fiber runs next, how many blocks are resident and in which order
// they start follow from a seed. It finds errors of indexing, of synchronisation (a barrier that is missing, divergent
// or not reached) and of tails. It says nothing about memory ordering or speed: a kernel that passes here has not been
// verified on a GPU.
//
// Stricter than the hardware on purpose: no thread may leave a kernel while another one waits at a barrier, and all
// threads that meet must do so at the same line.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

// ---- the words of CUDA that g++ does not know ----

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
};
// Of the fiber that runs at present.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

// What a kernel did wrong, with block, threads and lines.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Everything that a seed decides comes from here. Seed 0: threads and blocks in their order.
void set_seed(uint64_t seed);
// A launch that takes more turns than this is reported as one that makes no progress.
void set_turn_limit(int64_t turns);

void launch(int64_t grid, int block, int shared_bytes, const std::function<void()>& kernel);

enum class Op { kBarrier, kSync, kShuffle, kBallot, kMatch, kMax };
constexpr const char* kOpNames[] = {"sync_block", "sync_warp", "shfl", "ballot", "match_any", "reduce_max"};

// Where a fiber meets others: `line` of `file` is reported, and has to be the same for all of them.
struct Site {
  Op op;
  const char* file;
  int line;
};

void meet_block(const Site& site);
// The lanes of `members` meet. The result: for a shuffle, what lane `source` brought; else what the operation gives.
uint64_t meet_warp(const Site& site, uint32_t members, uint64_t value, int source);
// Lets other fibers run first, if the seed says so (at atomics) or always (where a fiber waits for a flag).
void maybe_yield();
// What the launch before writes is there only from the first wait for it on: `writes` runs then. Launches that are not
// told so follow one another.
void set_launch_before(const std::function<void()>& writes);
void finish_launch_before();
void yield();
int lane();

void* shared_array(const void* key, int64_t bytes);
unsigned char* dynamic_shared();

}  // namespace simt

// Each block has its own array, on the heap so that AddressSanitizer knows its end, and poisoned.
#define SHARED_ARRAY(type, name, count) \
  static const char name##_key = 0;     \
  type* const name = static_cast<type*>(simt::shared_array(&name##_key, int64_t{sizeof(type)} * (count)))

namespace moe_overlap {

struct bf16;
struct fp16;

#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline unsigned char* dynamic_shared() { return simt::dynamic_shared(); }
inline void sync_block(SIMT_SITE) { simt::meet_block({simt::Op::kBarrier, file, line}); }
inline void sync_warp(uint32_t members = 0xffffffffu, SIMT_SITE) {
  simt::meet_warp({simt::Op::kSync, file, line}, members, 0, 0);
}

template <typename T>
T shuffle_from(int source, T value, uint32_t members, const char* file, int line) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = simt::meet_warp({simt::Op::kShuffle, file, line}, members, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
// The lane itself where the source would lie outside its segment of `width` lanes.
inline int lane_in_segment(int source, int width) {
  return source / width == simt::lane() / width && source >= 0 ? source : simt::lane();
}

template <typename T>
T shfl_xor(T value, int lane_mask, int width = 32, uint32_t members = 0xffffffffu, SIMT_SITE) {
  return shuffle_from(lane_in_segment(simt::lane() ^ lane_mask, width), value, members, file, line);
}
template <typename T>
T shfl_down(T value, int delta, int width = 32, uint32_t members = 0xffffffffu, SIMT_SITE) {
  return shuffle_from(lane_in_segment(simt::lane() + delta, width), value, members, file, line);
}
template <typename T>
T shfl_up(T value, int delta, int width = 32, uint32_t members = 0xffffffffu, SIMT_SITE) {
  return shuffle_from(lane_in_segment(simt::lane() - delta, width), value, members, file, line);
}
template <typename T>
T shfl_idx(T value, int lane, int width = 32, uint32_t members = 0xffffffffu, SIMT_SITE) {
  const int begin = simt::lane() / width * width;
  return shuffle_from(begin + (lane & (width - 1)), value, members, file, line);
}
inline uint32_t ballot(bool predicate, uint32_t members = 0xffffffffu, SIMT_SITE) {
  return static_cast<uint32_t>(simt::meet_warp({simt::Op::kBallot, file, line}, members, predicate, 0));
}
inline uint32_t match_any(uint32_t value, uint32_t members = 0xffffffffu, SIMT_SITE) {
  return static_cast<uint32_t>(simt::meet_warp({simt::Op::kMatch, file, line}, members, value, 0));
}
inline uint32_t reduce_max(uint32_t value, uint32_t members = 0xffffffffu, SIMT_SITE) {
  return static_cast<uint32_t>(simt::meet_warp({simt::Op::kMax, file, line}, members, value, 0));
}

inline int atomic_add(int* address, int value) {
  simt::maybe_yield();
  const int before = *address;
  *address = before + value;
  return before;
}
inline int atomic_or(int* address, int value) {
  simt::maybe_yield();
  const int before = *address;
  *address = before | value;
  return before;
}
inline uint64_t atomic_exchange(uint64_t* address, uint64_t value) {
  simt::maybe_yield();
  const uint64_t before = *address;
  *address = value;
  return before;
}
inline uint64_t load_acquire(const uint64_t* address) {
  simt::yield();
  return *address;
}
inline void store_release(uint64_t* address, uint64_t value) {
  simt::maybe_yield();
  *address = value;
}
inline void fence_device() {}
inline void let_next_launch_start() {}
inline void wait_for_launch_before() { simt::finish_launch_before(); }

inline int count_bits(uint32_t value) { return __builtin_popcount(value); }
inline int leading_zeros(uint32_t value) { return value == 0 ? 32 : __builtin_clz(value); }
inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float exp_f32(float x) { return std::exp(x); }
inline float erf_f32(float x) { return std::erf(x); }
inline float divide_fast(float a, float b) { return std::fabs(b) > 0x1p126f ? 0.0f : a / b; }
inline float mul_rn(float a, float b) { return a * b; }
inline float add_rn(float a, float b) { return a + b; }
inline float exp2_fast(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }
inline float max_nan(float a, float b) { return a > b || std::isnan(a) ? a : b; }
inline float min_nan(float a, float b) { return a < b || std::isnan(a) ? a : b; }

float to_float(bf16 value);
float to_float(fp16 value);
inline float to_float(float value) { return value; }
template <typename T>
T from_float(float value);
template <>
bf16 from_float<bf16>(float value);
template <>
fp16 from_float<fp16>(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}

}  // namespace moe_overlap
