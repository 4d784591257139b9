// The step of a group of leaves, as a handler of XLA's foreign function interface.
//
// Operands: the scalars, float32[10]; the count, int32; the leaves' numbers, uint32; the moments of
// the group; the gradient of each leaf; each leaf. Results: the moments and the leaves, in the buffers of their operands.
//
// A group is one leaf with moments in its shape, or several whose moments lie end to end in one
// buffer. What XLA hands over is checked: a mistake is an error of the step and not a crash.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "group.h"
#include "xla/ffi/api/ffi.h"

namespace adamfn {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kTilesPerTask = 16;  // that a thread takes at a time

// Tasks that the calling thread and those of XLA's pool take one after another. The calling thread
// can finish them alone, so a pool that is busy, or gone after a fork, stops nothing; a pool thread
// that comes late finds none left, and touches nothing but this.
class Tasks {
 public:
  explicit Tasks(Group group)
      : group_(std::move(group)), number_((group_.tiles + kTilesPerTask - 1) / kTilesPerTask) {}

  int64_t number() const { return number_; }

  void Work() {
    for (int64_t task; (task = next_.fetch_add(1)) < number_;) {
      StepTiles(group_, task * kTilesPerTask,
                std::min((task + 1) * kTilesPerTask, group_.tiles));
      if (done_.fetch_add(1) + 1 == number_) {
        const std::lock_guard<std::mutex> lock(mutex_);
        all_done_.notify_all();
      }
    }
  }

  void Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [this] { return done_.load() == number_; });
  }

 private:
  const Group group_;
  const int64_t number_;
  std::atomic<int64_t> next_{0}, done_{0};
  std::mutex mutex_;
  std::condition_variable all_done_;
};

bool IsNarrow(const ffi::AnyBuffer& buffer) { return buffer.element_type() == ffi::DataType::BF16; }

bool IsParameter(const ffi::AnyBuffer& buffer) {
  return IsNarrow(buffer) || buffer.element_type() == ffi::DataType::F32;
}

ffi::Error Wrong(const std::string& what) {
  return ffi::Error::InvalidArgument("adamfn: the step of a group of leaves got " + what + ".");
}

ffi::Error Run(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results,
               int32_t format, int32_t block, bool nesterov, ffi::Span<const int64_t> decays) {
  constexpr ffi::DataType kTypes[][2] = {{ffi::DataType::F32, ffi::DataType::F32},
                                         {ffi::DataType::BF16, ffi::DataType::BF16},
                                         {ffi::DataType::BF16, ffi::DataType::BF16},
                                         {ffi::DataType::S8, ffi::DataType::U8}};
  if (format < kFloat32 || format > kEightBit) return Wrong("an unknown format");
  const bool blocks = format == kEightBit;
  const size_t leaves = decays.size(), moments = blocks ? 5 : 2, first = 3 + moments;
  if (leaves == 0 || (blocks && leaves != 1)) return Wrong("another number of leaves");
  if (blocks && (block < 1 || block > kLargestBlock)) return Wrong("a block of another size");
  if (arguments.size() != first + 2 * leaves || results.size() != moments + leaves) {
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
  if (!is(0, ffi::DataType::F32, sizeof(Scalars) / sizeof(float)) ||
      !is(1, ffi::DataType::S32, 1) || !is(2, ffi::DataType::U32, leaves)) {
    return Wrong("other scalars");
  }

  // Results lie where their operands do; where they do not, they begin as a copy.
  std::vector<void*> kept;
  for (size_t i = 0; i < results.size(); ++i) {
    const ffi::AnyBuffer& operand = operands[i < moments ? 3 + i : 3 + leaves + i];
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
  std::memcpy(&group.scalars, operands[0].untyped_data(), sizeof(Scalars));
  std::memcpy(&group.count, operands[1].untyped_data(), sizeof group.count);
  const auto* numbers = static_cast<const uint32_t*>(operands[2].untyped_data());
  group.format = format;
  group.nesterov = nesterov;
  int64_t offset = 0;
  for (size_t i = 0; i < leaves; ++i) {
    const ffi::AnyBuffer& g = operands[first + i];
    const ffi::AnyBuffer& p = operands[first + leaves + i];
    if (!IsParameter(g) || !IsParameter(p) || g.element_count() != p.element_count()) {
      return Wrong("a gradient and a parameter of other dtypes or sizes");
    }
    Leaf leaf{};
    leaf.g = g.untyped_data();
    leaf.p = kept[moments + i];
    leaf.g_is_narrow = IsNarrow(g);
    leaf.p_is_narrow = IsNarrow(p);
    leaf.decays = decays[i] != 0;
    leaf.number = numbers[i];
    leaf.offset = offset;
    leaf.size = static_cast<int64_t>(p.element_count());
    const auto shape = p.dimensions();
    leaf.row = blocks && shape.size() ? shape[shape.size() - 1] : leaf.size;
    leaf.tile = blocks ? block : kTile;
    leaf.first_tile = group.tiles;
    offset += leaf.size;
    if (leaf.size == 0) continue;
    group.tiles += leaf.size / leaf.row * ((leaf.row + leaf.tile - 1) / leaf.tile);
    group.leaves.push_back(leaf);
  }
  const size_t whole = static_cast<size_t>(offset);
  // Of mu: codes and scale; of nu: codes, top and step.
  const size_t nu = blocks ? 5 : 4;
  if (!is(3, kTypes[format][0], whole) || !is(nu, kTypes[format][1], whole)) {
    return Wrong("moments of another dtype or size than its leaves");
  }
  group.mu = kept[0];
  group.nu = kept[nu - 3];
  if (blocks) {
    const size_t tiles = static_cast<size_t>(group.tiles);
    if (!is(4, ffi::DataType::F32, tiles) || !is(6, ffi::DataType::F32, tiles) ||
        !is(7, ffi::DataType::S32, tiles)) {
      return Wrong("scales of another dtype or number than its blocks");
    }
    group.scale = static_cast<float*>(kept[1]);
    group.top = static_cast<float*>(kept[3]);
    group.step = static_cast<int32_t*>(kept[4]);
  }
  if (group.tiles == 0) return ffi::Error::Success();

  const auto tasks = std::make_shared<Tasks>(std::move(group));
  const int64_t threads = std::min(pool.num_threads(), tasks->number());
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
                                  .Attr<int32_t>("block")
                                  .Attr<bool>("nesterov")
                                  .Attr<xla::ffi::Span<const int64_t>>("decays"));
