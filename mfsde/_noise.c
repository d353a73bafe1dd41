/* The compiled kernel of noise.py: Philox4x32-10 words, Box-Muller normals, the fused Euler and kinetic steps, and births
 * and deaths.
 *
 * Every backend evaluates the same expressions in the same order with + - * / sqrt, integer operations and selects
 * only. IEEE arithmetic then leaves one possible result, whatever the vector width, provided that nothing is
 * contracted or reassociated: compile with -ffp-contract=off, and never with -ffast-math.
 *
 * The functions of the module take addresses as integers and trust them. noise.py is their only caller; it checks
 * shapes, types and contiguity.
 *
 * The file includes itself: once for each instruction set, and in each of these once for each real type. Function
 * targets and a table do what target_clones would, without its need for ifunc (musl), and let a test compare them.
 */
#ifndef ISA

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __FAST_MATH__
#error "-ffast-math would make the noise depend on the vector width"
#endif

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
/* Inlined into the loops around them, the two inner ones run a third slower: too few registers. */
#define INNER static __attribute__((noinline))
#define ALIGNED __attribute__((aligned(64)))
#define PASTE(a, b) a##_##b
#define JOIN(a, b) PASTE(a, b)
#define OF_ISA(name) JOIN(name, ISA)
#define OF_REAL(name) JOIN(name, REAL)
#define NAME(name) OF_ISA(OF_REAL(name))

enum {
    LANE = 64,          /* consecutive particles that take the same word of their blocks */
    TILE = 4 * LANE,    /* the particles of 64 blocks */
    GROUP = 8,          /* channels generated before they are written out together: 16 kB in float64 */
    SERIAL = 16384,     /* normals that are not worth waking a thread for */
};

typedef struct {
    uint64_t seed, first_particle;
    uint32_t stream, first_replica, step, substeps;
    int64_t replicas, particles, channels;
    double scale, h;    /* scale: of the sum over the substeps; in an Euler step it includes a constant diffusion */
    uint64_t high;      /* of the integers; 0 asks for uniforms */
    void *out;          /* the values drawn, or x of a step */
    const void *drift, *diffusion;  /* the rates and their shifts, for rings */
    double decay, deviation;    /* of a kinetic step, whose h is half the step and whose force is the drift */
    void *positions;    /* to which it writes them once more, without the velocities between */
    int due;            /* whether the last kick of the step before is still to come */
    int single;         /* whether float64 values have float32 normals, widened */
} Job;

typedef void (*Worker)(const Job *job, int64_t begin, int64_t end);

/* The part of one tile that one replica needs: entries [low, high) go to rows row, row + 1, ... of the output. */
typedef struct {
    uint32_t block, replica;
    int low, high, blocks;
    int64_t row;
} Part;

INLINE int64_t tiles(const Job *job)
{
    uint64_t last = job->first_particle + (uint64_t)job->particles - 1;
    return (int64_t)(last / TILE - job->first_particle / TILE) + 1;
}

INLINE Part part(const Job *job, int64_t task, int64_t n_tiles)
{
    uint64_t first = job->first_particle, end = first + (uint64_t)job->particles;
    uint64_t tile = first / TILE + (uint64_t)(task % n_tiles), start = tile * TILE;
    Part p;
    p.replica = job->first_replica + (uint32_t)(task / n_tiles);
    p.block = (uint32_t)(tile * LANE);
    p.low = start < first ? (int)(first - start) : 0;
    p.high = end - start < TILE ? (int)(end - start) : TILE;
    p.row = task / n_tiles * job->particles + (int64_t)(start + (uint64_t)p.low - first);
    /* Whole vectors, but no more than needed: common noise has one particle. */
    p.blocks = p.high < LANE ? (p.high + 15) / 16 * 16 : LANE;
    return p;
}

/* The polynomials are minimax (Remez exchange in 60 digits, then rounded). With t in (-1, 1) and y = t^2:
 *     sin(pi t / 4) / t,            relative error 3.2e-9 (4 terms),  3.3e-18 (7 terms)
 *     (cos(pi t / 4) - 1) / y,      absolute error of the cosine 5.4e-11 (4 terms),  3.3e-20 (7 terms)
 * and for f in [sqrt(1/2) - 1, sqrt(2) - 1], the error relative to the logarithm that it enters:
 *     float32: (-2 log(1+f) + 2f - f^2) / f^3 in f, 3.9e-9 (8 terms)
 *     float64: 2 (log((1+s)/(1-s)) - 2s) / s^3 in s^2, s = f / (2+f), 4.9e-18 absolute (7 terms). */

