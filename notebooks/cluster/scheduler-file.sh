#!/usr/bin/env bash
# A run on machines without a batch system that share a disk: bash scheduler-file.sh segment slide.ome.zarr -o out.ome.zarr
#
# Start the workers by hand or by ssh, on each machine and as often as needed, also while the run goes on:
#
#   CUDA_VISIBLE_DEVICES=0 dask worker --scheduler-file scheduler.json --nthreads 6 --resources GPU=6 --no-dashboard
#   CUDA_VISIBLE_DEVICES=1 dask worker --scheduler-file scheduler.json --nthreads 6 --resources GPU=6 --no-dashboard
#   CUDA_VISIBLE_DEVICES= dask worker --scheduler-file scheduler.json --nthreads 16 --resources CPU=16 --no-dashboard
#
# As it is, whoever reaches the scheduler's port can run code in your name. For TLS set, for all processes,
# DASK_DISTRIBUTED__COMM__TLS__CA_FILE, and ..TLS__SCHEDULER__CERT and ..TLS__SCHEDULER__KEY and the same for WORKER
# and CLIENT, to files in PEM, and add --protocol tls below.
set -euo pipefail
rm -f scheduler.json
dask scheduler --scheduler-file scheduler.json --no-dashboard --dashboard-address 127.0.0.1:0 &
trap 'kill %1' EXIT
until [ -s scheduler.json ]; do sleep 1; done
# Of every kind one must have come before the run begins.
python -c 'from distributed import Client; Client(scheduler_file="scheduler.json").wait_for_workers(3)'
tiledseg "$@" --scheduler scheduler.json # the same again goes on where it was
