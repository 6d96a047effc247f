"""An OpenAI-compatible server that answers as a script says."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[[str, int], Any]  # (the last message, number of the request) -> text, or (status, headers), or a body


class ScriptedServer:
    """Serves until the end of its `with`. `requests` holds the bodies that came, `headers` theirs, `most` how many were
    under way at once."""

    def __init__(self, script: Script, delay_s: float = 0.0):
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most = self._under_way = 0
        self._script, self._delay_s, self._lock = script, delay_s, threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, headers, answer = server._answer(self.path, body, dict(self.headers))
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    for name, value in (headers | {"Content-Length": str(len(content))}).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                except ConnectionError:
                    pass  # the client gave up

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def prompts(self) -> list[str]:
        return [request["messages"][-1]["content"] for request in self.requests]

    def _answer(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, dict[str, str], Any]:
        with self._lock:
            number = len(self.requests)
            self.requests.append(body)
            self.headers.append(headers)
            self._under_way += 1
            self.most = max(self.most, self._under_way)
        time.sleep(self._delay_s)
        answer = self._script(body["messages"][-1]["content"], number) if path == "/v1/chat/completions" else (404, {})
        with self._lock:
            self._under_way -= 1
        if isinstance(answer, tuple):
            status, extra = answer
            return status, extra, {"error": "as scripted"}
        if not isinstance(answer, str):
            return 200, {}, answer
        choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
        return 200, {}, {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 7}}

    def __enter__(self) -> "ScriptedServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._http.shutdown()
        self._http.server_close()
