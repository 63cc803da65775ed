// Decode attention on packed pages for sm_90: 8-bit tensor-core products on codes that are looked up, never de-quantised.
//
// Defines: KBITS, VBITS (2, 3, 4), PAGE (16, 32, 64 tokens), NB (blocks of four query rows a warp serves), WARPS, STAGES,
// QTYPE (0 bf16, 1 f16, 2 f32), SOFTCAP, MASKED, FIXED (0: balanced splits over all sequences, 1: splits that depend on the
// sequence alone), SLICE (bytes of shared memory of a warp), KT0.. VU1 (codebooks as byte tables), SIGN0..SIGN3 (signs of the rotation, bit 1 = negative).
//
// Terms: an *item* is a sequence, a KV head and a block of 4 NB query rows (row = query token * group + head in group). A
// *step* is 32 tokens, two tiles. All steps of all items stand in one line; each warp gets an equal stretch of it. Where a
// stretch cuts an item, partial results are merged: by warps in shared memory, then by CTAs in global scratch, always in
// the order of the tokens, so that the result does not depend on timing.
//
// Arithmetic (docs/kernels.md): a level is +-(m + 1/2). prmt looks up the positive levels of four codes with one
// instruction, and gives 0 where the code's sign bit is set, because the table's bytes have a clear top bit; a second prmt,
// with the complemented codes as selectors, looks up the negative ones and gives -1 elsewhere. The sum of both is the level
// - 1/2, and adding them is the tensor core's work. Widths 2 and 3 fit one signed table. q is 16-bit fixed point in two
// columns of the product (high and low byte); so are the probabilities times V's scale. Both references (of the scores and of
// the weights) move only when a weight would overflow.

#include "common.cuh"

#define D 128
#define TILE_TOKENS 16
#define STEP_TOKENS 32
#define TILE_BYTES (TILE_TOKENS * (D / 8 * (KBITS + VBITS) + 4))
#define STEP_BYTES (2 * TILE_BYTES)
#define V_CODES (TILE_TOKENS * D / 8 * KBITS)
#define SCALES (TILE_TOKENS * D / 8 * (KBITS + VBITS))
#define THREADS (32 * WARPS)
#define ROWS (4 * NB)
#define PARTIAL (NB * 18 * 32) // floats of a partial result: 16 outputs, reference and sum of a lane's row, 32 lanes
#define Q_BYTES (ROWS * 256 + ROWS * 8) // a rotated query block
#define W_BYTES (NB * 256)              // weights on their way to the other operand
#define SLOTS (FIXED ? 1 : 2) // partial results of a CTA
#define HEADROOM 4.f // of the weights' reference over the first weights
#define NOTHING -1e30f

struct Params {
    const u8* pages;
    const int* table;
    const void* q;
    void* out;
    float* lse;
    const void* seq_lens;
    const void* first;
    const void* query_start;
    const u8* mask;
    float* scratch;   // partial results of CTAs [grid, 2], then of warps [grid, WARPS, 2]; FIXED: of CTAs alone [grid]
    u32* counters;    // [CTAs]: all zero before and after
    i64 q_stride_b, q_stride_t, q_stride_h;
    i64 mask_stride_b, mask_stride_t;
    u32 page_stride;
    int table_stride, pages_per_sequence;
    int batch, num_queries, heads, group, row_blocks;
    int lag, window; // window 0: none
    u32 minus_one, low_nibbles; // -1 and 0x0f0f0f0f, kept from the compiler, which would use them worse
    int wide;        // bit 0: seq_lens is int64, bit 1: first, bit 2: query_start
    int splits, begin; // FIXED only: of a sequence; the first sequence of this launch
    float scale_log2; // score scale * log2(e)
    float softcap_log2;  // softcap * log2(e)
    float softcap_inv;   // 1 / (softcap * log2 e)
};

