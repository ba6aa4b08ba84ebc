// CUDA's language and runtime on the host, as much of it as csrc/stable/cuda/*_kernel.cu needs: those
// files compile with a C++ compiler against this header (build.py rewrites what is not C++ in them).
// Kernels run on scheduler.cpp.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;

using std::max;
using std::min;

namespace cuda_host {

enum class Order {
  forward,      // one block after the other
  reverse,      // the last block first
  shuffled,     // one after the other, in random order
  interleaved,  // several at a time, threads of all of them taking turns at random
};

struct Schedule {
  Order order = Order::forward;
  uint64_t seed = 0;  // also orders the threads of a block
  int resident = 4;   // blocks at a time, where they interleave
};

// How the next launches run.
extern Schedule schedule;

// Which fault the kernels have; 0: none. See build.py.
extern int fault;

// What went wrong in the last launch; empty if nothing.
const char* problem();

// Each is a point at which another thread may be run.
void barrier();                                             // all threads of a block
void fence();                                               // orders memory, other blocks' too
void atomic(const void* address);                          // before an atomic operation
void exchange(void* value, int bytes, unsigned lane);       // of a warp: takes the value of `lane`
void* shared_memory(int id, uint64_t bytes, uint64_t align);  // the block's, filled with garbage

dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();

void run(dim3 grid, dim3 block, uint64_t shared_bytes, const std::function<void()>& thread);

// kernel<<<grid, block, shared_bytes, stream>>>(args...) is rewritten to this.
template <typename Kernel, typename... Args>
void launch(const Kernel& kernel, dim3 grid, dim3 block, uint64_t shared_bytes, cudaStream_t, Args... args) {
  run(grid, block, shared_bytes, [&] { kernel(args...); });
}

// __shared__ T name; is rewritten to `auto& name = cuda_host::shared<T>(__COUNTER__);`
template <typename T>
T& shared(int id) {
  return *static_cast<T*>(shared_memory(id, sizeof(T), alignof(T)));
}

}  // namespace cuda_host

#define threadIdx (::cuda_host::thread_index())
#define blockIdx (::cuda_host::block_index())
#define blockDim (::cuda_host::block_size())
#define gridDim (::cuda_host::grid_size())

cudaError_t cudaGetLastError();

using std::fmaf;
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline float __saturatef(float x) { return x > 0.0f ? std::min(x, 1.0f) : 0.0f; }  // NaN: 0

inline void __syncthreads() { cuda_host::barrier(); }
inline void __threadfence() { cuda_host::fence(); }

template <typename T>
T __shfl_sync(unsigned, T value, unsigned lane) {
  cuda_host::exchange(&value, sizeof(T), lane % 32);
  return value;
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned offset) {
  const unsigned lane = threadIdx.x % 32;
  return __shfl_sync(mask, value, lane >= offset ? lane - offset : lane);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset) {
  const unsigned lane = threadIdx.x % 32;
  return __shfl_sync(mask, value, lane + offset < 32 ? lane + offset : lane);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned bits) {
  return __shfl_sync(mask, value, threadIdx.x % 32 ^ bits);
}

inline unsigned __ballot_sync(unsigned mask, bool flag) {
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) bits |= unsigned(__shfl_sync(mask, flag, lane)) << lane;
  return bits;
}

// Atomic operations order no other memory.
template <typename T>
T atomicAdd(T* address, T value) {
  cuda_host::atomic(address);
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

inline unsigned atomicInc(unsigned* address, unsigned last) {
  cuda_host::atomic(address);
  unsigned old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, old >= last ? 0 : old + 1, false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  return old;
}
