// pack and unpack: rows copied through an order. Bytes are moved as they are, so every dtype is the same kernel: whole
// rows in the widest accesses that the addresses allow, several of them in flight for each thread.
#include "kernels/rows.cuh"

namespace moe_overlap {
namespace {

constexpr int kWordsAtOnce = 4;

// to[i] = from[i] for this thread's words. All loads of a round come before its stores: the compiler may not move a
// load over a store that could be to the same place.
template <typename Word>
__device__ inline void copy_words(const Word* from, Word* to, int words, const RowPlace& place) {
  for (int64_t first = place.first; first < words; first += int64_t{kWordsAtOnce} * place.step) {
    Word value[kWordsAtOnce];
#pragma unroll
    for (int j = 0; j < kWordsAtOnce; ++j) {
      const int64_t word = first + int64_t{j} * place.step;
      value[j] = word < words ? from[word] : Word{};
    }
#pragma unroll
    for (int j = 0; j < kWordsAtOnce; ++j) {
      const int64_t word = first + int64_t{j} * place.step;
      if (word < words) to[word] = value[j];
    }
  }
}

template <typename Word, bool kUnpack>
__global__ void __launch_bounds__(kRowThreads)
    copy_rows_kernel(PackArgs args, int words, int threads_per_row, int splits) {
  const RowPlace place = row_place(threads_per_row, splits);
  if (place.row >= args.num_order) return;
  const int64_t entry = args.order_is_int64 ? static_cast<const int64_t*>(args.order)[place.row]
                                            : static_cast<const int32_t*>(args.order)[place.row];
  const bool valid = entry >= 0 && entry < args.num_rows;
  if (kUnpack && !valid) return;
  const int64_t read = kUnpack ? place.row : entry, written = kUnpack ? entry : place.row;
  Word* const to = static_cast<Word*>(args.out) + element_offset(written, words);
  if (valid) {
    copy_words(static_cast<const Word*>(args.rows) + element_offset(read, words), to, words, place);
  } else {
    for (int64_t word = place.first; word < words; word += place.step) to[word] = Word{};
  }
}

int word_bytes(const PackArgs& args) {
  return access_bytes(checked_mul(args.width, args.element_bytes), args.rows, args.out);
}

template <bool kUnpack>
void copy_rows(const PackArgs& args, cudaStream_t stream) {
  const int64_t row_bytes = checked_mul(args.width, args.element_bytes);
  checked_mul(std::max(args.num_rows, args.num_order), row_bytes);
  const RowTiling tiling = pack_tiling(args);
  with_word(word_bytes(args), [&](auto word) {
    using Word = decltype(word);
    const int words = row_length(row_bytes / int64_t{sizeof(Word)});
    launch(copy_rows_kernel<Word, kUnpack>, tiling.launch, stream, args, words, tiling.threads_per_row, tiling.splits);
  });
}

}  // namespace

RowTiling pack_tiling(const PackArgs& args) {
  const int64_t words = args.width * args.element_bytes / word_bytes(args);
  return row_tiling(args.num_order, ceil_div(words, kWordsAtOnce), true);
}

void pack(const PackArgs& args, cudaStream_t stream) { copy_rows<false>(args, stream); }
void unpack(const PackArgs& args, cudaStream_t stream) { copy_rows<true>(args, stream); }

}  // namespace moe_overlap
