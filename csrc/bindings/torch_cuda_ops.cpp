// moe_overlap._C, the CUDA half: tensors in, kernels.h called, tensors out, for the operators `_<op>_cuda` whose
// schemas stand in moe_overlap/ops. Compiled by the C++ compiler (no CUDA header is needed) and linked where nvcc was
// there. The file must load without libtorch_cuda, so nothing of it is named at link time: see current_stream.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <optional>
#include <random>
#include <string>
#include <tuple>

#include "core/row_map.h"
#include "kernels/kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;
using MaybeTensor = std::optional<Tensor>;

// The stream that torch considers current, asked for at every call: the caller may change it between two.
cudaStream_t current_stream(const Tensor& tensor) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const auto get = [] {
    // Loaded by torch where there are CUDA tensors at all; with local symbols, so a plain reference would not find it.
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(get != nullptr,
                  "moe_overlap: this torch has no libtorch_cuda with aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(tensor.get_device_index(), &stream) == AOTI_TORCH_SUCCESS, "moe_overlap: no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

Tensor row_major(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cuda(), "moe_overlap: a CUDA tensor");
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Keeps the contiguous copy alive as long as its pointer is used.
MaybeTensor row_major(const MaybeTensor& tensor) { return tensor ? MaybeTensor(row_major(*tensor)) : std::nullopt; }

moe_overlap::DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return moe_overlap::DType::kFloat32;
    case ScalarType::BFloat16:
      return moe_overlap::DType::kBFloat16;
    case ScalarType::Half:
      return moe_overlap::DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "moe_overlap: float32, bfloat16 or float16");
  }
}

