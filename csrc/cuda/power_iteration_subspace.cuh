// One matrix, its k largest triples, k > 1: block Rayleigh–Ritz. The search space is spanned by the
// rows of x [side, n]: v, s, d for cg (side = 3k), v, d for power (2k), with the images zx = WᵀW x
// [side, n] and y = W x [side, m]. v are the estimates, s the last move, d the k directions of the
// pass; the images of v and s follow by linearity. A step is
//
//   pass     y = W d and the block's share of z = Wᵀ y: W is read once
//   sums     the Gram matrix of y; with it, the shares of z become readable
//   solve    every block the same: Rayleigh–Ritz in coordinates, orthonormal by the Gram matrices
//   update   the block's rows of y, and its slices of x and zx; the residual, which is the next d
//   sums     the Gram matrix of x, the residuals; with it, the slices of d become readable
//
// so it needs four barriers of the team (two more where residuals have drowned in rounding).
// The vectors are in shared memory (a block) or in device memory, where L2 keeps them (a grid); W
// is in shared memory if it fits: then the bound is the arithmetic, 2·k products for each element
// of W. Else it is L2, from which the later reads of a panel come.
#pragma once

#include "power_iteration_dense.cuh"
#include "power_iteration_subspace_pass.cuh"

struct Subspace {
  C *x, *zx;  // [side, np]: the team's
  C* y;       // [side, m]
};
static_assert(sizeof(Dense) + sizeof(Subspace) <= kDenseBytes);

__device__ __forceinline__ Subspace* subspace() { return reinterpret_cast<Subspace*>(dense() + 1); }

// ---- sums over the team ------------------------------------------------------------------------

// Where a block puts what it adds to sums.
__device__ __forceinline__ double* own_sums(const Team& team) {
  return team.p.size > 1 ? team.p.slots + 16 : dense()->sums;
}

// dense()->sums ← the first `count` of own_sums, summed over the team; a barrier. Each sum is taken
// by one warp of one block.
__device__ __forceinline__ void sum_over_team(Team& team, int count) {
  const Work& p = team.p;
  if (p.size > 1) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    double* totals = reinterpret_cast<double*>(p.memory);
    team.barrier();
#pragma unroll 1
    for (int at = p.rank * kWarps + warp; at < count; at += p.size * kWarps) {
      double sum = 0.0;
      for (int of = lane; of < p.size; of += 32) sum += team.other(p.slots, of)[16 + at];
      for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(kAll, sum, o);
      if (lane == 0) totals[at] = sum;
    }
    team.barrier();
#pragma unroll 1
    for (int at = threadIdx.x; at < count; at += THREADS) dense()->sums[at] = totals[at];
  }
  __syncthreads();
}

// gram [rows, rows] of the rows of x, `stride` apart, of which the block has `length` columns from
// x on; with it, `more` sums that it has put behind the triangle of the matrix.
__device__ __forceinline__ void gram_matrix(Team& team, const C* x, int64 stride, int64 length,
                                            int rows, int more, double* gram) {
  double* own = own_sums(team);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads();  // x is there
  int turn = 0;
  const auto place = [=](int i, int j) { return i * rows - i * (i + 1) / 2 + j; };  // i ≤ j
#pragma unroll 1
  for (int i = 0; i < rows; ++i)
#pragma unroll 1
    for (int j = i; j < rows; j += 4, turn = turn + 1 == kWarps ? 0 : turn + 1) {
      if (turn != warp) continue;
      double sum[4] = {};
#pragma unroll 1
      for (int64 at = lane; at < length; at += 32) {
        const double a = x[i * stride + at];
#pragma unroll
        for (int b = 0; b < 4; ++b) sum[b] += a * x[(j + b < rows ? j + b : j) * stride + at];
      }
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        for (int o = 16; o > 0; o /= 2) sum[b] += __shfl_xor_sync(kAll, sum[b], o);
        if (lane == 0 && j + b < rows) own[place(i, j + b)] = sum[b];
      }
    }
  sum_over_team(team, rows * (rows + 1) / 2 + more);
#pragma unroll 1
  for (int at = threadIdx.x; at < rows * rows; at += THREADS) {
    const int i = at / rows, j = at - i * rows;
    gram[i * kSide + j] = dense()->sums[i < j ? place(i, j) : place(j, i)];
  }
  __syncthreads();
}

