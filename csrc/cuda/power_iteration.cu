// Largest singular triple (σ, u, v) of every matrix of a list: one launch for all matrices of a
// team size and for all steps. Each matrix stops on its own; the host is never asked.
//
// A matrix W [m, n] is owned by a team of `size` blocks: each has a range of rows, and of all
// vectors of length n a slice of columns. A step is
//
//   pass     y = W_r x, z += W_rᵀ y: every row is read once; z is the block's share of Wᵀ W x
//   reduce   dot products of the images; with it, the shares of z become readable
//   update   the block's slice of z and of every vector: Rayleigh–Ritz, residual
//   reduce   |r|², r·v, r·s; with it, the slices of the next direction become readable
//
// so a step needs two barriers of the team (one or two more where the residual has drowned in
// rounding). Every sum has a fixed order and nothing is added atomically: same input, same bits.
//
// Classes, by the macro TEAM and the mode of an item; bytes that a step must move and what bounds
// it:
//
//   TEAM 0, on chip      a block a matrix. W and all vectors in shared memory: no device memory at
//                        all. Bound by two sweeps over the W in shared memory at 128 bytes a clock
//                        and multiprocessor, and by the latency of about six block barriers.
//   TEAM 1, on chip      a cluster a matrix, the same per block; shares of z and slices of x go
//                        through distributed shared memory: 2·n·sizeof(C) bytes a block.
//                        Bound by the latency of two cluster barriers for small slices.
//   TEAM 2, on chip      many blocks a matrix, W in their shared memory; shares and slices go
//                        through L2: 3·n·sizeof(C) a block. Bound by two barriers in L2 (a few µs).
//   TEAM 2, staged       W streams through a ring in shared memory: m·n·sizeof(T) bytes from L2
//   where
//                        the matrix stays there, else from device memory, whose bandwidth is the
//                        bound.
//   TEAM 2, wide         not even a row fits: a panel of rows is read twice, the second time from
//                        L1 or L2. Bound by L2, about half the bandwidth of the staged mode.
//
// Once per matrix comes a sweep that measures W (its norms, whether it is finite, its scale): as
// many bytes as a step. On chip, the only read of device memory is that W is loaded once.
//
// Macros: ELEMENT, see elements.cuh; TEAM 0 block, 1 cluster, 2 grid; THREADS.

#ifndef THREADS
#define THREADS 256
#endif

#include "elements.cuh"

constexpr int kWarps = THREADS / 32;
constexpr double kEpsilon = sizeof(C) == 8 ? 0x1p-52 : 0x1p-23;
constexpr int kLargestExponent = sizeof(C) == 8 ? 1022 : 126;  // 2^± of it is a normal number of C
// Row sums of |W| in 2^± of it: no square or product of what is computed leaves the range of C.
constexpr int kSafeExponent = sizeof(C) == 8 ? 200 : 20;

enum Mode { kOnChip = 0, kStaged = 1, kWide = 2 };

// A row of the table, one per matrix.
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

// ---- what differs between a GPU and the emulation ----------------------------------------------

