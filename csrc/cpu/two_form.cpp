// Columns are cut into segments, a segment into panels that stay in cache, and a panel is gone
// through in tiles of 4 x 4 row pairs, each with its sums in registers.
#include "gti/two_form.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "simd.h"

namespace gti {
namespace {

constexpr int kTile = 4;
constexpr int kLanes = 8;
constexpr int64_t kMaxPanel = 2048;          // columns
constexpr int64_t kPanelBytes = 256 * 1024;  // of all 2m rows
constexpr int64_t kMaxSegments = 64;
constexpr int64_t kSegment = 8192;  // columns at least

// Running sums. Products of elements up to fp32 are exact in fp64, so a plain sum has one rounding
// a term; for fp64 elements the product's and the sum's roundings are kept beside it (Dot2 of
// Ogita, Rump and Oishi 2005).
struct Plain {
  Vec<double, kLanes> sum = {};
  GTI_INLINE void add(const Vec<double, kLanes>& a, const Vec<double, kLanes>& b) { sum += a * b; }
  GTI_INLINE void subtract(const Vec<double, kLanes>& a, const Vec<double, kLanes>& b) {
    sum -= a * b;
  }
};
struct Compensated {
  Vec<double, kLanes> sum = {}, error = {};
  GTI_INLINE void add(const Vec<double, kLanes>& a, const Vec<double, kLanes>& b) {
    Vec<double, kLanes> product = a * b, low;
    asm("" : "+m"(product));  // rounded: not to be fused into the sum below
    for (int l = 0; l < kLanes; ++l) low[l] = __builtin_fma(a[l], b[l], -product[l]);
    const Vec<double, kLanes> total = sum + product, back = total - sum;
    error += ((sum - (total - back)) + (product - back)) + low;
    sum = total;
  }
  GTI_INLINE void subtract(const Vec<double, kLanes>& a, const Vec<double, kLanes>& b) {
    add(-a, b);
  }
};
template <class T>
struct SumOf {
  using type = Plain;
};
template <>
struct SumOf<double> {
  using type = Compensated;
};

// The sums of one tile or one segment, [rows, rows] each: value + error.
struct Pair {
  double value = 0.0, error = 0.0;
  // Without rounding: TwoSum, its remainder kept.
  GTI_INLINE void add(double x, double e) {
    const double total = value + x, back = total - value;
    error += ((value - (total - back)) + (x - back)) + e;
    value = total;
  }
};
GTI_INLINE void flush(const Plain& s, Pair& out) { out.add(lane_sum<double, kLanes>(s.sum), 0.0); }
GTI_INLINE void flush(const Compensated& s, Pair& out) {
  for (int l = 0; l < kLanes; ++l) out.add(s.sum[l], s.error[l]);
}

// qi, pi, qj, pj: the 4 rows of the tile's two sides, [n] each. Sums omega for the pairs of the
// tile (i < j alone on the diagonal) and, with kMetric or i == j, metric.
template <bool kDiagonal, bool kMetric, class T>
GTI_INLINE void tile(const T* const* qi, const T* const* pi, const T* const* qj, const T* const* pj,
                     int64_t n, Pair* omega, Pair* metric, int64_t ld) {
  using Sum = typename SumOf<T>::type;
  Sum o[kTile][kTile], g[kTile][kTile];
  const auto step = [&](const T* const* a, const T* const* b, const T* const* c, const T* const* d,
                        int64_t at) __attribute__((always_inline)) {
    Vec<double, kLanes> q[kTile], p[kTile], x[kTile], y[kTile];
    for (int i = 0; i < kTile; ++i) {
      q[i] = widen<kLanes>(load<kLanes>(a[i] + at));
      p[i] = widen<kLanes>(load<kLanes>(b[i] + at));
      x[i] = kDiagonal ? q[i] : widen<kLanes>(load<kLanes>(c[i] + at));
      y[i] = kDiagonal ? p[i] : widen<kLanes>(load<kLanes>(d[i] + at));
    }
#pragma GCC unroll 4
    for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kTile; ++j) {
        if (!kDiagonal || i < j) {
          o[i][j].add(q[i], y[j]);
          o[i][j].subtract(p[i], x[j]);
        }
        if (kDiagonal ? i == j || (kMetric && i < j) : kMetric) {
          g[i][j].add(q[i], x[j]);
          g[i][j].add(p[i], y[j]);
        }
      }
  };
  int64_t at = 0;
  for (; at + kLanes <= n; at += kLanes) step(qi, pi, qj, pj, at);
  if (at < n) {  // the tail, padded with zeros
    T tail[4][kTile][kLanes] = {};
    const T* rows[4][kTile];
    const T* const* from[4] = {qi, pi, qj, pj};
    for (int s = 0; s < (kDiagonal ? 2 : 4); ++s)
      for (int i = 0; i < kTile; ++i) {
        std::memcpy(tail[s][i], from[s][i] + at, (n - at) * sizeof(T));
        rows[s][i] = tail[s][i];
      }
    step(rows[0], rows[1], rows[2], rows[3], 0);
  }
  for (int i = 0; i < kTile; ++i)
    for (int j = 0; j < kTile; ++j) {
      if (!kDiagonal || i < j) flush(o[i][j], omega[i * ld + j]);
      if (kDiagonal ? i == j || (kMetric && i < j) : kMetric) flush(g[i][j], metric[i * ld + j]);
    }
}

#define GTI_TWO_FORM_TILES(T)                                                                     \
  GTI_CLONES void diagonal_tile(const T* const* q, const T* const* p, int64_t n, bool metric,     \
                                Pair* o, Pair* g, int64_t ld) {                                   \
    metric ? tile<true, true, T>(q, p, q, p, n, o, g, ld)                                         \
           : tile<true, false, T>(q, p, q, p, n, o, g, ld);                                       \
  }                                                                                               \
  GTI_CLONES void off_diagonal_tile(const T* const* qi, const T* const* pi, const T* const* qj,   \
                                    const T* const* pj, int64_t n, bool metric, Pair* o, Pair* g, \
                                    int64_t ld) {                                                 \
    metric ? tile<false, true, T>(qi, pi, qj, pj, n, o, g, ld)                                    \
           : tile<false, false, T>(qi, pi, qj, pj, n, o, g, ld);                                  \
  }
GTI_TWO_FORM_TILES(double)
GTI_TWO_FORM_TILES(float)
GTI_TWO_FORM_TILES(bf16)
GTI_TWO_FORM_TILES(f16)
#undef GTI_TWO_FORM_TILES

// Adds columns [begin, end) of one item to omega and metric, [padded, padded].
template <class T>
void add_columns(const TwoFormItem& item, int64_t m, int64_t begin, int64_t end, bool metric,
                 Pair* o, Pair* g, int64_t padded) {
  static const T zeros[kMaxPanel] = {};
  const auto* dq = static_cast<const T*>(item.dq);
  const auto* dp = static_cast<const T*>(item.dp);
  const int64_t panel = std::clamp<int64_t>(
      kPanelBytes / (2 * m * static_cast<int64_t>(sizeof(T))) / kLanes * kLanes, 64, kMaxPanel);
  const int64_t tiles = padded / kTile;
  std::vector<const T*> q(padded), p(padded);
  for (int64_t at = begin; at < end; at += panel) {
    const int64_t n = std::min(panel, end - at);
    for (int64_t i = 0; i < padded; ++i) {  // rows that fill the last tile are zeros
      q[i] = i < m ? dq + i * item.count + at : zeros;
      p[i] = i < m ? dp + i * item.count + at : zeros;
    }
    for (int64_t ti = 0; ti < tiles; ++ti)
      for (int64_t tj = ti; tj < tiles; ++tj) {
        const int64_t i = ti * kTile, j = tj * kTile, corner = i * padded + j;
        if (ti == tj)
          diagonal_tile(&q[i], &p[i], n, metric, o + corner, g + corner, padded);
        else
          off_diagonal_tile(&q[i], &p[i], &q[j], &p[j], n, metric, o + corner, g + corner, padded);
      }
  }
}

}  // namespace

