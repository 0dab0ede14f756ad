// The log-prob head on a CPU: what one pass over a tile of logits gives, and the tile's gradient in its own memory.
//
// A plain C interface without torch's headers, so that a C++17 compiler is all it takes (GCC or Clang: vector extensions).
// Rows are shared out to threads; the best instruction set of the processor is chosen when the library runs. Megadpo's
// plain torch twin of both functions, and what the numbers mean, is megadpo/model/heads/kernels.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr int64_t BLOCK = 2048;  // columns read twice (maximum, then sums): 8 KiB, a quarter of a small L1

struct Bf16 {
    uint16_t bits;
};

// Of a row, in this order; sums are of exp(x - maximum), that times (x - maximum), x, and exp squared.
enum Part { MAXIMUM, EXPONENTIALS, TARGET, PRODUCTS, LOGITS, SQUARES_, NUM_PARTS };
enum Wanted { WANT_MORE = 1, WANT_SQUARES = 2 };  // PRODUCTS and LOGITS; with them also SQUARES_

#define INLINE static inline __attribute__((always_inline))

#define ON
#define WIDTH 4
namespace portable {
#include "head_rows.inc"
}
#undef ON
#undef WIDTH

#if defined(__x86_64__)
#define ON __attribute__((target("avx2,fma")))
#define WIDTH 8
namespace avx2 {
#include "head_rows.inc"
}
#undef ON
#undef WIDTH
#define ON __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define WIDTH 16
namespace avx512 {
#include "head_rows.inc"
}
#undef ON
#undef WIDTH
#endif

const char* const NAMES[] = {"portable", "AVX2", "AVX-512"};

int best_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return has_avx2 ? (has_avx512 ? 2 : 1) : 0;
#else
    return 0;
#endif
}

int level = best_level();

template <typename Element>
void parts_of(const void* logits, int64_t columns, int64_t stride, int64_t first, int64_t end, const int64_t* targets,
              int wanted, float* parts) {
    const Element* values = static_cast<const Element*>(logits);
#if defined(__x86_64__)
    if (level == 2) return avx512::tile_parts(values, columns, stride, first, end, targets, wanted, parts);
    if (level == 1) return avx2::tile_parts(values, columns, stride, first, end, targets, wanted, parts);
#endif
    portable::tile_parts(values, columns, stride, first, end, targets, wanted, parts);
}

template <typename Element>
void gradient_of(void* logits, int64_t columns, int64_t stride, int64_t first, int64_t end, const int64_t* targets,
                 const float* log_normalisers, const float* gradients) {
    Element* values = static_cast<Element*>(logits);
#if defined(__x86_64__)
    if (level == 2)
        return avx512::tile_gradient(values, columns, stride, first, end, targets, log_normalisers, gradients);
    if (level == 1)
        return avx2::tile_gradient(values, columns, stride, first, end, targets, log_normalisers, gradients);
#endif
    portable::tile_gradient(values, columns, stride, first, end, targets, log_normalisers, gradients);
}

// Calls work(first, end) for every row once. Threads are started anew: a tile takes milliseconds, a thread microseconds,
// and a second OpenMP runtime beside torch's would fight it for the cores.
template <typename Work>
void share_out(int64_t rows, int64_t columns, int num_threads, Work work) {
    const int64_t worth_a_thread = 1 << 16;
    const int64_t wanted = std::min<int64_t>(num_threads, std::max<int64_t>(1, rows * columns / worth_a_thread));
    const int64_t shares = std::max<int64_t>(1, std::min(wanted, rows));
    std::vector<std::thread> threads;
    int64_t started = 1;
    try {
        for (; started < shares; ++started)
            threads.emplace_back(work, rows * started / shares, rows * (started + 1) / shares);
    } catch (const std::system_error&) {  // no more threads to be had: the rest is done here
        work(rows * started / shares, rows);
    }
    work(0, rows / shares);
    for (std::thread& thread : threads) thread.join();
}

}  // namespace

#ifndef MEGADPO_SOURCE_KEY
#define MEGADPO_SOURCE_KEY ""
#endif

extern "C" {

// What this library was made from, so that an old one is not taken for a new one.
const char* megadpo_source_key() { return MEGADPO_SOURCE_KEY; }

// The instruction set in use.
const char* megadpo_head_instructions() { return NAMES[level]; }

// Use the instruction set with this number (0 portable, 1, 2); 0 where the processor does not have it, else 1.
int megadpo_head_use(int wanted_level) {
    if (wanted_level < 0 || wanted_level > best_level()) return 0;
    level = wanted_level;
    return 1;
}

// logits: [rows, columns] of float32 or bfloat16, `stride` elements from row to row. targets: [rows], the column of each
// row's target, outside [0, columns) where it is on another rank. wanted: a sum of Wanted. parts: [rows, NUM_PARTS].
// Like the other functions of tiles, gives 0: there is nothing that can go wrong (on CUDA there is).
int megadpo_head_parts(const void* logits, int is_bf16, int64_t rows, int64_t columns, int64_t stride,
                        const int64_t* targets, int wanted, float* parts, int num_threads) {
    share_out(rows, columns, num_threads, [=](int64_t first, int64_t end) {
        if (is_bf16)
            parts_of<Bf16>(logits, columns, stride, first, end, targets, wanted, parts);
        else
            parts_of<float>(logits, columns, stride, first, end, targets, wanted, parts);
    });
    return 0;
}

// logits, in place, become (onehot(target) - exp(logits - log_normaliser)) * gradient.
int megadpo_head_gradient(void* logits, int is_bf16, int64_t rows, int64_t columns, int64_t stride,
                           const int64_t* targets, const float* log_normalisers, const float* gradients,
                           int num_threads) {
    share_out(rows, columns, num_threads, [=](int64_t first, int64_t end) {
        if (is_bf16)
            gradient_of<Bf16>(logits, columns, stride, first, end, targets, log_normalisers, gradients);
        else
            gradient_of<float>(logits, columns, stride, first, end, targets, log_normalisers, gradients);
    });
    return 0;
}

}  // extern "C"
