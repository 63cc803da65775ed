// De-quantises a window of every sequence into bfloat16 or float16, in the stored (rotated) basis, for heads of 128.
//
// Defines, for X in K and V: X_BITS (2, 3 or 4), X_PLANE0, X_PLANE1 and X_SCALES (offsets in a tile; V's scales follow
// K's); TILE_BYTES; FLOAT16 (what comes out); WIDE_TABLE (block table entries are int64).
//
// A warp takes a tile of 16 tokens of one head, K and V. A lane turns eight neighbouring coordinates of a token, one nibble
// each, into 16 bytes, so that sixteen lanes write a whole row. All loads of a tile are issued before the first is used.
//
// With `peaks`, K and V are divided by the power of two below their largest scale, so that they fit float16.
//
// Levels are odd multiples of half the codebook's step, up to 255, so they are exact as bfloat16. Two look-ups with prmt,
// four codes each, give their upper and lower bytes; the product with the scale is rounded once, to the output's type.
#include "common.cuh"

constexpr int HEAD = 128;
constexpr int TILE = 16;
constexpr int WARPS = 8;

static_assert(V_SCALES == K_SCALES + 2 * TILE, "a tile's scales are read as one");

struct Levels {
    u32 upper[2], lower[2];  // bytes of level c as bfloat16: of all codes, with 4 bits of the positive ones
    float unit;              // half the codebook's step
};

struct Window {
    const u8* pages;
    const void* table;
    i64 table_stride;
    i64 page_bytes;
    const int* starts;
    const int* lengths;
    u8* k;  // [batch, heads, tokens, 128]
    u8* v;
    float* peaks;  // largest finite |scale| of K and of V, or null
    int page_shift;
    int batch, heads, tokens;
};

template <int BITS>
struct Planes {
    static constexpr int WIDTH0 = BITS == 3 ? 2 : BITS;  // of the first plane; a second one has 1 bit
    static constexpr int ROWS0 = 4 / WIDTH0;             // eights of coordinates in a word
    static constexpr int ROW_BYTES0 = HEAD * WIDTH0 / 8;
    static constexpr int ROW_BYTES1 = HEAD / 8;
};

// The codes of eight coordinates, `eight` counted along the row, from the words of both planes that hold them.
template <int BITS>
__device__ __forceinline__ u32 codes(u32 word0, u32 word1, int eight) {
    if constexpr (BITS == 4) return word0;
    u32 low = word0 >> 2 * (eight & 1) & 0x33333333u;
    if constexpr (BITS == 2) return low;
    return low | (word1 >> (eight & 3) & 0x11111111u) << 2;
}

