// Queries: rotated, in fixed point, as the product's B operand.
#pragma once

#include "decode_work.cuh"
#include "rotation.cuh"

// Two neighbouring values as a word of the output's dtype.
__device__ __forceinline__ u32 pack2(float low, float high) {
    return QTYPE == 0 ? pack_bf16(low, high) : pack_f16(low, high);
}

// Whether scores begin as a float's bits, 12582912 = 0x4b400000: the integers that are added, below 2^22, are its last bits.
#define FLOATS (KTRELLIS && NB == 1)

struct Query {
    // rotated q in 16-bit fixed point, column 2 r its high bytes, 2 r + 1 its low bytes; with key references in the order in
    // which words of these lie side by side (reference_scores)
    u32 b[NB][8];
    int zero[NB][4];  // FLOATS: what sums of high, low, high, low bytes begin with, half_sum included
    int half_sum[NB]; // what the levels' halves add: sum of the row's fixed-point q / 2
    float unit[NB];   // value of one unit of the integer scores, in log2
    int from[NB], to[NB]; // visible positions of the row of this lane's columns
    int inner_from, inner_to; // positions that every row sees
};

#if QTYPE == 2
typedef float4 Four; // neighbouring coordinates of a query
#else
typedef uint2 Four;
#endif

__device__ __forceinline__ void unpack(const Four& v, float (&x)[4]) {
#if QTYPE == 2
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
#elif QTYPE == 0
    x[0] = flt(v.x << 16), x[1] = flt(v.x & 0xffff0000u), x[2] = flt(v.y << 16), x[3] = flt(v.y & 0xffff0000u);
#else
    x[0] = half_to_float(v.x & 0xffffu), x[1] = half_to_float(v.x >> 16);
    x[2] = half_to_float(v.y & 0xffffu), x[3] = half_to_float(v.y >> 16);
#endif
}

__device__ __forceinline__ u32 bits_of(const Four& v) {
#if QTYPE == 2
    return bits(v.x) | bits(v.y) | bits(v.z) | bits(v.w);
#else
    return v.x | v.y;
#endif
}

// Four neighbouring coordinates of rows of an item (those with number `rank` modulo `ranks`), as they are; of others zeros.
__device__ __forceinline__ void load_rows(const Params& P, Four (&raw)[ROWS], int hr, int b, int rank, int ranks, int lane) {
    constexpr int SIZE = QTYPE == 2 ? 4 : 2;
    const int last = P.num_queries * P.group - 1, first = block_of(P, hr) * ROWS;
    const u8* const from = (const u8*)P.q + (b * P.q_stride_b + head_of(P, hr) * P.group * P.q_stride_h + 4 * lane) * SIZE;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        raw[r] = {};
        if (rank-- != 0) continue;
        rank = ranks - 1;
        const int row = min(first + r, last), t = token_of(P, row);
        raw[r] = *(const Four*)(from + (t * P.q_stride_t + (row - t * P.group) * P.q_stride_h) * SIZE);
    }
}

