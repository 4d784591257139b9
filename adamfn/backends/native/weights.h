// Weights in bfloat16 and the bits below them: adamfn's weights.py and its formulas of rounding.

#ifndef ADAMFN_WEIGHTS_H_
#define ADAMFN_WEIGHTS_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#include "rounding.h"

namespace adamfn {

inline int32_t WordOf(float x) {
  int32_t word;
  std::memcpy(&word, &x, sizeof word);
  return word;
}

// The float32 weights of bfloat16 ones and their corrections, if any are kept.
template <typename Correction, int kBits>
ADAMFN_LOOPS void JoinWeights(const uint16_t* __restrict narrow,
                                   const Correction* __restrict corrections, int64_t size,
                                   float* __restrict p) {
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t upper = uint32_t{narrow[i]} << 16;
    const int32_t correction = kBits == 16 ? 0 : corrections[i];
    const uint32_t lower = static_cast<uint32_t>(correction) << (32 - kBits);
    p[i] = FloatOf(static_cast<int32_t>(upper + lower));
  }
}

// What is added to the word of p + u before bits are dropped: random, and what the sum lost.
template <int kBits>
inline int32_t Added(float p, float u, float total, uint32_t noise) {
  const float added = total - p;
  const float lost = (p - (total - added)) + (u - added);
  const int32_t word = WordOf(total), exponent = word & kInfinity;
  float units = lost * std::copysign(8388608.0f, total) * FloatOf((254 << 23) - exponent);
  units = (word & 0x7FFFFF) == 0 && units < 0 ? 2 * units : units;
  const float share =
      static_cast<float>(static_cast<int32_t>((noise >> (kBits - 16)) & 0xFFFF)) * 0x1p-16f;
  const float carried = std::floor(share + units);
  // Where it is no number the sum is none, and nothing is added.
  const int32_t carry = static_cast<int32_t>(std::fabs(carried) < 65536.0f ? carried : 0.0f);
  return static_cast<int32_t>(noise >> kBits) + carry;
}

// Rounds the weights p + u (of 32 bits p, which the step has moved) to bfloat16 and corrections.
// Writes the corrections, the updates that land on the bfloat16 unless `landing` is null, and if
// `moves` where they land.
template <typename Correction, int kBits>
ADAMFN_LOOPS void SplitWeights(const float* __restrict p, const float* __restrict u,
                                    const uint32_t* __restrict noise, int64_t size, bool moves,
                                    uint16_t* __restrict narrow,
                                    Correction* __restrict corrections,
                                    float* __restrict landing) {
  constexpr uint32_t kDropped = (uint64_t{1} << (32 - kBits)) - 1;
  for (int64_t i = 0; i < size; ++i) {
    const float total = kBits == 32 ? p[i] : p[i] + u[i];
    const int32_t word = WordOf(total);
    uint32_t rounded = static_cast<uint32_t>(word);
    if constexpr (kBits != 32) {
      rounded += static_cast<uint32_t>(Added<kBits>(p[i], u[i], total, noise[i]));
      rounded &= ~kDropped;
    }
    const uint32_t nearest = (rounded + 0x8000u) & 0xFFFF0000u;
    const bool finite = (word & kInfinity) != kInfinity;
    const float weight = finite ? FloatOf(static_cast<int32_t>(nearest)) : total;
    const float stored = FromBfloat16(narrow[i]);
    const float update = weight - stored;
    const uint16_t landed = ToBfloat16(stored + update);
    if (kBits != 16) {
      const bool fits = finite && FromBfloat16(landed) == weight;
      const int32_t lower = static_cast<int32_t>(rounded - nearest) >> (32 - kBits);
      corrections[i] = static_cast<Correction>(fits ? lower : 0);
    }
    if (landing) landing[i] = update;
    if (moves) narrow[i] = landed;
  }
}

}  // namespace adamfn

#endif  // ADAMFN_WEIGHTS_H_
