"""Bring up Slurm on this machine alone, run a small sweep through it, and write down what happened.

``python experiments/slurm/run.py`` as root on Debian, in an environment with ``tokenreduce[submitit]``. Nothing of the
machine's own configuration is touched, and all is taken down again. The sweep is then run a second time without Slurm:
its records must be the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenreduce.evaluation import read_records

HERE = Path(__file__).parent
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
SWEEP = (
    "-m",
    "reducer=fopru_rank,divprune",
    "reducer.keep=0.5,0.25",
    "benchmark.limit=60",
    "evaluation.random_seeds=1",
    "evaluation.timing_pairs=0",
    "evaluation.pictures=0",
    "tracking=none",
)
SLURM = ("launcher=submitit_slurm", "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1")
CONFIGURATION = """\
ClusterName=alone
SlurmctldHost={host}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
# In a container there are no control groups to put jobs into.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed.txt
NodeName={host} CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def main() -> None:
    if os.geteuid() != 0:
        sys.exit("Slurm's daemons are started here, which takes root")
    if not all(map(shutil.which, ("slurmctld", "slurmd", "sbatch", "munged"))):
        subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES], check=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with slurm(folder):
            run(folder / "through_slurm", *SWEEP, *SLURM)
            version = subprocess.check_output(["sinfo", "--version"], text=True).strip()
        run(folder / "serial", *SWEEP)
        evidence = {
            "slurm": version,
            "command": f"python -m tokenreduce {' '.join((*SWEEP, *SLURM))}",
            "jobs": jobs(folder / "through_slurm"),
            "accounting": accounting((folder / "completed.txt").read_text(encoding="utf-8")),
            "records": hashes(folder / "through_slurm"),
        }
        if evidence["records"] != hashes(folder / "serial"):
            sys.exit("the records are not those of a serial run")
    (HERE / "evidence.json").write_text(json.dumps(evidence, indent=1) + "\n", encoding="utf-8")
    print(f"{len(evidence['accounting'])} jobs, same records as a serial run: {HERE / 'evidence.json'}")


@contextmanager
def slurm(folder: Path) -> Iterator[None]:
    """A cluster of this one machine, for programs started meanwhile."""
    host = socket.gethostname().split(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(host=host, folder=folder, cpus=os.cpu_count()), encoding="utf-8")
    os.environ["SLURM_CONF"] = str(configuration)
    options = {"key": "key-file", "socket": "socket", "pid": "pid-file", "log": "log-file", "seed": "seed-file"}
    munge = ["munged", "--foreground", "--force"]
    munge += [f"--{option}={folder}/munge.{name}" for name, option in options.items()]
    daemons = []
    try:
        for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D"]):
            daemons.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            time.sleep(2)
        for _ in range(60):
            state = subprocess.run(
                ["sinfo", "--noheader", "--format=%T"], capture_output=True, text=True
            ).stdout.strip()
            if state == "idle":
                break
            time.sleep(1)
        else:
            sys.exit(f"the node is {state or 'not there'}\n{(folder / 'slurmd.log').read_text()[-2000:]}")
        yield
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()
        del os.environ["SLURM_CONF"]


def run(output: Path, *arguments: str) -> None:
    """The command, with its results in ``output``."""
    subprocess.run([sys.executable, "-m", "tokenreduce", *arguments, f"output={output}"], check=True)


def jobs(output: Path) -> list[dict[str, str]]:
    """What each job of the sweep was asked, and the run that it left."""
    outcomes = [json.loads(path.read_text()) for path in sorted(output.glob("sweep-*/jobs/*.json"))]
    return [
        {"array_task": str(outcome["number"]), "asked": " ".join(outcome["overrides"][:2]), "run": outcome["run"]}
        for outcome in outcomes
    ]


def accounting(text: str) -> list[str]:
    """Slurm's own lines about finished jobs, less the names of this machine and its folders."""
    host = socket.gethostname().split(".")[0]
    return [re.sub(r"WorkDir=\S+", "WorkDir=.", line.replace(host, "node")).strip() for line in text.splitlines()]


def hashes(output: Path) -> dict[str, str]:
    """A digest of every run's records, less the seconds that they took."""
    found = {}
    for path in sorted(output.glob("*/records.jsonl")):
        lines = [{**vars(record), "seconds": None} for record in read_records(path.parent)]
        found[path.parent.name] = hashlib.sha256(json.dumps(lines, default=vars).encode()).hexdigest()[:16]
    return found


if __name__ == "__main__":
    main()
