// The step of a group of leaves, tile by tile: decode, step, encode.

#ifndef ADAMFN_GROUP_H_
#define ADAMFN_GROUP_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "eight_bit.h"
#include "rounding.h"
#include "step.h"

namespace adamfn {

// How moments are stored; adamfn.fused.cpu has the same numbers.
enum Format : int32_t { kFloat32 = 0, kBfloat16 = 1, kBfloat16Nearest = 2, kEightBit = 3 };

inline constexpr int64_t kTile = 1024;  // elements that are worked on in one go
static_assert(kLargestBlock <= kTile);

struct Leaf {
  const void* g;
  void* p;
  bool g_is_narrow, p_is_narrow;  // bfloat16, not float32
  bool decays;
  uint32_t number;      // in the tree of parameters: its noise is made from it
  int64_t offset;       // of its moments in the group's buffers
  int64_t size, row;    // elements, and those of the last axis
  int64_t tile;         // elements of a tile: a block of an 8-bit leaf
  int64_t first_tile;   // of the group's
};

struct Group {
  Scalars scalars;
  int32_t count;
  int32_t format;
  bool nesterov;
  void* mu;
  void* nu;
  float* scale;   // these three of 8-bit moments only
  float* top;
  int32_t* step;
  std::vector<Leaf> leaves;
  int64_t tiles;
};

inline void StepTile(const Group& group, const Leaf& leaf, int64_t tile) {
  float g_tile[kTile], p_tile[kTile], mu_tile[kTile], nu_tile[kTile];

  // A tile of 8-bit moments is a block, and the last one of a row may be shorter.
  const int64_t tiles_per_row = (leaf.row + leaf.tile - 1) / leaf.tile;
  const int64_t within = (tile % tiles_per_row) * leaf.tile;
  const int64_t start = (tile / tiles_per_row) * leaf.row + within;
  const int64_t size = std::min(leaf.tile, leaf.row - within);
  const int64_t at = leaf.offset + start;

  const float* g = static_cast<const float*>(leaf.g) + start;
  if (leaf.g_is_narrow) {
    const uint16_t* narrow = static_cast<const uint16_t*>(leaf.g) + start;
    for (int64_t i = 0; i < size; ++i) g_tile[i] = FromBfloat16(narrow[i]);
    g = g_tile;
  }
  float* p = static_cast<float*>(leaf.p) + start;
  uint16_t* narrow_p = static_cast<uint16_t*>(leaf.p) + start;
  if (leaf.p_is_narrow) {
    for (int64_t i = 0; i < size; ++i) p_tile[i] = FromBfloat16(narrow_p[i]);
    p = p_tile;
  }

  const Noise leaf_noise(group.count, leaf.number);
  const auto noise = [&](int64_t i) { return leaf_noise(static_cast<uint32_t>(start + i)); };
  switch (group.format) {
    case kFloat32:
      StepRun(group.scalars, group.nesterov, leaf.decays, size, g,
              static_cast<float*>(group.mu) + at, static_cast<float*>(group.nu) + at, p);
      break;
    case kBfloat16:
    case kBfloat16Nearest: {
      uint16_t* mu = static_cast<uint16_t*>(group.mu) + at;
      uint16_t* nu = static_cast<uint16_t*>(group.nu) + at;
      for (int64_t i = 0; i < size; ++i) {
        mu_tile[i] = FromBfloat16(mu[i]);
        nu_tile[i] = FromBfloat16(nu[i]);
      }
      StepRun(group.scalars, group.nesterov, leaf.decays, size, g, mu_tile, nu_tile, p);
      if (group.format == kBfloat16) {
        for (int64_t i = 0; i < size; ++i) {
          const uint32_t random = noise(i);
          mu[i] = ToBfloat16(mu_tile[i], random);
          nu[i] = ToBfloat16(nu_tile[i], random >> 16);
        }
      } else {
        for (int64_t i = 0; i < size; ++i) {
          mu[i] = ToBfloat16(mu_tile[i]);
          nu[i] = ToBfloat16(nu_tile[i]);
        }
      }
      break;
    }
    case kEightBit: {
      int8_t* mu = static_cast<int8_t*>(group.mu) + at;
      uint8_t* nu = static_cast<uint8_t*>(group.nu) + at;
      const BlockScales block{group.scale + tile, group.top + tile, group.step + tile};
      DecodeBlock(mu, nu, block, static_cast<int>(size), mu_tile, nu_tile);
      StepRun(group.scalars, group.nesterov, leaf.decays, size, g, mu_tile, nu_tile, p);
      EncodeBlock(mu_tile, nu_tile, noise, static_cast<int>(size), mu, nu, block);
      break;
    }
  }
  if (leaf.p_is_narrow) {
    for (int64_t i = 0; i < size; ++i) narrow_p[i] = ToBfloat16(p_tile[i]);
  }
}

inline void StepTiles(const Group& group, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  auto leaf = std::upper_bound(group.leaves.begin(), group.leaves.end(), begin,
                               [](int64_t tile, const Leaf& l) { return tile < l.first_tile; });
  --leaf;
  for (int64_t tile = begin; tile < end; ++tile) {
    while (leaf + 1 != group.leaves.end() && (leaf + 1)->first_tile <= tile) ++leaf;
    StepTile(group, *leaf, tile - leaf->first_tile);
  }
}

}  // namespace adamfn

#endif  // ADAMFN_GROUP_H_