#ifndef GTI_EMULATION
// Copies 16 bytes to shared memory, asynchronously; a group is what came since the last commit.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
// Adds one, after all that this thread wrote or saw, for every thread of the device.
__device__ __forceinline__ void arrive(unsigned* counter) {
  __threadfence();
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
// True once the counter has come to the target; what was written before is visible then.
__device__ __forceinline__ bool arrived(const unsigned* counter, unsigned target) {
  unsigned count;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
  return static_cast<int>(count - target) >= 0;
}
#if TEAM == 1
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ unsigned char* cluster_map(unsigned char* place, int rank) {
  unsigned char* other;
  asm("mapa.u64 %0, %1, %2;" : "=l"(other) : "l"(place), "r"(rank));
  return other;
}
#endif
#endif

// ---- numbers -----------------------------------------------------------------------------------

// V consecutive numbers of C, 16 bytes at a time.
struct alignas(16) Quad {
  C x[16 / sizeof(C)];
};
__device__ __forceinline__ void load(const C* from, C (&x)[V]) {
  constexpr int N = 16 / sizeof(C);
#pragma unroll
  for (int i = 0; i < V; i += N) {
    const Quad quad = *reinterpret_cast<const Quad*>(from + i);
#pragma unroll
    for (int e = 0; e < N; ++e) x[i + e] = quad.x[e];
  }
}
__device__ __forceinline__ void store(C* to, const C (&x)[V]) {
  constexpr int N = 16 / sizeof(C);
#pragma unroll
  for (int i = 0; i < V; i += N) {
    Quad quad;
#pragma unroll
    for (int e = 0; e < N; ++e) quad.x[e] = x[i + e];
    *reinterpret_cast<Quad*>(to + i) = quad;
  }
}

template <class T>
__device__ __forceinline__ T larger(T a, T b) {
  return a > b ? a : b;
}
template <class T>
__device__ __forceinline__ T magnitude(T x) {
  return x < T(0) ? -x : x;  // of a NaN: a NaN
}
__device__ __forceinline__ bool is_finite(double x) { return x - x == 0.0; }

__device__ __forceinline__ int exponent(double x) {  // of x > 0: ⌊log₂ x⌋, −1023 for a denormal
  return static_cast<int>((__double_as_longlong(x) >> 52) & 0x7ff) - 1023;
}
__device__ __forceinline__ double power_of_two(int e) {
  return __longlong_as_double(static_cast<int64>(e + 1023) << 52);
}

// Element e of the random start vector of a matrix: uniform on (−1, 1), exact in fp32; the
// splitmix64 finaliser of seed, matrix number and e.
__device__ __forceinline__ float start_element(uint64 seed, uint64 matrix, uint64 e) {
  uint64 x =
      seed * 0x9E3779B97F4A7C15u + matrix * 0xD1342543DE82EF95u + (e + 1) * 0x94D049BB133111EBu;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  x = x ^ (x >> 31);
  return (static_cast<float>(x >> 40) * 2.0f + 1.0f) * 0x1p-24f - 1.0f;
}

// The unit eigenvector of the largest eigenvalue of a symmetric 3 x 3 matrix, by Jacobi rotations.
// A rotation need not have the exact angle, but must be one: the tangent is computed in fp32, which
// is several times as fast, its cosine and sine in fp64.
__device__ __forceinline__ void rotate(double& app, double& aqq, double& apq, double& arp,
                                       double& arq, double (&p)[3], double (&q)[3]) {
  if (apq == 0.0) return;
  const float difference = static_cast<float>(aqq - app), twice = static_cast<float>(2.0 * apq);
  const float length = sqrtf(difference * difference + twice * twice);
  if (!(length > 0.0f)) return;
  const float tangent = (difference < 0.0f ? -twice : twice) / (fabsf(difference) + length);
  const double t = tangent, c = 1.0 / sqrt(1.0 + t * t), s = t * c;
  const double pp = app, qq = aqq, pq = apq;
  app = c * c * pp - 2.0 * c * s * pq + s * s * qq;
  aqq = s * s * pp + 2.0 * c * s * pq + c * c * qq;
  apq = (c * c - s * s) * pq + c * s * (pp - qq);
  const double rp = arp, rq = arq;
  arp = c * rp - s * rq;
  arq = s * rp + c * rq;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const double a = p[i], b = q[i];
    p[i] = c * a - s * b;
    q[i] = s * a + c * b;
  }
}

