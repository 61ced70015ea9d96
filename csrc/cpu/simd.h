// Vectors of the compiler, loads and stores of the four element types, and functions for each
// instruction level.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "gti/common.h"

// GTI_LEVELS(result, name, (parameters), body) defines a function once for each instruction level;
// the loader picks the best. In the body B is the width of a vector register in bytes: the compiler
// keeps wider vectors in memory. It is for the hot loop of a kernel: what the body calls must be
// GTI_INLINE, a template on B, and open no parallel region.
// GTI_LEVEL is for tests: that B alone, for any processor.
#if defined(GTI_LEVEL)
#define GTI_LEVELS(result, name, parameters, ...) \
  result name parameters {                        \
    [[maybe_unused]] constexpr int B = GTI_LEVEL; \
    __VA_ARGS__                                   \
  }
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define GTI_LEVELS(result, name, parameters, ...)                                                 \
  __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"))) result name parameters { \
    [[maybe_unused]] constexpr int B = 64;                                                        \
    __VA_ARGS__                                                                                   \
  }                                                                                               \
  __attribute__((target("avx2,fma"))) result name parameters {                                    \
    [[maybe_unused]] constexpr int B = 32;                                                        \
    __VA_ARGS__                                                                                   \
  }                                                                                               \
  __attribute__((target("default"))) result name parameters {                                     \
    [[maybe_unused]] constexpr int B = 16;                                                        \
    __VA_ARGS__                                                                                   \
  }
#else
#define GTI_LEVELS(result, name, parameters, ...) \
  result name parameters {                        \
    [[maybe_unused]] constexpr int B = 16;        \
    __VA_ARGS__                                   \
  }
#endif
// Where registers are few GCC would load a vector again for each of its uses; this keeps it in one.
#if defined(__x86_64__) && defined(__GNUC__)
#define GTI_KEEP(vector) asm("" : "+x"(vector))
#else
#define GTI_KEEP(vector)
#endif
#define GTI_INLINE inline __attribute__((always_inline))
#define GTI_INLINE_LAMBDA __attribute__((always_inline))

