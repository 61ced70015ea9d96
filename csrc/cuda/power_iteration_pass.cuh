// One pass over W: y = W x and z = Wᵀ y, every row read once.
#pragma once

#include "power_iteration_team.cuh"

struct Measures {
  C row = 0, largest = 0, squares = 0;  // largest row sum and entry of |W|, Σ W²
  bool nan = false;
};

// Rows [first, first + count) to shared memory, np elements each, zero beyond n.
__device__ __forceinline__ void copy_rows(const Work& p, int64 first, int64 count, Element* to) {
  const int64 n = p.item.n;
  const Element* from = p.w + first * n;
  if (p.even) {
    const int chunks = static_cast<int>(count) * p.chunks;
    for (int c = threadIdx.x; c < chunks; c += THREADS) copy_async(to + c * V, from + c * V);
  } else {
    for (int r = threadIdx.x / 32; r < count; r += kWarps)
      for (int j = threadIdx.x % 32; j < p.np; j += 32)
        to[r * p.np + j] = j < n ? from[r * n + j] : Element(0);
  }
}

// Where the rows of a panel are.
enum Place { kShared, kGlobal, kGlobalUneven };

template <Place kPlace>
__device__ __forceinline__ void load_chunk(const Element* row, int chunk, int64 n, C (&w)[V]) {
  const int64 first = static_cast<int64>(chunk) * V;
  if (kPlace != kGlobalUneven) {
    widen(*reinterpret_cast<const uint4*>(row + first), w);
  } else {
#pragma unroll
    for (int e = 0; e < V; ++e) w[e] = first + e < n ? widen(row[first + e]) : C(0);
  }
}

// R rows for each group of threads, from w on, `stride` apart, of which `rows` in all exist:
// y = up · W x and z += Wᵀ (down · y). With kMeasure, |W| in place of W and 1 in place of y, and
// the sizes of up · down · W.
template <int R, Place kPlace, bool kMeasure>
__device__ __forceinline__ void multiply(const Work& p, const Element* w, int64 stride, int64 rows,
                                         int parity, C* y, Measures& measures) {
  const int chunks = p.chunks, positions = p.positions, place = threadIdx.x & (positions - 1),
            group = threadIdx.x / positions;
  const int64 n = kPlace == kGlobalUneven ? p.item.n : 0;
  const C down = p.down, up = p.up;
  const int here = rows < group * R       ? 0
                   : rows - group * R < R ? static_cast<int>(rows) - group * R
                                          : R;
  // Rows that are not there are read in the place of the first, and count for nothing.
  w += here > 0 ? group * R * stride : 0;
  const auto row = [&](int r) { return r < here ? w + r * stride : w; };
  C sum[R] = {};
  {
    // From the base, so that the compiler knows these for shared memory.
    const C* x_all = kPlace == kShared ? reinterpret_cast<C*>(shared_memory() + p.x_at) : p.x;
#pragma unroll 1
    for (int c = place; c < chunks; c += positions) {
      C x[V];
      if (!kMeasure) load(x_all + static_cast<int64>(c) * V, x);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        C a[V];
        load_chunk<kPlace>(row(r), c, n, a);
#pragma unroll
        for (int e = 0; e < V; ++e) {
          if (kMeasure) {
            const C size = magnitude(a[e]), scaled = size * down * up;
            sum[r] += size * down;
            measures.largest = larger(measures.largest, size);
            measures.squares += r < here ? scaled * scaled : C(0);
          } else {
            sum[r] += a[e] * x[e];
          }
        }
      }
    }
  }
  const int reach = positions < 32 ? positions : 32;
#pragma unroll 1
  for (int o = reach / 2; o > 0; o /= 2)
