// What storing is about whatever the codes: vectors are loaded and rotated, and where their bytes go.
//
// Defines, for X in K and V:
//   X_BITS      width of a code: 2, 3 or 4
//   X_TRELLIS   1: of a trellis
//   X_RULE      the stored scale: 0 plain, 1 unbiased, 2 nc, 3 mse
//   X_SEARCH    1: several prescales are tried; 0: one
//   X_TYPE      what comes in: 0 bfloat16, 1 float16, 2 float32
//   X_VECTOR    1: a vector's coordinates are contiguous and aligned to 16 bytes
//   X_PLANE0, X_PLANE1, X_PATH (a trellis' path bits), X_SCALES   offsets in a tile
//   TILE_BYTES
//   MEAN        1: what is quantised of a rotated key is the difference from its page's reference
//
// Rotation. A coordinate's number has seven bits. H128 is the product of seven butterflies, one per bit, in any order. The
// tensor core does those of bits 3 to 6: A is 16 tokens x 16 coordinates, B the signs of H16, times 2^-7, which keeps
// every sum below the largest input. Bits 0 to 2 tell apart eight such products, whose results lie in the same lane, where
// three stages of additions finish. Lane i loads coordinates with bits 3, 4 = i (so that a warp reads whole sectors) and
// ends with those whose bits 5, 6 = i (so that its codes are whole words of every plane). Rotation's result c is y /
// sqrt(128), so that the sum of c^2 is the mean of y^2. For few tokens the 16 rows of A are four tokens (or four times the
// same) x two of the eight products x bit 3 of what comes out, which turns signs of A. So B keeps half of its columns.
#pragma once

#include "common.cuh"

constexpr int HEAD = 128;
constexpr int TILE = 16;
constexpr int MAX_PRESCALES = 13;
constexpr float SMALL = 8.271806e-25f;   // 2^-80: a vector with a smaller mean square is multiplied by 2^100
constexpr float LARGE = 1.2089258e24f;    // 2^80: one with a larger by 2^-100
constexpr float TWO_100 = 1.2676506e30f;
constexpr float NORM = 0.08838834764831845f;  // 1 / sqrt(128)
constexpr int REFERENCE_BYTES = HEAD + 16;    // of a page's end: int8 codes, and last their scale, a bfloat16
constexpr u32 BF16_NAN = 0x7FC0;

struct Source {
    const void* data;
    i64 token, head, coordinate;  // strides in elements
};

struct Target {
    const i64* slots;
    u8* pages;
    i64 page_bytes;
    int page_shift;  // a page has 2^page_shift tokens
    int tokens, heads;
    int align;  // 1: tiles begin where slots do
};

struct Call {
    Source k, v;
    Target target;
};

template <int BITS_, bool TRELLIS_, int RULE_, bool SEARCH_, int TYPE_, bool VECTOR_, int PLANE0_, int PLANE1_, int PATH_,
          int SCALES_, bool IS_K_>
struct Side {
    static constexpr int BITS = BITS_, RULE = RULE_, TYPE = TYPE_;
    static constexpr int PLANE0 = PLANE0_, PLANE1 = PLANE1_, PATH = PATH_, SCALES = SCALES_;
    static constexpr bool TRELLIS = TRELLIS_, SEARCH = SEARCH_, VECTOR = VECTOR_, IS_K = IS_K_, SUBTRACTS = IS_K && MEAN;
    static constexpr int LEVELS = 1 << (BITS - 1);
    static constexpr int ITEM = TYPE == 2 ? 4 : 2;  // bytes of an incoming coordinate
};
typedef Side<K_BITS, K_TRELLIS, K_RULE, K_SEARCH, K_TYPE, K_VECTOR, K_PLANE0, K_PLANE1, K_PATH, K_SCALES, true> KeySide;
typedef Side<V_BITS, V_TRELLIS, V_RULE, V_SEARCH, V_TYPE, V_VECTOR, V_PLANE0, V_PLANE1, V_PATH, V_SCALES, false> ValueSide;

