// permute under the harness, against a loop over slots.
#include "cases.h"
#include "kernels/permute.cu"
#include "slots.h"

namespace {

using cases::Buffer;
using cases::Random;
using moe_overlap::PermuteArgs;

TEST(permute_copies_each_token_to_its_rows_and_zeroes_the_rest) {
  cases::for_seeds("permute", 1500, [](Random& random) {
    const cases::Slots slots(random);
    const int element_bytes = random.pick(std::vector<int>{2, 4, 8});
    const int64_t width = cases::random_width(random, slots), row_bytes = width * element_bytes;
    const int64_t skew = random.pick(std::vector<int64_t>{0, 0, 4, 8}) / element_bytes * element_bytes;
    Buffer<unsigned char> x(slots.tokens * row_bytes, skew), out(slots.num_rows * row_bytes, skew),
        want(slots.num_rows * row_bytes, skew);
    Buffer<uint8_t> used(slots.num_rows);
    for (size_t i = 0; i < x.size(); ++i) x.data()[i] = static_cast<unsigned char>(random.range(0, 255));
    std::memset(want.data(), 0, want.size());
    for (int64_t slot = 0; slot < slots.tokens * slots.k; ++slot) {
      const int32_t row = slots.slot_to_row[slot];
      if (row < 0 || row >= slots.num_rows) continue;
      std::memcpy(want.data() + row * row_bytes, x.data() + slot / slots.k * row_bytes, static_cast<size_t>(row_bytes));
    }
    moe_overlap::permute({x.data(), slots.slot_to_row.data(), slots.tokens, slots.k, width, slots.num_rows,
                          element_bytes, out.data(), used.data()},
                         nullptr);
    CHECK(out.same_bytes(want));
  });
}

moe_overlap::RowTiling tiling(int64_t tokens, int64_t width) {
  alignas(16) static unsigned char memory[16];
  return moe_overlap::permute_tiling({memory, nullptr, tokens, 8, width, tokens * 8, 2, memory, nullptr});
}

TEST(permute_tiling_leaves_few_threads_idle) {
  const auto qwen = tiling(8192, 2048);
  CHECK(qwen.launch.text() == "grid 8192 block 256 shared 0 B" && qwen.threads_per_row == 256 && qwen.splits == 1);
  const auto deepseek = tiling(4096, 7168);
  CHECK(deepseek.launch.text() == "grid 2048 block 256 shared 0 B" && deepseek.threads_per_row == 128);
  const auto decode = tiling(8, 7168);
  CHECK(decode.launch.text() == "grid 28 block 256 shared 0 B" && decode.splits == 7);
  CHECK(tiling(5, 3).threads_per_row == 32);
  CHECK(tiling(0, 64).launch.grid == 0);
}

TEST(permute_refuses_sizes_that_overflow) {
  const auto run = [](int64_t tokens, int64_t width) {
    moe_overlap::permute({nullptr, nullptr, tokens, 1, width, 8, 2, nullptr, nullptr}, nullptr);
    return 0;
  };
  CHECK_THROWS(run(int64_t{1} << 40, int64_t{1} << 30), std::overflow_error, "64-bit offset overflow");
  CHECK_THROWS(run(2, int64_t{1} << 40), std::invalid_argument, "at most 2^31 - 1");
}

}  // namespace
