// Stores vectors of 128 coordinates as Lloyd-Max codes of 2, 3 or 4 bits: rotate, normalise, quantise, pack, in one launch. A
// side whose codes are of a trellis is left to store_trellis.cu. Defines: as in store_vectors.cuh.
//
// Two kernels, to the same bytes. `store` is for throughput: a warp takes a tile of 16 tokens of one head, and lane 4 g + i
// works for tokens g and g + 8. `store_few` is for few tokens, when only the time of one warp counts: eight lanes take a
// token, and a warp four tokens or, in a search, four prescales of one token at the same time. Both add up in the same
// order, so that a token's bytes do not depend on how many are stored with it.
//
// Levels are odd multiples of half the codebook's step, so thresholds are integers in that unit, and the level of z depends
// on ceil(z) alone: a table of 257 words, the level in the upper half of each and the index in the lower. The table lies in
// shared memory once per bank, so that 32 random look-ups do not meet. |z| is in units of 256 half-steps: multiplication
// saturates at 1, beyond the last threshold; adding 2^15, rounded up, leaves the ceiling in the lowest bits.
#include "store_vectors.cuh"

constexpr int WARPS = 8;
constexpr int FEW_WARPS = 4;
constexpr int GROUPS = 4;  // of eight lanes, in a warp that stores few tokens
constexpr int CELLS = 257;
constexpr float UNIT = 1.0f / 256;       // of a half-step
constexpr float CEILING = 32768.0f;      // its last place is UNIT
constexpr u32 CEILING_BITS = 0x47000000u;

struct Recipe {
    float scale_to_unit;  // 1 / (sqrt(128) step): times c / scale it is z in units of 256 half-steps
    int prescales;
    float prescale[MAX_PRESCALES];  // and zeros
    int integers[8];  // level m is (integers[m] + 1/2) step
};

struct Format {
    Recipe k, v;
    u32 flips[4];  // signs of the rotation, for the four lanes of a token
};

template <int N>
constexpr int COPIES = N == 4 ? 32 : 4;  // of the table: few look-ups do not pay for one in every bank

// --- the table --------------------------------------------------------------------------------------------------------

template <class S, int N, int THREADS>
__device__ __forceinline__ void fill_table(u32* table, const Recipe& recipe) {
    constexpr int QUADS = COPIES<N> / 4;
#pragma unroll 1
    for (int cell = threadIdx.x; cell < CELLS; cell += THREADS) {
        int index = 0, m = recipe.integers[0];
#pragma unroll
        for (int next = 1; next < S::LEVELS; next++) {
            if (recipe.integers[next - 1] + recipe.integers[next] + 1 < cell) {
                index = next;
                m = recipe.integers[next];
            }
        }
        u32 word = __float_as_uint((2 * m + 1) * UNIT) | index;  // eight bits of mantissa: the lower half is free
        uint4 four = make_uint4(word, word, word, word);
#pragma unroll
        for (int quad = 0; quad < QUADS; quad++) {  // neighbouring lanes begin at different banks
            reinterpret_cast<uint4*>(table)[cell * QUADS + ((quad + threadIdx.x) & (QUADS - 1))] = four;
        }
    }
}

// The shared address of this lane's copy, less what `look_up` adds to it for cell 0.
template <int N>
__device__ __forceinline__ u32 address_of(const u32* table, int lane) {
    return (u32)__cvta_generic_to_shared(table) + 4 * (lane & (COPIES<N> - 1)) - CEILING_BITS * (4 * COPIES<N>);
}

// The word for |c| * factor.
template <int N>
__device__ __forceinline__ u32 look_up(float c, float factor, u32 lane_table) {
    float z;
    asm("mul.rn.sat.f32 %0, %1, %2;" : "=f"(z) : "f"(fabsf(c)), "f"(factor));
    u32 cell = __float_as_uint(__fadd_ru(z, CEILING));
    u32 word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(cell * (4 * COPIES<N>) + lane_table));
    return word;
}

__device__ __forceinline__ float level(u32 word) { return __uint_as_float(word & 0xFFFF0000u); }

// --- quantise ---------------------------------------------------------------------------------------------------------

struct Sums {
    float z_z0, z0_z0;  // <|z|, z0> and <z0, z0>
    float sine;         // 1 - cos^2 of the angle between z and z0
};

