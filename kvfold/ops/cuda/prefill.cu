// What prefill attention needs around a library's dense attention: rotating what goes in, and joining and un-rotating what
// comes out.
//
// Defines: QTYPE (of the inputs and the output: 0 bf16, 1 f16), SIGN0 to SIGN3 (signs of the rotation, bit 1 = negative);
// CAPACITY (partial results that merge takes; 1: there is exactly one) and ROTATED (whether any may be in the basis of the
// pages).
//
// De-quantised windows are float16, which has eight times bfloat16's precision but not its range. So K is divided by a
// power of two below the peak of the sequence, and V likewise (expand.cu, `peaks`), and multiplied by LIFT; q is multiplied
// by K's power, and the result by V's and divided by LIFT.
//
// A warp takes 16 vectors, of which lane 4 g + i has coordinates 32 t + 8 i to 32 t + 8 i + 7, t = 0 to 3, of vectors g and
// g + 8: rows of 16 bytes, all in flight before the first is used. In that shape they are the A of mma.m16n8k16, which
// sums over the coordinate's bits 0, 1, 3 and 4 exactly; bits 2, 5 and 6 are in the registers of a lane.

#include "common.cuh"

constexpr int WARPS = 4;  // of a block
constexpr float NORM = 0.08838834764831845f;  // 1 / sqrt(128)

struct Part {
    const void* out; // [rows, heads, 128], strides in elements
    const float* lse;
    i64 out_row, out_head, lse_row, lse_head;
};

struct Merge {
    Part parts[CAPACITY]; // the first `rotated` of them are rotated
    void* out; // [rows, heads, 128], strides in elements
    float* lse;
    const float* peaks; // of K and V
    i64 out_row, out_head, lse_row, lse_head;
    int rows, heads;
    int count, rotated; // parts
};

struct Rotate {
    const void* x; // [rows, heads, 128], strides in elements
    void* out;     // float16 [rows, heads, 128], strides in elements
    i64 x_row, x_head, out_row, out_head;
    int rows, heads;
    int side;  // queries, keys or values
    int first; // block
};

constexpr int JOBS = 3;

struct Rotations {
    Rotate jobs[JOBS]; // in the order of their blocks
    const float* peaks;
};

template <bool HALF>
__device__ __forceinline__ void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if constexpr (HALF) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
}

// B's register for k = 2 i and 2 i + 1, column g: `unit` with the sign of the parity of the bits that an incoming and an
// outgoing coordinate share. A's columns 2 i, 2 i + 1, 2 i + 8 and 2 i + 9 are a lane's coordinates 0 to 3 of four, and
// the result's columns 2 i and 2 i + 1 are its coordinates 0 and 1 of four, or 2 and 3 in a second product.
__device__ __forceinline__ u32 signs(u32 unit, int lane) {
    const int g = lane >> 2, i = lane & 3;
    return unit * 0x10001u ^ (__popc(i & g >> 1) & 1 ? 0x80008000u : 0) ^ (g & 1 ? 0x80000000u : 0);
}

// The Hadamard transform of vectors in words a[0] and a[1] of a lane. Word 2 n + PAIR of the result, not yet packed, is
// y[n][0] and y[n][1] of the first vector, y[n][2] and y[n][3] of the second.
template <bool HALF, int PAIR>
__device__ __forceinline__ void hadamard(const u32 (&a)[2][16], u32 b, float (&y)[8][4]) {
#pragma unroll
    for (int n = 0; n < 8; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) y[n][e] = 0.f;
        multiply<HALF>(y[n], a[0][2 * n], a[1][2 * n], a[0][2 * n + 1], a[1][2 * n + 1], b, PAIR ? b ^ 0x80008000u : b);
    }
#pragma unroll
    for (int k = 1; k < 8; k <<= 1)
#pragma unroll
        for (int n = 0; n < 8; n++)
            if (!(n & k))
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float one = y[n][e], other = y[n | k][e];
                    y[n][e] = one + other, y[n | k][e] = one - other;
                }
}

