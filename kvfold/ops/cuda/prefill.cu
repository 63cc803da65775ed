// What prefill attention needs around a library's dense attention: rotating q, and joining partial results.
//
// Defines: QTYPE (of q and the output: 0 bf16, 1 f16), SIGN0 to SIGN3 (signs of the rotation, bit 1 = negative); PARTS and
// ROTATED (partial results, and how many of them, the first, are in the basis of the pages).
//
// De-quantised windows are float16, which has eight times bfloat16's precision but not its range. So K is divided by a
// power of two below the largest K scale of the sequence, and V likewise (expand.cu, `peaks`); q is multiplied by K's
// power, and the result by V's. A warp has a vector, four coordinates a lane.

#include "common.cuh"

struct Part {
    const void* out; // [rows, heads, 128], strides in elements
    const float* lse;
    i64 out_row, out_head, lse_row, lse_head;
};

struct Merge {
    Part parts[PARTS];
    void* out; // [rows, heads, 128] contiguous
    float* lse;
    const float* peaks; // largest scales of K and V
    i64 lse_row, lse_head;
    int rows, heads;
};

struct Rotate {
    const void* q; // [rows, heads, 128], strides in elements
    void* out;     // float16 [heads, rows, 128] contiguous
    const float* peaks;
    i64 q_row, q_head;
    int rows, heads;
};

__device__ __forceinline__ u32 flips(int lane) {
    const int quarter = lane >> 3;
    return (quarter == 0 ? SIGN0 : quarter == 1 ? SIGN1 : quarter == 2 ? SIGN2 : SIGN3) >> (4 * (lane & 7));
}

// The Hadamard transform of a vector, times 1 / sqrt(128).
__device__ __forceinline__ void hadamard(float (&o)[4], int lane) {
    const float a = o[0] + o[1], b = o[0] - o[1], c = o[2] + o[3], d = o[2] - o[3];
    o[0] = a + c, o[1] = b + d, o[2] = a - c, o[3] = b - d;
#pragma unroll
    for (int k = 1; k < 32; k <<= 1) {
        const float own = lane & k ? -1.f : 1.f;
#pragma unroll
        for (int e = 0; e < 4; e++) o[e] = fmaf(own, o[e], __shfl_xor_sync(ALL_LANES, o[e], k));
    }
#pragma unroll
    for (int e = 0; e < 4; e++) o[e] *= 0.08838834764831845f;
}

template <bool HALF>
__device__ __forceinline__ void load4(const void* p, i64 at, float (&x)[4]) {
    const uint2 v = *(const uint2*)((const u16*)p + at);
    if (HALF) {
        x[0] = half_to_float(v.x & 0xffffu), x[1] = half_to_float(v.x >> 16);
        x[2] = half_to_float(v.y & 0xffffu), x[3] = half_to_float(v.y >> 16);
    } else {
        x[0] = __uint_as_float(v.x << 16), x[1] = __uint_as_float(v.x & 0xffff0000u);
        x[2] = __uint_as_float(v.y << 16), x[3] = __uint_as_float(v.y & 0xffff0000u);
    }
}

template <bool HALF>
__device__ __forceinline__ void store4(void* p, i64 at, const float (&x)[4]) {
    *(uint2*)((u16*)p + at) = HALF ? make_uint2(pack_f16(x[0], x[1]), pack_f16(x[2], x[3]))
                                   : make_uint2(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]));
}

extern "C" __global__ void __launch_bounds__(256) rotate(const __grid_constant__ Rotate P) {
    const int item = blockIdx.x * 8 + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (item >= P.rows * P.heads) return;
    const int row = item / P.heads, head = item - row * P.heads;
    float x[4];
    load4<QTYPE == 1>(P.q, row * P.q_row + head * P.q_head + 4 * lane, x);
    const u32 negative = flips(lane);
#pragma unroll
    for (int e = 0; e < 4; e++) x[e] = negative >> e & 1 ? -x[e] : x[e];
    hadamard(x, lane);
    const float factor = power_below(P.peaks[0]) * 0.015625f; // room for large scores; the softmax scale has it back
#pragma unroll
    for (int e = 0; e < 4; e++) {
        x[e] *= factor;
        if (fabsf(x[e]) > 65504.f && fabsf(x[e]) < __uint_as_float(0x7f800000u)) x[e] = x[e] > 0.f ? 65504.f : -65504.f;
    }
    store4<true>(P.out, ((i64)head * P.rows + row) * 128 + 4 * lane, x);
}

extern "C" __global__ void __launch_bounds__(256) merge(const __grid_constant__ Merge P) {
    const int item = blockIdx.x * 8 + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (item >= P.rows * P.heads) return;
    const int row = item / P.heads, head = item - row * P.heads;
    const float nothing = -__uint_as_float(0x7f800000u);
    float lse[PARTS], top = nothing;
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        lse[i] = P.parts[i].lse[row * P.parts[i].lse_row + head * P.parts[i].lse_head];
        top = fmaxf(top, lse[i]); // passes over NaN, which is found again in the sum below
    }
    const float base = top == nothing ? 0.f : top;
    float total = 0.f, o[4] = {0.f, 0.f, 0.f, 0.f};
    auto model_basis = [&]() { // of what is summed so far
        hadamard(o, lane);
        const float power = power_below(P.peaks[1]);
        const u32 negative = flips(lane);
#pragma unroll
        for (int e = 0; e < 4; e++) o[e] *= negative >> e & 1 ? -power : power;
    };
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        if (ROTATED && i == ROTATED) model_basis();
        const float weight = expf(lse[i] - base);
        total += weight;
        if (weight == 0.f) continue; // what nobody sees may be anything
        float x[4];
        const i64 at = row * P.parts[i].out_row + head * P.parts[i].out_head + 4 * lane;
        if (i < ROTATED) load4<true>(P.parts[i].out, at, x);
        else load4<QTYPE == 1>(P.parts[i].out, at, x);
#pragma unroll
        for (int e = 0; e < 4; e++) o[e] = fmaf(weight, x[e], o[e]);
    }
    if (ROTATED == PARTS) model_basis();
    const float norm = total == 0.f ? 0.f : 1.f / total;
#pragma unroll
    for (int e = 0; e < 4; e++) o[e] *= norm;
    store4<QTYPE == 1>(P.out, (i64)item * 128 + 4 * lane, o);
    if (lane == 0) P.lse[row * P.lse_row + head * P.lse_head] = base + logf(total);
}
