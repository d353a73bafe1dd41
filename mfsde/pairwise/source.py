"""C for the sums of one kernel: rows in blocks, atoms in tiles, single precision inside a tile, double between tiles.

Every row of a block runs the same operations in the same order on the same tiles, multiply-adds are written out, and
contraction is left to nobody: so a row's bits depend on its point and the atoms only, not on its block or thread.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from . import expression as ex
from .expression import Expression
from .trace import Trace

TILE = 1024
# Rows side by side share the atoms that are read and hide latencies, while sums and points fit the registers.
ROWS, REGISTERS = 4, 16
# Kernels of more operations than this gain nothing from more than two.
LARGE = 48

# 2^r = 1 + r q(r) on [-1/2, 1/2]: minimax coefficients of q, relative error 9e-8 and 3e-18.
_EXP2 = {
    torch.float32: (
        "0.69314697760021691786f",
        "0.24022242085729485772f",
        "0.055507337417843030982f",
        "0.0096715126248521181681f",
        "0.0013264727611782230439f",
    ),
    torch.float64: (
        "0.6931471805599453258",
        "0.2402265069591013126",
        "0.055504108664820083268",
        "0.0096181291075942201503",
        "0.0013333558146774611079",
        "0.00015403530457111887113",
        "0.000015252733493136247267",
        "1.3215435282409788228e-6",
        "1.0178199568333082488e-7",
        "7.0737832313174615438e-9",
        "4.434771806479267299e-10",
    ),
}

# log₂ m = s R(s²), s = (m - 1)/(m + 1), on [√½, √2]: minimax coefficients of R, relative error 7e-10 and 8e-21.
_LOG2 = {
    torch.float32: (
        "2.885390079788926709f",
        "0.96179884764174293401f",
        "0.57671438396246790101f",
        "0.43173587920703855297f",
    ),
    torch.float64: (
        "2.8853900817779268147",
        "0.96179669392597548465",
        "0.57707801635569405916",
        "0.41219858307332787825",
        "0.32059890455649097264",
        "0.26230754653220563648",
        "0.22198986913983030132",
        "0.19113796131772272808",
        "0.19134264284064209204",
    ),
}

# What the bits of numbers are like. Adding 1.5 · 2^mantissa leaves the nearest whole number in the low bits of the sum.
_BITS = {
    torch.float32: {
        "s": "f",
        "low": "-126.0",
        "high": "127.5",
        "magic": "12582912.0",
        "mantissa": "23",
        "one": "0x3f800000u",
        "root": "0x3f3504f3u",
        "normal": "0x1p-126f",
        "lift": "0x1p25f",
        "lifted": "25.0f",
    },
    torch.float64: {
        "s": "",
        "low": "-1022.0",
        "high": "1023.5",
        "magic": "6755399441055744.0",
        "mantissa": "52",
        "one": "0x3ff0000000000000ull",
        "root": "0x3fe6a09e667f3bcdull",
        "normal": "0x1p-1022",
        "lift": "0x1p54",
        "lifted": "54.0",
    },
}

# Functions of the mathematical library; its vector forms are declared where the library has them.
_LIBRARY = ("expm1", "log1p", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "erf", "erfc")
_LIBRARY_OF_TWO = ("pow", "atan2")
_BUILTIN = {"abs": "fabs", "floor": "floor", "ceil": "ceil", "round": "rint", "trunc": "trunc", "sqrt": "sqrt"}
_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}

_HEAD = """\
#include <stdint.h>
#include <string.h>

