/* PagedAttention as an operator of ONNX Runtime: everything that arrives is checked here, before anything is read through an
   index or written. Also the plain entry that tests use without a runtime. */
#include "abi.h"
#include "attention_plan.h"

enum {
    QKV,
    KV_CACHE,
    POSITIONS,
    CU_SEQLENS,
    PAST_LENS,
    BLOCK_TABLE,
    SLOT_MAPPING,
    COS_SIN,
    Q_NORM,
    K_NORM,
    SINKS,
    NUM_INPUTS
};

static const struct mr_port inputs[] = {
    [QKV] = {"qkv", MR_F32, 0},
    [KV_CACHE] = {"kv_cache", MR_ANY, 0},
    [POSITIONS] = {"positions", MR_I64, 0},
    [CU_SEQLENS] = {"cu_seqlens", MR_I32, 0},
    [PAST_LENS] = {"past_lens", MR_I32, 0},
    [BLOCK_TABLE] = {"block_table", MR_I32, 0},
    [SLOT_MAPPING] = {"slot_mapping", MR_I32, 0},
    [COS_SIN] = {"cos_sin", MR_F32, 0},
    [Q_NORM] = {"q_norm", MR_F32, 1},
    [K_NORM] = {"k_norm", MR_F32, 1},
    [SINKS] = {"sinks", MR_F32, 1},
};
static const struct mr_port outputs[] = {{"y", MR_F32, 0}};

struct attention_kernel {
    int64_t layer, num_heads, kv_num_heads, window;
    float scale, softcap, norm_epsilon; /* scale 0: 1 / sqrt(D) */
};

static OrtStatus *create_attention(const struct mr_node *node, void *memory) {
    struct attention_kernel *kernel = memory;
    const int64_t no_window = 0;
    const float none = 0.0f, epsilon = 1e-5f;
    MR_TRY(mr_attribute_int(node, "layer", NULL, &kernel->layer));
    MR_TRY(mr_attribute_int(node, "num_heads", NULL, &kernel->num_heads));
    MR_TRY(mr_attribute_int(node, "kv_num_heads", NULL, &kernel->kv_num_heads));
    MR_TRY(mr_attribute_int(node, "window", &no_window, &kernel->window));
    MR_TRY(mr_attribute_float(node, "scale", &none, &kernel->scale));
    MR_TRY(mr_attribute_float(node, "softcap", &none, &kernel->softcap));
    MR_TRY(mr_attribute_float(node, "norm_epsilon", &epsilon, &kernel->norm_epsilon));
    MR_TRY(mr_expect_range(node->op, "layer", kernel->layer, 0, INT32_MAX));
    MR_TRY(mr_expect_range(node->op, "num_heads", kernel->num_heads, 1, INT16_MAX));
    MR_TRY(mr_expect_range(node->op, "kv_num_heads", kernel->kv_num_heads, 1, INT16_MAX));
    MR_TRY(mr_expect_range(node->op, "window", kernel->window, 0, INT32_MAX));
    if (kernel->num_heads % kernel->kv_num_heads)
        return mr_fail("%s: num_heads %d is not a multiple of kv_num_heads %d", node->op->name, kernel->num_heads,
                       kernel->kv_num_heads);
    if (!(kernel->softcap >= 0.0f)) return mr_fail("%s: softcap is %f, must not be negative", node->op->name, kernel->softcap);
    return NULL;
}

/* ---- shapes ---- */

static OrtStatus *check_head_dim(const struct mr_op *op, const struct mr_tensor *qkv, struct mr_attention *a) {
    MR_TRY(mr_expect_shape(op, "qkv", qkv, 2, (int64_t[]){-1, -1}));
    int64_t heads = (int64_t)(a->num_heads + 2 * a->kv_num_heads), width = qkv->dims[1];
    if (width % heads || width / heads < 1 || width / heads > MR_MAX_HEAD_DIM)
        return mr_fail("%s: qkv has %d columns; %d + 2 * %d heads want a multiple of %d, at most %d times", op->name, width,
                       (int64_t)a->num_heads, (int64_t)a->kv_num_heads, heads, (int64_t)MR_MAX_HEAD_DIM);
    MR_TRY(mr_expect_range(op, "number of tokens", qkv->dims[0], 0, INT32_MAX));
    a->num_tokens = (size_t)qkv->dims[0];
    a->head_dim = (size_t)(width / heads);
    return NULL;
}

