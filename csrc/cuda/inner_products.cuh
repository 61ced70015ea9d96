// Inner products between rows, to full precision, Σ w x_i y_j: what two_form and gram share.
//
//   tile_sums   a warp takes a tile of TILE × TILE entries and the units of columns u, u + streams,
//               … of a stretch; a block adds its warps and writes a sum for every entry and stretch
//   finish      of each source: a warp adds the stretches of an entry and forms result and bound
//
// The cut into units and stretches follows from the sizes of the tensors alone and every sum has a
// fixed order: same inputs, same bits.
//
// Elements up to fp32: products of two are exact in fp64. They go through the fp64 tensor cores: a
// lane's 16 bytes of a row are its part of the operands of V instructions, without a way through
// shared memory, because the order of the columns in a sum is free. A warp of m <= 16 reads every
// element once: bound by the bandwidth of device memory; above, the operations on the tensor cores
// are the bound, and tiles of 32 whose warps share rows through L1. Sums of 512 columns are added
// in shared memory, so that no term passes through many additions.
//
// fp64 elements: a product's error comes from an fma, that of a sum from TwoSum (Dot2: Ogita, Rump,
// Oishi 2005). Lanes own columns. 17 operations a product: bound by fp64 arithmetic above m = 2.
//
// PAIRS: elements up to fp32 on devices with next to no fp64, whose products are summed in pairs of
// fp32 numbers. Lanes own columns; 16 fp32 operations a product, in place of one in fp64 at 1/64 of
// their rate.
//
// Macros: ELEMENT; TILE, rows of a tile: 4 (two halves of the columns in one instruction), 8, 16,
// 32, or for fp64 and PAIRS 2, 4; METRIC: x_i·x_j + y_i·y_j too; WEIGHTED; SYMMETRIC: y is x;
// PAIRS, not with WEIGHTED; THREADS. The registers limit 32 to fp32 without METRIC, and 4 for fp64
// to no METRIC.
#pragma once

#include "ragged.cuh"

constexpr bool kExact = ELEMENT == 0;
constexpr int kParts = kExact ? 2 : 1;  // numbers of a sum: high, low
constexpr int kForms = METRIC ? 2 : 1;  // Σ w x_i y_j; Σ x_i x_j + y_i y_j

#ifndef GTI_EMULATION
// c += a b for 8 × 8 numbers, of which a lane holds row lane/4 and columns 2·(lane%4) + {0, 1};
// a [8, 4], b [4, 8]: row (column) lane/4 and the column (row) lane%4 of it. Each product and sum
// is rounded as by an fma.
__device__ __forceinline__ void mma(double (&c)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(c[0]), "+d"(c[1])
               : "d"(a), "d"(b));
}
#endif

