"""The peer's own virtual environment, made on demand: its packages never meet those of the engine."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

DIRECTORY = Path("~/.cache/leeway/peers/trl").expanduser()
INSTALLS = (("torch==2.13.0",), ("trl==1.16.0", "transformers==5.12.1"))  # torch first and alone, by its exact version
ROOT = Path(__file__).resolve().parents[2]
MODULE = "bench.peers.trl_grpo"


def prepare(directory: Path = DIRECTORY) -> Path:
    """The Python of the peer's environment in `directory`, which is made first where it is missing or of other pins.

    Raises `CalledProcessError` where pip fails; the next call then begins anew.
    """
    python, stamp = directory / "bin" / "python", directory / "installed.json"
    pins = json.dumps(INSTALLS)
    if stamp.exists() and stamp.read_text() == pins:
        return python
    print(f"making the peer's environment in {directory}", file=sys.stderr)
    venv.create(directory, clear=True, with_pip=True)
    for packages in INSTALLS:
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
        subprocess.run(command, check=True, env=_variables(), stdout=sys.stderr)
    stamp.write_text(pins)
    return python


def run(arguments: dict[str, Any], *, processes: int, threads: int, directory: Path = DIRECTORY) -> dict[str, Any]:
    """What `bench.peers.trl_grpo` reports when it runs with `arguments` (see there), its processes each on so many
    threads; several processes train data-parallel.

    Raises `CalledProcessError` where it fails; what it said stands on standard error.
    """
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"] if processes > 1 else []
    options = [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]
    command = [prepare(directory), "-m", *launcher, MODULE, *options]
    variables = _variables() | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=True, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _variables() -> dict[str, str]:
    """This process's environment variables, less what would let its packages or its job into the peer's."""
    foreign = ("PYTHONPATH", "PYTHONHOME", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in foreign}
    return kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
