// The work on 32 tokens: scores, weights, output.
#pragma once

#include "decode_codes.cuh"

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

#define PAGES (PAGE == 16 ? 2 : 1) // of a step

// Of a lane's four tokens.
__device__ __forceinline__ constexpr int page_of(int t) { return PAGES == 2 ? t >> 1 : 0; }

// What the key references of a step's pages add to the scores of the lane's rows, in log2.
__device__ __forceinline__ void reference_scores(const Query& Q, u32 step, u32 i, float (&r)[NB][PAGES]) {
#pragma unroll
    for (int p = 0; p < PAGES; p++) {
        const u32 reference = step + (PAGE == 16 ? p * TILE_STRIDE + TILE_BYTES : STEP_BYTES);
        const uint4 v = load_16(reference + 32 * i), w = load_16(reference + 32 * i + 16);
        const float scale = flt(load_4(reference + D + 12) & 0xffff0000u) * (1.f / K_STEP); // a query's unit has K's step
#pragma unroll
        for (int nb = 0; nb < NB; nb++) {
            // A's registers are four neighbouring words of the reference, the same for all g. Rows g have the first and the
            // third, which fit q's in c; rows g + 8 the others, which fit those in d. Every lane has the sums of its own columns.
            int c[4] = {0, 0, 0, 0}, d[4] = {0, 0, 0, 0};
            mma_s8(c, v.x, v.y, v.z, v.w, Q.b[nb][0], Q.b[nb][1]);
            mma_s8(d, v.x, v.y, v.z, v.w, Q.b[nb][2], Q.b[nb][3]);
            mma_s8(c, w.x, w.y, w.z, w.w, Q.b[nb][4], Q.b[nb][5]);
            mma_s8(d, w.x, w.y, w.z, w.w, Q.b[nb][6], Q.b[nb][7]);
            r[nb][p] = (float)((c[0] + d[2]) * 256 + (c[1] + d[3])) * (Q.unit[nb] * scale);
        }
    }
}

__device__ __forceinline__ float score(float x, float unit, float r) { return MEAN ? fmaf(x, unit, r) : x * unit; }

