/* The frame of abi.h on top of ONNX Runtime's function table. */
#include "abi.h"

#include <stdarg.h>

/* Entries of the table, by index: F(index, return type, name, parameters). */
#define MR_ORT_ENTRIES(F)                                                                                                     \
    F(0, OrtStatus *, CreateStatus, (int32_t code, const char *message))                                                      \
    F(26, OrtStatus *, CreateCustomOpDomain, (const char *name, void **domain))                                               \
    F(27, OrtStatus *, CustomOpDomain_Add, (void *domain, const OrtCustomOp *op))                                             \
    F(28, OrtStatus *, AddCustomOpDomain, (OrtSessionOptions *options, void *domain))                                         \
    F(51, OrtStatus *, GetTensorMutableData, (OrtValue *value, void **data))                                                  \
    F(60, OrtStatus *, GetTensorElementType, (const void *info, int32_t *type))                                               \
    F(61, OrtStatus *, GetDimensionsCount, (const void *info, size_t *count))                                                 \
    F(62, OrtStatus *, GetDimensions, (const void *info, int64_t *dims, size_t count))                                        \
    F(65, OrtStatus *, GetTensorTypeAndShape, (const OrtValue *value, void **info))                                           \
    F(75, OrtStatus *, AllocatorAlloc, (void *allocator, size_t bytes, void **memory))                                        \
    F(76, OrtStatus *, AllocatorFree, (void *allocator, void *memory))                                                        \
    F(78, OrtStatus *, GetAllocatorWithDefaultOptions, (void **allocator))                                                    \
    F(85, OrtStatus *, KernelInfoGetAttribute_float, (const OrtKernelInfo *info, const char *name, float *out))               \
    F(86, OrtStatus *, KernelInfoGetAttribute_int64, (const OrtKernelInfo *info, const char *name, int64_t *out))             \
    F(87, OrtStatus *, KernelInfoGetAttribute_string, (const OrtKernelInfo *info, const char *name, char *out, size_t *size)) \
    F(88, OrtStatus *, KernelContext_GetInputCount, (const OrtKernelContext *context, size_t *count))                         \
    F(90, OrtStatus *, KernelContext_GetInput, (const OrtKernelContext *context, size_t index, const OrtValue **value))       \
    F(91, OrtStatus *, KernelContext_GetOutput,                                                                               \
      (OrtKernelContext *context, size_t index, const int64_t *dims, size_t rank, OrtValue **value))                          \
    F(93, void, ReleaseStatus, (OrtStatus *status))                                                                           \
    F(99, void, ReleaseTensorTypeAndShapeInfo, (void *info))                                                                  \
    F(230, OrtStatus *, KernelInfo_GetInputCount, (const OrtKernelInfo *info, size_t *count))                                 \
    F(232, OrtStatus *, KernelInfo_GetInputName, (const OrtKernelInfo *info, size_t index, char *out, size_t *size))          \
    F(249, OrtStatus *, KernelInfoGetConstantInput_tensor,                                                                    \
      (const OrtKernelInfo *info, size_t index, int *is_constant, const OrtValue **value))                                    \
    F(274, OrtStatus *, KernelContext_ParallelFor,                                                                            \
      (const OrtKernelContext *context, void (*fn)(void *, size_t), size_t total, size_t num_batch, void *user))

/* The entries we use, copied out of the runtime's table under their names. */
#define MR_DECLARE_ENTRY(index, type, name, parameters) type(*name) parameters;
static struct { MR_ORT_ENTRIES(MR_DECLARE_ENTRY) } ort;

static void *allocator;

OrtStatus *mr_bind_api(const OrtApiBase *base) {
    const OrtApi *api = NULL;
    uint32_t version = MR_ORT_API_VERSION;
    for (; !api && version > 0; --version) api = base->GetApi(version);
    void *const *table = (void *const *)api;
#define MR_BIND_ENTRY(index, type, name, parameters) ort.name = (type(*) parameters)table[index];
    if (version + 1 < MR_ORT_API_VERSION) { /* an older table is enough to say so */
        ort.CreateStatus = (OrtStatus * (*)(int32_t, const char *)) table[0];
        return mr_fail("the millrace kernels need ONNX Runtime's API version %d; this runtime (%s) offers %d",
                       (int64_t)MR_ORT_API_VERSION, base->GetVersionString(), (int64_t)version + 1);
    }
    MR_ORT_ENTRIES(MR_BIND_ENTRY)
    return ort.GetAllocatorWithDefaultOptions(&allocator);
}

