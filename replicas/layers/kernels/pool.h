/* Threads: workers look for work for SPIN_NS after the last, then sleep in the kernel. */
#ifndef WATTLINE_POOL_H
#define WATTLINE_POOL_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#define SPIN_NS 100000

typedef void (*Task)(const void *job, long index);

typedef struct Pool {
    _Atomic int is_open, active, sleepers, is_stopped;
    _Atomic unsigned generation;
    _Atomic long next;
    long count, chunk;
    Task task;
    const void *job;
    int num_threads;
    pthread_t *workers;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    char *scratch;
    size_t scratch_size;
} Pool;

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Buffers of a thread; workers keep theirs for life. */
static _Thread_local struct { float *data; size_t size; } own;

static void take(Pool *p) {
    long count = p->count, chunk = p->chunk, at;
    while ((at = atomic_fetch_add(&p->next, chunk)) < count)
        for (long end = at + chunk < count ? at + chunk : count; at < end; at++) p->task(p->job, at);
}

static void *work(void *argument) {
    Pool *p = argument;
    int64_t last = now_ns();
    while (!atomic_load(&p->is_stopped)) {
        unsigned seen = atomic_load(&p->generation);
        if (atomic_load(&p->is_open) && atomic_load(&p->next) < p->count) {
            /* Announce first, then look again: the caller closes first, then waits for the announced. */
            atomic_fetch_add(&p->active, 1);
            if (atomic_load(&p->is_open)) take(p);
            atomic_fetch_sub(&p->active, 1);
            last = now_ns();
        }
        for (int i = 0; i < 32 && !(atomic_load(&p->is_open) && atomic_load(&p->next) < p->count); i++) relax();
        if (now_ns() - last < SPIN_NS) continue;
        pthread_mutex_lock(&p->mutex);
        atomic_fetch_add(&p->sleepers, 1);
        while (atomic_load(&p->generation) == seen && !atomic_load(&p->is_stopped))
            pthread_cond_wait(&p->wake, &p->mutex);
        atomic_fetch_sub(&p->sleepers, 1);
        pthread_mutex_unlock(&p->mutex);
        last = now_ns();
    }
    free(own.data);
    return NULL;
}

static void wake_all(Pool *p) {
    pthread_mutex_lock(&p->mutex);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->mutex);
}

/* Run task(job, 0..count-1). Never waits for a worker that is still asleep. */
static void run(Pool *p, Task task, const void *job, long count, long chunk) {
    if (p->num_threads == 1 || count <= chunk) {
        for (long at = 0; at < count; at++) task(job, at);
        return;
    }
    p->task = task, p->job = job, p->count = count, p->chunk = chunk;
    atomic_store(&p->next, 0);
    atomic_fetch_add(&p->generation, 1);
    atomic_store(&p->is_open, 1);
    if (atomic_load(&p->sleepers)) wake_all(p);
    take(p);
    atomic_store(&p->is_open, 0);
    for (long turns = 0; atomic_load(&p->active); turns++)
        if (turns < 20000) relax(); else sched_yield();
}

static void *scratch(Pool *p, size_t size) {
    if (size > p->scratch_size) {
        free(p->scratch);
        p->scratch_size = (size + size / 2 + 4095) & ~(size_t)4095;
        p->scratch = aligned_alloc(4096, p->scratch_size);
        if (!p->scratch) abort();
    }
    return p->scratch;
}

static float *own_buffer(long count) {
    if ((size_t)count > own.size) {
        free(own.data);
        own.size = ((size_t)count * 2 + 63) & ~(size_t)63;
        own.data = aligned_alloc(64, own.size * sizeof(float));
        if (!own.data) abort();
    }
    return own.data;
}

Pool *wl_pool_new(int num_threads) {
    Pool *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    p->num_threads = 1;
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->wake, NULL);
    p->workers = calloc((size_t)num_threads, sizeof *p->workers);
    for (int i = 0; p->workers && i < num_threads - 1; i++) {
        if (pthread_create(&p->workers[i], NULL, work, p)) break;
        p->num_threads++;
    }
    return p;
}

void wl_pool_free(Pool *p) {
    atomic_store(&p->is_stopped, 1);
    wake_all(p);
    for (int i = 0; i < p->num_threads - 1; i++) pthread_join(p->workers[i], NULL);
    free(p->workers), free(p->scratch), free(p);
}

#endif
