import json

import msgspec
import pyarrow
import pytest
from pyarrow import parquet

from engine import config as configs
from engine import tokenizer as tokenizers
from engine.config import ConfigError
from engine.prompts import Prompts
from engine.schema import Prompt
from engine.wire import decode, encode

CHARACTERS = "".join(map(chr, range(32, 127))) + "\n"
CHAIN = {
    "name": "sum",
    "source": "reasoning_gym",
    "task": "chain_sum",
    "reward": "reasoning_gym",
    "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "eval_prompts": 20,
}


def count(seed, index, *, digits=3):
    """A callable's rows: each number of so many digits again and again."""
    return {"prompt": str((seed + index) % 10**digits), "answer": str(index), "hint": [index]}


def fragile(seed, index):
    if index == 30:
        raise KeyError(index)
    return {"prompt": str(index), "answer": 1}


def misspelt(seed, index):
    return {"question": "1", "answer": "1"}


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.make(configs.Tokenizer(alphabet=CHARACTERS))


def make(domains, seed=0, context=120):
    return configs.parse({
        "run": {"name": "t", "steps": 1, "groups_per_step": 1, "group_size": 2, "seed": seed},
        "model": {"init": {"model_type": "qwen3"}, "context": context},
        "domains": domains,
        "generator": {"max_new_tokens": 4},
        "learner": {"tokens_per_micro_batch": 1000, "lr": 1e-3},
    })


def rows(path, rows, **extra):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return {"name": "file", "source": "file", "path": str(path), **extra}


def numbers(path, num=10, **extra):
    return rows(path, [{"prompt": f"{n}?", "answer": n, "hint": n} for n in range(num)], **extra)


def take(prompts, num):
    return [prompts.prompt(*prompts.draw()) for _ in range(num)]


def seen(some):
    return [(prompt.domain, prompt.index, prompt.text, prompt.answer, prompt.fields) for prompt in some]


# ---- the cursor ----


def test_the_cursor_repeats_and_continues(tokenizer, tmp_path):
    config = make([CHAIN, numbers(tmp_path / "a.jsonl", weight=3.0)])
    whole = seen(take(Prompts(config, tokenizer), 60))
    first = Prompts(config, tokenizer)
    assert seen(take(first, 25)) == whole[:25]
    second = Prompts(config, tokenizer)
    second.restore(msgspec.msgpack.decode(msgspec.msgpack.encode(first.state())))
    assert seen(take(second, 35)) == whole[25:]
    other = make([CHAIN, numbers(tmp_path / "a.jsonl", weight=3.0)], seed=1)
    assert seen(take(Prompts(other, tokenizer), 60)) != whole


def test_a_cursor_of_other_domains_is_refused(tokenizer, tmp_path):
    prompts = Prompts(make([numbers(tmp_path / "a.jsonl")]), tokenizer)
    with pytest.raises(ValueError, match="domains"):
        prompts.restore({"num_draws": 1, "num_drawn": {"other": 1}})


def test_domains_are_drawn_by_weight(tokenizer, tmp_path):
    config = make([
        numbers(tmp_path / "a.jsonl", weight=3.0),
        {**numbers(tmp_path / "b.jsonl"), "name": "rare"},
    ])
    prompts = Prompts(config, tokenizer)
    drawn = [prompts.draw() for _ in range(2000)]
    share = sum(name == "file" for name, _ in drawn) / 2000
    assert abs(share - 0.75) < 0.05  # five standard deviations
    assert [index for name, index in drawn if name == "rare"] == list(range(2000 - int(share * 2000)))