#pragma unroll
    for (int r = 0; r < R; ++r) sum[r] += __shfl_xor_sync(kAll, sum[r], o);
  if (positions > 32) {
    C(*parts)[8] = control()->warp_rows[parity];
    const int warp = threadIdx.x / 32, warps = positions / 32;
    if (threadIdx.x % 32 == 0)
#pragma unroll
      for (int r = 0; r < R; ++r) parts[warp][r] = sum[r];
    __syncthreads();
    parts += group * warps;
#pragma unroll
    for (int r = 0; r < R; ++r) sum[r] = parts[0][r];
#pragma unroll 1
    for (int other = 1; other < warps; ++other)
#pragma unroll
      for (int r = 0; r < R; ++r) sum[r] += parts[other][r];
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    sum[r] *= up;
    if (kMeasure) {
      measures.row = larger(measures.row, sum[r]);
      measures.nan |= sum[r] != sum[r];
      sum[r] = r < here ? down : C(0);
    } else {
      if (r < here && place == r % positions) y[group * R + r] = sum[r];
      sum[r] = r < here ? sum[r] * down : C(0);
    }
  }
  C* z_all = kPlace == kShared ? reinterpret_cast<C*>(shared_memory() + p.z_at) : p.z;
  C* z_group = z_all + group * p.np;
#pragma unroll 1
  for (int c = place; c < chunks; c += positions) {
    C z[V];
    load(z_group + static_cast<int64>(c) * V, z);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      C a[V];
      load_chunk<kPlace>(row(r), c, n, a);
#pragma unroll
      for (int e = 0; e < V; ++e) z[e] += sum[r] * (kMeasure ? magnitude(a[e]) : a[e]);
    }
    store(z_group + static_cast<int64>(c) * V, z);
  }
}

template <int R, bool kMeasure>
__device__ __forceinline__ void staged_pass(const Work& p, bool backwards, C* y,
                                            Measures& measures) {
  const int rows = p.groups * R, stages = static_cast<int>(p.item.stages);
  const int panels = static_cast<int>((p.rows + rows - 1) / rows);
  // Odd passes go backwards: what the last pass left in L2 comes first.
  const auto first = [&](int k) {
    return static_cast<int64>(backwards ? panels - 1 - k : k) * rows;
  };
  const auto count = [&](int k) { return p.rows - first(k) < rows ? p.rows - first(k) : rows; };
  const auto fetch = [&](int k, int stage) {
    if (k < panels) copy_rows(p, first(k), count(k), p.ring(stage * rows));
    commit_copies();
  };
  for (int k = 0; k < stages - 1; ++k) fetch(k, k);
  int stage = 0, next = stages - 1;
#pragma unroll 1
  for (int k = 0; k < panels; ++k) {
    if (stages == 4)
      wait_for_copies<2>();
    else if (stages == 3)
      wait_for_copies<1>();
    else
      wait_for_copies<0>();
    __syncthreads();  // panel k is there for all, and all are done with panel k − 1
    fetch(k + stages - 1, next);
    multiply<R, kShared, kMeasure>(p, p.ring(stage * rows), p.np, count(k), k % 2, y + first(k),
                                   measures);
    stage = stage + 1 == stages ? 0 : stage + 1;
    next = next + 1 == stages ? 0 : next + 1;
  }
}

// All panels of R rows a group that lie where they are read.
template <int R, Place kPlace, bool kMeasure>
__device__ __forceinline__ void direct_pass(const Work& p, const Element* w, int64 stride, C* y,
                                            Measures& measures) {
  const int rows = p.groups * R;
  int parity = 0;
#pragma unroll 1
  for (int64 first = 0; first < p.rows; first += rows, parity ^= 1)
    multiply<R, kPlace, kMeasure>(p, w + first * stride, stride, p.rows - first, parity, y + first,
                                  measures);
}

