/* The compiled activation of network.py: the hyperbolic tangent of float32 arrays, in place.
 *
 * Two polynomials and a division, where library functions take five to ten times as long. The function of the module
 * takes an address as an integer and trusts it; network.py is its only caller.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

/* A clone for each instruction set needs ifunc, which glibc has. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

enum { PIECE = 1 << 14 };   /* values that a thread takes at a time */

/* x P(y)/Q(y), y = x^2: minimax for the relative error on |x| <= 9, 2.1e-8, and 3.3e-7 with the rounding of float32.
 * From 9.02 on the tangent rounds to 1, and from 9.3 on the quotient exceeds it. NaN stays NaN: each comparison with it
 * is false. */
CLONES static void tangents(float *restrict values, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        float x = values[i];
        x = x > 9.3f ? 9.3f : x;
        x = x < -9.3f ? -9.3f : x;
        float y = x * x;
        float p = 1.33545560e-08f;
        p = p * y + 2.06089983e-05f;
        p = p * y + 3.49558267e-03f;
        p = p * y + 1.33810209e-01f;
        p = p * y + 9.99999979e-01f;
        float q = 7.77651282e-07f;
        q = q * y + 3.28562615e-04f;
        q = q * y + 2.58769611e-02f;
        q = q * y + 4.67143365e-01f;
        q = q * y + 1.0f;
        float r = x * p / q;
        r = r > 1.0f ? 1.0f : r;
        values[i] = r < -1.0f ? -1.0f : r;
    }
}

/* tanh_(values, n, threads) */
static PyObject *py_tanh(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    if (given != 3) return PyErr_Format(PyExc_TypeError, "%zd arguments given, 3 expected", given);
    float *values = (float *)(uintptr_t)PyLong_AsUnsignedLongLong(args[0]);
    int64_t n = PyLong_AsLongLong(args[1]), threads = PyLong_AsLongLong(args[2]);
    if (PyErr_Occurred()) return NULL;
    int64_t pieces = (n + PIECE - 1) / PIECE;
    if (threads > pieces) threads = pieces;
    Py_BEGIN_ALLOW_THREADS
    if (threads <= 1) tangents(values, n);
#ifdef _OPENMP
    else {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t k = 0; k < pieces; k++)
            tangents(values + k * PIECE, k == pieces - 1 ? n - k * PIECE : PIECE);
    }
#else
    else tangents(values, n);
#endif
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"tanh_", (PyCFunction)(void (*)(void))py_tanh, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_activation", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__activation(void) { return PyModule_Create(&module); }
