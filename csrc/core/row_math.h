// Numbers of 16 bits by integer arithmetic, and exp, in plain C++ that a compiler turns into vector instructions of any
// width. Each operation rounds by itself (-ffp-contract=off), so the width does not change a bit.
//
// All has internal linkage: files that include this are compiled for different CPUs, and a function that one of them
// shared with another could be one that the CPU at hand does not have. For the same reason nothing of the standard
// library but memcpy, which is the compiler's own, is called here.
#pragma once

#include <cstdint>
#include <cstring>

#define MOE_OVERLAP_INLINE inline __attribute__((always_inline))

namespace moe_overlap::cpu {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// In what rows of T are computed.
template <typename T>
struct AccumulationOf {
  using type = float;
};
template <>
struct AccumulationOf<double> {
  using type = double;
};
template <typename T>
using Accumulation = typename AccumulationOf<T>::type;

template <typename To, typename From>
MOE_OVERLAP_INLINE To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "the same number of bits");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

MOE_OVERLAP_INLINE float widen(float value) { return value; }
MOE_OVERLAP_INLINE double widen(double value) { return value; }
MOE_OVERLAP_INLINE float widen(BFloat16 value) { return bits_as<float>(uint32_t{value.bits} << 16); }

MOE_OVERLAP_INLINE float widen(Float16 value) {
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t infinite = magnitude + (224u << 23);  // or NaN
  // A number below 2^-14 has no leading 1: one is put before it and taken off again.
  const float tiny = bits_as<float>(magnitude + (113u << 23)) - bits_as<float>(113u << 23);
  uint32_t result = magnitude < (1u << 23) ? bits_as<uint32_t>(tiny) : normal;
  result = magnitude >= (31u << 23) ? infinite : result;
  return bits_as<float>(result | (value.bits & 0x8000u) << 16);
}

// To the nearest, ties to even.
MOE_OVERLAP_INLINE void narrow(float value, float* to) { *to = value; }
MOE_OVERLAP_INLINE void narrow(double value, double* to) { *to = value; }

MOE_OVERLAP_INLINE void narrow(float value, BFloat16* to) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

MOE_OVERLAP_INLINE void narrow(float value, Float16* to) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Below 2^-14 the addition of 1/2 rounds to a multiple of 2^-24, the unit of the result.
  const uint32_t tiny = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - bits_as<uint32_t>(0.5f);
  const uint32_t infinite = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t result = magnitude < (113u << 23) ? tiny : normal;
  result = magnitude >= (143u << 23) ? infinite : result;
  to->bits = static_cast<uint16_t>(result | (bits >> 16 & 0x8000u));
}

// What exp needs to know about a type.
template <typename A>
struct ExpOf;

template <>
struct ExpOf<float> {
  using Bits = uint32_t;
  using Int = int32_t;
  static constexpr int kMantissa = 23;
  static constexpr Bits kBias = 127;
  static constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: a sum with it is a whole number
  static constexpr float kLowest = -104.0f;     // exp is 0 from here on down, and inf from the next one on
  static constexpr float kHighest = 89.0f;
  static constexpr float kLog2E = 1.44269504088896341f;
  static constexpr float kLn2High = 0.693359375f;  // few enough bits for an exact product with a whole number
  static constexpr float kLn2Low = -2.12194440e-4f;

  // (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2: the minimax polynomial of Cephes' expf.
  static MOE_OVERLAP_INLINE float tail(float r) {
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    return p * r + 5.0000001201e-1f;
  }
};

template <>
struct ExpOf<double> {
  using Bits = uint64_t;
  using Int = int64_t;
  static constexpr int kMantissa = 52;
  static constexpr Bits kBias = 1023;
  static constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLowest = -746.0;
  static constexpr double kHighest = 710.0;
  static constexpr double kLog2E = 1.44269504088896340736;
  static constexpr double kLn2High = 6.93147180369123816490e-01;
  static constexpr double kLn2Low = 1.90821492927058770002e-10;

  // The series up to r^13: what is left out is below 2^-57 of the result.
  static MOE_OVERLAP_INLINE double tail(double r) {
    double p = 1.0 / 6227020800.0;
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    return p * r + 0.5;
  }
};

// 2^n for a normal result.
template <typename A>
MOE_OVERLAP_INLINE A power_of_two(typename ExpOf<A>::Int n) {
  using E = ExpOf<A>;
  return bits_as<A>((static_cast<typename E::Bits>(n) + E::kBias) << E::kMantissa);
}

// e^x, within 2 units in the last place everywhere: subnormal results, 0, inf and NaN included.
template <typename A>
MOE_OVERLAP_INLINE A exponential(A x) {
  using E = ExpOf<A>;
  x = x > E::kHighest ? E::kHighest : x;  // NaN stays
  x = x < E::kLowest ? E::kLowest : x;
  const A shifted = x * E::kLog2E + E::kShift;
  const A whole = shifted - E::kShift;
  const auto n =
      static_cast<typename E::Int>(bits_as<typename E::Bits>(shifted) - bits_as<typename E::Bits>(E::kShift));
  const A r = (x - whole * E::kLn2High) - whole * E::kLn2Low;
  const A mantissa = (E::tail(r) * (r * r) + r) + A{1};
  // In two steps: 2^n itself may be no normal number.
  const auto half = static_cast<typename E::Int>(n >> 1);
  return mantissa * power_of_two<A>(half) * power_of_two<A>(static_cast<typename E::Int>(n - half));
}

template <typename A>
MOE_OVERLAP_INLINE A sigmoid(A x) {
  return A{1} / (A{1} + exponential<A>(-x));
}

}  // namespace
}  // namespace moe_overlap::cpu