__device__ __forceinline__ double add_rn(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ float add_rn(float a, float b) { return __fadd_rn(a, b); }

// sum += x; what the rounding lost. Knuth's TwoSum, written so that nothing is contracted.
template <class T>
__device__ __forceinline__ T two_sum(T& sum, T x) {
  const T total = add_rn(sum, x), back = add_rn(total, -sum);
  const T lost = add_rn(add_rn(sum, -add_rn(total, -back)), add_rn(x, -back));
  sum = total;
  return lost;
}

__device__ __forceinline__ double add_lanes(double x) {
#pragma unroll
  for (int o = 16; o > 0; o /= 2) x += __shfl_xor_sync(kAll, x, o);
  return x;
}

// A sum and the part that its rounding lost.
struct Sum {
  double high = 0.0, low = 0.0;

  __device__ __forceinline__ void add(double x, double x_low) {
    const double lost = two_sum(high, x);
    low = __dadd_rn(__dadd_rn(low, x_low), lost);
  }
  __device__ __forceinline__ void add_product(double a, double b) {
    const double product = __dmul_rn(a, b);
    add(product, fma(a, b, -product));
  }
  // (a + a_low) b
  __device__ __forceinline__ void add_product(double a, double a_low, double b) {
    const double product = __dmul_rn(a, b);
    add(product, fma(a_low, b, fma(a, b, -product)));
  }
  // Over all lanes, in each of them.
  __device__ __forceinline__ void add_lanes() {
#pragma unroll
    for (int o = 16; o > 0; o /= 2) {
      const double x = __shfl_xor_sync(kAll, high, o), x_low = __shfl_xor_sync(kAll, low, o);
      add(x, x_low);
    }
  }
};

#if PAIRS
// A sum of products of fp32 numbers in a pair of them, which fp64 sums take in now and then.
//
// One product x = a b, u = 2^-24: it is p + e without error (barring underflow, which loses at most
// 2^-150). The pair S = s + l, |l| <= u|s|, and x give TwoSum(s, p) = s' + t exactly, then
// fl(l + e), wrong by u(|l| + |e|) <= u²(|S| + |x|), then fl(t + that), wrong by at most
// u(u|s'| + u(|S| + |x|)) <= 2u²(|S| + |x|), both but for factors 1 + O(u); TwoSum then makes a
// pair again. With |S| at most the sum of the |x| before, K products lose at most
// 3u²((K - 1) + 1) Σ|x| = 3K u² Σ|x|; the launcher's 3K + 6 has room for the factors and the norms.
struct PairSum {
  static constexpr int kProducts = 32;  // K
  float sum = 0.0f, rest = 0.0f;
  double high = 0.0;
  static constexpr double low = 0.0;

  __device__ __forceinline__ void add_product(float a, float b) {
    const float product = __fmul_rn(a, b), error = fmaf(a, b, -product);
    const float lost = two_sum(sum, product);
    rest = two_sum(sum, __fadd_rn(lost, __fadd_rn(rest, error)));
  }
  __device__ __forceinline__ void flush() {
    high += sum;
    high += rest;
    sum = rest = 0.0f;
  }
  __device__ __forceinline__ void add_lanes() {
    flush();
    high = ::add_lanes(high);
  }
};
#endif

// sum + |w| x², wx the rounded product. In this order: w x is in range where w x² need not be.
__device__ __forceinline__ double add_square(double x, double wx, double sum) {
  return fma(fabs(wx), fabs(x), sum);
}

// A problem of a batch, and the list of its tensors: rows of addresses of x [batch, m, count],
// y [batch, l, count] and w [count], of counts, and first units.
struct List {
  const int64* table;
  int64 items;
  int problem;
  int64 m, l;
  __device__ __forceinline__ const int64* starts() const { return table + 4 * items; }
};

// The columns of a tensor, and which unit of the list is its first.
struct Columns {
  const Element *x, *y, *w;
  int64 count, first, end;  // end: the first unit of the next tensor
  bool even;                // every row begins on a 16-byte boundary
};
__device__ __forceinline__ Columns columns_of(const List& list, int64 item) {
  const int64 *table = list.table, items = list.items;
  const int64 x = table[item], y = table[items + item], w = table[2 * items + item];
  const int64 count = table[3 * items + item];
  return {reinterpret_cast<const Element*>(x) + list.problem * list.m * count,
          reinterpret_cast<const Element*>(y) + list.problem * list.l * count,
          reinterpret_cast<const Element*>(w),
          count,
          list.starts()[item],
          list.starts()[item + 1],
          (x | y | w) % 16 == 0 && count % V == 0};
}

// What a warp knows of its tile: its first rows, of x and of y, and the last there are. Rows beyond
// are read from the last one; what they give is not written.
struct Place {
  int64 i, j, last_i, last_j;
};

// Kinds of tiles: G alone, with y = x on the diagonal (kSame) or not; on the diagonal with S, rows
// i and j being the same; all four rows. Sets of rows that are read: x_i, y_j, x_j, y_i.
enum Kind { kSame, kPlain, kDiagonal, kFull };
template <Kind kKind>
constexpr int kSetsOf = kKind == kSame   ? 1
                        : kKind == kFull ? 4
                                         : 2;

#if ELEMENT != 0 && !PAIRS

constexpr int R = TILE < 8 ? 1 : TILE / 8;  // instructions across a tile
constexpr int kFold = TILE < 8 ? 2 : 1;     // halves of the columns
constexpr int kSteps = R > 1 ? 1 : METRIC || WEIGHTED || (V == 8 && !SYMMETRIC) ? 2 : 4;
constexpr bool kOneTile = R == 1;
constexpr int kUnit = kSteps * kFold * 4 * V;  // columns
// On a multiprocessor at once, as registers allow.
constexpr bool kTight = METRIC || R > 1;  // for eight numbers at once
constexpr int kBlocks = (R == 1 || (R == 2 && !METRIC && !WEIGHTED)) && !(V == 8 && kTight) ? 2 : 1;
constexpr int kFlush = 512 * kFold / kUnit;                 // units
constexpr int kSlots = kForms * R * R * 2 * 32 + 2 * TILE;  // numbers of a warp in shared memory

// The sums of a warp over its units; `slots` are its own.
class Tile {
 public:
  __device__ __forceinline__ Tile(const Place& place, double* slots)
      : place_(place), lane_(threadIdx.x % 32), slots_(slots) {
#pragma unroll
    for (int a = 0; a < kForms * R * R * 2; ++a) slots_[a * 32 + lane_] = 0.0;
  }

  template <Kind kKind>
  __device__ __forceinline__ void run(const List& list, int64 item, int64 unit, int64 last,
                                      int streams) {
    constexpr int kSets = kSetsOf<kKind>;
    Columns at = columns_of(list, item);
    uint4 next[kSets][kSteps][R], next_weights[WEIGHTED ? kSteps : 1];
    const auto load = [&](int64 unit) {
      while (at.end <= unit) at = columns_of(list, ++item);
      const int64 column = (unit - at.first) * kUnit;
      if (at.even && column + kUnit <= at.count)
        read<kSets, true>(at, column, next, next_weights);
      else
        read<kSets, false>(at, column, next, next_weights);
    };
    if (unit < last) load(unit);
    int since = 0;
#pragma unroll 1
    for (; unit < last; unit += streams) {
      uint4 raw[kSets][kSteps][R], weights[WEIGHTED ? kSteps : 1];
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (int s = 0; s < kSets; ++s)
#pragma unroll
          for (int r = 0; r < R; ++r) raw[s][k][r] = next[s][k][r];
        if (WEIGHTED) weights[k] = next_weights[k];
      }
      if (unit + streams < last) load(unit + streams);  // while this one is multiplied
#pragma unroll
      for (int k = 0; k < kSteps; ++k) add<kKind>(raw, weights[WEIGHTED ? k : 0], k);
      if (++since == kFlush) {
        flush();
        since = 0;
      }
    }
    flush();
    // The squares of a row lie in the four lanes of a group, folded in two groups.
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        double x = squares_[s][r];
        x += __shfl_xor_sync(kAll, x, 1);
        x += __shfl_xor_sync(kAll, x, 2);
        if (kFold == 2) x += __shfl_xor_sync(kAll, x, 16);
        if (lane_ % 4 == 0 && lane_ / 4 < TILE)
          slots_[kSlots - 2 * TILE + s * TILE + r * 8 + lane_ / 4] = x;
      }
  }

  // Entry (i, j) of a form in the slots of a warp, which holds it `kFold` times.
  static __device__ __forceinline__ double entry(const double* slots, int form, int i, int j,
                                                 int fold, int) {
    i += fold * TILE;
    j += fold * TILE;
    const int a = (form * R + i / 8) * R + j / 8;
    return slots[(2 * a + j % 2) * 32 + i % 8 * 4 + j % 8 / 2];
  }

 private:
  template <int kSets, bool kWhole>
  __device__ __forceinline__ void read(const Columns& at, int64 column,
                                       uint4 (&to)[kSets][kSteps][R],
                                       uint4 (&weights)[WEIGHTED ? kSteps : 1]) const {
    const int group = lane_ / 4;
    column += group / (8 / kFold) * (4 * V) + lane_ % 4 * V;
    if (WEIGHTED) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const int64 here = column + k * (kFold * 4 * V);
        weights[k] = fetch<kWhole>(at.w + here, at.count - here, at.even);
      }
    }
