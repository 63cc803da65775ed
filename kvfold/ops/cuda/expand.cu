// De-quantises a window of every sequence into bfloat16 or float16, in the stored (rotated) basis, for heads of 128.
//
// Defines, for X in K and V: X_BITS (2, 3 or 4), X_TRELLIS, X_PLANE0, X_PLANE1, X_PATH (a trellis' path bits) and X_SCALES
// (offsets in a tile; V's scales follow K's); TILE_BYTES; MEAN (pages have key references); FLOAT16 (what comes out);
// WIDE_TABLE (block table entries are int64).
//
// A warp takes a tile of 16 tokens of one head, K and V. A lane turns eight neighbouring coordinates of a token, one nibble
// each, into 16 bytes, so that sixteen lanes write a whole row. All loads of a tile are issued before the first is used.
//
// With `peaks`, K and V are divided by the power of two below their peak, so that they fit float16, and times LIFT.
//
// Levels are odd multiples of half the codebook's step, up to 255, so they are exact as bfloat16. Two look-ups with prmt,
// four codes each, give their upper and lower bytes; the product with the scale is rounded to the output's type, and V's to
// 8 significant bits then if it is `coarse`.
//
// A trellis' indices of 3 bits are looked up like codes of 3 bits. Of 4 and 5 bits they are a sign and a magnitude once the
// path's two bits of negative levels have been complemented; those of 4 bits are made codes of 4 bits. Of 5 bits they are
// magnitudes of 7 bits, in two tables, whose complement is the negative level less one half.
#include "trellis.cuh"

constexpr int HEAD = 128;
constexpr int TILE = 16;
constexpr int WARPS = 8;

static_assert(V_SCALES == K_SCALES + 2 * TILE, "a tile's scales are read as one");

struct Levels {
    u32 upper[2], lower[2];  // bytes of level c as bfloat16: of all codes, with 4 bits of the positive ones; with 5 magnitudes
    float unit;              // half the codebook's step
};

struct Window {
    const u8* pages;  // of the window's first head
    const void* table;
    i64 table_stride;
    i64 page_bytes;   // of a head
    i64 page_stride;  // from a page to the next, of all heads
    const int* starts;  // null: `start` for all sequences
    const int* lengths;  // null: `length`
    u8* k;  // [batch, heads, rows, 128]
    u8* v;
    float* peaks;  // K's and V's, of `peaks` below, or null
    int page_shift;
    int batch, heads, tokens;
    int start, length;
    int rows;  // of a head in k and v: `tokens`, or more where others follow them
    int coarse;  // whether V is rounded to 8 significant bits
};

struct Chunk {
    const u8* k;  // 16-bit floats [rows, heads, 128], strides in elements, vectors at multiples of 16 bytes
    const u8* v;
    i64 k_row, k_head, v_row, v_head;
    int rows, heads;
    int half;  // float16, else bfloat16
};

__device__ __forceinline__ int start_of(const Window& window, int b) {
    return window.starts ? __ldg(window.starts + b) : window.start;
}

__device__ __forceinline__ int length_of(const Window& window, int b) {
    return window.lengths ? __ldg(window.lengths + b) : window.length;
}

template <int BITS_, bool TRELLIS_>
struct Side {
    static constexpr int BITS = BITS_, INDEX = BITS + TRELLIS_;  // of a code, of the index of a level
    static constexpr bool TRELLIS = TRELLIS_;
    static constexpr int WIDTH0 = TRELLIS ? (BITS == 2 ? 1 : 2) : BITS == 3 ? 2 : BITS;  // of the first plane
    static constexpr bool SECOND = TRELLIS ? BITS == 4 : BITS == 3;                      // whether another of 1 bit follows
    static constexpr int ROWS0 = 4 / WIDTH0;             // eights of coordinates in a word
    static constexpr int ROW_BYTES0 = HEAD * WIDTH0 / 8;
    static constexpr int ROW_BYTES1 = HEAD / 8;          // of planes of 1 bit
};
typedef Side<K_BITS, K_TRELLIS> KeySide;
typedef Side<V_BITS, V_TRELLIS> ValueSide;

