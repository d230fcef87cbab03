/* LinearBf16 and LinearF16: the linear layers of the CUDA target as operators of ONNX Runtime's CUDA provider.

   y = activation(rms_norm(x) @ weight^T + bias) + residual. A few rows go through one kernel of ours that reads the weight once and
   does all the rest beside it (decoding is memory bound); more rows are cuBLAS's, with small kernels before and after.
   This library knows no CUDA headers and links nothing: kernels/cuda/binding.py compiles linear.cu for the GPU at hand and hands
   over functions, the cuBLAS handle, the stream and scratch memory in `struct mr_cuda`. */
#include "abi.h"

#define MR_GEMV_FORMS 2      /* of the fused kernel: for one row and for two */
#define MR_OWNED 4           /* rows of the weight that one of its blocks owns */
#define MR_OWNED_WIDE 8      /* in the form for layers that make blocks enough */
#define MR_WIDE_COLUMNS 4096 /* from so many rows of the weight on */
#define MR_GEMV_THREADS 128  /* of a block; twice as many split a long K */
#define MR_LONG_K 8192
#define MR_ROW_THREADS 256  /* threads of the kernels that walk rows */
#define MR_ALIGNMENT 8      /* elements that are read at once: K is a multiple */

/* What cuLaunchKernelEx takes, and cublasGemmEx, by their C declarations. */
struct mr_launch_attribute {
    uint32_t id;
    uint32_t padding;
    int32_t value[16];
};
struct mr_launch_config {
    uint32_t grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
    void *stream;
    const struct mr_launch_attribute *attributes;
    uint32_t num_attributes;
};
enum { CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6 };
typedef int (*mr_launch)(const struct mr_launch_config *config, void *function, void **arguments, void **extra);
typedef int (*mr_gemm)(void *handle, int trans_a, int trans_b, int m, int n, int k, const void *alpha, const void *a, int a_type,
                       int lda, const void *b, int b_type, int ldb, const void *beta, void *c, int c_type, int ldc,
                       int compute_type, int algorithm);
enum { CUBLAS_N = 0, CUBLAS_T = 1, CUBLAS_COMPUTE_32F = 68, CUBLAS_GEMM_DEFAULT = -1 };
enum { CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14 };

/* What one session computes with. kernels/cuda/binding.py declares the same fields in the same order. */
struct mr_cuda {
    mr_launch launch;
    mr_gemm gemm;
    void *blas;
    void *stream;
    void *scratch; /* device memory, used within a node */
    uint64_t scratch_bytes;
    int32_t type;      /* MR_BF16 or MR_F16: what the functions below were compiled for */
    int32_t gemv_rows; /* most rows that take the fused kernel: 0 to 2 */
    int32_t overlaps;  /* whether kernels may begin while the one before them runs (programmatic dependent launch) */
    void *gemv[MR_GEMV_FORMS][2]; /* few outputs a block, many */
    void *norm_rows;
    void *silu_mul;
    void *residual_bias;
    void *add_bias;
};

/* Kernels created next belong to this session. Sessions are opened one at a time (binding.py holds a lock). */
static const struct mr_cuda *opening;

MR_EXPORT void millrace_cuda_open(const struct mr_cuda *cuda);
void millrace_cuda_open(const struct mr_cuda *cuda) { opening = cuda; }

/* abi.c asks for it when a loop is made parallel, which happens on the CPU only. */
size_t mr_threads(void) { return 1; }

enum { X, WEIGHT, BIAS, NORM, RESIDUAL };
enum { Y16, Y32 };

struct linear_kernel {
    const struct mr_cuda *cuda;
    float norm_epsilon;
    int32_t gated; /* silu_mul: the weight holds gate rows, then as many up rows */
};

/* One run, checked: device pointers and extents. */
struct linear_run {
    const void *x;
    int32_t x_is_f32;
    const void *weight;
    const float *bias;
    const float *norm;
    const float *residual;
    void *y16;
    float *y32;
    int32_t rows, N, K;
    int32_t columns; /* rows of the weight: N, or 2 N */
};

/* ---- creation ---- */

