// The Gram matrix of a short side: products in the compute type, summed in it over a panel, in fp64
// over panels.
#pragma once

#include <algorithm>

#include "simd.h"

namespace gti {
namespace {

constexpr int64_t kShort = 64;          // rows or columns at most
constexpr int64_t kGramPanel = 256;     // of the long side, in L2
constexpr int64_t kGramSegment = 8192;  // of the long side, with a sum of its own

// Rows and columns of the sums of a Gram matrix [s, s].
constexpr int64_t gram_stride(int64_t s) { return (s + 31) / 32 * 32; }
// Elements of a panel. Its rows do not lie a power of two apart, where they would share a cache
// line's place.
constexpr int64_t gram_panel_size(int64_t s) { return gram_stride(s) * (kGramPanel + 16); }

// g [sp, sp] += WᵀW, on and above the diagonal, over the rows [at, at + count) of w [m, s].
template <int B, class T, class C>
GTI_INLINE void gram_of_rows(const T* w, int64_t s, int64_t at, int64_t count, C* panel,
                             double* g) {
  constexpr int N = B / sizeof(C), R = B == 64 ? 8 : 4, Q = 2;
  const int64_t sp = gram_stride(s);
  for (int64_t c = 0; c < count; ++c) {
    const T* row = w + (at + c) * s;
    C* to = panel + c * sp;
    int64_t i = 0;
    for (; i + N <= s; i += N) {
      __builtin_prefetch(row + kGramPanel * s + i, 0, 2);  // the next panel
      store(to + i, load<N>(row + i));
    }
    for (; i < sp; ++i) to[i] = i < s ? load<1>(row + i)[0] : C(0);
  }
  for (int64_t i = 0; i < s; i += R)
    for (int64_t j = i / (Q * N) * (Q * N); j < s; j += Q * N) {
      Vec<C, N> sum[R][Q] = {};
      for (const C* x = panel; x != panel + count * sp; x += sp) {
        Vec<C, N> b[Q];
        for (int q = 0; q < Q; ++q) b[q] = load<N>(x + j + q * N);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
          for (int q = 0; q < Q; ++q) sum[r][q] += x[i + r] * b[q];
      }
      for (int r = 0; r < R; ++r) {
        C out[Q * N];
        for (int q = 0; q < Q; ++q) store(out + q * N, sum[r][q]);
        for (int l = 0; l < Q * N; ++l) g[(i + r) * sp + j + l] += out[l];
      }
    }
}

// The same of W Wᵀ over the columns [at, at + count) of w [s, n].
template <int B, class T, class C>
GTI_INLINE void gram_of_columns(const T* w, int64_t n, int64_t s, int64_t at, int64_t count,
                                C* panel, double* g) {
  constexpr int N = B / sizeof(C), R = 4, Q = B == 64 ? 4 : 2;  // a tile of R x Q sums
  constexpr int64_t kStride = kGramPanel + 16;
  const int64_t sp = gram_stride(s);
  std::fill(panel, panel + gram_panel_size(s), C(0));
  for (int64_t i = 0; i < s; ++i) {
    const T* row = w + i * n + at;
    int64_t c = 0;
    for (; c + N <= count; c += N) {
      __builtin_prefetch(row + kGramPanel + c, 0, 2);  // the next panel
      store(panel + i * kStride + c, load<N>(row + c));
    }
    for (; c < count; ++c) panel[i * kStride + c] = load<1>(row + c)[0];
  }
  constexpr int kSums = std::min(N, R * Q);  // at a time, for lane_sums
  for (int64_t i = 0; i < s; i += R)
    for (int64_t j = i; j < s; j += Q) {
      Vec<C, N> sum[R * Q / kSums][kSums] = {};
      for (int64_t c = 0; c < kGramPanel; c += N) {
        Vec<C, N> a[R], b[Q];
        for (int r = 0; r < R; ++r) a[r] = load<N>(panel + (i + r) * kStride + c);
        for (int q = 0; q < Q; ++q) b[q] = load<N>(panel + (j + q) * kStride + c);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int q = 0; q < Q; ++q) {
            const int e = r * Q + q;
            sum[e / kSums][e % kSums] += a[r] * b[q];
          }
      }
      C out[R * Q];
      for (int e = 0; e < R * Q; e += kSums) lane_sums<C, N>(sum[e / kSums], out + e);
      for (int e = 0; e < R * Q; ++e) g[(i + e / Q) * sp + j + e % Q] += out[e];
    }
}

// out[j] = Σ_i c_i w[i, j] over the m rows of w, for the columns [begin, end). A row at a time: the
// rows may lie a power of two apart.
template <int B, class T>
GTI_INLINE void combine_rows_any(const T* w, int64_t m, int64_t n, const double* c, int64_t stride,
                                 int64_t begin, int64_t end, double* out) {
  constexpr int N = B / 8;
  std::fill(out + begin, out + end, 0.0);
  for (int64_t i = 0; i < m; ++i) {
    const T* row = w + i * n;
    int64_t j = begin;
    for (; j + N <= end; j += N) {
      __builtin_prefetch(row + (end - begin) + j, 0, 2);  // the next columns
      store(out + j, load<N>(out + j) + c[i * stride] * widen<N>(load<N>(row + j)));
    }
    for (; j < end; ++j) out[j] += c[i * stride] * load<1>(row + j)[0];
  }
}

}  // namespace
}  // namespace gti
