// One step of Adam on a run of float32 numbers, in place.
//
// The formulas are those of adamfn's formulas.py, one after the other. tests/test_native.py
// holds this file to them.

#ifndef ADAMFN_STEP_H_
#define ADAMFN_STEP_H_

#include <cmath>
#include <cstddef>
#include <cstdint>

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
  kScalars
};

struct Scalars {
  float value[kScalars] = {0, 0, 1, 1, 0, 0, 1, 1, 0, 1, 1, 0, 1};  // of those that a program lacks
  float operator[](Scalar scalar) const { return value[scalar]; }
};

inline float Average(float old, float fresh, float complement, float rate) {
  const float step = fresh - old;
  return rate < 0.5f ? fresh - rate * step : old + complement * step;
}

inline float Bounded(float g) {  // finite and larger than 2^48: that, with its sign
  constexpr float kLargest = 281474976710656.0f;
  const float size = std::fabs(g);
  return size > kLargest && size < HUGE_VALF ? std::copysign(kLargest, g) : g;
}

// Moves p by the update, or writes the update to u.
template <bool kNesterov, bool kDecays, bool kMoves>
void StepRun(const Scalars& s, int64_t size, const float* g, float* mu, float* nu, float* p,
             float* u) {
  const Scalars c = s;  // a copy that nothing written below can be an alias of
#pragma GCC ivdep
  for (int64_t i = 0; i < size; ++i) {
    const float x = Bounded(g[i] * c[kGradientFactor]);
    mu[i] = Average(mu[i], x, c[kComplement1], c[kRate1]);
    nu[i] = Average(nu[i], x * x, c[kComplement2], c[kRate2]);
    const float m =
        kNesterov ? mu[i] * ((1 - c[kComplement1]) * c[kAhead]) + x * c[kComplement1] : mu[i];
    const float ratio = m / (std::sqrt(nu[i] + c[kEpsRoot]) + c[kEps]) * c[kCorrection];
    const float decay =
        kDecays ? (ratio * p[i] >= 0 ? c[kWeightDecay] : c[kWeightDecayAgainst]) * p[i] : 0;
    const float update = (kDecays ? ratio + decay : ratio) * c[kFactor];
    if (kMoves) {
      p[i] += update;
    } else {
      u[i] = update;
    }
  }
}

template <bool kNesterov, bool kDecays>
void StepRun(const Scalars& s, int64_t size, const float* g, float* mu, float* nu, float* p,
             float* u) {
  (u ? StepRun<kNesterov, kDecays, false> : StepRun<kNesterov, kDecays, true>)(s, size, g, mu, nu,
                                                                               p, u);
}

inline void StepRun(const Scalars& s, bool nesterov, bool decays, int64_t size, const float* g,
                    float* mu, float* nu, float* p, float* u) {
  const auto run = nesterov ? (decays ? StepRun<true, true> : StepRun<true, false>)
                            : (decays ? StepRun<false, true> : StepRun<false, false>);
  run(s, size, g, mu, nu, p, u);
}

}  // namespace adamfn

#endif  // ADAMFN_STEP_H_
