// moe_overlap._C, the gate on a CPU: tensors in, csrc/core/gate.h called on the threads of torch. The schemas stand in
// moe_overlap/ops/gate.py, where results are allocated and arguments checked and made contiguous; what is checked here
// are our own assumptions. Against the stable ABI, as torch_ops.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "core/gate.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

template <typename Float>
constexpr ScalarType kDtype = sizeof(Float) == sizeof(double) ? ScalarType::Double : ScalarType::Float;

void check(const Tensor& tensor, ScalarType dtype, int64_t numel) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous(), "moe_overlap: a contiguous tensor on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.numel() == numel, "moe_overlap: dtype and size");
}

template <typename Float>
const Float* read(const Tensor& tensor, int64_t numel) {
  check(tensor, kDtype<Float>, numel);
  return static_cast<const Float*>(tensor.const_data_ptr());
}

int32_t* written(const Tensor& tensor, int64_t numel) {
  check(tensor, ScalarType::Int, numel);
  return tensor.mutable_data_ptr<int32_t>();
}

// As torch does, fewer than 32768 elements are not worth a thread.
template <typename Work>
void share_out(int64_t tokens, int64_t experts, const Work& work) {
  if (tokens > 0) torch::stable::parallel_for(0, tokens, std::max<int64_t>(1, 32768 / experts), work);
}

template <typename Float>
void choose(const Tensor& logits, const Tensor& choice, int64_t groups, int64_t kept_groups, int64_t summed,
            const Tensor& ids, const Tensor& counts, const Tensor& status) {
  const int64_t tokens = ids.size(0);
  moe_overlap::GateArgs<Float> args{};
  args.experts = counts.numel();
  args.k = ids.size(1);
  args.logits = read<Float>(logits, tokens * args.experts);
  args.choice = read<Float>(choice, tokens * args.experts);
  args.groups = groups;
  args.kept_groups = kept_groups;
  args.summed = summed;
  STD_TORCH_CHECK(1 <= kept_groups && kept_groups <= groups && args.experts % groups == 0 && summed >= 1 &&
                      1 <= args.k && args.k <= args.experts / groups * kept_groups,
                  "moe_overlap: experts and groups");
  args.ids = written(ids, tokens * args.k);
  int32_t* const counted = written(counts, args.experts);
  int32_t* const bad = written(status, 1);
  const auto run = [&](int64_t first, int64_t end) { moe_overlap::choose_experts(args, first, end); };
  share_out(tokens, args.experts, run);
  *bad = moe_overlap::count_chosen(args.ids, tokens * args.k, args.experts, counted);
}

void gate_topk(const Tensor& logits, const Tensor& choice, int64_t groups, int64_t kept_groups, int64_t summed,
               const Tensor& ids, const Tensor& counts, const Tensor& status) {
  const bool wide = logits.scalar_type() == ScalarType::Double;
  (wide ? choose<double> : choose<float>)(logits, choice, groups, kept_groups, summed, ids, counts, status);
}

template <typename Float>
void differentiate(const Tensor& dchosen, const Tensor& ids, const MaybeTensor& scores, const Tensor& weighted,
                   const Tensor& dlogits) {
  const int64_t tokens = ids.size(0);
  moe_overlap::GateGradientArgs<Float> args{};
  args.experts = dlogits.size(1);
  args.k = ids.size(1);
  check(ids, ScalarType::Int, tokens * args.k);
  args.ids = ids.const_data_ptr<int32_t>();
  args.chosen = read<Float>(dchosen, tokens * args.k);
  args.scores = scores ? read<Float>(*scores, tokens * args.experts) : nullptr;
  args.weighted = read<Float>(weighted, tokens);
  STD_TORCH_CHECK(args.k >= 1, "moe_overlap: a choice for each token");
  check(dlogits, kDtype<Float>, tokens * args.experts);
  args.logits = static_cast<Float*>(dlogits.mutable_data_ptr());
  const auto run = [&](int64_t first, int64_t end) { moe_overlap::gate_gradient(args, first, end); };
  share_out(tokens, args.experts, run);
}

void gate_topk_backward(const Tensor& dchosen, const Tensor& ids, const MaybeTensor& scores, const Tensor& weighted,
                        const Tensor& dlogits) {
  const bool wide = dchosen.scalar_type() == ScalarType::Double;
  (wide ? differentiate<double> : differentiate<float>)(dchosen, ids, scores, weighted, dlogits);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_overlap, CPU, library) {
  library.impl("_gate_topk_cpp", TORCH_BOX(&gate_topk));
  library.impl("_gate_topk_backward_cpp", TORCH_BOX(&gate_topk_backward));
}
