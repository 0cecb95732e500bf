// pack and unpack: rows copied through an order. One warp takes one row at a time, in the widest accesses that the
// addresses and the row allow; bytes are moved as they are, so every dtype is the same kernel.
#include <algorithm>

#include "kernels/launch.h"

namespace moe_overlap {
namespace {

constexpr int kWarpsPerBlock = 8;
// Enough blocks to fill any chip several times over; more rows than that are taken in turns.
constexpr int64_t kMostBlocks = 132 * 16;

struct RowCopy {
  const unsigned char* rows;
  const void* order;
  bool order_is_int64;
  int64_t num_rows;
  int64_t num_order;
  int64_t row_bytes;
  unsigned char* out;
};

template <typename Word>
__device__ inline void copy_row(const unsigned char* from, unsigned char* to, int64_t row_bytes) {
  const auto* const source = reinterpret_cast<const Word*>(from);
  auto* const target = reinterpret_cast<Word*>(to);
  const int64_t words = row_bytes / int64_t{sizeof(Word)};
  for (int64_t word = lane_id(); word < words; word += kWarp) target[word] = source[word];
}

template <typename Word>
__device__ inline void clear_row(unsigned char* to, int64_t row_bytes) {
  auto* const target = reinterpret_cast<Word*>(to);
  for (int64_t word = lane_id(); word < row_bytes / int64_t{sizeof(Word)}; word += kWarp) target[word] = Word{};
}

template <typename Word, bool kUnpack>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp) copy_rows_kernel(RowCopy args) {
  const int64_t step = int64_t{gridDim.x} * kWarpsPerBlock;
  for (int64_t i = int64_t{blockIdx.x} * kWarpsPerBlock + warp_id(); i < args.num_order; i += step) {
    const int64_t entry =
        args.order_is_int64 ? static_cast<const int64_t*>(args.order)[i] : static_cast<const int32_t*>(args.order)[i];
    if (entry >= 0 && entry < args.num_rows) {
      copy_row<Word>(args.rows + element_offset(kUnpack ? i : entry, args.row_bytes),
                     args.out + element_offset(kUnpack ? entry : i, args.row_bytes), args.row_bytes);
    } else if (!kUnpack) {
      clear_row<Word>(args.out + element_offset(i, args.row_bytes), args.row_bytes);
    }
  }
}

template <bool kUnpack>
void copy_rows(const PackArgs& args, cudaStream_t stream) {
  const LaunchConfig config = pack_config(args);
  const int64_t row_bytes = checked_mul(args.width, args.element_bytes);
  checked_mul(std::max(args.num_rows, args.num_order), row_bytes);
  const RowCopy copy{static_cast<const unsigned char*>(args.rows),
                     args.order,
                     args.order_is_int64,
                     args.num_rows,
                     args.num_order,
                     row_bytes,
                     static_cast<unsigned char*>(args.out)};
  const auto fits = [&](int64_t bytes) {
    return row_bytes % bytes == 0 && aligned(args.rows, bytes) && aligned(args.out, bytes);
  };
  if (fits(16)) {
    launch(copy_rows_kernel<Bytes16, kUnpack>, config, stream, copy);
  } else if (fits(4)) {
    launch(copy_rows_kernel<uint32_t, kUnpack>, config, stream, copy);
  } else {
    launch(copy_rows_kernel<uint16_t, kUnpack>, config, stream, copy);
  }
}

}  // namespace

LaunchConfig pack_config(const PackArgs& args) {
  if (args.num_order == 0 || args.width == 0) return {};
  return {std::min(ceil_div(args.num_order, kWarpsPerBlock), kMostBlocks), kWarpsPerBlock * kWarp, 0};
}

void pack(const PackArgs& args, cudaStream_t stream) { copy_rows<false>(args, stream); }
void unpack(const PackArgs& args, cudaStream_t stream) { copy_rows<true>(args, stream); }

}  // namespace moe_overlap
