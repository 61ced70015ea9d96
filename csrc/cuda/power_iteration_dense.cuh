// The Rayleigh–Ritz problem of k > 1: small symmetric matrices in fp64, in shared memory, worked on
// by all threads of a block. Every block of a team solves it from the same numbers to the same
// bits.
#pragma once

#include "power_iteration_team.cuh"

// What is kept of a share of a square by `gram_schmidt` is orthogonal to the rounding of fp64 over
// this share: that must stay below the rounding of C. In fp64 it is a share met near the end only.
constexpr double kLeastShare = sizeof(C) == 8 ? 1e-4 : 1e-8;
constexpr double kLeastRest = sizeof(C) == 8 ? 1e-12 : 1e-10;  // where it is measured again after
constexpr double kLeastMove = 1e-4;  // of s: those that all but coincide say nothing new

// Behind Control. Matrices have rows of kSide.
struct Dense {
  double sums[kSums];                  // the last that were taken over the team
  double a[kSide * kSide];             // the Gram matrix of the search space; then products
  double e[kSide * kSide];             // its orthonormal coordinates
  double b[kSide * kSide];             // the Gram matrix of the images; then products
  double q[kSide * kSide];             // eigenvectors
  double t[2 * kMostTriples * kSide];  // the rotation to the new search space
  double theta[kMostTriples];          // of the Ritz vectors
  double left[kSide], later[kSide];    // of gram_schmidt
  double cosine[kSide / 2], sine[kSide / 2];
  int first[kSide / 2], second[kSide / 2];  // partners
  int order[kMostTriples];                  // of the largest eigenvalues
};

constexpr int kDenseBytes = SUBSPACE ? 25600 : 0;  // as the launcher counts
static_assert(sizeof(Dense) <= kDenseBytes);

__device__ __forceinline__ Dense* dense() {
  return reinterpret_cast<Dense*>(shared_memory() + kControlBytes);
}

// out [rows, columns] = a b by their entries a(i, l), b(l, j), l < inner.
template <class A, class B>
__device__ __forceinline__ void product(double* out, int rows, int columns, int inner, const A& a,
                                        const B& b) {
#pragma unroll 1
  for (int at = threadIdx.x; at < rows * columns; at += THREADS) {
    const int i = at / columns, j = at - i * columns;
    double sum = 0.0;
#pragma unroll 2
    for (int l = 0; l < inner; ++l) sum += a(i, l) * b(l, j);
    out[i * kSide + j] = sum;
  }
  __syncthreads();
}

// e [count, count] for vectors with the Gram matrix c, which is used up: e · (vectors) is
// orthonormal. They are taken in the order shift, shift + 1, … of their numbers modulo count; kept
// are those of whose square those before leave more than `least`, `most` of them at the most. left:
// that share, zero where a vector was not kept; then its row of e is zero.
__device__ __forceinline__ void gram_schmidt(double* c, double* e, int count, int shift, int most,
                                             double least) {
  Dense* d = dense();
  if (threadIdx.x < count) {
    const double square = c[threadIdx.x * (kSide + 1)];
    d->left[threadIdx.x] = square > 1e-280 && is_finite(square) ? 1.0 / sqrt(square) : 0.0;
  }
  __syncthreads();
#pragma unroll 1
  for (int at = threadIdx.x; at < count * count; at += THREADS) {
    const int i = at / count, j = at - i * count;
    const double scale = d->left[i], both = scale * d->left[j];
    double* entry = c + i * kSide + j;
    *entry = both == 0.0 ? 0.0 : i == j ? 1.0 : *entry * both;
    e[i * kSide + j] = i == j ? scale : 0.0;
  }
  __syncthreads();
  int kept = 0;
#pragma unroll 1
  for (int turn = 0; turn < count; ++turn) {
    const int now = turn + shift < count ? turn + shift : turn + shift - count;
    const double share = c[now * (kSide + 1)];
    const bool keep = share > least && kept < most;
    const double inverse = keep ? 1.0 / sqrt(share) : 0.0;
    kept += keep;
    if (threadIdx.x < count) {
      e[now * kSide + threadIdx.x] *= inverse;
      d->later[threadIdx.x] = c[now * kSide + threadIdx.x] * inverse;
      if (threadIdx.x == now) d->left[now] = keep ? share : 0.0;
    }
    __syncthreads();
#pragma unroll 1
    for (int at = threadIdx.x + (turn + 1) * count; at < count * count; at += THREADS) {
      const int place = at / count, j = at - place * count;
      const int i = place + shift < count ? place + shift : place + shift - count;
      c[i * kSide + j] -= d->later[i] * d->later[j];
      e[i * kSide + j] -= d->later[i] * e[now * kSide + j];
    }
    __syncthreads();
  }
}