__device__ __forceinline__ void top_eigenvector(const double (&g)[6], double (&top)[3]) {
  // With trace 1 the squares that `rotate` takes stay in the range of fp32.
  const double trace = g[0] + g[3] + g[5], unit = trace > 0.0 ? 1.0 / trace : 0.0;
  double a00 = g[0] * unit, a01 = g[1] * unit, a02 = g[2] * unit, a11 = g[3] * unit,
         a12 = g[4] * unit, a22 = g[5] * unit;
  double q0[3] = {1.0, 0.0, 0.0}, q1[3] = {0.0, 1.0, 0.0}, q2[3] = {0.0, 0.0, 1.0};
  for (int sweep = 0; sweep < 12; ++sweep) {
    if (fabs(a01) + fabs(a02) + fabs(a12) <= 1e-17) break;
    rotate(a00, a11, a01, a02, a12, q0, q1);
    rotate(a00, a22, a02, a01, a12, q0, q2);
    rotate(a11, a22, a12, a01, a02, q1, q2);
  }
  const bool one = a11 > a00, two = a22 > (one ? a11 : a00);
#pragma unroll
  for (int i = 0; i < 3; ++i) top[i] = two ? q2[i] : one ? q1[i] : q0[i];
  // The sign is free: the coordinate on v stays positive, so that v keeps its sign.
  const double sign = top[0] < 0.0 ? -1.0 : 1.0;
#pragma unroll
  for (int i = 0; i < 3; ++i) top[i] *= sign;
}

// What a block knows of the matrix it works on; in shared memory, to save registers.
struct Work {
  Item item;
  int rank, size;         // of the team
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

  __device__ __forceinline__ int mode() const { return TEAM == 2 ? item.mode : kOnChip; }
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
  double slots[2][8];          // of a block, for its team (TEAM 0, 1)
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

// What a block of a grid shows to its team, in device memory: slots, then its share of z.
[[maybe_unused]] constexpr int64 kSlotBytes = 2 * 8 * sizeof(double);

struct Team {
  int rank, size;         // of the blocks that work on the matrix
  unsigned char* memory;  // TEAM 2: x [slices] of the team, then a region for each block
  int64 x_bytes, region_bytes;
  unsigned* counter;    // TEAM 2: of arrivals
  unsigned target = 0;  // at the last barrier
  unsigned parity = 0;  // of the number of reductions: what is read after one barrier is not
                        // written before the next

  __device__ __forceinline__ unsigned char* region(int of) const {
    return memory + x_bytes + of * region_bytes;
  }
  __device__ __forceinline__ double* slots(int of) const {
#if TEAM == 2
    return reinterpret_cast<double*>(region(of));
#elif TEAM == 1
    return reinterpret_cast<double*>(
        cluster_map(reinterpret_cast<unsigned char*>(control()->slots), of));
#else
    return control()->slots[0];
#endif
  }
  // Where `mine` is in the block `of`.
  template <class T>
  __device__ __forceinline__ const T* other(T* mine, int of) const {
#if TEAM == 2
    return reinterpret_cast<const T*>(reinterpret_cast<unsigned char*>(mine) +
                                      (of - rank) * region_bytes);
#elif TEAM == 1
    return reinterpret_cast<const T*>(cluster_map(reinterpret_cast<unsigned char*>(mine), of));
#else
    return mine;
#endif
  }

  // All threads of the team; what was written before is visible after.
  __device__ __forceinline__ void barrier() {
#if TEAM == 2
    __syncthreads();
    if (threadIdx.x == 0) {
      target += size;
      arrive(counter);
      while (!arrived(counter, target)) {
      }
    }
    __syncthreads();
#elif TEAM == 1
    cluster_sync();
#else
    __syncthreads();
#endif
  }

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
    if (size == 1) {
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
      slots(rank)[parity * 8 + threadIdx.x] = total;
    }
    barrier();
    for (int k = warp; k < K; k += kWarps) {
      double total = lane < size ? slots(lane)[parity * 8 + k] : 0.0;  // no maximum is negative
      for (int of = lane + 32; of < size; of += 32) total = join(total, slots(of)[parity * 8 + k]);
      for (int o = 16; o > 0; o /= 2) total = join(total, __shfl_xor_sync(kAll, total, o));
      if (lane == 0) c->totals[parity][k] = total;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) value[k] = c->totals[parity][k];
  }
};

