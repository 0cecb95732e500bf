// The activation between the two matmuls of an expert: swiglu on [gate | up] (arXiv 2002.05202), gelu (erf) and relu,
// forward and backward, with a factor for each row (the router weight) and its gradient.
//
// A row is taken by one warp, or by a whole block where rows are wide; which one follows from the width alone, so that
// the order in which the gradient of a row's factor is summed never depends on how many rows there are. Arithmetic is
// in float32, rounded once at the end. Rows past offs are not read: a matmul may have left anything there.
#include "kernels/launch.h"

namespace moe_overlap {
namespace {

constexpr int kWarpsPerBlock = 8;
// From here on a block has work for all its warps in one row: 256 threads with 8 elements each.
constexpr int64_t kWideRow = 2048;

struct Rows {
  const void* h;
  const float* row_scale;
  bool has_offs;
  const int32_t* offs;
  int64_t num_offs;
  const void* da;
  void* a;
  void* dh;
  float* dscale;
  int64_t rows;
  int64_t width;
  int warps_per_row;
};

__device__ inline int64_t live_rows(const Rows& args) {
  if (!args.has_offs) return args.rows;
  const int64_t end = args.num_offs == 0 ? 0 : args.offs[args.num_offs - 1];
  return end < args.rows ? end : args.rows;
}

// act(h) and its derivative. swiglu: value = silu(gate) * up.
__device__ inline float sigmoid(float x) { return divide_fast(1.0f, 1.0f + exp_f32(-x)); }
__device__ inline float gelu(float x) { return x * 0.5f * (1.0f + erf_f32(x * 0.70710678118654752f)); }
__device__ inline float gelu_slope(float x) {
  const float density = 0.39894228040143268f * exp_f32(-0.5f * x * x);
  return 0.5f * (1.0f + erf_f32(x * 0.70710678118654752f)) + x * density;
}
// Not max(x, 0): a NaN has to stay one.
__device__ inline float relu(float x) { return x <= 0.0f ? 0.0f : x; }

// The part of a row that this thread has: in vectors, every `step`-th from `begin` on.
struct Share {
  int64_t row;
  int64_t begin, step;
  __device__ explicit Share(int warps_per_row) {
    row = int64_t{blockIdx.x} * (kWarpsPerBlock / warps_per_row) + warp_id() / warps_per_row;
    step = warps_per_row * kWarp;
    begin = static_cast<int>(threadIdx.x) % step;
  }
};

template <typename T, int N>
__device__ inline void clear(T* row, int64_t width, const Share& share) {
  for (int64_t i = share.begin; i < width / N; i += share.step) store_vec(row + i * N, Vec<T, N>{});
}

template <typename T, int N, Activation kKind>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp) activation_forward_kernel(Rows args) {
  constexpr int kHalves = kKind == Activation::kSwiglu ? 2 : 1;
  const Share share(args.warps_per_row);
  const int64_t row = share.row, width = args.width;
  if (row >= args.rows) return;
  T* const a = static_cast<T*>(args.a) + element_offset(row, width);
  if (row >= live_rows(args)) return clear<T, N>(a, width, share);
  const T* const h = static_cast<const T*>(args.h) + element_offset(row, kHalves * width);
  const float scale = args.row_scale ? args.row_scale[row] : 1.0f;
  for (int64_t i = share.begin * N; i < width; i += share.step * N) {
    const Vec<T, N> first = load_vec<N>(h + i);
    const Vec<T, N> up = load_vec<N>(h + i + (kHalves - 1) * width);
    Vec<T, N> out;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const float x = to_float(first.v[e]);
      float value = 0.0f;
      if (kKind == Activation::kSwiglu) value = x * sigmoid(x) * to_float(up.v[e]);
      if (kKind == Activation::kGelu) value = gelu(x);
      if (kKind == Activation::kRelu) value = relu(x);
      out.v[e] = from_float<T>(value * scale);
    }
    store_vec(a + i, out);
  }
}

// The sum over the threads of a row, in a fixed tree; valid in the row's first thread.
__device__ inline float row_sum(float value, int warps_per_row) {
  value = warp_sum(value);
  if (warps_per_row > 1) {  // then it is the whole block, and all of it is here
    SHARED_ARRAY(float, part, kWarpsPerBlock);
    if (lane_id() == 0) part[warp_id()] = value;
    sync_block();
    value = 0.0f;
    for (int warp = 0; warp < kWarpsPerBlock; ++warp) value = add_rn(value, part[warp]);
  }
  return value;
}

