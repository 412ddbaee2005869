#!/bin/sh
# _rank.sh FOLDER COMMAND…: under a launcher; ranks above 0 write to FOLDER/rank<N>.log instead of the terminal.
folder=$1; shift
rank=${PMI_RANK:-${OMPI_COMM_WORLD_RANK:-${PMIX_RANK:-${SLURM_PROCID:-0}}}}
export MOONCAKE_TEST_RANK="$rank"
[ "$rank" = 0 ] && exec "$@"
exec "$@" >"$folder/rank$rank.log" 2>&1
