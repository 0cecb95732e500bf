// The kernels of rows.h, compiled once for each kind of CPU: MOE_OVERLAP_ROWS names the compilation. See row_math.h for
// what may not stand here.
//
// A row is taken in blocks of one length: widened into a buffer on the stack, computed there, narrowed into the result.
// So loops have operands that cannot overlap and a length known to the compiler, which lets it use vectors; results may
// lie where arguments were; and the end of a row, filled up with zeros, takes the way of all the others.
#include "row_math.h"
#include "rows.h"

namespace moe_overlap::cpu {
namespace {

constexpr int64_t kBlock = 64;

MOE_OVERLAP_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T>
MOE_OVERLAP_INLINE const T* row_of(const void* rows, int64_t row, int64_t width) {
  return static_cast<const T*>(rows) + row * width;
}

template <typename T>
MOE_OVERLAP_INLINE T* row_of(void* rows, int64_t row, int64_t width) {
  return static_cast<T*>(rows) + row * width;
}

// values[index], or `without` where there are none.
template <typename A>
MOE_OVERLAP_INLINE A value_of(const void* values, int64_t index, A without) {
  return values == nullptr ? without : static_cast<const A*>(values)[index];
}

// The next n elements of a row, 0 < n <= kBlock.
template <typename T>
MOE_OVERLAP_INLINE void load(const T* from, int64_t n, Accumulation<T>* to) {
  if (n == kBlock) {
    for (int64_t i = 0; i < kBlock; ++i) to[i] = widen(from[i]);
  } else {
    T filled_up[kBlock] = {};
    for (int64_t i = 0; i < n; ++i) filled_up[i] = from[i];
    for (int64_t i = 0; i < kBlock; ++i) to[i] = widen(filled_up[i]);
  }
}

template <typename T>
MOE_OVERLAP_INLINE void store(const Accumulation<T>* from, T* to, int64_t n) {
  if (n == kBlock) {
    for (int64_t i = 0; i < kBlock; ++i) narrow(from[i], to + i);
  } else {
    T narrowed[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) narrow(from[i], narrowed + i);
    for (int64_t i = 0; i < n; ++i) to[i] = narrowed[i];
  }
}

// The sum of a row: element i goes to lane i % kBlock, and then the lanes are added in pairs. The order follows from
// the width of the row alone.
template <typename A>
struct LaneSum {
  A lane[kBlock] = {};

  MOE_OVERLAP_INLINE void add(const A* values) {
    for (int64_t l = 0; l < kBlock; ++l) lane[l] += values[l];
  }

