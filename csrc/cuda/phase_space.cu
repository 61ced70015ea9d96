// The steps of a plan (csrc/include/gti/phase_space.h), each of a whole list in one pass: a kick
// and a drift of parameters whose momenta may be wider, 16-bit parameters rounded stochastically;
// and the same on a grid of integers, which can be undone to the last bit. The bits are those of
// the CPU: a product that a sum follows is rounded by itself.
//
// Bound by the bandwidth of device memory. In bytes an element, sizes of the dtypes being q and p:
// 3q + 2p for `phase_step` with both steps, 40 for `grid_step` with q = 4. The widest operand is
// read and written 16 bytes at a time, the others in pieces of as many elements, so that a warp
// always touches whole sectors; four pieces of every operand are under way before the first is
// used.
//
// An operand whose address is null takes no part. Macros: ELEMENT, of q and ∇L; MOMENTUM 0: p and
// M⁻¹ of `phase_step` are fp64, 1: fp32; THREADS.

#include "ragged.cuh"

#if MOMENTUM == 0
typedef double Momentum;
#else
typedef float Momentum;
#endif

constexpr int kLoads = 4;  // of a thread and an operand at a time

// Never contracted: the compiler fuses none of these with its neighbours.
__device__ __forceinline__ float times(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double times(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float plus(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double plus(double a, double b) { return __dadd_rn(a, b); }

// ---- pieces of memory
// ----------------------------------------------------------------------------

// kSize elements as they are in memory, read or written at once where the address allows it.
template <class T, int kSize>
struct alignas(kSize * sizeof(T)) Piece {
  unsigned word[kSize * sizeof(T) / 4];
};

// from[0 … kSize), of which `count` exist (the rest is zero). kWhole: all do, and `even`.
template <bool kWhole, class T, int kSize>
__device__ __forceinline__ void read(Piece<T, kSize>& piece, const T* from, int64 count,
                                     bool even) {
  if (kWhole || (even && count >= kSize)) {
    piece = *reinterpret_cast<const Piece<T, kSize>*>(from);
  } else {
    T x[kSize];
#pragma unroll
    for (int e = 0; e < kSize; ++e) x[e] = e < count ? from[e] : T(0);
    memcpy(&piece, x, sizeof(x));
  }
}

template <bool kWhole, class T, int kSize>
__device__ __forceinline__ void write(T* to, int64 count, bool even, const T (&x)[kSize]) {
  if (kWhole || (even && count >= kSize)) {
    Piece<T, kSize> piece;
    memcpy(&piece, x, sizeof(x));
    *reinterpret_cast<Piece<T, kSize>*>(to) = piece;
  } else {
#pragma unroll
    for (int e = 0; e < kSize; ++e)
      if (e < count) to[e] = x[e];
  }
}

template <class T, int kSize>
__device__ __forceinline__ void unpack(const Piece<T, kSize>& piece, T (&x)[kSize]) {
  memcpy(x, &piece, sizeof(x));
}

// The elements from `first` on of a tensor, or null.
template <class T>
__device__ __forceinline__ T* elements(int64 address, int64 first) {
  return address ? static_cast<T*>(__cvta_global_to_generic(address)) + first : nullptr;
}

template <class T, int kSize>
__device__ __forceinline__ bool aligned(int64 address) {
  return address % static_cast<int64>(kSize * sizeof(T)) == 0;
}

// Σ x modulo 2^64 over the threads of a block; shares its memory with the sum of doubles.
__device__ __forceinline__ uint64 block_sum(uint64 x) {
  uint64* parts = reinterpret_cast<uint64*>(shared_memory());
#pragma unroll
  for (int o = 16; o > 0; o /= 2) x += __shfl_xor_sync(kAll, x, o);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  uint64 total = parts[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) total += parts[w];
  return total;
}

// ---- stochastic rounding
// -------------------------------------------------------------------------

// The finaliser of splitmix64 (Steele, Lea & Flood 2014).
__device__ __forceinline__ uint64 mixed(uint64 x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// 32 random bits: a function of key and place.
__device__ __forceinline__ unsigned random_bits(uint64 place, uint64 key) {
  unsigned x = static_cast<unsigned>(place) * 0x9e3779b9u +
               (static_cast<unsigned>(key) + static_cast<unsigned>(place >> 32) * 0x85ebca6bu);
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x ^= static_cast<unsigned>(key >> 32);
  x = (x ^ (x >> 15)) * 0xd35a2d97u;
  return x ^ (x >> 15);
}

// Up or down, with the probabilities that keep the mean; of more than 16 bits to nearest.
__device__ __forceinline__ Element rounded(C x, uint64 place, uint64 key) {
#if ELEMENT < 2
  return x;
#else
  const unsigned random = random_bits(place, key);
  const unsigned b = __float_as_uint(x), a = b & 0x7fffffffu;
#if ELEMENT == 2
  if (a >= 0x7f800000u) return static_cast<Element>((b >> 16) | (a > 0x7f800000u ? 0x40u : 0u));
  return static_cast<Element>((b + (random >> 16)) >> 16);
#else
  const unsigned r = random >> 19;
  unsigned h = (a - 0x38000000u + r) >> 13;
  if (a < 0x38800000u)  // below 2^-14 halves are multiples of 2^-24
    h = static_cast<unsigned>(static_cast<int>(
        plus(times(__uint_as_float(a), 0x1p24f), times(static_cast<float>(r), 0x1p-13f))));
  if (a >= 0x47800000u || h > 0x7c00u) h = 0x7c00u;  // 65536 and above: infinity
  if (a > 0x7f800000u) h = 0x7e00u;                  // NaN
  return static_cast<Element>(h | ((b >> 16) & 0x8000u));
#endif
#endif
}

// ---- a step on floating-point numbers
// ------------------------------------------------------------

#if ELEMENT == 0
typedef double Compute;
#else
typedef Momentum Compute;
#endif

constexpr int kPiece = 16 / sizeof(Compute);  // elements that a thread takes at once

struct Factors {
  Compute kick, damp, drift;  // `drift` holds the mass too, where it is one number
  uint64 key;
};

// One chunk of `count` elements, the first of them at `place` of its tensor; returns Σ M⁻¹p² of a
// thread, 1 in place of M⁻¹ where it is one number.
template <bool kWhole>
__device__ __forceinline__ double advance(Momentum* p, Element* q, const Element* g,
                                          const Momentum* w, int64 place, int64 count, bool even,
                                          const Factors& by) {
  double squares = 0.0;
#pragma unroll 1
  for (int64 first = threadIdx.x * kPiece; first < count; first += kLoads * kPiece * THREADS) {
    Piece<Momentum, kPiece> raw_p[kLoads], raw_w[kLoads] = {};
    Piece<Element, kPiece> raw_q[kLoads] = {}, raw_g[kLoads] = {};
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int64 at = first + u * kPiece * THREADS, left = count - at;
      read<kWhole>(raw_p[u], p + at, left, even);
      if (g) read<kWhole>(raw_g[u], g + at, left, even);
      if (q) read<kWhole>(raw_q[u], q + at, left, even);
      if (w) read<kWhole>(raw_w[u], w + at, left, even);
    }
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int64 at = first + u * kPiece * THREADS, left = count - at;
      Momentum momentum[kPiece], inverse[kPiece];
      Element position[kPiece], slope[kPiece];
      unpack(raw_p[u], momentum);
      unpack(raw_w[u], inverse);
      if (g) {
        unpack(raw_g[u], slope);
#pragma unroll
        for (int e = 0; e < kPiece; ++e) {
          const Compute damped = times(by.damp, static_cast<Compute>(momentum[e]));
          const Compute kick = times(by.kick, static_cast<Compute>(widen(slope[e])));
          momentum[e] = static_cast<Momentum>(plus(damped, -kick));
        }
        write<kWhole>(p + at, left, even, momentum);
      }
      if (q) {
        unpack(raw_q[u], position);
#pragma unroll
        for (int e = 0; e < kPiece; ++e) {
          const Compute x = momentum[e];  // as it was rounded
          const Compute velocity = w ? times(static_cast<Compute>(inverse[e]), x) : x;
          const Compute moved =
              plus(static_cast<Compute>(widen(position[e])), times(by.drift, velocity));
          position[e] = rounded(static_cast<C>(moved), place + at + e, by.key);
        }
        write<kWhole>(q + at, left, even, position);
      }
#pragma unroll
      for (int e = 0; e < kPiece; ++e) {
        const double x = momentum[e];
        squares = fma(w ? inverse[e] * x : x, x, squares);
      }
    }
  }
  return squares;
}

// table [items] each: addresses of p and of M⁻¹ (null where it is one number), that number (1 where
// it is not), place in the list, counts; then [items + 1] first chunks. qs, gs: [items] addresses
// of q and ∇L, or null: no drift, no kick. A factor is a number or, where it was computed on the
// device, at an address; so is what is added to the key. partials [chunks]: ½ Σ M⁻¹p², written
// where it drifts.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    phase_step(const int64* table, int64 items, const int64* qs, const int64* gs, double kick,
               const double* kick_at, double damp, const double* damp_at, double drift,
               const double* drift_at, uint64 key, const uint64* key_at, double* partials) {
  const Chunk chunk = find_chunk(table + 4 * items, items);
  const int64* row = table + chunk.item;
  const int64 g_address = gs ? gs[chunk.item] : 0;
  const int64 q_address = qs ? qs[chunk.item] : 0;
  const int64 p_address = row[0], w_address = row[items];
  const double mass = __longlong_as_double(row[2 * items]);
  const bool even = aligned<Momentum, kPiece>(p_address | w_address) &&
                    aligned<Element, kPiece>(q_address | g_address);
  Momentum* p = elements<Momentum>(p_address, chunk.first);
  Element* q = elements<Element>(q_address, chunk.first);
  const Element* g = elements<const Element>(g_address, chunk.first);
  const Momentum* w = elements<const Momentum>(w_address, chunk.first);
  if (key_at) key += *key_at;
  const Factors by = {static_cast<Compute>(kick_at ? *kick_at : kick),
                      static_cast<Compute>(damp_at ? *damp_at : damp),
                      static_cast<Compute>((drift_at ? *drift_at : drift) * mass),
                      mixed(key + row[3 * items])};
  if (!qs && !g) return;
  const double squares = even && chunk.count == kChunk
                             ? advance<true>(p, q, g, w, chunk.first, kChunk, true, by)
                             : advance<false>(p, q, g, w, chunk.first, chunk.count, even, by);
  if (!qs) return;
  const double energy = 0.5 * mass * block_sum(squares);
  if (threadIdx.x == 0) partials[blockIdx.x] = energy;
}

// ---- a step on the grid
// --------------------------------------------------------------------------

constexpr int kPair = 16 / sizeof(int64);
constexpr int kPairs = 2;  // of a thread and an operand at a time: of four there is no room
constexpr int kIncrementBits = 51, kCoordinateBits = 62;  // −2^bits ≤ number < 2^bits
constexpr uint64 kChecksumKey = 0x9e3779b97f4a7c15u;
constexpr double kMiddle = 0x1.8p52;  // kMiddle + n holds n in its low bits

// The integer nearest to x, ties to even, for |x| < 2^51. For any other x, NaN too, an integer
// outside ±2^51, the same every time.
__device__ __forceinline__ int64 nearest(double x) {
  return __double_as_longlong(plus(x, kMiddle)) - __double_as_longlong(kMiddle);
}

// Not zero in the bits above `power` unless −2^power ≤ x < 2^power.
template <int kPower>
__device__ __forceinline__ uint64 beyond(int64 x) {
  return (static_cast<uint64>(x) + (1ull << kPower)) & (~0ull << (kPower + 1));
}

struct GridFactors {
  double kick, drift;  // in units of the grid; `drift` holds the mass too, where it is one number
  double unit_q;
  int64 sign;    // 0, or −1 where back: (x ^ sign) − sign is ±x
  uint64 first;  // key of the first element
};

struct Sums {
  double squares = 0.0;  // Σ M⁻¹P², 1 in place of M⁻¹ where it is one number
  uint64 checksum = 0;
  uint64 outside = 0;  // not zero where an increment or a coordinate is beyond its limits
};

template <bool kWhole>
__device__ __forceinline__ Sums advance(int64* P, int64* Q, Element* q, const Element* g,
                                        const Element* rest, const double* w, int64 count,
                                        bool even, const GridFactors& by) {
  Sums sums;
#pragma unroll 1
  for (int64 first = threadIdx.x * kPair; first < count; first += kPairs * kPair * THREADS) {
    Piece<int64, kPair> raw_P[kPairs], raw_Q[kPairs] = {};
    Piece<Element, kPair> raw_g[kPairs] = {}, raw_rest[kPairs] = {};
    Piece<double, kPair> raw_w[kPairs] = {};
#pragma unroll
    for (int u = 0; u < kPairs; ++u) {
      const int64 at = first + u * kPair * THREADS, left = count - at;
      read<kWhole>(raw_P[u], P + at, left, even);
      if (g) read<kWhole>(raw_g[u], g + at, left, even);
      if (q) read<kWhole>(raw_Q[u], Q + at, left, even);
      if (rest) read<kWhole>(raw_rest[u], rest + at, left, even);
      if (w) read<kWhole>(raw_w[u], w + at, left, even);
    }
#pragma unroll
    for (int u = 0; u < kPairs; ++u) {
      const int64 at = first + u * kPair * THREADS, left = count - at;
      int64 momentum[kPair], position[kPair];
      double inverse[kPair];
      Element slope[kPair], remainder[kPair], shown[kPair];
      unpack(raw_P[u], momentum);
      unpack(raw_w[u], inverse);
      if (g) {
        unpack(raw_g[u], slope);
#pragma unroll
        for (int e = 0; e < kPair; ++e) {
          const int64 step = nearest(times(by.kick, static_cast<double>(widen(slope[e]))));
          momentum[e] -= (step ^ by.sign) - by.sign;
          sums.outside |= beyond<kIncrementBits>(step) | beyond<kCoordinateBits>(momentum[e]);
          const uint64 z = static_cast<uint64>(step) + (by.first + (at + e) * kChecksumKey);
          if (kWhole || e < left) sums.checksum += (z & 0xffffffffu) * (z >> 32);
        }
        write<kWhole>(P + at, left, even, momentum);
      }
      if (q) {
        unpack(raw_Q[u], position);
        unpack(raw_rest[u], remainder);
#pragma unroll
        for (int e = 0; e < kPair; ++e) {
          const double x = static_cast<double>(momentum[e]);
          const int64 step = nearest(times(w ? times(by.drift, inverse[e]) : by.drift, x));
          position[e] += (step ^ by.sign) - by.sign;
          sums.outside |= beyond<kIncrementBits>(step) | beyond<kCoordinateBits>(position[e]);
          double moved = times(by.unit_q, static_cast<double>(position[e]));
          if (rest) {  // at Q = 0 not a sum, which would lose the sign of a zero
            const double r = static_cast<double>(widen(remainder[e]));
            moved = position[e] == 0 ? r : plus(moved, r);
          }
          shown[e] = narrow(static_cast<C>(moved));
        }
        write<kWhole>(Q + at, left, even, position);
        write<kWhole>(q + at, left, even, shown);
      }
#pragma unroll
      for (int e = 0; e < kPair; ++e) {
        const double x = static_cast<double>(momentum[e]);
        sums.squares = fma(w ? inverse[e] * x : x, x, sums.squares);
      }
    }
  }
  return sums;
}

// table [items] each: addresses of P, Q, the remainder (null: zero) and M⁻¹ (null where it is one
// number), that number (1 where it is not), unit_q, 1/unit_p, unit_p/unit_q, elements of the
// tensors before, counts; then [items + 1] first chunks. qs, gs: as above. scales: s of each tensor
// [items], or null where it is `scale` for all. sign: 0, or −1 for the way back. [chunks] each:
// partials as above, written where it drifts; checksums of the increments of the kick; outside, 1
// where an increment or a coordinate is beyond its limits, else 0.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    grid_step(const int64* table, int64 items, const int64* qs, const int64* gs, double kick,
              double drift, double scale, const double* scales, int64 sign, double* partials,
              uint64* checksums, int64* outside) {
  const Chunk chunk = find_chunk(table + 9 * items, items);
  const int64* row = table + chunk.item;
  const int64 g_address = gs ? gs[chunk.item] : 0;
  const int64 q_address = qs ? qs[chunk.item] : 0;
  const int64 P_address = row[0], Q_address = row[items];
  const int64 rest_address = row[2 * items], w_address = row[3 * items];
  const double mass = __longlong_as_double(row[4 * items]);
  const double unit_q = __longlong_as_double(row[5 * items]);
  const double per_unit_p = __longlong_as_double(row[6 * items]);
  const double ratio = __longlong_as_double(row[7 * items]);
  const bool even = aligned<int64, kPair>(P_address | Q_address | w_address) &&
                    aligned<Element, kPair>(q_address | g_address | rest_address);
  int64* P = elements<int64>(P_address, chunk.first);
  int64* Q = elements<int64>(Q_address, chunk.first);
  Element* q = elements<Element>(q_address, chunk.first);
  const Element* g = elements<const Element>(g_address, chunk.first);
  const Element* rest = elements<const Element>(rest_address, chunk.first);
  const double* w = elements<const double>(w_address, chunk.first);
  const uint64 place = row[8 * items] + chunk.first;
  const double s = scales ? scales[chunk.item] : scale;
  const GridFactors by = {times(kick / s, per_unit_p), times(times(times(drift, s), ratio), mass),
                          unit_q, sign, (place + 1) * kChecksumKey};
  Sums sums;
  if (qs || g)
    sums = even && chunk.count == kChunk
               ? advance<true>(P, Q, q, g, rest, w, kChunk, true, by)
               : advance<false>(P, Q, q, g, rest, w, chunk.count, even, by);
  const double unit = s * (ratio * unit_q);
  const double energy = 0.5 * mass * unit * unit * block_sum(sums.squares);
  const int beyond_limits = __syncthreads_count(sums.outside != 0);  // and the sums stay apart
  const uint64 checksum = block_sum(sums.checksum);
  if (threadIdx.x == 0) {
    if (qs) partials[blockIdx.x] = energy;
    checksums[blockIdx.x] = checksum;
    outside[blockIdx.x] = beyond_limits != 0;
  }
}
