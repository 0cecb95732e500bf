// combine and its backward under the harness, against a loop over slots.
#include "cases.h"
#include "kernels/combine.cu"
#include "kernels/permute.cu"
#include "slots.h"

namespace {

using cases::Buffer;
using cases::Random;
using namespace moe_overlap;

// A tensor of any of the three dtypes, filled with normal numbers rounded to it.
class Floats {
 public:
  Floats(DType dtype, int64_t count, int64_t skew) : dtype_(dtype), bytes_(count * dtype_bytes(dtype), skew) {}
  void fill(Random& random) {
    for (int64_t i = 0; i < static_cast<int64_t>(bytes_.size()) / dtype_bytes(dtype_); ++i) set(i, random.normal());
  }
  float get(int64_t i) const {
    float value = 0.0f;
    with_dtype(dtype_, [&](auto element) { value = to_float(at<decltype(element)>(i)); });
    return value;
  }
  void set(int64_t i, float value) {
    with_dtype(dtype_, [&](auto element) {
      using T = decltype(element);
      const_cast<T&>(at<T>(i)) = from_float<T>(value);
    });
  }
  void* data() { return bytes_.data(); }
  // -0 counts as 0, since a sum may begin with either.
  bool equal(const Floats& other) const {
    for (int64_t i = 0; i < static_cast<int64_t>(bytes_.size()) / dtype_bytes(dtype_); ++i) {
      if (!(get(i) == other.get(i))) return false;
    }
    return true;
  }

