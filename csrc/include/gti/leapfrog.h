// In-place kick and drift over a list of tensors.
//   kick:        p ← damp·p − kick·grad
//   drift:       q ← q + drift·w·p, w = M⁻¹
//   kick_drift:  both in one pass over memory; returns ½ Σ w p² of the new p
// Arithmetic is fp32 for bf16, f16 and f32 and fp64 for f64; each stored element is rounded once.
#pragma once

#include "gti/common.h"

namespace gti {

struct LeapfrogItem {
  DType dtype;           // of every buffer of the item
  int64_t count;         // elements; 0 is allowed
  void* q;               // [count], written by drift and kick_drift; unused by kick
  void* p;               // [count], written by kick and kick_drift
  const void* grad;      // [count]; unused by drift
  const void* inv_mass;  // [count], or nullptr: inv_mass_scalar for every element; unused by kick
  double inv_mass_scalar;
};

// No two written buffers may overlap.
void kick(const LeapfrogItem* items, int64_t n_items, double kick, double damp, int threads);
void drift(const LeapfrogItem* items, int64_t n_items, double drift, int threads);
double kick_drift(const LeapfrogItem* items, int64_t n_items, double kick, double drift,
                  double damp, int threads);

}  // namespace gti
