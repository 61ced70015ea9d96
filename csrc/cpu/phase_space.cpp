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

// Elements of a step of the loop, whatever the width of a vector: sums have the same bits.
constexpr int64_t kStep = 8;

// The place of each lane.
template <class T, int N>
GTI_INLINE Vec<T, N> places() {
  Vec<T, N> v;
  for (int l = 0; l < N; ++l) v[l] = static_cast<T>(l);
  return v;
}

// n < kStep elements: a call of memcpy would take longer.
template <class T>
GTI_INLINE void copy_tail(T* to, const T* from, int64_t n) {
  static_assert(kStep == 8);
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
template <class Places>
GTI_INLINE Places random_bits(const Places& place, uint64_t key, uint32_t far) {
  auto x = place * 0x9e3779b9u + (static_cast<uint32_t>(key) + far * 0x85ebca6bu);
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x ^= static_cast<uint32_t>(key >> 32);
  x = (x ^ (x >> 15)) * 0xd35a2d97u;
  return x ^ (x >> 15);
}

template <int N>
GTI_INLINE void store_stochastic(bf16* x, const Vec<float, N>& v, const Vec<uint32_t, N>& random) {
  const auto b = bits_as<Vec<uint32_t, N>>(v);
  const auto a = b & 0x7fffffffu;
  const auto quiet = bits_as<Vec<uint32_t, N>>(a > 0x7f800000u) & 0x40u;
  store_u16<N>(x, a >= 0x7f800000u ? (b >> 16) | quiet : (b + (random >> 16)) >> 16);
}

template <int N>
GTI_INLINE void store_stochastic(f16* x, const Vec<float, N>& v, const Vec<uint32_t, N>& random) {
  const auto b = bits_as<Vec<uint32_t, N>>(v);
  const auto a = b & 0x7fffffffu;
  const auto r = random >> 19;
  const auto normal = (a - 0x38000000u + r) >> 13;
  // Below 2^-14 halves are multiples of 2^-24.
  const auto small = a < 0x38800000u ? a : a - a;
  const auto multiple = bits_as<Vec<float, N>>(small) * 0x1p24f +
                        __builtin_convertvector(r, Vec<float, N>) * 0x1p-13f;
  const auto subnormal =
      bits_as<Vec<uint32_t, N>>(__builtin_convertvector(multiple, Vec<int32_t, N>));
  auto h = a < 0x38800000u ? subnormal : normal;
  h = (a >= 0x47800000u) | (h > 0x7c00u) ? h - h + 0x7c00u : h;  // 65536 and above: infinity
  h = a > 0x7f800000u ? h - h + 0x7e00u : h;                     // NaN
  store_u16<N>(x, h | ((b >> 16) & 0x8000u));
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
template <int B, bool kicks, bool drifts, class Q, class P, class C>
GTI_INLINE double advance(Q* q, P* p, const Q* grad, const P* w, Factors<C> f, int64_t place,
                          int64_t n) {
  constexpr bool stochastic = sizeof(Q) == 2;
  constexpr int N = std::min<int>(kStep, B / sizeof(C));  // lanes of the compute type
  constexpr int D = B / 8, parts = kStep / D;             // of fp64
  const auto as_c = [](const auto& v)
                        GTI_INLINE_LAMBDA { return __builtin_convertvector(v, Vec<C, N>); };
  Vec<double, D> sum[parts] = {};
  auto at = places<uint32_t, N>() + static_cast<uint32_t>(place);
  const auto far = static_cast<uint32_t>(place >> 32);  // of the whole chunk
  const auto step = [&](Q* q_at, P* p_at, const Q* g_at, const P* w_at) GTI_INLINE_LAMBDA {
    for (int h = 0; h < kStep; h += N) {
      auto p_v = as_c(load<N>(p_at + h));
      if constexpr (kicks) {
        const auto kicked = f.damp * p_v - f.kick * as_c(load<N>(g_at + h));
        store(p_at + h, __builtin_convertvector(kicked, Vec<P, N>));
        p_v = as_c(load<N>(p_at + h));  // as rounded to P
      }
      if constexpr (drifts) {
        const auto velocity = w_at ? as_c(load<N>(w_at + h)) * p_v : p_v;
        const auto moved = as_c(load<N>(q_at + h)) + f.drift * velocity;
        if constexpr (stochastic) {
          store_stochastic<N>(q_at + h, __builtin_convertvector(moved, Vec<float, N>),
                              random_bits(at, f.key, far));
          at += N;
        } else {
          store(q_at + h, __builtin_convertvector(moved, Vec<Q, N>));
        }
      }
    }
    if constexpr (drifts || !kicks)
      for (int h = 0; h < parts; ++h) {
        const auto p_w = widen<D>(load<D>(p_at + h * D));
        sum[h] += w_at ? widen<D>(load<D>(w_at + h * D)) * p_w * p_w : p_w * p_w;
      }
  };
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    if constexpr (drifts) fetch_ahead(q + i);
    fetch_ahead(p + i);
    if constexpr (kicks) fetch_ahead(grad + i);
    step(drifts ? q + i : nullptr, p + i, kicks ? grad + i : nullptr, w ? w + i : nullptr);
  }
  if (i < n) {  // the tail, padded with zeros
    Q q_t[kStep] = {}, g_t[kStep] = {};
    P p_t[kStep] = {}, w_t[kStep] = {};
    if (drifts) copy_tail(q_t, q + i, n - i);
    copy_tail(p_t, p + i, n - i);
    if (kicks) copy_tail(g_t, grad + i, n - i);
    if (w) copy_tail(w_t, w + i, n - i);
    step(q_t, p_t, g_t, w ? w_t : nullptr);
    if (drifts) copy_tail(q + i, q_t, n - i);
    if (kicks) copy_tail(p + i, p_t, n - i);
  }
  return f.energy * lane_sum<double, D, parts>(sum);
}

// One pair of types: the branches stand outside the loop.
#define GTI_PHASE_CHUNK(Q, P, C)                                                                   \
  GTI_LEVELS(                                                                                      \
      double, phase_chunk,                                                                         \
      (Q * q, P * p, const Q* grad, const P* w, const Factors<C>& f, bool drifts, int64_t place,   \
       int64_t n),                                                                                 \
      if (!drifts && grad) return advance<B, true, false, Q, P, C>(q, p, grad, nullptr, f, place,  \
                                                                   n);                             \
      if (!drifts) return w ? advance<B, false, false, Q, P, C>(q, p, grad, w, f, place, n)        \
                            : advance<B, false, false, Q, P, C>(q, p, grad, nullptr, f, place, n); \
      if (!grad) return w ? advance<B, false, true, Q, P, C>(q, p, grad, w, f, place, n)           \
                          : advance<B, false, true, Q, P, C>(q, p, grad, nullptr, f, place, n);    \
      return w ? advance<B, true, true, Q, P, C>(q, p, grad, w, f, place, n)                       \
               : advance<B, true, true, Q, P, C>(q, p, grad, nullptr, f, place, n);)
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
template <int N>
GTI_INLINE Vec<int64_t, N> nearest(const Vec<double, N>& x) {
  return bits_as<Vec<int64_t, N>>(x + kMiddle) - bits_as<int64_t>(kMiddle);
}

// The lower half of each lane of v, below the upper half of `above`: a blend.
template <int N>
GTI_INLINE Vec<uint64_t, N> lower_halves(const Vec<uint64_t, N>& v, uint64_t above) {
  using Halves = Vec<uint32_t, 2 * N>;
  Vec<int32_t, 2 * N> from = places<int32_t, 2 * N>();
  for (int i = 1; i < 2 * N; i += 2) from[i] += 2 * N;
  const auto uppers = bits_as<Halves>(Vec<uint64_t, N>{} + above);
  return bits_as<Vec<uint64_t, N>>(GTI_SHUFFLE(uint32_t, 2 * N, bits_as<Halves>(v), uppers, from));
}

// v rounded to nearest even, as a conversion would: 2^32 times its upper half, which 2^84 + 2^63
// lifts to where 2^32 is the unit of a double, and its lower half; only the last sum rounds.
template <int N>
GTI_INLINE Vec<double, N> real(const Vec<int64_t, N>& v) {
  constexpr double kTwo84 = 0x1p84, kTwo63 = 0x1p63;
  const auto u = bits_as<Vec<uint64_t, N>>(v);
  const auto upper = bits_as<Vec<double, N>>((u >> 32) ^ bits_as<uint64_t>(kTwo84 + kTwo63));
  const auto lower = bits_as<Vec<double, N>>(lower_halves<N>(u, bits_as<uint64_t>(kTwo52)));
  return (upper - (kTwo84 + kTwo63 + kTwo52)) + lower;
}

// Adds to `bits` one above the last `power` + 1, unless −2^power ≤ x < 2^power.
template <int power, int N>
GTI_INLINE void watch(Vec<uint64_t, N>& bits, const Vec<int64_t, N>& x) {
  bits |= bits_as<Vec<uint64_t, N>>(x) + (1ull << power);
}

// The products of the lower and the upper half of each lane: one instruction of AVX2, where GCC
// multiplies whole lanes.
template <int N>
GTI_INLINE Vec<uint64_t, N> product_of_halves(const Vec<uint64_t, N>& z) {
  const Vec<uint64_t, N> upper = z >> 32;
#if defined(__x86_64__) && !defined(GTI_LEVEL)
  if constexpr (N == 4) {
    Vec<uint64_t, N> product;
    asm("vpmuludq %2, %1, %0" : "=x"(product) : "x"(z), "x"(upper));
    return product;
  }
#endif
  return (z & 0xffffffffu) * upper;
}

// Lane by lane: GCC makes one instruction of this, and several of __builtin_convertvector.
template <int N>
GTI_INLINE Vec<float, N> rounded_to(float*, const Vec<double, N>& v) {
  float lanes[N];
  for (int l = 0; l < N; ++l) lanes[l] = static_cast<float>(v[l]);
  return load<N>(lanes);
}
template <int N>
GTI_INLINE Vec<double, N> rounded_to(double*, const Vec<double, N>& v) {
  return v;
}

template <int B, bool kicks, bool drifts, class T>
GTI_INLINE Partial grid_advance(T* q, const T* remainder, int64_t* Q, int64_t* P, const T* grad,
                                const double* w, GridFactors f, int64_t n) {
  using C = compute_t<T>;
  constexpr int N = B / 8, parts = kStep / N;
  using I = Vec<int64_t, N>;
  using Bits = Vec<uint64_t, N>;
  const auto as_integers = [](const int64_t* x) GTI_INLINE_LAMBDA {
    I v;
    std::memcpy(&v, x, sizeof(v));
    return v;
  };
  Vec<double, N> sum[parts] = {};
  Bits checksum = {}, increments = {}, coordinates = {};
  Bits keys = places<uint64_t, N>() * kChecksumKey + f.first;
  // `counted`: how many of the elements the checksum takes.
  const auto step = [&](T* q_at, const T* r_at, int64_t* Q_at, int64_t* P_at, const T* g_at,
                        const double* w_at, int64_t counted) GTI_INLINE_LAMBDA {
    for (int h = 0; h < parts; ++h) {
      const int at = h * N;
      I P_v = as_integers(P_at + at);
      if constexpr (kicks) {
        const I by = nearest<N>(f.kick * widen<N>(load<N>(g_at + at)));
        const auto z = bits_as<Bits>(by) + keys;
        keys += N * kChecksumKey;
        Bits terms = product_of_halves<N>(z);
        for (int64_t l = std::max<int64_t>(counted - at, 0); l < N; ++l) terms[l] = 0;
        checksum += terms;
        P_v -= (by ^ f.sign) - f.sign;
        std::memcpy(P_at + at, &P_v, sizeof(P_v));
        watch<kIncrementBits, N>(increments, by);
        watch<kCoordinateBits, N>(coordinates, P_v);
      }
      const auto p = real<N>(P_v);
      if constexpr (drifts) {
        const auto b = w_at ? f.drift * load<N>(w_at + at) : f.drift + Vec<double, N>{};
        const I by = nearest<N>(b * p);
        const I Q_v = as_integers(Q_at + at) + ((by ^ f.sign) - f.sign);
        std::memcpy(Q_at + at, &Q_v, sizeof(Q_v));
        watch<kIncrementBits, N>(increments, by);
        watch<kCoordinateBits, N>(coordinates, Q_v);
        auto q_v = f.unit_q * real<N>(Q_v);  // the unit is a power of two: exact
        if (r_at) {  // at Q = 0 not a sum, which would lose the sign of a zero
          const auto r_v = widen<N>(load<N>(r_at + at));
          q_v = Q_v == 0 ? r_v : q_v + r_v;
        }
        store(q_at + at, rounded_to<N>(static_cast<C*>(nullptr), q_v));
      }
      if constexpr (drifts || !kicks) sum[h] += w_at ? load<N>(w_at + at) * p * p : p * p;
    }
  };
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    fetch_ahead(P + i);
    if constexpr (kicks) fetch_ahead(grad + i);
    if constexpr (drifts) fetch_ahead(Q + i);
    if constexpr (drifts) fetch_ahead(q + i);
    step(q + i, remainder ? remainder + i : nullptr, Q + i, P + i, kicks ? grad + i : nullptr,
         w ? w + i : nullptr, kStep);
  }
  if (i < n) {  // the tail, padded with zeros
    const int64_t rest = n - i;
    T q_t[kStep], r_t[kStep] = {}, g_t[kStep] = {};
    int64_t Q_t[kStep] = {}, P_t[kStep] = {};
    double w_t[kStep] = {};
    if (remainder) copy_tail(r_t, remainder + i, rest);
    copy_tail(Q_t, Q + i, rest);
    copy_tail(P_t, P + i, rest);
    if (kicks) copy_tail(g_t, grad + i, rest);
    if (w) copy_tail(w_t, w + i, rest);
    step(q_t, r_t, Q_t, P_t, g_t, w ? w_t : nullptr, rest);
    if (drifts) copy_tail(q + i, q_t, rest);
    if (drifts) copy_tail(Q + i, Q_t, rest);
    if (kicks) copy_tail(P + i, P_t, rest);
  }
  const Bits outside = increments >> (kIncrementBits + 1) | coordinates >> (kCoordinateBits + 1);
  bool inside = true;
  for (int l = 0; l < N; ++l) inside &= outside[l] == 0;
  return {lane_sum<double, N, parts>(sum), lane_sum<uint64_t, N>(checksum), inside};
}

// A sign that the compiler knows.
GTI_INLINE GridFactors forward(GridFactors f) {
  f.sign = 0;
  return f;
}

#define GTI_GRID_CHUNK(T)                                                                     \
  GTI_LEVELS(                                                                                 \
      Partial, grid_chunk,                                                                    \
      (T * q, const T* r, int64_t* Q, int64_t* P, const T* grad, const double* w,             \
       const GridFactors& f, bool drifts, int64_t n),                                         \
      if (!drifts) return grad ? grid_advance<B, true, false, T>(q, r, Q, P, grad, w, f, n)   \
                               : grid_advance<B, false, false, T>(q, r, Q, P, grad, w, f, n); \
      if (grad && !r && !w && f.sign == 0) /* most steps: less for each vector */             \
      return grid_advance<B, true, true, T>(q, nullptr, Q, P, grad, nullptr, forward(f), n);  \
      return grad ? grid_advance<B, true, true, T>(q, r, Q, P, grad, w, f, n)                 \
                  : grid_advance<B, false, true, T>(q, r, Q, P, grad, w, f, n);)
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
