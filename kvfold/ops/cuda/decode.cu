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
#define SLOT_BYTES (STEP_BYTES + 16) // of the ring: a step and its mbarrier
#define COPIES (PAGE == 16 ? 2 : 1)  // of a step
#define WINDOW (32 / COPIES)         // steps whose addresses the lanes of a warp know
#define V_CODES (TILE_TOKENS * D / 8 * KBITS)
#define SCALES (TILE_TOKENS * D / 8 * (KBITS + VBITS))
#define THREADS (32 * WARPS)
#define ROWS (4 * NB)
#define PARTIAL (NB * 18 * 32) // floats of a partial result: 16 outputs, reference and sum of a lane's row, 32 lanes
#define Q_BYTES (ROWS * 256 + ROWS * 8) // a rotated query block
#define SLOTS (FIXED ? 1 : 2) // partial results of a CTA
#define PLACES 3 // of a warp in scratch
#define HEADROOM 4.f // of the weights' reference over the first weights, if more follow
#define SLACK 32 // pieces may be longer than equal stretches by one part in so many
#define CHECKED 256 // steps after which integer sums may be too large
#define NOTHING -1e30f

struct Params { // what is needed first comes first: constants arrive by lines
    const void* seq_lens;
    const void* first;
    const void* query_start;
    int batch, num_queries, heads, row_blocks, group;
    int lag, window; // window 0: none
    int wide;        // bit 0: seq_lens is int64, bit 1: first, bit 2: query_start
    u32 largest_piece; // of an item, see deal()
    u64 warps_inverse; // 2^64 over the number of warps, rounded up
    const int* table;
    const void* q;
    const u8* pages;
    u32 page_stride;
    int table_stride, pages_per_sequence;
    u32 table_bytes, q_bytes; // how far they reach
    u32 minus_one, low_nibbles; // -1 and 0x0f0f0f0f, kept from the compiler, which would use them worse
    float scale_log2; // score scale * log2(e)
    i64 q_stride_b, q_stride_t, q_stride_h;
    float* scratch; // partial results of CTAs [grid, 2], then of warps [grid, WARPS, 3]; FIXED: of CTAs alone [grid]
    u32* counters;  // [CTAs]: all zero before and after
    void* out;
    float* lse;
    const u8* mask;
    i64 mask_stride_b, mask_stride_t;
    int splits, begin; // FIXED only: of a sequence; the first sequence of this launch
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
// x >> 16 by a dot product: the multiplier is idle, the integer unit is not.
__device__ __forceinline__ u32 upper(u32 x) {
    u32 r;
    asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(0x0100u), "r"(0u));
    return r;
}
// Bits of x where mask is set, of y elsewhere: one instruction, if the mask is no constant.
__device__ __forceinline__ u32 select(u32 x, u32 y, u32 mask) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(r) : "r"(x), "r"(y), "r"(mask));
    return r;
}
// The larger one, or NaN if one is.
__device__ __forceinline__ float max_nan(float x, float y) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
    return r;
}
// An 8 x 8 matrix of 16-bit elements, two neighbouring ones of row lane / 4 in each lane: rows become columns.
__device__ __forceinline__ u32 transpose(u32 x) {
    u32 r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
    return r;
}
// x, in a register: without this the compiler computes it anew in each step.
__device__ __forceinline__ u32 pin(u32 x, u32 lane) { return __shfl_sync(~0u, x, lane); }
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
__device__ __forceinline__ float reciprocal_of(u32 x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"((float)x));
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

__device__ __forceinline__ void barrier_init(u32 bar, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
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

// Shared memory by its address. Volatile: the copies that write it are nothing that the compiler sees.
__device__ __forceinline__ u32 load_4(u32 from) {
    u32 r;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(from));
    return r;
}
__device__ __forceinline__ uint2 load_8(u32 from) {
    uint2 r;
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(r.x), "=r"(r.y) : "r"(from));
    return r;
}
__device__ __forceinline__ uint4 load_16(u32 from) {
    uint4 r;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(from));
    return r;
}

// Adds to a counter: all that this CTA wrote before is seen by whoever reads the sum, and the other way round.
__device__ __forceinline__ u32 add_release_acquire(u32* counter, u32 x) {
    u32 before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(x) : "memory");
    return before;
}