OrtStatus *mr_allocate(size_t bytes, void **out) { return ort.AllocatorAlloc(allocator, bytes, out); }

void mr_free(void *memory) {
    OrtStatus *status = ort.AllocatorFree(allocator, memory);
    if (status) ort.ReleaseStatus(status); /* nobody could do anything about it */
}

OrtStatus *mr_fail(const char *format, ...) {
    const int32_t invalid_argument = 2;
    char message[512];
    va_list values;
    va_start(values, format);
    mr_format(message, sizeof message, format, values);
    va_end(values);
    return ort.CreateStatus(invalid_argument, message);
}

/* ---- tensors ---- */

static const char *type_name(int32_t type) {
    switch (type) {
    case MR_F32: return "float32";
    case MR_F16: return "float16";
    case MR_BF16: return "bfloat16";
    case MR_I8: return "int8";
    case MR_I32: return "int32";
    case MR_I64: return "int64";
    default: return "another type";
    }
}

static OrtStatus *read_shape(const OrtValue *value, struct mr_tensor *out) {
    void *info;
    MR_TRY(ort.GetTensorTypeAndShape(value, &info));
    OrtStatus *status = ort.GetTensorElementType(info, &out->type);
    if (!status) status = ort.GetDimensionsCount(info, &out->rank);
    if (!status && out->rank <= MR_MAX_RANK) status = ort.GetDimensions(info, out->dims, out->rank);
    ort.ReleaseTensorTypeAndShapeInfo(info);
    return status;
}

static OrtStatus *read_tensor(const struct mr_op *op, size_t index, const OrtValue *value, struct mr_tensor *out) {
    const struct mr_port *port = &op->inputs[index];
    *out = (struct mr_tensor){.present = value != NULL};
    if (!value) return port->optional ? NULL : mr_fail("%s: input %s is missing", op->name, port->name);
    MR_TRY(read_shape(value, out));
    if (out->rank > MR_MAX_RANK)
        return mr_fail("%s: %s has %d dimensions, at most %d are known", op->name, port->name, (int64_t)out->rank,
                       (int64_t)MR_MAX_RANK);
    if (port->type != MR_ANY && out->type != port->type)
        return mr_fail("%s: %s is %s, expected %s", op->name, port->name, type_name(out->type), type_name(port->type));
    return ort.GetTensorMutableData((OrtValue *)value, &out->data);
}

OrtStatus *mr_input(struct mr_call *call, size_t index, struct mr_tensor *out) {
    size_t count;
    const OrtValue *value = NULL;
    MR_TRY(ort.KernelContext_GetInputCount(call->context, &count));
    if (index < count) MR_TRY(ort.KernelContext_GetInput(call->context, index, &value));
    return read_tensor(call->op, index, value, out);
}

OrtStatus *mr_output(struct mr_call *call, size_t index, const int64_t *dims, size_t rank, void **data) {
    OrtValue *value = NULL;
    MR_TRY(ort.KernelContext_GetOutput(call->context, index, dims, rank, &value));
    const struct mr_port *port = &call->op->outputs[index];
    *data = NULL;
    if (!value) return port->optional ? NULL : mr_fail("%s: output %s is not connected", call->op->name, port->name);
    return ort.GetTensorMutableData(value, data);
}

/* Whether the node has an input at `index`: an absent one in front of others has the empty name. */
static OrtStatus *is_connected(const OrtKernelInfo *info, size_t index, int *connected) {
    size_t count, size = 0;
    MR_TRY(ort.KernelInfo_GetInputCount(info, &count));
    if (index < count) MR_TRY(ort.KernelInfo_GetInputName(info, index, NULL, &size));
    *connected = size > 1; /* with the terminating zero */
    return NULL;
}

