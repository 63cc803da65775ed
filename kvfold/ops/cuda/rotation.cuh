// Multiplying with the signs and the Hadamard matrix of the rotation, a vector of 128 coordinates a warp.
//
// Needs: SIGN0 to SIGN3 (signs of the rotation, bit 1 = negative).
#pragma once

#include "common.cuh"

// Signs of the rotation for the 32 coordinates from 32 * quarter.
__device__ __forceinline__ u32 signs(int quarter) {
    return quarter == 0 ? SIGN0 : quarter == 1 ? SIGN1 : quarter == 2 ? SIGN2 : SIGN3;
}

// Products with the Hadamard matrix, not normalised; a lane holds four neighbouring coordinates, or others whose bits are those of
// lane and component in another order.
__device__ __forceinline__ float4 hadamard(float4 v, int lane) {
    const float u0 = v.x + v.y, u1 = v.x - v.y, u2 = v.z + v.w, u3 = v.z - v.w;
    v = make_float4(u0 + u2, u1 + u3, u0 - u2, u1 - u3);
#pragma unroll
    for (int k = 1; k < 32; k <<= 1) {
        const float own = lane & k ? -1.f : 1.f;
        v.x = fmaf(own, v.x, __shfl_xor_sync(~0u, v.x, k)), v.y = fmaf(own, v.y, __shfl_xor_sync(~0u, v.y, k));
        v.z = fmaf(own, v.z, __shfl_xor_sync(~0u, v.z, k)), v.w = fmaf(own, v.w, __shfl_xor_sync(~0u, v.w, k));
    }
    return v;
}
