/* Pages compared with their digests where they lie, layer by layer, as gates open.
 *
 * A gate is a C function that somebody else wrote, such as one that waits until a GPU has read some
 * layers. From the first gate to the last page no thread of this file asks for the interpreter's
 * lock: while an engine launches a forward pass, its thread holds that lock for milliseconds.
 *
 * kvkeep.transfer.arrivals wraps this and checks the arrays; here addresses are believed. The
 * threads live for one call of begin_verify: one waits at the gates, the others compare.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include "_pages.h"

#define CAPSULE_NAME "kvkeep.transfer._pages.verification"

typedef struct {
    uint64_t function; /* int (*)(void *): 0 when the layers before end_layer may be read */
    uint64_t argument;
    uint64_t end_layer;
} gate_t;

/* A run is what lies together: the pages of a layer of a block. Runs are counted layer by layer. */
typedef struct {
    Py_buffer starts;  /* uint64 [num_blocks]: the first page of layer 0 */
    Py_buffer digests; /* [num_blocks, num_layers, run_pages, 16] */
    Py_buffer ok;      /* uint8 [num_blocks] */
    Py_buffer gates;   /* gate_t [num_gates] */
    Py_buffer cpu_mask;
    size_t num_blocks;
    size_t num_layers;
    size_t layer_stride; /* bytes from a layer of a block to the next */
    size_t run_pages;
    size_t page_bytes;
    size_t num_helpers;
    pthread_t keeper; /* of the gates */
    bool is_started;
    atomic_size_t num_claimed; /* runs */
    atomic_size_t num_open;    /* runs; changed under the mutex */
    pthread_mutex_t mutex;
    pthread_cond_t has_news;
    bool is_shut; /* a gate failed: what is not open stays so */
    bool is_over;
    int error; /* of the gate that failed */
} verification_t;

static size_t num_runs(const verification_t *job)
{
    return job->num_layers * job->num_blocks;
}

static size_t chunk_runs(const verification_t *job)
{
    size_t count = CHUNK_BYTES / (job->run_pages * job->page_bytes);
    return count ? count : 1;
}

static void check_run(const verification_t *job, size_t run)
{
    size_t layer = run / job->num_blocks, block = run % job->num_blocks;
    const uint64_t *starts = job->starts.buf;
    const char *page = (const char *)(uintptr_t)starts[block] + layer * job->layer_stride;
    const uint8_t *expected = (const uint8_t *)job->digests.buf +
                              (block * job->num_layers + layer) * job->run_pages * DIGEST_BYTES;
    uint8_t found[DIGEST_BYTES];
    bool is_ok = true;
    for (size_t page_idx = 0; page_idx < job->run_pages; page_idx++) {
        digest_page(page, page + STREAM_DISTANCE, job->page_bytes, found);
        is_ok &= memcmp(found, expected, DIGEST_BYTES) == 0;
        page += job->page_bytes;
        expected += DIGEST_BYTES;
    }
    if (!is_ok) /* several threads may say so of one block */
        __atomic_store_n((uint8_t *)job->ok.buf + block, 0, __ATOMIC_RELAXED);
}

#ifdef TARGET_PUSHED
#pragma GCC pop_options
#endif

/* Wait until these runs may be read; false if they never may. */
static bool wait_until_open(verification_t *job, size_t end)
{
    if (atomic_load(&job->num_open) >= end)
        return true;
    pthread_mutex_lock(&job->mutex);
    while (atomic_load(&job->num_open) < end && !job->is_shut)
        pthread_cond_wait(&job->has_news, &job->mutex);
    bool is_open = atomic_load(&job->num_open) >= end;
    pthread_mutex_unlock(&job->mutex);
    return is_open;
}

static void *check_runs(void *argument)
{
    verification_t *job = argument;
    size_t step = chunk_runs(job), total = num_runs(job);
    for (;;) {
        size_t begin = atomic_fetch_add(&job->num_claimed, step);
        if (begin >= total)
            return NULL;
        size_t end = total - begin < step ? total : begin + step;
        if (!wait_until_open(job, end))
            return NULL;
        for (size_t run = begin; run < end; run++)
            check_run(job, run);
    }
}

static void tell(verification_t *job, size_t num_open, int error)
{
    pthread_mutex_lock(&job->mutex);
    atomic_store(&job->num_open, num_open);
    job->is_shut = error != 0;
    job->error = error;
    pthread_cond_broadcast(&job->has_news);
    pthread_mutex_unlock(&job->mutex);
}

/* Pass the gates one after the other, then help with what is left. */
static void *keep_gates(void *argument)
{
    verification_t *job = argument;
    pthread_t helpers[THREADS_MAX];
    size_t num_helpers = 0;
    while (num_helpers < job->num_helpers &&
           start_thread(&helpers[num_helpers], check_runs, job, &job->cpu_mask))
        num_helpers++;
    const gate_t *gates = job->gates.buf;
    size_t num_gates = (size_t)job->gates.len / sizeof(gate_t);
    int error = 0;
    for (size_t idx = 0; idx < num_gates && !error; idx++) {
        error = ((int (*)(void *))(uintptr_t)gates[idx].function)(
            (void *)(uintptr_t)gates[idx].argument);
        size_t num_open = error ? atomic_load(&job->num_open)
                                : (size_t)gates[idx].end_layer * job->num_blocks;
        tell(job, num_open, error);
    }
    check_runs(job);
    for (size_t idx = 0; idx < num_helpers; idx++)
        pthread_join(helpers[idx], NULL);
    if (error) /* not all were compared, and which were nobody noted */
        memset(job->ok.buf, 0, job->num_blocks);
    pthread_mutex_lock(&job->mutex);
    job->is_over = true;
    pthread_cond_broadcast(&job->has_news);
    pthread_mutex_unlock(&job->mutex);
    return NULL;
}

