// The symplectic 2-form Ω = G − Gᵀ, G = DQ DPᵀ, of m tangent vectors, its error bound, and the
// metric S = DQ DQᵀ + DP DPᵀ from the same read. G holds every product of Ω once, and G − Gᵀ is
// skew to the bit.
//
//   tile_sums   a warp takes a tile of TILE × TILE entries and the units of columns u, u + streams,
//               … of a stretch; a block adds its warps and writes a sum for every entry and stretch
//   finish      a warp takes a pair (i, j): adds the stretches, forms Ω, its bound, S
//
// The cut into units and stretches follows from the sizes of the tensors alone and every sum has a
// fixed order: same inputs, same bits.
//
// Elements up to fp32: products are exact in fp64. They go through the fp64 tensor cores: a lane's
// 16 bytes of a row are its part of the operands of V instructions, without a way through shared
// memory, because the order of the columns in a sum is free. A warp of m <= 16 reads every element
// once: bound by the bandwidth of device memory, 2·m·N·sizeof(Element) bytes; above, 2·m²·N
// operations on the tensor cores are the bound, and tiles of 32 whose warps share rows through L1.
// Sums of 512 columns are added in shared memory, so that no term passes through many additions.
//
// fp64 elements: a product's error comes from an fma, that of a sum from TwoSum (Dot2: Ogita, Rump,
// Oishi 2005). Lanes own columns. 17 operations a product: bound by fp64 arithmetic above m = 2.
//
// Macros: ELEMENT; TILE, rows of a tile: 4 (two halves of the columns in one instruction), 8, 16,
// 32, or for fp64 2, 4; METRIC; THREADS. The registers limit 32 to fp32 without METRIC, and 4 for
// fp64 to no METRIC.

#include "ragged.cuh"

constexpr bool kExact = ELEMENT == 0;
constexpr int kParts = kExact ? 2 : 1;  // numbers of a sum: high, low
constexpr int kForms = METRIC ? 2 : 1;  // G, S

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

// A sum and the part that its rounding lost.
struct Sum {
  double high = 0.0, low = 0.0;

