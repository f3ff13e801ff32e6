"""`vlmrt chat` against a server of the test: questions, files, commands, what goes wrong, and Ctrl-C."""

from __future__ import annotations

import base64
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tools.chat_server import ChatServer, chat_server
from vlmrt.tools.chat import client
from vlmrt.tools.chat.attachments import AttachmentError, attach, parts_of
from vlmrt.tools.chat.chat import Chat, figures_text
from vlmrt.tools.chat.client import Figures, Server
from vlmrt.tools.chat.conversation import SETTINGS, Conversation
from vlmrt.tools.chat.lines import completions, history_file
from vlmrt.tools.cli import main
from vlmrt.tools.offline.engine import Engine

PICTURE = b"\x89PNG of a kind"
WAIT_S = 60.0


@pytest.fixture(scope="module")
def module_server() -> Iterator[ChatServer]:
    with chat_server() as server:
        yield server


@pytest.fixture
def server(module_server: ChatServer) -> ChatServer:
    """One server for all tests, as new."""
    url = module_server.url
    vars(module_server).update(vars(ChatServer()))
    module_server.url = url
    return module_server


class Terminal(io.StringIO):
    """Standard input of a person."""

    def isatty(self) -> bool:
        return True


class Talk:
    """A chat whose lines the test says."""

    def __init__(self, server: ChatServer) -> None:
        self.out, self.notices = io.StringIO(), io.StringIO()
        self.conversation = Conversation()
        self.chat = Chat(Server(server.url), "fake", self.conversation, self.out, self.notices)

    def say(self, *lines: str) -> str:
        """What is told, but for answers."""
        begin = len(self.notices.getvalue())
        for line in lines:
            assert self.chat.handle(line)
        return self.notices.getvalue()[begin:].strip()


@pytest.fixture
def talk(server: ChatServer) -> Talk:
    return Talk(server)


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "a picture.png"
    path.write_bytes(PICTURE)
    return str(path)


def shown(part: dict[str, Any]) -> bytes:
    """The bytes of a part's data URL."""
    url: str = part[part["type"]]["url"]
    return base64.b64decode(url.partition(";base64,")[2])


# ---------------------------------------------------------------- questions and answers


def test_questions_and_answers_follow_each_other(talk: Talk, server: ChatServer) -> None:
    talk.say("Who are you?", "And I?")
    assert talk.out.getvalue() == "Hello.\nHello.\n"
    assert talk.notices.getvalue() == ""
    assert server.last["messages"] == [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And I?"},
    ]
    assert (server.last["model"], server.last["stream"]) == ("fake", True)
    assert server.last["stream_options"] == {"include_usage": True}


def test_an_answer_is_shown_piece_by_piece(server: ChatServer) -> None:
    writes: list[str] = []

    class Recording(io.StringIO):
        def write(self, text: str) -> int:
            writes.append(text)
            return len(text)

    chat = Chat(Server(server.url), "fake", Conversation(), Recording(), io.StringIO())
    assert chat.ask("x") == "answered"
    assert writes == ["Hel", "lo.", "\n"]


def test_what_a_model_writes_never_steers_the_terminal(talk: Talk, server: ChatServer) -> None:
    server.pieces = ["\x1b[2J\x1b]0;title\x07", "a\tb\nc\x9b31m\r", "\u202eevil", "é€😀"]
    talk.say("x")
    out = talk.out.getvalue()
    assert out == "�[2J�]0;title�a\tb\nc�31m��evilé€😀\n"
    server.error = (400, json.dumps({"error": {"message": "bad \x1b[31m"}}))
    assert "\x1b" not in talk.say("x")


def test_figures_are_those_of_the_last_answer(talk: Talk) -> None:
    assert talk.say("/stats") == "there is no answer yet"
    told = talk.say("x", "/stats")
    assert told.startswith("12 prompt tokens (4 cached), 3 output tokens, first token after 0.")
    assert figures_text(Figures(2.0, 0.5, 1.0, 10, 0, 11, "stop")) == (
        "10 prompt tokens, 11 output tokens, first token after 0.50 s, then 10.0 tokens/s, 2.00 s in all"
    )
    assert figures_text(Figures(2.0)) == "0 prompt tokens, 0 output tokens, 2.00 s in all"


