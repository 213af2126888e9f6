/* Head pages copied and digested (XXH3-128) in one pass, outside the interpreter's lock.
 *
 * kvkeep.transfer.host_copy wraps this module and checks the arrays; kvkeep.transfer.base says what
 * store, load, verify and digest promise. Here addresses are believed. Threads live for one call: starting
 * one costs about 20 us, a prompt's copy takes thousands, and nothing is left to stop or to fork.
 *
 * What was measured, and what lost, is in docs/decisions/0003-compiled-page-copies.md.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include "_pages.h"

#define LINE_BYTES 64

typedef struct job job_t;
struct job {
    bool (*copy_page)(const job_t *job, size_t page_idx, char *bounce);
    const uint64_t *source; /* [num_pages] */
    const uint64_t *target; /* [num_pages]; unused by verify and digest */
    size_t num_pages;
    size_t page_bytes;
    uint8_t *digests;         /* [num_pages, 16]; written by store and digest, read by others */
    uint8_t *ok;              /* [num_pages]; unused by store and digest */
    char *bounces;            /* a private page for each thread */
    atomic_size_t num_started; /* threads */
    atomic_size_t num_claimed; /* pages */
    atomic_size_t num_bad;     /* pages */
};

/* The source page so many places on; the last one at the end. */
static const char *source_ahead(const job_t *job, size_t page_idx, size_t num_ahead)
{
    size_t num_left = job->num_pages - 1 - page_idx;
    size_t ahead_idx = page_idx + (num_ahead < num_left ? num_ahead : num_left);
    return (const char *)(uintptr_t)job->source[ahead_idx];
}

static bool is_expected(const job_t *job, size_t page_idx, const uint8_t *digest)
{
    return memcmp(digest, job->digests + page_idx * DIGEST_BYTES, DIGEST_BYTES) == 0;
}

/* Write a page around the caches: the target is not read first, and what the caches hold stays.
 * Meanwhile, as many bytes from prefetch_from on are brought into the second-level cache. */
static void write_page(char *target, const char *source, const char *prefetch_from,
                       size_t page_bytes)
{
#ifdef __AVX2__
    if (((uintptr_t)target | page_bytes) % LINE_BYTES == 0) {
        for (size_t offset = 0; offset < page_bytes; offset += LINE_BYTES) {
            _mm_prefetch(prefetch_from + offset, _MM_HINT_T1);
            __m256i low = _mm256_loadu_si256((const __m256i *)(source + offset));
            __m256i high = _mm256_loadu_si256((const __m256i *)(source + offset + 32));
            _mm256_stream_si256((__m256i *)(target + offset), low);
            _mm256_stream_si256((__m256i *)(target + offset + 32), high);
        }
        return;
    }
#endif
    (void)prefetch_from;
    memcpy(target, source, page_bytes);
}

/* Digest, then copy: a source that changes in between is found by whoever loads the page. */
static bool store_page(const job_t *job, size_t page_idx, char *bounce)
{
    const char *source = source_ahead(job, page_idx, 0);
    (void)bounce;
    digest_page(source, source_ahead(job, page_idx, 1), job->page_bytes,
                job->digests + page_idx * DIGEST_BYTES);
    write_page((char *)(uintptr_t)job->target[page_idx], source, source_ahead(job, page_idx, 2),
               job->page_bytes);
    return true;
}

/* The source is read once, into memory nobody else writes: what was digested is what lands. */
static bool load_page(const job_t *job, size_t page_idx, char *bounce)
{
    uint8_t digest[DIGEST_BYTES];
    memcpy(bounce, source_ahead(job, page_idx, 0), job->page_bytes);
    digest_page(bounce, source_ahead(job, page_idx, 1), job->page_bytes, digest);
    bool is_ok = is_expected(job, page_idx, digest);
    if (is_ok)
        write_page((char *)(uintptr_t)job->target[page_idx], bounce,
                   source_ahead(job, page_idx, 2), job->page_bytes);
    job->ok[page_idx] = is_ok;
    return is_ok;
}

static bool verify_page(const job_t *job, size_t page_idx, char *bounce)
{
    const char *page = source_ahead(job, page_idx, 0);
    uint8_t digest[DIGEST_BYTES];
    (void)bounce;
    digest_page(page, page + STREAM_DISTANCE, job->page_bytes, digest);
    bool is_ok = is_expected(job, page_idx, digest);
    job->ok[page_idx] = is_ok;
    return is_ok;
}

static bool digest_in_place(const job_t *job, size_t page_idx, char *bounce)
{
    const char *page = source_ahead(job, page_idx, 0);
    (void)bounce;
    digest_page(page, page + STREAM_DISTANCE, job->page_bytes,
                job->digests + page_idx * DIGEST_BYTES);
    return true;
}

