// As much of the CUDA runtime as csrc/cuda/endpoint.cc calls, on the CPU. A kernel runs in the call
// that launches it, so every stream is in order and there is nothing to wait for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

inline const char* cudaGetErrorString(cudaError_t) { return "simt"; }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned a = 1) : x(a) {}
};

enum { cudaLaunchAttributeProgrammaticStreamSerialization, cudaMemcpyHostToDevice };
enum { cudaMemcpyDeviceToHost, cudaDevAttrMultiProcessorCount, cudaStreamNonBlocking };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };

struct cudaLaunchAttribute {
  int id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
struct cudaFuncAttributes {};

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** args);

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return 0; }
inline cudaError_t cudaFuncSetAttribute(const void*, int, int) { return 0; }
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return 0;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, int) {
  std::memcpy(to, from, bytes);
  return 0;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return 0;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return 0; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, int) {
  *stream = nullptr;
  return 0;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return 0; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  const char* wanted = std::getenv("MOE_SIMT_MULTIPROCESSORS");
  *value = wanted == nullptr ? 4 : std::atoi(wanted);  // as many blocks a grid has at most
  return 0;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaSetDevice(int) { return 0; }
