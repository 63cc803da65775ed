// Deals the steps of all sequences out to the warps of the decode kernel, once for all layers that see the same lengths.
//
// Defines: WARPS (of a CTA of the decode kernel). It is launched with that kernel's grid, and with as many warps: each works
// out its own share. An item is a sequence, a KV head and a block of query rows; a step is 32 tokens of it. Each warp gets a
// piece of an item, or, where lengths differ, an equal stretch of the line of all steps.

#include "decode_ptx.cuh"
#include "decode_spans.cuh"

#define SLACK 32 // pieces may be longer, and items be cut into fewer, by one part in so many
#define LONG_PIECE 12 // steps
#define KNOWN 4 // times 32 sequences, whose lengths the lanes of a warp keep

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

// Into how many pieces an item of so many steps is cut, or how many steps there are in the line. A few warps are left out where
// the item then is whole CTAs: fewer have parts of it to merge.
__device__ __forceinline__ u32 units_of(const Deal& d, u32 steps) {
    if (!d.piece) return steps;
    const u32 units = max(quotient(steps + d.piece - 1, d.inverse), (u32)((float)steps * d.spread));
    const u32 whole = units / WARPS * WARPS;
    return d.spread > 0.f && whole + whole / SLACK >= units ? whole : units;
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

extern "C" __global__ void __launch_bounds__(32 * WARPS) deal_out(const __grid_constant__ Params P) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    wait_for_predecessors();
    Span spans[KNOWN];
#pragma unroll
    for (int k = 0; k < KNOWN; k++) spans[k] = 32 * k + lane < P.batch ? span(P, 32 * k + lane) : Span{0, 0};
    const Deal plan = deal(P, spans, lane);
    const u32 mine = blockIdx.x * WARPS + warp;
    Share share = {};
    share.idle = blockIdx.x * WARPS >= plan.warps;
    share.total = plan.piece ? 0 : plan.total;
    if (mine < plan.warps) {
        u32 place = mine;
        if (!plan.piece) {
            place = (u32)__umul64hi((u64)plan.total * mine, P.warps_inverse);
            share.copies = (u32)__umul64hi((u64)plan.total * (mine + 1), P.warps_inverse) - place;
        }
        int4 item = make_int4(0, 0, 0, 0);
        u32 before = 0;
#pragma unroll 1
        for (int base = 0; base < P.batch; base += 32) { // the first sequence that ends beyond this place
            Span s = spans[0];
            if (base >= 32 * KNOWN) s = base + lane < P.batch ? span(P, base + lane) : Span{0, 0};
#pragma unroll
            for (int k = 1; k < KNOWN; k++)
                if (base == 32 * k) s = spans[k];
            const u32 own = line_of(P, plan, s.count);
            u32 upto = own;
#pragma unroll
            for (int k = 1; k < 32; k <<= 1) {
                const u32 y = __shfl_up_sync(~0u, upto, k);
                if (lane >= k) upto += y;
            }
            const u32 beyond = __ballot_sync(~0u, before + upto > place);
            if (beyond) {
                const int at = __ffs(beyond) - 1;
                item.x = base + at;
                item.z = __shfl_sync(~0u, s.begin, at), item.w = __shfl_sync(~0u, s.count, at);
                before += __shfl_sync(~0u, upto - own, at);
                break;
            }
            before += __shfl_sync(~0u, upto, 31);
        }
        const u32 past = place - before, places = places_of(plan, item.w);
        item.y = plan.piece ? quotient(past, reciprocal_of(places)) : past / places;
        share.begin = past - item.y * places;
        if (plan.piece) { // the pieces' sizes differ by one at most; in a gap there is none
            const u32 units = units_of(plan, item.w), piece = share.begin;
            const u32 size = quotient(item.w, reciprocal_of(units)), longer = item.w - size * units;
            const bool any = item.y < P.heads * P.row_blocks; // or the gap is the sequence's
            share.begin = size * piece + min(piece, longer);
            share.copies = any && piece < units ? size + (piece < longer) : 0;
            share.first_warp = mine - piece, share.last_warp = share.first_warp + units - 1;
            share.sharing = any ? places : 0;
        } else {
            share.item_begin = place - share.begin;
        }
        share.item = item;
    }
    if (lane == 0) P.schedule[mine] = share;
}
