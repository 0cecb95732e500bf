// moe_overlap._C: implementations for schemas that Python defines (moe_overlap/ops), against libtorch's stable ABI, so
// that one file serves every torch from 2.10 on. Only IMPL blocks here: a second definition of a namespace kills the
// process. Arguments were validated in Python; what is checked here are our own assumptions.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "core/row_map.h"

namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> row_map(const Tensor& ids, int64_t num_experts, int64_t first, int64_t last,
                                                   int64_t align, std::optional<int64_t> capacity) {
  STD_TORCH_CHECK(ids.is_cpu() && ids.is_contiguous() && ids.dim() == 2, "row_map: contiguous ids [T, K] on the CPU");
  STD_TORCH_CHECK(ids.scalar_type() == torch::headeronly::ScalarType::Int, "row_map: int32 ids");
  STD_TORCH_CHECK(0 <= first && first <= last && last <= num_experts && align >= 1, "row_map: experts and alignment");
  const int64_t experts = last - first;
  const Tensor tokens_per_expert = torch::stable::new_empty(ids, {experts});
  const Tensor offs = torch::stable::new_empty(ids, {experts});
  const Tensor slot_to_row = torch::stable::new_empty(ids, ids.sizes());
  const Tensor row_to_slot = torch::stable::new_empty(ids, {moe_overlap::row_map_rows(ids.numel(), experts, align)});
  moe_overlap::RowMapArgs args{};
  args.ids = ids.const_data_ptr<int32_t>();
  args.slots = ids.numel();
  args.first = first;
  args.last = last;
  args.align = align;
  args.capacity = capacity;
  args.tokens_per_expert = tokens_per_expert.mutable_data_ptr<int32_t>();
  args.offs = offs.mutable_data_ptr<int32_t>();
  args.slot_to_row = slot_to_row.mutable_data_ptr<int32_t>();
  args.row_to_slot = row_to_slot.mutable_data_ptr<int32_t>();
  moe_overlap::row_map(args);
  return {tokens_per_expert, offs, slot_to_row, row_to_slot};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_overlap, CPU, library) { library.impl("_row_map_cpp", TORCH_BOX(&row_map)); }
