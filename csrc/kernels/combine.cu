// combine: every token gathers the rows of its K slots and sums them in float32, k = 0, 1, ..., then the residual, each
// product and each sum rounded by itself, as the reference does: the same bits (but for the sign of a sum of -0). No
// atomics anywhere.
//
// Bytes: T * (K + 1) * width, and T * width more with a residual. A thread has 8 loads of 16 bytes under way: of 8
// slots, or of 4 or 2 where there are no more, for 2 or 4 words of the row; at 24 warps for each multiprocessor that is
// 96 KB in flight, four times what 4.3 TB/s at 700 ns of latency need. Arithmetic: about 24 instructions for 8
// elements, against some 100 issue slots in the time of one 512-byte access of a warp. The backward is permute with a
// weight, and a dot product for each slot, summed in a fixed tree.
#include "kernels/unused_rows.cuh"

namespace moe_overlap {
namespace {

constexpr int kWarpsPerBlock = kRowThreads / kWarp;

template <typename T, int N>
__device__ inline void store_streaming_vec(T* address, const Vec<T, N>& value) {
  if constexpr (sizeof(value) == sizeof(Bytes16)) {
    Bytes16 bytes;
    std::memcpy(&bytes, &value, sizeof bytes);
    store_streaming(reinterpret_cast<Bytes16*>(address), bytes);
  } else {
    store_vec(address, value);
  }
}

// N elements while they wait to be used: as bytes, since the compiler takes a vector of 16-bit elements apart on
// arrival, which doubles its registers.
template <int N, typename T>
__device__ inline Bytes16 load_bytes(const T* address) {
  const Vec<T, N> value = load_vec<N>(address);
  Bytes16 bytes{};
  std::memcpy(&bytes, &value, sizeof value);
  return bytes;
}
template <typename T, int N>
__device__ inline Vec<T, N> elements(const Bytes16& bytes) {
  Vec<T, N> value;
  std::memcpy(&value, &bytes, sizeof value);
  return value;
}

// The weights of the slots whose rows are `row`: 1 where there are none, 0 where there is no row, whatever stands
// there.
template <int kSlots>
__device__ inline void load_weights(const float* weights, int64_t first, const int32_t (&row)[kSlots],
                                    float (&weight)[kSlots]) {
#pragma unroll
  for (int j = 0; j < kSlots; ++j) {
    weight[j] = row[j] < 0 ? 0.0f : weights == nullptr ? 1.0f : weights[first + j];
  }
}

template <typename T, int N>
__device__ inline void add_vec(const T* address, float (&sum)[N]) {
  const Vec<T, N> value = load_vec<N>(address);
#pragma unroll
  for (int i = 0; i < N; ++i) sum[i] = add_rn(sum[i], to_float(value.v[i]));
}

// N elements of a residual of another dtype are up to 32 bytes: two loads of 16.
template <typename T, int N>
__device__ inline void add_residual(const T* address, float (&sum)[N]) {
  if constexpr (N <= kVec<T>) {
    add_vec<T, N>(address, sum);
  } else {
    float half[2][N / 2];
#pragma unroll
    for (int i = 0; i < N; ++i) half[i / (N / 2)][i % (N / 2)] = sum[i];
    add_vec<T, N / 2>(address, half[0]);
    add_vec<T, N / 2>(address + N / 2, half[1]);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = half[i / (N / 2)][i % (N / 2)];
  }
}

template <int N>
__device__ inline void add_residual(const CombineArgs& args, int64_t offset, float (&sum)[N]) {
  switch (args.residual_dtype) {
    case DType::kFloat32:
      return add_residual(static_cast<const float*>(args.residual) + offset, sum);
    case DType::kBFloat16:
      return add_residual(static_cast<const bf16*>(args.residual) + offset, sum);
    case DType::kFloat16:
      return add_residual(static_cast<const fp16*>(args.residual) + offset, sum);
  }
}

// sum[w] += the slots of kWords words, `step` words apart from `word` on: kSlots at a time, so that there are
// kSlots * kWords loads under way. Words from `words` on are not read.
template <typename T, int N, int kSlots, int kWords>
__device__ inline void add_slots(const CombineArgs& args, int width, int64_t token, int64_t word, int64_t words,
                                 int step, float (&sum)[kWords][N]) {
  const int32_t* const slots = args.slot_to_row + element_offset(token, args.k);
  const float* const weights = args.weights == nullptr ? nullptr : args.weights + element_offset(token, args.k);
  const T* const y = static_cast<const T*>(args.y);
  for (int64_t k = 0; k < args.k; k += kSlots) {
    int32_t row[kSlots];
    float weight[kSlots];
    Bytes16 value[kSlots][kWords];
    load_rows(slots, k, args.k, args.num_rows, row);
    load_weights(weights, k, row, weight);
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const int64_t at = word + int64_t{w} * step;
        value[j][w] = {};
        if (row[j] >= 0 && at < words) value[j][w] = load_bytes<N>(y + element_offset(row[j], width, at * N));
      }
    }
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const auto part = elements<T, N>(value[j][w]);
#pragma unroll
        for (int i = 0; i < N; ++i) sum[w][i] = add_rn(sum[w][i], mul_rn(to_float(part.v[i]), weight[j]));
      }
    }
  }
}