// Past L1, from global or shared memory.
__device__ __forceinline__ float4 load_coherent(const float4* from) {
    float4 r;
    asm volatile("ld.relaxed.gpu.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(r.x), "=f"(r.y), "=f"(r.z), "=f"(r.w) : "l"(from) : "memory");
    return r;
}
__device__ __forceinline__ float2 load_coherent(const float2* from) {
    float2 r;
    asm volatile("ld.relaxed.gpu.v2.f32 {%0,%1}, [%2];" : "=f"(r.x), "=f"(r.y) : "l"(from) : "memory");
    return r;
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

__device__ __forceinline__ u32 bits_of(const Four& v) {
#if QTYPE == 2
    return bits(v.x) | bits(v.y) | bits(v.z) | bits(v.w);
#else
    return v.x | v.y;
#endif
}

// An item is a sequence and `hr`, which numbers KV heads and blocks of query rows. Most calls need no division for these.
__device__ __forceinline__ int head_of(const Params& P, int hr) { return P.row_blocks == 1 ? hr : hr / P.row_blocks; }
__device__ __forceinline__ int block_of(const Params& P, int hr) { return P.row_blocks == 1 ? 0 : hr % P.row_blocks; }
__device__ __forceinline__ int token_of(const Params& P, int row) { return P.num_queries == 1 ? 0 : row / P.group; }

// Four neighbouring coordinates of each row of an item, as they are.
__device__ __forceinline__ void load_rows(const Params& P, Four (&raw)[ROWS], int hr, int b, int lane) {
    const int h = head_of(P, hr), last = P.num_queries * P.group - 1;
    int row = min(block_of(P, hr) * ROWS, last), t = token_of(P, row), j = row - t * P.group;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const i64 at = b * P.q_stride_b + t * P.q_stride_t + (h * P.group + j) * P.q_stride_h + 4 * lane;
        raw[r] = *(const Four*)((const u8*)P.q + at * (QTYPE == 2 ? 4 : 2));
        if (row++ < last && ++j == P.group) j = 0, t++;
    }
}

// Products with the Hadamard matrix, not normalised; a lane holds four neighbouring coordinates.
__device__ __forceinline__ float4 hadamard(float4 v, int lane) {
    const float u0 = v.x + v.y, u1 = v.x - v.y, u2 = v.z + v.w, u3 = v.z - v.w;
    v = make_float4(u0 + u2, u1 + u3, u0 - u2, u1 - u3);
#pragma unroll
    for (int k = 1; k < 32; k <<= 1) {
        const float own = lane & k ? -1.f : 1.f;
        v.x = fmaf(own, v.x, __shfl_xor_sync(~0u, v.x, k)), v.y = fmaf(own, v.y, __shfl_xor_sync(~0u, v.y, k));
        v.z = fmaf(own, v.z, __shfl_xor_sync(~0u, v.z, k)), v.w = fmaf(own, v.w, __shfl_xor_sync(~0u, v.w, k));
    }
    return v;
}

// Rotate rows of an item (those with number `rank` modulo `ranks`) and cut them into bytes: [row][high, low][128
// coordinates], and for each row the value of a unit and the sum.
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
        Q.b[nb][0] = v.x, Q.b[nb][1] = v.y, Q.b[nb][2] = v.z, Q.b[nb][3] = v.w;
        Q.b[nb][4] = w.x, Q.b[nb][5] = w.y, Q.b[nb][6] = w.z, Q.b[nb][7] = w.w;
        const int2 sums = ((const int2*)(from + ROWS * 256))[nb * 4 + i];
        Q.unit[nb] = flt((u32)sums.x), Q.half_sum[nb] = sums.y;
    }
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

// Partial results that are merged, in the order of the tokens: the first and the last lie anywhere, those between at equal
// distances.
struct Chain {
    const float *first, *last, *begin; // begin: where the first would lie if it were one of those between
    int distance, count;
};

// Merge one quad of the results first, first + stride... of a chain. What other CTAs wrote comes past L1, which nobody keeps
// coherent. Four at a time, so that loads do not wait for each other. It is not inlined because instructions that were
// fetched once are at hand the next time. The result is a partial result again, or rows of 128 coordinates and then the
// references and sums of rows.
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
    if (rows) {
        const int g = lane >> 2, row = (quad & ~3) + (lane & 3);
        float* const at_row = to + row * D + (VBITS == 4 ? 8 : 16) * g + 2 * (quad & 3);
        *(float2*)at_row = make_float2(o.x, o.z);
        *(float2*)(at_row + (VBITS == 4 ? 64 : 8)) = make_float2(o.y, o.w);
        if (lane < 4 && (quad & 3) == 0) ((float2*)(to + ROWS * D))[row] = make_float2(top, total);
    } else {
        ((float4*)to)[at] = o;
        if ((quad & 3) == 0) ((float2*)(to + NB * 512))[state] = make_float2(top, total);
    }
}

// Normalise, un-rotate and write a row of an item.
__device__ __forceinline__ void finish(const Params& P, const float* from, int b, int hr, int r, int lane) {
    const int row = block_of(P, hr) * ROWS + r;
    if (row >= P.num_queries * P.group) return;
    const float4 v = ((const float4*)(from + r * D))[lane];
    const float2 state = ((const float2*)(from + ROWS * D))[r];
    const float top = state.x, total = state.y;
    const float norm = total == 0.f ? 0.f : 0.08838834764831845f / total;
    const float4 turned = hadamard(make_float4(v.x * norm, v.y * norm, v.z * norm, v.w * norm), lane);
    const int t = token_of(P, row), head = head_of(P, hr) * P.group + row - t * P.group, query_heads = P.heads * P.group;
    const i64 at = (((i64)b * P.num_queries + t) * query_heads + head) * D + 4 * lane;
    const u32 flips = signs(lane >> 3) >> (4 * (lane & 7));
    const float y0 = flt(bits(turned.x) ^ (flips << 31)), y1 = flt(bits(turned.y) ^ (flips >> 1 << 31));
    const float y2 = flt(bits(turned.z) ^ (flips >> 2 << 31)), y3 = flt(bits(turned.w) ^ (flips >> 3 << 31));
#if QTYPE == 2
    *(float4*)((float*)P.out + at) = make_float4(y0, y1, y2, y3);
#else
    *(uint2*)((unsigned short*)P.out + at) = make_uint2(pack2(y0, y1), pack2(y2, y3));
#endif
    if (lane == 0)
        P.lse[((i64)b * query_heads + head) * P.num_queries + t] =
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

// What a lane needs in each step and the compiler would compute anew. The first words of the byte tables are among them: a
// constant, or anything that is known to be the same in all lanes, would be copied before each of its hundred uses.
struct Lane {
    u32 k_low, k_high, v_low, v_high;
    u32 k0, k1, scales, v, v_top; // where its rows of K, its tokens' scales, its codes of V and their top bits lie in a tile
    u32 scale_order, word_order; // selectors: of the first token's scale in a pair, of the weights' operand
    u32 minus_one, low_nibbles;
};

__device__ __forceinline__ int swapped(int lane) { return __popc(lane >> 2) & 1; }

__device__ __forceinline__ Lane lane_constants(const Params& P, int lane) {
    const u32 g = lane >> 2, i = lane & 3, zero = (P.minus_one + 1) * lane; // a zero that the compiler does not know
    Lane L;
    L.k_low = pin(KT0 + zero, lane), L.k_high = KBITS == 4 ? pin(KU0 + zero, lane) : 0;
    L.v_low = VBITS == KBITS ? L.k_low : pin(VT0 + zero, lane);
    L.v_high = VBITS == KBITS ? L.k_high : VBITS == 4 ? pin(VU0 + zero, lane) : 0;
    // rows g and g + 8 of the product are tokens 2 g and 2 g + 1, in an order that avoids bank conflicts
    const u32 row = KBITS == 4 ? 64 : 32, part = KBITS == 4 ? 16 : 8;
    L.k0 = pin((2 * g + swapped(lane)) * row + part * i, lane);
    L.k1 = pin((2 * g + 1 - swapped(lane)) * row + part * i, lane);
    L.scales = pin(4 * g, lane);
    L.v = pin(V_CODES + 64 * g + 16 * i, lane);
    L.v_top = VBITS == 3 ? pin(V_CODES + 512 + 64 * (g >> 1) + 16 * i, lane) : 0;
    L.scale_order = pin(swapped(lane) ? 0x3244u : 0x1044u, lane);
    L.word_order = pin(__popc(2 * i) & 1 ? 0x1054u : 0x5410u, lane);
    L.minus_one = pin(P.minus_one, lane), L.low_nibbles = pin(P.low_nibbles, lane);
    return L;
}

// --- one step: 32 tokens ---------------------------------------------------------------------------------------------------

// Sums in units that are 2^shift times as large.
__device__ __forceinline__ void lower(State& S, int nb, int shift) {
    const u32 half = (1u << shift) >> 1;
    S.weights[nb] = (S.weights[nb] + half) >> shift;
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int c = 0; c < 4; c++) S.acc[nb][j][c] = (S.acc[nb][j][c] + (int)half) >> shift;
}

