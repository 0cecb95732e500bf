// How kernels are started: launch(kernel, config, stream, args...). Included by .cu files only. Under the harness the
// same call runs the kernel on fibers.
#pragma once

#include <stdexcept>
#include <string>

#include "kernels/device.cuh"
#include "kernels/kernels.h"

namespace moe_overlap {

constexpr int64_t kMaxGrid = 0x7fffffff;
constexpr int kMaxBlock = 1024;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned(const void* address, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) == 0;
}

inline void check_config(const LaunchConfig& config) {
  if (config.grid > kMaxGrid || config.block < kWarp || config.block > kMaxBlock || config.block % kWarp != 0) {
    throw std::invalid_argument("a launch that no GPU takes: " + config.text());
  }
}

template <typename... Parameters, typename... Args>
void launch(void (*kernel)(Parameters...), const LaunchConfig& config, cudaStream_t stream, const Args&... args) {
  if (config.grid == 0) return;
  check_config(config);
#ifdef __CUDACC__
  kernel<<<static_cast<unsigned>(config.grid), static_cast<unsigned>(config.block),
           static_cast<size_t>(config.shared_bytes), stream>>>(static_cast<Parameters>(args)...);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    throw std::runtime_error("kernel launch refused (" + config.text() + "): " + cudaGetErrorString(error));
  }
#else
  (void)stream;
  simt::launch(config.grid, config.block, config.shared_bytes, [&] { kernel(static_cast<Parameters>(args)...); });
#endif
}

// Sets `bytes` bytes to zero, in the order of the stream.
inline void clear(void* address, int64_t bytes, cudaStream_t stream) {
  if (bytes == 0) return;
#ifdef __CUDACC__
  if (const cudaError_t error = cudaMemsetAsync(address, 0, static_cast<size_t>(bytes), stream); error != cudaSuccess) {
    throw std::runtime_error(std::string("cudaMemsetAsync refused: ") + cudaGetErrorString(error));
  }
#else
  (void)stream;
  std::memset(address, 0, static_cast<size_t>(bytes));
#endif
}

// Calls run(T{}) with the element type of `dtype`.
template <typename Run>
void with_dtype(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kBFloat16:
      return run(bf16{});
    case DType::kFloat16:
      return run(fp16{});
  }
  throw std::invalid_argument("unknown dtype");
}

}  // namespace moe_overlap
