// SPDX-License-Identifier: Apache-2.0
// One step of Adam on a run of float32 numbers, in place: the formulas of core/formulas.py, one after
// the other. tests/test_native.py compares.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "group.h"
#include "rounding.h"

namespace adamfn::ADAMFN_VARIANT {

inline float Average(float old, float fresh, float complement, float rate) {
  const bool fast = rate < 0.5f;
  return (fast ? fresh : old) + (fast ? -rate : complement) * (fresh - old);
}

// A finite g beyond 1.8e19 becomes that, with its sign: its square would overflow.
inline float Bounded(float g) {
  constexpr int32_t kLargest = 0x5F7F0000, kLeastNegative = 0x00800000;
  const uint32_t bits = BitsOf(g);
  // This makes infinity and NaN negative, so that min keeps them.
  const int32_t raised = static_cast<int32_t>((bits & 0x7FFFFFFF) + kLeastNegative);
  const int32_t held = std::min(raised, kLargest + kLeastNegative);
  return FloatOf((static_cast<uint32_t>(held) - kLeastNegative) | (bits & 0x80000000));
}

// The root of nu, of the smallest normal number at least. In this order it is NaN where nu is.
inline float Root(float nu) { return std::sqrt(std::max(nu, 0x1p-126f)); }

// atan2(opposite, adjacent) of numbers at least 0; 0 where both are: core/formulas.py.
[[gnu::always_inline]] inline float Angle(float opposite, float adjacent) {
  constexpr float kQuarter = 1.57079633f, kSteep = 0.414213562f;  // pi / 2, tan(pi / 8)
  const float shorter = opposite > adjacent ? adjacent : opposite;
  const float longer = opposite > adjacent ? opposite : adjacent;
  // Both infinite, or both zero: as XLA has it, an eighth of the circle, and 0.
  const float ratio = shorter / longer, equal = longer > 0 ? 1 : 0;
  const float t = shorter == longer ? equal : ratio;
  // No division waits for a comparison: compilers would not make vectors of them.
  const float turned = (t - 1) / (t + 1), eighth = kQuarter / 2;
  const float x = t > kSteep ? turned : t, start = t > kSteep ? eighth : 0;
  const float z = x * x;
  float series = 8.05374449538e-2f * z - 1.38776856032e-1f;
  series = (series * z + 1.99777106478e-1f) * z - 3.33329491539e-1f;  // Cephes, atanf
  const float found = series * z * x + x + start, rest = kQuarter - found;
  return opposite > adjacent ? rest : found;
}

// What is decayed: nothing, all alike, or more where the decay has the sign of the update.
enum class Decay { kNone, kAlike, kCautious };

// A part of the loop below, which a call would keep from running in vectors.
template <Form kForm>
[[gnu::always_inline]] inline float Update(const Scalars& c, float g, float mu, float nu) {
  if (kForm == Form::kAngle) {
    const float angle = Angle(std::fabs(mu) * c[kCorrection], c[kRootFactor] * Root(nu));
    return std::copysign(c[kAngleFactor] * angle, mu);
  }
  const float m = kForm == Form::kNesterov
                      ? mu * ((1 - c[kComplement1]) * c[kAhead]) + g * c[kComplement1]
                      : mu;
  return m / (Root(nu + c[kEpsRoot]) + c[kEps]) * c[kCorrection];
}

// Moves p by the update, or writes the update to u.
template <Form kForm, Decay kDecay, bool kMoves>
void StepRun(const Scalars& s, int64_t size, const float* g, float* mu, float* nu, float* p,
             float* u) {
  const Scalars c = s;  // a copy that nothing written below can be an alias of
#pragma GCC ivdep
  for (int64_t i = 0; i < size; ++i) {
    const float x = Bounded(g[i] * c[kGradientFactor]);
    mu[i] = Average(mu[i], x, c[kComplement1], c[kRate1]);
    nu[i] = Average(nu[i], x * x, c[kComplement2], c[kRate2]);
    float update = Update<kForm>(c, x, mu[i], nu[i]);
    if (kDecay != Decay::kNone) {
      const bool agrees = kDecay == Decay::kAlike || update * p[i] >= 0;
      update += (agrees ? c[kWeightDecay] : c[kWeightDecayAgainst]) * p[i];
    }
    update *= c[kFactor];
    if (kMoves) {
      p[i] += update;
    } else {
      u[i] = update;
    }
  }
}

// Of StepRun, the one for these.
template <Form kForm>
auto Choose(Decay decay, bool moves) {
  if (decay == Decay::kNone) {
    return moves ? StepRun<kForm, Decay::kNone, true> : StepRun<kForm, Decay::kNone, false>;
  }
  if (decay == Decay::kAlike) {
    return moves ? StepRun<kForm, Decay::kAlike, true> : StepRun<kForm, Decay::kAlike, false>;
  }
  return moves ? StepRun<kForm, Decay::kCautious, true> : StepRun<kForm, Decay::kCautious, false>;
}

// Moves p if u is null.
inline void StepRun(const Group& group, int64_t size, const float* g, float* mu, float* nu, float* p,
                    float* u) {
  const bool alike = group.scalars[kWeightDecay] == group.scalars[kWeightDecayAgainst];
  const Decay decay = !group.decays ? Decay::kNone : alike ? Decay::kAlike : Decay::kCautious;
  const auto run = group.form == Form::kAngle      ? Choose<Form::kAngle>(decay, !u)
                   : group.form == Form::kNesterov ? Choose<Form::kNesterov>(decay, !u)
                                                   : Choose<Form::kRatio>(decay, !u);
  run(group.scalars, size, g, mu, nu, p, u);
}

}  // namespace adamfn::ADAMFN_VARIANT
