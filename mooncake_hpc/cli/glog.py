"""glog's flags, which the original's command lines carry, mapped to logging under the name `mooncake_hpc`."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path

from mooncake_hpc.cli.gflags import Flag, Parsed
from mooncake_hpc.core.errors import ConfigError

LEVELS = (logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL)  # glog's 0 to 3
LINE = "%(levelname).1s%(asctime)s.%(msecs)03d %(process)d %(name)s] %(message)s"
CLOCK = "%m%d %H:%M:%S"

FLAGS = (
    Flag("logtostderr", False, "Log to stderr from INFO on; without it, from WARNING on."),
    Flag("alsologtostderr", False, "The same as --logtostderr."),
    Flag("log_dir", "", "Folder for a log file of this process as well, from INFO on."),
    Flag("minloglevel", 0, "Least level that is logged at all: 0 INFO, 1 WARNING, 2 ERROR, 3 FATAL."),
    Flag("stderrthreshold", 1, "Least level that goes to stderr: 0 INFO, 1 WARNING, 2 ERROR, 3 FATAL."),
    Flag("v", 0, "Above 0: log everything, DEBUG included, to stderr."),
)
IGNORED = (
    Flag("colorlogtostderr", False, "Accepted and ignored."),
    Flag("log_prefix", True, "Accepted and ignored."),
    Flag("logbuflevel", 0, "Accepted and ignored."),
    Flag("logbufsecs", 30, "Accepted and ignored."),
    Flag("log_link", "", "Accepted and ignored."),
    Flag("logtostdout", False, "Accepted and ignored."),
    Flag("max_log_size", 1800, "Accepted and ignored."),
    Flag("stop_logging_if_full_disk", False, "Accepted and ignored."),
    Flag("vmodule", "", "Accepted and ignored."),
)


def set_up(flags: Parsed) -> None:
    """Attach handlers to the logger `mooncake_hpc`. ConfigError for an impossible level or folder."""
    for name in ("minloglevel", "stderrthreshold"):
        if not 0 <= flags.integer(name) < len(LEVELS):
            raise ConfigError(f"--{name}={flags.integer(name)}: expected 0 to {len(LEVELS) - 1}")
    logger = logging.getLogger("mooncake_hpc")
    least = LEVELS[flags.integer("minloglevel")]
    stderr_level = LEVELS[flags.integer("stderrthreshold")]
    if flags.boolean("logtostderr") or flags.boolean("alsologtostderr"):
        stderr_level = logging.INFO
    if flags.integer("v") > 0:
        least = stderr_level = logging.DEBUG
    logger.setLevel(least)
    _attach(logger, logging.StreamHandler(sys.stderr), stderr_level)
    if folder := flags.text("log_dir"):
        path = Path(folder) / f"mooncake-hpc.{socket.gethostname()}.{os.getpid()}.log"
        try:
            _attach(logger, logging.FileHandler(path, encoding="utf-8"), least)
        except OSError as error:
            raise ConfigError(f"--log_dir={folder}: {error}") from error


def _attach(logger: logging.Logger, handler: logging.Handler, level: int) -> None:
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter(LINE, CLOCK))
    logger.addHandler(handler)
