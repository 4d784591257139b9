// SPDX-License-Identifier: Apache-2.0
// Weights in bfloat16 and the bits below them: core/weights.py and the formulas that round weights.

#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "group.h"
#include "rounding.h"

namespace adamfn::ADAMFN_VARIANT {

// The type of the lower bits of weights of which so many bits are kept.
template <int kBits>
using Lower = std::conditional_t<kBits == 32, int16_t, int8_t>;

// The float32 weights of bfloat16 ones and their lower bits, if any are kept.
template <int kBits>
ADAMFN_LOOPS void Join(const uint16_t* __restrict upper, const Lower<kBits>* __restrict lower,
                       int64_t size, float* __restrict p) {
  for (int64_t i = 0; i < size; ++i) {
    const int32_t below = kBits == 16 ? 0 : lower[i];
    p[i] = FloatOf((uint32_t{upper[i]} << 16) + (static_cast<uint32_t>(below) << (32 - kBits)));
  }
}

// What is added to the bits of p + u before the last ones are dropped: random bits, and what the
// sum lost.
template <int kBits>
inline int32_t Added(float p, float u, float total, uint32_t random) {
  const float added = total - p;
  const float lost = (p - (total - added)) + (u - added);  // half a unit of the last bit, at most
  const uint32_t bits = BitsOf(total);
  const int32_t exponent = static_cast<int32_t>(bits) & kInfinity;
  // In 65536ths of that unit, like the last 16 random bits.
  float units = lost * std::copysign(0x1p39f, total) * FloatOf((254 << 23) - exponent);
  units = (bits & 0x7FFFFF) == 0 && units < 0 ? 2 * units : units;
  const float sum =
      static_cast<float>(static_cast<int32_t>(random >> (kBits - 16) & 0xFFFF)) + units;
  // If the total is not finite, neither holds.
  return static_cast<int32_t>(random >> kBits) + (sum >= 65536.0f) - (sum < 0);
}

// The bits of the bfloat16 nearest to a weight of so many bits.
template <int kBits>
inline uint32_t NearestUpper(uint32_t rounded) {
  return kBits == 16 ? rounded : (rounded + 0x8000u) & 0xFFFF0000u;
}

// Rounds the weights p + u (of 32 bits: p, which the step has moved) to so many bits. Returns whether
// all updates land, that is, lead from the stored weights to exactly these.
template <int kBits>
ADAMFN_LOOPS bool Round(const float* __restrict p, const float* __restrict u,
                        const uint32_t* __restrict random, int64_t size,
                        const uint16_t* __restrict upper, uint32_t* __restrict rounded,
                        float* __restrict landing) {
  constexpr uint32_t kDropped = (uint64_t{1} << (32 - kBits)) - 1;
  int32_t astray = 0;
  for (int64_t i = 0; i < size; ++i) {
    const float total = kBits == 32 ? p[i] : p[i] + u[i];
    uint32_t bits = BitsOf(total);
    if constexpr (kBits != 32) {
      bits += static_cast<uint32_t>(Added<kBits>(p[i], u[i], total, random[i]));
      bits &= ~kDropped;
    }
    rounded[i] = bits;
    const float weight = FloatOf(NearestUpper<kBits>(bits));
    const float stored = FromBfloat16(upper[i]), update = weight - stored;
    landing[i] = update;
    astray |= stored + update == weight ? 0 : 1;
  }
  return !astray;
}

// The same where some weights are not finite, or so much smaller than the stored ones that their
// updates do not land: those keep no lower bits.
template <int kBits>
void Land(const float* p, const float* u, int64_t size, const uint16_t* upper, uint32_t* rounded,
          float* landing) {
  for (int64_t i = 0; i < size; ++i) {
    const float total = kBits == 32 ? p[i] : p[i] + u[i], stored = FromBfloat16(upper[i]);
    const bool finite = MagnitudeBitsOf(total) < kInfinity;
    const float weight = finite ? FloatOf(NearestUpper<kBits>(rounded[i])) : total;
    landing[i] = weight - stored;
    const uint16_t landed = ToBfloat16(stored + landing[i]);
    if (!finite || FromBfloat16(landed) != weight) rounded[i] = uint32_t{landed} << 16;
  }
}

template <int kBits>
ADAMFN_LOOPS void Store(const uint32_t* __restrict rounded, int64_t size, bool moves,
                        uint16_t* __restrict upper, Lower<kBits>* __restrict lower) {
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t nearest = NearestUpper<kBits>(rounded[i]);
    if (moves) upper[i] = static_cast<uint16_t>(nearest >> 16);
    if (kBits != 16) {
      const int32_t below = static_cast<int32_t>(rounded[i] - nearest) >> (32 - kBits);
      lower[i] = static_cast<Lower<kBits>>(below);
    }
  }
}

template <int kBits>
void Split(const float* p, const float* u, const uint32_t* random, int64_t size, bool moves,
           uint16_t* upper, void* lower, float* landing) {
  uint32_t rounded[kLargestBlock];
  float unread[kLargestBlock];
  if (!landing) landing = unread;
  if (!Round<kBits>(p, u, random, size, upper, rounded, landing)) {
    Land<kBits>(p, u, size, upper, rounded, landing);
  }
  Store<kBits>(rounded, size, moves, upper, static_cast<Lower<kBits>*>(lower));
}

inline void JoinWeights(int32_t bits, const uint16_t* upper, const void* lower, int64_t size,
                        float* p) {
  if (bits == 16) return Join<16>(upper, nullptr, size, p);
  if (bits == 24) return Join<24>(upper, static_cast<const int8_t*>(lower), size, p);
  return Join<32>(upper, static_cast<const int16_t*>(lower), size, p);
}

// Rounds the weights p + u of a tile to bfloat16 and their lower bits. Writes the lower bits, the
// updates that land on the bfloat16 unless `landing` is null, and if `moves` the bfloat16.
inline void SplitWeights(int32_t bits, const float* p, const float* u, const uint32_t* random,
                         int64_t size, bool moves, uint16_t* upper, void* lower, float* landing) {
  const auto split = bits == 16 ? Split<16> : bits == 24 ? Split<24> : Split<32>;
  split(p, u, random, size, moves, upper, lower, landing);
}

}  // namespace adamfn::ADAMFN_VARIANT
