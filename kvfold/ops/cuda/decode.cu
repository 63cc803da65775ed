// Decode attention on packed pages for sm_90: 8-bit tensor-core products on codes that are looked up, never de-quantised.
//
// Defines: KBITS, VBITS (2, 3, 4), KTRELLIS, VTRELLIS (whether codes are a trellis'), MEAN (pages have key references), PAGE
// (16, 32, 64 tokens), NB (blocks of four query rows a warp serves), WARPS, STAGES, QTYPE (0 bf16, 1 f16, 2 f32), SOFTCAP,
// MASKED, FIXED (0: balanced splits over all sequences, 1: splits that depend on the sequence alone), SLICE (bytes of shared
// memory of a warp), ROW_FLOATS (of a row of a partial result), SLOTS and PLACES (in scratch, for partial results of a CTA and
// of a warp), KT0.. VUE1 (codebooks as byte tables), SIGN0..SIGN3 (signs of the rotation, bit 1 = negative).
//
// Terms: an *item* is a sequence, a KV head and a block of 4 NB query rows (row = query token * group + head in group). A
// *step* is 32 tokens, two tiles. Each warp gets a piece of an item, or, where lengths differ, an equal stretch of the line of
// all steps: schedule.cu has dealt them out. Where an item is cut, partial results are merged: by warps in shared memory, then by
// CTAs in global scratch, always in the order of the tokens, so that the result does not depend on timing.
//
// Arithmetic (docs/kernels.md): a level is +-(m + 1/2). prmt looks up the positive levels of four codes with one
// instruction, and gives 0 where the code's sign bit is set, because the table's bytes have a clear top bit; a second prmt,
// with the complemented codes as selectors, looks up the negative ones and gives -1 elsewhere. The sum of both is the level
// - 1/2, and adding them is the tensor core's work. Widths 2 and 3 fit one signed table. q is 16-bit fixed point in two
// columns of the product (high and low byte); so are the probabilities times V's scale. Both references (of the scores and of
// the weights) move only when a weight would overflow. A trellis' indices are made of its planes in decode_codes.cuh; what a key
// reference adds to the scores of its page is one product more.

#include "decode_step.cuh"