#ifdef __FMA__
#define FMA(a, b, c) __builtin_fma{s}(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif
#ifdef VECTOR_MATH
#define LIBRARY extern __attribute__((simd("notinbranch"), const, nothrow, leaf))
#else
#define LIBRARY extern __attribute__((const, nothrow, leaf))
#endif
typedef {real} real;
typedef {integer} integer;
typedef {unsigned} bits;
"""

_EXP = """
/* 2^y: 0 below the exponents of normal numbers, infinity above them; NaN stays. */
static inline __attribute__((always_inline)) real exp2_(real y, const int any_sign)
{{
    const real shifted = y + (real){magic}, whole = shifted - (real){magic}, r = y - whole;
    real p = {last};
    {steps}
    p = FMA(p, r, (real)1);
    bits exponent;
    memcpy(&exponent, &shifted, sizeof exponent);
    exponent = (exponent << {mantissa}) + {one};
    real scale;
    memcpy(&scale, &exponent, sizeof scale);
    const real value = p * scale, above = y < (real){low} ? (real)0 : value;
    return any_sign && y > (real){high} ? __builtin_inf{s}() : above;
}}
"""

_LOG = """
/* log2 x: -infinity at 0, NaN below it, infinity at infinity; NaN stays. */
static inline __attribute__((always_inline)) real log2_(real x, const int any_size)
{{
    const int is_small = any_size && x < {normal};
    const real lifted = is_small ? x * {lift} : x;
    bits b;
    memcpy(&b, &lifted, sizeof b);
    const integer exponent = (integer)(b - {root}) >> {mantissa};
    b -= (bits)exponent << {mantissa};
    real m;
    memcpy(&m, &b, sizeof m);
    const real s = (m - 1) / (m + 1), u = s * s, e = (real)exponent - (is_small ? {lifted} : (real)0);
    real p = {last};
    {steps}
    const real value = FMA(s, p, e), below = x == 0 ? -__builtin_inf{s}() : __builtin_nan{s}("");
    const real finite = !any_size || x > 0 ? value : below;
    return x < __builtin_inf{s}() ? finite : x;
}}
"""


@dataclass(frozen=True)
class Form:
    """What a library is made for besides its kernel.

    period: lengths of the torus, infinite on a line; weighted: atoms have masses of their own; own: rows leave one out.
    """

    dtype: torch.dtype
    period: tuple[float, ...]
    weighted: bool
    own: bool


def source(trace: Trace, form: Form) -> str:
    """The C source of `sums` for a kernel."""
    return _Writer(trace, form).text()


def row_block(trace: Trace) -> int:
    """How many rows run side by side."""
    size = sum(node.op not in ("constant", "component") for node in ex.in_order(trace.outputs))
    fitting = max(1, REGISTERS // (trace.dim + len(trace.outputs)))
    return min(ROWS if size <= LARGE else 2, fitting)


class _Writer:
    def __init__(self, trace: Trace, form: Form) -> None:
        self.trace, self.form = trace, form
        self.single = form.dtype == torch.float32
        self.suffix = "f" if self.single else ""
        self.rows = row_block(trace)
        self.outputs = ex.rebuilt(trace.outputs, _in_base_two)
        self.nodes = list(ex.in_order(self.outputs))
        self.uses = Counter(a for node in self.nodes for a in node.args) + Counter(self.outputs)
        self.folded = self._folded()
        # Outputs -e, where the sum over atoms subtracts e.
        self.negated = {e for e in self.outputs if e.op == "neg" and self.uses[e] == self.outputs.count(e)}

    def text(self) -> str:
        return "".join([self._head(), self._functions(), self._tile(), self._sums()])

    def _head(self) -> str:
        kinds = ("float", "int32_t", "uint32_t") if self.single else ("double", "int64_t", "uint64_t")
        return _HEAD.format(s=self.suffix, real=kinds[0], integer=kinds[1], unsigned=kinds[2])

    def _functions(self) -> str:
        ops = {node.op for node in self.nodes}
        lines = [f"LIBRARY real {f}{self.suffix}(real);" for f in _LIBRARY if f in ops]
        lines += [f"LIBRARY real {f}{self.suffix}(real, real);" for f in _LIBRARY_OF_TWO if f in ops]
        own = [self._series(_EXP, _EXP2, "r")] if "exp2" in ops else []
        own += [self._series(_LOG, _LOG2, "u")] if "log2" in ops else []
        return "\n".join([*lines, *own])

    def _series(self, form: str, coefficients: dict[torch.dtype, tuple[str, ...]], variable: str) -> str:
        *others, last = coefficients[self.form.dtype]
        steps = "\n    ".join(f"p = FMA(p, {variable}, {c});" for c in reversed(others))
        return form.format(last=last, steps=steps, **_BITS[self.form.dtype])

    # One tile of atoms, for the rows of a block --------------------------------------------------------------------

    def _tile(self) -> str:
        d, outputs = self.trace.dim, len(self.outputs)
        sums = [[f"s{i}_{k}" for k in range(outputs)] for i in range(self.rows)]
        lines = [
            "",
            "static inline __attribute__((always_inline)) void",
            "tile(const real *x, int64_t n, const real *y, const real *w, integer count, const integer *own,",
            "     const int excludes, double *total)",
            "{",
        ]
        for i in range(self.rows):
            lines += [f"    const real x{i}_{k} = x[{i * d + k}];" for k in range(d)]
            if self.form.own:
                lines.append(f"    const integer own{i} = own[{i}];")
            lines.append(f"    real {', '.join(f'{s} = 0' for s in sums[i])};")
        names = ", ".join(s for row in sums for s in row)
        lines += [
            "#ifdef __clang__",
            "#pragma clang loop vectorize(assume_safety) interleave_count(1)",
            "#endif",
            f"#pragma omp simd reduction(+ : {names})",
            "    for (integer j = 0; j < count; ++j) {",
        ]
        lines += [f"        const real y{k} = y[{k} * n + j];" for k in range(d) if self._component_is_used(k)]
        if self.form.weighted:
            lines.append("        const real m = w[j];")
        for i in range(self.rows):
            lines += [f"        {line}" for line in self._row(i)]
        lines.append("    }")
        lines += [f"    total[{i * outputs + k}] += {sums[i][k]};" for i in range(self.rows) for k in range(outputs)]
        return "\n".join([*lines, "}", ""])

    def _component_is_used(self, k: int) -> bool:
        return any(node.op == "component" and node.index == k for node in self.nodes)

    def _row(self, i: int) -> Iterator[str]:
        yield "{"
        names: dict[Expression, str] = {}
        for node in self.nodes:
            if node.op == "component":
                yield from self._difference(i, node.index)
                names[node] = f"z{node.index}"
            elif node.is_constant:
                names[node] = self._number(node.value)
            elif node.is_boolean:
                names[node] = self._condition(node, names)
            elif node in self.folded or node in self.negated:
                names[node] = ""
            else:
                names[node] = f"t{len(names)}"
                yield f"    const real {names[node]} = {self._formula(node, names)};"
        for k, output in enumerate(self.outputs):
            yield f"    {self._accumulation(f's{i}_{k}', i, output, names)}"
        yield "}"

    def _difference(self, i: int, k: int) -> Iterator[str]:
        yield f"    const real d{k} = x{i}_{k} - y{k};"
        p = self.form.period[k]
        if math.isinf(p):
            yield f"    const real z{k} = d{k};"
        else:
            turns = f"__builtin_rint{self.suffix}(d{k} * {self._number(1 / p)})"
            yield f"    const real z{k} = FMA({self._number(-p)}, {turns}, d{k});"

    def _folded(self) -> set[Expression]:
        """Products that are part of a multiply-add: those that one sum alone uses, be it the one over atoms."""
        found = set()
        for node in self.nodes:
            if node.op in ("add", "sub"):
                products = [a for a in reversed(node.args) if a.op == "mul" and self.uses[a] == 1]
                found.update(products[:1])
        if not self.form.weighted:
            signed = (e.args[0] if e.op == "neg" else e for e in self.outputs)
            found.update(e for e in signed if e.op == "mul" and self.uses[e] == 1)
        return found

    def _formula(self, node: Expression, names: dict[Expression, str]) -> str:
        args = [names[a] for a in node.args]
        if node.op in ("add", "sub"):
            return self._sum(node, names)
        if node.op in ("mul", "div"):
            return f"{args[0]} {'*' if node.op == 'mul' else '/'} {args[1]}"
        if node.op == "neg":
            return f"-{args[0]}"
        if node.op == "sign":
            a = args[0]
            return f"{a} > 0 ? (real)1 : {a} < 0 ? (real)-1 : (real)0"
        if node.op == "where":
            return f"{args[0]} ? {args[1]} : {args[2]}"
        if node.op in ("max", "min"):
            return self._extremum(node, args)
        if node.op == "log2":
            # Above 0 for certain, there is nothing to tell apart.
            return f"log2_({args[0]}, {int(not ex.lower_bound(node.args[0]) > 1e-30)})"
        if node.op == "exp2":
            return f"exp2_({args[0]}, {int(not ex.is_non_positive(node.args[0]))})"
        if node.op in _BUILTIN:
            return f"__builtin_{_BUILTIN[node.op]}{self.suffix}({args[0]})"
        return f"{node.op}{self.suffix}({', '.join(args)})"

    def _sum(self, node: Expression, names: dict[Expression, str]) -> str:
        a, b = node.args
        minus = "-" if node.op == "sub" else ""
        if b in self.folded:
            return f"FMA({minus}{names[b.args[0]]}, {names[b.args[1]]}, {names[a]})"
        if a in self.folded:
            return f"FMA({names[a.args[0]]}, {names[a.args[1]]}, {minus}{names[b]})"
        return f"{names[a]} {'-' if minus else '+'} {names[b]}"

    def _extremum(self, node: Expression, args: Sequence[str]) -> str:
        a, b = args
        sign = "<" if node.op == "max" else ">"
        # A comparison with NaN is false: written so, a NaN in b is kept, and one in a constant cannot be.
        kept = f"{b} {sign} {a} ? {a} : {b}"
        return kept if node.args[0].is_constant else f"{a} != {a} ? {a} : ({kept})"

    def _condition(self, node: Expression, names: dict[Expression, str]) -> str:
        args = [names[a] for a in node.args]
        if node.op == "not":
            return f"(!{args[0]})"
        sign = {"and": "&", "or": "|"}.get(node.op) or _COMPARISONS[node.op]
        return f"({args[0]} {sign} {args[1]})"

    def _accumulation(self, name: str, i: int, output: Expression, names: dict[Expression, str]) -> str:
        """One more atom: a multiply-add where there is a product. A left out atom adds 0 · 0 to the same operation."""
        minus, output = ("-", output.args[0]) if output.op == "neg" else ("", output)
        factors = [names[a] for a in output.args] if output in self.folded else [names[output]]
        if self.form.weighted:
            factors = ["m", names[output]]
        if self.form.own:
            factors = [f"(excludes && j == own{i} ? (real)0 : {f})" for f in factors]
        if len(factors) == 2:
            return f"{name} = FMA({minus}{factors[0]}, {factors[1]}, {name});"
        return f"{name} {minus or '+'}= {factors[0]};"

    def _number(self, value: float) -> str:
        if math.isnan(value):
            return f'__builtin_nan{self.suffix}("")'
        if math.isinf(value) or (self.single and abs(value) > 3.4028235e38):
            return f"({'-' if value < 0 else ''}__builtin_inf{self.suffix}())"
        text = f"{value.hex()}{self.suffix}"
        return f"({text})" if value < 0 else text

    # All rows ------------------------------------------------------------------------------------------------------

    def _sums(self) -> str:
        d, outputs, rows = self.trace.dim, len(self.outputs), self.rows
        excludes = "int any = 0;" if self.form.own else ""
        own = (
            f"""
            integer mine[{rows}];
            for (int i = 0; i < {rows}; ++i) {{
                const int64_t at = own[row[i]] - first;
                mine[i] = at >= 0 && at < count ? (integer)at : (integer)-1;
                any |= mine[i] >= 0;
            }}"""
            if self.form.own
            else "const integer *mine = 0;"
        )
        weights = "w + first" if self.form.weighted else "w"
        call = f"tile(&x_[0][0], n, y + first, {weights}, count, mine, {{}}, &total[0][0]);"
        run = (
            f"if (any)\n                {call.format(1)}\n            else\n                {call.format(0)}"
            if self.form.own
            else call.format(0)
        )
        return f"""
