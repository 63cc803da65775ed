// Opens pages: of those whose first slot is among the slots, the key references are chosen and written, before the keys are
// stored. kvfold/ops/references.py says which vector is chosen.
//
// Defines: PAGE (16, 32 or 64 tokens), TILE_BYTES; K_BITS (2, 3 or 4), K_TRELLIS, K_PLANE0, K_PLANE1, K_PATH and K_SCALES
// (offsets in a tile); SINKS (the format's exact first tokens); TYPE (what comes in: 0 bfloat16, 1 float16, 2 float32) and
// VECTOR (1: a vector's coordinates are contiguous and aligned to 16 bytes); SIGN0 to SIGN3 (signs of the rotation, bit 1 =
// negative).
//
// A block looks at `chunk` tokens and takes those that open a page one after the other. The keys that it chooses from are
// dealt out to its warps, of which lane l has coordinates 4 l to 4 l + 3, and stay in registers. Keys of this call are not
// rotated: whether one is nearer to the mean than to zero is the same in every basis. Their mean is.
#include "rotation.cuh"
#include "trellis.cuh"

constexpr int HEAD = 128;
constexpr int TILE = 16;
constexpr int WARPS = 8;
constexpr int KEYS = PAGE / WARPS;            // of a warp
constexpr int REFERENCE_BYTES = HEAD + 16;    // of a page's end: int8 codes, and last their scale, a bfloat16
constexpr float NORM = 0.08838834764831845f;  // 1 / sqrt(128)

struct Opening {
    const void* k;
    i64 token, head, coordinate;  // strides in elements
    const i64* slots;
    const i64* previous;  // for a token that opens a page the page before it in the sequence, or -1
    u8* pages;
    i64 page_bytes;  // of a head
    int tokens, heads, chunk;
    float levels[32];  // by code, of a trellis by the path's two bits and above them the stored refine bits
};

struct Shared {
    float sums[WARPS][HEAD];
    float first[HEAD];
    float largest[WARPS], squares[WARPS], spreads[WARPS];
    int counts[WARPS], votes[WARPS];
    int first_counts;
};

// Of all warps; squares of 1e30 overflow.
__device__ __forceinline__ float largest_of(const Shared& shared) {
    float largest = 1e-30f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, shared.largest[w]);
    return largest;
}

template <class T>
__device__ __forceinline__ T sum_of(const T (&x)[WARPS]) {
    T sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += x[w];
    return sum;
}

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) <= 3.4028235e38f; }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int k = 1; k < 32; k <<= 1) x += __shfl_xor_sync(ALL_LANES, x, k);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int k = 1; k < 32; k <<= 1) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, k));
    return x;
}

// Of how many tokens from `token` on, or back from it, the slots are `slot` and those that follow it, or precede it.
__device__ __forceinline__ int run(const Opening& P, int token, i64 slot, int direction, int lane) {
    int length = 0;
#pragma unroll
    for (int begin = 0; begin < PAGE; begin += 32) {
        int j = begin + lane, at = token + direction * j;
        bool follows = j < PAGE && (u32)at < (u32)P.tokens && __ldg(P.slots + at) == slot + direction * j;
        u32 missing = ~__ballot_sync(ALL_LANES, follows);
        if (length == begin) length += missing ? __ffs(missing) - 1 : 32;
    }
    return length;
}

__device__ __forceinline__ float to_float(u32 bits) { return TYPE == 1 ? half_to_float(bits) : bf16_to_float(bits); }

// A lane's coordinates of a key of this call.
__device__ __forceinline__ void load_key(const Opening& P, i64 token, int head, int lane, float (&x)[4]) {
    const i64 at = token * P.token + head * P.head + 4 * lane * P.coordinate;
    if constexpr (TYPE == 2) {
        const float* from = (const float*)P.k + at;
#pragma unroll
        for (int e = 0; e < 4; e++) x[e] = __ldg(from + e * P.coordinate);
    } else if constexpr (VECTOR) {
        const uint2 v = __ldg((const uint2*)((const u16*)P.k + at));
        x[0] = to_float(v.x & 0xFFFFu), x[1] = to_float(v.x >> 16), x[2] = to_float(v.y & 0xFFFFu), x[3] = to_float(v.y >> 16);
    } else {
        const u16* from = (const u16*)P.k + at;
#pragma unroll
        for (int e = 0; e < 4; e++) x[e] = to_float(__ldg(from + e * P.coordinate));
    }
}

// Four nibbles with a lane's bits of a plane: in a word are 32 / WIDTH coordinates, eight of them side by side.
template <int WIDTH>
__device__ __forceinline__ u32 nibbles(const u8* row, int lane) {
    constexpr u32 MASK = WIDTH == 4 ? 0xFFFFu : WIDTH == 2 ? 0x3333u : 0x1111u;
    const u32 word = *((const u32*)row + lane / (8 / WIDTH));
    return word >> WIDTH * (lane / 2 % (4 / WIDTH)) >> 16 * (lane & 1) & MASK;
}