def test_every_row_once_an_epoch_in_a_new_order(tokenizer, tmp_path):
    prompts = Prompts(make([numbers(tmp_path / "a.jsonl")]), tokenizer)
    texts = [prompt.text for prompt in take(prompts, 30)]
    epochs = [texts[:10], texts[10:20], texts[20:]]
    assert all(sorted(epoch) == [f"{n}?" for n in range(10)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert prompts.prompt("file", 3).text == texts[3]  # an earlier epoch again


# ---- held-out prompts ----


def test_held_out_prompts_never_meet_training(tokenizer):
    small = {**CHAIN, "options": {"min_terms": 2, "max_terms": 2, "max_digits": 1}, "eval_prompts": 100}
    prompts = Prompts(make([small]), tokenizer)  # some 200 different prompts, 100 of them held out
    held_out = {prompt.text for prompt in prompts.held_out()}
    assert len(held_out) == len(prompts.held_out()) == 100
    assert not held_out & {prompt.text for prompt in take(prompts, 300)}
    assert prompts.redrawn["held out for evaluation"] > 50


def test_what_one_domain_holds_out_no_other_trains(tokenizer):
    small = {"name": "a", "source": "callable", "task": f"{__name__}:count", "options": {"digits": 2}}
    config = make([{**small, "eval_prompts": 50}, {**small, "name": "b"}])
    prompts = Prompts(config, tokenizer)
    trained = {prompts.prompt("b", index).text for index in range(200)}
    assert len(prompts.held_out()) == 50
    assert not trained & {prompt.text for prompt in prompts.held_out()}


def test_held_out_prompts_are_the_same_under_every_seed(tokenizer, tmp_path):
    for domain in (CHAIN, numbers(tmp_path / "a.jsonl", eval_prompts=4)):
        first, second = (Prompts(make([domain], seed=seed), tokenizer).held_out() for seed in (0, 1))
        assert seen(first) == seen(second)
        assert [prompt.index for prompt in first] == list(range(len(first)))


def test_held_out_rows_leave_the_file(tokenizer, tmp_path):
    prompts = Prompts(make([numbers(tmp_path / "a.jsonl", eval_prompts=4)]), tokenizer)
    trained = {prompt.text for prompt in take(prompts, 12)}
    assert len(trained) == 6
    assert trained | {prompt.text for prompt in prompts.held_out()} == {f"{n}?" for n in range(10)}


def test_an_evaluation_file_is_held_out_whole_and_leaves_the_training_file(tokenizer, tmp_path):
    numbers(tmp_path / "eval.jsonl", 3)
    prompts = Prompts(make([numbers(tmp_path / "a.jsonl", eval_path=str(tmp_path / "eval.jsonl"))]), tokenizer)
    assert [prompt.text for prompt in prompts.held_out()] == ["0?", "1?", "2?"]
    assert {prompt.text for prompt in take(prompts, 14)} == {f"{n}?" for n in range(3, 10)}


# ---- what a prompt holds ----


def test_a_prompt_of_a_file(tokenizer, tmp_path):
    row = {"prompt": "1+1", "answer": 2, "why": {"k": [1, 2]}}
    domain = rows(tmp_path / "a.jsonl", [row], template="Q: {prompt} =")
    prompt = Prompts(make([domain]), tokenizer).prompt("file", 0)
    assert (prompt.text, prompt.answer, prompt.fields) == ("Q: 1+1 =", "2", {"why": {"k": [1, 2]}})
    assert tokenizers.decode(tokenizer, prompt.token_ids) == "Q: 1+1 ="


@pytest.mark.parametrize(
    ("tools", "shown"),
    [([{"name": "f"}], "f"), ('[{"name": "f"}, {"name": "g"}]', "fg"), (["f"], ""), ("f", ""), ([], ""), (None, "")],
)
def test_schemas_of_tools_reach_the_chat_template(tools, shown, tmp_path):
    tokenizer = tokenizers.make(configs.Tokenizer(alphabet=CHARACTERS))
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool.name }}{% endfor %}{{ messages[0].content }}"
    domain = rows(tmp_path / "a.jsonl", [{"prompt": "1", "answer": "1", "tools": tools}])
    assert Prompts(make([domain]), tokenizer).prompt("file", 0).text == f"{shown}1"


def test_parquet_reads_as_jsonl(tokenizer, tmp_path):
    some = [{"prompt": f"{n}?", "answer": str(n), "tags": ["x", str(n)]} for n in range(5)]
    parquet.write_table(pyarrow.Table.from_pylist(some), tmp_path / "a.parquet")
    domain = rows(tmp_path / "a.jsonl", some)
    first = seen(take(Prompts(make([domain]), tokenizer), 9))
    assert seen(take(Prompts(make([{**domain, "path": str(tmp_path / "a.parquet")}]), tokenizer), 9)) == first