// A lane's rotated coordinates, c[bits 0-2][bit 4][N]. N = 4: 2 * (token g + 8) + bit 3, of two tokens. N = 1: of one token
// and one bit 3, which is bit 2 of the lane.
template <int N>
using Rotated = float[8][2][N];
template <int N>
constexpr int HALVES = N == 4 ? 2 : 1;  // values of bit 3 in a lane
template <class S>
constexpr int PARTS = S::TYPE == 2 ? 2 : 1;  // a lane loads 64 bytes of a token in each

__device__ __forceinline__ u8* page_of(const Target& target, i64 slot, int head) {
    return target.pages + ((slot >> target.page_shift) * target.heads + head) * target.page_bytes;
}

struct Place {
    u8* tile;
    int token;
};

__device__ __forceinline__ Place place_of(const Target& target, i64 slot, int head) {
    int offset = (int)slot & ((1 << target.page_shift) - 1);
    return {page_of(target, slot, head) + (offset >> 4) * TILE_BYTES, offset & 15};
}

// Of the page that a slot lies in, if there is one.
__device__ __forceinline__ const u8* reference_of(const Target& target, i64 slot, int head) {
    return slot < 0 ? nullptr : page_of(target, slot, head) + (target.page_bytes - REFERENCE_BYTES);
}

// --- load and rotate --------------------------------------------------------------------------------------------------

template <int TYPE>
__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    if constexpr (TYPE == 1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

// B: +-2^-7, by the parity of the bits that an incoming and an outgoing coordinate (their bits 3 to 6) share. Its columns
// are outgoing coordinates: two tiles of them, or one with those whose bit 3 is zero.
template <int TYPE, int TILES>
__device__ __forceinline__ void hadamard_16(u32 (&b)[TILES][2], int lane) {
    const u32 one = TYPE == 1 ? 0x2000u : 0x3C00u;  // 2^-7
    int g = lane >> 2, i = lane & 3;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        int to = (g >> 1) << 2 | (TILES == 2 ? tile << 1 | (g & 1) : (g & 1) << 1);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int from = half << 3 | i;  // and with bit 2 for the upper element
            u32 low = one | (__popc(from & to) & 1) << 15, high = one | (__popc((from | 4) & to) & 1) << 15;
            b[tile][half] = low | high << 16;
        }
    }
}

// The eight coordinates 32 j + 8 i + (0 to 7) of a token, 16 bits each; `x` is at coordinate 8 i.
template <bool VECTOR>
__device__ __forceinline__ uint4 load_eight(const u16* x, int j, i64 stride, bool there) {
    uint4 w = make_uint4(0, 0, 0, 0);
    if (!there) return w;
    if constexpr (VECTOR) return __ldg(reinterpret_cast<const uint4*>(x + 32 * j));
    const u16* at = x + 32 * j * stride;
    w.x = __ldg(at) | (u32)__ldg(at + stride) << 16;
    w.y = __ldg(at + 2 * stride) | (u32)__ldg(at + 3 * stride) << 16;
    w.z = __ldg(at + 4 * stride) | (u32)__ldg(at + 5 * stride) << 16;
    w.w = __ldg(at + 6 * stride) | (u32)__ldg(at + 7 * stride) << 16;
    return w;
}

template <bool VECTOR>
__device__ __forceinline__ uint4 load_four(const u32* x, int at, i64 stride, bool there) {
    uint4 w = make_uint4(0, 0, 0, 0);
    if (!there) return w;
    if constexpr (VECTOR) return __ldg(reinterpret_cast<const uint4*>(x + at));
    x += at * stride;
    w.x = __ldg(x);
    w.y = __ldg(x + stride);
    w.z = __ldg(x + 2 * stride);
    w.w = __ldg(x + 3 * stride);
    return w;
}