static void release(verification_t *job)
{
    Py_buffer *buffers[] = {&job->starts, &job->digests, &job->ok, &job->gates, &job->cpu_mask};
    for (size_t idx = 0; idx < sizeof buffers / sizeof *buffers; idx++)
        PyBuffer_Release(buffers[idx]);
    pthread_cond_destroy(&job->has_news);
    pthread_mutex_destroy(&job->mutex);
    free(job);
}

static void destroy(PyObject *capsule)
{
    verification_t *job = PyCapsule_GetPointer(capsule, CAPSULE_NAME);
    if (job->is_started) {
        Py_BEGIN_ALLOW_THREADS
        pthread_join(job->keeper, NULL);
        Py_END_ALLOW_THREADS
    }
    release(job);
}

static bool gates_fit(const verification_t *job)
{
    const gate_t *gates = job->gates.buf;
    size_t num_gates = (size_t)job->gates.len / sizeof(gate_t), end_layer = 0;
    if (num_gates == 0 || (size_t)job->gates.len % sizeof(gate_t) != 0)
        return false;
    for (size_t idx = 0; idx < num_gates; idx++) {
        if (gates[idx].function == 0 || gates[idx].end_layer < end_layer ||
            gates[idx].end_layer > job->num_layers)
            return false;
        end_layer = gates[idx].end_layer;
    }
    return end_layer == job->num_layers;
}

/* kvkeep.transfer.arrivals words these errors for people; this stands between a slip there and
 * reads beyond an array. */
static bool is_sound(const verification_t *job, const Py_ssize_t *sizes, Py_ssize_t num_threads)
{
    size_t num_digests, run_bytes, num_bytes;
    bool fits = num_threads >= 1 && num_threads <= THREADS_MAX;
    for (size_t idx = 0; idx < 4; idx++)
        fits = fits && sizes[idx] >= 1;
    fits = fits && (size_t)job->starts.len % sizeof(uint64_t) == 0 &&
           !__builtin_mul_overflow(job->num_blocks, job->num_layers, &num_digests) &&
           !__builtin_mul_overflow(num_digests, job->run_pages, &num_digests) &&
           !__builtin_mul_overflow(num_digests, (size_t)DIGEST_BYTES, &num_bytes) &&
           !__builtin_mul_overflow(job->run_pages, job->page_bytes, &run_bytes) &&
           (size_t)job->digests.len == num_bytes && (size_t)job->ok.len == job->num_blocks &&
           gates_fit(job);
    if (!fits)
        PyErr_SetString(PyExc_ValueError, "arrays of different lengths, an empty page, gates out "
                                          "of order, or a number of threads outside 1 to 16");
    return fits;
}

/* (starts, num_layers, layer_stride, run_pages, page_bytes, digests, ok, gates, num_threads,
 * cpu_mask) -> what end_verify takes. The arrays stay in use until that has returned. */
PyObject *begin_verify(PyObject *module, PyObject *arguments)
{
    Py_ssize_t sizes[4], num_threads;
    verification_t *job = calloc(1, sizeof *job);
    (void)module;
    if (job == NULL)
        return PyErr_NoMemory();
    if (!PyArg_ParseTuple(arguments, "y*nnnny*w*y*ny*", &job->starts, &sizes[0], &sizes[1],
                          &sizes[2], &sizes[3], &job->digests, &job->ok, &job->gates, &num_threads,
                          &job->cpu_mask)) {
        free(job);
        return NULL;
    }
    pthread_mutex_init(&job->mutex, NULL);
    pthread_cond_init(&job->has_news, NULL);
    job->num_blocks = (size_t)job->starts.len / sizeof(uint64_t);
    job->num_layers = (size_t)sizes[0];
    job->layer_stride = (size_t)sizes[1];
    job->run_pages = (size_t)sizes[2];
    job->page_bytes = (size_t)sizes[3];
    if (!is_sound(job, sizes, num_threads)) {
        release(job);
        return NULL;
    }
    size_t num_useful = num_runs(job) / chunk_runs(job) / THREAD_CHUNKS;
    job->num_helpers = (size_t)num_threads < num_useful ? (size_t)num_threads : num_useful;
    memset(job->ok.buf, 1, job->num_blocks);
    PyObject *capsule = PyCapsule_New(job, CAPSULE_NAME, destroy);
    if (capsule == NULL) {
        release(job);
        return NULL;
    }
    job->is_started = start_thread(&job->keeper, keep_gates, job, &job->cpu_mask);
    if (!job->is_started) {
        Py_BEGIN_ALLOW_THREADS
        keep_gates(job); /* the caller waits instead of nobody */
        Py_END_ALLOW_THREADS
    }
    return capsule;
}

/* Wait until nothing is read any more: 0, or what the gate returned that failed. */
PyObject *end_verify(PyObject *module, PyObject *capsule)
{
    verification_t *job = PyCapsule_GetPointer(capsule, CAPSULE_NAME);
    (void)module;
    if (job == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    pthread_mutex_lock(&job->mutex);
    while (!job->is_over)
        pthread_cond_wait(&job->has_news, &job->mutex);
    pthread_mutex_unlock(&job->mutex);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(job->error);
}
