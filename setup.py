"""Only the optional native extension is declared here; everything else stands in setup.cfg."""

from glob import glob

from setuptools import Extension, setup

# A plain C interface, loaded through ctypes: no torch headers, so one build serves every version of torch. -fopenmp is
# given to the compiler and not to the linker: torch's own OpenMP runtime resolves the symbols when the library is
# loaded (kernels/cpu.py). -ffp-contract=off: a fused multiply-add rounds once where the reference rounds twice.
NATIVE = Extension(
    "msamp_like.kernels._cpu",
    sources=["msamp_like/kernels/cpu.cpp"],
    depends=sorted(glob("msamp_like/kernels/*.h")),
    extra_compile_args=[
        *("-O3", "-std=c++17", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-exceptions"),
        *("-g0", "-fvisibility=hidden", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    ],
    language="c++",
    optional=True,  # with no compiler the installation succeeds and the reference kernels run
)

setup(ext_modules=[NATIVE])
