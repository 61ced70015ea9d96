// Kinetic energy K = ½ Σ_t Σ_i w_{t,i} p_{t,i}² of a list of tensors, w = M⁻¹.
#pragma once

#include "gti/common.h"

namespace gti {

struct KineticEnergyItem {
  DType dtype;
  int64_t count;         // elements; 0 is allowed
  const void* p;         // [count]
  const void* inv_mass;  // [count] of the same dtype, or nullptr: inv_mass_scalar for every element
  double inv_mass_scalar;
};

// Reads items[0..n_items); writes nothing. Terms and sums are fp64.
double kinetic_energy(const KineticEnergyItem* items, int64_t n_items, int threads);

}  // namespace gti
