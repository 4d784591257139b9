// SPDX-License-Identifier: Apache-2.0
// kernels.cc is compiled for several kinds of processors. This chooses among them.

#include <atomic>
#include <cstring>

#include "group.h"

namespace adamfn {

#if defined(__x86_64__)
namespace sse4 { Kernels StepTiles; }
namespace avx2 { Kernels StepTiles; }
namespace avx512 { Kernels StepTiles; }
#else
namespace portable { Kernels StepTiles; }
#endif

namespace {

struct Variant {
  const char* name;
  Kernels* kernels;
  bool runs_here;
};

// The variant of this name, or of any the fastest, if it runs here.
const Variant* Find(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  static const Variant variants[] = {{"avx512", avx512::StepTiles, avx512},
                                     {"avx2", avx2::StepTiles, avx2},
                                     {"sse4", sse4::StepTiles, true}};  // JAX needs more
#else
  static const Variant variants[] = {{"portable", portable::StepTiles, true}};
#endif
  for (const Variant& variant : variants) {
    if (variant.runs_here && (!name || !std::strcmp(name, variant.name))) return &variant;
  }
  return nullptr;
}

std::atomic<const Variant*> chosen{Find(nullptr)};

}  // namespace

Kernels* ChosenKernels() { return chosen.load()->kernels; }

// Measured: up to a quarter faster on Intel's processors, and up to a quarter slower on AMD's, whose
// hardware reads ahead by itself.
bool ReadsAhead() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace adamfn

// Chooses the variant of this name, if it runs here. Returns the name of the one chosen.
extern "C" [[gnu::visibility("default")]] const char* adamfn_variant(const char* name) {
  if (const auto* found = adamfn::Find(name)) adamfn::chosen = found;
  return adamfn::chosen.load()->name;
}