def test_an_answer_that_was_cut_says_so(talk: Talk, server: ChatServer) -> None:
    server.finish_reason = "length"
    assert talk.say("x").startswith("[cut")


# ---------------------------------------------------------------- files


def test_a_picture_is_shown_with_the_next_question_only(talk: Talk, server: ChatServer, picture: str) -> None:
    assert talk.say(f"/image {picture}") == "1 file will be shown with the next question"
    assert talk.say(f"/image '{picture}'") == "2 files will be shown with the next question"
    talk.say("What is it?", "Sure?")
    first, _, second = server.last["messages"]
    assert [part["type"] for part in first["content"]] == ["image_url", "image_url", "text"]
    assert shown(first["content"][0]) == PICTURE
    assert first["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert second["content"] == "Sure?"


def test_paths_in_a_line_are_shown_where_they_stand(
    talk: Talk, server: ChatServer, picture: str, tmp_path: Path
) -> None:
    (tmp_path / "b.JPG").write_bytes(b"jpeg")
    (tmp_path / "c.mp4").write_bytes(b"clip")
    escaped = picture.replace(" ", "\\ ")
    talk.say(f'Is {escaped} like "{tmp_path}/b.JPG" or {tmp_path}/c.mp4?')
    talk.say(f"Is {escaped} like \"{tmp_path}/b.JPG\" or '{tmp_path}/c.mp4' ?")
    parts = server.last["messages"][-1]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url", "text", "image_url", "text", "video_url", "text"]
    assert [part["text"] for part in parts if part["type"] == "text"] == ["Is", "like", "or", "?"]
    assert [shown(part) for part in parts if part["type"] != "text"] == [PICTURE, b"jpeg", b"clip"]


@pytest.mark.parametrize(
    "line", ["What is a.png?", "It's x.png", 'Say "hi" to a.png', "~nobody/x.png", "x" * 5000 + ".png", "a\0.png", "\\"]
)
def test_words_that_are_no_files_stay_words(line: str) -> None:
    assert parts_of(line) == [line]


def test_urls_are_passed_on_and_files_that_are_none_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert attach("video", "https://example.org/c.mp4") == {
        "type": "video_url", "video_url": {"url": "https://example.org/c.mp4"},
    }  # fmt: skip
    with pytest.raises(AttachmentError, match=r"no-file\.png: No such file"):
        attach("image", "no-file.png")
    with pytest.raises(AttachmentError, match="Is a directory"):
        attach("image", str(tmp_path))
    unknown = tmp_path / "picture"
    unknown.write_bytes(b"x")
    assert attach("image", str(unknown))["image_url"]["url"] == "data:image/*;base64,eA=="
    monkeypatch.setattr("vlmrt.tools.chat.attachments.MAX_FILE_MIB", 0)
    with pytest.raises(AttachmentError, match="more than 0"):
        attach("image", str(unknown))


def test_a_file_that_cannot_be_shown_is_told_and_nothing_is_asked(talk: Talk, server: ChatServer) -> None:
    assert talk.say("/image no-file.png") == "error: no-file.png: No such file or directory"
    assert talk.say("/image") == "/image FILE|URL"
    assert server.asked == []


# ---------------------------------------------------------------- commands


def test_clear_forgets_what_was_said_and_keeps_how(talk: Talk, server: ChatServer, picture: str) -> None:
    talk.say("/system Be brief.", "/set temperature 0.2", "one", f"/image {picture}", "/clear", "two")
    assert server.last["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "two"},
    ]
    assert server.last["temperature"] == 0.2
    talk.say("/system", "/set temperature default", "three")
    assert server.last["messages"][0]["role"] == "user"
    assert "temperature" not in server.last


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_a_field_of_the_request(name: str, talk: Talk, server: ChatServer) -> None:
    assert talk.say(f"/set {name.replace('_', '-')}=3") == ""
    assert talk.say("/set") == f"{name} 3"
    talk.say("x")
    assert server.last[name] == 3


def test_wrong_settings_and_commands_are_told_with_what_was_meant(talk: Talk, server: ChatServer) -> None:
    assert talk.say("/set temprature 1") == "error: no such setting: temprature; did you mean temperature?"
    assert talk.say("/set quux 1").startswith("error: no such setting: quux; there are temperature, ")
    assert talk.say("/set temperature warm") == "error: temperature: 'warm' is not a number"
    assert talk.say("/set temperature") == "/set NAME VALUE"
    assert talk.say("/set") == "nothing is set"
    assert talk.say("/claer") == "no such command: /claer; did you mean /clear?"
    assert talk.say("/") == "no such command: /; /help lists them"
    assert talk.say("  ") == ""
    assert all(name in talk.say("/help") for name in talk.chat.commands)
    assert server.asked == []
    assert talk.say("/set stop END", "/etc/passwd is what?") == ""  # a path is no command
    assert server.last["stop"] == "END"


def test_retry_asks_the_last_question_again(talk: Talk, server: ChatServer) -> None:
    assert talk.say("/retry") == "nothing was asked yet"
    talk.say("one", "/set seed 7", "/retry")
    assert len(server.asked) == 2
    assert server.asked[0]["messages"] == server.asked[1]["messages"]
    assert server.last["seed"] == 7


@pytest.mark.parametrize("line", ["/quit", "/exit", " /bye "])
def test_quit_ends(line: str, talk: Talk) -> None:
    assert not talk.chat.handle(line)


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("status", "text", "says"),
    [
        (400, '{"error": {"message": "too long\\nby far"}}', "error: too long by far (status 400)"),
        (401, '{"error": {"message": "no key"}}', "VLMRT_API_KEY or --api-key-file"),
        (429, '{"error": {"message": "busy"}}', "busy (status 429)"),
        (502, "<html>Bad Gateway</html>", "error: <html>Bad Gateway</html> (status 502)"),
        (500, "", "error: Internal Server Error (status 500)"),
    ],
)
def test_a_refusal_is_told_and_the_question_is_taken_back(
    status: int, text: str, says: str, talk: Talk, server: ChatServer
) -> None:
    server.error = (status, text)
    assert says in talk.say("one")
    server.error = None
    talk.say("two")
    assert server.last["messages"] == [{"role": "user", "content": "two"}]


