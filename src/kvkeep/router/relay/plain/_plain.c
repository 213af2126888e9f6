/* What the relay reads most, in one pass: heads that pass unchanged, whole chunks, streams of them.
 *
 * kvkeep.router.relay.framing says what HTTP is here. This module only recognizes the plain form of
 * it; of anything else it says so, and framing reads it, or refuses it. So nothing is refused here,
 * and a message that is plain here is one that framing understands in the same way: the tests hold
 * both together. Nothing is read beyond the bytes given, and nothing is written but to one buffer.
 *
 * Why it is compiled, and what that saves, is in docs/decisions/0024-plain-heads-in-c.md.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

/* As in framing.py. */
#define HEAD_BYTES_MAX (64 << 10)
#define FIELDS_MAX 128
#define DIGITS_MAX 19
#define HEX_DIGITS_MAX 15
#define UNTIL_CLOSE (-1)
#define CHUNKED (-2)

/* What is read of a stream at a time. */
#define PIECE_BYTES (64 << 10)
/* Of a stream's end, which says what it took, kept for whoever reads that. */
#define TAIL_BYTES (4 << 10)

#define TOKEN 1  /* may stand in a name (RFC 9110, 5.6.2) */
#define VALUE 2  /* may stand in a value: what can be seen, space, tab, and bytes beyond ASCII */
#define TARGET 4 /* may stand in a target: what can be seen */

static const uint8_t KINDS[256] = {
    ['\t'] = VALUE,
    [' '] = VALUE,
    ['!'] = TOKEN | VALUE | TARGET,
    ['"'] = VALUE | TARGET,
    ['#' ... '\''] = TOKEN | VALUE | TARGET,
    ['(' ... ')'] = VALUE | TARGET,
    ['*' ... '+'] = TOKEN | VALUE | TARGET,
    [','] = VALUE | TARGET,
    ['-' ... '.'] = TOKEN | VALUE | TARGET,
    ['/'] = VALUE | TARGET,
    ['0' ... '9'] = TOKEN | VALUE | TARGET,
    [':' ... '@'] = VALUE | TARGET,
    ['A' ... 'Z'] = TOKEN | VALUE | TARGET,
    ['[' ... ']'] = VALUE | TARGET,
    ['^' ... 'z'] = TOKEN | VALUE | TARGET,
    ['{'] = VALUE | TARGET,
    ['|'] = TOKEN | VALUE | TARGET,
    ['}'] = VALUE | TARGET,
    ['~'] = TOKEN | VALUE | TARGET,
    [0x80 ... 0xff] = VALUE,
};

/* --- Heads ------------------------------------------------------------------------------------ */

typedef struct {
    const char *at; /* the first byte that was not read */
    const char *end;
} reader_t;

typedef struct {
    const char *begin;
    size_t size;
} text_t;

typedef enum {
    FIELD,       /* a name and a value were read */
    EMPTY_LINE,  /* the head is over */
    NOT_A_FIELD, /* it is malformed, or not all there */
} line_t;

static text_t take_kind(reader_t *reader, uint8_t kind)
{
    text_t text = {.begin = reader->at};
    while (reader->at < reader->end && (KINDS[(uint8_t)*reader->at] & kind))
        reader->at++;
    text.size = (size_t)(reader->at - text.begin);
    return text;
}

static bool take_text(reader_t *reader, const char *wanted)
{
    size_t size = strlen(wanted);
    if ((size_t)(reader->end - reader->at) < size || memcmp(reader->at, wanted, size) != 0)
        return false;
    reader->at += size;
    return true;
}

/* A field's line. Space before the value is left out, space behind it is part of it. */
static line_t take_field(reader_t *reader, text_t *name, text_t *value)
{
    if (take_text(reader, "\r\n"))
        return EMPTY_LINE;
    *name = take_kind(reader, TOKEN);
    if (name->size == 0 || !take_text(reader, ":"))
        return NOT_A_FIELD;
    *value = take_kind(reader, VALUE);
    while (value->size && (*value->begin == ' ' || *value->begin == '\t')) {
        value->begin++;
        value->size--;
    }
    return take_text(reader, "\r\n") ? FIELD : NOT_A_FIELD;
}

/* Whether it is this text in whatever case; the text has small letters, digits and '-' only, and no
 * other byte becomes one of those by the bit that makes letters small, except control characters,
 * which neither names nor values hold. */
