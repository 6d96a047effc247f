"""Whether a model can be had: from a directory, from the hub's cache, or from the hub."""

import re
from pathlib import Path

from engine.config import ConfigError

TIMEOUT_S = 5.0


def check_model(field: str, path: str) -> None:
    """Raises `ConfigError`, within seconds, where `path` is neither a model's directory nor a hub id that can be had.

    Left to itself the hub's client asks again for most of a minute, for every file.
    """
    where = Path(path)
    if where.is_dir():
        if not (where / "config.json").exists():
            raise ConfigError(f"{field} = {path!r}: no model in Hugging Face format: the directory has no config.json")
        return
    if where.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path[0] == ".":
        allowed = "allowed are a model's directory and a hub id, org/name"
        raise ConfigError(f"{field} = {path!r}: no such directory; {allowed}")
    import httpx
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    hub = constants.ENDPOINT
    try:
        if not isinstance(try_to_load_from_cache(path, "config.json"), str):
            HfApi(endpoint=hub).model_info(path, timeout=TIMEOUT_S)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(f"{field} = {path!r}: neither a directory here nor a model on {hub}") from error
    except (httpx.HTTPError, OfflineModeIsEnabled, OSError) as error:
        why = f"{hub} cannot be asked ({str(error).partition(chr(10))[0]})"
        raise ConfigError(f"{field} = {path!r}: no such directory, not in the hub's cache, and {why}") from error