static OrtStatus *check_cache(const struct mr_op *op, const struct attention_kernel *kernel, const struct mr_tensor *cache,
                              struct mr_attention *a) {
    if (cache->type != MR_F16 && cache->type != MR_F32)
        return mr_fail("%s: kv_cache has ONNX type %d, expected float16 (%d) or float32 (%d)", op->name, (int64_t)cache->type,
                       (int64_t)MR_F16, (int64_t)MR_F32);
    int64_t row = (int64_t)(MR_BLOCK_TOKENS * mr_attention_padded_dim(a));
    MR_TRY(mr_expect_shape(op, "kv_cache", cache, 5, (int64_t[]){-1, 2, -1, kernel->kv_num_heads, row}));
    MR_TRY(mr_expect_range(op, "layer", kernel->layer, 0, cache->dims[0] - 1));
    MR_TRY(mr_expect_range(op, "number of KV blocks", cache->dims[2], 0, INT32_MAX / MR_BLOCK_TOKENS));
    a->num_blocks = (size_t)cache->dims[2];
    a->cache_is_half = cache->type == MR_F16;
    size_t layer_elements = 2 * a->num_blocks * a->kv_num_heads * (size_t)row;
    a->cache = (char *)cache->data + (size_t)kernel->layer * layer_elements * (a->cache_is_half ? 2 : 4);
    return NULL;
}

static OrtStatus *check_shapes(const struct mr_op *op, const struct mr_tensor *in, struct mr_attention *a) {
    int64_t T = (int64_t)a->num_tokens, D = (int64_t)a->head_dim;
    MR_TRY(mr_expect_shape(op, "positions", &in[POSITIONS], 1, (int64_t[]){T}));
    MR_TRY(mr_expect_shape(op, "past_lens", &in[PAST_LENS], 1, (int64_t[]){-1}));
    int64_t B = in[PAST_LENS].dims[0];
    MR_TRY(mr_expect_shape(op, "cu_seqlens", &in[CU_SEQLENS], 1, (int64_t[]){B + 1}));
    MR_TRY(mr_expect_shape(op, "block_table", &in[BLOCK_TABLE], 2, (int64_t[]){B, -1}));
    MR_TRY(mr_expect_shape(op, "slot_mapping", &in[SLOT_MAPPING], 1, (int64_t[]){T}));
    MR_TRY(mr_expect_shape(op, "cos_sin", &in[COS_SIN], 2, (int64_t[]){-1, -1}));
    int64_t R = in[COS_SIN].dims[1];
    if (R % 2 || R > D)
        return mr_fail("%s: cos_sin has %d columns; it takes an even number, at most the head dim %d", op->name, R, D);
    if (in[Q_NORM].present) MR_TRY(mr_expect_shape(op, "q_norm", &in[Q_NORM], 1, (int64_t[]){D}));
    if (in[K_NORM].present) MR_TRY(mr_expect_shape(op, "k_norm", &in[K_NORM], 1, (int64_t[]){D}));
    if (in[SINKS].present) MR_TRY(mr_expect_shape(op, "sinks", &in[SINKS], 1, (int64_t[]){(int64_t)a->num_heads}));
    a->num_seqs = (size_t)B;
    a->table_width = (size_t)in[BLOCK_TABLE].dims[1];
    a->rotary_dim = (size_t)R;
    return NULL;
}

/* ---- what is in the index tensors ---- */

/* Rows of tokens and their slots: positions have a row of cos_sin, slots lie in the pool. */
static OrtStatus *check_tokens(const struct mr_op *op, const struct mr_attention *a, int64_t num_positions) {
    int64_t num_slots = (int64_t)(a->num_blocks * MR_BLOCK_TOKENS);
    for (size_t t = 0; t < a->num_tokens; ++t) {
        int64_t position = a->positions[t], slot = a->slot_mapping[t];
        if (MR_UNLIKELY(a->rotary_dim && (position < 0 || position >= num_positions)))
            return mr_fail("%s: positions[%d] is %d, cos_sin has rows 0..%d", op->name, (int64_t)t, position,
                           num_positions - 1);
        if (MR_UNLIKELY(slot < -1 || slot >= num_slots))
            return mr_fail("%s: slot_mapping[%d] is %d, the pool has slots 0..%d (-1: do not write)", op->name, (int64_t)t,
                           slot, num_slots - 1);
    }
    return NULL;
}

static OrtStatus *check_offsets(const struct mr_op *op, const struct mr_attention *a) {
    const int32_t *offsets = a->cu_seqlens;
    if (offsets[0] != 0) return mr_fail("%s: cu_seqlens[0] is %d, must be 0", op->name, (int64_t)offsets[0]);
    for (size_t b = 0; b < a->num_seqs; ++b) {
        if (MR_UNLIKELY(offsets[b + 1] < offsets[b]))
            return mr_fail("%s: cu_seqlens[%d] is %d, less than the %d before it", op->name, (int64_t)b + 1,
                           (int64_t)offsets[b + 1], (int64_t)offsets[b]);
    }
    if ((size_t)offsets[a->num_seqs] != a->num_tokens)
        return mr_fail("%s: cu_seqlens ends at %d, qkv has %d tokens", op->name, (int64_t)offsets[a->num_seqs],
                       (int64_t)a->num_tokens);
    return NULL;
}

