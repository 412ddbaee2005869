"""Command lines that start ranks: one module a launcher, each a pure function from a job to words.

`base` says what a job is; `mpich`, `openmpi`, `intel` and `srun` write its command line; `choice` finds out which
of them fits this machine; `hostfile` reads host files; `binding` ties ranks to cores.
"""
