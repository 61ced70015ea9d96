// One pass over W for k > 1: y = W x and z = Wᵀ y of k vectors at once, four of which share a read
// of W. On chip these are reads of shared memory; else a panel of rows is read 2·⌈k/4⌉ times, all
// but the first from L1 or L2.
#pragma once

#include "power_iteration_pass.cuh"

constexpr int kRows = 4;  // of W to a group of lanes at a time

// A chunk of a row of the block, scaled.
template <Place kPlace>
__device__ __forceinline__ void load_scaled(const Work& p, int64 row, int chunk, C scale,
                                            C (&w)[V]) {
  load_chunk<kPlace>(kPlace == kShared ? p.ring(row) : p.w + row * p.item.n, chunk, p.item.n, w);
  if (scale != C(1)) {
#pragma unroll
    for (int e = 0; e < V; ++e) w[e] *= scale;
  }
}

// y [N, m] = W x for the rows [begin, end) of the block; of the N rows of x and y `count` exist.
// With kMeasure, the sums of |W| over a row: x and y are not used.
template <int N, Place kPlace, bool kMeasure>
__device__ __forceinline__ void multiply_rows(const Work& p, int64 begin, int64 end, int count,
                                              const C* x, C* y, Measures& measures) {
  const int lanes = p.positions < 32 ? p.positions : 32, place = threadIdx.x & (lanes - 1),
            groups = THREADS / lanes;
  const C scale = p.down * p.up;
#pragma unroll 1
  for (int64 panel = begin; panel < end; panel += groups * kRows) {
    const int64 first = panel + threadIdx.x / lanes * kRows;
    // Rows that are not there are read in the place of another, and count for nothing.
    const int here = first >= end ? 0 : end - first < kRows ? static_cast<int>(end - first) : kRows;
    const int64 base = here > 0 ? first : begin;
    C sum[N][kRows] = {};
#pragma unroll 1
    for (int c = place; c < p.chunks; c += lanes) {
      C x_c[N][V];
      if (!kMeasure) {
#pragma unroll
        for (int v = 0; v < N; ++v)
          load(x + (v < count ? v : 0) * p.np + static_cast<int64>(c) * V, x_c[v]);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        C w[V];
        load_scaled<kPlace>(p, base + (r < here ? r : 0), c, scale, w);
#pragma unroll
        for (int e = 0; e < V; ++e) {
          if (kMeasure) {
            const C size = magnitude(w[e]);
            sum[0][r] += size;
            measures.largest = larger(measures.largest, size);
            measures.squares += r < here ? size * size : C(0);
          } else {
#pragma unroll
            for (int v = 0; v < N; ++v) sum[v][r] += w[e] * x_c[v][e];
          }
        }
      }
    }
#pragma unroll 1
    for (int o = lanes / 2; o > 0; o /= 2)
#pragma unroll
      for (int v = 0; v < N; ++v)
#pragma unroll
        for (int r = 0; r < kRows; ++r) sum[v][r] += __shfl_xor_sync(kAll, sum[v][r], o);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (kMeasure) {
        measures.row = larger(measures.row, sum[0][r]);
        measures.nan |= sum[0][r] != sum[0][r];
      } else {
#pragma unroll
        for (int v = 0; v < N; ++v)
          if (r < here && v < count && place == (v * kRows + r) % lanes)
            y[v * p.item.m + first + r] = sum[v][r];
      }
    }
  }
}

// z [N, groups, np] += Wᵀ y over the rows [begin, end) of the block; kMeasure: |W| and 1.
template <int N, Place kPlace, bool kMeasure>
__device__ __forceinline__ void multiply_columns(const Work& p, int64 begin, int64 end, int count,
                                                 const C* y, C* z) {
  const int place = threadIdx.x & (p.positions - 1), group = threadIdx.x / p.positions;
  const C scale = p.down * p.up;
#pragma unroll 1
  for (int c = place; c < p.chunks; c += p.positions) {
    C sum[N][V] = {};
#pragma unroll 2
    for (int64 row = begin + group; row < end; row += p.groups) {
      C w[V];
      load_scaled<kPlace>(p, row, c, scale, w);
#pragma unroll
      for (int v = 0; v < N; ++v) {
        const C y_r = kMeasure ? C(1) : y[(v < count ? v : 0) * p.item.m + row];
#pragma unroll
        for (int e = 0; e < V; ++e) sum[v][e] += y_r * (kMeasure ? magnitude(w[e]) : w[e]);
      }
    }
#pragma unroll
    for (int v = 0; v < N; ++v)
      if (v < count) {
        C* out = z + (v * p.groups + group) * p.np + static_cast<int64>(c) * V;
        C before[V];
        load(out, before);
#pragma unroll
        for (int e = 0; e < V; ++e) sum[v][e] += before[e];
        store(out, sum[v]);
      }
  }
}

template <Place kPlace, bool kMeasure>
__device__ __forceinline__ void multiply_panel(const Work& p, int64 begin, int64 end, int k,
                                               const C* x, C* y, Measures& measures) {
  if (kMeasure) {
    multiply_rows<1, kPlace, true>(p, begin, end, 1, nullptr, nullptr, measures);
    multiply_columns<1, kPlace, true>(p, begin, end, 1, nullptr, p.z);
    return;
  }
  // Four vectors share a read of W.
#pragma unroll 1
  for (int c = 0; c < k; c += 4) {
    if (k - c > 2)
      multiply_rows<4, kPlace, false>(p, begin, end, k - c, x + c * p.np, y + c * p.item.m,
                                      measures);
    else
      multiply_rows<2, kPlace, false>(p, begin, end, k - c, x + c * p.np, y + c * p.item.m,
                                      measures);
  }
  __syncthreads();
#pragma unroll 1
  for (int c = 0; c < k; c += 4) {
    C* z = p.z + c * p.groups * p.np;
    if (k - c > 2)
      multiply_columns<4, kPlace, false>(p, begin, end, k - c, y + c * p.item.m, z);
    else
      multiply_columns<2, kPlace, false>(p, begin, end, k - c, y + c * p.item.m, z);
  }
}

// y [k, m] = W x and the block's shares of z = Wᵀ y: share c is p.z + c · groups · np, readable
// after the next barrier.
template <bool kMeasure>
__device__ __forceinline__ void multiply_all(const Work& p, int k, const C* x, C* y,
                                             Measures& measures) {
#pragma unroll 1
  for (int64 j = threadIdx.x; j < k * p.groups * p.np; j += THREADS) p.z[j] = 0;
  __syncthreads();
  if (p.item.mode == kOnChip) {
    multiply_panel<kShared, kMeasure>(p, 0, p.rows, k, x, y, measures);
  } else {
    const int64 panel = THREADS / (p.positions < 32 ? p.positions : 32) * kRows;
#pragma unroll 1
    for (int64 begin = 0; begin < p.rows; begin += panel) {
      const int64 end = p.rows - begin < panel ? p.rows : begin + panel;
      if (p.even)
        multiply_panel<kGlobal, kMeasure>(p, begin, end, k, x, y, measures);
      else
        multiply_panel<kGlobalUneven, kMeasure>(p, begin, end, k, x, y, measures);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int c = 0; c < k; ++c) {
    C* z = p.z + c * p.groups * p.np;
#pragma unroll 1
    for (int64 j = threadIdx.x; j < p.np; j += THREADS) {
      C sum = z[j];
      for (int g = 1; g < p.groups; ++g) sum += z[g * p.np + j];
      z[j] = sum;
    }
  }
}
