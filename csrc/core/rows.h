// Row work of a layer on a CPU: the weighted sum of each token's rows and its backward, and the activation between the
// two matmuls of an expert. The contracts and the references stand in moe_overlap/ops/combine.py and activation.py.
//
// Every function works on a range of tokens or rows, so that the caller may share them out over threads: what a row
// comes to depends on that row alone. Arithmetic is float32 (float64 for float64 rows), rounded once.
#pragma once

#include <cstdint>
#include <vector>

namespace moe_overlap::cpu {

enum class Float { kFloat32, kBFloat16, kFloat16, kFloat64 };
enum class Activation { kSwiglu, kRelu };

// out[t] = sum over k, in order, of weights[t, k] * y[slot_to_row[t, k]], then + residual[t].
struct CombineArgs {
  Float dtype;  // of y, residual and out
  int64_t k;
  int64_t width;
  const void* y;               // [rows, width]
  const int32_t* slot_to_row;  // [tokens, k], -1 = no row: adds nothing, whatever its weight
  const void* weights;         // [tokens, k] in the accumulation dtype; null: 1
  const void* residual;        // [tokens, width]; null: 0
  void* out;                   // [tokens, width]
};

// dy_rows[slot_to_row[t, k]] = dy[t] * weights[t, k] and dweights[t, k] = the dot product of dy[t] and that row of y,
// 0 without a row. Rows without a slot are not written.
struct CombineBackwardArgs {
  Float dtype;  // of dy, y and dy_rows
  int64_t k;
  int64_t width;
  const void* dy;              // [tokens, width]
  const void* y;               // [rows, width]; null where dweights is
  const int32_t* slot_to_row;  // [tokens, k]
  const void* weights;         // [tokens, k] in the accumulation dtype
  void* dy_rows;               // [rows, width]
  void* dweights;              // [tokens, k] in the accumulation dtype; null: not wanted
};

// Forward: a = act(h) * scale. Backward: that again, dh = act'(h) * da * scale and dscale = sum over the row of
// da * act(h). For swiglu a row of h is [gate | up]. dh may be h, and for relu da.
struct ActivationArgs {
  Float dtype;  // of h, a, da and dh
  Activation kind;
  int64_t width;      // F
  const void* h;      // [rows, F], or [rows, 2F] for swiglu
  const void* scale;  // [rows] in the accumulation dtype; null: 1
  void* a;            // [rows, F]
  const void* da;     // [rows, F]
  void* dh;           // as h
  void* dscale;       // [rows] in the accumulation dtype; null: not wanted
};

// One compilation of csrc/core/row_kernels.cpp. All of them give the same bits: none fuses a multiplication with an
// addition, and sums have one order.
struct RowKernels {
  const char* name;
  void (*combine)(const CombineArgs&, int64_t first_token, int64_t end_token);
  void (*combine_backward)(const CombineBackwardArgs&, int64_t first_token, int64_t end_token);
  void (*activation)(const ActivationArgs&, int64_t first_row, int64_t end_row);
  void (*activation_backward)(const ActivationArgs&, int64_t first_row, int64_t end_row);
};

// Those that this CPU can run, the one with the widest vectors first.
std::vector<const RowKernels*> row_kernels();

// Marks the rows of [0, rows) that a slot points to, in used [rows]. Returns a row that two slots point to, or -1.
int64_t mark_rows(const int32_t* slot_to_row, int64_t slots, int64_t rows, uint8_t* used);

// out[slot_to_row[t, k]] = x[t] for the tokens of a range, rows of row_bytes.
void copy_to_rows(const void* x, const int32_t* slot_to_row, int64_t k, int64_t row_bytes, void* out,
                  int64_t first_token, int64_t end_token);

// Zeros in the rows of a range that `used` does not mark.
void clear_unused_rows(const uint8_t* used, int64_t row_bytes, void* out, int64_t first_row, int64_t end_row);

}  // namespace moe_overlap::cpu
