/* The inputs of a decode step become those of the next one, on the device: see services/backends/step_image.py, advance(). */
#include "common.cuh"

/* Each row moves on to the token it has sampled (-1, a row without a finite logit, reads as 0). A row whose slot is negative is
   padding and stays where it is. One thread a row. */
MR_KERNEL void millrace_advance(long long *input_ids, int *past_lens, int *slot_mapping, long long *position,
                                const long long *token_ids, int rows) {
    int row = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (row >= rows || slot_mapping[row] < 0) return;
    long long token = token_ids[row];
    input_ids[row] = token < 0 ? 0 : token;
    past_lens[row] += 1;
    slot_mapping[row] += 1;
    position[row] += 1;
}
