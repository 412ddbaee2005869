"""A worker process; started by `mooncake_hpc.workers.process`, never by hand."""

import signal
import sys

# before numba is imported, which takes a while: Ctrl-C is the pool's business
signal.signal(signal.SIGINT, signal.SIG_IGN)

from mooncake_hpc.workers.worker import serve  # noqa: E402

if __name__ == "__main__":
    owner, control, channel, parent = map(int, sys.argv[1:])
    serve(owner, control, channel, parent)