struct Codes {
    u32 nibbles;
    u32 negative;  // with 5 bits: nibbles of ones where the level is negative
};

// The codes of eight coordinates, `eight` counted along the row, from the words of the planes that hold them; `before` is the
// word of path bits before `path`.
template <class S>
__device__ __forceinline__ Codes codes(u32 word0, u32 word1, u32 path, u32 before, int eight) {
    if constexpr (S::WIDTH0 == 4) return {word0, 0};
    u32 low = word0 >> S::WIDTH0 * (eight & (S::ROWS0 - 1)) & (S::WIDTH0 == 1 ? 0x11111111u : 0x33333333u);
    u32 top = S::SECOND ? word1 >> (eight & 3) & 0x11111111u : 0;
    if constexpr (!S::TRELLIS) return {low | top << 2, 0};
    u32 index = low << 2 | path_of_eight(before, path, eight & 3), negative = 0;
    if constexpr (S::BITS == 3) index ^= 0xBBBBBBBBu ^ (index >> 3 & 0x11111111u) * 3;
    if constexpr (S::BITS == 4) {
        negative = (top ^ 0x11111111u) * 15;
        index ^= negative & 0x33333333u;
    }
    return {index, negative};
}

// What is added to eight coordinates of each key of a page.
struct Offsets {
    float x[8];
};

// `page` is of one head; the reference is int8 codes and, at its end, their scale.
__device__ __forceinline__ Offsets reference_of(const u8* page, i64 page_bytes, int eight, float times) {
    const u8* end = page + page_bytes;
    uint2 codes = __ldg((const uint2*)(end - (HEAD + 16)) + eight);
    float scale = bf16_to_float(__ldg((const u16*)end - 1)) * times;
    Offsets offsets;
#pragma unroll
    for (int n = 0; n < 8; n++) offsets.x[n] = signed_byte(n < 4 ? codes.x : codes.y, n & 3) * scale;
    return offsets;
}

// Bytes of four codes from their upper or lower half, as int8: the levels less one half, in steps.
__device__ __forceinline__ u32 look_up_bytes(const Codes& codes, int half, const Levels& levels) {
    u32 selectors = codes.nibbles >> 16 * half & 0x7777u;
    u32 first = __byte_perm(levels.upper[0], levels.upper[1], selectors);
    u32 second = __byte_perm(levels.lower[0], levels.lower[1], selectors);
    // the top bit of nibble n, and then its sign, in all bits of byte n
    u32 order = half ? 0xFBEAu : 0xD9C8u, upper, negative;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(upper) : "r"(codes.nibbles << 4), "r"(codes.nibbles), "r"(order));
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(negative) : "r"(codes.negative << 4), "r"(codes.negative), "r"(order));
    return ((first & ~upper) | (second & upper)) ^ negative;
}

