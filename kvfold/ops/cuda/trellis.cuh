// The path bits of a trellis (docs/layout.md): what is read of them.
#pragma once

#include "common.cuh"

// The path's two bits of each level's index, as a plane of 2 bits has them, from the path bits u of 32 coordinates and
// these two bits up, as one string: u_t xor u_{t-2} above u_{t-1}. `odd` has the coordinates whose t is odd; the others are in
// `even_down`, which is one bit too low.
__device__ __forceinline__ void path_bits(u32 u, u32 two_up, u32& odd, u32& even_down) {
    odd = u ^ (two_up & 0xaaaaaaaau);
    even_down = u ^ (two_up & 0x55555555u);
}

// The same of a word of one vector and the word before it.
__device__ __forceinline__ void path_of_word(u32 before, u32 u, u32& even, u32& odd) {
    u32 even_down;
    path_bits(u, __funnelshift_l(before, u, 2), odd, even_down);
    even = __funnelshift_l(before, even_down, 1);
}

// Of eight neighbouring coordinates of these 32, the ones with number `row` modulo 4: a nibble each.
__device__ __forceinline__ u32 path_of_eight(u32 before, u32 u, int row) {
    u32 even, odd;
    path_of_word(before, u, even, odd);
    return (row & 1 ? odd : even) >> (row & 2) & 0x33333333u;
}
