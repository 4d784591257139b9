// SPDX-License-Identifier: Apache-2.0
// The tiles of a group as tasks that threads share.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>

#include "group.h"

namespace adamfn {

// Tiles whose step takes about as long as a thread takes to begin.
inline constexpr int64_t kTilesPerThread = 256;

// The least and the most tiles of a task.
inline constexpr int64_t kLeastTiles = 64, kMostTiles = 512;

// Tasks that the calling thread and those of XLA's pool take one after another. The calling thread
// can finish them alone, so a pool that is busy, or gone after a fork, stops nothing; a pool thread
// that comes late finds none left, and touches nothing but this.
class Tasks {
 public:
  Tasks(Group group, Kernels* kernels, int64_t threads)
      : group_(std::move(group)),
        kernels_(kernels),
        // Many, for memory is read faster in long runs, but so few that the threads end together.
        tiles_(std::clamp(group_.tiles / (16 * threads), kLeastTiles, kMostTiles)),
        count_((group_.tiles + tiles_ - 1) / tiles_) {}

  void Work() {
    for (int64_t task; (task = next_.fetch_add(1)) < count_;) {
      kernels_(group_, task * tiles_, std::min((task + 1) * tiles_, group_.tiles));
      if (done_.fetch_add(1) + 1 == count_) {
        const std::lock_guard<std::mutex> lock(mutex_);
        all_done_.notify_all();
      }
    }
  }

  void Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [this] { return done_.load() == count_; });
  }

 private:
  const Group group_;
  Kernels* const kernels_;
  const int64_t tiles_, count_;
  std::atomic<int64_t> next_{0}, done_{0};
  std::mutex mutex_;
  std::condition_variable all_done_;
};

// Steps a group in this thread and in others of a pool, and returns when all is done.
template <typename Schedule>
void RunTasks(Group group, Kernels* kernels, int64_t available, const Schedule& schedule) {
  if (group.tiles == 0) return;
  const int64_t threads = std::clamp<int64_t>(group.tiles / kTilesPerThread, 1,
                                              std::max<int64_t>(available, 1));
  const auto tasks = std::make_shared<Tasks>(std::move(group), kernels, threads);
  for (int64_t i = 1; i < threads; ++i) schedule([tasks] { tasks->Work(); });
  tasks->Work();
  tasks->Wait();
}

}  // namespace adamfn
