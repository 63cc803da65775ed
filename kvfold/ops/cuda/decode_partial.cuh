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

// A row of a partial result: a lane has four outputs, x and z of row lane / 4 of the products, y and w of the eighth one after it
// (coordinate_of).
struct Row {
    float4 v;
    float top, total; // reference and sum
};

// Where x and z lie in the output's row, and how far from these y and w are. The bits of lane and component are those of the
// coordinate in another order.
__device__ __forceinline__ int coordinate_of(int lane) {
    const int g = lane >> 2, quad = lane & 3;
    if (VTRELLIS) return 32 * (g >> 1) + 4 * (g & 1) + 16 * (quad >> 1) + 2 * (quad & 1);
    return (VBITS == 4 ? 8 : 16) * g + 2 * quad;
}
constexpr int COORDINATE_DISTANCE = VBITS == 4 && !VTRELLIS ? 64 : 8;

// A partial result in memory: rows of ROW_FLOATS, four outputs for each of 32 lanes, then the reference and the sum.
__device__ __forceinline__ void save(const State& S, float* to, int lane) {
#pragma unroll
    for (int nb = 0; nb < NB; nb++) {
        const float half = 0.5f * row_sum((float)S.weights[nb]), unit = S.limit[nb] * (V_STEP / 65534.f);
        const float spoilt = row_sum(S.spoilt[nb]), total = row_sum(S.total[nb]);
        float* const row = to + (4 * nb + (lane & 3)) * ROW_FLOATS;
        float4* o = (float4*)row + (lane & ~3);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float v[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int* acc = S.acc[nb][2 * j + (e >> 1)] + 2 * (e & 1);
                v[e] = fmaf((float)acc[0], 256.f, (float)acc[1] + half) * unit + spoilt;
            }
            o[j] = make_float4(v[0], v[1], v[2], v[3]);
        }
        if (lane < 4) *(float2*)(row + D) = make_float2(S.top[nb], total);
    }
}

__device__ __forceinline__ Row load_row(const float* from, int row, int lane) {
    const float* const its = from + row * ROW_FLOATS;
    const float2 state = *(const float2*)(its + D);
    return {((const float4*)its)[lane], state.x, state.y};
}

__device__ __forceinline__ void save_row(const Row& x, float* to, int row, int lane) {
    float* const its = to + row * ROW_FLOATS;
    ((float4*)its)[lane] = x.v;
    if (lane == 0) *(float2*)(its + D) = make_float2(x.top, x.total);
}

// Partial results that are merged, in the order of the tokens: the first and the last lie anywhere, those between at equal
// distances.
struct Chain {
    const float *first, *last, *begin; // begin: where the first would lie if it were one of those between
    int distance, count;
};

// Merge a row of the results first, first + stride... of a chain. What other CTAs wrote comes past L1, which nobody keeps
// coherent. Four at a time, so that loads do not wait for each other. It is not inlined because instructions that were
// fetched once are at hand the next time.
__device__ __noinline__ Row merge(const Chain chain, int first, int stride, int row, int lane) {
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
            from += row * ROW_FLOATS;
            v[k] = load_coherent((const float4*)from + lane);
            s[k] = load_coherent((const float2*)(from + D));
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
    return {o, top, total};
}

// Merge a row of `count` partial results in shared memory, SLICE bytes apart. It is shorter than merge(), as a lane works out the
// weight of a result for all: it runs once, and then most of the time goes with fetching instructions.
__device__ __forceinline__ Row merge_own(u32 slices, int count, int row, int lane) {
    static_assert(WARPS <= 16, "more results than half of a warp's lanes");
    const int mine = lane & 15; // of the results
    const u32 rows = slices + row * (ROW_FLOATS * 4);
    float2 s = make_float2(-flt(0x7f800000u), 0.f);
    if (mine < count) {
        const uint2 state = load_8(rows + mine * SLICE + D * 4);
        s = make_float2(flt(state.x), flt(state.y));
    }
    float top = fmaxf(s.x, NOTHING);
#pragma unroll
    for (int k = 1; k < 16; k <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, k));
    const float weight = ex2(s.x - top);
    float total = __fmul_rn(weight, s.y); // with the additions in one instruction, lanes would differ in the last bit
#pragma unroll
    for (int k = 1; k < 16; k <<= 1) total += __shfl_xor_sync(~0u, total, k);
    float4 o = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
    for (int n = 0; n < count; n += 4) { // four loads do not wait for each other
        uint4 v[4];
#pragma unroll
        for (int k = 0; k < 4; k++) v[k] = load_16(rows + min(n + k, count - 1) * SLICE + lane * 16);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float w = __shfl_sync(~0u, weight, n + k);
            if (n + k >= count) continue;
            o.x = fmaf(w, flt(v[k].x), o.x), o.y = fmaf(w, flt(v[k].y), o.y);
            o.z = fmaf(w, flt(v[k].z), o.z), o.w = fmaf(w, flt(v[k].w), o.w);
        }
    }
    return {o, top, total};
}

// Normalise, un-rotate and write a row of an item. The transform does not mind that the bits of coordinates are in another
// order: what it makes of a lane's four are the same coordinates of the output.
__device__ __forceinline__ void finish(const Params& P, const Row& x, int b, int hr, int r, int lane) {
    const int row = block_of(P, hr) * ROWS + r;
    if (row >= P.num_queries * P.group) return;
    const float norm = x.total == 0.f ? 0.f : __fdividef(0.08838834764831845f, x.total);
    const float4 turned = hadamard(make_float4(x.v.x * norm, x.v.y * norm, x.v.z * norm, x.v.w * norm), lane);
    const int t = token_of(P, row), head = head_of(P, hr) * P.group + row - t * P.group, query_heads = P.heads * P.group;
    const int c = coordinate_of(lane), d = c + COORDINATE_DISTANCE;
    const i64 at = (i64)((b * P.num_queries + t) * query_heads + head) * D;
    const u32 flips = signs(c >> 5) >> (c & 31), others = signs(d >> 5) >> (d & 31);
    const float y0 = flt(bits(turned.x) ^ (flips << 31)), y1 = flt(bits(turned.z) ^ (flips >> 1 << 31));
    const float y2 = flt(bits(turned.y) ^ (others << 31)), y3 = flt(bits(turned.w) ^ (others >> 1 << 31));
#if QTYPE == 2
    *(float2*)((float*)P.out + at + c) = make_float2(y0, y1);
    *(float2*)((float*)P.out + at + d) = make_float2(y2, y3);
#else
    *(u32*)((unsigned short*)P.out + at + c) = pack2(y0, y1);
    *(u32*)((unsigned short*)P.out + at + d) = pack2(y2, y3);
#endif
    if (lane == 0)
        P.lse[(b * query_heads + head) * P.num_queries + t] =
            (x.total == 0.f ? -flt(0x7f800000u) : x.top + lg2(x.total)) * 0.6931471805599453f;
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
