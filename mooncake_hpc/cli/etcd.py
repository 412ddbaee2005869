"""`mooncake-hpc etcd`: an embedded etcd in the foreground, for trials and tests."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from mooncake_hpc.cli import glog, streams
from mooncake_hpc.cli.gflags import Flag, FlagSet, Parsed
from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.jobs.etcd_cluster import EtcdMember
from mooncake_hpc.metadata.embedded import EmbeddedEtcd

FLAGS = FlagSet(
    "mooncake-hpc etcd",
    "Starts an etcd on a free port, prints host:port for --metadata_server, and serves until Ctrl-C. Its data is in a "
    "temporary folder that goes with it. For trials: a cluster's etcd should have several members and a disk.",
    {
        "Where": (
            Flag("listen", "127.0.0.1", "Address to listen on; 0.0.0.0 for all."),
            Flag("members", "", "Hosts of an etcd of several members, split by commas; --member tells which this is. "
                 "Each prints host:port when a majority serves."),
            Flag("member", 0, "Which of --members runs here: 0 is the first."),
            Flag("port", 0, "Clients' port with --members; the members themselves use the next one."),
            Flag("until_eof", False, "End at the end of the standard input, and so with the program that holds it."),
            Flag("password", "", "Makes clients log in as root with it: MOONCAKE_HPC_ETCD_USER=root and "
                 "MOONCAKE_HPC_ETCD_PASSWORD. Never on the command line, which all users of the host see: in the "
                 "variable FLAGS_password with --fromenv=password, or in a --flagfile of mode 0600."),
        ),
        "Logging (glog's)": (*glog.FLAGS, *glog.IGNORED),
    },
)  # fmt: skip


def main(arguments: Sequence[str], command: Sequence[str] = ()) -> int:
    """Serve until SIGINT, SIGTERM or what --until_eof says; the exit code. Raises ConfigError, MetadataError."""
    if any(word.lstrip("-").partition("=")[0] == "password" for word in arguments if word.startswith("-")):
        raise ConfigError("--password: all users of this host see a command line; set FLAGS_password and say "
                          "--fromenv=password")  # fmt: skip
    flags = FLAGS.parse(arguments, os.environ)
    if FLAGS.answer(flags):
        return 0
    if flags.boolean("until_eof") and streams.input_closed():
        raise ConfigError("--until_eof: the standard input is closed; give it a pipe that ends when etcd is to end")
    glog.set_up(flags)
    with _server(flags, Settings.from_env()) as etcd:
        try:
            sys.stdout.write(f"{etcd.endpoint}\n")  # in one piece: members share srun's output
            sys.stdout.flush()
            if streams.output_lost():
                return 0  # nobody knows the endpoint
            while flags.boolean("until_eof"):
                if not os.read(sys.stdin.fileno(), 4096):
                    return 0
            while True:
                signal.pause()
        except KeyboardInterrupt:
            return 0


def _server(flags: Parsed, settings: Settings) -> EmbeddedEtcd:
    if not flags.text("members"):
        return EmbeddedEtcd(flags.text("listen"), flags.text("password"), settings)
    if not 0 < flags.integer("port") < 65535:
        raise ConfigError(f"--port={flags.integer('port')}: an etcd of several --members needs one below 65535")
    hosts = flags.text("members").split(",")
    return EtcdMember(hosts, flags.integer("member"), flags.integer("port"), flags.text("password"), settings)