#pragma unroll
    for (int s = 0; s < kSets; ++s)
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64 last = s % 3 == 0 ? place_.last_i : place_.last_j;
        int64 row = (s % 3 == 0 ? place_.i : place_.j) + r * 8 + group % (8 / kFold);
        row = row < last ? row : last;
        const Element* from = (s % 2 == 0 ? at.x : at.y) + row * at.count + column;
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          const int64 step = k * (kFold * 4 * V);
          to[s][k][r] = fetch<kWhole>(from + step, at.count - column - step, at.even);
        }
      }
  }

  template <Kind kKind, int kSets>
  __device__ __forceinline__ void add(const uint4 (&raw)[kSets][kSteps][R], const uint4& weights,
                                      int k) {
    constexpr int kOther = kKind == kSame ? 0 : 1;
#pragma unroll
    for (int e = 0; e < V; ++e) {
      double a[kSets][R], wx[R];
#pragma unroll
      for (int s = 0; s < kSets; ++s)
#pragma unroll
        for (int r = 0; r < R; ++r) a[s][r] = element(raw[s][k][r], e);
      const double w = WEIGHTED ? element(weights, e) : 1.0;
#pragma unroll
      for (int r = 0; r < R; ++r) wx[r] = WEIGHTED ? w * a[0][r] : a[0][r];
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int c = 0; c < R; ++c) {
          mma(sums_[0][r][c], wx[r], a[kOther][c]);
          if (kKind == kDiagonal || kKind == kFull) {
            mma(sums_[kForms - 1][r][c], a[0][r], a[kKind == kFull ? 2 : 0][c]);
            mma(sums_[kForms - 1][r][c], a[kKind == kFull ? 3 : 1][r], a[1][c]);
          }
        }
      if (kKind == kSame || place_.i == 0 || place_.j == 0) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const double y = a[kOther][r];
          squares_[0][r] = add_square(a[0][r], wx[r], squares_[0][r]);
          if (kKind != kSame) squares_[1][r] = add_square(y, WEIGHTED ? w * y : y, squares_[1][r]);
        }
      }
    }
  }

  __device__ __forceinline__ void flush() {
#pragma unroll
    for (int a = 0; a < kForms * R * R; ++a)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        double& sum = sums_[a / (R * R)][a / R % R][a % R][e];
        slots_[(2 * a + e) * 32 + lane_] += sum;
        sum = 0.0;
      }
  }

  Place place_;
  int lane_;
  double* slots_;
  double sums_[kForms][R][R][2] = {};
  double squares_[2][R] = {};
};

