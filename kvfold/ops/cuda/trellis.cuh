// The path bits of a trellis (docs/layout.md): what is read of them.
#pragma once

#include "common.cuh"

// The path's two bits of each level's index, from the path bits u of 32 coordinates and these two bits up, as one string, where
// a plane of 2 bits has them. Of coordinates whose t is odd, u_t xor u_{t-2} is above u_{t-1}; in `even` it is below.
__device__ __forceinline__ void path_bits(u32 u, u32 two_up, u32& even, u32& odd) {
    even = two_up ^ (u & 0x55555555u);
    odd = u ^ (two_up & 0xaaaaaaaau);
}

// Of eight neighbouring coordinates of these 32, the ones with number `row` modulo 4: a nibble each, u_t xor u_{t-2} above.
__device__ __forceinline__ u32 path_of_eight(u32 before, u32 u, int row) {
    const u32 two_up = __funnelshift_l(before, u, 2);
    const u32 odd = u ^ (two_up & 0xaaaaaaaau), even_down = u ^ (two_up & 0x55555555u);
    return (row & 1 ? odd : __funnelshift_l(before, even_down, 1)) >> (row & 2) & 0x33333333u;
}