static_assert(ROW_FLOATS >= D + 2 && ROW_FLOATS % 4 == 0, "a row has outputs, reference and sum, and lies at 16 bytes");
static_assert(PARTIAL * 4 <= STAGES * SLOT_BYTES, "a partial result overwrites the queries behind the ring");

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode(const __grid_constant__ Params P) {
    extern __shared__ __align__(128) u8 shared[];
#if !FIXED
    // of warps that may change from one item to the next: [0] of an item that an earlier warp begins, [1] of one that a later
    // warp ends: where the partial result lies, and (b, hr, first and last warp of the grid)
    __shared__ float* partial[WARPS][2];
    __shared__ int4 owner[WARPS][2];
    __shared__ int ends[WARPS]; // whether [0] is the end of its item
#endif
    __shared__ Share shares[WARPS]; // as of the item that the warp attends to now: the loop has no registers for it
    __shared__ Copies copying[WARPS];
    __shared__ u64 addresses[WARPS][32]; // of the copies of WINDOW steps: half of them are replaced while the others are used
    __shared__ int pending[2]; // what this CTA is the last to bring to an item, and the item
    __shared__ int4 whole[2];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    u8* slice = shared + warp * SLICE;
    const u32 ring = pin(smem_address(slice), lane);
    const int cta_slot = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    if (!P.ready) wait_for_predecessors();
#if !FIXED
    const Share share = P.schedule[blockIdx.x * WARPS + warp]; // what takes longest comes first
#endif
    // what everybody needs next comes to L2, a line by each thread
    const u32 line128 = (cta_slot * THREADS + threadIdx.x) * 128;
    if (line128 < P.table_bytes) prefetch_l2((const u8*)P.table + line128);
    if (line128 < P.q_bytes) prefetch_l2((const u8*)P.q + line128);

    if (lane == 0) {
#pragma unroll
        for (int s = 0; s < STAGES; s++) barrier_init(ring + s * SLOT_BYTES + STEP_END, COPIES);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#if !FIXED
        partial[warp][0] = partial[warp][1] = nullptr;
        ends[warp] = 0;
#endif
    }
    if (threadIdx.x < 2) pending[threadIdx.x] = 0;
    const Lane L = lane_constants(P, lane);

#if FIXED
    bool empty; // whether this CTA writes the result of a sequence that sees nothing
    Share share = {};
    share.item.x = P.begin + blockIdx.z, share.item.y = blockIdx.y;
    {
        const Span all = span(P, share.item.x);
        const int total = all.count, size = max((total + P.splits - 1) / P.splits, WARPS);
        const int ctas = (total + size - 1) / size;
        empty = total == 0 && blockIdx.x == 0 && blockIdx.y == 0;
        share.idle = blockIdx.x >= ctas;
        const int low = blockIdx.x * size, high = min(low + size, total);
        const int active = max(min(high - low, WARPS), 1);
        share.begin = low + (high - low) * min(warp, active) / active;
        share.copies = low + (high - low) * min(warp + 1, active) / active - share.begin;
        share.item.z = all.begin, share.item.w = total;
        share.first_warp = (cta_slot - blockIdx.x) * WARPS, share.last_warp = share.first_warp + (ctas - 1) * WARPS + active - 1;
        share.sharing = share.last_warp + 1 - share.first_warp;
    }
#endif
    const int4 item = share.item;
    const int begin = share.begin, copies = share.copies;
    const bool piecewise = FIXED || share.total == 0; // no warp goes on from one item to the next
    if (share.idle) {
        if (P.ready) wait_for_predecessors();
#if FIXED
        if (empty) write_nothing(P, item.x);
#else
        for (int b = blockIdx.x; b < P.batch; b += gridDim.x)
            if (span(P, b).count == 0) write_nothing(P, b);
#endif
        return;
    }

    Query Q;
    Four raw[ROWS];
    u32 issued = 0;
    Source source = {0, NOWHERE}; // of a copy whose address comes to `addresses` the next time that half of them is replaced
    const int window = min(copies, WINDOW), known = begin + window <= item.w ? window : 0; // steps that are looked up at once
    if (lane / COPIES < known) source = source_of(P, item, begin + lane / COPIES, lane);
    const u32 upcoming = pin(smem_address(addresses[warp]), lane);
    auto copy = [&](u32 slot, u32 its) { // of a step whose addresses are there
        const u32 bar = slot + STEP_END;
        if (PAGE == 16) {
#pragma unroll
            for (int tile = 0; tile < 2; tile++) {
                const u64 from = load_address(its + tile * 8);
                barrier_expect(bar, from ? TILE_STRIDE : 0);
                if (from) bulk_copy(slot + tile * TILE_STRIDE, from, TILE_STRIDE, bar);
            }
        } else {
            const u64 from = load_address(its);
            const bool behind = !MEAN || PAGE == 32 || from & 1; // whether the reference, if any, follows these tiles
            barrier_expect(bar, STEP_END);
            bulk_copy(slot, tiles_at(from), behind ? STEP_END : STEP_BYTES, bar);
            if (!behind) bulk_copy(slot + STEP_BYTES, from + 2 * STEP_BYTES, REFERENCE_BYTES, bar);
        }
    };
    auto fetch = [&](u32 slot) {
        if (issued < copies && elected()) copy(slot, upcoming + issued % WINDOW * COPIES * 8);
        issued++;
    };
    static_assert(STAGES < WINDOW / 2, "a ring is filled before more addresses are looked up");
    if (lane == 0) {
        shares[warp] = share;
        copying[warp] = {item, begin + known, copies - known};
    }
    __syncwarp();
    // warps of the CTA that begin with the same item share the work of rotating q
    const int cta_warp = cta_slot * WARPS; // the first one of this CTA in the grid
    int leader = max(share.first_warp - cta_warp, 0), ranks = min(share.last_warp - cta_warp, WARPS - 1) + 1 - leader;
    if (!piecewise) {
        __syncthreads();
        const Share& other = shares[lane % WARPS];
        const bool same = other.item.x == item.x && other.item.y == item.y;
        const u32 group = __ballot_sync(~0u, lane < WARPS && other.copies && same);
        leader = __ffs(group) - 1, ranks = __popc(group);
    }
    const int rank = warp - leader;
    if (copies) {
        if (!known) look_up(P, copying[warp], source, 0, WINDOW, lane);
        load_rows(P, raw, item.y, item.x, rank, ranks, lane);
        look_out(P, Q, item.y, item.x, lane);
        const u64 from = address_of(P, source);
        addresses[warp][lane] = from;
        // While the kernels ahead end, the memory has little to do: it brings the first pages to L2, where they may still be
        // written. Earlier, they would keep queries waiting.
        if (P.ready && lane / COPIES < min(copies, AHEAD) && from) prefetch_bulk(tiles_at(from), AHEAD_BYTES);
        if (copies > WINDOW) look_up(P, copying[warp], source, 0, WINDOW / 2, lane);
    }
    // Whatever is read later waits until the ring is full. So nobody begins to fill it before all have what they read.
    u32 words = 0;
    if (copies) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) words |= bits_of(raw[r]);
    }
    __syncthreads_or(words == 1);
    int filled = 0; // stages
    if (!P.ready && copies) fetch(ring), filled = 1; // more would keep other CTAs' queries waiting
    const bool rotates = copies && rank < ROWS;
    // Where there is more than fills the ring, it is filled as soon as the kernels ahead have ended, those of warps that rotate
    // queries by others. (Where there is not, most CTAs wait here, and should have rotated queries meanwhile.)
    const bool soon = P.ready && STAGES == 2 && copies > STAGES;
    if (soon && !rotates) {
        wait_for_predecessors();
#pragma unroll 1
        for (; filled < STAGES; filled++) {
            fetch(ring + filled * SLOT_BYTES);
            if (rank < 2 * ROWS && shares[warp - ROWS].copies > STAGES && elected())
                copy(ring - ROWS * SLICE + filled * SLOT_BYTES, upcoming - ROWS * 32 * 8 + filled * COPIES * 8);
        }
    }
    u8* const shared_query = shared + leader * SLICE + STAGES * SLOT_BYTES;
    if (rotates) rotate_rows(P, raw, shared_query, rank, ranks, lane);
    __syncthreads();
    if (copies) load_query(Q, shared_query, lane);
