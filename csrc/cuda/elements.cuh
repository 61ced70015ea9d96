// Elements of a tensor in memory and in registers. A source names its dtype by the macro ELEMENT:
// 0 fp64, 1 fp32, 2 bf16, 3 fp16. Sources compile with nvcc, with NVRTC and, with the header of the
// tests, with g++.
#pragma once

typedef long long int64;
typedef unsigned long long uint64;

#if ELEMENT == 0
typedef double Element;
typedef double C;  // of all arithmetic on elements
#elif ELEMENT == 1
typedef float Element;
typedef float C;
#else
typedef unsigned short Element;  // the bits
typedef float C;
#endif

constexpr int V = 16 / sizeof(Element);  // elements that a thread reads at once
constexpr unsigned kAll = 0xffffffffu;   // lanes of a warp

// What differs between a GPU and the emulation.
#ifndef GTI_EMULATION
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  return dynamic_shared;
}
__device__ __forceinline__ float half_to_float(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
__device__ __forceinline__ unsigned short float_to_half(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
__device__ __forceinline__ unsigned short float_to_bf16(float x) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif

__device__ __forceinline__ C widen(Element x) {
#if ELEMENT == 2
  return __uint_as_float(static_cast<unsigned>(x) << 16);
#elif ELEMENT == 3
  return half_to_float(x);
#else
  return x;
#endif
}

__device__ __forceinline__ Element narrow(C x) {  // to nearest, ties to even
#if ELEMENT == 2
  return float_to_bf16(x);
#elif ELEMENT == 3
  return float_to_half(x);
#else
  return x;
#endif
}

// One of V elements.
__device__ __forceinline__ C element(const uint4& raw, int e) {
  const unsigned word[4] = {raw.x, raw.y, raw.z, raw.w};
#if ELEMENT == 0
  return __hiloint2double(word[2 * e + 1], word[2 * e]);
#elif ELEMENT == 1
  return __uint_as_float(word[e]);
#elif ELEMENT == 2
  return __uint_as_float(e % 2 == 0 ? word[e / 2] << 16 : word[e / 2] & 0xffff0000u);
#else
  return half_to_float(static_cast<unsigned short>(word[e / 2] >> e % 2 * 16));
#endif
}

__device__ __forceinline__ void widen(const uint4& raw, C (&x)[V]) {
#pragma unroll
  for (int e = 0; e < V; ++e) x[e] = element(raw, e);
}

// V elements as they are in memory.
__device__ __forceinline__ uint4 pack(const Element (&x)[V]) {
#if ELEMENT == 0
  const uint64 a = __double_as_longlong(x[0]), b = __double_as_longlong(x[1]);
  return {static_cast<unsigned>(a), static_cast<unsigned>(a >> 32), static_cast<unsigned>(b),
          static_cast<unsigned>(b >> 32)};
#elif ELEMENT == 1
  return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
          __float_as_uint(x[3])};
#else
  unsigned word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) word[i] = x[2 * i] | static_cast<unsigned>(x[2 * i + 1]) << 16;
  return {word[0], word[1], word[2], word[3]};
#endif
}

// from[0 … V), of which `count` exist (the rest is zero); 16 bytes at once where `even` says that
// the address allows it. kWhole: it does, and all exist.
template <bool kWhole>
__device__ __forceinline__ uint4 fetch(const Element* from, int64 count, bool even) {
  if (kWhole || (even && count >= V)) {
    return *reinterpret_cast<const uint4*>(from);
  } else {
    Element x[V];
#pragma unroll
    for (int e = 0; e < V; ++e) x[e] = e < count ? from[e] : Element(0);
    return pack(x);
  }
}

// The way back: to[0 … V) ← x, of which `count` exist.
template <bool kWhole>
__device__ __forceinline__ void put(Element* to, int64 count, bool even, const Element (&x)[V]) {
  if (kWhole || (even && count >= V)) {
    *reinterpret_cast<uint4*>(to) = pack(x);
  } else {
#pragma unroll
    for (int e = 0; e < V; ++e)
      if (e < count) to[e] = x[e];
  }
}
