// One step of Adam on a run of float32 numbers, in place: the formulas of core/formulas.py, one after
// the other. tests/test_native.py compares.

#ifndef ADAMFN_STEP_H_
#define ADAMFN_STEP_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "angle.h"
#include "group.h"
#include "rounding.h"

namespace adamfn::ADAMFN_VARIANT {

inline float Average(float old, float fresh, float complement, float rate) {
  const bool fast = rate < 0.5f;
  return (fast ? fresh : old) + (fast ? -rate : complement) * (fresh - old);
}

// A finite g larger than 2^48 becomes that, with its sign.
inline float Bounded(float g) {
  constexpr int32_t kLargest = (127 + 48) << 23, kLeastNegative = 0x00800000;
  const uint32_t bits = BitsOf(g);
  // Raised, infinity and NaN are negative.
  const int32_t raised = static_cast<int32_t>((bits & 0x7FFFFFFF) + kLeastNegative);
  const int32_t held = std::min(raised, kLargest + kLeastNegative);
  return FloatOf((static_cast<uint32_t>(held) - kLeastNegative) | (bits & 0x80000000));
}

// What is decayed: nothing, all alike, or more where the decay has the sign of the update.
enum class Decay { kNone, kAlike, kCautious };

// A part of the loop below, which a call would keep from running in vectors.
template <Form kForm>
[[gnu::always_inline]] inline float Update(const Scalars& c, float g, float mu, float nu) {
  if (kForm == Form::kAngle) {
    const float angle = Angle(std::fabs(mu) * c[kCorrection], c[kRootFactor] * std::sqrt(nu));
    return std::copysign(c[kAngleFactor] * angle, mu);
  }
  const float m = kForm == Form::kNesterov
                      ? mu * ((1 - c[kComplement1]) * c[kAhead]) + g * c[kComplement1]
                      : mu;
  return m / (std::sqrt(nu + c[kEpsRoot]) + c[kEps]) * c[kCorrection];
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

template <Form kForm, Decay kDecay>
auto Choose(bool moves) {
  return moves ? StepRun<kForm, kDecay, true> : StepRun<kForm, kDecay, false>;
}

template <Form kForm>
auto Choose(Decay decay, bool moves) {
  return decay == Decay::kNone    ? Choose<kForm, Decay::kNone>(moves)
         : decay == Decay::kAlike ? Choose<kForm, Decay::kAlike>(moves)
                                  : Choose<kForm, Decay::kCautious>(moves);
}

// Moves p if u is null.
inline void StepRun(const Scalars& s, Form form, bool decays, int64_t size, const float* g,
                    float* mu, float* nu, float* p, float* u) {
  const bool alike = s[kWeightDecay] == s[kWeightDecayAgainst];
  const Decay decay = !decays ? Decay::kNone : alike ? Decay::kAlike : Decay::kCautious;
  const auto run = form == Form::kAngle      ? Choose<Form::kAngle>(decay, !u)
                   : form == Form::kNesterov ? Choose<Form::kNesterov>(decay, !u)
                                             : Choose<Form::kRatio>(decay, !u);
  run(s, size, g, mu, nu, p, u);
}

}  // namespace adamfn::ADAMFN_VARIANT

#endif  // ADAMFN_STEP_H_
