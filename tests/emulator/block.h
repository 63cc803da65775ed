// The threads of a CUDA block on one thread of the host, and the shared memory they have in common.
//
// Every CUDA thread is a fiber that runs until it waits: at a barrier of its warp or block, or for a copy. Blocks run one
// after the other. So what a kernel computes here is a legal order of what it may do on a GPU, one of very many; the bits
// of `schedule` choose among a few extreme ones. Whatever a GPU leaves undefined (lanes that meet at different operations,
// a barrier that nobody completes, a copy that nobody waits for, a write past shared memory) ends the launch with a message.
#pragma once
#include <csetjmp>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>

struct Dim3 {
    unsigned x, y, z;
};
static Dim3 threadIdx, blockIdx, blockDim, gridDim;

// The kernels' static shared memory is a section of its own, so that it can be found, and poisoned.
extern unsigned char __start_kvfold_shared[] __attribute__((weak, visibility("hidden")));
extern unsigned char __stop_kvfold_shared[] __attribute__((weak, visibility("hidden")));

namespace host {

// From 8 on a multiple of 8 is the seed of a random order of warps and lanes, in which a warp may stop for others at any
// operation, and some copies are late.
enum Schedule { BLOCKS_BACKWARDS = 1, THREADS_BACKWARDS = 2, LATE_COPIES = 4, SEED = 8 };

constexpr int LANES = 32;
constexpr size_t STACK = 128 << 10, GUARD = 4096, MARGIN = 256;
constexpr unsigned char POISON = 0xFF;  // NaN as a float, and no valid mbarrier
constexpr uint32_t STATIC_BASE = 0x1000, DYNAMIC_BASE = 0x100000;  // addresses in the shared window

// --- fibers -----------------------------------------------------------------------------------------------------------

struct Fiber {
    ucontext_t start;
    jmp_buf context;
    unsigned char* stack = nullptr;
    bool begun = false, done = true, polls = false;
    bool waited = false;  // for the kernels ahead
    const unsigned* counter = nullptr;  // what it waits for to change
    unsigned seen = 0;
};

enum Operation { NONE, SHUFFLE, BALLOT, REDUCE, MMA, SYNC };

struct Meeting {  // what the lanes of a warp bring to an operation
    uint64_t value[LANES];
    uint32_t a[LANES][4], b[LANES][2];
    float result[LANES][4];
    int integers[LANES][4];
};

struct Warp {
    Meeting meetings[2];  // in turns, because a lane may be one operation ahead of those that still read
    unsigned turn = 0;
    int arrived = 0;
    Operation operation = NONE;
};

struct Copy {
    uint32_t to;
    const void* from;
    uint32_t bytes, barrier;
};

static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static std::vector<Copy> copies;
static std::vector<std::pair<uint32_t, int>> barriers;  // where mbarriers are, and their counts
static jmp_buf scheduler;
static Fiber* current;
static void (*body)(void*);
static void* body_argument;
static unsigned block_turn, threads, alive, block_arrived, schedule, random_state;
static bool early;                // whether it may begin before the kernels ahead have ended
static bool moved;  // whether anybody got on since the scheduler last looked
static unsigned char* dynamic_shared;
static size_t dynamic_bytes;
static char message[512];

// End the launch. What the fibers have on their stacks is abandoned; kernels own nothing.
[[noreturn]] static void fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    int used = snprintf(message, sizeof message, "block (%u, %u, %u), thread %u: ", blockIdx.x, blockIdx.y, blockIdx.z,
                        threadIdx.x);
    vsnprintf(message + used, sizeof message - used, format, values);
    va_end(values);
    _longjmp(scheduler, 2);
}

static void pause() {
    if (!_setjmp(current->context)) _longjmp(scheduler, 1);
}

static void wait_for_change(const unsigned& counter) {
    current->counter = &counter;
    current->seen = counter;
    pause();
}