  // Knuth's TwoSum. Written so that nothing is contracted.
  __device__ __forceinline__ void add(double x, double x_low) {
    const double total = __dadd_rn(high, x), back = __dadd_rn(total, -high);
    const double lost = __dadd_rn(__dadd_rn(high, -__dadd_rn(total, -back)), __dadd_rn(x, -back));
    low = __dadd_rn(__dadd_rn(low, x_low), lost);
    high = total;
  }
  __device__ __forceinline__ void add_product(double a, double b) {
    const double product = __dmul_rn(a, b);
    add(product, fma(a, b, -product));
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

// The columns of a tensor [m, count], and which unit of the list is its first.
struct Columns {
  const Element *q, *p;
  int64 count, first, end;  // end: the first unit of the next tensor
  bool even;                // every row begins on a 16-byte boundary
};
__device__ __forceinline__ Columns columns_of(const int64* table, int64 items, int64 item) {
  const int64 q = table[item], p = table[items + item], count = table[2 * items + item];
  const int64* starts = table + 3 * items + item;
  return {reinterpret_cast<const Element*>(q),
          reinterpret_cast<const Element*>(p),
          count,
          starts[0],
          starts[1],
          (q | p) % 16 == 0 && count % V == 0};
}

// What a warp knows of its tile: where its rows are and which lie beyond the last, m − 1. Those
// are read from the last row; what they give is not written.
struct Place {
  int64 i, j, last;  // first rows of the tile, of DQ and of DP
};

// Kinds of tiles: G alone; on the diagonal with S, rows i and j being the same; all four rows.
enum Kind { kPlain, kDiagonal, kFull };

#if ELEMENT != 0

constexpr int R = TILE < 8 ? 1 : TILE / 8;  // instructions across a tile
constexpr int kFold = TILE < 8 ? 2 : 1;     // halves of the columns
constexpr int kSteps = R > 1 ? 1 : METRIC ? 2 : 4;
constexpr bool kOneTile = R == 1;
constexpr int kUnit = kSteps * kFold * 4 * V;                   // columns
constexpr int kBlocks = R == 1 || (R == 2 && !METRIC) ? 2 : 1;  // on a multiprocessor at once
constexpr int kFlush = 512 * kFold / kUnit;                     // units
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
  __device__ __forceinline__ void run(const int64* table, int64 items, int64 item, int64 unit,
                                      int64 last, int streams) {
    constexpr int kSets = kKind == kFull ? 4 : 2;  // of rows: q_i, p_j, q_j, p_i
    Columns at = columns_of(table, items, item);
    uint4 next[kSets][kSteps][R];
    const auto load = [&](int64 unit) {
      while (at.end <= unit) at = columns_of(table, items, ++item);
      const int64 column = (unit - at.first) * kUnit;
      if (at.even && column + kUnit <= at.count)
        read<kSets, true>(at, column, next);
      else
        read<kSets, false>(at, column, next);
    };
    if (unit < last) load(unit);
    int since = 0;
#pragma unroll 1
    for (; unit < last; unit += streams) {
      uint4 raw[kSets][kSteps][R];
#pragma unroll
      for (int s = 0; s < kSets; ++s)
#pragma unroll
        for (int k = 0; k < kSteps; ++k)
#pragma unroll
          for (int r = 0; r < R; ++r) raw[s][k][r] = next[s][k][r];
      if (unit + streams < last) load(unit + streams);  // while this one is multiplied
#pragma unroll
      for (int k = 0; k < kSteps; ++k) add<kKind>(raw, k);
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
                                       uint4 (&to)[kSets][kSteps][R]) const {
    const int group = lane_ / 4;
    column += group / (8 / kFold) * (4 * V) + lane_ % 4 * V;
#pragma unroll
    for (int s = 0; s < kSets; ++s)
#pragma unroll
      for (int r = 0; r < R; ++r) {
        int64 row = (s % 3 == 0 ? place_.i : place_.j) + r * 8 + group % (8 / kFold);
        row = row < place_.last ? row : place_.last;
        const Element* from = (s % 2 == 0 ? at.q : at.p) + row * at.count + column;
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          const int64 step = k * (kFold * 4 * V);
          to[s][k][r] = fetch<kWhole>(from + step, at.count - column - step, at.even);
        }
      }
  }

  template <Kind kKind, int kSets>
  __device__ __forceinline__ void add(const uint4 (&raw)[kSets][kSteps][R], int k) {
#pragma unroll
    for (int e = 0; e < V; ++e) {
      double a[kSets][R];
#pragma unroll
      for (int s = 0; s < kSets; ++s)
#pragma unroll
        for (int r = 0; r < R; ++r) a[s][r] = element(raw[s][k][r], e);
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int c = 0; c < R; ++c) {
          mma(sums_[0][r][c], a[0][r], a[1][c]);
          if (kKind != kPlain) {
            mma(sums_[kForms - 1][r][c], a[0][r], a[kKind == kFull ? 2 : 0][c]);
            mma(sums_[kForms - 1][r][c], a[kKind == kFull ? 3 : 1][r], a[1][c]);
          }
        }
      if (place_.i == place_.j) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          squares_[0][r] = fma(a[0][r], a[0][r], squares_[0][r]);
          squares_[1][r] = fma(a[1][r], a[1][r], squares_[1][r]);
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

class Tile {
 public:
  __device__ __forceinline__ Tile(const Place& place, double* slots)
      : place_(place), lane_(threadIdx.x % 32), slots_(slots) {}

  template <Kind kKind>
  __device__ __forceinline__ void run(const int64* table, int64 items, int64 item, int64 unit,
                                      int64 last, int streams) {
    constexpr int kSets = kKind == kFull ? 4 : 2;
    Columns at = columns_of(table, items, item);
#pragma unroll 1
    for (; unit < last; unit += streams) {
      while (at.end <= unit) at = columns_of(table, items, ++item);
      double x[kSets][kSteps][TILE];
#pragma unroll
      for (int s = 0; s < kSets; ++s)
#pragma unroll
        for (int r = 0; r < TILE; ++r) {
          int64 row = (s % 3 == 0 ? place_.i : place_.j) + r;
          row = row < place_.last ? row : place_.last;
          const Element* from = (s % 2 == 0 ? at.q : at.p) + row * at.count;
#pragma unroll
          for (int k = 0; k < kSteps; ++k) {
            const int64 column = (unit - at.first) * kUnit + k * 32 + lane_;
            x[s][k][r] = column < at.count ? from[column] : 0.0;
          }
        }
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (int r = 0; r < TILE; ++r)
#pragma unroll
          for (int c = 0; c < TILE; ++c) {
            sums_[0][r][c].add_product(x[0][k][r], x[1][k][c]);
            if (kKind != kPlain) {
              Sum& sum = sums_[kForms - 1][r][c];
              sum.add_product(x[0][k][r], x[kKind == kFull ? 2 : 0][k][c]);
              sum.add_product(x[kKind == kFull ? 3 : 1][k][r], x[1][k][c]);
            }
          }
#pragma unroll
        for (int r = 0; r < TILE; ++r) {
          squares_[0][r] = fma(x[0][k][r], x[0][k][r], squares_[0][r]);
          squares_[1][r] = fma(x[1][k][r], x[1][k][r], squares_[1][r]);
        }
      }
    }
#pragma unroll
    for (int a = 0; a < kForms * TILE * TILE; ++a) {
      Sum& sum = sums_[a / (TILE * TILE)][a / TILE % TILE][a % TILE];
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
        double x = squares_[s][r];
#pragma unroll
        for (int o = 16; o > 0; o /= 2) x += __shfl_xor_sync(kAll, x, o);
        if (lane_ == 0) slots_[kSlots - 2 * TILE + s * TILE + r] = x;
      }
  }

  static __device__ __forceinline__ double entry(const double* slots, int form, int i, int j, int,
                                                 int part) {
    return slots[2 * ((form * TILE + i) * TILE + j) + part];
  }

 private:
  Place place_;
  int lane_;
  double* slots_;
  Sum sums_[kForms][TILE][TILE];
  double squares_[2][TILE] = {};
};

#endif

// A block has split × split tiles next to each other, each with kWarps / split² streams. table
// [items] each: addresses of dq and of dp, both [m, N], and N; then [items + 1] first units. The
// stretches of this launch are the numbers first, first + 1, … of all. Written: sums
// [forms, m, m, parts, stretches], of S above and on the diagonal only; norms [2, m, stretches]:
// Σ dq², Σ dp².
extern "C" __global__ void __launch_bounds__(THREADS, kBlocks)
    tile_sums(const int64* table, int64 items, int64 m, int64 split, int64 units, int64 stretch,
              int64 first, int64 stretches, double* sums, double* norms) {
  double* slots = reinterpret_cast<double*>(shared_memory());
  const int64 across = (m + split * TILE - 1) / (split * TILE);  // blocks
  const int64 pair = blockIdx.x % (across * across), place = blockIdx.x / (across * across);
  const int squared = static_cast<int>(split * split), streams = kWarps / squared;
  const int warp = threadIdx.x / 32, sub = warp % squared, stream = warp / squared;
  const int64 block_i = pair / across * split, block_j = pair % across * split;  // in tiles
  const Place tile = {(block_i + sub / split) * TILE, (block_j + sub % split) * TILE, m - 1};
  const int64 begin = place * stretch;
  const int64 end = begin + stretch < units ? begin + stretch : units;
  const int64 item = find_item(table + 3 * items, items, begin);
  if (tile.i < m && tile.j < m) {
    Tile work(tile, slots + warp * kSlots);
    const int64 unit = begin + stream;
    if constexpr (!METRIC) {
      work.run<kPlain>(table, items, item, unit, end, streams);
    } else if (kOneTile || tile.i == tile.j) {
      work.run<kDiagonal>(table, items, item, unit, end, streams);
    } else if constexpr (!kOneTile) {
      if (tile.i < tile.j)
        work.run<kFull>(table, items, item, unit, end, streams);
      else
        work.run<kPlain>(table, items, item, unit, end, streams);
    }
  }
  __syncthreads();
  const int64 at = first + place;
  for (int t = threadIdx.x; t < squared * kForms * TILE * TILE; t += THREADS) {
    const int c = t % TILE, r = t / TILE % TILE, form = t / (TILE * TILE) % kForms;
    const int which = t / (TILE * TILE * kForms);
    const int64 tile_i = (block_i + which / split) * TILE,
                tile_j = (block_j + which % split) * TILE;
    const int64 i = tile_i + r, j = tile_j + c;
    if (i >= m || j >= m || (form == 1 && tile_i > tile_j)) continue;
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
    double* to = sums + ((form * m + i) * m + j) * kParts * stretches + at;
    to[0] = kExact ? sum.high : plain;
    if (kExact) to[stretches] = sum.low;
  }
  if (block_i != block_j) return;
  for (int t = threadIdx.x; t < split * 2 * TILE; t += THREADS) {
    const int r = t % TILE, form = t / TILE % 2, which = t / (2 * TILE);
    const int64 i = (block_i + which) * TILE + r;
    if (i >= m) continue;
    double total = 0.0;
    for (int s = 0; s < streams; ++s)
      total += slots[(s * squared + which * (split + 1) + 1) * kSlots - 2 * TILE + form * TILE + r];
    norms[(form * m + i) * stretches + at] = total;
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

// Block i, and a warp for each pair (i, j), j >= i: Ω_ij = G_ij − G_ji, its bound, S_ij (unless
// metric is null); all [m, m]. factor, underflow: of the bound, as the launcher explains.
extern "C" __global__ void __launch_bounds__(THREADS)
    finish(const double* sums, const double* norms, int64 m, int64 stretches, double factor,
           double underflow, double* omega, double* bound, double* metric) {
  const int64 i = blockIdx.x;
  const auto norm = [&](int64 row) {
    const Sum sum = total(norms + row * stretches, stretches, 1);
    return sqrt(sum.high + sum.low + underflow);  // not less for squares that underflowed
  };
  for (int64 j = i + threadIdx.x / 32; j < m; j += kWarps) {
    const int64 entry = kParts * stretches;
    Sum w = total(sums + (i * m + j) * entry, stretches, kParts);
    const Sum back = total(sums + (j * m + i) * entry, stretches, kParts);
    w.add(-back.high, -back.low);
    const double value = w.high + w.low;  // on the diagonal 0, or NaN
    const double size = norm(i) * norm(m + j) + norm(m + i) * norm(j);
    const double limit = 0x1p-53 * fabs(value) + factor * size + underflow;
    if (threadIdx.x % 32 == 0) {
      omega[i * m + j] = value;
      omega[j * m + i] = i == j ? value : -value;
      bound[i * m + j] = bound[j * m + i] = i == j ? value : limit;
    }
    if (metric) {
      const Sum s = total(sums + ((m + i) * m + j) * entry, stretches, kParts);
      if (threadIdx.x % 32 == 0) metric[i * m + j] = metric[j * m + i] = s.high + s.low;
    }
  }
}