// Raise the references of a row so that the weights of this step fit, and bring what was summed to them. The first time
// there is nothing to bring; later the factors are powers of two, and integers are shifted.
__device__ __forceinline__ void move_references(State& S, int nb, const float (&s)[4], const float (&vs)[4], float headroom) {
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
    int shift = 0;
    if (fresh || limit < 1e-30f) { // nothing was summed, or nothing that is left
        limit = fminf(most * headroom, 3e38f);
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
    if (!__all_sync(~0u, shift == 0)) lower(S, nb, shift);
}

// A weight of a step that fits adds at most 2^20 to a sum: a look at the sums every CHECKED steps keeps them in 31 bits.
__device__ __forceinline__ void relieve(State& S) {
#pragma unroll
    for (int nb = 0; nb < NB; nb++) {
        int large = (int)(S.weights[nb] >> 1);
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) large = max(large, abs(S.acc[nb][j][c]));
        if (__reduce_max_sync(~0u, large) <= 1 << 29) continue;
        S.limit[nb] = fminf(S.limit[nb] * 8.f, 3e38f);
        S.factor[nb] = __fdividef(65534.f, S.limit[nb]);
        lower(S, nb, 3);
    }
}

// Words of a K row for the four k-steps of a lane: eight codes each, in eight nibbles.
__device__ __forceinline__ void load_k(u32 tile, u32 at, u32 (&w)[4]) {
#if KBITS == 4
    const uint4 v = load_16(tile + at);
    w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
#else
    const uint2 v = load_8(tile + at);
#if KBITS == 2
    w[0] = v.x & 0x33333333u, w[1] = (v.x >> 2) & 0x33333333u;
    w[2] = v.y & 0x33333333u, w[3] = (v.y >> 2) & 0x33333333u;
#else
    const u32 h = load_4(tile + 512 + at / 2);
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
__device__ __forceinline__ void step(const Params& P, const Lane& L, const Query& Q, State& S, u32 tiles, int lane,
                                     int b, int hr, int at, u32& dither, float headroom) {
    // scores: K q, as integers with a factor
    float x[NB][4], unit[NB][4], vs[4];
    {
        float ks[4];
        // with one block of rows each look-up has sums of its own, so that products wait less for each other
        constexpr bool APART = NB == 1 && KBITS == 4;
        int c[2][NB][4], d[2][NB][4];
#pragma unroll
        for (int a = 0; a < 2; a++) {
            const u32 tile = tiles + a * TILE_BYTES;
            const u32 kw = load_4(tile + L.scales + SCALES), vw = load_4(tile + L.scales + (SCALES + 32));
            const u32 first = L.scale_order, second = first ^ 0x2200u;
            ks[2 * a] = flt(prmt(kw, 0, first)), ks[2 * a + 1] = flt(prmt(kw, 0, second));
            vs[2 * a] = flt(prmt(vw, 0, first)), vs[2 * a + 1] = flt(prmt(vw, 0, second));
            u32 w0[4], w1[4];
            load_k(tile, L.k0, w0);
            load_k(tile, L.k1, w1);
#pragma unroll
            for (int nb = 0; nb < NB; nb++)
#pragma unroll
                for (int e = 0; e < 4; e++) c[a][nb][e] = e & 1 ? Q.half_sum[nb] : 0, d[a][nb][e] = 0;
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const u32 h0 = upper(w0[k]), h1 = upper(w1[k]);
                u32 a0 = prmt(L.k_low, KT1, w0[k]), a1 = prmt(L.k_low, KT1, w1[k]);
                u32 a2 = prmt(L.k_low, KT1, h0), a3 = prmt(L.k_low, KT1, h1);
#pragma unroll
                for (int nb = 0; nb < NB; nb++) mma_s8(c[a][nb], a0, a1, a2, a3, Q.b[nb][2 * k], Q.b[nb][2 * k + 1]);
#if KBITS == 4
                a0 = prmt(L.k_high, KU1, complement(w0[k], L.minus_one)), a1 = prmt(L.k_high, KU1, complement(w1[k], L.minus_one));
                a2 = prmt(L.k_high, KU1, complement(h0, L.minus_one)), a3 = prmt(L.k_high, KU1, complement(h1, L.minus_one));
#pragma unroll
                for (int nb = 0; nb < NB; nb++) mma_s8(APART ? d[a][nb] : c[a][nb], a0, a1, a2, a3, Q.b[nb][2 * k], Q.b[nb][2 * k + 1]);
#endif
            }
        }
#pragma unroll
        for (int nb = 0; nb < NB; nb++)
#pragma unroll
            for (int t = 0; t < 4; t++) {
                const int a = t >> 1, e = 2 * (t & 1);
                int sum = c[a][nb][e] * 256 + c[a][nb][e + 1];
                if (APART) sum += d[a][nb][e] * 256 + d[a][nb][e + 1];
                x[nb][t] = (float)sum;
                unit[nb][t] = Q.unit[nb] * ks[t];
#if SOFTCAP
                {
                    const float z = x[nb][t] * unit[nb][t] * P.softcap_inv; // tanh by exp2: tanh.approx is too coarse
                    const float e = ex2(fminf(fabsf(z), 20.f) * 2.8853900817779268f);
                    const float y = (e - 1.f) / (e + 1.f);
                    x[nb][t] = z == z ? (z < 0.f ? -y : y) : z, unit[nb][t] = P.softcap_log2;
                }
#endif
            }
    }
    if (EDGE) {
        const int g = lane >> 2, swap = swapped(lane);
#pragma unroll
        for (int t = 0; t < 4; t++) {
            const int j = at + 16 * (t >> 1) + 2 * g + (t & 1 ? 1 - swap : swap);
            bool any = false;
#pragma unroll
            for (int nb = 0; nb < NB; nb++) {
                bool seen = j >= Q.from[nb] && j < Q.to[nb];
#if MASKED
                if (seen) {
                    const int rows = P.num_queries * P.group;
                    const int row = min((hr % P.row_blocks) * ROWS + nb * 4 + (lane & 3), rows - 1);
                    seen = P.mask[b * P.mask_stride_b + (row / P.group) * P.mask_stride_t + j] != 0;
                }
#endif
                if (!seen) x[nb][t] = -flt(0x7f800000u), unit[nb][t] = 1.f;
                any |= seen;
            }
            // what nobody wrote may be NaN or huge: no row of this lane may meet it
            if (!any) vs[t] = 0.f;
        }
    }

    // weights: exp2(score - top) * V scale, in 16-bit fixed point
    dither += 0x9e3779b9u;
    const float d0 = flt((dither >> 9) | 0x3f800000u) - 1.5f, d1 = -d0;
    u32 pb[NB][2];
#pragma unroll
    for (int nb = 0; nb < NB; nb++) {
        float p[4], w[4];
#pragma unroll
        for (int t = 0; t < 4; t++) {
            p[t] = ex2(fmaf(x[nb][t], unit[nb][t], -S.top[nb]));
            w[t] = p[t] * vs[t];
            if (EDGE && NB > 1 && x[nb][t] == -flt(0x7f800000u)) w[t] = 0.f;
        }
        float total = S.total[nb] + ((p[0] + p[1]) + (p[2] + p[3]));
        const float most = max_nan(max_nan(w[0], w[1]), max_nan(w[2], w[3]));
        if (__builtin_expect(__any_sync(~0u, !(most <= S.limit[nb]) || !(total < 1e18f)), 0)) {
            float s[4], own[4];
#pragma unroll
            for (int t = 0; t < 4; t++) {
                s[t] = x[nb][t] * unit[nb][t];
                own[t] = EDGE && NB > 1 && x[nb][t] == -flt(0x7f800000u) ? 0.f : vs[t];
            }
            move_references(S, nb, s, own, headroom);
            total = S.total[nb];
#pragma unroll
            for (int t = 0; t < 4; t++) {
                p[t] = ex2(s[t] - S.top[nb]);
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
        // from rows of tokens to columns: high and low bytes of the first tokens of both tiles, then of the second ones
        const u32 first = transpose(prmt(y[0], y[2], 0x4051)), second = transpose(prmt(y[1], y[3], 0x4051));
        pb[nb][0] = prmt(first, second, L.word_order);
        pb[nb][1] = prmt(first, second, L.word_order ^ 0x6666u);
    }

    // output: V^T w
    const u32 codes = tiles + L.v;
    const uint4 xa = load_16(codes), ya = load_16(codes + TILE_BYTES);
#if VBITS == 4
    const uint4 xb = load_16(codes + 512), yb = load_16(codes + (512 + TILE_BYTES));
    const u32 xs[2][4] = {{xa.x, xa.y, xa.z, xa.w}, {xb.x, xb.y, xb.z, xb.w}};
    const u32 ys[2][4] = {{ya.x, ya.y, ya.z, ya.w}, {yb.x, yb.y, yb.z, yb.w}};
#else
    const u32 xs[4] = {xa.x, xa.y, xa.z, xa.w}, ys[4] = {ya.x, ya.y, ya.z, ya.w};
#if VBITS == 3
    const u32 top_bits = tiles + L.v_top;
    const uint4 ha = load_16(top_bits), ka = load_16(top_bits + TILE_BYTES);
    const u32 hs[4] = {ha.x, ha.y, ha.z, ha.w}, ks[4] = {ka.x, ka.y, ka.z, ka.w};
    const u32 shift = lane >> 1 & 2;
#endif
#endif
#pragma unroll
    for (int byte = 0; byte < 4; byte++) {
        u32 code[2][2]; // [nibble of the byte][row g, row g + 8]
#if VBITS == 4
        interleave(xs[0][byte], ys[0][byte], L.low_nibbles, code[0][0], code[1][0]);
        interleave(xs[1][byte], ys[1][byte], L.low_nibbles, code[0][1], code[1][1]);
#else
        u32 pair[2];
        interleave(xs[byte], ys[byte], L.low_nibbles, pair[0], pair[1]);
#if VBITS == 3
        u32 top[2];
        interleave(hs[byte], ks[byte], L.low_nibbles, top[0], top[1]);
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
            const u32 e = code[n][0], f = code[n][1], eh = upper(e), fh = upper(f);
            u32 a0 = prmt(L.v_low, VT1, e), a1 = prmt(L.v_low, VT1, f);
            u32 a2 = prmt(L.v_low, VT1, eh), a3 = prmt(L.v_low, VT1, fh);
#pragma unroll
            for (int nb = 0; nb < NB; nb++) mma_u8(S.acc[nb][j], a0, a1, a2, a3, pb[nb][0], pb[nb][1]);
#if VBITS == 4
            a0 = prmt(L.v_high, VU1, complement(e, L.minus_one)), a1 = prmt(L.v_high, VU1, complement(f, L.minus_one));
            a2 = prmt(L.v_high, VU1, complement(eh, L.minus_one)), a3 = prmt(L.v_high, VU1, complement(fh, L.minus_one));
#pragma unroll
            for (int nb = 0; nb < NB; nb++) mma_u8(S.acc[nb][j], a0, a1, a2, a3, pb[nb][0], pb[nb][1]);
#endif
        }
    }
}

// --- the kernel --------------------------------------------------------------------------------------------------------

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

// What a warp has not yet looked up the addresses of: from a step of an item on, so many steps.
struct Copies {
    int4 item;
    int step, left;
};

// The addresses of the next `steps` steps, for as many times COPIES lanes from `first` on. 0: there is no such page.
__device__ __forceinline__ void look_up(const Params& P, Copies& copies, u64& source, u32 first, int steps, u32 lane) {
    Copies c = copies;
    const int mine = (lane - first) / COPIES; // huge for lanes before the first
#pragma unroll 1
    for (int done = 0; done < steps && c.left > 0;) {
        if (c.step == c.item.w) c.item = next_item(P, c.item), c.step = 0;
        const int n = min(min(steps - done, c.item.w - c.step), c.left);
        if (mine >= done && mine < done + n) {
            const int step = c.item.z + c.step + mine - done;
            const int page = step * STEP_TOKENS / PAGE + (PAGE == 16 ? lane & 1 : 0);
            source = 0;
            if (PAGE > 16 || page < P.pages_per_sequence) {
                source = (u64)P.pages + (u64)(u32)P.table[(i64)c.item.x * P.table_stride + page] * P.page_stride;
                source += head_of(P, c.item.y) * (PAGE / 16 * TILE_BYTES) + (PAGE == 64 ? (step & 1) * STEP_BYTES : 0);
            }
        }
        done += n, c.step += n, c.left -= n;
    }
    __syncwarp(); // everybody has read
    if (lane == 0) copies = c;
    __syncwarp();
}

#if !FIXED
// --- the split -----------------------------------------------------------------------------------------------------------

// How the steps of all sequences are dealt out to the warps of the grid.
struct Deal {
    u32 total; // steps of all items
    u32 piece; // 0: each warp gets an equal stretch of the line. Else each item is cut into pieces of at most so many steps
    u32 warps; // that have work, the first ones
};

// n / divisor, rounded down; exact for n below 2^20.
__device__ __forceinline__ u32 quotient(u32 n, float inverse) { return (u32)(((float)n + 0.5f) * inverse); }

// How often a number of steps, or of pieces, of a sequence occurs over all of them.
template <typename Units>
__device__ __forceinline__ u32 sum_units(const Params& P, int first, int lane, Units units) {
    u32 sum = units(first);
#pragma unroll 1
    for (int b = 32 + lane; b < P.batch; b += 32) sum += units(span(P, b).count);
    return __reduce_add_sync(~0u, sum) * (P.heads * P.row_blocks);
}

// Whole pieces are better, as no warp has to change from one item to another, if they make no warp much slower.
__device__ __forceinline__ Deal deal(const Params& P, int first, int lane) {
    const u32 all = gridDim.x * WARPS;
    Deal d;
    d.total = sum_units(P, first, lane, [](int steps) { return (u32)steps; });
    d.piece = 0, d.warps = all;
    const u32 least = max((u32)__umul64hi((u64)d.total + all - 1, P.warps_inverse), 1u);
    if (least > P.largest_piece) return d;
#pragma unroll 1
    for (u32 piece = least; piece <= least + max(2u, least / SLACK); piece++) {
        const float inverse = reciprocal_of(piece);
        const u32 pieces = sum_units(P, first, lane, [&](int steps) { return quotient(steps + piece - 1, inverse); });
        if (pieces <= all) {
            d.piece = piece, d.warps = pieces;
            break;
        }
    }
    return d;
}

// The warp that has a place of the line. The division is exact, as the product is below 2^53.
__device__ __forceinline__ int warp_at(const Deal& d, u32 place) {
    return (int)((double)(((u64)place + 1) * d.warps - 1) / (double)d.total);
}
#endif

// --- the kernel ----------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode(const __grid_constant__ Params P) {
    extern __shared__ __align__(128) u8 shared[];
#if !FIXED
    // of warps that may change from one item to the next: [0] of an item that an earlier warp begins, [1] of one that a later
    // warp ends: where the partial result lies, and (b, hr, first and last warp of the grid)
    __shared__ float* partial[WARPS][2];
    __shared__ int4 owner[WARPS][2];
    __shared__ int ends[WARPS]; // whether [0] is the end of its item
#endif
    __shared__ int4 reading[WARPS]; // the items that warps attend to
    __shared__ int2 covering[WARPS]; // the first and last warps that have to do with these, if warps do not change
    __shared__ int busy[WARPS]; // whether a warp has steps
    __shared__ Copies copying[WARPS];
    __shared__ int pending[2]; // what this CTA is the last to bring to an item, and the item
    __shared__ int4 whole[2];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    u8* slice = shared + warp * SLICE;
    const u32 ring = pin(smem_address(slice), lane);
    const int cta_slot = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;

    if (lane == 0) {
#pragma unroll
        for (int s = 0; s < STAGES; s++) barrier_init(ring + s * SLOT_BYTES + STEP_BYTES, COPIES);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#if !FIXED
        partial[warp][0] = partial[warp][1] = nullptr;
        ends[warp] = 0;
#endif
    }
    if (threadIdx.x < 2) pending[threadIdx.x] = 0;
    const Lane L = lane_constants(P, lane);
    wait_for_predecessors();

    // who does what: so many steps of the line of all steps, from this step of this item on
    int4 item = make_int4(0, 0, 0, 0);
    int begin = 0, copies = 0;
    int first_warp = 0, last_warp = 0; // of the grid that have to do with the item
    bool idle = false;
#if FIXED
    item.x = P.begin + blockIdx.z, item.y = blockIdx.y;
    {
        const Span all = span(P, item.x);
        const int total = all.count, size = max((total + P.splits - 1) / P.splits, WARPS);
        const int ctas = (total + size - 1) / size;
        if (total == 0 && blockIdx.x == 0 && blockIdx.y == 0) write_nothing(P, item.x);
        idle = blockIdx.x >= ctas;
        const int low = blockIdx.x * size, high = min(low + size, total);
        const int active = max(min(high - low, WARPS), 1);
        begin = low + (high - low) * min(warp, active) / active;
        copies = low + (high - low) * min(warp + 1, active) / active - begin;
        item.z = all.begin, item.w = total;
        first_warp = (cta_slot - blockIdx.x) * WARPS, last_warp = first_warp + (ctas - 1) * WARPS + active - 1;
    }
    const bool piecewise = false;
#else
    const Span first32 = lane < P.batch ? span(P, lane) : Span{0, 0};
#endif

    // what everybody needs next comes to L2, a line by each thread
    const u32 line128 = (cta_slot * THREADS + threadIdx.x) * 128;
    if (line128 < P.table_bytes) prefetch_l2((const u8*)P.table + line128);
    if (line128 < P.q_bytes) prefetch_l2((const u8*)P.q + line128);

#if !FIXED
    const Deal plan = deal(P, first32.count, lane);
    const bool piecewise = plan.piece;
    const u32 mine = blockIdx.x * WARPS + warp;
    u32 item_begin = 0; // the item's place in the line
    idle = blockIdx.x * WARPS >= plan.warps;
    if (mine < plan.warps) {
        const u32 items_each = P.heads * P.row_blocks; // of a sequence
        u32 place = mine;
        if (!plan.piece) {
            place = (u32)__umul64hi((u64)plan.total * mine, P.warps_inverse);
            copies = (u32)__umul64hi((u64)plan.total * (mine + 1), P.warps_inverse) - place;
        }
        u32 before = 0, units = 0;
        const float piece_inverse = reciprocal_of(plan.piece);
        const u32 wanted = plan.piece ? quotient(mine, reciprocal_of(items_each)) : place / items_each;
#pragma unroll 1
        for (int base = 0; base < P.batch; base += 32) { // the first sequence whose sum of steps, or pieces, exceeds `wanted`
            const Span s = base == 0 ? first32 : base + lane < P.batch ? span(P, base + lane) : Span{0, 0};
            const u32 own = plan.piece ? quotient(s.count + plan.piece - 1, piece_inverse) : s.count;
            u32 upto = own;
#pragma unroll
            for (int k = 1; k < 32; k <<= 1) {
                const u32 y = __shfl_up_sync(~0u, upto, k);
                if (lane >= k) upto += y;
            }
            const u32 beyond = __ballot_sync(~0u, before + upto > wanted);
            if (beyond) {
                const int at = __ffs(beyond) - 1;
                item.x = base + at;
                item.z = __shfl_sync(~0u, s.begin, at), item.w = __shfl_sync(~0u, s.count, at);
                units = __shfl_sync(~0u, own, at);
                before += __shfl_sync(~0u, upto, at) - units;
                break;
            }
            before += __shfl_sync(~0u, upto, 31);
        }
        const u32 past = place - before * items_each;
        const float units_inverse = reciprocal_of(units);
        item.y = plan.piece ? quotient(past, units_inverse) : past / units;
        begin = past - item.y * units;
        if (plan.piece) { // the pieces' sizes differ by one at most
            const u32 piece = begin, size = quotient(item.w, units_inverse), longer = item.w - size * units;
            begin = size * piece + min(piece, longer), copies = size + (piece < longer);
            first_warp = mine - piece, last_warp = first_warp + units - 1;
        } else {
            item_begin = place - begin;
        }
    }
#endif
    if (idle) {
#if !FIXED
        for (int b = blockIdx.x; b < P.batch; b += gridDim.x)
            if (span(P, b).count == 0) write_nothing(P, b);
#endif
        return;
    }

    Query Q;
    Four raw[ROWS];
    u32 issued = 0;
    u64 source = 0;
    auto fetch = [&](u32 slot) {
        // lane l knows the address of each WINDOW-th copy, and issues it
        if (((lane / COPIES) ^ issued) % WINDOW == 0 && issued < copies) {
            const u32 bar = slot + STEP_BYTES;
            if (PAGE == 16) {
                barrier_expect(bar, source ? TILE_BYTES : 0);
                if (source) bulk_copy(slot + (lane & 1) * TILE_BYTES, source, TILE_BYTES, bar);
            } else {
                barrier_expect(bar, STEP_BYTES);
                bulk_copy(slot, source, STEP_BYTES, bar);
            }
        }
        // in good time: the other half of the lanes has the next ones
        issued++;
        if (__builtin_expect(issued % (WINDOW / 2) == 0, 0))
            look_up(P, copying[warp], source, ~issued / (WINDOW / 2) % 2 * 16, WINDOW / 2, lane);
    };
    if (lane == 0) {
        busy[warp] = copies > 0;
        reading[warp] = item;
        covering[warp] = make_int2(first_warp, last_warp);
        copying[warp] = {item, begin, copies};
    }
    __syncwarp();
    if (copies) {
        look_out(P, Q, item.y, item.x, lane);
        load_rows(P, raw, item.y, item.x, lane);
        look_up(P, copying[warp], source, 0, WINDOW, lane);
    }
    // Whatever is read later waits until the ring is full. So nobody begins to fill it before all have what they read.
    u32 words = (u32)source;
    if (copies) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) words |= bits_of(raw[r]);
    }
    __syncthreads_or(words == 1);
    if (copies) fetch(ring);
    { // neighbouring warps that begin with the same item share the work of rotating q
        const int4 other = reading[lane % WARPS];
        const u32 group = __ballot_sync(~0u, lane < WARPS && busy[lane % WARPS] && other.x == item.x && other.y == item.y);
        const int leader = __ffs(group) - 1;
        u8* const shared_query = shared + leader * SLICE + STAGES * SLOT_BYTES;
        if (copies) rotate_rows(P, raw, shared_query, warp - leader, __popc(group), lane);
#if !FIXED
        for (int b = blockIdx.x; b < P.batch; b += gridDim.x)
            if (span(P, b).count == 0) write_nothing(P, b);
#endif
        __syncthreads();
        if (copies) load_query(Q, shared_query, lane);
#if !FIXED
        if (!plan.piece) __syncthreads(); // a leader may go on to another item, and overwrite
#endif
    }