#if !FIXED
    if (!piecewise) __syncthreads(); // a leader may go on to another item, and overwrite
#endif

    if (P.ready) wait_for_predecessors(); // the pages, and whoever still reads what will be written
    if (soon && rotates && rank + ROWS < ranks && shares[warp + ROWS].copies > STAGES) filled = issued = STAGES;
#pragma unroll 1
    for (; filled < STAGES && filled < copies; filled++) fetch(ring + filled * SLOT_BYTES);
#if !FIXED
    for (int b = blockIdx.x; b < P.batch; b += gridDim.x)
        if (span(P, b).count == 0) write_nothing(P, b);
#endif

    auto release_ring = [&]() { // its memory is for results from now on
        __syncwarp();
        if (lane < STAGES) barrier_invalidate(ring + lane * SLOT_BYTES + STEP_END);
        __syncwarp();
    };
    if (!copies) release_ring();

    auto remaining = [&]() { return copies + min(copies, STAGES) - (int)issued; }; // steps

    State S;
    u32 slot = ring, phase = 0; // of the ring's barriers: with two stages in bit 31
    const u32 turning = pin(STAGES == 2 ? 2 * ring + SLOT_BYTES : ring + STAGES * SLOT_BYTES, lane); // the sum of both, or the end
#pragma unroll 1
    for (int left = remaining(); left > 0;) {
        clear(S);
        int at = (shares[warp].item.z + shares[warp].begin) * STEP_TOKENS;
        const int end = at + min(shares[warp].item.w - shares[warp].begin, left) * STEP_TOKENS;
        const float headroom = end - at == STEP_TOKENS ? 1.f : HEADROOM;
        auto advance = [&]() { // after a step: its slot is free
            __syncwarp();
            fetch(slot);
            if (STAGES == 2) { // the other one
                slot = turning - slot, phase += 1u << 30;
            } else {
                slot += SLOT_BYTES;
                if (slot == turning) slot = ring, phase ^= 1;
            }
        };
        int unchecked = 0;
#pragma unroll 1
        while (at < end) {
            // steps of which every row sees all tokens
            const int seen = MASKED || at < Q.inner_from ? 0 : (Q.inner_to - at) / STEP_TOKENS;
            const int most = min(CHECKED - unchecked, WINDOW / 2 - (int)(issued % (WINDOW / 2)));
            const int run = min(min(seen, (end - at) / STEP_TOKENS), most);
            const int counted = max(run, 1);
            if (run <= 0) {
                barrier_wait(slot + STEP_END, STAGES == 2 ? phase >> 31 : phase);
                step<true>(P, L, Q, S, slot, lane, shares[warp].item.x, shares[warp].item.y, at, issued, headroom);
                advance();
            } else {
#pragma unroll 1
                for (const u32 last = issued + run; issued != last; advance()) { // which counts
                    barrier_wait(slot + STEP_END, STAGES == 2 ? phase >> 31 : phase);
                    step<false>(P, L, Q, S, slot, lane, 0, 0, 0, issued, headroom);
                }
            }
            unchecked += counted, at += counted * STEP_TOKENS;
            if (issued % (WINDOW / 2) == 0) { // half of the addresses have been used, and what was looked up the last time is there
                const u32 half = issued / (WINDOW / 2) % 2;
                __syncwarp();
                if (lane / 16 != half) addresses[warp][lane] = address_of(P, source);
                look_up(P, copying[warp], source, half * 16, WINDOW / 2, lane);
            }
            if (unchecked == CHECKED) relieve(S), unchecked = 0;
        }
        left = remaining();
        if (!left) release_ring();
#if FIXED
        save(S, (float*)slice, lane);
#else
        const Share its = shares[warp];
        const bool begins = its.begin == 0, finished = at == (its.item.z + its.item.w) * STEP_TOKENS;
        float* const kept = P.scratch + ((i64)gridDim.x * SLOTS + ((i64)cta_slot * WARPS + warp) * PLACES) * PARTIAL;
        // the ring is still in use if there is more to come: one place for what is kept, another for what is finished at once
        float* const place = left ? kept + (begins && finished) * PARTIAL : (float*)slice;
        save(S, place, lane);
        if (its.total == 0) break;
        __syncwarp();
        if (begins && finished) {
#pragma unroll 1
            for (int r = 0; r < ROWS; r++) finish(P, load_row(place, r, lane), its.item.x, its.item.y, r, lane);
        } else {
            if (lane == 0) {
                partial[warp][begins] = place;
                const u32 last = its.item_begin + its.item.w - 1;
                owner[warp][begins] =
                    make_int4(its.item.x, its.item.y, warp_at(its.total, its.item_begin), warp_at(its.total, last));
                if (!begins) ends[warp] = finished;
            }
        }
        if (left) {
            const int4 next = next_item(P, its.item);
            if (lane == 0) shares[warp].item = next, shares[warp].begin = 0, shares[warp].item_begin = its.item_begin + its.item.w;
            look_out(P, Q, next.y, next.x, lane);
            load_rows(P, raw, next.y, next.x, 0, 1, lane);
            u8* const query = slice + STAGES * SLOT_BYTES;
            rotate_rows(P, raw, query, 0, 1, lane);
            __syncwarp();
            load_query(Q, query, lane);
            __syncwarp();
        }
#endif
    }

    const Share& its = shares[warp];
    if (FIXED || its.total == 0) {
        // No warp has more than one item. The CTA's warps of an item, from `low` to `high`, merge their partial results. If it has
        // none in other CTAs, the warps of the gap behind it help; they know the item too.
        const int first_warp = its.first_warp, last_warp = its.last_warp;
        const int low = max(first_warp - cta_warp, 0), high = min(last_warp - cta_warp, WARPS - 1), members = high - low + 1;
        const bool inside = first_warp >= cta_warp && last_warp < cta_warp + WARPS, begun = first_warp < cta_warp;
        const int helpers = inside ? min(its.sharing, WARPS - low) : members;
        const bool helps = its.sharing && warp - low < helpers;
        float* const target = P.scratch + ((i64)cta_slot * SLOTS + (FIXED || begun ? 0 : 1)) * PARTIAL;
        __syncthreads();
        if (helps) {
#pragma unroll 1
            for (int r = warp - low; r < ROWS; r += helpers) {
                const Row x = merge_own(smem_address(shared + low * SLICE), members, r, lane);
                if (inside) finish(P, x, its.item.x, its.item.y, r, lane);
                else save_row(x, target, r, lane);
            }
            if (!inside && warp == low && lane == 0)
                pending[!begun] = 1, whole[!begun] = make_int4(its.item.x, its.item.y, first_warp, last_warp);
        }
    }