template <typename T, int N, int kSlots>
__global__ void __launch_bounds__(kRowThreads, 3)
    combine_kernel(CombineArgs args, int width, int threads_per_row, int splits) {
  constexpr int kWords = kSlotsAtOnce / kSlots;
  const RowPlace place = row_place(threads_per_row, splits);
  if (place.row >= args.tokens) return;
  const int64_t words = width / N;
  for (int64_t first = place.first; first < words; first += int64_t{kWords} * place.step) {
    float sum[kWords][N] = {};
    add_slots<T, N, kSlots, kWords>(args, width, place.row, first, words, place.step, sum);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int64_t word = first + int64_t{w} * place.step;
      if (word >= words) break;
      const int64_t offset = element_offset(place.row, width, word * N);
      if (args.residual != nullptr) add_residual(args, offset, sum[w]);
      Vec<T, N> out;
#pragma unroll
      for (int i = 0; i < N; ++i) out.v[i] = from_float<T>(sum[w][i]);
      store_streaming_vec<T, N>(static_cast<T*>(args.out) + offset, out);
    }
  }
}

// dot[j] of every thread summed over the threads of its row, in a fixed tree: within a warp, then warp after warp.
__device__ inline void store_dots(const CombineBackwardArgs& args, const RowPlace& place, int64_t k,
                                  int threads_per_row, const float (&dot)[kSlotsAtOnce]) {
  SHARED_ARRAY(float, partial, kWarpsPerBlock* kSlotsAtOnce);
#pragma unroll
  for (int j = 0; j < kSlotsAtOnce; ++j) {
    const float sum = warp_sum(dot[j]);
    if (lane_id() == 0) partial[warp_id() * kSlotsAtOnce + j] = sum;
  }
  sync_block();
  if (place.row < args.tokens && place.first < kSlotsAtOnce && k + place.first < args.k) {
    float sum = 0.0f;
    for (int warp = 0; warp < threads_per_row / kWarp; ++warp) {
      sum = add_rn(sum, partial[(warp_id() + warp) * kSlotsAtOnce + place.first]);
    }
    args.dweights[element_offset(place.row, args.k, k + place.first)] = sum;
  }
  sync_block();  // before the next slots write to partial
}

// One word of a token's gradient to the rows of up to kSlotsAtOnce slots; dot[j] += <dy, y[row[j]]> where wanted.
template <typename T, int N, bool kDots>
__device__ inline void spread_word(const CombineBackwardArgs& args, int width, int64_t token, int64_t column,
                                   const int32_t (&row)[kSlotsAtOnce], const float (&weight)[kSlotsAtOnce],
                                   float (&dot)[kSlotsAtOnce]) {
  const T* const y = static_cast<const T*>(args.y);
  T* const out = static_cast<T*>(args.dy_rows);
  Bytes16 value[kSlotsAtOnce] = {};
  if (kDots) {
#pragma unroll
    for (int j = 0; j < kSlotsAtOnce; ++j) {
      if (row[j] >= 0) value[j] = load_bytes<N>(y + element_offset(row[j], width, column));
    }
  }
  const Vec<T, N> dy = load_vec<N>(static_cast<const T*>(args.dy) + element_offset(token, width, column));
#pragma unroll
  for (int j = 0; j < kSlotsAtOnce; ++j) {
    if (row[j] < 0) continue;
    const auto other = elements<T, N>(value[j]);
    Vec<T, N> scaled;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float d = to_float(dy.v[i]);
      if (kDots) dot[j] = add_rn(dot[j], mul_rn(d, to_float(other.v[i])));
      scaled.v[i] = from_float<T>(mul_rn(d, weight[j]));
    }
    store_streaming_vec<T, N>(out + element_offset(row[j], width, column), scaled);
  }
}