// `flips` holds the signs of the rotation: bit 15 - n and bit 31 - n those of the two coordinates in register n.
__device__ __forceinline__ u32 flip(u32 pair, u32 flips, int n) { return pair ^ (flips << n & 0x80008000u); }

// Of each token a lane's 64 bytes, or the first or second 64 bytes if coordinates are float32.
template <class S, int ROWS>
__device__ __forceinline__ void load(uint4 (&w)[ROWS][4], const void* const (&rows)[ROWS], const bool (&there)[ROWS],
                                     i64 stride, int part) {
#pragma unroll
    for (int row = 0; row < ROWS; row++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if constexpr (S::TYPE == 2)
                w[row][j] = load_four<S::VECTOR>((const u32*)rows[row], 32 * j + 4 * part, stride, there[row]);
            else
                w[row][j] = load_eight<S::VECTOR>((const u16*)rows[row], j, stride, there[row]);
        }
}

// Adds product number m: with N = 4 that of bits 0-2 = m, with N = 1 those of 2 m (upper rows of A) and 2 m + 1.
template <int TYPE, int N>
__device__ __forceinline__ void add_product(Rotated<N>& c, int m, const u32 (&a)[4], const u32 (&b)[HALVES<N>][2]) {
    if constexpr (N == 4) {
        multiply<TYPE>(c[m][0], a, b[0]);
        multiply<TYPE>(c[m][1], a, b[1]);
    } else {
        float d[4] = {c[2 * m][0][0], c[2 * m][1][0], c[2 * m + 1][0][0], c[2 * m + 1][1][0]};
        multiply<TYPE>(d, a, b[0]);
        c[2 * m][0][0] = d[0], c[2 * m][1][0] = d[1], c[2 * m + 1][0][0] = d[2], c[2 * m + 1][1][0] = d[3];
    }
}

// Register n of A: row n & 1, coordinates with bit 6 = n >> 1. Bits 0-2 are as add_product says.
template <class S, int N>
__device__ __forceinline__ void multiply_halves(Rotated<N>& c, const uint4 (&w)[HALVES<N>][4],
                                                const u32 (&b)[HALVES<N>][2], u32 flips) {
#pragma unroll
    for (int m = 0; m < 4 * HALVES<N>; m++) {
        u32 a[4];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int row = N == 4 ? n & 1 : 0, r = N == 4 ? m : 2 * m + (n & 1), upper = n >> 1;
            const uint4 &low = w[row][2 * upper], &high = w[row][2 * upper + 1];
            u32 x = r < 2 ? low.x : r < 4 ? low.y : r < 6 ? low.z : low.w;
            u32 y = r < 2 ? high.x : r < 4 ? high.y : r < 6 ? high.z : high.w;
            a[n] = flip(__byte_perm(x, y, r & 1 ? 0x7632 : 0x5410), flips, 2 * r + upper);
        }
        add_product<S::TYPE, N>(c, m, a, b);
    }
}

// A float32 is the sum of three bfloat16, cut out of its mantissa: the products are exact all the same.
template <class S, int N>
__device__ __forceinline__ void multiply_floats(Rotated<N>& c, const uint4 (&w)[HALVES<N>][4], int part,
                                                const u32 (&b)[HALVES<N>][2], u32 flips) {
#pragma unroll
    for (int m = 2 * HALVES<N> * part; m < 2 * HALVES<N> * (part + 1); m++) {
        u32 a[3][4];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int row = N == 4 ? n & 1 : 0, r = N == 4 ? m : 2 * m + (n & 1), upper = n >> 1;
            u32 pieces[2][3];
#pragma unroll
            for (int odd = 0; odd < 2; odd++) {
                const uint4& four = w[row][2 * upper + odd];
                int k = r & 3;
                float x = __uint_as_float(k == 0 ? four.x : k == 1 ? four.y : k == 2 ? four.z : four.w);
#pragma unroll
                for (int p = 0; p < 3; p++) {
                    pieces[odd][p] = __float_as_uint(x) & 0xFFFF0000u;
                    x -= __uint_as_float(pieces[odd][p]);
                }
            }
#pragma unroll
            for (int p = 0; p < 3; p++) a[p][n] = flip(pieces[0][p] >> 16 | pieces[1][p], flips, 2 * r + upper);
        }
#pragma unroll
        for (int p = 2; p >= 0; p--) add_product<0, N>(c, m, a[p], b);  // smallest first
    }
}

