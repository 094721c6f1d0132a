"""Each script in launch starts the example on the hosts of a cluster in a box, as it stands."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from boxes import BOX, DEADLINE, ROOT, unavailable, until
from cluster_in_a_box import Cluster

LAUNCH = ROOT / "launch"
EXAMPLE = f"{ROOT}/examples/cluster.py"
STEPS = 300  # of the runs that are broken off, or not


@pytest.fixture(autouse=True)
def _needs(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("root") and unavailable():
        pytest.skip(unavailable())


def finished(output: str, ranks: int, steps: int = 20) -> bool:
    start, end = (
        output.find(f"{ranks} ranks, from step 0 to {steps}\n"),
        output.find(f"% of the test images after {steps} steps\n"),
    )
    return 0 <= start < end


def run(*command: str, **environment: str) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Output and checkpoint of a run that nothing breaks off."""
    checkpoint = tmp_path_factory.mktemp("whole") / "run.pt"
    options = ["--steps", str(STEPS), "--every", "20", "--checkpoint", str(checkpoint)]
    return run("bash", "launch/single_host.sh", *options), checkpoint


def test_a_single_host(whole: tuple[str, Path]) -> None:
    assert finished(whole[0], 2, STEPS)
    saved = torch.load(whole[1], weights_only=True)
    assert saved["grain"]["step"] == STEPS


TRAINING = {  # what TRAIN says, and the words of the command
    "{file}": ["{file}"],
    '"{quoted}" --name "two words" --n 3': ["{file}", "--name", "two words", "--n", "3"],
    "train.py --n 3": ["train.py", "--n", "3"],
}