#pragma unroll 1
    for (int s = 1; s < STAGES && s < copies; s++) fetch(ring + s * SLOT_BYTES);

    State S;
    u32 slot = ring;
    const u32 ring_end = pin(ring + STAGES * SLOT_BYTES, lane);
    int parity = 0;
    u32 dither = lane * 0x3c6ef372u + 0x1234567u;
#pragma unroll 1
    for (int left = copies; left > 0;) {
        clear(S);
        const int steps = min(item.w - begin, left);
        const float headroom = steps == 1 ? 1.f : HEADROOM;
        int at = (item.z + begin) * STEP_TOKENS;
        auto advance = [&]() { // after a step: its slot is free
            __syncwarp();
            fetch(slot);
            slot += SLOT_BYTES;
            if (slot == ring_end) slot = ring, parity ^= 1;
            at += STEP_TOKENS;
        };
        int unchecked = 0;
#pragma unroll 1
        for (int n = 0; n < steps;) {
            // steps of which every row sees all tokens
            const int seen = MASKED || at < Q.inner_from ? 0 : (Q.inner_to - at) / STEP_TOKENS;
            int run = min(min(seen, steps - n), CHECKED - unchecked);
            const int counted = max(run, 1);
            if (run <= 0) {
                barrier_wait(slot + STEP_BYTES, parity);
                step<true>(P, L, Q, S, slot, lane, reading[warp].x, reading[warp].y, at, dither, headroom);
                advance();
            } else {
#pragma unroll 1
                do {
                    barrier_wait(slot + STEP_BYTES, parity);
                    step<false>(P, L, Q, S, slot, lane, 0, 0, at, dither, headroom);
                    advance();
                } while (--run);
            }
            n += counted, unchecked += counted;
            if (unchecked == CHECKED) relieve(S), unchecked = 0;
        }
        left -= steps;
        item = reading[warp];
#if FIXED
        save(S, (float*)slice, lane);
#else
        const bool begins = begin == 0, finished = begin + steps == item.w;
        float* const places = P.scratch + ((i64)gridDim.x * SLOTS + ((i64)cta_slot * WARPS + warp) * PLACES) * PARTIAL;
        // the ring is still in use if there is more to come: one place for what is kept, others for what is finished at once
        float* const place = left ? places + (begins && finished) * PARTIAL : (float*)slice;
        save(S, place, lane);
        if (piecewise) break;
        __syncwarp();
        if (begins && finished) {
            float* const rows = left ? places + 2 * PARTIAL : (float*)slice + PARTIAL;
#pragma unroll 1
            for (int quad = 0; quad < 4 * NB; quad++) merge({place, nullptr, nullptr, 0, 1}, 0, 1, rows, true, quad, lane);
            __syncwarp();
#pragma unroll 1
            for (int r = 0; r < ROWS; r++) finish(P, rows, item.x, item.y, r, lane);
        } else {
            if (lane == 0) {
                partial[warp][begins] = place;
                owner[warp][begins] =
                    make_int4(item.x, item.y, warp_at(plan, item_begin), warp_at(plan, item_begin + item.w - 1));
                if (!begins) ends[warp] = finished;
            }
        }
        if (left) {
            item_begin += item.w;
            item = next_item(P, item);
            begin = 0;
            if (lane == 0) reading[warp] = item;
            look_out(P, Q, item.y, item.x, lane);
            load_rows(P, raw, item.y, item.x, lane);
            u8* const query = slice + STAGES * SLOT_BYTES;
            rotate_rows(P, raw, query, 0, 1, lane);
            __syncwarp();
            load_query(Q, query, lane);
            __syncwarp();
        }
#endif
    }
    __syncthreads();

    const int cta_warp = cta_slot * WARPS; // the first one of this CTA in the grid
    if (FIXED || piecewise) {
        // Each warp has one item. The CTA's warps of an item, from `low` to `high`, merge their partial results.
        const int first_warp = covering[warp].x, last_warp = covering[warp].y;
        const bool any = busy[warp];
        const int low = max(first_warp - cta_warp, 0), high = min(last_warp - cta_warp, WARPS - 1), members = high - low + 1;
        const bool inside = first_warp >= cta_warp && last_warp < cta_warp + WARPS, begun = first_warp < cta_warp;
        float* const target = inside ? (float*)(shared + low * SLICE) + PARTIAL
                                     : P.scratch + ((i64)cta_slot * SLOTS + (FIXED || begun ? 0 : 1)) * PARTIAL;
        float* const slices = (float*)(shared + low * SLICE);
        if (any) {
            const Chain chain = {slices, slices + (members - 1) * (SLICE / 4), slices, SLICE / 4, members};
#pragma unroll 1
            for (int quad = warp - low; quad < 4 * NB; quad += members) merge(chain, 0, 1, target, inside, quad, lane);
        }
        __syncthreads();
        if (any && inside) {
#pragma unroll 1
            for (int r = warp - low; r < ROWS; r += members) finish(P, target, item.x, item.y, r, lane);
        } else if (any && warp == low && lane == 0) {
            pending[!begun] = 1, whole[!begun] = make_int4(item.x, item.y, first_warp, last_warp);
        }
    }
