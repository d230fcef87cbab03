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
static unsigned num_blocks, num_threads;

static void *run_thread(void *number) {
    threadIdx.x = (unsigned)(unsigned long long)number;
    blockDim.x = num_threads;
    for (blockIdx.x = 0; blockIdx.x < num_blocks; ++blockIdx.x) {
        running();
        __syncthreads(); /* the next block uses the same shared memory */
    }
    return NULL;
}

/* 0, or 1 for a kernel there is not. */
__attribute__((visibility("default"))) int emulated_launch(const char *name, unsigned blocks, unsigned threads, void **values) {
    static pthread_t made[EMULATED_MOST_THREADS];
    running = NULL;
    for (unsigned i = 0; i < sizeof kernels / sizeof *kernels; ++i)
        if (!strcmp(kernels[i].name, name)) running = kernels[i].run;
    if (!running || threads > EMULATED_MOST_THREADS || threads % 32) return 1;
    arguments = values;
    num_blocks = blocks;
    num_threads = threads;
    pthread_barrier_init(&block_barrier, NULL, threads);
    for (unsigned w = 0; w < threads / 32; ++w) pthread_barrier_init(&warp_barriers[w], NULL, 32);
    for (unsigned i = 0; i < threads; ++i) pthread_create(&made[i], NULL, run_thread, (void *)(unsigned long long)i);
    for (unsigned i = 0; i < threads; ++i) pthread_join(made[i], NULL);
    return 0;
}
