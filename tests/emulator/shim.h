// What CUDA C++ has and C++ has not, as far as the kernels use it: keywords, vector types and device functions.
#pragma once
#include <climits>
#include <cmath>
#include <cstddef>

#include "block.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("kvfold_shared")))

// --- vector types -----------------------------------------------------------------------------------------------------

struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) ulonglong2 {
    unsigned long long x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// --- arithmetic -------------------------------------------------------------------------------------------------------

// Of different integer types the common one, as in CUDA: unsigned if either is.
template <class A, class B, class C = std::common_type_t<A, B>>
inline C min(A a, B b) {
    return (C)b < (C)a ? (C)b : (C)a;
}
template <class A, class B, class C = std::common_type_t<A, B>>
inline C max(A a, B b) {
    return (C)a < (C)b ? (C)b : (C)a;
}

inline float __uint_as_float(unsigned x) {
    float f;
    memcpy(&f, &x, 4);
    return f;
}
inline unsigned __float_as_uint(float x) {
    unsigned u;
    memcpy(&u, &x, 4);
    return u;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
    unsigned r = 0;
    for (int n = 0; n < 32; n++) r |= (x >> n & 1) << (31 - n);
    return r;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selectors) {
    const uint64_t bytes = a | (uint64_t)b << 32;
    unsigned r = 0;
    for (int n = 0; n < 4; n++) r |= (unsigned)(bytes >> 8 * (selectors >> 4 * n & 7) & 255) << 8 * n;
    return r;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((uint64_t)high << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((uint64_t)high << 32 | low) >> (shift & 31));
}
inline float __fadd_ru(float a, float b) {
    const double exact = (double)a + b;  // of the numbers that the kernels add
    const float near = (float)exact;
    return near < exact ? nextafterf(near, INFINITY) : near;
}
inline float __frcp_rn(float a) { return 1.f / a; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline float __fmul_rn(float a, float b) { return a * b; } // compiled without contraction

inline float __fdividef(float a, float b) {
    const float size = fabsf(b);
    if (size > 0x1p126f && size <= 0x1.fffffep127f) return fabsf(a) == INFINITY ? NAN : 0.f;
    return a / b;
}
inline int __float2int_rn(float x) {
    if (x != x) return 0;
    return x >= 0x1p31f ? INT_MAX : x <= -0x1p31f ? INT_MIN : (int)nearbyintf(x);
}

// --- memory -----------------------------------------------------------------------------------------------------------

template <class T>
inline T __ldg(const T* p) {
    return *p;
}
template <class T>
inline T __ldcg(const T* p) {
    return *p;
}
inline size_t __cvta_generic_to_shared(const void* p) { return host::shared_address(p); }
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* p, unsigned x) {
    const unsigned before = *p;
    *p += x;
    return before;
}
inline unsigned atomicMax(unsigned* p, unsigned x) {
    const unsigned before = *p;
    *p = max(before, x);
    return before;
}

// --- warps and blocks -------------------------------------------------------------------------------------------------

inline void __syncthreads() { host::block_barrier(); }
inline int __syncthreads_or(int predicate) {
    static int any;
    host::block_barrier();
    any = 0;
    host::block_barrier();
    any |= predicate;
    host::block_barrier();
    return any != 0;
}
inline void __syncwarp(unsigned mask = ~0u) {
    host::meet(host::SYNC, mask, [](host::Meeting&) {});
}

template <class T>
inline T __shfl_sync(unsigned mask, T x, int from) {
    auto& meeting = host::meet(host::SHUFFLE, mask, [&](host::Meeting& m) { memcpy(&m.value[host::lane()], &x, sizeof x); });
    T got;
    memcpy(&got, &meeting.value[from & 31], sizeof got);
    return got;
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T x, int bits) {
    return __shfl_sync(mask, x, host::lane() ^ bits);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T x, unsigned by) {
    return __shfl_sync(mask, x, host::lane() >= (int)by ? host::lane() - (int)by : host::lane());
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
    auto& meeting = host::meet(
        host::BALLOT, mask, [&](host::Meeting& m) { m.value[host::lane()] = predicate; },
        [](host::Meeting& m) {
            unsigned bits = 0;
            for (int n = 0; n < host::LANES; n++) bits |= (unsigned)m.value[n] << n;
            m.a[0][0] = bits;
        });
    return meeting.a[0][0];
}
inline bool __any_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate); }
inline bool __all_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) == ~0u; }

namespace host {
template <class T, class F>
inline T reduce(unsigned mask, T x, F join) {
    static_assert(sizeof(T) == 4 && std::is_integral_v<T>, "redux is for 32-bit integers");
    auto& meeting = meet(
        REDUCE, mask, [&](Meeting& m) { m.value[lane()] = (uint32_t)x; },
        [&](Meeting& m) {
            T all = (T)m.value[0];
            for (int n = 1; n < LANES; n++) all = join(all, (T)m.value[n]);
            m.a[0][0] = (uint32_t)all;
        });
    return (T)meeting.a[0][0];
}
}  // namespace host
template <class T>
inline T __reduce_max_sync(unsigned mask, T x) {
    return host::reduce(mask, x, [](T a, T b) { return a < b ? b : a; });
}
template <class T>
inline T __reduce_min_sync(unsigned mask, T x) {
    return host::reduce(mask, x, [](T a, T b) { return b < a ? b : a; });
}
template <class T>
inline T __reduce_add_sync(unsigned mask, T x) {
    return host::reduce(mask, x, [](T a, T b) { return (T)((uint32_t)a + (uint32_t)b); });
}
