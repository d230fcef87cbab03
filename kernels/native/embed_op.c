/* QEmbed and Embed as operators of ONNX Runtime. */
#include "abi.h"
#include "embed.h"

enum { IDS, WEIGHT, SCALE };

static const struct mr_port qembed_inputs[] = {{"ids", MR_I64, 0}, {"weight", MR_I8, 0}, {"scale", MR_F32, 0}};
static const struct mr_port embed_inputs[] = {{"ids", MR_I64, 0}, {"weight", MR_F32, 0}};
static const struct mr_port outputs[] = {{"y", MR_F32, 0}};

struct embed_kernel {
    int64_t N, K;
    const void *weight;
    const float *scale;
};

/* N and K, and how many blocks of 64 columns they make. */
static OrtStatus *read_sizes(const struct mr_node *node, struct embed_kernel *kernel, int64_t *blocks) {
    MR_TRY(mr_attribute_int(node, "N", NULL, &kernel->N));
    MR_TRY(mr_attribute_int(node, "K", NULL, &kernel->K));
    MR_TRY(mr_expect_range(node->op, "N", kernel->N, 1, INT32_MAX));
    MR_TRY(mr_expect_range(node->op, "K", kernel->K, 1, INT32_MAX));
    *blocks = (int64_t)mr_num_blocks((size_t)kernel->N, MR_NONE);
    return NULL;
}

static OrtStatus *create_qembed(const struct mr_node *node, void *memory) {
    struct embed_kernel *kernel = memory;
    struct mr_tensor weight, scale;
    int64_t blocks;
    MR_TRY(read_sizes(node, kernel, &blocks));
    MR_TRY(mr_constant(node, WEIGHT, &weight));
    MR_TRY(mr_constant(node, SCALE, &scale));
    MR_TRY(mr_expect_shape(node->op, "weight", &weight, 4, (int64_t[]){blocks, (kernel->K + 3) / 4, MR_BLOCK, 4}));
    MR_TRY(mr_expect_shape(node->op, "scale", &scale, 1, (int64_t[]){blocks * MR_BLOCK}));
    kernel->weight = weight.data;
    kernel->scale = scale.data;
    return NULL;
}

static OrtStatus *create_embed(const struct mr_node *node, void *memory) {
    struct embed_kernel *kernel = memory;
    struct mr_tensor weight;
    int64_t blocks;
    MR_TRY(read_sizes(node, kernel, &blocks));
    MR_TRY(mr_constant(node, WEIGHT, &weight));
    MR_TRY(mr_expect_shape(node->op, "weight", &weight, 3, (int64_t[]){blocks, kernel->K, MR_BLOCK}));
    kernel->weight = weight.data;
    return NULL;
}

/* The ids, checked, and memory for their rows. */
static OrtStatus *read_ids(const struct embed_kernel *kernel, struct mr_call *call, struct mr_tensor *ids, float **y) {
    MR_TRY(mr_input(call, IDS, ids));
    MR_TRY(mr_expect_shape(call->op, "ids", ids, 1, (int64_t[]){-1}));
    const int64_t *values = ids->data;
    size_t bad = mr_first_bad_id(values, (size_t)ids->dims[0], (size_t)kernel->N);
    if (MR_UNLIKELY(bad < (size_t)ids->dims[0]))
        return mr_fail("%s: ids[%d] is %d, the table has rows 0..%d", call->op->name, (int64_t)bad, values[bad], kernel->N - 1);
    return mr_output(call, 0, (int64_t[]){ids->dims[0], kernel->K}, 2, (void **)y);
}

static OrtStatus *compute_qembed(const void *memory, struct mr_call *call) {
    const struct embed_kernel *kernel = memory;
    struct mr_tensor ids;
    float *y;
    MR_TRY(read_ids(kernel, call, &ids, &y));
    const struct mr_qembed args = {.ids = ids.data,
                                   .y = y,
                                   .rows = (size_t)ids.dims[0],
                                   .K = (size_t)kernel->K,
                                   .N = (size_t)kernel->N,
                                   .weight = kernel->weight,
                                   .scale = kernel->scale};
    const struct mr_parallel parallel = mr_call_parallel(call);
    mr_active()->qembed(&args, &parallel);
    return NULL;
}

static OrtStatus *compute_embed(const void *memory, struct mr_call *call) {
    const struct embed_kernel *kernel = memory;
    struct mr_tensor ids;
    float *y;
    MR_TRY(read_ids(kernel, call, &ids, &y));
    const struct mr_embed args = {.ids = ids.data,
                                  .y = y,
                                  .rows = (size_t)ids.dims[0],
                                  .K = (size_t)kernel->K,
                                  .N = (size_t)kernel->N,
                                  .weight = kernel->weight};
    const struct mr_parallel parallel = mr_call_parallel(call);
    mr_active()->embed(&args, &parallel);
    return NULL;
}

MR_DEFINE_OP(mr_qembed_op, "QEmbed", qembed_inputs, outputs, struct embed_kernel, create_qembed, compute_qembed);
MR_DEFINE_OP(mr_embed_op, "Embed", embed_inputs, outputs, struct embed_kernel, create_embed, compute_embed);