@pytest.mark.parametrize("train", TRAINING)
@pytest.mark.parametrize(
    "script", [path for path in sorted(LAUNCH.iterdir()) if "TRAIN" in path.read_text()], ids=str
)
def test_spaces_and_quotes_in_the_training_command(
    script: Path, train: str, tmp_path: Path
) -> None:
    file = tmp_path / 'my "best" run\'s' / "train.py"
    file.parent.mkdir()
    file.touch()
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("torchrun", "deepspeed", "srun", "scontrol"):
        path = programs / name
        path.write_text(
            "#!/bin/sh\n" + ("printf '%s\\n' \"$@\"" if name != "scontrol" else "echo h")
        )
        path.chmod(0o755)
    result = subprocess.run(
        ["bash", str(script), "--steps", "a b"],
        env={
            "PATH": f"{programs}:{os.environ['PATH']}",
            "TRAIN": train.format(file=file, quoted=str(file).replace('"', '\\"')),
            **{f"SLURM_{name}": "1" for name in ("JOB_ID", "JOB_NODELIST", "NTASKS", "NNODES")},
        },
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert result.returncode == 0, result.stderr
    words = [word.format(file=file) for word in TRAINING[train]] + ["--steps", "a b"]
    assert result.stdout.splitlines()[-len(words) :] == words


def test_a_file_with_a_space_and_a_quote_is_trained(tmp_path: Path) -> None:
    file = tmp_path / "my best run's" / "cluster.py"
    file.parent.mkdir()
    shutil.copy(EXAMPLE, file)
    assert finished(run("bash", "launch/single_host.sh", "--steps", "20", TRAIN=str(file)), 2)


@pytest.mark.root
def test_several_hosts() -> None:
    script = ["bash", "launch/several_hosts.sh", "--steps", "20"]
    assert finished(re.sub("host[01]: ", "", run(*BOX, *script, RANKS="1")), 2)


@pytest.mark.root
def test_deepspeed_with_a_hostfile(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    hosts = tmp_path / "hostfile"
    hosts.write_text("host0 slots=1\nhost1 slots=1\n")
    script = "NODE=$NODE_RANK exec bash launch/deepspeed.sh --steps 20"
    output = run(*BOX, "sh", "-c", script, HOSTFILE=str(hosts), DS_ACCELERATOR="cpu")
    assert finished(re.sub("host[01]: ", "", output), 2)


@contextmanager
def slurm(folder: Path) -> Iterator[Cluster]:
    """A cluster of two hosts that Slurm manages; its daemons end with it."""
    conf, munge = folder / "slurm.conf", folder / "munge"
    munge.mkdir(mode=0o755)
    (folder / "state").mkdir()
    key = munge / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    conf.write_text(
        f"""
        ClusterName=box
        SlurmctldHost=host0
        SlurmUser=root
        AuthType=auth/munge
        AuthInfo=socket={munge}/socket
        StateSaveLocation={folder}/state
        SlurmdSpoolDir={folder}/%n
        SlurmctldPidFile={folder}/slurmctld.pid
        SlurmdPidFile={folder}/%n.pid
        SlurmctldPort=6817
        SlurmdPort=6818
        ProctrackType=proctrack/pgid
        TaskPlugin=task/none
        MpiDefault=none
        ReturnToService=2
        NodeName=host[0-1] CPUs={os.cpu_count()} State=UNKNOWN
        PartitionName=all Nodes=ALL Default=YES MaxTime=10
        """.replace("        ", "")
    )
    # A namespace of `ip netns` has no cgroups mounted, and none are used.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    names = ("socket", "pid-file", "log-file", "seed-file")
    files = [f"--{name}={munge}/{name.removesuffix('-file')}" for name in names]
    settings = {"SLURM_CONF": str(conf)}
    with Cluster(2) as cluster, (folder / "log").open("w") as log:

        def start(host: int, *command: str) -> None:
            cluster.start(host, command, environment=settings, stdout=log, stderr=log)

        start(0, "munged", "--foreground", "--force", f"--key-file={key}", *files)
        until((munge / "socket").exists)
        start(0, "slurmctld", "-D")
        for host in range(2):
            start(host, "slurmd", "-D", "-N", f"host{host}")

        def ready() -> bool:
            done = cluster.start(
                0,
                ["sinfo", "-h", "-t", "idle", "-o", "%D"],
                environment=settings,
                stdout=subprocess.PIPE,
                stderr=log,
            )
            return done.communicate(timeout=DEADLINE)[0].strip() == "2"

        try:
            until(ready, 30)
        except AssertionError as error:
            raise AssertionError((folder / "log").read_text()[-5000:]) from error
        yield cluster


@pytest.mark.root
def test_slurm(tmp_path: Path) -> None:
    missing = [tool for tool in ("munged", "slurmctld", "slurmd") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt install slurm-wlm munge")
    with slurm(tmp_path) as cluster:

        def ask(*command: str) -> str:
            process = cluster.start(
                0,
                command,
                environment={"SLURM_CONF": str(tmp_path / "slurm.conf"), "RANKS": "1"},
                cwd=ROOT,
                stdout=subprocess.PIPE,
            )
            return process.communicate(timeout=DEADLINE)[0]

        for name in ("slurm_torchrun", "slurm_srun"):
            output = tmp_path / f"{name}.out"
            options = ["--ntasks-per-node=1", "--overcommit", f"--output={output}"]
            submitted = ask("sbatch", *options, str(LAUNCH / f"{name}.sbatch"), "--steps", "20")
            until(lambda: not ask("squeue", "-h"), every=0.5)
            text = output.read_text() if output.exists() else (tmp_path / "log").read_text()
            assert finished(text, 2), text
            assert "JobState=COMPLETED" in ask("scontrol", "show", "job", submitted.split()[-1]), (
                text
            )


def test_the_train_job_is_what_trainer_expects() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    manifest = pytest.importorskip("yaml").safe_load((LAUNCH / "trainjob.yaml").read_text())
    # What a model does not know it leaves out, so that an equal dictionary has no unknown key.
    assert models.TrainerV1alpha1TrainJob.from_dict(manifest).to_dict() == manifest
    assert models.TrainerV1alpha1TrainJob.from_dict({**manifest, "sepc": {}}).to_dict() == manifest


def test_the_pytorch_job_is_what_the_training_operator_expects() -> None:
    models = pytest.importorskip("kubeflow.training.models")
    client = pytest.importorskip("kubeflow.training.api_client").ApiClient()
    manifest = pytest.importorskip("yaml").safe_load((LAUNCH / "pytorchjob.yaml").read_text())

    def known(value: Any) -> Any:
        """What is left where the models leave out what they do not know."""
        answer = SimpleNamespace(data=json.dumps(value))
        job = client.deserialize(answer, models.KubeflowOrgV1PyTorchJob)
        return client.sanitize_for_serialization(job)

    assert known(manifest) == manifest
    assert known({**manifest, "sepc": {}}) == manifest


@pytest.mark.root
def test_elastic_resumes_with_the_same_trajectory(whole: tuple[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.pt"
    settings = {"RANKS": "1", "LOST_AFTER": "3"}

    options = ["--every", "20", "--timeout", "20", "--steps", str(STEPS)]
    command = ["bash", "launch/elastic.sh", *options, "--checkpoint", str(broken)]

    def saved() -> int:
        return torch.load(broken, weights_only=True)["grain"]["step"] if broken.exists() else 0

    with Cluster(2) as cluster, (tmp_path / "log").open("w+") as log:

        def start(host: int) -> subprocess.Popen[str]:
            output = {"stdout": log, "stderr": log, "cwd": ROOT}
            return cluster.start(host, command, environment=settings, **output)

        def rank_on(host: int) -> int:
            """The process of the training itself, not torchrun's."""
            for pid in cluster.processes(host):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if words[1:3] == [b"-u", b"examples/cluster.py"]:
                    return pid
            raise AssertionError(f"no rank on host {host}")

        agents = [start(0), start(1)]
        until(lambda: saved() >= 40)
        os.kill(rank_on(1), signal.SIGKILL)
        at = saved()
        until(lambda: saved() >= at + 40)
        cluster.kill(1)  # the host is gone, torchrun too
        assert agents[1].wait(DEADLINE) == -signal.SIGKILL
        at = saved()
        agents[1] = start(1)
        codes = [agent.wait(DEADLINE) for agent in agents]
        log.seek(0)
        text = log.read()
    assert codes == [0, 0], text
    starts = [int(step) for step in re.findall(r"2 ranks, from step (\d+)", text)]
    assert len(starts) >= 3, text
    assert 0 == starts[0] < starts[1] < starts[-1] <= at + 20 < STEPS
    assert "grain_ddp: lost the connection to rank 1" in text
    one, other = (torch.load(path, weights_only=True) for path in (whole[1], broken))
    assert one["grain"] == other["grain"]
    assert one["grain"]["step"] == STEPS
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name])
    for key, values in one["optimizer"]["state"].items():
        momentum = other["optimizer"]["state"][key]["momentum_buffer"]
        assert torch.equal(values["momentum_buffer"], momentum)