@pytest.mark.parametrize(
    ("ending", "says"),
    [
        ('data: {"error": {"message": "the scheduler was restarted"}}\n\n', "error: the scheduler was restarted"),
        ("", "error: the server ended the answer in the middle"),
        *(
            (f"data: {event}\n\n", "error: the server's stream is not what the API has")
            for event in (
                "{nonsense",
                "5",
                '{"choices": 5}',
                '{"choices": [5]}',
                '{"choices": [{"delta": {"content": ["a"]}}]}',
                '{"choices": [{"delta": {"content": "\\ud800"}}]}',
                '{"usage": {"prompt_tokens": "many"}}',
                "[" * 100_000,
            )
        ),
    ],
)
def test_an_answer_that_breaks_is_told_and_what_came_of_it_is_kept(
    ending: str, says: str, talk: Talk, server: ChatServer
) -> None:
    server.ending = ending
    assert talk.say("one") == says
    assert talk.out.getvalue() == "Hello.\n"
    server.ending = "data: [DONE]\n\n"
    talk.say("two")
    assert [message["content"] for message in server.last["messages"]] == ["one", "Hello.", "two"]


def test_where_there_is_no_server_it_says_how_to_start_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert main(["chat", "--url", "http://127.0.0.1:1/v1", "hi"]) == 1
    assert capsys.readouterr().err == (
        "vlmrt chat: error: no server at http://127.0.0.1:1 (Connection refused); `vlmrt launch` starts one\n"
    )
    assert main(["chat", "--url", "not a url", "hi"]) == 1
    assert "not a url" in capsys.readouterr().err


