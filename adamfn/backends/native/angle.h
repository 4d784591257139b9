// The angle of two sides of a triangle: core/angle.py.

#ifndef ADAMFN_ANGLE_H_
#define ADAMFN_ANGLE_H_

namespace adamfn::ADAMFN_VARIANT {

// atan2(opposite, adjacent) of numbers at least 0; 0 where both are.
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

}  // namespace adamfn::ADAMFN_VARIANT

#endif  // ADAMFN_ANGLE_H_
