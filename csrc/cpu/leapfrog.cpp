#include "gti/leapfrog.h"

#include "chunks.h"
#include "simd.h"

namespace gti {
namespace {

constexpr int64_t kStep = 8;  // elements of a step of the loop, whatever the width of a vector

enum class Work { kick, drift, kick_drift };

// The factors of one chunk, already in the compute type C of its elements.
template <class C>
struct Factors {
  C kick, damp, drift;  // `drift` holds the scalar mass too, where there is one
  double energy;        // ½, times the scalar mass where there is one
};

// One chunk of n elements; grad, w may be nullptr where the work does not use them.
// Returns Σ w p² · energy of the new p as it was stored.
template <int B, Work work, class T, class C>
GTI_INLINE double advance(T* q, T* p, const T* grad, const T* w, Factors<C> f, int64_t n) {
  constexpr int N = std::min<int>(kStep, B / sizeof(C));  // lanes of the compute type
  constexpr int D = B / 8, P = kStep / D;                 // of fp64
  Vec<double, D> sum[P] = {};
  const auto step = [&](T* q_at, T* p_at, const T* g_at, const T* w_at) GTI_INLINE_LAMBDA {
    for (int h = 0; h < kStep; h += N) {
      auto p_v = load<N>(p_at + h);
      if constexpr (work != Work::drift) {
        store(p_at + h, f.damp * p_v - f.kick * load<N>(g_at + h));
        p_v = load<N>(p_at + h);  // as rounded to T
      }
      if constexpr (work != Work::kick) {
        const auto velocity = w_at ? load<N>(w_at + h) * p_v : p_v;
        store(q_at + h, load<N>(q_at + h) + f.drift * velocity);
      }
    }
    if constexpr (work == Work::kick_drift)
      for (int h = 0; h < P; ++h) {
        const auto p_w = widen<D>(load<D>(p_at + h * D));
        sum[h] += w_at ? widen<D>(load<D>(w_at + h * D)) * p_w * p_w : p_w * p_w;
      }
  };
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    if constexpr (work != Work::kick) fetch_ahead(q + i);
    fetch_ahead(p + i);
    if constexpr (work != Work::drift) fetch_ahead(grad + i);
    step(q ? q + i : nullptr, p + i, grad ? grad + i : nullptr, w ? w + i : nullptr);
  }
  if (i < n) {  // the tail, padded with zeros
    const size_t bytes = (n - i) * sizeof(T);
    T q_t[kStep] = {}, p_t[kStep] = {}, g_t[kStep] = {}, w_t[kStep] = {};
    if (q) std::memcpy(q_t, q + i, bytes);
    std::memcpy(p_t, p + i, bytes);
    if (grad) std::memcpy(g_t, grad + i, bytes);
    if (w) std::memcpy(w_t, w + i, bytes);
    step(q_t, p_t, g_t, w ? w_t : nullptr);
    if constexpr (work != Work::kick) std::memcpy(q + i, q_t, bytes);
    if constexpr (work != Work::drift) std::memcpy(p + i, p_t, bytes);
  }
  return f.energy * lane_sum<double, D, P>(sum);
}

// The branch on w stands outside the loop.
#define GTI_LEAPFROG_CHUNKS(T)                                                                     \
  GTI_LEVELS(double, kick_chunk,                                                                   \
             (T * p, const T* grad, const Factors<compute_t<T>>& f, int64_t n),                    \
             return advance<B, Work::kick, T>(nullptr, p, grad, nullptr, f, n);)                   \
  GTI_LEVELS(double, drift_chunk,                                                                  \
             (T * q, T * p, const T* w, const Factors<compute_t<T>>& f, int64_t n),                \
             return w ? advance<B, Work::drift, T>(q, p, nullptr, w, f, n)                         \
                      : advance<B, Work::drift, T>(q, p, nullptr, nullptr, f, n);)                 \
  GTI_LEVELS(double, kick_drift_chunk,                                                             \
             (T * q, T * p, const T* grad, const T* w, const Factors<compute_t<T>>& f, int64_t n), \
             return w ? advance<B, Work::kick_drift, T>(q, p, grad, w, f, n)                       \
                      : advance<B, Work::kick_drift, T>(q, p, grad, nullptr, f, n);)
GTI_LEAPFROG_CHUNKS(double)
GTI_LEAPFROG_CHUNKS(float)
GTI_LEAPFROG_CHUNKS(bf16)
GTI_LEAPFROG_CHUNKS(f16)
#undef GTI_LEAPFROG_CHUNKS

template <Work work>
double run(const LeapfrogItem* items, int64_t n_items, double kick, double drift, double damp,
           int threads) {
  return sum_over_chunks(
      items, n_items, threads, [=](const LeapfrogItem& item, int64_t at, int64_t n) {
        return with_dtype(item.dtype, [&](auto* tag) {
          using T = std::remove_pointer_t<decltype(tag)>;
          using C = compute_t<T>;
          auto* q = static_cast<T*>(item.q) + at;
          auto* p = static_cast<T*>(item.p) + at;
          const auto* grad = static_cast<const T*>(item.grad) + at;
          const auto* w = item.inv_mass ? static_cast<const T*>(item.inv_mass) + at : nullptr;
          const double mass = w ? 1.0 : item.inv_mass_scalar;
          const Factors<C> f{static_cast<C>(kick), static_cast<C>(damp),
                             static_cast<C>(drift * mass), 0.5 * mass};
          if constexpr (work == Work::kick) return kick_chunk(p, grad, f, n);
          if constexpr (work == Work::drift) return drift_chunk(q, p, w, f, n);
          if constexpr (work == Work::kick_drift) return kick_drift_chunk(q, p, grad, w, f, n);
        });
      });
}

}  // namespace

void kick(const LeapfrogItem* items, int64_t n_items, double kick, double damp, int threads) {
  run<Work::kick>(items, n_items, kick, 0.0, damp, threads);
}

void drift(const LeapfrogItem* items, int64_t n_items, double drift, int threads) {
  run<Work::drift>(items, n_items, 0.0, drift, 1.0, threads);
}

double kick_drift(const LeapfrogItem* items, int64_t n_items, double kick, double drift,
                  double damp, int threads) {
  return run<Work::kick_drift>(items, n_items, kick, drift, damp, threads);
}

}  // namespace gti