// --- PTX ---------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 prmt(u32 a, u32 b, u32 s) {
    u32 r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(s));
    return r;
}
// ~x by multiplication, with -1 in a register that the compiler knows nothing about.
__device__ __forceinline__ u32 complement(u32 x, u32 minus_one) {
    u32 r;
    asm("mad.lo.u32 %0, %1, %2, %2;" : "=r"(r) : "r"(x), "r"(minus_one));
    return r;
}
// Bits of x where mask is set, of y elsewhere: one instruction, if the mask is no constant.
__device__ __forceinline__ u32 select(u32 x, u32 y, u32 mask) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(r) : "r"(x), "r"(y), "r"(mask));
    return r;
}
__device__ __forceinline__ float ex2(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
__device__ __forceinline__ float lg2(float x) {
    float r;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
__device__ __forceinline__ u32 bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float flt(u32 x) { return __uint_as_float(x); }
__device__ __forceinline__ float nan_f() { return flt(0x7fffffffu); }
__device__ __forceinline__ u32 smem_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void mma_s8(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_u8(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void barrier_init(u32 bar) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bulk_copy(u32 to, u64 from, u32 bytes, u32 bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
        "l"(from), "r"(bytes), "r"(bar)
        : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
    asm volatile(
        "{\n.reg .pred P;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 P, [%0], %1;\n@P bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(
            bar),
        "r"(parity)
        : "memory");
}

// --- inputs and outputs --------------------------------------------------------------------------------------------------

__device__ __forceinline__ int position(const void* p, int b, int wide) {
    return wide ? (int)((const i64*)p)[b] : ((const int*)p)[b];
}

// Two neighbouring values as a word of the output's dtype.
__device__ __forceinline__ u32 pack2(float low, float high) {
    return QTYPE == 0 ? pack_bf16(low, high) : pack_f16(low, high);
}

// Signs of the rotation for the 32 coordinates from 32 * quarter.
__device__ __forceinline__ u32 signs(int quarter) {
    return quarter == 0 ? SIGN0 : quarter == 1 ? SIGN1 : quarter == 2 ? SIGN2 : SIGN3;
}

// --- where the work lies -------------------------------------------------------------------------------------------------

struct Span { // what the rows of a sequence's queries see together, in steps
    int begin, count;
};

struct Sight { // of one sequence
    int start;  // position of the first query
    int first;  // first visible position
    int length;
};

__device__ __forceinline__ Sight sight(const Params& P, int b) {
    Sight s;
    s.length = position(P.seq_lens, b, P.wide & 1);
    s.start = P.query_start ? position(P.query_start, b, P.wide & 4) : s.length - P.num_queries;
    s.first = P.first ? max(position(P.first, b, P.wide & 2), 0) : 0;
    return s;
}

__device__ __forceinline__ int visible_from(const Params& P, const Sight& s, int t) {
    return P.window ? max(s.first, s.start + t - P.window + 1) : s.first;
}
__device__ __forceinline__ int visible_to(const Params& P, const Sight& s, int t) {
    return min(s.length, s.start + t - P.lag + 1);
}

__device__ __forceinline__ Span span(const Params& P, int b) {
    const Sight s = sight(P, b);
    const int lo = visible_from(P, s, 0), hi = visible_to(P, s, P.num_queries - 1);
    Span r;
    r.begin = lo / STEP_TOKENS;
    r.count = hi > lo ? (hi + STEP_TOKENS - 1) / STEP_TOKENS - r.begin : 0;
    return r;
}

// --- one query row block: q as the product's B operand ----------------------------------------------------------------------

struct Query {
    u32 b[NB][8];     // rotated q in 16-bit fixed point: column 2 r its high bytes, 2 r + 1 its low bytes
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

// Four neighbouring coordinates of row r of an item, as they are.
__device__ __forceinline__ Four load_row(const Params& P, int hr, int b, int r, int lane) {
    const int h = hr / P.row_blocks, rows = P.num_queries * P.group;
    const int row = min((hr - h * P.row_blocks) * ROWS + r, rows - 1);
    const int t = row / P.group, head = h * P.group + row - t * P.group;
    const i64 at = b * P.q_stride_b + t * P.q_stride_t + head * P.q_stride_h + 4 * lane;
    return *(const Four*)((const u8*)P.q + at * (QTYPE == 2 ? 4 : 2));
}

// Rotate rows of an item (those with number `rank` modulo `ranks`; the first is at hand) and cut them into bytes:
// [row][high, low][128 coordinates], and for each row the value of a unit and the sum.
__device__ __forceinline__ void rotate_rows(const Params& P, Four raw, u8* to, int hr, int b, int rank, int ranks, int lane) {
    const u32 flips = signs(lane >> 3) >> (4 * (lane & 7));
    u32* words = (u32*)to;
    int2* sums = (int2*)(to + ROWS * 256);
#pragma unroll 1
    for (int r = rank; r < ROWS; r += ranks) { // a lane holds four coordinates
        float x[4];
        unpack(raw, x);
        if (r + ranks < ROWS) raw = load_row(P, hr, b, r + ranks, lane);
#pragma unroll
        for (int e = 0; e < 4; e++) x[e] = flt(bits(x[e]) ^ (flips >> e << 31));
        const float u0 = x[0] + x[1], u1 = x[0] - x[1], u2 = x[2] + x[3], u3 = x[2] - x[3];
        x[0] = u0 + u2, x[1] = u1 + u3, x[2] = u0 - u2, x[3] = u1 - u3;
#pragma unroll
        for (int k = 1; k < 32; k <<= 1) {
            const float own = lane & k ? -1.f : 1.f;
#pragma unroll
            for (int e = 0; e < 4; e++) x[e] = fmaf(own, x[e], __shfl_xor_sync(~0u, x[e], k));
        }
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

// What rotate_rows wrote, as this lane's operand.
__device__ __forceinline__ void load_query(const Params& P, Query& Q, const u8* from, int hr, int b, int lane) {
    const int g = lane >> 2, i = lane & 3;
    const int block = hr % P.row_blocks, rows = P.num_queries * P.group;
    const Sight s = sight(P, b);
    Q.inner_from = 0;
    Q.inner_to = 0x7fffffff;
#pragma unroll
    for (int nb = 0; nb < NB; nb++) {
        const uint4* words = (const uint4*)(from + (nb * 4 + (g >> 1)) * 256 + (g & 1) * 128 + 32 * i);
        const uint4 v = words[0], w = words[1];
        Q.b[nb][0] = v.x, Q.b[nb][1] = v.y, Q.b[nb][2] = v.z, Q.b[nb][3] = v.w;
        Q.b[nb][4] = w.x, Q.b[nb][5] = w.y, Q.b[nb][6] = w.z, Q.b[nb][7] = w.w;
        const int2 sums = ((const int2*)(from + ROWS * 256))[nb * 4 + i];
        Q.unit[nb] = flt((u32)sums.x), Q.half_sum[nb] = sums.y;
        const int t = min(block * ROWS + nb * 4 + i, rows - 1) / P.group;
        Q.from[nb] = visible_from(P, s, t);
        Q.to[nb] = visible_to(P, s, t);
        Q.inner_from = max(Q.inner_from, Q.from[nb]);
        Q.inner_to = min(Q.inner_to, Q.to[nb]);
    }
    Q.inner_from = __reduce_max_sync(~0u, Q.inner_from);
    Q.inner_to = __reduce_min_sync(~0u, Q.inner_to);
}

// --- partial results -----------------------------------------------------------------------------------------------------

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

// Merge one quad of partial results first, first + stride... before end, which where() finds, in this order. What other CTAs
// wrote comes past L1, which nobody keeps coherent. Four at a time, so that loads do not wait for each other.
template <bool GLOBAL, typename Where>
__device__ __forceinline__ void merge(int first, int stride, int end, Where where, float* to, int quad, int lane) {
    const int at = quad * 32 + lane, state = (quad >> 2) * 32 + lane;
    float top = NOTHING, total = 0.f;
    float4 o = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
    for (int c = first; c < end; c += 4 * stride) {
        float4 v[4];
        float2 s[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const bool in = c + k * stride < end;
            const float* from = where(in ? c + k * stride : c);
            const float4* p = (const float4*)from + at;
            const float2* q = (const float2*)(from + NB * 512) + state;
            v[k] = GLOBAL ? __ldcg(p) : *p;
            s[k] = GLOBAL ? __ldcg(q) : *q;
            if (!in) s[k].x = -flt(0x7f800000u);
        }
        const float most = fmaxf(fmaxf(fmaxf(s[0].x, s[1].x), fmaxf(s[2].x, s[3].x)), top), fade = ex2(top - most);
        o.x *= fade, o.y *= fade, o.z *= fade, o.w *= fade, total *= fade, top = most;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (k && c + k * stride >= end) break;
            const float weight = ex2(s[k].x - top);
            o.x = fmaf(weight, v[k].x, o.x), o.y = fmaf(weight, v[k].y, o.y);
            o.z = fmaf(weight, v[k].z, o.z), o.w = fmaf(weight, v[k].w, o.w);
            total = fmaf(weight, s[k].y, total);
        }
    }
    ((float4*)to)[at] = o;
    if ((quad & 3) == 0) ((float2*)(to + NB * 512))[state] = make_float2(top, total);
}

// Normalise, un-rotate and write the rows of an item. Every bit of the coordinate's index is a bit of j, of the half or of
// g, whatever the width, so that the same butterflies undo the Hadamard matrix.
__device__ __noinline__ void finish(const Params& P, const float* from, int b, int hr, int lane) {
    const int g = lane >> 2, i = lane & 3;
    const int h = hr / P.row_blocks, block = hr - h * P.row_blocks, rows = P.num_queries * P.group;
#pragma unroll 1
    for (int nb = 0; nb < NB; nb++) {
        const float2 state = ((const float2*)(from + NB * 512))[nb * 32 + lane];
        const float top = state.x, total = state.y;
        const float norm = total == 0.f ? 0.f : 0.08838834764831845f / total;
        float o[16];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float4 v = ((const float4*)from)[(nb * 4 + e) * 32 + lane];
            o[4 * e] = v.x * norm, o[4 * e + 1] = v.y * norm, o[4 * e + 2] = v.z * norm, o[4 * e + 3] = v.w * norm;
        }
#pragma unroll
        for (int k = 1; k < 16; k <<= 1)
#pragma unroll
            for (int e = 0; e < 16; e++)
                if (!(e & k)) {
                    const float u = o[e], v = o[e | k];
                    o[e] = u + v;
                    o[e | k] = u - v;
                }
#pragma unroll 1
        for (int k = 4; k < 32; k <<= 1) {
            const float own = lane & k ? -1.f : 1.f;
#pragma unroll
            for (int e = 0; e < 16; e++) o[e] = fmaf(own, o[e], __shfl_xor_sync(~0u, o[e], k));
        }
        const int row = block * ROWS + nb * 4 + i;
        if (row >= rows) continue;
        const int t = row / P.group, head = h * P.group + row - t * P.group, query_heads = P.heads * P.group;
        const i64 at = (((i64)b * P.num_queries + t) * query_heads + head) * D;
#pragma unroll
        for (int half = 0; half < 2; half++) {
#if VBITS == 4
            const int dim = 64 * half + 8 * g;
#else
            const int dim = 16 * g + 8 * half;
#endif
            const u32 flips = signs(dim >> 5) >> (dim & 31);
            float y[8];
#pragma unroll
            for (int j = 0; j < 8; j++) y[j] = flt(bits(o[2 * j + half]) ^ ((flips >> j) << 31));
#if QTYPE == 2
            float4* to = (float4*)((float*)P.out + at + dim);
            to[0] = make_float4(y[0], y[1], y[2], y[3]);
            to[1] = make_float4(y[4], y[5], y[6], y[7]);
#else
            *(uint4*)((unsigned short*)P.out + at + dim) =
                make_uint4(pack2(y[0], y[1]), pack2(y[2], y[3]), pack2(y[4], y[5]), pack2(y[6], y[7]));
#endif
        }
        if (g == 0)
            P.lse[((i64)b * query_heads + head) * P.num_queries + t] =
                (total == 0.f ? -flt(0x7f800000u) : top + lg2(total)) * 0.6931471805599453f;
    }
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

// The first words of the byte tables in registers. A constant, or anything that the compiler knows to be the same in all
// lanes, would be copied before each of its hundred uses; so a zero is added that it cannot know.
struct Tables {
    u32 k_low, k_high, v_low, v_high;
};

__device__ __forceinline__ u32 in_register(u32 constant, u32 minus_one, u32 lane) {
    return constant + (minus_one + 1) * lane;
}

// --- one step: 32 tokens ---------------------------------------------------------------------------------------------------

// Raise the references of a row so that the weights of this step fit, and bring what was summed to them. The first time
// there is nothing to bring; later the factors are powers of two, and integers are shifted.
__device__ __forceinline__ void move_references(State& S, int nb, const float (&s)[4], const float (&vs)[4], bool shrink) {
    float top = fmaxf(fmaxf(s[0], s[1]), fmaxf(s[2], s[3])); // fmaxf passes over NaN
    float total = S.total[nb];
#pragma unroll
    for (int k = 4; k < 32; k <<= 1) {
        top = fmaxf(top, __shfl_xor_sync(~0u, top, k));
        total = fmaxf(total, __shfl_xor_sync(~0u, total, k));
    }
    const bool fresh = S.limit[nb] == 0.f; // no weight yet: the integers are zero
    float now = S.top[nb];
    if (top > now && (fresh || top > now + 40.f)) now = fresh ? top : now + ceilf(top - now);
    if (total > 1e15f && !fresh) now = fmaxf(now, S.top[nb] + 50.f);
    // weights near the end of float's range (values of 1e30 and more): once more, with room above the scores
    float most;
#pragma unroll 1
    for (int round = 0;; round++) {
        most = 0.f;
#pragma unroll
        for (int t = 0; t < 4; t++) most = fmaxf(most, ex2(s[t] - now) * vs[t]);
#pragma unroll
        for (int k = 4; k < 32; k <<= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, k));
        if (__all_sync(~0u, round || most < 1e36f)) break;
        if (!(most < 1e36f)) now += ceilf(fmaxf(top - now, 0.f)) + 8.f;
    }
#pragma unroll
    for (int t = 0; t < 4; t++) {
        const float w = ex2(s[t] - now) * vs[t];
        if (w != w) S.spoilt[nb] = w;
    }
    // where the scores' reference rises the weights shrink, and their reference with them: the integers stay as they are
    const float drop = now - S.top[nb];
    float limit = S.limit[nb] * ex2(-drop);
    int shift = shrink ? 3 : 0;
    if (fresh || limit < 1e-30f) { // nothing was summed, or nothing that is left
        limit = fminf(most * HEADROOM, 3e38f);
        shift = 31;
    } else {
        if (most > limit) shift += (int)ceilf(lg2(most) - lg2(limit)) + 2;
        limit = fminf(limit * ex2((float)shift), 3e38f);
        shift = min(shift, 31);
    }
    S.top[nb] = now;
    S.limit[nb] = limit;
    S.factor[nb] = limit > 0.f ? __fdividef(65534.f, limit) : 0.f;
    S.total[nb] *= ex2(-drop);
    if (fresh) shift = 0;
    if (__all_sync(~0u, shift == 0)) return;
    const u32 half = (1u << shift) >> 1;
    S.weights[nb] = (S.weights[nb] + half) >> shift;
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int c = 0; c < 4; c++) S.acc[nb][j][c] = (S.acc[nb][j][c] + (int)half) >> shift;
}

// Words of a K row for the four k-steps of a lane: eight codes each, in eight nibbles.
__device__ __forceinline__ void load_k(const u8* tile, int token, int i, u32 (&w)[4]) {
#if KBITS == 4
    const uint4 v = *(const uint4*)(tile + token * 64 + 16 * i);
    w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
#else
    const uint2 v = *(const uint2*)(tile + token * 32 + 8 * i);
#if KBITS == 2
    w[0] = v.x & 0x33333333u, w[1] = (v.x >> 2) & 0x33333333u;
    w[2] = v.y & 0x33333333u, w[3] = (v.y >> 2) & 0x33333333u;
#else
    const u32 h = *(const u32*)(tile + 512 + token * 16 + 4 * i);
    w[0] = (v.x & 0x33333333u) | ((h << 2) & 0x44444444u);
    w[1] = ((v.x >> 2) & 0x33333333u) | ((h << 1) & 0x44444444u);
    w[2] = (v.y & 0x33333333u) | (h & 0x44444444u);
    w[3] = ((v.y >> 2) & 0x33333333u) | ((h >> 1) & 0x44444444u);
#endif
#endif
}

// Nibbles of the same byte of eight tokens, four of each tile: low nibbles and high nibbles of the byte.
__device__ __forceinline__ void interleave(u32 x, u32 y, u32 mask, u32& low, u32& high) {
    low = select(x, y << 4, mask);
    high = select(x >> 4, y, mask);
}

template <bool EDGE>
__device__ __forceinline__ void step(const Params& P, const Tables& T, const Query& Q, State& S, const u8* tiles, u8* staging, int lane,
                                     int b, int hr, int at, u32& dither, bool check) {
    const int g = lane >> 2, i = lane & 3, swap = __popc(g) & 1;
    const int token0 = 2 * g + swap, token1 = 2 * g + 1 - swap; // rows g and g + 8; bank conflicts are avoided by swap
    float s[NB][4], vs[4];

    // scores: K q
    {
        const u32 first = swap ? 0x3244u : 0x1044u, second = swap ? 0x1044u : 0x3244u;
        float ks[4];
        int c[2][NB][4];
#pragma unroll
        for (int a = 0; a < 2; a++) {
            const u8* tile = tiles + a * TILE_BYTES;
            const u32 kw = *(const u32*)(tile + SCALES + 4 * g), vw = *(const u32*)(tile + SCALES + 32 + 4 * g);
            ks[2 * a] = flt(prmt(kw, 0, first)), ks[2 * a + 1] = flt(prmt(kw, 0, second));
            vs[2 * a] = flt(prmt(vw, 0, first)), vs[2 * a + 1] = flt(prmt(vw, 0, second));
            u32 w0[4], w1[4];
            load_k(tile, token0, i, w0);
            load_k(tile, token1, i, w1);
#pragma unroll
            for (int nb = 0; nb < NB; nb++)
                c[a][nb][0] = c[a][nb][2] = 0, c[a][nb][1] = c[a][nb][3] = Q.half_sum[nb];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const u32 h0 = w0[k] >> 16, h1 = w1[k] >> 16;
                u32 a0 = prmt(T.k_low, KT1, w0[k]), a1 = prmt(T.k_low, KT1, w1[k]);
                u32 a2 = prmt(T.k_low, KT1, h0), a3 = prmt(T.k_low, KT1, h1);
#pragma unroll
                for (int nb = 0; nb < NB; nb++) mma_s8(c[a][nb], a0, a1, a2, a3, Q.b[nb][2 * k], Q.b[nb][2 * k + 1]);
#if KBITS == 4
                a0 = prmt(T.k_high, KU1, complement(w0[k], P.minus_one)), a1 = prmt(T.k_high, KU1, complement(w1[k], P.minus_one));
                a2 = prmt(T.k_high, KU1, complement(h0, P.minus_one)), a3 = prmt(T.k_high, KU1, complement(h1, P.minus_one));
#pragma unroll
                for (int nb = 0; nb < NB; nb++) mma_s8(c[a][nb], a0, a1, a2, a3, Q.b[nb][2 * k], Q.b[nb][2 * k + 1]);
#endif
            }
        }
#pragma unroll
        for (int nb = 0; nb < NB; nb++)
#pragma unroll
            for (int t = 0; t < 4; t++) {
                const int x = c[t >> 1][nb][2 * (t & 1)] * 256 + c[t >> 1][nb][2 * (t & 1) + 1];
                s[nb][t] = (float)x * (Q.unit[nb] * ks[t]);
#if SOFTCAP
                {
                    const float z = s[nb][t] * P.softcap_inv; // tanh by exp2: tanh.approx is too coarse
                    const float e = ex2(fminf(fabsf(z), 20.f) * 2.8853900817779268f);
                    const float y = (e - 1.f) / (e + 1.f);
                    s[nb][t] = z == z ? (z < 0.f ? -y : y) * P.softcap_log2 : z;
                }
#endif
            }
    }
    if (EDGE) {
#pragma unroll
        for (int t = 0; t < 4; t++) {
            const int j = at + 16 * (t >> 1) + (t & 1 ? token1 : token0);
            bool any = false;
#pragma unroll
            for (int nb = 0; nb < NB; nb++) {
                bool seen = j >= Q.from[nb] && j < Q.to[nb];
#if MASKED
                if (seen) {
                    const int rows = P.num_queries * P.group;
                    const int row = min((hr % P.row_blocks) * ROWS + nb * 4 + i, rows - 1);
                    seen = P.mask[b * P.mask_stride_b + (row / P.group) * P.mask_stride_t + j] != 0;
                }
#endif
                if (!seen) s[nb][t] = -flt(0x7f800000u);
                any |= seen;
            }
            // what nobody wrote may be NaN or huge: no row of this lane may meet it
            if (!any) vs[t] = 0.f;
        }
    }

    // weights: exp2(score - top) * V scale, in 16-bit fixed point
    dither += 0x9e3779b9u;
    const float d0 = flt((dither >> 9) | 0x3f800000u) - 1.5f, d1 = -d0;
#pragma unroll
    for (int nb = 0; nb < NB; nb++) {
        float p[4], w[4];
#pragma unroll
        for (int t = 0; t < 4; t++) {
            p[t] = ex2(s[nb][t] - S.top[nb]);
            w[t] = p[t] * vs[t];
        }
        if (EDGE && NB > 1) {
#pragma unroll
            for (int t = 0; t < 4; t++)
                if (s[nb][t] == -flt(0x7f800000u)) w[t] = 0.f;
        }
        float total = S.total[nb] + ((p[0] + p[1]) + (p[2] + p[3]));
        const float most = fmaxf(fmaxf(w[0], w[1]), fmaxf(w[2], w[3]));
        const float sum = (w[0] + w[1]) + (w[2] + w[3]); // NaN shows here, not in most
        bool shrink = false;
        if (check) {
            int large = (int)(S.weights[nb] >> 1);
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int k = 0; k < 4; k++) large = max(large, abs(S.acc[nb][j][k]));
            shrink = __reduce_max_sync(~0u, large) > (1 << 29);
        }
        if (__any_sync(~0u, !(most <= S.limit[nb]) || !(sum < 3e38f) || !(total < 1e18f)) || shrink) {
            float own[4];
#pragma unroll
            for (int t = 0; t < 4; t++) own[t] = EDGE && NB > 1 && s[nb][t] == -flt(0x7f800000u) ? 0.f : vs[t];
            move_references(S, nb, s[nb], own, shrink);
            total = S.total[nb];
#pragma unroll
            for (int t = 0; t < 4; t++) {
                p[t] = ex2(s[nb][t] - S.top[nb]);
                total += p[t];
                w[t] = p[t] * own[t];
                w[t] = w[t] <= S.limit[nb] ? w[t] : 0.f; // NaN: S.spoilt has it
            }
        }
        S.total[nb] = total;
        u32 y[4];
#pragma unroll
        for (int t = 0; t < 4; t++) y[t] = bits(fmaf(w[t], S.factor[nb], t & 1 ? d1 : d0) + 12582912.f);
        S.weights[nb] += (y[0] + y[1]) + (y[2] + y[3]) - 4u * 0x4b400000u;
        const u32 x0 = prmt(y[0], y[2], 0x5140), x1 = prmt(y[1], y[3], 0x5140);
        u32* to = (u32*)(staging + nb * 256) + 16 * i + g;
        to[8] = prmt(x0, x1, swap ? 0x1054u : 0x5410u);
        to[0] = prmt(x0, x1, swap ? 0x3276u : 0x7632u);
    }
    __syncwarp();
    u32 pb[NB][2];
#pragma unroll
    for (int nb = 0; nb < NB; nb++) {
        const uint2 v = *((const uint2*)(staging + nb * 256) + lane);
        pb[nb][0] = v.x, pb[nb][1] = v.y;
    }

    // output: V^T w
    const u8* v0 = tiles + V_CODES + 16 * i;
    const u8* v1 = v0 + TILE_BYTES;
#if VBITS == 4
    const uint4 xa = *(const uint4*)(v0 + 64 * g), ya = *(const uint4*)(v1 + 64 * g);
    const uint4 xb = *(const uint4*)(v0 + 64 * (g + 8)), yb = *(const uint4*)(v1 + 64 * (g + 8));
    const u32 xs[2][4] = {{xa.x, xa.y, xa.z, xa.w}, {xb.x, xb.y, xb.z, xb.w}};
    const u32 ys[2][4] = {{ya.x, ya.y, ya.z, ya.w}, {yb.x, yb.y, yb.z, yb.w}};
#else
    const uint4 xa = *(const uint4*)(v0 + 64 * g), ya = *(const uint4*)(v1 + 64 * g);
    const u32 xs[4] = {xa.x, xa.y, xa.z, xa.w}, ys[4] = {ya.x, ya.y, ya.z, ya.w};
#if VBITS == 3
    const uint4 ha = *(const uint4*)(v0 + 512 + 64 * (g >> 1)), ka = *(const uint4*)(v1 + 512 + 64 * (g >> 1));
    const u32 hs[4] = {ha.x, ha.y, ha.z, ha.w}, ks[4] = {ka.x, ka.y, ka.z, ka.w};
    const u32 shift = 2 * (g & 1);
#endif
#endif
#pragma unroll
    for (int byte = 0; byte < 4; byte++) {
        u32 code[2][2]; // [nibble of the byte][row g, row g + 8]
#if VBITS == 4
        interleave(xs[0][byte], ys[0][byte], P.low_nibbles, code[0][0], code[1][0]);
        interleave(xs[1][byte], ys[1][byte], P.low_nibbles, code[0][1], code[1][1]);
#else
        u32 pair[2];
        interleave(xs[byte], ys[byte], P.low_nibbles, pair[0], pair[1]);
#if VBITS == 3
        u32 top[2];
        interleave(hs[byte], ks[byte], P.low_nibbles, top[0], top[1]);
#endif
#pragma unroll
        for (int n = 0; n < 2; n++) {
            code[n][0] = pair[n] & 0x33333333u;
            code[n][1] = (pair[n] >> 2) & 0x33333333u;
#if VBITS == 3
            const u32 t = top[n] >> shift;
            code[n][0] |= (t << 2) & 0x44444444u;
            code[n][1] |= (t << 1) & 0x44444444u;
#endif
        }
#endif
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int j = 2 * byte + n;
            const u32 e = code[n][0], f = code[n][1], eh = e >> 16, fh = f >> 16;
            u32 a0 = prmt(T.v_low, VT1, e), a1 = prmt(T.v_low, VT1, f);
            u32 a2 = prmt(T.v_low, VT1, eh), a3 = prmt(T.v_low, VT1, fh);
#pragma unroll
            for (int nb = 0; nb < NB; nb++) mma_u8(S.acc[nb][j], a0, a1, a2, a3, pb[nb][0], pb[nb][1]);
#if VBITS == 4
            a0 = prmt(T.v_high, VU1, complement(e, P.minus_one)), a1 = prmt(T.v_high, VU1, complement(f, P.minus_one));
            a2 = prmt(T.v_high, VU1, complement(eh, P.minus_one)), a3 = prmt(T.v_high, VU1, complement(fh, P.minus_one));
#pragma unroll
            for (int nb = 0; nb < NB; nb++) mma_u8(S.acc[nb][j], a0, a1, a2, a3, pb[nb][0], pb[nb][1]);
#endif
        }
    }
}

