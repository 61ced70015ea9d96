// Inner products between rows, to full precision: what two_form and gram share.
//
// Columns are cut into segments, one for a thread at a time, and a segment into panels. The rows of
// a panel are widened to fp64 once, into a buffer that stays in cache, from as many items as fill
// it; every tile of 4 x 4 pairs reads them there, and fetches the memory of the next panel. The
// skew tiles on the diagonal are summed already while their rows are widened.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "simd.h"

namespace gti {
namespace {

constexpr int kTile = 4;
constexpr int kArea = kTile * kTile;
constexpr int kLanes = 8;
constexpr int64_t kDepth = 2048;  // columns that a lane's sum sees at most, over kLanes
constexpr int64_t kPanelBytes = 24 * 1024, kLargePanelBytes = 256 * 1024;  // of all rows in fp64
constexpr int64_t kMinPanel = 64, kMaxPanel = 128;                         // columns
constexpr int64_t kMaxSegments = 64;
constexpr int64_t kSegment = 16384;  // columns at least
constexpr int64_t kCacheLine = 64;

// Running sums of each of kLanes lanes, in memory; Part: those of N lanes, in registers. Products
// of elements up to fp32 are exact in fp64, so a plain sum has one rounding a term; for fp64
// elements the product's and the sum's roundings are kept beside it (Dot2 of Ogita, Rump and Oishi
// 2005).
struct Plain {
  double sum[kLanes] = {};

  template <int N>
  struct Part {
    Vec<double, N> sum;
    GTI_INLINE void read(const Plain& from, int at) { sum = load<N>(from.sum + at); }
    GTI_INLINE void write(Plain& to, int at) const { store(to.sum + at, sum); }
    GTI_INLINE void add(const Vec<double, N>& a, const Vec<double, N>& b) { sum += a * b; }
    GTI_INLINE void subtract(const Vec<double, N>& a, const Vec<double, N>& b) { sum -= a * b; }
  };
};
struct Compensated {
  double sum[kLanes] = {}, error[kLanes] = {};

