// Adaptive mixing on CPUs: threads, and the widest instructions there are.

#include "mixing.h"

#define INLINE static inline __attribute__((always_inline))
#define PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define UNROLL PRAGMA(clang loop unroll(full))
#define TARGET(set) \
  PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define UNROLL PRAGMA(GCC unroll 32)
#define TARGET(set) PRAGMA(GCC push_options) PRAGMA(GCC target(set))
#define END_TARGET PRAGMA(GCC pop_options)
#define SHUFFLE
#endif

#if defined(__x86_64__)
TARGET("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")
#define KERNELS avx512
#define LANES 16
#define TILE_ROWS 6
#define TILE_VECTORS 4
#include "kernels.h"
#undef KERNELS
#undef LANES
#undef TILE_ROWS
#undef TILE_VECTORS
END_TARGET

TARGET("avx2,fma")
#define KERNELS avx2
#define LANES 8
#define TILE_ROWS 6
#define TILE_VECTORS 2
#include "kernels.h"
#undef KERNELS
#undef LANES
#undef TILE_ROWS
#undef TILE_VECTORS
END_TARGET
#endif

// Any other CPU, with what the compiler takes for granted: SSE2 or NEON.
#define KERNELS baseline
#define LANES 4
#if defined(__aarch64__)
#define TILE_ROWS 6
#define TILE_VECTORS 4
#else
#define TILE_ROWS 4
#define TILE_VECTORS 2
#endif
#include "kernels.h"

namespace {

struct Kernels {
  const char* name;
  Run forward, backward;
};

// The last one runs anywhere.
const Kernels all[] = {
#if defined(__x86_64__)
    {"AVX-512", avx512::forward, avx512::backward},
    {"AVX2", avx2::forward, avx2::backward},
#endif
    {"baseline", baseline::forward, baseline::backward},
};

bool runs_here(int64_t set) {
#if defined(__x86_64__)
  if (set == 0)
    return __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma");
  if (set == 1)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return true;
}

void in_threads(Run run, const Mixing& mixing) {
  const int64_t threads = mixing.threads;
  if (threads == 1) {  // never touch OpenMP, which a fork leaves unusable
    run(mixing, 0, mixing.queries, 0);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t thread = 0; thread < threads; thread++)
    run(mixing, mixing.queries * thread / threads,
        mixing.queries * (thread + 1) / threads, thread);
}

}  // namespace

extern "C" {

int64_t lors_sets() { return sizeof(all) / sizeof(*all); }

const char* lors_set_name(int64_t set) { return all[set].name; }

int lors_set_runs(int64_t set) { return runs_here(set); }

int64_t lors_scratch_floats(const Mixing* mixing) {
  return Scratch(*mixing, nullptr).size;
}

void lors_forward(int64_t set, const Mixing* mixing) {
  in_threads(all[set].forward, *mixing);
}

void lors_backward(int64_t set, const Mixing* mixing) {
  in_threads(all[set].backward, *mixing);
}
}
