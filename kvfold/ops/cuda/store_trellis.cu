// Stores vectors of 128 coordinates as codes of a trellis (kvfold/codecs/trellis.py): rotate, normalise, find the best path,
// pack. Sides with other codes are left to store.cu. Defines: as in store_vectors.cuh.
//
// A warp takes 16 vectors. It rotates them as store.cu does, lane 4 g + i for vectors g and g + 8, and hands them through
// shared memory to their searching lanes: lane v finds the first half of vector v's path forwards, lane 16 + v the second half
// backwards, and in the middle they agree on a state. A trellis reads the same in both directions: from a state of two path
// bits, `2 newest + older`, the level of a coordinate has the subset `2 (next xor older) + newest`, and backwards it is the
// other way round. So both lanes do the same, but for where they begin: forwards in state 0, backwards in any. Then each goes
// back over its half.
//
// `store_trellis` tries one prescale of its 16 vectors after the other. `store_trellis_few` is for few tokens: the 16 vectors
// are four, with four prescales each. Sums are the same, so that bytes do not depend on how many tokens are stored together.
//
// Levels are odd multiples of half a step, and thresholds between levels of a subset integers in that unit. So the nearest
// level in each subset depends on ceil(z) alone: a table has the four for 513 cells. Multiplication with saturation brings z +
// 256, in units of 512, between 0 and 1; adding 2^14, rounded up, leaves the cell in the lowest bits.
#include "store_vectors.cuh"

constexpr int WARPS = 4;
constexpr int ROWS = 16;   // vectors of a warp
constexpr int STEPS = 64;  // of half a path
constexpr int CELLS = 513;
constexpr int MIDDLE = 256;               // the cell of zero
constexpr float CEILING = 16384.0f;       // its last place is 1 / 512
constexpr u32 CEILING_BITS = 0x46800000u;
constexpr float FAR = 1e30f;              // the cost of a state that no path is in
constexpr int TOKENS = 4;                 // of a warp that stores few

struct Recipe {
    float scale_to_unit;  // 2 sqrt(128) / step: times c / scale it is z in half-steps
    int prescales;
    float prescale[MAX_PRESCALES];  // and zeros
    int integers[16];  // positive level m is (integers[m] + 1/2) step
};

struct Format {
    Recipe k, v;
    u32 flips[4];  // signs of the rotation, for the four lanes of a token
};

struct Shared {
    uint2 levels[CELLS];  // the nearest level of each subset, in half-steps, as bfloat16
    u32 refines[CELLS];   // their refine bits as stored, a nibble each; above them the same with two lower bits exchanged
    float vectors[WARPS][STEPS][32];
    u32 decisions[WARPS][STEPS / 8][32];
};

template <class S>
__device__ __forceinline__ void fill_tables(Shared& shared, const Recipe& recipe) {
    constexpr int REFINES = 1 << (S::BITS - 1), POSITIVE = 1 << S::BITS;
    auto level = [&](int index) {  // they ascend
        int m = index < POSITIVE ? POSITIVE - 1 - index : index - POSITIVE;
        return index < POSITIVE ? -2 * recipe.integers[m] - 1 : 2 * recipe.integers[m] + 1;
    };
#pragma unroll 1
    for (int cell = threadIdx.x; cell < CELLS; cell += WARPS * 32) {
        u32 nearest[4], refines = 0;
#pragma unroll
        for (int subset = 0; subset < 4; subset++) {
            int r = 0, found = level(subset);
#pragma unroll
            for (int next = 1; next < REFINES; next++)
                if ((level(4 * next - 4 + subset) + level(4 * next + subset)) / 2 < cell - MIDDLE)
                    r = next, found = level(4 * next + subset);
            nearest[subset] = __float_as_uint((float)found) >> 16;
            const int stored = r < REFINES / 2 ? REFINES / 2 - 1 - r : r;  // sign and magnitude
            const int exchanged = S::BITS == 2 ? stored : (stored & 4) | (stored & 1) << 1 | (stored >> 1 & 1);
            refines |= (stored | exchanged << 16) << 4 * subset;
        }
        shared.levels[cell] = make_uint2(nearest[0] | nearest[1] << 16, nearest[2] | nearest[3] << 16);
        shared.refines[cell] = refines;
    }
}

// --- the best path ----------------------------------------------------------------------------------------------------

