// The step of a group of leaves, tile by tile: decode, step, encode.

#ifndef ADAMFN_GROUP_H_
#define ADAMFN_GROUP_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "eight_bit.h"
#include "rounding.h"
#include "step.h"
#include "weights.h"

namespace adamfn {

// How moments are stored; adamfn.backends.cpu has the same numbers.
enum Format : int32_t { kFloat32 = 0, kBfloat16 = 1, kBfloat16Nearest = 2, kEightBit = 3 };

// Elements that are worked on in one go, but for those of a block: so few that what is computed
// hides the way of the next ones from memory.
inline constexpr int64_t kTile = 128;
static_assert(kTile <= kLargestBlock);

// An axis of a leaf, and how far apart the numbers of elements along it are in the whole leaf.
struct Axis {
  int64_t length, stride;
};

struct Leaf {
  const void* g;
  void* p;                        // null if it is not read
  void* u;                        // null if the update is not returned
  bool moves;                     // p, by the update
  bool g_is_narrow, p_is_narrow, u_is_narrow;  // bfloat16, not float32
  void* correction;                            // the lower bits of p, if any are kept
  uint32_t number;     // in the tree of parameters: its noise is made from it
  uint32_t first;      // of the first element in the whole leaf, if this is a shard of it
  std::vector<Axis> axes;  // from the innermost
  void* mu;
  void* nu;
  BlockScales blocks;  // the first, of an 8-bit leaf
  int64_t size, row;   // elements, and those of the last axis
  int64_t tile;        // elements of a tile: a block of an 8-bit leaf
  int64_t first_tile;  // of the group's
};

struct Group {
  Scalars scalars;
  int32_t count;
  int32_t format;
  int32_t bits;  // of a bfloat16 weight that are kept: 16, 24 or 32; 0 for weights as they are
  Form form;
  bool decays;
  std::vector<Leaf> leaves;
  int64_t tiles;
};

// The random words of some elements of a leaf, by their numbers in the whole leaf.
inline void FillNoise(const Noise& noise, const Leaf& leaf, int64_t start, int64_t size,
                      uint32_t* words) {
  const Axis& inner = leaf.axes[0];
  for (int64_t done = 0; done < size;) {
    const int64_t within = (start + done) % inner.length;
    const int64_t run = std::min(size - done, inner.length - within);
    int64_t outer = (start + done) / inner.length;
    uint64_t number = leaf.first + static_cast<uint64_t>(within);
    for (size_t i = 1; i < leaf.axes.size(); ++i) {
      number += static_cast<uint64_t>(outer % leaf.axes[i].length) *
                static_cast<uint64_t>(leaf.axes[i].stride);
      outer /= leaf.axes[i].length;
    }
    noise.Fill(static_cast<uint32_t>(number), run, words + done);
    done += run;
  }
}

inline void Join(int32_t bits, const Leaf& leaf, int64_t start, int64_t size, float* p) {
  const uint16_t* narrow = static_cast<const uint16_t*>(leaf.p) + start;
  switch (bits) {
    case 16:
      return JoinWeights<int8_t, 16>(narrow, nullptr, size, p);
    case 24:
      return JoinWeights<int8_t, 24>(narrow, static_cast<int8_t*>(leaf.correction) + start, size,
                                     p);
    case 32:
      return JoinWeights<int16_t, 32>(narrow, static_cast<int16_t*>(leaf.correction) + start, size,
                                      p);
  }
}

inline void Split(int32_t bits, const Leaf& leaf, int64_t start, int64_t size, const float* p,
                  const float* u, const uint32_t* noise) {
  uint16_t* narrow = static_cast<uint16_t*>(leaf.p) + start;
  float* landing = leaf.u ? static_cast<float*>(leaf.u) + start : nullptr;
  switch (bits) {
    case 16:
      return SplitWeights<int8_t, 16>(p, u, noise, size, leaf.moves, narrow, nullptr, landing);
    case 24:
      return SplitWeights<int8_t, 24>(p, u, noise, size, leaf.moves, narrow,
                                      static_cast<int8_t*>(leaf.correction) + start, landing);
    case 32:
      return SplitWeights<int16_t, 32>(p, u, noise, size, leaf.moves, narrow,
                                       static_cast<int16_t*>(leaf.correction) + start, landing);
  }
}

// Elements between those that are worked on and those that are asked for: what the processor reads
// ahead by itself of four arrays comes too late. Arrays begin at one place of a page each, where all
// are in one channel of the memory; so each is read a tile further than the one before.
inline constexpr int64_t kReadAhead = 256;

inline void ReadAhead(const void* array, int64_t bytes_each, int64_t start, int64_t size) {
  // An address and no pointer: of the last tiles it may lie past the array, where nothing is read.
  const uintptr_t first = reinterpret_cast<uintptr_t>(array) + start * bytes_each;
  for (int64_t i = 0; i < size * bytes_each; i += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(first + i));
  }
}

