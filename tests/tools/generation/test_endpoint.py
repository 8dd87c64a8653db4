"""Answers of an endpoint: a real server of this process that misbehaves in turn."""

import gzip
import json
import socket
import time
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from answering_server import AnsweringServer, Reply, running, send

from hpd_verl.tools.generation import Answer, GenerationError, Sampling, generate_all
from hpd_verl.tools.generation.endpoint import EndpointGenerator

PROMPTS = [[{"role": "user", "content": f"{number} plus 1 ?"}] for number in range(6)]


def choice_of(request: dict[str, Any], number: int, **message: Any) -> dict[str, Any]:
    text = f"{request['messages'][0]['content'].split()[0]} by {request['seed'] + number}"
    return {"index": number, "message": {"role": "assistant", "content": text, **message}, "finish_reason": "stop"}


def good(handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
    choices = [choice_of(request, number) for number in range(request["n"])]
    send(handler, {"choices": choices})


def replies(content: Any, status: int = 200, **headers: str) -> Reply:
    return lambda handler, request: send(handler, content, status, **headers)


def one_choice(**changed: Any) -> Reply:
    def reply(handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
        choices = [{**choice_of(request, number), **changed} for number in range(request["n"])]
        send(handler, {"choices": choices})

    return reply


def one_answer_only(handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
    send(handler, {"choices": [choice_of(request, 0)]})


def slow(handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
    time.sleep(0.8)
    good(handler, request)


def drips(handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
    """A byte now and then: no single read is slow."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(20):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def hangs_up(handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def stops_in_the_middle(handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)


BEYOND_CONTEXT = replies({"error": {"message": "This model's maximum context length is 8 tokens"}}, 400)


class Server(AnsweringServer):
    """Gives the replies of ``script`` in turn, good ones after them."""

    def __init__(self) -> None:
        super().__init__()
        self.script: list[Reply] = []
        self.always: Reply = good

    def reply(self, handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
        with self.lock:
            reply = self.script.pop(0) if self.script else self.always
        reply(handler, request)


@pytest.fixture
def server() -> Iterator[Server]:
    with running(Server()) as started:
        yield started


def endpoint(url: str, **settings: Any) -> EndpointGenerator:
    return EndpointGenerator(url, "teacher", **{"timeout": 0.3, "retries": 2, "first_pause": 0.01, **settings})


def texts(server: Server, journal: Path, sampling: Sampling, **settings: Any) -> list[list[str]]:
    answers = generate_all(endpoint(server.url, **settings), PROMPTS, sampling, journal)
    return [[answer.text for answer in each] for each in answers]


def expected(sampling: Sampling) -> list[list[str]]:
    seeds = [sampling.seed_of(position) for position in range(len(PROMPTS))]
    return [[f"{position} by {seed + number}" for number in range(sampling.n)] for position, seed in enumerate(seeds)]


def test_what_is_asked(server: Server, tmp_path: Path) -> None:
    sampling = Sampling(n=2, temperature=0.5, top_p=0.9, top_k=20, max_tokens=7, seed=3)
    answers = texts(server, tmp_path / "journal", sampling, api_key="key", template_kwargs={"enable_thinking": False})
    assert answers == expected(sampling)
    request = next(each for each in server.requests if each["messages"] == PROMPTS[1])
    assert request == {
        "path": "/v1/chat/completions",
        "key": "Bearer key",
        "model": "teacher",
        "messages": PROMPTS[1],
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 20,
        "max_tokens": 7,
        "seed": sampling.seed_of(1),
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert "key" not in (tmp_path / "journal").read_text().replace("template_kwargs", "")


def test_a_begun_answer_is_continued(server: Server, tmp_path: Path) -> None:
    prompts = [*PROMPTS[:1], [*PROMPTS[1], {"role": "assistant", "content": "Sure:"}]]
    generate_all(endpoint(server.url), prompts, Sampling(), tmp_path / "journal")
    begun, other = (next(each for each in server.requests if each["messages"] == prompt) for prompt in prompts[::-1])
    assert (begun["continue_final_message"], begun["add_generation_prompt"]) == (True, False)
    assert not {"continue_final_message", "add_generation_prompt"} & other.keys()


@pytest.mark.parametrize(
    "bad",
    [
        slow,
        drips,
        hangs_up,
        stops_in_the_middle,
        replies({"error": "busy"}, 500),
        replies({"error": "busy"}, 503, Retry_After="0"),
        replies({"error": "too many"}, 429),
        replies(b'{"choices": [{"message": {"content": "4"'),
        replies(b"<html>busy</html>"),
        replies(b"\xff\xfe"),
        replies(b""),
        replies({}),
        replies([]),
        replies(None),
        replies({"choices": []}),
        replies({"choices": None}),
        replies({"choices": ["4"]}),
        replies({"choices": [{"text": "4", "finish_reason": "stop"}]}),
        replies({"choices": [{"message": None, "finish_reason": "stop"}]}),
        one_choice(message={"content": 4}),
        one_choice(message={"content": "\ud800"}),
        one_choice(finish_reason=None),
        one_choice(finish_reason="tool_calls"),
        one_choice(message={"content": json.loads("[" * 400 + "]" * 400)}),
        one_answer_only,
        replies(b'{"choices": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        replies(b"[" * 100_000),
        replies({"error": "busy"}, 503, Retry_After="\u00b2"),
        replies({"error": "busy"}, 503, Retry_After="-1"),
        replies({"error": "busy"}, 503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
        replies(b"busy", 503, Content_Type="text/html; charset=no_such"),
        replies(b"busy", 503, Content_Type="text/html; charset=hex"),
        replies(b"\xff\xfe", 200, Content_Type="application/json; charset=undefined"),
        replies(b"\0", 200, Content_Encoding="br"),
        replies(b"\0", 200, Content_Encoding="gzip"),
        replies(b"\0", 200, Content_Encoding="\u00e9"),
        replies(gzip.compress(b" " * (64 << 20)), 200, Content_Encoding="gzip"),
        replies(gzip.compress(b" " * (64 << 20)), 500, Content_Encoding="gzip"),
        replies(b" " * (5 << 20)),
    ],
    ids=lambda bad: getattr(bad, "__name__", "reply"),
)
def test_a_bad_reply_is_asked_for_again(server: Server, tmp_path: Path, bad: Reply) -> None:
    sampling = Sampling(n=2)
    server.script = [bad, bad]
    assert texts(server, tmp_path / "journal", sampling, concurrency=2) == expected(sampling)
    assert not server.script


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (slow, "no answer within 0.3 seconds"),
        (replies({"error": "out of memory"}, 500), 'status 500: {"error": "out of memory"}'),
        (replies({}), "a reply that is no chat completion: '{}'"),
        (replies(b" " * (5 << 20)), "a reply of more than 4 MiB"),
        (one_choice(finish_reason="tool_calls"), "finish_reason 'tool_calls', expected stop, length or content_filter"),
    ],
)
def test_what_stays_bad_ends_in_one_line_and_loses_nothing(
    server: Server, tmp_path: Path, bad: Reply, found: str
) -> None:
    sampling, journal = Sampling(n=1), tmp_path / "journal"
    server.script = [good, good]
    server.always = bad
    with pytest.raises(GenerationError) as error:
        texts(server, journal, sampling, concurrency=1)
    assert str(error.value).startswith(
        f"--endpoint={server.url}: {found}, prompt 2, 3 times; finished prompts are kept"
    )
    assert "\n" not in str(error.value)
    assert len(server.requests) == 2 + 3
    server.always = good
    assert texts(server, journal, sampling) == expected(sampling)
    assert len(server.requests) == 2 + 3 + 4


def test_what_no_retry_helps_is_not_asked_again(server: Server, tmp_path: Path) -> None:
    server.always = replies({"error": "no such model"}, 404)
    with pytest.raises(GenerationError, match=r"status 404: .*no such model"):
        texts(server, tmp_path / "journal", Sampling(), concurrency=1)
    assert len(server.requests) == 1


def test_nobody_there(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(GenerationError, match=r"ConnectError.*prompt \d, 3 times; finished prompts are kept"):
        generate_all(endpoint(url), PROMPTS, Sampling(), tmp_path / "journal")


def test_others_that_finish_beside_a_failure_are_kept(server: Server, tmp_path: Path) -> None:
    """Requests run at a time: all that had come back is in the journal."""
    server.script = [replies({"error": "no"}, 403)]
    journal = tmp_path / "journal"
    with pytest.raises(GenerationError, match="status 403"):
        texts(server, journal, Sampling(), concurrency=6)
    kept = len(journal.read_text().splitlines()) - 1
    assert texts(server, journal, Sampling()) == expected(Sampling())
    assert len(server.requests) <= 6 + len(PROMPTS) - kept


def test_text_reasoning_and_tokens(server: Server, tmp_path: Path) -> None:
    server.script = [
        one_choice(message={"content": "It is 4.", "reasoning_content": "2 and 2\n"}),
        one_choice(message={"content": None}, finish_reason="length"),
        one_choice(message={"content": ""}),
        BEYOND_CONTEXT,
        BEYOND_CONTEXT,
        one_choice(message={"content": "日本 🎉\u2028\n"}),
    ]
    answers = generate_all(endpoint(server.url, concurrency=1), PROMPTS, Sampling(), tmp_path / "journal")
    assert [each for (each,) in answers[:5]] == [
        Answer("<think>\n2 and 2\n</think>\n\nIt is 4.", None, "stop"),
        Answer("", None, "length"),
        Answer("", None, "stop"),
        Answer("", None, "length"),
        Answer("日本 🎉\u2028\n", None, "stop"),
    ]


@pytest.mark.parametrize(
    "message",
    ["This model's maximum context length is 8 tokens", "max_tokens=9 cannot be greater than max_model_len=8"],
)
def test_a_limit_beyond_the_context_is_asked_for_without_one(server: Server, tmp_path: Path, message: str) -> None:
    """As many tokens as the prompt leaves, as by the engine here; not an answer that counts as empty."""
    server.script = [replies({"error": {"message": message}}, 400)]
    sampling = Sampling(n=2, max_tokens=4096)
    assert texts(server, tmp_path / "journal", sampling, concurrency=1) == expected(sampling)
    assert [request.get("max_tokens") for request in server.requests] == [4096, None, *[4096] * 5]
    assert [request["n"] for request in server.requests] == [2] * 7


def test_tokens_are_asked_for(server: Server, tmp_path: Path) -> None:
    server.always = one_choice(token_ids=[5, 1])
    answers = generate_all(endpoint(server.url, token_ids=True), PROMPTS, Sampling(), tmp_path / "journal")
    assert answers[0][0].tokens == [5, 1]
    assert server.requests[0]["return_token_ids"] is True
    unchanged = {name: server.requests[0][name] for name in ("top_k", "min_p", "repetition_penalty")}
    assert unchanged == {"top_k": -1, "min_p": 0, "repetition_penalty": 1}  # whatever generation_config.json has
    server.always = good
    with pytest.raises(GenerationError, match="its replies hold no token_ids; leave --token_ids away"):
        generate_all(endpoint(server.url, token_ids=True), PROMPTS, Sampling(), tmp_path / "other")


def test_no_more_requests_at_a_time_than_asked(server: Server, tmp_path: Path) -> None:
    running, most = 0, 0

    def counted(handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
        nonlocal running, most
        with server.lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with server.lock:
            running -= 1
        good(handler, request)

    server.always = counted
    texts(server, tmp_path / "journal", Sampling(), concurrency=2, timeout=5)
    assert most == 2


@pytest.mark.parametrize(
    "url",
    [
        *("", "localhost:8000", "file:///etc/passwd", "http://", "http:///v1", "http://host:port/v1"),
        *("http://host:99999/v1", "http://[::1/v1", "http://h\0st/v1", "http://hö..st/v1"),
    ],
)
def test_no_url(url: str) -> None:
    with pytest.raises(ValueError, match=r"^--endpoint=.*expected a URL"):
        endpoint(url)
    with pytest.raises(ValueError, match=r"^--judge_endpoint=.*expected a URL"):
        EndpointGenerator(url, "m", setting="--judge_endpoint")


@pytest.mark.parametrize("status", [200, 400])
def test_a_reply_that_unpacks_to_much_takes_little_memory(server: Server, tmp_path: Path, status: int) -> None:
    """200 KB that become 200 MB, in six requests at a time."""
    server.always = replies(gzip.compress(bytes(200 << 20), 1), status, Content_Encoding="gzip")
    tracemalloc.start()
    try:
        with pytest.raises(GenerationError, match="a reply of more than 4 MiB, prompt"):
            texts(server, tmp_path / "journal", Sampling(), timeout=30, retries=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 80 << 20
    server.always = lambda handler, request: send(
        handler,
        gzip.compress(json.dumps({"choices": [choice_of(request, 0)]}).encode()),
        Content_Encoding="gzip",
    )
    assert texts(server, tmp_path / "journal", Sampling()) == expected(Sampling())  # though it was not asked for


KEY = "sk-0/secret+key=="


@pytest.mark.parametrize(
    "echo",
    [
        replies({"error": f"no rights: Bearer {KEY}"}, 401),
        replies(f"no <{KEY}>".encode(), 500),
        replies(json.dumps({"error": KEY}).replace("/", "\\/").encode(), 403),
        replies(("x" * 290 + KEY).encode(), 403),
        replies(f"https://h/?key={quote(KEY, safe='')}".encode(), 403),
        replies(KEY.encode()),
        replies({"choices": [{"text": KEY}]}),
        replies(b"", 200, Content_Encoding=KEY),
        one_choice(finish_reason=KEY),
        one_choice(message={"content": [KEY]}),
        lambda handler, request: handler.wfile.write(f"{KEY} {KEY}\r\n\r\n".encode()),
    ],
)
def test_a_key_that_the_server_repeats_is_not_shown(server: Server, tmp_path: Path, echo: Reply) -> None:
    server.always = echo
    with pytest.raises(GenerationError) as error:
        texts(server, tmp_path / "journal", Sampling(), api_key=KEY, concurrency=1, retries=0)
    assert "secret" not in str(error.value)
    assert "secret" not in (tmp_path / "journal").read_text()


def test_a_key_in_an_answer_is_not_kept(server: Server, tmp_path: Path) -> None:
    server.always = one_choice(message={"content": f"It is {KEY}.", "reasoning": f"{KEY}?"})
    assert texts(server, tmp_path / "journal", Sampling(), api_key=KEY)[0] == ["<think>\n***?\n</think>\n\nIt is ***."]
    assert "secret" not in (tmp_path / "journal").read_text()
    server.always = one_choice(message={"content": "EMPTY is a word"})
    assert texts(server, tmp_path / "other", Sampling(), api_key="EMPTY")[0] == ["EMPTY is a word"]


def test_keys_of_other_servers_are_not_sent(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller says whose key is sent; the environment does not."""
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "of-another")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Key: of-another")
    headers: list[str] = []

    def reply(handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
        headers.append(str(handler.headers))
        good(handler, request)

    server.always = reply
    texts(server, tmp_path / "journal", Sampling())
    assert headers
    assert "of-another" not in "".join(headers)
    assert "Authorization" not in "".join(headers)


@pytest.mark.parametrize(
    "url",
    ["http://user:secret@host/v1", "http://secret@host:port/v1", "http://h/v1?key=secret", "http://h/v1#secret"],
)
def test_a_url_with_a_password_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ValueError, match=r"^--judge_endpoint=http://.*by its variable$") as caught:
        EndpointGenerator(url, "m", setting="--judge_endpoint")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


AZURE = {"error": {"code": "content_filter", "message": "The response was filtered by our content management policy."}}


@pytest.mark.parametrize(
    "refusal",
    [
        replies(AZURE, 400),
        replies({"error": {"code": "content_policy_violation"}}, 400),
        replies({"error": {"code": "invalid_prompt", "message": "Your prompt may violate our usage policy."}}, 400),
        replies({"error": {"message": "Content Exists Risk", "code": "invalid_request_error"}}, 400),
        replies({"error": {"message": "The request was rejected because it was considered high risk"}}, 400),
        replies({"error": {"message": "Your input was flagged", "metadata": {"reasons": ["violence"]}}}, 403),
        replies({"error": {"code": "1301", "message": "输入或生成内容可能包含敏感内容"}}, 400),
        one_choice(finish_reason="content_filter", message={"content": "half a sen"}),
    ],
)
def test_a_prompt_that_is_refused_by_policy_is_kept_as_such(server: Server, tmp_path: Path, refusal: Reply) -> None:
    """The others are answered, and it is not asked again, also by the next start."""
    server.script = [good, refusal]
    for _ in range(2):
        found = generate_all(endpoint(server.url, concurrency=1), PROMPTS, Sampling(n=2), tmp_path / "journal")
        assert found[1] == [Answer("", None, "content_filter")] * 2
        assert [answer.finish_reason for group in found for answer in group].count("content_filter") == 2
    assert len(server.requests) == len(PROMPTS)


def test_many_refusals_stop_a_run(server: Server, tmp_path: Path) -> None:
    server.script = [replies(AZURE, 400), replies(AZURE, 400)]
    sampling = Sampling()
    line = r"^--endpoint=.*: its content filter refused 2 of 6 prompts, more than --max_refused=0.25; finished prompts"
    with pytest.raises(GenerationError, match=line):
        texts(server, tmp_path / "journal", sampling)
    assert len(server.requests) == 6
    server.always = replies(AZURE, 400)  # of many prompts not all are asked
    prompts = [[{"role": "user", "content": str(number)}] for number in range(200)]
    with pytest.raises(GenerationError, match="refused 20 of 20 prompts"):
        generate_all(endpoint(server.url, concurrency=1), prompts, sampling, tmp_path / "other")
    with pytest.raises(ValueError, match=r"^--max_refused=2: expected a share, 0 to 1$"):
        endpoint(server.url, max_refused=2)
    allowed = generate_all(endpoint(server.url, max_refused=1), PROMPTS, sampling, tmp_path / "third")
    assert {answer.finish_reason for (answer,) in allowed} == {"content_filter"}


@pytest.mark.parametrize("key", ["sécret", "secret\n"])
def test_no_key(key: str) -> None:
    """It is not shown."""
    with pytest.raises(ValueError, match=r"^--endpoint=http://h: its key holds characters that no key has") as caught:
        EndpointGenerator("http://h", "m", api_key=key)
    assert key.strip() not in str(caught.value)
