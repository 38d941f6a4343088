"""CUDA C++ on the processor of the host, with checks of every access to memory.

A kernel's text is compiled by gcc with ``cuda_language.h`` in front (the ``cuda_*.h`` files), and
linked to a runtime that runs all its threads as fibres of one thread, in a chosen order:

    device.py             what launches are handed to
    build.py              compiles, after shared_variables.py has rewritten what only CUDA has
    launch_request.py/.h  the caller's memory and words; launch.cpp runs the blocks, wave by wave
    fibre, scheduler      stacks, and which thread runs next
    threads.h             threads, warps, blocks, clusters; barriers, warps: where they meet
    memory                the arena: copies of the caller's memory and shared memory, with guards
    checks                every access (access_hooks: how gcc tells of them): bounds, clusters, ...
    races, ordering       who touched memory before (access_history), what orders it (clocks)
    traps, undefined_hooks, reports, name_lines.py   faults and the lines of the kernel

Not modelled: PTX in the text, tensor cores, asynchronous copies, textures, registers, time. What
comes from exp, log and their like is the processor's. Races are those of the executed paths. It is
strict where CUDA is lenient: two threads that write the same value race, flags are not read as
data, and no mask of a collective names lanes that have ended. A loop that waits must call
__nanosleep.
"""

if __name__ != "sparsify.codegen.emulator":
    raise ImportError(f"import this package as sparsify.codegen.emulator, not as {__name__}")
