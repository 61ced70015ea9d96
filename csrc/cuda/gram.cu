// Weighted inner products G = A diag(w) Bᵀ of m and l vectors and their error bounds; where B is A,
// from half of the products and symmetric to the bit. Bytes read: (m + l)·N·sizeof(Element), or
// m·N·sizeof(Element), up to 16 vectors.

#define METRIC 0
#include "inner_products.cuh"

// Block problem·m + i, and a warp for each pair (i, j), of j >= i where SYMMETRIC:
// G_ij and its bound, [batch, m, l]. sums and norms: of tile_sums. factor, underflow: of the bound,
// as the launcher explains.
extern "C" __global__ void __launch_bounds__(THREADS)
    finish(const double* sums, const double* norms, int64 m, int64 l, int64 stretches,
           double factor, double underflow, double* gram, double* bound) {
  const int64 problem = blockIdx.x / m, i = blockIdx.x % m;
  sums += problem * m * l * kParts * stretches;
  norms += problem * (SYMMETRIC ? m : m + l) * stretches;
  gram += problem * m * l;
  bound += problem * m * l;
  const double a = norm(norms + i * stretches, stretches, underflow);
  for (int64 j = (SYMMETRIC ? i : 0) + threadIdx.x / 32; j < l; j += kWarps) {
    const Sum sum = total(sums + (i * l + j) * kParts * stretches, stretches, kParts);
    const double value = sum.high + sum.low;
    const double b = norm(norms + ((SYMMETRIC ? 0 : m) + j) * stretches, stretches, underflow);
    const double limit = error_bound(value, a * b, factor, underflow);
    if (threadIdx.x % 32 == 0) {
      gram[i * l + j] = value;
      bound[i * l + j] = limit;
      if (SYMMETRIC) {
        gram[j * l + i] = value;
        bound[j * l + i] = limit;
      }
    }
  }
}
