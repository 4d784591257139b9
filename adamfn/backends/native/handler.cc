// A call of Adam's program, as a handler of XLA's foreign function interface.
//
// Operands and results are those of adamfn.program.Call: the scalars, float32, and behind them what
// nothing reads (adamfn.backends.cpu says why); the count, int32; the leaves' numbers and those of
// their first elements, uint32; the moments; the gradients; the parameters where they are read.
// Results are the moments, the updates if they are returned, and the parameters if they are moved.
// Moments and parameters lie in the buffers of their operands.
//
// Each leaf has moments of its own, in its shape; or all share two buffers, in which they lie end to
// end. What XLA hands over is checked: a mistake is an error of the step and not a crash.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "group.h"
#include "tasks.h"
#include "xla/ffi/api/ffi.h"

namespace adamfn {
namespace {

namespace ffi = xla::ffi;

bool IsNarrow(const ffi::AnyBuffer& buffer) { return buffer.element_type() == ffi::DataType::BF16; }

bool IsParameter(const ffi::AnyBuffer& buffer) {
  return IsNarrow(buffer) || buffer.element_type() == ffi::DataType::F32;
}

ffi::Error Wrong(const std::string& what) {
  return ffi::Error::InvalidArgument("adamfn: a call of a program got " + what + ".");
}

// The types of what is kept of a leaf: mu, nu, and the scales of blocks.
std::vector<ffi::DataType> MomentTypes(int32_t format) {
  constexpr auto kF32 = ffi::DataType::F32, kBF16 = ffi::DataType::BF16;
  if (format == kEightBit) return {ffi::DataType::S8, ffi::DataType::U8, kF32, kF32, ffi::DataType::S32};
  if (format == kFloat32) return {kF32, kF32};
  return {kBF16, kBF16};
}

// The axes of a leaf of so many elements, at their place among those of all leaves: how many, and
// the length and the stride of each. Moves the place on.
bool ReadAxes(ffi::Span<const int64_t> numbers, size_t& next, size_t size,
              std::vector<Axis>& axes) {
  if (next >= numbers.size()) return false;
  const int64_t count = numbers[next++];
  if (count < 0 || static_cast<uint64_t>(count) > (numbers.size() - next) / 2) return false;
  size_t elements = 1;
  for (int64_t i = 0; i < count; ++i, next += 2) {
    if (numbers[next] < 0) return false;
    axes.push_back({numbers[next], numbers[next + 1]});
    elements *= static_cast<size_t>(numbers[next]);
  }
  if (axes.empty()) axes.push_back({1, 1});
  return elements == size;
}

ffi::Error Run(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results,
               int32_t format, int32_t bits, bool packed, bool moves, bool returns,
               ffi::Span<const int64_t> places, ffi::Span<const int64_t> blocks,
               ffi::Span<const int64_t> axes) {
  if (format < kFloat32 || format > kEightBit) return Wrong("an unknown format");
  if ((bits != 0 && bits != 16 && bits != 24 && bits != 32) || (bits && packed)) {
    return Wrong("another number of bits of a weight");
  }
  std::vector<ffi::DataType> types = MomentTypes(format);
  if (bits > 16) types.push_back(bits == 24 ? ffi::DataType::S8 : ffi::DataType::S16);
  const size_t leaves = blocks.size(), kinds = types.size();
  const size_t moments = packed ? kinds : kinds * leaves, first = 3 + moments;
  if (leaves == 0 || (packed && format != kFloat32)) return Wrong("another number of leaves");
  if (places.size() != kScalars) return Wrong("another number of scalars");
  const bool decays = places[kWeightDecay] >= 0, has_params = moves || decays || bits;
  if (arguments.size() != first + (has_params ? 2 : 1) * leaves ||
      results.size() != moments + (returns ? leaves : 0) + (moves ? leaves : 0)) {
    return Wrong("another number of operands or results");
  }

  std::vector<ffi::AnyBuffer> operands;
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto operand = arguments.get<ffi::AnyBuffer>(i);
    if (operand.has_error()) return operand.error();
    operands.push_back(*operand);
  }
  const auto is = [&](size_t i, ffi::DataType type, size_t size) {
    return operands[i].element_type() == type && operands[i].element_count() == size;
  };
  if (operands[0].element_type() != ffi::DataType::F32 || !is(1, ffi::DataType::S32, 1) ||
      !is(2, ffi::DataType::U32, 2 * leaves)) {
    return Wrong("other scalars");
  }

  // Results lie where their operands do, but for updates; where they do not, they begin as a copy.
  std::vector<void*> kept;
  const size_t updates = returns ? leaves : 0;
  for (size_t i = 0; i < results.size(); ++i) {
    if (i >= moments && i < moments + updates) {
      auto result = results.get<ffi::AnyBuffer>(i);
      if (result.has_error()) return result.error();
      const ffi::AnyBuffer& g = operands[3 + i];
      if ((*result)->element_type() != (bits ? ffi::DataType::F32 : g.element_type()) ||
          (*result)->element_count() != g.element_count()) {
        return Wrong("an update unlike its gradient");
      }
      kept.push_back((*result)->untyped_data());
      continue;
    }
    const ffi::AnyBuffer& operand =
        operands[i < moments ? 3 + i : first + leaves + i - moments - updates];
    auto result = results.get<ffi::AnyBuffer>(i);
    if (result.has_error()) return result.error();
    if ((*result)->element_type() != operand.element_type() ||
        (*result)->element_count() != operand.element_count()) {
      return Wrong("a result unlike its operand");
    }
    void* data = (*result)->untyped_data();
    if (data != operand.untyped_data()) {
      std::memcpy(data, operand.untyped_data(), operand.size_bytes());
    }
    kept.push_back(data);
  }

