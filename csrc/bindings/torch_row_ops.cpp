// moe_overlap._C, the row work of a CPU: tensors in, csrc/core/rows.h called on the threads of torch. The schemas stand
// in moe_overlap/ops, where results are allocated and arguments checked and made contiguous; what is checked here are
// our own assumptions. Against the stable ABI, as torch_ops.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/rows.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
namespace cpu = moe_overlap::cpu;

const cpu::RowKernels& kernels() {
  static const cpu::RowKernels& widest = *cpu::row_kernels().front();
  return widest;
}

cpu::Float float_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return cpu::Float::kFloat32;
    case ScalarType::BFloat16:
      return cpu::Float::kBFloat16;
    case ScalarType::Half:
      return cpu::Float::kFloat16;
    default:
      STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double, "moe_overlap: float rows");
      return cpu::Float::kFloat64;
  }
}

ScalarType accumulation(const Tensor& rows) {
  return rows.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check(const Tensor& tensor, ScalarType dtype, int64_t numel) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous(), "moe_overlap: a contiguous tensor on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.numel() == numel, "moe_overlap: dtype and size");
}

const void* read(const Tensor& tensor, ScalarType dtype, int64_t numel) {
  check(tensor, dtype, numel);
  return tensor.const_data_ptr();
}

const void* read(const MaybeTensor& tensor, ScalarType dtype, int64_t numel) {
  return tensor ? read(*tensor, dtype, numel) : nullptr;
}

void* written(const Tensor& tensor, ScalarType dtype, int64_t numel) {
  check(tensor, dtype, numel);
  return tensor.mutable_data_ptr();
}

const int32_t* map_of(const Tensor& slot_to_row, int64_t tokens) {
  STD_TORCH_CHECK(slot_to_row.dim() == 2 && slot_to_row.size(0) == tokens, "moe_overlap: slot_to_row [T, K]");
  return static_cast<const int32_t*>(read(slot_to_row, ScalarType::Int, slot_to_row.numel()));
}

// work(first, end) over [0, count) on torch's threads, where each item costs about `elements` elements. As torch does,
// fewer than 32768 elements are not worth a thread.
template <typename Work>
void share_out(int64_t count, int64_t elements, const Work& work) {
  if (count == 0) return;
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements)), work);
}

void combine(const Tensor& y, const Tensor& slot_to_row, const MaybeTensor& weights, const MaybeTensor& residual,
             const Tensor& out) {
  const int64_t tokens = out.size(0), k = slot_to_row.size(1);
  const ScalarType dtype = y.scalar_type();
  cpu::CombineArgs args{};
  args.dtype = float_of(y);
  args.k = k;
  args.width = y.size(1);
  args.y = read(y, dtype, y.numel());
  args.slot_to_row = map_of(slot_to_row, tokens);
  args.weights = read(weights, accumulation(y), tokens * k);
  args.residual = read(residual, dtype, tokens * args.width);
  args.out = written(out, dtype, tokens * args.width);
  const auto run = [&](int64_t first, int64_t end) { kernels().combine(args, first, end); };
  share_out(tokens, (k + 1) * args.width, run);
}

// Which rows of [0, rows) a slot points to. `twice` is set to a row that two point to, or -1.
std::vector<uint8_t> used_rows(const Tensor& slot_to_row, int64_t rows, int64_t* twice) {
  std::vector<uint8_t> used(static_cast<size_t>(rows));
  *twice = cpu::mark_rows(slot_to_row.const_data_ptr<int32_t>(), slot_to_row.numel(), rows, used.data());
  return used;
}

void clear_unused_rows(const std::vector<uint8_t>& used, const Tensor& out) {
  const int64_t row_bytes = out.size(1) * static_cast<int64_t>(out.element_size());
  void* const rows = out.mutable_data_ptr();
  const auto run = [&](int64_t first, int64_t end) {
    cpu::clear_unused_rows(used.data(), row_bytes, rows, first, end);
  };
  share_out(out.size(0), out.size(1), run);
}

