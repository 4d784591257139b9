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
  const float lost = (p - (total - added)) + (u - added);  // half a unit of the last bit, at most
  const int32_t word = WordOf(total), exponent = word & kInfinity;
  // In 65536ths of that unit, as the share of the noise is.
  float units = lost * std::copysign(0x1p39f, total) * FloatOf((254 << 23) - exponent);
  units = (word & 0x7FFFFF) == 0 && units < 0 ? 2 * units : units;
  const float sum = static_cast<float>(static_cast<int32_t>(noise >> (kBits - 16) & 0xFFFF)) + units;
  // Where it is no number the total is none, and nothing is carried.
  return static_cast<int32_t>(noise >> kBits) + (sum >= 65536.0f) - (sum < 0);
}

// The bfloat16 nearest to a word whose lower bits were dropped, as a word.
template <int kBits>
inline uint32_t Nearest(uint32_t rounded) {
  return kBits == 16 ? rounded : (rounded + 0x8000u) & 0xFFFF0000u;
}

// Rounds the weights p + u (of 32 bits p, which the step has moved) to words of so many bits. Returns
// whether each is a number that its update lands on: what is stored now and the difference make it.
template <int kBits>
ADAMFN_LOOPS bool RoundWeights(const float* __restrict p, const float* __restrict u,
                               const uint32_t* __restrict noise, int64_t size,
                               const uint16_t* __restrict narrow, uint32_t* __restrict words,
                               float* __restrict landing) {
  constexpr uint32_t kDropped = (uint64_t{1} << (32 - kBits)) - 1;
  int32_t astray = 0;
  for (int64_t i = 0; i < size; ++i) {
    const float total = kBits == 32 ? p[i] : p[i] + u[i];
    uint32_t word = static_cast<uint32_t>(WordOf(total));
    if constexpr (kBits != 32) {
      word += static_cast<uint32_t>(Added<kBits>(p[i], u[i], total, noise[i]));
      word &= ~kDropped;
    }
    words[i] = word;
    const float weight = FloatOf(static_cast<int32_t>(Nearest<kBits>(word)));
    const float stored = FromBfloat16(narrow[i]), update = weight - stored;
    landing[i] = update;
    astray |= stored + update == weight ? 0 : 1;
  }
  return !astray;
}

// The same for weights of which some are no numbers, or so much smaller than what is stored that
// their updates do not land on them: those keep no correction.
template <int kBits>
void LandWeights(const float* p, const float* u, int64_t size, const uint16_t* narrow,
                 uint32_t* words, float* landing) {
  for (int64_t i = 0; i < size; ++i) {
    const float total = kBits == 32 ? p[i] : p[i] + u[i], stored = FromBfloat16(narrow[i]);
    const bool finite = (WordOf(total) & kInfinity) != kInfinity;
    const uint32_t nearest = Nearest<kBits>(words[i]);
    const float weight = finite ? FloatOf(static_cast<int32_t>(nearest)) : total;
    landing[i] = weight - stored;
    const uint16_t landed = ToBfloat16(stored + landing[i]);
    if (!finite || FromBfloat16(landed) != weight) words[i] = uint32_t{landed} << 16;
  }
}

// Weights and corrections of words; weights only if they are moved.
template <typename Correction, int kBits>
ADAMFN_LOOPS void StoreWeights(const uint32_t* __restrict words, int64_t size, bool moves,
                               uint16_t* __restrict narrow, Correction* __restrict corrections) {
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t nearest = Nearest<kBits>(words[i]);
    if (moves) narrow[i] = static_cast<uint16_t>(nearest >> 16);
    if (kBits != 16) {
      const int32_t lower = static_cast<int32_t>(words[i] - nearest) >> (32 - kBits);
      corrections[i] = static_cast<Correction>(lower);
    }
  }
}

// Rounds the weights p + u (of 32 bits p) of a tile to bfloat16 and corrections. Writes the
// corrections, the updates that land on the bfloat16 unless `landing` is null, and if `moves` where
// they land.
template <typename Correction, int kBits>
void SplitWeights(const float* p, const float* u, const uint32_t* noise, int64_t size, bool moves,
                  uint16_t* narrow, Correction* corrections, float* landing) {
  uint32_t words[kLargestBlock];
  float unread[kLargestBlock];
  if (!landing) landing = unread;
  if (!RoundWeights<kBits>(p, u, noise, size, narrow, words, landing)) {
    LandWeights<kBits>(p, u, size, narrow, words, landing);
  }
  StoreWeights<Correction, kBits>(words, size, moves, narrow, corrections);
}

}  // namespace adamfn

#endif  // ADAMFN_WEIGHTS_H_
