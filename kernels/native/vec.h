/* Vectors of 16 float lanes with the same bits in every form.

   Clang splits a 16-lane vector into whatever registers the form has; every operation here is lane-wise IEEE arithmetic
   or a reduction in one fixed tree, so the forms differ in speed only. Contraction is off (-ffp-contract=off): a fused
   multiply-add happens where mr_fma is written and nowhere else. exp, log, tanh and sigmoid are in vecmath.h. */
#ifndef MR_VEC_H
#define MR_VEC_H

#include "millrace.h"

#define MR_LANES 16

typedef float f32x16 __attribute__((ext_vector_type(16)));
typedef float f32x8 __attribute__((ext_vector_type(8)));
typedef float f32x4 __attribute__((ext_vector_type(4)));
typedef float f32x2 __attribute__((ext_vector_type(2)));
typedef double f64x16 __attribute__((ext_vector_type(16)));
typedef int32_t i32x16 __attribute__((ext_vector_type(16)));
typedef int32_t i32x8 __attribute__((ext_vector_type(8)));
typedef int32_t i32x4 __attribute__((ext_vector_type(4)));
typedef int32_t i32x2 __attribute__((ext_vector_type(2)));
typedef uint32_t u32x16 __attribute__((ext_vector_type(16)));
typedef int64_t i64x16 __attribute__((ext_vector_type(16)));
typedef uint16_t u16x16 __attribute__((ext_vector_type(16)));
typedef int8_t i8x16 __attribute__((ext_vector_type(16)));
typedef uint8_t u8x16 __attribute__((ext_vector_type(16)));
typedef _Float16 f16x16 __attribute__((ext_vector_type(16)));

/* Comparisons give i32x16 masks (-1 or 0); `mask ? a : b` chooses by lane. */

MR_INLINE f32x16 mr_splat(float value) { return (f32x16)(value); }
MR_INLINE i32x16 mr_splat_i32(int32_t value) { return (i32x16)(value); }

/* ---- memory: no alignment is assumed; processors of this decade load unaligned lines at full speed ---- */