template <typename T, int N, Activation kKind>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp) activation_backward_kernel(Rows args) {
  constexpr int kHalves = kKind == Activation::kSwiglu ? 2 : 1;
  const Share share(args.warps_per_row);
  const int64_t row = share.row, width = args.width;
  if (row >= args.rows) return;
  T* const dh = static_cast<T*>(args.dh) + element_offset(row, kHalves * width);
  if (row >= live_rows(args)) {
    if (args.dscale && share.begin == 0) args.dscale[row] = 0.0f;
    return clear<T, N>(dh, kHalves * width, share);
  }
  const T* const h = static_cast<const T*>(args.h) + element_offset(row, kHalves * width);
  const T* const da = static_cast<const T*>(args.da) + element_offset(row, width);
  const float scale = args.row_scale ? args.row_scale[row] : 1.0f;
  float dscale = 0.0f;
  for (int64_t i = share.begin * N; i < width; i += share.step * N) {
    const Vec<T, N> first = load_vec<N>(h + i);
    const Vec<T, N> second = load_vec<N>(h + i + (kHalves - 1) * width);
    const Vec<T, N> given = load_vec<N>(da + i);
    Vec<T, N> dfirst, dsecond;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const float x = to_float(first.v[e]), d = to_float(given.v[e]), scaled = d * scale;
      float value = 0.0f;
      if (kKind == Activation::kSwiglu) {
        const float up = to_float(second.v[e]), s = sigmoid(x), silu = x * s;
        value = silu * up;
        dfirst.v[e] = from_float<T>(scaled * up * (s + silu * (1.0f - s)));
        dsecond.v[e] = from_float<T>(scaled * silu);
      } else if (kKind == Activation::kGelu) {
        value = gelu(x);
        dfirst.v[e] = from_float<T>(scaled * gelu_slope(x));
      } else {
        value = relu(x);
        dfirst.v[e] = from_float<T>(x <= 0.0f ? 0.0f : scaled);
      }
      dscale += d * value;
    }
    store_vec(dh + i, dfirst);
    if (kHalves == 2) store_vec(dh + i + width, dsecond);
  }
  if (args.dscale) {
    dscale = row_sum(dscale, args.warps_per_row);
    if (share.begin == 0) args.dscale[row] = dscale;
  }
}

int warps_per_row(int64_t width) { return width >= kWideRow ? kWarpsPerBlock : 1; }

template <typename T, int N, Activation kKind>
void start(const Rows& rows, const LaunchConfig& config, bool backward, cudaStream_t stream) {
  launch(backward ? activation_backward_kernel<T, N, kKind> : activation_forward_kernel<T, N, kKind>, config, stream,
         rows);
}

template <typename T, int N>
void start(Activation kind, const Rows& rows, const LaunchConfig& config, bool backward, cudaStream_t stream) {
  switch (kind) {
    case Activation::kSwiglu:
      return start<T, N, Activation::kSwiglu>(rows, config, backward, stream);
    case Activation::kGelu:
      return start<T, N, Activation::kGelu>(rows, config, backward, stream);
    case Activation::kRelu:
      return start<T, N, Activation::kRelu>(rows, config, backward, stream);
  }
  throw std::invalid_argument("unknown activation");
}

void run(const ActivationArgs& args, bool backward, cudaStream_t stream) {
  checked_mul(checked_mul(args.rows, args.width), 2);
  const Rows rows{args.h, args.row_scale, args.has_offs, args.offs, args.num_offs, args.da,
                  args.a, args.dh,        args.dscale,   args.rows, args.width,    warps_per_row(args.width)};
  with_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    const bool vectors = args.width % kVec<T> == 0 && aligned(args.h, 16) && aligned(args.da, 16) &&
                         aligned(args.a, 16) && aligned(args.dh, 16);
    if (vectors) {
      start<T, kVec<T>>(args.kind, rows, activation_config(args), backward, stream);
    } else {
      start<T, 1>(args.kind, rows, activation_config(args), backward, stream);
    }
  });
}

}  // namespace

LaunchConfig activation_config(const ActivationArgs& args) {
  if (args.rows == 0) return {};
  return {ceil_div(args.rows, kWarpsPerBlock / warps_per_row(args.width)), kWarpsPerBlock * kWarp, 0};
}

void activation_forward(const ActivationArgs& args, cudaStream_t stream) { run(args, false, stream); }
void activation_backward(const ActivationArgs& args, cudaStream_t stream) { run(args, true, stream); }

}  // namespace moe_overlap
