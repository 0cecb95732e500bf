// The activation kernels under the harness, against float64 formulas written out for one element at a time.
#include "cases.h"
#include "kernels/swiglu.cu"

namespace {

using cases::Buffer;
using cases::Random;
using namespace moe_overlap;

struct Case {
  Activation kind;
  int64_t rows, width, live, skew;
  bool has_offs, has_scale;
  int64_t num_offs;
};

Case random_case(Random& random, int64_t most_width) {
  const std::vector<int64_t> widths{1, 2, 3, 7, 8, 15, 16, 24, 40, 64, 72, 256, 264, 2047, 2048, 2056, 4096};
  Case c{};
  c.kind = random.pick(std::vector<Activation>{Activation::kSwiglu, Activation::kGelu, Activation::kRelu});
  do c.width = random.pick(widths);
  while (c.width > most_width);
  c.rows = random.range(0, c.width > 300 ? 5 : 40);
  c.has_offs = random.chance(0.7);
  c.num_offs = c.has_offs ? random.range(0, 3) : 0;
  c.live = !c.has_offs ? c.rows : c.num_offs == 0 ? 0 : random.range(0, c.rows + 2);
  c.has_scale = random.chance(0.6);
  c.skew = random.chance(0.2) ? 4 : 0;
  return c;
}

double sigmoid64(double x) { return 1.0 / (1.0 + std::exp(-x)); }

double value64(Activation kind, double x, double up) {
  if (kind == Activation::kSwiglu) return x * sigmoid64(x) * up;
  return kind == Activation::kGelu ? 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0))) : std::max(x, 0.0);
}

double slope64(Activation kind, double x) {  // without the factor `up`
  if (kind == Activation::kSwiglu) return sigmoid64(x) * (1.0 + x * (1.0 - sigmoid64(x)));
  if (kind == Activation::kRelu) return x > 0 ? 1.0 : 0.0;
  return 0.5 * (1.0 + std::erf(x / std::sqrt(2.0))) + x * std::exp(-0.5 * x * x) / std::sqrt(2.0 * std::acos(-1.0));
}

// One rounding to T and a few of float32, relative to the size of what was added up.
template <typename T>
bool near(double got, double want, double size) {
  const double step = sizeof(T) == 4 ? 0.0 : std::is_same_v<T, bf16> ? 1.0 / 256 : 1.0 / 2048;
  return std::fabs(got - want) <= step * std::fabs(want) + 1e-6 * size + (sizeof(T) == 4 ? 1e-12 : 1e-7);
}

template <typename T>
constexpr DType kDType = sizeof(T) == 4            ? DType::kFloat32
                         : std::is_same_v<T, bf16> ? DType::kBFloat16
                                                   : DType::kFloat16;

template <typename T>
struct Data {
  explicit Data(const Case& c, Random& random)
      : halves(c.kind == Activation::kSwiglu ? 2 : 1),
        h(c.rows * c.width * halves, c.skew),
        da(c.rows * c.width, c.skew),
        a(c.rows * c.width, c.skew),
        dh(c.rows * c.width * halves, c.skew),
        scale(c.rows),
        dscale(c.rows),
        offs(c.num_offs) {
    // Rows past the live ones keep their poison: reading them shows as NaN.
    const int64_t live = std::min(c.live, c.rows);
    for (int64_t i = 0; i < live * c.width * halves; ++i) h[i] = from_float<T>(2.0f * random.normal());
    for (int64_t i = 0; i < live * c.width; ++i) da[i] = from_float<T>(random.normal());
    for (int64_t row = 0; row < live; ++row) scale[row] = random.chance(0.1) ? 0.0f : random.normal();
    for (int64_t i = 0; i < c.num_offs; ++i) {
      offs[i] = static_cast<int32_t>(i + 1 == c.num_offs ? c.live : random.range(0, c.live));
    }
  }

  ActivationArgs args(const Case& c) {
    ActivationArgs args{};
    args.dtype = kDType<T>;
    args.kind = c.kind;
    args.rows = c.rows;
    args.width = c.width;
    args.h = h.data();
    args.row_scale = c.has_scale ? scale.data() : nullptr;
    args.has_offs = c.has_offs;
    args.offs = offs.data();
    args.num_offs = c.num_offs;
    return args;
  }

  double x(const Case& c, int64_t row, int64_t i, int64_t half) const {
    return to_float(h[row * c.width * halves + half * c.width + i]);
  }

  int64_t halves;
  Buffer<T> h, da, a, dh;
  Buffer<float> scale, dscale;
  Buffer<int32_t> offs;
};

template <typename T>
void check_forward(const Case& c, Random& random) {
  Data<T> data(c, random);
  ActivationArgs args = data.args(c);
  args.a = data.a.data();
  activation_forward(args, nullptr);
  for (int64_t row = 0; row < c.rows; ++row) {
    for (int64_t i = 0; i < c.width; ++i) {
      const double got = to_float(data.a[row * c.width + i]);
      if (row >= c.live) {
        CHECK(got == 0.0);
        continue;
      }
      const double x = data.x(c, row, i, 0), up = data.x(c, row, i, data.halves - 1);
      const double want = value64(c.kind, x, up) * (c.has_scale ? data.scale[row] : 1.0);
      CHECK(near<T>(got, want, std::fabs(want) + std::fabs(up) + std::fabs(x)));
    }
  }
}

