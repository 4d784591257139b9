// SPDX-License-Identifier: Apache-2.0
// Steps of the native code without XLA: calls of groups of leaves, on threads of its own.
//
// benchmarks/native_sweep.py times it with other settings; tests/test_native.py runs it under
// ThreadSanitizer, which cannot see how XLA's threads wait for one another.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "group.h"
#include "tasks.h"

#ifndef READS_AHEAD
#define READS_AHEAD true
#endif

namespace adamfn {
namespace ADAMFN_VARIANT { Kernels StepTiles; }
namespace {

// Threads that wait for functions to run.
class Pool {
 public:
  explicit Pool(int64_t threads) {
    for (int64_t i = 0; i < threads; ++i) threads_.emplace_back([this] { Loop(); });
  }

  ~Pool() {
    for (size_t i = 0; i < threads_.size(); ++i) Schedule(nullptr);
    for (std::thread& thread : threads_) thread.join();
  }

  void Schedule(std::function<void()> function) {
    const std::lock_guard<std::mutex> lock(mutex_);
    waiting_.push_back(std::move(function));
    some_.notify_one();
  }

 private:
  void Loop() {
    while (true) {
      std::unique_lock<std::mutex> lock(mutex_);
      some_.wait(lock, [this] { return !waiting_.empty(); });
      const auto function = std::move(waiting_.front());
      waiting_.pop_front();
      lock.unlock();
      if (!function) return;
      function();
    }
  }

  std::mutex mutex_;
  std::condition_variable some_;
  std::deque<std::function<void()>> waiting_;
  std::vector<std::thread> threads_;
};

struct Workload {
  std::vector<Group> calls;
  int64_t threads;
  std::unique_ptr<Pool> pool;
};

}  // namespace
}  // namespace adamfn

using adamfn::Group;
using adamfn::Leaf;
using adamfn::Workload;

// A workload of calls. Each leaf has a call, a number of elements, a length of its last axis, a block
// of 8-bit moments, and eight arrays: gradient, parameter, mu, nu, three scales, lower bits.
extern "C" Workload* new_workload(int32_t format, int32_t bits, int64_t threads, int64_t leaves,
                                  const int64_t (*numbers)[4], void* const (*arrays)[8]) {
  auto* made = new Workload{{}, threads, std::make_unique<adamfn::Pool>(threads - 1)};
  for (int64_t k = 0; k < leaves; ++k) {
    const auto [call, size, row, block] = numbers[k];
    const auto& own = arrays[k];
    if (static_cast<size_t>(call) == made->calls.size()) {
      Group group{};
      group.scalars.value[adamfn::kComplement1] = 0.1f;
      group.scalars.value[adamfn::kComplement2] = 0.001f;
      group.scalars.value[adamfn::kEps] = 1e-8f;
      group.scalars.value[adamfn::kFactor] = -1e-3f;
      group.format = format;
      group.bits = bits;
      group.reads_ahead = READS_AHEAD;
      made->calls.push_back(std::move(group));
    }
    const bool in_blocks = format == adamfn::kEightBit;
    Leaf leaf{};
    leaf.g = {own[0], false};
    leaf.p = {own[1], bits != 0};
    leaf.moves = true;
    leaf.mu = own[2];
    leaf.nu = own[3];
    leaf.blocks = {static_cast<float*>(own[4]), static_cast<float*>(own[5]),
                   static_cast<int32_t*>(own[6])};
    leaf.lower = bits > 16 ? own[7] : nullptr;
    leaf.index = static_cast<uint32_t>(k);
    leaf.axes = {{size, 1}};
    leaf.size = size;
    leaf.row = in_blocks ? row : size;
    leaf.tile = in_blocks ? block : adamfn::kTile;
    Group& group = made->calls.back();
    leaf.first_tile = group.tiles;
    group.tiles += size / leaf.row * ((leaf.row + leaf.tile - 1) / leaf.tile);
    group.leaves.push_back(std::move(leaf));
  }
  return made;
}

extern "C" void free_workload(Workload* workload) { delete workload; }

// Takes so many steps, and returns the seconds of all.
extern "C" double run_workload(Workload* workload, int64_t steps) {
  const auto began = std::chrono::steady_clock::now();
  for (int64_t step = 0; step < steps; ++step) {
    for (Group& group : workload->calls) {
      ++group.count;
      adamfn::RunTasks(group, adamfn::ADAMFN_VARIANT::StepTiles, workload->threads,
                       [&](auto work) { workload->pool->Schedule(work); });
    }
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}
