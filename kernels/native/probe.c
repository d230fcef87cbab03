/* What vec.h and vecmath.h compute, one function at a time, for tests: attention, sampling and layers are built from these. */
#include "vecmath.h"

static f32x16 compute(uint32_t function, f32x16 a, f32x16 b, f32x16 c) {
    switch (function) {
    case 0: return mr_exp(a);
    case 1: return mr_log(a);
    case 2: return mr_tanh(a);
    case 3: return mr_sigmoid(a);
    case 4: return mr_silu(a);
    case 5: return mr_round(a);
    case 6: return mr_fma(a, b, c);
    case 7: return mr_splat(mr_sum_lanes(a));
    case 8: return mr_splat(mr_max_lanes(a));
    default: { /* to half precision and back */
        uint16_t half[MR_LANES];
        mr_store_f16(half, a);
        return mr_load_f16(half);
    }
    }
}

/* out[i] = function(a[i], b[i], c[i]); count is a multiple of 16. */
void MR_NAME(mr_probe)(uint32_t function, const float *a, const float *b, const float *c, float *out, size_t count) {
    for (size_t i = 0; i < count; i += MR_LANES)
        mr_store(out + i, compute(function, mr_load(a + i), mr_load(b + i), mr_load(c + i)));
}