template <class S, int N>
__device__ __forceinline__ void multiply_part(Rotated<N>& c, const uint4 (&w)[HALVES<N>][4], int part,
                                              const u32 (&b)[HALVES<N>][2], u32 flips) {
    if constexpr (S::TYPE == 2)
        multiply_floats<S, N>(c, w, part, b, flips);
    else
        multiply_halves<S, N>(c, w, b, flips);
}

template <int N>
__device__ __forceinline__ void zero(Rotated<N>& c) {
#pragma unroll
    for (int n = 0; n < 16 * N; n++) c[n / (2 * N)][n / N & 1][n % N] = 0;
}

template <int N>
__device__ __forceinline__ void butterflies(Rotated<N>& c) {
#pragma unroll
    for (int stage = 1; stage < 8; stage *= 2)
#pragma unroll
        for (int r = 0; r < 8; r++)
            if (!(r & stage))
#pragma unroll
                for (int n = 0; n < 2 * N; n++) {
                    float x = c[r][n / N][n % N], y = c[r + stage][n / N][n % N];
                    c[r][n / N][n % N] = x + y;
                    c[r + stage][n / N][n % N] = x - y;
                }
}

// --- the reference ----------------------------------------------------------------------------------------------------

// What a lane subtracts of a token: 16 HALVES<N> codes, in words of r, bit 4 and bit 3, and the value of one as c.
template <int N>
struct Reference {
    u32 codes[2][HALVES<N>][2];
    float unit;
};

// `from` is the address of the reference; null: nothing is subtracted. `first` is the lane's first coordinate.
template <int N>
__device__ __forceinline__ Reference<N> load_reference(const u8* from, int first) {
    Reference<N> reference = {};
    if (!from) return reference;
#pragma unroll
    for (int b4 = 0; b4 < 2; b4++)
#pragma unroll
        for (int b3 = 0; b3 < HALVES<N>; b3++) {
            uint2 eight = *reinterpret_cast<const uint2*>(from + first + 16 * b4 + 8 * b3);
            reference.codes[b4][b3][0] = eight.x, reference.codes[b4][b3][1] = eight.y;
        }
    reference.unit = bf16_to_float(*reinterpret_cast<const u16*>(from + REFERENCE_BYTES - 2)) * NORM;
    return reference;
}

template <int N>
__device__ __forceinline__ void subtract(Rotated<N>& c, int row, const Reference<N>& reference) {
#pragma unroll
    for (int b4 = 0; b4 < 2; b4++)
#pragma unroll
        for (int b3 = 0; b3 < HALVES<N>; b3++)
#pragma unroll
            for (int r = 0; r < 8; r++) {
                float& x = c[r][b4][2 * row + b3];
                x = fmaf(signed_byte(reference.codes[b4][b3][r >> 2], r & 3), -reference.unit, x);
            }
}

// --- sums and scales --------------------------------------------------------------------------------------------------

// The sum over the lanes of a token of what they have by bit 3 of the coordinate.
template <int N>
__device__ __forceinline__ float token_sum(const float (&x)[HALVES<N>]) {
    float sum;
    if constexpr (N == 4)
        sum = x[0] + x[1];
    else
        sum = x[0] + __shfl_xor_sync(ALL_LANES, x[0], 4);
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    return sum + __shfl_xor_sync(ALL_LANES, sum, 2);
}

