// permute: every token's row is read once and written to the rows of its K slots. Bytes are moved as they are, so every
// dtype is the same kernel.
//
// Bytes: T * (1 + K) * width, the least there is; a gather by output row would read T * K rows. The writes are streamed
// (no reuse before the GEMM), which leaves the caches to x and the map. For each 16-byte word a thread has one load and
// up to 8 stores under way. The first blocks of the launch clear the rows without a slot (unused_rows.cuh).
#include "kernels/unused_rows.cuh"

namespace moe_overlap {
namespace {

template <typename Word>
__device__ inline void store_word(Word* address, const Word& value) {
  *address = value;
}
__device__ inline void store_word(Bytes16* address, const Bytes16& value) { store_streaming(address, value); }

template <typename Word>
__global__ void __launch_bounds__(kRowThreads)
    permute_kernel(PermuteArgs args, int words, int threads_per_row, int splits, int clearing) {
  if (blockIdx.x < static_cast<unsigned>(clearing)) {
    return clear_unused(args.slot_to_row, args.tokens * args.k, args.num_rows, clearing, words,
                        static_cast<Word*>(args.out));
  }
  const RowPlace place = row_place(threads_per_row, splits, clearing);
  if (place.row >= args.tokens) return;
  const Word* const x = static_cast<const Word*>(args.x) + element_offset(place.row, words);
  Word* const out = static_cast<Word*>(args.out);
  const int32_t* const slots = args.slot_to_row + element_offset(place.row, args.k);
  for (int64_t k = 0; k < args.k; k += kSlotsAtOnce) {
    int32_t row[kSlotsAtOnce];
    load_rows(slots, k, args.k, args.num_rows, row);
    for (int64_t word = place.first; word < words; word += place.step) {
      const Word value = x[word];
#pragma unroll
      for (int j = 0; j < kSlotsAtOnce; ++j) {
        if (row[j] >= 0) store_word(out + element_offset(row[j], words, word), value);
      }
    }
  }
}

int word_bytes(const PermuteArgs& args) {
  return access_bytes(checked_mul(args.width, args.element_bytes), args.x, args.out);
}

}  // namespace

RowTiling permute_tiling(const PermuteArgs& args) {
  const int64_t row_bytes = args.width * args.element_bytes;
  return with_clearing(row_tiling(args.k == 0 ? 0 : args.tokens, row_bytes / word_bytes(args), true), args.num_rows,
                       row_bytes);
}

void permute(const PermuteArgs& args, cudaStream_t stream) {
  const int64_t row_bytes = checked_mul(args.width, args.element_bytes);
  checked_mul(args.tokens, args.k);
  checked_mul(std::max(args.tokens, args.num_rows), row_bytes);
  if (row_bytes == 0 || args.num_rows == 0) return;
  const RowTiling tiling = permute_tiling(args);
  with_word(word_bytes(args), [&](auto word) {
    using Word = decltype(word);
    const int words = row_length(row_bytes / int64_t{sizeof(Word)});
    launch(permute_kernel<Word>, tiling.launch, stream, args, words, tiling.threads_per_row, tiling.splits,
           tiling.clearing);
  });
}

}  // namespace moe_overlap