// y [rows] = W x; the block's share of z = Wᵀ y, which is readable after the next barrier.
template <bool kMeasure>
__device__ __forceinline__ void pass(const Work& p, bool backwards, C* y, Measures& measures) {
  const int positions = p.positions, place = threadIdx.x & (positions - 1),
            group = threadIdx.x / positions;
  const C zeros[V] = {};
#pragma unroll 1
  for (int c = place; c < p.chunks; c += positions)
    store(p.z + group * p.np + static_cast<int64>(c) * V, zeros);
  if (p.item.mode == kOnChip) {
    direct_pass<8, kShared, kMeasure>(p, p.ring(0), p.np, y, measures);
  } else if (p.item.mode == kWide) {
    if (p.even)
      direct_pass<4, kGlobal, kMeasure>(p, p.w, p.item.n, y, measures);
    else
      direct_pass<4, kGlobalUneven, kMeasure>(p, p.w, p.item.n, y, measures);
  } else if (p.item.rows == 8) {
    staged_pass<8, kMeasure>(p, backwards, y, measures);
  } else if (p.item.rows == 4) {
    staged_pass<4, kMeasure>(p, backwards, y, measures);
  } else if (p.item.rows == 2) {
    staged_pass<2, kMeasure>(p, backwards, y, measures);
  } else {
    staged_pass<1, kMeasure>(p, backwards, y, measures);
  }
  __syncthreads();
#pragma unroll 1
  for (int64 j = threadIdx.x; j < p.np; j += THREADS) {
    C sum = p.z[j];
    for (int g = 1; g < p.groups; ++g) sum += p.z[g * p.np + j];
    p.share[j] = sum * p.up;
  }
}

// The sum over the team of a share [np], in the block's slice, handed to use(j, sum), each column
// to one thread. All threads of the block call it.
template <class Use>
__device__ __forceinline__ void sum_shares(const Team& team, const Work& p, C* share,
                                           const Use& use) {
  // A slice is narrow where the team is large: several threads share a column then.
  int width = 8;
  while (width < THREADS && width < p.count) width *= 2;
  const int groups = THREADS / width, column = threadIdx.x & (width - 1),
            group = threadIdx.x / width;
  C* parts = control()->columns;
#pragma unroll 1
  for (int64 begin = 0; begin < p.count; begin += width) {
    const int64 j = begin + column;
    C sum = 0;
    if (j < p.count)
#pragma unroll 4
      for (int of = group; of < p.size; of += groups) sum += team.other(share, of)[p.first + j];
    if (groups > 1) {
      __syncthreads();
      parts[threadIdx.x] = sum;
      __syncthreads();
      if (group == 0)
        for (int g = 1; g < groups && g < p.size; ++g) sum += parts[g * width + column];
    }
    if (group == 0 && j < p.count) use(j, sum);
  }
}

// The norms of W, and a scale that keeps squares in the range of C. sweep(measures) looks at all of
// the block's rows and leaves their column sums of |W| in `columns`, [np]. Returns false where W
// holds a NaN or an infinity.
template <class Sweep>
__device__ __forceinline__ bool measure(Team& team, Work& p, C* columns, const Sweep& sweep) {
  for (bool again = false;; again = true) {
    Measures measures;
    sweep(measures);
    double most[3] = {measures.row, measures.largest, measures.nan ? 1.0 : 0.0};
    team.reduce<3, true>(most);
    if (most[2] > 0.0 || !is_finite(most[1])) return false;
    const int size = exponent(most[0]);
    const bool safe = most[0] == 0.0 || (size <= kSafeExponent && size >= -kSafeExponent);
    if (!safe && !again) {
      // Half of the scale on either side of a product with W: not even the product can overflow.
      int e = exponent(most[1]);
      e = e < -kLargestExponent ? -kLargestExponent : e;
      if (threadIdx.x == 0) {
        p.down = static_cast<C>(power_of_two(-(e / 2)));
        p.up = static_cast<C>(power_of_two(-(e - e / 2)));
      }
      __syncthreads();
      continue;
    }
    double column[1] = {0.0}, squares[1] = {measures.squares};
    sum_shares(team, p, columns,
               [&](int64, C sum) { column[0] = larger(column[0], static_cast<double>(sum)); });
    team.reduce<1, true>(column);
    team.reduce(squares);
    const double one_inf = sqrt(column[0]) * sqrt(most[0]), frobenius = sqrt(squares[0]);
    const double rounding = static_cast<double>(p.item.m + p.np + 8) * kEpsilon;
    if (threadIdx.x == 0)
      p.upper = (one_inf < frobenius ? one_inf : frobenius) * (1.0 + rounding) /
                (static_cast<double>(p.down) * static_cast<double>(p.up));
    return true;
  }
}