// Rows of q: the unit eigenvectors of the symmetric h [count, count], whose diagonal becomes the
// eigenvalues, in no order. Jacobi rotations of count/2 disjoint pairs at once; in a sweep all
// meet.
__device__ __forceinline__ void eigenvectors(double* h, double* q, int count) {
  Dense* d = dense();
  const int even = (count + 1) / 2 * 2, pairs = even / 2;  // with a row of zeros, if count is odd
#pragma unroll 1
  for (int at = threadIdx.x; at < even * even; at += THREADS) {
    const int i = at / even, j = at - i * even;
    q[i * kSide + j] = i == j;
    if (i >= count || j >= count) h[i * kSide + j] = 0.0;
  }
  __syncthreads();
#pragma unroll 1
  for (int sweep = 0; sweep < 20; ++sweep) {
    double trace = 0.0;
    for (int i = 0; i < count; ++i) trace += fabs(h[i * (kSide + 1)]);
    bool more = false;
#pragma unroll 1
    for (int at = threadIdx.x; at < count * count; at += THREADS) {
      const int i = at / count, j = at - i * count;
      more |= i < j && fabs(h[i * kSide + j]) > 1e-17 * trace;
    }
    if (__syncthreads_count(more) == 0) break;
#pragma unroll 1
    for (int turn = 0; turn < even - 1; ++turn) {
      if (threadIdx.x < pairs) {  // i and j meet where i + j = turn, and the last meets who is left
        const int n = even - 1, half = turn * pairs % n, step = threadIdx.x;
        const int i = step == 0 ? half : (half + step) % n;
        const int j = step == 0 ? n : (half + n - step) % n;
        const double across = h[i * kSide + j], apart = h[j * (kSide + 1)] - h[i * (kSide + 1)];
        const double length = sqrt(apart * apart + 4.0 * across * across);
        const double tangent =
            length > 0.0 ? 2.0 * (apart < 0.0 ? -across : across) / (fabs(apart) + length) : 0.0;
        d->first[step] = i;
        d->second[step] = j;
        d->cosine[step] = 1.0 / sqrt(1.0 + tangent * tangent);
        d->sine[step] = d->cosine[step] * tangent;
      }
      __syncthreads();
#pragma unroll 1
      for (int at = threadIdx.x; at < pairs * (pairs + even); at += THREADS) {
        const int a = at / (pairs + even), b = at - a * (pairs + even);
        const int i = d->first[a], j = d->second[a];
        const double c = d->cosine[a], s = d->sine[a];
        if (b >= pairs) {  // a column of the eigenvectors
          double *x = q + i * kSide + (b - pairs), *y = q + j * kSide + (b - pairs);
          const double x_old = *x, y_old = *y;
          *x = c * x_old - s * y_old;
          *y = s * x_old + c * y_old;
        } else if (a == b) {
          const double x = h[i * (kSide + 1)], y = h[j * (kSide + 1)], xy = h[i * kSide + j];
          h[i * (kSide + 1)] = c * c * x - 2.0 * c * s * xy + s * s * y;
          h[j * (kSide + 1)] = s * s * x + 2.0 * c * s * xy + c * c * y;
          h[i * kSide + j] = h[j * kSide + i] = 0.0;
        } else if (a < b) {  // four entries, and those across the diagonal
          const int k = d->first[b], l = d->second[b];
          const double cb = d->cosine[b], sb = d->sine[b];
          const double ik = h[i * kSide + k], il = h[i * kSide + l], jk = h[j * kSide + k],
                       jl = h[j * kSide + l];
          const double ki = c * ik - s * jk, kj = s * ik + c * jk, li = c * il - s * jl,
                       lj = s * il + c * jl;
          h[i * kSide + k] = h[k * kSide + i] = cb * ki - sb * li;
          h[i * kSide + l] = h[l * kSide + i] = sb * ki + cb * li;
          h[j * kSide + k] = h[k * kSide + j] = cb * kj - sb * lj;
          h[j * kSide + l] = h[l * kSide + j] = sb * kj + cb * lj;
        }
      }
      __syncthreads();
    }
  }
}

// From the orthonormal coordinates e of the search space (v, s, d; power: v, d) and the Gram matrix
// b of its images: θ, and t [side − k, side], whose rows are the new v and, but for power, the new
// s in coordinates of it.
__device__ __forceinline__ void rayleigh_ritz(int k, bool power) {
  Dense* d = dense();
  double *a = d->a, *b = d->b, *e = d->e, *q = d->q, *t = d->t;
  const int side = power ? 2 * k : 3 * k, outputs = side - k;
  const auto entry = [](const double* x) { return [=](int i, int j) { return x[i * kSide + j]; }; };
  const auto transposed = [](const double* x) {
    return [=](int i, int j) { return x[j * kSide + i]; };
  };
  product(a, side, side, side, entry(e), entry(b));
  product(b, side, side, side, entry(a), transposed(e));
  eigenvectors(b, q, side);
  if (threadIdx.x < side) {
    const int i = threadIdx.x;
    const double value = b[i * (kSide + 1)];
    const bool kept = d->left[i] > 0.0;
    int rank = 0;  // what was not kept comes last
    for (int j = 0; j < side; ++j) {
      const double other = b[j * (kSide + 1)];
      const bool first = other > value || (other == value && j < i), is = d->left[j] > 0.0;
      rank += is == kept ? first : is;
    }
    if (rank < k) {
      d->order[rank] = i;
      d->theta[rank] = larger(value, 0.0);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int at = threadIdx.x; at < outputs * side; at += THREADS) {
    const int i = at / side, j = at - i * side, c = i < k ? i : i - k;
    const double* from = q + d->order[c] * kSide;
    // v keeps its sign; the first has that of d. s is the move: without the part in the old v.
    const double sign = from[c] == 0.0 ? from[c + outputs] : from[c];
    a[i * kSide + j] = i >= k && j < k ? 0.0 : sign < 0.0 ? -from[j] : from[j];
  }
  __syncthreads();
  product(b, outputs, outputs, side, entry(a), transposed(a));
  gram_schmidt(b, q, outputs, 0, outputs, kLeastMove);
  product(b, outputs, side, outputs, entry(q), entry(a));
  product(t, outputs, side, side, entry(b), entry(e));
}