// Sign bits of a lane's words, where the rotation's signs are negative.
__device__ __forceinline__ void flip(u32 (&words)[2][16], int i) {
    const u32 quarters[4] = {(u32)(SIGN0) >> 8 * i, (u32)(SIGN1) >> 8 * i, (u32)(SIGN2) >> 8 * i, (u32)(SIGN3) >> 8 * i};
#pragma unroll
    for (int m = 0; m < 16; m++) {
        const u32 two = quarters[m >> 2] >> 2 * (m & 3), mask = (two & 1) << 15 | (two & 2) << 30;
        words[0][m] ^= mask, words[1][m] ^= mask;
    }
}

__device__ __forceinline__ void load(u32 (&words)[16], const void* from, i64 at, bool wanted) {
#pragma unroll
    for (int t = 0; t < 4; t++) {
        uint4 four = make_uint4(0, 0, 0, 0);
        if (wanted) four = *(const uint4*)((const u16*)from + at + 32 * t);
        words[4 * t] = four.x, words[4 * t + 1] = four.y, words[4 * t + 2] = four.z, words[4 * t + 3] = four.w;
    }
}

__device__ __forceinline__ void store(const u32 (&words)[16], void* to, i64 at) {
#pragma unroll
    for (int t = 0; t < 4; t++)
        *(uint4*)((u16*)to + at + 32 * t) =
            make_uint4(words[4 * t], words[4 * t + 1], words[4 * t + 2], words[4 * t + 3]);
}

// Into float16, divided by K's or V's power; queries are multiplied by K's, and divided by 64.
template <int PAIR>
__device__ __forceinline__ void rotate_pair(const u32 (&a)[2][16], u32 b, float factor, bool bounded, u32 (&words)[2][16]) {
    float y[8][4], largest = 0.f;
    hadamard<QTYPE == 1, PAIR>(a, b, y);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) largest = fmaxf(largest, fabsf(y[n][e] *= factor));
    if (bounded && largest > 65504.f) { // seldom; infinities and NaN stay
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (fabsf(y[n][e]) > 65504.f && fabsf(y[n][e]) < __uint_as_float(0x7f800000u))
                    y[n][e] = y[n][e] > 0.f ? 65504.f : -65504.f;
    }
#pragma unroll
    for (int n = 0; n < 8; n++)
        words[0][2 * n + PAIR] = pack_f16(y[n][0], y[n][1]), words[1][2 * n + PAIR] = pack_f16(y[n][2], y[n][3]);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 4) rotate(const __grid_constant__ Rotations P) {
    const int lane = threadIdx.x & 31, g = lane >> 2, i = lane & 3, block = blockIdx.x;
    const int job = block < P.jobs[1].first ? 0 : block < P.jobs[2].first ? 1 : 2;
    const Rotate& J = P.jobs[job];
    const int item = (block - J.first) * WARPS + (threadIdx.x >> 5);
    const int head = item % J.heads, row = item / J.heads * 16 + g;
    if (row - g >= J.rows) return wait_for_predecessors();
    u32 a[2][16], words[2][16];
    load(a[0], J.x, row * J.x_row + head * J.x_head + 8 * i, row < J.rows);
    load(a[1], J.x, (row + 8) * J.x_row + head * J.x_head + 8 * i, row + 8 < J.rows);
    wait_for_predecessors(); // of which `peaks` is one; x was complete before that
    const float power = power_below(P.peaks[J.side == 2]);
    // The products are with 2^-8, so that no sum of 128 bfloat16 overflows; 64 is room for large scores.
    const float factor = 256.f * NORM * (J.side ? reciprocal(power) * LIFT : power * 0.015625f);
    const u32 b = signs(QTYPE == 1 ? 0x1C00u : 0x3B80u, lane);
    flip(a, i);
    rotate_pair<0>(a, b, factor, J.side == 0, words);
    rotate_pair<1>(a, b, factor, J.side == 0, words);
    const i64 at = head * J.out_head + row * J.out_row + 8 * i;
    if (row < J.rows) store(words[0], J.out, at);
    if (row + 8 < J.rows) store(words[1], J.out, at + 8 * J.out_row);
}

template <int PAIR>
__device__ __forceinline__ void add_rotated(const u32 (&a)[2][16], u32 b, const float (&factor)[2], bool first,
                                            float (&o)[8][4]) {
    float y[8][4];
    hadamard<true, PAIR>(a, b, y);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) o[n][e] = first ? factor[e >> 1] * y[n][e] : fmaf(factor[e >> 1], y[n][e], o[n][e]);
}

