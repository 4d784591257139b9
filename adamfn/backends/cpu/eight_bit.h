// SPDX-License-Identifier: Apache-2.0
// One block of moments in 8 bits: formats/levels.py.

#pragma once

#include <algorithm>
#include <cstdint>

#include "group.h"
#include "rounding.h"

namespace adamfn::ADAMFN_VARIANT {

inline constexpr float kSmallestRatio = 0x1p-50f;
inline constexpr int32_t kOctaves = 48;  // that levels span at most

// The integer nearest to an |x| < 2^22, of two as near the even one.
inline int32_t Nearest(float x) {
  return static_cast<int32_t>(BitsOf(x + 12582914.0f)) - 0x4B400002;
}

inline float NearRoot(int32_t bits) { return FloatOf((bits >> 1) + (127 << 22)); }

ADAMFN_LOOPS inline void DecodeBlock(const int8_t* __restrict mu_codes,
                                     const uint8_t* __restrict nu_codes, BlockScales block,
                                     int size, float* __restrict mu, float* __restrict nu) {
  const float scale = *block.scale;
  const int32_t top = MagnitudeBitsOf(*block.top), step = *block.step;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {
    // Unsigned: of a state that no encoding made it may overflow.
    const uint32_t below = static_cast<uint32_t>(255 - nu_codes[i]) * static_cast<uint32_t>(step);
    const int32_t bits =
        nu_codes[i] ? static_cast<int32_t>(static_cast<uint32_t>(top) - below) : 0;
    mu[i] = static_cast<float>(mu_codes[i]) * scale * NearRoot(bits);
    nu[i] = FloatOf(bits);
  }
}

ADAMFN_LOOPS inline void EncodeBlock(const float* __restrict mu, const float* __restrict nu,
                                     const uint32_t* __restrict random, int size,
                                     int8_t* __restrict mu_codes, uint8_t* __restrict nu_codes,
                                     BlockScales block) {
  constexpr int32_t kLevels = 255;
  constexpr int32_t kLeast = 0x00800000 + kLevels;  // the last level stays above the denormals
  int32_t highest = 0, lowest = kInfinity;
  for (int i = 0; i < size; ++i) {
    const int32_t bits = MagnitudeBitsOf(nu[i]);
    highest = std::max(highest, bits);
    lowest = std::min(lowest, bits ? bits : kInfinity);
  }
  const int32_t top = std::max(highest, kLeast), bottom = std::max(lowest, kLeast);
  const int32_t most = top < kInfinity ? kOctaves << 23 : kInfinity;
  const int32_t span = std::clamp(top - bottom, 0, most);
  const int32_t step = std::max((span + (kLevels - 2)) / (kLevels - 1), 1);

  // The ratios are taken with nu before it is rounded; the root of a level below is smaller by
  // `fall`, in which there is room for roundings.
  const float fall = 1 + 0x1p-20f + static_cast<float>(step) * 0x1p-24f;
  int32_t widest = 0;
  for (int i = 0; i < size; ++i) {
    const int32_t bits = MagnitudeBitsOf(nu[i]);
    const float inverse = bits ? 1 / NearRoot(bits) : 0.0f;
    widest = std::max(widest, MagnitudeBitsOf(mu[i] * inverse));
  }
  const float largest = fall * FloatOf(widest);
  // In this order the maximum is NaN where `largest` is.
  const float per_code = 127 / (largest < kSmallestRatio ? kSmallestRatio : largest);
  const float per_step = 1 / static_cast<float>(step);

#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {
    const float for_mu = static_cast<float>(random[i] & 0xFFFF) * 0x1p-16f + (0x1p-17f - 0.5f);
    const float for_nu = static_cast<float>(random[i] >> 16) * 0x1p-16f + 0x1p-17f;
    const int32_t bits = MagnitudeBitsOf(nu[i]);
    const float depth = static_cast<float>(top - bits) * per_step;
    const int32_t above = Nearest(std::min(depth - 0.5f, kLevels - 1.5f));
    const int32_t from = top - above * step;
    const float upper = FloatOf(from);
    const float lower = FloatOf(from - step);  // not top - 255 * step, which may overflow
    const bool up = FloatOf(bits) - lower > for_nu * (upper - lower);
    int32_t level = std::min(up ? above : above + 1, kLevels - 1);
    level = bits >= kInfinity ? 0 : level;
    const float per_ratio = bits ? per_code / NearRoot(top - level * step) : 0.0f;
    mu_codes[i] = static_cast<int8_t>(Nearest(mu[i] * per_ratio + for_mu));
    nu_codes[i] = static_cast<uint8_t>(bits ? kLevels - level : 0);
  }
  *block.scale = largest * (1.0f / 127);
  *block.top = FloatOf(top);
  *block.step = step;
}

}  // namespace adamfn::ADAMFN_VARIANT
