"""A real Slurm of two virtual nodes on this machine, for as long as a test needs it."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
    """A running cluster: client commands, and its nodes' lives."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.daemons: list[subprocess.Popen[bytes]] = []
        self._conf = root / "slurm.conf"
        own = {"SLURM_CONF": str(self._conf), "PATH": _path()}
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
            assert time.monotonic() < deadline, f"{self.call('squeue')}\n{self.logs(job)}"
            time.sleep(0.2)

    def start(self, name: str, *arguments: object) -> None:
        """Start one of Slurm's daemons in the foreground of a process of ours."""
        with open(self.root / f"{name}.{len(self.daemons)}.log", "wb") as log:
            command = [name, *map(str, arguments)]
            self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def start_node(self, node: str) -> None:
        """Switch a node on."""
        self.start("slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """SIGKILL a node's daemon and all that runs on the node, as a power cut would; `start_node` brings it back."""
        tasks = [p for p, e in _environments() if {f"SLURMD_NODENAME={node}", f"SLURM_CONF={self._conf}"} <= e]
        steps = {parent for task in tasks if _command(parent := _parent(task)).startswith("slurmstepd")}
        daemons = [daemon.pid for daemon in self.daemons if _command(daemon.pid) == f"slurmd\0-D\0-N\0{node}\0"]
        assert tasks and steps and daemons, f"nothing of a job runs on {node}: {tasks} {steps} {daemons}"
        for process in [*daemons, *steps, *tasks]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def kill_jobs(self) -> None:
        """End whatever still runs, as after a test that failed: without their daemons, jobs would run for ever."""
        own = {os.getpid(), *(daemon.pid for daemon in self.daemons)}
        for process in {p for p, e in _environments() if f"SLURM_CONF={self._conf}" in e} - own:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

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
    try:
        files = (f"--{name}-file={root}/munge.{name}" for name in ("key", "pid", "log", "seed"))
        cluster.start("munged", "--foreground", "--force", f"--socket={root}/munge.socket", *files)
        _until(lambda: (root / "munge.socket").exists(), "munged gave no socket", root)
        cluster.start("slurmctld", "-D")
        for node in NODES:
            (root / node).mkdir()
            cluster.start_node(node)
        _until(lambda: _num_idle(cluster) == len(NODES), "the nodes did not come up", root)
        yield cluster
    finally:
        cluster.kill_jobs()
        for daemon in reversed(cluster.daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in cluster.daemons:
            try:
                daemon.wait(timeout=5)
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
        f"AuthInfo=socket={root}/munge.socket,cred_expire=5",
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


def _environments() -> Iterator[tuple[int, set[str]]]:
    """Process number and environment of every process that may be looked at."""
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with suppress(OSError):
                yield int(path.name), set((path / "environ").read_bytes().decode(errors="replace").split("\0"))


def _parent(process: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _command(process: int) -> str:
    """The command line, words ended by NUL; empty if there is no such process."""
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text()
    return ""