static void leave() {
    current->done = true;
    alive--;
    moved = true;
    if (alive && block_arrived == alive) block_arrived = 0, block_turn++;
    _longjmp(scheduler, 1);
}

static void fiber_main() {
    body(body_argument);
    leave();
}

static unsigned random_bits() {  // xorshift
    static_assert(SEED == 8, "the three lowest bits choose otherwise");
    random_state ^= random_state << 13, random_state ^= random_state >> 17, random_state ^= random_state << 5;
    return random_state;
}

// --- warps and blocks -------------------------------------------------------------------------------------------------

static int lane() { return threadIdx.x % LANES; }

// All lanes of the warp meet: each brings something, and the last to come computes what they take away.
template <class Bring, class Compute>
static Meeting& meet(Operation operation, unsigned mask, Bring bring, Compute compute) {
    static const char* const names[] = {"none", "shuffle", "ballot", "reduction", "mma", "syncwarp"};
    Warp& warp = warps[threadIdx.x / LANES];
    Meeting& meeting = warp.meetings[warp.turn & 1];
    if (mask != 0xFFFFFFFFu) fail("a warp operation has the mask %08x; the emulator knows whole warps only", mask);
    if (warp.arrived == 0) warp.operation = operation;
    if (warp.operation != operation)
        fail("a warp's lanes are at different operations: %s and %s", names[warp.operation], names[operation]);
    bring(meeting);
    if (++warp.arrived == LANES) {
        compute(meeting);
        warp.arrived = 0;
        warp.turn++;
        moved = true;
    } else {
        wait_for_change(warp.turn);
    }
    return meeting;
}
template <class Bring>
static Meeting& meet(Operation operation, unsigned mask, Bring bring) {
    return meet(operation, mask, bring, [](Meeting&) {});
}

static void block_barrier() {
    if (++block_arrived == alive) {
        block_arrived = 0;
        block_turn++;
        moved = true;
    } else {
        wait_for_change(block_turn);
    }
}

// --- shared memory ----------------------------------------------------------------------------------------------------

static size_t static_bytes() { return __stop_kvfold_shared - __start_kvfold_shared; }

static uint32_t shared_address(const void* p) {
    auto at = (const unsigned char*)p;
    if (at >= dynamic_shared && at <= dynamic_shared + dynamic_bytes) return DYNAMIC_BASE + (at - dynamic_shared);
    if (at >= __start_kvfold_shared && at <= __stop_kvfold_shared) return STATIC_BASE + (at - __start_kvfold_shared);
    fail("%p is converted to a shared address, and is none", p);
}

static unsigned char* shared_at(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what) {
    if (address % alignment) fail("%s at shared address 0x%x is not aligned to %u bytes", what, address, alignment);
    if (address >= DYNAMIC_BASE && address - DYNAMIC_BASE + (uint64_t)bytes <= dynamic_bytes)
        return dynamic_shared + (address - DYNAMIC_BASE);
    if (address >= STATIC_BASE && address - STATIC_BASE + (uint64_t)bytes <= static_bytes())
        return __start_kvfold_shared + (address - STATIC_BASE);
    fail("%s of %u bytes at 0x%x is outside of shared memory", what, bytes, address);
}

// --- mbarriers and asynchronous copies --------------------------------------------------------------------------------

struct Mbarrier {
    int32_t bytes;  // expected less arrived
    uint8_t expected, pending;
    uint8_t phase, magic;
};
constexpr uint8_t MAGIC = 0x5A;

static Mbarrier& mbarrier(uint32_t address, bool fresh = false) {
    auto& barrier = *(Mbarrier*)shared_at(address, 8, 8, "an mbarrier");
    if (!fresh && barrier.magic != MAGIC) fail("the mbarrier at 0x%x is used before it is initialised", address);
    return barrier;
}