// Words of codes of half a vector, as they lie in the planes: two of the planes of 1 bit, and twice as many of 2 bits.
template <int BITS>
struct Words {
    static constexpr int LOWS = BITS == 2 ? 1 : 2;
    u32 path[2], low[2][LOWS], top[2];
};

struct Sums {
    float z_e, e_e;  // of c and the error, and of the errors
};

__device__ __forceinline__ u32 cell_of(float c, float factor) {
    float z;
    asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(z) : "f"(c), "f"(factor * (1.0f / 512)), "f"(0.5f));
    return __float_as_uint(__fadd_ru(z, CEILING)) - CEILING_BITS;
}

// The state in the middle, as this lane has it.
__device__ __forceinline__ int search(const Shared& shared, u32 (&decisions)[STEPS / 8][32], const float (&vectors)[STEPS][32],
                                      float factor, int lane) {
    const bool backwards = lane >= ROWS;
    float cost[4] = {0, backwards ? 0 : FAR, backwards ? 0 : FAR, backwards ? 0 : FAR};
#pragma unroll 1
    for (int octet = 0; octet < STEPS / 8; octet++) {
        u32 word = 0;
#pragma unroll
        for (int step = 0; step < 8; step++) {
            const float c = vectors[8 * octet + step][lane];
            const uint2 levels = shared.levels[cell_of(c, factor)];
            const float e0 = fmaf(c, factor, -__uint_as_float(levels.x << 16));
            const float e1 = fmaf(c, factor, -__uint_as_float(levels.x & 0xFFFF0000u));
            const float e2 = fmaf(c, factor, -__uint_as_float(levels.y << 16));
            const float e3 = fmaf(c, factor, -__uint_as_float(levels.y & 0xFFFF0000u));
            // to state 2 next + newest, from 2 newest + older, with an older bit of 0 and of 1
            const float from0[4] = {fmaf(e0, e0, cost[0]), fmaf(e1, e1, cost[2]), fmaf(e2, e2, cost[0]), fmaf(e3, e3, cost[2])};
            const float from1[4] = {fmaf(e2, e2, cost[1]), fmaf(e3, e3, cost[3]), fmaf(e0, e0, cost[1]), fmaf(e1, e1, cost[3])};
#pragma unroll
            for (int state = 3; state >= 0; state--) {
                word = shift_in_sign(word, from1[state] - from0[state]);
                cost[state] = fminf(from0[state], from1[state]);
            }
        }
        decisions[octet][lane] = word;
    }
    // the same state is 2 u_t + u_{t-1} forwards and 2 u_{t-1} + u_t backwards
    float least = 0;
    int middle = 0;
#pragma unroll
    for (int state = 0; state < 4; state++) {
        const int reversed = (state & 1) << 1 | state >> 1;
        const float given = __shfl_xor_sync(ALL_LANES, backwards ? cost[reversed] : cost[state], ROWS);
        const float total = (backwards ? cost[reversed] : cost[state]) + given;
        if (state == 0 || total < least) least = total, middle = state;
    }
    return backwards ? (middle & 1) << 1 | middle >> 1 : middle;
}

// From the middle back to where the search began: the codes on the way, and sums over the whole vector.
template <int BITS>
__device__ __forceinline__ Sums trace(const Shared& shared, const u32 (&decisions)[STEPS / 8][32],
                                      const float (&vectors)[STEPS][32], float factor, int state, int lane,
                                      Words<BITS>& words) {
    const bool backwards = lane >= ROWS;
    constexpr int LOWS = Words<BITS>::LOWS;
    float ce = 0, ee = 0;
#pragma unroll
    for (int w = 0; w < 2; w++) {
        u32 path = 0, low[2] = {0, 0}, top = 0;
#pragma unroll 1
        for (int octet = 7 - 4 * w; octet > 3 - 4 * w; octet--) {
            const u32 word = decisions[octet][lane];
#pragma unroll
            for (int step = 7; step >= 0; step--) {
                const int newest = state >> 1, older = state & 1, next = word >> (4 * (7 - step) + state) & 1;
                const bool upper = newest ^ next;
                const float c = vectors[8 * octet + step][lane];
                const u32 cell = cell_of(c, factor);
                const uint2 levels = shared.levels[cell];
                const u32 pair = upper ? levels.y : levels.x;
                const float e = fmaf(c, factor, -__uint_as_float(older ? pair & 0xFFFF0000u : pair << 16));
                ce = fmaf(c, e, ce), ee = fmaf(e, e, ee);
                const u32 r = shared.refines[cell] >> ((backwards ? 16 : 0) + 8 * upper + 4 * older) & 7;
                path = path << 1 | (backwards ? next : newest);
                if (BITS == 2) low[0] = low[0] << 1 | r;
                else low[step % 4 < 2] = low[step % 4 < 2] << 2 | (r & 3);
                if (BITS == 4) top = top << 1 | r >> 2;
                state = 2 * older + next;
            }
        }
        // backwards coordinates came in their order, the first one in the highest bit
        words.path[w] = backwards ? __brev(path) : path;
        words.top[w] = backwards ? __brev(top) : top;
        words.low[w][0] = backwards ? __brev(low[0]) : low[LOWS - 1];
        if (LOWS == 2) words.low[w][LOWS - 1] = backwards ? __brev(low[1]) : low[0];
    }
    ce += __shfl_xor_sync(ALL_LANES, ce, ROWS);
    ee += __shfl_xor_sync(ALL_LANES, ee, ROWS);
    return {ce * factor, ee};
}

