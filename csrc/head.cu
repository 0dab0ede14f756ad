// The log-prob head on CUDA (sm_80, sm_90 and newer): the two functions of head.cpp, for tiles that cuBLAS made.
//
// The same C interface, with a stream in place of the number of threads; every function gives a cudaError_t. A row belongs
// to one block, and what a thread adds up and the order in which threads are put together depend on the number of columns
// alone: results are the same bits from run to run, and do not depend on what else is asked for.

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace {

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;

// As in head.cpp.
enum Part { MAXIMUM, EXPONENTIALS, TARGET, PRODUCTS, LOGITS, SQUARES, NUM_PARTS };
enum Wanted { WANT_MORE = 1, WANT_SQUARES = 2 };

__device__ inline float value(float x) { return x; }
__device__ inline float value(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void put(float* to, float x) { *to = x; }
__device__ inline void put(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

// 16 bytes, read and written at once.
template <typename Element>
struct alignas(16) Pack {
    static constexpr int SIZE = 16 / sizeof(Element);
    Element elements[SIZE];
};

// Columns before the first one that lies on 16 bytes.
template <typename Element>
__device__ inline int64_t unaligned_columns(const Element* row, int64_t columns) {
    const int64_t bytes = -reinterpret_cast<intptr_t>(row) & 15;
    const int64_t count = bytes / int64_t(sizeof(Element));
    return count < columns ? count : columns;
}

constexpr float LEAST = -INFINITY;

// What has been read of a row so far: the maximum, and sums shifted by it.
struct Sums {
    float maximum, exponentials, products, logits, squares;
};

__device__ inline Sums nothing() { return {LEAST, 0.f, 0.f, 0.f, 0.f}; }

// The sums as they are when shifted by a larger maximum. Of nothing they stay zeros, whatever the maximum.
__device__ inline void shift_to(Sums& sums, float maximum) {
    if (sums.maximum == LEAST) {
        sums.maximum = maximum;
        return;
    }
    const float shift = sums.maximum - maximum, scale = expf(shift);
    sums.products = __fmul_rn(scale, __fmaf_rn(sums.exponentials, shift, sums.products));
    sums.exponentials = __fmul_rn(sums.exponentials, scale);
    sums.squares = __fmul_rn(sums.squares, __fmul_rn(scale, scale));
    sums.maximum = maximum;
}

// A not-a-number must not be lost in the maximum's comparison: it enters the sums.
template <int COUNT>
__device__ inline void add(Sums& sums, const float (&x)[COUNT]) {
    float maximum = sums.maximum;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) maximum = x[i] > maximum ? x[i] : maximum;
    if (maximum > sums.maximum) shift_to(sums, maximum);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const float shifted = __fsub_rn(x[i], maximum), e = expf(shifted);
        sums.exponentials = __fadd_rn(sums.exponentials, e);
        sums.products = __fmaf_rn(e, shifted, sums.products);
        sums.logits = __fadd_rn(sums.logits, x[i]);
        sums.squares = __fmaf_rn(e, e, sums.squares);
    }
}

__device__ inline Sums together(Sums a, Sums b) {
    const float maximum = b.maximum > a.maximum ? b.maximum : a.maximum;
    if (maximum == LEAST && a.exponentials == 0.f && b.exponentials == 0.f) return a;
    shift_to(a, maximum);
    shift_to(b, maximum);
    return {maximum, __fadd_rn(a.exponentials, b.exponentials), __fadd_rn(a.products, b.products),
            __fadd_rn(a.logits, b.logits), __fadd_rn(a.squares, b.squares)};
}

__device__ inline Sums from_lane(const Sums& sums, int lanes_away) {
    const unsigned all = 0xffffffffu;
    return {__shfl_down_sync(all, sums.maximum, lanes_away), __shfl_down_sync(all, sums.exponentials, lanes_away),
            __shfl_down_sync(all, sums.products, lanes_away), __shfl_down_sync(all, sums.logits, lanes_away),
            __shfl_down_sync(all, sums.squares, lanes_away)};
}

template <typename Element>
__global__ void __launch_bounds__(THREADS)
    parts_kernel(const Element* logits, int64_t columns, int64_t stride, const int64_t* targets, int wanted, float* parts) {
    const Element* row = logits + blockIdx.x * stride;
    Sums sums = nothing();
    const int64_t head = unaligned_columns(row, columns);
    const int64_t num_packs = (columns - head) / Pack<Element>::SIZE;
    const int64_t tail = head + num_packs * Pack<Element>::SIZE;
    const Pack<Element>* packs = reinterpret_cast<const Pack<Element>*>(row + head);
    for (int64_t number = threadIdx.x; number < num_packs; number += THREADS) {
        const Pack<Element> pack = packs[number];
        float x[Pack<Element>::SIZE];
#pragma unroll
        for (int i = 0; i < Pack<Element>::SIZE; ++i) x[i] = value(pack.elements[i]);
        add(sums, x);
    }
    // Fewer than THREADS columns are left on either side.
    if (threadIdx.x < head) {
        const float x[1] = {value(row[threadIdx.x])};
        add(sums, x);
    }
    if (threadIdx.x < columns - tail) {
        const float x[1] = {value(row[tail + threadIdx.x])};
        add(sums, x);
    }
    for (int away = 16; away > 0; away /= 2) sums = together(sums, from_lane(sums, away));
    __shared__ Sums of_warps[WARPS];
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sums;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    sums = threadIdx.x < WARPS ? of_warps[threadIdx.x] : nothing();
    for (int away = 16; away > 0; away /= 2) sums = together(sums, from_lane(sums, away));
    if (threadIdx.x > 0) return;
    const int64_t target = targets[blockIdx.x];
    float* to = parts + int64_t(blockIdx.x) * NUM_PARTS;
    to[MAXIMUM] = sums.maximum;
    to[EXPONENTIALS] = sums.exponentials;
    to[TARGET] = target >= 0 && target < columns ? value(row[target]) : LEAST;
    to[PRODUCTS] = wanted & WANT_MORE ? sums.products : 0.f;
    to[LOGITS] = wanted & WANT_MORE ? sums.logits : 0.f;
    to[SQUARES] = wanted & WANT_SQUARES ? sums.squares : 0.f;
}

template <typename Element>
__global__ void __launch_bounds__(THREADS)
    gradient_kernel(Element* logits, int64_t columns, int64_t stride, const int64_t* targets, const float* log_normalisers,
                    const float* gradients) {
    Element* row = logits + blockIdx.x * stride;
    const int64_t target = targets[blockIdx.x];
    const float log_normaliser = log_normalisers[blockIdx.x], gradient = gradients[blockIdx.x];
    const int64_t head = unaligned_columns(row, columns);
    const int64_t num_packs = (columns - head) / Pack<Element>::SIZE;
    const int64_t tail = head + num_packs * Pack<Element>::SIZE;
    Pack<Element>* packs = reinterpret_cast<Pack<Element>*>(row + head);
    const auto of_column = [=](float x, int64_t column) {
        const float scaled = __fmul_rn(expf(__fsub_rn(x, log_normaliser)), -gradient);
        return column == target ? __fadd_rn(scaled, gradient) : scaled;
    };
    for (int64_t number = threadIdx.x; number < num_packs; number += THREADS) {
        Pack<Element> pack = packs[number];
        const int64_t first = head + number * Pack<Element>::SIZE;
#pragma unroll
        for (int i = 0; i < Pack<Element>::SIZE; ++i) put(&pack.elements[i], of_column(value(pack.elements[i]), first + i));
        packs[number] = pack;
    }
    if (threadIdx.x < head) put(row + threadIdx.x, of_column(value(row[threadIdx.x]), threadIdx.x));
    if (threadIdx.x < columns - tail) {
        const int64_t column = tail + threadIdx.x;
        put(row + column, of_column(value(row[column]), column));
    }
}

}  // namespace