  Group group{};
  const auto* vector = static_cast<const float*>(operands[0].untyped_data());
  for (size_t i = 0; i < kScalars; ++i) {
    if (places[i] >= static_cast<int64_t>(operands[0].element_count())) return Wrong("other scalars");
    if (places[i] >= 0) group.scalars.value[i] = vector[places[i]];
  }
  if (group.scalars[kTaken] == 0) {
    for (size_t i = 0; i < updates; ++i) {
      const ffi::AnyBuffer& g = operands[first + i];
      std::memset(kept[moments + i], 0, bits ? 4 * g.element_count() : g.size_bytes());
    }
    return ffi::Error::Success();
  }
  std::memcpy(&group.count, operands[1].untyped_data(), sizeof group.count);
  const auto* numbers = static_cast<const uint32_t*>(operands[2].untyped_data());
  group.format = format;
  group.bits = bits;
  group.form = places[kAngleFactor] >= 0 ? Form::kAngle
               : places[kAhead] >= 0      ? Form::kNesterov
                                          : Form::kRatio;
  group.decays = decays;
  size_t together = 0;  // elements of packed leaves so far
  size_t next_axes = 0;
  for (size_t k = 0; k < leaves; ++k) {
    const ffi::AnyBuffer& g = operands[first + k];
    const ffi::AnyBuffer& p = operands[first + (has_params ? leaves : 0) + k];
    const size_t size = g.element_count();
    if (!IsParameter(g) || !IsParameter(p) || p.element_count() != size) {
      return Wrong("a gradient and a parameter of other dtypes or sizes");
    }
    if (format == kEightBit && (blocks[k] < 1 || blocks[k] > kLargestBlock)) {
      return Wrong("a block of another size");
    }
    const auto shape = g.dimensions();
    Leaf leaf{};
    leaf.g = g.untyped_data();
    leaf.u = returns ? kept[moments + k] : nullptr;
    leaf.p = moves ? kept[moments + updates + k] : has_params ? p.untyped_data() : nullptr;
    leaf.moves = moves;
    leaf.g_is_narrow = IsNarrow(g);
    leaf.p_is_narrow = IsNarrow(p);
    leaf.u_is_narrow = leaf.g_is_narrow && !bits;
    if (bits && !leaf.p_is_narrow) return Wrong("a weight of another dtype than bfloat16");
    leaf.number = numbers[2 * k];
    leaf.first = numbers[2 * k + 1];
    if (!ReadAxes(axes, next_axes, size, leaf.axes)) return Wrong("other axes");
    leaf.size = static_cast<int64_t>(size);
    leaf.row = format == kEightBit && shape.size() ? shape[shape.size() - 1] : leaf.size;
    leaf.tile = format == kEightBit ? blocks[k] : kTile;
    leaf.first_tile = group.tiles;
    const int64_t tiles =
        size ? leaf.size / leaf.row * ((leaf.row + leaf.tile - 1) / leaf.tile) : 0;
    if (packed) {
      if (operands[3].element_count() < together + size) break;  // said below
      leaf.mu = static_cast<float*>(kept[0]) + together;
      leaf.nu = static_cast<float*>(kept[1]) + together;
      together += size;
    } else {
      const size_t own = k * kinds;
      for (size_t i = 0; i < kinds; ++i) {
        const bool codes = i < 2 || (bits > 16 && i == kinds - 1);
        if (!is(3 + own + i, types[i], codes ? size : static_cast<size_t>(tiles))) {
          return Wrong("moments of another dtype or size than their leaf");
        }
      }
      leaf.mu = kept[own];
      leaf.nu = kept[own + 1];
      leaf.correction = bits > 16 ? kept[own + kinds - 1] : nullptr;
      if (format == kEightBit) {
        leaf.blocks = {static_cast<float*>(kept[own + 2]), static_cast<float*>(kept[own + 3]),
                       static_cast<int32_t*>(kept[own + 4])};
      }
    }
    if (size) group.leaves.push_back(std::move(leaf));
    group.tiles += tiles;
  }
  if (packed && (!is(3, types[0], together) || !is(4, types[1], together))) {
    return Wrong("moments of another dtype or size than their leaves");
  }
  if (group.tiles == 0) return ffi::Error::Success();

  const int64_t threads =
      std::clamp<int64_t>(group.tiles / kTilesPerThread, 1, std::max<int64_t>(pool.num_threads(), 1));
  const auto tasks = std::make_shared<Tasks>(std::move(group), threads);
  for (int64_t i = 1; i < threads; ++i) pool.Schedule([tasks] { tasks->Work(); });
  tasks->Work();
  tasks->Wait();
  return ffi::Error::Success();
}

}  // namespace
}  // namespace adamfn

XLA_FFI_DEFINE_HANDLER_SYMBOL(adamfn_step, adamfn::Run,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int32_t>("format")
                                  .Attr<int32_t>("bits")
                                  .Attr<bool>("packed")
                                  .Attr<bool>("moves")
                                  .Attr<bool>("returns")
                                  .Attr<xla::ffi::Span<const int64_t>>("scalars")
                                  .Attr<xla::ffi::Span<const int64_t>>("blocks")
                                  .Attr<xla::ffi::Span<const int64_t>>("axes"));
