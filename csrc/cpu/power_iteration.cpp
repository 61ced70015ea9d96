// One pass over W yields z = Wᵀ(W x): a panel of rows stays in cache between y = W_r x and
// z += W_rᵀ y. Small matrices run one per thread, from a packed copy; large ones one after the
// other, their rows shared out among all threads.
#include "gti/power_iteration.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "simd.h"

namespace gti {
namespace {

constexpr int64_t kSmallBytes = 768 * 1024;  // of a packed matrix: it stays in a core's L2
constexpr int64_t kPanelBytes = 128 * 1024;  // of a packed panel of a large matrix
constexpr int64_t kBlockBytes = 256 * 1024;  // of a block of rows with a z of its own, at least
constexpr int64_t kMaxBlocks = 64;

template <class C>
constexpr int kLanes = 64 / sizeof(C);

template <class C>
int64_t padded(int64_t n) {
  return (n + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
}

// ---- the pass over a panel ---------------------------------------------------------------------

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

// One vector of the compute type for each of the vectors that 64 bytes of W become.
template <class T>
constexpr int kVectors = std::is_same_v<T, bf16> ? 2 : 1;

// bf16 widens with a shift and a mask of its pairs: even columns, then odd ones. Where W is read in
// this way (in_pairs) every vector of length n keeps its elements in that order.
template <class T>
bool in_pairs(int64_t n) {
  return std::is_same_v<T, bf16> && n % 32 == 0;
}
inline int64_t place_in_pairs(int64_t j) { return j / 32 * 32 + j % 2 * 16 + j / 2 % 16; }

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
template <int K, int R, bool kDot, bool kUpdate, bool kMeasure, class T, class C>
GTI_INLINE void row_group(const T* w, const T* before, Strides at, const C* x, const C* y_before,
                          C* y, C* z, Sizes<C>* sizes) {
  constexpr int N = kLanes<C>, Q = kVectors<T>;
  const int64_t np = at.np;
  Vec<C, N> sum[K][R] = {}, y_v[K][R] = {}, size[R] = {}, squares = {}, w_v[Q];
  for (int k = 0; kUpdate && k < K; ++k)
    for (int r = 0; r < R; ++r) y_v[k][r] += y_before[k * at.mp + r];
  for (int64_t j = 0; j < np; j += Q * N) {
    if constexpr (kDot) {
      Vec<C, N> x_v[K][Q], column[Q] = {};
      for (int k = 0; k < K; ++k)
        for (int q = 0; q < Q; ++q) x_v[k][q] = load<N>(x + k * np + j + q * N);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
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
        C* column_at = sizes->column + j + q * N;
        store(column_at, load<N>(column_at) + column[q]);
      }
    }
    if constexpr (kUpdate) {
      constexpr int kChains = K == 1 ? 2 : 1;
      Vec<C, N> z_v[K][Q][kChains] = {};
      for (int k = 0; k < K; ++k)
        for (int q = 0; q < Q; ++q) z_v[k][q][0] = load<N>(z + k * np + j + q * N);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        load_block<N>(before + r * np + j, w_v);
        for (int k = 0; k < K; ++k)
          for (int q = 0; q < Q; ++q) z_v[k][q][r % kChains] += y_v[k][r] * w_v[q];
      }
      for (int k = 0; k < K; ++k)
        for (int q = 0; q < Q; ++q)
          store(z + k * np + j + q * N,
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

// Rows in groups of R, each group's dot products together with the last group's update of z.
template <int K, int R, bool kMeasure, class T, class C>
GTI_INLINE void rows_pass(const T* w, int64_t groups, Strides at, const C* x, C* y, C* z,
                          Sizes<C>* sizes) {
  if (groups == 0) return;
  row_group<K, R, true, false, kMeasure, T, C>(w, w, at, x, y, y, z, sizes);
  for (int64_t g = 1; g < groups; ++g, w += R * at.np, y += R)
    row_group<K, R, true, true, kMeasure, T, C>(w + R * at.np, w, at, x, y, y + R, z, sizes);
  row_group<K, R, false, true, false, T, C>(w, w, at, x, y, y, z, sizes);
}

// The same for rows of V vectors, few enough that x and z stay in registers. Also asks for one part
// in eight of the rows at `ahead`. Returns the number of rows done, whole groups.
template <int V, bool kMeasure, class C>
GTI_INLINE int64_t narrow_pass(const C* w, int64_t rows, const C* x, C* y, C* z, Sizes<C>* sizes,
                               const C* ahead) {
  constexpr int N = kLanes<C>, R = 8;
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
    for (int line = 0; line < V; ++line) __builtin_prefetch(ahead + (g * V + line) * 8 * N, 0, 2);
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

template <int K, bool kMeasure, class T, class C>
GTI_INLINE void all_rows(const T* w, int64_t rows, Strides at, const C* x, C* y, C* z,
                         Sizes<C>* sizes) {
  constexpr int R = 8 / K;
  const int64_t grouped = rows / R * R;
  rows_pass<K, R, kMeasure>(w, rows / R, at, x, y, z, sizes);
  rows_pass<K, 1, kMeasure>(w + grouped * at.np, rows % R, at, x, y + grouped, z, sizes);
}

template <bool kMeasure, class T, class C>
GTI_INLINE void one_vector_any(const T* w, int64_t rows, Strides at, const C* x, C* y, C* z,
                               Sizes<C>* sizes, const C* ahead) {
  int64_t done = 0;
  if constexpr (std::is_same_v<T, C>) {
    const int64_t vectors = at.np / kLanes<C>;
    if (vectors == 1) done = narrow_pass<1, kMeasure>(w, rows, x, y, z, sizes, ahead);
    if (vectors == 2) done = narrow_pass<2, kMeasure>(w, rows, x, y, z, sizes, ahead);
    if (vectors == 3) done = narrow_pass<3, kMeasure>(w, rows, x, y, z, sizes, ahead);
    if (vectors == 4) done = narrow_pass<4, kMeasure>(w, rows, x, y, z, sizes, ahead);
  }
  all_rows<1, kMeasure>(w + done * at.np, rows - done, at, x, y + done, z, sizes);
}

// Copies rows of n elements to rows of np, scaled, the rest of each row zero.
template <class T, class C>
GTI_INLINE void pack_any(const T* w, int64_t rows, int64_t n, C scale, C* out) {
  constexpr int N = kLanes<C>;
  const int64_t np = padded<C>(n), whole = n / N * N;
  for (int64_t r = 0; r < rows; ++r, w += n, out += np) {
    if (in_pairs<T>(n)) {
      Vec<C, N> w_v[kVectors<T>];
      for (int64_t j = 0; j < n; j += kVectors<T> * N) {
        load_block<N>(w + j, w_v);
        for (int q = 0; q < kVectors<T>; ++q) store(out + j + q * N, scale * w_v[q]);
      }
      continue;
    }
    for (int64_t j = 0; j < whole; j += N) store(out + j, scale * load<N>(w + j));
    if (whole < np) {
      T tail[N] = {};
      std::memcpy(tail, w + whole, (n - whole) * sizeof(T));
      store(out + whole, scale * load<N>(tail));
    }
  }
}

// ---- what happens between passes ---------------------------------------------------------------

// Element e of the random start vector of a matrix: uniform on (−1, 1), exact in fp32; the
// splitmix64 finaliser of seed, matrix number and e.
GTI_INLINE float start_element(uint64_t seed, uint64_t matrix, uint64_t e) {
  uint64_t x =
      seed * 0x9E3779B97F4A7C15u + matrix * 0xD1342543DE82EF95u + (e + 1) * 0x94D049BB133111EBu;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  x = x ^ (x >> 31);
  return (static_cast<float>(x >> 40) * 2.0f + 1.0f) * 0x1p-24f - 1.0f;
}

// out[i] = a · b_i in fp64, i < count, of rows b_i `stride` apart; n is a multiple of 8.
template <int K, class C>
GTI_INLINE void dots_of(const C* a, const C* b, int64_t stride, int64_t n, double* out) {
  constexpr int N = 8;
  Vec<double, N> sum[K] = {};
  for (int64_t i = 0; i < n; i += N) {
    const auto a_v = widen<N>(load<N>(a + i));
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) sum[k] += a_v * widen<N>(load<N>(b + k * stride + i));
  }
  for (int k = 0; k < K; ++k) out[k] = lane_sum<double, N>(sum[k]);
}
template <class C>
GTI_INLINE void dots(const C* a, const C* b, int64_t stride, int count, int64_t n, double* out) {
  for (; count >= 3; count -= 3, b += 3 * stride, out += 3) dots_of<3>(a, b, stride, n, out);
  if (count == 2) dots_of<2>(a, b, stride, n, out);
  if (count == 1) dots_of<1>(a, b, stride, n, out);
}

// x ← scale·x − Σ c_i b_i
template <class C>
GTI_INLINE void subtract(C* x, double scale, const C* b, int64_t stride, int count, int64_t n,
                         const double* c) {
  constexpr int N = kLanes<C>;
  for (int64_t j = 0; j < n; j += N) {
    auto x_v = static_cast<C>(scale) * load<N>(x + j);
    for (int i = 0; i < count; ++i) x_v -= static_cast<C>(c[i]) * load<N>(b + i * stride + j);
    store(x + j, x_v);
  }
}

// Makes x a unit vector orthogonal to the `count` orthonormal rows b, or zero where nothing is left
// of it (then false). Twice is enough (Giraud, Langou, Rozložník 2005).
template <class C>
GTI_INLINE bool orthonormalize(C* x, const C* b, int64_t stride, int count, int64_t n) {
  double c[3 * kMaxTriples], norm2;
  dots(x, x, n, 1, n, &norm2);
  double scale = norm2 > 0.0 && std::isfinite(norm2) ? 1.0 / std::sqrt(norm2) : 0.0;
  for (int twice = 0; twice < 2 && count > 0 && scale > 0.0; ++twice) {
    dots(x, b, stride, count, n, c);
    for (int i = 0; i < count; ++i) c[i] *= scale;
    subtract(x, scale, b, stride, count, n, c);
    dots(x, x, n, 1, n, &norm2);
    const double left = std::sqrt(norm2);
    scale = left > 100.0 * std::numeric_limits<C>::epsilon() ? 1.0 / left : 0.0;
  }
  subtract(x, scale, b, stride, 0, n, c);
  return scale > 0.0;
}

// The same, but what would be zero becomes a random direction.
template <class C>
GTI_INLINE void complete(C* x, const C* b, int64_t stride, int count, int64_t n, int64_t np) {
  for (uint64_t attempt = 0; !orthonormalize(x, b, stride, count, np); ++attempt)
    for (int64_t j = 0; j < n; ++j) x[j] = start_element(attempt, ~uint64_t{0}, j);
}

// Row c < outputs ← Σ_i to[c][i] x_i, of `inputs` rows x_i of length n, one after the other.
template <class C>
GTI_INLINE void combine(C* x, int64_t n, int inputs, int outputs,
                        const double (*to)[3 * kMaxTriples]) {
  constexpr int N = kLanes<C>;
  Vec<C, N> in[3 * kMaxTriples];
  for (int64_t j = 0; j < n; j += N) {
    for (int i = 0; i < inputs; ++i) in[i] = load<N>(x + i * n + j);
    for (int c = 0; c < outputs; ++c) {
      Vec<C, N> sum = {};
      for (int i = 0; i < inputs; ++i) sum += static_cast<C>(to[c][i]) * in[i];
      store(x + c * n + j, sum);
    }
  }
}

// The `count` eigenvectors with the largest eigenvalues of the symmetric t [p, p], by Jacobi
// rotations; t is overwritten. to[c] is the eigenvector c, with to[c][c] ≥ 0.
GTI_INLINE void top_eigenvectors(double (*t)[3 * kMaxTriples], int p, const bool* nonzero,
                                 int count, double (*to)[3 * kMaxTriples]) {
  double q[3 * kMaxTriples][3 * kMaxTriples];  // rows: eigenvectors
  for (int i = 0; i < p; ++i)
    for (int j = 0; j < p; ++j) q[i][j] = i == j;
  for (int sweep = 0; sweep < 30; ++sweep) {
    double off = 0.0, diagonal = 0.0;
    for (int i = 0; i < p; ++i) {
      diagonal += std::abs(t[i][i]);
      for (int j = i + 1; j < p; ++j) off += std::abs(t[i][j]);
    }
    if (off <= 1e-16 * diagonal) break;
    for (int i = 0; i < p; ++i)
      for (int j = i + 1; j < p; ++j) {
        if (t[i][j] == 0.0) continue;
        const double ratio = (t[j][j] - t[i][i]) / (2.0 * t[i][j]);
        const double tan =
            std::copysign(1.0, ratio) / (std::abs(ratio) + std::sqrt(1.0 + ratio * ratio));
        const double c = 1.0 / std::sqrt(1.0 + tan * tan), s = tan * c;
        for (int k = 0; k < p; ++k) {
          const double x = t[k][i], y = t[k][j];
          t[k][i] = c * x - s * y;
          t[k][j] = s * x + c * y;
        }
        for (int k = 0; k < p; ++k) {
          const double x = t[i][k], y = t[j][k], a = q[i][k], b = q[j][k];
          t[i][k] = c * x - s * y;
          t[j][k] = s * x + c * y;
          q[i][k] = c * a - s * b;
          q[j][k] = s * a + c * b;
        }
      }
  }
  int order[3 * kMaxTriples];
  for (int i = 0; i < p; ++i) order[i] = i;
  // A zero row is no direction: it comes last.
  std::stable_sort(order, order + p, [=](int a, int b) {
    return nonzero[a] != nonzero[b] ? nonzero[a] : t[a][a] > t[b][b];
  });
  for (int c = 0; c < count; ++c) {
    const double* from = q[order[c]];
    for (int i = 0; i < p; ++i) to[c][i] = std::copysign(1.0, from[c]) * from[i];
  }
}

struct Settings {
  int k;
  PowerMethod method;
  int64_t max_steps;
  double tol;
  uint64_t seed;
};

// The iteration on one matrix A = WᵀW. The estimates v span the search space together with s, the
// last move, and r, the residuals: 3k rows, one after the other in this order, orthonormal or zero.
// y· = W·, z· = A·. r alone needs a pass, the images of v and s follow by linearity.
template <class C>
struct Iteration {
  int k;
  int64_t n, mp, np;                   // mp, np: m and n, padded: what lies beyond them is zero
  C *v, *s, *r, *zv, *zs, *zr;         // [k, np]
  C *yv, *ys, *yr;                     // [k, mp]
  C* column;                           // [np]
  bool nonzero[3 * kMaxTriples] = {};  // of v, s, r
  double theta[kMaxTriples] = {}, residual[kMaxTriples] = {};
  int64_t steps = 0;

  Iteration(int64_t m, int64_t n, int k, Buffer<C>& memory)
      : k(k), n(n), mp(padded<C>(m)), np(padded<C>(n)) {
    memory.resize((6 * k + 1) * np + 3 * k * mp);
    C* at = memory.data();
    for (C** x : {&v, &s, &r, &zv, &zs, &zr}) *x = std::exchange(at, at + k * np);
    for (C** y : {&yv, &ys, &yr}) *y = std::exchange(at, at + k * mp);
    column = at;
    std::fill(nonzero, nonzero + k, true);
  }

  // The directions of the next pass and where their images go.
  bool on_v(const Settings& set) const { return steps == 0 || set.method == PowerMethod::power; }
  C* x(const Settings& set) const { return on_v(set) ? v : r; }
  C* y(const Settings& set) const { return on_v(set) ? yv : yr; }
  C* z(const Settings& set) const { return on_v(set) ? zv : zr; }
};

// The best v in the span of the first p rows of the search space, and s, the move that led there.
template <class C>
GTI_INLINE void rayleigh_ritz(Iteration<C>& it, int k, int p) {
  double t[3 * kMaxTriples][3 * kMaxTriples], to[2 * kMaxTriples][3 * kMaxTriples];
  for (int i = 0; i < p; ++i) {
    dots(it.yv + i * it.mp, it.yv + i * it.mp, it.mp, p - i, it.mp, &t[i][i]);
    for (int j = i + 1; j < p; ++j) t[j][i] = t[i][j];
  }
  top_eigenvectors(t, p, it.nonzero, k, to);
  int outputs = k;
  if (p > k) {
    // The move: the new v without its part in the old, made orthonormal to the new in coordinates.
    for (int c = k; c < 2 * k; ++c) {
      for (int i = 0; i < p; ++i) to[c][i] = i < k ? 0.0 : to[c - k][i];
      double norm2 = 0.0;
      for (int i = 0; i < p; ++i) norm2 += to[c][i] * to[c][i];
      double scale = norm2 > 0.0 ? 1.0 / std::sqrt(norm2) : 0.0;
      for (int twice = 0; twice < 2 && scale > 0.0; ++twice) {
        for (int i = 0; i < p; ++i) to[c][i] *= scale;
        for (int b = 0; b < c; ++b) {
          double on = 0.0;
          for (int i = 0; i < p; ++i) on += to[c][i] * to[b][i];
          for (int i = 0; i < p; ++i) to[c][i] -= on * to[b][i];
        }
        norm2 = 0.0;
        for (int i = 0; i < p; ++i) norm2 += to[c][i] * to[c][i];
        scale = norm2 > 1e-24 ? 1.0 / std::sqrt(norm2) : 0.0;
      }
      for (int i = 0; i < p; ++i) to[c][i] *= scale;
      it.nonzero[c] = scale > 0.0;
    }
    outputs = 2 * k;
  }
  combine(it.v, it.np, p, outputs, to);
  combine(it.zv, it.np, p, outputs, to);
  combine(it.yv, it.mp, p, outputs, to);
}

// After z and y of the last directions are there: improves v, its residual and the next directions.
// Returns true when the iteration is over.
// K: k where the compiler is to know it, else 0.
template <int K, class C>
GTI_INLINE bool update_any(Iteration<C>& it, const Settings& set) {
  const int k = K ? K : it.k;
  const int64_t mp = it.mp, np = it.np;
  ++it.steps;
  const bool first = it.steps == 1, power = set.method == PowerMethod::power;
  if (k > 1 || !(first || power)) rayleigh_ritz(it, k, first || power ? k : 3 * k);
  const bool last = it.steps == set.max_steps;
  if (!power || last || set.tol > 0.0) {  // else nobody asks for the residual
    bool converged = true;
    for (int c = 0; c < k; ++c) {
      C* r = it.r + c * np;
      double square;
      dots(it.yv + c * mp, it.yv + c * mp, mp, 1, mp, &it.theta[c]);
      const C theta = static_cast<C>(it.theta[c]);
      const C *v = it.v + c * np, *zv = it.zv + c * np;
#pragma omp simd
      for (int64_t j = 0; j < np; ++j) r[j] = zv[j] - theta * v[j];
      dots(r, r, np, 1, np, &square);
      it.residual[c] = it.theta[0] > 0.0 ? std::sqrt(square) / it.theta[0] : 0.0;
      converged &= it.residual[c] <= set.tol;
    }
    if (last || (converged && set.tol > 0.0)) return true;
  }
  for (int c = 0; c < k; ++c) {
    if (power) {
      std::copy(it.zv + c * np, it.zv + (c + 1) * np, it.v + c * np);
      complete(it.v + c * np, it.v, np, c, it.n, np);
    } else {
      // The residuals of a Ritz basis are orthogonal to the space they come from, up to rounding.
      it.nonzero[2 * k + c] = orthonormalize(it.r + c * np, it.v, np, 2 * k + c, np);
    }
  }
  return false;
}

// ---- the Gram matrix of a short side -----------------------------------------------------------

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

// ---- the clones --------------------------------------------------------------------------------

// Small functions: the compiler's time grows faster than their size.
#define GTI_PASSES(T)                                                                              \
  GTI_CLONES void one_vector(const T* w, int64_t rows, Strides at, const compute_t<T>* x,          \
                             compute_t<T>* y, compute_t<T>* z, const compute_t<T>* ahead) {        \
    one_vector_any<false, T, compute_t<T>>(w, rows, at, x, y, z, nullptr, ahead);                  \
  }                                                                                                \
  GTI_CLONES void one_vector_measured(const T* w, int64_t rows, Strides at, const compute_t<T>* x, \
                                      compute_t<T>* y, compute_t<T>* z, const compute_t<T>* ahead, \
                                      Sizes<compute_t<T>>* sizes) {                                \
    one_vector_any<true, T, compute_t<T>>(w, rows, at, x, y, z, sizes, ahead);                     \
  }                                                                                                \
  GTI_CLONES void two_vectors(const T* w, int64_t rows, Strides at, const compute_t<T>* x,         \
                              compute_t<T>* y, compute_t<T>* z) {                                  \
    all_rows<2, false, T, compute_t<T>>(w, rows, at, x, y, z, nullptr);                            \
  }
GTI_PASSES(double)
GTI_PASSES(float)
GTI_PASSES(bf16)
#undef GTI_PASSES

// y [k, rows] = w x and z += wᵀ y for a panel w of rows, which stays in cache for all k vectors.
// sizes: nullptr, or where to add the sizes of the panel.
template <class T, class C>
void panel_pass(const T* w, int64_t rows, int k, Strides at, const C* x, C* y, C* z,
                Sizes<C>* sizes, const C* ahead) {
  int c = 0;
  if (sizes) {
    one_vector_measured(w, rows, at, x, y, z, ahead, sizes);
    c = 1;
  }
  for (; c + 1 < k; c += 2) two_vectors(w, rows, at, x + c * at.np, y + c * at.mp, z + c * at.np);
  if (c < k) one_vector(w, rows, at, x + c * at.np, y + c * at.mp, z + c * at.np, ahead);
}

#define GTI_GRAM(T)                                                                               \
  GTI_CLONES void gram_panel(const T* w, int64_t n, bool tall, int64_t s, int64_t at,             \
                             int64_t count, double* panel, double* g) {                           \
    gram_panel_any(w, n, tall, s, at, count, panel, g);                                           \
  }                                                                                               \
  GTI_CLONES void combine_rows(const T* w, int64_t m, int64_t n, const double* c, int64_t stride, \
                               int64_t begin, int64_t end, double* out) {                         \
    combine_rows_any(w, m, n, c, stride, begin, end, out);                                        \
  }
GTI_GRAM(double)
GTI_GRAM(float)
GTI_GRAM(bf16)
GTI_GRAM(f16)
#undef GTI_GRAM
#define GTI_POWER_ITERATION(C)                                                                     \
  GTI_CLONES void start_vector(uint64_t seed, uint64_t matrix, Iteration<C>& it, int c) {          \
    for (int64_t j = 0; j < it.n; ++j)                                                             \
      it.v[c * it.np + j] = start_element(seed, matrix, static_cast<uint64_t>(j * it.k + c));      \
  }                                                                                                \
  GTI_CLONES void make_basis(C* x, const C* b, int64_t stride, int count, int64_t n, int64_t np) { \
    complete(x, b, stride, count, n, np);                                                          \
  }                                                                                                \
  GTI_CLONES double norm(const C* x, int64_t np) {                                                 \
    double square;                                                                                 \
    dots(x, x, np, 1, np, &square);                                                                \
    return std::sqrt(square);                                                                      \
  }                                                                                                \
  GTI_CLONES C largest(const C* x, int64_t np) {                                                   \
    constexpr int N = kLanes<C>;                                                                   \
    auto most = load<N>(x);                                                                        \
    for (int64_t i = N; i < np; i += N) {                                                          \
      const auto x_v = load<N>(x + i);                                                             \
      most = x_v > most ? x_v : most;                                                              \
    }                                                                                              \
    C out = most[0];                                                                               \
    for (int i = 1; i < N; ++i) out = std::max(out, most[i]);                                      \
    return out;                                                                                    \
  }                                                                                                \
  GTI_CLONES bool update_one(Iteration<C>& it, const Settings& set) {                              \
    return update_any<1>(it, set);                                                                 \
  }                                                                                                \
  GTI_CLONES bool update_several(Iteration<C>& it, const Settings& set) {                          \
    return update_any<0>(it, set);                                                                 \
  }                                                                                                \
  bool update(Iteration<C>& it, const Settings& set) {                                             \
    return it.k == 1 ? update_one(it, set) : update_several(it, set);                              \
  }
GTI_POWER_ITERATION(double)
GTI_POWER_ITERATION(float)
#undef GTI_POWER_ITERATION

GTI_CLONES void pack(const double* w, int64_t rows, int64_t n, double scale, double* out) {
  pack_any(w, rows, n, scale, out);
}
GTI_CLONES void pack(const float* w, int64_t rows, int64_t n, float scale, float* out) {
  pack_any(w, rows, n, scale, out);
}
GTI_CLONES void pack(const bf16* w, int64_t rows, int64_t n, float scale, float* out) {
  pack_any(w, rows, n, scale, out);
}
GTI_CLONES void pack(const f16* w, int64_t rows, int64_t n, float scale, float* out) {
  pack_any(w, rows, n, scale, out);
}

// ---- one matrix --------------------------------------------------------------------------------

template <class T>
struct Matrix {
  using C = compute_t<T>;
  const PowerIterationItem& item;
  int64_t index;   // within the item
  int64_t number;  // through the list
  C scale = 1;

  const T* w() const { return static_cast<const T*>(item.w) + index * item.m * item.n; }

  // True where a pass can read W as it lies in memory. fp16 costs more to widen twice than to pack.
  bool direct() const {
    return scale == C(1) &&
           (std::is_same_v<T, C> ? item.n == padded<C>(item.n) : in_pairs<T>(item.n));
  }

  // Rows [begin, end), np columns each, of the compute type and scaled.
  const C* panel(int64_t begin, int64_t end, Buffer<C>& buffer) const {
    if constexpr (std::is_same_v<T, C>)
      if (direct()) return w() + begin * item.n;
    const int64_t needed = (end - begin) * padded<C>(item.n);
    if (buffer.size() < needed) buffer.resize(needed);
    pack(w() + begin * item.n, end - begin, item.n, scale, buffer.data());
    return buffer.data();
  }

  const C* given_start(int k) const {
    return item.start ? static_cast<const C*>(item.start) + index * item.n * k : nullptr;
  }

  // given: [n, k], or nullptr where the start is to be random.
  template <class G>
  void start(Iteration<C>& it, const Settings& set, const G* given) const {
    const int64_t n = item.n, np = it.np, k = it.k;
    for (int c = 0; c < k; ++c) {
      C* v = it.v + c * np;
      for (int64_t j = 0; given && j < n; ++j) v[j] = static_cast<C>(given[j * k + c]);
      const double length = given ? norm(v, np) : 0.0;
      if (!(length > 0.0 && std::isfinite(length)))
        start_vector(set.seed, static_cast<uint64_t>(number), it, c);
      make_basis(v, it.v, np, c, n, np);
    }
    if (!in_pairs<T>(n)) return;
    std::copy(it.v, it.v + k * np, it.r);
    for (int c = 0; c < k; ++c)
      for (int64_t j = 0; j < n; ++j) it.v[c * np + place_in_pairs(j)] = it.r[c * np + j];
  }

  // Looks at every entry: true where all are finite; the largest magnitude.
  bool scan(double& largest) const {
    bool finite = true;
    largest = 0.0;
    for (int64_t i = 0; i < item.m * item.n; ++i) {
      const double x = std::abs(static_cast<double>(load<1>(w() + i)[0]));
      finite &= std::isfinite(x);
      largest = std::max(largest, x);
    }
    return finite;
  }

  // After the first look at W, taken at scale 1: true where its squares might leave the range of C.
  // Then `scale` brings the largest entry near 1 and `sizes` belong to the scaled matrix, which is
  // to be measured again; sizes.finite is false where W holds a NaN or an infinity.
  bool rescale(Sizes<C>& sizes) {
    const int safe = sizeof(C) == 8 ? 200 : 40;  // sums of z² are sums of σ⁴, in fp64
    const bool in_range = sizes.row == 0.0 || std::abs(std::ilogb(sizes.row)) <= safe;
    if (sizes.finite && (in_range || scale != C(1))) return false;
    double largest = sizes.row;
    sizes.finite = scan(largest);
    if (!sizes.finite || largest == 0.0 || scale != C(1)) return false;
    const int most = std::numeric_limits<C>::max_exponent - 2;  // 2^most is finite
    scale = static_cast<C>(std::ldexp(1.0, std::clamp(-std::ilogb(largest), -most, most)));
    sizes = Sizes<C>{sizes.column};
    std::fill(sizes.column, sizes.column + padded<C>(item.n), C(0));
    return true;
  }

  void finish(Iteration<C>& it, const Sizes<C>& sizes, const Settings& set,
              int64_t passes_before = 0) const {
    const int64_t m = item.m, n = item.n, mp = it.mp, np = it.np, k = it.k;
    C* u = static_cast<C*>(item.u) + index * m * k;
    C* v = static_cast<C*>(item.v) + index * n * k;
    double* sigma = item.sigma + index * k;
    double* residual = item.residual + index * k;
    if (!sizes.finite) {
      const double nan = std::numeric_limits<double>::quiet_NaN();
      std::fill(sigma, sigma + k, nan);
      std::fill(residual, residual + k, nan);
      item.upper[index] = nan;
      std::fill(u, u + m * k, static_cast<C>(nan));
      std::fill(v, v + n * k, static_cast<C>(nan));
      item.steps[index] = 0;
      item.converged[index] = false;
      return;
    }
    const double inverse = 1.0 / static_cast<double>(scale);
    // Below this share of the largest σ, W v is rounding: u is then any direction left.
    const double least = std::min<double>(std::numeric_limits<C>::epsilon() * std::max(m, n), 0.01);
    bool converged = true;
    double largest_y = 0.0;
    for (int c = 0; c < k; ++c) {
      C *v_c = it.v + c * np, *y_c = it.yv + c * mp;
      const double wv = norm(y_c, mp), length = norm(v_c, np);
      sigma[c] = wv / length * inverse;
      residual[c] = it.residual[c];
      converged &= residual[c] <= set.tol;
      largest_y = std::max(largest_y, wv);
      if (!(wv > least * largest_y)) std::fill(y_c, y_c + mp, C(0));
      make_basis(y_c, it.yv, mp, c, m, mp);
      const C unit = static_cast<C>(1.0 / length);
      for (int64_t j = 0; j < n; ++j)
        v[j * k + c] = unit * v_c[in_pairs<T>(n) ? place_in_pairs(j) : j];
      for (int64_t i = 0; i < m; ++i) u[i * k + c] = y_c[i];
    }
    item.steps[index] = it.steps + passes_before;
    item.converged[index] = converged;
    const double one = largest(sizes.column, np);
    const double bound =
        std::min(std::sqrt(one) * std::sqrt(sizes.row), std::sqrt(sizes.frobenius2));
    const double rounding = (m + np + 8) * std::numeric_limits<C>::epsilon();
    item.upper[index] = bound * (1.0 + rounding) * inverse;
  }
};

// What a thread keeps from one small matrix to the next.
template <class C>
struct Workspace {
  Buffer<C> vectors, packed;
};

// next: the matrix that this thread takes next, to be asked for, or W itself.
template <class T>
void run_small(Matrix<T> matrix, const Settings& set, const void* next,
               Workspace<compute_t<T>>& work) {
  using C = compute_t<T>;
  const int64_t m = matrix.item.m, np = padded<C>(matrix.item.n);
  Iteration<C> it(m, matrix.item.n, set.k, work.vectors);
  const Strides at{np, it.mp};
  Sizes<C> sizes{it.column};
  matrix.start(it, set, matrix.given_start(set.k));
  const C* w = matrix.panel(0, m, work.packed);
  const auto pass = [&](Sizes<C>* measured) {
    std::fill(it.z(set), it.z(set) + set.k * np, C(0));
    const C* ahead = static_cast<const C*>(next) + it.steps % 8 * kLanes<C>;
    panel_pass(w, m, set.k, at, it.x(set), it.y(set), it.z(set), measured, ahead);
  };
  pass(&sizes);
  if (matrix.rescale(sizes)) {
    w = matrix.panel(0, m, work.packed);
    pass(&sizes);
  }
  while (sizes.finite && !update(it, set)) pass(nullptr);
  matrix.finish(it, sizes, set);
}

// The k top right singular vectors [n, k] by way of the Gram matrix of the short side, WᵀW or WWᵀ,
// in fp64: one pass over W for it, and one for v = Wᵀu where the rows are the short side. Not
// finite where W is not.
template <class T>
std::vector<double> start_from_gram(const Matrix<T>& matrix, const Settings& set, int threads) {
  const int64_t m = matrix.item.m, n = matrix.item.n, k = set.k;
  const bool tall = n <= m;
  const int64_t s = std::min(m, n), sp = (s + 3) / 4 * 4, length = std::max(m, n);
  const int64_t segments = (length + kGramSegment - 1) / kGramSegment;
  std::vector<double> parts(segments * sp * sp), gram(s * s), top(s * k), spare(s * k + 2 * k + 1);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t b = 0; b < segments; ++b) {
    Buffer<double> panel(sp * kGramPanel);
    const int64_t end = std::min(length, (b + 1) * kGramSegment);
    for (int64_t at = b * kGramSegment; at < end; at += kGramPanel)
      gram_panel(matrix.w(), n, tall, s, at, std::min(kGramPanel, end - at), panel.data(),
                 parts.data() + b * sp * sp);
  }
  for (int64_t b = 0; b < segments; ++b)
    for (int64_t i = 0; i < s; ++i)
      for (int64_t j = i; j < s; ++j)
        gram[j * s + i] = gram[i * s + j] += parts[(b * sp + i) * sp + j];
  // Its singular vectors are those of W: WᵀW squares σ, so few steps do.
  int64_t steps;
  bool converged;
  PowerIterationItem item{};
  item.dtype = DType::f64;
  item.batch = 1;
  item.m = item.n = s;
  item.w = gram.data();
  item.u = spare.data();
  item.v = top.data();
  item.sigma = spare.data() + s * k;
  item.residual = item.sigma + k;
  item.upper = item.residual + k;
  item.steps = &steps;
  item.converged = &converged;
  Workspace<double> work;
  run_small(Matrix<double>{item, 0, matrix.number},
            Settings{set.k, PowerMethod::cg, 1000, 1e-10, set.seed}, gram.data(), work);
  if (tall) return top;
  std::vector<double> v(n * k), columns(k * n);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t b = 0; b < segments; ++b) {
    const int64_t end = std::min(n, (b + 1) * kGramSegment);
    for (int64_t at = b * kGramSegment; at < end; at += kGramPanel)  // in cache for all vectors
      for (int64_t c = 0; c < k; ++c)
        combine_rows(matrix.w(), m, n, top.data() + c, k, at, std::min(end, at + kGramPanel),
                     columns.data() + c * n);
  }
  for (int64_t c = 0; c < k; ++c)
    for (int64_t j = 0; j < n; ++j) v[j * k + c] = columns[c * n + j];
  return v;
}

template <class T>
void run_large(Matrix<T> matrix, Settings set, int threads) {
  using C = compute_t<T>;
  const int64_t m = matrix.item.m, n = matrix.item.n, np = padded<C>(n);
  const int64_t row_bytes = np * static_cast<int64_t>(sizeof(C));
  const int64_t panel_rows = std::max<int64_t>(8, kPanelBytes / row_bytes / 8 * 8);
  const int64_t most_blocks = std::max((m + 63) / 64, std::min<int64_t>(4, (m + 15) / 16));
  // A power of two, so that any usual number of threads shares them evenly.
  const auto blocks = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(std::clamp<int64_t>(
      m * row_bytes / kBlockBytes, 1, std::min<int64_t>(kMaxBlocks, most_blocks)))));
  const auto first_row = [=](int64_t b) { return std::min(m, (m + 7) / 8 * b / blocks * 8); };

