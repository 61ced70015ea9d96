// Kinetic energy of a list of momenta: ½ Σ M⁻¹ p², one read of p (and of M⁻¹), summed in fp64.
//
// Bound by the bandwidth of device memory: N · sizeof(Element) bytes, twice that with a mass for
// each element. Up to eight 16-byte loads of a thread are under way before the first is used.
// The sums of the chunks, those of leapfrog.cu too, are added by `sum`, one block.
//
// Macros: ELEMENT; MASS 1: M⁻¹ of each element, 0: of each tensor; THREADS.

#include "ragged.cuh"

constexpr int kLoads = 32 / V < 8 ? 32 / V : 8;  // of a thread at a time

// Σ M⁻¹ p² of a thread; 1 in place of M⁻¹ where it is one number.
template <bool kWhole>
__device__ __forceinline__ double squares(const Element* p, const Element* w, int64 count,
                                          bool even) {
  double total = 0.0;
#pragma unroll 1
  for (int64 first = threadIdx.x * V; first < count; first += kLoads * V * THREADS) {
    uint4 raw_p[kLoads], raw_w[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int64 at = first + u * V * THREADS;
      raw_p[u] = fetch<kWhole>(p + at, count - at, even);
      if (MASS) raw_w[u] = fetch<kWhole>(w + at, count - at, even);
    }
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      C x[V], y[V];
      widen(raw_p[u], x);
      if (MASS) widen(raw_w[u], y);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const double p64 = x[e];
        total = fma(MASS ? y[e] * p64 : p64, p64, total);
      }
    }
  }
  return total;
}

// partials[b] = ½ Σ M⁻¹ p² over chunk b. table [items] each: addresses of p, of M⁻¹ (or its fp64
// bits), counts; then [items + 1] first chunks.
extern "C" __global__ void __launch_bounds__(THREADS)
    kinetic_energy(const int64* table, int64 items, double* partials) {
  const Chunk chunk = find_chunk(table + 2 * items, items);
  const int64 address = table[chunk.item], mass = table[items + chunk.item];
  const bool even = (address | (MASS ? mass : 0)) % 16 == 0;
  const Element* p = reinterpret_cast<const Element*>(address) + chunk.first;
  const Element* w = reinterpret_cast<const Element*>(MASS ? mass : 0) + chunk.first;
  const double total =
      block_sum(even && chunk.count == kChunk ? squares<true>(p, w, kChunk, true)
                                              : squares<false>(p, w, chunk.count, even));
  const double scale = MASS ? 0.5 : 0.5 * __longlong_as_double(mass);
  if (threadIdx.x == 0) partials[blockIdx.x] = scale * total;
}

// out[0] = Σ x [count]; one block. Eight numbers of each thread are under way at a time.
extern "C" __global__ void __launch_bounds__(THREADS)
    sum(const double* x, int64 count, double* out) {
  double total[8] = {};
  for (int64 first = 0; first < count; first += 8 * THREADS) {
#pragma unroll
    for (int u = 0; u < 8; ++u) {
      const int64 at = first + u * THREADS + threadIdx.x;
      if (at < count) total[u] += x[at];
    }
  }
#pragma unroll
  for (int o = 4; o > 0; o /= 2)
#pragma unroll
    for (int u = 0; u < o; ++u) total[u] += total[u + o];
  const double all = block_sum(total[0]);
  if (threadIdx.x == 0) out[0] = all;
}