void two_form(const TwoFormItem* items, int64_t n_items, int64_t m, double* omega, double* bound,
              double* metric, int threads) {
  std::vector<int64_t> first(n_items + 1, 0);  // number of the first column of each item
  bool compensated = false;
  for (int64_t i = 0; i < n_items; ++i) {
    first[i + 1] = first[i] + items[i].count;
    compensated |= items[i].dtype == DType::f64;
  }
  const int64_t columns = first[n_items];
  const int64_t padded = (m + kTile - 1) / kTile * kTile;
  // Fewer segments for a large m, so that their sums stay small beside the inputs.
  const int64_t most = std::max<int64_t>(8, kMaxSegments * 16 / std::max<int64_t>(16, padded));
  const int64_t segments = std::clamp<int64_t>(columns / kSegment, 1, most);
  const int64_t area = padded * padded;
  std::vector<Pair> sums(2 * area * segments);

  const auto add_segment = [&](int64_t s) {
    Pair* o = sums.data() + 2 * area * s;
    const int64_t begin = columns / segments * s + std::min(s, columns % segments);
    const int64_t end = begin + columns / segments + (s < columns % segments);
    int64_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t at = begin; at < end; at = first[++i]) {
      const TwoFormItem& item = items[i];
      const int64_t stop = std::min(end, first[i + 1]);
      with_dtype(item.dtype, [&](auto* tag) {
        add_columns<std::remove_pointer_t<decltype(tag)>>(item, m, at - first[i], stop - first[i],
                                                          metric != nullptr, o, o + area, padded);
      });
    }
  };
  if (segments == 1) {
    add_segment(0);
  } else {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t s = 0; s < segments; ++s) add_segment(s);
  }
  for (int64_t s = 1; s < segments; ++s)
    for (int64_t e = 0; e < 2 * area; ++e) {
      const Pair& x = sums[2 * area * s + e];
      sums[e].add(x.value, x.error);
    }

  // With Σ|q_i p_j| + |p_i q_j| ≤ ‖z_i‖‖z_j‖ = size: a lane adds `depth` terms, each with a
  // rounding of u times at most the running sum of magnitudes; sums over lanes, panels and segments
  // keep their remainders. Compensated lanes leave depth² u² instead of depth·u.
  const double u = 0x1p-53;
  const double depth = 2.0 * (kMaxPanel / kLanes + 1) + 3;
  const auto diagonal = [&](int64_t i) {
    return sums[area + i * padded + i].value + sums[area + i * padded + i].error;
  };
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = i; j < m; ++j) {
      const Pair& o = sums[i * padded + j];
      const double size = std::sqrt(diagonal(i)) * std::sqrt(diagonal(j)) * (1 + 4 * depth * u);
      // 0 · NaN: a row with a NaN has no zero on the diagonal either.
      const double value =
          i == j ? (std::isnan(diagonal(i)) ? diagonal(i) : 0.0) : o.value + o.error;
      omega[i * m + j] = value;
      omega[j * m + i] = i == j ? value : -value;
      const double lanes = compensated ? 0.0 : depth * u * size;
      const double total = static_cast<double>(columns) + depth + 64;
      const double b = i == j ? value
                              : u * std::abs(value) + lanes + 8 * (total * u) * (total * u) * size +
                                    8 * total * std::numeric_limits<double>::denorm_min();
      bound[i * m + j] = bound[j * m + i] = b;
      if (metric) {
        const Pair& s = sums[area + i * padded + j];
        metric[i * m + j] = metric[j * m + i] = s.value + s.error;
      }
    }
}

}  // namespace gti
