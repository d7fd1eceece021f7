"""A person's terminal with editing, history and completion, by prompt_toolkit, which is optional.

It runs on a thread of its own with asyncio, where a stopped terminal (Ctrl-S) blocks nobody else. It draws the last
line and knows the text that was typed there, so log lines are written above it.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress

import trio
from prompt_toolkit import PromptSession
from prompt_toolkit.application import run_in_terminal
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_input
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle

from vhostpc._native.entries import Thread
from vhostpc._native.threads import KeptThread
from vhostpc.qmp.screen import Screen, held_threads

Complete = Callable[[str], Iterable[str]]
"""The completions of the last word of a line."""

ENDING = 1.0
"""Seconds in which the thread must release the terminal; a stopped terminal accepts no output."""
UNSHOWN = 1000
"""Most log lines that wait for a stopped terminal; older ones are dropped."""


class _Completer(Completer):
    def __init__(self, complete: Complete) -> None:
        self._complete = complete

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        before = document.text_before_cursor
        word = before.split(" ")[-1]
        found = list(self._complete(before))
        if len(found) == 1 and not found[0].endswith(":"):  # otherwise an address goes on
            return [Completion(f"{found[0]} ", -len(word))]
        return [Completion(text, -len(word)) for text in found]


class Editor:
    """Lines from standard input, a terminal, and texts to standard output, the same one."""

    newline = "\n"

    # Raises Shortage, and the library's errors for a terminal that it does not know.
    def __init__(self, prompt: str, complete: Complete, screen: Screen | None) -> None:
        self._prompt = prompt
        self._screen = screen
        self._trio = trio.lowlevel.current_trio_token()
        self._loop = asyncio.new_event_loop()
        self._answer: bytes | None = None
        self._answered = trio.Event()
        self._unshown: deque[str] = deque(maxlen=UNSHOWN)
        self._left_out = 0
        self._ended = trio.Event()
        self._task: asyncio.Task[None] | None = None
        output = Vt100_Output.from_pty(sys.stdout, term=os.environ.get("TERM"))
        output.enable_cpr = False  # one row, wherever it is: the cursor's position need not be known
        self._session: PromptSession[str] = PromptSession(
            history=InMemoryHistory(),
            completer=_Completer(complete),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            input=create_input(sys.stdin),
            output=output,
        )
        self._thread = KeptThread(Thread.TERMINAL, "the monitor's terminal")

    # --- on the trio thread

    async def run(self) -> None:
        """The thread's life, up to :meth:`aclose`. Cancelled, it is left alone."""
        if self._screen is not None:
            self._screen.above = self._above
        await self._thread.call(self._loop.run_forever, abandon=True)

    async def ask(self) -> None:
        self._answer, self._answered = None, trio.Event()
        self._loop.call_soon_threadsafe(self._begin)
        await trio.lowlevel.checkpoint()

    async def receive(self) -> bytes:
        await self._answered.wait()
        return self._answer or b""

    async def send(self, data: bytes) -> None:
        done = trio.Event()

        def write() -> None:
            with suppress(OSError):
                sys.stdout.write(data.decode(errors="replace"))
                sys.stdout.flush()
            self._tell(done.set)

        self._loop.call_soon_threadsafe(write)
        await done.wait()

    def _above(self, text: str) -> None:
        """A log line; also from other threads."""
        if len(self._unshown) == UNSHOWN:
            self._left_out += 1
        self._unshown.append(text)
        with suppress(RuntimeError):  # it has ended: close() shows the rest
            self._loop.call_soon_threadsafe(self._show)

    async def aclose(self) -> None:
        """Release the terminal."""
        if self._screen is not None:
            self._screen.above = None
        with trio.CancelScope(shield=True):
            self._loop.call_soon_threadsafe(self._stop)
            with trio.move_on_after(ENDING):
                await self._ended.wait()
        self._thread.close()
        if not self._ended.is_set():
            held_threads.append(Thread.TERMINAL)
        elif self._screen is not None and self._unshown:
            self._screen.write(self._lines())

    # --- on the editor's thread

    def _tell(self, what: Callable[[], object]) -> None:
        with suppress(trio.RunFinishedError):
            self._trio.run_sync_soon(what)

    def _begin(self) -> None:
        self._task = self._loop.create_task(self._one_line())

    async def _one_line(self) -> None:
        try:
            line = await self._session.prompt_async(self._prompt, handle_sigint=False)
            found = line.encode(errors="surrogateescape") + b"\n"
        except EOFError:  # the key for the end of a file: a new prompt
            found = b"" if _hung_up() else b"\n"
        except KeyboardInterrupt:  # the key sends no signal while a line is edited
            found = b"\n"
            os.kill(os.getpid(), signal.SIGINT)
        except OSError:
            found = b""

        def answer() -> None:
            self._answer = found
            self._answered.set()

        self._tell(answer)

    def _show(self) -> None:
        if self._screen is None or not self._unshown:
            return
        screen = self._screen
        text = self._lines()
        if self._task is not None and not self._task.done():
            self._loop.create_task(_in_terminal(lambda: screen.write_now(text)))
        else:
            screen.write_now(text)

    def _lines(self) -> str:
        left_out, self._left_out = self._left_out, 0
        lines = [f"({left_out} lines were dropped here)\n"] if left_out else []
        while self._unshown:
            lines.append(self._unshown.popleft())
        return "".join(lines)

    def _stop(self) -> None:
        async def stop() -> None:
            if self._task is not None and not self._task.done():
                self._task.cancel()
                with suppress(asyncio.CancelledError):
                    await self._task
            self._loop.stop()
            self._tell(self._ended.set)

        self._stopping = self._loop.create_task(stop())


async def _in_terminal(write: Callable[[], None]) -> None:
    await run_in_terminal(write)


def _hung_up() -> bool:
    poll = select.poll()
    poll.register(0, 0)
    return bool(poll.poll(0))
