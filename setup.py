"""The one part that pyproject.toml cannot describe: the optional compiled kernels."""

from setuptools import Extension, setup

# -ffp-contract=off: a fused multiply-add rounds once where numpy, Triton and the scalar remainder round twice.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]


def kernel(name: str) -> Extension:
    return Extension(
        f"mfsde.{name}",
        [f"mfsde/{name}.c"],
        define_macros=[("Py_LIMITED_API", "0x030B0000")],
        py_limited_api=True,
        depends=["setup.py"],
        optional=True,
        extra_compile_args=FLAGS,
        extra_link_args=["-fopenmp"],
    )


setup(
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    ext_modules=[kernel("_noise"), kernel("_activation")],
)