// For N = 1: puts a coordinate's code into the lane's words, which begin as zeros. With 4 bits these are two words, by bit
// 4. With fewer a word is of two lanes, and the other's bits stay free.
template <class S>
__device__ __forceinline__ void put(u32 (&words)[S::BITS], int r, int b4, float c, u32 found) {
    u32 signs = __float_as_uint(c), index = S::LEVELS - 1;
    u32 code = S::BITS == 3 ? found & index : (found & index) | (signs >> (32 - S::BITS) & ~index);
    words[b4] += code << 4 * r;
    if constexpr (S::BITS == 3) words[2] += signs >> 31 << (4 * r + 2 * b4);
}

// The sums over one token's coordinates, from the errors e = |z| - z0: nothing cancels, so that two prescales compare right.
// With N = 1 the codes as well.
template <class S, int N>
__device__ __forceinline__ Sums errors(const Rotated<N>& c, int row, float factor, float cc, u32 lane_table,
                                       u32 (&words)[S::BITS]) {
    float ce[HALVES<N>] = {}, ee[HALVES<N>] = {};
#pragma unroll
    for (int r = 0; r < 8; r++)
#pragma unroll
        for (int b4 = 0; b4 < 2; b4++)
#pragma unroll
            for (int b3 = 0; b3 < HALVES<N>; b3++) {
                float x = c[r][b4][2 * row + b3];
                u32 found = look_up<N>(x, factor, lane_table);
                if constexpr (N == 1) put<S>(words, r, b4, x, found);
                float e = fmaf(fabsf(x), factor, -level(found));
                ce[b3] = fmaf(fabsf(x), e, ce[b3]);
                ee[b3] = fmaf(e, e, ee[b3]);
            }
    float zz = cc * factor * factor, z_e = token_sum<N>(ce) * factor, e_e = token_sum<N>(ee);
    Sums sums;
    sums.z_z0 = zz - z_e;
    sums.z0_z0 = zz - 2 * z_e + e_e;
    sums.sine = (zz * e_e - z_e * z_e) / (zz * sums.z0_z0);
    return sums;
}

// The codes of one token's coordinates in this lane: the lane's words of each plane, first plane first. WITH_SUMS: the
// products of the levels on the way.
template <class S, bool WITH_SUMS, int N>
__device__ __forceinline__ void encode(const Rotated<N>& c, int row, float factor, u32 lane_table,
                                       u32 (&words)[S::BITS], float& c_z0, float& z0_z0) {
    float cz[HALVES<N>] = {}, zz[HALVES<N>] = {};
#pragma unroll
    for (int n = 0; n < S::BITS; n++) words[n] = 0;
#pragma unroll
    for (int b4 = 0; b4 < 2; b4++)
#pragma unroll
        for (int r = 7; r >= 0; r--)
#pragma unroll
            for (int b3 = HALVES<N> - 1; b3 >= 0; b3--) {
                float x = c[r][b4][2 * row + b3];
                u32 found = look_up<N>(x, factor, lane_table);
                if (WITH_SUMS) {
                    if (S::RULE != 2) cz[b3] = fmaf(fabsf(x), level(found), cz[b3]);
                    if (S::RULE >= 2) zz[b3] = fmaf(level(found), level(found), zz[b3]);
                }
                if constexpr (N == 1) {
                    put<S>(words, r, b4, x, found);
                } else {
                    u32& word = words[S::BITS == 4 ? 2 * b4 + b3 : b4];
                    if (S::BITS != 3) word = shift_in_sign(word, x);
                    word = (word << (S::BITS == 4 ? 3 : S::BITS == 3 ? 2 : 1)) | (found & (S::LEVELS - 1));
                }
            }
    if constexpr (N == 4 && S::BITS == 3) {  // the sign is a plane of its own
#pragma unroll
        for (int r = 7; r >= 0; r--)
#pragma unroll
            for (int n = 3; n >= 0; n--) words[2] = shift_in_sign(words[2], c[r][n >> 1][2 * row + (n & 1)]);
    }
    if (WITH_SUMS) {
        c_z0 = token_sum<N>(cz);
        z0_z0 = token_sum<N>(zz);
    }
}

