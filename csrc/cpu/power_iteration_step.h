// What happens between two passes: Rayleigh–Ritz in the span of v, s and r, the residual, and the
// directions of the next pass.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "gti/power_iteration.h"
#include "power_iteration_pass.h"
#include "simd.h"

namespace gti {
namespace {

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
template <int B, int K, class C>
GTI_INLINE void dots_of(const C* a, const C* b, int64_t stride, int64_t n, double* out) {
  constexpr int N = B / 8;
  Vec<double, N> sum[K] = {};
  for (int64_t i = 0; i < n; i += N) {
    const auto a_v = widen<N>(load<N>(a + i));
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) sum[k] += a_v * widen<N>(load<N>(b + k * stride + i));
  }
  for (int k = 0; k < K; ++k) out[k] = lane_sum<double, N>(sum[k]);
}
template <int B, class C>
GTI_INLINE void dots(const C* a, const C* b, int64_t stride, int count, int64_t n, double* out) {
  for (; count >= 3; count -= 3, b += 3 * stride, out += 3) dots_of<B, 3>(a, b, stride, n, out);
  if (count == 2) dots_of<B, 2>(a, b, stride, n, out);
  if (count == 1) dots_of<B, 1>(a, b, stride, n, out);
}

template <int B, class C>
GTI_INLINE double norm_any(const C* x, int64_t n) {
  double square;
  dots<B>(x, x, n, 1, n, &square);
  return std::sqrt(square);
}

// The largest element; n is a multiple of kBlock.
template <int B, class C>
GTI_INLINE C largest_any(const C* x, int64_t n) {
  constexpr int N = B / sizeof(C);
  auto most = load<N>(x);
  for (int64_t i = N; i < n; i += N) {
    const auto x_v = load<N>(x + i);
    most = x_v > most ? x_v : most;
  }
  C out = most[0];
  for (int i = 1; i < N; ++i) out = std::max(out, most[i]);
  return out;
}

// x ← scale·x − Σ c_i b_i
template <int B, class C>
GTI_INLINE void subtract(C* x, double scale, const C* b, int64_t stride, int count, int64_t n,
                         const double* c) {
  constexpr int N = B / sizeof(C);
  for (int64_t j = 0; j < n; j += N) {
    auto x_v = static_cast<C>(scale) * load<N>(x + j);
    for (int i = 0; i < count; ++i) x_v -= static_cast<C>(c[i]) * load<N>(b + i * stride + j);
    store(x + j, x_v);
  }
}

// Makes x a unit vector orthogonal to the `count` orthonormal rows b, or zero where nothing is left
// of it (then false). Twice is enough (Giraud, Langou, Rozložník 2005).
template <int B, class C>
GTI_INLINE bool orthonormalize(C* x, const C* b, int64_t stride, int count, int64_t n) {
  double c[3 * kMaxTriples], norm2;
  dots<B>(x, x, n, 1, n, &norm2);
  // The inverse of a subnormal length would overflow C, that of a subnormal square is wrong.
  const double least = std::numeric_limits<C>::min();
  const bool there = norm2 >= std::max(least * least, std::numeric_limits<double>::min());
  double scale = there && std::isfinite(norm2) ? 1.0 / std::sqrt(norm2) : 0.0;
  for (int twice = 0; twice < 2 && count > 0 && scale > 0.0; ++twice) {
    dots<B>(x, b, stride, count, n, c);
    for (int i = 0; i < count; ++i) c[i] *= scale;
    subtract<B>(x, scale, b, stride, count, n, c);
    dots<B>(x, x, n, 1, n, &norm2);
    const double left = std::sqrt(norm2);
    // What is left of a direction that the b span is rounding, and lies in their span again, as far
    // as they are orthonormal: the second time shows it.
    scale = left > (twice ? 0.5 : 100.0 * std::numeric_limits<C>::epsilon()) ? 1.0 / left : 0.0;
  }
  if (scale > 0.0) {
    subtract<B>(x, scale, b, stride, 0, n, c);
  } else {
    std::fill(x, x + n, C(0));  // 0·x would keep a NaN
  }
  return scale > 0.0;
}

// The same, but what would be zero becomes a random direction.
template <int B, class C>
GTI_INLINE void complete(C* x, const C* b, int64_t stride, int count, int64_t n, int64_t np) {
  // Where b is orthonormal the first attempt is enough, but for a draw along b; a NaN ends too.
  for (uint64_t attempt = 0; !orthonormalize<B>(x, b, stride, count, np) && attempt < 100;
       ++attempt)
    for (int64_t j = 0; j < n; ++j) x[j] = start_element(attempt, ~uint64_t{0}, j);
}

// Row c < outputs ← Σ_i to[c][i] x_i, of `inputs` rows x_i of length n, one after the other.
template <int B, class C>
GTI_INLINE void combine(C* x, int64_t n, int inputs, int outputs,
                        const double (*to)[3 * kMaxTriples]) {
  constexpr int N = B / sizeof(C);
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
template <int B, class C>
GTI_INLINE void rayleigh_ritz(Iteration<C>& it, int k, int p) {
  double t[3 * kMaxTriples][3 * kMaxTriples], to[2 * kMaxTriples][3 * kMaxTriples];
  for (int i = 0; i < p; ++i) {
    dots<B>(it.yv + i * it.mp, it.yv + i * it.mp, it.mp, p - i, it.mp, &t[i][i]);
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
  combine<B>(it.v, it.np, p, outputs, to);
  combine<B>(it.zv, it.np, p, outputs, to);
  combine<B>(it.yv, it.mp, p, outputs, to);
}

// After z and y of the last directions are there: improves v, its residual and the next directions.
// Returns true when the iteration is over.
// K: k where the compiler is to know it, else 0.
template <int B, int K, class C>
GTI_INLINE bool update_any(Iteration<C>& it, const Settings& set) {
  const int k = K ? K : it.k;
  const int64_t mp = it.mp, np = it.np;
  ++it.steps;
  const bool first = it.steps == 1, power = set.method == PowerMethod::power;
  if (k > 1 || !(first || power)) rayleigh_ritz<B>(it, k, first || power ? k : 3 * k);
  const bool last = it.steps == set.max_steps;
  if (!power || last || set.tol > 0.0) {  // else nobody asks for the residual
    bool converged = true;
    for (int c = 0; c < k; ++c) {
      C* r = it.r + c * np;
      double square;
      dots<B>(it.yv + c * mp, it.yv + c * mp, mp, 1, mp, &it.theta[c]);
      const C theta = static_cast<C>(it.theta[c]);
      const C *v = it.v + c * np, *zv = it.zv + c * np;
#pragma omp simd
      for (int64_t j = 0; j < np; ++j) r[j] = zv[j] - theta * v[j];
      dots<B>(r, r, np, 1, np, &square);
      it.residual[c] = it.theta[0] == 0.0 ? 0.0 : std::sqrt(square) / it.theta[0];
      converged &= it.residual[c] <= set.tol;
    }
    if (last || (converged && set.tol > 0.0)) return true;
  }
  for (int c = 0; c < k; ++c) {
    if (power) {
      std::copy(it.zv + c * np, it.zv + (c + 1) * np, it.v + c * np);
      complete<B>(it.v + c * np, it.v, np, c, it.n, np);
    } else {
      // The residuals of a Ritz basis are orthogonal to the space they come from, up to rounding.
      it.nonzero[2 * k + c] = orthonormalize<B>(it.r + c * np, it.v, np, 2 * k + c, np);
    }
  }
  return false;
}

}  // namespace
}  // namespace gti
