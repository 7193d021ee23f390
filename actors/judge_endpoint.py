"""A judge behind an OpenAI-compatible server.

All questions of a call run in one event loop in the caller's thread: a signal handler runs at once and a second Ctrl-C
ends the call, whatever the server does.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx

from actors.judge import Keep
from rlvid.config import JudgeConfig
from rlvid.errors import UserError
from rlvid.rewards.judge_prompts import TIMED_OUT, Answer
from rlvid.rollout.engine import Sampling
from rlvid.servers import may_recover, open_client
from rlvid.types import Encoded, Sample

Frames = Callable[[Sequence[Sample]], Mapping[str, list[bytes]]]  # JPEG files of each sample, by its id

FIRST_PAUSE_S = 0.5  # before the second try; doubled each time
LONGEST_PAUSE_S = 30.0
MAX_ANSWER_BYTES = 2**20
PROBE_S = 5.0
SILENCE_S = 10.0  # without an answer, before a line says so; doubled each time up to a minute


class EndpointBackend:
    """Each question has a deadline for all its tries.

    Args:
        frames: asked for with `send_frames`.
        on_event: called with one line on what is waited for.
    """

    def __init__(self, cfg: JudgeConfig, seed: int, frames: Frames, on_event: Callable[[str], None]):
        self.id = f"{cfg.model} at {cfg.url}" + (" with frames" if cfg.send_frames else "")
        self._cfg, self._frames, self._on_event = cfg, frames, on_event
        self._sampling = Sampling(1, cfg.temperature, cfg.max_tokens, seed=seed)
        self._tokens_key = "max_tokens"
        self._n_unanswered = 0  # questions in a row that had no answer within their deadline
        self._n_done = 0
        self._heard_s = 0.0
        self._failure = ""  # of the last try that failed

    def ask(self, prompts: Sequence[Encoded], keep: Keep) -> None:
        """Ask up to `concurrency` questions at a time.

        Raises:
            UserError: the server is gone or is none; `keep` has had the answers that came before.
        """
        frames = self._frames([p.sample for p in prompts]) if self._cfg.send_frames else {}
        self._n_unanswered = self._n_done = 0
        asyncio.run(self._ask_all(prompts, frames, keep))

    async def _ask_all(self, prompts: Sequence[Encoded], frames: Mapping[str, list[bytes]], keep: Keep) -> None:
        free = asyncio.Semaphore(self._cfg.concurrency)
        self._heard_s = time.monotonic()

        async def ask(client: httpx.AsyncClient, prompt: Encoded) -> None:
            async with free:
                answer = await self._ask(client, prompt.sample, frames.get(prompt.sample.id, []))
            self._n_done += 1
            keep([(prompt, answer)])

        async with _client(self._cfg, httpx.AsyncClient) as client:
            reports = asyncio.create_task(self._report_silence(len(prompts)))
            try:
                await asyncio.gather(*(ask(client, prompt) for prompt in prompts))
            finally:
                reports.cancel()

    async def _report_silence(self, n: int) -> None:
        pause_s = SILENCE_S
        while True:
            await asyncio.sleep(pause_s)
            silent_s = time.monotonic() - self._heard_s
            if silent_s >= SILENCE_S:
                pause_s = min(2 * pause_s, 60.0)
                failure = f" ({self._failure})" if self._failure else ""
                self._on_event(
                    f"waiting for the judge {self.id}: {self._n_done} of {n} questions answered, nothing for "
                    f"{silent_s:.0f} s{failure}"
                )

    async def _ask(self, client: httpx.AsyncClient, sample: Sample, frames: Sequence[bytes]) -> Answer:
        """Try until the answer is final or the deadline passes, with longer and longer pauses.

        Raises:
            UserError: the server is gone: nothing listens there, or as many questions in a row as are asked at once had
                no answer in time.
        """
        answer, is_refused = Answer(None, f"{TIMED_OUT} {min(self._cfg.timeout_s, self._cfg.deadline_s):g} s"), False
        pause_s = FIRST_PAUSE_S
        try:
            async with asyncio.timeout(self._cfg.deadline_s):
                while True:
                    try:
                        answer, is_final = await self._try(client, sample, frames)
                        is_refused = False
                    except httpx.HTTPError as e:
                        answer, is_final = Answer(None, f"{type(e).__name__}: {e}"), False
                        is_refused = isinstance(e, httpx.ConnectError)
                    if is_final:
                        self._n_unanswered, self._heard_s, self._failure = 0, time.monotonic(), ""
                        return answer
                    self._failure = answer.failure
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        except TimeoutError:
            self._n_unanswered += 1
        if is_refused or self._n_unanswered >= self._cfg.concurrency:
            raise UserError(
                f"{self._cfg.key}.url: {self.id} answers no more, {self._n_unanswered} questions in a row had no "
                f"answer within {self._cfg.key}.deadline_s={self._cfg.deadline_s:g}. The last failure: "
                f"{answer.failure}. Start the server again; the same command resumes with the questions that have no "
                f"answer"
            )
        return answer

    async def _try(self, client: httpx.AsyncClient, sample: Sample, frames: Sequence[bytes]) -> tuple[Answer, bool]:
        """One request: its answer, and whether another try would be of no use."""
        cfg, key, content = self._cfg, self._tokens_key, b""
        try:
            async with (
                asyncio.timeout(cfg.timeout_s),
                client.stream("POST", f"{base_url(cfg)}/chat/completions", json=self._body(sample, frames)) as response,
            ):
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > MAX_ANSWER_BYTES:
                        return Answer(None, f"an answer of more than {MAX_ANSWER_BYTES} bytes"), False
        except TimeoutError:
            return Answer(None, f"{TIMED_OUT} {cfg.timeout_s:g} s"), False
        status, said = response.status_code, content[:200].decode(errors="replace")
        if status == 400 and key == "max_tokens" and b"max_completion_tokens" in content:
            self._tokens_key = "max_completion_tokens"  # what newer servers call it
            return await self._try(client, sample, frames)
        if status != 200:
            return Answer(None, f"HTTP {status}: {said}"), not may_recover(status)
        answer = parse_json(cfg, response, content)
        try:
            text = answer["choices"][0]["message"]["content"]
        except (LookupError, TypeError):
            return Answer(None, "the server's answer has no choices[0].message.content"), False
        return (Answer(text), True) if isinstance(text, str) else (Answer(None, "an answer without text"), False)

    def _body(self, sample: Sample, frames: Sequence[bytes]) -> dict[str, Any]:
        images = [
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"}}
            for jpeg in frames
        ]
        # Servers of text models may not know the list form.
        content = [*images, {"type": "text", "text": sample.question}] if images else sample.question
        body = {
            "model": self._cfg.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": self._cfg.temperature,
            self._tokens_key: self._cfg.max_tokens,
        }
        return body | ({"seed": self._sampling.request_seed(sample.id)} if self._cfg.temperature else {})


def probe_endpoint(cfg: JudgeConfig, on_event: Callable[[str], None]) -> None:
    """Ask for the server's list of models, which costs nothing, before a run needs its judge.

    Raises:
        UserError: nothing answers, something that is no API answers, or the key is refused.
    """
    with _client(cfg, httpx.Client, timeout=PROBE_S) as client:
        try:
            response = client.get(f"{base_url(cfg)}/models")
        except (httpx.ReadTimeout, httpx.PoolTimeout):
            on_event(f"the judge at {cfg.url} did not answer within {PROBE_S:g} s; it is asked again when needed")
            return
        except httpx.HTTPError as e:
            raise UserError(
                f"{cfg.key}.url: no judge answers at {cfg.url} ({type(e).__name__}: {e}); start it, or correct the URL"
            ) from e
    if response.status_code == 401:
        has_key = bool(os.environ.get(cfg.api_key_env))
        key = f"the key in {cfg.api_key_env}" if has_key else f"no key, {cfg.api_key_env} is empty"
        raise UserError(f"{cfg.key}.api_key_env: {cfg.url} answers HTTP 401 to {key}")
    if response.status_code == 200:
        parse_json(cfg, response, response.content)


def parse_json(cfg: JudgeConfig, response: httpx.Response, content: bytes) -> Any:
    """
    Raises:
        UserError: the body is no JSON: a web page, say, which waiting does not change.
    """
    try:
        return json.loads(content)
    except ValueError:
        kind = response.headers.get("content-type", "a body of no stated type")
        raise UserError(
            f"{cfg.key}.url: {response.url} answers with {kind} where JSON is expected "
            f"({content[:60].decode(errors='replace')!r}). Give the URL where the API begins, as http://localhost:8000/v1"
        ) from None


def base_url(cfg: JudgeConfig) -> str:
    return (cfg.url or "").rstrip("/")


def _client(cfg: JudgeConfig, kind: Callable[..., Any], timeout: float | None = None) -> Any:
    return open_client(base_url(cfg), cfg.api_key_env, f"{cfg.key}.url", kind, timeout)
