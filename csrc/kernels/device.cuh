// Every hardware instruction the kernels use, behind a name of ours. nvcc sees the instructions; g++ (the SIMT harness
// of tests/native/simt) sees the same names on fibers. Warps have 32 lanes; `members` names the lanes that take part,
// and all of them must call the same function with the same `members`.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/checked_math.h"
#include "kernels/kernels.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "simt.h"
#endif

namespace moe_overlap {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

// 16-bit floats are storage only: arithmetic is in float32.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

#ifdef __CUDACC__

// A static array in shared memory. Under the harness each block has its own, poisoned.
#define SHARED_ARRAY(type, name, count) __shared__ type name[count]

__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[];
  return dynamic_shared_bytes;
}

__device__ inline void sync_block() { __syncthreads(); }
__device__ inline void sync_warp(uint32_t members = kAllLanes) { __syncwarp(members); }

template <typename T>
__device__ inline T shfl_xor(T value, int lane_mask, int width = kWarp, uint32_t members = kAllLanes) {
  return __shfl_xor_sync(members, value, lane_mask, width);
}
template <typename T>
__device__ inline T shfl_down(T value, int delta, int width = kWarp, uint32_t members = kAllLanes) {
  return __shfl_down_sync(members, value, static_cast<unsigned>(delta), width);
}
template <typename T>
__device__ inline T shfl_up(T value, int delta, int width = kWarp, uint32_t members = kAllLanes) {
  return __shfl_up_sync(members, value, static_cast<unsigned>(delta), width);
}
template <typename T>
__device__ inline T shfl_idx(T value, int lane, int width = kWarp, uint32_t members = kAllLanes) {
  return __shfl_sync(members, value, lane, width);
}
__device__ inline uint32_t ballot(bool predicate, uint32_t members = kAllLanes) {
  return __ballot_sync(members, predicate);
}
// The lanes of `members` that hold the same value as this one.
__device__ inline uint32_t match_any(uint32_t value, uint32_t members = kAllLanes) {
  return __match_any_sync(members, value);
}
__device__ inline uint32_t reduce_max(uint32_t value, uint32_t members = kAllLanes) {
  return __reduce_max_sync(members, value);
}

// Only where the result does not depend on the order: counts and flags of integers, never floats.
__device__ inline int atomic_add(int* address, int value) { return atomicAdd(address, value); }
__device__ inline int atomic_or(int* address, int value) { return atomicOr(address, value); }
__device__ inline uint64_t atomic_exchange(uint64_t* address, uint64_t value) {
  static_assert(sizeof(unsigned long long) == sizeof(uint64_t), "the type that CUDA's atomics take");
  return atomicExch(reinterpret_cast<unsigned long long*>(address), value);
}

// Flags between blocks: what was written before the release is seen by whoever acquires the value.
__device__ inline uint64_t load_acquire(const uint64_t* address) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}
__device__ inline void store_release(uint64_t* address, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}
__device__ inline void fence_device() { __threadfence(); }

// Between two launches of which the second one starts early (launch_early). The first one calls let_next_launch_start;
// once all its blocks have, those of the second may start. That one calls wait_for_launch_before ahead of its first
// access to anything that the first one writes, or that may still be read there: all of it is done then, and is seen.
// Neither does anything in another launch, or before compute capability 9.0.
__device__ inline void let_next_launch_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline int count_bits(uint32_t value) { return __popc(value); }
__device__ inline int leading_zeros(uint32_t value) { return __clz(static_cast<int>(value)); }
__device__ inline uint32_t float_bits(float value) { return __float_as_uint(value); }
__device__ inline float bits_float(uint32_t bits) { return __uint_as_float(bits); }

// Accurate (1 ulp), not the fast approximation: the reference of every operator uses the accurate one too.
__device__ inline float exp_f32(float x) { return expf(x); }
__device__ inline float erf_f32(float x) { return erff(x); }
// 2 ulp; 0 where b passes 2^126.
__device__ inline float divide_fast(float a, float b) { return __fdividef(a, b); }
// Rounded separately, never contracted into a fused multiply-add: where a sum must equal the reference's bit for bit.
__device__ inline float mul_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float add_rn(float a, float b) { return __fadd_rn(a, b); }
// 2^x with a relative error of 2^-22, in one instruction; 0 where the result is below 2^-126.
__device__ inline float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
// NaN if one of the two is: fmaxf and fminf would hide it.
__device__ inline float max_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
__device__ inline float min_nan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(bf16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
__device__ inline float to_float(fp16 value) { return __half2float(__ushort_as_half(value.bits)); }

template <typename T>
__device__ inline T from_float(float value);  // to nearest, ties to even
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline bf16 from_float<bf16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
__device__ inline fp16 from_float<fp16>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}

#endif  // __CUDACC__

// N elements that move in one access when N * sizeof(T) is 16 (or 8, 4, 2): the address must be a multiple of it.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
};
template <typename T>
constexpr int kVec = static_cast<int>(16 / sizeof(T));

template <int N, typename T>
__device__ inline Vec<T, N> load_vec(const T* address) {
  return *reinterpret_cast<const Vec<T, N>*>(address);
}
template <typename T, int N>
__device__ inline void store_vec(T* address, const Vec<T, N>& value) {
  *reinterpret_cast<Vec<T, N>*>(address) = value;
}

// Data that is read or written once: do not keep it in the caches.
struct alignas(16) Bytes16 {
  uint32_t word[4];
};
__device__ inline Bytes16 load_streaming(const Bytes16* address) {
#ifdef __CUDACC__
  const uint4 value = __ldcs(reinterpret_cast<const uint4*>(address));
  return {{value.x, value.y, value.z, value.w}};
#else
  return *address;
#endif
}
__device__ inline void store_streaming(Bytes16* address, const Bytes16& value) {
#ifdef __CUDACC__
  __stcs(reinterpret_cast<uint4*>(address), make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]));
#else
  *address = value;
#endif
}

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }

// The sum over `width` neighbouring lanes in a fixed tree, the same in all of them. A butterfly adds the same pairs in
// every lane, and float addition commutes, so all lanes hold the same bits.
__device__ inline float warp_sum(float value, int width = kWarp, uint32_t members = kAllLanes) {
  for (int step = width / 2; step > 0; step /= 2) value = add_rn(value, shfl_xor(value, step, width, members));
  return value;
}

}  // namespace moe_overlap
