"""A worker process; started by `mooncake_hpc.workers.process`, never by hand."""

import os
import signal
import sys

# before numba is imported, which takes a while: Ctrl-C is the pool's business
signal.signal(signal.SIGINT, signal.SIG_IGN)

from mooncake_hpc.workers.worker import serve  # noqa: E402

if __name__ == "__main__":
    owner, control, channel, parent = map(int, sys.argv[1:])
    serve(owner, control, channel, parent)
    os._exit(0)  # the system frees all that a worker has; numba's own teardown takes 0.3 s