  template <int N>
  struct Part {
    Vec<double, N> sum, error;
    GTI_INLINE void read(const Compensated& from, int at) {
      sum = load<N>(from.sum + at);
      error = load<N>(from.error + at);
    }
    GTI_INLINE void write(Compensated& to, int at) const {
      store(to.sum + at, sum);
      store(to.error + at, error);
    }
    GTI_INLINE void add(const Vec<double, N>& a, const Vec<double, N>& b) {
      Vec<double, N> product = a * b, low;
      asm("" : "+m"(product));  // rounded: not to be fused into the sum below
      for (int l = 0; l < N; ++l) low[l] = __builtin_fma(a[l], b[l], -product[l]);
      const Vec<double, N> total = sum + product, back = total - sum;
      error += ((sum - (total - back)) + (product - back)) + low;
      sum = total;
    }
    GTI_INLINE void subtract(const Vec<double, N>& a, const Vec<double, N>& b) { add(-a, b); }
  };
};

// The sum of many lanes: value + error, without rounding of the value.
struct Pair {
  double value = 0.0, error = 0.0;
  GTI_INLINE void add(double x, double e) {
    const double total = value + x, back = total - value;
    error += ((value - (total - back)) + (x - back)) + e;
    value = total;
  }
  double rounded() const { return value + error; }
};
inline double sum_of_lanes(const double* lanes) {
  Vec<double, 2> parts[kLanes / 2];
  std::memcpy(parts, lanes, sizeof(parts));
  return lane_sum<double, 2, kLanes / 2>(parts);
}
inline void flush(Plain& s, Pair& out) {
  out.add(sum_of_lanes(s.sum), 0.0);
  s = {};
}
inline void flush(Compensated& s, Pair& out) {
  for (int l = 0; l < kLanes; ++l) out.add(s.sum[l], s.error[l]);
  s = {};
}

// What is summed for a pair of rows: x_i·y_j − y_i·x_j, x_i·x_j + y_i·y_j, or x_i·y_j.
enum class Form { skew, metric, gram };

// Rows of x and of y in a panel, `stride` numbers apart, from the first of a tile on.
struct Rows {
  const double *xi, *yi, *xj, *yj;
  int64_t stride;
};
// Cache lines to fetch during a tile, `each` of them with every step, `shift` bytes on.
struct Ahead {
  const char* const* lines = nullptr;
  int64_t each = 0, shift = 0;
};

// Where a skew tile lies on the diagonal, only six pairs i < j are summed, and their sums would
// wait for each other: with registers to spare the two terms have sums of their own, the second
// one's in place of (j, i).
template <int B>
constexpr bool kTwoSums = B == 64;

// Adds n columns, a multiple of kLanes, to the sums of 4 x 4 pairs. kUpper: a tile on the diagonal,
// where both sides are the same rows, and only pairs of i < j (skew) or i <= j are summed. A sweep
// over the columns takes the lanes from `lane` on and the rows j from kFirst on, kWidth of them:
// what fits in the registers of a level.
template <int B, Form kForm, bool kUpper, int kFirst, int kWidth, class Sum>
GTI_INLINE void tile_sweep(const Rows& r, int64_t n, int lane, const Ahead& ahead, Sum* sums) {
  constexpr int N = B / 8;
  using V = Vec<double, N>;
  constexpr bool kGram = kForm == Form::gram, kSkew = kForm == Form::skew;
  constexpr bool kTwo = kUpper && kSkew && kTwoSums<B>, kSame = kUpper && !kGram && kWidth == kTile;
  constexpr auto counts = [](int i, int j) { return !kUpper || (kSkew ? i < j : i <= j); };
  typename Sum::template Part<N> s[kTile][kWidth], second[kTile][kWidth];
#pragma GCC unroll 4
  for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kWidth; ++j) {
      if (!counts(i, kFirst + j)) continue;
      s[i][j].read(sums[i * kTile + kFirst + j], lane);
      if (kTwo) second[i][j].read(sums[(kFirst + j) * kTile + i], lane);
    }
  // Each sweep asks for its share of the memory.
  constexpr int kSweeps = kTile / kWidth * (kLanes / N);
  const int64_t sweep = (lane * kTile / N + kFirst) / kWidth;
  const int64_t from = ahead.each * sweep / kSweeps, to = ahead.each * (sweep + 1) / kSweeps;
  const char* const* line = ahead.lines;
  for (int64_t c = lane; c < n; c += kLanes, line += ahead.each) {
    for (int64_t k = from; k < to; ++k) __builtin_prefetch(line[k] + ahead.shift);
    V u[kWidth], v[kWidth];
#pragma GCC unroll 4
    for (int j = 0; j < kWidth; ++j) {
      v[j] = load<N>(r.yj + (kFirst + j) * r.stride + c);
      if (!kGram) u[j] = load<N>(r.xj + (kFirst + j) * r.stride + c);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kTile; ++i) {
      if (!counts(i, kFirst + kWidth - 1)) continue;
      V x = kSame ? u[i % kWidth] : load<N>(r.xi + i * r.stride + c);
      V y = kSame ? v[i % kWidth] : kGram ? x : load<N>(r.yi + i * r.stride + c);
      if constexpr (B < 64) {
        GTI_KEEP(x);
        if (!kGram) GTI_KEEP(y);
      }
#pragma GCC unroll 4
      for (int j = 0; j < kWidth; ++j) {
        if (!counts(i, kFirst + j)) continue;
        s[i][j].add(x, kForm == Form::metric ? u[j] : v[j]);
        if (kForm == Form::metric) s[i][j].add(y, v[j]);
        if (kTwo)
          second[i][j].add(y, u[j]);
        else if (kSkew)
          s[i][j].subtract(y, u[j]);
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kWidth; ++j) {
      if (!counts(i, kFirst + j)) continue;
      s[i][j].write(sums[i * kTile + kFirst + j], lane);
      if (kTwo) second[i][j].write(sums[(kFirst + j) * kTile + i], lane);
    }
}
template <int B, Form kForm, bool kUpper, class Sum>
GTI_INLINE void tile(const Rows& rows, int64_t n, Ahead ahead, Sum* sums) {
  constexpr int kWidth = B == 64 ? 4 : std::is_same_v<Sum, Compensated> ? 1 : kUpper ? 4 : 2;
  const Rows r = rows;
  for (int lane = 0; lane < kLanes; lane += B / 8) {
    tile_sweep<B, kForm, kUpper, 0, kWidth>(r, n, lane, ahead, sums);
    if constexpr (kWidth == 1) tile_sweep<B, kForm, kUpper, 1, 1>(r, n, lane, ahead, sums);
    if constexpr (kWidth <= 2) tile_sweep<B, kForm, kUpper, 2, kWidth>(r, n, lane, ahead, sums);
    if constexpr (kWidth == 1) tile_sweep<B, kForm, kUpper, 3, 1>(r, n, lane, ahead, sums);
  }
}

#define GTI_TILE(form, Sum)                                                                 \
  GTI_LEVELS(void, form##_tile, (const Rows& r, int64_t n, Ahead ahead, Sum* sums),         \
             tile<B, Form::form, false>(r, n, ahead, sums);)                                \
  GTI_LEVELS(void, upper_##form##_tile, (const Rows& r, int64_t n, Ahead ahead, Sum* sums), \
             tile<B, Form::form, true>(r, n, ahead, sums);)
GTI_TILE(skew, Plain)
GTI_TILE(metric, Plain)
GTI_TILE(gram, Plain)
GTI_TILE(skew, Compensated)
GTI_TILE(metric, Compensated)
GTI_TILE(gram, Compensated)
#undef GTI_TILE

// The skew tile on the diagonal while its rows are widened: x_rows and y_rows [4, n], `count`
// apart; squares += Σ_c x² + y² of each row, lane by lane. kKeep: the rows in fp64 go to wide_x and
// wide_y. Else nobody reads them again, and the memory is fetched that comes next in each row.
template <int B, bool kKeep, class T>
GTI_INLINE void early_tile(const T* x_rows, const T* y_rows, int64_t count, int64_t n,
                           double* wide_x, double* wide_y, int64_t stride, Plain* sums,
                           double* squares) {
  constexpr int N = B / 8;
  using V = Vec<double, N>;
  constexpr auto counts = [](int e) {
    const int i = e / kTile, j = e % kTile;
    return kTwoSums<B> ? i != j : i < j;
  };
  for (int lane = 0; lane < kLanes; lane += N) {
    V square[kTile];
    for (int i = 0; i < kTile; ++i) square[i] = load<N>(squares + i * kLanes + lane);
    Plain::Part<N> s[kArea];
#pragma GCC unroll 16
    for (int e = 0; e < kArea; ++e)
      if (counts(e)) s[e].read(sums[e], lane);
    for (int64_t c = lane; c < n; c += kLanes) {
      V x[kTile], y[kTile];
#pragma GCC unroll 4
      for (int i = 0; i < kTile; ++i) {
        const T *x_at = x_rows + i * count + c, *y_at = y_rows + i * count + c;
        x[i] = widen<N>(load<N>(x_at));
        y[i] = widen<N>(load<N>(y_at));
        if (!kKeep && lane == 0) {
          fetch_ahead(x_at);
          fetch_ahead(y_at);
        }
        if (kKeep) {
          store(wide_x + i * stride + c, x[i]);
          store(wide_y + i * stride + c, y[i]);
        }
        square[i] += x[i] * x[i];
        square[i] += y[i] * y[i];
      }
#pragma GCC unroll 4
      for (int j = 1; j < kTile; ++j)
#pragma GCC unroll 4
        for (int i = 0; i < j; ++i) {
          s[i * kTile + j].add(x[i], y[j]);
          if (kTwoSums<B>)
            s[j * kTile + i].add(y[i], x[j]);
          else
            s[i * kTile + j].subtract(y[i], x[j]);
        }
    }
#pragma GCC unroll 16
    for (int e = 0; e < kArea; ++e)
      if (counts(e)) s[e].write(sums[e], lane);
    for (int i = 0; i < kTile; ++i) store(squares + i * kLanes + lane, square[i]);
  }
}

#define GTI_EARLY_TILE(T)                                                                       \
  GTI_LEVELS(void, early_skew_tile,                                                             \
             (const T* x, const T* y, int64_t count, int64_t n, double* wide_x, double* wide_y, \
              int64_t stride, Plain* sums, double* squares),                                    \
             wide_x != nullptr                                                                  \
                 ? early_tile<B, true>(x, y, count, n, wide_x, wide_y, stride, sums, squares)   \
                 : early_tile<B, false>(x, y, count, n, wide_x, wide_y, stride, sums, squares);)
GTI_EARLY_TILE(float)
GTI_EARLY_TILE(bf16)
GTI_EARLY_TILE(f16)
#undef GTI_EARLY_TILE

template <class Sum>
void add_tile(Form form, bool upper, const Rows& r, int64_t n, Ahead ahead, Sum* sums) {
  using Tile = void(const Rows&, int64_t, Ahead, Sum*);
  Tile* const tiles[3][2] = {
      {skew_tile, upper_skew_tile}, {metric_tile, upper_metric_tile}, {gram_tile, upper_gram_tile}};
  tiles[static_cast<int>(form)][upper](r, n, ahead, sums);
}

// to[c] = x[c] in fp64, and squares += Σ_c x[c]², lane by lane.
template <int B, class T>
GTI_INLINE void widen_row(const T* x, int64_t n, double* to, double* squares) {
  constexpr int N = B / 8, P = kLanes / N;
  using V = Vec<double, N>;
  V sum[P], other[P] = {};
  for (int h = 0; h < P; ++h) sum[h] = load<N>(squares + h * N);
  const auto step = [&](const T* from, double* to, V(&sum)[P]) GTI_INLINE_LAMBDA {
    for (int h = 0; h < P; ++h) {
      const V v = widen<N>(load<N>(from + h * N));
      store(to + h * N, v);
      sum[h] += v * v;
    }
  };
  int64_t c = 0;
  for (; c + 2 * kLanes <= n; c += 2 * kLanes) {
    step(x + c, to + c, sum);
    step(x + c + kLanes, to + c + kLanes, other);
  }
  for (; c < n; c += kLanes) {
    T last[kLanes] = {};
    double wide_last[kLanes];
    const int64_t rest = std::min<int64_t>(n - c, kLanes);
    std::memcpy(last, x + c, rest * sizeof(T));
    step(last, wide_last, sum);
    std::memcpy(to + c, wide_last, rest * sizeof(double));
  }
  for (int h = 0; h < P; ++h) store(squares + h * N, sum[h] + other[h]);
}

// x: [rows, n], rows `count` apart.
#define GTI_WIDEN(T)                                                                          \
  GTI_LEVELS(void, widen_rows,                                                                \
             (const T* x, int64_t count, int64_t rows, int64_t n, double* to, int64_t stride, \
              double* squares),                                                               \
             for (int64_t r = 0; r < rows; ++r)                                               \
                 widen_row<B>(x + r * count, n, to + r * stride, squares + r * kLanes);)
GTI_WIDEN(double)
GTI_WIDEN(float)
GTI_WIDEN(bf16)
GTI_WIDEN(f16)
#undef GTI_WIDEN

// Weighted rows of a panel: x ← w x, low = what the rounding of w x lost, squares += Σ |w| x².
// low = nullptr: the rows stay as they are.
template <int B>
GTI_INLINE void weigh_row(double* x, double* low, const double* w, int64_t n, double* squares) {
  constexpr int N = B / 8;
  using V = Vec<double, N>;
  for (int lane = 0; lane < kLanes; lane += N) {
    V sum = load<N>(squares + lane);
    for (int64_t c = lane; c < n; c += kLanes) {
      const V weight = load<N>(w + c), v = load<N>(x + c);
      V product = weight * v, rest;
      asm("" : "+m"(product));  // rounded
      sum += abs<N>(product * v);
      if (low == nullptr) continue;
      for (int l = 0; l < N; ++l) rest[l] = __builtin_fma(weight[l], v[l], -product[l]);
      store(x + c, product);
      store(low + c, rest);
    }
    store(squares + lane, sum);
  }
}
GTI_LEVELS(void, weigh_rows,
           (double* x, double* low, const double* w, int64_t rows, int64_t n, int64_t stride,
            double* squares),
           for (int64_t r = 0; r < rows; ++r)
               weigh_row<B>(x + r * stride, low ? low + r * stride : nullptr, w, n,
                            squares + r * kLanes);)

// The part of x_i·y_j that the rounding of w x lost.
template <int B>
GTI_INLINE void add_low(const double* low, const double* y, int64_t n, Compensated& sum) {
  constexpr int N = B / 8;
  for (int lane = 0; lane < kLanes; lane += N) {
    Vec<double, N> error = load<N>(sum.error + lane);
    for (int64_t c = lane; c < n; c += kLanes) error += load<N>(low + c) * load<N>(y + c);
    store(sum.error + lane, error);
  }
}
GTI_LEVELS(void, add_low_tile,
           (const double* low, const double* y, int64_t stride, int64_t n, Compensated* sums),
           for (int e = 0; e < kArea; ++e)
               add_low<B>(low + e / kTile * stride, y + e % kTile * stride, n, sums[e]);)

// Columns of the two sets of rows: x [rows of x, count], y [rows of y, count], weight [count].
struct Item {
  DType dtype;
  int64_t count;
  const void *x, *y;
  DType weight_dtype = DType::f64;
  const void* weight = nullptr;
};

int64_t padded(int64_t rows) { return (rows + kTile - 1) / kTile * kTile; }

// All inner products of one problem.
class InnerProducts {
 public:
  // upper: only pairs i <= j. forms: one or two of skew, metric; or gram alone. y = nullptr in
  // every item: y is x (gram). weighted: x is multiplied by the weights, which every item has.
  InnerProducts(const Item* items, int64_t n_items, int64_t rows_of_x, int64_t rows_of_y,
                std::span<const Form> forms, bool upper, bool weighted)
      : items_(items),
        x_(rows_of_x),
        y_(rows_of_y),
        tiles_of_y_(padded(rows_of_y) / kTile),
        n_forms_(static_cast<int64_t>(forms.size())),
        upper_(upper),
        weighted_(weighted),
        first_(n_items + 1, 0) {
    std::copy(forms.begin(), forms.end(), forms_);
    for (int64_t i = 0; i < n_items; ++i) {
      first_[i + 1] = first_[i] + items[i].count;
      compensated_ |= items[i].dtype == DType::f64;
      compensated_ |= weighted && items[i].weight_dtype == DType::f64;
    }
    const int64_t tiles = padded(x_) / kTile;
    tiles_ = upper_ ? tiles * (tiles + 1) / 2 : tiles * tiles_of_y_;
    // Fewer segments for many rows, so that their sums stay small beside the inputs.
    const int64_t rows = std::max<int64_t>(16, std::max(padded(x_), padded(y_)));
    const int64_t most = std::max<int64_t>(8, kMaxSegments * 16 / rows);
    segments_ = std::clamp<int64_t>(columns() / kSegment, 1, most);
  }

  int64_t columns() const { return first_.back(); }
  int64_t segments() const { return segments_; }

  void run(int threads) {
    sums_.assign(segments_ * pairs(), {});
    squares_.assign(segments_ * (x_ + y_), 0.0);
    if (segments_ == 1) {
      add_segment(0);
    } else {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
      for (int64_t s = 0; s < segments_; ++s) add_segment(s);
    }
    for (int64_t s = 1; s < segments_; ++s) {
      for (int64_t e = 0; e < pairs(); ++e) {
        const Pair& x = sums_[s * pairs() + e];
        sums_[e].add(x.value, x.error);
      }
      for (int64_t r = 0; r < x_ + y_; ++r) squares_[r] += squares_[s * (x_ + y_) + r];
    }
  }

  // Of the f-th form; upper: i <= j.
  double sum(int64_t f, int64_t i, int64_t j) const {
    const int64_t at = (f * tiles_ + tile_at(i / kTile, j / kTile)) * kArea;
    Pair sum = sums_[at + i % kTile * kTile + j % kTile];
    if (forms_[f] == Form::skew && i / kTile == j / kTile) {
      const Pair& second = sums_[at + j % kTile * kTile + i % kTile];
      sum.add(-second.value, -second.error);
    }
    return sum.rounded();
  }
  // Σ |w| x_i² and Σ |w| y_j², and at least the squares that vanished.
  double square_of_x(int64_t i) const { return squares_[i]; }
  double square_of_y(int64_t j) const { return squares_[x_ + j]; }

  // |sum(f, i, j) − exact|, where size is at least the sum of the magnitudes of its terms. A lane
  // adds at most `depth` terms, each with a rounding of u times at most the running sum; sums of
  // lanes, panels and segments keep their remainders. In compensated sums these are left: chains of
  // at most `depth` + `flushes` remainders leave (chain · u)² of the size.
  double bound(double value, double size) const {
    const double u = 0x1p-53, n = static_cast<double>(columns());
    const double depth = 2.0 * (kDepth / kLanes + 1) + 3;
    const double flushes = n / (kDepth / 2 / kLanes) + kLanes + kMaxSegments;
    const double vanished = 8 * (n + kLanes) * std::numeric_limits<double>::denorm_min();
    size = (size + vanished) * (1 + 4 * (n + depth) * u);
    const double chain = (depth + flushes) * u;
    return u * std::abs(value) + (compensated_ ? 0.0 : depth * u * size) +
           8 * chain * chain * size + vanished;
  }
  // √(a b) of two sums of squares, no less for squares that vanished.
  double size(double a, double b) const {
    const double vanished =
        static_cast<double>(columns()) * std::numeric_limits<double>::denorm_min();
    return std::sqrt(a + vanished) * std::sqrt(b + vanished);
  }

 private:
  int64_t pairs() const { return n_forms_ * tiles_ * kArea; }
  int64_t tile_at(int64_t ti, int64_t tj) const {
    return upper_ ? ti * tiles_of_y_ - ti * (ti - 1) / 2 + tj - ti : ti * tiles_of_y_ + tj;
  }
  bool y_is_x() const { return items_[0].y == nullptr && !weighted_; }

  void add_segment(int64_t s) {
    if (compensated_)
      add_columns<Compensated>(s);
    else
      add_columns<Plain>(s);
  }

  template <class Sum>
  void add_columns(int64_t s) {
    const int64_t begin = columns() / segments_ * s + std::min(s, columns() % segments_);
    const int64_t end = begin + columns() / segments_ + (s < columns() % segments_);
    const int64_t px = padded(x_), py = padded(y_), rows = px + (y_is_x() ? 0 : py);
    // Columns of all rows that the first cache holds, or else, for many rows, the second.
    const auto fitting = [&](int64_t bytes) {
      return std::min(bytes / (rows * int64_t{sizeof(double)}) / kLanes * kLanes, kMaxPanel);
    };
    int64_t panel = fitting(kPanelBytes);
    if (panel < kMinPanel) panel = std::max(fitting(kLargePanelBytes), kMinPanel);
    panel = std::min(panel, (end - begin + kLanes - 1) / kLanes * kLanes);
    const int64_t stride = panel + kLanes;  // no power of two: rows would share cache sets
    const int64_t n_sums = n_forms_ * tiles_ * kArea;
    const int64_t low_rows = weighted_ ? px : 0;

    Buffer<double> memory((rows + low_rows + weighted_) * stride + 2 * (px + py) * kLanes +
                          n_sums * static_cast<int64_t>(sizeof(Sum) / sizeof(double)));
    Sum* sums = reinterpret_cast<Sum*>(memory.data());
    double* squares = memory.data() + n_sums * (sizeof(Sum) / sizeof(double));
    double* unweighted = weighted_ ? squares + (px + py) * kLanes : squares;
    double* x = squares + 2 * (px + py) * kLanes;
    double* y = y_is_x() ? x : x + px * stride;
    double* low = x + rows * stride;
    double* weight = low + low_rows * stride;

    // Cache lines of the first panel of item `listed`, and more of the last one.
    std::vector<const char*> lines;
    int64_t listed = -1, n_lines = 0;
    Pair* out = sums_.data() + s * pairs();
    int64_t since = 0;  // columns since the lanes' sums were last added up
    int64_t at = begin;
    int64_t i = std::upper_bound(first_.begin(), first_.end(), begin) - first_.begin() - 1;
    // The panel from `at` on, where one item holds all of it, to be fetched by `tiles` tiles.
    const auto next_panel = [&](int64_t tiles) -> Ahead {
      if (at >= end || first_[i + 1] - at < panel) return {};
      if (listed != i) {
        lines.clear();
        add_lines_of(items_[i], panel, lines);
        listed = i;
        n_lines = static_cast<int64_t>(lines.size());
        lines.resize(n_lines + n_forms_ * tiles_ * (panel / kLanes), lines.back());
      }
      const int64_t steps = tiles * (panel / kLanes);
      return {lines.data(), (n_lines + steps - 1) / steps, (at - first_[i]) * size_of(items_[i])};
    };
    while (at < end) {
      // Tiles on the diagonal that are summed while their rows are widened.
      const bool whole = std::min(end, first_[i + 1]) - at >= panel;
      const bool plain = std::is_same_v<Sum, Plain>;
      const int64_t early = plain && whole && forms_[0] == Form::skew ? x_ / kTile : 0;
      const int64_t late = n_forms_ * tiles_ - early;
      int64_t n = 0;
      for (; n < panel && at < end; i += at == first_[i + 1]) {
        const Item& item = items_[i];
        const int64_t offset = at - first_[i];
        const int64_t count = std::min({panel - n, end - at, first_[i + 1] - at});
        with_dtype(item.dtype, [&](auto* tag) {
          using T = std::remove_pointer_t<decltype(tag)>;
          const T* from = static_cast<const T*>(item.x) + offset;
          const T* from_y = static_cast<const T*>(item.y) + offset;
          if constexpr (std::is_same_v<Sum, Plain> && sizeof(T) < sizeof(double))
            for (int64_t t = 0; t < early; ++t) {
              const int64_t r = t * kTile, to = r * stride;
              early_skew_tile(from + r * item.count, from_y + r * item.count, item.count, count,
                              late > 0 ? x + to : nullptr, y + to, stride,
                              sums + tile_at(t, t) * kArea, squares + r * kLanes);
            }
          const auto widen = [&](const T* from, int64_t rows, double* to, double* squares) {
            const int64_t r = early * kTile;
            widen_rows(from + r * item.count, item.count, rows - r, count, to + r * stride + n,
                       stride, squares + r * kLanes);
          };
          widen(from, x_, x, unweighted);
          if (y != x) widen(item.y ? from_y : from, y_, y, unweighted + px * kLanes);
        });
        if (weighted_)
          with_dtype(item.weight_dtype, [&](auto* tag) {
            using T = std::remove_pointer_t<decltype(tag)>;
            const T* from = static_cast<const T*>(item.weight) + offset;
            double ignored[kLanes] = {};
            widen_rows(from, item.count, 1, count, weight + n, stride, ignored);
          });
        n += count;
        at += count;
      }
      for (; n % kLanes != 0; ++n) {
        for (int64_t r = 0; r < px; ++r) x[r * stride + n] = 0.0;
        for (int64_t r = 0; r < py; ++r) y[r * stride + n] = 0.0;
        if (weighted_) weight[n] = 0.0;
      }
      if (weighted_) {
        weigh_rows(x, low, weight, x_, n, stride, squares);
        weigh_rows(y, nullptr, weight, y_, n, stride, squares + px * kLanes);
      }
      if (late > 0) add_panel(x, y, low, stride, n, next_panel(late), early, sums);
      since += n;
      if (since + panel > kDepth || at >= end) {
        for (int64_t e = 0; e < n_sums; ++e) flush(sums[e], out[e]);
        since = 0;
      }
    }
    for (int64_t r = 0; r < x_ + y_; ++r) {
      const int64_t from = r < x_ || y == x ? r % x_ : px + r - x_;
      squares_[s * (x_ + y_) + r] = sum_of_lanes(squares + from * kLanes);
    }
  }

  // early: tiles on the diagonal, of the first form, that have been summed before.
  template <class Sum>
  void add_panel(const double* x, const double* y, const double* low, int64_t stride, int64_t n,
                 Ahead ahead, int64_t early, Sum* sums) const {
    const int64_t tiles = padded(x_) / kTile, height = kTile * stride;
    for (int64_t f = 0; f < n_forms_; ++f)
      for (int64_t ti = 0; ti < tiles; ++ti)
        for (int64_t tj = upper_ ? ti : 0; tj < tiles_of_y_; ++tj, sums += kArea) {
          if (f == 0 && ti == tj && ti < early) continue;
          const Rows r{x + ti * height, y + ti * height, x + tj * height, y + tj * height, stride};
          add_tile(forms_[f], upper_ && ti == tj, r, n, ahead, sums);
          ahead.lines += ahead.each * (n / kLanes);
          if constexpr (std::is_same_v<Sum, Compensated>)
            if (weighted_) add_low_tile(low + ti * height, r.yj, stride, n, sums);
        }
  }

  static int64_t size_of(const Item& item) {
    return item.dtype == DType::f64 ? 8 : item.dtype == DType::f32 ? 4 : 2;
  }
  // The cache lines of the first n columns of an item.
  void add_lines_of(const Item& item, int64_t n, std::vector<const char*>& lines) const {
    for (const auto& [start, rows] : {std::pair(item.x, x_), std::pair(item.y, y_)})
      for (int64_t r = 0; start != nullptr && r < rows; ++r) {
        // A row's first line comes with the panel before.
        const char* from = static_cast<const char*>(start) + r * item.count * size_of(item);
        for (int64_t b = kCacheLine - 1; b < n * size_of(item); b += kCacheLine)
          lines.push_back(from + b);
      }
  }

  const Item* items_;
  int64_t x_, y_, tiles_of_y_, tiles_ = 0, segments_ = 1;
  Form forms_[2] = {};
  int64_t n_forms_;
  bool upper_, weighted_, compensated_ = false;
  std::vector<int64_t> first_;   // number of the first column of each item
  std::vector<Pair> sums_;       // [segments, forms, tiles, kArea]
  std::vector<double> squares_;  // [segments, rows of x and y]
};

// f(b, threads) for every problem of a batch: large ones one after the other, small ones at once.
template <class F>
void for_each_problem(int64_t batch, int64_t columns, int threads, F&& f) {
  if (batch == 1 || columns >= 2 * kSegment) {
    for (int64_t b = 0; b < batch; ++b) f(b, threads);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t b = 0; b < batch; ++b) f(b, 1);
}

// The b-th of a batch of arrays of `size` numbers each.
inline const void* at_batch(const void* x, DType dtype, int64_t size, int64_t b) {
  const int64_t bytes = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
  return x == nullptr ? nullptr : static_cast<const char*>(x) + b * size * bytes;
}

}  // namespace
}  // namespace gti
