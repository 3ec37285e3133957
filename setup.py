"""Builds fastattn._C: every source under csrc, each with its own flags, compiled by ninja.

Read from the environment:
    FASTATTN_CUDA        auto (default): if nvcc is found, and torch is a CUDA build or a GPU is
                         visible; 0: no; 1: yes; emulate: compile the CUDA kernels with CXX, to run
                         on the CPU over an emulation of the GPU (to test them where there is none;
                         never installed)
    FASTATTN_CUDA_ARCHS  default "80;90a"; PTX of the newest one without a letter is added
    FASTATTN_CPU_EMULATE 1: build the AVX-512 and AMX levels over an emulation (to test them where
                         the CPU lacks them; never installed)
    CXX, NVCC            the compilers: g++, nvcc
    MAX_JOBS             compilers at a time: by default what cores and free memory allow

CXXFLAGS is not read: a -march in it would put instructions into the baseline that not every CPU
has.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = "0x020a000000000000"  # the oldest torch whose stable ABI the binary needs: 2.10
GIB = 1 << 30
JOB_BYTES = 2 * GIB
MEMORY_SHARE = 0.8  # of the free memory; the rest is a margin

COMMON_FLAGS = [
    *("-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-Wall", "-Wextra"),
    *("-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    "-ffp-contract=off",  # a fused multiply-add is written where it is meant
]
EXPORTS = "csrc/bind/exports.map"
LINK_FLAGS = [
    *("-shared", "-Wl,-O1", "-Wl,-rpath,$ORIGIN/../torch/lib"),
    f"-Wl,--version-script={EXPORTS}",
]

# The instruction sets of each CPU level; everything outside csrc/cpu/isa_*.cpp is baseline. What a
# level's unit emits beside its kernels (type info, unwinding, guards of statics) could be the copy
# that the linker keeps for every CPU, hence the isolation flags.
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [
    *(*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # gcc 12's own _mm512_undefined_ps()
]
_AVX512BF16 = [*_AVX512, "-mavx512bf16"]
LEVEL_FLAGS = {
    "scalar": [],
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512bf16": _AVX512BF16,
    "amx": [*_AVX512BF16, "-mamx-tile", "-mamx-bf16"],
}
LEVEL_ISOLATION_FLAGS = ["-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"]
EMULATED_LEVELS = ("avx512", "avx512bf16", "amx")
EMULATION_FLAGS = [
    *(*_AVX2, "-DFASTATTN_CPU_EMULATE", "-Itests/emulator/cpu", "-Wno-psabi"),
    "-O2",  # -O3 unrolls the emulated loops for minutes
    "-DFASTATTN_INTRINSICS_HEADER=<emulated_intrinsics.h>",
]

CUDA_EMULATOR = Path("tests", "emulator", "cuda")
CUDA_EMULATION_FLAGS = [
    *("-DFASTATTN_CUDA_EMULATE", "-DFASTATTN_WITH_SM90", "-Wno-psabi"),
    *(f"-I{CUDA_EMULATOR}", "-Icsrc/include"),
    "-Wno-unknown-pragmas",  # unroll
    "-ftrivial-auto-var-init=pattern",  # what is read before it is written shows
    "-O2",
]


def flag(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        raise SystemExit(f"{name}: expected 0 or 1, got {value!r}")
    return value == "1"


class Torch:
    """Where the installed torch lies and how it was built, found without importing it."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            raise SystemExit(
                "fastattn is compiled against torch >= 2.10, and this Python has none: install it "
                "first, or let pip bring it (pip install without --no-build-isolation)"
            )
        self.root = Path(spec.origin).parent
        text = (self.root / "version.py").read_text()
        versions = re.findall(r"^(__version__|cuda)\b.*?=\s*'([^']+)'", text, flags=re.MULTILINE)
        self.version = dict(versions)["__version__"]
        self.cuda = dict(versions).get("cuda")
        if tuple(map(int, self.version.split(".")[:2])) < (2, 10):
            raise SystemExit(f"fastattn needs torch >= 2.10, found {self.version}")