#if !FIXED
    else {
        // Merge what the CTA's warps have of the same item: a chain of neighbouring warps, led by the one that begins the item,
        // or by the first if an earlier CTA does. Each warp merges some of the values.
        const bool known = lane < WARPS;
        const u32 closing = __ballot_sync(~0u, known && ends[lane % WARPS]);
        const u32 opening = __ballot_sync(~0u, known && partial[lane % WARPS][1]);
        u32 complete = 0; // chains, by leader
        int turn = 0;     // whose it is to merge
#pragma unroll 1
        for (u32 todo = opening << 1 | (partial[0][0] ? 1 : 0); todo; todo &= todo - 1) {
            const int slot = todo & 1 ? 0 : 1, lead = slot ? __ffs(todo) - 2 : 0;
            const u32 close = slot ? closing >> lead >> 1 << lead << 1 : closing;
            const int last = close ? __ffs(close) - 1 : WARPS - 1;
            const bool all = slot && close;
            float* target = all ? (float*)(shared + lead * SLICE) + PARTIAL : P.scratch + ((i64)cta_slot * SLOTS + slot) * PARTIAL;
            const int quad = (warp - turn + WARPS) % WARPS;
            if (quad < 4 * NB) {
                const Chain chain = {partial[lead][slot], last > lead ? partial[last][0] : nullptr,
                                     (float*)(shared + lead * SLICE), SLICE / 4, last - lead + 1};
                merge(chain, 0, 1, target, all, quad, lane);
            }
            turn = (turn + 4 * NB) % WARPS;
            if (all) complete |= 1u << lead;
            else if (threadIdx.x == 0) pending[slot] = 1, whole[slot] = owner[lead][slot];
        }
        if (complete) { // the same for all threads
            __syncthreads();
            if (complete >> warp & 1) {
                const int4 its = owner[warp][1];
#pragma unroll 1
                for (int r = 0; r < ROWS; r++) finish(P, (float*)slice + PARTIAL, its.x, its.y, r, lane);
            }
        }
    }