// ---- the pass ----------------------------------------------------------------------------------

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
  if (p.mode() == kOnChip) {
    direct_pass<8, kShared, kMeasure>(p, p.ring(0), p.np, y, measures);
  } else if (p.mode() == kWide) {
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

// The sum of the shares in the block's slice, handed to use(j, sum), each column to one thread. All
// threads of the block call it.
template <class Use>
__device__ __forceinline__ void sum_shares(const Team& team, const Work& p, const Use& use) {
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
      for (int of = group; of < p.size; of += groups) sum += team.other(p.share, of)[p.first + j];
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

// ---- one matrix --------------------------------------------------------------------------------

struct Settings {
  bool power;
  int64 max_steps;
  double tol;
  uint64 seed;
  const C* start;  // [Σ n] or null: random
};
struct Results {
  C *u, *v;                          // [Σ m], [Σ n]
  double *sigma, *residual, *upper;  // [matrices of the call]
  int64* steps;
  unsigned char* converged;
};

// x [np] ← factor · x of all slices; the factor is that of the direction.
__device__ __forceinline__ void gather(Team& team, const Work& p, double factor) {
  if (p.mode() == kWide) {  // every block reads the one x of the team: it is scaled in place
#pragma unroll 1
    for (int64 j = threadIdx.x; j < p.count; j += THREADS)
      p.slice[j] = static_cast<C>(p.slice[j] * factor) * p.down;
    team.barrier();
    return;
  }
#pragma unroll 1
  for (int j = threadIdx.x; j < p.np; j += THREADS) {
#if TEAM == 2
    const C x = (p.slice - p.first)[j];
#else
    const int of = j / static_cast<int>(p.width);
    const C x = team.other(p.slice, of)[j - of * static_cast<int>(p.width)];
#endif
    p.x[j] = static_cast<C>(x * factor) * p.down;
  }
  __syncthreads();
}

// The norms of W, and a scale that keeps squares in the range of C. Returns false where W holds a
// NaN or an infinity.
__device__ __forceinline__ bool measure(Team& team, Work& p) {
  for (bool again = false;; again = true) {
    Measures measures;
    pass<true>(p, false, nullptr, measures);
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
    sum_shares(team, p,
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

// Makes v the unit start vector and publishes it; returns the factor of the first direction.
__device__ __forceinline__ double begin(Team& team, const Work& p, const Settings& set) {
  double length = 0.0;
#pragma unroll 1
  for (bool random = set.start == nullptr;; random = true) {
    double squares[1] = {0.0};
#pragma unroll 1
    for (int64 j = threadIdx.x; j < p.width; j += THREADS) {
      const int64 e = p.first + j;
      C x = 0;
      if (e < p.item.n)
        x = random ? start_element(set.seed, p.item.number, e) : set.start[p.item.v + e];
      p.v[j] = x;
      p.r[j] = p.s[j] = p.zv[j] = p.zs[j] = 0;
      if (j < p.count) p.slice[j] = x;
      squares[0] += static_cast<double>(x) * x;
    }
    team.reduce(squares);
    length = sqrt(squares[0]);
    if (random || (length > 0.0 && is_finite(length))) break;
  }
  const double inverse = 1.0 / length;
#pragma unroll 1
  for (int64 j = threadIdx.x; j < p.count; j += THREADS) p.v[j] = static_cast<C>(p.v[j] * inverse);
#pragma unroll 1
  for (int64 i = threadIdx.x; i < p.rows; i += THREADS) p.yv[i] = p.yr[i] = p.ys[i] = 0;
  return inverse;
}

// Coordinates of the new v and the new s in (v, r, s), and ‖W v‖² of the new v, from the Gram
// matrix of their images: to control()->ritz.
__device__ __forceinline__ void rayleigh_ritz(const double (&gram)[6]) {
  double* ritz = control()->ritz;
  if (threadIdx.x == 0) {
    double top[3];
    top_eigenvector(gram, top);
    // The move (0, top₁, top₂) made orthonormal to the new v, in coordinates: nothing cancels.
    const double length = sqrt(top[1] * top[1] + top[2] * top[2]);
    const double share = length > 0.0 ? top[0] / length : 0.0;
#pragma unroll
    for (int i = 0; i < 3; ++i) ritz[i] = top[i];
    ritz[3] = -length;
    ritz[4] = share * top[1];
    ritz[5] = length > 0.0 ? share * top[2] : 1.0;
    const double a = static_cast<C>(top[0]), b = static_cast<C>(top[1]), c = static_cast<C>(top[2]);
    ritz[6] = a * a * gram[0] + b * b * gram[3] + c * c * gram[5] +
              2.0 * (a * b * gram[1] + a * c * gram[2] + b * c * gram[4]);
  }
  __syncthreads();
}

// The residual of a Ritz vector is orthogonal to the space it came from, up to rounding. A small
// part on v and s is taken off r and its images after the pass, by linearity; a large one now,
// twice at the most. r is zero if nothing is left of it. dots: r with r, v, s.
__device__ __forceinline__ Direction orthonormalise(Team& team, const Work& p, double (&dots)[3]) {
  Direction to = {0.0, 0.0, 0.0, 0.0};
#pragma unroll 1
  for (int turn = 0; dots[0] > 0.0; ++turn) {
    const double a = 1.0 / sqrt(dots[0]), on_v = dots[1] * a, on_s = dots[2] * a;
    const double parts = on_v * on_v + on_s * on_s;
    if (parts <= 1e-4) {
      to.factor = a;
      to.on_v = on_v;
      to.on_s = on_s;
      to.left = 1.0 / sqrt(1.0 - parts);
      break;
    }
    if (turn == 2) break;
    dots[0] = dots[1] = dots[2] = 0.0;
#pragma unroll 1
    for (int64 j = threadIdx.x; j < p.count; j += THREADS) {
      const double v = p.v[j], s = p.s[j];
      const C r = static_cast<C>(p.r[j] * a - (on_v * v + on_s * s));
      p.r[j] = p.slice[j] = r;
      dots[0] += static_cast<double>(r) * r;
      dots[1] += r * v;
      dots[2] += r * s;
    }
    team.reduce(dots);
    const double least = 100.0 * kEpsilon;
    if (dots[0] <= least * least) break;
  }
  return to;
}

// Rows of the results that need no iteration: NaN.
__device__ __forceinline__ void give_up(const Work& p, const Results& out) {
  const C nan = __uint_as_float(0x7fffffffu);
#pragma unroll 1
  for (int64 i = threadIdx.x; i < p.rows; i += THREADS) out.u[p.item.u + p.first_row + i] = nan;
#pragma unroll 1
  for (int64 j = threadIdx.x; j < p.count && p.first + j < p.item.n; j += THREADS)
    out.v[p.item.v + p.first + j] = nan;
  if (p.rank == 0 && threadIdx.x == 0) {
    const int64 at = p.item.number;
    out.sigma[at] = out.residual[at] = out.upper[at] = nan;
    out.steps[at] = 0;
    out.converged[at] = 0;
  }
}

__device__ __forceinline__ void run(Team& team, Work& p, const Settings& set, const Results& out) {
  if (!measure(team, p)) return give_up(p, out);
  Direction next = {begin(team, p, set), 0.0, 0.0, 0.0};
  double residual = 0.0;
  int64 step = 1;
#pragma unroll 1
  for (;; ++step) {
    if (threadIdx.x == 0) control()->direction = next;  // not in registers during the pass
    gather(team, p, next.factor);
    const bool cg = !set.power && step > 1;  // the pass takes r, else v
    Measures none;
    pass<false>(p, step % 2 == 0, cg ? p.yr : p.yv, none);
    __syncthreads();
    const Direction to = control()->direction;
    double gram[6] = {};
#pragma unroll 1
    for (int64 i = threadIdx.x; i < p.rows; i += THREADS) {
      const double a = p.yv[i];
      gram[0] += a * a;
      if (cg) {
        const double c = p.ys[i];
        const C image = static_cast<C>(to.left * (p.yr[i] - to.on_v * a - to.on_s * c));
        p.yr[i] = image;
        const double b = image;
        gram[1] += a * b;
        gram[2] += a * c;
        gram[3] += b * b;
        gram[4] += b * c;
        gram[5] += c * c;
      }
    }
    team.reduce(gram);  // and the shares of z are there
    C top[3] = {1, 0, 0}, move[3] = {0, 0, 1};
    double theta = gram[0];
    if (cg) {
      rayleigh_ritz(gram);
      const double* ritz = control()->ritz;
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        top[i] = static_cast<C>(ritz[i]);
        move[i] = static_cast<C>(ritz[3 + i]);
      }
      theta = ritz[6];
#pragma unroll 1
      for (int64 i = threadIdx.x; i < p.rows; i += THREADS) {
        const C v = p.yv[i], r = p.yr[i], s = p.ys[i];
        p.yv[i] = top[0] * v + top[1] * r + top[2] * s;
        p.ys[i] = move[0] * v + move[1] * r + move[2] * s;
      }
    }
    double dots[3] = {};  // r with r, v, s; power: r with r, z with z
    sum_shares(team, p, [&](int64 j, C z) {
      C v = p.v[j], s = 0;
      if (cg) {
        const C zv = p.zv[j], zs = p.zs[j];
        s = p.s[j];
        const C x = static_cast<C>(p.r[j] * to.factor);
        const C r = static_cast<C>(to.left * (x - to.on_v * v - to.on_s * s));
        const C zr = static_cast<C>(to.left * (z - to.on_v * zv - to.on_s * zs));
        z = top[0] * zv + top[1] * zr + top[2] * zs;
        p.zs[j] = move[0] * zv + move[1] * zr + move[2] * zs;
        const C moved = move[0] * v + move[1] * r + move[2] * s;
        v = top[0] * v + top[1] * r + top[2] * s;
        p.s[j] = s = moved;
        p.v[j] = v;
      }
      p.zv[j] = z;
      const C r = z - static_cast<C>(theta) * v;
      p.r[j] = r;
      p.slice[j] = set.power ? z : r;
      dots[0] += static_cast<double>(r) * r;
      dots[1] += set.power ? static_cast<double>(z) * z : static_cast<double>(r) * v;
      dots[2] += static_cast<double>(r) * s;
    });
    team.reduce(dots);  // and the slices of the next x are there
    residual = theta > 0.0 ? sqrt(dots[0]) / theta : 0.0;
    if (step == set.max_steps || (set.tol > 0.0 && residual <= set.tol)) break;
    if (!set.power) {
      next = orthonormalise(team, p, dots);
    } else if (dots[1] > 0.0) {
      next.factor = 1.0 / sqrt(dots[1]);
#pragma unroll 1
      for (int64 j = threadIdx.x; j < p.count; j += THREADS)
        p.v[j] = static_cast<C>(p.zv[j] * next.factor);
    }
  }

  double squares[2] = {};
#pragma unroll 1
  for (int64 i = threadIdx.x; i < p.rows; i += THREADS)
    squares[0] += static_cast<double>(p.yv[i]) * p.yv[i];
#pragma unroll 1
  for (int64 j = threadIdx.x; j < p.count; j += THREADS)
    squares[1] += static_cast<double>(p.v[j]) * p.v[j];
  team.reduce(squares);
  const double image = sqrt(squares[0]), length = sqrt(squares[1]);
#pragma unroll 1
  for (int64 i = threadIdx.x; i < p.rows; i += THREADS)
    out.u[p.item.u + p.first_row + i] =
        image > 0.0 ? static_cast<C>(p.yv[i] / image) : static_cast<C>(p.first_row + i == 0);
#pragma unroll 1
  for (int64 j = threadIdx.x; j < p.count && p.first + j < p.item.n; j += THREADS)
    out.v[p.item.v + p.first + j] = static_cast<C>(p.v[j] / length);
  if (p.rank == 0 && threadIdx.x == 0) {
    const int64 at = p.item.number;
    const double scale = static_cast<double>(p.down) * static_cast<double>(p.up);
    out.sigma[at] = image / length / scale;
    out.residual[at] = residual;
    out.upper[at] = p.upper;
    out.steps[at] = step;
    out.converged[at] = residual <= set.tol;
  }
}

// Lays out the memory of a block for a matrix: see the kernel. One thread does it.
__device__ __forceinline__ void lay_out(const Team& team, const Item& item, Work& p) {
  p.item = item;
  p.rank = team.rank;
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
  p.down = p.up = C(1);
  const int64 most_rows = (item.m + p.size - 1) / p.size;
  p.width = ((p.np + p.size - 1) / p.size + 7) / 8 * 8;
  p.first = p.rank * p.width;
  p.count = p.first >= p.np ? 0 : p.np - p.first < p.width ? p.np - p.first : p.width;

  int at = kControlBytes;
#if TEAM == 2
  p.slice = reinterpret_cast<C*>(team.memory) + p.first;
  p.share = reinterpret_cast<C*>(team.region(p.rank) + kSlotBytes);
#else
  p.slice = reinterpret_cast<C*>(shared_memory() + at);
  at += static_cast<int>(p.width * sizeof(C));
#endif
  C* vectors = reinterpret_cast<C*>(shared_memory() + at);
  if (p.mode() == kWide) {
    p.x = reinterpret_cast<C*>(team.memory);
    p.z = p.share;
    vectors = p.z + p.groups * p.np;
  } else {
    const int bytes = static_cast<int>((5 * p.width + 3 * most_rows) * sizeof(C));
    p.x_at = at + (bytes + 15) / 16 * 16;
    p.z_at = p.x_at + static_cast<int>(p.np * sizeof(C));
    p.ring_at = p.z_at + static_cast<int>(p.groups * p.np * sizeof(C));
    p.x = reinterpret_cast<C*>(shared_memory() + p.x_at);
    p.z = reinterpret_cast<C*>(shared_memory() + p.z_at);
#if TEAM != 2
    p.share = p.z;
#endif
  }
  p.v = vectors;
  p.r = p.v + p.width;
  p.s = p.r + p.width;
  p.zv = p.s + p.width;
  p.zs = p.zv + p.width;
  p.yv = p.zs + p.width;
  p.yr = p.yv + most_rows;
  p.ys = p.yr + most_rows;
}

// The blocks b·size … b·size + size − 1 are team b, which takes the items b, b + teams, …; the last
// blocks, if size does not divide the grid, have nothing to do.
//
// Shared memory of a block: Control; slice [width] (unless TEAM 2); and unless wide: v, r, s and
// images, x [np], z [groups, np], W. Device memory, TEAM 2: for each team x [width · blocks], then
// for each block its slots, its share [np], and if wide: z [groups, np] in place of the share,
// vectors.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    power_iteration(const Item* items, int64 count, int64 size, int64 power, int64 max_steps,
                    double tol, int64 seed, const C* start, unsigned char* memory, int64 team_bytes,
                    int64 x_bytes, int64 region_bytes,
                    unsigned* counters,  // TEAM 2: [items + teams], zero
                    C* u, C* v, double* sigma, double* residual, double* upper, int64* steps,
                    unsigned char* converged) {
  const Settings set = {power != 0, max_steps, tol, static_cast<uint64>(seed), start};
  const Results out = {u, v, sigma, residual, upper, steps, converged};
  const int teams = gridDim.x / static_cast<int>(size),
            number = blockIdx.x / static_cast<int>(size);
  if (number >= teams) return;
  Team all;  // from one matrix to the next
  all.rank = blockIdx.x - number * static_cast<int>(size);
  all.size = static_cast<int>(size);
  all.memory = memory + number * team_bytes;
  all.x_bytes = x_bytes;
  all.region_bytes = region_bytes;
  all.counter = counters + count + number;

#pragma unroll 1
  for (int64 index = number; index < count; index += teams) {
    Work& p = control()->work;
    if (threadIdx.x == 0) lay_out(all, items[index], p);
    __syncthreads();
    if (p.rank < p.size) {
      Team team = all;
      team.size = p.size;
      team.counter = counters + index;
      team.target = 0;
      if (p.mode() == kOnChip) {
        copy_rows(p, 0, p.rows, p.ring(0));
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();
      }
      run(team, p, set, out);
    }
    all.barrier();  // nobody reads any more what the next matrix overwrites
  }
}
