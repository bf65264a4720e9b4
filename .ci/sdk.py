"""A client library as people have it, driven as it is: sdk.py openai|anthropic URL.

It reads cases {name: [call, model, wish, options]} and prints {name: result}: of an
answer its text or tool call, its reason to end and its tokens; of an error its type
and status. One process for all of them, for to import a library takes seconds.
"""

import gc
import io
import json
import sys
import time

gc.disable()  # it takes a tenth of an import
HELLO = [{"role": "user", "content": "Hello"}]


class OpenAI:
    """The calls of OpenAI's library."""

    def __init__(self, url):
        import openai

        self._error = openai.InternalServerError
        self._client = openai.OpenAI(base_url=url + "/v1", api_key="secret")

    def _ask(self, model, wish, key="secret", retries=2, **more):
        by = self._client.with_options(api_key=key, max_retries=retries)
        create = by.chat.completions.create
        return create(model=model, messages=HELLO, extra_body=wish, **more)

    def _joined(self, calls):
        parts = (call.function for call in calls or ())
        return "".join((part.name or "") + (part.arguments or "") for part in parts)

    def whole(self, *asked, **options):
        answer = self._ask(*asked, **options)
        [choice] = answer.choices
        text = choice.message.content or self._joined(choice.message.tool_calls)
        return [text, choice.finish_reason, answer.usage.completion_tokens]

    def flow(self, *asked):
        text, used, end = "", None, None
        more = {"stream": True, "stream_options": {"include_usage": True}}
        for chunk in self._ask(*asked, **more):
            used = getattr(chunk, "usage", None) or used
            for choice in chunk.choices:
                text += choice.delta.content or self._joined(choice.delta.tool_calls)
                end = choice.finish_reason or end
        return [text, end, used and used.completion_tokens]

    def lists(self, *_):
        return sorted(each.id for each in self._client.models.list())

    def finds(self, model, _):
        return self._client.models.retrieve(model).id

    def embeds(self, model, texts):
        answer = self._client.embeddings.create(model=model, input=texts)
        return [[len(each.embedding), each.embedding[0]] for each in answer.data]

    def uploads(self, model, size):
        sound = "a.wav", io.BytesIO(bytes(size)), "audio/wav"
        create = self._client.audio.transcriptions.create
        return create(model=model, file=sound).text

    def waits(self, model, wish):
        """From the third failed load on they are spaced."""
        began = []
        for retries in (2, 2, 1):
            began.append(time.monotonic())
            try:
                self._ask(model, wish, retries=retries)
            except self._error as error:
                status = error.status_code
        return [status, 0.9 < time.monotonic() - began[1] < 9]


class Anthropic:
    """The calls of Anthropic's library, with OpenAI's words for the reasons to end."""

    _REASONS = {"end_turn": "stop", "tool_use": "tool_calls", "max_tokens": "length"}

    def __init__(self, url):
        import anthropic

        self._client = anthropic.Anthropic(base_url=url, api_key="secret")

    def _request(self, model, wish):
        tools = [{"name": "tool0", "input_schema": {"type": "object"}}]
        body = {**wish, "tools": tools}
        return {"model": model, "max_tokens": 9, "messages": HELLO, "extra_body": body}

    def _result(self, message):
        dump = json.JSONEncoder(separators=(",", ":")).encode
        text = "".join(
            part.text if part.type == "text" else part.name + dump(part.input)
            for part in message.content
        )
        reason = self._REASONS[message.stop_reason]
        return [text, reason, message.usage.output_tokens]

    def whole(self, model, wish, key="secret", retries=2):
        by = self._client.with_options(api_key=key, max_retries=retries)
        return self._result(by.messages.create(**self._request(model, wish)))

    def flow(self, model, wish):
        with self._client.messages.stream(**self._request(model, wish)) as stream:
            return self._result(stream.get_final_message())

    def lists(self, *_):
        return sorted(each.id for each in self._client.models.list())

    def finds(self, model, _):
        return self._client.models.retrieve(model).id

    def counts(self, model, _):
        count_tokens = self._client.messages.count_tokens
        return count_tokens(model=model, messages=HELLO).input_tokens > 4


client = {"openai": OpenAI, "anthropic": Anthropic}[sys.argv[1]](sys.argv[2])
results = {}
for case, (call, model, wish, options) in json.load(sys.stdin).items():
    try:
        if hasattr(client, call):
            results[case] = getattr(client, call)(model, wish, **options)
    except Exception as error:
        results[case] = [type(error).__name__, getattr(error, "status_code", None)]
print(json.dumps(results))