template <typename T>
void check_backward(const Case& c, Random& random) {
  Data<T> data(c, random);
  ActivationArgs args = data.args(c);
  args.da = data.da.data();
  args.dh = data.dh.data();
  args.dscale = c.has_scale ? data.dscale.data() : nullptr;
  activation_backward(args, nullptr);
  for (int64_t row = 0; row < c.rows; ++row) {
    double dscale = 0.0, size = 0.0;
    for (int64_t i = 0; i < c.width; ++i) {
      const int64_t at = row * c.width * data.halves + i;
      if (row >= c.live) {
        CHECK(to_float(data.dh[at]) == 0.0f && to_float(data.dh[at + (data.halves - 1) * c.width]) == 0.0f);
        continue;
      }
      const double x = data.x(c, row, i, 0), up = data.x(c, row, i, data.halves - 1),
                   d = to_float(data.da[row * c.width + i]);
      const double scaled = d * (c.has_scale ? data.scale[row] : 1.0), value = value64(c.kind, x, up);
      const double factor = c.kind == Activation::kSwiglu ? up : 1.0;
      CHECK(near<T>(to_float(data.dh[at]), scaled * factor * slope64(c.kind, x), std::fabs(scaled * factor)));
      if (data.halves == 2) {
        CHECK(near<T>(to_float(data.dh[at + c.width]), scaled * x * sigmoid64(x), std::fabs(scaled * x)));
      }
      dscale += d * value;
      size += std::fabs(d) * (std::fabs(value) + std::fabs(x));  // 1 + erf(x) loses what x has against 1
    }
    if (c.has_scale) CHECK(near<float>(data.dscale[row], dscale, size + 1e-3));
  }
}

template <typename T>
void check_both(Random& random, int64_t most_width) {
  check_forward<T>(random_case(random, most_width), random);
  check_backward<T>(random_case(random, most_width), random);
}

TEST(activation_in_every_dtype) {
  cases::for_seeds("activation float32", 400, [](Random& random) { check_both<float>(random, 264); });
  cases::for_seeds("activation bf16", 400, [](Random& random) { check_both<bf16>(random, 264); });
  cases::for_seeds("activation fp16", 400, [](Random& random) { check_both<fp16>(random, 264); });
}

TEST(activation_of_wide_rows_uses_whole_blocks) {
  cases::for_seeds("activation wide", 100, [](Random& random) {
    check_both<float>(random, 4096);
    check_both<bf16>(random, 4096);
  });
}

// A row's gradient may depend on its width and contents alone.
TEST(dscale_has_the_same_bits_in_every_interleaving_and_beside_other_rows) {
  for (const int64_t width : {264, 2056}) {
    const Case c{Activation::kSwiglu, 9, width, 9, 0, false, true, 0};
    Random random(1);
    Data<bf16> data(c, random);
    std::vector<float> first;
    for (uint64_t seed = 0; seed < 6; ++seed) {
      simt::set_seed(seed);
      ActivationArgs args = data.args(c);
      args.rows = seed % 2 == 0 ? 9 : 3;
      args.da = data.da.data();
      args.dh = data.dh.data();
      args.dscale = data.dscale.data();
      activation_backward(args, nullptr);
      if (seed == 0) first.assign(data.dscale.data(), data.dscale.data() + 9);
      CHECK(std::memcmp(first.data(), data.dscale.data(), 3 * sizeof(float)) == 0);
    }
  }
}

TEST(activation_of_large_numbers_stays_finite_where_it_is) {
  const Case c{Activation::kSwiglu, 1, 8, 1, 0, false, false, 0};
  Random random(1);
  Data<float> data(c, random);
  const float gates[] = {-1e4f, -100.0f, -88.0f, -0.0f, 88.0f, 100.0f, 1e4f, 1e30f};
  for (int i = 0; i < 8; ++i) {
    data.h[i] = gates[i];
    data.h[8 + i] = 1.0f;
    data.da[i] = 1.0f;
  }
  ActivationArgs args = data.args(c);
  args.a = data.a.data();
  activation_forward(args, nullptr);
  args.a = nullptr;
  args.da = data.da.data();
  args.dh = data.dh.data();
  activation_backward(args, nullptr);
  for (int i = 0; i < 8; ++i) {
    CHECK(near<float>(data.a[i], gates[i] < -80 ? 0.0 : gates[i] > 80 ? gates[i] : 0.0, 1.0));
    CHECK(near<float>(data.dh[i], gates[i] < -80 ? 0.0 : gates[i] > 80 ? 1.0 : 0.5, 1.0));
  }
}

TEST(activation_config_follows_from_rows_and_width) {
  ActivationArgs args{};
  CHECK(activation_config(args).grid == 0);
  args.rows = 17;
  args.width = 2047;
  CHECK(activation_config(args).text() == "grid 3 block 256 shared 0 B");
  args.width = 2048;
  CHECK(activation_config(args).text() == "grid 17 block 256 shared 0 B");
}

}  // namespace
