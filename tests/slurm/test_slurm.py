"""examples/slurm on a real Slurm of two nodes, which are both this machine."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import Tiny
from slurm_cluster import Slurm, free_ports, running_slurm, wait_until

pytestmark = pytest.mark.xdist_group("slurm")  # one cluster

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = EXAMPLES / "slurm"
SRUN = '"${on_all_nodes[@]}" --nodes=1 --ntasks=1 bash -c "$RELAY" task'
STOPPED = "75:0"
"""Slurm's words for the exit code of a run that was asked to end."""

RUN_THAT_STOPS = """#!/bin/bash
# A job whose run starts deaf, as Python does, and ends when it is asked to; after some restarts it is done.
source {job}
export restarts=${{SLURM_RESTART_COUNT:-0}}
code=0
run_group {launcher} bash -c '
echo "run $restarts of the job began"
if ((restarts == {runs})); then exit {code}; fi
sleep 3
python -c "
import signal, sys
def end(number, frame):
    signal.signal(number, signal.SIG_IGN)
    sys.exit(75)
signal.signal(signal.SIGUSR1, end)
print(\\"ready\\", flush=True)
signal.pause()
"
' || code=$?
end_job "$code"
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    with running_slurm() as found:
        yield found


@pytest.fixture
def slurm(cluster: Slurm) -> Iterator[Slurm]:
    """After each test its jobs have ended, and no process of them is left."""
    before = {process.pid for process in psutil.process_iter()}
    yield cluster
    wait_until(lambda: not cluster.run("squeue", "--noheader"), 180, lambda: cluster.run("squeue"))

    def left() -> list[str]:
        marker = str(cluster.folder)
        found = []
        for process in psutil.process_iter(["pid", "cmdline"]):
            if process.pid in before:
                continue
            try:
                environment = process.environ()
            except psutil.Error:
                continue
            if "SLURM_JOB_ID" in environment and environment.get("SLURM_CONF", "").startswith(marker):
                found.append(" ".join(process.info["cmdline"] or []))
        return found

    wait_until(lambda: not left(), 90, lambda: "\n".join(left()))


def stopping_job(slurm: Slurm, name: str, runs: int, code: int = 0, launcher: str = "") -> str:
    file = slurm.folder / f"{name}.sh"
    file.write_text(RUN_THAT_STOPS.format(job=SCRIPTS / "job.sh", runs=runs, code=code, launcher=launcher))
    return str(file)


STOPS = ("--requeue", "--open-mode=append", "--signal=B:USR1@60")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["", SRUN], ids=["of the shell", "of srun"])
def test_a_run_that_is_ended_goes_back_to_the_queue(slurm: Slurm, launcher: str) -> None:
    """By Slurm's warning while it starts, and by SIGTERM; at the end the job has the run's exit code."""
    job = slurm.submit(*STOPS, stopping_job(slurm, "stops", runs=2, code=7, launcher=launcher))
    slurm.wait_for_text(job, "run 0 of the job began")
    slurm.run("scancel", "--signal=USR1", "--batch", job)  # what --signal=B:USR1 sends; the run is deaf yet
    slurm.wait_for_text(job, "Requeued: the run ended at a checkpoint, restart 1 of at most 100")
    slurm.wait_for_text(job, "ready", times=2)
    slurm.run("scancel", "--signal=TERM", "--batch", job)
    slurm.wait_for_text(job, "restart 2 of at most 100")
    assert slurm.wait_for_end(job)["ExitCode"] == "7:0"
    assert slurm.log(job).count("of the job began") == 3


@pytest.mark.slow
def test_requeues_are_bounded_and_a_cancelled_job_stays_so(slurm: Slurm) -> None:
    bounded = slurm.submit(*STOPS, stopping_job(slurm, "bounded", runs=9), MAX_RESTARTS="0")
    cancelled = slurm.submit(*STOPS, stopping_job(slurm, "cancelled", runs=9))
    for job in (bounded, cancelled):
        slurm.wait_for_text(job, "ready")
    slurm.run("scancel", "--signal=USR1", "--batch", bounded)
    slurm.run("scancel", cancelled)
    found = slurm.wait_for_end(bounded)
    assert (found["JobState"], found["ExitCode"]) == ("FAILED", STOPPED)
    assert "Error: MAX_RESTARTS=0: the job was requeued as often; submit it again to go on" in slurm.log(bounded)
    assert slurm.wait_for_end(cancelled)["JobState"] == "CANCELLED"
    assert "Requeued" not in slurm.log(cancelled)


SCRIPT = """
echo "arguments: $*"
echo "size: $NNODES x $NGPUS_PER_NODE"
python - <<'EOF'
import os, ray
ray.init(log_to_driver=False)
found = ray.cluster_resources()
print("GPUs:", found["GPU"], "CPUs:", found["CPU"])
@ray.remote(num_gpus=4)
def variables():
    return [os.environ.get(name) for name in ("OF_THE_USER", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")]
print("workers:", ray.get([variables.remote(), variables.remote()]))
EOF
exit 3
"""


@pytest.mark.slow
def test_ray_on_two_nodes(slurm: Slurm) -> None:
    """Both join with their CPUs and with the user's environment; the job has the script's exit code."""
    (slurm.folder / "script.sh").write_text(SCRIPT)
    folder = Path("/tmp") / f"{slurm.folder.name}r"  # short: Ray's socket names have a limit
    port = free_ports(1)[0]
    job = slurm.submit(
        str(SCRIPTS / "hpd.sbatch"),
        str(slurm.folder / "script.sh"),
        "a=1",
        "b=x y",
        HEAD_ADDRESS="127.0.0.1",
        RAY_PORT=str(port),
        RAY_TMPDIR=str(folder),
        NGPUS_PER_NODE="4",
        OF_THE_USER="forwarded",
    )
    found = slurm.wait_for_end(job, 240)
    shutil.rmtree(folder, ignore_errors=True)
    log = slurm.log(job)
    assert (found["JobState"], found["ExitCode"]) == ("FAILED", "3:0"), log[-5000:]
    assert f"Ray: 2 nodes at 127.0.0.1:{port}, 8 GPUs, 16 CPUs" in log
    assert "arguments: a=1 b=x y\nsize: 2 x 4\n" in log
    assert "GPUs: 8.0 CPUs: 16.0\n" in log
    assert "workers: [['forwarded', 'lo', 'lo'], ['forwarded', 'lo', 'lo']]" in log


@pytest.mark.slow
def test_a_node_that_never_comes(slurm: Slurm) -> None:
    """Its Ray hangs: one line after START_TIMEOUT, and the job is over. A Ray that fails ends it sooner."""
    ray = slurm.folder / "bin" / "ray"
    ray.parent.mkdir(exist_ok=True)
    ray.write_text('#!/bin/bash\n[[ -z ${RAY_FAILS:-} ]] || { echo "ray is broken" >&2; exit 1; }\nsleep 600\n')
    ray.chmod(0o755)
    variables = {"PATH": f"{ray.parent}:{slurm.environment['PATH']}", "RAY_PORT": str(free_ports(1)[0])}
    command = (str(SCRIPTS / "hpd.sbatch"), "no_script.sh")
    hangs = slurm.submit(*command, START_TIMEOUT="5", **variables)
    fails = slurm.submit(*command, RAY_FAILS="1", **variables)
    for job, line in {
        hangs: "Error: no Ray head at .* within START_TIMEOUT=5 seconds",
        fails: "Error: srun has ended, its message is above",
    }.items():
        found = slurm.wait_for_end(job)
        assert (found["JobState"], found["ExitCode"]) == ("FAILED", "1:0"), slurm.log(job)
        (error,) = [each for each in slurm.log(job).splitlines() if each.startswith("Error: ")]
        assert re.fullmatch(line, error)
    assert "ray is broken" in slurm.log(fails)


def steps(log: str) -> list[int]:
    """The steps that were logged, in the order of the log; verl's file of metrics begins anew with each start."""
    return [int(step) for step in re.findall(r"training/global_step:(\d+)", log)]


@pytest.mark.slow
def test_the_lean_trainer_survives_preemption(slurm: Slurm, tiny: Tiny) -> None:
    """One run of an array job on two nodes, preempted by a job of another partition: no step is lost or made twice."""
    (slurm.folder / "sweep.txt").write_text("optim.lr=1e-3\noptim.lr=1e-2 'trainer.project_name=two words'\n")
    array = slurm.submit(
        "--array=2",
        "--exclusive",
        str(SCRIPTS / "sweep.sbatch"),
        "sweep.txt",
        *tiny.sft,
        "trainer.logger=[console]",
        "trainer.total_training_steps=40",
        "trainer.save_freq=-1",
        HEAD_ADDRESS="127.0.0.1",
        MASTER_PORT=str(free_ports(1)[0]),
        NGPUS_PER_NODE="1",
    )
    job = slurm.job(f"{array}_2")["JobId"]
    wait_until(lambda: len(steps(slurm.log(job))) >= 5, 200, lambda: slurm.log(job)[-5000:])
    urgent = slurm.submit("--partition=high", "--exclusive", "--wrap=true")
    assert slurm.wait_for_end(urgent)["JobState"] == "COMPLETED"
    slurm.wait_for_text(job, "Requeued")
    first = steps(slurm.log(job))
    assert 5 <= len(first) < 40
    found = slurm.wait_for_end(job, 200)
    text = slurm.log(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), text[-5000:]
    assert steps(slurm.log(job)) == list(range(1, 41))
    folder = "checkpoints/two words/sweep_2"
    assert f"Stopped by SIGTERM after step {len(first)} of 40: {slurm.folder}/{folder}/global_step_{len(first)}" in text
    assert "Requeued: the run ended at a checkpoint, restart 1 of at most 100" in text
    assert (slurm.folder / folder / "global_step_40" / "complete").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("script", "line"), [("hpd", "usage: sbatch"), ("sft", "usage: sbatch"), ("sweep", "usage:")])
def test_arguments_are_needed(slurm: Slurm, script: str, line: str) -> None:
    job = slurm.submit(str(SCRIPTS / f"{script}.sbatch"))
    assert slurm.wait_for_end(job)["ExitCode"] == "2:0"
    assert slurm.log(job).startswith(line)
