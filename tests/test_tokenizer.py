import numpy as np
import pytest

from engine import tokenizer as tokenizers
from engine.config import ConfigError, Model, Tokenizer

CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def made(**spec):
    return tokenizers.load(Model(init={"model_type": "qwen3"}, tokenizer=Tokenizer(**spec), context=32))


def test_characters_become_tokens_after_pad_and_eos():
    tokenizer = made(alphabet="0123456789+= \n")
    ids = tokenizers.encode(tokenizer, "12+ 3=\n")
    assert ids.dtype == np.int32
    assert ids.tolist() == [3, 4, 12, 14, 5, 13, 15]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 16)
    assert tokenizers.decode(tokenizer, [*ids.tolist(), 1]) == "12+ 3=\n"


def test_words_are_cut_longest_first_and_joined_without_spaces():
    tokenizer = made(alphabet="s ", words=["sum", "summand", "a.c"])
    ids = tokenizers.encode(tokenizer, "summand sums a.c").tolist()
    assert ids == [5, 3, 4, 2, 3, 6]
    assert tokenizers.decode(tokenizer, ids) == "summand sums a.c"


def test_an_unknown_character_is_named():
    with pytest.raises(ValueError, match="no token for 'xé'"):
        tokenizers.encode(made(alphabet="012"), "1x2é")


@pytest.mark.parametrize("spec", [{}, {"alphabet": "00"}, {"words": ["a", ""]}, {"words": ["<eos>"]}])
def test_a_tokenizer_that_cannot_be_made_is_refused(spec):
    with pytest.raises(ConfigError, match="model.tokenizer"):
        made(**spec)


def test_files_travel(tmp_path):
    first = made(alphabet="0123456789+=", words=["sum"])
    second = tokenizers.from_files(tokenizers.files(first))
    text = "12+3=sum"
    assert tokenizers.encode(second, text).tolist() == tokenizers.encode(first, text).tolist()
    assert tokenizers.decode(second, tokenizers.encode(second, text).tolist()) == text
    assert (second.pad_token_id, second.eos_token_id) == (0, 1)


def test_a_plain_tokenizer_is_read_without_the_registry_of_all_models(monkeypatch):
    import transformers

    files = tokenizers.files(made(alphabet="01"))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda path: "looked up")
    assert len(tokenizers.from_files(files)) == 4
    foreign = files | {"tokenizer_config.json": b'{"tokenizer_class": "Qwen2Tokenizer"}'}
    assert tokenizers.from_files(foreign) == "looked up"


def test_files_stay_in_their_directory():
    with pytest.raises(ValueError, match="outside"):
        tokenizers.from_files({"../escaped.json": b"{}"})


def test_a_path_without_a_tokenizer_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="model.path = ") as caught:
        tokenizers.load(Model(path=str(tmp_path), context=32))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = made(alphabet="01")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        tokenizers.load(Model(path=str(tmp_path), context=32))


def test_a_text_prompt_goes_into_the_template():
    assert tokenizers.render(made(alphabet="01"), "1", "a {prompt} b {x}") == "a 1 b {x}"


def test_messages_and_system_need_a_chat_template():
    tokenizer = made(alphabet="01")
    with pytest.raises(ValueError, match="chat messages"):
        tokenizers.render(tokenizer, [{"role": "user", "content": "1"}])
    with pytest.raises(ValueError, match="system"):
        tokenizers.render(tokenizer, "1", system="be brief")


def test_a_chat_template_wraps_text_and_messages():
    tokenizer = made(alphabet="01")
    tokenizer.chat_template = CHAT
    assert tokenizers.render(tokenizer, "1", "<{prompt}>") == "[user]<1>[assistant]"
    assert tokenizers.render(tokenizer, "1", system="s") == "[system]s[user]1[assistant]"
    talk = [{"role": "system", "content": "own"}, {"role": "user", "content": "0"}]
    assert tokenizers.render(tokenizer, talk, system="s") == "[system]own[user]0[assistant]"


def test_ends_of_segments_are_counted_in_tokens():
    tokenizer = made(alphabet="abc#", words=["###", "aa"])
    token_ids = tokenizers.encode(tokenizer, "aab###c")  # aa b ### c
    whole = np.append(token_ids, tokenizers.vocabulary(tokenizer)["eos_id"])
    assert tokenizers.token_ends(tokenizer, whole, [3, 6, 7]) == [2, 3, 5]
    assert tokenizers.token_ends(tokenizer, whole, [1]) == [1]  # within aa: its token belongs to the first part
    assert tokenizers.token_ends(tokenizer, token_ids[:0], [0]) == [0]


# ---- templates of one's own ------------------------------------------------------------------------------------

THINKING = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if enable_thinking %}<think>{% endif %}"


def with_template(template: str = THINKING, **variables):
    init = {"model_type": "qwen3"}
    spec = {"tokenizer": Tokenizer(alphabet="01"), "chat_template": template, "chat_template_kwargs": variables}
    return tokenizers.load(Model(init=init, context=32, **spec))


def test_a_chat_template_of_ones_own_is_the_tokenizers_and_travels_with_it():
    tokenizer = with_template(enable_thinking=True)
    there = tokenizers.from_files(tokenizers.files(tokenizer))
    for each in (tokenizer, there):
        assert tokenizers.render(each, "1", variables={"enable_thinking": True}) == "[user]1<think>"
        assert tokenizers.render(each, "1", variables={"enable_thinking": False}) == "[user]1"


def test_a_variable_that_the_chat_template_has_not_is_refused():
    with pytest.raises(ConfigError) as error:
        with_template(enable_thinkin=False)
    field = "model.chat_template_kwargs.enable_thinkin = False"
    assert str(error.value) == f"{field}: the chat template has no such variable (did you mean enable_thinking?)"
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        with_template("", enable_thinking=False)


@pytest.mark.parametrize("template", ["{% if %}", "{{ raise_exception('no') }}", "{{ messages[0]['x'] + 1 }}"])
def test_a_chat_template_that_fails_is_named(template):
    with pytest.raises(ValueError, match="^the chat template: "):
        tokenizers.render(with_template(template), "1")
