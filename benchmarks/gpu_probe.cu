// What benchmarks/gpu_probe.py needs beside torch: kernels that hold multiprocessors, copy with few blocks, wait with a
// limit. Built there with nvcc into a shared library and called through ctypes; no part of the package.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

__device__ uint64_t now_ns() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
}

// Busy for `ns` nanoseconds, with all the threads a multiprocessor can hold when the grid is large enough.
__global__ void __launch_bounds__(1024) occupy_kernel(uint64_t ns) {
  const uint64_t begin = now_ns();
  while (now_ns() - begin < ns) {
  }
}

// 16-byte accesses, four in flight for each thread.
__global__ void __launch_bounds__(1024) put_kernel(const uint4* from, uint4* to, int64_t count) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; i + 3 * step < count; i += 4 * step) {
    const uint4 a = from[i], b = from[i + step], c = from[i + 2 * step], d = from[i + 3 * step];
    to[i] = a;
    to[i + step] = b;
    to[i + 2 * step] = c;
    to[i + 3 * step] = d;
  }
  for (; i < count; i += step) to[i] = from[i];
}

// Waits until *flag is `value`, at most `ns` nanoseconds: *result = 1 when it came, 2 when the time was over.
__global__ void wait_kernel(volatile uint32_t* flag, uint32_t value, uint64_t ns, uint32_t* result) {
  const uint64_t begin = now_ns();
  while (*flag != value) {
    if (now_ns() - begin > ns) {
      *result = 2;
      return;
    }
  }
  *result = 1;
}

}  // namespace

extern "C" {

int probe_occupy(int blocks, uint64_t ns, cudaStream_t stream) {
  occupy_kernel<<<blocks, 1024, 0, stream>>>(ns);
  return cudaGetLastError();
}
int probe_put(const void* from, void* to, int64_t bytes, int blocks, cudaStream_t stream) {
  put_kernel<<<blocks, 1024, 0, stream>>>(static_cast<const uint4*>(from), static_cast<uint4*>(to), bytes / 16);
  return cudaGetLastError();
}
int probe_wait(void* flag, uint32_t value, uint64_t ns, void* result, cudaStream_t stream) {
  wait_kernel<<<1, 1, 0, stream>>>(static_cast<volatile uint32_t*>(flag), value, ns, static_cast<uint32_t*>(result));
  return cudaGetLastError();
}
int probe_async_engines(int device) {
  int count = -1;
  return cudaDeviceGetAttribute(&count, cudaDevAttrAsyncEngineCount, device) == cudaSuccess ? count : -1;
}

}  // extern "C"
