// The Gram matrix of a short side, in fp64.
#pragma once

#include <algorithm>

#include "simd.h"

namespace gti {
namespace {

constexpr int64_t kShort = 64;          // rows or columns at most
constexpr int64_t kGramPanel = 512;     // of the long side
constexpr int64_t kGramSegment = 8192;  // of the long side, with a sum of its own

// g [sp, sp] += P Pᵀ in fp64 above the diagonal, P [sp, kGramPanel] the columns (tall: the rows)
// [at, at + count) of w; sp is s rounded up to 4.
template <class T>
GTI_INLINE void gram_panel_any(const T* w, int64_t n, bool tall, int64_t s, int64_t at,
                               int64_t count, double* panel, double* g) {
  constexpr int N = 8, R = 4;
  const int64_t sp = (s + R - 1) / R * R;
  std::fill(panel, panel + sp * kGramPanel, 0.0);
  for (int64_t c = 0; tall && c < count; ++c)
    for (int64_t i = 0; i < s; ++i) panel[i * kGramPanel + c] = load<1>(w + (at + c) * n + i)[0];
  for (int64_t i = 0; !tall && i < s; ++i) {
    const T* row = w + i * n + at;
    int64_t c = 0;
    for (; c + N <= count; c += N) store(panel + i * kGramPanel + c, widen<N>(load<N>(row + c)));
    for (; c < count; ++c) panel[i * kGramPanel + c] = load<1>(row + c)[0];
  }
  for (int64_t i = 0; i < sp; i += R)
    for (int64_t j = i; j < sp; j += R) {
      Vec<double, N> sum[2][2 * R] = {};
      for (int64_t c = 0; c < kGramPanel; c += N) {
        Vec<double, N> a[R], b[R];
        for (int r = 0; r < R; ++r) {
          a[r] = load<N>(panel + (i + r) * kGramPanel + c);
          b[r] = load<N>(panel + (j + r) * kGramPanel + c);
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
