// From bytes in the ring to codes in nibbles, which are prmt's selectors, and from these to levels in bytes.
#pragma once

#include "decode_partial.cuh"
#include "trellis.cuh"

// Whether products with V have the tokens of one tile, and two neighbouring coordinates by turns, as V's bytes have them: weights
// are zero for one of these, so that there are twice as many products, but nothing is joined of nibbles from both tiles. 4t gains
// 4 % by that; 3t and 2t, which have less to join, lose 5 and 2 (H200).
#define BY_TILES (VTRELLIS && VBITS == 4 && NB == 1)
#define TILES (1 + BY_TILES) // that weights are for
#define COORDINATES (1 + BY_TILES)

// What a lane needs in each step and the compiler would compute anew. The first words of the byte tables are among them: a
// constant, or anything that is known to be the same in all lanes, would be copied before each of its hundred uses.
struct Lane {
    u32 k_low, k_high, v_low, v_high;
    u32 k0, k1, scales, v, v_top; // where its rows of K, its tokens' scales, its codes of V and their top bits lie in a tile
    u32 scale_order, scale_order1, word_order, word_order1; // selectors: of the scales in a pair, of the weights' operands
    u32 minus_one, low_nibbles, dither;
    // of trellises: the tables of words with even t; how far the path bits before the lane's are shifted down, out of the word
    // where there are none; and where they lie in V
    u32 k_low_even, k_high_even, v_low_even, v_high_even;
    u32 k_down, v_down, v_before;
};

__device__ __forceinline__ int swapped(int lane) { return __popc(lane >> 2) & 1; }

__device__ __forceinline__ Lane lane_constants(const Params& P, int lane) {
    const u32 g = lane >> 2, i = lane & 3, zero = (P.minus_one + 1) * lane; // a zero that the compiler does not know
    Lane L;
    L.k_low = pin(KT0 + zero, lane), L.k_high = K_INDEX >= 4 ? pin(KU0 + zero, lane) : 0;
    L.v_low = SAME_LEVELS ? L.k_low : pin(VT0 + zero, lane);
    L.v_high = SAME_LEVELS ? L.k_high : V_INDEX >= 4 ? pin(VU0 + zero, lane) : 0;
    // rows g and g + 8 of the product are tokens 2 g and 2 g + 1, in an order that avoids bank conflicts
    const u32 row = KTRELLIS ? 16 : KBITS == 4 ? 64 : 32, part = KTRELLIS ? 4 : KBITS == 4 ? 16 : 8;
    L.k0 = pin((2 * g + swapped(lane)) * row + part * i, lane);
    L.k1 = pin((2 * g + 1 - swapped(lane)) * row + part * i, lane);
    L.scales = pin(SCALES + 4 * g, lane);
    L.scale_order = pin(swapped(lane) ? 0x3244u : 0x1044u, lane);
    L.scale_order1 = pin(L.scale_order ^ 0x2200u, lane);
#if VTRELLIS
    L.v = pin(V_CODES + 128 * (g >> 1) + 16 * i + 8 * (g & 1), lane);
    L.v_top = pin(V_CODES + 64 * (g >> 1) + 16 * i + 8 * (g & 1), lane);
    L.v_before = pin(L.v_top + (V_PATH - V_CODES) - (g & 1 ? 4 : 52), lane);
    L.v_down = pin(!g ? 32 : BY_TILES ? 6 : 2, lane);
#else
    L.v = pin(V_CODES + 64 * g + 16 * i, lane);
    L.v_top = VBITS == 3 ? pin(V_CODES + 512 + 64 * (g >> 1) + 16 * i, lane) : 0;
#endif
    L.k_down = KTRELLIS ? pin(i ? 30 : 32, lane) : 0;
    L.k_low_even = KTRELLIS ? pin(KTE0 + zero, lane) : 0;
    L.k_high_even = KTRELLIS && KBITS > 2 ? pin(KUE0 + zero, lane) : 0;
    L.v_low_even = SAME_LEVELS ? L.k_low_even : VTRELLIS ? pin(VTE0 + zero, lane) : 0;
    L.v_high_even = SAME_LEVELS ? L.k_high_even : VTRELLIS && VBITS > 2 ? pin(VUE0 + zero, lane) : 0;
#if BY_TILES
    L.word_order = pin(swapped(lane) ? 0x0415u : 0x4051u, lane), L.word_order1 = 0;
#else
    L.word_order = pin(__popc(2 * i) & 1 ? 0x1054u : 0x5410u, lane);
    L.word_order1 = pin(L.word_order ^ 0x6666u, lane);
#endif
    L.dither = pin(lane * 0x3c6ef372u + 0x1234567u, lane);
    L.minus_one = pin(P.minus_one, lane), L.low_nibbles = pin(P.low_nibbles, lane);
    return L;
}