#if !FIXED
    else {
        __syncthreads();
        // Merge what the CTA's warps have of the same item: a chain of neighbouring warps, led by the one that begins the item,
        // or by the first if an earlier CTA does. A warp merges a row.
        const bool own = lane < WARPS;
        const u32 closing = __ballot_sync(~0u, own && ends[lane % WARPS]);
        const u32 opening = __ballot_sync(~0u, own && partial[lane % WARPS][1]);
        int turn = 0; // whose it is to merge
#pragma unroll 1
        for (u32 todo = opening << 1 | (partial[0][0] ? 1 : 0); todo; todo &= todo - 1) {
            const int slot = todo & 1 ? 0 : 1, lead = slot ? __ffs(todo) - 2 : 0;
            const u32 close = slot ? closing >> lead >> 1 << lead << 1 : closing;
            const int last = close ? __ffs(close) - 1 : WARPS - 1;
            const bool all = slot && close;
            const int r = (warp - turn + WARPS) % WARPS;
            if (r < ROWS) {
                const Chain chain = {partial[lead][slot], last > lead ? partial[last][0] : nullptr,
                                     (float*)(shared + lead * SLICE), SLICE / 4, last - lead + 1};
                const Row x = merge(chain, 0, 1, r, lane);
                if (all) finish(P, x, owner[lead][1].x, owner[lead][1].y, r, lane);
                else save_row(x, P.scratch + ((i64)cta_slot * SLOTS + slot) * PARTIAL, r, lane);
            }
            turn = (turn + ROWS) % WARPS;
            if (!all && threadIdx.x == 0) pending[slot] = 1, whole[slot] = owner[lead][slot];
        }
    }