static void invalidate(uint32_t address) {
    mbarrier(address).magic = 0;
    for (size_t n = 0; n < barriers.size(); n++)
        if (barriers[n].first == address) {
            barriers.erase(barriers.begin() + n);
            return;
        }
}

// A GPU may write an mbarrier back at any time until it is invalidated, so nothing else may have been written there.
static void check_barriers() {
    for (auto [address, count] : barriers) {
        const Mbarrier& barrier = mbarrier(address, true);
        if (barrier.magic != MAGIC || barrier.expected != count || barrier.pending > count || barrier.phase > 1)
            fail("the mbarrier at 0x%x is overwritten and has not been invalidated", address);
    }
}

static void complete_phase(Mbarrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    barrier.phase ^= 1;
    barrier.pending = barrier.expected;
    moved = true;
}

static void perform(const Copy& copy) {
    memcpy(shared_at(copy.to, copy.bytes, 16, "a bulk copy"), copy.from, copy.bytes);
    Mbarrier& barrier = mbarrier(copy.barrier);
    barrier.bytes -= copy.bytes;
    complete_phase(barrier);
}

static void start_copy(const Copy& copy) {
    shared_at(copy.to, copy.bytes, 16, "a bulk copy");
    mbarrier(copy.barrier);
    if (copy.bytes % 16 || (uintptr_t)copy.from % 16)
        fail("a bulk copy of %u bytes from %p: both have to be multiples of 16", copy.bytes, copy.from);
    if (schedule & LATE_COPIES || (schedule >= SEED && random_bits() >> 31)) copies.push_back(copy);
    else perform(copy);
}

// Whether the phase of this parity is over. If it is not, others go first.
static bool test_wait(uint32_t address, uint32_t parity) {
    for (size_t n = 0; n < copies.size();) {  // late copies arrive when they are waited for
        if (copies[n].barrier != address) {
            n++;
            continue;
        }
        const Copy copy = copies[n];
        copies.erase(copies.begin() + n);
        perform(copy);
    }
    if ((mbarrier(address).phase ^ 1) == (parity & 1)) return true;
    current->polls = true;
    pause();
    current->polls = false;
    return (mbarrier(address).phase ^ 1) == (parity & 1);
}

// --- launches ---------------------------------------------------------------------------------------------------------

static void begin_block() {
    memset(dynamic_shared, POISON, dynamic_bytes + GUARD);
    if (static_bytes()) memset(__start_kvfold_shared, POISON, static_bytes());
    for (Warp& warp : warps) warp.arrived = 0;
    copies.clear();
    barriers.clear();
    block_arrived = 0;
    alive = threads;
    for (unsigned n = 0; n < threads; n++) {
        fibers[n].begun = fibers[n].done = fibers[n].polls = fibers[n].waited = false;
        fibers[n].counter = nullptr;
        memset(fibers[n].stack, POISON, MARGIN);
    }
}

static void end_block() {
    check_barriers();
    for (unsigned t = 0; early && t < threads; t++)
        if (!fibers[t].waited) fail("it is launched early, and its thread %u never waits for the kernels ahead", t);
    if (!copies.empty()) fail("the block ends while %zu copies into it are under way", copies.size());
    for (size_t n = 0; n < GUARD; n++)
        if (dynamic_shared[dynamic_bytes + n] != POISON) fail("byte %zu past the dynamic shared memory was written", n);
    for (unsigned t = 0; t < threads; t++)
        for (size_t n = 0; n < MARGIN; n++)
            if (fibers[t].stack[n] != POISON) fail("the emulator's stack of thread %u is too small", t);
}

static void resume(unsigned thread) {
    current = &fibers[thread];
    current->counter = nullptr;
    threadIdx = {thread, 0, 0};
    if (_setjmp(scheduler)) return;
    if (current->begun) _longjmp(current->context, 1);
    current->begun = true;
    setcontext(&current->start);
}

