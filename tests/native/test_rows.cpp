#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "core/row_math.h"
#include "core/rows.h"

using namespace moe_overlap::cpu;

#ifdef MOE_OVERLAP_SLOW_BUILD
static constexpr uint64_t kStep = 4099;  // every 4099th float32
#else
static constexpr uint64_t kStep = 1021;
#endif

// The distance of a result from the right one, in units in the last place of the right one.
template <typename T>
static long double ulps(T got, long double want) {
  if (std::isinf(static_cast<T>(want))) return got == static_cast<T>(want) ? 0 : 99;
  int exponent = 0;
  std::frexp(want, &exponent);
  const int lowest = std::numeric_limits<T>::min_exponent;
  const int digits = std::numeric_limits<T>::digits;
  return std::fabs(static_cast<long double>(got) - want) / std::ldexp(1.0L, std::max(exponent, lowest) - digits);
}

TEST(exp_is_within_two_units_of_every_float32_exponent) {
  long double worst = 0;
  for (uint64_t bits = 0; bits <= 0xffffffffu; bits += kStep) {
    const float x = bits_as<float>(static_cast<uint32_t>(bits));
    if (std::isnan(x)) {
      CHECK(std::isnan(exponential<float>(x)));
    } else {
      worst = std::max(worst, ulps<float>(exponential<float>(x), std::exp(static_cast<long double>(x))));
    }
  }
  CHECK(worst <= 2);
  std::printf("       exp of float32: %.2Lf units in the last place at most\n", worst);
}

TEST(exp_of_float64) {
  long double worst = 0;
  for (double x = -760; x < 720; x += static_cast<double>(kStep) * 1e-5 + 1e-7) {
    worst = std::max(worst, ulps<double>(exponential<double>(x), std::exp(static_cast<long double>(x))));
  }
  CHECK(worst <= 2);
  const double inf = std::numeric_limits<double>::infinity();
  CHECK(exponential<double>(inf) == inf && exponential<double>(-inf) == 0 && exponential<double>(0.0) == 1);
  CHECK(std::isnan(exponential<double>(std::nan(""))));
}

TEST(sixteen_bits_go_to_float32_and_back) {
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float from_bfloat16 = widen(BFloat16{half}), from_float16 = widen(Float16{half});
    BFloat16 bfloat16{};
    Float16 float16{};
    narrow(from_bfloat16, &bfloat16);
    narrow(from_float16, &float16);
    CHECK(std::isnan(from_bfloat16) ? std::isnan(widen(bfloat16)) : bfloat16.bits == half);
    CHECK(std::isnan(from_float16) ? std::isnan(widen(float16)) : float16.bits == half);
    // Between two neighbours the nearer one is taken, and of two that are equally near the even one.
    const float next_bfloat16 = widen(BFloat16{static_cast<uint16_t>(half + 1)});
    const float next_float16 = widen(Float16{static_cast<uint16_t>(half + 1)});
    if (std::isfinite(next_bfloat16) && std::isfinite(from_bfloat16) && (bits & 0x7fff) != 0x7fff) {
      narrow(from_bfloat16 + (next_bfloat16 - from_bfloat16) / 2, &bfloat16);
      CHECK(bfloat16.bits == half + (half & 1) || (bits & 0x7f80) == 0);  // halves of float32's smallest are not there
    }
    if (std::isfinite(next_float16) && std::isfinite(from_float16) && (bits & 0x7fff) != 0x7fff) {
      narrow(from_float16 + (next_float16 - from_float16) / 2, &float16);
      CHECK(float16.bits == half + (half & 1));
      narrow(from_float16 + (next_float16 - from_float16) / 4, &float16);
      CHECK(float16.bits == half);
    }
  }
  Float16 float16{};
  narrow(65519.0f, &float16);
  CHECK(float16.bits == 0x7bff);
  narrow(65520.0f, &float16);
  CHECK(float16.bits == 0x7c00);
  CHECK(widen(Float16{1}) == 0x1p-24f && widen(Float16{0x3c00}) == 1 && widen(BFloat16{0x3f80}) == 1);
}

// Bytes of numbers of a type: whatever the bits, but no NaN, of which the bits are free.
template <typename T>
static std::vector<T> numbers(int64_t count, uint64_t seed) {
  std::vector<T> result(static_cast<size_t>(count));
  uint64_t state = seed * 0x9e3779b97f4a7c15u + 1;
  for (T& value : result) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const auto whole = static_cast<int64_t>(state >> 33) % 2001 - 1000;
    narrow(static_cast<Accumulation<T>>(whole) / Accumulation<T>{128}, &value);
  }
  return result;
}

template <typename T>
static bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

TEST(combine_of_a_worked_example) {
  const std::vector<float> y{1, 2, 10, 20, 100, 200};
  const std::vector<int32_t> map{2, 0, -1, 1, -1, -1};
  const std::vector<float> weights{1, 2, 9, 3, 9, 9}, residual{0, 0, 1, 1, 5, 6};
  for (const RowKernels* kernels : row_kernels()) {
    std::vector<float> out(6, 99);
    CombineArgs args{Float::kFloat32, 2, 2, y.data(), map.data(), weights.data(), residual.data(), out.data()};
    kernels->combine(args, 0, 2);
    CHECK((out == std::vector<float>{102, 204, 31, 61, 99, 99}));  // the last token is not in the range
    args.weights = args.residual = nullptr;
    kernels->combine(args, 1, 3);
    CHECK((out == std::vector<float>{102, 204, 10, 20, 0, 0}));
  }
}

