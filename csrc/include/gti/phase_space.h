// The steps of a plan: kick and drift over a list of tensors whose momenta may be wider than their
// positions, and the same on a grid of integers, which can be undone to the last bit.
#pragma once

#include "gti/common.h"

namespace gti {

struct PhaseItem {
  DType q_dtype, p_dtype;  // of q and grad; of p and inv_mass (f32 or f64)
  int64_t count;           // elements; 0 is allowed
  void* q;                 // [count], written by the drift
  void* p;                 // [count], written by the kick
  const void* grad;        // [count], read by the kick
  const void* inv_mass;    // [count], or nullptr: inv_mass_scalar for every element
  double inv_mass_scalar;
  bool skipped;  // takes no part: neither kicked nor moved
};

struct PhaseStep {
  bool kicks, drifts;
  double kick, damp, drift;
  uint64_t key;  // of stochastic rounding, one per drift
};

// p ← damp·p − kick·grad, then q ← q + drift·w·p, each if the step has it. Returns ½ Σ w p² of the
// new p where it drifts, of skipped items too, else 0. Arithmetic is fp64 if q or p is, else
// fp32. A q of 16 bits is rounded up or down at random, with the probabilities that keep its mean,
// by a hash of the key, the place of the item in the list and the place of the element; any other
// number to nearest.
double phase_step(const PhaseItem* items, int64_t n_items, const PhaseStep& step, int threads);

struct GridItem {
  DType dtype;             // of q and grad
  int64_t count;           // elements; 0 is allowed
  void* q;                 // [count], written by the drift: unit_q·Q + remainder
  const void* remainder;   // [count] of dtype, or nullptr: zero
  int64_t* Q;              // [count], written by the drift
  int64_t* P;              // [count], written by the kick
  const void* grad;        // [count], read by the kick
  const double* inv_mass;  // [count], or nullptr: inv_mass_scalar for every element
  double inv_mass_scalar;
  double unit_q, unit_p;  // powers of two
  double scale;           // s
  bool skipped;           // takes no part: neither kicked nor moved
};

struct GridStep {
  bool kicks, drifts, back;
  double kick, drift;
};

struct GridResult {
  uint64_t checksum;  // of the increments of the kick
  bool inside;        // every increment and every new coordinate is inside its limits
  double energy;      // ½ Σ w (s·unit_p·P)² of the new P where it drifts, of skipped items too
};

// P ← P ∓ round(kick/s/unit_p · grad), then Q ← Q ± round((drift·s·unit_p/unit_q · w) · P) with the
// new P; the lower signs where `back`. Products are rounded to fp64 one by one, `round` is to the
// nearest integer, ties to even. Where increments or coordinates leave their limits, the opposite
// step on the same gradient still undoes this one. The checksum is Σ lo·hi modulo 2^64 over the
// halves of increment + (1 + place in the whole list)·kChecksumKey.
GridResult grid_step(const GridItem* items, int64_t n_items, const GridStep& step, int threads);

constexpr uint64_t kChecksumKey = 0x9e3779b97f4a7c15u;
constexpr int kIncrementBits = 51, kCoordinateBits = 62;  // −2^bits ≤ number < 2^bits

}  // namespace gti
