// Weighted inner products of the rows of A [m, N] and B [l, N]: gram_ij = Σ_c w_c a_ic b_jc.
#pragma once

#include "gti/common.h"

namespace gti {

struct GramItem {
  DType dtype;    // of a and b
  int64_t count;  // N_t, columns
  const void* a;  // [batch, m, count], contiguous
  const void* b;  // [batch, l, count]; nullptr in every item: b is a, and l = m
  DType weight_dtype;
  const void* weight;  // [count], the same for the whole batch; nullptr in every item: ones
};

// gram [batch, m, l], bound [batch, m, l]: written, fp64, row-major. Symmetric to the bit where b
// is a. |gram_ij − exact| ≤ bound_ij.
void gram(const GramItem* items, int64_t n_items, int64_t batch, int64_t m, int64_t l, double* gram,
          double* bound, int threads);

}  // namespace gti