// These two return a row that two slots point to, or -1. Nothing was written where there is such a row.
int64_t permute(const Tensor& x, const Tensor& slot_to_row, const Tensor& out) {
  const int64_t tokens = x.size(0), k = slot_to_row.size(1), width = x.size(1), rows = out.size(0);
  const void* const from = read(x, x.scalar_type(), x.numel());
  const int32_t* const map = map_of(slot_to_row, tokens);
  void* const to = written(out, x.scalar_type(), rows * width);
  int64_t twice = -1;
  const std::vector<uint8_t> used = used_rows(slot_to_row, rows, &twice);
  if (twice >= 0) return twice;
  const int64_t row_bytes = width * static_cast<int64_t>(x.element_size());
  const auto run = [&](int64_t first, int64_t end) { cpu::copy_to_rows(from, map, k, row_bytes, to, first, end); };
  share_out(tokens, k * width, run);
  clear_unused_rows(used, out);
  return -1;
}

int64_t combine_backward(const Tensor& dy, const MaybeTensor& y, const Tensor& slot_to_row, const Tensor& weights,
                         const Tensor& dy_rows, const MaybeTensor& dweights) {
  const int64_t tokens = dy.size(0), k = slot_to_row.size(1), width = dy.size(1), rows = dy_rows.size(0);
  const ScalarType dtype = dy.scalar_type();
  STD_TORCH_CHECK(y.has_value() == dweights.has_value(), "combine_backward: y is there for dweights");
  cpu::CombineBackwardArgs args{};
  args.dtype = float_of(dy);
  args.k = k;
  args.width = width;
  args.dy = read(dy, dtype, tokens * width);
  args.y = read(y, dtype, rows * width);
  args.slot_to_row = map_of(slot_to_row, tokens);
  args.weights = read(weights, accumulation(dy), tokens * k);
  args.dy_rows = written(dy_rows, dtype, rows * width);
  args.dweights = dweights ? written(*dweights, accumulation(dy), tokens * k) : nullptr;
  int64_t twice = -1;
  const std::vector<uint8_t> used = used_rows(slot_to_row, rows, &twice);
  if (twice >= 0) return twice;
  const auto run = [&](int64_t first, int64_t end) { kernels().combine_backward(args, first, end); };
  share_out(tokens, 2 * k * width, run);
  clear_unused_rows(used, dy_rows);
  return -1;
}

// For blocks of rows: h and a, to which the backward adds the rest.
cpu::ActivationArgs activation_args(const Tensor& h, const std::string& kind, const Tensor& a,
                                    const MaybeTensor& scale) {
  STD_TORCH_CHECK(kind == "swiglu" || kind == "relu", "moe_overlap: swiglu or relu");
  cpu::ActivationArgs args{};
  args.dtype = float_of(h);
  args.kind = kind == "swiglu" ? cpu::Activation::kSwiglu : cpu::Activation::kRelu;
  args.width = a.size(1);
  const int64_t rows = a.size(0), wide = args.kind == cpu::Activation::kSwiglu ? 2 * args.width : args.width;
  args.h = read(h, h.scalar_type(), rows * wide);
  args.scale = read(scale, accumulation(h), rows);
  args.a = written(a, h.scalar_type(), rows * args.width);
  return args;
}

void activation(const Tensor& h, const std::string& kind, const Tensor& a, const MaybeTensor& scale) {
  const cpu::ActivationArgs args = activation_args(h, kind, a, scale);
  const auto run = [&](int64_t first, int64_t end) { kernels().activation(args, first, end); };
  share_out(a.size(0), args.width, run);
}

void activation_backward(const Tensor& da, const Tensor& h, const std::string& kind, const Tensor& dh, const Tensor& a,
                         const MaybeTensor& scale, const MaybeTensor& dscale) {
  cpu::ActivationArgs args = activation_args(h, kind, a, scale);
  args.da = read(da, h.scalar_type(), a.numel());
  args.dh = written(dh, h.scalar_type(), h.numel());
  args.dscale = dscale ? written(*dscale, accumulation(h), a.size(0)) : nullptr;
  const auto run = [&](int64_t first, int64_t end) { kernels().activation_backward(args, first, end); };
  share_out(a.size(0), args.width, run);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_overlap, CPU, library) {
  library.impl("_combine_cpp", TORCH_BOX(&combine));
  library.impl("_combine_backward_cpp", TORCH_BOX(&combine_backward));
  library.impl("_permute_cpp", TORCH_BOX(&permute));
  library.impl("_activation_rows_cpp", TORCH_BOX(&activation));
  library.impl("_activation_rows_backward_cpp", TORCH_BOX(&activation_backward));
}