static size_t chunk_pages(const job_t *job)
{
    size_t num_pages = CHUNK_BYTES / job->page_bytes;
    return num_pages ? num_pages : 1;
}

static size_t bounce_bytes(size_t page_bytes)
{
    return (page_bytes + LINE_BYTES - 1) / LINE_BYTES * LINE_BYTES;
}

/* Claim chunks until none is left. Every thread of a job, the caller's included, runs this. */
static void *work(void *argument)
{
    job_t *job = argument;
    char *bounce =
        job->bounces + atomic_fetch_add(&job->num_started, 1) * bounce_bytes(job->page_bytes);
    size_t step = chunk_pages(job), num_bad = 0;
    for (;;) {
        size_t begin = atomic_fetch_add(&job->num_claimed, step);
        if (begin >= job->num_pages)
            break;
        size_t end = job->num_pages - begin < step ? job->num_pages : begin + step;
        for (size_t page_idx = begin; page_idx < end; page_idx++)
            num_bad += !job->copy_page(job, page_idx, bounce);
    }
    atomic_fetch_add(&job->num_bad, num_bad);
#ifdef __AVX2__
    _mm_sfence(); /* streamed stores are not ordered by what tells others that we are done */
#endif
    return NULL;
}

#ifdef TARGET_PUSHED
#pragma GCC pop_options
#endif

/* Run a job on the calling thread and on helpers; fewer helpers than asked for only cost time. */
static void run_job(job_t *job, size_t num_threads, const Py_buffer *cpu_mask)
{
    pthread_t helpers[THREADS_MAX];
    size_t num_helpers = 0;
    while (num_helpers + 1 < num_threads &&
           start_thread(&helpers[num_helpers], work, job, cpu_mask))
        num_helpers++;
    work(job);
    for (size_t helper_idx = 0; helper_idx < num_helpers; helper_idx++)
        pthread_join(helpers[helper_idx], NULL);
}

/* kvkeep.transfer.host_copy words these errors for people; this stands between a slip there and
 * writes beyond an array. */
static bool lengths_agree(const job_t *job, Py_ssize_t source_bytes, Py_ssize_t target_bytes,
                          Py_ssize_t digests_bytes, Py_ssize_t ok_bytes, Py_ssize_t num_threads)
{
    Py_ssize_t num_pages = (Py_ssize_t)job->num_pages;
    bool agree = job->page_bytes > 0 && num_threads >= 1 && num_threads <= THREADS_MAX &&
                 source_bytes == num_pages * (Py_ssize_t)sizeof(uint64_t) &&
                 target_bytes == source_bytes && digests_bytes == num_pages * DIGEST_BYTES &&
                 ok_bytes == num_pages;
    if (!agree)
        PyErr_SetString(PyExc_ValueError, "arrays of different lengths, an empty page, or a number "
                                          "of threads outside 1 to 16");
    return agree;
}

/* Run a job outside the interpreter's lock. Returns the number of bad pages; -1 with an error. */
static Py_ssize_t run_unlocked(job_t *job, size_t num_threads, const Py_buffer *cpu_mask)
{
    size_t step = chunk_pages(job);
    size_t num_chunks = job->num_pages / step + (job->num_pages % step != 0);
    if (num_chunks == 0)
        return 0;
    size_t num_useful = num_chunks < 2 * THREAD_CHUNKS ? 1 : num_chunks / THREAD_CHUNKS;
    num_threads = num_threads < num_useful ? num_threads : num_useful;
    if (job->page_bytes > PY_SSIZE_T_MAX / THREADS_MAX - LINE_BYTES) {
        PyErr_NoMemory();
        return -1;
    }
    job->bounces = aligned_alloc(LINE_BYTES, num_threads * bounce_bytes(job->page_bytes));
    if (job->bounces == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    Py_BEGIN_ALLOW_THREADS
    run_job(job, num_threads, cpu_mask);
    Py_END_ALLOW_THREADS
    free(job->bounces);
    return (Py_ssize_t)atomic_load(&job->num_bad);
}

static PyObject *store(PyObject *module, PyObject *arguments)
{
    Py_buffer source, target, digests, cpu_mask;
    Py_ssize_t page_bytes, num_threads, num_bad = -1;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*y*nw*ny*", &source, &target, &page_bytes, &digests,
                          &num_threads, &cpu_mask))
        return NULL;
    job_t job = {.copy_page = store_page,
                 .source = source.buf,
                 .target = target.buf,
                 .num_pages = (size_t)source.len / sizeof(uint64_t),
                 .page_bytes = page_bytes > 0 ? (size_t)page_bytes : 0,
                 .digests = digests.buf};
    if (lengths_agree(&job, source.len, target.len, digests.len, (Py_ssize_t)job.num_pages,
                      num_threads))
        num_bad = run_unlocked(&job, (size_t)num_threads, &cpu_mask);
    PyBuffer_Release(&source);
    PyBuffer_Release(&target);
    PyBuffer_Release(&digests);
    PyBuffer_Release(&cpu_mask);
    if (num_bad < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *load(PyObject *module, PyObject *arguments)
{
    Py_buffer source, target, digests, ok, cpu_mask;
    Py_ssize_t page_bytes, num_threads, num_bad = -1;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*y*ny*w*ny*", &source, &target, &page_bytes, &digests, &ok,
                          &num_threads, &cpu_mask))
        return NULL;
    job_t job = {.copy_page = load_page,
                 .source = source.buf,
                 .target = target.buf,
                 .num_pages = (size_t)source.len / sizeof(uint64_t),
                 .page_bytes = page_bytes > 0 ? (size_t)page_bytes : 0,
                 .digests = digests.buf,
                 .ok = ok.buf};
    if (lengths_agree(&job, source.len, target.len, digests.len, ok.len, num_threads))
        num_bad = run_unlocked(&job, (size_t)num_threads, &cpu_mask);
    PyBuffer_Release(&source);
    PyBuffer_Release(&target);
    PyBuffer_Release(&digests);
    PyBuffer_Release(&ok);
    PyBuffer_Release(&cpu_mask);
    return num_bad < 0 ? NULL : PyLong_FromSsize_t(num_bad);
}

