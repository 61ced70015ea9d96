// Kick, drift, or both in one pass, over a list of tensors: p ← damp·p − kick·∇L, then
// q ← q + drift·M⁻¹p with the p that was stored, and of that p the kinetic energy ½ Σ M⁻¹p².
//
// Bound by the bandwidth of device memory: 3 · N · sizeof(Element) bytes for a kick or a drift, 5
// for both, one more with a mass for each element. 16 elements of every operand (fp64: 8) are under
// way in 16-byte loads before the first is used. Arithmetic is fp32 up to fp32 and fp64 for fp64;
// each element is rounded to its dtype once. Energies are summed in fp64: of a chunk here, of all
// chunks by `sum` in kinetic_energy.cu.
//
// Macros: ELEMENT; KICK, DRIFT: 1 where the step is taken; MASS 1: M⁻¹ of each element, 0: of each
// tensor; THREADS.

#include "ragged.cuh"

constexpr int kLoads = V == 8 ? 2 : 4;  // of a thread and an operand at a time

// a·b + c, rounded once.
__device__ __forceinline__ C fused(C a, C b, C c) {
#if ELEMENT == 0
  return fma(a, b, c);
#else
  return fmaf(a, b, c);
#endif
}

struct Factors {
  C kick, drift, damp;  // `drift` holds the mass too, where it is one number
};

// One chunk of `count` elements; returns Σ M⁻¹p² of a thread, 1 in place of M⁻¹ where it is one
// number. The compiler drops what a step does not use.
template <bool kWhole>
__device__ __forceinline__ double advance(Element* p, Element* q, const Element* g,
                                          const Element* w, int64 count, bool even,
                                          const Factors& by) {
  double squares = 0.0;
#pragma unroll 1
  for (int64 first = threadIdx.x * V; first < count; first += kLoads * V * THREADS) {
    uint4 raw_p[kLoads], raw_q[kLoads], raw_g[kLoads], raw_w[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int64 at = first + u * V * THREADS, left = count - at;
      raw_p[u] = fetch<kWhole>(p + at, left, even);
      if (KICK) raw_g[u] = fetch<kWhole>(g + at, left, even);
      if (DRIFT) raw_q[u] = fetch<kWhole>(q + at, left, even);
      if (MASS) raw_w[u] = fetch<kWhole>(w + at, left, even);
    }
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int64 at = first + u * V * THREADS, left = count - at;
      C x[V], slope[V], position[V], inverse[V];
      Element stored[V];
      widen(raw_p[u], x);
      if (KICK) {
        widen(raw_g[u], slope);
#pragma unroll
        for (int e = 0; e < V; ++e) {
          stored[e] = narrow(fused(by.damp, x[e], -(by.kick * slope[e])));
          x[e] = widen(stored[e]);
        }
        put<kWhole>(p + at, left, even, stored);
      }
      if (DRIFT) {
        widen(raw_q[u], position);
        if (MASS) widen(raw_w[u], inverse);
#pragma unroll
        for (int e = 0; e < V; ++e) {
          stored[e] = narrow(fused(by.drift, MASS ? inverse[e] * x[e] : x[e], position[e]));
          const double p64 = x[e];
          squares = fma(MASS ? inverse[e] * p64 : p64, p64, squares);
        }
        put<kWhole>(q + at, left, even, stored);
      }
    }
  }
  return squares;
}

// table [items] each: addresses of p, q, ∇L, M⁻¹ (or its fp64 bits), counts; then [items + 1] first
// chunks. A row of what takes no part is not read. A factor is a number or, where it was computed
// on the device, at an address. partials [chunks]: energies, written where both steps are taken.
extern "C" __global__ void __launch_bounds__(THREADS)
    leapfrog(const int64* table, int64 items, double kick, const double* kick_at, double drift,
             const double* drift_at, double damp, const double* damp_at, double* partials) {
  const Chunk chunk = find_chunk(table + 4 * items, items);
  const int64* row = table + chunk.item;
  const int64 p_address = row[0], q_address = DRIFT ? row[items] : 0;
  const int64 g_address = KICK ? row[2 * items] : 0, mass = DRIFT ? row[3 * items] : 0;
  const bool even = (p_address | q_address | g_address | (MASS ? mass : 0)) % 16 == 0;
  Element* p = reinterpret_cast<Element*>(p_address) + chunk.first;
  Element* q = reinterpret_cast<Element*>(q_address) + chunk.first;
  const Element* g = reinterpret_cast<const Element*>(g_address) + chunk.first;
  const Element* w = reinterpret_cast<const Element*>(MASS ? mass : 0) + chunk.first;
  const double scalar = MASS ? 1.0 : __longlong_as_double(mass);
  const Factors by = {static_cast<C>(kick_at ? *kick_at : kick),
                      static_cast<C>((drift_at ? *drift_at : drift) * scalar),
                      static_cast<C>(damp_at ? *damp_at : damp)};
  const double squares = even && chunk.count == kChunk
                             ? advance<true>(p, q, g, w, kChunk, true, by)
                             : advance<false>(p, q, g, w, chunk.count, even, by);
  if (KICK && DRIFT) {
    const double energy = 0.5 * scalar * block_sum(squares);
    if (threadIdx.x == 0) partials[blockIdx.x] = energy;
  }
}
