// The pass over a panel of rows of W: y = W x and z += Wᵀ y in one sweep, the sizes of W with the
// first; and the packing of rows into the compute type.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "simd.h"

namespace gti {
namespace {

// Vectors of length n are padded to blocks of 64 bytes, a whole number of vectors at any level.
template <class C>
constexpr int kBlock = 64 / sizeof(C);

template <class C>
int64_t padded(int64_t n) {
  return (n + kBlock<C> - 1) / kBlock<C> * kBlock<C>;
}

// Rows of W at a time whose sums fit in the registers of a level, for one vector x.
template <int B, class C>
constexpr int kRows = std::min<int>(B == 64 ? 8 : 4, B / sizeof(C));

// Sizes of W, gathered during the first pass: the largest sum of |W| in a row, |W| by columns,
// ‖W‖²_F. Sums run in C: their relative error, rows or columns times epsilon, is part of the bound
// `upper`.
template <class C>
struct Sizes {
  C* column;  // [np], zero to begin with
  double row = 0.0, frobenius2 = 0.0;
  bool finite = true;

  template <int R>
  void add_rows(const C (&sums)[R], C squares) {
    for (C sum : sums) {
      finite &= std::isfinite(sum);
      row = std::max(row, static_cast<double>(sum));
    }
    frobenius2 += squares;
  }
};

// Vectors of the compute type for each vector of W.
template <class T>
constexpr int kVectors = std::is_same_v<T, bf16> ? 2 : 1;

// bf16 widens with a shift and a mask of its pairs: even columns, then odd ones. Where W is read in
// this way (in_pairs) every vector of length n keeps its elements in that order, 32 at a time.
template <class T>
bool in_pairs(int64_t n) {
  return std::is_same_v<T, bf16> && n % 32 == 0;
}
inline int64_t place_in_pairs(int64_t j) { return j / 32 * 32 + j % 2 * 16 + j / 2 % 16; }

// Where the vectors of length n have the q-th vector of what a block of W at j becomes.
template <class T, int N>
GTI_INLINE int64_t place_of(int64_t j, int q) {
  if constexpr (kVectors<T> == 1 || N == 16)
    return j + q * N;
  else  // a part of the 32
    return (j & ~int64_t{31}) + (j & 31) / 2 + q * 16;
}

template <int N, class T, class V>
GTI_INLINE void load_block(const T* w, V (&out)[kVectors<T>]) {
  if constexpr (std::is_same_v<T, bf16>) {
    const auto pairs = bits_as<Vec<uint32_t, N>>(load<N>(reinterpret_cast<const float*>(w)));
    out[0] = bits_as<V>(pairs << 16);
    out[1] = bits_as<V>(pairs & 0xffff0000u);
  } else {
    out[0] = load<N>(w);
  }
}

// How K vectors at once lie in memory: x and z [K, np], y [K, mp].
struct Strides {
  int64_t np, mp;
};

// Two sweeps over rows of np columns in one, so that reading ahead and computing overlap: y [K, R]
// = w x, and z [K, np] += beforeᵀ y_before for the rows before, whose y is known. With kMeasure,
// also adds the rows w to sizes.
template <int B, int K, int R, bool kDot, bool kUpdate, bool kMeasure, class T, class C>
GTI_INLINE void row_group(const T* w, const T* before, Strides at, const C* x, const C* y_before,
                          C* y, C* z, Sizes<C>* sizes) {
  constexpr int N = B / sizeof(C), Q = kVectors<T>;
  const int64_t np = at.np;
  Vec<C, N> sum[K][R] = {}, y_v[K][R] = {}, size[R] = {}, squares = {}, w_v[Q];
  for (int k = 0; kUpdate && k < K; ++k)
    for (int r = 0; r < R; ++r) y_v[k][r] += y_before[k * at.mp + r];
  for (int64_t j = 0; j < np; j += Q * N) {
    if constexpr (kDot) {
      Vec<C, N> x_v[K][Q], column[Q] = {};
      for (int k = 0; k < K; ++k)
        for (int q = 0; q < Q; ++q) x_v[k][q] = load<N>(x + k * np + place_of<T, N>(j, q));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        // The next group, into L2: measured a twentieth faster for pairs, slower for fp32.
        if (Q > 1) __builtin_prefetch(w + (R + r) * np + j, 0, 2);
        load_block<N>(w + r * np + j, w_v);
        for (int q = 0; q < Q; ++q) {
          for (int k = 0; k < K; ++k) sum[k][r] += w_v[q] * x_v[k][q];
          if constexpr (kMeasure) {
            const auto magnitude = abs<N>(w_v[q]);
            size[r] += magnitude;
            column[q] += magnitude;
            squares += w_v[q] * w_v[q];
          }
        }
      }
      for (int q = 0; kMeasure && q < Q; ++q) {
        C* column_at = sizes->column + place_of<T, N>(j, q);
        store(column_at, load<N>(column_at) + column[q]);
      }
    }
    if constexpr (kUpdate) {
      constexpr int kChains = K == 1 ? 2 : 1;
      Vec<C, N> z_v[K][Q][kChains] = {};
      for (int k = 0; k < K; ++k)
        for (int q = 0; q < Q; ++q) z_v[k][q][0] = load<N>(z + k * np + place_of<T, N>(j, q));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        load_block<N>(before + r * np + j, w_v);
        for (int k = 0; k < K; ++k)
          for (int q = 0; q < Q; ++q) z_v[k][q][r % kChains] += y_v[k][r] * w_v[q];
      }
      for (int k = 0; k < K; ++k)
        for (int q = 0; q < Q; ++q)
          store(z + k * np + place_of<T, N>(j, q),
                z_v[k][q][0] + (K == 1 ? z_v[k][q][kChains - 1] : Vec<C, N>{}));
    }
  }
  for (int k = 0; kDot && k < K; ++k) lane_sums<C, N>(sum[k], y + k * at.mp);
  if constexpr (kMeasure) {
    C sums[R];
    lane_sums<C, N>(size, sums);
    sizes->add_rows(sums, lane_sum<C, N>(squares));
  }
}