template <typename T>
static void combine_is_the_same_everywhere(Float dtype, int64_t width) {
  using A = Accumulation<T>;
  const int64_t tokens = 7, k = 3, rows = 16;
  std::vector<int32_t> map(tokens * k, -1);
  for (int32_t slot = 0; slot < tokens * k; ++slot) {
    if (slot % 4 != 3) map[static_cast<size_t>(slot)] = (slot * 5) % 21 < rows ? (slot * 5) % 21 : -1;
  }
  const auto y = numbers<T>(rows * width, 1), residual = numbers<T>(tokens * width, 2);
  const auto weights = numbers<A>(tokens * k, 3);
  std::vector<T> first_out, first_rows;
  std::vector<A> first_dweights;
  for (const RowKernels* kernels : row_kernels()) {
    std::vector<T> out = numbers<T>(tokens * width, 9), dy_rows = numbers<T>(rows * width, 9);
    std::vector<A> dweights(tokens * k, 99);
    kernels->combine({dtype, k, width, y.data(), map.data(), weights.data(), residual.data(), out.data()}, 0, tokens);
    const CombineBackwardArgs back{
        dtype, k, width, residual.data(), y.data(), map.data(), weights.data(), dy_rows.data(), dweights.data()};
    kernels->combine_backward(back, 0, 3);
    kernels->combine_backward(back, 3, tokens);
    if (first_out.empty()) {
      first_out = out, first_rows = dy_rows, first_dweights = dweights;
    } else {
      CHECK(same(out, first_out) && same(dy_rows, first_rows) && same(dweights, first_dweights));
    }
  }
}

template <typename T>
static void activations_are_the_same_everywhere(Float dtype, Activation kind, int64_t width) {
  using A = Accumulation<T>;
  const int64_t rows = 5, wide = kind == Activation::kSwiglu ? 2 * width : width;
  const auto h = numbers<T>(rows * wide, 1), da = numbers<T>(rows * width, 2);
  const auto scale = numbers<A>(rows, 3);
  std::vector<T> first_a, first_dh;
  std::vector<A> first_dscale;
  for (const RowKernels* kernels : row_kernels()) {
    std::vector<T> a(static_cast<size_t>(rows * width)), a_again = a, dh = h;  // dh over h
    std::vector<A> dscale(rows, 99);
    ActivationArgs args{dtype, kind, width, h.data(), scale.data(), a.data(), nullptr, nullptr, nullptr};
    kernels->activation(args, 0, 2);
    kernels->activation(args, 2, rows);
    args.h = args.dh = dh.data();
    args.a = a_again.data(), args.da = da.data(), args.dscale = dscale.data();
    kernels->activation_backward(args, 0, rows);
    CHECK(same(a, a_again));
    if (first_a.empty()) {
      first_a = a, first_dh = dh, first_dscale = dscale;
    } else {
      CHECK(same(a, first_a) && same(dh, first_dh) && same(dscale, first_dscale));
    }
  }
}

template <typename T>
static void all_are_the_same_everywhere(Float dtype) {
  for (const int64_t width : {0, 1, 63, 64, 65, 130, 512, 577}) {
    combine_is_the_same_everywhere<T>(dtype, width);
    activations_are_the_same_everywhere<T>(dtype, Activation::kSwiglu, width);
    activations_are_the_same_everywhere<T>(dtype, Activation::kRelu, width);
  }
}

TEST(every_compilation_gives_the_same_bits) {
  CHECK(std::string(row_kernels().back()->name) == "baseline");
  all_are_the_same_everywhere<float>(Float::kFloat32);
  all_are_the_same_everywhere<BFloat16>(Float::kBFloat16);
  all_are_the_same_everywhere<Float16>(Float::kFloat16);
  all_are_the_same_everywhere<double>(Float::kFloat64);
}

TEST(rows_that_no_slot_points_to_are_cleared_and_two_slots_on_one_are_found) {
  const std::vector<int32_t> map{3, -1, 0, 1};
  const std::vector<float> x{1, 2, 3, 4};
  std::vector<uint8_t> used(5, 7);
  CHECK(mark_rows(map.data(), 4, 5, used.data()) == -1);
  CHECK((used == std::vector<uint8_t>{1, 1, 0, 1, 0}));
  std::vector<float> out(10, 99);
  copy_to_rows(x.data(), map.data(), 2, 8, out.data(), 0, 2);
  clear_unused_rows(used.data(), 8, out.data(), 0, 5);
  CHECK((out == std::vector<float>{3, 4, 3, 4, 0, 0, 1, 2, 0, 0}));
  const std::vector<int32_t> bad{3, 1, 3, 0};
  CHECK(mark_rows(bad.data(), 4, 5, used.data()) == 3);
}