// ---- the vectors -------------------------------------------------------------------------------

// The rows `to` of x [inputs, ·], `stride` apart, and those behind ← t x, of `outputs` rows, on
// `length` columns from x on.
__device__ __forceinline__ void rotate(C* x, int64 stride, int64 length, int inputs, int to,
                                       int outputs) {
  Dense* d = dense();
  C* tile = reinterpret_cast<C*>(d->b);  // [inputs, 32]; b and q are free
  static_assert(sizeof(d->b) + sizeof(d->q) >= kSide * 32 * sizeof(C));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
  for (int64 begin = 0; begin < length; begin += 32) {
    const bool inside = begin + lane < length;
    __syncthreads();
#pragma unroll 1
    for (int i = warp; i < inputs; i += kWarps)
      tile[i * 32 + lane] = inside ? x[i * stride + begin + lane] : C(0);
    __syncthreads();
#pragma unroll 1
    for (int c = warp; c < outputs; c += kWarps) {
      double sum = 0.0;
#pragma unroll 4
      for (int i = 0; i < inputs; ++i) sum += d->t[c * kSide + i] * tile[i * 32 + lane];
      if (inside) x[(to + c) * stride + begin + lane] = static_cast<C>(sum);
    }
  }
  __syncthreads();
}

// What settle() is for: at the start, after a step, at the end.
enum Stage { kStart, kStep, kEnd };

// The rows behind the first `old` of x [rows, ·], orthonormal to those and to each other. Of x,
// `stride` apart, the block has the columns [first, first + length), of which those from `end` on
// stay zero; `more` as in gram_matrix.
//
// kStep: the search space; dense()->e gets its orthonormal coordinates. The residuals d of a Ritz
// basis are orthogonal to the space it came from, up to rounding. Small parts on v and s are taken
// off by linearity, after the pass; where a d has large ones, or is nearly dependent on those
// before it, that would blow up the rounding of the images: then d itself is changed, twice at the
// most. power: no image is carried on; v stands in where d has lost a dimension.
//
// kStart, kEnd: x itself is changed, until it was far from dependent. A row that leaves nothing
// becomes random.
__device__ __forceinline__ void settle(Team& team, Stage stage, bool power, C* x, int64 stride,
                                       int64 first, int64 length, int64 end, int rows, int old,
                                       int more) {
  Dense* d = dense();
  const int fresh = rows - old, c = old + static_cast<int>(threadIdx.x);
  const bool step = stage == kStep, last_look = step && power;
  bool again = !step;
#pragma unroll 1
  for (int turn = 0;; ++turn) {
    gram_matrix(team, x, stride, length, rows, turn == 0 ? more : 0, d->a);
    bool change = false, some = false;
    if (c < rows) {
      double parts = 0.0;
      for (int j = 0; j < old; ++j) parts += d->a[c * kSide + j] * d->a[c * kSide + j];
      some = d->a[c * (kSide + 1)] > 0.0;
      change = step && parts > 1e-4 * d->a[c * (kSide + 1)];
    }
    __syncthreads();  // a is read
    gram_schmidt(d->a, d->e, rows, last_look ? old : 0, last_look ? fresh : rows,
                 last_look ? kLeastShare : kLeastRest);
    if (c < rows) change |= step ? some && d->left[c] < 0.1 : d->left[c] < 0.25;
    const bool any = __syncthreads_count(change) > 0;
    if (!(any || again) || last_look || turn == (step ? 2 : 5)) return;
    again = any && !step;
#pragma unroll 1
    for (int at = threadIdx.x; at < fresh * kSide; at += THREADS) d->t[at] = d->e[old * kSide + at];
    rotate(x, stride, length, rows, old, fresh);
#pragma unroll 1
    for (int i = 0; i < fresh && !step; ++i)
      if (d->left[i] == 0.0)
#pragma unroll 1
        for (int64 j = threadIdx.x; j < length && first + j < end; j += THREADS)
          x[i * stride + j] = start_element(turn, ~uint64{0}, (first + j) * fresh + i);
  }
}

// ---- one matrix --------------------------------------------------------------------------------