template <int N>
__device__ __forceinline__ float square(const Rotated<N>& c, int row) {
    float sums[HALVES<N>] = {};
#pragma unroll
    for (int r = 0; r < 8; r++)
#pragma unroll
        for (int b4 = 0; b4 < 2; b4++)
#pragma unroll
            for (int b3 = 0; b3 < HALVES<N>; b3++) {
                float x = c[r][b4][2 * row + b3];
                sums[b3] = fmaf(x, x, sums[b3]);
            }
    return token_sum<N>(sums);
}

__device__ __forceinline__ u32 shift_in_sign(u32 word, float c) {
    return __funnelshift_l(__float_as_uint(c), word, 1);
}

template <int RULE>
__device__ __forceinline__ float stored_scale(float scale, float zz, float z_z0, float z0_z0) {
    if (!(scale > 0)) return 0;
    if (RULE == 1) return scale * (zz / z_z0);
    if (RULE == 2) return scale * sqrtf(zz / z0_z0);
    if (RULE == 3) return scale * (z_z0 / z0_z0);
    return scale;
}

// A vector so large or small that its square leaves float32 is multiplied by a power of two. Of one that is not finite
// `cc` becomes zero, and false comes back.
template <int N>
__device__ __forceinline__ bool bring_into_range(Rotated<N>& c, int row, float& cc, float& times, float& inverse) {
    if (!(cc <= LARGE)) {
        times = 1 / TWO_100;
        inverse = TWO_100;
    } else if (cc < SMALL) {
        times = TWO_100;
        inverse = 1 / TWO_100;
    }
#pragma unroll
    for (int n = 0; n < 16 * HALVES<N>; n++) c[n / (2 * HALVES<N>)][n / HALVES<N> & 1][2 * row + n % HALVES<N>] *= times;
    cc = square<N>(c, row);
    bool finite = cc <= __uint_as_float(0x7F7FFFFF);
    if (!finite) cc = 0;
    return finite;
}

template <int N>
__device__ __forceinline__ void clear(Rotated<N>& c, int row) {
#pragma unroll
    for (int n = 0; n < 16 * HALVES<N>; n++) c[n / (2 * HALVES<N>)][n / HALVES<N> & 1][2 * row + n % HALVES<N>] = 0;
}

// The scale of a candidate is a bfloat16 in the vector's own units; `factor_of` brings c to units of the table.
__device__ __forceinline__ float scale_of(float rms, float prescale, float inverse) {
    return __uint_as_float(pack_bf16(0, rms * prescale * inverse));
}

// --- write ------------------------------------------------------------------------------------------------------------

template <int COUNT>
__device__ __forceinline__ void write_row(u8* to, const u32* words) {
    if constexpr (COUNT == 4) *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    if constexpr (COUNT == 2) *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    if constexpr (COUNT == 1) *reinterpret_cast<u32*>(to) = words[0];
}

// V: the bytes of COUNT words, from word `first` of the row, one by one: the neighbours' tokens are elsewhere.
template <int COUNT>
__device__ __forceinline__ void scatter_bytes(u8* plane, const u32* words, int first, int token) {
    u8* to = plane + 64 * first + (token >> 2) * 16 + (token & 3);
#pragma unroll
    for (int n = 0; n < COUNT; n++)
#pragma unroll
        for (int byte = 0; byte < 4; byte++) to[64 * n + 4 * byte] = words[n] >> 8 * byte;
}

__device__ __forceinline__ u32 bits_of_scale(bool finite, float scale) { return finite ? pack_bf16(scale, 0) : BF16_NAN; }

template <class S>
__device__ __forceinline__ void write_scale(const Place& place, u32 bits) {
    *reinterpret_cast<u16*>(place.tile + S::SCALES + 2 * place.token) = bits;
}

// Word `which` of the row of one token in a plane of rows of WORDS words.
template <class S, int WORDS>
__device__ __forceinline__ void write_word(u8* plane, int token, int which, u32 word) {
    if constexpr (S::IS_K)
        write_row<1>(plane + token * 4 * WORDS + 4 * which, &word);
    else
        scatter_bytes<1>(plane, &word, which, token);
}
