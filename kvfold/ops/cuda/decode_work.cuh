// Where the bytes of steps lie.
#pragma once

#include "decode_ptx.cuh"
#include "decode_spans.cuh"

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

// The source of this lane's copy of a step of an item.
__device__ __forceinline__ Source source_of(const Params& P, int4 item, int step, u32 lane) {
    Source source = {0, NOWHERE};
    step += item.z;
    const int page = step * STEP_TOKENS / PAGE + (PAGE == 16 ? lane & 1 : 0);
    bool there = true; // of two pages in a step one may lie before or behind what is seen, and be anything
    if (PAGE == 16) {
        const Sight s = sight(P, item.x);
        there = page * 16 < s.length && (page + 1) * 16 > visible_from(P, s, 0);
    }
    if (there) {
        source.page = P.table[(i64)item.x * P.table_stride + page];
        source.offset = head_of(P, item.y) * PAGE_BYTES + (PAGE == 64 ? (step & 1) * (STEP_BYTES + MEAN) : 0);
    }
    return source;
}

// The sources of the copies of the next `steps` steps, in their order in the lanes from `first` on.
__device__ __forceinline__ void look_up(const Params& P, Copies& copies, Source& source, u32 first, int steps, u32 lane) {
    Copies c = copies;
    const int mine = (lane - first) / COPIES; // huge for lanes before the first
#pragma unroll 1
    for (int done = 0; done < steps && c.left > 0;) {
        if (c.step == c.item.w) c.item = next_item(P, c.item), c.step = 0;
        const int n = min(min(steps - done, c.item.w - c.step), c.left);
        if (mine >= done && mine < done + n) source = source_of(P, c.item, c.step + mine - done, lane);
        done += n, c.step += n, c.left -= n;
    }
    __syncwarp(); // everybody has read
    if (lane == 0) copies = c;
    __syncwarp();
}

// Of an address that is not 0.
__device__ __forceinline__ u64 tiles_at(u64 source) { return MEAN && PAGE == 64 ? source & ~(u64)1 : source; }

// The warp of the grid that has a place of the line of so many steps. The division is exact, as the product is below 2^53.
__device__ __forceinline__ int warp_at(u32 total, u32 place) {
    return (int)((double)(((u64)place + 1) * (gridDim.x * WARPS) - 1) / (double)total);
}
