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
    for (size_t i = 0; i < x.size(); ++i) x.data()[i] = static_cast<unsigned char>(random.range(0, 255));
    std::memset(want.data(), 0, want.size());
    for (int64_t slot = 0; slot < slots.tokens * slots.k; ++slot) {
      const int32_t row = slots.slot_to_row[slot];
      if (row < 0 || row >= slots.num_rows) continue;
      std::memcpy(want.data() + row * row_bytes, x.data() + slot / slots.k * row_bytes, static_cast<size_t>(row_bytes));
    }
    moe_overlap::permute(
        {x.data(), slots.slot_to_row.data(), slots.tokens, slots.k, width, slots.num_rows, element_bytes, out.data()},
        nullptr);
    CHECK(out.same_bytes(want));
  });
}

moe_overlap::RowTiling tiling(int64_t tokens, int64_t width) {
  alignas(16) static unsigned char memory[16];
  return moe_overlap::permute_tiling({memory, nullptr, tokens, 8, width, tokens * 8, 2, memory});
}

// More rows than one block has bits for: each block still finds its own.
TEST(permute_clears_more_rows_than_one_board_holds) {
  const int64_t num_rows = moe_overlap::kMostBoardRows + 40;
  Buffer<uint16_t> x(3), out(num_rows);
  Buffer<int32_t> slot_to_row(6);
  for (int64_t token = 0; token < 3; ++token) x[token] = static_cast<uint16_t>(token + 1);
  const std::vector<int64_t> rows{0, num_rows - 1, 31, moe_overlap::kMostBoardRows, -1, 65536};
  for (int64_t slot = 0; slot < 6; ++slot) slot_to_row[slot] = static_cast<int32_t>(rows[static_cast<size_t>(slot)]);
  const moe_overlap::PermuteArgs args{x.data(), slot_to_row.data(), 3, 2, 1, num_rows, 2, out.data()};
  CHECK(moe_overlap::permute_tiling(args).clearing == 2);
  moe_overlap::permute(args, nullptr);
  for (int64_t slot = 0; slot < 6; ++slot) {
    const int64_t row = rows[static_cast<size_t>(slot)];
    if (row < 0) continue;
    CHECK(out[row] == x[slot / 2]);
    out[row] = 0;
  }
  for (int64_t row = 0; row < num_rows; ++row) CHECK(out[row] == 0);
}

TEST(permute_tiling_leaves_few_threads_idle) {
  const auto qwen = tiling(8192, 2048);
  CHECK(qwen.launch.text() == "grid 8256 block 256 shared 128 B" && qwen.threads_per_row == 256 && qwen.splits == 1);
  const auto deepseek = tiling(4096, 7168);
  CHECK(deepseek.launch.text() == "grid 2112 block 256 shared 64 B" && deepseek.threads_per_row == 128);
  const auto decode = tiling(8, 7168);
  CHECK(decode.launch.text() == "grid 30 block 256 shared 4 B" && decode.splits == 7);
  CHECK(tiling(5, 3).threads_per_row == 32);
  CHECK(tiling(0, 64).launch.grid == 0);
}

TEST(permute_refuses_sizes_that_overflow) {
  const auto run = [](int64_t tokens, int64_t width) {
    moe_overlap::permute({nullptr, nullptr, tokens, 1, width, 8, 2, nullptr}, nullptr);
    return 0;
  };
  CHECK_THROWS(run(int64_t{1} << 40, int64_t{1} << 30), std::overflow_error, "64-bit offset overflow");
  CHECK_THROWS(run(2, int64_t{1} << 40), std::invalid_argument, "at most 2^31 - 1");
}

}  // namespace