def test_the_domain_column_selects_rows(tokenizer, tmp_path):
    some = [{"prompt": f"{n}", "answer": "1", "domain": "even" if n % 2 == 0 else "odd"} for n in range(6)]
    config = make([{**rows(tmp_path / "a.jsonl", some), "name": name} for name in ("even", "odd")])
    prompts = Prompts(config, tokenizer)
    assert {prompts.prompt("even", index).text for index in range(3)} == {"0", "2", "4"}
    assert {prompts.prompt("odd", index).text for index in range(3)} == {"1", "3", "5"}


def test_a_task_prompt_finds_its_entry_again_after_the_journey(tokenizer):
    from rewards.table import resolve

    prompts = Prompts(make([CHAIN]), tokenizer)
    for prompt in [*take(prompts, 5), prompts.prompt("sum", 2500), prompts.held_out()[0]]:
        there = decode(encode(prompt), Prompt)
        reward = resolve("reasoning_gym", {})
        assert reward(there.text, there.answer, there.answer, **there.fields).solved
        assert not reward(there.text, there.answer + "7", there.answer, **there.fields).solved


def test_generated_prompts_do_not_repeat_when_a_data_set_ends(tokenizer):
    prompts = Prompts(make([CHAIN]), tokenizer)
    texts = [[prompts.prompt("sum", start + index).text for index in range(20)] for start in (0, 1000, 2000)]
    assert texts[0] != texts[1] != texts[2]


def test_generated_prompts_that_fail_or_are_too_long_are_drawn_again(tokenizer):
    domain = {"name": "f", "source": "callable", "task": f"{__name__}:count", "options": {"digits": 6}}
    prompts = Prompts(make([domain], context=6), tokenizer)  # room for five digits; numbers of six are drawn again
    assert all(len(prompt.token_ids) <= 5 for prompt in take(prompts, 20))
    assert sum(prompts.redrawn.values()) > 20


# ---- bad input ----


def refusal(domain, tokenizer, context=120):
    with pytest.raises(ConfigError) as caught:
        Prompts(make([domain], context=context), tokenizer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("some", "message"),
    [
        ([], "no rows"),
        ([{"question": "1", "answer": "1"}], "row 1: no column 'prompt'; there are 'question', 'answer'"),
        ([{"prompt": "1", "answer": "1"}, {"prompt": "1"}], "row 2: no column 'answer'"),
        ([{"prompt": "1", "answer": "1"}, {"prompt": "1", "answer": None}], "row 2: no value in column 'answer'"),
        ([{"prompt": None, "answer": "1"}], "row 1: no value in column 'prompt'"),
        ([{"prompt": "1", "answer": ["1"]}], "row 1: answer = ['1']: must be text or a number"),
        ([{"prompt": 1, "answer": "1"}], "row 1: prompt = 1: must be text or chat messages"),
        ([{"prompt": [{"role": "user"}], "answer": "1"}], "must be text or chat messages"),
        ([{"prompt": [{"role": "user", "content": "1"}], "answer": "1"}], "the tokenizer has no chat template"),
        ([{"prompt": "é", "answer": "1"}], "row 1: the tokenizer has no token for 'é'"),
        ([{"prompt": "1" * 120, "answer": "1"}], "the prompt has 120 tokens; allowed are 1 to model.context - 1 = 119"),
        ([{"prompt": prompt, "answer": "1"} for prompt in ("1", "1" * 120, "")], "; of 3 rows 2 do not fit"),
        ([{"prompt": "", "answer": "1"}], "the prompt has 0 tokens"),
        ([{"prompt": "1", "answer": "1", "domain": "x"}], "no rows of domain 'file'; there are x"),
    ],
)
def test_unusable_rows_are_named(some, message, tokenizer, tmp_path):
    refused = refusal(rows(tmp_path / "a.jsonl", some), tokenizer)
    assert refused.startswith("domains.0.path = ")
    assert message in refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "missing.jsonl"}, "domains.0.path = 'missing.jsonl': cannot read it"),
        ({"path": "missing.parquet"}, "domains.0.path = 'missing.parquet': cannot read it"),
        ({"path": "data.csv"}, "allowed are files that end in .jsonl, .parquet"),
        ({"eval_path": "missing.jsonl"}, "domains.0.eval_path = 'missing.jsonl': cannot read it"),
        ({"eval_prompts": 11}, "domains.0.eval_prompts = 11: there are only 10 different prompts"),
        ({"eval_prompts": 10}, "every prompt is held out"),
        ({"system": "be brief"}, "system: the tokenizer has no chat template"),
    ],
)
def test_a_file_domain_that_cannot_work_is_refused(change, message, tokenizer, tmp_path):
    assert message in refusal({**numbers(tmp_path / "a.jsonl"), **change}, tokenizer)


