// One step of Adam on a run of float32 numbers, in place.
//
// The formulas are those of adamfn's formulas.py, one after the other. tests/test_native.py
// holds this file to them.

#ifndef ADAMFN_STEP_H_
#define ADAMFN_STEP_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "angle.h"
#include "rounding.h"

namespace adamfn {

// The scalars of a step, in the order of adamfn.backends.cpu.scalar_places.
enum Scalar : size_t {
  kComplement1,  // 1 - b1
  kComplement2,  // 1 - b2
  kRate1,        // b1, or 1 where it is known to be at least 1/2
  kRate2,        // b2, likewise
  kEps,          // eps sqrt(c2)
  kEpsRoot,      // eps_root c2
  kAhead,        // c1(t) / c1(t + 1), of Nesterov's form
  kCorrection,   // sqrt(c2) / c1
  kWeightDecay,
  kFactor,       // minus the learning rate
  kGradientFactor,     // of clipping by the norm
  kWeightDecayAgainst,  // the decay of what the update makes larger
  kTaken,               // 0 in a step that is held back
  kAngleFactor,         // a and b of Adam-atan2, which has no eps
  kRootFactor,
  kScalars
};

struct Scalars {
  float value[kScalars] = {0, 0, 1, 1, 0, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1};  // of those that a program lacks
  float operator[](Scalar scalar) const { return value[scalar]; }
};

inline float Average(float old, float fresh, float complement, float rate) {
  const bool fast = rate < 0.5f;
  return (fast ? fresh : old) + (fast ? -rate : complement) * (fresh - old);
}

inline float Bounded(float g) {  // finite and larger than 2^48: that, with its sign
  constexpr int32_t kLargest = (127 + 48) << 23, kLeastNegative = 0x00800000;
  uint32_t word;
  std::memcpy(&word, &g, sizeof word);
  // Raised, infinity and NaN are negative.
  const int32_t raised = static_cast<int32_t>((word & 0x7FFFFFFF) + kLeastNegative);
  const int32_t held = std::min(raised, kLargest + kLeastNegative);
  const uint32_t bounded = (static_cast<uint32_t>(held) - kLeastNegative) | (word & 0x80000000);
  return FloatOf(static_cast<int32_t>(bounded));
}

// What becomes of the moments: their ratio, that of Nesterov's form, or their angle.
enum class Form { kRatio, kNesterov, kAngle };

// What is decayed: nothing, all alike, or what the update makes larger in its own way.
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
void StepRun(const Scalars& s, int64_t size, const float* g, float* mu, float* nu, float* p,
             float* u) {
  (u ? StepRun<kForm, kDecay, false> : StepRun<kForm, kDecay, true>)(s, size, g, mu, nu, p, u);
}

template <Form kForm>
void StepRun(const Scalars& s, bool decays, int64_t size, const float* g, float* mu, float* nu,
             float* p, float* u) {
  const bool alike = s[kWeightDecay] == s[kWeightDecayAgainst];
  const auto run = !decays ? StepRun<kForm, Decay::kNone>
                   : alike ? StepRun<kForm, Decay::kAlike>
                           : StepRun<kForm, Decay::kCautious>;
  run(s, size, g, mu, nu, p, u);
}

inline void StepRun(const Scalars& s, Form form, bool decays, int64_t size, const float* g,
                    float* mu, float* nu, float* p, float* u) {
  const auto run = form == Form::kAngle      ? StepRun<Form::kAngle>
                   : form == Form::kNesterov ? StepRun<Form::kNesterov>
                                             : StepRun<Form::kRatio>;
  run(s, decays, size, g, mu, nu, p, u);
}

}  // namespace adamfn

#endif  // ADAMFN_STEP_H_
