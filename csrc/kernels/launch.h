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

#ifdef __CUDACC__
inline void check_cuda(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // taken out: the next launch is not to report it
  throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

// Whether the current device lets a launch start before the one ahead of it in the stream has ended.
inline bool starts_early() {
  int device = 0, major = 0;
  check_cuda(cudaGetDevice(&device), "no current device");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "no compute capability");
  return major >= 9;
}
#endif

template <typename... Parameters, typename... Args>
void launch(void (*kernel)(Parameters...), const LaunchConfig& config, cudaStream_t stream, const Args&... args) {
  if (config.grid == 0) return;
  check_config(config);
#ifdef __CUDACC__
  kernel<<<static_cast<unsigned>(config.grid), static_cast<unsigned>(config.block),
           static_cast<size_t>(config.shared_bytes), stream>>>(static_cast<Parameters>(args)...);
  check_cuda(cudaGetLastError(), "kernel launch refused (" + config.text() + ")");
#else
  (void)stream;
  simt::launch(config.grid, config.block, config.shared_bytes, [&] { kernel(static_cast<Parameters>(args)...); });
#endif
}

// The same for a kernel that calls wait_for_launch_before (device.cuh), and right after the launch of one that calls
// let_next_launch_start: what it does before its wait, and starting it, then takes no time of its own. A graph that
// captures the two keeps this.
template <typename... Parameters, typename... Args>
void launch_early(void (*kernel)(Parameters...), const LaunchConfig& config, cudaStream_t stream, const Args&... args) {
#ifdef __CUDACC__
  if (config.grid != 0 && starts_early()) {
    check_config(config);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t asked{};
    asked.gridDim = dim3(static_cast<unsigned>(config.grid));
    asked.blockDim = dim3(static_cast<unsigned>(config.block));
    asked.dynamicSmemBytes = static_cast<size_t>(config.shared_bytes);
    asked.stream = stream;
    asked.attrs = &attribute;
    asked.numAttrs = 1;
    check_cuda(cudaLaunchKernelEx(&asked, kernel, static_cast<Parameters>(args)...),
               "kernel launch refused (" + config.text() + ")");
    return;
  }
#endif
  launch(kernel, config, stream, args...);
}

// Sets `bytes` bytes to zero, in the order of the stream.
inline void clear(void* address, int64_t bytes, cudaStream_t stream) {
  if (bytes == 0) return;
#ifdef __CUDACC__
  check_cuda(cudaMemsetAsync(address, 0, static_cast<size_t>(bytes), stream), "cudaMemsetAsync refused");
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
