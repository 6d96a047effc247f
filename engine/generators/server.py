"""An SGLang server as a child process in an environment of its own."""

import json
import os
import secrets
import signal
import socket
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.config import Config, ConfigError
from engine.generators.client import LOADER
from engine.process import ProcessDied, child_environment

SPARE_TOKENS = 16  # SGLang keeps a few of its context for itself, and refuses prompts that leave it none
ROOT = Path(__file__).resolve().parents[2]
# Of ServerArgs: what the generator itself decides, so that the user cannot.
OWNED = (
    "model_path",
    "load_format",
    "dtype",
    "host",
    "port",
    "api_key",
    "custom_weight_loader",
    "tp_size",
    "enable_deterministic_inference",
    "enable_fp32_lm_head",
)
# The attention backends with which it does so; SGLang 0.5.18 ends at its start with another, and has none for CPUs.
DETERMINISTIC = ("ascend", "fa3", "fa4", "flashinfer", "triton")

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}


class Server:
    """Starts at once and serves some time later, at `url` with `api_key`. It dies with this process; what it prints
    goes where this process prints."""

    def __init__(self, config: Config, files: dict[str, bytes], threads: int):
        """`files` describe the model and hold its tokenizer; the weights are arbitrary until they are loaded."""
        check(config)
        spec = config.generator.sglang
        self._directory = tempfile.TemporaryDirectory(prefix="leeway-sglang-")
        for name, content in files.items():
            path = Path(self._directory.name, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        port, self.api_key = _free_port(), secrets.token_hex()
        self.url = f"http://127.0.0.1:{port}"
        options = {
            **_defaults(config),
            **spec.options,
            "model_path": self._directory.name,
            "load_format": "dummy",
            "dtype": config.generator.dtype,
            "host": "127.0.0.1",
            "port": port,
            "api_key": self.api_key,
            "custom_weight_loader": [LOADER],
            "tp_size": config.generator.gpus,
            "enable_deterministic_inference": spec.deterministic,
            "enable_fp32_lm_head": config.model.fp32_head,
        }
        environment = {**child_environment(threads, []), **ENVIRONMENT, **spec.environment}
        environment["PYTHONPATH"] = os.pathsep.join([*map(os.path.abspath, spec.path), str(ROOT)])
        self._process = subprocess.Popen(
            [spec.python, "-m", "engine.generators.guest"],
            env=environment,
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        with self._process.stdin as stdin:  # not the command line, which others can read
            stdin.write(json.dumps(options).encode())
        self.pid = self._process.pid
        self.fd = os.pidfd_open(self.pid)

    def exited(self) -> bool:
        return self._process.poll() is not None

    def error(self) -> ProcessDied:
        """What to raise when it has ended."""
        return ProcessDied(f"the SGLang server (pid {self.pid}) ended with code {self._process.wait()}: see this log")

    def close(self) -> None:
        """Kills it and its own children, which may outlive one that was killed."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self.fd)
        self._directory.cleanup()


def check(config: Config) -> None:
    """Raises `ConfigError` where no server can be started."""
    spec = config.generator.sglang
    if not os.access(spec.python, os.X_OK):
        raise ConfigError(f"generator.sglang.python = {spec.python!r}: is no interpreter; `make sglang` makes one")
    for name in OWNED:
        if name in spec.options:
            raise ConfigError(f"generator.sglang.options.{name} = {spec.options[name]!r}: is set by other fields")
    backend = spec.options.get("attention_backend", DETERMINISTIC[0])
    if spec.deterministic and backend not in DETERMINISTIC:
        allowed = ", ".join(DETERMINISTIC)
        raise ConfigError(f"generator.sglang.deterministic = true: needs an attention_backend of {allowed}: {backend}")


def _defaults(config: Config) -> dict[str, Any]:
    """What the user's options may replace."""
    return {
        "max_running_requests": config.generator.slots,
        "context_length": config.model.context + SPARE_TOKENS,
        "incremental_streaming_output": True,
        "skip_server_warmup": True,
        "log_level": "warning",
        "random_seed": config.run.seed,
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
