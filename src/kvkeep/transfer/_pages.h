/* What _pages.c and _arrivals.c share: how a page is digested, and how a thread is started.
 *
 * Include it once Python.h is in. From then on code is compiled for AVX2, whatever the build's own
 * flags are, until whoever included it pops the options where TARGET_PUSHED is defined. Loading the
 * module checks the CPU. Compilers that do not know the pragma build the plain form.
 */
#ifndef KVKEEP_PAGES_H
#define KVKEEP_PAGES_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define DIGEST_BYTES 16
#define THREADS_MAX 16
/* What a thread takes at a time: about 25 us of work, so that no thread waits long for the last. */
#define CHUNK_BYTES ((size_t)256 << 10)
/* What a thread must have to do to be worth starting. */
#define THREAD_CHUNKS 2
/* How far ahead a page is fetched that is digested where it lies. */
#define STREAM_DISTANCE 512

/* In _arrivals.c: methods of the module. */
__attribute__((visibility("hidden"))) PyObject *begin_verify(PyObject *module, PyObject *arguments);
__attribute__((visibility("hidden"))) PyObject *end_verify(PyObject *module, PyObject *capsule);

/* Start a thread on the given CPUs; where the system refuses them, on those of the caller. */
static bool start_thread(pthread_t *thread, void *(*run)(void *), void *argument,
                         const Py_buffer *cpu_mask)
{
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0)
        return false;
    int error = pthread_attr_setaffinity_np(&attributes, (size_t)cpu_mask->len, cpu_mask->buf);
    if (error == 0)
        error = pthread_create(thread, &attributes, run, argument);
    pthread_attr_destroy(&attributes);
    return error == 0 || pthread_create(thread, NULL, run, argument) == 0;
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2")
#define TARGET_PUSHED
#endif

/* Reading, digesting and writing must overlap, or each waits for the others in turn. A page is
 * fetched into the second-level cache while the one two before it is written, and into the first
 * while the one before it is digested: xxhash.h prefetches XXH_PREFETCH_DIST bytes ahead of what it
 * digests, and that may as well be the next page. Worth a third of a store, a quarter of a load. */
static _Thread_local ptrdiff_t prefetch_distance;
#define XXH_PREFETCH_DIST prefetch_distance
#define XXH_INLINE_ALL
#include <xxhash.h>

/* While the page is digested, as many bytes from prefetch_from on are brought into cache. */
static void digest_page(const char *page, const char *prefetch_from, size_t page_bytes,
                        uint8_t *out)
{
    prefetch_distance = (ptrdiff_t)((uintptr_t)prefetch_from - (uintptr_t)page);
    XXH128_canonical_t digest;
    XXH128_canonicalFromHash(&digest, XXH3_128bits(page, page_bytes));
    memcpy(out, digest.digest, DIGEST_BYTES);
}

#endif
