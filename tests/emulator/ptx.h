// The PTX instructions that the kernels use, as functions: operands in PTX's order, the dots of the name as underscores.
// `ptx.py` translates a kernel's asm statements into calls of these, and refuses an instruction that is missing here.
#pragma once
#include "shim.h"

namespace ptx {

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// --- floats -----------------------------------------------------------------------------------------------------------

inline float flush(float x) {  // .ftz
    return fabsf(x) < 0x1p-126f ? copysignf(0.f, x) : x;
}
inline u32 to_bf16(float x) {
    const u32 bits = __float_as_uint(x);
    if (x != x) return 0x7FFF;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline u32 to_f16(float x) {
    const u32 sign = __float_as_uint(x) >> 16 & 0x8000u;
    const float size = fabsf(x);
    if (x != x) return 0x7FFF;
    if (size >= 65520.f) return sign | 0x7C00;
    if (size < 0x1p-14f) return sign | (u32)nearbyintf(size * 0x1p24f);  // up to 1024, the smallest normal number
    const u32 bits = __float_as_uint(size) - (112u << 23);
    return sign | (bits + 0xFFF + (bits >> 13 & 1)) >> 13;
}
inline float from_f16(u32 h) {
    const u32 rest = h & 0x7FFFu, sign = (h & 0x8000u) << 16;
    if (rest >= 0x7C00u) return __uint_as_float(sign | 0x7F800000u | rest << 13);
    return __uint_as_float(sign | __float_as_uint(rest < 0x400u ? rest * 0x1p-24f : __uint_as_float((rest << 13) + (112u << 23))));
}

inline void cvt_rn_bf16_f32(u16& d, float a) { d = to_bf16(a); }
inline void cvt_rn_bf16x2_f32(u32& d, float high, float low) { d = to_bf16(low) | to_bf16(high) << 16; }
inline void cvt_rn_f16x2_f32(u32& d, float high, float low) { d = to_f16(low) | to_f16(high) << 16; }
inline void cvt_u16_u32(u16& d, u32 a) { d = a; }
inline void cvt_f32_f16(float& d, u16 a) { d = from_f16(a); }
inline void ex2_approx_ftz_f32(float& d, float a) { d = flush((float)exp2((double)flush(a))); }
inline void lg2_approx_ftz_f32(float& d, float a) { d = flush((float)log2((double)flush(a))); }
inline void max_NaN_f32(float& d, float a, float b) { d = a != a || b != b ? __uint_as_float(0x7fffffffu) : a > b ? a : b; }
inline void rcp_approx_ftz_f32(float& d, float a) { d = flush(1.f / flush(a)); }
inline void mul_rn_sat_f32(float& d, float a, float b) {
    const float product = a * b;
    d = product > 1.f ? 1.f : product > 0.f ? product : 0.f;  // NaN becomes 0
}
inline void fma_rn_sat_f32(float& d, float a, float b, float c) {
    const float sum = fmaf(a, b, c);
    d = sum > 1.f ? 1.f : sum > 0.f ? sum : 0.f;
}

// --- integers ---------------------------------------------------------------------------------------------------------

inline void prmt_b32(u32& d, u32 a, u32 b, u32 selectors) {  // a selector's top bit repeats the byte's
    const u64 bytes = a | (u64)b << 32;
    u32 r = 0;
    for (int n = 0; n < 4; n++) {
        const u32 selector = selectors >> 4 * n & 15, byte = bytes >> 8 * (selector & 7) & 255;
        r |= (selector & 8 ? byte & 128 ? 255u : 0u : byte) << 8 * n;
    }
    d = r;
}
inline void selp_u32(u32& d, u32 a, u32 b, bool chosen) { d = chosen ? a : b; }
inline void shr_u32(u32& d, u32 a, u32 n) { d = n < 32 ? a >> n : 0; }
inline void mad_lo_u32(u32& d, u32 a, u32 b, u32 c) { d = a * b + c; }
inline void dp2a_lo_u32_u32(u32& d, u32 a, u32 b, u32 c) { d = c + (a & 0xFFFFu) * (b & 255u) + (a >> 16) * (b >> 8 & 255u); }
inline void lop3_b32(u32& d, u32 a, u32 b, u32 c, u32 table) {
    u32 r = 0;
    for (int n = 0; n < 8; n++)
        if (table >> n & 1) r |= (n & 4 ? a : ~a) & (n & 2 ? b : ~b) & (n & 1 ? c : ~c);
    d = r;
}

// --- matrix products --------------------------------------------------------------------------------------------------

// Fragments of m16n8k32 with bytes: lane 4 g + i holds of A rows g and g + 8, of B column g, coordinates 4 i to 4 i + 3 and
// those from 16 on, and of C rows g and g + 8, columns 2 i and 2 i + 1.
template <class B>
inline void mma_bytes(int& d0, int& d1, int& d2, int& d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, int c0, int c1,
                      int c2, int c3) {
    const int lane = host::lane();
    auto& meeting = host::meet(
        host::MMA, ~0u,
        [&](host::Meeting& m) {
            const u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
            memcpy(m.a[lane], a, sizeof a);
            memcpy(m.b[lane], b, sizeof b);
        },
        [](host::Meeting& m) {
            int16_t rows[16][32], columns[8][32];
            for (int g = 0; g < 8; g++)
                for (int i = 0; i < 4; i++)
                    for (int half = 0; half < 2; half++)
                        for (int n = 0; n < 4; n++) {
                            const int k = 16 * half + 4 * i + n;
                            rows[g][k] = (int8_t)(m.a[4 * g + i][2 * half] >> 8 * n);
                            rows[g + 8][k] = (int8_t)(m.a[4 * g + i][2 * half + 1] >> 8 * n);
                            columns[g][k] = (B)(m.b[4 * g + i][half] >> 8 * n);
                        }
            for (int row = 0; row < 16; row++)
                for (int column = 0; column < 8; column++) {
                    int sum = 0;
                    for (int k = 0; k < 32; k++) sum += rows[row][k] * columns[column][k];
                    m.integers[4 * (row & 7) + column / 2][2 * (row >> 3) + (column & 1)] = sum;
                }
        });
    const int* sums = meeting.integers[lane];  // added with the wrap-around of the hardware
    d0 = (int)((u32)c0 + sums[0]), d1 = (int)((u32)c1 + sums[1]), d2 = (int)((u32)c2 + sums[2]), d3 = (int)((u32)c3 + sums[3]);
}
template <class... A>
inline void mma_sync_aligned_m16n8k32_row_col_s32_s8_s8_s32(A&&... operands) {
    mma_bytes<int8_t>(operands...);
}
template <class... A>
inline void mma_sync_aligned_m16n8k32_row_col_s32_s8_u8_s32(A&&... operands) {
    mma_bytes<uint8_t>(operands...);
}

// Fragments of m16n8k16 with halves: as above, two coordinates in each register, 2 i and 2 i + 1 and those from 8 on. The
// sum is rounded once; tensor cores cut off bits on the way.
template <bool BF16>
inline void mma_halves(float& d0, float& d1, float& d2, float& d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, float c0,
                       float c1, float c2, float c3) {
    const int lane = host::lane();
    auto& meeting = host::meet(
        host::MMA, ~0u,
        [&](host::Meeting& m) {
            const u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
            const float c[4] = {c0, c1, c2, c3};
            memcpy(m.a[lane], a, sizeof a);
            memcpy(m.b[lane], b, sizeof b);
            memcpy(m.result[lane], c, sizeof c);
        },
        [](host::Meeting& m) {
            auto value = [](u32 bits) { return (double)(BF16 ? __uint_as_float(bits << 16) : from_f16(bits & 0xFFFFu)); };
            double rows[16][16], columns[8][16];
            for (int g = 0; g < 8; g++)
                for (int i = 0; i < 4; i++)
                    for (int half = 0; half < 2; half++)
                        for (int n = 0; n < 2; n++) {
                            const int k = 8 * half + 2 * i + n;
                            rows[g][k] = value(m.a[4 * g + i][2 * half] >> 16 * n);
                            rows[g + 8][k] = value(m.a[4 * g + i][2 * half + 1] >> 16 * n);
                            columns[g][k] = value(m.b[4 * g + i][half] >> 16 * n);
                        }
            for (int row = 0; row < 16; row++)
                for (int column = 0; column < 8; column++) {
                    float& result = m.result[4 * (row & 7) + column / 2][2 * (row >> 3) + (column & 1)];
                    double sum = result;
                    for (int k = 0; k < 16; k++) sum += rows[row][k] * columns[column][k];
                    result = (float)sum;
                }
        });
    const float* sums = meeting.result[lane];
    d0 = sums[0], d1 = sums[1], d2 = sums[2], d3 = sums[3];
}
template <class... A>
inline void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(A&&... operands) {
    mma_halves<false>(operands...);
}
template <class... A>
inline void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(A&&... operands) {
    mma_halves<true>(operands...);
}

// An 8 x 8 matrix of 16-bit elements: lane 4 g + i holds those in row g, columns 2 i and 2 i + 1.
inline void movmatrix_sync_aligned_m8n8_trans_b16(u32& d, u32 a) {
    const int lane = host::lane();
    auto& meeting = host::meet(host::MMA, ~0u, [&](host::Meeting& m) { m.a[lane][0] = a; });
    const int g = lane >> 2, i = lane & 3;
    auto element = [&](int row, int column) { return meeting.a[4 * row + column / 2][0] >> 16 * (column & 1) & 0xFFFFu; };
    d = element(2 * i, g) | element(2 * i + 1, g) << 16;
}

// --- memory -----------------------------------------------------------------------------------------------------------

inline void ld_shared_u32(u32& d, u32 address) { memcpy(&d, host::shared_at(address, 4, 4, "a load"), 4); }
inline void ld_shared_u64(u64& d, u32 address) { memcpy(&d, host::shared_at(address, 8, 8, "a load"), 8); }
inline void ld_shared_v2_u32(u32& d0, u32& d1, u32 address) {
    const u32* from = (const u32*)host::shared_at(address, 8, 8, "a load");
    d0 = from[0], d1 = from[1];
}
inline void ld_shared_v4_u32(u32& d0, u32& d1, u32& d2, u32& d3, u32 address) {
    const u32* from = (const u32*)host::shared_at(address, 16, 16, "a load");
    d0 = from[0], d1 = from[1], d2 = from[2], d3 = from[3];
}
inline void ld_relaxed_gpu_v2_f32(float& d0, float& d1, const void* from) {
    d0 = ((const float*)from)[0], d1 = ((const float*)from)[1];
}
inline void ld_relaxed_gpu_v4_f32(float& d0, float& d1, float& d2, float& d3, const void* from) {
    const float* at = (const float*)from;
    d0 = at[0], d1 = at[1], d2 = at[2], d3 = at[3];
}
inline void atom_add_acq_rel_gpu_global_u32(u32& d, u32* at, u32 x) { d = *at, *at += x; }
inline void griddepcontrol_wait() { host::current->waited = true; }  // kernels run one after the other
inline void griddepcontrol_launch_dependents() {}
inline void prefetch_global_L2(const void*) {}
inline void cp_async_bulk_prefetch_L2_global(u64 from, u32 bytes) {
    if (bytes % 16 || from % 16) host::fail("a prefetch of %u bytes from 0x%llx: both have to be multiples of 16", bytes, (unsigned long long)from);
}
inline void fence_mbarrier_init_release_cluster() {}

inline void mbarrier_init_shared__cta_b64(u32 barrier, int count) {
    host::mbarrier(barrier, true) = {0, (uint8_t)count, (uint8_t)count, 0, host::MAGIC};
    host::barriers.push_back({barrier, count});
}
inline void elect_sync(bool& elected, u32) { elected = host::lane() == 0; }
inline void mbarrier_inval_shared__cta_b64(u32 barrier) { host::invalidate(barrier); }
inline void mbarrier_arrive_expect_tx_shared__cta_b64(u32 barrier, u32 bytes) {
    host::Mbarrier& it = host::mbarrier(barrier);
    if (!it.pending) host::fail("the mbarrier at 0x%x is arrived at more often than it was initialised for", barrier);
    it.bytes += bytes;
    it.pending--;
    host::complete_phase(it);
}
inline void cp_async_bulk_shared__cluster_global_mbarrier__complete_tx__bytes(u32 to, u64 from, u32 bytes, u32 barrier) {
    host::start_copy({to, (const void*)from, bytes, barrier});
}
inline void mbarrier_try_wait_parity_shared__cta_b64(bool& done, u32 barrier, u32 parity) {
    done = host::test_wait(barrier, parity);
}

}  // namespace ptx
