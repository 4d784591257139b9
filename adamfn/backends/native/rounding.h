// Float32 numbers as bits, bfloat16, and the noise that rounds them: adamfn's formats/floats.py,
// formats/bfloat16.py and the noise of formats/base.py.

#ifndef ADAMFN_ROUNDING_H_
#define ADAMFN_ROUNDING_H_

#include <cstdint>
#include <cstring>

namespace adamfn {

// A function whose loops take many operations for each number: in vectors of 512 bits, where GCC
// would take 256. None is inlined: the compiler vectorizes what it knows to be apart.
#if defined(__AVX512F__) && !defined(__clang__)
#define ADAMFN_LOOPS [[gnu::noinline, gnu::target("prefer-vector-width=512")]]
#else
#define ADAMFN_LOOPS [[gnu::noinline]]
#endif

inline constexpr int32_t kInfinity = 0x7F800000;

inline int32_t BitsOf(float x) {  // of |x|
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & 0x7FFFFFFF;
}

inline float FloatOf(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t Hash(uint32_t x, uint32_t key) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15) ^ key) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// The random words of a leaf at a step: 16 bits for mu, and above them 16 for nu.
class Noise {
 public:
  Noise(int32_t count, uint32_t leaf) {
    const uint32_t hashed = Hash(leaf + 0x9E3779B9u, 0);
    add_ = Hash(static_cast<uint32_t>(count), hashed);
    key_ = Hash(add_ + 0x85EBCA6Bu, hashed);
  }

  // The words of some elements in a row.
  ADAMFN_LOOPS void Fill(uint32_t first, int64_t size, uint32_t* __restrict words) const {
    const uint32_t add = add_ + first, key = key_;
    for (int64_t i = 0; i < size; ++i) words[i] = Hash(add + static_cast<uint32_t>(i), key);
  }

 private:
  uint32_t add_, key_;
};

inline float FromBfloat16(uint16_t x) { return FloatOf(static_cast<int32_t>(uint32_t{x} << 16)); }

inline uint16_t ToBfloat16(float x) {  // to nearest, ties to even
  uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  const bool nan = (word & 0x7FFFFFFF) > 0x7F800000;
  const uint32_t rounded = word + 0x7FFF + ((word >> 16) & 1);
  return static_cast<uint16_t>((nan ? word | 0x400000 : rounded) >> 16);
}

inline uint16_t ToBfloat16(float x, uint32_t random) {  // up or down by the 16 lower bits of random
  uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  const bool finite = (word & 0x7F800000) != 0x7F800000;
  const uint32_t quiet = (word & 0x7FFFFF) ? 0x400000 : 0;
  return static_cast<uint16_t>((finite ? word + (random & 0xFFFF) : word | quiet) >> 16);
}

ADAMFN_LOOPS inline void Widen(const uint16_t* __restrict narrow, int64_t size,
                               float* __restrict wide) {
  for (int64_t i = 0; i < size; ++i) wide[i] = FromBfloat16(narrow[i]);
}

ADAMFN_LOOPS inline void Narrow(const float* __restrict wide, int64_t size,
                                uint16_t* __restrict narrow) {
  for (int64_t i = 0; i < size; ++i) narrow[i] = ToBfloat16(wide[i]);
}

// Of moments, mu by the lower bits of the noise, and nu by the upper.
ADAMFN_LOOPS inline void Narrow(const float* __restrict mu, const float* __restrict nu,
                                const uint32_t* __restrict noise, int64_t size,
                                uint16_t* __restrict narrow_mu, uint16_t* __restrict narrow_nu) {
  for (int64_t i = 0; i < size; ++i) {
    narrow_mu[i] = ToBfloat16(mu[i], noise[i]);
    narrow_nu[i] = ToBfloat16(nu[i], noise[i] >> 16);
  }
}

// XLA takes denormals for zero, in and out. So does this, on whatever thread it runs.
class FlushDenormals {
 public:
  FlushDenormals() : before_(Read()) { Write(before_ | kBits); }
  ~FlushDenormals() { Write(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
#if defined(__SSE__)
  using Word = unsigned int;
  static constexpr Word kBits = 0x8040;  // FTZ and DAZ of MXCSR
  static Word Read() { return __builtin_ia32_stmxcsr(); }
  static void Write(Word word) { __builtin_ia32_ldmxcsr(word); }
#elif defined(__aarch64__)
  using Word = uint64_t;
  static constexpr Word kBits = uint64_t{1} << 24;  // FZ of FPCR
  static Word Read() {
    Word word;
    asm volatile("mrs %0, fpcr" : "=r"(word));
    return word;
  }
  static void Write(Word word) { asm volatile("msr fpcr, %0" : : "r"(word)); }
#else
  using Word = int;
  static constexpr Word kBits = 0;
  static Word Read() { return 0; }
  static void Write(Word) {}
#endif
  Word before_;
};

}  // namespace adamfn

#endif  // ADAMFN_ROUNDING_H_
