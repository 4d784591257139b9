// The angle of two sides of a triangle: adamfn's angle.py.

#ifndef ADAMFN_ANGLE_H_
#define ADAMFN_ANGLE_H_

namespace adamfn {

// atan2(opposite, adjacent) of numbers at least 0; 0 where both are.
inline float Angle(float opposite, float adjacent) {
  constexpr float kQuarter = 1.57079633f, kSteep = 0.414213562f;  // pi / 2, tan(pi / 8)
  const bool beyond = opposite > adjacent;
  const float shorter = beyond ? adjacent : opposite, longer = beyond ? opposite : adjacent;
  const bool equal = shorter == longer;  // both infinite: an eighth of the circle
  const bool steep = equal ? longer > 0 : shorter > kSteep * longer;
  const float above = steep ? shorter - longer : shorter;
  const float x = equal ? 0 : above / (steep ? shorter + longer : longer);
  const float z = x * x;
  float series = 8.05374449538e-2f * z - 1.38776856032e-1f;
  series = (series * z + 1.99777106478e-1f) * z - 3.33329491539e-1f;  // Cephes, atanf
  const float found = series * z * x + x + (steep ? kQuarter / 2 : 0);
  return beyond ? kQuarter - found : found;
}

}  // namespace adamfn

#endif  // ADAMFN_ANGLE_H_