__device__ __forceinline__ float factor_of(const Recipe& recipe, float scale, float times) {
    float scaled = scale * times;
    return scaled > 0 ? recipe.scale_to_unit / scaled : 0.0f;
}

// --- write ------------------------------------------------------------------------------------------------------------

// Words 0 to 3 of four lanes (those that differ in bits 2 and 3, the token): afterwards lane p has word p of the four tokens.
__device__ __forceinline__ void exchange_words(u32 (&w)[4], int p) {
#pragma unroll
    for (int stage = 0; stage < 2; stage++) {
        bool upper = p >> stage & 1;
#pragma unroll
        for (int n = 0; n < 2; n++) {
            int low = stage == 0 ? 2 * n : n, high = low + (1 << stage);
            u32 got = __shfl_xor_sync(ALL_LANES, upper ? w[low] : w[high], 4 << stage);
            w[low] = upper ? got : w[low];
            w[high] = upper ? w[high] : got;
        }
    }
}

__device__ __forceinline__ void write_four_tokens(u8* plane, u32 (&w)[4], int word, int token) {
    transpose_bytes(w);
    *reinterpret_cast<uint4*>(plane + 64 * word + (token >> 2) * 16) = make_uint4(w[0], w[1], w[2], w[3]);
}


// V of 16 tokens that lie four by four in their tiles: each lane writes a word of four tokens, 16 bytes.
template <class S>
__device__ __forceinline__ void write_values(const Place (&place)[2], u32 (&words)[2][S::BITS], int lane) {
    int i = lane & 3, p = lane >> 2 & 3;
    if constexpr (S::BITS == 4) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            exchange_words(words[row], p);
            write_four_tokens(place[row].tile + S::PLANE0, words[row], 4 * i + p, place[row].token);
        }
    } else {
        u32 w[4] = {words[0][0], words[0][1], words[1][0], words[1][1]};
        exchange_words(w, p);
        const Place mine = p >> 1 ? place[1] : place[0];
        write_four_tokens(mine.tile + S::PLANE0, w, 2 * i + (p & 1), mine.token);
        if constexpr (S::BITS == 3) {
            u32 s[4] = {words[0][2], words[1][2], 0, 0};
            exchange_words(s, p);
            const Place mine = p & 1 ? place[1] : place[0];
            if (p < 2) write_four_tokens(mine.tile + S::PLANE1, s, i, mine.token);
        }
    }
}

// --- many tokens ------------------------------------------------------------------------------------------------------

// One tile: 16 tokens from `first` on, of which some may not exist.
template <class S>
__device__ __forceinline__ void store_tile(const Source& source, const Recipe& recipe, const Target& target, int first,
                                           int head, const u32 (&b)[2][2], u32 flips, u32 lane_table, int lane) {
    int g = lane >> 2, i = lane & 3;
    bool there[2];
    i64 slot[2];
    const void* rows[2];
#pragma unroll
    for (int row = 0; row < 2; row++) {
        int token = first + g + 8 * row;
        there[row] = (u32)token < (u32)target.tokens;
        slot[row] = there[row] ? __ldg(target.slots + token) : -1;
        rows[row] = (const u8*)source.data +
                    S::ITEM * (token * source.token + head * source.head + 8 * i * (S::VECTOR ? 1 : source.coordinate));
    }
    Rotated<4> c;
    zero<4>(c);
#pragma unroll
    for (int part = 0; part < PARTS<S>; part++) {
        uint4 w[2][4];
        load<S, 2>(w, rows, there, source.coordinate, part);
        multiply_part<S, 4>(c, w, part, b, flips);
    }
    butterflies<4>(c);
    if constexpr (S::SUBTRACTS) {
#pragma unroll
        for (int row = 0; row < 2; row++)
            subtract<4>(c, row, load_reference<4>(reference_of(target, slot[row], head), 32 * i));
    }

    float cc[2] = {square<4>(c, 0), square<4>(c, 1)}, times[2] = {1, 1}, inverse[2] = {1, 1};
    bool finite[2] = {true, true};
    bool usual = cc[0] >= SMALL && cc[0] <= LARGE && cc[1] >= SMALL && cc[1] <= LARGE;
    if (__any_sync(ALL_LANES, !usual)) {
        finite[0] = bring_into_range<4>(c, 0, cc[0], times[0], inverse[0]);
        finite[1] = bring_into_range<4>(c, 1, cc[1], times[1], inverse[1]);
    }

    float factor[2], chosen[2];
    float rms[2] = {sqrtf(cc[0]), sqrtf(cc[1])};
    u32 words[2][S::BITS];
    if constexpr (S::SEARCH) {
        float best[2];
#pragma unroll 1
        for (int n = 0; n < recipe.prescales; n++) {
#pragma unroll
            for (int row = 0; row < 2; row++) {
                float scale = scale_of(rms[row], recipe.prescale[n], inverse[row]);
                float f = factor_of(recipe, scale, times[row]);
                Sums sums = errors<S, 4>(c, row, f, cc[row], lane_table, words[row]);
                if (n == 0 || sums.sine < best[row]) {
                    best[row] = sums.sine;
                    factor[row] = f;
                    chosen[row] = stored_scale<S::RULE>(scale, cc[row] * f * f, sums.z_z0, sums.z0_z0);
                }
            }
        }
    } else {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            chosen[row] = scale_of(rms[row], recipe.prescale[0], inverse[row]);
            factor[row] = factor_of(recipe, chosen[row], times[row]);
        }
    }
    if (__any_sync(ALL_LANES, factor[0] == 0 || factor[1] == 0)) {  // zero has no sign
        if (factor[0] == 0) clear<4>(c, 0);
        if (factor[1] == 0) clear<4>(c, 1);
    }