#else

constexpr int kFold = 1;
constexpr int kSteps = METRIC ? 1 : 2;
constexpr bool kOneTile = false;
constexpr int kBlocks = 1;
constexpr int kUnit = 32 * kSteps;                           // columns
constexpr int kSlots = kForms * TILE * TILE * 2 + 2 * TILE;  // numbers of a warp in shared memory

#if PAIRS
constexpr int kFlush = PairSum::kProducts / (kSteps * kForms);  // units
typedef PairSum LaneSum;
#else
typedef Sum LaneSum;
#endif

class Tile {
 public:
  __device__ __forceinline__ Tile(const Place& place, double* slots)
      : place_(place), lane_(threadIdx.x % 32), slots_(slots) {}

  template <Kind kKind>
  __device__ __forceinline__ void run(const List& list, int64 item, int64 unit, int64 last,
                                      int streams) {
    constexpr int kSets = kSetsOf<kKind>, kOther = kKind == kSame ? 0 : 1;
    Columns at = columns_of(list, item);
    [[maybe_unused]] int since = 0;
#pragma unroll 1
    for (; unit < last; unit += streams) {
      while (at.end <= unit) at = columns_of(list, ++item);
      C x[kSets][kSteps][TILE], weights[kSteps];
      if (WEIGHTED) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          const int64 column = (unit - at.first) * kUnit + k * 32 + lane_;
          weights[k] = column < at.count ? widen(at.w[column]) : C(0);
        }
      }
#pragma unroll
      for (int s = 0; s < kSets; ++s)
#pragma unroll
        for (int r = 0; r < TILE; ++r) {
          const int64 last_row = s % 3 == 0 ? place_.last_i : place_.last_j;
          int64 row = (s % 3 == 0 ? place_.i : place_.j) + r;
          row = row < last_row ? row : last_row;
          const Element* from = (s % 2 == 0 ? at.x : at.y) + row * at.count;
#pragma unroll
          for (int k = 0; k < kSteps; ++k) {
            const int64 column = (unit - at.first) * kUnit + k * 32 + lane_;
            x[s][k][r] = column < at.count ? widen(from[column]) : C(0);
          }
        }
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
#if WEIGHTED
        double wx[TILE], wx_low[TILE];
#pragma unroll
        for (int r = 0; r < TILE; ++r) {
          wx[r] = __dmul_rn(x[0][k][r], weights[k]);
          wx_low[r] = fma(x[0][k][r], weights[k], -wx[r]);
        }
#endif
#pragma unroll
        for (int r = 0; r < TILE; ++r)
#pragma unroll
          for (int c = 0; c < TILE; ++c) {
#if WEIGHTED
            sums_[0][r][c].add_product(wx[r], wx_low[r], x[kOther][k][c]);
#else
            sums_[0][r][c].add_product(x[0][k][r], x[kOther][k][c]);
#endif
            if (kKind == kDiagonal || kKind == kFull) {
              LaneSum& sum = sums_[kForms - 1][r][c];
              sum.add_product(x[0][k][r], x[kKind == kFull ? 2 : 0][k][c]);
              sum.add_product(x[kKind == kFull ? 3 : 1][k][r], x[1][k][c]);
            }
          }
        if (kKind == kSame || place_.i == 0 || place_.j == 0) {
#pragma unroll
          for (int r = 0; r < TILE; ++r) {
            add_square(0, r, x[0][k][r], weights[k]);
            if (kKind != kSame) add_square(1, r, x[kOther][k][r], weights[k]);
          }
        }
      }
