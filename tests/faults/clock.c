// A wall clock that can be set for one process: preloaded, it adds the nanoseconds found in the file that
// FAULTS_CLOCK names to every reading of the real time. Monotonic clocks stay as they are.
//
// Not covered: waits until a time on the wall clock. CPython and uvloop wait on the monotonic one.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

#define SECOND INT64_C(1000000000)

typedef int gettime_fn(clockid_t, struct timespec *);

static const volatile int64_t *offset_ns;
static gettime_fn *real_gettime;

__attribute__((constructor)) static void open_clock(void) {
    real_gettime = (gettime_fn *)dlsym(RTLD_NEXT, "clock_gettime");
    const char *name = getenv("FAULTS_CLOCK");
    int file = name ? open(name, O_RDONLY | O_CLOEXEC) : -1;
    void *page = file < 0 ? MAP_FAILED : mmap(NULL, sizeof *offset_ns, PROT_READ, MAP_SHARED, file, 0);
    if (page != MAP_FAILED) offset_ns = page;
}

int clock_gettime(clockid_t id, struct timespec *now) {
    if (!real_gettime) open_clock();  // another library's constructor has come before ours
    int failed = real_gettime(id, now);
    if (failed || !offset_ns || (id != CLOCK_REALTIME && id != CLOCK_REALTIME_COARSE)) return failed;
    int64_t ns = now->tv_sec * SECOND + now->tv_nsec + *offset_ns;
    now->tv_sec = ns / SECOND;
    now->tv_nsec = ns % SECOND;
    return 0;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    (void)zone;  // obsolete; nobody passes one
    struct timespec fine;
    int failed = clock_gettime(CLOCK_REALTIME, &fine);
    if (!failed) *now = (struct timeval){fine.tv_sec, fine.tv_nsec / 1000};
    return failed;
}

time_t time(time_t *out) {
    struct timespec now;
    if (clock_gettime(CLOCK_REALTIME_COARSE, &now)) return -1;
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
