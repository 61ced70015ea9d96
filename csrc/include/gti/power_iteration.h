// The k largest singular triples (σ, u, v) of each matrix of a list: W v = σ u, Wᵀu = σ v.
#pragma once

#include "gti/common.h"

namespace gti {

enum class PowerMethod : int { cg = 0, power = 1 };

constexpr int kMaxTriples = 16;

struct PowerIterationItem {
  DType dtype;
  int64_t batch, m, n;
  const void* w;  // [batch, m, n], contiguous
  // [batch, n, k] of the compute type (fp64 for f64, else fp32), or nullptr: random.
  const void* start;
  // Written:
  void* u;           // [batch, m, k] of the compute type
  void* v;           // [batch, n, k] of the compute type
  double* sigma;     // [batch, k], descending
  double* residual;  // [batch, k]  ‖WᵀWv − θv‖ / θ₁
  double* upper;   // [batch]  min(‖W‖_F, √(‖W‖₁‖W‖_∞)) ≥ σ₁, with room to round to the compute type
  int64_t* steps;  // [batch]  passes over W
  bool* converged;  // [batch]  all residuals ≤ tol
};

// 1 ≤ k ≤ min(m, n, kMaxTriples). Matrices are numbered through the list; number and seed choose
// the random start vectors. tol = 0: exactly max_steps passes.
void power_iteration(const PowerIterationItem* items, int64_t n_items, int k, PowerMethod method,
                     int64_t max_steps, double tol, uint64_t seed, int threads);

// True where a matrix starts from the Gram matrix of its short side instead of at random: the cost
// model. The iteration then confirms the result with passes over W, as ever.
bool power_iteration_uses_gram(const PowerIterationItem& item, int k, PowerMethod method,
                               int64_t max_steps, double tol);

}  // namespace gti
