// SPDX-License-Identifier: Apache-2.0
// The step of a group of leaves, tile by tile: decode, step, encode. CMake compiles this file once
// for each kind of processor, with ADAMFN_VARIANT as the namespace of all that it has.

#include <algorithm>
#include <cstdint>

#include "eight_bit.h"
#include "group.h"
#include "rounding.h"
#include "step.h"
#include "weights.h"

namespace adamfn::ADAMFN_VARIANT {
namespace {

// Fills in the random bits of some elements of a leaf, by their indices in the whole leaf.
void FillRandom(const Noise& noise, const Leaf& leaf, int64_t start, int64_t size,
                uint32_t* random) {
  const Axis& inner = leaf.axes[0];
  for (int64_t done = 0; done < size;) {
    const int64_t within = (start + done) % inner.length;
    const int64_t run = std::min(size - done, inner.length - within);
    int64_t outer = (start + done) / inner.length;
    uint64_t index = leaf.first + static_cast<uint64_t>(within);
    for (size_t i = 1; i < leaf.axes.size(); ++i) {
      index += static_cast<uint64_t>(outer % leaf.axes[i].length) *
               static_cast<uint64_t>(leaf.axes[i].stride);
      outer /= leaf.axes[i].length;
    }
    noise.Fill(static_cast<uint32_t>(index), run, random + done);
    done += run;
  }
}

// How many elements ahead memory is requested: with more than four arrays, the processor's prefetching
// comes too late. All arrays begin at the same place of a page, in one channel of the memory, so each
// is read one tile further than the one before.
constexpr int64_t kReadAhead = 256;

// The elements of a leaf from which on that pays: smaller ones are in a cache, or end too soon.
constexpr int64_t kReadAheadFrom = 1 << 18;

// Inlined: GCC drops calls of a function that does nothing but prefetch, as if it had no effect.
[[gnu::always_inline]] inline void ReadAhead(const void* array, int64_t bytes_each, int64_t start,
                                             int64_t size) {
  // An address and no pointer: at the end it may be past the array, where nothing is read.
  const uintptr_t first = reinterpret_cast<uintptr_t>(array) + start * bytes_each;
  for (int64_t i = 0; i < size * bytes_each; i += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(first + i));
  }
}

[[gnu::always_inline]] inline void ReadAhead(const Group& group, const Leaf& leaf, int64_t next,
                                             int64_t size) {
  const int64_t of_moments = group.format == kFloat32 ? 4 : group.format == kEightBit ? 1 : 2;
  ReadAhead(leaf.g.data, leaf.g.is_bfloat16 ? 2 : 4, next, size);
  ReadAhead(leaf.mu, of_moments, next + kTile, size);
  ReadAhead(leaf.nu, of_moments, next + 2 * kTile, size);
  if (leaf.p.data) ReadAhead(leaf.p.data, leaf.p.is_bfloat16 ? 2 : 4, next + 3 * kTile, size);
  if (leaf.lower) ReadAhead(leaf.lower, group.bits == 24 ? 1 : 2, next + 4 * kTile, size);
}

// The array from an element on, as numbers of another type.
template <typename T>
T* From(void* array, int64_t start) {
  return array ? static_cast<T*>(array) + start : nullptr;
}

void StepTile(const Group& group, const Leaf& leaf, int64_t tile) {
  float g_tile[kLargestBlock], p_tile[kLargestBlock], u_tile[kLargestBlock];
  float mu_tile[kLargestBlock], nu_tile[kLargestBlock];
  uint32_t random[kLargestBlock];

  // The last tile of a row may be shorter.
  const int64_t tiles_per_row = (leaf.row + leaf.tile - 1) / leaf.tile;
  const int64_t within = (tile % tiles_per_row) * leaf.tile;
  const int64_t start = (tile / tiles_per_row) * leaf.row + within;
  const int64_t size = std::min(leaf.tile, leaf.row - within);
  const int64_t next = start + kReadAhead;
  if (group.reads_ahead && leaf.size >= kReadAheadFrom && next + size <= leaf.size) {
    ReadAhead(group, leaf, next, size);
  }

  const float* g = From<float>(leaf.g.data, start);
  if (leaf.g.is_bfloat16) {
    Widen(From<uint16_t>(leaf.g.data, start), size, g_tile);
    g = g_tile;
  }
  const int32_t bits = group.bits;
  float* p = From<float>(leaf.p.data, start);
  uint16_t* upper = From<uint16_t>(leaf.p.data, start);  // if p is bfloat16
  void* lower = bits == 24 ? static_cast<void*>(From<int8_t>(leaf.lower, start))
                           : From<int16_t>(leaf.lower, start);
  if (bits) {
    JoinWeights(bits, upper, lower, size, p_tile);
    p = p_tile;
  } else if (leaf.p.data && leaf.p.is_bfloat16) {
    Widen(upper, size, p_tile);
    p = p_tile;
  }
  float* returned = From<float>(leaf.u.data, start);  // unless u is bfloat16
  float* u = leaf.u.data && leaf.u.is_bfloat16 ? u_tile : returned;
  // With 32-bit weights the sum is a plain float32 sum, which StepRun takes.
  if (bits) u = bits == 32 ? nullptr : u_tile;

  if (group.format == kBfloat16 || group.format == kEightBit) {
    FillRandom(Noise(group.count, leaf.index), leaf, start, size, random);
  }
  const auto step = [&](float* mu, float* nu) { StepRun(group, size, g, mu, nu, p, u); };
  if (group.format == kFloat32) {
    step(From<float>(leaf.mu, start), From<float>(leaf.nu, start));
  } else if (group.format == kEightBit) {
    int8_t* mu = From<int8_t>(leaf.mu, start);
    uint8_t* nu = From<uint8_t>(leaf.nu, start);
    const BlockScales& first = leaf.blocks;
    const BlockScales block{first.scale + tile, first.top + tile, first.step + tile};
    DecodeBlock(mu, nu, block, static_cast<int>(size), mu_tile, nu_tile);
    step(mu_tile, nu_tile);
    EncodeBlock(mu_tile, nu_tile, random, static_cast<int>(size), mu, nu, block);
  } else {
    uint16_t *mu = From<uint16_t>(leaf.mu, start), *nu = From<uint16_t>(leaf.nu, start);
    Widen(mu, size, mu_tile);
    Widen(nu, size, nu_tile);
    step(mu_tile, nu_tile);
    if (group.format == kBfloat16) {
      Narrow(mu_tile, nu_tile, random, size, mu, nu);
    } else {
      Narrow(mu_tile, size, mu);
      Narrow(nu_tile, size, nu);
    }
  }

  if (bits) {
    // Weights take their random bits from indices of leaves beyond those of moments.
    const Noise noise(group.count, leaf.index + (1u << 31));
    if (bits < 32) FillRandom(noise, leaf, start, size, random);
    SplitWeights(bits, p_tile, u_tile, random, size, leaf.moves, upper, lower, returned);
    return;
  }
  if (u && leaf.moves) {
    for (int64_t i = 0; i < size; ++i) p[i] += u[i];
  }
  if (u == u_tile) Narrow(u, size, From<uint16_t>(leaf.u.data, start));
  if (leaf.moves && leaf.p.is_bfloat16) Narrow(p_tile, size, upper);
}

}  // namespace

void StepTiles(const Group& group, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const Leaf* leaf = group.leaves.data();
  const Leaf* last = leaf + group.leaves.size() - 1;
  for (int64_t tile = begin; tile < end; ++tile) {
    while (leaf != last && (leaf + 1)->first_tile <= tile) ++leaf;
    StepTile(group, *leaf, tile - leaf->first_tile);
  }
}

}  // namespace adamfn::ADAMFN_VARIANT