// d ← the start vectors, v and s and all images zero.
__device__ __forceinline__ void begin(const Work& p, const Settings& set, int side) {
  const Subspace s = *subspace();
  const int k = set.k, old = side - k;
#pragma unroll 1
  for (int c = 0; c < side; ++c) {
    C *x = s.x + c * p.np + p.first, *zx = s.zx + c * p.np + p.first;
    C* y = s.y + c * p.item.m + p.first_row;
#pragma unroll 1
    for (int64 j = threadIdx.x; j < p.count; j += THREADS) {
      const int64 e = p.first + j, at = e * k + c - old;
      C value = 0;
      if (c >= old && e < p.item.n)
        value = set.start == nullptr ? start_element(set.seed, p.item.number, at)
                                     : set.start[p.item.v * k + at];
      x[j] = is_finite(value) ? value : C(0);
      zx[j] = 0;
    }
#pragma unroll 1
    for (int64 i = threadIdx.x; i < p.rows; i += THREADS) y[i] = 0;
  }
}

// Σ x² over `length` elements, in lane 0 of each warp that calls it.
template <class Next>
__device__ __forceinline__ double warp_squares(int64 length, const Next& next) {
  double sum = 0.0;
#pragma unroll 1
  for (int64 j = threadIdx.x % 32; j < length; j += 32) {
    const double x = next(j);
    sum += x * x;
  }
  for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(kAll, sum, o);
  return sum;
}

// d ← the residual z − θ v; power: z, with enough of v where z is all rounding. Puts Σ r² and Σ y²
// of the block behind the triangle of a Gram matrix of x.
__device__ __forceinline__ void residuals(const Team& team, const Work& p, const Settings& set,
                                          int side) {
  const Subspace s = *subspace();
  const Dense* d = dense();
  const int k = set.k;
  const double least = 16.0 * kEpsilon * d->theta[0];
  double* sums = own_sums(team) + side * (side + 1) / 2;
#pragma unroll 1
  for (int c = threadIdx.x / 32; c < k; c += kWarps) {
    const C *v = s.x + c * p.np + p.first, *z = s.zx + c * p.np + p.first,
            *y = s.y + c * p.item.m + p.first_row;
    C* to = s.x + (side - k + c) * p.np + p.first;
    const double theta = d->theta[c], whole = larger(theta, least > 0.0 ? least : 1.0);
    const double squares = warp_squares(p.count, [&](int64 j) {
      const double r = z[j] - theta * v[j];
      to[j] = static_cast<C>(set.power ? r + whole * v[j] : r);
      return r;
    });
    const double image = warp_squares(p.rows, [&](int64 i) { return y[i]; });
    if (threadIdx.x % 32 == 0) {
      sums[c] = squares;
      sums[k + c] = image;
    }
  }
}

// The results but for u: σ = ‖W v‖/‖v‖. Of a σ that is all rounding, y ← 0: it has no u of its own.
__device__ __forceinline__ void give(const Work& p, const Settings& set, const Results& out,
                                     int64 step, int side) {
  const Subspace s = *subspace();
  const int k = set.k;
  const double* squares = dense()->sums + side * (side + 1) / 2;
  const double scale = static_cast<double>(p.down) * static_cast<double>(p.up);
  const double theta = dense()->theta[0], inverse_theta = theta > 0.0 ? 1.0 / theta : 0.0;
  const double sides = static_cast<double>(larger(p.item.m, p.item.n)) * kEpsilon;
  const double least = sqrt(squares[k]) * (sides < 0.01 ? sides : 0.01);
  bool converged = true;
#pragma unroll 1
  for (int c = 0; c < k; ++c) {
    const C* x = s.x + c * p.np;
    C* y = s.y + c * p.item.m + p.first_row;
    const double length = sqrt(dense()->sums[c * side - c * (c - 1) / 2]);
    const double image = sqrt(squares[k + c]), residual = sqrt(squares[c]) * inverse_theta;
    converged &= residual <= set.tol;
    if (p.rank == 0 && threadIdx.x == 0) {
      out.sigma[p.item.number * k + c] = image / length / scale;
      out.residual[p.item.number * k + c] = residual;
    }
#pragma unroll 1
    for (int64 j = p.first + threadIdx.x; j < p.first + p.count && j < p.item.n; j += THREADS)
      out.v[(p.item.v + j) * k + c] = static_cast<C>(x[j] / length);
    if (!(image > least))
#pragma unroll 1
      for (int64 i = threadIdx.x; i < p.rows; i += THREADS) y[i] = 0;
  }
  if (p.rank == 0 && threadIdx.x == 0) {
    out.upper[p.item.number] = p.upper;
    out.steps[p.item.number] = step;
    out.converged[p.item.number] = converged;
  }
}