 private:
  template <typename T>
  const T& at(int64_t i) const {
    return reinterpret_cast<const T*>(bytes_.data())[i];
  }
  DType dtype_;
  Buffer<unsigned char> bytes_;
};

DType random_dtype(Random& random) { return static_cast<DType>(random.range(0, 2)); }

// Where the addresses lie: mostly for 16-byte accesses, else off by some elements.
int64_t random_skew(Random& random, DType dtype) {
  return random.chance(0.7) ? 0 : dtype_bytes(dtype) * random.range(1, 3);
}

// NaN where there is no row: its weight must not matter.
void fill_weights(Buffer<float>& weights, const cases::Slots& slots, Random& random) {
  for (int64_t slot = 0; slot < slots.tokens * slots.k; ++slot) {
    const int32_t row = slots.slot_to_row[slot];
    weights[slot] = row >= 0 && row < slots.num_rows ? random.normal() : NAN;
  }
}

TEST(combine_sums_in_the_order_of_k) {
  cases::for_seeds("combine", 1200, [](Random& random) {
    const cases::Slots slots(random);
    const DType dtype = random_dtype(random), residual_dtype = random_dtype(random);
    const int64_t width = cases::random_width(random, slots), skew = random_skew(random, dtype);
    const bool weighted = random.chance(0.6), with_residual = random.chance(0.4);
    Floats y(dtype, slots.num_rows * width, skew), out(dtype, slots.tokens * width, skew),
        want(dtype, slots.tokens * width, skew);
    Floats residual(residual_dtype, slots.tokens * width, random_skew(random, residual_dtype));
    Buffer<float> weights(slots.tokens * slots.k);
    y.fill(random);
    residual.fill(random);
    fill_weights(weights, slots, random);
    for (int64_t t = 0; t < slots.tokens; ++t) {
      for (int64_t column = 0; column < width; ++column) {
        float sum = 0.0f;
        for (int64_t slot = t * slots.k; slot < (t + 1) * slots.k; ++slot) {
          const int32_t row = slots.slot_to_row[slot];
          if (row < 0 || row >= slots.num_rows) continue;
          const float part = y.get(row * width + column) * (weighted ? weights[slot] : 1.0f);
          sum = sum + part;
        }
        want.set(t * width + column, with_residual ? sum + residual.get(t * width + column) : sum);
      }
    }
    combine({y.data(), slots.slot_to_row.data(), weighted ? weights.data() : nullptr,
             with_residual ? residual.data() : nullptr, slots.tokens, slots.k, width, slots.num_rows, dtype,
             residual_dtype, out.data()},
            nullptr);
    CHECK(out.equal(want));
  });
}

struct Gradients {
  Gradients(DType dtype, const cases::Slots& slots, int64_t width, int64_t skew)
      : dy_rows(dtype, slots.num_rows * width, skew), dweights(slots.tokens * slots.k) {}
  Floats dy_rows;
  Buffer<float> dweights;
};

TEST(combine_backward_spreads_and_multiplies) {
  cases::for_seeds("combine_backward", 1000, [](Random& random) {
    const cases::Slots slots(random);
    const DType dtype = random_dtype(random);
    const int64_t width = cases::random_width(random, slots), skew = random_skew(random, dtype);
    const bool weighted = random.chance(0.8), with_y = weighted && random.chance(0.7);
    Floats dy(dtype, slots.tokens * width, skew), y(dtype, slots.num_rows * width, skew);
    Buffer<float> weights(slots.tokens * slots.k);
    dy.fill(random);
    y.fill(random);
    fill_weights(weights, slots, random);
    Floats want(dtype, slots.num_rows * width, skew);
    for (int64_t i = 0; i < slots.num_rows * width; ++i) want.set(i, 0.0f);
    std::vector<double> dot(static_cast<size_t>(slots.tokens * slots.k), 0.0), size = dot;
    for (int64_t slot = 0; slot < slots.tokens * slots.k; ++slot) {
      const int32_t row = slots.slot_to_row[slot];
      if (row < 0 || row >= slots.num_rows) continue;
      for (int64_t column = 0; column < width; ++column) {
        const float d = dy.get(slot / slots.k * width + column), other = y.get(row * width + column);
        want.set(row * width + column, weighted ? d * weights[slot] : d);
        dot[static_cast<size_t>(slot)] += double{d} * double{other};
        size[static_cast<size_t>(slot)] += std::fabs(double{d} * double{other});
      }
    }
    const auto run = [&](Gradients& got) {
      combine_backward({dy.data(), with_y ? y.data() : nullptr, slots.slot_to_row.data(),
                        weighted ? weights.data() : nullptr, slots.tokens, slots.k, width, slots.num_rows, dtype,
                        got.dy_rows.data(), with_y ? got.dweights.data() : nullptr},
                       nullptr);
    };
    Gradients got(dtype, slots, width, skew), again(dtype, slots, width, skew);
    run(got);
    CHECK(got.dy_rows.equal(want));
    if (!with_y) return;
    for (size_t slot = 0; slot < dot.size(); ++slot) {
      const double error = std::fabs(double{got.dweights[static_cast<int64_t>(slot)]} - dot[slot]);
      CHECK(error <= 1e-6 * size[slot]);
    }
    simt::set_seed(12345);  // another interleaving, the same bits
    run(again);
    CHECK(again.dweights.same_bytes(got.dweights));
  });
}

TEST(combine_tiling_splits_rows_only_where_it_may) {
  alignas(16) static unsigned char memory[16];
  CombineArgs args{memory, nullptr, nullptr, nullptr, 8, 8, 7168, 64, DType::kBFloat16, DType::kBFloat16, memory};
  CHECK(combine_tiling(args).launch.text() == "grid 28 block 256 shared 0 B" && combine_tiling(args).splits == 7);
  args.tokens = 8192;
  CHECK(combine_tiling(args).launch.text() == "grid 4096 block 256 shared 0 B");
  args.k = 2;  // 896 words, 4 a thread: 7 rounds of 32 threads
  CHECK(combine_tiling(args).threads_per_row == 32);
  args.width = 4096;
  CHECK(combine_tiling(args).threads_per_row == 128);
  args.k = 8;
  args.width = 7169;  // no 16-byte accesses
  CHECK(combine_tiling(args).threads_per_row == 32);
  float dweights[1];
  CombineBackwardArgs backward{memory, memory, nullptr, dweights, 8, 8, 7168, 64, DType::kBFloat16, memory, dweights};
  CHECK(combine_tiling(backward).splits == 1 &&
        combine_tiling(backward).launch.text() == "grid 6 block 256 shared 4 B");
  backward.dweights = nullptr;
  CHECK(combine_tiling(backward).splits == 7 && combine_tiling(backward).clearing == 2);
}

TEST(combine_backward_refuses_half_the_arguments) {
  float dweights[1];
  const CombineBackwardArgs args{nullptr, nullptr, nullptr, nullptr, 1, 1, 8, 1, DType::kBFloat16, nullptr, dweights};
  CHECK_THROWS((combine_backward(args, nullptr), 0), std::invalid_argument, "needs the weights and y");
}

}  // namespace
