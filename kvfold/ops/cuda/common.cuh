// Device helpers that the kernels share. No header of the CUDA toolkit is needed: NVRTC knows the built-in types and
// intrinsics, and the rest is PTX.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr u32 ALL_LANES = 0xFFFFFFFFu;

__device__ __forceinline__ float bf16_to_float(u32 bits) { return __uint_as_float(bits << 16); }

// Nearest, ties to even, sub-normal numbers included.
__device__ __forceinline__ u32 float_to_bf16(float x) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// Two floats as a pair of bfloat16 or float16, the first in the low half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ u32 pack_f16(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// The largest power of two not above x, which is not negative, as far as it and its reciprocal are normal numbers.
__device__ __forceinline__ float power_below(float x) {
    u32 exponent = __float_as_uint(x) & 0x7F800000u;
    exponent = exponent < 0x00800000u ? 0x00800000u : exponent > 0x7E800000u ? 0x7E800000u : exponent;
    return __uint_as_float(exponent);
}

// What has been divided by such a power is multiplied by this before it becomes float16: the largest values are then some
// thousands, and half of float16's range is left for the small ones. As in prefill.py.
constexpr float LIFT = 1024.f;

// Of such a power.
__device__ __forceinline__ float reciprocal(float power) { return __uint_as_float(0x7F000000u - __float_as_uint(power)); }

// Exact, also for subnormal numbers, infinities and NaN.
__device__ __forceinline__ float half_to_float(u32 h) {
    const u32 sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
    const float magnitude = __uint_as_float(rest << 13) * 5.192296858534828e33f; // 2^112: the exponents' biases
    return __uint_as_float((rest >= 0x7c00u ? 0x7f800000u | rest << 13 : __float_as_uint(magnitude)) | sign);
}

// Byte n of a word as int8, without a conversion: 2^23 + 128 is added and taken away.
__device__ __forceinline__ float signed_byte(u32 word, int n) {
    return __uint_as_float(__byte_perm(word ^ 0x80808080u, 0x4B000000u, 0x7440 + n)) - 8388736.0f;
}

// Bytes of a 4 x 4 matrix, a row in each word: rows become columns.
__device__ __forceinline__ void transpose_bytes(u32 (&w)[4]) {
    u32 a = __byte_perm(w[0], w[1], 0x5140);
    u32 b = __byte_perm(w[2], w[3], 0x5140);
    u32 c = __byte_perm(w[0], w[1], 0x7362);
    u32 d = __byte_perm(w[2], w[3], 0x7362);
    w[0] = __byte_perm(a, b, 0x5410);
    w[1] = __byte_perm(a, b, 0x7632);
    w[2] = __byte_perm(c, d, 0x5410);
    w[3] = __byte_perm(c, d, 0x7632);
}

// Until the kernels before this one in the stream have ended and what they wrote is seen: one that is launched `early` has
// to call this before it writes anything, or reads anything that the kernel ahead may still write. From then on the next
// kernel may begin likewise. Every thread does, so that a kernel has not ended before those ahead have.
__device__ __forceinline__ void wait_for_predecessors() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ __forceinline__ void prefetch_l2(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}