template <bool EDGE>
__device__ __forceinline__ void step(const Params& P, const Lane& L, const Query& Q, State& S, u32 tiles, int lane,
                                     int b, int hr, int at, u32 number, float headroom) {
    // scores: K q, as integers with a factor, and what is added to those of a page
    float x[NB][4], unit[NB][4], vs[4], r[NB][PAGES];
    if (MEAN) reference_scores(Q, tiles, lane & 3, r);
    {
        float ks[4];
        // with one block of rows each look-up has sums of its own, so that products wait less for each other
        constexpr bool APART = NB == 1 && K_INDEX == 4;
        int c[2][NB][4], d[2][NB][4];
#pragma unroll
        for (int a = 0; a < 2; a++) {
            const u32 tile = tiles + a * TILE_STRIDE;
            const u32 kw = load_4(tile + L.scales), vw = load_4(tile + L.scales + 32);
            const u32 first = L.scale_order, second = L.scale_order1;
            ks[2 * a] = flt(prmt(kw, 0, first)), ks[2 * a + 1] = flt(prmt(kw, 0, second));
            vs[2 * a] = flt(prmt(vw, 0, first)), vs[2 * a + 1] = flt(prmt(vw, 0, second));
            u32 w0[4], w1[4], top0, top1;
            load_k(L, tile, L.k0, w0, top0);
            load_k(L, tile, L.k1, w1, top1);
#pragma unroll
            for (int nb = 0; nb < NB; nb++)
#pragma unroll
                for (int e = 0; e < 4; e++) c[a][nb][e] = FLOATS ? Q.zero[nb][e] : 0, d[a][nb][e] = 0;
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const u32 l0 = codes_of(w0, k, 0), l1 = codes_of(w1, k, 0), h0 = codes_of(w0, k, 1), h1 = codes_of(w1, k, 1);
                // tables of the words of both halves
                const bool le = KTRELLIS && word_of(k, 0) % 2 == 0, he = KTRELLIS && word_of(k, 1) % 2 == 0;
                const u32 lt0 = le ? L.k_low_even : L.k_low, lt1 = le ? KTE1 : KT1;
                const u32 ht0 = he ? L.k_low_even : L.k_low, ht1 = he ? KTE1 : KT1;
                const u32 lu0 = le ? L.k_high_even : L.k_high, lu1 = le ? KUE1 : KU1;
                const u32 hu0 = he ? L.k_high_even : L.k_high, hu1 = he ? KUE1 : KU1;
                u32 a0 = prmt(lt0, lt1, l0), a1 = prmt(lt0, lt1, l1), a2 = prmt(ht0, ht1, h0), a3 = prmt(ht0, ht1, h1);
#if K_INDEX == 5
                const int lw = word_of(k, 0), hw = word_of(k, 1);
                const bool lh = is_upper(k, 0), hh = is_upper(k, 1);
                a0 = signed_levels(a0, lu0, lu1, l0, sign_bytes(top0, lw, lh), L.minus_one);
                a1 = signed_levels(a1, lu0, lu1, l1, sign_bytes(top1, lw, lh), L.minus_one);
                a2 = signed_levels(a2, hu0, hu1, h0, sign_bytes(top0, hw, hh), L.minus_one);
                a3 = signed_levels(a3, hu0, hu1, h1, sign_bytes(top1, hw, hh), L.minus_one);
#endif
#pragma unroll
                for (int nb = 0; nb < NB; nb++) mma_s8(c[a][nb], a0, a1, a2, a3, Q.b[nb][2 * k], Q.b[nb][2 * k + 1]);
#if K_INDEX == 4
                a0 = prmt(lu0, lu1, complement(l0, L.minus_one)), a1 = prmt(lu0, lu1, complement(l1, L.minus_one));
                a2 = prmt(hu0, hu1, complement(h0, L.minus_one)), a3 = prmt(hu0, hu1, complement(h1, L.minus_one));
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
                const int high = APART ? c[a][nb][e] + d[a][nb][e] : c[a][nb][e];
                const int low = APART ? c[a][nb][e + 1] + d[a][nb][e + 1] : c[a][nb][e + 1];
                // floats are 12582912 more than the sums: high * 256 - 12582912 is exact, and the sum is rounded once
                x[nb][t] = FLOATS ? fmaf(flt(high), 256.f, -257.f * 12582912.f) + flt(low)
                                  : (float)(high * 256 + (low + Q.half_sum[nb]));
                unit[nb][t] = Q.unit[nb] * ks[t];
#if SOFTCAP
                {
                    // tanh by exp2: tanh.approx is too coarse
                    const float z = score(x[nb][t], unit[nb][t], r[nb][page_of(t)]) * P.softcap_inv;
                    const float e = ex2(fminf(fabsf(z), 20.f) * 2.8853900817779268f);
                    const float y = (e - 1.f) / (e + 1.f);
                    x[nb][t] = z == z ? (z < 0.f ? -y : y) : z, unit[nb][t] = P.softcap_log2;
                    if (t == 4 - 1 || page_of(t) != page_of(t + 1)) r[nb][page_of(t)] = 0.f; // z has it
                }
#endif
            }
    }
    if (EDGE) {
        const int g = lane >> 2, swap = swapped(lane);
        bool used[NB][PAGES] = {};
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
                used[nb][page_of(t)] |= seen;
            }
            // what nobody wrote may be NaN or huge: no row of this lane may meet it
            if (!any) vs[t] = 0.f;
        }
#pragma unroll
        for (int nb = 0; nb < NB; nb++)
#pragma unroll
            for (int p = 0; p < PAGES; p++)
                if (!used[nb][p]) r[nb][p] = 0.f;
    }

    Values V;
    if (VALUES_AHEAD) load_values(L, tiles, V);

    // weights: exp2(score - top) * V scale, in 16-bit fixed point
    const u32 dither = number * 0x9e3779b9u + L.dither;
    const float d0 = flt((dither >> 9) | 0x3f800000u) - 1.5f, d1 = -d0;
    u32 pb[NB][TILES][COORDINATES][2];
