"""A vision-language model as judge, behind any OpenAI-compatible chat endpoint, and the same judge replayed from its log.

Every request is one line of a log: what was asked (the sentence, a hash of every picture), and the answer word for word. A study can be
judged again from the log, without network, without the model and without cost; pictures are not in it.
"""

from __future__ import annotations

import base64
import io
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError, check_at_least
from physisforcing.core.results import config_hash

from .judges import JsonLines, JudgeRequest, Verdict, request_key
from .service.http import Address, NoReplyError, Reply, TooLargeError, exchange

#: Answers after which the same question may succeed later.
RETRIED = frozenset({429, 500, 502, 503, 504})
LONGEST_WAIT_S = 30.0

QUESTION = """You judge whether a robot did what it was told.

Task, as a JSON string: {instruction}

{pictures}

Success: the robot did what the task says, with the arm that the task names if it names one, and at the end the objects are where the task
wants them. Small blemishes of a generated video, other colours, another speed or another length do not matter.
Failure: the end state is another one, the wrong arm or object was used, or nothing was done.
Compare the last pictures above all.

Answer with one JSON object and nothing else: {{"success": true or false, "reason": "one sentence"}}"""
BOTH = (
    "First come {n} pictures of a recording in which the task is done correctly, in order of time; then {m} pictures of the "
    "video to be judged, in order of time."
)
ALONE = "The {m} pictures are of the video to be judged, in order of time."


@dataclass(slots=True, kw_only=True)
class OpenAIJudgeConfig:
    """``base_url``: for instance ``http://127.0.0.1:8000/v1``; ``/chat/completions`` is added. ``key_variable``: name of the environment
    variable that holds the key, empty for none. ``json_mode``: ask for ``response_format`` json_object. ``timeout_s``: for one whole
    exchange. ``retries``: after 429, 5xx and no answer, waiting ``backoff_s``, doubled each time, or what Retry-After says (up to 30 s).
    """

    base_url: str = ""
    model: str = ""
    key_variable: str = ""
    temperature: float = 0.0
    max_tokens: int = 300
    json_mode: bool = True
    timeout_s: float = 60.0
    max_response_bytes: int = 2**20
    retries: int = 2
    backoff_s: float = 1.0

    def check(self) -> None:
        """``UserError`` for what cannot work, and for a key that would travel in the open."""
        self.check_model()
        try:
            address = Address.of(self.base_url)
        except UserError as error:
            # An address with a password in it is not repeated.
            got = "an address with a user name" if "@" in self.base_url else self.base_url
            fix = "judge.base_url=http://127.0.0.1:8000/v1"
            raise UserError("judge.base_url", got=got, wanted="http(s)://host[:port]/v1", fix=fix) from error
        if self.key_variable and not address.keeps_secrets:
            fix = "use https, or leave judge.key_variable out"
            raise UserError("judge.base_url", got=self.base_url, wanted="https where a key is sent", fix=fix)
        if self.key_variable and not os.environ.get(self.key_variable):
            fix = f"export {self.key_variable}=..."
            raise UserError("judge.key_variable", got=self.key_variable, wanted="a variable that is set", fix=fix)
        check_at_least(self, max_tokens=1, timeout_s=0.1, max_response_bytes=1024, retries=0, backoff_s=0)

    def check_model(self) -> None:
        """``UserError`` without a model: its name is a part of what verdicts are known by."""
        if not self.model:
            raise UserError("judge.model", got=self.model, wanted="the model's name", fix="judge.model=NAME")

    @property
    def fingerprint(self) -> str:
        """What may change an answer: the model, the question, how it is asked. Not where it is served."""
        settings = {"model": self.model, "temperature": self.temperature, "max_tokens": self.max_tokens}
        settings |= {"json_mode": self.json_mode, "question": [QUESTION, BOTH, ALONE]}
        return f"{self.model}-{config_hash(settings)}"


