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

// Two sweeps over rows of np columns in one, so that reading ahead and computing overlap: y [R] = w
// x, and z [np] += beforeᵀ y_before for the rows before, whose y is known. With kMeasure, also adds
// the rows w to sizes.
template <int R, bool kDot, bool kUpdate, bool kMeasure, class T, class C>
GTI_INLINE void row_group(const T* w, const T* before, int64_t np, const C* x, const C* y_before,
                          C* y, C* z, Sizes<C>* sizes) {
  constexpr int N = kLanes<C>, Q = kVectors<T>;
  Vec<C, N> sum[R] = {}, y_v[R] = {}, size[R] = {}, squares = {}, w_v[Q];
  for (int r = 0; kUpdate && r < R; ++r) y_v[r] += y_before[r];
  for (int64_t j = 0; j < np; j += Q * N) {
    if constexpr (kDot) {
      Vec<C, N> x_v[Q], column[Q] = {};
      for (int q = 0; q < Q; ++q) x_v[q] = load<N>(x + j + q * N);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        load_block<N>(w + r * np + j, w_v);
        for (int q = 0; q < Q; ++q) {
          sum[r] += w_v[q] * x_v[q];
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
      Vec<C, N> z_v[Q][2] = {};
      for (int q = 0; q < Q; ++q) z_v[q][0] = load<N>(z + j + q * N);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        load_block<N>(before + r * np + j, w_v);
        for (int q = 0; q < Q; ++q) z_v[q][r % 2] += y_v[r] * w_v[q];
      }
      for (int q = 0; q < Q; ++q) store(z + j + q * N, z_v[q][0] + z_v[q][1]);
    }
  }
  if constexpr (kDot) lane_sums<C, N>(sum, y);
  if constexpr (kMeasure) {
    C sums[R];
    lane_sums<C, N>(size, sums);
    sizes->add_rows(sums, lane_sum<C, N>(squares));
  }
}

// Rows in groups of R, each group's dot products together with the last group's update of z.
template <int R, bool kMeasure, class T, class C>
GTI_INLINE void rows_pass(const T* w, int64_t groups, int64_t np, const C* x, C* y, C* z,
                          Sizes<C>* sizes) {
  if (groups == 0) return;
  row_group<R, true, false, kMeasure, T, C>(w, w, np, x, y, y, z, sizes);
  for (int64_t g = 1; g < groups; ++g, w += R * np, y += R)
    row_group<R, true, true, kMeasure, T, C>(w + R * np, w, np, x, y, y + R, z, sizes);
  row_group<R, false, true, false, T, C>(w, w, np, x, y, y, z, sizes);
}

// The same for rows of V vectors, few enough that x and z stay in registers. Also asks for one part
// in eight of the rows at `ahead`.
template <int V, bool kMeasure, class C>
GTI_INLINE void narrow_pass(const C* w, int64_t rows, const C* x, C* y, C* z, Sizes<C>* sizes,
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
  rows_pass<1, kMeasure>(w + groups * kGroup, rows % R, V * N, x, y + groups * R, z, sizes);
}

template <bool kMeasure, class T, class C>
GTI_INLINE void panel_pass_any(const T* w, int64_t rows, int64_t np, const C* x, C* y, C* z,
                               Sizes<C>* sizes, const C* ahead) {
  if constexpr (std::is_same_v<T, C>) {
    constexpr int N = kLanes<C>;
    if (np == N) return narrow_pass<1, kMeasure>(w, rows, x, y, z, sizes, ahead);
    if (np == 2 * N) return narrow_pass<2, kMeasure>(w, rows, x, y, z, sizes, ahead);
    if (np == 3 * N) return narrow_pass<3, kMeasure>(w, rows, x, y, z, sizes, ahead);
    if (np == 4 * N) return narrow_pass<4, kMeasure>(w, rows, x, y, z, sizes, ahead);
  }
  const int64_t grouped = rows / 8 * 8;
  rows_pass<8, kMeasure>(w, rows / 8, np, x, y, z, sizes);
  rows_pass<1, kMeasure>(w + grouped * np, rows % 8, np, x, y + grouped, z, sizes);
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

// The dot products of a with each of b, in fp64 and in one sweep; n is a multiple of 8 or the tail
// of every array is zero up to one.
template <int K, class C>
GTI_INLINE void dots(const C* a, const C* const (&b)[K], int64_t n, double* out) {
  constexpr int N = 8;
  Vec<double, N> sum[K] = {};
  for (int64_t i = 0; i < n; i += N) {
    const auto a_v = widen<N>(load<N>(a + i));
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) sum[k] += a_v * widen<N>(load<N>(b[k] + i));
  }
  for (int k = 0; k < K; ++k) out[k] = lane_sum<double, N>(sum[k]);
}
template <class C>
GTI_INLINE double dot(const C* a, const C* b, int64_t n) {
  double out;
  dots<1, C>(a, {b}, n, &out);
  return out;
}

