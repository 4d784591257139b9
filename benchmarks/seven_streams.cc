// SPDX-License-Identifier: Apache-2.0
// What a step of float32 Adam reads and writes, with next to no arithmetic: the machine's limit.

#include <cstdint>
#include <thread>
#include <vector>

namespace {

void Pass(const float* __restrict g, float* __restrict mu, float* __restrict nu,
          float* __restrict p, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    mu[i] += 0.1f * (g[i] - mu[i]);
    nu[i] += 0.1f * (g[i] - nu[i]);
    p[i] -= 0.1f * mu[i];
  }
}

}  // namespace

// Each thread goes over its part of the four buffers so many times.
extern "C" void seven_streams(const float* g, float* mu, float* nu, float* p, int64_t size,
                              int64_t times, int64_t threads) {
  std::vector<std::thread> running;
  for (int64_t k = 0; k < threads; ++k) {
    const int64_t begin = size * k / threads, end = size * (k + 1) / threads;
    running.emplace_back([=] {
      for (int64_t i = 0; i < times; ++i) {
        Pass(g + begin, mu + begin, nu + begin, p + begin, end - begin);
      }
    });
  }
  for (std::thread& thread : running) thread.join();
}