class OpenAIJudge:
    """Asks the endpoint. ``log``: file of JSON lines that every answer, good or bad, is appended to."""

    def __init__(self, config: OpenAIJudgeConfig, log: str | Path) -> None:
        config.check()
        self.config, self._log = config, JsonLines(log)
        self._address = Address.of(config.base_url)

    @property
    def fingerprint(self) -> str:
        return self.config.fingerprint

    def judge(self, request: JudgeRequest) -> Verdict:
        began, key = time.monotonic(), request_key(self.fingerprint, request)
        reply, problem, tries = self._ask(request)
        text = ""
        if reply is not None:
            text, problem = (self._without_key(part) for part in answer_text(reply))
        status, reason = read_verdict(text) if not problem else ("error", problem)
        seconds = time.monotonic() - began
        self._log.append(
            {
                "key": key,
                "id": request.id,
                "judge": self.fingerprint,
                "model": self.config.model,
                "instruction": request.instruction,
                "pictures": request.pictures(),
                "http": None if reply is None else reply.status,
                "answer": text,
                "problem": problem,
                "tries": tries,
                "seconds": round(seconds, 3),
                "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
        )
        return Verdict(status=status, reason=reason, judge=self.fingerprint, key=key, source="asked", seconds=seconds)

    def _without_key(self, text: str) -> str:
        """A server may send back what it was sent; a key does not go into a log."""
        secret = os.environ.get(self.config.key_variable, "") if self.config.key_variable else ""
        return text.replace(secret, "(key)") if secret else text

    def _ask(self, request: JudgeRequest) -> tuple[Reply | None, str, int]:
        """-> (the last answer of the server, or None; what went wrong; how often it was asked)."""
        config = self.config
        headers = {"content-type": "application/json", "accept": "application/json"}
        if config.key_variable:
            headers["authorization"] = f"Bearer {os.environ.get(config.key_variable, '')}"
        body = json.dumps(payload(config, request)).encode()
        problem, wait_s = "", config.backoff_s
        for tries in range(1, config.retries + 2):
            reply, retry_after = None, None
            try:
                reply = exchange(
                    self._address,
                    "POST",
                    "/chat/completions",
                    body,
                    headers,
                    timeout_s=config.timeout_s,
                    most_bytes=config.max_response_bytes,
                )
            except NoReplyError as error:
                problem = str(error)
                if isinstance(error, TooLargeError):  # the same question would get the same answer
                    return None, problem, tries
            if reply is not None and reply.status not in RETRIED:
                return reply, "", tries
            if reply is not None:
                problem, retry_after = f"HTTP status {reply.status}", reply.headers.get("retry-after", "")
            if tries <= config.retries:
                told = float(retry_after) if retry_after and retry_after.isdecimal() else wait_s
                time.sleep(min(LONGEST_WAIT_S, told))
                wait_s *= 2
        return reply, problem, config.retries + 1


class ReplayJudge:
    """Answers from the log of an ``OpenAIJudge`` with the same settings. A question that is not in it is an ``error``.

    The answer is read again, word for word, so that a log also serves to test another way of reading. Of several answers to one question
    the last one that was a verdict counts, else the last one.
    """

    def __init__(self, config: OpenAIJudgeConfig, log: str | Path) -> None:
        config.check_model()
        self._file = JsonLines(log)
        if not self._file.path.is_file():
            fix = "give the log that a judge=openai evaluation wrote"
            raise UserError("judge.log", got=str(log), wanted="an existing file", fix=fix)
        self._fingerprint = config.fingerprint
        self._answers: dict[str, Verdict] = {}
        for row in self._file.rows():
            verdict = self._read(row)
            known = self._answers.get(verdict.key)
            if known is None or known.status == "error" or verdict.status != "error":
                self._answers[verdict.key] = verdict

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def judge(self, request: JudgeRequest) -> Verdict:
        key = request_key(self.fingerprint, request)
        found = self._answers.get(key)
        if found is not None:
            return found
        reason = "no recorded answer: another model, question, sentence or picture than in the log"
        return Verdict(status="error", reason=reason, judge=self.fingerprint, key=key, source="replayed")

    def _read(self, row: Mapping[str, Any]) -> Verdict:
        problem = str(row.get("problem") or "")
        status, reason = ("error", problem) if problem else read_verdict(str(row.get("answer", "")))
        return Verdict(status=status, reason=reason, judge=self._fingerprint, key=row["key"], source="replayed")


# ------------------------------------------------------------------------------------------------------ question and answer


def payload(config: OpenAIJudgeConfig, request: JudgeRequest) -> dict[str, Any]:
    """The body of a chat completion: the question, then the pictures as PNG data URLs."""
    reference = [] if request.reference_THWC is None else list(request.reference_THWC)
    told = (BOTH if reference else ALONE).format(n=len(reference), m=len(request.rollout_THWC))
    text = QUESTION.format(instruction=json.dumps(request.instruction, ensure_ascii=False), pictures=told)
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    for picture in [*reference, *request.rollout_THWC]:
        content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_png(picture)}"}})
    body: dict[str, Any] = {
        "model": config.model,
        "messages": [{"role": "user", "content": content}],
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
    }
    return body | ({"response_format": {"type": "json_object"}} if config.json_mode else {})


def answer_text(reply: Reply) -> tuple[str, str]:
    """(text of the answer, what is wrong with it): one of the two is empty."""
    if 300 <= reply.status < 400:
        return "", f"HTTP status {reply.status}: redirects are not followed; give the final judge.base_url"
    if reply.status != 200:
        return "", f"HTTP status {reply.status}: {reply.body[:200].decode('utf-8', 'replace')}"
    try:
        choice = json.loads(reply.body)["choices"][0]
        text, ended = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        return "", f"no chat completion: {type(error).__name__}: {str(error)[:120]}"
    if not isinstance(text, str) or not text.strip():
        return "", "an answer without text"
    if ended == "length":
        return "", "the answer was cut off at judge.max_tokens"
    return text, ""


def read_verdict(text: str) -> tuple[str, str]:
    """(status, reason) of an answer: exactly one JSON object with ``success`` (true, false, 1 or 0) and maybe ``reason``.

    Anything else, also around the object, is an ``error``: guessing what a judge may have meant makes verdicts.
    """
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        return "error", f"not one JSON object ({str(error)[:80]}): {text[:120]!r}"
    if not isinstance(found, dict) or not {"success"} <= found.keys() <= {"success", "reason"}:
        return "error", f"not an object with success and reason: {text[:120]!r}"
    said, reason = found["success"], found.get("reason", "")
    if not (isinstance(said, bool) or (type(said) is int and said in (0, 1))) or not isinstance(reason, str):
        return "error", f"success is true or false, reason a sentence: {text[:120]!r}"
    return ("success" if said else "failure"), reason[:1000]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name twice")
    return found


def _png(picture_HWC: NDArray[np.uint8]) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture_HWC).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