// --- the kernel --------------------------------------------------------------------------------------------------------

// A place in the line of steps.
struct Cursor {
    int b, hr, step, count, begin; // step of count steps of the item, which begins at the sequence's step `begin`
};

// Items as four numbers: sequence, KV head and row block, first step of the sequence, number of steps.
__device__ __forceinline__ int4 next_item(const Params& P, int4 item) {
    if (++item.y == P.heads * P.row_blocks) {
        item.y = item.w = 0;
        while (item.w == 0 && ++item.x < P.batch) {
            const Span s = span(P, item.x);
            item.z = s.begin, item.w = s.count;
        }
    }
    return item;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode(const __grid_constant__ Params P) {
    extern __shared__ __align__(128) u8 shared[];
    // partial results of a warp: [0] of an item that an earlier warp begins, [1] of one that a later warp ends
    __shared__ float* partial[WARPS][2];
    __shared__ int4 owner[WARPS][2]; // of each: (b, hr, the item's begin in the line, its steps)
    __shared__ int busy[WARPS], ends[WARPS]; // whether a warp has steps; whether [0] is the end of its item
    __shared__ int4 reading[WARPS], filling[WARPS]; // the items that a warp attends to, and copies
    __shared__ ulonglong2 sources[WARPS]; // addresses: the head's tiles in page 0, the sequence's row of the table
    __shared__ i64 line[2]; // steps in all, warps with work (the first ones)
    __shared__ int pending[2]; // what this CTA is the last to bring to an item, and the item
    __shared__ int4 whole[2];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    u8* slice = shared + warp * SLICE;
    u8* const staging = slice + STAGES * STEP_BYTES;
    u8* const query = staging + W_BYTES;
    const u32 ring = smem_address(slice), bars = smem_address(query + Q_BYTES);

    const int cta_slot = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;

    // what everybody needs first comes to L2, a line by each thread
    auto prefetch = [&](const void* p, i64 bytes) {
        const i64 at = ((i64)cta_slot * THREADS + threadIdx.x) * 128;
        if (p && at < bytes) asm volatile("prefetch.global.L2 [%0];" ::"l"((const u8*)p + at));
    };
    prefetch(P.seq_lens, P.batch * (P.wide & 1 ? 8 : 4));
    prefetch(P.first, P.batch * (P.wide & 2 ? 8 : 4));
    prefetch(P.query_start, P.batch * (P.wide & 4 ? 8 : 4));
    prefetch(P.table, ((P.batch - 1) * (i64)P.table_stride + P.pages_per_sequence) * 4);
    prefetch(P.q, ((P.batch - 1) * P.q_stride_b + (P.num_queries - 1) * P.q_stride_t +
                   (P.heads * P.group - 1) * P.q_stride_h + D) * (QTYPE == 2 ? 4 : 2));

    if (lane == 0) {
        for (int s = 0; s < STAGES; s++) barrier_init(bars + 8 * s);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        partial[warp][0] = partial[warp][1] = nullptr;
        ends[warp] = 0;
    }
    if (threadIdx.x < 2) pending[threadIdx.x] = 0;
    __syncwarp();

    Query Q;
    State S;
    Tables T;
    T.k_low = in_register(KT0, P.minus_one, lane), T.k_high = KBITS == 4 ? in_register(KU0, P.minus_one, lane) : 0;
    T.v_low = VBITS == KBITS ? T.k_low : in_register(VT0, P.minus_one, lane);
    T.v_high = VBITS == KBITS ? T.k_high : VBITS == 4 ? in_register(VU0, P.minus_one, lane) : 0;
    // who does what: [from, to) of the line of `total` steps, and the place where this warp begins
    Cursor here = {0, 0, 0, 0, 0};
    int from = 0, to = 0;
    const u32 cta = blockIdx.x;
    auto plan = [&]() -> bool { // false: this CTA has no work
#if FIXED
        here.b = P.begin + blockIdx.z, here.hr = blockIdx.y;
        const Span all = span(P, here.b);
        const int total = all.count, size = max((total + P.splits - 1) / P.splits, WARPS);
        const u32 ctas = (total + size - 1) / size;
        if (total == 0 && cta == 0 && here.hr == 0) write_nothing(P, here.b);
        if (cta >= ctas) return false;
        const int low = cta * size, high = min(low + size, total);
        const int active = min(high - low, WARPS);
        from = low + (high - low) * min(warp, active) / active;
        to = low + (high - low) * min(warp + 1, active) / active;
        here.step = from, here.count = total, here.begin = all.begin;
        if (threadIdx.x == 0) line[0] = ctas;
#else
        const int items_each = P.heads * P.row_blocks; // of a sequence
        const Span first32 = lane < P.batch ? span(P, lane) : Span{0, 0};
        int sum = first32.count;
#pragma unroll 1
        for (int b = 32 + lane; b < P.batch; b += 32) sum += span(P, b).count;
        const u32 total = __reduce_add_sync(~0u, sum) * items_each;
        const u32 ctas = min((total + WARPS - 1) / WARPS, gridDim.x);
        if (cta >= ctas) return false;
        const u32 warps = min(ctas * WARPS, total), mine = min(cta * WARPS + warp, warps), next = min(mine + 1, warps);
        const u32 each = total / warps, rest = total - each * warps; // rest * warps fits 32 bits: both are below 4096
        from = each * mine + rest * mine / warps, to = each * next + rest * next / warps;
        if (threadIdx.x == 0) line[0] = total, line[1] = warps;
        const int wanted = from / items_each;
        int before = 0;
#pragma unroll 1
        for (int base = 0; from < to; base += 32) { // the first sequence whose sum of steps exceeds `wanted`
            const Span s = base == 0 ? first32 : base + lane < P.batch ? span(P, base + lane) : Span{0, 0};
            int upto = s.count;
#pragma unroll 1
            for (int k = 1; k < 32; k <<= 1) {
                const int y = __shfl_up_sync(~0u, upto, k);
                if (lane >= k) upto += y;
            }
            const u32 beyond = __ballot_sync(~0u, before + upto > wanted);
            if (beyond) {
                const int at = __ffs(beyond) - 1;
                here.b = base + at;
                here.count = __shfl_sync(~0u, s.count, at), here.begin = __shfl_sync(~0u, s.begin, at);
                before += __shfl_sync(~0u, upto, at) - here.count;
                break;
            }
            before += __shfl_sync(~0u, upto, 31);
        }
        if (from < to) {
            const int past = from - before * items_each;
            here.hr = past / here.count;
            here.step = past - here.hr * here.count;
        }
#endif
        return true;
    };

    if (!plan()) {
#if !FIXED
        for (int b = cta; b < P.batch; b += gridDim.x)
            if (span(P, b).count == 0) write_nothing(P, b);
#endif
        return;
    }
    if (lane == 0) {
        busy[warp] = from < to;
        reading[warp] = filling[warp] = make_int4(here.b, here.hr, here.begin, here.count);
    }
    __syncwarp();

    // The ring. The page of the next copy is looked up one copy ahead, so that nobody waits for it. All of it is lane 0's.
    u32 left = to - from, ahead = here.begin + here.step, ahead_left = here.count - here.step, fill = 0;
    u32 page0 = 0, page1 = 0;
    auto aim = [&](const int4& item) { // where an item's tiles and table lie
        const u8* tiles = P.pages + (i64)(item.y / P.row_blocks) * ((PAGE / 16) * TILE_BYTES);
        const int* row = P.table + (i64)item.x * P.table_stride;
        sources[warp] = make_ulonglong2((u64)tiles, (u64)row);
    };
    auto look_up_page = [&]() {
        const int* row = (const int*)sources[warp].y;
        const u32 page = ahead * STEP_TOKENS / PAGE;
        page0 = row[page];
        if (PAGE == 16) page1 = page + 1 < P.pages_per_sequence ? row[page + 1] : ~0u;
    };
    auto fetch = [&]() {
        if (lane == 0) {
            const u64 source = sources[warp].x;
            const u32 bar = bars + 8 * fill, target = ring + fill * STEP_BYTES;
            if (PAGE == 16) {
                barrier_expect(bar, page1 != ~0u ? STEP_BYTES : TILE_BYTES);
                bulk_copy(target, source + (u64)page0 * P.page_stride, TILE_BYTES, bar);
                if (page1 != ~0u) bulk_copy(target + TILE_BYTES, source + (u64)page1 * P.page_stride, TILE_BYTES, bar);
            } else {
                const u32 offset = PAGE == 64 ? (ahead & 1) * STEP_BYTES : 0;
                barrier_expect(bar, STEP_BYTES);
                bulk_copy(target, source + (u64)page0 * P.page_stride + offset, STEP_BYTES, bar);
            }
        }
        fill = fill + 1 == STAGES ? 0 : fill + 1;
        ahead++;
        if (--left == 0) return;
        if (--ahead_left == 0) {
            const int4 item = next_item(P, filling[warp]);
            ahead = item.z, ahead_left = item.w;
            __syncwarp(); // everybody has read what is overwritten, and
            if (lane == 0) filling[warp] = item, aim(item);
            __syncwarp(); // nobody reads the next time before it is
        }
        if (lane == 0) look_up_page();
    };
    if (left && lane == 0) aim(filling[warp]);

    // q: neighbouring warps that begin with the same item share the work of rotating it. It is read before the ring begins,
    // because whatever is read later waits until the ring is full.
    __syncthreads();
    {
        const int4 first = reading[warp], other = reading[lane % WARPS];
        const u32 group = __ballot_sync(~0u, lane < WARPS && busy[lane % WARPS] && other.x == first.x && other.y == first.y);
        const int leader = __ffs(group) - 1, rank = warp - leader;
        u8* const shared_query = shared + leader * SLICE + STAGES * STEP_BYTES + W_BYTES;
        if (left) {
            const Four raw = load_row(P, first.y, first.x, min(rank, ROWS - 1), lane);
            if (lane == 0) look_up_page();
            fetch();
            rotate_rows(P, raw, shared_query, first.y, first.x, rank, __popc(group), lane);
        }
#if !FIXED
        for (int b = cta; b < P.batch; b += gridDim.x)
            if (span(P, b).count == 0) write_nothing(P, b);
#endif
        __syncthreads();
        if (from < to) load_query(P, Q, shared_query, first.y, first.x, lane);
        __syncthreads(); // a leader may go on to another item, and overwrite
    }
    for (int s = 1; s < STAGES && left > 0; s++) fetch();

    int stage = 0, parity = 0, done = from, step_of_item = here.step;
    u32 dither = lane * 0x3c6ef372u + 0x1234567u;
#pragma unroll 1
    while (done < to) {
        clear(S);
        int4 item = reading[warp];
        const bool begins = step_of_item == 0;
        const int steps = min(item.w - step_of_item, to - done);
        int at = (item.z + step_of_item) * STEP_TOKENS;
#pragma unroll 1
        for (int n = 0; n < steps; n++, at += STEP_TOKENS) {
            barrier_wait(bars + 8 * stage, parity);
            const u8* tiles = slice + stage * STEP_BYTES;
            const bool check = (n & 255) == 255;
#if MASKED
            const bool inner = false;
#else
            const bool inner = at >= Q.inner_from && at + STEP_TOKENS <= Q.inner_to;
#endif
            if (inner) step<false>(P, T, Q, S, tiles, staging, lane, 0, 0, at, dither, check);
            else step<true>(P, T, Q, S, tiles, staging, lane, reading[warp].x, reading[warp].y, at, dither, check);
            __syncwarp();
            if (++stage == STAGES) stage = 0, parity ^= 1;
            if (left > 0) fetch();
        }
        item = reading[warp];
        const bool finished = step_of_item + steps == item.w;
        // the ring is still in use if there is more to come
        float* place = (float*)slice;
#if !FIXED
        // one place for what is kept until the end, another for what is finished at once
        if (done + steps < to)
            place = P.scratch + ((i64)gridDim.x * SLOTS + ((i64)cta_slot * WARPS + warp) * 2 + (begins && finished)) * PARTIAL;
#endif
        save(S, place, lane);
        __syncwarp();
        if (begins && finished) {
            finish(P, place, item.x, item.y, lane);
        } else if (lane == 0) {
            const int slot = begins ? 1 : 0;
            partial[warp][slot] = place;
            owner[warp][slot] = make_int4(item.x, item.y, done - step_of_item, item.w);
            if (slot == 0) ends[warp] = finished;
        }
        done += steps;
        step_of_item = 0;
        if (done < to) {
            item = next_item(P, item);
            if (lane == 0) reading[warp] = item;
            rotate_rows(P, load_row(P, item.y, item.x, 0, lane), query, item.y, item.x, 0, 1, lane);
            __syncwarp();
            load_query(P, Q, query, item.y, item.x, lane);
            __syncwarp();
        }
    }
    __syncthreads();

    // Merge what the CTA's warps have of the same item: a chain of neighbouring warps, led by the one that begins the item, or
    // by the first if an earlier CTA does. Each warp merges some of the values.
    const bool known = lane < WARPS;
    const u32 working = __ballot_sync(~0u, known && busy[lane % WARPS]); // the first so many
    const u32 closing = __ballot_sync(~0u, known && ends[lane % WARPS]);
    const u32 opening = __ballot_sync(~0u, known && partial[lane % WARPS][1]);
    u32 complete = 0; // chains, by leader
    int turn = 0;     // whose it is to merge
#pragma unroll 1
    for (u32 todo = opening << 1 | (partial[0][0] ? 1 : 0); todo; todo &= todo - 1) {
        const int slot = todo & 1 ? 0 : 1, lead = slot ? __ffs(todo) - 2 : 0;
        const u32 close = slot ? closing >> lead >> 1 << lead << 1 : closing;
        const int last = close ? __ffs(close) - 1 : __popc(working) - 1;
        const bool all = slot && close;
        float* target = all ? (float*)(shared + lead * SLICE) + PARTIAL
                            : P.scratch + ((i64)cta_slot * SLOTS + (FIXED ? 0 : slot)) * PARTIAL;
        auto where = [&](int c) -> const float* { return partial[c][c == lead ? slot : 0]; };
        const int quad = (warp - turn + WARPS) % WARPS;
        if (quad < 4 * NB) merge<false>(lead, 1, last + 1, where, target, quad, lane);
        turn = (turn + 4 * NB) % WARPS;
        if (all) complete |= 1u << lead;
        else if (threadIdx.x == 0) pending[slot] = 1, whole[slot] = owner[lead][slot];
    }
    if (complete) { // the same for all threads
        __syncthreads();
        if (complete >> warp & 1) {
            const int4 item = owner[warp][1];
            finish(P, (float*)slice + PARTIAL, item.x, item.y, lane);
        }
    }
    __syncthreads();

    // The CTA that comes last to an item merges what all CTAs have of it.
    if (threadIdx.x < 2 && pending[threadIdx.x]) {
        const int slot = threadIdx.x;
        int4 item = whole[slot];
#if FIXED
        item.z = cta_slot - cta, item.w = item.z + (int)line[0] - 1;
        u32* counter = P.counters + item.z / (int)gridDim.x;
#else
        const i64 begin = item.z;
        item.w = (int)(((begin + item.w) * line[1] - 1) / line[0] / WARPS);
        item.z = (int)(((begin + 1) * line[1] - 1) / line[0] / WARPS);
        u32* counter = P.counters + item.z;
#endif
        __threadfence();
        pending[slot] = atomicAdd(counter, 1) == item.w - item.z;
        if (pending[slot]) *counter = 0;
        __threadfence();
        whole[slot] = item;
    }
    __syncthreads();
#pragma unroll 1
    for (int slot = 0; slot < 2; slot++) {
        if (!pending[slot]) continue;
        const int4 item = whole[slot];
        auto everywhere = [&](int c) -> const float* {
            return P.scratch + ((i64)(item.z + c) * SLOTS + (!FIXED && c == 0 ? 1 : 0)) * PARTIAL;
        };
        const int quad = warp % (4 * NB), share = warp / (4 * NB), shares = WARPS / (4 * NB);
        const int count = item.w - item.z + 1;
        if (share < shares) merge<true>(share, shares, count, everywhere, (float*)(shared + share * SLICE), quad, lane);
        __syncthreads();
        auto shared_out = [&](int c) -> const float* { return (const float*)(shared + c * SLICE); };
        if (share == 0) merge<false>(0, 1, min(shares, count), shared_out, (float*)shared + PARTIAL, quad, lane);
        __syncthreads();
        if (warp == 0) finish(P, (float*)shared + PARTIAL, item.x, item.y, lane);
        __syncthreads();
    }
}