static bool is_text(text_t text, const char *wanted)
{
    if (text.size != strlen(wanted))
        return false;
    for (size_t offset = 0; offset < text.size; offset++)
        if ((text.begin[offset] | 0x20) != wanted[offset])
            return false;
    return true;
}

/* What stands for one connection only, so that a head with it can't pass unchanged. */
static bool is_hop_by_hop(text_t name)
{
    switch (name.size) {
    case 2: return is_text(name, "te");
    case 7: return is_text(name, "trailer") || is_text(name, "upgrade");
    case 10: return is_text(name, "connection") || is_text(name, "keep-alive");
    case 14: return is_text(name, "http2-settings");
    case 16: return is_text(name, "proxy-connection");
    case 17: return is_text(name, "transfer-encoding");
    default: return false;
    }
}

/* Digits and nothing else, few enough to fit; -1 for anything else. */
static long long read_length(text_t value)
{
    long long length = 0;
    if (value.size == 0 || value.size >= DIGITS_MAX)
        return -1;
    for (size_t offset = 0; offset < value.size; offset++) {
        char digit = value.begin[offset];
        if (digit < '0' || digit > '9')
            return -1;
        length = length * 10 + (digit - '0');
    }
    return length;
}

static bool is_known_method(text_t method)
{
    static const char *const METHODS[] = {"GET", "POST", "HEAD", "PUT", "PATCH", "DELETE",
                                          "OPTIONS"};
    for (size_t number = 0; number < sizeof METHODS / sizeof *METHODS; number++)
        if (method.size == strlen(METHODS[number]) &&
            memcmp(method.begin, METHODS[number], method.size) == 0)
            return true;
    return false;
}

typedef struct {
    text_t method, target;
    long long length;
} request_t;

/* Returns the bytes that a plain head has; 0 if there is none. */
static size_t read_request(const char *data, size_t size, request_t *request)
{
    reader_t reader = {.at = data, .end = data + (size < HEAD_BYTES_MAX ? size : HEAD_BYTES_MAX)};
    request->method = take_kind(&reader, TOKEN);
    if (!is_known_method(request->method) || !take_text(&reader, " "))
        return 0;
    request->target = take_kind(&reader, TARGET);
    if (request->target.size == 0 || *request->target.begin != '/' ||
        !take_text(&reader, " HTTP/1.1\r\n"))
        return 0;
    request->length = -1;
    int num_hosts = 0;
    text_t name, value;
    for (int num_fields = 0;; num_fields++) {
        line_t line = take_field(&reader, &name, &value);
        if (line == EMPTY_LINE)
            break;
        if (line == NOT_A_FIELD || num_fields == FIELDS_MAX)
            return 0;
        if (name.size == 4 && is_text(name, "host")) {
            num_hosts++;
        } else if (name.size == 14 && is_text(name, "content-length")) {
            if (request->length >= 0 || (request->length = read_length(value)) < 0)
                return 0;
        } else if (name.size == 10 && is_text(name, "connection")) {
            if (!is_text(value, "keep-alive"))
                return 0;
        } else if (is_hop_by_hop(name) || is_text(name, "expect")) {
            return 0;
        }
    }
    if (num_hosts != 1)
        return 0;
    if (request->length < 0)
        request->length = 0;
    return (size_t)(reader.at - data);
}

typedef struct {
    int status;
    long long length;
    bool is_event_stream;
} response_t;

static bool read_status(reader_t *reader, int *status)
{
    if (!take_text(reader, "HTTP/1.1 ") || reader->end - reader->at < 3)
        return false;
    *status = 0;
    for (int place = 0; place < 3; place++) {
        char digit = *reader->at++;
        if (digit < '0' || digit > '9')
            return false;
        *status = *status * 10 + (digit - '0');
    }
    if (take_text(reader, " "))
        take_kind(reader, VALUE);
    return take_text(reader, "\r\n");
}

