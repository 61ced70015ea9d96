// Largest singular triple (σ, u, v) of each matrix of a list: W v = σ u, Wᵀu = σ v.
#pragma once

#include "gti/common.h"

namespace gti {

enum class PowerMethod : int { cg = 0, power = 1 };

struct PowerIterationItem {
  DType dtype;
  int64_t batch, m, n;
  const void* w;  // [batch, m, n], contiguous
  const void*
      start;  // [batch, n] of the compute type (fp64 for f64, else fp32), or nullptr: random
  // Written:
  void* u;           // [batch, m] of the compute type
  void* v;           // [batch, n] of the compute type
  double* sigma;     // [batch]
  double* residual;  // [batch]  ‖WᵀWv − θv‖ / θ
  double* upper;    // [batch]  min(‖W‖_F, √(‖W‖₁‖W‖_∞)) ≥ σ, with room to round to the compute type
  int64_t* steps;   // [batch]  passes over W
  bool* converged;  // [batch]  residual ≤ tol
};

// Matrices are numbered through the list; number and seed choose the random start vector.
// tol = 0: exactly max_steps passes.
void power_iteration(const PowerIterationItem* items, int64_t n_items, PowerMethod method,
                     int64_t max_steps, double tol, uint64_t seed, int threads);

}  // namespace gti