// A lane's coordinates of a key that a page holds; `level` is that of code `lane`, and `offset` the page's reference.
__device__ __forceinline__ void stored_key(const u8* page, int token, int lane, float level, const float (&offset)[4],
                                           float (&x)[4]) {
    constexpr int WIDTH = K_TRELLIS ? (K_BITS == 2 ? 1 : 2) : K_BITS == 3 ? 2 : K_BITS;  // of the first plane
    constexpr bool SECOND = K_TRELLIS ? K_BITS == 4 : K_BITS == 3;                       // whether another of 1 bit follows
    const u8* tile = page + token / TILE * TILE_BYTES;
    token %= TILE;
    u32 low = nibbles<WIDTH>(tile + K_PLANE0 + token * (HEAD * WIDTH / 8), lane), top = 0, path = 0;
    if constexpr (SECOND) top = nibbles<1>(tile + K_PLANE1 + token * (HEAD / 8), lane);
    if constexpr (K_TRELLIS) {
        const u32* words = (const u32*)(tile + K_PATH + token * (HEAD / 8)) + lane / 8;
        path = path_of_eight(lane < 8 ? 0 : words[-1], words[0], lane / 2 & 3) >> 16 * (lane & 1);
    }
    const float scale = bf16_to_float(*((const u16*)(tile + K_SCALES) + token));
#pragma unroll
    for (int e = 0; e < 4; e++) {
        u32 code = (low >> 4 * e & 15) | (top >> 4 * e & 1) << WIDTH;
        if constexpr (K_TRELLIS) code = code << 2 | (path >> 4 * e & 3);
        x[e] = __shfl_sync(ALL_LANES, level, code) * scale + offset[e];
    }
}

// A lane's four codes of a page's reference, as floats.
__device__ __forceinline__ void stored_reference(const u8* end, int lane, float (&x)[4]) {
    const u32 codes = *((const u32*)(end - REFERENCE_BYTES) + lane);
    const float scale = bf16_to_float(*((const u16*)end - 1));
#pragma unroll
    for (int e = 0; e < 4; e++) x[e] = signed_byte(codes, e) * scale;
}

// A lane's coordinates of the mean of all warps' keys, and whether most are nearer to it than to zero. Keys that are not finite
// do not count and become zeros.
__device__ __forceinline__ bool mean_of(float (&x)[KEYS][4], bool (&counted)[KEYS], Shared& shared, int warp, int lane,
                                        float (&mean)[4]) {
    int count = 0, votes = 0;
    float largest = 0;
#pragma unroll
    for (int n = 0; n < KEYS; n++) {
        const bool finite = is_finite(x[n][0]) && is_finite(x[n][1]) && is_finite(x[n][2]) && is_finite(x[n][3]);
        counted[n] = __all_sync(ALL_LANES, counted[n] && finite);
        count += counted[n];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            x[n][e] = counted[n] ? x[n][e] : 0;
            largest = fmaxf(largest, fabsf(x[n][e]));
        }
    }
    largest = warp_max(largest);
    if (lane == 0) shared.counts[warp] = count, shared.largest[warp] = largest;
    __syncthreads();
    count = sum_of(shared.counts);
    const float share = 1.0f / max(count, 1), inverse = 1.0f / largest_of(shared);
#pragma unroll
    for (int e = 0; e < 4; e++) {
        float sum = 0;
#pragma unroll
        for (int n = 0; n < KEYS; n++) sum = fmaf(x[n][e], share, sum);
        shared.sums[warp][4 * lane + e] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < 4; e++) {
        mean[e] = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) mean[e] += shared.sums[w][4 * lane + e];
    }
#pragma unroll
    for (int n = 0; n < KEYS; n++) {
        float further = 0;  // the squared distance from the mean, less that from zero
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float centre = mean[e] * inverse;
            further = fmaf(centre, centre - 2 * (x[n][e] * inverse), further);
        }
        votes += counted[n] && warp_sum(further) < 0;
    }
    if (lane == 0) shared.votes[warp] = votes;
    __syncthreads();
    return 2 * sum_of(shared.votes) >= count;
}