template <int BITS>
__device__ __forceinline__ uint4 decode(u32 codes, float scale, const Levels& levels) {
    u32 pairs[4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 selectors = (codes >> 16 * half) & (BITS == 4 ? 0x7777u : 0xFFFFu);
        u32 upper = __byte_perm(levels.upper[0], levels.upper[1], selectors);
        u32 lower = __byte_perm(levels.lower[0], levels.lower[1], selectors);
        if constexpr (BITS == 4) {  // the sign of nibble n to the top of byte n
            upper ^= __byte_perm(codes << 4, codes, half ? 0x7362 : 0x5140) & 0x80808080u;
        }
#pragma unroll
        for (int two = 0; two < 2; two++) {
            u32 pair = __byte_perm(lower, upper, two ? 0x7362 : 0x5140);
            u32 first = pair << 16, second = pair & 0xFFFF0000u;
            float x = __uint_as_float(first) * scale, y = __uint_as_float(second) * scale;
            pairs[2 * half + two] = FLOAT16 ? pack_f16(x, y) : pack_bf16(x, y);
        }
    }
    return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

extern "C" __global__ __launch_bounds__(WARPS * 32, 3) void expand(const __grid_constant__ Window window,
                                                                  const __grid_constant__ Levels k_levels,
                                                                  const __grid_constant__ Levels v_levels) {
    typedef Planes<K_BITS> KP;
    typedef Planes<V_BITS> VP;
    int lane = threadIdx.x & 31, item = blockIdx.x * WARPS + (threadIdx.x >> 5);
    int tiles = (window.tokens + TILE - 1) / TILE;
    if (item >= tiles * window.heads * window.batch) return;
    int row = item / tiles, first = item % tiles * TILE, b = row / window.heads, head = row % window.heads;
    int position = __ldg(window.starts + b) + first;
    int stored = min(__ldg(window.lengths + b) - position, TILE), wanted = min(window.tokens - first, TILE);
    i64 out = ((i64)row * window.tokens + first) * (2 * HEAD) + 16 * (lane & 15);
    u8 *k_out = window.k + out, *v_out = window.v + out;
    int pair = lane >> 4, eight = lane & 15;

    if (stored <= 0) {
        for (int token = pair; token < wanted; token += 2) {
            *reinterpret_cast<uint4*>(k_out + token * 2 * HEAD) = make_uint4(0, 0, 0, 0);
            *reinterpret_cast<uint4*>(v_out + token * 2 * HEAD) = make_uint4(0, 0, 0, 0);
        }
        return;
    }
    i64 entry = b * window.table_stride + (position >> window.page_shift);
    i64 page = WIDE_TABLE ? __ldg((const i64*)window.table + entry) : (i64)__ldg((const int*)window.table + entry);
    int inside = position & ((1 << window.page_shift) - 1);
    const u8* tile =
        window.pages + (page * window.heads + head) * window.page_bytes + (inside / TILE) * TILE_BYTES;

    // The scale of token `lane`, K's for the first sixteen lanes and V's for the others.
    float scale = bf16_to_float(__ldg((const u16*)(tile + K_SCALES) + lane)) * (pair ? v_levels.unit : k_levels.unit);
    if (window.peaks) scale *= reciprocal(power_below(window.peaks[pair]));
    if (eight >= stored) scale = 0;
    u32 k_word0[8], k_word1[8];
    uint4 v_words0[2], v_words1[2];
#pragma unroll
    for (int n = 0; n < 8; n++) {
        int token = 2 * n + pair;
        k_word0[n] = __ldg((const u32*)(tile + K_PLANE0 + token * KP::ROW_BYTES0) + eight / KP::ROWS0);
        k_word1[n] = K_BITS == 3 ? __ldg((const u32*)(tile + K_PLANE1 + token * KP::ROW_BYTES1) + eight / 4) : 0;
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
        int four = 2 * n + pair;
        v_words0[n] = __ldg((const uint4*)(tile + V_PLANE0 + eight / VP::ROWS0 * 64) + four);
        v_words1[n] = V_BITS == 3 ? __ldg((const uint4*)(tile + V_PLANE1 + eight / 4 * 64) + four) : v_words0[n];
    }
#pragma unroll
    for (int n = 0; n < 8; n++) {
        int token = 2 * n + pair;
        u32 nibbles = token < stored ? codes<K_BITS>(k_word0[n], k_word1[n], eight) : 0;
        uint4 eight_values = decode<K_BITS>(nibbles, __shfl_sync(ALL_LANES, scale, token), k_levels);
        if (token < wanted) *reinterpret_cast<uint4*>(k_out + token * 2 * HEAD) = eight_values;
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
        u32 w0[4] = {v_words0[n].x, v_words0[n].y, v_words0[n].z, v_words0[n].w};
        u32 w1[4] = {v_words1[n].x, v_words1[n].y, v_words1[n].z, v_words1[n].w};
        transpose_bytes(w0);
        if constexpr (V_BITS == 3) transpose_bytes(w1);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int token = 4 * (2 * n + pair) + j;
            u32 nibbles = token < stored ? codes<V_BITS>(w0[j], w1[j], eight) : 0;
            uint4 eight_values = decode<V_BITS>(nibbles, __shfl_sync(ALL_LANES, scale, TILE + token), v_levels);
            if (token < wanted) *reinterpret_cast<uint4*>(v_out + token * 2 * HEAD) = eight_values;
        }
    }
}

// The largest finite scales of the windows' tokens, into peaks, which are zero or more before. Floats that are not negative
// are in the order of their bits.
extern "C" __global__ __launch_bounds__(WARPS * 32) void peaks(const __grid_constant__ Window window) {
    int lane = threadIdx.x & 31, tiles = (window.tokens + TILE - 1) / TILE;
    u32 largest = 0;
    for (int item = blockIdx.x * WARPS + (threadIdx.x >> 5); item < tiles * window.heads * window.batch;
         item += gridDim.x * WARPS) {
        int row = item / tiles, first = item % tiles * TILE, b = row / window.heads, head = row % window.heads;
        int position = __ldg(window.starts + b) + first;
        if ((lane & 15) >= __ldg(window.lengths + b) - position) continue;
        i64 entry = b * window.table_stride + (position >> window.page_shift);
        i64 page = WIDE_TABLE ? __ldg((const i64*)window.table + entry) : (i64)__ldg((const int*)window.table + entry);
        int inside = position & ((1 << window.page_shift) - 1);
        const u8* tile =
            window.pages + (page * window.heads + head) * window.page_bytes + (inside / TILE) * TILE_BYTES;
        u32 scale = (u32)__ldg((const u16*)(tile + K_SCALES) + lane) << 16 & 0x7FFFFFFFu;
        if (scale < 0x7F800000u && scale > largest) largest = scale;
    }
    for (int k = 1; k < 16; k <<= 1) {
        u32 other = __shfl_xor_sync(ALL_LANES, largest, k);
        if (other > largest) largest = other;
    }
    if ((lane & 15) == 0) atomicMax((u32*)window.peaks + (lane >> 4), largest);
}