static void run_block() {
    begin_block();
    const bool backwards = schedule & THREADS_BACKWARDS, random = schedule >= SEED;
    const unsigned count = threads / LANES;
    random_state = schedule * 2654435761u;  // neighbouring seeds begin far from each other
    while (alive) {
        moved = false;
        const unsigned first_warp = random ? random_bits() % count : 0;
        for (unsigned k = 0; k < count; k++) {
            const unsigned warp = (first_warp + (backwards ? count - 1 - k : k)) % count;
            for (bool again = true; again;) {  // a warp goes on as long as it can
                again = false;
                const unsigned order = random ? random_bits() : 0, step = order | 1;  // odd: all lanes get their turn
                for (unsigned n = 0; n < LANES; n++) {
                    const unsigned lane = (n * step + (order >> 8)) % LANES;
                    const unsigned thread = warp * LANES + (backwards ? LANES - 1 - lane : lane);
                    Fiber& fiber = fibers[thread];
                    if (fiber.done || (fiber.counter && *fiber.counter == fiber.seen)) continue;
                    const bool polled = fiber.polls;
                    resume(thread);
                    if (*message) return;
                    const bool idle = polled && fiber.polls;
                    again |= !idle;
                    moved |= !idle;
                }
                if (random && random_bits() >> 30 == 0) break;
            }
        }
        if (!moved) {
            unsigned stuck = 0;
            while (fibers[stuck].done) stuck++;
            threadIdx = {stuck, 0, 0};
            snprintf(message, sizeof message, "block (%u, %u, %u): %u of %u threads wait for ever, the first is %u",
                     blockIdx.x, blockIdx.y, blockIdx.z, alive, threads, stuck);
            return;
        }
    }
    if (!_setjmp(scheduler)) end_block();
}

static void prepare(unsigned wanted) {
    threads = wanted;
    warps.assign(threads / LANES, Warp());
    while (fibers.size() < threads) {
        fibers.emplace_back();
        fibers.back().stack = (unsigned char*)malloc(STACK);
    }
    for (Fiber& fiber : fibers) {  // after the vector has moved them for the last time
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack;
        fiber.start.uc_stack.ss_size = STACK;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, fiber_main, 0);
    }
}

template <class... A, size_t... I>
static void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*(std::remove_cv_t<A>*)arguments[I]...);
}

// Run a kernel. `arguments` are as cuLaunchKernel takes them. Returns null, or what went wrong.
template <class... A>
static const char* launch(void (*kernel)(A...), Dim3 grid, unsigned wanted, size_t shared_bytes, unsigned chosen,
                          bool begins_early, void** arguments) {
    *message = 0;
    schedule = chosen, early = begins_early;
    gridDim = grid;
    blockDim = {wanted, 1, 1};
    if (wanted % LANES || !wanted) return "the emulator runs whole warps only";
    prepare(wanted);
    dynamic_bytes = shared_bytes;
    dynamic_shared = (unsigned char*)aligned_alloc(1024, (shared_bytes + GUARD + 1023) / 1024 * 1024);
    auto run = [=] { call(kernel, arguments, std::index_sequence_for<A...>()); };
    body = [](void* p) { (*(decltype(run)*)p)(); };
    body_argument = &run;
    const uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
    for (uint64_t k = 0; k < blocks && !*message; k++) {
        const uint64_t n = schedule & BLOCKS_BACKWARDS ? blocks - 1 - k : k;
        blockIdx = {(unsigned)(n % grid.x), (unsigned)(n / grid.x % grid.y), (unsigned)(n / grid.x / grid.y)};
        run_block();
    }
    free(dynamic_shared);
    return *message ? message : nullptr;
}

template <class... A>
static int parameter_sizes(void (*)(A...), size_t* sizes) {
    size_t all[] = {sizeof(A)..., 0};
    memcpy(sizes, all, sizeof...(A) * sizeof(size_t));
    return sizeof...(A);
}

}  // namespace host
