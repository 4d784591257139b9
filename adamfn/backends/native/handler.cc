// A call of Adam's program, as a handler of XLA's foreign function interface.
//
// Operands: the scalars, float32, with what nothing reads behind them (the lowering in Python says
// why); the count, int32; the index of each leaf and of its first element, uint32; of each leaf what
// is kept (mu, nu, scales, lower bits); the gradients; the parameters, where they are read. Results:
// what is kept, the updates if they are returned, and the parameters if they are moved.
//
// What XLA hands over is checked: a mistake is an error of the step and not a crash.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "group.h"
#include "tasks.h"
#include "xla/ffi/api/ffi.h"

namespace adamfn {
namespace {

namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using ffi::DataType;
using Integers = ffi::Span<const int64_t>;

void Check(bool right, const char* wrong) {
  if (!right) throw std::invalid_argument(wrong);
}

bool IsBfloat16(const AnyBuffer& buffer) { return buffer.element_type() == DataType::BF16; }

bool IsReal(const AnyBuffer& buffer) {
  return IsBfloat16(buffer) || buffer.element_type() == DataType::F32;
}

bool Is(const AnyBuffer& buffer, DataType type, size_t size) {
  return buffer.element_type() == type && buffer.element_count() == size;
}

// The types of what is kept of a leaf: mu, nu, the scales of blocks, the lower bits of weights.
std::vector<DataType> KeptTypes(int32_t format, int32_t bits) {
  Check(format >= kFloat32 && format <= kEightBit, "an unknown format");
  Check(bits == 0 || bits == 16 || bits == 24 || bits == 32, "another number of bits of a weight");
  const DataType wide = format == kFloat32 ? DataType::F32 : DataType::BF16;
  std::vector<DataType> types{wide, wide};
  if (format == kEightBit) {
    types = {DataType::S8, DataType::U8, DataType::F32, DataType::F32, DataType::S32};
  }
  if (bits > 16) types.push_back(bits == 24 ? DataType::S8 : DataType::S16);
  return types;
}

// Reads the axes of a leaf of so many elements from those of all leaves, and moves on to the next.
std::vector<Axis> ReadAxes(Integers all, size_t& next, size_t size) {
  constexpr auto kWrong = "other axes";
  Check(next < all.size(), kWrong);
  const int64_t count = all[next++];
  Check(count >= 0 && static_cast<uint64_t>(count) <= (all.size() - next) / 2, kWrong);
  std::vector<Axis> axes;
  size_t elements = 1;
  for (int64_t i = 0; i < count; ++i, next += 2) {
    Check(all[next] >= 0, kWrong);
    axes.push_back({all[next], all[next + 1]});
    elements *= static_cast<size_t>(all[next]);
  }
  Check(elements == size, kWrong);
  if (axes.empty()) axes.push_back({1, 1});
  return axes;
}

// The memory of a result that XLA places where its operand is. Where it does not, it begins as a copy.
void* InPlace(const AnyBuffer& result, const AnyBuffer& operand) {
  Check(Is(result, operand.element_type(), operand.element_count()), "a result unlike its operand");
  void* data = result.untyped_data();
  if (data != operand.untyped_data()) std::memcpy(data, operand.untyped_data(), operand.size_bytes());
  return data;
}

Scalars ReadScalars(const AnyBuffer& buffer, Integers places) {
  Check(buffer.element_type() == DataType::F32, "other scalars");
  Scalars scalars;
  for (size_t i = 0; i < kScalars; ++i) {
    Check(places[i] < static_cast<int64_t>(buffer.element_count()), "other scalars");
    if (places[i] >= 0) scalars.value[i] = static_cast<const float*>(buffer.untyped_data())[places[i]];
  }
  return scalars;
}

void Step(ffi::ThreadPool& pool, const std::vector<AnyBuffer>& operands,
          const std::vector<AnyBuffer>& results, int32_t format, int32_t bits, bool moves,
          bool returns, Integers places, Integers blocks, Integers axes) {
  const std::vector<DataType> types = KeptTypes(format, bits);
  const size_t leaves = blocks.size(), kinds = types.size(), kept = kinds * leaves;
  Check(leaves > 0, "another number of leaves");
  Check(places.size() == kScalars, "another number of scalars");
  const bool decays = places[kWeightDecay] >= 0, has_params = moves || decays || bits;
  const size_t grads = 3 + kept, params = has_params ? grads + leaves : grads;
  const size_t moved = kept + (returns ? leaves : 0);
  Check(operands.size() == params + leaves && results.size() == moved + (moves ? leaves : 0),
        "another number of operands or results");
  Check(Is(operands[1], DataType::S32, 1) && Is(operands[2], DataType::U32, 2 * leaves),
        "other scalars");

  Group group{};
  group.scalars = ReadScalars(operands[0], places);
  std::memcpy(&group.count, operands[1].untyped_data(), sizeof group.count);
  group.format = format;
  group.bits = bits;
  group.form = places[kAngleFactor] >= 0 ? Form::kAngle
               : places[kAhead] >= 0     ? Form::kNesterov
                                         : Form::kRatio;
  group.decays = decays;
  const auto* indices = static_cast<const uint32_t*>(operands[2].untyped_data());
  size_t next_axes = 0;
  for (size_t k = 0; k < leaves; ++k) {
    const AnyBuffer &g = operands[grads + k], &p = operands[params + k];
    const size_t size = g.element_count();
    Check(IsReal(g) && IsReal(p) && p.element_count() == size,
          "a gradient and a parameter of other dtypes or sizes");
    Check(!bits || IsBfloat16(p), "a weight of another dtype than bfloat16");
    Leaf leaf{};
    leaf.g = {g.untyped_data(), IsBfloat16(g)};
    if (has_params) leaf.p = {p.untyped_data(), IsBfloat16(p)};
    if (moves) leaf.p.data = InPlace(results[moved + k], p);
    if (returns) {
      const AnyBuffer& u = results[kept + k];
      Check(Is(u, bits ? DataType::F32 : g.element_type(), size), "an update unlike its gradient");
      leaf.u = {u.untyped_data(), IsBfloat16(u)};
      if (group.scalars[kGate] == 0) std::memset(leaf.u.data, 0, u.size_bytes());
    }
    leaf.moves = moves;
    leaf.index = indices[2 * k];
    leaf.first = indices[2 * k + 1];
    leaf.axes = ReadAxes(axes, next_axes, size);
    leaf.size = leaf.row = static_cast<int64_t>(size);
    leaf.tile = kTile;
    if (format == kEightBit) {
      Check(blocks[k] >= 1 && blocks[k] <= kLargestBlock, "a block of another size");
      const auto shape = g.dimensions();
      if (shape.size()) leaf.row = shape[shape.size() - 1];
      leaf.tile = blocks[k];
    }
    const int64_t tiles =
        size ? leaf.size / leaf.row * ((leaf.row + leaf.tile - 1) / leaf.tile) : 0;
    void* data[6];  // mu, nu, the scales of blocks, the lower bits of weights
    for (size_t i = 0; i < kinds; ++i) {
      const AnyBuffer& operand = operands[3 + k * kinds + i];
      const bool is_scale = format == kEightBit && i >= 2 && i < 5;
      Check(Is(operand, types[i], is_scale ? static_cast<size_t>(tiles) : size),
            "moments of another dtype or size than their leaf");
      data[i] = InPlace(results[k * kinds + i], operand);
    }
    leaf.mu = data[0];
    leaf.nu = data[1];
    if (bits > 16) leaf.lower = data[kinds - 1];
    if (format == kEightBit) {
      leaf.blocks = {static_cast<float*>(data[2]), static_cast<float*>(data[3]),
                     static_cast<int32_t*>(data[4])};
    }
    leaf.first_tile = group.tiles;
    group.tiles += tiles;
    if (size) group.leaves.push_back(std::move(leaf));
  }
  if (group.tiles == 0 || group.scalars[kGate] == 0) return;

  const int64_t threads = std::clamp<int64_t>(group.tiles / kTilesPerThread, 1,
                                              std::max<int64_t>(pool.num_threads(), 1));
  const auto tasks = std::make_shared<Tasks>(std::move(group), ChosenKernels(), threads);
  for (int64_t i = 1; i < threads; ++i) pool.Schedule([tasks] { tasks->Work(); });
  tasks->Work();
  tasks->Wait();
}

template <typename T>
T ValueOf(ffi::ErrorOr<T> found) {
  Check(found.has_value(), "a buffer that cannot be read");
  return *found;
}

ffi::Error Run(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results,
               int32_t format, int32_t bits, bool moves, bool returns, Integers places,
               Integers blocks, Integers axes) {
  try {
    std::vector<AnyBuffer> inputs, outputs;
    for (size_t i = 0; i < arguments.size(); ++i) {
      inputs.push_back(ValueOf(arguments.get<AnyBuffer>(i)));
    }
    for (size_t i = 0; i < results.size(); ++i) {
      outputs.push_back(*ValueOf(results.get<AnyBuffer>(i)));
    }
    Step(pool, inputs, outputs, format, bits, moves, returns, places, blocks, axes);
    return ffi::Error::Success();
  } catch (const std::exception& wrong) {
    return ffi::Error::InvalidArgument(std::string("adamfn: a call of a program got ") +
                                       wrong.what() + ".");
  }
}

}  // namespace
}  // namespace adamfn

// The version of XLA's interface that this was compiled for.
extern "C" [[gnu::visibility("default")]] int adamfn_ffi_version() {
  return 1000 * XLA_FFI_API_MAJOR + XLA_FFI_API_MINOR;
}

extern "C" [[gnu::visibility("default")]] XLA_FFI_Error* adamfn_step(XLA_FFI_CallFrame* frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(adamfn_step, adamfn::Run,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int32_t>("format")
                                  .Attr<int32_t>("bits")
                                  .Attr<bool>("moves")
                                  .Attr<bool>("returns")
                                  .Attr<xla::ffi::Span<const int64_t>>("scalars")
                                  .Attr<xla::ffi::Span<const int64_t>>("blocks")
                                  .Attr<xla::ffi::Span<const int64_t>>("axes"));