static OrtStatus *create_linear(const struct mr_node *node, void *memory, int32_t type) {
    struct linear_kernel *kernel = memory;
    const float default_epsilon = 1e-5f;
    char activation[16];
    if (!opening) return mr_fail("%s: no CUDA session is being opened (millrace_cuda_open)", node->op->name);
    if (opening->type != type) return mr_fail("%s: the session's kernels are of another type", node->op->name);
    kernel->cuda = opening;
    MR_TRY(mr_attribute_float(node, "norm_epsilon", &default_epsilon, &kernel->norm_epsilon));
    MR_TRY(mr_attribute_string(node, "activation", "none", activation, sizeof activation));
    if (mr_same_text(activation, "silu_mul")) kernel->gated = 1;
    else if (!mr_same_text(activation, "none"))
        return mr_fail("%s: activation is '%s', known are none and silu_mul", node->op->name, activation);
    return NULL;
}

static OrtStatus *create_bf16(const struct mr_node *node, void *memory) { return create_linear(node, memory, MR_BF16); }
static OrtStatus *create_f16(const struct mr_node *node, void *memory) { return create_linear(node, memory, MR_F16); }

/* ---- what arrives ---- */

static OrtStatus *read_matrices(const struct linear_kernel *kernel, struct mr_call *call, struct linear_run *run) {
    const struct mr_op *op = call->op;
    struct mr_tensor x, weight;
    MR_TRY(mr_input(call, X, &x));
    MR_TRY(mr_input(call, WEIGHT, &weight));
    MR_TRY(mr_expect_shape(op, "x", &x, 2, (int64_t[]){-1, -1}));
    MR_TRY(mr_expect_range(op, "rows of x", x.dims[0], 0, 1 << 20));
    MR_TRY(mr_expect_range(op, "K", x.dims[1], MR_ALIGNMENT, 1 << 24));
    MR_TRY(mr_expect_shape(op, "weight", &weight, 2, (int64_t[]){-1, x.dims[1]}));
    MR_TRY(mr_expect_range(op, "rows of weight", weight.dims[0], 1, 1 << 24));
    if (x.dims[1] % MR_ALIGNMENT)
        return mr_fail("%s: K is %d, must be a multiple of %d", op->name, x.dims[1], (int64_t)MR_ALIGNMENT);
    if (kernel->gated && weight.dims[0] % 2)
        return mr_fail("%s: weight has %d rows, gate and up must be alike", op->name, weight.dims[0]);
    if (x.type != MR_F32 && x.type != kernel->cuda->type)
        return mr_fail("%s: x is neither float32 nor of the weight's type", op->name);
    *run = (struct linear_run){.x = x.data,
                               .x_is_f32 = x.type == MR_F32,
                               .weight = weight.data,
                               .rows = (int32_t)x.dims[0],
                               .K = (int32_t)x.dims[1],
                               .columns = (int32_t)weight.dims[0],
                               .N = (int32_t)(kernel->gated ? weight.dims[0] / 2 : weight.dims[0])};
    return NULL;
}

static OrtStatus *read_run(const struct linear_kernel *kernel, struct mr_call *call, struct linear_run *run) {
    const struct mr_op *op = call->op;
    struct mr_tensor bias, norm, residual;
    MR_TRY(read_matrices(kernel, call, run));
    MR_TRY(mr_input(call, BIAS, &bias));
    MR_TRY(mr_input(call, NORM, &norm));
    MR_TRY(mr_input(call, RESIDUAL, &residual));
    if (bias.present) MR_TRY(mr_expect_shape(op, "bias", &bias, 1, (int64_t[]){run->columns}));
    if (norm.present) MR_TRY(mr_expect_shape(op, "norm", &norm, 1, (int64_t[]){run->K}));
    if (residual.present) MR_TRY(mr_expect_shape(op, "residual", &residual, 2, (int64_t[]){run->rows, run->N}));
    if (norm.present && !run->x_is_f32) return mr_fail("%s: a norm reads float32 only", op->name);
    run->bias = bias.data;
    run->norm = norm.data;
    run->residual = residual.data;
    const int64_t dims[] = {run->rows, run->N};
    MR_TRY(mr_output(call, Y16, dims, 2, &run->y16));
    MR_TRY(mr_output(call, Y32, dims, 2, (void **)&run->y32));
    if (!run->rows) return NULL;
    if (!run->y16 == !run->y32) return mr_fail("%s: exactly one output must be connected", op->name);
    if (run->y16 && residual.present) return mr_fail("%s: a residual is added in float32 only", op->name);
    if (run->y32 && kernel->gated) return mr_fail("%s: silu_mul gives 16 bits only", op->name);
    return NULL;
}

