"""Begin a session over stdio before settings, logging and SDK are imported. This module imports little."""

from __future__ import annotations

import gc
import os
import sys

from evolink_mcp.app.environment import cache_folder, tools_text
from evolink_mcp.server.startup_answers import StartupAnswers, load, recording_key
from evolink_mcp.transports.signals import leave_on_stop_signal
from evolink_mcp.transports.stdio_lines import StdioLines

# The longest time that the imports delay the first answers.
SWITCH_INTERVAL_S = 0.0005


class EarlySession:
    """Read stdin, and answer the first requests from the recording of an earlier start.

    `problem`: the error of stdin or stdout, empty without one. `lines`: None after such an error. `is_terminal`: a person
    started the server in a terminal. `cache`, `key` and `has_recording` describe the recording.
    """

    def __init__(self) -> None:
        gc.disable()  # garbage collection takes a tenth of the start; `start_garbage_collection` enables it again
        leave_on_stop_signal()
        self.is_terminal = os.isatty(0) if sys.stdin else False
        self.cache = cache_folder()
        self.key = recording_key(tools_text())
        results = load(self.cache, self.key)
        self.has_recording = results is not None
        self.startup_answers = StartupAnswers(results)
        self.lines: StdioLines | None = None
        self.problem = ""
        self._switch_interval_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        try:
            self.lines = StdioLines(self.startup_answers.answer, can_leave=False)
        except OSError as error:
            self.problem = error.strerror or ""

    def end_imports(self) -> None:
        """The imports are complete: let the threads switch in the usual interval."""
        sys.setswitchinterval(self._switch_interval_s)
