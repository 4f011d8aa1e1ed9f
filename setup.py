"""Only the optional native extension is declared here; everything else stands in setup.cfg."""

import zlib
from glob import glob

from setuptools import Extension, setup

HEADERS = sorted(glob("msamp_like/kernels/cpu_*.h"))


def digest():
    """Of the sources, compiled into the library: kernels/cpu.py refuses one that was built from others."""
    found = 0
    for path in ["msamp_like/kernels/cpu.cpp", *HEADERS]:
        with open(path, "rb") as source:
            found = zlib.crc32(source.read(), found)
    return found


# A plain C interface, loaded through ctypes: no torch headers, so one build serves every version of torch. -fopenmp is
# given to the compiler and not to the linker: torch's own OpenMP runtime resolves the symbols when the library is
# loaded (kernels/cpu.py). -ffp-contract=off: a fused multiply-add rounds once where the reference rounds twice.
NATIVE = Extension(
    "msamp_like.kernels._cpu",
    sources=["msamp_like/kernels/cpu.cpp"],
    depends=HEADERS,
    define_macros=[("MSAMP_DIGEST", f"{digest()}u")],
    extra_compile_args=[
        *("-O3", "-std=c++17", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-exceptions"),
        *("-g0", "-fvisibility=hidden", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    ],
    language="c++",
    optional=True,  # with no compiler the installation succeeds and the reference kernels run
)

setup(ext_modules=[NATIVE])
