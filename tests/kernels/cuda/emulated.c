/* The kernels' own text, compiled for the CPU, behind one entry: emulated_launch(name, blocks, threads, arguments). Arguments are
   pointers to values, as for cuLaunchKernel. */
#define MR_EMULATED 1
#include "advance.cu"
#include "linear.cu"
#undef MOST_WARPS
#include "sample.cu"

static void **arguments;
#define ARG(type, i) (*(type *)arguments[i])

static void run_advance(void) {
    millrace_advance(ARG(long long *, 0), ARG(int *, 1), ARG(int *, 2), ARG(long long *, 3), ARG(const long long *, 4), ARG(int, 5));
}

#define RUN_GEMV(rows)                                                                                                        \
    static void run_gemv_##rows(void) {                                                                                       \
        millrace_gemv_##rows(ARG(const void *, 0), ARG(int, 1), ARG(const unsigned short *, 2), ARG(const float *, 3),        \
                             ARG(const float *, 4), ARG(const float *, 5), ARG(unsigned short *, 6), ARG(float *, 7),         \
                             ARG(int, 8), ARG(int, 9), ARG(int, 10), ARG(float, 11), ARG(int, 12));                           \
    }
RUN_GEMV(1)
RUN_GEMV(1_wide)
RUN_GEMV(2)
RUN_GEMV(2_wide)

static void run_norm_rows(void) {
    millrace_norm_rows(ARG(const float *, 0), ARG(const float *, 1), ARG(unsigned short *, 2), ARG(int, 3), ARG(float, 4));
}

static void run_silu_mul(void) {
    millrace_silu_mul(ARG(const unsigned short *, 0), ARG(const float *, 1), ARG(unsigned short *, 2), ARG(int, 3), ARG(int, 4));
}

static void run_residual_bias(void) {
    millrace_residual_bias(ARG(const float *, 0), ARG(const float *, 1), ARG(float *, 2), ARG(int, 3), ARG(int, 4));
}

static void run_add_bias(void) { millrace_add_bias(ARG(unsigned short *, 0), ARG(const float *, 1), ARG(int, 2), ARG(int, 3)); }

static void run_top(void) { millrace_top(ARG(const float *, 0), ARG(long long, 1), ARG(struct top *, 2)); }

static void run_sample(void) {
    millrace_sample(ARG(const float *, 0), ARG(long long, 1), ARG(const struct top *, 2), ARG(const float *, 3),
                    ARG(const int *, 4), ARG(const float *, 5), ARG(const float *, 6), ARG(const long long *, 7),
                    ARG(const long long *, 8), ARG(long long *, 9));
}

static const struct {
    const char *name;
    void (*run)(void);
} kernels[] = {
    {"millrace_advance", run_advance},
    {"millrace_gemv_1", run_gemv_1},       {"millrace_gemv_1_wide", run_gemv_1_wide},
    {"millrace_gemv_2", run_gemv_2},       {"millrace_gemv_2_wide", run_gemv_2_wide},
    {"millrace_norm_rows", run_norm_rows},
    {"millrace_silu_mul", run_silu_mul},   {"millrace_residual_bias", run_residual_bias},
    {"millrace_add_bias", run_add_bias},   {"millrace_top", run_top},
    {"millrace_sample", run_sample},
};

static void (*running)(void);
static unsigned num_blocks;
static struct barrier end_of_block;
static jmp_buf end_of_launch;

/* What a CUDA thread does: its part of every block, one block after the other. The last to end goes back to the launch. */
static void run_thread(void) {
    for (unsigned block = 0; block < num_blocks; ++block) {
        blockIdx.x = block;
        running();
        wait_at(&end_of_block, blockDim.x); /* the next block uses the same shared memory */
    }
    turns[threadIdx.x].has_ended = 1;
    for (unsigned i = 1; i < blockDim.x; ++i) {
        unsigned next = (threadIdx.x + i * stride) % blockDim.x;
        if (!turns[next].has_ended) resume(next);
    }
    _longjmp(end_of_launch, 1);
}

static void run_threads(void) {
    static _Alignas(16) char stacks[EMULATED_MOST_THREADS][64 << 10];
    for (unsigned i = 0; i < blockDim.x; ++i) {
        struct turn *turn = &turns[i];
        turn->has_begun = turn->has_ended = 0;
        getcontext(&turn->fresh);
        turn->fresh.uc_stack.ss_sp = stacks[i];
        turn->fresh.uc_stack.ss_size = sizeof stacks[i];
        makecontext(&turn->fresh, run_thread, 0);
    }
    if (!_setjmp(end_of_launch)) resume(stride == 1 ? 0 : blockDim.x - 1);
}

/* 0, or 1 for a kernel there is not. `descends`: which thread goes first where the order is free; a kernel must not care. */
__attribute__((visibility("default"))) int emulated_launch(const char *name, unsigned blocks, unsigned threads, void **values,
                                                           int descends) {
    running = NULL;
    for (unsigned i = 0; i < sizeof kernels / sizeof *kernels; ++i)
        if (!strcmp(kernels[i].name, name)) running = kernels[i].run;
    if (!running || !threads || threads > EMULATED_MOST_THREADS || threads % 32) return 1;
    arguments = values;
    num_blocks = blocks;
    blockDim.x = threads;
    stride = descends ? threads - 1 : 1;
    run_threads();
    return 0;
}