template <class S, bool OFFSETS>
__device__ __forceinline__ uint4 decode(const Codes& codes, float scale, const Levels& levels, const Offsets& offsets,
                                        bool coarse = false) {
    u32 pairs[4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 upper, lower;
        if constexpr (S::INDEX == 5) {
            upper = look_up_bytes(codes, half, levels);
        } else {
            u32 selectors = (codes.nibbles >> 16 * half) & (S::INDEX == 4 ? 0x7777u : 0xFFFFu);
            upper = __byte_perm(levels.upper[0], levels.upper[1], selectors);
            lower = __byte_perm(levels.lower[0], levels.lower[1], selectors);
            if constexpr (S::INDEX == 4) {  // the sign of nibble n to the top of byte n
                upper ^= __byte_perm(codes.nibbles << 4, codes.nibbles, half ? 0x7362 : 0x5140) & 0x80808080u;
            }
        }
#pragma unroll
        for (int two = 0; two < 2; two++) {
            float level[2];
            if constexpr (S::INDEX == 5) {
#pragma unroll
                for (int n = 0; n < 2; n++) level[n] = fmaf(2, signed_byte(upper, 2 * two + n), 1);
            } else {
                u32 pair = __byte_perm(lower, upper, two ? 0x7362 : 0x5140);
                level[0] = __uint_as_float(pair << 16), level[1] = __uint_as_float(pair & 0xFFFF0000u);
            }
            float x = level[0] * scale, y = level[1] * scale;
            if constexpr (OFFSETS) {
                x = fmaf(level[0], scale, offsets.x[4 * half + 2 * two]);
                y = fmaf(level[1], scale, offsets.x[4 * half + 2 * two + 1]);
            }
            u32 pair = FLOAT16 ? pack_f16(x, y) : pack_bf16(x, y);
            // Three of eleven bits less. Only a NaN would carry into the sign, and is not asked for.
            if (FLOAT16 && coarse) pair = (pair + 0x00040004u) & 0xFFF8FFF8u;
            pairs[2 * half + two] = pair;
        }
    }
    return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// What the lane has that holds the word before this lane's, which are four lanes' each.
__device__ __forceinline__ u32 path_before(u32 path, int lane) {
    u32 before = __shfl_up_sync(ALL_LANES, path, 4);
    return lane & 12 ? before : 0;
}

// A trellis needs more registers.
constexpr int BLOCKS = K_TRELLIS || V_TRELLIS ? 2 : 3;

extern "C" __global__ __launch_bounds__(WARPS * 32, BLOCKS) void expand(const __grid_constant__ Window window,
                                                                  const __grid_constant__ Levels k_levels,
                                                                  const __grid_constant__ Levels v_levels) {
    typedef KeySide KP;
    typedef ValueSide VP;
    int lane = threadIdx.x & 31, item = blockIdx.x * WARPS + (threadIdx.x >> 5);
    int tiles = (window.tokens + TILE - 1) / TILE;
    if (item >= tiles * window.heads * window.batch) return wait_for_predecessors();
    int row = item / tiles, first = item % tiles * TILE, b = row / window.heads, head = row % window.heads;
    int position = start_of(window, b) + first;
    int stored = min(length_of(window, b) - position, TILE), wanted = min(window.tokens - first, TILE);
    i64 out = ((i64)row * window.rows + first) * (2 * HEAD) + 16 * (lane & 15);
    u8 *k_out = window.k + out, *v_out = window.v + out;
    int pair = lane >> 4, eight = lane & 15;

    if (stored <= 0) {
        wait_for_predecessors();
        for (int token = pair; token < wanted; token += 2) {
            *reinterpret_cast<uint4*>(k_out + token * 2 * HEAD) = make_uint4(0, 0, 0, 0);
            *reinterpret_cast<uint4*>(v_out + token * 2 * HEAD) = make_uint4(0, 0, 0, 0);
        }
        return;
    }
    i64 entry = b * window.table_stride + (position >> window.page_shift);
    i64 page = WIDE_TABLE ? __ldg((const i64*)window.table + entry) : (i64)__ldg((const int*)window.table + entry);
    int inside = position & ((1 << window.page_shift) - 1);
    const u8* page_of_head = window.pages + page * window.page_stride + head * window.page_bytes;
    const u8* tile = page_of_head + inside / TILE * TILE_BYTES;

    // The scale of token `lane`, K's for the first sixteen lanes and V's for the others.
    float scale = bf16_to_float(__ldg((const u16*)(tile + K_SCALES) + lane)) * (pair ? v_levels.unit : k_levels.unit);
    u32 k_word0[8], k_word1[8], k_path[8];
    uint4 v_words0[2], v_words1[2], v_path[2];
#pragma unroll
    for (int n = 0; n < 8; n++) {
        int token = 2 * n + pair;
        k_word0[n] = __ldg((const u32*)(tile + K_PLANE0 + token * KP::ROW_BYTES0) + eight / KP::ROWS0);
        k_word1[n] = KP::SECOND ? __ldg((const u32*)(tile + K_PLANE1 + token * KP::ROW_BYTES1) + eight / 4) : 0;
        k_path[n] = KP::TRELLIS ? __ldg((const u32*)(tile + K_PATH + token * KP::ROW_BYTES1) + eight / 4) : 0;
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
        int four = 2 * n + pair;
        v_words0[n] = __ldg((const uint4*)(tile + V_PLANE0 + eight / VP::ROWS0 * 64) + four);
        v_words1[n] = VP::SECOND ? __ldg((const uint4*)(tile + V_PLANE1 + eight / 4 * 64) + four) : v_words0[n];
        v_path[n] = VP::TRELLIS ? __ldg((const uint4*)(tile + V_PATH + eight / 4 * 64) + four) : v_words0[n];
    }
    wait_for_predecessors();  // of which `peaks` is one; pages were complete before that
    Offsets offsets = {};
    if (MEAN) {
        float times = window.peaks ? reciprocal(power_below(window.peaks[0])) * LIFT : 1.f;
        offsets = reference_of(page_of_head, window.page_bytes, eight, times);
    }
    if (window.peaks) scale = scale * reciprocal(power_below(window.peaks[pair])) * LIFT;
    if (eight >= stored) scale = 0;
#pragma unroll
    for (int n = 0; n < 8; n++) {
        int token = 2 * n + pair;
        u32 before = KP::TRELLIS ? path_before(k_path[n], lane) : 0;
        Codes found = {0, 0};
        if (token < stored) found = codes<KP>(k_word0[n], k_word1[n], k_path[n], before, eight);
        uint4 eight_values = decode<KP, MEAN>(found, __shfl_sync(ALL_LANES, scale, token), k_levels, offsets);
        if (MEAN && token >= stored) eight_values = make_uint4(0, 0, 0, 0);
        if (token < wanted) *reinterpret_cast<uint4*>(k_out + token * 2 * HEAD) = eight_values;
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
        u32 w0[4] = {v_words0[n].x, v_words0[n].y, v_words0[n].z, v_words0[n].w};
        u32 w1[4] = {v_words1[n].x, v_words1[n].y, v_words1[n].z, v_words1[n].w};
        u32 u[4] = {v_path[n].x, v_path[n].y, v_path[n].z, v_path[n].w}, before = 0;
        if constexpr (VP::TRELLIS) {
            before = path_before(u[3], lane);  // the last bytes of four tokens' words
            transpose_bytes(u);
        }
        transpose_bytes(w0);
        if constexpr (VP::SECOND) transpose_bytes(w1);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int token = 4 * (2 * n + pair) + j;
            Codes found = {0, 0};
            if (token < stored) found = codes<VP>(w0[j], w1[j], u[j], before >> 8 * j << 24, eight);
            float its = __shfl_sync(ALL_LANES, scale, TILE + token);
            uint4 eight_values = decode<VP, false>(found, its, v_levels, offsets, window.coarse && its == its);
            if (token < wanted) *reinterpret_cast<uint4*>(v_out + token * 2 * HEAD) = eight_values;
        }
    }
}

