/* What the kernels share. Plain C as NVRTC and clang both take it: no headers, no templates; tests compile the same text for the
   CPU (tests/kernels/cuda/emulator.h brings the names that CUDA has built in). T, the 16-bit type, is bfloat16 with -DMR_BF16=1
   and float16 with -DMR_BF16=0. */
#ifndef MILLRACE_COMMON_CUH
#define MILLRACE_COMMON_CUH

#ifdef MR_EMULATED
#include "emulator.h"
#else
#define MR_KERNEL extern "C" __global__
#define MR_DEVICE static __device__ __forceinline__
#define MR_SHARED __shared__
#define MR_UNROLL _Pragma("unroll")
#define MR_FULL_WARP 0xffffffffu

#define MR_ALIGNED __align__(16)

struct MR_ALIGNED mr_words {
    unsigned w[4];
};

/* Sixteen bytes that are read once: they pass the first cache by. */
MR_DEVICE struct mr_words mr_load_once(const void *at) {
    struct mr_words v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                 : "l"(at));
    return v;
}

/* Programmatic dependent launch, from Hopper on: a kernel that is launched for it (linear_op.c) begins while the one before it
   still runs, and may read what no kernel writes, such as weights. Before it touches anything else it waits until that one, and with
   it all before, has ended. It lets the next one begin likewise. */
MR_DEVICE void mr_let_next_begin(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

MR_DEVICE void mr_wait_for_previous(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

MR_DEVICE float mr_f16_to_float(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

MR_DEVICE unsigned short mr_float_to_f16(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

MR_DEVICE float mr_bf16_to_float(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }

/* To nearest, ties to even; a NaN stays one. */
MR_DEVICE unsigned short mr_float_to_bf16(float value) {
    unsigned bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (unsigned short)((bits >> 16) | 0x40u);
    return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#if MR_BF16
#define MR_TO_FLOAT mr_bf16_to_float
#define MR_FROM_FLOAT mr_float_to_bf16
#else
#define MR_TO_FLOAT mr_f16_to_float
#define MR_FROM_FLOAT mr_float_to_f16
#endif

/* Eight values of T that lie side by side, as floats. */
MR_DEVICE void mr_unpack(struct mr_words v, float *out) {
    MR_UNROLL
    for (int i = 0; i < 4; ++i) {
        out[2 * i] = MR_TO_FLOAT((unsigned short)(v.w[i] & 0xffffu));
        out[2 * i + 1] = MR_TO_FLOAT((unsigned short)(v.w[i] >> 16));
    }
}

/* Eight floats that lie side by side, the first on a 16-byte boundary. */
MR_DEVICE void mr_load_floats(const float *at, float *out) {
    struct mr_words low = *(const struct mr_words *)at, high = *(const struct mr_words *)(at + 4);
    MR_UNROLL
    for (int i = 0; i < 4; ++i) {
        out[i] = __uint_as_float(low.w[i]);
        out[i + 4] = __uint_as_float(high.w[i]);
    }
}

/* The sum over a warp's lanes, in every lane, in one fixed tree. */
MR_DEVICE float mr_warp_sum(float value) {
    MR_UNROLL
    for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(MR_FULL_WARP, value, offset);
    return value;
}

MR_DEVICE float mr_silu(float x) { return x / (1.0f + expf(-x)); }

#endif