#pragma unroll
    for (int nb = 0; nb < NB; nb++) {
        float p[4], w[4];
#pragma unroll
        for (int t = 0; t < 4; t++) {
            p[t] = ex2(fmaf(x[nb][t], unit[nb][t], MEAN ? r[nb][page_of(t)] - S.top[nb] : -S.top[nb]));
            w[t] = p[t] * vs[t];
            if (EDGE && NB > 1 && x[nb][t] == -flt(0x7f800000u)) w[t] = 0.f;
        }
        float total = S.total[nb] + ((p[0] + p[1]) + (p[2] + p[3]));
        const float most = max_nan(max_nan(w[0], w[1]), max_nan(w[2], w[3]));
        if (__builtin_expect(__any_sync(~0u, !(most <= S.limit[nb]) || !(total < 1e18f)), 0)) {
            float s[4], own[4];
#pragma unroll
            for (int t = 0; t < 4; t++) {
                s[t] = score(x[nb][t], unit[nb][t], r[nb][page_of(t)]);
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
#if BY_TILES
#pragma unroll
        for (int t = 0; t < 4; t++) S.weights[nb] = add_lower(S.weights[nb], y[t]);
#else
        S.weights[nb] += (y[0] + y[1]) + (y[2] + y[3]) - 4u * 0x4b400000u;
#endif
        // from rows of tokens to columns: high and low bytes of the first tokens of both tiles, then of the second ones
#if BY_TILES
#pragma unroll
        for (int a = 0; a < 2; a++) {
            const u32 four = transpose(prmt(y[2 * a], y[2 * a + 1], L.word_order));
            pb[nb][a][0][0] = prmt(four, 0, 0x4140), pb[nb][a][0][1] = prmt(four, 0, 0x4342);
            pb[nb][a][1][0] = times_power(pb[nb][a][0][0], 8), pb[nb][a][1][1] = times_power(pb[nb][a][0][1], 8);
        }
#else
        const u32 first = transpose(prmt(y[0], y[2], 0x4051)), second = transpose(prmt(y[1], y[3], 0x4051));
        pb[nb][0][0][0] = prmt(first, second, L.word_order);
        pb[nb][0][0][1] = prmt(first, second, L.word_order1);
#endif
    }

    // output: V^T w
    for_values(L, tiles, V, lane, [&](int j, u32 e, u32 f, u32 top, int word, int a) {
        const u32 eh = upper(e), fh = upper(f);
        const u32 et0 = VTRELLIS ? L.v_low_even : L.v_low, et1 = VTRELLIS ? VTE1 : VT1;
        const u32 eu0 = VTRELLIS ? L.v_high_even : L.v_high, eu1 = VTRELLIS ? VUE1 : VU1;
        u32 a0 = prmt(et0, et1, e), a1 = prmt(L.v_low, VT1, f), a2 = prmt(et0, et1, eh), a3 = prmt(L.v_low, VT1, fh);
#if V_INDEX == 5
        a0 = signed_levels(a0, eu0, eu1, e, sign_bytes(top, word, false), L.minus_one);
        a1 = signed_levels(a1, L.v_high, VU1, f, sign_bytes(top, word + 1, false), L.minus_one);
        a2 = signed_levels(a2, eu0, eu1, eh, sign_bytes(top, word, true), L.minus_one);
        a3 = signed_levels(a3, L.v_high, VU1, fh, sign_bytes(top, word + 1, true), L.minus_one);
#endif
#pragma unroll
        for (int nb = 0; nb < NB; nb++)
#pragma unroll
            for (int n = 0; n < COORDINATES; n++) mma_u8(S.acc[nb][j + n], a0, a1, a2, a3, pb[nb][a][n][0], pb[nb][a][n][1]);
#if V_INDEX == 4
        a0 = prmt(eu0, eu1, complement(e, L.minus_one)), a1 = prmt(L.v_high, VU1, complement(f, L.minus_one));
        a2 = prmt(eu0, eu1, complement(eh, L.minus_one)), a3 = prmt(L.v_high, VU1, complement(fh, L.minus_one));
#pragma unroll
        for (int nb = 0; nb < NB; nb++)
#pragma unroll
            for (int n = 0; n < COORDINATES; n++) mma_u8(S.acc[nb][j + n], a0, a1, a2, a3, pb[nb][a][n][0], pb[nb][a][n][1]);
#endif
    });
}
