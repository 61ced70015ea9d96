// A list of tensors as one launch. A table in device memory (`gti_kernels/tables.py`) has a row of
// addresses for each operand, a row of element counts and the running number of chunks; a block
// finds its tensor in the last row. Nothing of a list travels as kernel arguments, so that it may
// have any length. Every sum has a fixed order and nothing is added atomically: same input, same
// bits.
//
// Macros, beside ELEMENT: THREADS of a block, whose work is a chunk.
#pragma once

#include "elements.cuh"

constexpr int kWarps = THREADS / 32;
constexpr int64 kChunk = 32 * THREADS;  // elements

// The item i with starts[i] <= unit < starts[i + 1]; starts [items + 1] ascends. All threads look
// at once: one load each for every factor THREADS of the number of items.
__device__ __forceinline__ int64 find_item(const int64* starts, int64 items, int64 unit) {
  int64 low = 0, high = items;
  while (high - low > 1) {
    const int64 step = (high - low + THREADS - 1) / THREADS;
    const int64 probe = low + step * (threadIdx.x + 1);
    const int before = __syncthreads_count(probe < high && starts[probe] <= unit);
    low += step * before;
    high = low + step < high ? low + step : high;
  }
  return low;
}

// A block's chunk of its tensor: `count` elements from `first` on.
struct Chunk {
  int64 item, first, count;
};
__device__ __forceinline__ Chunk find_chunk(const int64* counts, int64 items) {
  const int64* starts = counts + items;
  const int64 item = find_item(starts, items, blockIdx.x);
  const int64 first = (blockIdx.x - starts[item]) * kChunk, left = counts[item] - first;
  return {item, first, left < kChunk ? left : kChunk};
}

// Σ x over the threads of a block, in thread 0. Takes 8 bytes of shared memory a warp.
__device__ __forceinline__ double block_sum(double x) {
  double* parts = reinterpret_cast<double*>(shared_memory());
#pragma unroll
  for (int o = 16; o > 0; o /= 2) x += __shfl_xor_sync(kAll, x, o);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  double total = parts[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) total += parts[w];
  return total;
}
