// pack and unpack under the harness, against a loop over rows.
#include <numeric>

#include "cases.h"
#include "kernels/pack.cu"

namespace {

using cases::Buffer;
using cases::Random;
using moe_overlap::PackArgs;

struct Case {
  int64_t num_rows, num_order, width;
  int element_bytes;
  bool order_is_int64;
  int64_t skew;  // bytes by which rows and out are off
};

Case random_case(Random& random) {
  const std::vector<int64_t> widths{0, 1, 2, 3, 7, 8, 9, 16, 24, 31, 32, 33, 64, 100, 256, 264, 1000};
  Case c{};
  c.num_rows = random.range(1, 40);
  c.num_order = random.chance(0.05) ? 0 : random.range(1, 60);
  c.width = random.pick(widths);
  c.element_bytes = random.pick(std::vector<int>{2, 2, 2, 4, 8});
  c.order_is_int64 = random.chance(0.5);
  c.skew = random.pick(std::vector<int64_t>{0, 0, 4, 8}) + (c.element_bytes == 2 && random.chance(0.2) ? 2 : 0);
  return c;
}

// Runs pack or unpack on random bytes and returns whether `out` is what the loop gives.
void check(const Case& c, const std::vector<int64_t>& order, bool unpack, Random& random) {
  const int64_t row_bytes = c.width * c.element_bytes;
  const int64_t in_rows = unpack ? c.num_order : c.num_rows, out_rows = unpack ? c.num_rows : c.num_order;
  Buffer<unsigned char> rows(in_rows * row_bytes, c.skew), out(out_rows * row_bytes, c.skew);
  Buffer<unsigned char> want(out_rows * row_bytes, c.skew);
  for (size_t i = 0; i < rows.size(); ++i) rows.data()[i] = static_cast<unsigned char>(random.range(0, 255));
  Buffer<int64_t> order64(c.num_order);
  Buffer<int32_t> order32(c.num_order);
  for (int64_t i = 0; i < c.num_order; ++i) {
    const int64_t entry = order[static_cast<size_t>(i)];
    order64[i] = entry;
    order32[i] = static_cast<int32_t>(entry);
    const bool valid = entry >= 0 && entry < c.num_rows;
    if (!unpack && !valid) std::memset(want.data() + i * row_bytes, 0, static_cast<size_t>(row_bytes));
    if (!valid) continue;
    std::memcpy(want.data() + (unpack ? entry : i) * row_bytes, rows.data() + (unpack ? i : entry) * row_bytes,
                static_cast<size_t>(row_bytes));
  }
  const void* const order_data =
      c.order_is_int64 ? static_cast<const void*>(order64.data()) : static_cast<const void*>(order32.data());
  const PackArgs args{rows.data(), order_data, c.order_is_int64, c.num_rows,
                      c.num_order, c.width,    c.element_bytes,  out.data()};
  if (unpack) {
    moe_overlap::unpack(args, nullptr);
  } else {
    moe_overlap::pack(args, nullptr);
  }
  CHECK(out.same_bytes(want));
}

TEST(pack_takes_rows_in_order) {
  cases::for_seeds("pack", 1500, [](Random& random) {
    const Case c = random_case(random);
    std::vector<int64_t> order(static_cast<size_t>(c.num_order));
    for (int64_t& entry : order) {
      entry = random.chance(0.05) ? random.pick(std::vector<int64_t>{-1, c.num_rows, 1 << 30})
                                  : random.range(0, c.num_rows - 1);
    }
    check(c, order, false, random);
  });
}

TEST(unpack_is_the_inverse) {
  cases::for_seeds("unpack", 1500, [](Random& random) {
    Case c = random_case(random);
    c.num_rows = c.num_order;
    std::vector<int64_t> order(static_cast<size_t>(c.num_order));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random.bits());
    check(c, order, true, random);
  });
}

TEST(pack_tiling_covers_the_rows) {
  alignas(16) static unsigned char memory[16];
  PackArgs args{};
  args.rows = args.out = memory;
  args.width = 2048;
  args.element_bytes = 2;
  CHECK(moe_overlap::pack_tiling(args).launch.grid == 0);
  args.num_order = 1000;
  CHECK(moe_overlap::pack_tiling(args).launch.text() == "grid 250 block 256 shared 0 B");  // 4 words a thread
  args.num_order = 16;  // 256 words, 64 threads, one round: nothing to split
  CHECK(moe_overlap::pack_tiling(args).splits == 1);
  args.width = 64;  // 8 words: a warp takes a row, 8 rows a block
  CHECK(moe_overlap::pack_tiling(args).launch.text() == "grid 2 block 256 shared 0 B");
}

TEST(pack_refuses_sizes_that_overflow) {
  PackArgs args{};
  args.num_rows = args.num_order = int64_t{1} << 40;
  args.width = int64_t{1} << 30;
  args.element_bytes = 2;
  CHECK_THROWS((moe_overlap::pack(args, nullptr), 0), std::overflow_error, "64-bit offset overflow");
}

}  // namespace
