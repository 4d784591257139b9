// The tiles of a group as tasks that threads share.

#ifndef ADAMFN_TASKS_H_
#define ADAMFN_TASKS_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <utility>

#include "group.h"

namespace adamfn {

inline constexpr int64_t kTilesPerTask = 64;  // that a thread takes at a time

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

}  // namespace adamfn

#endif  // ADAMFN_TASKS_H_