/* Returns the bytes that a plain head has; 0 if there is none. */
static size_t read_response(const char *data, size_t size, response_t *response)
{
    static const char EVENT_STREAM[] = "text/event-stream";
    reader_t reader = {.at = data, .end = data + (size < HEAD_BYTES_MAX ? size : HEAD_BYTES_MAX)};
    if (!read_status(&reader, &response->status) || response->status < 200 ||
        response->status == 204 || response->status == 304)
        return 0;
    response->length = UNTIL_CLOSE;
    response->is_event_stream = false;
    text_t name, value;
    for (int num_fields = 0;; num_fields++) {
        line_t line = take_field(&reader, &name, &value);
        if (line == EMPTY_LINE)
            break;
        if (line == NOT_A_FIELD || num_fields == FIELDS_MAX)
            return 0;
        if (name.size == 12 && is_text(name, "content-type")) {
            text_t begin = {value.begin, sizeof EVENT_STREAM - 1};
            response->is_event_stream = value.size >= begin.size && is_text(begin, EVENT_STREAM);
        } else if (name.size == 14 && is_text(name, "content-length")) {
            if (response->length != UNTIL_CLOSE || (response->length = read_length(value)) < 0)
                return 0;
        } else if (name.size == 17 && is_text(name, "transfer-encoding")) {
            if (response->length != UNTIL_CLOSE || !is_text(value, "chunked"))
                return 0;
            response->length = CHUNKED;
        } else if (is_hop_by_hop(name)) {
            return 0;
        }
    }
    return response->length == UNTIL_CLOSE ? 0 : (size_t)(reader.at - data);
}

static PyObject *plain_request(PyObject *module, PyObject *data)
{
    char *bytes;
    Py_ssize_t size;
    request_t request;
    (void)module;
    if (PyBytes_AsStringAndSize(data, &bytes, &size) < 0)
        return NULL;
    size_t head_bytes = read_request(bytes, (size_t)size, &request);
    if (head_bytes == 0)
        Py_RETURN_NONE;
    return Py_BuildValue("(y#y#Ln)", request.method.begin, (Py_ssize_t)request.method.size,
                         request.target.begin, (Py_ssize_t)request.target.size, request.length,
                         (Py_ssize_t)head_bytes);
}

static PyObject *plain_response(PyObject *module, PyObject *data)
{
    char *bytes;
    Py_ssize_t size;
    response_t response;
    (void)module;
    if (PyBytes_AsStringAndSize(data, &bytes, &size) < 0)
        return NULL;
    size_t head_bytes = read_response(bytes, (size_t)size, &response);
    if (head_bytes == 0)
        Py_RETURN_NONE;
    return Py_BuildValue("(iLOn)", response.status, response.length,
                         response.is_event_stream ? Py_True : Py_False, (Py_ssize_t)head_bytes);
}

/* --- Usage ------------------------------------------------------------------------------------ */

/* A number of at most so many digits is one of tokens. */
#define TOKEN_DIGITS_MAX 12

static bool is_space(char letter)
{
    return letter == ' ' || (letter >= '\t' && letter <= '\r');
}

static bool is_of_word(char letter)
{
    return (letter >= '0' && letter <= '9') || (letter >= 'A' && letter <= 'Z') ||
           (letter >= 'a' && letter <= 'z') || letter == '_';
}

/* Colon and number behind a name; -1 for anything else. */
static long long read_number(reader_t reader)
{
    long long number = 0;
    int num_digits = 0;
    while (reader.at < reader.end && is_space(*reader.at))
        reader.at++;
    if (!take_text(&reader, ":"))
        return -1;
    while (reader.at < reader.end && is_space(*reader.at))
        reader.at++;
    for (; reader.at < reader.end && *reader.at >= '0' && *reader.at <= '9'; reader.at++) {
        if (++num_digits > TOKEN_DIGITS_MAX)
            return -1;
        number = number * 10 + (*reader.at - '0');
    }
    bool is_ended = reader.at == reader.end || !is_of_word(*reader.at);
    return num_digits && is_ended ? number : -1;
}

/* The first number of each kind, by the names that OpenAI's two interfaces have for it. */
static PyObject *find_tokens(PyObject *module, PyObject *data)
{
    static const struct {
        const char *name;
        int kind;
    } NAMES[] = {
        {"prompt_tokens\"", 0},     {"input_tokens\"", 0},  {"completion_tokens\"", 1},
        {"output_tokens\"", 1}, {"cached_tokens\"", 2},
    };
    long long found[3] = {-1, -1, -1};
    char *bytes;
    Py_ssize_t size;
    (void)module;
    if (PyBytes_AsStringAndSize(data, &bytes, &size) < 0)
        return NULL;
    reader_t reader = {.at = bytes, .end = bytes + size};
    while ((reader.at = memchr(reader.at, '"', (size_t)(reader.end - reader.at))) != NULL) {
        reader.at++;
        for (size_t number = 0; number < sizeof NAMES / sizeof *NAMES; number++) {
            reader_t behind = reader;
            int kind = NAMES[number].kind;
            if (found[kind] < 0 && take_text(&behind, NAMES[number].name))
                found[kind] = read_number(behind);
        }
    }
    return Py_BuildValue("(LLL)", found[0], found[1], found[2]);
}