// --- trellises --------------------------------------------------------------------------------------------------------

// Masks: of every other bit, of the lower two bits of nibbles.
#define EVEN_BITS 0x55555555u
#define LOW_PAIRS 0x33333333u

// Indices of the levels of 32 coordinates, or of eight tokens' four, or of four tokens' eight, in the nibbles of four words: the
// path's bits of path_bits(), from the path bits u and these two bits up, and refine bits, from `low` and `high` (2 bits a
// coordinate) or from `low` alone (1 bit). These lie above the path's bits, but below them where a word with even t has two, which
// saves the third word a shift. With 5 bits the sign is in `top`, and nibbles are magnitudes: where it is clear the path's bits are
// complemented, as the refine bits are in memory. Bit u_t xor u_{t-2} of all coordinates is one instruction then, and the other
// bit beside it one for even t and one for odd t.
template <int BITS>
__device__ __forceinline__ void join(u32 u, u32 two_up, u32 low, u32 high, u32 top, u32 (&w)[4]) {
    u32 even, odd;
    if (BITS == 4) {
        const u32 upper_bit = not_xor(u, two_up, top);
        even = select(upper_bit, equal_bits(two_up, times_power(top, 1)), EVEN_BITS);
        odd = select(equal_bits(u, top >> 1), upper_bit, EVEN_BITS);
    } else {
        path_bits(u, two_up, even, odd);
    }
    if (BITS == 2) {
        // the fourth word's refine bits lie behind their nibbles, and are rotated with the path's bits
        const u32 r_even = masked(low, EVEN_BITS), r_odd = masked(__funnelshift_l(low, low, 1), EVEN_BITS);
        const u32 last = select(r_odd, odd, LOW_PAIRS);
        w[0] = select(even, r_even << 2, LOW_PAIRS);
        w[1] = select(odd, r_odd, LOW_PAIRS);
        w[2] = select(even >> 2, r_even, LOW_PAIRS);
        w[3] = __funnelshift_r(last, last, 2);
        return;
    }
    w[0] = select(low, times_power(even, 2), LOW_PAIRS);
    w[1] = select(odd, low, LOW_PAIRS);
    w[2] = select(high, even, LOW_PAIRS);
    w[3] = select(odd >> 2, high, LOW_PAIRS);
}

// The same of 2 bits, where words have eight tokens' nibbles: of each one the path's bits of t to t + 3. `before` has the two of
// t - 2 and t - 1 in the lower bits, and gets those for the next nibbles. Each pair is the lower bits of `before`, u or u two down,
// one of them xor the same bit of another of these.
__device__ __forceinline__ void join_nibbles(u32& before, u32 u, u32 low, u32 (&w)[4]) {
    const u32 down = u >> 2, r_even = masked(low, EVEN_BITS), r_odd = masked(low >> 1, EVEN_BITS);
    w[0] = select(before ^ (u & 0x11111111u), r_even << 2, LOW_PAIRS);
    w[1] = select(u ^ (before & 0x22222222u), r_odd << 2, LOW_PAIRS);
    w[2] = select(u ^ (down & 0x11111111u), r_even, LOW_PAIRS);
    w[3] = select(down ^ (u & 0x22222222u), r_odd, LOW_PAIRS);
    before = down;
}