__device__ __forceinline__ void run(Work& p, const Settings& set, const Results& out) {
  Team team = {p};
  const int k = set.k, side = set.power ? 2 * k : 3 * k, old = side - k;
  const auto sweep = [&](Measures& measures) {
    multiply_all<true>(p, 1, nullptr, nullptr, measures);
  };
  if (!measure(team, p, p.z, sweep)) return give_up(p, set, out);
  begin(p, set, side);
  const Subspace s = *subspace();
  Dense* d = dense();
  C *x = s.x + p.first, *y = s.y + p.first_row;
  int64 step = 0;
  Stage stage = kStart;
#pragma unroll 1
  for (;;) {  // one loop for all stages: what they share is compiled once
    if (stage == kStep) {
      ++step;
      Measures none;
      multiply_all<false>(p, k, s.x + old * p.np, y + old * p.item.m, none);
      gram_matrix(team, y, p.item.m, p.rows, side, 0, dense()->b);
      rayleigh_ritz(k, set.power);
#pragma unroll 1
      for (int c = 0; c < k; ++c) {
        C* z = s.zx + p.first + (old + c) * p.np;
        sum_shares(team, p, p.z + c * p.groups * p.np, [&](int64 j, C sum) { z[j] = sum; });
      }
#pragma unroll 1
      for (int which = 0; which < 3; ++which)
        rotate(which == 0   ? y
               : which == 1 ? s.zx + p.first
                            : x,
               which == 0 ? p.item.m : p.np, which == 0 ? p.rows : p.count, side, 0, old);
      residuals(team, p, set, side);
    }
    const bool left = stage == kEnd;
    settle(team, stage, set.power,
           left              ? y
           : stage == kStart ? x + old * p.np
                             : x,
           left ? p.item.m : p.np, left ? p.first_row : p.first, left ? p.rows : p.count,
           left ? p.item.m : p.item.n, stage == kStep ? side : k, stage == kStep ? old : 0, 2 * k);
    if (stage == kEnd) break;
    if (stage == kStart) {  // of the search space there is d alone
#pragma unroll 1
      for (int at = threadIdx.x; at < kSide * kSide; at += THREADS) {
        const int i = at / kSide;
        const bool one = at == i * (kSide + 1) && i >= old && i < side;
        d->e[at] = one;
        if (at == i * (kSide + 1)) d->left[i] = one;
      }
      __syncthreads();
      stage = kStep;
      continue;
    }
    const double* squares = d->sums + side * (side + 1) / 2;
    const double inverse_theta = d->theta[0] > 0.0 ? 1.0 / d->theta[0] : 0.0;
    double residual = 0.0;
    for (int c = 0; c < k; ++c) residual = larger(residual, sqrt(squares[c]) * inverse_theta);
    if (step == set.max_steps || (set.tol > 0.0 && residual <= set.tol)) {
      give(p, set, out, step, side);
      stage = kEnd;
    }
  }
#pragma unroll 1
  for (int64 at = threadIdx.x; at < p.rows * k; at += THREADS)
    out.u[(p.item.u + p.first_row) * k + at] = y[at % k * p.item.m + at / k];
}

// Lays out the memory of a block for a matrix: see the kernel. One thread does it.
__device__ __forceinline__ void lay_out(const Item& item, const Settings& set, Work& p) {
  assign(item, p);
  const int64 np = p.np, k = set.k, side = set.power ? 2 * k : 3 * k, shares = k * p.groups * np;
  Subspace* s = subspace();
  const int at = kControlBytes + kDenseBytes;
  s->x = reinterpret_cast<C*>(p.kind == kGrid ? p.memory + kSums * sizeof(double)
                                              : shared_memory() + at);
  s->zx = s->x + side * np;
  s->y = s->zx + side * np;
  if (p.kind == kGrid) {
    p.z = reinterpret_cast<C*>(p.slots) + kSlotBytes / sizeof(C);
    p.ring_at = at;
  } else {
    p.z = s->y;
    s->y = p.z + shares;
    p.ring_at = at + static_cast<int>(((2 * side * np + shares + side * item.m) * sizeof(C) + 15) /
                                      16 * 16);
  }
}