/* ---- launches ---- */

static OrtStatus *launch(const struct mr_cuda *cuda, const char *what, void *function, size_t blocks, size_t threads,
                         void **arguments) {
    const struct mr_launch_attribute overlap = {CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, 0, {1}};
    const struct mr_launch_config config = {
        (uint32_t)blocks, 1, 1, (uint32_t)threads, 1, 1, 0, cuda->stream, &overlap, cuda->overlaps ? 1 : 0};
    int code = cuda->launch(&config, function, arguments, NULL);
    return code ? mr_fail("CUDA error %d launching %s", (int64_t)code, what) : NULL;
}

/* One of the kernels that give each thread `each` elements of [rows, N]. */
static OrtStatus *launch_elements(const struct mr_cuda *cuda, const char *what, void *function, const struct linear_run *run,
                                  size_t each, void **arguments) {
    size_t threads = mr_ceil_div((size_t)run->rows * (size_t)run->N, each);
    return launch(cuda, what, function, mr_ceil_div(threads, MR_ROW_THREADS), MR_ROW_THREADS, arguments);
}

/* Few rows: everything in one kernel. */
static OrtStatus *compute_fused(const struct linear_kernel *kernel, struct linear_run *run) {
    const struct mr_cuda *cuda = kernel->cuda;
    const int form = run->rows <= 1 ? 0 : 1, wide = run->columns >= MR_WIDE_COLUMNS;
    const size_t owned = wide ? MR_OWNED_WIDE : MR_OWNED, outputs = kernel->gated ? owned / 2 : owned;
    const size_t threads = !wide && run->K >= MR_LONG_K ? 2 * MR_GEMV_THREADS : MR_GEMV_THREADS;
    float epsilon = kernel->norm_epsilon;
    int32_t gated = kernel->gated;
    void *arguments[] = {&run->x,   &run->x_is_f32, &run->weight, &run->bias, &run->norm, &run->residual, &run->y16,
                         &run->y32, &run->rows,     &run->N,      &run->K,    &epsilon,   &gated};
    const size_t blocks = mr_ceil_div((size_t)run->N, outputs);
    return launch(cuda, "gemv", cuda->gemv[form][wide], blocks, threads, arguments);
}

