"""Runs a program in several processes of one group, each with its rank, the number of processes and a store."""

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"


def started(program, world, store, *arguments):
    """The processes. They find the packages of this one."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-W",
                "error",
                str(PROGRAMS / program),
                str(rank),
                str(world),
                str(store),
                *arguments,
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def answers(program, world, store, *arguments):
    """The line of JSON that each process prints last, in rank order."""
    processes = started(program, world, store, *arguments)
    try:
        done = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "".join(error[-3000:] for _, error in done)
    return [json.loads(out.splitlines()[-1]) for out, _ in done]
