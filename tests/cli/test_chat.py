"""``reprise chat`` on the demo model: in a pipe and in a terminal."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time

import pytest
import warm

GREEDY = ("--temperature", "0", "--device", "cpu", "--num-blocks", "160")


def test_every_line_of_a_pipe_is_a_turn(invoke):
    result = invoke("chat", *GREEDY, input="What is 12 + 30?\n\nWhat is 25 + 14?\n")
    assert result.exit_code == 0
    first, second = result.stdout.splitlines()
    assert "42" in first
    assert "39" in second
    assert result.stderr.count("first token after") == 2


def test_commands(invoke):
    result = invoke(
        "chat", *GREEDY, "-q", input="/help\n/nonsense\n/reset\n/quit\nWhat is 1 + 1?\n"
    )
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "Ctrl-C         stop the answer" in result.stderr
    assert "unknown command /nonsense" in result.stderr
    assert "conversation forgotten" in result.stderr


@pytest.mark.parametrize("word", ["/exit", "/bye"])
def test_other_words_for_leaving(invoke, word):
    result = invoke("chat", *GREEDY, "-q", input=f"{word}\nWhat is 1 + 1?\n")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_a_system_message_may_be_set_at_any_time(invoke, monkeypatch):
    from reprise.cli import chat

    conversations = []
    original = chat.Conversation.answer

    def answer(self, text):
        original(self, text)
        conversations.append([(each["role"], each["content"]) for each in self.messages[:-1]])

    monkeypatch.setattr(chat.Conversation, "answer", answer)
    turns = "/system\nhi\n/system Be brief.\nand now\n/system\n/reset\nanew\n"
    result = invoke("chat", *GREEDY, "-q", "-n", "2", input=turns)
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        "no system message", "system message set", "Be brief.", "conversation forgotten"
    ]  # fmt: skip
    first, second, third = conversations
    assert first == [("user", "hi")]
    assert second[0] == ("system", "Be brief.")
    assert [role for role, _ in second] == ["system", "user", "assistant", "user"]
    assert third == [("system", "Be brief."), ("user", "anew")]


def test_a_full_context_is_an_error_of_the_turn_only(invoke):
    long = "word " * 200
    result = invoke(
        "chat", *GREEDY, "-q", "--max-model-len", "64", input=f"{long}\nWhat is 12 + 30?\n"
    )
    assert result.exit_code == 0
    assert "error:" in result.stderr
    assert "/reset begins anew" in result.stderr
    assert "42" in result.stdout


def test_a_refused_request_is_an_error_of_the_turn_only(invoke, monkeypatch):
    from reprise.cli import chat
    from reprise.errors import RequestError

    def stream(llm, prompt, params):
        if "unfit" in str(prompt):
            raise RequestError("this text is unfit")
        return original(llm, prompt, params)

    original = chat.stream
    monkeypatch.setattr(chat, "stream", stream)
    result = invoke("chat", *GREEDY, "-q", input="an unfit text\nWhat is 12 + 30?\n")
    assert result.exit_code == 0
    assert result.stderr == "error: this text is unfit\n"
    # The second turn would be refused as well if the first were still part of it.
    assert "42" in result.stdout


def test_a_model_without_a_chat_template_is_refused(invoke, tmp_path):
    from pathlib import Path

    import reprise

    for each in (Path(reprise.__file__).parent / "demo_model").iterdir():
        if each.name != "chat_template.jinja":
            (tmp_path / each.name).symlink_to(each)
    result = invoke("chat", "--model", str(tmp_path), *GREEDY, input="hi\n")
    assert result.exit_code == 2
    assert "no chat template" in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves():
    chat = Terminal("chat", "--ignore-eos", "-n", "1800", "--device", "cpu", "--num-blocks", "160")
    try:
        chat.wait_for("> ")
        chat.type("Tell me a story.\n")
        chat.wait_for(". ")
        chat.type("\x03")
        chat.wait_for("(stopped)")
        chat.wait_for("> ")
        chat.type("\x04")
        assert chat.exit_status() == 0
    finally:
        chat.close()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
def test_a_pasted_block_is_one_turn():
    """With the terminal's marks around it, and without: dumb terminals set none."""
    for term, pasted in (
        ("dumb", "What is\n12 + 30?\n"),
        ("xterm", "\x1b[200~What is\r12 + 30?\x1b[201~\r"),
    ):
        chat = Terminal("chat", *GREEDY, "-n", "4", term=term)
        try:
            chat.wait_for("> ")
            chat.type(pasted)
            chat.wait_for("first token after")
            chat.wait_for("> ")
            chat.type("\x04")
            assert chat.exit_status() == 0
            assert chat.seen.count("first token after") == 1
        finally:
            chat.close()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
def test_something_is_shown_until_the_model_is_ready():
    program = (
        "import logging, time, reprise.llm\n"
        "from reprise.cli.logs import LogLevel, configure\n"
        "from reprise.cli.streaming import load\n"
        "configure(LogLevel.WARNING)\n"
        "class LLM:\n"
        "    def __init__(self):\n"
        "        logging.getLogger('reprise').warning('a decision')\n"
        "        time.sleep(2.5)\n"
        "        print('built')\n"
        "reprise.llm.LLM = LLM\n"
        "load({})"
    )
    loading = Terminal(program=("-c", program), term="xterm")
    try:
        loading.wait_for("built")
        assert loading.seen.count("starting") >= 2
        # A log line does not begin behind the spinner.
        before = loading.seen.partition("WARNING")[0].rpartition("starting")[2]
        assert "\x1b[2K" in before
        assert loading.exit_status() == 0
    finally:
        loading.close()


class Terminal:
    """``reprise ARGUMENTS``, or another program of Python, in a pseudo terminal."""

    def __init__(
        self, *arguments: str, program: tuple[str, ...] = ("-m", "reprise"), term: str = "dumb"
    ) -> None:
        self._terminal, theirs = os.openpty()
        self._child = subprocess.Popen(
            [sys.executable, *program, *arguments], stdin=theirs, stdout=theirs, stderr=theirs,
            env={**os.environ, "TERM": term}, start_new_session=True,
            preexec_fn=warm.lead_terminal,
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""
        """All that was read."""
        self._unread = b""

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Read until ``text`` appears; what follows it is read by the next call."""
        wanted, deadline = text.encode(), time.monotonic() + seconds
        while wanted not in self._unread:
            patience = max(0, deadline - time.monotonic())
            assert select.select([self._terminal], [], [], patience)[0], self._unread
            read = os.read(self._terminal, 4096)
            self._unread += read
            self.seen += read.decode(errors="replace")
        self._unread = self._unread.partition(wanted)[2]

    def exit_status(self, seconds: float = 30) -> int:
        return self._child.wait(seconds)

    def close(self) -> None:
        self._child.kill()
        self._child.wait()
        os.close(self._terminal)