#if PAIRS
      if (++since == kFlush) {
        since = 0;
#pragma unroll
        for (int a = 0; a < kForms * TILE * TILE; ++a)
          sums_[a / (TILE * TILE)][a / TILE % TILE][a % TILE].flush();
#pragma unroll
        for (int a = 0; a < 2 * TILE; ++a) squares_[a / TILE][a % TILE].flush();
      }
#endif
    }
#pragma unroll
    for (int a = 0; a < kForms * TILE * TILE; ++a) {
      LaneSum& sum = sums_[a / (TILE * TILE)][a / TILE % TILE][a % TILE];
      sum.add_lanes();
      if (lane_ == 0) {
        slots_[2 * a] = sum.high;
        slots_[2 * a + 1] = sum.low;
      }
    }
#pragma unroll
    for (int r = 0; r < TILE; ++r)
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#if PAIRS
        squares_[s][r].add_lanes();
        const double x = squares_[s][r].high;
#else
        const double x = add_lanes(squares_[s][r]);
#endif
        if (lane_ == 0) slots_[kSlots - 2 * TILE + s * TILE + r] = x;
      }
  }

  static __device__ __forceinline__ double entry(const double* slots, int form, int i, int j, int,
                                                 int part) {
    return slots[2 * ((form * TILE + i) * TILE + j) + part];
  }

 private:
  __device__ __forceinline__ void add_square(int side, int r, C x, C w) {
#if PAIRS
    squares_[side][r].add_product(x, x);
#else
    squares_[side][r] = ::add_square(x, WEIGHTED ? w * x : x, squares_[side][r]);
#endif
  }

  Place place_;
  int lane_;
  double* slots_;
  LaneSum sums_[kForms][TILE][TILE];
#if PAIRS
  PairSum squares_[2][TILE];
#else
  double squares_[2][TILE] = {};
#endif
};

#endif