#pragma unroll
    for (int row = 0; row < 2; row++) {
        float c_z0, z0_z0;
        encode<S, !S::SEARCH && S::RULE != 0, 4>(c, row, factor[row], lane_table, words[row], c_z0, z0_z0);
        if constexpr (!S::SEARCH && S::RULE != 0) {
            float f = factor[row];
            chosen[row] = stored_scale<S::RULE>(chosen[row], cc[row] * f * f, c_z0 * f, z0_z0);
        }
    }

    Place place[2];
#pragma unroll
    for (int row = 0; row < 2; row++) {
        place[row] = place_of(target, slot[row], head);
        if (i == 0 && slot[row] >= 0) write_scale<S>(place[row], bits_of_scale(finite[row], chosen[row]));
    }
    constexpr int WORDS0 = S::BITS == 4 ? 4 : 2;
    if constexpr (S::IS_K) {
#pragma unroll
        for (int row = 0; row < 2; row++)
            if (slot[row] >= 0) {
                write_row<WORDS0>(place[row].tile + S::PLANE0 + place[row].token * 16 * WORDS0 + 4 * WORDS0 * i, words[row]);
                if constexpr (S::BITS == 3)
                    write_row<1>(place[row].tile + S::PLANE1 + place[row].token * 16 + 4 * i, words[row] + 2);
            }
    } else {
        bool together = true;
#pragma unroll
        for (int row = 0; row < 2; row++) {
            i64 begin = slot[row] - (g & 3), leader = __shfl_sync(ALL_LANES, begin, lane & ~12);
            together &= slot[row] >= 0 && (begin & 3) == 0 && begin == leader;
        }
        if (__all_sync(ALL_LANES, together)) {
            write_values<S>(place, words, lane);
        } else {
#pragma unroll
            for (int row = 0; row < 2; row++)
                if (slot[row] >= 0) {
                    scatter_bytes<WORDS0>(place[row].tile + S::PLANE0, words[row], WORDS0 * i, place[row].token);
                    if constexpr (S::BITS == 3)
                        scatter_bytes<1>(place[row].tile + S::PLANE1, words[row] + 2, i, place[row].token);
                }
        }
    }
}