#ifndef MEGADPO_SOURCE_KEY
#define MEGADPO_SOURCE_KEY ""
#endif

extern "C" {

const char* megadpo_source_key() { return MEGADPO_SOURCE_KEY; }

const char* megadpo_head_instructions() { return "CUDA"; }

// See head.cpp. With no rows nothing is launched; what the device says is given all the same.
int megadpo_head_parts(const void* logits, int is_bf16, int64_t rows, int64_t columns, int64_t stride,
                       const int64_t* targets, int wanted, float* parts, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    if (rows == 0) {
        cudaFuncAttributes unused;  // fails where the library has no code for this device
        return cudaFuncGetAttributes(&unused, parts_kernel<float>);
    }
    if (is_bf16)
        parts_kernel<<<unsigned(rows), THREADS, 0, on>>>(static_cast<const __nv_bfloat16*>(logits), columns, stride, targets,
                                                         wanted, parts);
    else
        parts_kernel<<<unsigned(rows), THREADS, 0, on>>>(static_cast<const float*>(logits), columns, stride, targets, wanted,
                                                         parts);
    return cudaGetLastError();
}

int megadpo_head_gradient(void* logits, int is_bf16, int64_t rows, int64_t columns, int64_t stride, const int64_t* targets,
                          const float* log_normalisers, const float* gradients, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    if (rows == 0) return cudaSuccess;
    if (is_bf16)
        gradient_kernel<<<unsigned(rows), THREADS, 0, on>>>(static_cast<__nv_bfloat16*>(logits), columns, stride, targets,
                                                            log_normalisers, gradients);
    else
        gradient_kernel<<<unsigned(rows), THREADS, 0, on>>>(static_cast<float*>(logits), columns, stride, targets,
                                                            log_normalisers, gradients);
    return cudaGetLastError();
}

}  // extern "C"
