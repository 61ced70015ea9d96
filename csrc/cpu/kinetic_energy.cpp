#include "gti/kinetic_energy.h"

#include "chunks.h"
#include "simd.h"

namespace gti {
namespace {

constexpr int kLanes = 8;

// ½ Σ w p² over n elements. w: [n] or nullptr (then `scalar`).
template <class T>
GTI_INLINE double chunk_energy(const T* p, const T* w, double scalar, int64_t n) {
  Vec<double, kLanes> sum = {};
  const auto add = [&](const T* p_at, const T* w_at) __attribute__((always_inline)) {
    const auto p_v = widen<kLanes>(load<kLanes>(p_at));
    sum += w_at ? widen<kLanes>(load<kLanes>(w_at)) * p_v * p_v : p_v * p_v;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) add(p + i, w ? w + i : nullptr);
  if (i < n) {  // the tail, padded with zeros
    T p_tail[kLanes] = {}, w_tail[kLanes] = {};
    std::memcpy(p_tail, p + i, (n - i) * sizeof(T));
    if (w) std::memcpy(w_tail, w + i, (n - i) * sizeof(T));
    add(p_tail, w ? w_tail : nullptr);
  }
  return 0.5 * (w ? 1.0 : scalar) * lane_sum<double, kLanes>(sum);
}

GTI_CLONES double energy(const double* p, const double* w, double scalar, int64_t n) {
  return chunk_energy(p, w, scalar, n);
}
GTI_CLONES double energy(const float* p, const float* w, double scalar, int64_t n) {
  return chunk_energy(p, w, scalar, n);
}
GTI_CLONES double energy(const bf16* p, const bf16* w, double scalar, int64_t n) {
  return chunk_energy(p, w, scalar, n);
}
GTI_CLONES double energy(const f16* p, const f16* w, double scalar, int64_t n) {
  return chunk_energy(p, w, scalar, n);
}

}  // namespace

double kinetic_energy(const KineticEnergyItem* items, int64_t n_items, int threads) {
  return sum_over_chunks(items, n_items, threads,
                         [](const KineticEnergyItem& item, int64_t at, int64_t n) {
                           return with_dtype(item.dtype, [&](auto* tag) {
                             using T = std::remove_pointer_t<decltype(tag)>;
                             const auto* w = static_cast<const T*>(item.inv_mass);
                             return energy(static_cast<const T*>(item.p) + at, w ? w + at : nullptr,
                                           item.inv_mass_scalar, n);
                           });
                         });
}

}  // namespace gti