// Asks for one line in eight of n elements from `from` on at `ahead`; nullptr: of none.
template <class C>
GTI_INLINE void fetch_eighth(const C* ahead, int64_t from, int64_t n) {
  for (int64_t at = 0; ahead != nullptr && at < n; at += 8 * kBlock<C>)
    __builtin_prefetch(ahead + from + at, 0, 2);
}

// Rows in groups of R, each group's dot products together with the last group's update of z.
template <int B, int K, int R, bool kMeasure, class T, class C>
GTI_INLINE void rows_pass(const T* w, int64_t groups, Strides at, const C* x, C* y, C* z,
                          Sizes<C>* sizes, const C* ahead = nullptr) {
  if (groups == 0) return;
  row_group<B, K, R, true, false, kMeasure, T, C>(w, w, at, x, y, y, z, sizes);
  for (int64_t g = 1; g < groups; ++g, w += R * at.np, y += R) {
    fetch_eighth(ahead, g * R * at.np, R * at.np);
    row_group<B, K, R, true, true, kMeasure, T, C>(w + R * at.np, w, at, x, y, y + R, z, sizes);
  }
  row_group<B, K, R, false, true, false, T, C>(w, w, at, x, y, y, z, sizes);
}

// The same for rows of V vectors, few enough that x and z stay in registers. Also asks for one part
// in eight of the rows at `ahead`. Returns the number of rows done, whole groups.
template <int B, int V, bool kMeasure, class C>
GTI_INLINE int64_t narrow_pass(const C* w, int64_t rows, const C* x, C* y, C* z, Sizes<C>* sizes,
                               const C* ahead) {
  constexpr int N = B / sizeof(C), R = kRows<B, C>;
  constexpr int64_t kGroup = R * V * N;
  Vec<C, N> x_v[V], z_v[2][V] = {}, column[V] = {}, squares = {};
  for (int j = 0; j < V; ++j) {
    x_v[j] = load<N>(x + j * N);
    z_v[0][j] = load<N>(z + j * N);
  }
  const auto multiply = [&](const C* w, C* y) GTI_INLINE_LAMBDA {
    Vec<C, N> sum[R] = {}, size[R] = {};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        const auto w_v = load<N>(w + (r * V + j) * N);
        sum[r] += w_v * x_v[j];
        if constexpr (kMeasure) {
          const auto magnitude = abs<N>(w_v);
          size[r] += magnitude;
          column[j] += magnitude;
          squares += w_v * w_v;
        }
      }
    lane_sums<C, N>(sum, y);
    if constexpr (kMeasure) {
      C sums[R];
      lane_sums<C, N>(size, sums);
      sizes->add_rows(sums, C(0));
    }
  };
  const auto update = [&](const C* w, const C* y) GTI_INLINE_LAMBDA {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) z_v[r % 2][j] += y[r] * load<N>(w + (r * V + j) * N);
  };
  const int64_t groups = rows / R;
  for (int64_t g = 0; g < groups; ++g) {
    fetch_eighth(ahead, g * kGroup, kGroup);
    multiply(w + g * kGroup, y + g * R);
    if (g > 0) update(w + (g - 1) * kGroup, y + (g - 1) * R);
  }
  if (groups > 0) update(w + (groups - 1) * kGroup, y + (groups - 1) * R);
  for (int j = 0; j < V; ++j) store(z + j * N, z_v[0][j] + z_v[1][j]);
  if constexpr (kMeasure) {
    for (int j = 0; j < V; ++j)
      store(sizes->column + j * N, load<N>(sizes->column + j * N) + column[j]);
    sizes->frobenius2 += lane_sum<C, N>(squares);
  }
  return groups * R;
}