OrtStatus *mr_constant(const struct mr_node *node, size_t index, struct mr_tensor *out) {
    int connected, is_constant = 0;
    const OrtValue *value = NULL;
    MR_TRY(is_connected(node->info, index, &connected));
    if (connected) {
        MR_TRY(ort.KernelInfoGetConstantInput_tensor(node->info, index, &is_constant, &value));
        if (!is_constant || !value)
            return mr_fail("%s: %s must be an initializer of the graph", node->op->name, node->op->inputs[index].name);
    }
    return read_tensor(node->op, index, value, out);
}

OrtStatus *mr_expect_shape(const struct mr_op *op, const char *name, const struct mr_tensor *tensor, size_t rank,
                           const int64_t *dims) {
    int same = tensor->rank == rank;
    for (size_t i = 0; same && i < rank; ++i) same = dims[i] < 0 || tensor->dims[i] == dims[i];
    if (MR_LIKELY(same)) return NULL;
    struct mr_tensor expected = {.rank = rank};
    for (size_t i = 0; i < rank; ++i) expected.dims[i] = dims[i];
    return mr_fail("%s: %s has shape %t, expected %t", op->name, name, tensor, &expected);
}

OrtStatus *mr_expect_range(const struct mr_op *op, const char *name, int64_t value, int64_t low, int64_t high) {
    if (MR_LIKELY(value >= low && value <= high)) return NULL;
    return mr_fail("%s: %s is %d, must be in %d..%d", op->name, name, value, low, high);
}

/* ---- attributes ---- */

/* A missing attribute: its fallback was taken, or the failure is ours to word. */
static OrtStatus *missing(const struct mr_node *node, const char *name, OrtStatus *status, int has_fallback) {
    ort.ReleaseStatus(status);
    return has_fallback ? NULL : mr_fail("%s: attribute %s is missing or of another type", node->op->name, name);
}

OrtStatus *mr_attribute_int(const struct mr_node *node, const char *name, const int64_t *fallback, int64_t *out) {
    OrtStatus *status = ort.KernelInfoGetAttribute_int64(node->info, name, out);
    if (!status) return NULL;
    if (fallback) *out = *fallback;
    return missing(node, name, status, fallback != NULL);
}

OrtStatus *mr_attribute_float(const struct mr_node *node, const char *name, const float *fallback, float *out) {
    OrtStatus *status = ort.KernelInfoGetAttribute_float(node->info, name, out);
    if (!status) return NULL;
    if (fallback) *out = *fallback;
    return missing(node, name, status, fallback != NULL);
}

OrtStatus *mr_attribute_string(const struct mr_node *node, const char *name, const char *fallback, char *out, size_t capacity) {
    size_t size = 0;
    OrtStatus *status = ort.KernelInfoGetAttribute_string(node->info, name, NULL, &size);
    if (status) {
        MR_TRY(missing(node, name, status, fallback != NULL));
        size_t i = 0;
        for (; fallback[i] && i + 1 < capacity; ++i) out[i] = fallback[i];
        out[i] = 0;
        return NULL;
    }
    if (size > capacity)
        return mr_fail("%s: attribute %s has %d characters, at most %d are known", node->op->name, name, (int64_t)size - 1,
                       (int64_t)capacity - 1);
    return ort.KernelInfoGetAttribute_string(node->info, name, out, &size);
}

/* ---- the parallel loop ---- */

static void run_parallel(void *context, mr_task task, size_t count, void *user) {
    struct mr_call *call = context;
    OrtStatus *status = ort.KernelContext_ParallelFor(call->context, task, count, count, user);
    if (!status) return;
    if (call->parallel_status) ort.ReleaseStatus(status);
    else call->parallel_status = status;
}

struct mr_parallel mr_call_parallel(struct mr_call *call) {
    return (struct mr_parallel){run_parallel, call, mr_threads()};
}

/* ---- the runtime's side of an operator ---- */

static const struct mr_op *of(const OrtCustomOp *base) { return (const struct mr_op *)base; }

struct kernel {
    const struct mr_op *op;
    _Alignas(16) char state[];
};