// The larger of `largest` and the bits of two finite floats' absolute values.
__device__ __forceinline__ u32 larger(u32 word, int half, u32 largest) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
        u32 bits = n ? word >> 16 : word & 0xFFFFu;
        bits = (half ? __float_as_uint(half_to_float(bits)) : bits << 16) & 0x7FFFFFFFu;
        if (bits < 0x7F800000u && bits > largest) largest = bits;
    }
    return largest;
}

// The largest finite scales of the windows' tokens, sixteen times those of the pages' key references, and eight times the
// largest elements of a chunk's own K and V, into peaks, which are positive before. (A vector of 128 that is rotated has no
// coordinate of twelve times its largest one, so it is below six times the power of two below the peak; a reference, which
// has 7 bits, is below sixteen times.) Floats that are not negative are in the order of their bits.
//
// A warp takes four tiles' scales, or 16 tokens of a head of the chunk. K's are in lanes whose bit 2 is 0.
extern "C" __global__ __launch_bounds__(WARPS * 32) void peaks(const __grid_constant__ Window window,
                                                              const __grid_constant__ Chunk chunk) {
    __shared__ u32 most[WARPS][2];
    wait_for_predecessors();
    int lane = threadIdx.x & 31, tiles = (window.tokens + TILE - 1) / TILE, all = tiles * window.heads * window.batch;
    int side = lane >> 2 & 1, chunks = (chunk.rows + TILE - 1) / TILE * chunk.heads;
    u32 largest = 0, own = 0;
    for (int item = blockIdx.x * WARPS + (threadIdx.x >> 5); item < chunks + (all + 3) / 4; item += gridDim.x * WARPS) {
        if (item < chunks) {
            int head = item % chunk.heads, first = item / chunk.heads * TILE, eight = (lane & 3) | lane >> 3 << 2;
            i64 row_stride = side ? chunk.v_row : chunk.k_row, at = head * (side ? chunk.v_head : chunk.k_head) + 8 * eight;
            const u8* from = (side ? chunk.v : chunk.k) + 2 * (at + first * row_stride);
            uint4 words[TILE];
#pragma unroll
            for (int n = 0; n < TILE; n++) {
                words[n] = make_uint4(0, 0, 0, 0);
                if (first + n < chunk.rows) words[n] = __ldg((const uint4*)(from + 2 * n * row_stride));
            }
#pragma unroll
            for (int n = 0; n < TILE; n++) {
                own = larger(words[n].x, chunk.half, larger(words[n].y, chunk.half, own));
                own = larger(words[n].z, chunk.half, larger(words[n].w, chunk.half, own));
            }
            continue;
        }
        int number = 4 * (item - chunks) + (lane >> 3);
        if (number >= all) continue;
        int row = number / tiles, first = number % tiles * TILE, b = row / window.heads, head = row % window.heads;
        int position = start_of(window, b) + first, stored = length_of(window, b) - position - 4 * (lane & 3);
        if (stored <= 0) continue;
        i64 entry = b * window.table_stride + (position >> window.page_shift);
        i64 page = WIDE_TABLE ? __ldg((const i64*)window.table + entry) : (i64)__ldg((const int*)window.table + entry);
        int inside = position & ((1 << window.page_shift) - 1);
        const u8* page_of_head = window.pages + page * window.page_stride + head * window.page_bytes;
        const u8* tile = page_of_head + inside / TILE * TILE_BYTES;
        if (MEAN && !side) {
            u32 scale = (u32)__ldg((const u16*)(page_of_head + window.page_bytes) - 1) << 16;
            u32 lifted = min(scale + (4u << 23), 0x7F000000u);
            if (scale && scale < 0x7F800000u && lifted > largest) largest = lifted;
        }
        uint2 scales = __ldg((const uint2*)(tile + K_SCALES) + (lane & 7));  // of four tokens
        if (stored < 4) scales.y = stored < 3 ? 0 : scales.y & 0xFFFFu;
        if (stored < 2) scales.x &= 0xFFFFu;
        largest = larger(scales.x, 0, larger(scales.y, 0, largest));
    }
    own = own ? min(own + (3u << 23), 0x7F000000u) : 0;
    if (own > largest) largest = own;
    for (int k = 1; k < 32; k <<= 1) {
        if (k == 4) continue;
        u32 other = __shfl_xor_sync(ALL_LANES, largest, k);
        if (other > largest) largest = other;
    }
    // Few blocks find more than those before them, and atomics on one word wait for each other.
    if ((lane & 27) == 0) most[threadIdx.x >> 5][side] = largest;
    __syncthreads();
    if (threadIdx.x >= 2) return;
    largest = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++)
        if (most[warp][threadIdx.x] > largest) largest = most[warp][threadIdx.x];
    u32* peak = (u32*)window.peaks + threadIdx.x;
    if (largest > *(volatile u32*)peak) atomicMax(peak, largest);
}
