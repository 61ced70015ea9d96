// The blocks that own a matrix: what each knows of it, where its memory is, barriers and sums.
#pragma once

#include "power_iteration_numbers.cuh"

enum Kind { kBlock = 0, kCluster = 1, kGrid = 2 };  // of a team: what its blocks share
enum Mode { kOnChip = 0, kStaged = 1, kWide = 2 };

// A row of the first table: the matrices of a kind and size of team.
struct Section {
  int64 kind, size;             // blocks of a team
  int64 teams;                  // that work side by side
  int64 first;                  // block of the first team; behind the last block comes block 0
  int64 begin, items;           // rows of the second table
  int64 memory, counters;       // kGrid: where its own begin
  int64 x_bytes, region_bytes;  // kGrid: in device memory, of the team and of a block; else 0
};

// A row of the second table, one per matrix.
struct Item {
  int64 w;       // address of W, contiguous
  int64 m, n;    //
  int64 number;  // of the matrix in the call: its random start, and where its scalars go
  int64 u, v;    // where its vectors begin in u, v and start
  int64 size;    // blocks that work on it
  int64 mode;    //
  int64 rows;    // staged: rows of a panel for each group of threads: 8, 4, 2 or 1
  int64 stages;  // staged: panels in the ring, 2 to 4
};

// What a launch asks for, and where the results go.
struct Settings {
  int k;
  bool power;
  int64 max_steps;
  double tol;
  uint64 seed;
  const C* start;  // [Σ n·k] or null: random
};
struct Results {
  C *u, *v;                  // [Σ m·k], [Σ n·k]
  double *sigma, *residual;  // [matrices of the call · k]
  double* upper;             // [matrices of the call]; so are the next two
  int64* steps;
  unsigned char* converged;
};

// What a block knows of the matrix it works on; in shared memory, to save registers.
struct Work {
  Item item;
  int kind, rank, size;         // of the team: of the blocks that work on the matrix
  unsigned char* memory;        // kGrid: x [slices] of the team, then a region for each block
  int64 x_bytes, region_bytes;  //
  unsigned* counter;            // kGrid: of arrivals
  unsigned target;              // at the last barrier; thread 0's
  double* slots;                // [2, 8] of the block, which the team reads

  int64 first_row, rows;  // of the block
  int64 np;               // n in whole chunks: what lies beyond n is zero
  int chunks;             //
  int positions, groups;  // threads of a group, which share rows; groups
  bool even;              // each row begins on a 16-byte boundary
  const Element* w;       // the first row of the block, in device memory
  C down, up;             // powers of two; up · down · W has a safe size
  double upper;           // ≥ ‖W‖₂

  // Vectors of length np: x as the pass takes it and z [groups, np], whose sum over groups is what
  // the block shows to the team as its share. Unless wide they are in shared memory, at x_at and
  // z_at, as is W [rows, np] or the ring of its panels.
  C *x, *z, *share;
  int x_at, z_at, ring_at;

  // The block's slice of every vector of length n, and its rows of every vector of length m: v is
  // the estimate, r and s span the search space beside it, z· = Wᵀ W · and y· = W ·. r alone needs
  // a pass, the images of v and s follow by linearity.
  int64 first, count, width;
  C *v, *r, *s, *zv, *zs;  // [width], zero from count on
  C *yv, *yr, *ys;         // [rows]
  C* slice;                // [width] of the next x, up to a factor; the team reads it

  __device__ __forceinline__ Element* ring(int64 row) const;
};

// ---- a team of blocks --------------------------------------------------------------------------

// What the direction r of the next pass is: factor · x, of which on_v and on_s lie on v and s; left
// is the inverse length of the rest.
struct Direction {
  double factor, on_v, on_s, left;
};

// At the beginning of shared memory.
struct Control {
  double parts[2][kWarps][8];  // sums of a warp
  double totals[2][8];         // of the team
  double slots[2][8];          // of a block, for its cluster
  C warp_rows[2][kWarps][8];   // a warp's part of the dot products of 8 rows
  C columns[THREADS];          // parts of the sum of shares
  double ritz[8];
  Direction direction;
  Work work;
};

constexpr int kControlBytes = 1024 + 16 * THREADS;  // as the launcher counts
static_assert(sizeof(Control) <= kControlBytes);

__device__ __forceinline__ Control* control() {
  return reinterpret_cast<Control*>(shared_memory());
}
__device__ __forceinline__ Element* Work::ring(int64 row) const {
  return reinterpret_cast<Element*>(shared_memory() + ring_at) + row * np;
}

// Triples that the kernel finds at most, rows of its search space, and sums that a reduction takes:
// a Gram matrix and two more for each triple. The launcher counts the same.
constexpr int kMostTriples = SUBSPACE ? 8 : 1;
constexpr int kSide = 3 * kMostTriples;
constexpr int kSums = SUBSPACE ? kSide * (kSide + 1) / 2 + 2 * kMostTriples : 0;