# ---------------------------------------------------------------- the command


def test_a_question_is_answered_and_the_command_ends(
    server: ChatServer, picture: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    options = ["--system", "Be brief.", "--temperature", "0", "--max-tokens", "9", "--image", picture, "--stats"]
    assert main(["chat", "--url", f"{server.url}/v1/", "What", "is it?", *options]) == 0
    shown_text = capsys.readouterr()
    assert shown_text.out == "Hello.\n"
    assert shown_text.err.startswith("12 prompt tokens")
    system, question = server.last["messages"]
    assert system["content"] == "Be brief."
    assert question["content"][1] == {"type": "text", "text": "What is it?"}
    assert (server.last["model"], server.last["temperature"], server.last["max_tokens"]) == ("fake", 0, 9)


def test_a_pipe_is_one_question_behind_that_of_the_command_line(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLMRT_URL", server.url)
    for words, piped, asked in (
        ([], b"one\ntwo\n", "one\ntwo"),
        (["Sum up:"], b"one\n", "Sum up:\n\none"),
        (["Only this"], b"", "Only this"),
        ([], b"/quit", "/quit"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped)))
        assert main(["chat", *words]) == 0
        assert server.last["messages"] == [{"role": "user", "content": asked}]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b" \n")))
    assert main(["chat"]) == 2
    assert "neither QUESTION nor standard input" in capsys.readouterr().err