template <class S>
__device__ __forceinline__ void store_side(const Source& source, const Recipe& recipe, const Target& target,
                                           const u32* flips, u32* table) {
    int lane = threadIdx.x & 31, tile = blockIdx.x + gridDim.x * (threadIdx.x >> 5);
    // Tiles begin where slots do, as far as the first slot tells: then V is written four tokens at a time.
    int shift = target.align ? (int)__ldg(target.slots) & 3 : 0;
    int tiles = (target.tokens + shift + TILE - 1) / TILE * target.heads;
    auto prefetch = [&](int which) {
        int token = which / target.heads * TILE - shift + (lane >> 1), head = which % target.heads;
        if (S::VECTOR && which < tiles && (u32)token < (u32)target.tokens) {
            const u8* row = (const u8*)source.data + S::ITEM * (token * source.token + head * source.head);
            for (int line = lane & 1; line < HEAD * S::ITEM / 128; line += 2) prefetch_l2(row + 128 * line);
        }
    };
    prefetch(tile);
    fill_table<S, 4, WARPS * 32>(table, recipe);
    u32 b[2][2];
    hadamard_16<S::TYPE, 2>(b, lane);
    u32 mine = flips[lane & 3], lane_table = address_of<4>(table, lane);
    __syncthreads();
    for (; tile < tiles; tile += gridDim.x * WARPS) {
        prefetch(tile + gridDim.x * WARPS);
        int first = tile / target.heads * TILE - shift;
        store_tile<S>(source, recipe, target, first, tile % target.heads, b, mine, lane_table, lane);
    }
}

extern "C" __global__ __launch_bounds__(WARPS * 32, 2) void store(const __grid_constant__ Call call,
                                                                 const __grid_constant__ Format format) {
    __shared__ __align__(16) u32 table[CELLS * 32];
    wait_for_predecessors();
    if constexpr (!KeySide::TRELLIS)
        if (blockIdx.y == 0) return store_side<KeySide>(call.k, format.k, call.target, format.flips, table);
    if constexpr (!ValueSide::TRELLIS) store_side<ValueSide>(call.v, format.v, call.target, format.flips, table);
}

// --- few tokens -------------------------------------------------------------------------------------------------------

// The compiler moves what it can to where it is used, behind a barrier or a branch, where nobody waits for memory any more.
// So x is computed before what follows; and what comes through a shuffle is not computed or loaded a second time either.
template <class T>
__device__ __forceinline__ void compute_now(T& x) {
    if constexpr (sizeof(T) == 8)
        asm volatile("" : "+l"(x));
    else
        asm volatile("" : "+r"(x));
}
template <class T>
__device__ __forceinline__ void hold(T& x) {
    x = __shfl_sync(ALL_LANES, x, threadIdx.x & 31);
}

