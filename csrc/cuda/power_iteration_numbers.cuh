// What the kernels of power_iteration need of the machine and of numbers: asynchronous copies,
// arrivals across blocks, vectors of 16 bytes, exponents, random starts.
#pragma once

#include "elements.cuh"

constexpr int kWarps = THREADS / 32;
constexpr double kEpsilon = sizeof(C) == 8 ? 0x1p-52 : 0x1p-23;
constexpr int kLargestExponent = sizeof(C) == 8 ? 1022 : 126;  // 2^± of it is a normal number of C
// Row sums of |W| in 2^± of it: no square or product of what is computed leaves the range of C.
constexpr int kSafeExponent = sizeof(C) == 8 && !SUBSPACE ? 200 : 20;

// ---- what differs between a GPU and the emulation ----------------------------------------------

#ifndef GTI_EMULATION
// Copies 16 bytes to shared memory, asynchronously; a group is what came since the last commit.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
// Adds one, after all that this thread wrote or saw, for every thread of the device.
__device__ __forceinline__ void arrive(unsigned* counter) {
  __threadfence();
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
// True once the counter has come to the target; what was written before is visible then.
__device__ __forceinline__ bool arrived(const unsigned* counter, unsigned target) {
  unsigned count;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
  return static_cast<int>(count - target) >= 0;
}
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ unsigned char* cluster_map(unsigned char* place, int rank) {
  unsigned char* other;
  asm("mapa.u64 %0, %1, %2;" : "=l"(other) : "l"(place), "r"(rank));
  return other;
}
#else  // there are no clusters, and no launch has any
__device__ __forceinline__ void cluster_sync() {}
__device__ __forceinline__ unsigned char* cluster_map(unsigned char* place, int) { return place; }
#endif
#endif

// ---- numbers -----------------------------------------------------------------------------------

// V consecutive numbers of C, 16 bytes at a time.
struct alignas(16) Quad {
  C x[16 / sizeof(C)];
};
__device__ __forceinline__ void load(const C* from, C (&x)[V]) {
  constexpr int N = 16 / sizeof(C);
#pragma unroll
  for (int i = 0; i < V; i += N) {
    const Quad quad = *reinterpret_cast<const Quad*>(from + i);
#pragma unroll
    for (int e = 0; e < N; ++e) x[i + e] = quad.x[e];
  }
}
__device__ __forceinline__ void store(C* to, const C (&x)[V]) {
  constexpr int N = 16 / sizeof(C);
#pragma unroll
  for (int i = 0; i < V; i += N) {
    Quad quad;
#pragma unroll
    for (int e = 0; e < N; ++e) quad.x[e] = x[i + e];
    *reinterpret_cast<Quad*>(to + i) = quad;
  }
}

template <class T>
__device__ __forceinline__ T larger(T a, T b) {
  return a > b ? a : b;
}
template <class T>
__device__ __forceinline__ T magnitude(T x) {
  return x < T(0) ? -x : x;  // of a NaN: a NaN
}
__device__ __forceinline__ bool is_finite(double x) { return x - x == 0.0; }

__device__ __forceinline__ int exponent(double x) {  // of x > 0: ⌊log₂ x⌋, −1023 for a denormal
  return static_cast<int>((__double_as_longlong(x) >> 52) & 0x7ff) - 1023;
}
__device__ __forceinline__ double power_of_two(int e) {
  return __longlong_as_double(static_cast<int64>(e + 1023) << 52);
}

// Element e of the random start vector of a matrix: uniform on (−1, 1), exact in fp32; the
// splitmix64 finaliser of seed, matrix number and e.
__device__ __forceinline__ float start_element(uint64 seed, uint64 matrix, uint64 e) {
  uint64 x =
      seed * 0x9E3779B97F4A7C15u + matrix * 0xD1342543DE82EF95u + (e + 1) * 0x94D049BB133111EBu;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  x = x ^ (x >> 31);
  return (static_cast<float>(x >> 40) * 2.0f + 1.0f) * 0x1p-24f - 1.0f;
}

// The unit eigenvector of the largest eigenvalue of a symmetric 3 x 3 matrix, by Jacobi rotations.