// (a, b) ← (a, r, b) · [[a0, b0], [a1, b1], [a2, b2]]
template <class C>
GTI_INLINE void combine(C* a, const C* r, C* b, int64_t n, const double* to_a, const double* to_b) {
  const C a0 = to_a[0], a1 = to_a[1], a2 = to_a[2], b0 = to_b[0], b1 = to_b[1], b2 = to_b[2];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const C x = a[i], y = r[i], z = b[i];
    a[i] = a0 * x + a1 * y + a2 * z;
    b[i] = b0 * x + b1 * y + b2 * z;
  }
}

// The unit eigenvector of the largest eigenvalue of a symmetric 3 x 3 matrix, by Jacobi rotations.
inline void top_eigenvector(double t[3][3], double* top) {
  double q[3][3] = {{1, 0, 0}, {0, 1, 0}, {0, 0, 1}};
  for (int sweep = 0; sweep < 12; ++sweep) {
    const double off = std::abs(t[0][1]) + std::abs(t[0][2]) + std::abs(t[1][2]);
    if (off <= 1e-16 * (std::abs(t[0][0]) + std::abs(t[1][1]) + std::abs(t[2][2]))) break;
    for (int i = 0; i < 2; ++i)
      for (int j = i + 1; j < 3; ++j) {
        if (t[i][j] == 0.0) continue;
        const double ratio = (t[j][j] - t[i][i]) / (2.0 * t[i][j]);
        const double tan =
            std::copysign(1.0, ratio) / (std::abs(ratio) + std::sqrt(1.0 + ratio * ratio));
        const double c = 1.0 / std::sqrt(1.0 + tan * tan), s = tan * c;
        for (int k = 0; k < 3; ++k) {
          const double x = t[k][i], y = t[k][j];
          t[k][i] = c * x - s * y;
          t[k][j] = s * x + c * y;
        }
        for (int k = 0; k < 3; ++k) {
          const double x = t[i][k], y = t[j][k];
          t[i][k] = c * x - s * y;
          t[j][k] = s * x + c * y;
        }
        for (int k = 0; k < 3; ++k) {
          const double x = q[k][i], y = q[k][j];
          q[k][i] = c * x - s * y;
          q[k][j] = s * x + c * y;
        }
      }
  }
  int best = 0;
  for (int i = 1; i < 3; ++i)
    if (t[i][i] > t[best][best]) best = i;
  // The sign is free: the coordinate on v stays positive, so that v keeps its sign.
  for (int i = 0; i < 3; ++i) top[i] = std::copysign(1.0, q[0][best]) * q[i][best];
}

struct Settings {
  PowerMethod method;
  int64_t max_steps;
  double tol;
  uint64_t seed;
};

// The iteration on one matrix A = WᵀW. v is the estimate; r and s span the search space beside it;
// y· = W·, z· = A·. r alone needs a pass, the images of v and s follow by linearity.
template <class C>
struct Iteration {
  int64_t mp, np;                        // m and n, padded: what lies beyond them is zero
  C *v, *r, *s, *zv, *zr, *zs, *column;  // [np]
  C *yv, *yr, *ys;                       // [mp]
  double theta = 0.0, residual = 0.0;
  int64_t steps = 0;