INLINE void box_muller_float(uint32_t x, uint32_t turn, float *first, float *second)
{
    /* -2 log u, u = (x + 1/2) / 2^32. Above sqrt(1/2), f = u - 1 comes from ~x, which keeps its relative accuracy. */
    int near_one = x >= 0xB504F334u;
    uint32_t complement = near_one ? 0xFFFFFFFFu : 0u;   /* gcc gives ~x a false dependency between iterations */
    float v = (float)(x ^ complement) + 0.5f;
    int32_t bits, exponent, reduced;
    memcpy(&bits, &v, 4);
    exponent = (bits - 0x3F3504F3) >> 23;
    reduced = bits - (int32_t)((uint32_t)exponent << 23);
    float m;
    memcpy(&m, &reduced, 4);
    float f = near_one ? v * -0x1p-32f : m - 1.0f;
    float e = near_one ? 0.0f : (float)(exponent - 32);
    float p = 0x1.483938p-3f;
    p = p * f + -0x1.0bee3cp-2f;
    p = p * f + 0x1.0d2fb8p-2f;
    p = p * f + -0x1.219ab8p-2f;
    p = p * f + 0x1.545e06p-2f;
    p = p * f + -0x1.99b438p-2f;
    p = p * f + 0x1.0002b4p-1f;
    p = p * f + -0x1.55551ep-1f;
    float square = f * f;
    float r = sqrtf((square + square * (f * p) - 2.0f * f) + e * -0x1.62e430p+0f);

    /* The nearest quarter turn is taken off in integers; t is odd, so neither function is ever zero. */
    uint32_t shifted = turn + 0x20000000u, quadrant = shifted >> 30;
    int32_t odd = (int32_t)((shifted & 0x3FFFFFFFu) << 1 | 1u) - 0x40000000;
    float t = (float)odd * 0x1p-30f;
    float y = t * t;
    float s = -0x1.2d9302p-15f;
    s = s * y + 0x1.465e92p-9f;
    s = s * y + -0x1.4abbbap-4f;
    s = s * y + 0x1.921fb6p-1f;
    s = s * t;
    float c = 0x1.d9f7bcp-19f;
    c = c * y + -0x1.55c664p-12f;
    c = c * y + 0x1.03c1dep-6f;
    c = c * y + -0x1.3bd3ccp-2f;
    c = c * y;
    float along = r + r * c, across = r * s;
    float cosine = quadrant & 1 ? across : along, sine = quadrant & 1 ? along : across;
    *first = (quadrant + 1) & 2 ? -cosine : cosine;
    *second = quadrant & 2 ? -sine : sine;
}

INLINE void box_muller_double(uint32_t x, uint32_t turn, double *first, double *second)
{
    /* u = (x + 1/2) / 2^32, u - 1 and 2 + f are exact in float64; e * (2 log 2, upper part) is exact as well. */
    double u = ((double)x + 0.5) * 0x1p-32;
    uint64_t bits, reduced, biased;
    memcpy(&bits, &u, 8);
    biased = (bits + 0x00095F619980C433u) >> 52;
    reduced = bits - (biased << 52) + 0x3FF0000000000000u;
    double m, e = (double)((int32_t)biased - 1023);
    memcpy(&m, &reduced, 8);
    double f = m - 1.0;
    double s = f / (f + 2.0);
    double z = s * s;
    double p = 0x1.2f0566962d4a2p-2;
    p = p * z + 0x1.39a1ba5a0fd37p-2;
    p = p * z + 0x1.74663eecb9048p-2;
    p = p * z + 0x1.c71c520944924p-2;
    p = p * z + 0x1.24924941f1475p-1;
    p = p * z + 0x1.999999997fdb5p-1;
    p = p * z + 0x1.5555555555592p+0;
    double square = f * f;
    double r = sqrt(((square - s * (square + z * p) - 2.0 * f) - e * 0x1.473de6af278edp-33) - e * 0x1.62e42fef00000p+0);

    uint32_t shifted = turn + 0x20000000u, quadrant = shifted >> 30;
    int32_t odd = (int32_t)((shifted & 0x3FFFFFFFu) << 1 | 1u) - 0x40000000;
    double t = (double)odd * 0x1p-30;
    double y = t * t;
    double a = 0x1.e3eed63267ce0p-38;
    a = a * y + -0x1.e30063a189f6cp-30;
    a = a * y + 0x1.50782fca3a85cp-22;
    a = a * y + -0x1.32d2cce2d5383p-15;
    a = a * y + 0x1.466bc67758700p-9;
    a = a * y + -0x1.4abbce625be41p-4;
    a = a * y + 0x1.921fb54442d18p-1;
    a = a * t;
    double c = -0x1.b26fe87b03e9dp-42;
    c = c * y + 0x1.f9cc6ad036bf9p-34;
    c = c * y + -0x1.a6d1ecb740ad4p-26;
    c = c * y + 0x1.e1f50683b42d6p-19;
    c = c * y + -0x1.55d3c7e3c95bcp-12;
    c = c * y + 0x1.03c1f081b5ab0p-6;
    c = c * y + -0x1.3bd3cc9be45dep-2;
    c = c * y;
    double along = r + r * c, across = r * a;
    double cosine = quadrant & 1 ? across : along, sine = quadrant & 1 ? along : across;
    *first = (quadrant + 1) & 2 ? -cosine : cosine;
    *second = quadrant & 2 ? -sine : sine;
}

/* A uniform is u = (x + 1/2) / 2^32, exact in float64; float32 rounds it, and stays below 1 at 1 - 2^-24. */
INLINE float below_one_float(double u)
{
    float rounded = (float)u;
    return rounded < 1.0f ? rounded : 0x1.fffffep-1f;
}

INLINE double below_one_double(double u) { return u; }

#define ISA baseline
#define TARGET
#include "_noise.c"
#undef ISA
#undef TARGET