// --- store ------------------------------------------------------------------------------------------------------------

// What the lanes 4 g of a rotated vector know, for the lane that searches it.
template <class T>
__device__ __forceinline__ T of_vector(const T (&x)[2], int lane) {
    const T first = __shfl_sync(ALL_LANES, x[0], 4 * (lane & 7)), second = __shfl_sync(ALL_LANES, x[1], 4 * (lane & 7));
    return lane & 8 ? second : first;
}

template <class S>
__device__ __forceinline__ void write_words(const Place& place, const Words<S::BITS>& words, int lane) {
#pragma unroll
    for (int w = 0; w < 2; w++) {
        const int which = lane >= ROWS ? 2 + w : 1 - w;
        write_word<S, 4>(place.tile + S::PATH, place.token, which, words.path[w]);
        if constexpr (S::BITS == 2) {
            write_word<S, 4>(place.tile + S::PLANE0, place.token, which, words.low[w][0]);
        } else {
            write_word<S, 8>(place.tile + S::PLANE0, place.token, 2 * which, words.low[w][0]);
            write_word<S, 8>(place.tile + S::PLANE0, place.token, 2 * which + 1, words.low[w][1]);
        }
        if constexpr (S::BITS == 4) write_word<S, 4>(place.tile + S::PLANE1, place.token, which, words.top[w]);
    }
}

// A warp's vectors, from token `first` on: sixteen tokens, or four with four prescales each.
template <class S, bool FEW>
__device__ __forceinline__ void store_rows(const Source& source, const Recipe& recipe, const Target& target, int first, int head,
                                           const u32 (&b)[2][2], u32 flips, Shared& shared, int warp, int lane) {
    const int g = lane >> 2, i = lane & 3;
    auto token_of = [&](int row) { return first + (FEW ? row & (TOKENS - 1) : row); };
    bool there[2];
    const void* rows[2];
#pragma unroll
    for (int row = 0; row < 2; row++) {
        const int token = token_of(g + 8 * row);
        there[row] = token < target.tokens;
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
        for (int row = 0; row < 2; row++) {
            const i64 slot = there[row] ? __ldg(target.slots + token_of(g + 8 * row)) : -1;
            subtract<4>(c, row, load_reference<4>(reference_of(target, slot, head), 32 * i));
        }
    }
    float cc[2] = {square<4>(c, 0), square<4>(c, 1)}, times[2] = {1, 1}, inverse[2] = {1, 1};
    int finite[2] = {1, 1};
    const bool usual = cc[0] >= SMALL && cc[0] <= LARGE && cc[1] >= SMALL && cc[1] <= LARGE;
    if (__any_sync(ALL_LANES, !usual)) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            finite[row] = bring_into_range<4>(c, row, cc[row], times[row], inverse[row]);
            if (!finite[row]) clear<4>(c, row);
        }
    }

    // to the lanes that search: those of the second half begin with the last coordinate
    float(&vectors)[STEPS][32] = shared.vectors[warp];
    __syncwarp();
