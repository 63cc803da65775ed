// Partial results: kept, merged, and made outputs of.
#pragma once

#include "decode_query.cuh"

struct State {
    int acc[NB][8][4];
    u32 weights[NB];  // sum of this lane's integer weights
    float total[NB];  // sum of this lane's exp2(score - top)
    float top[NB];    // reference of the scores of row i (log2)
    float limit[NB];  // reference of the weights: probability * V scale <= limit
    float factor[NB]; // 65534 / limit
    float spoilt[NB]; // NaN once a visible token's V is
};

__device__ __forceinline__ void clear(State& S) {
#pragma unroll
    for (int nb = 0; nb < NB; nb++) {
#pragma unroll
        for (int j = 0; j < 8; j++) S.acc[nb][j][0] = S.acc[nb][j][1] = S.acc[nb][j][2] = S.acc[nb][j][3] = 0;
        S.weights[nb] = 0, S.total[nb] = 0.f, S.top[nb] = NOTHING, S.limit[nb] = 0.f, S.factor[nb] = 0.f;
        S.spoilt[nb] = 0.f;
    }
}

__device__ __forceinline__ float row_sum(float x) { // over the eight lanes of a row
    x += __shfl_xor_sync(~0u, x, 4);
    x += __shfl_xor_sync(~0u, x, 8);
    return x + __shfl_xor_sync(~0u, x, 16);
}

// A partial result in memory: sixteen outputs of a lane for each block of rows, as quads [4 NB][32 lanes][4], then
// [NB][32 lanes] of the reference and the sum of the lane's row.
__device__ __forceinline__ void save(const State& S, float* to, int lane) {
#pragma unroll
    for (int nb = 0; nb < NB; nb++) {
        const float half = 0.5f * row_sum((float)S.weights[nb]), unit = S.limit[nb] * (V_STEP / 65534.f);
        const float spoilt = row_sum(S.spoilt[nb]);
        float4* o = (float4*)to + nb * 128 + lane;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float v[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int* acc = S.acc[nb][2 * j + (e >> 1)] + 2 * (e & 1);
                v[e] = fmaf((float)acc[0], 256.f, (float)acc[1] + half) * unit + spoilt;
            }
            o[32 * j] = make_float4(v[0], v[1], v[2], v[3]);
        }
        ((float2*)(to + NB * 512))[nb * 32 + lane] = make_float2(S.top[nb], row_sum(S.total[nb]));
    }
}

// Where a lane's coordinates lie in a row: of quad 0 to 3 of its outputs the first, which another follows, and how far from
// these the two of row g + 8 are.
__device__ __forceinline__ int coordinate_of(int g, int quad) {
    if (VTRELLIS) return 32 * (g >> 1) + 4 * (g & 1) + 16 * (quad >> 1) + 2 * (quad & 1);
    return (VBITS == 4 ? 8 : 16) * g + 2 * quad;
}
constexpr int ROW_DISTANCE = VBITS == 4 && !VTRELLIS ? 64 : 8;

// Partial results that are merged, in the order of the tokens: the first and the last lie anywhere, those between at equal
// distances.
struct Chain {
    const float *first, *last, *begin; // begin: where the first would lie if it were one of those between
    int distance, count;
};

// One quad of what was merged: a partial result again, or rows of 128 coordinates and then the references and sums of rows.
__device__ __forceinline__ void put(float4 o, float top, float total, float* to, bool rows, int quad, int lane) {
    const int at = quad * 32 + lane, state = (quad >> 2) * 32 + lane;
    if (rows) {
        const int g = lane >> 2, row = (quad & ~3) + (lane & 3);
        float* const at_row = to + row * D + coordinate_of(g, quad & 3);
        *(float2*)at_row = make_float2(o.x, o.z);
        *(float2*)(at_row + ROW_DISTANCE) = make_float2(o.y, o.w);
        if (lane < 4 && (quad & 3) == 0) ((float2*)(to + ROWS * D))[row] = make_float2(top, total);
    } else {
        ((float4*)to)[at] = o;
        if ((quad & 3) == 0) ((float2*)(to + NB * 512))[state] = make_float2(top, total);
    }
}

// Merge one quad of the results first, first + stride... of a chain. What other CTAs wrote comes past L1, which nobody keeps
// coherent. Four at a time, so that loads do not wait for each other. It is not inlined because instructions that were
// fetched once are at hand the next time.
__device__ __noinline__ void merge(const Chain chain, int first, int stride, float* to, bool rows, int quad, int lane) {
    const int at = quad * 32 + lane, state = (quad >> 2) * 32 + lane;
    float top = NOTHING, total = 0.f;
    float4 o = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
    for (int c = first; c < chain.count; c += 4 * stride) {
        float4 v[4];
        float2 s[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int n = c + k * stride < chain.count ? c + k * stride : c;
            const float* from = n == 0 ? chain.first : n == chain.count - 1 ? chain.last : chain.begin + (i64)n * chain.distance;
            v[k] = load_coherent((const float4*)from + at);
            s[k] = load_coherent((const float2*)(from + NB * 512) + state);
            if (k && n == c) s[k].x = -flt(0x7f800000u);
        }
        const float most = fmaxf(fmaxf(fmaxf(s[0].x, s[1].x), fmaxf(s[2].x, s[3].x)), top), fade = ex2(top - most);
        o.x *= fade, o.y *= fade, o.z *= fade, o.w *= fade, total *= fade, top = most;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (k && c + k * stride >= chain.count) break;
            const float weight = ex2(s[k].x - top);
            o.x = fmaf(weight, v[k].x, o.x), o.y = fmaf(weight, v[k].y, o.y);
            o.z = fmaf(weight, v[k].z, o.z), o.w = fmaf(weight, v[k].w, o.w);
            total = fmaf(weight, s[k].y, total);
        }
    }
    put(o, top, total, to, rows, quad, lane);
}

