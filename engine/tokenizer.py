"""The tokenizer: loaded beside the model or made on the spot, sent to the generators as files.

transformers is imported inside the functions: it takes seconds, and most who import this module need one name of it.
"""

import json
import re
import tempfile
from bisect import bisect_left
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from engine.config import ConfigError, Model, Tokenizer
from engine.origin import check_model
from rewards.spelling import suggestion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD, EOS = "<pad>", "<eos>"
PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")  # as transformers 4 and 5 call it in tokenizer_config.json

Prompt = str | list[dict[str, Any]]  # text, or chat messages with `role` and `content`


def load(model: Model) -> "PreTrainedTokenizerBase":
    """The tokenizer in `model.path`, or a new one of `model.tokenizer`, with `model.chat_template`.

    Raises `ConfigError` where there is none, it has no end-of-sequence token, or its chat template lacks a variable of
    `model.chat_template_kwargs`.
    """
    tokenizer = make(model.tokenizer) if model.init else _read(model)
    if model.chat_template:
        tokenizer.chat_template = model.chat_template
    chat = tokenizer.chat_template
    words = re.findall(r"\w+", chat if isinstance(chat, str) else " ".join((chat or {}).values()))
    for name, value in model.chat_template_kwargs.items():
        if name not in words:
            problem = "the chat template has no such variable" if chat else "the tokenizer has no chat template"
            near = suggestion(name, set(words))
            raise ConfigError(f"model.chat_template_kwargs.{name} = {value!r}: {problem}{near}")
    return tokenizer


def _read(model: Model) -> "PreTrainedTokenizerBase":
    check_model("model.path", model.path)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model.path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"model.path = {model.path!r}: no tokenizer could be loaded: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.path = {model.path!r}: its tokenizer has no end-of-sequence token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def make(spec: Tokenizer) -> "PreTrainedTokenizerBase":
    """A tokenizer whose tokens are the characters of `alphabet` and the `words`; text is cut longest word first.

    Token 0 pads, token 1 ends a sequence. There is no unknown token: it would be one more thing to sample.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    pieces = [*spec.alphabet, *spec.words]
    _check_pieces(pieces)
    backend = Backend(models.WordLevel({piece: number for number, piece in enumerate([PAD, EOS, *pieces])}))
    longest_first = sorted(pieces, key=len, reverse=True)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def _check_pieces(pieces: list[str]) -> None:
    if not pieces:
        raise ConfigError("model.tokenizer: [model.init] needs an alphabet or words")
    for piece in pieces:
        if piece in ("", PAD, EOS) or pieces.count(piece) > 1:
            raise ConfigError(f"model.tokenizer: {piece!r} stands twice, is empty or is reserved ({PAD}, {EOS})")


def vocabulary(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """What a new model must know of it."""
    ids = {"eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}
    return {"vocab_size": len(tokenizer), **{name: int(number) for name, number in ids.items()}}  # pyright: ignore[reportArgumentType]


def files(tokenizer: "PreTrainedTokenizerBase") -> dict[str, bytes]:
    """The tokenizer as its files by name, small enough for a message."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        root = Path(directory)
        return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def from_files(contents: dict[str, bytes]) -> "PreTrainedTokenizerBase":
    """The tokenizer that `files` gave; names of other files are ignored."""
    kind = _kind(contents)
    with tempfile.TemporaryDirectory() as directory:
        for name, content in contents.items():
            path = Path(directory, name)
            if not path.resolve().is_relative_to(Path(directory).resolve()):
                raise ValueError(f"a tokenizer file outside its directory: {name!r}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return kind.from_pretrained(directory)


def _kind(contents: dict[str, bytes]) -> Any:
    """The class that reads them. AutoTokenizer imports much that a plain tokenizer does without: seconds at every start
    of a coordinator."""
    if json.loads(contents.get("tokenizer_config.json", b"{}")).get("tokenizer_class") in PLAIN:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def render(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Prompt,
    template: str = "{prompt}",
    system: str = "",
    variables: dict[str, Any] | None = None,
) -> str:
    """The text that the model reads: a text prompt in `template`, and all in the chat template where there is one, with
    its `variables`.

    Raises `ValueError` for chat messages or a system message without a chat template, or what that refuses.
    """
    text = template.replace("{prompt}", prompt) if isinstance(prompt, str) else None
    if tokenizer.chat_template is None:
        if text is None or system:
            raise ValueError(f"{'chat messages' if text is None else 'system'}: the tokenizer has no chat template")
        return text
    messages = [{"role": "user", "content": text}] if isinstance(prompt, str) else prompt
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    try:
        options = {"add_generation_prompt": True, **(variables or {})}
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, TypeError, KeyError) as error:
        raise ValueError(f"the chat template: {type(error).__name__}: {error}") from error


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> np.ndarray:
    """`text` as int32 [P]. Raises `ValueError` for a character that a made tokenizer does not know."""
    special = tokenizer.chat_template is None  # a chat template writes its own special tokens
    try:
        return np.array(tokenizer(text, add_special_tokens=special)["input_ids"], np.int32)
    except Exception as error:  # tokenizers raises nothing narrower
        if "[UNK]" not in str(error):
            raise
        unknown = "".join(sorted(set(text) - set("".join(tokenizer.get_vocab()))))
        raise ValueError(f"the tokenizer has no token for {unknown or text!r}, see model.tokenizer") from error


def decode(tokenizer: "PreTrainedTokenizerBase", token_ids: np.ndarray | list[int]) -> str:
    """The text of a completion, special tokens left out."""
    ids = token_ids.tolist() if isinstance(token_ids, np.ndarray) else token_ids
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)  # without transformers' own 30 us a call
    return str(backend.decode(ids, skip_special_tokens=True))


def token_ends(tokenizer: "PreTrainedTokenizerBase", token_ids: np.ndarray, ends: list[int]) -> list[int]:
    """How many of a completion's tokens reach each of `ends`, given in characters of their text; all of them, special
    tokens included, for the end of the text."""
    length = len(decode(tokenizer, token_ids))
    return [
        len(token_ids)
        if end >= length
        else bisect_left(range(len(token_ids)), end, key=lambda count: len(decode(tokenizer, token_ids[:count])))
        for end in ends
    ]