#endif
    __syncthreads();

    // The CTA that comes last to an item merges what all CTAs have of it.
    if (threadIdx.x < 2 && pending[threadIdx.x]) {
        const int4 its = whole[threadIdx.x];
        const int first = its.z / WARPS;
        u32* counter = P.counters + first / (FIXED ? (int)gridDim.x : 1);
        const bool last = add_release_acquire(counter, 1) == its.w / WARPS - first;
        pending[threadIdx.x] = last;
        if (last) *counter = 0;
    }
    __syncthreads();
#pragma unroll 1
    for (int slot = 0; slot < 2; slot++) {
        if (!pending[slot]) continue;
        const int4 its = whole[slot];
        const int quad = warp % (4 * NB), share = warp / (4 * NB), shares = WARPS / (4 * NB);
        // what CTAs left: of the one that begins the item it is [1], of the others [0]
        const int from = its.z / WARPS, count = its.w / WARPS - from + 1;
        const float* const begins = P.scratch + (i64)from * SLOTS * PARTIAL;
        const Chain all = {begins + (SLOTS - 1) * PARTIAL, begins + (i64)(count - 1) * SLOTS * PARTIAL, begins, SLOTS * PARTIAL, count};
        const int used = min(shares, count);
        if (share < used) merge(all, share, shares, (float*)(shared + share * SLICE), false, quad, lane);
        __syncthreads();
        const Chain rest = {(float*)shared, (float*)(shared + (used - 1) * SLICE), (float*)shared, SLICE / 4, used};
        if (share == 0) merge(rest, 0, 1, (float*)shared + PARTIAL, true, quad, lane);
        __syncthreads();
        if (warp < ROWS) finish(P, (float*)shared + PARTIAL, its.x, its.y, warp, lane);
        __syncthreads();
    }
}