// Merge one quad of the partial results of `count` neighbouring warps, the first of them at `slices` in shared memory. It is
// shorter than merge(), as lanes work out the weights of all results together: it runs once, and then most of the time goes
// with fetching instructions.
__device__ __forceinline__ void merge_own(u32 slices, int count, float* to, bool rows, int quad, int lane) {
    static_assert(WARPS <= 16, "more results than there are lanes for a row of each");
    float2 s[2]; // of results lane / 4 and lane / 4 + 8: reference and sum of row lane % 4
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const int n = (lane >> 2) + 8 * k;
        const uint2 state = load_8(slices + min(n, count - 1) * SLICE + NB * 2048 + (quad >> 2) * 256 + (lane & 3) * 8);
        s[k] = n < count ? make_float2(flt(state.x), flt(state.y)) : make_float2(-flt(0x7f800000u), 0.f);
    }
    float top = fmaxf(fmaxf(s[0].x, s[1].x), NOTHING);
#pragma unroll
    for (int k = 4; k < 32; k <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, k));
    const float low = ex2(s[0].x - top), high = ex2(s[1].x - top); // weights
    const float total = row_sum(fmaf(high, s[1].y, low * s[0].y));
    float4 o = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
    for (int n = 0; n < count; n += 4) { // four loads do not wait for each other
        uint4 v[4];
#pragma unroll
        for (int k = 0; k < 4; k++) v[k] = load_16(slices + min(n + k, count - 1) * SLICE + (quad * 32 + lane) * 16);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float w = __shfl_sync(~0u, n < 8 ? low : high, 4 * ((n + k) & 7) + (lane & 3));
            if (n + k >= count) continue;
            o.x = fmaf(w, flt(v[k].x), o.x), o.y = fmaf(w, flt(v[k].y), o.y);
            o.z = fmaf(w, flt(v[k].z), o.z), o.w = fmaf(w, flt(v[k].w), o.w);
        }
    }
    put(o, top, total, to, rows, quad, lane);
}

// Normalise, un-rotate and write a row of an item.
__device__ __forceinline__ void finish(const Params& P, const float* from, int b, int hr, int r, int lane) {
    const int row = block_of(P, hr) * ROWS + r;
    if (row >= P.num_queries * P.group) return;
    const float4 v = ((const float4*)(from + r * D))[lane];
    const float2 state = ((const float2*)(from + ROWS * D))[r];
    const float top = state.x, total = state.y;
    const float norm = total == 0.f ? 0.f : __fdividef(0.08838834764831845f, total);
    const float4 turned = hadamard(make_float4(v.x * norm, v.y * norm, v.z * norm, v.w * norm), lane);
    const int t = token_of(P, row), head = head_of(P, hr) * P.group + row - t * P.group, query_heads = P.heads * P.group;
    const i64 at = (i64)((b * P.num_queries + t) * query_heads + head) * D + 4 * lane;
    const u32 flips = signs(lane >> 3) >> (4 * (lane & 7));
    const float y0 = flt(bits(turned.x) ^ (flips << 31)), y1 = flt(bits(turned.y) ^ (flips >> 1 << 31));
    const float y2 = flt(bits(turned.z) ^ (flips >> 2 << 31)), y3 = flt(bits(turned.w) ^ (flips >> 3 << 31));
#if QTYPE == 2
    *(float4*)((float*)P.out + at) = make_float4(y0, y1, y2, y3);
#else
    *(uint2*)((unsigned short*)P.out + at) = make_uint2(pack2(y0, y1), pack2(y2, y3));
#endif
    if (lane == 0)
        P.lse[(b * query_heads + head) * P.num_queries + t] =
            (total == 0.f ? -flt(0x7f800000u) : top + lg2(total)) * 0.6931471805599453f;
}

// The rows of a sequence that sees nothing: zeros, and minus infinity.
__device__ __forceinline__ void write_nothing(const Params& P, int b) {
    const int rows = P.heads * P.group * P.num_queries;
    for (int x = threadIdx.x; x < rows * D; x += THREADS)
#if QTYPE == 2
        ((float*)P.out)[(i64)b * rows * D + x] = 0.f;
#else
        ((unsigned short*)P.out)[(i64)b * rows * D + x] = 0;
#endif
    for (int x = threadIdx.x; x < rows; x += THREADS) P.lse[(i64)b * rows + x] = -flt(0x7f800000u);
}
