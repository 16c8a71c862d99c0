"""The rendezvous of the processes of several machines, by the environment that Slurm or the user sets."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from typing import Any

from utils.errors import UserError

PORT = 29400  # torchrun's
_PORTS = 10000  # to choose from by the number of a Slurm job, since two jobs may share a machine


def rendezvous_of(nodes: int, environ: Mapping[str, str]) -> dict[str, Any]:
    """The rendezvous of the machines of a job, as arguments of torchrun's `LaunchConfig`.

    Args:
        nodes: number of machines.
        environ: with ``MASTER_ADDR`` (and ``MASTER_PORT``), or with the variables of ``srun``.

    Raises:
        UserError: neither is there, or Slurm has started another number of machines.
    """
    job = environ.get("SLURM_JOB_ID", "")
    port = environ.get("MASTER_PORT") or str(PORT + (int(job) if job.isdecimal() else 0) % _PORTS)
    host = environ.get("MASTER_ADDR")
    started = environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES")
    if started and started != str(nodes):
        raise UserError(f"nnodes: found {nodes}, but Slurm has started this on {started}; srun --nodes={nodes} helps")
    own_name = environ.get("SLURMD_NODENAME")
    if host:
        address = host if _is_here(host) else own_name
        return {"rdzv_endpoint": f"{host}:{port}", "run_id": f"sakd-{job}", "local_addr": address}
    listed = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not (started and listed):
        raise UserError(
            f"nnodes: found {nodes}, but MASTER_ADDR is not set and this is no job of Slurm; start this on each "
            "machine by srun, or with MASTER_ADDR=<name of one of them>"
        )
    is_host = environ.get("SLURM_NODEID") == "0"
    found = {"rdzv_endpoint": f"{first_host(listed)}:{port}", "run_id": f"sakd-{job}", "local_addr": own_name}
    return found | {"rdzv_configs": {"is_host": is_host}}


def first_host(listed: str) -> str:
    """The first host in Slurm's list, e.g. ``"gpu003"`` of ``"gpu[003-005,9],login1"``."""
    first = re.split(r",(?![^\[]*\])", listed)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _is_here(host: str) -> bool:
    """Whether it is a name of this machine."""
    try:
        with socket.socket() as test:
            test.bind((host, 0))
    except OSError:
        return False
    return True