template <typename T>
const T* pointer(const MaybeTensor& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

Tensor no_tensor(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

moe_overlap::Score score_of(const std::string& name) {
  if (name == "softmax") return moe_overlap::Score::kSoftmax;
  if (name == "topk_softmax") return moe_overlap::Score::kTopkSoftmax;
  STD_TORCH_CHECK(name == "sigmoid", "moe_overlap: an unknown score");
  return moe_overlap::Score::kSigmoid;
}

moe_overlap::Activation activation_of(const std::string& name) {
  if (name == "swiglu") return moe_overlap::Activation::kSwiglu;
  if (name == "gelu") return moe_overlap::Activation::kGelu;
  STD_TORCH_CHECK(name == "relu", "moe_overlap: an unknown activation");
  return moe_overlap::Activation::kRelu;
}

// ---- gate_topk ----

// Another one for each call of this process, and for other processes as far as 64 random bits go; never 0.
uint64_t new_nonce() {
  static std::atomic<uint64_t> next{[] {
    std::random_device bits;
    return uint64_t{bits()} << 32 | bits();
  }()};
  const uint64_t nonce = next.fetch_add(1, std::memory_order_relaxed);
  return nonce != 0 ? nonce : next.fetch_add(1, std::memory_order_relaxed);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gate_topk(const Tensor& given, const MaybeTensor& given_bias, int64_t k,
                                                     int64_t n_group, int64_t topk_group, const std::string& score,
                                                     bool renormalize, double scale) {
  const Tensor logits = row_major(given);
  const MaybeTensor bias = row_major(given_bias);
  const DeviceGuard guard(logits.get_device_index());
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  const Tensor weights = torch::stable::new_empty(logits, {tokens, k});
  const Tensor ids = torch::stable::new_empty(logits, {tokens, k}, ScalarType::Int);
  const Tensor counts = torch::stable::new_empty(logits, {experts}, ScalarType::Int);
  const Tensor status = torch::stable::new_empty(logits, {1}, ScalarType::Int);
  const Tensor workspace =
      torch::stable::new_empty(logits, {int64_t{sizeof(moe_overlap::GateWorkspace)}}, ScalarType::Byte);
  moe_overlap::GateArgs args{};
  args.logits = logits.const_data_ptr<float>();
  args.bias = pointer<float>(bias);
  args.tokens = tokens;
  args.experts = static_cast<int>(experts);
  args.k = static_cast<int>(k);
  args.n_group = static_cast<int>(n_group);
  args.topk_group = static_cast<int>(topk_group);
  args.score = score_of(score);
  args.renormalize = renormalize;
  args.scale = static_cast<float>(scale);
  args.nonce = new_nonce();
  args.workspace = static_cast<moe_overlap::GateWorkspace*>(workspace.mutable_data_ptr());
  args.weights = weights.mutable_data_ptr<float>();
  args.ids = ids.mutable_data_ptr<int32_t>();
  args.counts = counts.mutable_data_ptr<int32_t>();
  args.status = status.mutable_data_ptr<int32_t>();
  moe_overlap::gate_topk(args, current_stream(logits));
  return {weights, ids, counts, status};
}

Tensor gate_topk_backward(const Tensor& given_dweights, const Tensor& given_logits, const Tensor& given_ids,
                          const std::string& score, bool renormalize, double scale) {
  const Tensor dweights = row_major(given_dweights), logits = row_major(given_logits), ids = row_major(given_ids);
  const DeviceGuard guard(logits.get_device_index());
  const Tensor dlogits = torch::stable::new_empty(logits, logits.sizes());
  moe_overlap::GateBackwardArgs args{};
  args.dweights = dweights.const_data_ptr<float>();
  args.logits = logits.const_data_ptr<float>();
  args.ids = ids.const_data_ptr<int32_t>();
  args.tokens = logits.size(0);
  args.experts = static_cast<int>(logits.size(1));
  args.k = static_cast<int>(ids.size(1));
  args.score = score_of(score);
  args.renormalize = renormalize;
  args.scale = static_cast<float>(scale);
  args.dlogits = dlogits.mutable_data_ptr<float>();
  moe_overlap::gate_topk_backward(args, current_stream(logits));
  return dlogits;
}

// ---- row_map ----

std::tuple<Tensor, Tensor, Tensor, Tensor> row_map(const Tensor& given, int64_t num_experts, int64_t first,
                                                   int64_t last, int64_t align, std::optional<int64_t> capacity) {
  STD_TORCH_CHECK(0 <= first && first <= last && last <= num_experts && align >= 1, "row_map: experts and alignment");
  const Tensor ids = row_major(given);
  const DeviceGuard guard(ids.get_device_index());
  const int64_t experts = last - first, slots = ids.numel();
  const Tensor tokens_per_expert = torch::stable::new_empty(ids, {experts});
  const Tensor offs = torch::stable::new_empty(ids, {experts});
  const Tensor slot_to_row = torch::stable::new_empty(ids, ids.sizes());
  const Tensor row_to_slot = torch::stable::new_empty(ids, {moe_overlap::row_map_rows(slots, experts, align)});
  const Tensor workspace =
      torch::stable::new_empty(ids, {moe_overlap::row_map_plan(slots, experts).workspace_bytes}, ScalarType::Byte);
  moe_overlap::RowMapArgs args{};
  args.ids = ids.const_data_ptr<int32_t>();
  args.slots = slots;
  args.first = first;
  args.last = last;
  args.align = align;
  args.capacity = capacity;
  args.tokens_per_expert = tokens_per_expert.mutable_data_ptr<int32_t>();
  args.offs = offs.mutable_data_ptr<int32_t>();
  args.slot_to_row = slot_to_row.mutable_data_ptr<int32_t>();
  args.row_to_slot = row_to_slot.mutable_data_ptr<int32_t>();
  moe_overlap::row_map(args, workspace.mutable_data_ptr(), current_stream(ids));
  return {tokens_per_expert, offs, slot_to_row, row_to_slot};
}

// ---- permute, combine ----

Tensor permute(const Tensor& given_x, const Tensor& given_map, const MaybeTensor& /*offs*/, int64_t num_rows) {
  const Tensor x = row_major(given_x), slot_to_row = row_major(given_map);
  const DeviceGuard guard(x.get_device_index());
  const Tensor out = torch::stable::new_empty(x, {num_rows, x.size(1)});
  moe_overlap::PermuteArgs args{};
  args.x = x.const_data_ptr();
  args.slot_to_row = slot_to_row.const_data_ptr<int32_t>();
  args.tokens = x.size(0);
  args.k = slot_to_row.size(1);
  args.width = x.size(1);
  args.num_rows = num_rows;
  args.element_bytes = static_cast<int>(x.element_size());
  args.out = out.mutable_data_ptr();
  moe_overlap::permute(args, current_stream(x));
  return out;
}

Tensor combine(const Tensor& given_y, const Tensor& given_map, const MaybeTensor& given_weights,
               const MaybeTensor& given_residual) {
  const Tensor y = row_major(given_y), slot_to_row = row_major(given_map);
  const MaybeTensor weights = row_major(given_weights), residual = row_major(given_residual);
  const DeviceGuard guard(y.get_device_index());
  const Tensor out = torch::stable::new_empty(y, {slot_to_row.size(0), y.size(1)});
  moe_overlap::CombineArgs args{};
  args.y = y.const_data_ptr();
  args.slot_to_row = slot_to_row.const_data_ptr<int32_t>();
  args.weights = pointer<float>(weights);
  args.residual = residual ? residual->const_data_ptr() : nullptr;
  args.tokens = slot_to_row.size(0);
  args.k = slot_to_row.size(1);
  args.width = y.size(1);
  args.num_rows = y.size(0);
  args.dtype = dtype_of(y);
  args.residual_dtype = residual ? dtype_of(*residual) : args.dtype;
  args.out = out.mutable_data_ptr();
  moe_overlap::combine(args, current_stream(y));
  return out;
}

std::tuple<Tensor, Tensor> combine_backward(const Tensor& given_dy, const MaybeTensor& given_y, const Tensor& given_map,
                                            const MaybeTensor& given_weights, int64_t num_rows) {
  const Tensor dy = row_major(given_dy), slot_to_row = row_major(given_map);
  const MaybeTensor y = row_major(given_y), weights = row_major(given_weights);
  STD_TORCH_CHECK(!y || y->scalar_type() == dy.scalar_type(), "combine_backward: y and dy of one dtype");
  const DeviceGuard guard(dy.get_device_index());
  const bool wants_dweights = y && weights;
  const Tensor dy_rows = torch::stable::new_empty(dy, {num_rows, dy.size(1)});
  const Tensor dweights = wants_dweights ? torch::stable::new_empty(*weights, weights->sizes()) : no_tensor(dy);
  moe_overlap::CombineBackwardArgs args{};
  args.dy = dy.const_data_ptr();
  args.y = wants_dweights ? y->const_data_ptr() : nullptr;
  args.slot_to_row = slot_to_row.const_data_ptr<int32_t>();
  args.weights = pointer<float>(weights);
  args.tokens = dy.size(0);
  args.k = slot_to_row.size(1);
  args.width = dy.size(1);
  args.num_rows = num_rows;
  args.dtype = dtype_of(dy);
  args.dy_rows = dy_rows.mutable_data_ptr();
  args.dweights = wants_dweights ? dweights.mutable_data_ptr<float>() : nullptr;
  moe_overlap::combine_backward(args, current_stream(dy));
  return {dy_rows, dweights};
}

// ---- activation ----

moe_overlap::ActivationArgs activation_args(const Tensor& h, const std::string& kind, const MaybeTensor& row_scale,
                                            const MaybeTensor& offs) {
  moe_overlap::ActivationArgs args{};
  args.dtype = dtype_of(h);
  args.kind = activation_of(kind);
  args.rows = h.size(0);
  args.width = args.kind == moe_overlap::Activation::kSwiglu ? h.size(1) / 2 : h.size(1);
  args.h = h.const_data_ptr();
  args.row_scale = pointer<float>(row_scale);
  args.has_offs = offs.has_value();
  args.offs = pointer<int32_t>(offs);
  args.num_offs = offs ? offs->numel() : 0;
  return args;
}

Tensor activation(const Tensor& given_h, const std::string& kind, const MaybeTensor& given_scale,
                  const MaybeTensor& given_offs) {
  const Tensor h = row_major(given_h);
  const MaybeTensor row_scale = row_major(given_scale), offs = row_major(given_offs);
  const DeviceGuard guard(h.get_device_index());
  moe_overlap::ActivationArgs args = activation_args(h, kind, row_scale, offs);
  const Tensor a = torch::stable::new_empty(h, {args.rows, args.width});
  args.a = a.mutable_data_ptr();
  moe_overlap::activation_forward(args, current_stream(h));
  return a;
}

std::tuple<Tensor, Tensor> activation_backward(const Tensor& given_da, const Tensor& given_h, const std::string& kind,
                                               const MaybeTensor& given_scale, const MaybeTensor& given_offs) {
  const Tensor da = row_major(given_da), h = row_major(given_h);
  const MaybeTensor row_scale = row_major(given_scale), offs = row_major(given_offs);
  STD_TORCH_CHECK(da.scalar_type() == h.scalar_type(), "activation_backward: da and h of one dtype");
  const DeviceGuard guard(h.get_device_index());
  moe_overlap::ActivationArgs args = activation_args(h, kind, row_scale, offs);
  const Tensor dh = torch::stable::new_empty(h, h.sizes());
  const Tensor dscale = row_scale ? torch::stable::new_empty(*row_scale, row_scale->sizes()) : no_tensor(da);
  args.da = da.const_data_ptr();
  args.dh = dh.mutable_data_ptr();
  args.dscale = row_scale ? dscale.mutable_data_ptr<float>() : nullptr;
  moe_overlap::activation_backward(args, current_stream(h));
  return {dh, dscale};
}

// ---- pack, unpack ----

moe_overlap::PackArgs pack_args(const Tensor& rows, const Tensor& order, const Tensor& out, int64_t num_rows) {
  moe_overlap::PackArgs args{};
  args.rows = rows.const_data_ptr();
  args.order = order.const_data_ptr();
  args.order_is_int64 = order.scalar_type() == ScalarType::Long;
  args.num_rows = num_rows;
  args.num_order = order.numel();
  args.width = rows.size(1);
  args.element_bytes = static_cast<int>(rows.element_size());
  args.out = out.mutable_data_ptr();
  return args;
}

Tensor pack(const Tensor& given_rows, const Tensor& given_order) {
  const Tensor rows = row_major(given_rows), order = row_major(given_order);
  const DeviceGuard guard(rows.get_device_index());
  const Tensor out = torch::stable::new_empty(rows, {order.numel(), rows.size(1)});
  moe_overlap::pack(pack_args(rows, order, out, rows.size(0)), current_stream(rows));
  return out;
}

Tensor unpack(const Tensor& given_rows, const Tensor& given_order) {
  const Tensor rows = row_major(given_rows), order = row_major(given_order);
  const DeviceGuard guard(rows.get_device_index());
  const Tensor out = torch::stable::new_empty(rows, rows.sizes());
  moe_overlap::unpack(pack_args(rows, order, out, rows.size(0)), current_stream(rows));
  return out;
}

void unpack_into(const Tensor& given_rows, const Tensor& given_order, const Tensor& out) {
  const Tensor rows = row_major(given_rows), order = row_major(given_order);
  const DeviceGuard guard(rows.get_device_index());
  moe_overlap::unpack(pack_args(rows, order, out, out.size(0)), current_stream(rows));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_overlap, CUDA, library) {
  library.impl("_gate_topk_cuda", TORCH_BOX(&gate_topk));
  library.impl("_gate_topk_backward_cuda", TORCH_BOX(&gate_topk_backward));
  library.impl("_row_map_cuda", TORCH_BOX(&row_map));
  library.impl("_permute_cuda", TORCH_BOX(&permute));
  library.impl("_combine_cuda", TORCH_BOX(&combine));
  library.impl("_combine_backward_cuda", TORCH_BOX(&combine_backward));
  library.impl("_activation_cuda", TORCH_BOX(&activation));
  library.impl("_activation_backward_cuda", TORCH_BOX(&activation_backward));
  library.impl("_pack_cuda", TORCH_BOX(&pack));
  library.impl("_unpack_cuda", TORCH_BOX(&unpack));
  library.impl("_unpack_into_cuda", TORCH_BOX(&unpack_into));
}