// Rotate the rows that load_rows had and cut them into bytes: [row][high, low][128 coordinates], and for each row the value
// of a unit and the sum.
__device__ __forceinline__ void rotate_rows(const Params& P, Four (&raw)[ROWS], u8* to, int rank, int ranks, int lane) {
    const u32 flips = signs(lane >> 3) >> (4 * (lane & 7));
    u32* words = (u32*)to;
    int2* sums = (int2*)(to + ROWS * 256);
#pragma unroll 1
    for (int r = 0; r < ROWS; r++) { // a lane holds four coordinates
        float x[4];
        unpack(raw[0], x);
#pragma unroll
        for (int n = 1; n < ROWS; n++) raw[n - 1] = raw[n];
        if (rank-- != 0) continue;
        rank = ranks - 1;
#pragma unroll
        for (int e = 0; e < 4; e++) x[e] = flt(bits(x[e]) ^ (flips >> e << 31));
        const float4 turned = hadamard(make_float4(x[0], x[1], x[2], x[3]), lane);
        x[0] = turned.x, x[1] = turned.y, x[2] = turned.z, x[3] = turned.w;
        // as integers, the absolute values of floats are in order, and infinities and NaN come last
        u32 most = 0;
#pragma unroll
        for (int e = 0; e < 4; e++) most = max(most, bits(x[e]) & 0x7fffffffu);
        most = __reduce_max_sync(~0u, most);
        const float top = most < 0x7f800000u ? flt(most) : nan_f(), inverse = most ? __fdividef(32512.f, top) : 0.f;
        int total = 0;
        u32 high = 0, low = 0;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int v = min(max(__float2int_rn(x[e] * inverse), -32512), 32512), l = (int)(signed char)(v & 255);
            total += v;
            low |= (u32)(l & 255) << (8 * e);
            high |= (u32)((v - l) >> 8 & 255) << (8 * e);
        }
        total = __reduce_add_sync(~0u, total);
        words[64 * r + lane] = high;
        words[64 * r + 32 + lane] = low;
        // H is not normalised above. A unit is the reciprocal of what was multiplied by, which is not quite top / 32512
        const float unit = most ? __fdividef(1.f, inverse) * (0.08838834764831845f * K_STEP) * P.scale_log2 : 0.f;
        if (lane == 0) sums[r] = make_int2((int)bits(unit), total >> 1);
    }
}

// What the rows of an item see.
__device__ __forceinline__ void look_out(const Params& P, Query& Q, int hr, int b, int lane) {
    const int block = block_of(P, hr), rows = P.num_queries * P.group;
    const Sight s = sight(P, b);
    if (P.num_queries == 1) {
        Q.inner_from = visible_from(P, s, 0), Q.inner_to = visible_to(P, s, 0);
#pragma unroll
        for (int nb = 0; nb < NB; nb++) Q.from[nb] = Q.inner_from, Q.to[nb] = Q.inner_to;
        return;
    }
    Q.inner_from = 0;
    Q.inner_to = 0x7fffffff;
#pragma unroll
    for (int nb = 0; nb < NB; nb++) {
        const int t = token_of(P, min(block * ROWS + nb * 4 + (lane & 3), rows - 1));
        Q.from[nb] = visible_from(P, s, t);
        Q.to[nb] = visible_to(P, s, t);
        Q.inner_from = max(Q.inner_from, Q.from[nb]);
        Q.inner_to = min(Q.inner_to, Q.to[nb]);
    }
    Q.inner_from = __reduce_max_sync(~0u, Q.inner_from);
    Q.inner_to = __reduce_min_sync(~0u, Q.inner_to);
}

// What rotate_rows wrote, as this lane's operand.
__device__ __forceinline__ void load_query(Query& Q, const u8* from, int lane) {
    const int g = lane >> 2, i = lane & 3;
#pragma unroll
    for (int nb = 0; nb < NB; nb++) {
        const uint4* words = (const uint4*)(from + (nb * 4 + (g >> 1)) * 256 + (g & 1) * 128 + 32 * i);
        const uint4 v = words[0], w = words[1];
        Q.b[nb][0] = v.x, Q.b[nb][1] = MEAN ? v.z : v.y, Q.b[nb][2] = MEAN ? v.y : v.z, Q.b[nb][3] = v.w;
        Q.b[nb][4] = w.x, Q.b[nb][5] = MEAN ? w.z : w.y, Q.b[nb][6] = MEAN ? w.y : w.z, Q.b[nb][7] = w.w;
        const int2 sums = ((const int2*)(from + ROWS * 256))[nb * 4 + i];
        Q.unit[nb] = flt((u32)sums.x), Q.half_sum[nb] = sums.y;
        if (FLOATS)
#pragma unroll
            for (int e = 0; e < 4; e++) Q.zero[nb][e] = pin(0x4b400000 + (e & 1 ? sums.y : 0), lane);
    }
}
