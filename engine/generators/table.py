"""The generators by the name that `generator.engine` gives them."""

from engine.config import Config
from engine.generators import embedded, server, sglang

# (config, files of the welcome, tokenizer) -> Generator
GENERATORS = {"embedded": embedded.from_files, "sglang": sglang.from_files}


def check_generator(config: Config) -> None:
    """Raises `ConfigError` where the generators that this host would start cannot start."""
    if config.generator.engine == "sglang" and not config.generator.sglang.url:
        server.check(config)