def test_a_failed_question_is_status_1(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    server.error = (503, "{}")
    assert main(["chat", "--url", server.url, "hi"]) == 1
    assert main(["chat", "--url", server.url, "hi", "--image", "no-file.png"]) == 1


def test_a_list_of_models_that_does_not_end_is_an_error(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(client, "MAX_MODELS_BYTES", 10)
    assert main(["chat", "--url", server.url, "hi"]) == 1
    assert "does not say which models it serves" in capsys.readouterr().err
    assert server.asked == []


def test_what_a_server_says_of_itself_never_steers_the_terminal(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    server.models_error = (403, json.dumps({"error": {"message": "no \x1b]0;title\x07"}}))
    assert main(["chat", "--url", server.url, "hi"]) == 1
    assert capsys.readouterr().err == "vlmrt chat: error: no \ufffd]0;title\ufffd (status 403)\n"


def test_a_key_is_taken_from_file_or_variable_and_sent_with_every_request(
    server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    keys = tmp_path / "keys"
    keys.write_text("# mine\nfrom-file tenant\nother\n")
    monkeypatch.setenv("VLMRT_API_KEY", "from-variable,second")
    assert main(["chat", "--url", server.url, "hi"]) == 0
    assert main(["chat", "--url", server.url, "hi", "--api-key-file", str(keys)]) == 0
    monkeypatch.delenv("VLMRT_API_KEY")
    assert main(["chat", "--url", server.url, "hi"]) == 0
    assert server.keys == [*["Bearer from-variable"] * 2, *["Bearer from-file"] * 2, None, None]
    assert main(["chat", "--url", server.url, "hi", "--api-key-file", str(tmp_path / "absent")]) == 1
    assert "--api-key-file" in capsys.readouterr().err


def test_a_server_of_its_own_has_the_model_and_ends_with_the_chat(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an engine whose service is the test's server."""
    made: list[Any] = []

    class FakeEngine:
        def __init__(self, words: list[str]) -> None:
            self.words, self.url, self.is_closed = words, server.url, False
            made.append(self)

        def close(self) -> None:
            self.is_closed = True

    assert isinstance(Engine.url, property)
    monkeypatch.setattr("vlmrt.tools.offline.engine.Engine", FakeEngine)
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert main(["chat", "--model", "some/model", "hi"]) == 0
    assert main(["chat", "--model", "demo", "hi"]) == 0
    assert [engine.words for engine in made] == [
        ["--model=some/model", "--preset=interactive"],
        ["--preset=interactive"],
    ]
    assert all(engine.is_closed for engine in made)


# ---------------------------------------------------------------- the terminal


class Session:
    """The command at a pseudo-terminal."""

    def __init__(self, url: str, home: Path, *words: str) -> None:
        self._fd, slave = pty.openpty()
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vlmrt.tools.cli", "chat", "--url", url, *words],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env={**os.environ, "XDG_STATE_HOME": str(home), "TERM": "dumb", "INPUTRC": "/dev/null"},
        )  # fmt: skip
        os.close(slave)

    def write(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def read_until(self, text: str) -> None:
        """Behind the next such text; the test's own time limit ends a wait in vain."""
        while text not in self.text:
            self.text += os.read(self._fd, 4096).decode(errors="replace")
        self.text = self.text.partition(text)[2]

    def interrupt_until(self, text: str) -> None:
        """As read_until, with Ctrl-C first, and again where nothing comes: readline misses one between two waits."""
        while text not in self.text:
            self.process.send_signal(signal.SIGINT)
            while text not in self.text and select.select([self._fd], [], [], 2.0)[0]:
                self.text += os.read(self._fd, 4096).decode(errors="replace")
        self.text = self.text.partition(text)[2]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        os.close(self._fd)


@pytest.fixture
def session(server: ChatServer, tmp_path: Path) -> Iterator[Session]:
    running = Session(server.url, tmp_path)
    try:
        yield running
    finally:
        running.close()


@pytest.mark.timeout(WAIT_S)
def test_ctrl_c_ends_the_answer_and_not_the_chat(session: Session, server: ChatServer, tmp_path: Path) -> None:
    session.read_until(">>> ")
    server.never_ends = True
    session.write("go on\n")
    session.read_until("Hello..")
    session.process.send_signal(signal.SIGINT)
    session.read_until("[stopped]")
    assert server.left.wait(WAIT_S)
    session.read_until(">>> ")
    server.never_ends = False
    session.write("half a li")
    session.read_until("half a li")
    session.interrupt_until(">>> ")
    session.write("and now?\n")
    session.read_until("Hello.\r\n>>> ")
    first, answer, second = server.last["messages"]
    assert (first["content"], second["content"]) == ("go on", "and now?")
    assert answer["content"].startswith("Hello..")
    session.write('"""two\nlines"""\n')
    session.read_until("Hello.\r\n>>> ")
    assert server.last["messages"][-1]["content"] == "two\nlines"
    session.write("\x04")
    assert session.process.wait(WAIT_S) == 0
    history = tmp_path / "vlmrt" / "chat_history"
    assert "go on" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


@pytest.mark.timeout(WAIT_S)
def test_ctrl_c_ends_a_question_of_the_command_line_with_status_130(server: ChatServer, tmp_path: Path) -> None:
    server.never_ends = True
    session = Session(server.url, tmp_path, "go on")
    try:
        assert server.began.wait(WAIT_S)
        session.process.send_signal(signal.SIGINT)
        session.read_until("[stopped]")
        assert session.process.wait(WAIT_S) == 130
    finally:
        session.close()


def test_tab_completes_commands_at_the_beginning_and_paths_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pic.png").touch()
    commands = ["/clear", "/image", "/quit"]
    assert completions("/im", "/im", commands) == ["/image "]
    assert completions("/", "/", commands) == ["/clear ", "/image ", "/quit "]
    path = f"{tmp_path}/pic"
    assert completions(path, f"/image {path}", commands) == [f"{path}.png ", f"{path}tures/"]
    assert completions(path, path, commands) == [f"{path}.png ", f"{path}tures/"]
    assert completions(f"{tmp_path}/[", "", commands) == []


def test_the_history_lies_with_the_users_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(history_file({"XDG_STATE_HOME": "/state"})) == "/state/vlmrt/chat_history"
    assert str(history_file({})) == "/home/somebody/.local/state/vlmrt/chat_history"
