// SPDX-License-Identifier: Apache-2.0
// Float32 numbers as bits, bfloat16, and the random bits that round, as adamfn/formats has them.

#pragma once

#include <cstdint>
#include <cstring>

namespace adamfn::ADAMFN_VARIANT {

// A function whose loops take many operations for each number: in vectors of 512 bits, where GCC
// would take 256. None is inlined: the compiler vectorizes what it knows to be apart.
#if defined(__AVX512F__) && !defined(__clang__)
#define ADAMFN_LOOPS [[gnu::noinline, gnu::target("prefer-vector-width=512")]]
#else
#define ADAMFN_LOOPS [[gnu::noinline]]
#endif

inline constexpr int32_t kInfinity = 0x7F800000;

inline uint32_t BitsOf(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline int32_t MagnitudeBitsOf(float x) { return static_cast<int32_t>(BitsOf(x) & 0x7FFFFFFF); }

inline float FloatOf(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float FloatOf(int32_t bits) { return FloatOf(static_cast<uint32_t>(bits)); }

inline uint32_t Hash(uint32_t x, uint32_t key) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15) ^ key) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// The random bits of a leaf at a step, 32 for each element: 16 for mu, and above them 16 for nu.
class Noise {
 public:
  Noise(int32_t count, uint32_t leaf) {
    const uint32_t hashed = Hash(leaf + 0x9E3779B9u, 0);
    add_ = Hash(static_cast<uint32_t>(count), hashed);
    key_ = Hash(add_ + 0x85EBCA6Bu, hashed);
  }

  // Fills in those of elements whose indices follow each other.
  ADAMFN_LOOPS void Fill(uint32_t first, int64_t size, uint32_t* __restrict random) const {
    const uint32_t add = add_ + first, key = key_;
    for (int64_t i = 0; i < size; ++i) random[i] = Hash(add + static_cast<uint32_t>(i), key);
  }

 private:
  uint32_t add_, key_;
};

inline float FromBfloat16(uint16_t x) { return FloatOf(uint32_t{x} << 16); }

inline uint16_t ToBfloat16(float x) {  // to nearest, ties to even
  const uint32_t bits = BitsOf(x);
  const bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
  const uint32_t rounded = bits + 0x7FFF + ((bits >> 16) & 1);
  return static_cast<uint16_t>((nan ? bits | 0x400000 : rounded) >> 16);
}

inline uint16_t ToBfloat16(float x, uint32_t random) {  // up or down by the 16 lower bits of random
  const uint32_t bits = BitsOf(x);
  const bool finite = (bits & 0x7F800000) != 0x7F800000;
  const uint32_t quiet = (bits & 0x7FFFFF) ? 0x400000 : 0;
  return static_cast<uint16_t>((finite ? bits + (random & 0xFFFF) : bits | quiet) >> 16);
}

ADAMFN_LOOPS inline void Widen(const uint16_t* __restrict narrow, int64_t size,
                               float* __restrict wide) {
  for (int64_t i = 0; i < size; ++i) wide[i] = FromBfloat16(narrow[i]);
}

ADAMFN_LOOPS inline void Narrow(const float* __restrict wide, int64_t size,
                                uint16_t* __restrict narrow) {
  for (int64_t i = 0; i < size; ++i) narrow[i] = ToBfloat16(wide[i]);
}

// Rounds mu by the lower half of the random bits, nu by the upper half.
ADAMFN_LOOPS inline void Narrow(const float* __restrict mu, const float* __restrict nu,
                                const uint32_t* __restrict random, int64_t size,
                                uint16_t* __restrict narrow_mu, uint16_t* __restrict narrow_nu) {
  for (int64_t i = 0; i < size; ++i) {
    narrow_mu[i] = ToBfloat16(mu[i], random[i]);
    narrow_nu[i] = ToBfloat16(nu[i], random[i] >> 16);
  }
}

// XLA takes denormals for zero, in and out. So does this, on whatever thread it runs.
class FlushDenormals {
 public:
  FlushDenormals() : before_(Read()) { Write(before_ | kFlush); }
  ~FlushDenormals() { Write(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
#if defined(__SSE__)
  using Register = unsigned int;
  static constexpr Register kFlush = 0x8040;  // FTZ and DAZ of MXCSR
  static Register Read() { return __builtin_ia32_stmxcsr(); }
  static void Write(Register value) { __builtin_ia32_ldmxcsr(value); }
#elif defined(__aarch64__)
  using Register = uint64_t;
  static constexpr Register kFlush = uint64_t{1} << 24;  // FZ of FPCR
  static Register Read() {
    Register value;
    asm volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void Write(Register value) { asm volatile("msr fpcr, %0" : : "r"(value)); }
#else
#error "This processor's flag for denormals is not known."
#endif
  Register before_;
};

}  // namespace adamfn::ADAMFN_VARIANT
