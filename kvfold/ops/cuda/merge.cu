// Joins partial attention results over disjoint tokens by their log-sum-exp: out = sum_i exp(lse_i - lse) out_i.
// The first ROTATED parts are in the basis of the pages: they are joined and un-rotated before the others come, all in
// float32. A warp per query row and head. Defines: PARTS, ROTATED, QTYPE (0 bf16, 1 f16), SIGN0 to SIGN3 (signs of the
// rotation, bit 1 = negative).

typedef unsigned int u32;
typedef long long i64;

struct Part {
    const void* out; // [rows, heads, 128], strides in elements
    const float* lse;
    i64 out_row, out_head, lse_row, lse_head;
};

struct Params {
    Part parts[PARTS];
    void* out; // [rows, heads, 128] contiguous
    float* lse;
    i64 lse_row, lse_head;
    int rows, heads;
};

__device__ __forceinline__ void load4(const void* p, i64 at, float (&x)[4]) {
    const uint2 v = *(const uint2*)((const unsigned short*)p + at);
#if QTYPE == 0
    x[0] = __uint_as_float(v.x << 16), x[1] = __uint_as_float(v.x & 0xffff0000u);
    x[2] = __uint_as_float(v.y << 16), x[3] = __uint_as_float(v.y & 0xffff0000u);
#else
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(x[0]), "=f"(x[1]) : "r"(v.x));
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(x[2]), "=f"(x[3]) : "r"(v.y));
#endif
}

// The inverse rotation of a vector that lies across a warp, four coordinates a lane.
__device__ __forceinline__ void unrotate(float (&o)[4], int lane) {
    const float a = o[0] + o[1], b = o[0] - o[1], c = o[2] + o[3], d = o[2] - o[3];
    o[0] = a + c, o[1] = b + d, o[2] = a - c, o[3] = b - d;
#pragma unroll
    for (int k = 1; k < 32; k <<= 1) {
        const float own = lane & k ? -1.f : 1.f;
#pragma unroll
        for (int e = 0; e < 4; e++) o[e] = fmaf(own, o[e], __shfl_xor_sync(~0u, o[e], k));
    }
    const int quarter = lane >> 3;
    const u32 flips = (quarter == 0 ? SIGN0 : quarter == 1 ? SIGN1 : quarter == 2 ? SIGN2 : SIGN3) >> (4 * (lane & 7));
#pragma unroll
    for (int e = 0; e < 4; e++) o[e] *= flips >> e & 1 ? -0.08838834764831845f : 0.08838834764831845f; // 1 / sqrt(128)
}

__device__ __forceinline__ u32 pack2(float lo, float hi) {
    u32 r;
#if QTYPE == 0
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
#endif
    return r;
}

extern "C" __global__ void __launch_bounds__(256) merge(const __grid_constant__ Params P) {
    const int item = blockIdx.x * 8 + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (item >= P.rows * P.heads) return;
    const int row = item / P.heads, head = item - row * P.heads;
    const float nothing = -__uint_as_float(0x7f800000u);
    float lse[PARTS], top = nothing;
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        lse[i] = P.parts[i].lse[row * P.parts[i].lse_row + head * P.parts[i].lse_head];
        top = lse[i] != lse[i] ? lse[i] : fmaxf(top, lse[i]); // a NaN is found again in the sum below
    }
    const float base = top == nothing ? 0.f : top;
    float total = 0.f, o[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        if (ROTATED && i == ROTATED) unrotate(o, lane);
        const float weight = expf(lse[i] - base);
        total += weight;
        if (weight == 0.f) continue; // what nobody sees may be anything
        float x[4];
        load4(P.parts[i].out, row * P.parts[i].out_row + head * P.parts[i].out_head + 4 * lane, x);
#pragma unroll
        for (int e = 0; e < 4; e++) o[e] = fmaf(weight, x[e], o[e]);
    }
    if (ROTATED == PARTS) unrotate(o, lane);
    const float norm = total == 0.f ? 0.f : 1.f / total;
    const i64 at = (i64)item * 128 + 4 * lane;
    *(uint2*)((unsigned short*)P.out + at) = make_uint2(pack2(o[0] * norm, o[1] * norm), pack2(o[2] * norm, o[3] * norm));
    if (lane == 0) P.lse[row * P.lse_row + head * P.lse_head] = base + logf(total);
}
