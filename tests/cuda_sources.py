"""Small CUDA C++ kernels to test the road with."""

AXPY = """
extern "C" __global__ void axpy(REAL a, const REAL* x, REAL* y, long long n) {
  const long long i = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
  if (i < n) y[i] += a * x[i];
}

extern "C" __global__ void stack(const int* at, REAL* x, int n) {
  REAL local[64];  // indexed at run time, so it cannot stay in registers
  for (int i = 0; i < n; ++i) local[at[i] & 63] = x[i];
  for (int i = 0; i < n; ++i) x[i] = local[at[n + i] & 63];
}

extern "C" __global__ void __launch_bounds__(1024) spill(REAL* x, int n) {
  REAL a[96];  // all are needed to the end, and of 1024 threads each has at most 64 registers
#pragma unroll
  for (int i = 0; i < 96; ++i) a[i] = x[i * 1024 + threadIdx.x];
  for (int k = 0; k < n; ++k) {
#pragma unroll
    for (int i = 0; i < 96; ++i) a[i] = a[i] * a[(i + 37) % 96] + 1;
  }
#pragma unroll
  for (int i = 0; i < 96; ++i) x[i * 1024 + threadIdx.x] = a[i];
}

// x reversed, through dynamic shared memory; one block.
extern "C" __global__ void reverse(REAL* x, int n) {
  extern __shared__ REAL copy[];
  for (int i = threadIdx.x; i < n; i += blockDim.x) copy[i] = x[i];
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) x[i] = copy[n - 1 - i];
}

// Every block waits for all: ends only if all run at once. seen[b] = number of blocks.
extern "C" __global__ void everyone(unsigned* count, int* seen) {
  if (threadIdx.x == 0) {
    atomicAdd(count, 1u);
    while (atomicAdd(count, 0u) < gridDim.x) {
    }
    seen[blockIdx.x] = static_cast<int>(atomicAdd(count, 0u));
  }
}

#if __CUDA_ARCH__ >= 900
// size[b] = number of blocks in the cluster of block b.
extern "C" __global__ void cluster(int* size) {
  unsigned blocks;
  asm volatile("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));
  asm volatile("barrier.cluster.arrive;\\nbarrier.cluster.wait;" ::: "memory");
  if (threadIdx.x == 0) size[blockIdx.x] = static_cast<int>(blocks);
}
#endif
"""
