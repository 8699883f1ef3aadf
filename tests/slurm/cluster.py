"""A real Slurm on this machine: one controller and some virtual nodes, all in a folder of their own."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "sinfo")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}

# cred_expire: a requeued job waits for so long, two minutes by default.
_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
MinJobAge=3600
KillWait=5
CompleteWait=0
SlurmctldTimeout=30
SlurmdTimeout=60
PropagateResourceLimits=NONE
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 OverSubscribe=NO State=UP
"""


def lacking() -> str:
    """Why no cluster can be started here, empty where one can."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install slurmctld slurmd slurm-client munge"
    return "" if os.geteuid() == 0 else "the daemons of a virtual cluster need root"


class Cluster:
    """One controller and `num_nodes` nodes of `cores` each, until they are stopped."""

    def __init__(self, folder: Path, num_nodes: int = 2, cores: int = 2) -> None:
        """`folder` must have a short path: sockets lie in it."""
        self.folder, self.num_nodes, self.cores = folder, num_nodes, cores
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: object, **variables: str) -> str:
        """Standard output of a command that finds this cluster; raises if it fails."""
        done = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            env=self.environment | variables,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def states(self, job: str) -> dict[str, str]:
        """State of a job, or of each task of an array, by id."""
        lines = self.run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def wait(self, *jobs: str, seconds: float = 180) -> dict[str, str]:
        """States of the jobs once all have ended."""
        deadline = time.monotonic() + seconds
        while True:
            states = {name: state for job in jobs for name, state in self.states(job).items()}
            if states and set(states.values()) <= ENDED:
                return states
            assert time.monotonic() < deadline, f"not ended in {seconds} s: {states}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        """The last words of the daemons."""
        texts = [f"{path.name}: {path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log"))]
        return "\n".join(texts)

    def start(self) -> None:
        """Start all daemons and wait until every node is idle; after a failure call `stop` too."""
        names = [f"n{number}" for number in range(self.num_nodes)]
        host, (controller, *ports) = socket.gethostname().split(".")[0], _free_ports(1 + self.num_nodes)
        hardware = f"CPUs={self.cores} Boards=1 SocketsPerBoard=1 CoresPerSocket={self.cores} ThreadsPerCore=1"
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {hardware} RealMemory=2000"
            for name, port in zip(names, ports, strict=True)
        ]
        for name in ("state", *(f"spool.{name}" for name in names)):
            (self.folder / name).mkdir()
        settings = {"host": host, "controller_port": controller, "folder": self.folder, "nodes": "\n".join(nodes)}
        (self.folder / "slurm.conf").write_text(_CONFIGURATION.format(**settings))
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = {"key-file": key.name, "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        files["log-file"] = "munged.log"
        self.run("munged", "--force", *(f"--{option}={self.folder / name}" for option, name in files.items()))
        self.run("slurmctld", "-c")
        for name in names:
            self.run("slurmd", "-N", name)
        deadline = time.monotonic() + 60
        while self.run("sinfo", "-h", "-N", "-o", "%T").split().count("idle") < self.num_nodes:
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.2)

    def stop(self) -> None:
        """End all jobs and daemons."""
        command = ["scancel", "--user=root", "--full"]
        subprocess.run(command, env=self.environment, capture_output=True, check=False, timeout=30)
        for path in [*self.folder.glob("slurm*.pid"), self.folder / "munged.pid"]:
            if path.exists() and path.read_text().strip():
                _end(int(path.read_text()))


def _end(pid: int) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for _ in range(50):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                return
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