#endif
    __syncthreads();

    // The CTA that comes last to an item merges what all CTAs have of it.
    if (threadIdx.x < 2 && pending[threadIdx.x]) {
        const int4 its = whole[threadIdx.x];
        const int first = its.z / WARPS;
        u32* counter = P.counters + first / (FIXED ? (int)gridDim.x : 1);
        const bool last = add_release_acquire(counter, 1) == its.w / WARPS - first;
        pending[threadIdx.x] = last;
        if (last) *counter = 0;
    }
    __syncthreads();
#pragma unroll 1
    for (int slot = 0; slot < 2; slot++) {
        if (!pending[slot]) continue;
        const int4 its = whole[slot];
        // what CTAs left: of the one that begins the item it is [1], of the others [0]
        const int from = its.z / WARPS, count = its.w / WARPS - from + 1;
        const float* const begins = P.scratch + (i64)from * SLOTS * PARTIAL;
        const Chain all = {begins + (SLOTS - 1) * PARTIAL, begins + (i64)(count - 1) * SLOTS * PARTIAL, begins, SLOTS * PARTIAL, count};
        // a warp for each row, or several, which share the results if they are many
        const int r = warp % ROWS, part = warp / ROWS, parts = count > 4 ? WARPS / ROWS : 1;
        Row x = {};
        if (part < parts) x = merge(all, part, parts, r, lane);
        if (parts > 1) {
            save_row(x, (float*)(shared + part * SLICE), r, lane);
            __syncthreads();
            if (part == 0) x = merge_own(smem_address(shared), parts, r, lane);
        }
        if (part == 0) finish(P, x, its.x, its.y, r, lane);
        __syncthreads();
    }
}