#ifdef X86
#define VECTOR_BYTES 32
#define WIDE_MULTIPLY(a, b) ((OF_ISA(Pairs))_mm256_mul_epu32((__m256i)(a), (__m256i)(b)))
#define ISA avx2
#define TARGET __attribute__((target("avx2")))
#include "_noise.c"
#undef VECTOR_BYTES
#undef WIDE_MULTIPLY
#undef ISA
#undef TARGET

#define VECTOR_BYTES 64
#define WIDE_MULTIPLY(a, b) ((OF_ISA(Pairs))_mm512_mul_epu32((__m512i)(a), (__m512i)(b)))
#define ISA avx512f
#define TARGET __attribute__((target("avx512f")))
#include "_noise.c"
#undef VECTOR_BYTES
#undef WIDE_MULTIPLY
#undef ISA
#undef TARGET
#endif

/* Indexed by the real type, float first. */
typedef struct {
    const char *name;
    void (*words)(uint32_t *, uint32_t, uint32_t, uint32_t, uint32_t, uint64_t, int);
    void (*map[2])(void *, const uint32_t *, int64_t);
    Worker normals[2], draws[2], rings[2], euler[2], kinetic[2], kick[2];
} Kernels;

#define PAIR(name, isa) {name##_float_##isa, name##_double_##isa}
#define KERNELS(isa) {#isa, words_##isa, PAIR(map, isa), PAIR(normals, isa), PAIR(draws, isa), PAIR(rings, isa), \
                      PAIR(euler, isa), \
                      PAIR(kinetic, isa), PAIR(kick, isa)}

static const Kernels all_kernels[] = {
    KERNELS(baseline),
#ifdef X86
    KERNELS(avx2),
    KERNELS(avx512f),
#endif
};

enum { N_KERNELS = sizeof all_kernels / sizeof all_kernels[0] };

static const Kernels *kernels = all_kernels;

static int usable(int i)
{
#ifdef X86
    __builtin_cpu_init();
    if (i == 1) return __builtin_cpu_supports("avx2") != 0;
    if (i == 2) return __builtin_cpu_supports("avx512f") != 0;
#endif
    return i == 0;
}

static void run(Worker work, const Job *job, int threads)
{
    int64_t tasks = job->replicas * tiles(job);
    int64_t normals = job->replicas * job->particles * job->channels * job->substeps;
    if (normals < SERIAL) threads = 1;
    if (tasks < threads) threads = (int)tasks;
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int i = 0; i < threads; i++) work(job, tasks * i / threads, tasks * (i + 1) / threads);
        return;
    }
#endif
    work(job, 0, tasks);
}

/* Arguments are read in order; an error is remembered until the last one is read. */
typedef struct {
    PyObject *const *next;
    int failed;
} Arguments;

static uint64_t integer(Arguments *a)
{
    uint64_t value = PyLong_AsUnsignedLongLong(*a->next++);
    if (value == (uint64_t)-1 && PyErr_Occurred()) a->failed = 1;
    return value;
}

static double real(Arguments *a)
{
    double value = PyFloat_AsDouble(*a->next++);
    if (value == -1.0 && PyErr_Occurred()) a->failed = 1;
    return value;
}

static void *address(Arguments *a) { return (void *)(uintptr_t)integer(a); }

static int counted(Py_ssize_t given, Py_ssize_t expected)
{
    if (given == expected) return 1;
    PyErr_Format(PyExc_TypeError, "%zd arguments given, %zd expected", given, expected);
    return 0;
}

