// Instructions that decode.cu uses and CUDA C++ has no function for.
#pragma once

#include "common.cuh"

__device__ __forceinline__ u32 prmt(u32 a, u32 b, u32 s) {
    u32 r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(s));
    return r;
}
// ~x by multiplication, with -1 in a register that the compiler knows nothing about.
__device__ __forceinline__ u32 complement(u32 x, u32 minus_one) {
    u32 r;
    asm("mad.lo.u32 %0, %1, %2, %2;" : "=r"(r) : "r"(x), "r"(minus_one));
    return r;
}
// x >> 16 by a dot product: the multiplier is idle, the integer unit is not.
__device__ __forceinline__ u32 upper(u32 x) {
    u32 r;
    asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(0x0100u), "r"(0u));
    return r;
}
// sum + (x & 0xffff), likewise.
__device__ __forceinline__ u32 add_lower(u32 sum, u32 x) {
    u32 r;
    asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(0x0001u), "r"(sum));
    return r;
}
// x << n as x * (2^n - 1) + x: of a product with a power of two the compiler may make a shift, for the integer unit.
__device__ __forceinline__ u32 times_power(u32 x, int n) {
    u32 r;
    asm("mad.lo.u32 %0, %1, %2, %1;" : "=r"(r) : "r"(x), "r"((1u << n) - 1));
    return r;
}
// x >> n, 0 if n is 32 or more.
__device__ __forceinline__ u32 shift_down(u32 x, u32 n) {
    u32 r;
    asm("shr.u32 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(n));
    return r;
}
// Bits of x where mask is set, of y elsewhere: one instruction.
__device__ __forceinline__ u32 select(u32 x, u32 y, u32 mask) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(r) : "r"(x), "r"(y), "r"(mask));
    return r;
}
// x & mask, with a mask that is a constant here alone: the compiler would put shifts ahead of it, and take more instructions.
__device__ __forceinline__ u32 masked(u32 x, u32 mask) { return select(x, 0, mask); }
// ~(x ^ y), ~((x | y) ^ z) and ~(x ^ y ^ z): the compiler would make two instructions of each.
__device__ __forceinline__ u32 equal_bits(u32 x, u32 y) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %2, 0xc3;" : "=r"(r) : "r"(x), "r"(y));
    return r;
}
__device__ __forceinline__ u32 equal_bits(u32 x, u32 y, u32 z) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xa9;" : "=r"(r) : "r"(x), "r"(y), "r"(z));
    return r;
}
__device__ __forceinline__ u32 not_xor(u32 x, u32 y, u32 z) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0x69;" : "=r"(r) : "r"(x), "r"(y), "r"(z));
    return r;
}
// The larger one, or NaN if one is.
__device__ __forceinline__ float max_nan(float x, float y) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
    return r;
}
// An 8 x 8 matrix of 16-bit elements, two neighbouring ones of row lane / 4 in each lane: rows become columns.
__device__ __forceinline__ u32 transpose(u32 x) {
    u32 r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
    return r;
}
// x, in a register: without this the compiler computes it anew in each step.
__device__ __forceinline__ u32 pin(u32 x, u32 lane) { return __shfl_sync(~0u, x, lane); }
__device__ __forceinline__ float ex2(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
__device__ __forceinline__ float lg2(float x) {
    float r;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
__device__ __forceinline__ float reciprocal_of(u32 x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"((float)x));
    return r;
}
__device__ __forceinline__ u32 bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float flt(u32 x) { return __uint_as_float(x); }
__device__ __forceinline__ float nan_f() { return flt(0x7fffffffu); }
__device__ __forceinline__ u32 smem_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void mma_s8(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_u8(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Whether this is the lane that acts for its warp: one only, as the compiler knows, which makes no loop over lanes then.
__device__ __forceinline__ bool elected() {
    u32 r;
    asm volatile("{\n.reg .pred P;\nelect.sync _|P, 0xffffffff;\nselp.u32 %0, 1, 0, P;\n}" : "=r"(r));
    return r;
}

__device__ __forceinline__ void barrier_init(u32 bar, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
// Before its memory is anything else: the hardware keeps barriers in a cache, and writes them back when it likes.
__device__ __forceinline__ void barrier_invalidate(u32 bar) {
    asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bulk_copy(u32 to, u64 from, u32 bytes, u32 bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
        "l"(from), "r"(bytes), "r"(bar)
        : "memory");
}
__device__ __forceinline__ void prefetch_bulk(u64 from, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
    asm volatile(
        "{\n.reg .pred P;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 P, [%0], %1;\n@P bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(
            bar),
        "r"(parity)
        : "memory");
}

// Shared memory by its address. Volatile: the copies that write it are nothing that the compiler sees.
__device__ __forceinline__ u32 load_4(u32 from) {
    u32 r;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(from));
    return r;
}
__device__ __forceinline__ u64 load_address(u32 from) {
    u64 r;
    asm volatile("ld.shared.u64 %0, [%1];" : "=l"(r) : "r"(from));
    return r;
}
__device__ __forceinline__ uint2 load_8(u32 from) {
    uint2 r;
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(r.x), "=r"(r.y) : "r"(from));
    return r;
}
__device__ __forceinline__ uint4 load_16(u32 from) {
    uint4 r;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(from));
    return r;
}

// Adds to a counter: all that this CTA wrote before is seen by whoever reads the sum, and the other way round.
__device__ __forceinline__ u32 add_release_acquire(u32* counter, u32 x) {
    u32 before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(x) : "memory");
    return before;
}

// Past L1, from global or shared memory.
__device__ __forceinline__ float4 load_coherent(const float4* from) {
    float4 r;
    asm volatile("ld.relaxed.gpu.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(r.x), "=f"(r.y), "=f"(r.z), "=f"(r.w) : "l"(from) : "memory");
    return r;
}
__device__ __forceinline__ float2 load_coherent(const float2* from) {
    float2 r;
    asm volatile("ld.relaxed.gpu.v2.f32 {%0,%1}, [%2];" : "=f"(r.x), "=f"(r.y) : "l"(from) : "memory");
    return r;
}