// Of four words of indices: 0xff for each of four coordinates whose sign in `top` is set, which is positive.
__device__ __forceinline__ u32 sign_bytes(u32 top, int word, bool upper_half) {
    return prmt(times_power(top, 7 - word), word == 3 ? top : times_power(top, 3 - word), upper_half ? 0xfbeau : 0xd9c8u);
}

// --- K ----------------------------------------------------------------------------------------------------------------

// Words of a K row for the four k-steps of a lane: eight codes each, in eight nibbles. `top` has signs, see join().
__device__ __forceinline__ void load_k(const Lane& L, u32 tile, u32 at, u32 (&w)[4], u32& top) {
#if KTRELLIS
    const u32 u = load_4(tile + K_PATH + at);
    const u32 two_up = 4 * u + shift_down(load_4(tile + (K_PATH - 4) + at), L.k_down);
    top = KBITS == 4 ? load_4(tile + 512 + at) : 0;
#if KBITS == 2
    join<2>(u, two_up, load_4(tile + at), 0, 0, w);
#else
    const uint2 r = load_8(tile + 2 * at);
    join<KBITS>(u, two_up, r.x, r.y, top, w);
#endif
#elif KBITS == 4
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

// Whether the codes of four coordinates that meet Q.b[2 * k + half] are the upper ones of a word, and of which.
__device__ __forceinline__ constexpr int word_of(int k, int half) { return MEAN ? (k & 2) | half : k; }
__device__ __forceinline__ constexpr bool is_upper(int k, int half) { return MEAN ? k & 1 : half; }

__device__ __forceinline__ u32 codes_of(const u32 (&w)[4], int k, int half) {
    const u32 word = w[word_of(k, half)];
    return is_upper(k, half) ? upper(word) : word;
}

// Levels less one half of four codes with 5 bits: of magnitudes, the first eight of which have been looked up, others being
// zeros there, and bytes of ones where they are positive.
__device__ __forceinline__ u32 signed_levels(u32 first, u32 table0, u32 table1, u32 codes, u32 positive, u32 minus_one) {
    return equal_bits(first, prmt(table0, table1, complement(codes, minus_one)), positive);
}

// --- V ----------------------------------------------------------------------------------------------------------------

// Nibbles of the same byte of eight tokens, four of each tile: low nibbles and high nibbles of the byte.
__device__ __forceinline__ void interleave(u32 x, u32 y, u32 mask, u32& low, u32& high) {
    low = select(x, y << 4, mask);
    high = select(x >> 4, y, mask);
}

// Nibbles of eight tokens, or bytes of four, two up as strings: `down` has the upper two bits of those before at the bottom.
__device__ __forceinline__ u32 two_up(u32 down, u32 u, u32 mask) { return select(times_power(u, 2), down, mask); }

#if VTRELLIS
// A lane's part of V's planes: bytes 2 (g & 1) and 2 (g & 1) + 1 of word g / 2 of the planes of 1 bit, with four rows in each
// nibble, and of both words that a plane of 2 bits has for these: coordinates 32 (g / 2) + 4 (g & 1) + 2 byte + nibble + 8 row.
struct Values {
    u32 path[2][2], low[2][2], high[2][2], top[2][2], last[2]; // [tile][byte]; of the byte before the first
};

__device__ __forceinline__ void load_values(const Lane& L, u32 tiles, Values& V) {
#pragma unroll
    for (int a = 0; a < 2; a++) {
        const u32 tile = tiles + a * TILE_STRIDE;
        const uint2 u = load_8(tile + (V_PATH - V_CODES) + L.v_top);
        V.path[a][0] = u.x, V.path[a][1] = u.y;
        V.last[a] = load_4(tile + L.v_before);
        const uint2 r = load_8(tile + (VBITS == 2 ? L.v_top : L.v));
        V.low[a][0] = r.x, V.low[a][1] = r.y;
        if (VBITS > 2) {
            const uint2 s = load_8(tile + L.v + 64);
            V.high[a][0] = s.x, V.high[a][1] = s.y;
        }
        if (VBITS == 4) {
            const uint2 t = load_8(tile + 512 + L.v_top);
            V.top[a][0] = t.x, V.top[a][1] = t.y;
        }
    }
}
#else
struct Values {}; // loaded where they are used
__device__ __forceinline__ void load_values(const Lane&, u32, Values&) {}
#endif

// Whether V's codes are loaded ahead of the weights that they wait for: 2t gains 1 % by that and 4t 1 to 2, 3t loses 2 (H200); with
// eight rows there are no registers for it.
#define VALUES_AHEAD (VTRELLIS && VBITS != 3 && NB == 1)

// Calls `use(j, e, f, top, word, tile)` for the products of a step, with codes of the coordinates of rows g and g + 8; of a trellis
// e is the word of that number of four, and f the next one. For each of eight j these are eight tokens' codes, four of each tile.
// BY_TILES: for each even j and each tile, four tokens' codes, of each token that of j and that of j + 1.
template <class Use>
__device__ __forceinline__ void for_values(const Lane& L, u32 tiles, Values& V, int lane, const Use& use) {
#if BY_TILES
#pragma unroll
    for (int a = 0; a < 2; a++) {
        u32 down = shift_down(V.last[a], L.v_down);
#pragma unroll
        for (int byte = 0; byte < 2; byte++) {
            const u32 u = V.path[a][byte], top = V.top[a][byte];
            u32 w[4];
            join<VBITS>(u, two_up(down, u, 0xfcfcfcfcu), V.low[a][byte], V.high[a][byte], top, w);
            down = u >> 6;
            use(2 * byte, w[0], w[1], top, 0, a);
            use(4 + 2 * byte, w[2], w[3], top, 2, a);
        }
    }
#elif VTRELLIS
    if (!VALUES_AHEAD) load_values(L, tiles, V);
    u32 down = shift_down(select(V.last[0] >> 4, V.last[1], L.low_nibbles), L.v_down);
#pragma unroll
    for (int byte = 0; byte < 2; byte++) {
        u32 u[2], l[2], h[2] = {0, 0}, t[2] = {0, 0}; // by nibble of the byte
        interleave(V.path[0][byte], V.path[1][byte], L.low_nibbles, u[0], u[1]);
        interleave(V.low[0][byte], V.low[1][byte], L.low_nibbles, l[0], l[1]);
        if (VBITS > 2) interleave(V.high[0][byte], V.high[1][byte], L.low_nibbles, h[0], h[1]);
        if (VBITS == 4) interleave(V.top[0][byte], V.top[1][byte], L.low_nibbles, t[0], t[1]);
#pragma unroll
        for (int n = 0; n < 2; n++) {
            u32 w[4];
            if (VBITS == 2) {
                join_nibbles(down, u[n], l[n], w);
            } else {
                join<VBITS>(u[n], two_up(down, u[n], 0xccccccccu), l[n], h[n], t[n], w);
                down = u[n] >> 2;
            }
            use(2 * byte + n, w[0], w[1], t[n], 0, 0);
            use(4 + 2 * byte + n, w[2], w[3], t[n], 2, 0);
        }
    }
#else
    const u32 codes = tiles + L.v;
    const uint4 xa = load_16(codes), ya = load_16(codes + TILE_STRIDE);
#if VBITS == 4
    const uint4 xb = load_16(codes + 512), yb = load_16(codes + (512 + TILE_STRIDE));
    const u32 xs[2][4] = {{xa.x, xa.y, xa.z, xa.w}, {xb.x, xb.y, xb.z, xb.w}};
    const u32 ys[2][4] = {{ya.x, ya.y, ya.z, ya.w}, {yb.x, yb.y, yb.z, yb.w}};
#else
    const u32 xs[4] = {xa.x, xa.y, xa.z, xa.w}, ys[4] = {ya.x, ya.y, ya.z, ya.w};
#if VBITS == 3
    const u32 top_bits = tiles + L.v_top;
    const uint4 ha = load_16(top_bits), ka = load_16(top_bits + TILE_STRIDE);
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
        for (int n = 0; n < 2; n++) use(2 * byte + n, code[n][0], code[n][1], 0u, 0, 0);
    }
#endif
}
