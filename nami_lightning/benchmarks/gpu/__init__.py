"""The proof that runs wherever a GPU is: ``lightning bench gpu`` writes one report, ``make gpu`` tests the same parity.

- ``report``: the sections in order, each promise as held or not, one Markdown file.
- ``section``: a part of the report, and its promises.
- ``sizes``: what is measured on a GPU, and the stand-in that runs the whole flow small on a CPU.
- ``parity``: the same numbers on the CPU and on the GPU, eager and compiled, whole and sharded.
- ``sampling_speed``: the paper's Table 2 and Figures 2 and 26, eager, compiled and with CUDA graphs.
- ``training_speed``: step time, utilisation, memory beside the plan's, and waits, next to a bare loop.
- ``training_run``: a short training of emoji, resumed on the other device: pictures.
"""
