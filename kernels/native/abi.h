/* ONNX Runtime's C API, as much of it as a custom operator needs, and a small frame to write operators in.

   The runtime's wheel ships no header, so the entries we use are named here by their index in its table of function pointers
   (the table only ever grows) and by their signature. An operator is a `struct mr_op`: ports, a create and a compute function;
   everything that arrives is checked with the helpers below and refused with a status that names the numbers.
   tests/kernels/test_abi.py runs every operator in the installed runtime and so guards the indexes. */
#ifndef MR_ABI_H
#define MR_ABI_H

#include <stdarg.h>

#include "millrace.h"

#define MR_ORT_API_VERSION 29
#define MR_MAX_RANK 8

typedef struct OrtStatus OrtStatus;
typedef struct OrtApi OrtApi;
typedef struct OrtValue OrtValue;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOp OrtCustomOp;

typedef struct OrtApiBase {
    const OrtApi *(*GetApi)(uint32_t version);
    const char *(*GetVersionString)(void);
} OrtApiBase;

/* ONNX element types, by their numbers in the format. */
enum mr_type { MR_ANY = 0, MR_F32 = 1, MR_I8 = 3, MR_I32 = 6, MR_I64 = 7, MR_F16 = 10, MR_BF16 = 16 };

/* An input or output of an operator. MR_ANY leaves the check of the type to the operator. */
struct mr_port {
    const char *name;
    int32_t type;
    int32_t optional;
};

/* A tensor that arrived; `data` is NULL if it is absent (optional) or has no elements. */
struct mr_tensor {
    void *data;
    int64_t dims[MR_MAX_RANK];
    size_t rank;
    int32_t type;
    int32_t present;
};

struct mr_op;

/* Kernel creation: what the node says. */
struct mr_node {
    const struct mr_op *op;
    const OrtKernelInfo *info;
};

/* One run of a node. */
struct mr_call {
    const struct mr_op *op;
    OrtKernelContext *context;
    OrtStatus *parallel_status; /* first failure of a parallel loop, returned by the frame */
};

/* The runtime's own table of an operator: 26 slots. */
struct OrtCustomOp {
    uint32_t version;
    void *(*CreateKernel)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
    const char *(*GetName)(const OrtCustomOp *);
    const char *(*GetExecutionProviderType)(const OrtCustomOp *);
    int32_t (*GetInputType)(const OrtCustomOp *, size_t);
    size_t (*GetInputTypeCount)(const OrtCustomOp *);
    int32_t (*GetOutputType)(const OrtCustomOp *, size_t);
    size_t (*GetOutputTypeCount)(const OrtCustomOp *);
    void (*KernelCompute)(void *, OrtKernelContext *);
    void (*KernelDestroy)(void *);
    int32_t (*GetInputCharacteristic)(const OrtCustomOp *, size_t);
    int32_t (*GetOutputCharacteristic)(const OrtCustomOp *, size_t);
    int32_t (*GetInputMemoryType)(const OrtCustomOp *, size_t);
    int (*GetVariadicInputMinArity)(const OrtCustomOp *);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp *);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp *);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *);
    OrtStatus *(*CreateKernelV2)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **);
    OrtStatus *(*KernelComputeV2)(void *, OrtKernelContext *);
    OrtStatus *(*InferOutputShapeFn)(const OrtCustomOp *, void *);
    int (*GetStartVersion)(const OrtCustomOp *);
    int (*GetEndVersion)(const OrtCustomOp *);
    size_t (*GetMayInplace)(int **, int **);
    void (*ReleaseMayInplace)(int *, int *);
    size_t (*GetAliasMap)(int **, int **);
    void (*ReleaseAliasMap)(int *, int *);
};

/* An operator of ours. The frame gives every node `kernel_bytes` of zeroed memory: create fills it, compute reads it (several
   runs may be in compute at once, so it must not write it). It holds no resources, so there is nothing to destroy. */
struct mr_op {
    OrtCustomOp base; /* first: the runtime hands its address back */
    const char *name;
    const char *provider; /* the execution provider it runs in; NULL = the CPU's */
    const struct mr_port *inputs;
    size_t num_inputs;
    const struct mr_port *outputs;
    size_t num_outputs;
    size_t kernel_bytes;
    OrtStatus *(*create)(const struct mr_node *node, void *kernel);
    OrtStatus *(*compute)(const void *kernel, struct mr_call *call);
};

