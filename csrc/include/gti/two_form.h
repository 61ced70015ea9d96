// The symplectic 2-form of m tangent vectors z_i = (dq_i, dp_i):
//   omega_ij = Σ_a dq_ia dp_ja − dp_ia dq_ja,   metric_ij = Σ_a dq_ia dq_ja + dp_ia dp_ja.
#pragma once

#include "gti/common.h"

namespace gti {

struct TwoFormItem {
  DType dtype;
  int64_t count;   // N_t, columns
  const void* dq;  // [batch, m, count], contiguous
  const void* dp;  // [batch, m, count]
};

// omega [batch, m, m], bound [batch, m, m]: written; metric [batch, m, m]: written unless nullptr.
// All fp64, row-major. omega is skew to the bit with a zero diagonal (NaN where row i holds a NaN);
// |omega_ij − exact| ≤ bound_ij.
void two_form(const TwoFormItem* items, int64_t n_items, int64_t batch, int64_t m, double* omega,
              double* bound, double* metric, int threads);

}  // namespace gti
