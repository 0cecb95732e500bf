// The CUDA operators as seen from the host: raw pointers and sizes in an Args struct, a stream, nothing of torch and no
// CUDA header, so that any C++ compiler reads this file. What each operator means stands with its reference in
// moe_overlap/ops/<op>.py; sizes and strides count elements. A function enqueues work on the stream and returns; it
// throws std::invalid_argument for arguments it does not take and std::runtime_error when CUDA refuses the launch.
#pragma once

#include <cstdint>
#include <string>

#include "core/row_map.h"

typedef struct CUstream_st* cudaStream_t;  // as the CUDA headers say it

namespace moe_overlap {

enum class DType { kFloat32, kBFloat16, kFloat16 };

// The shape of one launch: a pure function of an operator's sizes, so that it can be printed and tested without a GPU.
struct LaunchConfig {
  int64_t grid = 0;  // blocks; 0 = nothing to do
  int block = 0;     // threads of a block, whole warps
  int shared_bytes = 0;

  std::string text() const {
    return "grid " + std::to_string(grid) + " block " + std::to_string(block) + " shared " +
           std::to_string(shared_bytes) + " B";
  }
};

// Blocks laid over rows: threads_per_row threads take one row, or one of `splits` interleaved parts of it. The first
// `clearing` blocks of the launch set rows to zero that no slot points to.
struct RowTiling {
  LaunchConfig launch;
  int threads_per_row = 0;
  int splits = 0;
  int clearing = 0;
};

// ---- pack.cu: out[i] = rows[order[i]] and out[order[i]] = rows[i] ----

struct PackArgs {
  // in
  const void* rows;     // pack: [num_rows, width]; unpack: [num_order, width]
  const void* order;    // [num_order] int64 or int32, entries in [0, num_rows)
  bool order_is_int64;  // else int32
  int64_t num_rows;
  int64_t num_order;
  int64_t width;
  int element_bytes;  // 2, 4 or 8
  // out
  void* out;  // pack: [num_order, width]; unpack: [num_rows, width]
};

RowTiling pack_tiling(const PackArgs& args);
// An entry of `order` out of range is not followed: pack writes zeros there, unpack skips the row.
void pack(const PackArgs& args, cudaStream_t stream);
void unpack(const PackArgs& args, cudaStream_t stream);

// ---- swiglu.cu: a = act(h) * row_scale, and its backward ----

enum class Activation { kSwiglu, kGelu, kRelu };

struct ActivationArgs {
  DType dtype;  // of h, a, da, dh
  Activation kind;
  int64_t rows;
  int64_t width;  // F; rows of h are 2F wide, [gate | up], for kSwiglu and F wide for the others
  // in
  const void* h;
  const float* row_scale;  // [rows], or null: 1
  bool has_offs;           // else all rows count
  const int32_t* offs;     // [num_offs]; rows from offs[num_offs - 1] on (all of them when num_offs is 0) become zero
  int64_t num_offs;
  const void* da;  // backward only: [rows, width]
  // out
  void* a;        // forward only: [rows, width]
  void* dh;       // backward only: like h
  float* dscale;  // backward only: [rows], or null when row_scale is; the sum over a row in an order fixed by width
};

LaunchConfig activation_config(const ActivationArgs& args);
void activation_forward(const ActivationArgs& args, cudaStream_t stream);
void activation_backward(const ActivationArgs& args, cudaStream_t stream);

// ---- gate.cu: scores, top-k and weights of the router (moe_overlap/ops/gate.py) ----

enum class Score { kSoftmax, kTopkSoftmax, kSigmoid };

constexpr int kMostGateExperts = 1024;
constexpr int kMostGateK = 16;

// What the blocks of one gate_topk agree on. It may hold anything before, and is of no use to anyone after.
struct GateWorkspace {
  uint64_t claim;  // the nonce, once a block has undertaken to set the counts to zero
  uint64_t ready;  // the nonce, once they are
  int32_t left;    // blocks that are done with this workspace
};

struct GateArgs {
  // in
  const float* logits;  // [tokens, experts]
  const float* bias;    // [experts], or null
  int64_t tokens;
  int experts;     // 1 to kMostGateExperts
  int k;           // 1 to kMostGateK, at most topk_group * experts / n_group
  int n_group;     // a divisor of experts
  int topk_group;  // 1 to n_group
  Score score;
  bool renormalize;
  float scale;
  uint64_t nonce;  // not 0, and of no other call: by it the blocks tell their workspace from what the memory held
  GateWorkspace* workspace;
  // out
  float* weights;   // [tokens, k]
  int32_t* ids;     // [tokens, k]
  int32_t* counts;  // [experts]
  int32_t* status;  // [1], bit 0: a row was not usable
};

struct GateBackwardArgs {
  // in
  const float* dweights;  // [tokens, k]
  const float* logits;    // [tokens, experts]
  const int32_t* ids;     // [tokens, k]
  int64_t tokens;
  int experts;
  int k;
  Score score;
  bool renormalize;
  float scale;
  // out
  float* dlogits;  // [tokens, experts]
};

LaunchConfig gate_config(const GateArgs& args);
LaunchConfig gate_config(const GateBackwardArgs& args);
void gate_topk(const GateArgs& args, cudaStream_t stream);
void gate_topk_backward(const GateBackwardArgs& args, cudaStream_t stream);

// ---- row_map.cu: the counting sort of csrc/core/row_map.h, with the same arguments and the same integers ----

constexpr int64_t kMostRowMapExperts = 3000;  // last - first

struct RowMapPlan {
  LaunchConfig count;  // grid 0 where one block holds all slots
  LaunchConfig place;
  int64_t slots_per_block = 0;
  int64_t workspace_bytes = 0;  // int32 [blocks, experts], from an address that is a multiple of 16
};

RowMapPlan row_map_plan(int64_t slots, int64_t experts);
void row_map(const RowMapArgs& args, void* workspace, cudaStream_t stream);

// ---- permute.cu: out[slot_to_row[t, k]] = x[t], zero in every other row ----

struct PermuteArgs {
  // in
  const void* x;               // [tokens, width]
  const int32_t* slot_to_row;  // [tokens, k], an entry outside [0, num_rows) is no row
  int64_t tokens;
  int64_t k;
  int64_t width;
  int64_t num_rows;
  int element_bytes;  // 2, 4 or 8
  // out
  void* out;  // [num_rows, width]
};

RowTiling permute_tiling(const PermuteArgs& args);
void permute(const PermuteArgs& args, cudaStream_t stream);

// ---- combine.cu: out[t] = sum over k of weights[t, k] * y[slot_to_row[t, k]] + residual[t], and its gradients ----

struct CombineArgs {
  // in
  const void* y;               // [num_rows, width]
  const int32_t* slot_to_row;  // [tokens, k], an entry outside [0, num_rows) is no row
  const float* weights;        // [tokens, k], or null: every weight is 1
  const void* residual;        // [tokens, width], or null
  int64_t tokens;
  int64_t k;
  int64_t width;
  int64_t num_rows;
  DType dtype;           // of y and out
  DType residual_dtype;  // of the residual
  // out
  void* out;  // [tokens, width]
};

struct CombineBackwardArgs {
  // in
  const void* dy;              // [tokens, width]
  const void* y;               // [num_rows, width], or null: no gradient of the weights
  const int32_t* slot_to_row;  // [tokens, k], an entry outside [0, num_rows) is no row
  const float* weights;        // [tokens, k], or null: every weight is 1
  int64_t tokens;
  int64_t k;
  int64_t width;
  int64_t num_rows;
  DType dtype;  // of dy, y and dy_rows
  // out
  void* dy_rows;    // [num_rows, width], zero in rows without a slot
  float* dweights;  // [tokens, k]; null unless there are weights and y
};

RowTiling combine_tiling(const CombineArgs& args);
RowTiling combine_tiling(const CombineBackwardArgs& args);
void combine(const CombineArgs& args, cudaStream_t stream);
void combine_backward(const CombineBackwardArgs& args, cudaStream_t stream);

}  // namespace moe_overlap
