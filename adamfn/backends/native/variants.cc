// kernels.cc is compiled for several kinds of processors. This chooses among them.

#include <atomic>
#include <cstring>

#include "group.h"

namespace adamfn {

#define ADAMFN_DECLARE(variant)                       \
  namespace variant {                                 \
  void StepTiles(const Group&, int64_t, int64_t);     \
  }
#if defined(__x86_64__)
ADAMFN_DECLARE(sse4)
ADAMFN_DECLARE(avx2)
ADAMFN_DECLARE(avx512)
#else
ADAMFN_DECLARE(portable)
#endif

namespace {

struct Variant {
  const char* name;
  StepTiles step;
  bool runs_here;
};

// The first that runs here, or the one of this name.
const Variant* Find(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  // JAX itself needs more than SSE 4.
  static const Variant variants[] = {{"avx512", avx512::StepTiles, avx512},
                                     {"avx2", avx2::StepTiles, avx2},
                                     {"sse4", sse4::StepTiles, true}};
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

StepTiles ChosenStepTiles() { return chosen.load()->step; }

}  // namespace adamfn

// Chooses the variant of this name if there is one that runs here. Returns the name of the chosen.
extern "C" [[gnu::visibility("default")]] const char* adamfn_variant(const char* name) {
  if (const auto* found = adamfn::Find(name)) adamfn::chosen = found;
  return adamfn::chosen.load()->name;
}
