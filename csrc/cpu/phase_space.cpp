// The same bits on every machine: no product is contracted with the sum that follows it. Ahead of
// the headers, so that what is inlined from them obeys too.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "gti/phase_space.h"

#include <atomic>

#include "chunks.h"
#include "simd.h"

namespace gti {
namespace {

constexpr int kLanes = 8;

template <class T>
using Lanes = Vec<T, kLanes>;

// n < kLanes elements: a call of memcpy would take longer.
template <class T>
GTI_INLINE void copy_tail(T* to, const T* from, int64_t n) {
  static_assert(kLanes == 8);
  if (n & 4) {
    std::memcpy(to, from, 4 * sizeof(T));
    to += 4, from += 4;
  }
  if (n & 2) {
    std::memcpy(to, from, 2 * sizeof(T));
    to += 2, from += 2;
  }
  if (n & 1) *to = *from;
}

// ---- stochastic rounding
// -------------------------------------------------------------------------

// 32 random bits for each place (its lower half; `far` is the upper): a function of key and place.
GTI_INLINE Lanes<uint32_t> random_bits(const Lanes<uint32_t>& place, uint64_t key, uint32_t far) {
  auto x = place * 0x9e3779b9u + (static_cast<uint32_t>(key) + far * 0x85ebca6bu);
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x ^= static_cast<uint32_t>(key >> 32);
  x = (x ^ (x >> 15)) * 0xd35a2d97u;
  return x ^ (x >> 15);
}

GTI_INLINE void store_stochastic(bf16* x, const Lanes<float>& v, const Lanes<uint32_t>& random) {
  const auto b = bits_as<Lanes<uint32_t>>(v);
  const auto a = b & 0x7fffffffu;
  const auto quiet = bits_as<Lanes<uint32_t>>(a > 0x7f800000u) & 0x40u;
  store_u16<kLanes>(x, a >= 0x7f800000u ? (b >> 16) | quiet : (b + (random >> 16)) >> 16);
}

GTI_INLINE void store_stochastic(f16* x, const Lanes<float>& v, const Lanes<uint32_t>& random) {
  const auto b = bits_as<Lanes<uint32_t>>(v);
  const auto a = b & 0x7fffffffu;
  const auto r = random >> 19;
  const auto normal = (a - 0x38000000u + r) >> 13;
  // Below 2^-14 halves are multiples of 2^-24.
  const auto small = a < 0x38800000u ? a : a - a;
  const auto multiple =
      bits_as<Lanes<float>>(small) * 0x1p24f + __builtin_convertvector(r, Lanes<float>) * 0x1p-13f;
  const auto subnormal =
      bits_as<Lanes<uint32_t>>(__builtin_convertvector(multiple, Lanes<int32_t>));
  auto h = a < 0x38800000u ? subnormal : normal;
  h = (a >= 0x47800000u) | (h > 0x7c00u) ? h - h + 0x7c00u : h;  // 65536 and above: infinity
  h = a > 0x7f800000u ? h - h + 0x7e00u : h;                     // NaN
  store_u16<kLanes>(x, h | ((b >> 16) & 0x8000u));
}

// ---- a step on floating-point numbers
// ------------------------------------------------------------

template <class C>
struct Factors {
  C kick, damp, drift;  // `drift` holds the scalar mass too, where there is one
  double energy;        // ½, times the scalar mass where there is one
  uint64_t key;
};

// One chunk of n elements, the first of them at `place` of its item. Q, P: types of q
// and grad, of p and w. Arithmetic is in C. With neither kick nor drift: the energy of what is
// skipped.
template <bool kicks, bool drifts, class Q, class P, class C>
GTI_INLINE double advance(Q* q, P* p, const Q* grad, const P* w, const Factors<C>& f, int64_t place,
                          int64_t n) {
  constexpr bool stochastic = sizeof(Q) == 2;
  const auto as_c = [](const auto& v)
                        GTI_INLINE_LAMBDA { return __builtin_convertvector(v, Lanes<C>); };
  Lanes<double> sum = {};
  Lanes<uint32_t> places = {0, 1, 2, 3, 4, 5, 6, 7};
  places += static_cast<uint32_t>(place);
  const auto far = static_cast<uint32_t>(place >> 32);  // of the whole chunk
  const auto step = [&](Q* q_at, P* p_at, const Q* g_at, const P* w_at) GTI_INLINE_LAMBDA {
    auto p_v = as_c(load<kLanes>(p_at));
    if constexpr (kicks) {
      const auto kicked = f.damp * p_v - f.kick * as_c(load<kLanes>(g_at));
      store(p_at, __builtin_convertvector(kicked, Lanes<P>));
      p_v = as_c(load<kLanes>(p_at));  // as rounded to P
    }
    if constexpr (drifts) {
      const auto velocity = w_at ? as_c(load<kLanes>(w_at)) * p_v : p_v;
      const auto moved = as_c(load<kLanes>(q_at)) + f.drift * velocity;
      if constexpr (stochastic) {
        store_stochastic(q_at, __builtin_convertvector(moved, Lanes<float>),
                         random_bits(places, f.key, far));
        places += kLanes;
      } else {
        store(q_at, __builtin_convertvector(moved, Lanes<Q>));
      }
    }
    if constexpr (drifts || !kicks) {
      const auto p_w = widen<kLanes>(p_v);
      sum += w_at ? widen<kLanes>(load<kLanes>(w_at)) * p_w * p_w : p_w * p_w;
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    if constexpr (drifts) fetch_ahead(q + i);
    fetch_ahead(p + i);
    if constexpr (kicks) fetch_ahead(grad + i);
    step(drifts ? q + i : nullptr, p + i, kicks ? grad + i : nullptr, w ? w + i : nullptr);
  }
  if (i < n) {  // the tail, padded with zeros
    Q q_t[kLanes] = {}, g_t[kLanes] = {};
    P p_t[kLanes] = {}, w_t[kLanes] = {};
    if (drifts) copy_tail(q_t, q + i, n - i);
    copy_tail(p_t, p + i, n - i);
    if (kicks) copy_tail(g_t, grad + i, n - i);
    if (w) copy_tail(w_t, w + i, n - i);
    step(q_t, p_t, g_t, w ? w_t : nullptr);
    if (drifts) copy_tail(q + i, q_t, n - i);
    if (kicks) copy_tail(p + i, p_t, n - i);
  }
  return f.energy * lane_sum<double, kLanes>(sum);
}

// The clones of one pair of types: the branches stand outside the loop.
#define GTI_PHASE_CHUNK(Q, P, C)                                                                 \
  GTI_CLONES double phase_chunk(Q* q, P* p, const Q* grad, const P* w, const Factors<C>& f,      \
                                bool drifts, int64_t place, int64_t n) {                         \
    if (!drifts && grad) return advance<true, false, Q, P, C>(q, p, grad, nullptr, f, place, n); \
    if (!drifts)                                                                                 \
      return w ? advance<false, false, Q, P, C>(q, p, grad, w, f, place, n)                      \
               : advance<false, false, Q, P, C>(q, p, grad, nullptr, f, place, n);               \
    if (!grad)                                                                                   \
      return w ? advance<false, true, Q, P, C>(q, p, grad, w, f, place, n)                       \
               : advance<false, true, Q, P, C>(q, p, grad, nullptr, f, place, n);                \
    return w ? advance<true, true, Q, P, C>(q, p, grad, w, f, place, n)                          \
             : advance<true, true, Q, P, C>(q, p, grad, nullptr, f, place, n);                   \
  }
GTI_PHASE_CHUNK(double, double, double)
GTI_PHASE_CHUNK(double, float, double)
GTI_PHASE_CHUNK(float, double, double)
GTI_PHASE_CHUNK(float, float, float)
GTI_PHASE_CHUNK(bf16, double, double)
GTI_PHASE_CHUNK(bf16, float, float)
GTI_PHASE_CHUNK(f16, double, double)
GTI_PHASE_CHUNK(f16, float, float)
#undef GTI_PHASE_CHUNK

template <class Q, class P>
double phase_chunk_of(const PhaseItem& item, const PhaseStep& step, uint64_t key, int64_t at,
                      int64_t n) {
  using C = std::conditional_t<sizeof(Q) == 8 || sizeof(P) == 8, double, float>;
  if (item.skipped && !step.drifts) return 0.0;
  const bool kicks = step.kicks && !item.skipped;
  const auto* grad = kicks ? static_cast<const Q*>(item.grad) + at : nullptr;
  const auto* w = item.inv_mass ? static_cast<const P*>(item.inv_mass) + at : nullptr;
  const double mass = w ? 1.0 : item.inv_mass_scalar;
  const Factors<C> f{static_cast<C>(step.kick), static_cast<C>(step.damp),
                     static_cast<C>(step.drift * mass), 0.5 * mass, key};
  return phase_chunk(static_cast<Q*>(item.q) + at, static_cast<P*>(item.p) + at, grad, w, f,
                     step.drifts && !item.skipped, at, n);
}

// The finaliser of splitmix64 (Steele, Lea & Flood 2014).
uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// ---- a step on the grid
// --------------------------------------------------------------------------

struct GridFactors {
  double kick, drift;  // in units of the grid; `drift` holds the scalar mass too
  double unit_q;
  int64_t sign;    // 0, or −1 where back: (x ^ sign) − sign is ±x
  uint64_t first;  // key of the first element
};

struct Partial {
  double energy;  // Σ w P²
  uint64_t checksum;
  bool inside;
};

// Integers and doubles by way of numbers like 2^52 + n, which hold n in their low bits: unlike the
// conversions of the language these are vector instructions at every level.
constexpr double kTwo52 = 0x1p52, kMiddle = 0x1.8p52;

// The integers nearest to x, ties to even, for |x| < 2^51. For any other x, NaN too, an integer
// outside ±2^51, the same every time.
GTI_INLINE Lanes<int64_t> nearest(const Lanes<double>& x) {
  return bits_as<Lanes<int64_t>>(x + kMiddle) - bits_as<int64_t>(kMiddle);
}

// v rounded to nearest even, as a conversion would: 2^32 times its upper half, which 2^84 + 2^63
// lifts to where 2^32 is the unit of a double, and its lower half; only the last sum rounds.
GTI_INLINE Lanes<double> real(const Lanes<int64_t>& v) {
  constexpr double kTwo84 = 0x1p84, kTwo63 = 0x1p63;
  const auto u = bits_as<Lanes<uint64_t>>(v);
  const auto upper = bits_as<Lanes<double>>((u >> 32) ^ bits_as<uint64_t>(kTwo84 + kTwo63));
  const auto lower = bits_as<Lanes<double>>((u & 0xffffffffu) | bits_as<uint64_t>(kTwo52));
  return (upper - (kTwo84 + kTwo63 + kTwo52)) + lower;
}

// Not zero in the bits above `power` unless −2^power ≤ x < 2^power.
template <int power>
GTI_INLINE Lanes<uint64_t> beyond(const Lanes<int64_t>& x) {
  return (bits_as<Lanes<uint64_t>>(x) + (1ull << power)) & (~0ull << (power + 1));
}

// Lane by lane: GCC makes one instruction of this, and several of __builtin_convertvector.
GTI_INLINE Lanes<float> rounded_to(float*, const Lanes<double>& v) {
  float lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = static_cast<float>(v[l]);
  return load<kLanes>(lanes);
}
GTI_INLINE Lanes<double> rounded_to(double*, const Lanes<double>& v) { return v; }

template <bool kicks, bool drifts, class T>
GTI_INLINE Partial grid_advance(T* q, const T* remainder, int64_t* Q, int64_t* P, const T* grad,
                                const double* w, const GridFactors& f, int64_t n) {
  using C = compute_t<T>;
  using I = Lanes<int64_t>;
  const auto as_integers = [](const int64_t* x) GTI_INLINE_LAMBDA {
    I v;
    std::memcpy(&v, x, sizeof(v));
    return v;
  };
  Lanes<double> sum = {};
  Lanes<uint64_t> checksum = {}, outside = {}, keys = {0, 1, 2, 3, 4, 5, 6, 7};
  keys = keys * kChecksumKey + f.first;
  const auto step = [&](T* q_at, const T* r_at, int64_t* Q_at, int64_t* P_at, const T* g_at,
                        const double* w_at) GTI_INLINE_LAMBDA {
    I P_v = as_integers(P_at);
    if constexpr (kicks) {
      const I by = nearest(f.kick * widen<kLanes>(load<kLanes>(g_at)));
      const auto z = bits_as<Lanes<uint64_t>>(by) + keys;
      keys += kLanes * kChecksumKey;
      checksum += (z & 0xffffffffu) * (z >> 32);
      P_v -= (by ^ f.sign) - f.sign;
      std::memcpy(P_at, &P_v, sizeof(P_v));
      outside |= beyond<kIncrementBits>(by) | beyond<kCoordinateBits>(P_v);
    }
    const auto p = real(P_v);
    if constexpr (drifts) {
      const I by = nearest((w_at ? f.drift * load<kLanes>(w_at) : f.drift + Lanes<double>{}) * p);
      const I Q_v = as_integers(Q_at) + ((by ^ f.sign) - f.sign);
      std::memcpy(Q_at, &Q_v, sizeof(Q_v));
      outside |= beyond<kIncrementBits>(by) | beyond<kCoordinateBits>(Q_v);
      auto q_v = f.unit_q * real(Q_v);  // the unit is a power of two: exact
      if (r_at) q_v += widen<kLanes>(load<kLanes>(r_at));
      store(q_at, rounded_to(static_cast<C*>(nullptr), q_v));
    }
    if constexpr (drifts || !kicks) sum += w_at ? load<kLanes>(w_at) * p * p : p * p;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    fetch_ahead(P + i);
    if constexpr (kicks) fetch_ahead(grad + i);
    if constexpr (drifts) fetch_ahead(Q + i);
    if constexpr (drifts) fetch_ahead(q + i);
    step(q + i, remainder ? remainder + i : nullptr, Q + i, P + i, kicks ? grad + i : nullptr,
         w ? w + i : nullptr);
  }
  if (i < n) {  // the tail, padded with zeros, which count in the checksum alone
    const int64_t rest = n - i;
    T q_t[kLanes], r_t[kLanes] = {}, g_t[kLanes] = {};
    int64_t Q_t[kLanes] = {}, P_t[kLanes] = {};
    double w_t[kLanes] = {};
    if (remainder) copy_tail(r_t, remainder + i, rest);
    copy_tail(Q_t, Q + i, rest);
    copy_tail(P_t, P + i, rest);
    if (kicks) copy_tail(g_t, grad + i, rest);
    if (w) copy_tail(w_t, w + i, rest);
    const auto before = checksum;
    step(q_t, r_t, Q_t, P_t, g_t, w ? w_t : nullptr);
    for (int64_t l = rest; l < kLanes; ++l) checksum[l] = before[l];
    if (drifts) copy_tail(q + i, q_t, rest);
    if (drifts) copy_tail(Q + i, Q_t, rest);
    if (kicks) copy_tail(P + i, P_t, rest);
  }
  uint64_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= outside[l];
  return {lane_sum<double, kLanes>(sum), lane_sum<uint64_t, kLanes>(checksum), bits == 0};
}

#define GTI_GRID_CHUNK(T)                                                                        \
  GTI_CLONES Partial grid_chunk(T* q, const T* r, int64_t* Q, int64_t* P, const T* grad,         \
                                const double* w, const GridFactors& f, bool drifts, int64_t n) { \
    if (!drifts)                                                                                 \
      return grad ? grid_advance<true, false, T>(q, r, Q, P, grad, w, f, n)                      \
                  : grid_advance<false, false, T>(q, r, Q, P, grad, w, f, n);                    \
    if (grad && !r && !w) /* most tensors: two branches less for each vector */                  \
      return grid_advance<true, true, T>(q, nullptr, Q, P, grad, nullptr, f, n);                 \
    return grad ? grid_advance<true, true, T>(q, r, Q, P, grad, w, f, n)                         \
                : grid_advance<false, true, T>(q, r, Q, P, grad, w, f, n);                       \
  }
GTI_GRID_CHUNK(double)
GTI_GRID_CHUNK(float)
GTI_GRID_CHUNK(bf16)
GTI_GRID_CHUNK(f16)
#undef GTI_GRID_CHUNK

}  // namespace

double phase_step(const PhaseItem* items, int64_t n_items, const PhaseStep& step, int threads) {
  return sum_over_chunks(
      items, n_items, threads, [&](const PhaseItem& item, int64_t at, int64_t n) {
        const uint64_t key = mixed(step.key + static_cast<uint64_t>(&item - items));
        return with_dtype(item.q_dtype, [&](auto* tag) {
          using Q = std::remove_pointer_t<decltype(tag)>;
          return item.p_dtype == DType::f64 ? phase_chunk_of<Q, double>(item, step, key, at, n)
                                            : phase_chunk_of<Q, float>(item, step, key, at, n);
        });
      });
}

GridResult grid_step(const GridItem* items, int64_t n_items, const GridStep& step, int threads) {
  std::vector<int64_t> before(n_items + 1, 0);  // elements of the items before
  for (int64_t i = 0; i < n_items; ++i) before[i + 1] = before[i] + items[i].count;
  std::atomic<uint64_t> checksum = 0;  // integers: the order of additions does not matter
  std::atomic<bool> inside = true;
  const double energy =
      sum_over_chunks(items, n_items, threads, [&](const GridItem& item, int64_t at, int64_t n) {
        return with_dtype(item.dtype, [&](auto* tag) {
          using T = std::remove_pointer_t<decltype(tag)>;
          if (item.skipped && !step.drifts) return 0.0;
          const bool kicks = step.kicks && !item.skipped;
          const auto* grad = kicks ? static_cast<const T*>(item.grad) + at : nullptr;
          const auto* r = item.remainder ? static_cast<const T*>(item.remainder) + at : nullptr;
          const auto* w = item.inv_mass ? item.inv_mass + at : nullptr;
          const double mass = w ? 1.0 : item.inv_mass_scalar;
          const GridFactors f{step.kick / item.scale / item.unit_p,
                              step.drift * item.scale * (item.unit_p / item.unit_q) * mass,
                              item.unit_q, step.back ? -1 : 0,
                              (before[&item - items] + at + 1) * kChecksumKey};
          const Partial part = grid_chunk(static_cast<T*>(item.q) + at, r, item.Q + at, item.P + at,
                                          grad, w, f, step.drifts && !item.skipped, n);
          checksum.fetch_add(part.checksum, std::memory_order_relaxed);
          if (!part.inside) inside.store(false, std::memory_order_relaxed);
          const double p_unit = item.scale * item.unit_p;
          return 0.5 * mass * p_unit * p_unit * part.energy;
        });
      });
  return {checksum, inside, energy};
}

}  // namespace gti