static PyObject *launch(Arguments *a, Worker work, const Job *job, int threads)
{
    if (a->failed) return NULL;
    Py_BEGIN_ALLOW_THREADS
    run(work, job, threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* 0: float32, 1: float64, 2: float64 of float32 normals; the index of the real type */
static int read_type(Arguments *a, Job *job)
{
    uint64_t type = integer(a);
    job->single = type == 2;
    return type != 0;
}

static void read_key(Arguments *a, Job *job)
{
    job->seed = integer(a);
    job->stream = (uint32_t)integer(a);
    job->step = (uint32_t)integer(a);
    job->substeps = (uint32_t)integer(a);
}

static void read_shape(Arguments *a, Job *job)
{
    job->replicas = (int64_t)integer(a);
    job->particles = (int64_t)integer(a);
    job->channels = (int64_t)integer(a);
}

/* normals(out, type, seed, stream, step, substeps, R, N, m, first_replica, first_particle, scale, threads) */
static PyObject *py_normals(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    if (!counted(n, 13)) return NULL;
    Arguments a = {args, 0};
    Job job = {0};
    job.out = address(&a);
    int real_type = read_type(&a, &job);
    read_key(&a, &job);
    read_shape(&a, &job);
    job.first_replica = (uint32_t)integer(&a);
    job.first_particle = integer(&a);
    job.scale = real(&a);
    int threads = (int)integer(&a);
    return launch(&a, kernels->normals[real_type], &job, threads);
}

/* draws(out, float64, seed, stream, step, substeps, R, N, m, first_replica, first_particle, high, threads) */
static PyObject *py_draws(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    if (!counted(n, 13)) return NULL;
    Arguments a = {args, 0};
    Job job = {0};
    job.out = address(&a);
    int real_type = integer(&a) != 0;
    read_key(&a, &job);
    read_shape(&a, &job);
    job.first_replica = (uint32_t)integer(&a);
    job.first_particle = integer(&a);
    job.high = integer(&a);
    int threads = (int)integer(&a);
    return launch(&a, kernels->draws[real_type], &job, threads);
}

/* rings(out, float64, seed, stream, step, R, N, rate, shift, h, threads): bytes, 1 where |h rate + shift| exceeds the half
 * of a word of channel 0; returns their number */
static PyObject *py_rings(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    if (!counted(n, 11)) return NULL;
    Arguments a = {args, 0};
    Job job = {0};
    job.out = address(&a);
    int real_type = integer(&a) != 0;
    job.seed = integer(&a);
    job.stream = (uint32_t)integer(&a);
    job.step = (uint32_t)integer(&a);
    job.replicas = (int64_t)integer(&a);
    job.high = integer(&a);
    job.particles = ((int64_t)job.high + 2 * TILE - 1) / (2 * TILE) * TILE;
    job.channels = job.substeps = 1;
    job.drift = address(&a);
    job.diffusion = address(&a);
    job.h = real(&a);
    int threads = (int)integer(&a);
    if (a.failed) return NULL;
    int64_t count = 0, total = job.replicas * (int64_t)job.high;
    const uint8_t *flags = job.out;
    Py_BEGIN_ALLOW_THREADS
    run(kernels->rings[real_type], &job, threads);
    for (int64_t start = 0; start < total; start += 255) {
        /* Bytes are added in a vector; 255 of them fit. */
        int64_t end = start + 255 < total ? start + 255 : total;
        uint8_t some = 0;
        for (int64_t i = start; i < end; i++) some = (uint8_t)(some + flags[i]);
        count += some;
    }
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(count);
}

/* positions(out, flags, n): where the bytes are 1, in order */
static PyObject *py_positions(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    if (!counted(n, 3)) return NULL;
    Arguments a = {args, 0};
    int64_t *out = address(&a);
    const uint8_t *flags = address(&a);
    int64_t total = (int64_t)integer(&a), i = 0;
    if (a.failed) return NULL;
    while (i < total) {
        uint64_t eight = 0;
        if (total - i >= 8) memcpy(&eight, flags + i, 8);
        int64_t end = total - i >= 8 ? i + 8 : total;
        if (eight == 0 && end == i + 8) {
            i = end;
            continue;
        }
        for (; i < end; i++)
            if (flags[i]) *out++ = i;
    }
    Py_RETURN_NONE;
}

/* assign(slots, bytes, target, source, n): slot target[k] <- slot source[k], k = 0, 1, ... one by one */
static PyObject *py_assign(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    if (!counted(n, 5)) return NULL;
    Arguments a = {args, 0};
    char *slots = address(&a);
    int64_t bytes = (int64_t)integer(&a);
    const int64_t *target = address(&a), *source = address(&a);
    int64_t count = (int64_t)integer(&a);
    if (a.failed) return NULL;
    for (int64_t k = 0; k < count; k++) memcpy(slots + target[k] * bytes, slots + source[k] * bytes, (size_t)bytes);
    Py_RETURN_NONE;
}

/* euler(x, type, seed, stream, step, substeps, R, N, d, drift, diffusion or 0, h, scale, threads) */
static PyObject *py_euler(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    if (!counted(n, 14)) return NULL;
    Arguments a = {args, 0};
    Job job = {0};
    job.out = address(&a);
    int real_type = read_type(&a, &job);
    read_key(&a, &job);
    read_shape(&a, &job);
    job.drift = address(&a);
    job.diffusion = address(&a);
    job.h = real(&a);
    job.scale = real(&a);
    int threads = (int)integer(&a);
    return launch(&a, kernels->euler[real_type], &job, threads);
}

/* kinetic(x, type, seed, stream, step, substeps, R, N, d, force, positions, half, decay, deviation, due, scale,
 * threads): B A O A of the state x (R, N, 2d), after B if due; its positions also to (R, N, d) */
static PyObject *py_kinetic(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    if (!counted(n, 17)) return NULL;
    Arguments a = {args, 0};
    Job job = {0};
    job.out = address(&a);
    int real_type = read_type(&a, &job);
    read_key(&a, &job);
    read_shape(&a, &job);
    job.drift = address(&a);
    job.positions = address(&a);
    job.h = real(&a);
    job.decay = real(&a);
    job.deviation = real(&a);
    job.due = integer(&a) != 0;
    job.scale = real(&a);
    int threads = (int)integer(&a);
    return launch(&a, kernels->kinetic[real_type], &job, threads);
}

/* kick(x, float64, n, d, force, half, threads): B of the state x (n, 2d) */
static PyObject *py_kick(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    if (!counted(n, 7)) return NULL;
    Arguments a = {args, 0};
    Job job = {0};
    job.out = address(&a);
    int real_type = integer(&a) != 0;
    job.replicas = job.substeps = 1;
    job.particles = (int64_t)integer(&a);
    job.channels = (int64_t)integer(&a);
    job.drift = address(&a);
    job.h = real(&a);
    int threads = (int)integer(&a);
    return launch(&a, kernels->kick[real_type], &job, threads);
}

/* words(out, block, stream << 16 | channel, step, replica, seed): the 256 words of 64 consecutive blocks */
static PyObject *py_words(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    if (!counted(n, 6)) return NULL;
    Arguments a = {args, 0};
    uint32_t *out = address(&a), counter[4];
    for (int i = 0; i < 4; i++) counter[i] = (uint32_t)integer(&a);
    uint64_t seed = integer(&a);
    if (a.failed) return NULL;
    kernels->words(out, counter[0], counter[1], counter[2], counter[3], seed, LANE);
    Py_RETURN_NONE;
}

/* box_muller(out, float64, words, n): words (2, n) to normals (2, n) */
static PyObject *py_box_muller(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    if (!counted(n, 4)) return NULL;
    Arguments a = {args, 0};
    void *out = address(&a);
    int real_type = integer(&a) != 0;
    const uint32_t *words = address(&a);
    int64_t count = (int64_t)integer(&a);
    if (a.failed) return NULL;
    kernels->map[real_type](out, words, count);
    Py_RETURN_NONE;
}

/* instruction_sets(): those that this processor has, the widest last; it is the one in use */
static PyObject *py_instruction_sets(PyObject *self, PyObject *unused)
{
    PyObject *names = PyList_New(0);
    for (int i = 0; names && i < N_KERNELS; i++) {
        if (!usable(i)) continue;
        PyObject *name = PyUnicode_FromString(all_kernels[i].name);
        if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

/* use(index): one of instruction_sets(), by its position */
static PyObject *py_use(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    if (!counted(n, 1)) return NULL;
    Arguments a = {args, 0};
    uint64_t wanted = integer(&a);
    if (a.failed) return NULL;
    for (int i = 0; i < N_KERNELS; i++) {
        if (usable(i) && wanted-- == 0) {
            kernels = all_kernels + i;
            Py_RETURN_NONE;
        }
    }
    PyErr_SetString(PyExc_ValueError, "no such instruction set on this processor");
    return NULL;
}

#define FAST(function) (PyCFunction)(void (*)(void))function, METH_FASTCALL, NULL

static PyMethodDef methods[] = {
    {"normals", FAST(py_normals)},
    {"draws", FAST(py_draws)},
    {"rings", FAST(py_rings)},
    {"positions", FAST(py_positions)},
    {"assign", FAST(py_assign)},
    {"euler", FAST(py_euler)},
    {"kinetic", FAST(py_kinetic)},
    {"kick", FAST(py_kick)},
    {"words", FAST(py_words)},
    {"box_muller", FAST(py_box_muller)},
    {"instruction_sets", py_instruction_sets, METH_NOARGS, NULL},
    {"use", FAST(py_use)},
    {NULL, NULL, 0, NULL},
};

static int prepare(PyObject *module)
{
    for (int i = 0; i < N_KERNELS; i++)
        if (usable(i)) kernels = all_kernels + i;
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, prepare}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_noise", "Addresses in, numbers out; unchecked: call it through mfsde.noise.", 0, methods,
    slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__noise(void) { return PyModuleDef_Init(&definition); }

#elif !defined(REAL)

/* words[64 k + j] is word k of block + j.
 *
 * Philox4x32-10: Salmon, Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011. */
#ifdef VECTOR_BYTES

/* Two words share a 64-bit element, because the only vector multiplication of 32-bit words with a 64-bit product takes
 * the even ones. The compiler does not find this form by itself; it is worth a factor two on Philox. */
typedef uint64_t OF_ISA(Pairs) __attribute__((vector_size(VECTOR_BYTES)));

INNER TARGET void OF_ISA(words)(uint32_t *words, uint32_t block, uint32_t second, uint32_t step, uint32_t replica,
                                uint64_t seed, int blocks)
{
    const uint64_t both = (uint64_t)1 << 32 | 1, low = 0xFFFFFFFFu;
    const OF_ISA(Pairs) zero = {0}, m0 = zero + 0xD2511F53u, m1 = zero + 0xCD9E8D57u;
    uint32_t counter[LANE] ALIGNED;
    for (int j = 0; j < LANE; j++) counter[j] = block + (uint32_t)j;
    for (int j = 0; j < blocks; j += VECTOR_BYTES / 4) {
        uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
        OF_ISA(Pairs) w0, w1 = zero + second * both, w2 = zero + step * both, w3 = zero + replica * both;
        memcpy(&w0, counter + j, VECTOR_BYTES);
        for (int round = 0; round < 10; round++) {
            OF_ISA(Pairs) a = WIDE_MULTIPLY(w0, m0), a_odd = WIDE_MULTIPLY(w0 >> 32, m0);
            OF_ISA(Pairs) b = WIDE_MULTIPLY(w2, m1), b_odd = WIDE_MULTIPLY(w2 >> 32, m1);
            w0 = (b >> 32 | (b_odd & ~low)) ^ w1 ^ k0 * both;
            w1 = (b & low) | b_odd << 32;
            w2 = (a >> 32 | (a_odd & ~low)) ^ w3 ^ k1 * both;
            w3 = (a & low) | a_odd << 32;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        memcpy(words + j, &w0, VECTOR_BYTES);
        memcpy(words + LANE + j, &w1, VECTOR_BYTES);
        memcpy(words + 2 * LANE + j, &w2, VECTOR_BYTES);
        memcpy(words + 3 * LANE + j, &w3, VECTOR_BYTES);
    }
}

#else

INNER TARGET void OF_ISA(words)(uint32_t *restrict words, uint32_t block, uint32_t second, uint32_t step,
                                uint32_t replica, uint64_t seed, int blocks)
{
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    uint32_t *restrict w0 = words, *restrict w1 = words + LANE, *restrict w2 = words + 2 * LANE;
    uint32_t *restrict w3 = words + 3 * LANE;
    for (int j = 0; j < blocks; j++) {
        w0[j] = block + (uint32_t)j;
        w1[j] = second;
        w2[j] = step;
        w3[j] = replica;
    }
    for (int round = 0; round < 10; round++) {
        for (int j = 0; j < blocks; j++) {
            uint64_t a = (uint64_t)w0[j] * 0xD2511F53u, b = (uint64_t)w2[j] * 0xCD9E8D57u;
            w0[j] = (uint32_t)(b >> 32) ^ w1[j] ^ k0;
            w1[j] = (uint32_t)b;
            w2[j] = (uint32_t)(a >> 32) ^ w3[j] ^ k1;
            w3[j] = (uint32_t)a;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

#endif

INLINE TARGET void OF_ISA(part_words)(uint32_t *words, const Job *job, const Part *p, int64_t channel, uint32_t step)
{
    OF_ISA(words)(words, p->block, job->stream << 16 | (uint32_t)channel, step, p->replica, job->seed, p->blocks);
}

#define REAL float
#include "_noise.c"
#undef REAL
#define REAL double
#include "_noise.c"
#undef REAL

#else /* for one instruction set and one real type */

/* Words stride apart to normals stride apart. */
INNER TARGET void NAME(pairs)(REAL *restrict z, const uint32_t *restrict words, int64_t stride, int64_t n)
{
    for (int64_t j = 0; j < n; j++) OF_REAL(box_muller)(words[j], words[stride + j], z + j, z + stride + j);
}

static TARGET void NAME(map)(void *out, const uint32_t *words, int64_t n) { NAME(pairs)(out, words, n, n); }

INLINE TARGET void NAME(tile)(REAL *z, const Job *job, const Part *p, int64_t channel, uint32_t step)
{
    uint32_t words[TILE] ALIGNED;
    OF_ISA(part_words)(words, job, p, channel, step);
    if (job->single) {
        float narrow[TILE] ALIGNED;
        for (int half = 0; half < TILE; half += 2 * LANE)
            OF_ISA(pairs_float)(narrow + half, words + half, LANE, p->blocks);
        for (int i = 0; i < p->high; i++) z[i] = (REAL)narrow[i];
        return;
    }
    for (int half = 0; half < TILE; half += 2 * LANE) NAME(pairs)(z + half, words + half, LANE, p->blocks);
}

/* z[i] = sum over the substeps, in their order */
INLINE TARGET void NAME(substeps)(REAL *restrict z, const Job *job, const Part *p, int64_t channel)
{
    NAME(tile)(z, job, p, channel, job->step);
    for (uint32_t j = 1; j < job->substeps; j++) {
        REAL next[TILE] ALIGNED;
        NAME(tile)(next, job, p, channel, job->step + j);
        for (int i = 0; i < p->high; i++) z[i] += next[i];
    }
}

/* A perfect shuffle: from the halves of one array in turn. */
INNER TARGET void NAME(riffle)(REAL *restrict to, const REAL *restrict from, int half)
{
    for (int i = 0; i < half; i++) {
        to[2 * i] = from[i];
        to[2 * i + 1] = from[half + i];
    }
}

INLINE TARGET void NAME(transpose)(REAL *restrict rows, const REAL *restrict z, int g, int n)
{
    for (int i = 0; i < n; i++)
        for (int c = 0; c < g; c++) rows[i * g + c] = z[c * TILE + i];
}

/* z (g, TILE) to rows of g values; returns the row p->low. Either buffer may hold the result. */
INLINE TARGET const REAL *NAME(interleave)(REAL *z, REAL *rows, int g, const Part *p)
{
    if (p->high > LANE && (g & (g - 1)) == 0) {
        /* log2 g perfect shuffles transpose g rows, and are the one form of it that compilers do well. */
        for (int done = 1; done < g; done *= 2) {
            NAME(riffle)(rows, z, g * TILE / 2);
            REAL *shuffled = rows;
            rows = z;
            z = shuffled;
        }
        return z + p->low * g;
    }
    if (g == 1) return z + p->low;
    z += p->low;
    int n = p->high - p->low;
    /* A constant g lets the compiler shuffle instead of scatter. */
    switch (g) {
    case 3: NAME(transpose)(rows, z, 3, n); break;
    case 5: NAME(transpose)(rows, z, 5, n); break;
    case 6: NAME(transpose)(rows, z, 6, n); break;
    case 7: NAME(transpose)(rows, z, 7, n); break;
    default: NAME(transpose)(rows, z, g, n);
    }
    return rows;
}

/* Rows of g values to g of the m columns of a matrix. */
INLINE TARGET void NAME(write)(REAL *restrict out, const REAL *restrict rows, int64_t m, int g, int n)
{
    if (g == m) memcpy(out, rows, (size_t)n * (size_t)g * sizeof(REAL));
    else if (g == GROUP)
        for (int i = 0; i < n; i++) memcpy(out + i * m, rows + i * GROUP, GROUP * sizeof(REAL));
    else
        for (int i = 0; i < n; i++)
            for (int c = 0; c < g; c++) out[i * m + c] = rows[i * g + c];
}

static TARGET void NAME(normals)(const Job *job, int64_t begin, int64_t end)
{
    REAL z[GROUP * TILE] ALIGNED, spare[GROUP * TILE] ALIGNED;
    const REAL scale = (REAL)job->scale;
    const int64_t n_tiles = tiles(job), m = job->channels;
    for (int64_t task = begin; task < end; task++) {
        Part p = part(job, task, n_tiles);
        for (int64_t channel = 0; channel < m; channel += GROUP) {
            int g = m - channel < GROUP ? (int)(m - channel) : GROUP;
            for (int c = 0; c < g; c++) NAME(substeps)(z + c * TILE, job, &p, channel + c);
            if (job->substeps > 1)
                for (int c = 0; c < g; c++)
                    for (int i = p.low; i < p.high; i++) z[c * TILE + i] *= scale;
            const REAL *rows = NAME(interleave)(z, spare, g, &p);
            NAME(write)((REAL *)job->out + p.row * m + channel, rows, m, g, p.high - p.low);
        }
    }
}

/* x + (h b + c z), c = scale or scale * diffusion: every product and sum is rounded once, in this order.
 *
 * No restrict: the drift or the diffusion may be x itself, entry by entry, which ivdep allows. */
INLINE TARGET void NAME(advance)(REAL *x, const REAL *b, const REAL *diffusion, const REAL *z, REAL h, REAL scale,
                                 int64_t n)
{
    if (diffusion) {
#pragma GCC ivdep
        for (int64_t i = 0; i < n; i++) x[i] = x[i] + (h * b[i] + (scale * diffusion[i]) * z[i]);
    } else {
#pragma GCC ivdep
        for (int64_t i = 0; i < n; i++) x[i] = x[i] + (h * b[i] + scale * z[i]);
    }
}

static TARGET void NAME(euler)(const Job *job, int64_t begin, int64_t end)
{
    REAL z[GROUP * TILE] ALIGNED, spare[GROUP * TILE] ALIGNED;
    const REAL h = (REAL)job->h, scale = (REAL)job->scale;
    const int64_t n_tiles = tiles(job), d = job->channels;
    for (int64_t task = begin; task < end; task++) {
        Part p = part(job, task, n_tiles);
        for (int64_t channel = 0; channel < d; channel += GROUP) {
            int g = d - channel < GROUP ? (int)(d - channel) : GROUP, n = p.high - p.low;
            for (int c = 0; c < g; c++) NAME(substeps)(z + c * TILE, job, &p, channel + c);
            const REAL *rows = NAME(interleave)(z, spare, g, &p);
            int64_t offset = p.row * d + channel;
            REAL *x = (REAL *)job->out + offset;
            const REAL *b = (const REAL *)job->drift + offset;
            const REAL *field = job->diffusion ? (const REAL *)job->diffusion + offset : NULL;
            if (g == d) {
                NAME(advance)(x, b, field, rows, h, scale, n * d);
                continue;
            }
            for (int i = 0; i < n; i++, x += d, b += d, rows += g) {
                if (g == GROUP) NAME(advance)(x, b, field, rows, h, scale, GROUP);
                else NAME(advance)(x, b, field, rows, h, scale, g);
                if (field) field += d;
            }
        }
    }
}

/* B A O A, every product and sum rounded once: v + half F (twice if the last step's B is due), q + half v,
 * decay v + deviation w, q + half v. Rows of x hold d positions and d velocities. */
INLINE TARGET void NAME(glide_rows)(REAL *x, REAL *positions, const REAL *force, const REAL *w, const Job *job, int due, int64_t d, int g, int n)
{
    const REAL half = (REAL)job->h, decay = (REAL)job->decay, deviation = (REAL)job->deviation;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; i++) {
#pragma GCC ivdep
        for (int c = 0; c < g; c++) {
            REAL push = half * force[i * d + c], v = x[2 * i * d + d + c] + push;
            if (due) v = v + push;
            REAL q = x[2 * i * d + c] + half * v;
            v = decay * v + deviation * w[i * g + c];
            q = q + half * v;
            x[2 * i * d + c] = q;
            x[2 * i * d + d + c] = v;
            positions[i * d + c] = q;
        }
    }
}

/* Constants let the compiler shuffle instead of gather. */
#define GLIDE(due, d, g) NAME(glide_rows)(x, positions, force, w, job, due, d, g, n)
INNER TARGET void NAME(glide)(REAL *x, REAL *positions, const REAL *force, const REAL *w, const Job *job, int g, int n)
{
    int64_t d = job->channels;
    switch (d * 2 + job->due) {
    case 2: GLIDE(0, 1, 1); return;
    case 3: GLIDE(1, 1, 1); return;
    case 4: GLIDE(0, 2, 2); return;
    case 5: GLIDE(1, 2, 2); return;
    case 6: GLIDE(0, 3, 3); return;
    case 7: GLIDE(1, 3, 3); return;
    case 8: GLIDE(0, 4, 4); return;
    case 9: GLIDE(1, 4, 4); return;
    }
    if (g == GROUP && job->due) GLIDE(1, d, GROUP);
    else if (g == GROUP) GLIDE(0, d, GROUP);
    else if (job->due) GLIDE(1, d, g);
    else GLIDE(0, d, g);
}
#undef GLIDE

static TARGET void NAME(kinetic)(const Job *job, int64_t begin, int64_t end)
{
    REAL z[GROUP * TILE] ALIGNED, spare[GROUP * TILE] ALIGNED;
    const REAL scale = (REAL)job->scale;
    const int64_t n_tiles = tiles(job), d = job->channels;
    for (int64_t task = begin; task < end; task++) {
        Part p = part(job, task, n_tiles);
        int n = p.high - p.low;
        REAL *x = (REAL *)job->out + p.row * 2 * d, *positions = (REAL *)job->positions + p.row * d;
        const REAL *force = (const REAL *)job->drift + p.row * d;
        for (int64_t channel = 0; channel < d; channel += GROUP) {
            int g = d - channel < GROUP ? (int)(d - channel) : GROUP;
            for (int c = 0; c < g; c++) NAME(substeps)(z + c * TILE, job, &p, channel + c);
            if (job->substeps > 1)
                for (int c = 0; c < g; c++)
                    for (int i = p.low; i < p.high; i++) z[c * TILE + i] *= scale;
            const REAL *w = NAME(interleave)(z, spare, g, &p);
            NAME(glide)(x + channel, positions + channel, force + channel, w, job, g, n);
        }
    }
}

INLINE TARGET void NAME(kick_rows)(REAL *restrict x, const REAL *restrict force, REAL half, int64_t d, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        for (int64_t c = 0; c < d; c++) x[i * 2 * d + d + c] = x[i * 2 * d + d + c] + half * force[i * d + c];
}

/* v + half F */
static TARGET void NAME(kick)(const Job *job, int64_t begin, int64_t end)
{
    const int64_t d = job->channels, first = begin * TILE;
    const int64_t n = (end * TILE < job->particles ? end * TILE : job->particles) - first;
    REAL *x = (REAL *)job->out + first * 2 * d;
    const REAL *force = (const REAL *)job->drift + first * d;
    switch (d) {
    case 1: NAME(kick_rows)(x, force, (REAL)job->h, 1, n); break;
    case 2: NAME(kick_rows)(x, force, (REAL)job->h, 2, n); break;
    case 3: NAME(kick_rows)(x, force, (REAL)job->h, 3, n); break;
    default: NAME(kick_rows)(x, force, (REAL)job->h, d, n);
    }
}

static TARGET void NAME(draws)(const Job *job, int64_t begin, int64_t end)
{
    uint32_t words[TILE] ALIGNED;
    const int64_t n_tiles = tiles(job), m = job->channels;
    for (int64_t task = begin; task < end; task++) {
        Part p = part(job, task, n_tiles);
        for (int64_t channel = 0; channel < m; channel++) {
            OF_ISA(part_words)(words, job, &p, channel, job->step);
            int64_t offset = p.row * m + channel;
            for (int i = p.low; i < p.high; i++, offset += m) {
                if (job->high)
                    ((int64_t *)job->out)[offset] = (int64_t)(words[i] * job->high >> 32);
                else
                    ((REAL *)job->out)[offset] = OF_REAL(below_one)(((double)words[i] + 0.5) * 0x1p-32);
            }
        }
    }
}

/* Whether x < 2^16 |h rate + shift|, x the lower or the upper half of a word; product and sum are rounded once. */
INNER TARGET void NAME(below)(uint8_t *restrict out, const REAL *restrict rate, const uint32_t *restrict words, int upper,
                              REAL h, REAL shift, int n)
{
    int32_t flags[TILE] ALIGNED;    /* compilers do not narrow and compare in one vector loop */
    const uint32_t bits = upper ? 16 : 0;
    for (int i = 0; i < n; i++) {
        REAL level = (REAL)0x1p16 * (h * rate[i] + shift), x = (REAL)(int32_t)(words[i] >> bits & 0xFFFFu);
        flags[i] = x < (level < 0 ? -level : level);
    }
    for (int i = 0; i < n; i++) out[i] = (uint8_t)flags[i];
}

/* A word for two particles, 256 apart: the job's particles are the words, high is their number. */
static TARGET void NAME(rings)(const Job *job, int64_t begin, int64_t end)
{
    uint32_t words[TILE] ALIGNED;
    const int64_t n_tiles = tiles(job), n = (int64_t)job->high;
    for (int64_t task = begin; task < end; task++) {
        Part p = part(job, task, n_tiles);
        OF_ISA(part_words)(words, job, &p, 0, job->step);
        int64_t replica = task / n_tiles, row = task % n_tiles * 2 * TILE;
        REAL h = (REAL)job->h, shift = ((const REAL *)job->diffusion)[replica];
        for (int upper = 0; upper < 2; upper++, row += TILE) {
            int64_t left = n - row < TILE ? n - row : TILE, at = replica * n + row;
            NAME(below)((uint8_t *)job->out + at, (const REAL *)job->drift + at, words, upper, h, shift, (int)left);
        }
    }
}

#endif
