// SPDX-License-Identifier: Apache-2.0
// A call of Adam's program, as a handler of XLA's foreign function interface.
//
// Operands: the scalars, float32, with what nothing reads behind them (the lowering in Python says
// why); the count, int32; the index of each leaf and of its first element, uint32; of each leaf what
// is kept (mu, nu, scales, lower bits); the gradients; the parameters, where they are read. Results:
// what is kept, the updates if they are returned, and the parameters if they are moved.
//
// What XLA hands over is checked: a mistake is an error of the step and not a crash.

#include <cstdint>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <utility>
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

// What XLA hands over in a call, and where in it each kind of buffer begins.
struct Call {
  std::vector<AnyBuffer> operands, results;
  int32_t format, bits;
  bool moves, returns;
  Integers places, blocks, axes;

  std::vector<DataType> types = KeptTypes(format, bits);
  size_t kinds = types.size(), leaves = blocks.size(), grads = 3 + kinds * leaves;
  bool decays = places[kWeightDecay] >= 0, reads_params = moves || decays || bits;
  size_t params = reads_params ? grads + leaves : grads;
  size_t updates = kinds * leaves, moved = returns ? updates + leaves : updates;
};

Scalars ReadScalars(const AnyBuffer& buffer, Integers places) {
  Check(buffer.element_type() == DataType::F32, "other scalars");
  Scalars scalars;
  for (size_t i = 0; i < kScalars; ++i) {
    Check(places[i] < static_cast<int64_t>(buffer.element_count()), "other scalars");
    if (places[i] >= 0) scalars.value[i] = static_cast<const float*>(buffer.untyped_data())[places[i]];
  }
  return scalars;
}

// Sets where a leaf's moments and lower bits are.
void ReadKept(const Call& call, size_t k, int64_t tiles, Leaf& leaf) {
  void* data[6];
  for (size_t i = 0; i < call.kinds; ++i) {
    const AnyBuffer& operand = call.operands[3 + k * call.kinds + i];
    const bool is_scale = call.format == kEightBit && i >= 2 && i < 5;
    Check(Is(operand, call.types[i], static_cast<size_t>(is_scale ? tiles : leaf.size)),
          "moments of another dtype or size than their leaf");
    data[i] = InPlace(call.results[k * call.kinds + i], operand);
  }
  leaf.mu = data[0];
  leaf.nu = data[1];
  if (call.bits > 16) leaf.lower = data[call.kinds - 1];
  if (call.format == kEightBit) {
    leaf.blocks = {static_cast<float*>(data[2]), static_cast<float*>(data[3]),
                   static_cast<int32_t*>(data[4])};
  }
}

// Sets a leaf's gradient, parameter and update.
void ReadArrays(const Call& call, size_t k, Leaf& leaf) {
  const AnyBuffer &g = call.operands[call.grads + k], &p = call.operands[call.params + k];
  Check(IsReal(g) && IsReal(p) && p.element_count() == g.element_count(),
        "a gradient and a parameter of other dtypes or sizes");
  Check(!call.bits || IsBfloat16(p), "a weight of another dtype than bfloat16");
  leaf.size = static_cast<int64_t>(g.element_count());
  leaf.g = {g.untyped_data(), IsBfloat16(g)};
  leaf.moves = call.moves;
  if (call.reads_params) leaf.p = {p.untyped_data(), IsBfloat16(p)};
  if (call.moves) leaf.p.data = InPlace(call.results[call.moved + k], p);
  if (call.returns) {
    const AnyBuffer& u = call.results[call.updates + k];
    Check(IsReal(u) && !(call.bits && IsBfloat16(u)) && u.element_count() == g.element_count(),
          "an update unlike its gradient");
    leaf.u = {u.untyped_data(), IsBfloat16(u)};
  }
}

Group ReadGroup(const Call& call) {
  Check(call.leaves > 0, "another number of leaves");
  Check(call.operands.size() == call.params + call.leaves &&
            call.results.size() == call.moved + (call.moves ? call.leaves : 0),
        "another number of operands or results");
  const AnyBuffer &count = call.operands[1], &indices = call.operands[2];
  Check(Is(count, DataType::S32, 1) && Is(indices, DataType::U32, 2 * call.leaves), "other scalars");

  Group group{};
  group.scalars = ReadScalars(call.operands[0], call.places);
  group.count = *static_cast<const int32_t*>(count.untyped_data());
  group.format = call.format;
  group.bits = call.bits;
  group.form = call.places[kAngleFactor] >= 0 ? Form::kAngle
               : call.places[kAhead] >= 0     ? Form::kNesterov
                                              : Form::kRatio;
  group.decays = call.decays;
  group.reads_ahead = ReadsAhead();
  size_t next_axes = 0;
  for (size_t k = 0; k < call.leaves; ++k) {
    Leaf leaf{};
    ReadArrays(call, k, leaf);
    leaf.index = static_cast<const uint32_t*>(indices.untyped_data())[2 * k];
    leaf.first = static_cast<const uint32_t*>(indices.untyped_data())[2 * k + 1];
    leaf.axes = ReadAxes(call.axes, next_axes, static_cast<size_t>(leaf.size));
    leaf.row = leaf.size;
    leaf.tile = kTile;
    if (call.format == kEightBit) {
      Check(call.blocks[k] >= 1 && call.blocks[k] <= kLargestBlock, "a block of another size");
      const auto shape = call.operands[call.grads + k].dimensions();
      if (shape.size()) leaf.row = shape[shape.size() - 1];
      leaf.tile = call.blocks[k];
    }
    const int64_t tiles =
        leaf.size ? leaf.size / leaf.row * ((leaf.row + leaf.tile - 1) / leaf.tile) : 0;
    ReadKept(call, k, tiles, leaf);
    leaf.first_tile = group.tiles;
    group.tiles += tiles;
    if (tiles) group.leaves.push_back(std::move(leaf));
  }
  return group;
}

void Run(ffi::ThreadPool& pool, Group group) {
  if (group.scalars[kGate] == 0) {
    for (const Leaf& leaf : group.leaves) {
      if (leaf.u.data) std::memset(leaf.u.data, 0, leaf.size * (leaf.u.is_bfloat16 ? 2 : 4));
    }
    return;
  }
  RunTasks(std::move(group), ChosenKernels(), pool.num_threads(),
           [&pool](auto work) { pool.Schedule(std::move(work)); });
}

ffi::Error Handle(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets returned,
                  int32_t format, int32_t bits, bool moves, bool returns, Integers places,
                  Integers blocks, Integers axes) {
  std::vector<AnyBuffer> operands, results;
  for (size_t i = 0; i < arguments.size(); ++i) operands.push_back(*arguments.get<AnyBuffer>(i));
  for (size_t i = 0; i < returned.size(); ++i) results.push_back(**returned.get<AnyBuffer>(i));
  try {
    Check(places.size() == kScalars, "another number of scalars");
    Run(pool, ReadGroup({std::move(operands), std::move(results), format, bits, moves, returns, places,
                         blocks, axes}));
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
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    adamfn_step, adamfn::Handle,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().RemainingArgs().RemainingRets()
        .Attr<int32_t>("format").Attr<int32_t>("bits").Attr<bool>("moves").Attr<bool>("returns")
        .Attr<adamfn::Integers>("scalars").Attr<adamfn::Integers>("blocks")
        .Attr<adamfn::Integers>("axes"));
