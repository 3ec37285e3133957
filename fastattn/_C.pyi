"""The compiled extension: what was built, what this machine can run, and settings.

Importing it also registers the operators of torch.ops.fastattn.
"""

version: str
compiler: str
build_flags: str
built_with_cuda: bool
cuda_archs: tuple[str, ...]
emulated_levels: tuple[str, ...]
"""In a build for tests (FASTATTN_CUDA=emulate) "sm80" and "sm90", at which attention on CPU tensors
runs the CUDA kernels over an emulated GPU of that kind, and all else the highest CPU level."""

def cpu_levels() -> list[tuple[str, str | None]]:
    """Every CPU level, slowest first, with what keeps it from running here (None: nothing); after
    them emulated_levels."""

def active_cpu_level() -> str:
    """The level in use: the highest of the CPU that runs here, unless FASTATTN_CPU_ISA or a call
    chooses another one."""

def set_cpu_level(name: str) -> None:
    """Use this level from now on, in every thread.

    Raises ValueError when the name is unknown or the level cannot run here.
    """

def emulator_launches() -> int:
    """Kernels that the emulator has run. Only where there are emulated_levels."""

def set_emulator_seed(seed: int) -> None:
    """Choose the order in which the emulator runs threads. Only where there are emulated_levels."""

def hide_from_host(on: bool) -> None:
    """From now on the emulator's tensors are treated as those of a GPU, which the host does not
    read: nothing that they hold is refused. Only where emulates_cuda."""

def cpu_peak(what: str, rounds: int) -> float:
    """FLOPs of `rounds` rounds of the products that attention of a dtype ("fp32", "bf16", "fp16")
    is made of at the level in use, or exponentials in float32 ("exp"), on registers and on every
    thread. The caller takes the time. Raises ValueError for another name.
    """

def cuda_probe(device: int = 0) -> tuple[int, bool]:
    """Run a one-warp kernel on a device and check what it wrote. Only where built_with_cuda, or
    emulated.

    Returns the architecture that the code which ran was compiled for (800, 900, ...), and whether
    it ran in torch's current stream (no: torch is a CPU build). Raises RuntimeError when it fails.
    """