// Lane 8 q + 4 h + i has coordinates with bit 3 = h and bits 5, 6 = i, of token or for prescale q of the warp. The vectors
// are under way while all is made ready that does not depend on them.
template <class S>
__device__ __forceinline__ void store_few_side(const Source& source, const Recipe& recipe, const Target& target,
                                               const u32* flips, u32* table) {
    int lane = threadIdx.x & 31, i = lane & 3, half = lane >> 2 & 1, q = lane >> 3;
    int warp = blockIdx.x * FEW_WARPS + (threadIdx.x >> 5), token = S::SEARCH ? warp : warp * GROUPS + q;
    const bool there[1] = {token < target.tokens};
    const void* rows[1] = {(const u8*)source.data + S::ITEM * (token * source.token + blockIdx.y * source.head +
                                                               8 * i * (S::VECTOR ? 1 : source.coordinate))};
    uint4 w[PARTS<S>][1][4];
#pragma unroll
    for (int part = 0; part < PARTS<S>; part++) load<S, 1>(w[part], rows, there, source.coordinate, part);
    i64 slot = there[0] ? __ldg(target.slots + token) : -1;
    int n = S::SEARCH ? q : 0;
    float prescale = recipe.prescale[n];
    u32 b[1][2], mine = flips[i] ^ (half & i ? ALL_LANES : 0), lane_table = address_of<1>(table, lane);
    hadamard_16<S::TYPE, 1>(b, lane);
    Reference<1> reference;
    if constexpr (S::SUBTRACTS) reference = load_reference<1>(reference_of(target, slot, blockIdx.y), 32 * i + 8 * half);
    compute_now(b[0][0]), compute_now(b[0][1]), compute_now(mine);
    hold(prescale), hold(lane_table);
    fill_table<S, 1, FEW_WARPS * 32>(table, recipe);
    __syncthreads();

    Rotated<1> c;
    zero<1>(c);
#pragma unroll
    for (int part = 0; part < PARTS<S>; part++) multiply_part<S, 1>(c, w[part], part, b, mine);
    butterflies<1>(c);
    if constexpr (S::SUBTRACTS) subtract<1>(c, 0, reference);
    Place place = place_of(target, slot, blockIdx.y);
    i64 to = place.tile - target.pages;
    compute_now(to);  // while sums are waited for
    place.tile = target.pages + to;
    float cc = square<1>(c, 0), times = 1, inverse = 1;
    bool finite = true;
    if (!there[0]) cc = 1;
    if (__builtin_expect(__any_sync(ALL_LANES, !(cc >= SMALL && cc <= LARGE)), false))
        finite = bring_into_range<1>(c, 0, cc, times, inverse);

    float rms = sqrtf(cc), scale, factor, z_z0 = 0, z0_z0 = 0;
    u32 words[S::BITS];
    bool chosen = slot >= 0;
    if constexpr (S::SEARCH) {
        float best;
        int candidate;
        for (int begin = 0;;) {  // prescales that do not exist are zero, and never the best
            u32 codes[S::BITS] = {};
            float s = scale_of(rms, prescale, inverse), f = factor_of(recipe, s, times);
            Sums sums = errors<S, 1>(c, 0, f, cc, lane_table, codes);
            // NaN (of scale zero) is the best if it comes first, and else never.
            float sine = sums.sine == sums.sine ? sums.sine : __uint_as_float(n == 0 ? 0xFF800000u : 0x7F800000u);
            if (begin == 0 || sine < best) {
                best = sine, z_z0 = sums.z_z0, z0_z0 = sums.z0_z0;
                candidate = n, scale = s, factor = f;
#pragma unroll
                for (int k = 0; k < S::BITS; k++) words[k] = codes[k];
            }
            begin += GROUPS;
            if (begin >= recipe.prescales) break;
            n = min(begin + q, MAX_PRESCALES - 1);
            prescale = recipe.prescale[n];
        }
        int winner = candidate;  // the first of the best
#pragma unroll
        for (int other = 8; other < 32; other *= 2) {
            float sine = __shfl_xor_sync(ALL_LANES, best, other);
            int m = __shfl_xor_sync(ALL_LANES, winner, other);
            bool better = sine < best || (sine == best && m < winner);
            best = better ? sine : best;
            winner = better ? m : winner;
        }
        chosen = chosen && candidate == winner && (winner & (GROUPS - 1)) == q;
    } else {
        scale = scale_of(rms, prescale, inverse);
        factor = factor_of(recipe, scale, times);
        encode<S, S::RULE != 0, 1>(c, 0, factor, lane_table, words, z_z0, z0_z0);
        z_z0 *= factor;
    }
#pragma unroll
    for (int k = 0; k < S::BITS; k++) {
        if (factor == 0) words[k] = 0;  // zero has no sign
        if constexpr (S::BITS != 4) {   // a word of two lanes
            words[k] <<= k < 2 ? 2 * half : half;
            words[k] |= __shfl_xor_sync(ALL_LANES, words[k], 4);
        }
    }
    if (!chosen) return;
    if constexpr (S::BITS == 4) {
        write_word<S, 16>(place.tile + S::PLANE0, place.token, 4 * i + half, words[0]);
        write_word<S, 16>(place.tile + S::PLANE0, place.token, 4 * i + 2 + half, words[1]);
    } else {
        write_word<S, 8>(place.tile + S::PLANE0, place.token, 2 * i + half, half ? words[1] : words[0]);
        if constexpr (S::BITS == 3)
            if (half == 0) write_word<S, 4>(place.tile + S::PLANE1, place.token, i, words[2]);
    }
    if ((lane & 7) == 0)
        write_scale<S>(place, bits_of_scale(finite, stored_scale<S::RULE>(scale, cc * factor * factor, z_z0, z0_z0)));
}

extern "C" __global__ __launch_bounds__(FEW_WARPS * 32) void store_few(const __grid_constant__ Call call,
                                                                       const __grid_constant__ Format format) {
    __shared__ __align__(16) u32 table[CELLS * COPIES<1>];
    wait_for_predecessors();
    if constexpr (!KeySide::TRELLIS)
        if (blockIdx.z == 0) return store_few_side<KeySide>(call.k, format.k, call.target, format.flips, table);
    if constexpr (!ValueSide::TRELLIS) store_few_side<ValueSide>(call.v, format.v, call.target, format.flips, table);
}