#define MR_COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* Define an operator; it goes live when ops.c lists it. `base` is filled in there. */
#define MR_DEFINE_OP(variable, op_name, input_ports, output_ports, kernel_type, create_fn, compute_fn)                        \
    MR_DEFINE_OP_IN(NULL, variable, op_name, input_ports, output_ports, kernel_type, create_fn, compute_fn)

/* The same in another execution provider: tensors then lie in that provider's memory. */
#define MR_DEFINE_OP_IN(provider_name, variable, op_name, input_ports, output_ports, kernel_type, create_fn, compute_fn)      \
    struct mr_op variable = {.name = op_name,                                                                                 \
                             .provider = provider_name,                                                                       \
                             .inputs = input_ports,                                                                           \
                             .num_inputs = MR_COUNT(input_ports),                                                             \
                             .outputs = output_ports,                                                                         \
                             .num_outputs = MR_COUNT(output_ports),                                                           \
                             .kernel_bytes = sizeof(kernel_type),                                                             \
                             .create = create_fn,                                                                             \
                             .compute = compute_fn}

/* Return early with a status that is not OK (NULL is OK). */
#define MR_TRY(expression)                                                                                                    \
    do {                                                                                                                      \
        OrtStatus *status_ = (expression);                                                                                    \
        if (MR_UNLIKELY(status_ != NULL)) return status_;                                                                     \
    } while (0)

/* A status with a message. %s takes a const char *, %d an int64_t (cast smaller integers), %f a double (three decimals),
   %t a const struct mr_tensor * (its shape). */
OrtStatus *mr_fail(const char *format, ...);

/* The text of such a message, cut off at `capacity` - 1 characters (message.c). */
void mr_format(char *out, size_t capacity, const char *format, va_list values);

/* ---- at creation ---- */

/* A constant input (an initializer), in the runtime's own memory, which outlives the kernel. Absent only if the port is
   optional. Refuses a wrong type, and an input that is computed in the graph. */
OrtStatus *mr_constant(const struct mr_node *node, size_t index, struct mr_tensor *out);

/* Attributes; with `fallback` a missing one takes that value, without (NULL) it is refused. */
OrtStatus *mr_attribute_int(const struct mr_node *node, const char *name, const int64_t *fallback, int64_t *out);
OrtStatus *mr_attribute_float(const struct mr_node *node, const char *name, const float *fallback, float *out);
/* `capacity` counts the terminating zero. */
OrtStatus *mr_attribute_string(const struct mr_node *node, const char *name, const char *fallback, char *out, size_t capacity);

/* ---- in a run ---- */

/* Input `index`: refuses a missing required input and a wrong type; an absent optional one has present = 0. */
OrtStatus *mr_input(struct mr_call *call, size_t index, struct mr_tensor *out);

/* Make output `index` of this shape and give its memory; NULL if the port is optional and nothing is connected to it. */
OrtStatus *mr_output(struct mr_call *call, size_t index, const int64_t *dims, size_t rank, void **data);

/* The runtime's threads as a parallel loop; valid during this call. */
struct mr_parallel mr_call_parallel(struct mr_call *call);

/* ---- checks ---- */

/* Refuses a tensor whose shape is not `dims` (-1 = any extent). */
OrtStatus *mr_expect_shape(const struct mr_op *op, const char *name, const struct mr_tensor *tensor, size_t rank,
                           const int64_t *dims);

/* Refuses an attribute outside [low, high]. */
OrtStatus *mr_expect_range(const struct mr_op *op, const char *name, int64_t value, int64_t low, int64_t high);

/* ---- scratch memory (scratch.c) ---- */

struct mr_scratch {
    void *data; /* 64-byte aligned; contents undefined */
    int32_t slot;
};

/* Borrow at least `bytes`; give back before compute returns. Blocks are kept and reused by later runs of any kernel. */
OrtStatus *mr_scratch_borrow(size_t bytes, struct mr_scratch *out);
void mr_scratch_return(struct mr_scratch *scratch);

/* For abi.c: kernels alive; the last one out frees the kept blocks. */
void mr_scratch_kernel_created(void);
void mr_scratch_kernel_destroyed(void);

/* ---- the runtime (abi.c) ---- */

OrtStatus *mr_bind_api(const OrtApiBase *base); /* must succeed before anything above is called */
OrtStatus *mr_allocate(size_t bytes, void **out);
void mr_free(void *memory);
OrtStatus *mr_register(OrtSessionOptions *options, struct mr_op *const *ops, size_t count);

#endif
