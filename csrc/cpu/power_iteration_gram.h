// The Gram matrix of a short side, in fp64.
#pragma once

#include <algorithm>

#include "simd.h"

namespace gti {
namespace {

constexpr int64_t kShort = 64;          // rows or columns at most
constexpr int64_t kGramPanel = 128;     // of the long side, in L1 or L2 as fp64
constexpr int64_t kGramSegment = 8192;  // of the long side, with a sum of its own

// Rows and columns of the sums of a Gram matrix [s, s].
constexpr int64_t gram_stride(int64_t s) { return (s + 15) / 16 * 16; }
// Elements of a panel. Its rows do not lie a power of two apart, where they would share a cache
// line's place.
constexpr int64_t gram_panel_size(int64_t s) { return gram_stride(s) * (kGramPanel + 8); }

// g [sp, sp] += WᵀW in fp64, on and above the diagonal, over the rows [at, at + count) of w [m, s].
template <class T>
GTI_INLINE void gram_of_rows(const T* w, int64_t s, int64_t at, int64_t count, double* panel,
                             double* g) {
  constexpr int N = 8, R = 4, Q = 2;
  const int64_t sp = gram_stride(s);
  for (int64_t c = 0; c < count; ++c) {
    const T* row = w + (at + c) * s;
    double* to = panel + c * sp;
    int64_t i = 0;
    for (; i + N <= s; i += N) store(to + i, widen<N>(load<N>(row + i)));
    for (; i < sp; ++i) to[i] = i < s ? load<1>(row + i)[0] : 0.0;
  }
  for (int64_t i = 0; i < s; i += R)
    for (int64_t j = i / (Q * N) * (Q * N); j < sp; j += Q * N) {
      Vec<double, N> sum[R][Q];
      for (int r = 0; r < R; ++r)
        for (int q = 0; q < Q; ++q) sum[r][q] = load<N>(g + (i + r) * sp + j + q * N);
      for (const double* x = panel; x != panel + count * sp; x += sp) {
        Vec<double, N> b[Q];
        for (int q = 0; q < Q; ++q) b[q] = load<N>(x + j + q * N);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
          for (int q = 0; q < Q; ++q) sum[r][q] += x[i + r] * b[q];
      }
      for (int r = 0; r < R; ++r)
        for (int q = 0; q < Q; ++q) store(g + (i + r) * sp + j + q * N, sum[r][q]);
    }
}

// The same of W Wᵀ over the columns [at, at + count) of w [s, n].
template <class T>
GTI_INLINE void gram_of_columns(const T* w, int64_t n, int64_t s, int64_t at, int64_t count,
                                double* panel, double* g) {
  constexpr int N = 8, R = 4;
  constexpr int64_t kStride = kGramPanel + 8;
  const int64_t sp = gram_stride(s);
  std::fill(panel, panel + gram_panel_size(s), 0.0);
  for (int64_t i = 0; i < s; ++i) {
    const T* row = w + i * n + at;
    int64_t c = 0;
    for (; c + N <= count; c += N) store(panel + i * kStride + c, widen<N>(load<N>(row + c)));
    for (; c < count; ++c) panel[i * kStride + c] = load<1>(row + c)[0];
  }
  for (int64_t i = 0; i < s; i += R)
    for (int64_t j = i; j < s; j += R) {
      Vec<double, N> sum[2][2 * R] = {};
      for (int64_t c = 0; c < kGramPanel; c += N) {
        Vec<double, N> a[R], b[R];
        for (int r = 0; r < R; ++r) {
          a[r] = load<N>(panel + (i + r) * kStride + c);
          b[r] = load<N>(panel + (j + r) * kStride + c);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int q = 0; q < R; ++q) sum[r / 2][r % 2 * R + q] += a[r] * b[q];
      }
      double out[2][2 * R];
      for (int half = 0; half < 2; ++half) lane_sums<double, N>(sum[half], out[half]);
      for (int r = 0; r < R; ++r)
        for (int q = 0; q < R; ++q) g[(i + r) * sp + j + q] += out[r / 2][r % 2 * R + q];
    }
}

// out [n] = Σ_i c_i w_i of the m rows of w, columns [begin, end).
template <class T>
GTI_INLINE void combine_rows_any(const T* w, int64_t m, int64_t n, const double* c, int64_t stride,
                                 int64_t begin, int64_t end, double* out) {
  constexpr int N = 8;
  int64_t j = begin;
  for (; j + N <= end; j += N) {
    Vec<double, N> sum = {};
    for (int64_t i = 0; i < m; ++i) sum += c[i * stride] * widen<N>(load<N>(w + i * n + j));
    store(out + j, sum);
  }
  for (; j < end; ++j) {
    double sum = 0.0;
    for (int64_t i = 0; i < m; ++i) sum += c[i * stride] * load<1>(w + i * n + j)[0];
    out[j] = sum;
  }
}

}  // namespace
}  // namespace gti
