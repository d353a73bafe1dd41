/* The compiled pass of network.py over the activations of float32 tanh neurons, (rows, n): one row for each datum.
 *
 * Two polynomials and a quotient, where library functions take five to ten times as long, and the sum over neurons that
 * reads the same values. Threads share out rows, so that no bit depends on their number.
 *
 * The function of the module takes addresses as integers and trusts them; activation.py is its only caller.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <immintrin.h>
#endif

enum { TILE = 1024, LANES = 16 };

/* tanh x = x P(y)/Q(y), y = x^2: minimax for the relative error on |x| <= 9, 2.1e-8, and 3.3e-7 with the rounding of
 * float32. From 9.02 on the tangent rounds to 1, and from 9.3 on the quotient exceeds it. Highest degree first. */
static const float P[] = {1.33545560e-08f, 2.06089983e-05f, 3.49558267e-03f, 1.33810209e-01f, 9.99999979e-01f};
static const float Q[] = {7.77651282e-07f, 3.28562615e-04f, 2.58769611e-02f, 4.67143365e-01f, 1.0f};
#define LARGEST 9.3f

/* h = tanh(h), and the sum of beta h: in float within lanes of a tile, in double over tiles.
 * NaN stays NaN: each comparison with it is false. */
static double tangents_anywhere(float *restrict h, const float *restrict beta, int64_t n)
{
    double total = 0;
    for (int64_t tile = 0; tile < n; tile += TILE) {
        int m = n - tile < TILE ? (int)(n - tile) : TILE;
        float lanes[LANES] = {0}, *a = h + tile;
        for (int i = 0; i < m; i++) {
            float x = a[i];
            x = x > LARGEST ? LARGEST : x;
            x = x < -LARGEST ? -LARGEST : x;
            float y = x * x, p = P[0], q = Q[0];
            for (int k = 1; k < 5; k++) {
                p = p * y + P[k];
                q = q * y + Q[k];
            }
            float r = x * p / q;
            r = r > 1.0f ? 1.0f : r;
            a[i] = r < -1.0f ? -1.0f : r;
        }
        if (!beta) continue;
        for (int i = 0; i < m; i++) lanes[i % LANES] += beta[tile + i] * a[i];
        for (int k = 0; k < LANES; k++) total += lanes[k];
    }
    return total;
}

#ifdef X86
/* The same with the processor's estimate of a reciprocal and one Newton step, 2^-28, in place of the division. */
__attribute__((target("avx512f"))) static double tangents_avx512(float *h, const float *beta, int64_t n)
{
    const __m512 most = _mm512_set1_ps(LARGEST), one = _mm512_set1_ps(1.0f), minus = _mm512_set1_ps(-1.0f);
    double total = 0;
    for (int64_t tile = 0; tile < n; tile += TILE) {
        int64_t end = n - tile < TILE ? n : tile + TILE;
        __m512 lanes = _mm512_setzero_ps();
        for (int64_t i = tile; i < end; i += LANES) {
            __mmask16 some = end - i < LANES ? (__mmask16)((1u << (end - i)) - 1) : (__mmask16)0xFFFF;
            /* The second operand is what min and max give where one is NaN. */
            __m512 x = _mm512_min_ps(most, _mm512_maskz_loadu_ps(some, h + i));
            x = _mm512_max_ps(_mm512_mul_ps(most, minus), x);
            __m512 y = _mm512_mul_ps(x, x), p = _mm512_set1_ps(P[0]), q = _mm512_set1_ps(Q[0]);
            for (int k = 1; k < 5; k++) {
                p = _mm512_fmadd_ps(p, y, _mm512_set1_ps(P[k]));
                q = _mm512_fmadd_ps(q, y, _mm512_set1_ps(Q[k]));
            }
            __m512 inverse = _mm512_rcp14_ps(q);
            inverse = _mm512_mul_ps(inverse, _mm512_fnmadd_ps(q, inverse, _mm512_set1_ps(2.0f)));
            __m512 r = _mm512_mul_ps(_mm512_mul_ps(x, p), inverse);
            r = _mm512_max_ps(minus, _mm512_min_ps(one, r));
            _mm512_mask_storeu_ps(h + i, some, r);
            if (beta) lanes = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(some, beta + i), r, lanes);
        }
        float each[LANES];
        _mm512_storeu_ps(each, lanes);
        for (int k = 0; k < LANES; k++) total += each[k];
    }
    return total;
}
#endif

static double (*tangents)(float *, const float *, int64_t) = tangents_anywhere;

#define POINTER(i) ((void *)(uintptr_t)PyLong_AsUnsignedLongLong(args[i]))

/* tangents(h, beta or 0, sums or 0, rows, n, threads): sums[row] is that of beta h. */
static PyObject *py_tangents(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    if (given != 6) return PyErr_Format(PyExc_TypeError, "%zd arguments given, 6 expected", given);
    float *h = POINTER(0), *beta = POINTER(1), *sums = POINTER(2);
    int64_t rows = PyLong_AsLongLong(args[3]), n = PyLong_AsLongLong(args[4]);
    int threads = (int)PyLong_AsLong(args[5]);
    if (PyErr_Occurred()) return NULL;
    Py_BEGIN_ALLOW_THREADS
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
#endif
    for (int64_t row = 0; row < rows; row++) {
        double sum = tangents(h + row * n, beta, n);
        if (sums) sums[row] = (float)sum;
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"tangents", (PyCFunction)(void (*)(void))py_tangents, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_activation", "Addresses in, numbers out; unchecked: call it through mfsde.activation.", 0,
    methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__activation(void)
{
#ifdef X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) tangents = tangents_avx512;
#endif
    return PyModuleDef_Init(&module);
}
