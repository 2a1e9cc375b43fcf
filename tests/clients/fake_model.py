"""A simulated model that orders one image, for frameworks that speak OpenAI's or Gemini's protocol.

Its first answer calls generate_image. Its second answer ends the conversation. It records the tools that it was offered, and
the text that the framework sends back as the result of the call.
"""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CALL_ID = "call_1"
CHARS_PER_TOKEN = 4  # a rough average of the tokenizers
# A base64 text of this length is an image, not a hash or an ID.
BASE64_MIN_CHARS = 2_000


class FakeModel:
    """The model's address, its offered tools and the results of its call."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        self.tools: dict[str, Any] = {}
        self.results: list[Any] = []
        self.paths: list[str] = []

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to one request of a framework."""
        self.paths.append(path)
        if "generateContent" in path:
            return self._gemini(body)
        return self._responses(body) if path.endswith("/responses") else self._chat(body)

    def _arguments(self, name: str) -> dict[str, Any]:
        """Return the call's arguments. A strict schema requires all, so fill in empty ones."""
        parameters = self.tools[name].get("parameters") or {}
        values: dict[str, Any] = {"prompt": self.prompt}
        for field in set(parameters.get("required", [])) - {"prompt"}:
            values[field] = _filler(parameters["properties"][field])
        return values

    def _name(self) -> str:
        # Some frameworks add a prefix.
        return next((name for name in self.tools if name.endswith("generate_image")), "generate_image")

    def _chat(self, body: dict[str, Any]) -> dict[str, Any]:
        self.tools |= {tool["function"]["name"]: tool["function"] for tool in body.get("tools", [])}
        results = [message for message in body["messages"] if message["role"] == "tool"]
        self.results += [message["content"] for message in results]
        message: dict[str, Any] = {"role": "assistant", "content": "done"}
        if not results and self.tools:
            function = {"name": self._name(), "arguments": json.dumps(self._arguments(self._name()))}
            message = {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": CALL_ID, "type": "function", "function": function}],
            }
        finish = "tool_calls" if "tool_calls" in message else "stop"
        if body.get("stream"):
            return {
                "stream": [
                    {"index": 0, "delta": _delta(message), "finish_reason": None},
                    {"index": 0, "delta": {}, "finish_reason": finish},
                ]
            }
        return {
            "id": "chat-1",
            "object": "chat.completion",
            "created": 1,
            "model": body.get("model", "fake"),
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }

    def _responses(self, body: dict[str, Any]) -> dict[str, Any]:
        self.tools |= {tool["name"]: tool for tool in body.get("tools", []) if tool.get("type") == "function"}
        items = body["input"] if isinstance(body["input"], list) else []
        results = [item for item in items if item.get("type") == "function_call_output"]
        self.results += [item["output"] for item in results]
        output: dict[str, Any] = {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "done", "annotations": []}],
        }
        if not results and self.tools:
            arguments = json.dumps(self._arguments(self._name()))
            output = {
                "type": "function_call",
                "id": "fc_1",
                "call_id": CALL_ID,
                "name": self._name(),
                "arguments": arguments,
                "status": "completed",
            }
        return {
            "id": "resp_1",
            "object": "response",
            "created_at": 1,
            "model": body.get("model", "fake"),
            "status": "completed",
            "output": [output],
            "parallel_tool_calls": False,
            "tool_choice": "auto",
            "tools": [],
            "usage": {
                "input_tokens": 1,
                "output_tokens": 1,
                "total_tokens": 2,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens_details": {"reasoning_tokens": 0},
            },
        }

    def _gemini(self, body: dict[str, Any]) -> dict[str, Any]:
        for tool in body.get("tools", []):
            self.tools |= {function["name"]: function for function in tool.get("functionDeclarations", [])}
        parts = [part for content in body["contents"] for part in content.get("parts", [])]
        results = [part["functionResponse"] for part in parts if "functionResponse" in part]
        self.results += [result["response"] for result in results]
        part: dict[str, Any] = {"text": "done"}
        if not results and self.tools:
            part = {"functionCall": {"name": self._name(), "args": {"prompt": self.prompt}}}
        return {
            "candidates": [{"content": {"role": "model", "parts": [part]}, "finishReason": "STOP", "index": 0}],
            "usageMetadata": {"promptTokenCount": 1, "candidatesTokenCount": 1, "totalTokenCount": 2},
        }


def text_of_result(result: Any) -> str:
    """Return the parts of a result that a model reads as text. A part of type image is no text."""
    if isinstance(result, str):
        return result
    if isinstance(result, list):
        return "\n".join(text_of_result(part) for part in result if not _is_image(part))
    if isinstance(result, dict) and result.get("type") in ("text", "input_text"):
        return str(result.get("text", ""))
    return json.dumps(result, ensure_ascii=False)


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("image_url", "input_image", "image")


def _filler(schema: dict[str, Any]) -> Any:
    if "enum" in schema:
        return schema.get("default", schema["enum"][0])
    kind = schema.get("type")
    kind = next((name for name in kind if name != "null"), "string") if isinstance(kind, list) else kind
    return {
        "string": "", "array": [], "boolean": False, "integer": schema.get("default", 1), "number": 60, "object": {},
    }.get(kind)  # fmt: skip


def _delta(message: dict[str, Any]) -> dict[str, Any]:
    calls = [{"index": 0, **call} for call in message.get("tool_calls", [])]
    return {**message, "tool_calls": calls} if calls else message


@contextmanager
def fake_model(prompt: str):
    """Serve a FakeModel on a free port. Yield it with its address."""
    model = FakeModel(prompt)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            answer = model.answer(self.path.partition("?")[0], body)
            if "stream" in answer:
                chunks = [
                    {
                        "id": "chat-1",
                        "object": "chat.completion.chunk",
                        "created": 1,
                        "model": "fake",
                        "choices": [choice],
                    }
                    for choice in answer["stream"]
                ]
                content = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks).encode() + b"data: [DONE]\n\n"
                kind = "text/event-stream"
            else:
                content = json.dumps(answer).encode()
                kind = "application/json"
            self.send_response(200)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield model, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