  const int64_t z_size = set.k * np;
  Buffer<C> memory, partial_z(blocks * z_size), partial_column(blocks * np);
  Iteration<C> it(m, n, set.k, memory);
  const Strides at{np, it.mp};
  Sizes<C> sizes{it.column};
  std::vector<Sizes<C>> partial_sizes(blocks);
  bool measured = false, done = false;
  int64_t passes_before = 0;
  if (power_iteration_uses_gram(matrix.item, set.k, set.method, set.max_steps, set.tol)) {
    matrix.start(it, set, start_from_gram(matrix, set, threads).data());
    passes_before = n <= m ? 1 : 2;
    set.max_steps -= passes_before;
  } else {
    matrix.start(it, set, matrix.given_start(set.k));
  }

#pragma omp parallel num_threads(threads)
  {
#ifdef _OPENMP
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
#else
    const int64_t thread = 0, team = 1;
#endif
    Buffer<C> buffer;
    while (!done) {
      const C* x = it.x(set);
      C *y = it.y(set), *z = it.z(set);
      // Odd passes go backwards: what the last pass left in cache comes first.
      const bool backwards = it.steps % 2;
      const int64_t low = blocks * thread / team, high = blocks * (thread + 1) / team;
      for (int64_t c = 0; c < high - low; ++c) {
        const int64_t b = backwards ? high - 1 - c : low + c;
        const int64_t begin = first_row(b), end = first_row(b + 1);
        C* z_b = partial_z.data() + b * z_size;
        std::fill(z_b, z_b + z_size, C(0));
        if (!measured) {
          partial_sizes[b] = Sizes<C>{partial_column.data() + b * np};
          std::fill(partial_sizes[b].column, partial_sizes[b].column + np, C(0));
        }
        Sizes<C>* sizes_b = measured ? nullptr : &partial_sizes[b];
        // Two vectors at a time: more of them want the rows again while they are in cache.
        const int64_t most = matrix.direct() && set.k <= 2 ? end - begin : panel_rows;
        for (int64_t r = begin; r < end; r += most) {
          const int64_t rows = std::min(most, end - r);
          if constexpr (!std::is_same_v<T, f16>)
            if (matrix.direct()) {
              panel_pass(matrix.w() + r * n, rows, set.k, at, x, y + r, z_b, sizes_b, x);
              continue;
            }
          panel_pass(matrix.panel(r, r + rows, buffer), rows, set.k, at, x, y + r, z_b, sizes_b, x);
        }
      }
#pragma omp barrier
      const int64_t from = z_size * thread / team, to = z_size * (thread + 1) / team;
      const C* part = partial_z.data();
      for (int64_t j = from; j < to; ++j) z[j] = part[j];
      for (int64_t b = 1; b < blocks; ++b)
        for (int64_t j = from; j < to; ++j) z[j] += part[b * z_size + j];
#pragma omp barrier
#pragma omp single
      {
        if (!measured) {
          for (const Sizes<C>& part_sizes : partial_sizes) {
            sizes.row = std::max(sizes.row, part_sizes.row);
            sizes.frobenius2 += part_sizes.frobenius2;
            sizes.finite &= part_sizes.finite;
            for (int64_t j = 0; j < np; ++j) sizes.column[j] += part_sizes.column[j];
          }
          measured = !matrix.rescale(sizes);
          done = !sizes.finite;
        }
        if (measured && !done) done = update(it, set);
      }
    }
  }
  matrix.finish(it, sizes, set, passes_before);
}

}  // namespace