/* The blocks that sequence b's new tokens look at: those the window left behind may have been given to others already. */
static OrtStatus *check_blocks(const struct mr_op *op, const struct mr_attention *a, size_t b) {
    int64_t past = a->past_lens[b], num_new = (int64_t)a->cu_seqlens[b + 1] - a->cu_seqlens[b];
    if (MR_UNLIKELY(past < 0)) return mr_fail("%s: past_lens[%d] is %d, must not be negative", op->name, (int64_t)b, past);
    if (num_new == 0) return NULL;
    int64_t num_keys = past + num_new, width = (int64_t)a->table_width;
    int64_t num_blocks = (num_keys + MR_BLOCK_TOKENS - 1) / MR_BLOCK_TOKENS;
    if (MR_UNLIKELY(num_keys > INT32_MAX - MR_BLOCK_TOKENS || num_blocks > width))
        return mr_fail("%s: sequence %d has %d past and %d new tokens, more than the %d blocks of its block_table row hold",
                       op->name, (int64_t)b, past, num_new, width);
    const int32_t *row = a->block_table + b * a->table_width;
    size_t first = mr_attention_first_key(a, (size_t)past) / MR_BLOCK_TOKENS;
    for (size_t i = first; i < (size_t)num_blocks; ++i) {
        if (MR_UNLIKELY(row[i] < 0 || (size_t)row[i] >= a->num_blocks))
            return mr_fail("%s: block_table[%d, %d] is %d, the pool has blocks 0..%d", op->name, (int64_t)b, (int64_t)i,
                           (int64_t)row[i], (int64_t)a->num_blocks - 1);
    }
    return NULL;
}

static OrtStatus *read_arguments(const struct attention_kernel *kernel, struct mr_call *call, struct mr_attention *a) {
    struct mr_tensor in[NUM_INPUTS];
    const struct mr_op *op = call->op;
    for (size_t i = 0; i < NUM_INPUTS; ++i) MR_TRY(mr_input(call, i, &in[i]));
    *a = (struct mr_attention){.num_heads = (size_t)kernel->num_heads,
                               .kv_num_heads = (size_t)kernel->kv_num_heads,
                               .window = (size_t)kernel->window,
                               .scale = kernel->scale,
                               .softcap = kernel->softcap,
                               .norm_epsilon = kernel->norm_epsilon,
                               .qkv = in[QKV].data,
                               .positions = in[POSITIONS].data,
                               .cu_seqlens = in[CU_SEQLENS].data,
                               .past_lens = in[PAST_LENS].data,
                               .block_table = in[BLOCK_TABLE].data,
                               .slot_mapping = in[SLOT_MAPPING].data,
                               .cos_sin = in[COS_SIN].data,
                               .q_norm = in[Q_NORM].data,
                               .k_norm = in[K_NORM].data,
                               .sinks = in[SINKS].data};
    MR_TRY(check_head_dim(op, &in[QKV], a));
    MR_TRY(check_cache(op, kernel, &in[KV_CACHE], a));
    MR_TRY(check_shapes(op, in, a));
    MR_TRY(check_offsets(op, a));
    MR_TRY(check_tokens(op, a, in[COS_SIN].dims[0]));
    for (size_t b = 0; b < a->num_seqs; ++b) MR_TRY(check_blocks(op, a, b));
    if (a->scale == 0.0f) a->scale = 1.0f / __builtin_sqrtf((float)a->head_dim);
    return NULL;
}

static OrtStatus *compute_attention(const void *memory, struct mr_call *call) {
    struct mr_attention a;
    struct tile_walk walk;
    struct mr_scratch scratch;
    const struct mr_parallel parallel = mr_call_parallel(call);
    MR_TRY(read_arguments(memory, call, &a));
    MR_TRY(mr_output(call, 0, (int64_t[]){(int64_t)a.num_tokens, (int64_t)(a.num_heads * a.head_dim)}, 2, (void **)&a.out));
    if (a.num_tokens == 0) return NULL;
    MR_TRY(mr_scratch_borrow(plan_attention(&a, &walk, parallel.threads), &scratch));
    place_attention(&a, &walk, scratch.data);
    mr_active()->attention(&a, &parallel);
    mr_scratch_return(&scratch);
    return NULL;
}

MR_DEFINE_OP(mr_attention_op, "PagedAttention", inputs, outputs, struct attention_kernel, create_attention, compute_attention);

/* ---- without a runtime: arguments are taken as checked ---- */

MR_EXPORT size_t millrace_attention_plan(struct mr_attention *a, size_t threads);
MR_EXPORT void millrace_attention_run(struct mr_attention *a, void *scratch, const struct mr_parallel *parallel);

/* Bytes of scratch (64-byte aligned) that millrace_attention_run needs with that many threads. */
size_t millrace_attention_plan(struct mr_attention *a, size_t threads) {
    struct tile_walk walk;
    return plan_attention(a, &walk, threads);
}

/* Run with the active form; `parallel` has the threads that were planned for. */
void millrace_attention_run(struct mr_attention *a, void *scratch, const struct mr_parallel *parallel) {
    struct tile_walk walk;
    plan_attention(a, &walk, parallel->threads);
    place_attention(a, &walk, scratch);
    mr_active()->attention(a, parallel);
}
