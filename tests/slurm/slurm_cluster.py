"""A real Slurm of two nodes on this machine: munge, slurmctld and two slurmd, all of whose state is in a folder."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "ip", "setsid")
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"])
"""The scripts call `python` and `ray`: those of this environment, activated or not."""
PASSED_ON = ("LD_LIBRARY_PATH", "OMP_NUM_THREADS", "VERL_PLATFORM", "HF_HUB_OFFLINE", "PYTHONPATH")
CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
MpiDefault=none
ReturnToService=2
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=16
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""
"""Each node pretends to have more CPUs than there are: Ray counts them. A requeued job waits for its credential to
expire, which by default takes two minutes."""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_until(is_so: Callable[[], bool], seconds: float, what: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


@dataclass
class Slurm:
    """Its commands, and what jobs print."""

    folder: Path
    environment: dict[str, str]
    """Of those who submit."""

    def run(self, *command: str, **variables: str) -> str:
        environment = self.environment | variables
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    def submit(self, *command: str, **variables: str) -> str:
        """Submit one task on each of both nodes, with a log of its own; the job's number."""
        log = self.folder / "%j.log"
        options = ("--parsable", "--nodes=2", "--gpus-per-node=0", "--cpus-per-task=8", "--time=30", f"--output={log}")
        return self.run("sbatch", *options, *command, **variables).strip()

    def job(self, number: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", number)))

    def log(self, number: str) -> str:
        file = self.folder / f"{number}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def wait_for_text(self, number: str, text: str, seconds: float = 180, times: int = 1) -> None:
        wait_until(lambda: self.log(number).count(text) >= times, seconds, lambda: self.log(number)[-5000:])

    def wait_for_end(self, number: str, seconds: float = 180) -> dict[str, str]:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_until(lambda: self.job(number)["JobState"] in ended, seconds, lambda: self.log(number)[-5000:])
        return self.job(number)


def start(folder: Path, environment: dict[str, str], *command: str) -> "subprocess.Popen[bytes]":
    with open(folder / "daemons.log", "ab") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


@contextmanager
def running_slurm() -> Iterator[Slurm]:
    """The daemons, from the first node that is idle to the last job that has ended; skips where they cannot run."""
    missing = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: slurmctld slurmd slurm-client munge iproute2)")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons start jobs as another user only for root")
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # short: names of sockets have a limit
    folder.chmod(0o755)
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    environment = passed_on | {"PATH": PATH, "HOME": str(folder), "SLURM_CONF": str(folder / "slurm.conf")}
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(
        CONFIG.format(host=socket.gethostname().split(".")[0], folder=folder, ports=free_ports(3))
    )
    munge = [f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    daemons = [start(folder, environment, "munged", "--foreground", "--force", f"--key-file={key}", *munge)]
    try:
        wait_until(lambda: (folder / "munge.socket").exists(), 20)
        daemons.append(start(folder, environment, "slurmctld", "-D"))
        daemons += [start(folder, environment, "slurmd", "-D", "-N", name) for name in ("node1", "node2")]
        result = Slurm(folder, environment)

        def nodes_are_idle() -> bool:
            command = ["sinfo", "--noheader", "--partition=low", "--format=%T %D"]
            found = subprocess.run(command, env=environment, capture_output=True, text=True)
            return found.stdout.strip() == "idle 2"

        wait_until(nodes_are_idle, 60, lambda: (folder / "daemons.log").read_text()[-5000:])
        yield result
        subprocess.run(["scancel", "--signal=KILL", "--user=root"], env=environment, timeout=60)
        subprocess.run(["scancel", "--user=root"], env=environment, timeout=60)
        wait_until(lambda: not result.run("squeue", "--noheader"), 60)
    finally:
        for daemon in reversed(daemons):
            os.killpg(daemon.pid, signal.SIGTERM)
        for daemon in daemons:
            daemon.wait(30)
        shutil.rmtree(folder, ignore_errors=True)