class Cuda:
    """The CUDA toolkit: the compiler, and where it says that its headers and libraries lie."""

    def __init__(self, nvcc: str) -> None:
        self.nvcc = nvcc
        self.archs = os.environ.get("FASTATTN_CUDA_ARCHS", "80;90a").replace(",", ";").split(";")
        for arch in self.archs:
            if not re.fullmatch(r"\d{2,3}[af]?", arch):
                raise SystemExit(f"FASTATTN_CUDA_ARCHS: expected for example 80;90a, got {arch!r}")
        command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        self.include_dirs = self._dirs(lines, "INCLUDES", "-I")
        self.library_dirs = self._dirs(lines, "LIBRARIES", "-L")

    @staticmethod
    def _dirs(lines: str, name: str, prefix: str) -> list[str]:
        found = re.search(rf"^#\$ {name}=(.*)$", lines, flags=re.MULTILINE)
        words = shlex.split(found.group(1)) if found else []
        return [os.path.normpath(w.removeprefix(prefix)) for w in words if w.startswith(prefix)]

    def gencode(self, source: Path) -> list[str]:
        """Machine code per architecture, and PTX for those to come.

        A *_sm90.cu holds what only sm_90a can run, and is compiled for that alone.
        """
        if source.stem.endswith("_sm90"):
            return [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.archs if a == "90a"]
        flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.archs]
        portable = [a for a in self.archs if a.isdigit()]
        if portable:
            newest = max(portable, key=int)
            flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
        return flags


def find_cuda(torch: Torch) -> tuple[Cuda | None, str]:
    """The toolkit to build with, or None, and why."""
    wish = os.environ.get("FASTATTN_CUDA", "auto")
    if wish not in ("auto", "0", "1", "emulate"):
        raise SystemExit(f"FASTATTN_CUDA: expected auto, 0, 1 or emulate, got {wish!r}")
    if wish == "0":
        return None, "off (FASTATTN_CUDA=0)"
    if wish == "emulate":
        return None, "emulated (FASTATTN_CUDA=emulate)"
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    named = os.environ.get("NVCC")
    nvcc = (
        shutil.which(named) if named else shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    )
    if nvcc is None:
        if named or wish == "1":
            raise SystemExit(f"no nvcc: {named or 'put it on PATH, or name it in NVCC'}")
        return None, "off (no nvcc)"
    if wish == "auto" and not torch.cuda and not gpu_visible():
        return None, "off (torch is a CPU build and no GPU is visible; FASTATTN_CUDA=1 builds it)"
    cuda = Cuda(nvcc)
    return cuda, "on, for " + ";".join(cuda.archs)


def gpu_visible() -> bool:
    smi = shutil.which("nvidia-smi")
    return smi is not None and b"GPU" in subprocess.run([smi, "-L"], capture_output=True).stdout


def free_memory() -> int:
    """Bytes that new processes may take: free on the machine, and within the container's limit."""

    def read(path: Path) -> int | None:
        try:
            return int(path.read_text())
        except (OSError, ValueError):  # absent, or "max"
            return None

    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    free = int(found.group(1)) * 1024 if found else JOB_BYTES
    cgroup = Path("/sys/fs/cgroup")
    for limit, used in (
        (cgroup / "memory.max", cgroup / "memory.current"),
        (cgroup / "memory/memory.limit_in_bytes", cgroup / "memory/memory.usage_in_bytes"),
    ):
        most = read(limit)
        if most is not None:
            free = min(free, most - (read(used) or 0))
    return free