// A step of the iteration costs one pass, s·length·itemsize bytes at about 10 per ns and core from
// beyond L2. The Gram matrix costs a pass or two and s²·length/2 multiply-adds in fp64 at about 16
// per ns and core; an iteration with no start of its own takes about 20 steps.
bool power_iteration_uses_gram(const PowerIterationItem& item, int k, PowerMethod method,
                               int64_t max_steps, double tol) {
  const int64_t s = std::min(item.m, item.n), length = std::max(item.m, item.n);
  const double compute = item.dtype == DType::f64 ? 8.0 : 4.0;
  const double itemsize = item.dtype == DType::f64 ? 8 : item.dtype == DType::f32 ? 4 : 2;
  const double size = static_cast<double>(s) * static_cast<double>(length);
  if (method != PowerMethod::cg || tol == 0.0 || item.start || s > kShort ||
      size * compute <= kSmallBytes || 2 * k > s)
    return false;
  const double pass = size * itemsize / 10.0, gram = size * static_cast<double>(s) / 2.0 / 16.0;
  return gram + 3.0 * pass < std::min<double>(20.0, static_cast<double>(max_steps)) * pass;
}

void power_iteration(const PowerIterationItem* items, int64_t n_items, int k, PowerMethod method,
                     int64_t max_steps, double tol, uint64_t seed, int threads) {
  const Settings set{k, method, max_steps, tol, seed};
  struct Task {
    int64_t item, index, number, bytes;
  };
  std::vector<Task> tasks;
  int64_t number = 0, total = 0;
  for (int64_t i = 0; i < n_items; ++i) {
    const int64_t bytes =
        items[i].m * (items[i].dtype == DType::f64 ? padded<double>(items[i].n) * 8
                                                   : padded<float>(items[i].n) * 4);
    for (int64_t b = 0; b < items[i].batch; ++b) tasks.push_back({i, b, number++, bytes});
    total += items[i].batch * bytes;
  }
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.bytes > b.bytes; });
  using Workspaces = std::tuple<Workspace<float>, Workspace<double>>;
  const auto run = [&](int64_t i, int team, Workspaces& workspaces) {
    const Task &task = tasks[i], &next = tasks[std::min<int64_t>(i + 1, tasks.size() - 1)];
    with_dtype(items[task.item].dtype, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      Matrix<T> matrix{items[task.item], task.index, task.number};
      if (task.bytes > kSmallBytes) return run_large(matrix, set, team);
      const bool alike = next.item == task.item;
      const Matrix<T> after{items[task.item], alike ? next.index : task.index, 0};
      run_small(matrix, set, after.w(), std::get<Workspace<compute_t<T>>>(workspaces));
    });
  };
  // A thread a matrix needs no barriers; matrices too large to be balanced that way come first,
  // with all threads at each.
  const int64_t count = static_cast<int64_t>(tasks.size());
  int64_t first = 0;
  Workspaces none;
  while (threads > 1 && first < count &&
         tasks[first].bytes > std::max(kSmallBytes, total / threads)) {
    total -= tasks[first].bytes;
    run(first++, threads, none);
  }
  const int64_t at_once = std::clamp<int64_t>((count - first) / (16 * threads), 1, 64);
#pragma omp parallel num_threads(threads) if (count - first > 1)
  {
    Workspaces workspaces;
#pragma omp for schedule(dynamic, at_once)
    for (int64_t i = first; i < count; ++i) run(i, 1, workspaces);
  }
}

}  // namespace gti
