/* The table of one form's kernels. */
#include "millrace.h"

#define MR_TEXT_(name) #name
#define MR_TEXT(name) MR_TEXT_(name)

extern const struct mr_kernels MR_NAME(mr_kernels);

const struct mr_kernels MR_NAME(mr_kernels) = {
    .isa = MR_TEXT(MR_ISA),
    .qlinear = MR_NAME(mr_qlinear),
    .linear = MR_NAME(mr_linear),
    .qembed = MR_NAME(mr_qembed),
    .embed = MR_NAME(mr_embed),
    .attention = MR_NAME(mr_attention),
    .sample = MR_NAME(mr_sample),
    .peak_int8 = MR_NAME(mr_peak_int8),
    .peak_f32 = MR_NAME(mr_peak_f32),
    .probe = MR_NAME(mr_probe),
};
