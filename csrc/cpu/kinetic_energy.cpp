#include "gti/kinetic_energy.h"

#include "chunks.h"
#include "simd.h"

namespace gti {
namespace {

constexpr int64_t kStep = 8;  // elements of a step of the loop, whatever the width of a vector

// ½ Σ w p² over n elements. w: [n] or nullptr (then `scalar`).
template <int B, class T>
GTI_INLINE double chunk_energy(const T* p, const T* w, double scalar, int64_t n) {
  constexpr int N = B / 8, P = kStep / N;
  Vec<double, N> sum[P] = {};
  const auto add = [&](const T* p_at, const T* w_at) GTI_INLINE_LAMBDA {
    for (int h = 0; h < P; ++h) {
      const auto p_v = widen<N>(load<N>(p_at + h * N));
      sum[h] += w_at ? widen<N>(load<N>(w_at + h * N)) * p_v * p_v : p_v * p_v;
    }
  };
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) add(p + i, w ? w + i : nullptr);
  if (i < n) {  // the tail, padded with zeros
    T p_tail[kStep] = {}, w_tail[kStep] = {};
    std::memcpy(p_tail, p + i, (n - i) * sizeof(T));
    if (w) std::memcpy(w_tail, w + i, (n - i) * sizeof(T));
    add(p_tail, w ? w_tail : nullptr);
  }
  return 0.5 * (w ? 1.0 : scalar) * lane_sum<double, N, P>(sum);
}

#define GTI_ENERGY(T)                                                            \
  GTI_LEVELS(double, energy, (const T* p, const T* w, double scalar, int64_t n), \
             return chunk_energy<B>(p, w, scalar, n);)
GTI_ENERGY(double)
GTI_ENERGY(float)
GTI_ENERGY(bf16)
GTI_ENERGY(f16)
#undef GTI_ENERGY

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