// Whether the first key of a sequence, key 0 of warp 0, is to be its page's reference: it stands apart from the others and is
// near. `mean` is of all keys that count. The answer is for warp 0.
__device__ __forceinline__ bool first_stands_apart(const float (&x)[KEYS][4], const bool (&counted)[KEYS], Shared& shared,
                                                   int warp, int lane, const float (&mean)[4]) {
    if (warp == 0) {
#pragma unroll
        for (int e = 0; e < 4; e++) shared.first[4 * lane + e] = x[0][e];
        if (lane == 0) shared.first_counts = counted[0];
    }
    __syncthreads();
    const int all = sum_of(shared.counts), count = all - shared.first_counts;
    const float inverse = 1.0f / largest_of(shared), share = 1.0f / max(count, 1);
    float distance = 0, spread = 0, squares = 0;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const float first = shared.first[4 * lane + e] * inverse;
        const float centre = fmaf(mean[e] * inverse, all, -first) * share;  // of the others
        distance = fmaf(first - centre, first - centre, distance);
#pragma unroll
        for (int n = 0; n < KEYS; n++) {
            const float other = x[n][e] * inverse;
            if (!counted[n] || (warp == 0 && n == 0)) continue;
            spread = fmaf(other - centre, other - centre, spread);
            squares = fmaf(other, other, squares);
        }
    }
    spread = warp_sum(spread), squares = warp_sum(squares);
    if (lane == 0) shared.spreads[warp] = spread, shared.squares[warp] = squares;
    __syncthreads();
    distance = warp_sum(distance) * count, spread = sum_of(shared.spreads);
    return counted[0] && distance >= 1.5f * spread && distance + spread <= 2 * sum_of(shared.squares);
}

__device__ __forceinline__ void rotate(float (&x)[4], int lane) {
    const u32 flips = signs(lane >> 3) >> 4 * (lane & 7);
#pragma unroll
    for (int e = 0; e < 4; e++) x[e] = __uint_as_float(__float_as_uint(x[e] * NORM) ^ (flips >> e << 31));
    const float4 turned = hadamard(make_float4(x[0], x[1], x[2], x[3]), lane);
    x[0] = turned.x, x[1] = turned.y, x[2] = turned.z, x[3] = turned.w;
}

// As PageLayout.encode_reference does.
__device__ __forceinline__ void write_reference(u8* end, const float (&x)[4], int lane) {
    float largest = warp_max(fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3]))));
    const bool finite = is_finite(x[0]) && is_finite(x[1]) && is_finite(x[2]) && is_finite(x[3]);
    if (!__all_sync(ALL_LANES, finite)) largest = 0;
    const u32 scale = float_to_bf16(largest / 127.0f);
    const float inverse = 1.0f / bf16_to_float(scale);
    u32 codes = 0;
    if (is_finite(inverse)) {
#pragma unroll
        for (int e = 0; e < 4; e++) codes |= (min(max(__float2int_rn(x[e] * inverse), -127), 127) & 255) << 8 * e;
    }
    *((u32*)(end - REFERENCE_BYTES) + lane) = codes;
    if (lane == 0) *((uint4*)end - 1) = make_uint4(0, 0, 0, scale << 16);
}

extern "C" __global__ __launch_bounds__(WARPS * 32) void open_pages(const __grid_constant__ Opening P) {
    __shared__ Shared shared;
    wait_for_predecessors();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, head = blockIdx.y, begin = blockIdx.x * P.chunk;
    i64 mine = lane < P.chunk && begin + lane < P.tokens ? __ldg(P.slots + begin + lane) : -1;
    const float level = P.levels[lane];
    for (u32 opening = __ballot_sync(ALL_LANES, mine >= 0 && mine % PAGE == 0); opening; opening &= opening - 1) {
        const int token = begin + __ffs(opening) - 1;
        const i64 slot = __ldg(P.slots + token), before = __ldg(P.previous + token);
        const int own = run(P, token, slot, 1, lane);
        // of the page before, the last tokens that this call writes
        const int fresh = before < 0 ? 0 : run(P, token - 1, before * PAGE + PAGE - 1, -1, lane);
        const bool take_own = own >= PAGE / 4 || before < 0, stored = !take_own && fresh < PAGE / 2;
        const int first = take_own ? token : token - fresh, count = take_own ? own : stored ? PAGE - fresh : fresh;

        __syncthreads();  // the page before needs nothing in shared memory any more
        float x[KEYS][4], offset[4], mean[4];
        bool counted[KEYS];
        const int sinks = before < 0 && own > SINKS ? SINKS : 0;  // which are read exactly, from elsewhere
        const u8* page = P.pages + (before * P.heads + head) * P.page_bytes;
        if (stored) stored_reference(page + P.page_bytes, lane, offset);
#pragma unroll
        for (int n = 0; n < KEYS; n++) {
            const int key = warp + WARPS * n;
            counted[n] = sinks <= key && key < count;
            x[n][0] = x[n][1] = x[n][2] = x[n][3] = 0;
            if (!counted[n]) continue;
            if (stored)
                stored_key(page, key, lane, level, offset, x[n]);
            else
                load_key(P, first + key, head, lane, x[n]);
        }
        const bool good = mean_of(x, counted, shared, warp, lane, mean);
        const bool take_first = !SINKS && before < 0 && first_stands_apart(x, counted, shared, warp, lane, mean);
        if (warp) continue;
#pragma unroll
        for (int e = 0; e < 4; e++) mean[e] = take_first ? x[0][e] : good ? mean[e] : 0;
        if (!stored) rotate(mean, lane);
        write_reference(P.pages + (slot / PAGE * P.heads + head + 1) * P.page_bytes, mean, lane);
    }
}