static PyObject *verify(PyObject *module, PyObject *arguments)
{
    Py_buffer addresses, digests, ok, cpu_mask;
    Py_ssize_t page_bytes, num_threads, num_bad = -1;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*ny*w*ny*", &addresses, &page_bytes, &digests, &ok,
                          &num_threads, &cpu_mask))
        return NULL;
    job_t job = {.copy_page = verify_page,
                 .source = addresses.buf,
                 .num_pages = (size_t)addresses.len / sizeof(uint64_t),
                 .page_bytes = page_bytes > 0 ? (size_t)page_bytes : 0,
                 .digests = digests.buf,
                 .ok = ok.buf};
    if (lengths_agree(&job, addresses.len, addresses.len, digests.len, ok.len, num_threads))
        num_bad = run_unlocked(&job, (size_t)num_threads, &cpu_mask);
    PyBuffer_Release(&addresses);
    PyBuffer_Release(&digests);
    PyBuffer_Release(&ok);
    PyBuffer_Release(&cpu_mask);
    return num_bad < 0 ? NULL : PyLong_FromSsize_t(num_bad);
}

static PyObject *digest(PyObject *module, PyObject *arguments)
{
    Py_buffer addresses, digests, cpu_mask;
    Py_ssize_t page_bytes, num_threads, num_bad = -1;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*nw*ny*", &addresses, &page_bytes, &digests, &num_threads,
                          &cpu_mask))
        return NULL;
    job_t job = {.copy_page = digest_in_place,
                 .source = addresses.buf,
                 .num_pages = (size_t)addresses.len / sizeof(uint64_t),
                 .page_bytes = page_bytes > 0 ? (size_t)page_bytes : 0,
                 .digests = digests.buf};
    if (lengths_agree(&job, addresses.len, addresses.len, digests.len, (Py_ssize_t)job.num_pages,
                      num_threads))
        num_bad = run_unlocked(&job, (size_t)num_threads, &cpu_mask);
    PyBuffer_Release(&addresses);
    PyBuffer_Release(&digests);
    PyBuffer_Release(&cpu_mask);
    if (num_bad < 0)
        return NULL;
    Py_RETURN_NONE;
}

static int check_cpu(PyObject *module)
{
    (void)module;
#ifdef TARGET_PUSHED
    if (!__builtin_cpu_supports("avx2")) {
        PyErr_SetString(PyExc_ImportError, "this CPU has no AVX2");
        return -1;
    }
#endif
    return 0;
}

static PyMethodDef methods[] = {
    {"store", store, METH_VARARGS, "Digest each page, then copy it."},
    {"load", load, METH_VARARGS, "Copy each page whose bytes match its digest; count the others."},
    {"verify", verify, METH_VARARGS, "Compare pages with their digests; count those that differ."},
    {"digest", digest, METH_VARARGS, "Digest each page where it lies."},
    {"begin_verify", begin_verify, METH_VARARGS, "Begin to compare pages as gates open."},
    {"end_verify", end_verify, METH_O, "Wait until all are compared; 0, or a gate's error."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{Py_mod_exec, check_cpu}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "kvkeep.transfer._pages",
    .m_doc = "Head pages copied and digested outside the interpreter's lock.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__pages(void);
PyMODINIT_FUNC PyInit__pages(void)
{
    return PyModuleDef_Init(&definition);
}
