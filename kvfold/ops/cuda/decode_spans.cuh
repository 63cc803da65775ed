// Which steps each sequence has, and what a warp is told to do with them.
#pragma once

#include "decode_params.cuh"

__device__ __forceinline__ int position(const void* p, int b, int wide) {
    return wide ? (int)((const i64*)p)[b] : ((const int*)p)[b];
}

struct Span { // what the rows of a sequence's queries see together, in steps
    int begin, count;
};

struct Sight { // of one sequence
    int start;  // position of the first query
    int first;  // first visible position
    int length;
};

__device__ __forceinline__ Sight sight(const Params& P, int b) {
    Sight s;
    s.length = position(P.seq_lens, b, P.wide & 1);
    s.start = P.query_start ? position(P.query_start, b, P.wide & 4) : s.length - P.num_queries;
    s.first = P.first ? max(position(P.first, b, P.wide & 2), 0) : 0;
    return s;
}

__device__ __forceinline__ int visible_from(const Params& P, const Sight& s, int t) {
    return P.window ? max(s.first, s.start + t - P.window + 1) : s.first;
}
__device__ __forceinline__ int visible_to(const Params& P, const Sight& s, int t) {
    return min(s.length, s.start + t - P.lag + 1);
}

__device__ __forceinline__ Span span(const Params& P, int b) {
    const Sight s = sight(P, b);
    const int lo = visible_from(P, s, 0), hi = visible_to(P, s, P.num_queries - 1);
    Span r;
    r.begin = lo / STEP_TOKENS;
    r.count = hi > lo ? (hi + STEP_TOKENS - 1) / STEP_TOKENS - r.begin : 0;
    return r;
}

// An item is a sequence and `hr`, which numbers KV heads and blocks of query rows. Most calls need no division for these.
__device__ __forceinline__ int head_of(const Params& P, int hr) { return P.row_blocks == 1 ? hr : hr / P.row_blocks; }
__device__ __forceinline__ int block_of(const Params& P, int hr) { return P.row_blocks == 1 ? 0 : hr % P.row_blocks; }
__device__ __forceinline__ int token_of(const Params& P, int row) { return P.num_queries == 1 ? 0 : row / P.group; }

// Items as four numbers: sequence, KV head and row block, first step of the sequence, number of steps.
__device__ __forceinline__ int4 next_item(const Params& P, int4 item) {
    if (++item.y == P.heads * P.row_blocks) {
        item.y = item.w = 0;
        while (item.w == 0 && ++item.x < P.batch) {
            const Span s = span(P, item.x);
            item.z = s.begin, item.w = s.count;
        }
    }
    return item;
}

// What a warp of the decode kernel has to do, as schedule.cu writes it for all warps, [CTAs, WARPS].
struct Share {
    int4 item;  // sequence, KV head and row block, first step of the sequence, number of steps
    int begin;  // the first step of the item that is the warp's
    int copies; // so many are, and where warps go on to the next item, some of the next ones
    int first_warp, last_warp; // of the grid that have steps of this item, if warps do not go on
    int sharing;    // how many warps these have from the first one on, with a gap behind them; 0: there is no item
    int idle;       // whether no warp of the CTA has an item
    u32 total;      // 0: warps do not go on. Else the steps of all items, a line of which each warp has an equal stretch
    u32 item_begin; // the item's place in the line
};
