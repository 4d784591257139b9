// SPDX-License-Identifier: Apache-2.0
// What the handler hands to the kernels. Each processor's kernels are compiled apart, so this file
// has no code that they could share: the linker would keep any one of them.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace adamfn {

// How moments are stored: the `native_code` of a format in Python.
enum Format : int32_t { kFloat32 = 0, kBfloat16 = 1, kBfloat16Nearest = 2, kEightBit = 3 };

// The largest block of 8-bit moments.
inline constexpr int64_t kLargestBlock = 1024;

// Elements of a tile, unless a tile is a block: so few that computing hides reading the next ones.
inline constexpr int64_t kTile = 128;
static_assert(kTile <= kLargestBlock);

// The scalars of a step, in the order of scalar_places in Python.
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
  kFactor,              // minus the learning rate
  kGradientFactor,      // of clipping by the norm
  kWeightDecayAgainst,  // the decay where it has the sign of the update
  kGate,                // 0 in a step that is skipped
  kAngleFactor,         // a and b of Adam-atan2, which has no eps
  kRootFactor,
  kScalars
};

struct Scalars {
  float value[kScalars] = {0, 0, 1, 1, 0, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1};  // if a program lacks them
  [[gnu::always_inline]] float operator[](Scalar scalar) const { return value[scalar]; }
};

// What becomes of the moments: their ratio, that of Nesterov's form, or their angle.
enum class Form { kRatio, kNesterov, kAngle };

// An axis of a leaf: its length, and by how much an element's index grows along it.
struct Axis {
  int64_t length, stride;
};

// Numbers in float32, or in bfloat16.
struct Array {
  void* data;
  bool is_bfloat16;
};

// What 8-bit moments store of each block besides its codes.
struct BlockScales {
  float* scale;
  float* top;
  int32_t* step;
};

struct Leaf {
  Array g, p, u;           // gradient; parameter, null if it is not read; update, null if not returned
  bool moves;              // whether the update moves p
  void *mu, *nu;           // codes, or numbers
  BlockScales blocks;      // of 8-bit moments
  void* lower;             // the lower bits of p, if they are kept
  uint32_t index;          // in the tree of parameters; random bits are made from it
  uint32_t first;          // index of the first element in the whole leaf, if this is a shard of it
  std::vector<Axis> axes;  // from the innermost
  int64_t size, row;       // elements, and elements of the last axis
  int64_t tile;            // elements of a tile; 8-bit moments: of a block
  int64_t first_tile;      // index of the first tile in the group
};

// The leaves of a call, and what is common to them.
struct Group {
  Scalars scalars;
  int32_t count;
  int32_t format;
  int32_t bits;  // kept of a bfloat16 weight: 16, 24 or 32; 0 for weights as they are
  Form form;
  bool decays;
  bool reads_ahead;  // whether the step asks for memory before it needs it
  std::vector<Leaf> leaves;
  int64_t tiles;
};

// Steps the tiles of a group from `begin` to `end`: kernels.cc, compiled for some kind of processor.
using Kernels = void(const Group& group, int64_t begin, int64_t end);

// The kernels for this processor, and whether they gain by reading ahead on it.
Kernels* ChosenKernels();
bool ReadsAhead();

}  // namespace adamfn