template <int PAIR>
__device__ __forceinline__ void add_plain(const u32 (&a)[2][16], const float (&factor)[2], bool first, float (&o)[8][4]) {
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const u32 word = a[e >> 1][2 * n + PAIR], bits = e & 1 ? word >> 16 : word & 0xffffu;
            const float x = QTYPE == 1 ? half_to_float(bits) : bf16_to_float(bits);
            o[n][e] = first ? factor[e >> 1] * x : fmaf(factor[e >> 1], x, o[n][e]);
        }
}

__device__ __forceinline__ float lse_of(const Part& part, int row, int head) {
    return part.lse[row * part.lse_row + head * part.lse_head];
}

// Sums are kept with the rotation's signs on them, which the output's last step takes off. A part may be where the result
// goes: a lane has read a vector's coordinates of all parts before it writes them, and a warp all log-sum-exps.
extern "C" __global__ void __launch_bounds__(32 * WARPS, CAPACITY == 1 ? 4 : 2) merge(const __grid_constant__ Merge P) {
    const int lane = threadIdx.x & 31, g = lane >> 2, i = lane & 3, item = blockIdx.x * WARPS + (threadIdx.x >> 5);
    const int head = item % P.heads, row = item / P.heads * 16 + g;
    const int count = CAPACITY == 1 ? 1 : P.count, rotated = CAPACITY == 1 ? ROTATED : P.rotated;
    wait_for_predecessors();
    if (row - g >= P.rows) return;
    const float nothing = -__uint_as_float(0x7f800000u);
    float total[2], base[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int r = row + 8 * h;
        float top = nothing;
#pragma unroll 1
        for (int p = 0; p < count; p++)
            if (r < P.rows) top = fmaxf(top, lse_of(P.parts[p], r, head)); // passes over NaN, which the sum below finds
        base[h] = top == nothing ? 0.f : top;
        total[h] = 0.f;
#pragma unroll 1
        for (int p = 0; p < count; p++)
            if (r < P.rows) total[h] += expf(lse_of(P.parts[p], r, head) - base[h]);
    }
    const u32 b = signs(0x3C00u, lane);
    const float power = ROTATED && rotated ? power_below(P.peaks[1]) * (NORM / LIFT) : 1.f;
    float o[2][8][4];
#pragma unroll 1
    for (int p = 0; p < count; p++) {
        const Part& part = P.parts[p];
        u32 a[2][16];
        float factor[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int r = row + 8 * h;
            load(a[h], part.out, r * part.out_row + head * part.out_head + 8 * i, r < P.rows);
            const float lse = r < P.rows ? lse_of(part, r, head) : nothing, weight = expf(lse - base[h]);
            // What weighs nothing may be anything. Without a log-sum-exp there are zeros, or FlashAttention-3 has summed
            // NaN: these have to reach the result.
#pragma unroll
            for (int m = 0; m < 16; m++)
                if (weight == 0.f && lse != nothing) a[h][m] = 0;
            factor[h] = total[h] == 0.f ? 0.f : weight / total[h];
            if (p < rotated) factor[h] *= power;
        }
        if (ROTATED && p < rotated) {
            add_rotated<0>(a, b, factor, p == 0, o[0]);
            add_rotated<1>(a, b, factor, p == 0, o[1]);
        } else {
            if (ROTATED) flip(a, i);
            add_plain<0>(a, factor, p == 0, o[0]);
            add_plain<1>(a, factor, p == 0, o[1]);
        }
    }
    u32 words[2][16];
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int m = 0; m < 16; m++) {
            const float x = o[m & 1][m >> 1][2 * h], y = o[m & 1][m >> 1][2 * h + 1];
            words[h][m] = QTYPE == 1 ? pack_f16(x, y) : pack_bf16(x, y);
        }
    if (ROTATED) flip(words, i);
    __syncwarp();
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int r = row + 8 * h;
        if (r >= P.rows) continue;
        store(words[h], P.out, r * P.out_row + head * P.out_head + 8 * i);
        if (i == 0) P.lse[r * P.lse_row + head * P.lse_head] = base[h] + logf(total[h]);
    }
}
