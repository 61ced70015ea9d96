// The same bits on every machine: no product is contracted with the sum that follows it. Ahead of
// the headers, so that what is inlined from them obeys too.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "gti/phase_space.h"

#include <array>
#include <atomic>

#include "chunks.h"
#include "simd.h"

namespace gti {
namespace {

constexpr int kLanes = 8;

template <class T>
using Lanes = Vec<T, kLanes>;

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
  for (; i + kLanes <= n; i += kLanes)
    step(drifts ? q + i : nullptr, p + i, kicks ? grad + i : nullptr, w ? w + i : nullptr);
  if (i < n) {  // the tail, padded with zeros
    const size_t q_bytes = (n - i) * sizeof(Q), p_bytes = (n - i) * sizeof(P);
    Q q_t[kLanes] = {}, g_t[kLanes] = {};
    P p_t[kLanes] = {}, w_t[kLanes] = {};
    if (drifts) std::memcpy(q_t, q + i, q_bytes);
    std::memcpy(p_t, p + i, p_bytes);
    if (kicks) std::memcpy(g_t, grad + i, q_bytes);
    if (w) std::memcpy(w_t, w + i, p_bytes);
    step(q_t, p_t, g_t, w ? w_t : nullptr);
    if (drifts) std::memcpy(q + i, q_t, q_bytes);
    if (kicks) std::memcpy(p + i, p_t, p_bytes);
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

// The integer nearest to x, ties to even, for |x| < 2^51. For any other x, NaN too, an integer
// outside ±2^51, the same every time.
GTI_INLINE int64_t nearest(double x) {
  return static_cast<int64_t>(bits_as<uint64_t>(x + kMiddle) - bits_as<uint64_t>(kMiddle));
}

// v rounded to nearest even, as a conversion would.
GTI_INLINE double real(int64_t v) {
  const uint64_t u = static_cast<uint64_t>(v) + (1ull << 63);
  const auto half = [](uint64_t x) GTI_INLINE_LAMBDA {
    return bits_as<double>(x | bits_as<uint64_t>(kTwo52));
  };
  return (half(u >> 32) - (kTwo52 + 0x1p31)) * 0x1p32 + (half(u & 0xffffffffu) - kTwo52);
}

// Not zero in the bits above `power` unless −2^power ≤ x < 2^power.
template <int power>
GTI_INLINE uint64_t beyond(int64_t x) {
  return (static_cast<uint64_t>(x) + (1ull << power)) & (~0ull << (power + 1));
}

constexpr int64_t kBlock = 256;  // elements that stay in the nearest cache from loop to loop

// The keys of a block: a load is cheaper than a product of 64 bits.
constexpr auto kBlockKeys = [] {
  std::array<uint64_t, kBlock> keys{};
  for (int64_t i = 0; i < kBlock; ++i) keys[i] = i * kChecksumKey;
  return keys;
}();

// n numbers in the compute type: where they are, or widened into `buffer`.
template <class T>
GTI_INLINE const compute_t<T>* widened(const T* x, compute_t<T>* buffer, int64_t n) {
  if constexpr (sizeof(T) > 2) {
    return x;
  } else {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(buffer + i, load<kLanes>(x + i));
    for (; i < n; ++i) {
      T one[kLanes] = {x[i]};
      buffer[i] = load<kLanes>(one)[0];
    }
    return buffer;
  }
}

template <class T>
GTI_INLINE void narrowed(T* x, const float* buffer, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(x + i, load<kLanes>(buffer + i));
  for (; i < n; ++i) {
    T one[kLanes];
    store(one, Lanes<float>{buffer[i]});
    x[i] = one[0];
  }
}

template <bool kicks, bool drifts, class T>
GTI_INLINE Partial grid_advance(T* q, const T* remainder, int64_t* Q, int64_t* P, const T* grad,
                                const double* w, const GridFactors& f, int64_t n) {
  using C = compute_t<T>;
  alignas(64) double p_real[kBlock];
  alignas(64) C buffer[kBlock];
  Lanes<double> sum = {};
  uint64_t checksum = 0;
  uint64_t outside = 0;
  for (int64_t at = 0; at < n; at += kBlock) {
    const int64_t m = std::min(kBlock, n - at);
    int64_t* P_at = P + at;
    if constexpr (kicks) {
      const C* g = widened(grad + at, buffer, m);
      const uint64_t first = f.first + at * kChecksumKey;
#pragma omp simd reduction(+ : checksum) reduction(| : outside)
      for (int64_t i = 0; i < m; ++i) {
        const int64_t by = nearest(f.kick * static_cast<double>(g[i]));
        const uint64_t z = static_cast<uint64_t>(by) + (first + kBlockKeys[i]);
        checksum += (z & 0xffffffffu) * (z >> 32);
        const int64_t P_new = P_at[i] - ((by ^ f.sign) - f.sign);
        P_at[i] = P_new;
        p_real[i] = real(P_new);
        outside |= beyond<kIncrementBits>(by) | beyond<kCoordinateBits>(P_new);
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < m; ++i) p_real[i] = real(P_at[i]);
    }
    if constexpr (drifts) {
      int64_t* Q_at = Q + at;
      const C* r = remainder ? widened(remainder + at, buffer, m) : nullptr;
      C* q_at;
      if constexpr (sizeof(T) > 2)
        q_at = q + at;
      else
        q_at = buffer;
      const auto drift = [&](auto rate_of, auto rest_of) GTI_INLINE_LAMBDA {
#pragma omp simd reduction(| : outside)
        for (int64_t i = 0; i < m; ++i) {
          const int64_t by = nearest(rate_of(i) * p_real[i]);
          const int64_t Q_new = Q_at[i] + ((by ^ f.sign) - f.sign);
          Q_at[i] = Q_new;
          outside |= beyond<kIncrementBits>(by) | beyond<kCoordinateBits>(Q_new);
          // The unit is a power of two, so the product is exact.
          q_at[i] = static_cast<C>(rest_of(i, f.unit_q * real(Q_new)));
        }
      };
      const auto one_rate = [&](int64_t) GTI_INLINE_LAMBDA { return f.drift; };
      const auto rates = [&](int64_t i) GTI_INLINE_LAMBDA { return f.drift * w[at + i]; };
      const auto no_rest = [](int64_t, double x) GTI_INLINE_LAMBDA { return x; };
      const auto rest = [&](int64_t i, double x)
                            GTI_INLINE_LAMBDA { return x + static_cast<double>(r[i]); };
      if (!w && !r)
        drift(one_rate, no_rest);
      else if (!w)
        drift(one_rate, rest);
      else if (!r)
        drift(rates, no_rest);
      else
        drift(rates, rest);
      if constexpr (sizeof(T) == 2) narrowed(q + at, buffer, m);
    }
    if constexpr (drifts || !kicks) {
      int64_t i = 0;
      for (; i + kLanes <= m; i += kLanes) {
        const auto p = load<kLanes>(p_real + i);
        sum += w ? load<kLanes>(w + at + i) * p * p : p * p;
      }
      for (; i < m; ++i) sum[i % kLanes] += (w ? w[at + i] : 1.0) * p_real[i] * p_real[i];
    }
  }
  return {lane_sum<double, kLanes>(sum), checksum, outside == 0};
}

#define GTI_GRID_CHUNK(T)                                                                        \
  GTI_CLONES Partial grid_chunk(T* q, const T* r, int64_t* Q, int64_t* P, const T* grad,         \
                                const double* w, const GridFactors& f, bool drifts, int64_t n) { \
    if (!drifts)                                                                                 \
      return grad ? grid_advance<true, false, T>(q, r, Q, P, grad, w, f, n)                      \
                  : grid_advance<false, false, T>(q, r, Q, P, grad, w, f, n);                    \
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
