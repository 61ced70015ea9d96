// One matrix, its largest triple: what comes before, between and after the passes.
#pragma once

#include "power_iteration_pass.cuh"

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

// x [np] ← factor · x of all slices; the factor is that of the direction.
__device__ __forceinline__ void gather(Team& team, const Work& p, double factor) {
  if (p.item.mode == kWide) {  // every block reads the one x of the team: it is scaled in place
#pragma unroll 1
    for (int64 j = threadIdx.x; j < p.count; j += THREADS)
      p.slice[j] = static_cast<C>(p.slice[j] * factor) * p.down;
    team.barrier();
    return;
  }
#pragma unroll 1
  for (int j = threadIdx.x; j < p.np; j += THREADS) {
    C x;
    if (p.kind == kCluster) {
      const int of = j / static_cast<int>(p.width);
      x = team.other(p.slice, of)[j - of * static_cast<int>(p.width)];
    } else {
      x = (p.slice - p.first)[j];
    }
    p.x[j] = static_cast<C>(x * factor) * p.down;
  }
  __syncthreads();
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

__device__ __forceinline__ void run(Work& p, const Settings& set, const Results& out) {
  Team team = {p};
  const auto sweep = [&](Measures& measures) { pass<true>(p, false, nullptr, measures); };
  if (!measure(team, p, p.share, sweep)) return give_up(p, set, out);
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
    sum_shares(team, p, p.share, [&](int64 j, C z) {
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
    residual = theta == 0.0 ? 0.0 : sqrt(dots[0]) / theta;
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
__device__ __forceinline__ void lay_out(const Item& item, const Settings&, Work& p) {
  assign(item, p);
  const int64 most_rows = (item.m + p.size - 1) / p.size;
  int at = kControlBytes;
  if (p.kind == kGrid) {
    p.slice = reinterpret_cast<C*>(p.memory) + p.first;
    p.share = reinterpret_cast<C*>(p.slots) + kSlotBytes / sizeof(C);
  } else {
    p.slice = reinterpret_cast<C*>(shared_memory() + at);
    at += static_cast<int>(p.width * sizeof(C));
  }
  C* vectors = reinterpret_cast<C*>(shared_memory() + at);
  if (p.item.mode == kWide) {
    p.x = reinterpret_cast<C*>(p.memory);
    p.z = p.share;
    vectors = p.z + p.groups * p.np;
  } else {
    const int bytes = static_cast<int>((5 * p.width + 3 * most_rows) * sizeof(C));
    p.x_at = at + (bytes + 15) / 16 * 16;
    p.z_at = p.x_at + static_cast<int>(p.np * sizeof(C));
    p.ring_at = p.z_at + static_cast<int>(p.groups * p.np * sizeof(C));
    p.x = reinterpret_cast<C*>(shared_memory() + p.x_at);
    p.z = reinterpret_cast<C*>(shared_memory() + p.z_at);
    if (p.kind != kGrid) p.share = p.z;
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