  MOE_OVERLAP_INLINE A total() {
    for (int64_t half = kBlock / 2; half > 0; half /= 2) {
      for (int64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
    }
    return lane[0];
  }
};

// ---- combine ----

// sum += weight * row for n elements; sum has room for whole blocks.
template <typename T>
MOE_OVERLAP_INLINE void add_row(const T* from, int64_t n, Accumulation<T> weight, Accumulation<T>* sum) {
  Accumulation<T> row[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    load<T>(from + begin, smaller(kBlock, n - begin), row);
    for (int64_t i = 0; i < kBlock; ++i) sum[begin + i] = sum[begin + i] + weight * row[i];
  }
}

// Several blocks of a row at a time, as the rows lie anywhere: memory is faster in longer pieces.
template <typename T>
void combine_tokens(const CombineArgs& args, int64_t first_token, int64_t end_token) {
  using A = Accumulation<T>;
  constexpr int64_t kPiece = 8 * kBlock;
  A sum[kPiece];
  for (int64_t token = first_token; token < end_token; ++token) {
    for (int64_t begin = 0; begin < args.width; begin += kPiece) {
      const int64_t n = smaller(kPiece, args.width - begin);
      for (int64_t i = 0; i < kPiece; ++i) sum[i] = -A{0};  // -0 + x is x, also where x is -0
      bool all = args.k > 0;
      for (int64_t slot = token * args.k; slot < (token + 1) * args.k; ++slot) {
        const int64_t row = args.slot_to_row[slot];
        all = all && row >= 0;
        if (row < 0) continue;
        const A weight = value_of<A>(args.weights, slot, A{1});
        add_row<T>(row_of<T>(args.y, row, args.width) + begin, n, weight, sum);
      }
      // The reference adds +0 for a slot without a row: which only shows in a sum of -0.
      if (!all) {
        for (int64_t i = 0; i < kPiece; ++i) sum[i] = sum[i] + A{0};
      }
      if (args.residual != nullptr) add_row<T>(row_of<T>(args.residual, token, args.width) + begin, n, A{1}, sum);
      T* const out = row_of<T>(args.out, token, args.width) + begin;
      for (int64_t i = 0; i < n; i += kBlock) store<T>(sum + i, out + i, smaller(kBlock, n - i));
    }
  }
}

template <typename T>
void combine_backward_tokens(const CombineBackwardArgs& args, int64_t first_token, int64_t end_token) {
  using A = Accumulation<T>;
  A dy[kBlock], y[kBlock], product[kBlock];
  for (int64_t token = first_token; token < end_token; ++token) {
    const T* const dy_row = row_of<T>(args.dy, token, args.width);
    for (int64_t slot = token * args.k; slot < (token + 1) * args.k; ++slot) {
      const int64_t row = args.slot_to_row[slot];
      LaneSum<A> dot;
      for (int64_t begin = 0; row >= 0 && begin < args.width; begin += kBlock) {
        const int64_t n = smaller(kBlock, args.width - begin);
        const A weight = static_cast<const A*>(args.weights)[slot];
        load<T>(dy_row + begin, n, dy);
        for (int64_t i = 0; i < kBlock; ++i) product[i] = dy[i] * weight;
        store<T>(product, row_of<T>(args.dy_rows, row, args.width) + begin, n);
        if (args.dweights != nullptr) {
          load<T>(row_of<T>(args.y, row, args.width) + begin, n, y);
          for (int64_t i = 0; i < kBlock; ++i) product[i] = dy[i] * y[i];
          dot.add(product);
        }
      }
      if (args.dweights != nullptr) static_cast<A*>(args.dweights)[slot] = dot.total();
    }
  }
}

// ---- activation ----

template <typename T>
void swiglu_rows(const ActivationArgs& args, int64_t first_row, int64_t end_row) {
  using A = Accumulation<T>;
  A gate[kBlock], up[kBlock], a[kBlock];
  for (int64_t row = first_row; row < end_row; ++row) {
    const A scale = value_of<A>(args.scale, row, A{1});
    const T* const h = row_of<T>(args.h, row, 2 * args.width);
    for (int64_t begin = 0; begin < args.width; begin += kBlock) {
      const int64_t n = smaller(kBlock, args.width - begin);
      load<T>(h + begin, n, gate);
      load<T>(h + args.width + begin, n, up);
      for (int64_t i = 0; i < kBlock; ++i) a[i] = gate[i] * sigmoid<A>(gate[i]) * up[i] * scale;
      store<T>(a, row_of<T>(args.a, row, args.width) + begin, n);
    }
  }
}

template <typename T>
void swiglu_backward_rows(const ActivationArgs& args, int64_t first_row, int64_t end_row) {
  using A = Accumulation<T>;
  A gate[kBlock], up[kBlock], da[kBlock], a[kBlock], product[kBlock];
  for (int64_t row = first_row; row < end_row; ++row) {
    const A scale = value_of<A>(args.scale, row, A{1});
    const T* const h = row_of<T>(args.h, row, 2 * args.width);
    T* const dh = row_of<T>(args.dh, row, 2 * args.width);
    LaneSum<A> dscale;
    for (int64_t begin = 0; begin < args.width; begin += kBlock) {
      const int64_t n = smaller(kBlock, args.width - begin);
      load<T>(h + begin, n, gate);
      load<T>(h + args.width + begin, n, up);
      load<T>(row_of<T>(args.da, row, args.width) + begin, n, da);
      for (int64_t i = 0; i < kBlock; ++i) {
        const A g = gate[i], u = up[i], s = sigmoid<A>(g);
        const A silu = g * s, act = silu * u, scaled = da[i] * scale;
        product[i] = da[i] * act;
        a[i] = act * scale;
        up[i] = scaled * silu;
        gate[i] = scaled * u * (s * (A{1} + g * (A{1} - s)));
      }
      store<T>(a, row_of<T>(args.a, row, args.width) + begin, n);
      store<T>(gate, dh + begin, n);
      store<T>(up, dh + args.width + begin, n);
      if (args.dscale != nullptr) dscale.add(product);
    }
    if (args.dscale != nullptr) static_cast<A*>(args.dscale)[row] = dscale.total();
  }
}

// NaN stays NaN.
template <typename A>
MOE_OVERLAP_INLINE A relu(A h) {
  return h < A{0} ? A{0} : h;
}

template <typename T>
void relu_rows(const ActivationArgs& args, int64_t first_row, int64_t end_row) {
  using A = Accumulation<T>;
  A h[kBlock], a[kBlock];
  for (int64_t row = first_row; row < end_row; ++row) {
    const A scale = value_of<A>(args.scale, row, A{1});
    for (int64_t begin = 0; begin < args.width; begin += kBlock) {
      const int64_t n = smaller(kBlock, args.width - begin);
      load<T>(row_of<T>(args.h, row, args.width) + begin, n, h);
      for (int64_t i = 0; i < kBlock; ++i) a[i] = relu<A>(h[i]) * scale;
      store<T>(a, row_of<T>(args.a, row, args.width) + begin, n);
    }
  }
}

template <typename T>
void relu_backward_rows(const ActivationArgs& args, int64_t first_row, int64_t end_row) {
  using A = Accumulation<T>;
  A h[kBlock], da[kBlock], a[kBlock], product[kBlock];
  for (int64_t row = first_row; row < end_row; ++row) {
    const A scale = value_of<A>(args.scale, row, A{1});
    LaneSum<A> dscale;
    for (int64_t begin = 0; begin < args.width; begin += kBlock) {
      const int64_t n = smaller(kBlock, args.width - begin);
      load<T>(row_of<T>(args.h, row, args.width) + begin, n, h);
      load<T>(row_of<T>(args.da, row, args.width) + begin, n, da);
      for (int64_t i = 0; i < kBlock; ++i) {
        const A act = relu<A>(h[i]), scaled = da[i] * scale;
        product[i] = da[i] * act;
        a[i] = act * scale;
        da[i] = h[i] <= A{0} ? A{0} : scaled;
      }
      store<T>(a, row_of<T>(args.a, row, args.width) + begin, n);
      store<T>(da, row_of<T>(args.dh, row, args.width) + begin, n);
      if (args.dscale != nullptr) dscale.add(product);
    }
    if (args.dscale != nullptr) static_cast<A*>(args.dscale)[row] = dscale.total();
  }
}

// ---- by dtype and kind ----

template <typename T>
void activation_rows(const ActivationArgs& args, int64_t first, int64_t end) {
  args.kind == Activation::kSwiglu ? swiglu_rows<T>(args, first, end) : relu_rows<T>(args, first, end);
}

template <typename T>
void activation_backward_rows(const ActivationArgs& args, int64_t first, int64_t end) {
  args.kind == Activation::kSwiglu ? swiglu_backward_rows<T>(args, first, end)
                                   : relu_backward_rows<T>(args, first, end);
}

#define MOE_OVERLAP_BY_DTYPE(name, Args, kernel)            \
  void name(const Args& args, int64_t first, int64_t end) { \
    switch (args.dtype) {                                   \
      case Float::kFloat32:                                 \
        return kernel<float>(args, first, end);             \
      case Float::kBFloat16:                                \
        return kernel<BFloat16>(args, first, end);          \
      case Float::kFloat16:                                 \
        return kernel<Float16>(args, first, end);           \
      case Float::kFloat64:                                 \
        return kernel<double>(args, first, end);            \
    }                                                       \
  }

MOE_OVERLAP_BY_DTYPE(combine, CombineArgs, combine_tokens)
MOE_OVERLAP_BY_DTYPE(combine_backward, CombineBackwardArgs, combine_backward_tokens)
MOE_OVERLAP_BY_DTYPE(activation, ActivationArgs, activation_rows)
MOE_OVERLAP_BY_DTYPE(activation_backward, ActivationArgs, activation_backward_rows)

}  // namespace

namespace MOE_OVERLAP_ROWS {

#define MOE_OVERLAP_TEXT_OF(name) #name
#define MOE_OVERLAP_TEXT(name) MOE_OVERLAP_TEXT_OF(name)
extern const RowKernels kernels;
const RowKernels kernels = {MOE_OVERLAP_TEXT(MOE_OVERLAP_ROWS), &combine, &combine_backward, &activation,
                            &activation_backward};

}  // namespace MOE_OVERLAP_ROWS
}  // namespace moe_overlap::cpu
