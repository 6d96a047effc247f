"""The generators by the name that `generator.engine` gives them."""

from engine.generators.embedded import from_files

GENERATORS = {"embedded": from_files}  # (config, files of the welcome, tokenizer) -> Generator