// A block has split × split tiles next to each other, each with kWarps / split² streams; blocks
// follow each other by tile, then stretch, then problem. table: as in List. The stretches of this
// launch, `here` of them, are the numbers first, first + 1, … of all. Written:
//   sums [batch, forms, m, l, parts, stretches]; of S, and of G where y is x, above and on the
//   diagonal only
//   norms [batch, m + l, stretches]: Σ |w| x², Σ |w| y² (where y is x: [batch, m, stretches])
extern "C" __global__ void __launch_bounds__(THREADS, kBlocks)
    tile_sums(const int64* table, int64 items, int64 m, int64 l, int64 split, int64 units,
              int64 stretch, int64 here, int64 first, int64 stretches, double* sums,
              double* norms) {
  double* slots = reinterpret_cast<double*>(shared_memory());
  const int64 span = split * TILE, across = (l + span - 1) / span;  // blocks
  const int64 pairs = (m + span - 1) / span * across, pair = blockIdx.x % pairs;
  const int64 place = blockIdx.x / pairs % here;
  const int problem = static_cast<int>(blockIdx.x / pairs / here);
  const int squared = static_cast<int>(split * split), streams = kWarps / squared;
  const int warp = threadIdx.x / 32, sub = warp % squared, stream = warp / squared;
  // In tiles; of a TILE below 16 the launcher makes one.
  const int64 block_i = kOneTile ? 0 : pair / across * split;
  const int64 block_j = kOneTile ? 0 : pair % across * split;
  if (SYMMETRIC && block_i > block_j) return;
  const int64 i = kOneTile ? 0 : (block_i + sub / split) * TILE;
  const int64 j = kOneTile ? 0 : (block_j + sub % split) * TILE;
  const Place tile = {i, j, m - 1, l - 1};
  const List list = {table, items, problem, m, l};
  const int64 begin = place * stretch;
  const int64 end = begin + stretch < units ? begin + stretch : units;
  const int64 item = find_item(list.starts(), items, begin);
  if (i < m && j < l && !(SYMMETRIC && i > j)) {
    Tile work(tile, slots + warp * kSlots);
    const int64 unit = begin + stream;
    if constexpr (SYMMETRIC) {
      if (kOneTile || i == j)
        work.run<kSame>(list, item, unit, end, streams);
      else if constexpr (!kOneTile)
        work.run<kPlain>(list, item, unit, end, streams);
    } else if constexpr (!METRIC) {
      work.run<kPlain>(list, item, unit, end, streams);
    } else if (kOneTile || i == j) {
      work.run<kDiagonal>(list, item, unit, end, streams);
    } else if constexpr (!kOneTile) {
      if (i < j)
        work.run<kFull>(list, item, unit, end, streams);
      else
        work.run<kPlain>(list, item, unit, end, streams);
    }
  }
  __syncthreads();
  const int64 at = first + place;
  for (int t = threadIdx.x; t < squared * kForms * TILE * TILE; t += THREADS) {
    const int c = t % TILE, r = t / TILE % TILE, form = t / (TILE * TILE) % kForms;
    const int which = t / (TILE * TILE * kForms);
    const int64 tile_i = (block_i + which / split) * TILE,
                tile_j = (block_j + which % split) * TILE;
    const int64 row = tile_i + r, column = tile_j + c;
    if (row >= m || column >= l) continue;
    if ((SYMMETRIC || form == 1) && tile_i > tile_j) continue;
    Sum sum;
    double plain = 0.0;
    for (int s = 0; s < streams; ++s) {
      const double* of = slots + (s * squared + which) * kSlots;
      if (kExact) {
        sum.add(Tile::entry(of, form, r, c, 0, 0), Tile::entry(of, form, r, c, 0, 1));
      } else {
        for (int fold = 0; fold < kFold; ++fold) plain += Tile::entry(of, form, r, c, fold, 0);
      }
    }
    double* to = sums + (((problem * kForms + form) * m + row) * l + column) * kParts * stretches;
    to[at] = kExact ? sum.high : plain;
    if (kExact) to[stretches + at] = sum.low;
  }
  // Squares of x are with the tiles of the first column (symmetric: of the diagonal), those of y
  // with the tiles of the first row.
  for (int t = threadIdx.x; t < split * 2 * TILE; t += THREADS) {
    const int r = t % TILE, of_y = t / TILE % 2, which = t / (2 * TILE);
    const int64 row = ((of_y ? block_j : block_i) + which) * TILE + r;
    if (row >= (of_y ? l : m)) continue;
    if (of_y ? SYMMETRIC || block_i != 0 : block_j != (SYMMETRIC ? block_i : 0)) continue;
    const int source = of_y ? which : which * split + (SYMMETRIC ? which : 0);
    double total = 0.0;
    for (int s = 0; s < streams; ++s)
      total += slots[(s * squared + source) * kSlots + kSlots - 2 * TILE + of_y * TILE + r];
    norms[(problem * (SYMMETRIC ? m : m + l) + (of_y ? m : 0) + row) * stretches + at] = total;
  }
}

// Σ over the stretches, by a warp.
__device__ __forceinline__ Sum total(const double* x, int64 stretches, int parts) {
  Sum sum;
#pragma unroll 4
  for (int64 s = threadIdx.x % 32; s < stretches; s += 32)
    sum.add(x[s], parts == 2 ? x[stretches + s] : 0.0);
  sum.add_lanes();
  return sum;
}

// √(Σ over the stretches) of squares, no less for those that underflowed.
__device__ __forceinline__ double norm(const double* x, int64 stretches, double underflow) {
  const Sum sum = total(x, stretches, 1);
  return sqrt(sum.high + sum.low + underflow);
}

// |value − exact| where the magnitudes of its terms add up to at most `size`.
__device__ __forceinline__ double error_bound(double value, double size, double factor,
                                              double underflow) {
  return 0x1p-53 * fabs(value) + factor * size + underflow;
}
