// The symplectic 2-form Ω = G − Gᵀ, G = DQ DPᵀ, of m tangent vectors, its error bound, and the
// metric S = DQ DQᵀ + DP DPᵀ from the same read. G holds every product of Ω once, and G − Gᵀ is
// skew to the bit. Bytes read: 2·m·N·sizeof(Element) up to m = 16; operations: 2·m²·N.

#define WEIGHTED 0
#define SYMMETRIC 0
#include "inner_products.cuh"

// Block problem·m + i, and a warp for each pair (i, j), j >= i: Ω_ij = G_ij − G_ji, its bound, S_ij
// (unless metric is null); all [batch, m, m]. sums and norms: of tile_sums with `forms` of G, S.
// factor, underflow: of the bound, as the launcher explains.
extern "C" __global__ void __launch_bounds__(THREADS)
    finish(const double* sums, const double* norms, int64 m, int64 forms, int64 stretches,
           double factor, double underflow, double* omega, double* bound, double* metric) {
  const int64 problem = blockIdx.x / m, i = blockIdx.x % m;
  const int64 entry = kParts * stretches;
  sums += problem * forms * m * m * entry;
  norms += problem * 2 * m * stretches;
  omega += problem * m * m;
  bound += problem * m * m;
  const auto norm_of = [&](int64 row) {
    return norm(norms + row * stretches, stretches, underflow);
  };
  for (int64 j = i + threadIdx.x / 32; j < m; j += kWarps) {
    Sum w = total(sums + (i * m + j) * entry, stretches, kParts);
    const Sum back = total(sums + (j * m + i) * entry, stretches, kParts);
    w.add(-back.high, -back.low);
    const double value = w.high + w.low;  // on the diagonal 0, or NaN
    const double size = norm_of(i) * norm_of(m + j) + norm_of(m + i) * norm_of(j);
    const double limit = error_bound(value, size, factor, underflow);
    if (threadIdx.x % 32 == 0) {
      omega[i * m + j] = value;
      omega[j * m + i] = i == j ? value : -value;
      bound[i * m + j] = bound[j * m + i] = i == j ? value : limit;
    }
    if (metric) {
      const Sum s = total(sums + ((m + i) * m + j) * entry, stretches, kParts);
      double* of = metric + problem * m * m;
      if (threadIdx.x % 32 == 0) of[i * m + j] = of[j * m + i] = s.high + s.low;
    }
  }
}