def job_count() -> tuple[int, str]:
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"])), "MAX_JOBS"
    cores, free = len(os.sched_getaffinity(0)), free_memory()
    jobs = max(1, min(cores, int(MEMORY_SHARE * free) // JOB_BYTES))
    return jobs, f"{cores} cores, {free / GIB:.1f} GiB free"


class NinjaFile:
    """A build.ninja with one object per source and one library."""

    RULES = """\
rule compile
  command = $compiler -MD -MF $out.d -c $in -o $out
  description = compile $in
  depfile = $out.d
  deps = gcc
rule link
  command = $compiler -o $out $in $flags
  description = link $out
"""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = [f"builddir = {self._path(folder)}", self.RULES]
        self.objects: list[str] = []

    @staticmethod
    def _path(path: Path | str) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    @staticmethod
    def _words(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    def compile(self, compiler: list[str], source: Path, flags: list[str]) -> None:
        out = self._path(self.folder / f"{source}.o")
        self.lines += [
            f"build {out}: compile {self._path(source)}",
            f"  compiler = {self._words([*compiler, *flags])}",
        ]
        self.objects.append(out)

    def link(self, compiler: list[str], out: Path, flags: list[str]) -> None:
        self.lines += [
            f"build {self._path(out)}: link {' '.join(self.objects)} | {EXPORTS}",
            f"  compiler = {self._words(compiler)}",
            f"  flags = {self._words(flags)}",
        ]

    def run(self) -> None:
        """Builds what is out of date and prints the seconds that each compiled unit took."""
        import ninja

        path = ROOT / self.folder / "build.ninja"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(self.lines) + "\n")
        before, (jobs, reason) = self._log(), job_count()
        print(f"fastattn: up to {jobs} jobs ({reason})", flush=True)
        program = Path(ninja.BIN_DIR) / "ninja"
        if subprocess.run([program, "-f", path, f"-j{jobs}"], cwd=ROOT).returncode:
            raise SystemExit("fastattn: the build failed; the first error is above")
        built = {out: times for out, times in self._log().items() if before.get(out) != times}
        seconds = {out: (end - start) / 1000 for out, (start, end, _) in built.items()}
        for out in sorted(seconds, key=lambda out: -seconds[out]):
            unit = os.path.relpath(out, self.folder).removesuffix(".o")
            print(f"{seconds[out]:8.1f} s  {unit}")
        if not built:
            return
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / GIB
        print(f"fastattn: {len(built)} built; the largest process took {peak:.2f} GiB", flush=True)

    def _log(self) -> dict[str, tuple[int, int, int]]:
        """Output -> (start, end, time stamp), the first two in milliseconds since ninja's start."""
        path = ROOT / self.folder / ".ninja_log"
        rows = path.read_text().splitlines()[1:] if path.exists() else []
        return {
            out: (int(start), int(end), int(stamp))
            for start, end, stamp, out, _ in (row.split("\t") for row in rows)
        }


class BuildExtension(build_ext):
    """Builds under build/objects/<variant>, which outlives pip's temporary folders.

    So a rebuild after touching one file compiles one file, however it was started.
    """

    def run(self) -> None:
        self.inplace_wanted = bool(self.inplace)  # profilers want them; a wheel goes without
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if platform.system() != "Linux":
            raise SystemExit(f"fastattn builds on Linux, not yet on {platform.system()}")
        self.emulate = flag("FASTATTN_CPU_EMULATE")
        self.emulate_cuda = os.environ.get("FASTATTN_CUDA") == "emulate"
        wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
        if (self.emulate or self.emulate_cuda) and (self.inplace_wanted or wheel):
            raise SystemExit(
                "an emulation is for tests: python setup.py build --build-lib <folder>"
            )
        self.torch = Torch()
        self.cuda, cuda_reason = find_cuda(self.torch)
        self.cxx = shlex.split(os.environ.get("CXX", "g++"))
        if shutil.which(self.cxx[0]) is None:
            raise SystemExit(
                f"fastattn needs a C++20 compiler: no {self.cxx[0]} on PATH (CXX names another)"
            )
        print(f"fastattn: torch {self.torch.version}; CUDA kernels {cuda_reason}", flush=True)

        variants = {"emulated": self.emulate, "emulated_cuda": self.emulate_cuda, "cuda": self.cuda}
        variant = next((name for name, wanted in variants.items() if wanted), "cpu")
        file = NinjaFile(Path("build", "objects", variant))
        os.chdir(ROOT)
        self.add_cpu(file)
        self.add_bind(file)
        if self.cuda:
            self.add_cuda(file)
        if self.emulate_cuda:
            self.add_emulated_cuda(file)
        library = file.folder / "_C.so"
        self.add_link(file, library)
        file.run()

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a running process may have the old one mapped
        shutil.copy2(library, target)
        if not self.inplace_wanted:
            subprocess.run(["strip", "-s", str(target)], check=True)

    def add_cpu(self, file: NinjaFile) -> None:
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        for source in sorted(Path("csrc/cpu").glob("*.cpp")):
            flags = [*COMMON_FLAGS, "-Icsrc/include"]
            if source.stem.startswith("isa_"):  # isa_<level>_<family>.cpp
                level = source.stem.split("_")[1]
                if level != "scalar" and not x86:
                    continue
                emulated = self.emulate and level in EMULATED_LEVELS
                flags += LEVEL_ISOLATION_FLAGS
                flags += EMULATION_FLAGS if emulated else LEVEL_FLAGS[level]
            elif self.emulate and source.stem == "dispatch":
                flags.append("-DFASTATTN_CPU_EMULATE")
            file.compile(self.cxx, source, flags)

    def add_bind(self, file: NinjaFile) -> None:
        import pybind11

        flags = [*COMMON_FLAGS, "-Icsrc/include", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
        # pybind11 first: some versions of torch bring a copy that refuses the stable interface.
        flags += ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
        flags += ["-isystem", str(self.torch.root / "include")]
        if self.cuda or self.emulate_cuda:
            flags.append("-DFASTATTN_WITH_CUDA")
        if self.emulate_cuda:
            flags += ["-DFASTATTN_CUDA_EMULATE", f"-I{CUDA_EMULATOR}"]
        about = {
            "FASTATTN_VERSION": self.distribution.get_version(),
            "FASTATTN_BUILD_FLAGS": " ".join(COMMON_FLAGS),
            "FASTATTN_CUDA_ARCHS": ";".join(self.cuda.archs) if self.cuda else "",
        }
        for source in sorted(Path("csrc/bind").glob("*.cpp")):
            says = source.stem in ("module", "backend")
            own = [f'-D{k}="{v}"' for k, v in about.items()] if says else []
            file.compile(self.cxx, source, [*flags, *own])

    def add_cuda(self, file: NinjaFile) -> None:
        assert self.cuda is not None
        includes = ["-Icsrc/include", *(f"-isystem{folder}" for folder in self.cuda.include_dirs)]
        hopper = ["-DFASTATTN_WITH_SM90"] if "90a" in self.cuda.archs else []
        for source in sorted(Path("csrc/cuda").glob("*.cpp")):
            file.compile(self.cxx, source, [*COMMON_FLAGS, *includes, *hopper])
        host = ",".join(f for f in COMMON_FLAGS if f.startswith("-f"))
        nvcc = [self.cuda.nvcc, "-std=c++20", "-O3", "-DNDEBUG", "-lineinfo", "-Icsrc/include"]
        for source in sorted(Path("csrc/cuda/inst").glob("*.cu")):
            if gencode := self.cuda.gencode(source):
                file.compile(nvcc, source, [*gencode, f"-Xcompiler={host}"])

    def add_emulated_cuda(self, file: NinjaFile) -> None:
        """The host code and the kernels as they are, over tests/emulator/cuda."""
        flags = [*COMMON_FLAGS, *CUDA_EMULATION_FLAGS]
        for folder, pattern in (
            ("csrc/cuda", "*.cpp"),
            ("csrc/cuda/inst", "*.cu"),
            (CUDA_EMULATOR, "*.cpp"),
        ):
            for source in sorted(Path(folder).glob(pattern)):
                file.compile([*self.cxx, "-x", "c++"], source, flags)

    def add_link(self, file: NinjaFile, out: Path) -> None:
        flags = list(LINK_FLAGS)
        if self.cuda:
            flags += [f"-L{folder}" for folder in self.cuda.library_dirs]
            flags += ["-lcudart_static", "-lpthread", "-ldl", "-lrt"]
        if self.emulate_cuda:
            flags += ["-lpthread", "-ldl"]
        # libtorch.so, needed or not: in a CUDA build of torch it leads to libtorch_cuda.so and so
        # to the weakly declared symbols, which libtorch_cpu.so alone would leave null.
        flags += [f"-L{self.torch.root / 'lib'}", "-Wl,--no-as-needed", "-ltorch"]
        file.link(self.cxx, out, flags)


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("fastattn._C", sources=[])],
        cmdclass={"build_ext": BuildExtension},
    )