#pragma unroll
    for (int n = 0; n < 64; n++) {
        const int r = n >> 3, b4 = n >> 2 & 1, b3 = n & 1, row = n >> 1 & 1;
        const int t = 32 * i + 4 * r + 2 * b4 + b3, at = g + 8 * row;
        if (t < STEPS) vectors[t][at] = c[r][b4][2 * row + b3];
        else vectors[2 * STEPS - 1 - t][ROWS + at] = c[r][b4][2 * row + b3];
    }
    __syncwarp();

    const int row = lane & (ROWS - 1), token = token_of(row);
    const float square_sum = of_vector(cc, lane), rms = sqrtf(square_sum);
    const float own_times = of_vector(times, lane), own_inverse = of_vector(inverse, lane);
    const bool is_finite = of_vector(finite, lane);
    u32(&decisions)[STEPS / 8][32] = shared.decisions[warp];
    Words<S::BITS> best_words;
    float best = 0, stored = 0;
    int winner = 0;
#pragma unroll 1
    for (int begin = 0; begin < recipe.prescales; begin += FEW ? TOKENS : 1) {
        // prescales that do not exist are zero, and never the best
        const int n = FEW ? min(begin + row / TOKENS, MAX_PRESCALES - 1) : begin;
        const float scale = scale_of(rms, recipe.prescale[n], own_inverse), scaled = scale * own_times;
        const float factor = scaled > 0 ? recipe.scale_to_unit / scaled : 0;
        Words<S::BITS> words;
        const int middle = search(shared, decisions, vectors, factor, lane);
        const Sums sums = trace<S::BITS>(shared, decisions, vectors, factor, middle, lane, words);
        const float z_z = square_sum * factor * factor, z0_z0 = z_z - 2 * sums.z_e + sums.e_e;
        float sine = (z_z * sums.e_e - sums.z_e * sums.z_e) / (z_z * z0_z0);
        // NaN (of scale zero) is the best if it comes first, and else never
        if (sine != sine) sine = __uint_as_float(n == 0 ? 0xFF800000u : 0x7F800000u);
        if (begin == 0 || sine < best) {
            best = sine, winner = n, best_words = words;
            stored = stored_scale<S::RULE>(scale, z_z, z_z - sums.z_e, z0_z0);
        }
    }
    bool chosen = true;
    if constexpr (FEW) {  // the first of the best
        const int own = winner;
#pragma unroll
        for (int other = TOKENS; other < ROWS; other *= 2) {
            const float sine = __shfl_xor_sync(ALL_LANES, best, other);
            const int m = __shfl_xor_sync(ALL_LANES, winner, other);
            const bool better = sine < best || (sine == best && m < winner);
            best = better ? sine : best;
            winner = better ? m : winner;
        }
        chosen = own == winner && (winner & (TOKENS - 1)) == row / TOKENS;
    }
    const i64 slot = token < target.tokens ? __ldg(target.slots + token) : -1;
    if (slot < 0 || !chosen) return;
    const Place place = place_of(target, slot, head);
    write_words<S>(place, best_words, lane);
    if (lane < ROWS) write_scale<S>(place, bits_of_scale(is_finite, stored));
}

template <class S, bool FEW>
__device__ __forceinline__ void store_side(const Source& source, const Recipe& recipe, const Target& target, const u32* flips,
                                           Shared& shared) {
    constexpr int EACH = FEW ? TOKENS : ROWS;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, groups = (target.tokens + EACH - 1) / EACH;
    fill_tables<S>(shared, recipe);
    u32 b[2][2];
    hadamard_16<S::TYPE, 2>(b, lane);
    __syncthreads();
    for (int item = blockIdx.x + gridDim.x * warp; item < groups * target.heads; item += gridDim.x * WARPS)
        store_rows<S, FEW>(source, recipe, target, item / target.heads * EACH, item % target.heads, b, flips[lane & 3], shared,
                           warp, lane);
}

template <bool FEW>
__device__ __forceinline__ void store_sides(const Call& call, const Format& format, Shared& shared) {
    wait_for_predecessors();
    if constexpr (KeySide::TRELLIS)
        if (blockIdx.y == 0) return store_side<KeySide, FEW>(call.k, format.k, call.target, format.flips, shared);
    if constexpr (ValueSide::TRELLIS) store_side<ValueSide, FEW>(call.v, format.v, call.target, format.flips, shared);
}

extern "C" __global__ __launch_bounds__(WARPS * 32) void store_trellis(const __grid_constant__ Call call,
                                                                      const __grid_constant__ Format format) {
    __shared__ Shared shared;
    store_sides<false>(call, format, shared);
}

extern "C" __global__ __launch_bounds__(WARPS * 32) void store_trellis_few(const __grid_constant__ Call call,
                                                                          const __grid_constant__ Format format) {
    __shared__ Shared shared;
    store_sides<true>(call, format, shared);
}
