/* QLinear and Linear as operators of ONNX Runtime: weights are checked once at creation, x and residual in every run. */
#include "abi.h"
#include "linear.h"

static const struct mr_port qlinear_inputs[] = {
    {"x", MR_F32, 0},    {"weight", MR_I8, 0}, {"scale", MR_F32, 0},    {"colsum", MR_I32, 0},
    {"bias", MR_F32, 1}, {"norm", MR_F32, 1},  {"residual", MR_F32, 1},
};
static const struct mr_port linear_inputs[] = {
    {"x", MR_F32, 0}, {"weight", MR_F32, 0}, {"bias", MR_F32, 1}, {"norm", MR_F32, 1}, {"residual", MR_F32, 1},
};
static const struct mr_port outputs[] = {{"y", MR_F32, 0}};

/* Ports in the order of the tables above. */
enum { X, WEIGHT };
enum { Q_SCALE = 2, Q_COLSUM, Q_BIAS, Q_NORM, Q_RESIDUAL };
enum { F_BIAS = 2, F_NORM, F_RESIDUAL };

struct linear_kernel {
    int64_t N;
    int64_t min_K, max_K; /* inputs that fit the weight: an int8 weight is padded to a multiple of four */
    int64_t norm_K;       /* length of norm; 0 without */
    const void *weight;
    const float *scale;
    const int32_t *colsum;
    const float *bias;
    const float *norm;
    float norm_epsilon;
    int32_t activation;
};

/* ---- creation ---- */

static OrtStatus *read_activation(const struct mr_node *node, int32_t *activation) {
    char name[16];
    MR_TRY(mr_attribute_string(node, "activation", "none", name, sizeof name));
    if (mr_same_text(name, "none")) *activation = MR_NONE;
    else if (mr_same_text(name, "silu_mul")) *activation = MR_SILU_MUL;
    else return mr_fail("%s: activation is '%s', known are none and silu_mul", node->op->name, name);
    return NULL;
}

/* Attributes, and the number of weight blocks that N outputs take. */
static OrtStatus *read_attributes(const struct mr_node *node, struct linear_kernel *kernel, int64_t *blocks) {
    const float default_epsilon = 1e-5f;
    MR_TRY(mr_attribute_int(node, "N", NULL, &kernel->N));
    MR_TRY(mr_expect_range(node->op, "N", kernel->N, 1, INT32_MAX));
    MR_TRY(mr_attribute_float(node, "norm_epsilon", &default_epsilon, &kernel->norm_epsilon));
    MR_TRY(read_activation(node, &kernel->activation));
    *blocks = (int64_t)mr_num_blocks((size_t)kernel->N, kernel->activation);
    return NULL;
}

/* bias [blocks * 64] at `port` and norm [K] after it, both optional. */
static OrtStatus *read_vectors(const struct mr_node *node, struct linear_kernel *kernel, size_t port, int64_t blocks) {
    struct mr_tensor bias, norm;
    MR_TRY(mr_constant(node, port, &bias));
    MR_TRY(mr_constant(node, port + 1, &norm));
    if (bias.present) {
        MR_TRY(mr_expect_shape(node->op, "bias", &bias, 1, (int64_t[]){blocks * MR_BLOCK}));
        kernel->bias = bias.data;
    }
    if (norm.present) {
        MR_TRY(mr_expect_shape(node->op, "norm", &norm, 1, (int64_t[]){-1}));
        MR_TRY(mr_expect_range(node->op, "length of norm", norm.dims[0], kernel->min_K, kernel->max_K));
        kernel->norm = norm.data;
        kernel->norm_K = norm.dims[0];
    }
    return NULL;
}

static OrtStatus *create_qlinear(const struct mr_node *node, void *memory) {
    struct linear_kernel *kernel = memory;
    struct mr_tensor weight, scale, colsum;
    int64_t blocks;
    MR_TRY(read_attributes(node, kernel, &blocks));
    MR_TRY(mr_constant(node, WEIGHT, &weight));
    MR_TRY(mr_constant(node, Q_SCALE, &scale));
    MR_TRY(mr_constant(node, Q_COLSUM, &colsum));
    MR_TRY(mr_expect_shape(node->op, "weight", &weight, 4, (int64_t[]){blocks, -1, MR_BLOCK, 4}));
    MR_TRY(mr_expect_range(node->op, "padded K of weight", 4 * weight.dims[1], 4, MR_QLINEAR_MAX_K));
    MR_TRY(mr_expect_shape(node->op, "scale", &scale, 1, (int64_t[]){blocks * MR_BLOCK}));
    MR_TRY(mr_expect_shape(node->op, "colsum", &colsum, 1, (int64_t[]){blocks * MR_BLOCK}));
    kernel->max_K = 4 * weight.dims[1];
    kernel->min_K = kernel->max_K - 3;
    kernel->weight = weight.data;
    kernel->scale = scale.data;
    kernel->colsum = colsum.data;
    return read_vectors(node, kernel, Q_BIAS, blocks);
}