template <typename T, int N, bool kDots>
__global__ void __launch_bounds__(kRowThreads, 2)
    combine_backward_kernel(CombineBackwardArgs args, int width, int threads_per_row, int splits, int clearing) {
  if (blockIdx.x < static_cast<unsigned>(clearing)) {
    return clear_unused(args.slot_to_row, args.tokens * args.k, args.num_rows, clearing, width / N,
                        static_cast<Vec<T, N>*>(args.dy_rows));
  }
  const RowPlace place = row_place(threads_per_row, splits, clearing);
  const bool inside = place.row < args.tokens;  // all threads stay for the barriers
  const int words = inside ? width / N : 0;
  const int64_t first_slot = element_offset(inside ? place.row : 0, args.k);
  for (int64_t k = 0; k < args.k; k += kSlotsAtOnce) {
    int32_t row[kSlotsAtOnce];
    float weight[kSlotsAtOnce];
    float dot[kSlotsAtOnce] = {};
    load_rows(args.slot_to_row + first_slot, k, args.k, args.num_rows, row);
    load_weights(args.weights + first_slot, k, row, weight);
    for (int64_t word = place.first; word < words; word += place.step) {
      spread_word<T, N, kDots>(args, width, place.row, word * N, row, weight, dot);
    }
    if (kDots) store_dots(args, place, k, threads_per_row, dot);
  }
}

template <typename T, int N>
void run(const CombineBackwardArgs& args, cudaStream_t stream) {
  const RowTiling tiling = combine_tiling(args);
  const int width = row_length(args.width);
  if (args.dweights != nullptr) {
    launch(combine_backward_kernel<T, N, true>, tiling.launch, stream, args, width, tiling.threads_per_row,
           tiling.splits, tiling.clearing);
  } else {
    launch(combine_backward_kernel<T, N, false>, tiling.launch, stream, args, width, tiling.threads_per_row,
           tiling.splits, tiling.clearing);
  }
}

int dtype_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// 16-byte accesses, or one element at a time where an address or the width does not allow them.
bool wide(const CombineArgs& args) {
  const int vec = 16 / dtype_bytes(args.dtype);
  const int residual_bytes = std::min(16, vec * dtype_bytes(args.residual_dtype));
  return args.width % vec == 0 && aligned(args.y, 16) && aligned(args.out, 16) &&
         aligned(args.residual, residual_bytes);
}
bool wide(const CombineBackwardArgs& args) {
  return args.width % (16 / dtype_bytes(args.dtype)) == 0 && aligned(args.dy, 16) && aligned(args.y, 16) &&
         aligned(args.dy_rows, 16);
}

template <typename Args>
int64_t words(const Args& args) {
  return wide(args) ? args.width / (16 / dtype_bytes(args.dtype)) : args.width;
}

// Few slots of a token leave room for more of its words under way.
int slots_at_once(int64_t k) { return k <= 2 ? 2 : k <= 4 ? 4 : kSlotsAtOnce; }

template <typename T, int N>
auto combine_kernel_for(int64_t k) {
  switch (slots_at_once(k)) {
    case 2:
      return combine_kernel<T, N, 2>;
    case 4:
      return combine_kernel<T, N, 4>;
    default:
      return combine_kernel<T, N, kSlotsAtOnce>;
  }
}

template <typename Args>
void check_sizes(const Args& args) {
  checked_mul(args.tokens, args.k);
  checked_mul(std::max(args.tokens, args.num_rows), checked_mul(args.width, 4));
}

}  // namespace

RowTiling combine_tiling(const CombineArgs& args) {
  return row_tiling(args.tokens, ceil_div(words(args), kSlotsAtOnce / slots_at_once(args.k)), true);
}

// The gradient of a weight is summed within one block: no splits where it is wanted.
RowTiling combine_tiling(const CombineBackwardArgs& args) {
  return with_clearing(row_tiling(args.k == 0 ? 0 : args.tokens, words(args), args.dweights == nullptr), args.num_rows,
                       args.width * dtype_bytes(args.dtype));
}

void combine(const CombineArgs& args, cudaStream_t stream) {
  check_sizes(args);
  const RowTiling tiling = combine_tiling(args);
  with_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = wide(args) ? combine_kernel_for<T, kVec<T>>(args.k) : combine_kernel_for<T, 1>(args.k);
    launch(kernel, tiling.launch, stream, args, row_length(args.width), tiling.threads_per_row, tiling.splits);
  });
}

void combine_backward(const CombineBackwardArgs& args, cudaStream_t stream) {
  if (args.dweights != nullptr && (args.weights == nullptr || args.y == nullptr)) {
    throw std::invalid_argument("combine_backward: a gradient of the weights needs the weights and y");
  }
  check_sizes(args);
  if (args.width == 0 || args.num_rows == 0) {
    if (args.dweights != nullptr) clear(args.dweights, checked_mul(args.tokens * args.k, 4), stream);
    return;
  }
  if (args.weights == nullptr) {
    return permute({args.dy, args.slot_to_row, args.tokens, args.k, args.width, args.num_rows, dtype_bytes(args.dtype),
                    args.dy_rows},
                   stream);
  }
  with_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    wide(args) ? run<T, kVec<T>>(args, stream) : run<T, 1>(args, stream);
  });
}

}  // namespace moe_overlap
