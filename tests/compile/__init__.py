"""Every Triton kernel compiled for GPUs that are not here, and its machine code read.

    python -m tests.compile             # what CI compiles: default and extreme configurations
    python -m tests.compile --full --table kernels.md

``cases/`` says what each op launches; ``machine.py`` pretends to be a GPU, so that the op's own
launchers decide what is compiled; ``sass.py`` and ``amdgcn.py`` read what comes out, ``checks.py``
judges it, ``table.py`` prints it. Kernels that are interpreted can't be compiled, so each target
has a process of its own (``worker.py``).
"""
