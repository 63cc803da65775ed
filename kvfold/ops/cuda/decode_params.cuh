// What decode.cu and schedule.cu are compiled for and called with, and the sizes that follow.
#pragma once

#include "common.cuh"

#define D 128
#define TILE_TOKENS 16
#define STEP_TOKENS 32
#define TILE_BYTES (TILE_TOKENS * (D / 8 * (KBITS + VBITS) + 4))
#define STEP_BYTES (2 * TILE_BYTES)
#define REFERENCE_BYTES (MEAN ? D + 16 : 0) // behind the tiles of a page
#define PAGE_BYTES (PAGE / TILE_TOKENS * TILE_BYTES + REFERENCE_BYTES) // of a head
#define COPIES (PAGE == 16 ? 2 : 1)  // of a step
#define TILE_STRIDE (TILE_BYTES + (PAGE == 16 ? REFERENCE_BYTES : 0)) // in the ring
#define STEP_END (STEP_BYTES + COPIES * REFERENCE_BYTES) // of a step in the ring, where its mbarrier lies
#define SLOT_BYTES (STEP_END + 16) // of the ring
#define WINDOW (32 / COPIES)         // steps whose addresses the lanes of a warp know
#define V_CODES (TILE_TOKENS * D / 8 * KBITS)
#define K_INDEX (KBITS + KTRELLIS) // bits of the index of a level
#define V_INDEX (VBITS + VTRELLIS)
#define SAME_LEVELS (KBITS == VBITS && KTRELLIS == VTRELLIS)
#define K_PATH (V_CODES - TILE_TOKENS * D / 8) // of a trellis: its path bits, the last plane
#define V_PATH (SCALES - TILE_TOKENS * D / 8)
#define SCALES (TILE_TOKENS * D / 8 * (KBITS + VBITS))
#define THREADS (32 * WARPS)
#define ROWS (4 * NB)
#define PARTIAL (ROWS * ROW_FLOATS) // floats of a partial result
#define AHEAD 1 // steps of a warp that are brought to L2 while the kernels ahead end; more keep these from ending
#define AHEAD_BYTES ((MEAN || STEP_END < 3200 ? STEP_END : 3200) / COPIES) // of a copy that is: with 4 bits not all
#define HEADROOM 4.f // of the weights' reference over the first weights, if more follow
#define CHECKED 256 // steps after which integer sums may be too large
#define NOTHING -1e30f

struct Share; // decode_spans.cuh

struct Params { // what is needed first comes first: constants arrive by lines
    const void* seq_lens;
    const void* first;
    const void* query_start;
    int batch, num_queries, heads, row_blocks, group;
    int lag, window; // window 0: none
    int wide;        // bit 0: seq_lens is int64, bit 1: first, bit 2: query_start
    u32 largest_piece; // of an item, for schedule.cu
    int ready;         // whether all but the pages may be read before the kernels ahead have ended
    u64 warps_inverse; // 2^64 over the number of warps, rounded up, for schedule.cu
    Share* schedule; // [grid, WARPS]: schedule.cu writes it, behind `scratch` if nobody has made it ahead; FIXED: none
    const int* table;
    const void* q;
    const u8* pages;
    u32 page_stride;
    int table_stride, pages_per_sequence;
    u32 table_bytes, q_bytes; // how far they reach
    u32 minus_one, low_nibbles; // -1 and 0x0f0f0f0f, kept from the compiler, which would use them worse
    float scale_log2; // score scale * log2(e)
    i64 q_stride_b, q_stride_t, q_stride_h;
    float* scratch; // partial results of CTAs [grid, SLOTS], then of warps [grid, WARPS, PLACES]; FIXED: of CTAs alone
    u32* counters;  // [CTAs]: all zero before and after
    void* out;
    float* lse;
    const u8* mask;
    i64 mask_stride_b, mask_stride_t;
    int splits, begin; // FIXED only: of a sequence; the first sequence of this launch
    float softcap_log2;  // softcap * log2(e)
    float softcap_inv;   // 1 / (softcap * log2 e)
};