MR_INLINE f32x16 mr_load(const float *p) {
    f32x16 v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

MR_INLINE void mr_store(float *p, f32x16 v) { __builtin_memcpy(p, &v, sizeof v); }

MR_INLINE i32x16 mr_load_i32(const int32_t *p) {
    i32x16 v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

#if defined(__AVX2__)
typedef _Bool b1x16 __attribute__((ext_vector_type(16)));

MR_INLINE b1x16 mr_first_lanes_(size_t n) {
    i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return __builtin_convertvector(lane < (int32_t)n, b1x16);
}

/* The first n <= 16 lanes from memory, zero in the others; nothing beyond p[n - 1] is touched. */
MR_INLINE f32x16 mr_load_n(const float *p, size_t n) { return __builtin_masked_load(mr_first_lanes_(n), p, (f32x16)(0.0f)); }
MR_INLINE void mr_store_n(float *p, f32x16 v, size_t n) { __builtin_masked_store(mr_first_lanes_(n), v, p); }
#else
MR_INLINE f32x16 mr_load_n(const float *p, size_t n) {
    float lanes[MR_LANES] = {0};
    for (size_t i = 0; i < n; ++i) lanes[i] = p[i];
    return mr_load(lanes);
}

MR_INLINE void mr_store_n(float *p, f32x16 v, size_t n) {
    float lanes[MR_LANES];
    mr_store(lanes, v);
    for (size_t i = 0; i < n; ++i) p[i] = lanes[i];
}
#endif

/* ---- arithmetic ---- */

MR_INLINE i32x16 mr_bits(f32x16 v) { return (i32x16)v; }
MR_INLINE f32x16 mr_from_bits(i32x16 v) { return (f32x16)v; }
MR_INLINE f32x16 mr_abs(f32x16 v) { return mr_from_bits(mr_bits(v) & 0x7fffffff); }
MR_INLINE f32x16 mr_select(i32x16 mask, f32x16 a, f32x16 b) { return mask ? a : b; }
MR_INLINE i32x16 mr_select_i32(i32x16 mask, i32x16 a, i32x16 b) { return mask ? a : b; }

/* a where a > b, else b: b when either is NaN. */
MR_INLINE f32x16 mr_max(f32x16 a, f32x16 b) { return a > b ? a : b; }
MR_INLINE f32x16 mr_min_f32(f32x16 a, f32x16 b) { return a < b ? a : b; }
MR_INLINE i32x16 mr_max_i32(i32x16 a, i32x16 b) { return a > b ? a : b; }

#if defined(__FMA__) || defined(__aarch64__)
MR_INLINE f32x16 mr_fma(f32x16 a, f32x16 b, f32x16 c) { return __builtin_elementwise_fma(a, b, c); }
MR_INLINE float mr_fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
/* Fused multiply-add without the instruction. The product of two floats is exact in double; the sum with c is rounded to
   odd (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008), after which the rounding to float is the
   only one that counts. The error of the double sum is exact by Knuth's two-sum. */
MR_INLINE f32x16 mr_fma(f32x16 a, f32x16 b, f32x16 c) {
    f64x16 p = __builtin_convertvector(a, f64x16) * __builtin_convertvector(b, f64x16);
    f64x16 q = __builtin_convertvector(c, f64x16);
    f64x16 sum = p + q;
    f64x16 p_part = sum - q;
    f64x16 error = (p - p_part) + (q - (sum - p_part));
    i64x16 bits = (i64x16)sum;
    i64x16 inexact = (error < 0.0) | (error > 0.0); /* false for NaN, so infinities stay as they are */
    i64x16 even = (bits & 1) - 1;
    i64x16 away = ~(((i64x16)error ^ bits) >> 63); /* -1: the exact sum is larger in magnitude; 0: smaller */
    i64x16 step = (away & 2) - 1;
    bits += step & inexact & even;
    return __builtin_convertvector((f64x16)bits, f32x16);
}

MR_INLINE float mr_fmaf(float a, float b, float c) { return mr_fma(mr_splat(a), mr_splat(b), mr_splat(c))[0]; }
#endif

MR_INLINE f32x16 mr_sqrt(f32x16 v) { return __builtin_elementwise_sqrt(v); }
MR_INLINE float mr_sqrtf(float v) { return __builtin_elementwise_sqrt(v); }

/* 1.5 * 2^23: adding it rounds |x| < 2^22 to an integer, half to even, and leaves that integer in the low bits of the sum. */
#define MR_ROUNDING_BIAS 12582912.0f

/* x rounded to an integer, half to even; |x| < 2^22. */
MR_INLINE f32x16 mr_round(f32x16 x) { return (x + MR_ROUNDING_BIAS) - MR_ROUNDING_BIAS; }

/* ---- reductions: lanes i and i + 8, then i + 4, i + 2, i + 1 ---- */

MR_INLINE float mr_sum_lanes(f32x16 v) {
    f32x8 a = v.lo + v.hi;
    f32x4 b = a.lo + a.hi;
    f32x2 c = b.lo + b.hi;
    return c.x + c.y;
}

MR_INLINE float mr_max_lanes(f32x16 v) {
    f32x8 a = v.lo > v.hi ? v.lo : v.hi;
    f32x4 b = a.lo > a.hi ? a.lo : a.hi;
    f32x2 c = b.lo > b.hi ? b.lo : b.hi;
    return c.x > c.y ? c.x : c.y;
}

MR_INLINE int32_t mr_max_lanes_i32(i32x16 v) {
    i32x8 a = v.lo > v.hi ? v.lo : v.hi;
    i32x4 b = a.lo > a.hi ? a.lo : a.hi;
    i32x2 c = b.lo > b.hi ? b.lo : b.hi;
    return c.x > c.y ? c.x : c.y;
}

/* ---- half precision, as bits ---- */

#if defined(__F16C__) || defined(__aarch64__)
MR_INLINE f32x16 mr_load_f16(const uint16_t *p) {
    f16x16 v;
    __builtin_memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, f32x16);
}

MR_INLINE u16x16 mr_to_f16_(f32x16 v) { return (u16x16) __builtin_convertvector(v, f16x16); }
#else
MR_INLINE f32x16 mr_load_f16(const uint16_t *p) {
    u16x16 half;
    __builtin_memcpy(&half, p, sizeof half);
    u32x16 h = __builtin_convertvector(half, u32x16);
    u32x16 sign = (h & 0x8000u) << 16;
    u32x16 shifted = (h & 0x7fffu) << 13;
    /* 2^112 moves the exponent from bias 15 to bias 127 and makes half's subnormals normal floats, exactly. */
    u32x16 finite = (u32x16)((f32x16)shifted * 0x1p112f);
    u32x16 special = shifted | 0x7f800000u; /* infinity, NaN */
    special |= (u32x16)(shifted > 0x0f800000u) & 0x00400000u;
    u32x16 magnitude = (u32x16)(shifted >= 0x0f800000u) ? special : finite;
    return (f32x16)(magnitude | sign);
}

MR_INLINE u16x16 mr_to_f16_(f32x16 v) { /* |v| <= 65504 or NaN */
    u32x16 bits = (u32x16)v;
    u32x16 magnitude = bits & 0x7fffffffu;
    u32x16 normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    /* Below 2^-14: adding 0.5 leaves the subnormal's integer, rounded half to even, in the low bits. */
    u32x16 tiny = (u32x16)((f32x16)magnitude + 0.5f) - (126u << 23);
    u32x16 nan = 0x7e00u | ((magnitude >> 13) & 0x03ffu);
    u32x16 half = (u32x16)(magnitude < (113u << 23)) ? tiny : normal;
    half = (u32x16)(magnitude > 0x7f800000u) ? nan : half;
    return __builtin_convertvector(half | ((bits >> 16) & 0x8000u), u16x16);
}
#endif

/* Rounded half to even; values beyond +-65504 become +-65504, NaN stays NaN. */
MR_INLINE u16x16 mr_to_f16(f32x16 v) {
    v = v > 65504.0f ? (f32x16)(65504.0f) : v;
    v = v < -65504.0f ? (f32x16)(-65504.0f) : v;
    return mr_to_f16_(v);
}

MR_INLINE void mr_store_f16(uint16_t *p, f32x16 v) {
    u16x16 half = mr_to_f16(v);
    __builtin_memcpy(p, &half, sizeof half);
}

#endif