/* --- Chunks ----------------------------------------------------------------------------------- */

static int hex_digit(char letter)
{
    if (letter >= '0' && letter <= '9')
        return letter - '0';
    letter |= 0x20;
    return letter >= 'a' && letter <= 'f' ? letter - 'a' + 10 : -1;
}

/* Whether these are whole chunks without extensions, the last chunk not among them, and of a stream
 * of events whole lines: they may be passed on as they are, and anything may follow. */
static bool are_whole_chunks(const char *data, size_t size, bool is_event_stream)
{
    size_t at = 0;
    if (size == 0)
        return false;
    while (at < size) {
        size_t chunk_bytes = 0, begin = at;
        int digit;
        while (at < size && (digit = hex_digit(data[at])) >= 0 && at - begin < HEX_DIGITS_MAX) {
            chunk_bytes = chunk_bytes << 4 | (size_t)digit;
            at++;
        }
        if (chunk_bytes == 0 || size - at < 2 || memcmp(data + at, "\r\n", 2) != 0)
            return false;
        at += 2;
        if (size - at < 2 || size - at - 2 < chunk_bytes)
            return false;
        at += chunk_bytes;
        if (memcmp(data + at, "\r\n", 2) != 0)
            return false;
        at += 2;
    }
    return !is_event_stream || data[size - 3] == '\n' || data[size - 3] == '\r';
}

static PyObject *whole_chunks(PyObject *module, PyObject *arguments)
{
    const char *data;
    Py_ssize_t size;
    int is_event_stream;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y#p", &data, &size, &is_event_stream))
        return NULL;
    return PyBool_FromLong(are_whole_chunks(data, (size_t)size, is_event_stream));
}

/* --- Streams ---------------------------------------------------------------------------------- */

/* Pieces of a stream, from one socket to another, as long as they are plain and find room. */
typedef struct {
    PyObject_HEAD
    int upstream_fd, client_fd;
    bool is_event_stream;
    char is_heard; /* set with each piece; whoever looks sets it back */
    unsigned long long num_bytes;
    PyObject *leave;
    size_t tail_bytes;
    char tail[TAIL_BYTES];
} pump_t;

/* The interpreter's lock is held while it is used. */
static char piece[PIECE_BYTES];

static PyObject *pump_new(PyTypeObject *type, PyObject *arguments, PyObject *names)
{
    int upstream_fd, client_fd, is_event_stream;
    PyObject *leave;
    (void)names;
    if (!PyArg_ParseTuple(arguments, "iipO", &upstream_fd, &client_fd, &is_event_stream, &leave))
        return NULL;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    pump_t *pump = (pump_t *)allocate(type, 0);
    if (pump == NULL)
        return NULL;
    pump->upstream_fd = upstream_fd;
    pump->client_fd = client_fd;
    pump->is_event_stream = is_event_stream;
    pump->leave = Py_NewRef(leave);
    /* Acknowledge every other piece, not each: a tenth of what an event costs. That is as good as it
     * gets until the stream pauses; where it can't be had, nothing is lost. */
    int is_quick = 0;
    (void)setsockopt(upstream_fd, IPPROTO_TCP, TCP_QUICKACK, &is_quick, sizeof is_quick);
    return (PyObject *)pump;
}

static int pump_traverse(pump_t *pump, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE((PyObject *)pump));
    Py_VISIT(pump->leave);
    return 0;
}

static int pump_clear(pump_t *pump)
{
    Py_CLEAR(pump->leave);
    return 0;
}

static void pump_dealloc(pump_t *pump)
{
    PyTypeObject *type = Py_TYPE((PyObject *)pump);
    PyObject_GC_UnTrack(pump);
    pump_clear(pump);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(pump);
    Py_DECREF(type);
}