/* c [rows, columns] = a [rows, K] @ weight^T + beta * c: row-major, so for cuBLAS the transpose of it all. */
static OrtStatus *multiply(const struct mr_cuda *cuda, const struct linear_run *run, const void *a, void *c, int c_type,
                           float beta) {
    const float one = 1.0f;
    const int type = cuda->type == MR_BF16 ? CUDA_R_16BF : CUDA_R_16F;
    int code = cuda->gemm(cuda->blas, CUBLAS_T, CUBLAS_N, run->columns, run->rows, run->K, &one, run->weight, type, run->K, a,
                          type, run->K, &beta, c, c_type, run->columns, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    if (!code) return NULL;
    return mr_fail("cuBLAS error %d in a product of %d x %d x %d", (int64_t)code, (int64_t)run->rows, (int64_t)run->columns,
                   (int64_t)run->K);
}

/* Bytes of scratch for `run`: x in 16 bits, and behind it gate and up. */
static size_t converted_bytes(const struct linear_run *run) {
    return run->x_is_f32 ? mr_round_up((size_t)run->rows * (size_t)run->K * 2, 256) : 0;
}

static OrtStatus *check_scratch(const struct linear_kernel *kernel, const struct linear_run *run) {
    size_t bytes = converted_bytes(run) + (kernel->gated ? (size_t)run->rows * (size_t)run->columns * 2 : 0);
    if (bytes <= kernel->cuda->scratch_bytes) return NULL;
    return mr_fail("linear: %d rows need %d bytes of scratch, there are %d", (int64_t)run->rows, (int64_t)bytes,
                   (int64_t)kernel->cuda->scratch_bytes);
}

/* x in 16 bits, normalized where there is a norm. */
static OrtStatus *convert(const struct linear_kernel *kernel, struct linear_run *run, const void **a) {
    const struct mr_cuda *cuda = kernel->cuda;
    *a = run->x;
    if (!run->x_is_f32) return NULL;
    void *out = cuda->scratch;
    float epsilon = kernel->norm_epsilon;
    void *arguments[] = {&run->x, &run->norm, &out, &run->K, &epsilon};
    *a = out;
    return launch(cuda, "norm_rows", cuda->norm_rows, (size_t)run->rows, MR_ROW_THREADS, arguments);
}

static OrtStatus *compute_gated(const struct mr_cuda *cuda, struct linear_run *run, const void *a) {
    const int type = cuda->type == MR_BF16 ? CUDA_R_16BF : CUDA_R_16F;
    void *both = (char *)cuda->scratch + converted_bytes(run);
    MR_TRY(multiply(cuda, run, a, both, type, 0.0f));
    void *arguments[] = {&both, &run->bias, &run->y16, &run->rows, &run->N};
    return launch_elements(cuda, "silu_mul", cuda->silu_mul, run, run->N % MR_ALIGNMENT ? 1 : MR_ALIGNMENT, arguments);
}

static OrtStatus *compute_f32(const struct mr_cuda *cuda, struct linear_run *run, const void *a) {
    const int adds = run->residual || run->bias;
    if (adds) {
        void *arguments[] = {&run->residual, &run->bias, &run->y32, &run->rows, &run->N};
        MR_TRY(launch_elements(cuda, "residual_bias", cuda->residual_bias, run, 1, arguments));
    }
    return multiply(cuda, run, a, run->y32, CUDA_R_32F, adds ? 1.0f : 0.0f);
}

static OrtStatus *compute_16(const struct mr_cuda *cuda, struct linear_run *run, const void *a) {
    const int type = cuda->type == MR_BF16 ? CUDA_R_16BF : CUDA_R_16F;
    MR_TRY(multiply(cuda, run, a, run->y16, type, 0.0f));
    if (!run->bias) return NULL;
    void *arguments[] = {&run->y16, &run->bias, &run->rows, &run->N};
    return launch_elements(cuda, "add_bias", cuda->add_bias, run, 1, arguments);
}

static OrtStatus *compute_linear(const void *memory, struct mr_call *call) {
    const struct linear_kernel *kernel = memory;
    struct linear_run run;
    const void *a;
    MR_TRY(read_run(kernel, call, &run));
    if (!run.rows) return NULL;
    if (run.rows <= kernel->cuda->gemv_rows) return compute_fused(kernel, &run);
    MR_TRY(check_scratch(kernel, &run));
    MR_TRY(convert(kernel, &run, &a));
    if (kernel->gated) return compute_gated(kernel->cuda, &run, a);
    return run.y32 ? compute_f32(kernel->cuda, &run, a) : compute_16(kernel->cuda, &run, a);
}

/* ---- the operators ---- */

#define PROVIDER "CUDAExecutionProvider"
#define PORTS(name, type)                                                                                                     \
    static const struct mr_port name##_inputs[] = {                                                                           \
        [X] = {"x", MR_ANY, 0},       [WEIGHT] = {"weight", type, 0},       [BIAS] = {"bias", MR_F32, 1},                     \
        [NORM] = {"norm", MR_F32, 1}, [RESIDUAL] = {"residual", MR_F32, 1},                                                   \
    };                                                                                                                        \
    static const struct mr_port name##_outputs[] = {[Y16] = {"y", type, 1}, [Y32] = {"y_float", MR_F32, 1}}

PORTS(bf16, MR_BF16);
PORTS(f16, MR_F16);
static MR_DEFINE_OP_IN(PROVIDER, linear_bf16, "LinearBf16", bf16_inputs, bf16_outputs, struct linear_kernel, create_bf16,
                       compute_linear);
static MR_DEFINE_OP_IN(PROVIDER, linear_f16, "LinearF16", f16_inputs, f16_outputs, struct linear_kernel, create_f16,
                       compute_linear);
static struct mr_op *const operators[] = {&linear_bf16, &linear_f16};

MR_EXPORT OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base);

OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    MR_TRY(mr_bind_api(base));
    return mr_register(options, operators, MR_COUNT(operators));
}
