/* Sample as an operator of ONNX Runtime, and the plain entry that tests use without a runtime. */
#include "abi.h"
#include "sample.h"

enum { LOGITS, TEMPERATURE, TOP_K, TOP_P, MIN_P, SEED, POSITION, NUM_INPUTS };

static const struct mr_port inputs[] = {
    [LOGITS] = {"logits", MR_F32, 0}, [TEMPERATURE] = {"temperature", MR_F32, 0}, [TOP_K] = {"top_k", MR_I32, 0},
    [TOP_P] = {"top_p", MR_F32, 0},   [MIN_P] = {"min_p", MR_F32, 0},             [SEED] = {"seed", MR_I64, 0},
    [POSITION] = {"position", MR_I64, 0},
};
static const struct mr_port outputs[] = {{"token_ids", MR_I64, 0}};

struct sample_kernel {
    char nothing; /* no attributes */
};

static OrtStatus *create_sample(const struct mr_node *node, void *memory) {
    (void)node;
    (void)memory;
    return NULL;
}

static OrtStatus *read_arguments(struct mr_call *call, struct mr_sample *s) {
    struct mr_tensor in[NUM_INPUTS];
    for (size_t i = 0; i < NUM_INPUTS; ++i) MR_TRY(mr_input(call, i, &in[i]));
    MR_TRY(mr_expect_shape(call->op, "logits", &in[LOGITS], 2, (int64_t[]){-1, -1}));
    MR_TRY(mr_expect_range(call->op, "vocabulary of logits", in[LOGITS].dims[1], 1, INT32_MAX - 64));
    for (size_t i = TEMPERATURE; i < NUM_INPUTS; ++i)
        MR_TRY(mr_expect_shape(call->op, inputs[i].name, &in[i], 1, (int64_t[]){in[LOGITS].dims[0]}));
    *s = (struct mr_sample){.num_rows = (size_t)in[LOGITS].dims[0],
                            .vocab_size = (size_t)in[LOGITS].dims[1],
                            .logits = in[LOGITS].data,
                            .temperature = in[TEMPERATURE].data,
                            .top_k = in[TOP_K].data,
                            .top_p = in[TOP_P].data,
                            .min_p = in[MIN_P].data,
                            .seed = in[SEED].data,
                            .position = in[POSITION].data};
    return NULL;
}

static OrtStatus *compute_sample(const void *kernel, struct mr_call *call) {
    struct mr_sample s;
    struct mr_scratch scratch;
    const struct mr_parallel parallel = mr_call_parallel(call);
    (void)kernel;
    MR_TRY(read_arguments(call, &s));
    MR_TRY(mr_output(call, 0, (int64_t[]){(int64_t)s.num_rows}, 1, (void **)&s.token_ids));
    size_t bytes = mr_sample_scratch_bytes(&s, parallel.threads);
    if (bytes) {
        MR_TRY(mr_scratch_borrow(bytes, &scratch));
        s.slots = scratch.data;
    }
    mr_active()->sample(&s, &parallel);
    if (bytes) mr_scratch_return(&scratch);
    return NULL;
}

MR_DEFINE_OP(mr_sample_op, "Sample", inputs, outputs, struct sample_kernel, create_sample, compute_sample);

/* ---- without a runtime ---- */

MR_EXPORT size_t millrace_sample_scratch_bytes(const struct mr_sample *s, size_t threads);
MR_EXPORT void millrace_sample(const struct mr_sample *s, const struct mr_parallel *parallel);

size_t millrace_sample_scratch_bytes(const struct mr_sample *s, size_t threads) { return mr_sample_scratch_bytes(s, threads); }

/* Run with the active form; s->slots holds the scratch. */
void millrace_sample(const struct mr_sample *s, const struct mr_parallel *parallel) { mr_active()->sample(s, parallel); }