template <int B, int K, bool kMeasure, class T, class C>
GTI_INLINE void all_rows(const T* w, int64_t rows, Strides at, const C* x, C* y, C* z,
                         Sizes<C>* sizes, const C* ahead) {
  constexpr int R = std::max(1, kRows<B, C> / K);
  const int64_t grouped = rows / R * R;
  rows_pass<B, K, R, kMeasure>(w, rows / R, at, x, y, z, sizes, ahead);
  rows_pass<B, K, 1, kMeasure>(w + grouped * at.np, rows % R, at, x, y + grouped, z, sizes);
}

template <int B, bool kMeasure, class T, class C>
GTI_INLINE void one_vector_any(const T* w, int64_t rows, Strides at, const C* x, C* y, C* z,
                               Sizes<C>* sizes, const C* ahead) {
  int64_t done = 0;
  if constexpr (std::is_same_v<T, C>) {
    const int64_t vectors = at.np / (B / sizeof(C));
    if (vectors == 1) done = narrow_pass<B, 1, kMeasure>(w, rows, x, y, z, sizes, ahead);
    if (vectors == 2) done = narrow_pass<B, 2, kMeasure>(w, rows, x, y, z, sizes, ahead);
    if (vectors == 3) done = narrow_pass<B, 3, kMeasure>(w, rows, x, y, z, sizes, ahead);
    if (vectors == 4) done = narrow_pass<B, 4, kMeasure>(w, rows, x, y, z, sizes, ahead);
  }
  all_rows<B, 1, kMeasure>(w + done * at.np, rows - done, at, x, y + done, z, sizes,
                           done == 0 ? ahead : nullptr);
}

// Copies rows of n elements to rows of np, scaled, the rest of each row zero.
template <int B, class T, class C>
GTI_INLINE void pack_any(const T* w, int64_t rows, int64_t n, C scale, C* out) {
  constexpr int N = B / sizeof(C);
  const int64_t np = padded<C>(n), whole = n / N * N;
  for (int64_t r = 0; r < rows; ++r, w += n, out += np) {
    if (in_pairs<T>(n)) {
      Vec<C, N> w_v[kVectors<T>];
      for (int64_t j = 0; j < n; j += kVectors<T> * N) {
        load_block<N>(w + j, w_v);
        for (int q = 0; q < kVectors<T>; ++q) store(out + place_of<T, N>(j, q), scale * w_v[q]);
      }
      continue;
    }
    for (int64_t j = 0; j < whole; j += N) store(out + j, scale * load<N>(w + j));
    if (whole < np) {
      T tail[kBlock<C>] = {};
      std::memcpy(tail, w + whole, (n - whole) * sizeof(T));
      for (int64_t j = whole; j < np; j += N) store(out + j, scale * load<N>(tail + (j - whole)));
    }
  }
}

}  // namespace
}  // namespace gti