def test_a_line_that_is_no_object_is_named(tokenizer, tmp_path):
    domain = numbers(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text('{"prompt": "1", "answer": "1"}\n\n[1]\n')
    assert "line 3 is no JSON object" in refusal(domain, tokenizer)
    (tmp_path / "a.jsonl").write_bytes('{"prompt": "1", "answer": "é"}\n'.encode("latin-1"))
    assert "line 1 is no JSON object: 'utf-8' codec can't decode" in refusal(domain, tokenizer)


def test_a_file_may_begin_with_a_byte_order_mark(tokenizer, tmp_path):
    domain = numbers(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes())
    assert Prompts(make([domain]), tokenizer).prompt("file", 0).text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "chain_summ"}, "domains.0.task = 'chain_summ': unknown (did you mean chain_sum?); allowed are"),
        ({"options": {"min_term": 2}}, "unexpected keyword argument 'min_term'"),
        ({"options": {"min_terms": 5, "max_terms": 2}}, "max_terms must be >= min_terms"),
        ({"options": {"seed": 3}}, "domains.0.options.seed = 3: not allowed"),
        ({"template": "é{prompt}", "eval_prompts": 0}, "no token for 'é'"),
        ({"eval_prompts": 5000, "options": {"max_terms": 2, "max_digits": 1}}, "different prompts"),
    ],
)
def test_a_task_that_cannot_work_is_refused(change, message, tokenizer):
    assert message in refusal({**CHAIN, **change}, tokenizer)


def test_a_task_whose_prompts_are_all_too_long_is_refused(tokenizer):
    assert "1000 draws gave no usable prompt" in refusal(CHAIN, tokenizer, context=20)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (f"{__name__}:absent", "cannot import"),
        (f"{__name__}:misspelt", "no column 'prompt'"),
        (f"{__name__}:seen", "TypeError"),
    ],
)
def test_a_callable_that_cannot_work_is_refused(task, message, tokenizer):
    assert message in refusal({"name": "c", "source": "callable", "task": task}, tokenizer)


def test_a_callable_that_sometimes_raises_does_not_end_the_run(tokenizer):
    domain = {"name": "c", "source": "callable", "task": f"{__name__}:fragile"}
    prompts = Prompts(make([domain]), tokenizer)
    assert [prompts.prompt("c", index).text for index in (29, 30)] == ["29", "31"]
    assert prompts.redrawn == {"KeyError: 30": 1}


def test_levels_of_a_task_are_drawn_evenly_and_checked_at_launch(tokenizer):
    chain = {"name": "sum", "source": "reasoning_gym", "task": "chain_sum", "reward": "reasoning_gym"}
    prompts = Prompts(make([{**chain, "options": {"level": [0, 2]}}]), tokenizer)
    levels = [prompt.fields["options"]["level"] for prompt in take(prompts, 30)]
    assert [levels.count(level) for level in (0, 1, 2)] == [10, 10, 10]
    with pytest.raises(ConfigError, match=r"domains.0.options = .*ValueError: level = \[2, 0\]"):
        Prompts(make([{**chain, "options": {"level": [2, 0]}}]), tokenizer)
    with pytest.raises(ConfigError, match="the task acre has no curriculum"):
        Prompts(make([{**chain, "task": "acre", "options": {"level": 1}}]), tokenizer)