  Iteration(int64_t m, int64_t n, Buffer<C>& memory) : mp(padded<C>(m)), np(padded<C>(n)) {
    memory.resize(7 * np + 3 * mp);
    C* at = memory.data();
    for (C** x : {&v, &r, &s, &zv, &zr, &zs, &column}) *x = std::exchange(at, at + np);
    for (C** y : {&yv, &yr, &ys}) *y = std::exchange(at, at + mp);
  }

  // The direction of the next pass and where its images go.
  bool on_v(const Settings& set) const { return steps == 0 || set.method == PowerMethod::power; }
  C* x(const Settings& set) const { return on_v(set) ? v : r; }
  C* y(const Settings& set) const { return on_v(set) ? yv : yr; }
  C* z(const Settings& set) const { return on_v(set) ? zv : zr; }
};

// After z and y of the last direction are there: improves v, its residual and the next direction.
// Returns true when the iteration is over.
template <class C>
GTI_INLINE bool update_any(Iteration<C>& it, const Settings& set) {
  const int64_t mp = it.mp, np = it.np;
  ++it.steps;
  if (set.method == PowerMethod::cg && it.steps > 1) {
    double t[3][3], top[3];
    dots<3, C>(it.yv, {it.yv, it.yr, it.ys}, mp, t[0]);
    dots<2, C>(it.yr, {it.yr, it.ys}, mp, &t[1][1]);
    dots<1, C>(it.ys, {it.ys}, mp, &t[2][2]);
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < i; ++j) t[i][j] = t[j][i];
    top_eigenvector(t, top);
    // The move (0, top₁, top₂) made orthonormal to the new v, in coordinates: nothing cancels.
    const double move = std::sqrt(top[1] * top[1] + top[2] * top[2]);
    double to_s[3] = {0.0, 0.0, 1.0};
    if (move > 0.0) {
      to_s[0] = -move;
      to_s[1] = top[0] * top[1] / move;
      to_s[2] = top[0] * top[2] / move;
    }
    combine(it.v, it.r, it.s, np, top, to_s);
    combine(it.zv, it.zr, it.zs, np, top, to_s);
    combine(it.yv, it.yr, it.ys, mp, top, to_s);
  }
  const bool last = it.steps == set.max_steps, power = set.method == PowerMethod::power;
  double on[3] = {};                      // r with r, v, s
  if (!power || last || set.tol > 0.0) {  // else nobody asks for the residual
    it.theta = dot(it.yv, it.yv, mp);
    const C theta = static_cast<C>(it.theta);
#pragma omp simd
    for (int64_t j = 0; j < np; ++j) it.r[j] = it.zv[j] - theta * it.v[j];
    power ? dots<1, C>(it.r, {it.r}, np, on) : dots<3, C>(it.r, {it.r, it.v, it.s}, np, on);
    it.residual = it.theta > 0.0 ? std::sqrt(on[0]) / it.theta : 0.0;
    if (last || (it.residual <= set.tol && set.tol > 0.0)) return true;
  }
  if (power) {
    const double norm = std::sqrt(dot(it.zv, it.zv, np));
    const C scale = static_cast<C>(1.0 / norm);
#pragma omp simd
    for (int64_t j = 0; j < np; ++j) it.v[j] = norm > 0.0 ? scale * it.zv[j] : it.v[j];
    return false;
  }
  // The residual of a Ritz vector is orthogonal to the space it came from, up to rounding: what is
  // left on v and s is taken off twice, and r made a unit vector, or zero if nothing is left of it.
  double scale = on[0] > 0.0 ? 1.0 / std::sqrt(on[0]) : 0.0;
  for (int twice = 0; twice < 2 && scale > 0.0; ++twice) {
    const C a = static_cast<C>(scale), on_v = static_cast<C>(on[1] * scale),
            on_s = static_cast<C>(on[2] * scale);
#pragma omp simd
    for (int64_t j = 0; j < np; ++j) it.r[j] = a * it.r[j] - (on_v * it.v[j] + on_s * it.s[j]);
    dots<3, C>(it.r, {it.r, it.v, it.s}, np, on);
    const double left = std::sqrt(on[0]);
    scale = left > 100.0 * std::numeric_limits<C>::epsilon() ? 1.0 / left : 0.0;
  }
  const C a = static_cast<C>(scale);
