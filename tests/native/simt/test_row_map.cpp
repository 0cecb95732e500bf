// row_map under the harness, against the C++ counting sort of csrc/core.
#include "cases.h"
#include "core/row_map.h"
#include "kernels/row_map.cu"

namespace {

using cases::Buffer;
using cases::Random;
using moe_overlap::RowMapArgs;

struct Maps {
  Maps(int64_t slots, int64_t experts, int64_t align)
      : tokens_per_expert(experts),
        offs(experts),
        slot_to_row(slots),
        row_to_slot(moe_overlap::row_map_rows(slots, experts, align)) {}
  RowMapArgs args(const Buffer<int32_t>& ids, int64_t first, int64_t last, int64_t align,
                  std::optional<int64_t> capacity) {
    return {ids.data(),
            static_cast<int64_t>(ids.size()),
            first,
            last,
            align,
            capacity,
            tokens_per_expert.data(),
            offs.data(),
            slot_to_row.data(),
            row_to_slot.data()};
  }
  bool same(const Maps& other) const {
    return tokens_per_expert.same_bytes(other.tokens_per_expert) && offs.same_bytes(other.offs) &&
           slot_to_row.same_bytes(other.slot_to_row) && row_to_slot.same_bytes(other.row_to_slot);
  }
  Buffer<int32_t> tokens_per_expert, offs, slot_to_row, row_to_slot;
};

// uniform, few experts, one expert, sorted, reversed, or with many unused slots
void fill_ids(Buffer<int32_t>& ids, int64_t num_experts, Random& random) {
  const int64_t kind = random.range(0, 5), favourite = random.range(0, num_experts - 1);
  const auto slots = static_cast<int64_t>(ids.size());
  for (int64_t slot = 0; slot < slots; ++slot) {
    int64_t id = random.range(0, num_experts - 1);
    if (kind == 1) id = random.range(0, std::min<int64_t>(num_experts, 3) - 1);
    if (kind == 2) id = favourite;
    if (kind == 3) id = slot * num_experts / slots;
    if (kind == 4) id = num_experts - 1 - slot * num_experts / slots;
    if (kind == 5 && random.chance(0.4)) id = -1;
    ids[slot] = static_cast<int32_t>(id);
  }
}

void check(const Buffer<int32_t>& ids, int64_t first, int64_t last, int64_t align, std::optional<int64_t> capacity) {
  const auto slots = static_cast<int64_t>(ids.size());
  const int64_t experts = last - first;
  Maps got(slots, experts, align), want(slots, experts, align);
  moe_overlap::row_map(want.args(ids, first, last, align, capacity));
  Buffer<unsigned char> workspace(moe_overlap::row_map_plan(slots, experts).workspace_bytes);
  moe_overlap::row_map(got.args(ids, first, last, align, capacity), workspace.data(), nullptr);
  CHECK(got.same(want));
}

TEST(row_map_of_one_block_is_the_counting_sort) {
  cases::for_seeds("row_map, one block", 3000, [](Random& random) {
    const int64_t num_experts = random.pick(std::vector<int64_t>{1, 2, 3, 8, 31, 32, 33, 64, 100});
    Buffer<int32_t> ids(random.chance(0.05) ? 0 : random.range(1, random.chance(0.1) ? 4096 : 100));
    fill_ids(ids, num_experts, random);
    const bool part = random.chance(0.3);
    const int64_t first = part ? random.range(0, num_experts) : 0;
    const int64_t last = part ? random.range(first, num_experts) : num_experts;
    const int64_t align = random.pick(std::vector<int64_t>{1, 1, 3, 8, 128});
    const auto capacity = random.chance(0.3) ? std::optional<int64_t>(random.range(0, 20)) : std::nullopt;
    check(ids, first, last, align, capacity);
  });
}

TEST(row_map_of_several_blocks_is_the_counting_sort) {
  cases::for_seeds("row_map, several blocks", 150, [](Random& random) {
    const int64_t num_experts = random.pick(std::vector<int64_t>{1, 7, 8, 64, 130});
    Buffer<int32_t> ids(random.range(4097, 6000));
    fill_ids(ids, num_experts, random);
    const int64_t first = random.chance(0.3) ? random.range(0, num_experts) : 0;
    const auto capacity = random.chance(0.3) ? std::optional<int64_t>(random.range(0, 900)) : std::nullopt;
    check(ids, first, num_experts, random.pick(std::vector<int64_t>{1, 16}), capacity);
  });
}

// The second launch may run from its first line to its wait while the table of the first one is not there yet.
TEST(row_map_reads_the_table_only_after_its_wait) {
  cases::for_seeds("row_map, started early", 20, [](Random& random) {
    const int64_t experts = random.pick(std::vector<int64_t>{5, 8});
    Buffer<int32_t> ids(random.range(4097, 6000));
    fill_ids(ids, experts, random);
    const auto slots = static_cast<int64_t>(ids.size());
    Maps got(slots, experts, 1), want(slots, experts, 1);
    moe_overlap::row_map(want.args(ids, 0, experts, 1, std::nullopt));
    const auto plan = moe_overlap::row_map_plan(slots, experts);
    Buffer<int32_t> table(plan.count.grid * experts);
    bool waited = false;
    simt::set_launch_before([&] {
      waited = true;
      std::memset(table.data(), 0, table.size() * sizeof(int32_t));
      for (int64_t slot = 0; slot < slots; ++slot) {
        if (ids[slot] >= 0) ++table[slot / plan.slots_per_block * experts + ids[slot]];
      }
    });
    const auto args = got.args(ids, 0, experts, 1, std::nullopt);
    moe_overlap::launch(moe_overlap::place_kernel, plan.place, nullptr, moe_overlap::sort_of(args, plan, table.data()));
    CHECK(waited && got.same(want));
  });
}

TEST(row_map_with_many_experts_uses_fewer_warps) {
  for (const int64_t experts : {300, 600, 1117, 1118, 3000}) {
    cases::for_seeds("row_map, many experts", 3, [&](Random& random) {
      Buffer<int32_t> ids(random.range(1, 6000));
      fill_ids(ids, experts, random);
      check(ids, 0, experts, 4, std::nullopt);
    });
  }
}

TEST(row_map_plan_covers_the_slots) {
  using moe_overlap::row_map_plan;
  const auto qwen = row_map_plan(65536, 128);
  CHECK(qwen.count.text() == "grid 64 block 256 shared 4096 B" &&
        qwen.place.text() == "grid 64 block 256 shared 5636 B");
  CHECK(qwen.slots_per_block == 1024 && qwen.workspace_bytes == 64 * 128 * 4);
  CHECK(row_map_plan(4096, 8).count.grid == 0 && row_map_plan(4096, 8).workspace_bytes == 0);
  CHECK(row_map_plan(4096, 128).place.text() == "grid 1 block 1024 shared 17924 B");
  CHECK(row_map_plan(1025, 8).place.block == 512 && row_map_plan(1024, 8).place.block == 256);
  CHECK(row_map_plan(4097, 8).place.text() == "grid 5 block 256 shared 356 B");
  CHECK(row_map_plan(0, 8).place.grid == 1);
  CHECK(row_map_plan(1 << 24, 256).place.grid == 256 && row_map_plan(1 << 24, 256).slots_per_block == 65536);
  for (int64_t slots = 1; slots < 1 << 24; slots = slots * 5 / 4 + 1) {
    for (const int64_t experts : {0, 1, 256, 1117, 1118, 3000}) {
      const auto plan = row_map_plan(slots, experts);
      CHECK(plan.place.grid * plan.slots_per_block >= slots && plan.slots_per_block % plan.place.block == 0);
      CHECK(plan.place.shared_bytes <= 48 << 10 && plan.place.grid <= 256);
    }
  }
  CHECK_THROWS(row_map_plan(8, 3001), std::invalid_argument, "3001 experts, the kernel takes 3000");
}

}  // namespace
