// Which steps there are, how they are dealt out to warps, and where their bytes lie.
#pragma once

#include "decode_params.cuh"
#include "decode_ptx.cuh"

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

// What a warp has not yet looked up the addresses of: from a step of an item on, so many steps.
struct Copies {
    int4 item;
    int step, left;
};

// Where a copy is from: a page, as the table has it, which may still be on its way here, and a place in it.
struct Source {
    u32 page, offset; // offset NOWHERE: there is no such page
};
#define NOWHERE ~0u

// Its address; 0: there is none. With key references bit 0 is set in the second step of a page.
__device__ __forceinline__ u64 address_of(const Params& P, const Source& source) {
    return source.offset == NOWHERE ? 0 : (u64)P.pages + (u64)source.page * P.page_stride + source.offset;
}

// The sources of the copies of the next `steps` steps, in their order in the lanes from `first` on.
__device__ __forceinline__ void look_up(const Params& P, Copies& copies, Source& source, u32 first, int steps, u32 lane) {
    Copies c = copies;
    const int mine = (lane - first) / COPIES; // huge for lanes before the first
#pragma unroll 1
    for (int done = 0; done < steps && c.left > 0;) {
        if (c.step == c.item.w) c.item = next_item(P, c.item), c.step = 0;
        const int n = min(min(steps - done, c.item.w - c.step), c.left);
        if (mine >= done && mine < done + n) {
            const int step = c.item.z + c.step + mine - done;
            const int page = step * STEP_TOKENS / PAGE + (PAGE == 16 ? lane & 1 : 0);
            source.offset = NOWHERE;
            bool there = true; // of two pages in a step one may lie before or behind what is seen, and be anything
            if (PAGE == 16) {
                const Sight s = sight(P, c.item.x);
                there = page * 16 < s.length && (page + 1) * 16 > visible_from(P, s, 0);
            }
            if (there) {
                source.page = P.table[(i64)c.item.x * P.table_stride + page];
                source.offset = head_of(P, c.item.y) * PAGE_BYTES + (PAGE == 64 ? (step & 1) * (STEP_BYTES + MEAN) : 0);
            }
        }
        done += n, c.step += n, c.left -= n;
    }
    __syncwarp(); // everybody has read
    if (lane == 0) copies = c;
    __syncwarp();
}

// Of an address that is not 0.
__device__ __forceinline__ u64 tiles_at(u64 source) { return MEAN && PAGE == 64 ? source & ~(u64)1 : source; }

#if !FIXED
// How the steps of all sequences are dealt out to the warps of the grid.
struct Deal {
    u32 total; // steps of all items
    u32 piece; // 0: each warp gets an equal stretch of the line. Else each item is cut into pieces of at most so many steps
    u32 warps; // that have a place in the line, the first ones; in gaps without work
    float inverse; // of piece
    float spread;  // 0, or pieces of a step, if more and shorter pieces than needed are wanted
    bool gaps;     // whether warps behind an item are left without work, so that no item lies in two CTAs
};

// n / divisor, rounded down; exact for n below 2^20.
__device__ __forceinline__ u32 quotient(u32 n, float inverse) { return (u32)(((float)n + 0.5f) * inverse); }

// Into how many pieces an item of so many steps is cut, or how many steps there are in the line.
__device__ __forceinline__ u32 units_of(const Deal& d, u32 steps) {
    return d.piece ? max(quotient(steps + d.piece - 1, d.inverse), (u32)((float)steps * d.spread)) : steps;
}

// How many places an item has in the line: a warp each, or a step. With gaps a divisor of a CTA's warps, four at least, for as
// many share what is to be done at an item's end; if the item does not fit into a CTA so many that deal() refuses gaps.
__device__ __forceinline__ u32 places_of(const Deal& d, u32 steps) {
    const u32 units = units_of(d, steps);
    if (!d.gaps || units == 0) return units;
    if (units > WARPS) return gridDim.x * WARPS;
#pragma unroll
    for (u32 n = 4; n < WARPS; n++)
        if (WARPS % n == 0 && units <= n) return n;
    return WARPS;
}

// And a sequence: those of its items, with gaps up to the end of a CTA, so that the next one's items lie in CTAs of their own.
__device__ __forceinline__ u32 line_of(const Params& P, const Deal& d, u32 steps) {
    const u32 places = places_of(d, steps) * (P.heads * P.row_blocks);
    return d.gaps ? (places + WARPS - 1) / WARPS * WARPS : places;
}

// Of all sequences; `first` is those of the first ones, 32 * KNOWN.
__device__ __forceinline__ u32 sum_places(const Params& P, const Deal& d, const Span (&first)[KNOWN], int lane) {
    u32 sum = line_of(P, d, first[0].count);
#pragma unroll
    for (int k = 1; k < KNOWN; k++)
        if (32 * k < P.batch) sum += line_of(P, d, first[k].count);
#pragma unroll 1
    for (int b = 32 * KNOWN + lane; b < P.batch; b += 32) sum += line_of(P, d, span(P, b).count);
    return __reduce_add_sync(~0u, sum);
}

// Whole pieces are better, as no warp has to change from one item to another, if they make no warp much slower. Of long ones each
// warp has one if lengths allow, so that all SMs read. Of short ones there are as few as possible, so that an item is few CTAs;
// and if half of the SMs are enough for it, with one step a warp or two, each item is in one CTA, with gaps between them.
__device__ __forceinline__ Deal deal(const Params& P, const Span (&first)[KNOWN], int lane) {
    const u32 all = gridDim.x * WARPS;
    Deal d = {0, 0, all, 0.f, 0.f, false};
    d.total = sum_places(P, d, first, lane);
    const u32 least = max((u32)__umul64hi((u64)d.total + all - 1, P.warps_inverse), 1u);
    if (least > P.largest_piece || d.total >> 20 >= P.heads * P.row_blocks) return d; // quotients would not be exact
    if (least == 1) {
        d.gaps = true;
#pragma unroll 1
        for (u32 piece = 1; piece <= 2; piece++) {
            d.piece = piece, d.inverse = reciprocal_of(piece);
            d.warps = sum_places(P, d, first, lane);
            if (2 * d.warps <= all) return d;
        }
        d.gaps = false;
    }
#pragma unroll 1
    for (u32 piece = least; piece <= least + max(2u, least / SLACK); piece++) {
        d.piece = piece, d.inverse = reciprocal_of(piece);
        d.warps = sum_places(P, d, first, lane);
        if (d.warps > all) continue;
        if (piece >= LONG_PIECE) {
            d.spread = 1.00001f * all / d.total; // above the quotient, so that whole numbers stay whole
            const u32 spread = sum_places(P, d, first, lane);
            if (spread <= all) d.warps = spread;
            else d.spread = 0.f;
        }
        return d;
    }
    d.piece = 0, d.warps = all;
    return d;
}

// The warp that has a place of the line. The division is exact, as the product is below 2^53.
__device__ __forceinline__ int warp_at(const Deal& d, u32 place) {
    return (int)((double)(((u64)place + 1) * d.warps - 1) / (double)d.total);
}
#endif