#pragma omp simd
  for (int64_t j = 0; j < np; ++j) it.r[j] *= a;
  return false;
}

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

// ---- the clones --------------------------------------------------------------------------------

// sizes: nullptr, or where to add the sizes of the panel.
#define GTI_PANEL_PASS(T)                                                                  \
  GTI_CLONES void panel_pass(const T* w, int64_t rows, int64_t np, const compute_t<T>* x,  \
                             compute_t<T>* y, compute_t<T>* z, Sizes<compute_t<T>>* sizes, \
                             const compute_t<T>* ahead) {                                  \
    sizes ? panel_pass_any<true>(w, rows, np, x, y, z, sizes, ahead)                       \
          : panel_pass_any<false>(w, rows, np, x, y, z, sizes, ahead);                     \
  }
GTI_PANEL_PASS(double)
GTI_PANEL_PASS(float)
GTI_PANEL_PASS(bf16)
#undef GTI_PANEL_PASS
#define GTI_POWER_ITERATION(C)                                                        \
  GTI_CLONES void scaled_copy(const C* x, int64_t n, C scale, C* out) {               \
    for (int64_t i = 0; i < n; ++i) out[i] = scale * x[i];                            \
  }                                                                                   \
  GTI_CLONES void random_vector(uint64_t seed, uint64_t matrix, int64_t n, C* out) {  \
    for (int64_t j = 0; j < n; ++j)                                                   \
      out[j] = start_element(seed, matrix, static_cast<uint64_t>(j));                 \
  }                                                                                   \
  GTI_CLONES double norm(const C* x, int64_t np) { return std::sqrt(dot(x, x, np)); } \
  GTI_CLONES C largest(const C* x, int64_t np) {                                      \
    constexpr int N = kLanes<C>;                                                      \
    auto most = load<N>(x);                                                           \
    for (int64_t i = N; i < np; i += N) {                                             \
      const auto x_v = load<N>(x + i);                                                \
      most = x_v > most ? x_v : most;                                                 \
    }                                                                                 \
    C out = most[0];                                                                  \
    for (int i = 1; i < N; ++i) out = std::max(out, most[i]);                         \
    return out;                                                                       \
  }                                                                                   \
  GTI_CLONES bool update(Iteration<C>& it, const Settings& set) { return update_any(it, set); }
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

  void start(Iteration<C>& it, const Settings& set) const {
    const int64_t n = item.n;
    double length = 0.0;
    if (item.start) {
      const C* given = static_cast<const C*>(item.start) + index * n;
      std::copy(given, given + n, it.v);
      length = norm(it.v, it.np);
    }
    if (!(length > 0.0 && std::isfinite(length))) {
      random_vector(set.seed, static_cast<uint64_t>(number), n, it.v);
      length = norm(it.v, it.np);
    }
    scaled_copy(it.v, n, static_cast<C>(1.0 / length), it.v);
    if (!in_pairs<T>(n)) return;
    std::copy(it.v, it.v + n, it.r);
    for (int64_t j = 0; j < n; ++j) it.v[place_in_pairs(j)] = it.r[j];
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
    const int safe = sizeof(C) == 8 ? 400 : 40;
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

  void finish(const Iteration<C>& it, const Sizes<C>& sizes, const Settings& set) const {
    const int64_t m = item.m, n = item.n;
    C* u = static_cast<C*>(item.u) + index * m;
    C* v = static_cast<C*>(item.v) + index * n;
    if (!sizes.finite) {
      const double nan = std::numeric_limits<double>::quiet_NaN();
      item.sigma[index] = item.residual[index] = item.upper[index] = nan;
      std::fill(u, u + m, static_cast<C>(nan));
      std::fill(v, v + n, static_cast<C>(nan));
      item.steps[index] = 0;
      item.converged[index] = false;
      return;
    }
    const double inverse = 1.0 / static_cast<double>(scale);
    const double wv = norm(it.yv, it.mp), length = norm(it.v, it.np);
    item.sigma[index] = wv / length * inverse;
    scaled_copy(it.v, n, static_cast<C>(1.0 / length), v);
    for (int64_t j = 0; in_pairs<T>(n) && j < n; ++j)
      v[j] = it.v[place_in_pairs(j)] * static_cast<C>(1.0 / length);
    if (wv > 0.0)
      scaled_copy(it.yv, m, static_cast<C>(1.0 / wv), u);
    else
      for (int64_t i = 0; i < m; ++i) u[i] = i == 0;
    item.residual[index] = it.residual;
    item.steps[index] = it.steps;
    item.converged[index] = it.residual <= set.tol;
    const double one = largest(sizes.column, it.np);
    const double least =
        std::min(std::sqrt(one) * std::sqrt(sizes.row), std::sqrt(sizes.frobenius2));
    const double rounding = (m + it.np + 8) * std::numeric_limits<C>::epsilon();
    item.upper[index] = least * (1.0 + rounding) * inverse;
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
  Iteration<C> it(m, matrix.item.n, work.vectors);
  Sizes<C> sizes{it.column};
  matrix.start(it, set);
  const C* w = matrix.panel(0, m, work.packed);
  const auto pass = [&](Sizes<C>* measured) {
    std::fill(it.z(set), it.z(set) + np, C(0));
    const C* ahead = static_cast<const C*>(next) + it.steps % 8 * kLanes<C>;
    panel_pass(w, m, np, it.x(set), it.y(set), it.z(set), measured, ahead);
  };
  pass(&sizes);
  if (matrix.rescale(sizes)) {
    w = matrix.panel(0, m, work.packed);
    pass(&sizes);
  }
  while (sizes.finite && !update(it, set)) pass(nullptr);
  matrix.finish(it, sizes, set);
}

template <class T>
void run_large(Matrix<T> matrix, const Settings& set, int threads) {
  using C = compute_t<T>;
  const int64_t m = matrix.item.m, n = matrix.item.n, np = padded<C>(n);
  const int64_t row_bytes = np * static_cast<int64_t>(sizeof(C));
  const int64_t panel_rows = std::max<int64_t>(8, kPanelBytes / row_bytes / 8 * 8);
  // A power of two, so that any usual number of threads shares them evenly.
  const auto blocks = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(std::clamp<int64_t>(
      m * row_bytes / kBlockBytes, 1, std::min<int64_t>(kMaxBlocks, (m + 63) / 64)))));
  const auto first_row = [=](int64_t b) { return std::min(m, (m + 7) / 8 * b / blocks * 8); };

  Buffer<C> memory, partial_z(blocks * np), partial_column(blocks * np);
  Iteration<C> it(m, n, memory);
  Sizes<C> sizes{it.column};
  std::vector<Sizes<C>> partial_sizes(blocks);
  bool measured = false, done = false;
  matrix.start(it, set);

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
        C* z_b = partial_z.data() + b * np;
        std::fill(z_b, z_b + np, C(0));
        if (!measured) {
          partial_sizes[b] = Sizes<C>{partial_column.data() + b * np};
          std::fill(partial_sizes[b].column, partial_sizes[b].column + np, C(0));
        }
        Sizes<C>* sizes_b = measured ? nullptr : &partial_sizes[b];
        if constexpr (!std::is_same_v<T, f16>)
          if (matrix.direct()) {
            panel_pass(matrix.w() + begin * n, end - begin, np, x, y + begin, z_b, sizes_b, x);
            continue;
          }
        for (int64_t r = begin; r < end; r += panel_rows) {
          const int64_t rows = std::min(panel_rows, end - r);
          panel_pass(matrix.panel(r, r + rows, buffer), rows, np, x, y + r, z_b, sizes_b, x);
        }
      }
#pragma omp barrier
      const int64_t from = np * thread / team, to = np * (thread + 1) / team;
      const C* part = partial_z.data();
      for (int64_t j = from; j < to; ++j) z[j] = part[j];
      for (int64_t b = 1; b < blocks; ++b)
        for (int64_t j = from; j < to; ++j) z[j] += part[b * np + j];
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
  matrix.finish(it, sizes, set);
}

}  // namespace

void power_iteration(const PowerIterationItem* items, int64_t n_items, PowerMethod method,
                     int64_t max_steps, double tol, uint64_t seed, int threads) {
  const Settings set{method, max_steps, tol, seed};
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