static OrtStatus *create_kernel(const OrtCustomOp *base, const OrtApi *api, const OrtKernelInfo *info, void **out) {
    (void)api;
    const struct mr_op *op = of(base);
    struct kernel *kernel;
    MR_TRY(mr_allocate(sizeof *kernel + op->kernel_bytes, (void **)&kernel));
    __builtin_memset(kernel, 0, sizeof *kernel + op->kernel_bytes);
    kernel->op = op;
    const struct mr_node node = {op, info};
    OrtStatus *status = op->create(&node, kernel->state);
    if (status) {
        mr_free(kernel);
        return status;
    }
    mr_scratch_kernel_created();
    *out = kernel;
    return NULL;
}

static OrtStatus *compute_kernel(void *memory, OrtKernelContext *context) {
    struct kernel *kernel = memory;
    struct mr_call call = {kernel->op, context, NULL};
    OrtStatus *status = kernel->op->compute(kernel->state, &call);
    if (!status) return call.parallel_status;
    if (call.parallel_status) ort.ReleaseStatus(call.parallel_status);
    return status;
}

static void destroy_kernel(void *memory) {
    mr_free(memory);
    mr_scratch_kernel_destroyed();
}

static const char *get_name(const OrtCustomOp *op) { return of(op)->name; }
static const char *get_provider(const OrtCustomOp *op) { return of(op)->provider; }
static int32_t get_input_type(const OrtCustomOp *op, size_t i) { return of(op)->inputs[i].type; }
static size_t get_input_count(const OrtCustomOp *op) { return of(op)->num_inputs; }
static int32_t get_output_type(const OrtCustomOp *op, size_t i) { return of(op)->outputs[i].type; }
static size_t get_output_count(const OrtCustomOp *op) { return of(op)->num_outputs; }
static int32_t get_input_characteristic(const OrtCustomOp *op, size_t i) { return of(op)->inputs[i].optional; }
static int32_t get_output_characteristic(const OrtCustomOp *op, size_t i) { return of(op)->outputs[i].optional; }
static int32_t get_memory_type(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, 0; }
static int get_one(const OrtCustomOp *op) { return (void)op, 1; }
static int get_last_version(const OrtCustomOp *op) { return (void)op, INT32_MAX; }

static const OrtCustomOp mr_custom_op_base = {
    .version = MR_ORT_API_VERSION,
    .GetName = get_name,
    .GetExecutionProviderType = get_provider,
    .GetInputType = get_input_type,
    .GetInputTypeCount = get_input_count,
    .GetOutputType = get_output_type,
    .GetOutputTypeCount = get_output_count,
    .KernelDestroy = destroy_kernel,
    .GetInputCharacteristic = get_input_characteristic,
    .GetOutputCharacteristic = get_output_characteristic,
    .GetInputMemoryType = get_memory_type,
    .GetVariadicInputMinArity = get_one,
    .GetVariadicInputHomogeneity = get_one,
    .GetVariadicOutputMinArity = get_one,
    .GetVariadicOutputHomogeneity = get_one,
    .CreateKernelV2 = create_kernel,
    .KernelComputeV2 = compute_kernel,
    .GetStartVersion = get_one,
    .GetEndVersion = get_last_version,
};

/* One domain for the life of the library: session options only point at it. */
static OrtStatus *make_domain(struct mr_op *const *ops, size_t count, void **domain) {
    MR_TRY(ort.CreateCustomOpDomain("millrace", domain));
    for (size_t i = 0; i < count; ++i) {
        ops[i]->base = mr_custom_op_base;
        MR_TRY(ort.CustomOpDomain_Add(*domain, &ops[i]->base));
    }
    return NULL;
}

OrtStatus *mr_register(OrtSessionOptions *options, struct mr_op *const *ops, size_t count) {
    static void *domain;
    static int32_t busy;
    while (__atomic_exchange_n(&busy, 1, __ATOMIC_ACQUIRE)) {} /* two sessions opened at the same moment: a few microseconds */
    OrtStatus *status = domain ? NULL : make_domain(ops, count, &domain);
    __atomic_store_n(&busy, 0, __ATOMIC_RELEASE);
    return status ? status : ort.AddCustomOpDomain(options, domain);
}
