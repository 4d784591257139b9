// One step of Adam on a run of float32 numbers, in place.
//
// The formulas are those of adamfn's moments.py, bias.py, weight_decay.py and learning_rate.py,
// one after the other. tests/test_fused_native.py holds this file to them.

#ifndef ADAMFN_STEP_H_
#define ADAMFN_STEP_H_

#include <cmath>
#include <cstdint>

namespace adamfn {

// What is the same for all leaves at a step, in the order of adamfn.fused.scalars.Scalars.
struct Scalars {
  float complement1;  // 1 - b1
  float complement2;  // 1 - b2
  float rate1;        // b1, or 1 where it is known to be at least 1/2
  float rate2;        // b2, likewise
  float eps;          // eps sqrt(c2)
  float eps_root;     // eps_root c2
  float ahead;        // c1(t) / c1(t + 1), of Nesterov's form
  float correction;   // sqrt(c2) / c1
  float weight_decay;
  float learning_rate;
};

inline float Average(float old, float fresh, float complement, float rate) {
  const float step = fresh - old;
  return rate < 0.5f ? fresh - rate * step : old + complement * step;
}

template <bool kNesterov, bool kDecays>
void StepRun(const Scalars& s, int64_t size, const float* g, float* mu, float* nu, float* p) {
  const Scalars c = s;  // a copy that nothing written below can be an alias of
#pragma GCC ivdep
  for (int64_t i = 0; i < size; ++i) {
    mu[i] = Average(mu[i], g[i], c.complement1, c.rate1);
    nu[i] = Average(nu[i], g[i] * g[i], c.complement2, c.rate2);
    const float m =
        kNesterov ? mu[i] * ((1 - c.complement1) * c.ahead) + g[i] * c.complement1 : mu[i];
    const float u = m / (std::sqrt(nu[i] + c.eps_root) + c.eps) * c.correction;
    p[i] -= c.learning_rate * (kDecays ? u + c.weight_decay * p[i] : u);
  }
}

inline void StepRun(const Scalars& s, bool nesterov, bool decays, int64_t size, const float* g,
                    float* mu, float* nu, float* p) {
  const auto run = nesterov ? (decays ? StepRun<true, true> : StepRun<true, false>)
                            : (decays ? StepRun<false, true> : StepRun<false, false>);
  run(s, size, g, mu, nu, p);
}

}  // namespace adamfn

#endif  // ADAMFN_STEP_H_
