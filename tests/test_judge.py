"""The judge and the endpoint behind it, against a server that answers as scripted."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import learning
import msgspec
import numpy as np
import pytest
from scripted_server import ScriptedServer

from engine import config as configs
from engine import tokenizer as tokenizers
from engine.algorithms.method import compose
from engine.config import Config
from engine.credit import advantages
from engine.prompts import Prompts
from engine.schema import Prompt
from engine.scorer import Scorer
from engine.scores import shape_by
from rewards.endpoint import Endpoint, EndpointError, Reply
from rewards.judge import TEMPLATES, fill, read_rating, read_template, segment_ends
from rewards.ngrams import ngrams
from rewards.table import resolve
from rewards.verdict import Segment, Verdict

PROBLEM, REFERENCE = "Show that 2 + 2 = 4.", "By Peano's axioms 2 + 2 is the successor of 3."
FAST = {"first_wait_s": 0.01, "deadline_s": 5.0}


def judge(server: ScriptedServer, **options: Any):
    options["endpoint"] = FAST | options.get("endpoint", {})
    return resolve("judge", {"url": server.url, "model": "m", **options})


def verdict(server: ScriptedServer, completion: str, **options: Any) -> Verdict:
    return asyncio.run(judge(server, **options)(PROBLEM, completion, REFERENCE))


def ask(*questions: str, **options: Any) -> list[Reply | BaseException]:
    async def run() -> list[Reply | BaseException]:
        endpoint = Endpoint(**{"model": "m", **FAST, **options})
        asked = (endpoint.ask([{"role": "user", "content": each}], temperature=0.0) for each in questions)
        replies = await asyncio.gather(*asked, return_exceptions=True)
        await endpoint.close()
        return replies

    return asyncio.run(run())


def texts(replies: list[Reply | BaseException]) -> list[str]:
    return [reply.text for reply in replies if isinstance(reply, Reply)]


# ---- the endpoint ----------------------------------------------------------------------------------------------


def test_requests_run_at_once_but_not_more_than_allowed():
    with ScriptedServer(lambda text, _: text.upper(), delay_s=0.05) as server:
        replies = ask(*map(str, "abcdefghij"), url=server.url, concurrency=4)
    assert texts(replies) == list("ABCDEFGHIJ") and server.most == 4


def test_a_failing_server_is_asked_again_and_the_wait_grows():
    times = []

    def script(text: str, number: int) -> Any:
        times.append(time.monotonic())
        return (500, {}) if number < 3 else b"no json" if number == 3 else "ok"

    with ScriptedServer(script) as server:
        (reply,) = ask("a", url=server.url, first_wait_s=0.05)
    assert isinstance(reply, Reply) and (reply.text, reply.attempts) == ("ok", 5)
    waits = np.diff(times)
    assert all(wait > 0.02 * 2**number for number, wait in enumerate(waits))


def test_the_wait_that_a_server_asks_for_is_kept():
    with ScriptedServer(lambda _, number: (429, {"Retry-After": "0.3"}) if number == 0 else "ok") as server:
        started = time.monotonic()
        assert texts(ask("a", url=server.url)) == ["ok"]
    assert time.monotonic() - started > 0.3


def test_a_request_that_is_refused_is_not_repeated():
    with ScriptedServer(lambda *_: (400, {})) as server:
        (reply,) = ask("a", url=server.url)
    assert isinstance(reply, EndpointError) and "status 400" in str(reply) and len(server.requests) == 1


def test_no_wait_is_for_ever():
    with ScriptedServer(lambda *_: "late", delay_s=9.0) as server:
        started = time.monotonic()
        (late,) = ask("a", url=server.url, deadline_s=0.2)
        assert isinstance(late, EndpointError) and "no answer within 0.2 s" in str(late)
        assert time.monotonic() - started < 8.0
    (nobody,) = ask("a", url="http://127.0.0.1:9/v1", retries=1)
    assert isinstance(nobody, EndpointError) and "ConnectError" in str(nobody)


@pytest.mark.parametrize("body", [{}, {"choices": []}, {"choices": [{"message": None}]}, []])
def test_an_answer_of_another_form_is_an_error(body):
    with ScriptedServer(lambda *_: body) as server:
        (reply,) = ask("a", url=server.url)
    assert isinstance(reply, EndpointError) and "of another form" in str(reply)


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    with ScriptedServer(lambda *_: "ok") as server:
        ask("a", url=server.url, key_env="JUDGE_KEY")
        ask("a", url=server.url)
    assert [headers.get("Authorization") for headers in server.headers] == ["Bearer sesame", None]


def test_answers_are_kept_by_content(tmp_path):
    with ScriptedServer(lambda text, number: (500, {}) if text == "bad" else f"{text}{number}") as server:
        first = ask("a", "b", url=server.url, cache=str(tmp_path), concurrency=1)
        again = ask("b", "a", "c", url=server.url, cache=str(tmp_path), concurrency=1)
        other = ask("a", url=server.url, cache=str(tmp_path), model="n")
        assert isinstance(ask("bad", url=server.url, cache=str(tmp_path), retries=0)[0], EndpointError)
    assert (texts(first), texts(again), texts(other)) == (["a0", "b1"], ["b1", "a0", "c2"], ["a3"])
    spent = [(reply.attempts, reply.tokens) for reply in again if isinstance(reply, Reply)]
    assert spent == [(0, 0), (0, 0), (1, 7)]
    assert len(list(tmp_path.rglob("*.json"))) == 4 and not list(tmp_path.rglob("tmp*"))


# ---- ratings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("fine.\nScore: 4", 4),
        ("**Score:** 5", 5),
        ("score: [2]/5", 2),
        ("Score: 3.", 3),
        ("Score: 2 at first, then\nScore: 3", 3),
        ("<think>Score: 5</think>Score: 1", 1),
        ("Score (1-5): 4", 4),
        ("a score of 2. The score is **3**", 3),
        ("Score: 4/5", 4),
        ("Score: 0", None),
        ("Score: 6", None),
        ("Score: 45", None),
        ("Score: 4.5", None),
        ("Score: high", None),
        ("I give it 4", None),
        ("<think>Score: 5", None),
        ("", None),
    ],
)
def test_rating(text, rating):
    assert read_rating(text) == rating


@pytest.mark.parametrize(("rating", "score"), [(1, 0.0), (2, 0.25), (3, 0.5), (4, 0.75), (5, 1.0)])
def test_the_scale(rating, score):
    with ScriptedServer(lambda *_: f"so\nScore: {rating}") as server:
        given = verdict(server, "proof")
    assert (given.score, given.solved, given.error) == (score, rating >= 4, "")
    assert given.evidence == {"rating": str(rating), "judge": f"so\nScore: {rating}"}


def test_without_a_rating_there_is_no_verdict():
    with ScriptedServer(lambda *_: "I cannot say.") as server:
        given = verdict(server, "proof")
    assert given.error == "the judge gave no rating" and given.evidence["judge"] == "I cannot say."
    assert given.costs["judge_tokens"] == 7


def test_a_judge_that_does_not_answer_is_no_verdict():
    with ScriptedServer(lambda *_: (401, {})) as server:
        assert "status 401" in verdict(server, "proof").error


def test_the_judge_sees_problem_reference_and_attempt():
    with ScriptedServer(lambda *_: "Score: 3") as server:
        verdict(server, "my {reference} {problem}")
    (prompt,) = server.prompts()
    assert PROBLEM in prompt and REFERENCE in prompt and "my {reference} {problem}" in prompt
    assert server.requests[0]["temperature"] == 0.0 and server.requests[0]["max_tokens"] == 2048


def test_fields_hold_problem_and_reference_where_prompt_and_answer_are_others():
    with ScriptedServer(lambda *_: "Score: 3") as server:
        asyncio.run(judge(server)("[user]P[assistant]", "c", "4", problem="the bare P", reference="its solution"))
    (prompt,) = server.prompts()
    assert "the bare P" in prompt and "its solution" in prompt and "[user]" not in prompt


# ---- parts -----------------------------------------------------------------------------------------------------

STEPS = "Intro.\n### One\nfirst step\n### Two\nsecond ### step\n### Three\nthird"
ENDS = [STEPS.index("### One"), STEPS.index("### Two"), STEPS.index("### Three"), len(STEPS)]


def test_parts_begin_with_their_headings():
    assert segment_ends(STEPS, 9) == ENDS
    assert segment_ends(STEPS, 2) == [ENDS[0], len(STEPS)]
    assert segment_ends("### One\nonly", 9) == [12]
    assert segment_ends("plain", 9) == [5] and segment_ends("", 9) == [0]


def by_length(text: str, _: int) -> str:
    """The more steps the judge sees the better, and the second alone is good."""
    attempt = text.rpartition("# Rating")[0].rpartition("attempt\n")[2]
    return f"Score: {1 + sum(step in attempt for step in ('first', 'second', 'third'))}"


def test_prefixes_are_judged_up_to_each_end():
    with ScriptedServer(by_length) as server:
        given = verdict(server, STEPS, unit="prefix")
    assert given.segments == [Segment(end, score) for end, score in zip(ENDS, [0.0, 0.25, 0.5, 0.75], strict=True)]
    assert (given.score, given.solved, given.evidence["rating"]) == (0.75, True, "1 2 3 4")
    shown = [prompt.partition("of the attempt\n\n")[2].partition("\n\n# Rating")[0] for prompt in server.prompts()]
    assert sorted(shown, key=len) == [STEPS[:end] for end in ENDS]
    assert given.costs["judge_calls"] == 4 and given.costs["judge_tokens"] == 28


def test_parts_are_judged_by_themselves():
    with ScriptedServer(by_length) as server:
        given = verdict(server, STEPS, unit="segment")
    assert [segment.score for segment in given.segments] == [0.0, 0.25, 0.25, 0.25]
    assert given.score == pytest.approx(0.1875)
    assert sum("first step" in prompt for prompt in server.prompts()) == 1


def test_one_part_without_a_rating_leaves_the_whole_without_a_verdict():
    with ScriptedServer(lambda text, _: "hm" if "second" in text else "Score: 5") as server:
        given = verdict(server, STEPS, unit="segment")
    assert given.error == "the judge gave no rating" and not given.segments
    assert given.evidence["rating"] == "5 5 ? 5"


# ---- controls and costs ----------------------------------------------------------------------------------------


def test_without_the_reference_the_judge_does_not_see_it():
    with ScriptedServer(lambda *_: "Score: 3") as server:
        verdict(server, "proof", control="no_reference")
    assert REFERENCE not in server.prompts()[0] and "No reference solution" in server.prompts()[0]


def test_a_wrong_reference_is_another_problems_and_always_the_same(tmp_path):
    decoys = tmp_path / "decoys.jsonl"
    others = [f"The proof number {number}." for number in range(5)]
    decoys.write_text("".join(json.dumps({"answer": text}) + "\n" for text in [REFERENCE, *others]))
    with ScriptedServer(lambda *_: "Score: 3") as server:
        for _ in range(2):
            verdict(server, "proof", control="wrong_reference", decoys=str(decoys))
    first, second = server.prompts()
    assert first == second and REFERENCE not in first and sum(text in first for text in others) == 1


def test_costs_tell_calls_tokens_price_and_what_the_cache_saved(tmp_path):
    options = {"endpoint": {"cache": str(tmp_path)}, "price_in": 1.0, "price_out": 10.0}
    with ScriptedServer(lambda *_: "Score: 3", delay_s=0.05) as server:
        paid, saved = (verdict(server, "proof", **options).costs for _ in range(2))
    assert paid.pop("judge_s") > 0.05 and saved.pop("judge_s") == 0.0
    calls = {"judge_calls": 1, "judge_cached": 0, "judge_retries": 0}
    assert paid == {**calls, "judge_prompt_tokens": 100, "judge_tokens": 7, "judge_price": pytest.approx(170e-6)}
    assert (saved["judge_cached"], saved["judge_tokens"], saved["judge_price"]) == (1, 0, 0.0)


# ---- templates and options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.md")), ids=lambda path: path.stem)
def test_every_template_names_its_slots_once_and_the_line_that_is_read(path: Path):
    text = read_template(path.stem)
    assert [text.count(slot) for slot in ("{problem}", "{reference}", "{attempt}")] == [1, 1, 1]
    assert text.rstrip().endswith("Score: N") and "reference" in text and read_rating(text) is None


def test_slots_are_filled_at_once():
    assert fill("{a} {b}", {"{a}": "{b}", "{b}": r"\1 {a}"}) == r"{b} \1 {a}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "steps"}, "unit = 'steps': allowed are 'outcome', 'prefix', 'segment'"),
        ({"control": "none"}, "control = 'none'"),
        ({"control": "wrong_reference"}, "decoys = '': needed"),
        ({"template": "nowhere"}, "template = 'nowhere': allowed are code, outcome, prefix, segment or a path"),
        ({"url": "localhost"}, "url = 'localhost'"),
        ({"endpoint": {"concurrency": 0}}, "^endpoint.concurrency = 0: Expected 'int' >= 1$"),
        ({"endpoint": {"tries": 1}}, r"^endpoint.tries = 1: no such option \(did you mean retries\?\); allowed are"),
        ({"modell": "x"}, r"^modell = 'x': no such option \(did you mean model\?\)"),
    ],
)
def test_wrong_options_are_named_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        resolve("judge", {"url": "http://x/v1", "model": "m", **options})


def test_a_template_without_its_slots_is_refused(tmp_path):
    (tmp_path / "t.md").write_text("{problem} {attempt}")
    with pytest.raises(ValueError, match=r"has no \{reference\}"):
        read_template(str(tmp_path / "t.md"))


# ---- within the engine -----------------------------------------------------------------------------------------

PROOFS = [
    (f"Show that {n} is even or odd.", f"Divide {n} by two with remainder; the remainder {n % 2} decides between them.")
    for n in range(30)
]
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def proofs(seed: int, index: int) -> dict[str, Any]:
    problem, reference = PROOFS[(seed + index) % len(PROOFS)]
    return {"prompt": problem, "answer": reference, "reference": reference, "problem": problem}


def configure(path: Path, url: str = "http://127.0.0.1:9/v1") -> Config:
    path.write_text("".join(json.dumps(proofs(0, number)) + "\n" for number in range(len(PROOFS))))
    shared = {"reward": "judge", "reward_options": {"url": url, "model": "m", "endpoint": FAST}, "eval_prompts": 3}
    chat = [{"role": "user", "content": problem} for problem, _ in PROOFS]
    (path.parent / "chat.jsonl").write_text(
        "".join(
            json.dumps({"prompt": [turn], "answer": 4, "reference": reference}) + "\n"
            for turn, (_, reference) in zip(chat, PROOFS, strict=True)
        )
    )
    return configs.parse({
        "run": {"name": "t", "steps": 1, "groups_per_step": 1, "group_size": 4},
        "model": {"init": {"model_type": "qwen3"}, "context": 200},
        "domains": [
            {"name": "rows", "source": "file", "path": str(path), "template": "Task: {prompt}", **shared},
            {"name": "chat", "source": "file", "path": str(path.parent / "chat.jsonl"), "system": "Prove.", **shared},
            {"name": "made", "source": "callable", "task": f"{__name__}:proofs", **shared | {"eval_prompts": 0}},
        ],
        "generator": {"max_new_tokens": 4},
        "learner": {"tokens_per_micro_batch": 1000, "lr": 1e-3},
    })


def test_no_prompt_of_the_policy_holds_words_of_a_reference(tmp_path):
    """Searched in the text of the tokens that a generator would get, of every domain, trained on or held out."""
    tokenizer = tokenizers.make(configs.Tokenizer(alphabet="".join(map(chr, range(32, 127)))))
    tokenizer.chat_template = CHAT
    prompts = Prompts(configure(tmp_path / "rows.jsonl"), tokenizer)
    seen = [*prompts.held_out(), *(prompts.prompt(*prompts.draw()) for _ in range(200))]
    assert {prompt.domain for prompt in seen} == {"rows", "chat", "made"}
    references = [ngrams(prompt.fields["reference"], 4) for prompt in seen]
    assert all(len(runs) > 5 for runs in references)
    texts = [ngrams(tokenizers.decode(tokenizer, prompt.token_ids), 4) for prompt in seen]
    everywhere = set().union(*references)
    assert not any(text & everywhere for text in texts)
    assert ngrams("so: Divide 7 by two, with remainder!", 4) & everywhere  # the search finds what is there


def test_a_group_without_a_rating_carries_no_gradient_and_one_with_a_rating_does(tmp_path):
    """From the server's answers to the advantages: masked is not the same as 0."""

    def script(text: str, _: int) -> Any:
        return "no idea" if "lost" in text else "Score: 5" if "good" in text else "Score: 1"

    with ScriptedServer(script, delay_s=0.02) as server:
        config = configure(tmp_path / "rows.jsonl", server.url)
        scorer = Scorer(config)
        scorer.submit("group", Prompt("rows", 0, np.zeros(1, np.int32), *PROOFS[0]), ["good", "bad", "lost", "good"])
        verdicts, ends = [], time.monotonic() + 30
        while not verdicts and time.monotonic() < ends:
            verdicts = [verdict for _, group in scorer.poll(0.1) for verdict in group]
        scorer.close()
    assert [verdict.error for verdict in verdicts] == ["", "", "the judge gave no rating", ""]
    assert server.most == 4
    group = msgspec.structs.replace(learning.groups(1)[0], verdicts=verdicts)
    method = compose(learning.configure("algorithm.advantage={ name = 'group_mean' }").algorithm)
    (values,) = advantages(method, shape_by(config.algorithm), [group])
    assert values == pytest.approx([1 / 3, -2 / 3, 0.0, 1 / 3])
