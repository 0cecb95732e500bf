// The CUDA operators as seen from the host: raw pointers and sizes in an Args struct, a stream, nothing of torch and no
// CUDA header, so that any C++ compiler reads this file. What each operator means stands with its reference in
// moe_overlap/ops/<op>.py; sizes and strides count elements. A function enqueues work on the stream and returns; it
// throws std::invalid_argument for arguments it does not take and std::runtime_error when CUDA refuses the launch.
#pragma once

#include <cstdint>
#include <string>

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

// ---- pack.cu: out[i] = rows[order[i]] and out[order[i]] = rows[i] ----

struct PackArgs {
  // in
  const void* rows;     // pack: [num_rows, width]; unpack: [num_order, width]
  const void* order;    // [num_order] int64 or int32, entries in [0, num_rows)
  bool order_is_int64;  // else int32
  int64_t num_rows;
  int64_t num_order;
  int64_t width;
  int element_bytes;  // 2 or 4
  // out
  void* out;  // pack: [num_order, width]; unpack: [num_rows, width]
};

LaunchConfig pack_config(const PackArgs& args);
// An entry of `order` out of range is not followed: pack writes zeros there, unpack skips the row.
void pack(const PackArgs& args, cudaStream_t stream);
void unpack(const PackArgs& args, cudaStream_t stream);

}  // namespace moe_overlap