// What a block of a grid shows to its team, in device memory: slots, then its share of z.
[[maybe_unused]] constexpr int64 kSlotBytes = (2 * 8 + kSums) * sizeof(double);

// All threads of a team of `size` blocks; what was written before is visible after. kGrid: thread 0
// counts in `target` the arrivals that the team has waited for.
__device__ __forceinline__ void barrier(int kind, int size, unsigned* counter, unsigned& target) {
  if (kind == kCluster) {
    cluster_sync();
  } else if (kind == kBlock) {
    __syncthreads();
  } else {
    __syncthreads();
    if (threadIdx.x == 0) {
      target += size;
      arrive(counter);
      while (!arrived(counter, target)) {
      }
    }
    __syncthreads();
  }
}

struct Team {
  Work& p;
  unsigned parity = 0;  // of the number of reductions: what is read after one barrier is not
                        // written before the next

  // Where `mine`, which the team reads, is in the block `of`.
  template <class T>
  __device__ __forceinline__ const T* other(T* mine, int of) const {
    auto* place = reinterpret_cast<unsigned char*>(mine);
    return reinterpret_cast<const T*>(p.kind == kCluster ? cluster_map(place, of)
                                                         : place + (of - p.rank) * p.region_bytes);
  }
  __device__ __forceinline__ void barrier() { ::barrier(p.kind, p.size, p.counter, p.target); }

  // Each value summed (or its maximum taken) over all threads of the team, known to all; a barrier.
  template <int K, bool kMaximum = false>
  __device__ __forceinline__ void reduce(double (&value)[K]) {
    const auto join = [](double a, double b) { return kMaximum ? larger(a, b) : a + b; };
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Control* c = control();
    parity ^= 1;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      for (int o = 16; o > 0; o /= 2) value[k] = join(value[k], __shfl_xor_sync(kAll, value[k], o));
      if (lane == 0) c->parts[parity][warp][k] = value[k];
    }
    __syncthreads();
    if (p.size == 1) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        value[k] = c->parts[parity][0][k];
        for (int w = 1; w < kWarps; ++w) value[k] = join(value[k], c->parts[parity][w][k]);
      }
      return;
    }
    if (threadIdx.x < K) {
      double total = c->parts[parity][0][threadIdx.x];
      for (int w = 1; w < kWarps; ++w) total = join(total, c->parts[parity][w][threadIdx.x]);
      p.slots[parity * 8 + threadIdx.x] = total;
    }
    barrier();
    for (int k = warp; k < K; k += kWarps) {
      double total = 0.0;  // no maximum is negative
      for (int of = lane; of < p.size; of += 32)
        total = join(total, other(p.slots, of)[parity * 8 + k]);
      for (int o = 16; o > 0; o /= 2) total = join(total, __shfl_xor_sync(kAll, total, o));
      if (lane == 0) c->totals[parity][k] = total;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) value[k] = c->totals[parity][k];
  }
};

// Which rows and columns of a matrix are the block's. One thread does it, as all of lay_out.
__device__ __forceinline__ void assign(const Item& item, Work& p) {
  p.item = item;
  p.size = static_cast<int>(item.size);
  p.chunks = static_cast<int>((item.n + V - 1) / V);
  p.np = static_cast<int64>(p.chunks) * V;
  p.positions = 1;
  while (p.positions < THREADS && p.positions < p.chunks) p.positions *= 2;
  p.groups = THREADS / p.positions;
  p.even = item.w % 16 == 0 && item.n == p.np;
  p.first_row = item.m * p.rank / p.size;
  p.rows = item.m * (p.rank + 1) / p.size - p.first_row;
  p.w = reinterpret_cast<const Element*>(item.w) + p.first_row * item.n;
  p.slots = p.kind == kGrid
                ? reinterpret_cast<double*>(p.memory + p.x_bytes + p.rank * p.region_bytes)
                : control()->slots[0];
  p.down = p.up = C(1);
  p.width = ((p.np + p.size - 1) / p.size + 7) / 8 * 8;
  p.first = p.rank * p.width;
  p.count = p.first >= p.np ? 0 : p.np - p.first < p.width ? p.np - p.first : p.width;
}

// The results of a matrix that is not finite: NaN.
__device__ __forceinline__ void give_up(const Work& p, const Settings& set, const Results& out) {
  const C nan = __uint_as_float(0x7fffffffu);
  const int64 k = set.k, left = p.item.n - p.first, columns = left < p.count ? left : p.count;
#pragma unroll 1
  for (int64 i = threadIdx.x; i < p.rows * k; i += THREADS)
    out.u[(p.item.u + p.first_row) * k + i] = nan;
#pragma unroll 1
  for (int64 j = threadIdx.x; j < columns * k; j += THREADS)
    out.v[(p.item.v + p.first) * k + j] = nan;
  if (p.rank == 0 && threadIdx.x == 0) {
    const int64 at = p.item.number;
    for (int c = 0; c < k; ++c) out.sigma[at * k + c] = out.residual[at * k + c] = nan;
    out.upper[at] = nan;
    out.steps[at] = 0;
    out.converged[at] = 0;
  }
}