inline void StepTile(const Group& group, const Leaf& leaf, int64_t tile) {
  float g_tile[kLargestBlock], p_tile[kLargestBlock], u_tile[kLargestBlock];
  float mu_tile[kLargestBlock], nu_tile[kLargestBlock];

  // A tile of 8-bit moments is a block, and the last one of a row may be shorter.
  const int64_t tiles_per_row = (leaf.row + leaf.tile - 1) / leaf.tile;
  const int64_t within = (tile % tiles_per_row) * leaf.tile;
  const int64_t start = (tile / tiles_per_row) * leaf.row + within;
  const int64_t size = std::min(leaf.tile, leaf.row - within);

  if (const int64_t next = start + kReadAhead; next + size <= leaf.size) {
    const int64_t of_moments = group.format == kFloat32 ? 4 : group.format == kEightBit ? 1 : 2;
    const int64_t of_correction = group.bits == 24 ? 1 : 2;
    ReadAhead(leaf.g, leaf.g_is_narrow ? 2 : 4, next, size);
    ReadAhead(leaf.mu, of_moments, next + kTile, size);
    ReadAhead(leaf.nu, of_moments, next + 2 * kTile, size);
    if (leaf.p) ReadAhead(leaf.p, leaf.p_is_narrow ? 2 : 4, next + 3 * kTile, size);
    if (leaf.correction) ReadAhead(leaf.correction, of_correction, next + 4 * kTile, size);
  }

  const float* g = static_cast<const float*>(leaf.g) + start;
  if (leaf.g_is_narrow) {
    Widen(static_cast<const uint16_t*>(leaf.g) + start, size, g_tile);
    g = g_tile;
  }
  float* p = leaf.p ? static_cast<float*>(leaf.p) + start : nullptr;
  uint16_t* narrow_p = static_cast<uint16_t*>(leaf.p) + start;
  float* u = !leaf.u ? nullptr : leaf.u_is_narrow ? u_tile : static_cast<float*>(leaf.u) + start;
  if (group.bits) {
    Join(group.bits, leaf, start, size, p_tile);
    p = p_tile;
    // Of all 32 bits the sum is float32's own, taken with the step.
    u = group.bits == 32 ? nullptr : u_tile;
  } else if (leaf.p && leaf.p_is_narrow) {
    Widen(narrow_p, size, p_tile);
    p = p_tile;
  }

  uint32_t noise[kLargestBlock];
  if (group.format == kBfloat16 || group.format == kEightBit) {
    FillNoise(Noise(group.count, leaf.number), leaf, start, size, noise);
  }
  switch (group.format) {
    case kFloat32:
      StepRun(group.scalars, group.form, group.decays, size, g,
              static_cast<float*>(leaf.mu) + start, static_cast<float*>(leaf.nu) + start, p, u);
      break;
    case kBfloat16:
    case kBfloat16Nearest: {
      uint16_t* mu = static_cast<uint16_t*>(leaf.mu) + start;
      uint16_t* nu = static_cast<uint16_t*>(leaf.nu) + start;
      Widen(mu, size, mu_tile);
      Widen(nu, size, nu_tile);
      StepRun(group.scalars, group.form, group.decays, size, g, mu_tile, nu_tile, p, u);
      if (group.format == kBfloat16) {
        Narrow(mu_tile, nu_tile, noise, size, mu, nu);
      } else {
        Narrow(mu_tile, size, mu);
        Narrow(nu_tile, size, nu);
      }
      break;
    }
    case kEightBit: {
      int8_t* mu = static_cast<int8_t*>(leaf.mu) + start;
      uint8_t* nu = static_cast<uint8_t*>(leaf.nu) + start;
      const BlockScales& first = leaf.blocks;
      const BlockScales block{first.scale + tile, first.top + tile, first.step + tile};
      DecodeBlock(mu, nu, block, static_cast<int>(size), mu_tile, nu_tile);
      StepRun(group.scalars, group.form, group.decays, size, g, mu_tile, nu_tile, p, u);
      EncodeBlock(mu_tile, nu_tile, noise, static_cast<int>(size), mu, nu, block);
      break;
    }
  }
  if (group.bits) {
    if (group.bits < 32) {
      // Leaves of weights are numbered beyond those of moments.
      FillNoise(Noise(group.count, leaf.number + (1u << 31)), leaf, start, size, noise);
    }
    Split(group.bits, leaf, start, size, p_tile, u_tile, noise);
    return;
  }
  if (u && leaf.moves) {
    for (int64_t i = 0; i < size; ++i) p[i] += u[i];
  }
  if (u && leaf.u_is_narrow) {
    Narrow(u, size, static_cast<uint16_t*>(leaf.u) + start);
  }
  if (leaf.moves && leaf.p_is_narrow) {
    Narrow(p_tile, size, narrow_p);
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