namespace gti {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

template <class T, int N>
struct VecOf {
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
};
template <class T, int N>
using Vec = typename VecOf<T, N>::type;

template <class To, class From>
GTI_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// load<N>(x): N elements as a vector of the compute type. store(x, v): the reverse, rounded to
// nearest even.
template <int N, std::floating_point T>
GTI_INLINE Vec<T, N> load(const T* x) {
  Vec<T, N> v;
  std::memcpy(&v, x, sizeof(v));
  return v;
}
template <std::floating_point T, class V>
GTI_INLINE void store(T* x, const V& v) {
  static_assert(sizeof(V) % sizeof(T) == 0);
  std::memcpy(x, &v, sizeof(v));
}

// Asks for the memory that a loop over an array will want 2 KiB further on: left to itself the
// processor fetches ahead only up to the end of a page of 4 KiB.
GTI_INLINE void fetch_ahead(const void* x) {
  __builtin_prefetch(static_cast<const char*>(x) + 2048);
}

template <int N>
GTI_INLINE Vec<uint32_t, N> load_u16(const void* x) {
  Vec<uint16_t, N> h;
  std::memcpy(&h, x, sizeof(h));
  return __builtin_convertvector(h, Vec<uint32_t, N>);
}
template <int N>
GTI_INLINE void store_u16(void* x, const Vec<uint32_t, N>& w) {
  const auto h = __builtin_convertvector(w, Vec<uint16_t, N>);
  std::memcpy(x, &h, sizeof(h));
}

template <int N>
GTI_INLINE Vec<float, N> load(const bf16* x) {
  return bits_as<Vec<float, N>>(load_u16<N>(x) << 16);
}
template <int N>
GTI_INLINE Vec<float, N> load(const f16* x) {
  const auto h = load_u16<N>(x);
  const auto magnitude = (h & 0x7fffu) << 13;
  // Moving the exponent by a product also turns subnormal halves into normal floats.
  const auto scaled = bits_as<Vec<uint32_t, N>>(bits_as<Vec<float, N>>(magnitude) * 0x1p112f);
  const auto special = bits_as<Vec<uint32_t, N>>(magnitude >= 0x0f800000u) & 0x7f800000u;
  return bits_as<Vec<float, N>>(scaled | special | ((h & 0x8000u) << 16));
}

template <int N>
GTI_INLINE void store_narrow(bf16* x, const Vec<float, N>& v) {
  const auto b = bits_as<Vec<uint32_t, N>>(v);
  const auto rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  const auto nan = (b & 0x7fffffffu) > 0x7f800000u;
  store_u16<N>(x, nan ? (b >> 16) | 0x40u : rounded);
}
template <int N>
GTI_INLINE void store_narrow(f16* x, const Vec<float, N>& v) {
  const auto b = bits_as<Vec<uint32_t, N>>(v);
  const auto sign = (b >> 16) & 0x8000u;
  const auto a = b & 0x7fffffffu;
  auto normal = (a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13;
  normal = normal > 0x7c00u ? normal - normal + 0x7c00u : normal;
  // Below 2^-14 the sum with ½ rounds at 2^-24, the spacing of subnormal halves.
  const auto subnormal = bits_as<Vec<uint32_t, N>>(bits_as<Vec<float, N>>(a) + 0.5f) - 0x3f000000u;
  auto h = a < 0x38800000u ? subnormal : normal;
  h = a >= 0x47800000u ? h - h + 0x7c00u : h;  // 65536 and above: infinity
  h = a > 0x7f800000u ? h - h + 0x7e00u : h;   // NaN
  store_u16<N>(x, h | sign);
}
template <class V>
GTI_INLINE void store(bf16* x, const V& v) {
  store_narrow<sizeof(V) / sizeof(float)>(x, v);
}
template <class V>
GTI_INLINE void store(f16* x, const V& v) {
  store_narrow<sizeof(V) / sizeof(float)>(x, v);
}

// N numbers in fp64. Lane by lane: GCC makes one instruction of this, and many of
// __builtin_convertvector.
template <int N, class V>
GTI_INLINE Vec<double, N> widen(const V& v) {
  double lanes[N];
  for (int l = 0; l < N; ++l) lanes[l] = v[l];
  return load<N>(lanes);
}

template <int N, class V>
GTI_INLINE V abs(const V& v) {
  using Bits = Vec<std::conditional_t<sizeof(V) == 8 * N, uint64_t, uint32_t>, N>;
  return bits_as<V>(bits_as<Bits>(v) & (~Bits{} >> 1));
}

// The sum of the lanes, as a tree: lane i with lane i + N/2 first.
template <class T, int N>
GTI_INLINE T lane_sum(const Vec<T, N>& v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    Vec<T, N / 2> halves[2];
    std::memcpy(halves, &v, sizeof(v));
    return lane_sum<T, N / 2>(halves[0] + halves[1]);
  }
}

// The same of P vectors, taken for one of P·N lanes.
template <class T, int N, int P>
GTI_INLINE T lane_sum(const Vec<T, N> (&v)[P]) {
  if constexpr (P == 1) {
    return lane_sum<T, N>(v[0]);
  } else {
    Vec<T, N> half[P / 2];
    for (int i = 0; i < P / 2; ++i) half[i] = v[i] + v[i + P / 2];
    return lane_sum<T, N, P / 2>(half);
  }
}

#if defined(__clang__)
#define GTI_SHUFFLE(T, N, a, b, index) gti::shuffle_by_index<T, N>(a, b, index)
template <class T, int N, class I>
GTI_INLINE Vec<T, N> shuffle_by_index(const Vec<T, N>& a, const Vec<T, N>& b, const I& index) {
  Vec<T, N> out;
  for (int i = 0; i < N; ++i) out[i] = index[i] < N ? a[index[i]] : b[index[i] - N];
  return out;
}
#else
#define GTI_SHUFFLE(T, N, a, b, index) __builtin_shuffle(a, b, index)
#endif

// One step of `lane_sums`: a and b hold sums of G lanes each; the result holds those of a, then
// those of b, with G/2 lanes each.
template <class T, int N, int G>
GTI_INLINE Vec<T, N> fold_pair(const Vec<T, N>& a, const Vec<T, N>& b) {
  using I = Vec<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>, N>;
  I low, high;
  for (int i = 0; i < N; ++i) {
    const int half = G / 2, value = i / half;  // value of a, then of b
    low[i] = value * G + i % half;
    high[i] = low[i] + half;
  }
  return GTI_SHUFFLE(T, N, a, b, low) + GTI_SHUFFLE(T, N, a, b, high);
}

// The sums of the lanes of v[r], r < R, in the first R lanes of the result: each step folds pairs
// of vectors into one, and the last one into itself.
template <class T, int N, int G, int R>
GTI_INLINE Vec<T, N> fold_all(const Vec<T, N> (&v)[R]) {
  if constexpr (G == 1) {
    return v[0];
  } else {
    Vec<T, N> half[(R + 1) / 2];
    for (int i = 0; i < (R + 1) / 2; ++i)
      half[i] = fold_pair<T, N, G>(v[2 * i], v[std::min(2 * i + 1, R - 1)]);
    return fold_all<T, N, G / 2>(half);
  }
}

// out[r] = the sum of the lanes of v[r]; R ≤ N.
template <class T, int N, int R>
GTI_INLINE void lane_sums(const Vec<T, N> (&v)[R], T* out) {
  static_assert(R <= N);
  const Vec<T, N> sums = fold_all<T, N, N>(v);
  for (int r = 0; r < R; ++r) out[r] = sums[r];
}

// A zeroed array that begins on a cache line, so that no vector of it straddles two.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) { resize(size); }
  // Discards the contents; the memory only grows. Aligned by hand: an aligned operator new misses
  // the allocator's quick lists.
  void resize(int64_t size) {
    if (size > capacity_) {
      memory_.reset(static_cast<char*>(::operator new(size * sizeof(T) + 63)));
      const auto address = reinterpret_cast<uintptr_t>(memory_.get());
      data_ = reinterpret_cast<T*>((address + 63) / 64 * 64);
      capacity_ = size;
    }
    if (size > 0) std::memset(static_cast<void*>(data_), 0, size * sizeof(T));
    size_ = size;
  }
  int64_t size() const { return size_; }
  T* data() { return data_; }
  const T* data() const { return data_; }

 private:
  struct Free {
    void operator()(char* x) const { ::operator delete(x); }
  };
  std::unique_ptr<char, Free> memory_;
  T* data_ = nullptr;
  int64_t size_ = 0, capacity_ = 0;
};

// Calls f(static_cast<T*>(nullptr)) with the T of dtype.
template <class F>
GTI_INLINE auto with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64:
      return f(static_cast<double*>(nullptr));
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::bf16:
      return f(static_cast<bf16*>(nullptr));
    default:
      return f(static_cast<f16*>(nullptr));
  }
}

}  // namespace gti
