"""A real Slurm on this machine: one controller and some virtual nodes, all in a folder of their own."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from keeper import kill_all
from ports import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}

# cred_expire: a requeued job waits for so long, two minutes by default. MinJobAge: ended jobs stay to be asked for.
# config_overrides: nodes have the cores that stand here, not the machine's.
_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
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
KillWait=10
CompleteWait=0
SlurmctldTimeout=30
SlurmdTimeout=10
PropagateResourceLimits=NONE
GresTypes=gpu
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 OverSubscribe=NO State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefaultTime=10 OverSubscribe=NO State=UP PriorityTier=9
"""


def lacking() -> str:
    """Why no cluster can be started here, empty where one can."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install slurmctld slurmd slurm-client munge"
    return "" if os.geteuid() == 0 else "the daemons of a virtual cluster need root"


def until(condition: Callable[[], object], seconds: float, told: Callable[[], str] = lambda: "") -> None:
    """Return once `condition()` is true; raises AssertionError with `told()` if it is not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {seconds} s. {told()}"
        time.sleep(0.1)


class Cluster:
    """One controller and `num_nodes` nodes of `cores` and `gpus` each, until they are stopped.

    Nodes are called by addresses of this machine, so that names resolve as on a cluster. GPUs are files.
    """

    def __init__(self, folder: Path, num_nodes: int = 2, cores: int = 128, gpus: int = 8) -> None:
        """`folder` must have a short path: sockets lie in it."""
        self.folder, self.cores, self.gpus = folder, cores, gpus
        self.nodes = [f"127.0.0.{number}" for number in range(2, 2 + num_nodes)]
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._keeper: subprocess.Popen[str] | None = None
        self._daemons: dict[str, int] = {}

    def run(self, *command: object, **variables: str) -> str:
        """Standard output of a command that finds this cluster; raises if it fails."""
        status, output, errors = self.attempt(*command, **variables)
        assert status == 0, f"{command}: {output}{errors}"
        return output

    def attempt(self, *command: object, **variables: str) -> tuple[int, str, str]:
        """Exit status, standard output and standard error of a command that finds this cluster."""
        environment = self.environment | variables
        argv = list(map(str, command))
        done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=self.folder, env=environment)
        return done.returncode, done.stdout, done.stderr

    def states(self, job: str) -> dict[str, str]:
        """State of a job, or of each task of an array, by id."""
        lines = self.run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def state(self, job: str) -> str:
        """State of a job."""
        return self.states(job)[job]

    def details(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.run("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, *jobs: str, seconds: float = 180) -> dict[str, str]:
        """States of the jobs once all have ended."""
        states: dict[str, str] = {}

        def ended() -> bool:
            states.clear()
            for job in jobs:
                states.update(self.states(job))
            return bool(states) and set(states.values()) <= ENDED

        self.until(ended, seconds, lambda: f"jobs: {states}")
        return states

    def until(self, condition: Callable[[], object], seconds: float, told: Callable[[], str] = lambda: "") -> None:
        """As `until`, with the daemons' last words."""
        until(condition, seconds, lambda: f"{told()}\n{self.logs()}")

    def logs(self) -> str:
        """The last words of the daemons."""
        texts = [f"{path.name}: {path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log"))]
        return "\n".join(texts)

    def start(self) -> None:
        """Start all daemons and wait until every node is idle; after a failure call `stop` too."""
        self._write_configuration()
        keeper = [sys.executable, str(Path(__file__).with_name("keeper.py"))]
        with open(self.folder / "keeper.log", "w") as log:
            self._keeper = subprocess.Popen(
                keeper,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.environment,
                start_new_session=True,  # Ctrl-C ends the tests, which then end this
            )
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = {"key-file": key.name, "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        files["log-file"] = "munged.log"
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self._start("munged", "munged", "--force", "--foreground", *options)
        self.until((self.folder / "munge.socket").exists, 20)
        self._start("slurmctld", "slurmctld", "-D", "-c")
        for name in self.nodes:
            self.start_node(name)
        self.until(lambda: self.node_states() == dict.fromkeys(self.nodes, "idle"), 60)

    def start_node(self, name: str) -> None:
        """Start a node's daemon."""
        self._start(name, "slurmd", "-D", "-N", name)

    def stop_node(self, name: str) -> None:
        """What a power cut does: the daemon of a node and all that runs there are gone at once."""
        daemon = psutil.Process(self._daemons.pop(name))
        found = [daemon, *daemon.children(recursive=True)]
        assert self._keeper is not None
        for process in psutil.Process(self._keeper.pid).children(recursive=True):
            try:
                if process.environ().get("SLURMD_NODENAME") == name:
                    parent = process.parent()
                    found += [process] + ([parent] if parent and "slurmstepd" in parent.name() else [])
            except psutil.Error:
                continue  # it has just ended
        kill_all(found)

    def processes(self) -> list[str]:
        """Names of all processes that the cluster has started."""
        assert self._keeper is not None
        return [process.name() for process in psutil.Process(self._keeper.pid).children(recursive=True)]

    def node_states(self) -> dict[str, str]:
        """State of each node by name, empty while the controller does not answer."""
        status, output, _ = self.attempt("sinfo", "-h", "-N", "-o", "%N %T")
        return dict(line.split() for line in output.splitlines()) if status == 0 else {}

    def serve_again(self) -> None:
        """Bring back the nodes that an earlier job has left drained, as an administrator would."""
        drained = [name for name, state in self.node_states().items() if "drain" in state]
        for name in drained:
            self.run("scontrol", "update", f"nodename={name}", "state=resume")
        if drained:  # a star: the controller has not heard from it yet
            self.until(lambda: set(self.node_states().values()) == {"idle"}, 60)

    def stop(self) -> None:
        """End all jobs and daemons."""
        if self._keeper is not None:
            assert self._keeper.stdin is not None
            self._keeper.stdin.close()
            self._keeper.wait(60)

    def _start(self, name: str, *argv: str) -> None:
        assert self._keeper is not None
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        print(json.dumps(argv), file=self._keeper.stdin, flush=True)
        self._daemons[name] = int(self._keeper.stdout.readline())

    def _write_configuration(self) -> None:
        host, (controller, *ports) = socket.gethostname().split(".")[0], free_ports(1 + len(self.nodes))
        hardware = f"CPUs={self.cores} Boards=1 SocketsPerBoard=1 CoresPerSocket={self.cores} ThreadsPerCore=1"
        hardware += f" RealMemory=2000000 Gres=gpu:h100:{self.gpus}"
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {hardware}"
            for name, port in zip(self.nodes, ports, strict=True)
        ]
        for name in ("state", *(f"spool.{name}" for name in self.nodes)):
            (self.folder / name).mkdir()
        settings = {"host": host, "controller_port": controller, "folder": self.folder, "nodes": "\n".join(nodes)}
        (self.folder / "slurm.conf").write_text(_CONFIGURATION.format(**settings))
        devices = [_device(self.folder / f"gpu{number}") for number in range(self.gpus)]
        lines = [f"NodeName={name} Name=gpu Type=h100 File={path}" for name in self.nodes for path in devices]
        (self.folder / "gres.conf").write_text("\n".join(lines) + "\n")


def _device(path: Path) -> Path:
    """What stands for a GPU: a device like /dev/null, or an empty file where none may be made."""
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        path.touch()
    return path