/* x: ({d}, m), y: ({d}, n), w: (n,), own: (m,), out: ({outputs}, m); rows begin, ..., end - 1. */
void sums(const real *x, const real *y, const real *w, const int64_t *own, int64_t begin, int64_t end, int64_t m,
          int64_t n, double scale, real *out)
{{
    for (int64_t block = begin; block < end; block += {rows}) {{
        int64_t row[{rows}];
        real x_[{rows}][{d}];
        double total[{rows}][{outputs}] = {{{{0}}}};
        for (int i = 0; i < {rows}; ++i) {{
            row[i] = block + i < end ? block + i : end - 1;
            for (int k = 0; k < {d}; ++k)
                x_[i][k] = x[k * m + row[i]];
        }}
        for (int64_t first = 0; first < n; first += {TILE}) {{
            const integer count = (integer)(n - first < {TILE} ? n - first : {TILE});
            {excludes}
            {own}
            {run}
        }}
        for (int i = 0; i < {rows}; ++i)
            for (int k = 0; k < {outputs}; ++k)
                out[k * m + row[i]] = (real)(scale * total[i][k]);
    }}
}}
"""


def _in_base_two(node: Expression, args: Sequence[Expression]) -> Expression | None:
    """Logarithms and exponentials, where the factor log₂ e joins constants that are there already.

    x^p = 2^(p log₂ x) has the error (1 + |p log₂ x|) ε; the library's own takes several times as long.
    """
    if node.op == "exp":
        return ex.unary("exp2", ex.multiply(_LOG2_E, args[0]))
    if node.op == "log":
        return ex.multiply(_LN_2, ex.unary("log2", args[0]))
    if node.op == "pow" and args[1].is_constant and (ex.is_non_negative(args[0]) or not args[1].value.is_integer()):
        return ex.unary("exp2", ex.multiply(args[1], ex.unary("log2", args[0])))
    return None


_LOG2_E, _LN_2 = ex.constant(1 / math.log(2)), ex.constant(math.log(2))