static void keep_tail(pump_t *pump, size_t size)
{
    const char *from = piece;
    if (size >= TAIL_BYTES) {
        from += size - TAIL_BYTES;
        pump->tail_bytes = 0;
        size = TAIL_BYTES;
    } else if (pump->tail_bytes + size > TAIL_BYTES) {
        /* Half of it is dropped at a time: most pieces are small, and moving costs as well. */
        size_t kept = TAIL_BYTES - size < TAIL_BYTES / 2 ? TAIL_BYTES - size : TAIL_BYTES / 2;
        if (kept > pump->tail_bytes)
            kept = pump->tail_bytes;
        memmove(pump->tail, pump->tail + pump->tail_bytes - kept, kept);
        pump->tail_bytes = kept;
    }
    memcpy(pump->tail + pump->tail_bytes, from, size);
    pump->tail_bytes += size;
}

/* Tell why it goes on elsewhere: bytes that the client did not take, bytes that are not plain, or an
 * error; nothing of these if the stream's connection ended in order. */
static PyObject *leave(pump_t *pump, Py_ssize_t begin, Py_ssize_t unsent, Py_ssize_t unread,
                       int error)
{
    if (pump->leave == NULL)
        Py_RETURN_NONE;
    PyObject *told = PyObject_CallFunction(pump->leave, "y#y#i", piece + begin, unsent, piece,
                                           unread, error);
    Py_XDECREF(told);
    if (told == NULL)
        return NULL;
    Py_RETURN_NONE;
}

/* The stream's socket can be read. */
static PyObject *pump_call(pump_t *pump, PyObject *arguments, PyObject *names)
{
    (void)arguments;
    (void)names;
    ssize_t size = recv(pump->upstream_fd, piece, PIECE_BYTES, MSG_DONTWAIT);
    if (size < 0) {
        if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)
            Py_RETURN_NONE;
        return leave(pump, 0, 0, 0, errno);
    }
    if (!are_whole_chunks(piece, (size_t)size, pump->is_event_stream))
        return leave(pump, 0, 0, size, 0);
    pump->is_heard = 1;
    pump->num_bytes += (unsigned long long)size;
    keep_tail(pump, (size_t)size);
    /* An error of the client's connection is found, and told, by whoever writes the rest. */
    ssize_t sent = send(pump->client_fd, piece, (size_t)size, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent == size)
        Py_RETURN_NONE;
    sent = sent < 0 ? 0 : sent;
    return leave(pump, sent, size - sent, 0, 0);
}

static PyObject *pump_tail(pump_t *pump, void *closure)
{
    (void)closure;
    return PyBytes_FromStringAndSize(pump->tail, (Py_ssize_t)pump->tail_bytes);
}

static PyMemberDef pump_members[] = {
    {"is_heard", T_BOOL, offsetof(pump_t, is_heard), 0, "Whether a piece came since the last look."},
    {"num_bytes", T_ULONGLONG, offsetof(pump_t, num_bytes), READONLY, "Of all pieces."},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef pump_getters[] = {
    {"tail", (getter)pump_tail, NULL, "The last bytes of the pieces.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot pump_slots[] = {
    {Py_tp_doc, "Pieces of a stream, from one socket to another, as long as they are plain."},
    {Py_tp_new, pump_new},
    {Py_tp_dealloc, pump_dealloc},
    {Py_tp_traverse, pump_traverse},
    {Py_tp_clear, pump_clear},
    {Py_tp_call, pump_call},
    {Py_tp_members, pump_members},
    {Py_tp_getset, pump_getters},
    {0, NULL},
};

static PyType_Spec pump_spec = {
    .name = "kvkeep.router.relay.plain._plain.Pump",
    .basicsize = sizeof(pump_t),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = pump_slots,
};

static int add_pump(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &pump_spec, NULL);
    if (type == NULL)
        return -1;
    int status = PyModule_AddType(module, (PyTypeObject *)type);
    Py_DECREF(type);
    return status;
}

static PyMethodDef methods[] = {
    {"plain_request", plain_request, METH_O, "Method, target, length, bytes of a plain head."},
    {"plain_response", plain_response, METH_O, "Status, length, kind, bytes of a plain head."},
    {"find_tokens", find_tokens, METH_O, "Tokens of prompt, completion, cache; -1: not said."},
    {"whole_chunks", whole_chunks, METH_VARARGS, "Whether data is whole plain chunks."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{Py_mod_exec, add_pump}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "kvkeep.router.relay.plain._plain",
    .m_doc = "Plain heads, whole chunks, and streams of them from one socket to another.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__plain(void);
PyMODINIT_FUNC PyInit__plain(void)
{
    return PyModuleDef_Init(&definition);
}
