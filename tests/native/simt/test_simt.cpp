// The harness itself: kernels with the errors it is there to find, and the meaning of each operation.
#include "cases.h"
#include "kernels/launch.h"

namespace {

using namespace moe_overlap;

void run(int64_t grid, int block, const std::function<void()>& kernel) { simt::launch(grid, block, 64, kernel); }

// Expects simt::Error with `text`, whatever the seed.
void expect_error(int64_t grid, int block, const char* text, const std::function<void()>& kernel) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    simt::set_seed(seed);
    CHECK_THROWS((run(grid, block, kernel), 0), simt::Error, text);
  }
}

TEST(divergent_barrier_is_reported_with_lines) {
  expect_error(1, 64, "divergent barrier: block 0 thread", [] {
    if (threadIdx.x < 32) {
      sync_block();
    } else {
      sync_block();
    }
  });
}

TEST(barrier_that_a_thread_does_not_reach) {
  expect_error(1, 64, "left the kernel before a barrier", [] {
    if (threadIdx.x != 7) sync_block();
  });
}

TEST(shuffle_without_all_members) {
  expect_error(1, 32, "waits for a thread that has left", [] {
    if (threadIdx.x < 31) shfl_xor(1, 1);
  });
}

TEST(warp_operations_at_different_places) {
  expect_error(1, 32, "divergent warp operation", [] {
    if (threadIdx.x < 16) {
      shfl_xor(1, 1);
    } else {
      ballot(true);
    }
  });
}

TEST(lanes_that_wait_for_each_other) {
  expect_error(1, 32, "deadlock", [] {
    if (threadIdx.x < 16) sync_warp(threadIdx.x == 0 ? 0x3 : 0xffff);
    sync_block();
  });
}

TEST(shuffle_from_a_lane_that_takes_no_part) {
  expect_error(1, 32, "which takes no part", [] {
    if (threadIdx.x < 16) shfl_idx(1, 20, 32, 0xffff);
  });
}

TEST(a_flag_that_nobody_sets) {
  uint64_t flag = 0;
  simt::set_turn_limit(10'000);
  expect_error(2, 32, "no progress", [&] {
    while (load_acquire(&flag) == 0) {
    }
  });
  simt::set_turn_limit(200'000'000);
}

// Without the barrier some seed must show that thread t reads its neighbour's entry too early.
int wrong_reads(bool with_barrier) {
  int wrong = 0;
  for (uint64_t seed = 0; seed < 50; ++seed) {
    simt::set_seed(seed);
    run(2, 64, [&] {
      SHARED_ARRAY(int, box, 64);
      box[threadIdx.x] = static_cast<int>(threadIdx.x);
      if (with_barrier) sync_block();
      wrong += box[(threadIdx.x + 1) % 64] != static_cast<int>((threadIdx.x + 1) % 64);
    });
  }
  return wrong;
}

TEST(missing_barrier_shows) {
  CHECK(wrong_reads(true) == 0);
  CHECK(wrong_reads(false) > 0);
}

TEST(shared_memory_is_poisoned_and_each_block_has_its_own) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    simt::set_seed(seed);
    int clean = 0, foreign = 0;
    run(5, 32, [&] {
      SHARED_ARRAY(int, box, 32);
      if (threadIdx.x == 0) clean += box[3] != -1 && box[3] != 0x7f7f7f7f;
      sync_block();
      box[threadIdx.x] = static_cast<int>(blockIdx.x);
      dynamic_shared()[threadIdx.x] = static_cast<unsigned char>(blockIdx.x);
      sync_block();
      foreign += box[31 - threadIdx.x] != static_cast<int>(blockIdx.x) ||
                 dynamic_shared()[31 - threadIdx.x] != static_cast<unsigned char>(blockIdx.x);
    });
    CHECK(clean == 0 && foreign == 0);
  }
}

TEST(blocks_that_wait_for_their_predecessor) {
  for (uint64_t seed = 0; seed < 30; ++seed) {
    simt::set_seed(seed);
    uint64_t flags[6] = {1};
    int ticket = 0;
    run(5, 32, [&] {
      SHARED_ARRAY(int, mine, 1);
      if (threadIdx.x == 0) mine[0] = atomic_add(&ticket, 1);
      sync_block();
      if (threadIdx.x != 0) return;
      uint64_t before = 0;
      while ((before = load_acquire(&flags[mine[0]])) == 0) {
      }
      store_release(&flags[mine[0] + 1], before + 1);
    });
    CHECK(flags[5] == 6);
  }
}

TEST(warp_operations_mean_what_cuda_says) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    simt::set_seed(seed);
    int wrong = 0;
    run(1, 64, [&] {
      const int lane = lane_id();
      wrong += shfl_xor(lane, 5) != (lane ^ 5);
      wrong += shfl_down(lane, 3, 8) != (lane % 8 + 3 < 8 ? lane + 3 : lane);
      wrong += shfl_up(lane, 3, 8) != (lane % 8 >= 3 ? lane - 3 : lane);
      wrong += shfl_idx(lane, 2, 4) != lane / 4 * 4 + 2;
      wrong += shfl_idx(uint64_t{1} << lane, 31) != uint64_t{1} << 31;
      wrong += ballot(lane % 3 == 0) != 0x49249249u;
      wrong += match_any(static_cast<uint32_t>(lane % 2)) != (lane % 2 == 0 ? 0x55555555u : 0xaaaaaaaau);
      const uint32_t half = lane < 16 ? 0xffffu : 0xffff0000u;
      wrong += reduce_max(static_cast<uint32_t>(lane), half) != (lane < 16 ? 15u : 31u);
      wrong += warp_sum(static_cast<float>(lane), 4) != static_cast<float>(lane / 4 * 16 + 6);
    });
    CHECK(wrong == 0);
  }
}

TEST(sixteen_bit_floats_round_to_nearest_even) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const bf16 b{static_cast<uint16_t>(bits)};
    const fp16 h{static_cast<uint16_t>(bits)};
    if (!std::isnan(to_float(b))) CHECK(from_float<bf16>(to_float(b)).bits == bits);
    if (!std::isnan(to_float(h))) CHECK(from_float<fp16>(to_float(h)).bits == bits);
  }
  CHECK(std::isnan(to_float(from_float<bf16>(NAN))) && std::isnan(to_float(from_float<fp16>(NAN))));
  CHECK(to_float(from_float<bf16>(1.00390625f)) == 1.0f);       // a tie, to the even 1
  CHECK(to_float(from_float<bf16>(1.01171875f)) == 1.015625f);  // a tie, to the even one above
  CHECK(to_float(from_float<fp16>(1.00048828125f)) == 1.0f);
  CHECK(to_float(from_float<fp16>(65519.0f)) == 65504.0f && std::isinf(to_float(from_float<fp16>(65520.0f))));
  CHECK(to_float(from_float<fp16>(2.9e-8f)) == 0.0f);
}

TEST(launches_that_no_gpu_takes_are_refused) {
  CHECK_THROWS((launch(+[] {}, LaunchConfig{1, 48, 0}, nullptr), 0), std::invalid_argument, "no GPU takes");
  CHECK_THROWS((launch(+[] {}, LaunchConfig{int64_t{1} << 31, 32, 0}, nullptr), 0), std::invalid_argument, "grid 2147");
  launch(+[] { CHECK(false); }, LaunchConfig{0, 32, 0}, nullptr);
}

}  // namespace
