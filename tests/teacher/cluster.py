"""A real Slurm of two virtual nodes on this machine, for as long as a test needs it."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.tools import clean_environment, free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
NODES = ("n1", "n2")
CPUS = 2


def why_not() -> str | None:
    """What keeps Slurm from running here; None if nothing does."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)}); on Debian: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "starting Slurm's daemons needs root"


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Cluster:
    """Client commands of a running cluster."""

    def __init__(self, root: Path) -> None:
        self.root = root
        own = {"SLURM_CONF": str(root / "slurm.conf"), "PATH": _path()}
        kept = {k: v for k, v in clean_environment().items() if not k.startswith(("SLURM_", "SBATCH_"))}
        self.environment = kept | own

    def call(self, *command: object) -> str:
        """Standard output of a client command."""
        words = [str(word) for word in command]
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def submit(self, *arguments: object) -> int:
        """`sbatch`; returns the job's number. Output of task N goes to `<root>/<job>_<N>.out`."""
        return int(self.call("sbatch", "--parsable", f"--output={self.root}/%A_%a.out", *arguments).strip())

    def states(self, job: int) -> dict[int, str]:
        """State of each task of an array that is still known and not ended."""
        lines = self.call("squeue", "--noheader", "--array", "--format=%K %T", f"--jobs={job}").split("\n")
        return {int(line.split()[0]): line.split()[1] for line in lines if line.strip()}

    def wait(self, job: int, *, timeout: float) -> None:
        """Wait until no task of the array is pending or running."""
        deadline = time.monotonic() + timeout
        while self.call("squeue", "--noheader", f"--jobs={job}").strip():
            assert time.monotonic() < deadline, f"job {job} did not end: {self.states(job)}\n{self.logs(job)}"
            time.sleep(0.2)

    def logs(self, job: int) -> str:
        """Output of all tasks of a job."""
        return "\n".join(f"{p.name}: {p.read_text()}" for p in sorted(self.root.glob(f"{job}_*.out")))


@contextmanager
def running_cluster(root: Path) -> Iterator[Cluster]:
    """Start munge, the controller and two node daemons, all with files of their own under `root`; end them after."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "state").mkdir()
    key = root / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    (root / "slurm.conf").write_text(_configuration(root))
    cluster = Cluster(root)
    daemons: list[subprocess.Popen[bytes]] = []

    def start(name: str, *arguments: object) -> None:
        with open(root / f"{name}.{len(daemons)}.log", "wb") as log:
            command = [name, *map(str, arguments)]
            daemons.append(subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log))

    try:
        files = (f"--{name}-file={root}/munge.{name}" for name in ("key", "pid", "log", "seed"))
        start("munged", "--foreground", "--force", f"--socket={root}/munge.socket", *files)
        _until(lambda: (root / "munge.socket").exists(), "munged gave no socket", root)
        start("slurmctld", "-D")
        for node in NODES:
            (root / node).mkdir()
            start("slurmd", "-D", "-N", node)
        _until(lambda: _num_idle(cluster) == len(NODES), "the nodes did not come up", root)
        yield cluster
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _configuration(root: Path) -> str:
    host = socket.gethostname().split(".")[0]
    lines = [
        "ClusterName=test",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={free_port()}",
        "SlurmUser=root",
        "SlurmdUser=root",
        # a requeued job waits until its credential has expired: seconds here, not Slurm's two minutes
        f"AuthInfo=socket={root}/munge.socket,cred_expire=10",
        f"StateSaveLocation={root}/state",
        f"SlurmdSpoolDir={root}/%n",
        f"SlurmctldPidFile={root}/slurmctld.pid",
        f"SlurmdPidFile={root}/slurmd.%n.pid",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "MpiDefault=none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU",
        "SlurmdParameters=config_overrides",
        "AccountingStorageType=accounting_storage/none",
        "JobAcctGatherType=jobacct_gather/none",
        "ReturnToService=2",
        "SchedulerParameters=sched_min_interval=100000",
        *(f"NodeName={n} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs={CPUS}" for n in NODES),
        f"PartitionName=main Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP",
    ]
    return "\n".join(lines) + "\n"


def _num_idle(cluster: Cluster) -> int:
    command = ["sinfo", "--noheader", "--Node", "--format=%T"]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=30)
    return done.stdout.split().count("idle")


def _until(reached: Callable[[], bool], complaint: str, root: Path, *, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not reached():
        logs = "\n".join(f"{p.name}: {p.read_text()[-1500:]}" for p in sorted(root.glob("*.log")))
        assert time.monotonic() < deadline, f"{complaint}\n{logs}"
        time.sleep(0.1)
