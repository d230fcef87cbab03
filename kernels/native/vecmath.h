/* exp, log, tanh, sigmoid and SiLU on 16 lanes: polynomials in fixed order, a few units in the last place.

   Apart from vec.h because these are approximations with bounds, while vec.h is exact IEEE arithmetic. Coefficients are
   those of the Cephes library (Moshier: expf, logf, tanhf). No subnormal number is made on the way, so that the denormal
   setting of the calling thread does not matter. */
#ifndef MR_VECMATH_H
#define MR_VECMATH_H

#include "vec.h"

/* e^x; exactly 0 below -87 (and for -inf), e^87 above 87, NaN for NaN. Never infinite, never subnormal. */
MR_INLINE f32x16 mr_exp(f32x16 x) {
    i32x16 underflow = x < -87.0f;
    f32x16 y = x > 87.0f ? (f32x16)(87.0f) : x;
    y = underflow ? (f32x16)(-87.0f) : y;
    f32x16 biased = mr_fma(y, mr_splat(1.44269504f), mr_splat(MR_ROUNDING_BIAS));
    f32x16 n = biased - MR_ROUNDING_BIAS;
    f32x16 f = mr_fma(n, mr_splat(-0.693359375f), y); /* ln 2 in two parts; the first has few bits */
    f = mr_fma(n, mr_splat(2.12194440e-4f), f);
    f32x16 p = mr_splat(1.9875691500e-4f);
    p = mr_fma(p, f, mr_splat(1.3981999507e-3f));
    p = mr_fma(p, f, mr_splat(8.3334519073e-3f));
    p = mr_fma(p, f, mr_splat(4.1665795894e-2f));
    p = mr_fma(p, f, mr_splat(1.6666665459e-1f));
    p = mr_fma(p, f, mr_splat(5.0000001201e-1f));
    p = mr_fma(p, f * f, f) + 1.0f;
    u32x16 power = ((u32x16)biased + 127u) << 23; /* 2^n: the low bits of `biased` hold n */
    return underflow ? (f32x16)(0.0f) : p * (f32x16)power;
}

/* ln x; -inf at 0 (subnormals count as 0), NaN below 0 and for NaN, +inf at +inf. */
MR_INLINE f32x16 mr_log(f32x16 x) {
    u32x16 bits = (u32x16)x;
    /* m in [sqrt(1/2), sqrt(2)): subtract the bits of sqrt(1/2), keep the exponent, add the bits back to the mantissa. */
    i32x16 shifted = (i32x16)(bits - 0x3f3504f3u);
    f32x16 n = __builtin_convertvector(shifted >> 23, f32x16);
    f32x16 m = (f32x16)(((u32x16)shifted & 0x007fffffu) + 0x3f3504f3u);
    f32x16 f = m - 1.0f;
    f32x16 z = f * f;
    f32x16 p = mr_splat(7.0376836292e-2f);
    p = mr_fma(p, f, mr_splat(-1.1514610310e-1f));
    p = mr_fma(p, f, mr_splat(1.1676998740e-1f));
    p = mr_fma(p, f, mr_splat(-1.2420140846e-1f));
    p = mr_fma(p, f, mr_splat(1.4249322787e-1f));
    p = mr_fma(p, f, mr_splat(-1.6668057665e-1f));
    p = mr_fma(p, f, mr_splat(2.0000714765e-1f));
    p = mr_fma(p, f, mr_splat(-2.4999993993e-1f));
    p = mr_fma(p, f, mr_splat(3.3333331174e-1f));
    f32x16 y = mr_fma(n, mr_splat(-2.12194440e-4f), p * f * z);
    y = mr_fma(z, mr_splat(-0.5f), y);
    f32x16 result = mr_fma(n, mr_splat(0.693359375f), f + y);
    f32x16 infinity = mr_splat(__builtin_inff());
    result = x < 0x1p-126f ? -infinity : result;
    result = x < 0.0f ? mr_splat(__builtin_nanf("")) : result;
    result = x == infinity ? infinity : result;
    return x != x ? x : result;
}

/* 1 / (1 + e^-x). */
MR_INLINE f32x16 mr_sigmoid(f32x16 x) { return 1.0f / (1.0f + mr_exp(-x)); }

/* x * sigmoid(x). */
MR_INLINE f32x16 mr_silu(f32x16 x) { return x / (1.0f + mr_exp(-x)); }

/* tanh x: a polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel. */
MR_INLINE f32x16 mr_tanh(f32x16 x) {
    f32x16 a = mr_abs(x);
    f32x16 z = x * x;
    f32x16 p = mr_splat(-5.70498872745e-3f);
    p = mr_fma(p, z, mr_splat(2.06390887954e-2f));
    p = mr_fma(p, z, mr_splat(-5.37397155531e-2f));
    p = mr_fma(p, z, mr_splat(1.33314422036e-1f));
    p = mr_fma(p, z, mr_splat(-3.33332819422e-1f));
    f32x16 near_zero = mr_fma(p * z, x, x);
    f32x16 far = 1.0f - 2.0f / (mr_exp(a + a) + 1.0f);
    far = mr_from_bits(mr_bits(far) | (mr_bits(x) & (int32_t)0x80000000));
    return a < 0.625f ? near_zero : far;
}

#endif