static OrtStatus *create_linear(const struct mr_node *node, void *memory) {
    struct linear_kernel *kernel = memory;
    struct mr_tensor weight;
    int64_t blocks;
    MR_TRY(read_attributes(node, kernel, &blocks));
    MR_TRY(mr_constant(node, WEIGHT, &weight));
    MR_TRY(mr_expect_shape(node->op, "weight", &weight, 3, (int64_t[]){blocks, -1, MR_BLOCK}));
    MR_TRY(mr_expect_range(node->op, "K of weight", weight.dims[1], 1, INT32_MAX));
    kernel->min_K = kernel->max_K = weight.dims[1];
    kernel->weight = weight.data;
    return read_vectors(node, kernel, F_BIAS, blocks);
}

/* ---- runs ---- */

/* The tensors of a run. */
struct linear_run {
    int64_t rows, K;
    const float *x;
    const float *residual;
    float *y;
};

static OrtStatus *read_run(const struct linear_kernel *kernel, struct mr_call *call, size_t residual_port,
                           struct linear_run *run) {
    const char *op = call->op->name;
    struct mr_tensor x, residual;
    MR_TRY(mr_input(call, X, &x));
    MR_TRY(mr_input(call, residual_port, &residual));
    MR_TRY(mr_expect_shape(call->op, "x", &x, 2, (int64_t[]){-1, -1}));
    run->rows = x.dims[0];
    run->K = x.dims[1];
    if (MR_UNLIKELY(run->K < kernel->min_K || run->K > kernel->max_K))
        return mr_fail("%s: x has shape %t, the weight takes %d..%d inputs", op, &x, kernel->min_K, kernel->max_K);
    if (MR_UNLIKELY(kernel->norm && run->K != kernel->norm_K))
        return mr_fail("%s: x has shape %t, norm has %d elements", op, &x, kernel->norm_K);
    if (residual.present) MR_TRY(mr_expect_shape(call->op, "residual", &residual, 2, (int64_t[]){run->rows, kernel->N}));
    run->x = x.data;
    run->residual = residual.present ? residual.data : NULL;
    return mr_output(call, 0, (int64_t[]){run->rows, kernel->N}, 2, (void **)&run->y);
}

static OrtStatus *compute_qlinear(const void *memory, struct mr_call *call) {
    const struct linear_kernel *kernel = memory;
    struct linear_run run;
    struct mr_scratch scratch;
    MR_TRY(read_run(kernel, call, Q_RESIDUAL, &run));
    MR_TRY(mr_scratch_borrow(mr_qlinear_scratch_bytes((size_t)run.rows, (size_t)run.K), &scratch));
    const struct mr_qlinear args = {.x = run.x,
                                    .y = run.y,
                                    .rows = (size_t)run.rows,
                                    .K = (size_t)run.K,
                                    .N = (size_t)kernel->N,
                                    .weight = kernel->weight,
                                    .scale = kernel->scale,
                                    .colsum = kernel->colsum,
                                    .bias = kernel->bias,
                                    .norm = kernel->norm,
                                    .residual = run.residual,
                                    .norm_epsilon = kernel->norm_epsilon,
                                    .activation = kernel->activation,
                                    .scratch = scratch.data};
    const struct mr_parallel parallel = mr_call_parallel(call);
    mr_active()->qlinear(&args, &parallel);
    mr_scratch_return(&scratch);
    return NULL;
}

static OrtStatus *compute_linear(const void *memory, struct mr_call *call) {
    const struct linear_kernel *kernel = memory;
    struct linear_run run;
    struct mr_scratch scratch;
    MR_TRY(read_run(kernel, call, F_RESIDUAL, &run));
    MR_TRY(mr_scratch_borrow(kernel->norm ? mr_linear_scratch_bytes((size_t)run.rows, (size_t)run.K) : 0, &scratch));
    const struct mr_linear args = {.x = run.x,
                                   .y = run.y,
                                   .rows = (size_t)run.rows,
                                   .K = (size_t)run.K,
                                   .N = (size_t)kernel->N,
                                   .weight = kernel->weight,
                                   .bias = kernel->bias,
                                   .norm = kernel->norm,
                                   .residual = run.residual,
                                   .norm_epsilon = kernel->norm_epsilon,
                                   .activation = kernel->activation,
                                   .scratch = scratch.data};
    const struct mr_parallel parallel = mr_call_parallel(call);
    mr_active()->linear(&args, &parallel);
    mr_scratch_return(&scratch);
    return NULL;
}

MR_DEFINE_OP(mr_qlinear_op, "QLinear", qlinear_inputs, outputs, struct linear_kernel, create_qlinear, compute_qlinear);
MR_DEFINE_OP(mr_linear_op, "Linear", linear_inputs, outputs, struct linear_kernel, create_linear, compute_linear);
