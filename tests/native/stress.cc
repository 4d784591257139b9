// SPDX-License-Identifier: Apache-2.0
// Steps on many threads, for ThreadSanitizer: they must give the bytes that one thread gives.

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

struct Workload;
extern "C" Workload* new_workload(int32_t, int32_t, int64_t, int64_t, const int64_t (*)[4],
                                  void* const (*)[8]);
extern "C" void free_workload(Workload*);
extern "C" double run_workload(Workload*, int64_t);

namespace {

// Some large and many small leaves in three calls: call, elements, last axis, block.
std::vector<std::array<int64_t, 4>> Leaves() {
  std::vector<std::array<int64_t, 4>> leaves{{0, 300000, 1000, 256}, {1, 70001, 70001, 256}};
  for (int64_t k = 0; k < 40; ++k) leaves.push_back({2, 4096 + 16 * k, 4096 + 16 * k, 128});
  return leaves;
}

// What all arrays hold after some steps.
std::vector<unsigned char> After(int32_t format, int32_t bits, int64_t threads) {
  const auto leaves = Leaves();
  std::vector<std::vector<float>> kept;
  std::vector<std::array<void*, 8>> arrays;
  for (const auto& leaf : leaves) {
    auto& own = arrays.emplace_back();
    for (size_t i = 0; i < own.size(); ++i) {
      kept.emplace_back(leaf[1], i == 0 ? 0.01f : 0.0f);
      own[i] = kept.back().data();
    }
  }
  Workload* workload = new_workload(format, bits, threads, static_cast<int64_t>(leaves.size()),
                                    reinterpret_cast<const int64_t(*)[4]>(leaves.data()),
                                    reinterpret_cast<void* const(*)[8]>(arrays.data()));
  run_workload(workload, 5);
  free_workload(workload);
  std::vector<unsigned char> bytes;
  for (const auto& array : kept) {
    const auto* first = reinterpret_cast<const unsigned char*>(array.data());
    bytes.insert(bytes.end(), first, first + 4 * array.size());
  }
  return bytes;
}

}  // namespace

int main() {
  const int32_t cases[][2] = {{0, 0}, {1, 24}, {3, 0}};  // a format, bits of a weight
  for (const auto& [format, bits] : cases) {
    if (After(format, bits, 1) != After(format, bits, 6)) {
      std::printf("format %d with weights of %d bits depends on threads\n", format, bits);
      return 1;
    }
  }
  std::puts("sound");
}
