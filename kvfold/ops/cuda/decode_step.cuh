// The work on 32 tokens: scores, weights, output.
#pragma once

#include "decode_partial.cuh"

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
    if (fresh || drop > 100.f || limit < 2e-34f) { // nothing was summed, or nothing that is left
        limit = most > 0.f ? fminf(fmaxf(most * headroom, 2e-34f), 3e38f) : 0.f; // its reciprocal is finite
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
        S.factor[nb] = S.limit[nb] > 0.f ? __fdividef(65534.f, S.limit[nb]) : 0.f; // a row may have seen nothing yet
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
