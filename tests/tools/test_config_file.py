"""Options of a launch from flags, environment and file: which one counts, and how each is refused."""

from __future__ import annotations

import argparse
import functools
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from tests.tools.option_table import PAGE, replaced
from vlmrt.runtime.config import Config
from vlmrt.runtime.errors import StartupError
from vlmrt.tools import launch as launching
from vlmrt.tools.arguments import Parser
from vlmrt.tools.cli import main
from vlmrt.tools.launch import build_config
from vlmrt.tools.launch_command import add_arguments
from vlmrt.tools.settings import Settings, read_settings, settings_of, variable_of
from vlmrt.tools.settings_file import MAX_FILE_BYTES, SettingsError, read_settings_file
from vlmrt.tools.show_settings import shown_settings

SECRET = "sk-a-secret-1"


@functools.cache
def launch_parser() -> Parser:
    parser = Parser(prog="vlmrt launch")
    add_arguments(parser)
    return parser


def settings(*words: str, **environment: str) -> Settings:
    return read_settings(launch_parser(), words, environment)


def file_of(directory: Path, text: str, name: str = "vlmrt.toml") -> str:
    path = directory / name
    path.write_text(text)
    return str(path)


def refused(words: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """What is said, in one line."""
    with pytest.raises(SettingsError) as error:
        read_settings(launch_parser(), words, environment or {})
    assert "\n" not in str(error.value)
    return str(error.value)


def text_of(action: argparse.Action) -> tuple[str, object]:
    """A value that an option takes and that is not its default: as a flag says it, and as a file's value."""
    if action.choices is not None:
        choice = next(choice for choice in action.choices if choice != action.default)
        return choice, choice
    if action.type is None:
        return "other", "other"
    return "0.5" if action.default == 0.92 else "3", 0.5 if action.default == 0.92 else 3


# ---------------------------------------------------------------- which one counts


@pytest.mark.parametrize("name", settings_of(launch_parser()))
@pytest.mark.parametrize("suffix", [".toml", ".yaml"])
def test_every_option_is_taken_from_file_environment_and_flag_in_this_order(
    name: str, suffix: str, tmp_path: Path
) -> None:
    action = settings_of(launch_parser())[name]
    is_switch, is_list = action.nargs == 0, action.nargs == "+"
    text, value = text_of(action)
    in_file: object = True if is_switch else [value] if is_list else value
    line = f"{name}{' =' if suffix == '.toml' else ':'} {msgspec.json.encode(in_file).decode()}\n"
    path = file_of(tmp_path, line, f"c{suffix}")
    plain = getattr(settings().arguments, action.dest)
    assert settings().origins[name] == "default"

    of_file = settings("--config", path)
    found = getattr(of_file.arguments, action.dest)
    assert of_file.origins[name] == f"file {path}"
    assert found != plain
    if name == "api-key":
        return  # its variable has a meaning of its own

    variable = variable_of(name)
    over_file = read_settings(
        launch_parser(), ["--config", path], {variable: "0" if is_switch else f"{text},{text}" if is_list else text}
    )
    assert over_file.origins[name] == f"environment {variable}"
    expected = False if is_switch else found * 2 if is_list else found
    assert getattr(over_file.arguments, action.dest) == expected

    words = [f"--{name}"] if is_switch else [f"--{name}", text]
    over_all = read_settings(launch_parser(), ["--config", path, *words], {variable: "0"} if is_switch else {})
    assert over_all.origins[name] == "flag"
    assert getattr(over_all.arguments, action.dest) == found


def test_flags_go_before_the_environment_that_before_the_file_and_that_before_defaults(tmp_path: Path) -> None:
    path = file_of(tmp_path, "tp = 2\nmax-num-seqs = 2\nport = 2\n")
    found = settings(
        "--config", path, "--tp", "4", VLMRT_TP="3", VLMRT_MAX_NUM_SEQS="3", VLMRT_HOST="", VLMRT_UNRELATED="x"
    )
    assert (found.arguments.tp, found.arguments.max_num_seqs, found.arguments.port) == (4, 3, 2)
    names = ("tp", "max-num-seqs", "port", "host")
    assert [found.origins[name] for name in names] == [
        "flag", "environment VLMRT_MAX_NUM_SEQS", f"file {path}", "default",
    ]  # fmt: skip
    assert found.arguments.host == "127.0.0.1"
    assert found.warnings == []


def test_a_flag_that_says_the_default_is_a_flag(tmp_path: Path) -> None:
    path = file_of(tmp_path, "tp = 2")
    found = settings("--config", path, "--tp", "1")
    assert (found.arguments.tp, found.origins["tp"]) == (1, "flag")


def test_a_list_replaces_the_list_of_another_place(tmp_path: Path) -> None:
    path = file_of(tmp_path, 'served-model-name = ["a", "b"]\ncors_origins = "http://x"')
    words = ("--config", path, "--served-model-name", "c", "--served-model-name", "d", "e")
    assert settings(*words).arguments.served_model_name == ["c", "d", "e"]
    assert settings("--config", path).arguments.served_model_name == ["a", "b"]
    assert settings("--config", path).arguments.cors_origins == ["http://x"]
    assert settings("--config", path, VLMRT_SERVED_MODEL_NAME="c, d").arguments.served_model_name == ["c", "d"]


@pytest.mark.parametrize(
    ("flag", "name"), [("--prefix-caching", "no-prefix-caching"), ("--no-admin-routes", "admin-routes")]
)
def test_a_switch_of_a_file_is_turned_off_by_the_opposite_flag(flag: str, name: str, tmp_path: Path) -> None:
    path = file_of(tmp_path, f"{name} = true")
    found = settings("--config", path, flag)
    assert getattr(found.arguments, name.replace("-", "_")) is False
    assert found.origins[name] == "flag"


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("true", True), ("YES", True), ("0", False), ("off", False), ("no", False)]
)
def test_a_switch_of_the_environment_is_a_word_for_yes_or_no(text: str, value: bool) -> None:
    assert settings(VLMRT_ADMIN_ROUTES=text).arguments.admin_routes is value


def test_a_home_directory_is_found_in_file_and_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    path = file_of(tmp_path, 'model = "~/model"')
    assert settings("--config", path).arguments.model == "/home/somebody/model"
    assert settings(VLMRT_CHAT_TEMPLATE="~/t.jinja").arguments.chat_template == "/home/somebody/t.jinja"


# ---------------------------------------------------------------- which file


def test_the_file_is_named_by_flag_or_variable_or_lies_in_the_configuration_directory(tmp_path: Path) -> None:
    (tmp_path / "vlmrt").mkdir()
    found = file_of(tmp_path, "tp = 2", "vlmrt/config.toml")
    named = file_of(tmp_path, "tp: 3", "named.yml")
    other = file_of(tmp_path, "tp: 4", "other.yaml")
    home = {"XDG_CONFIG_HOME": str(tmp_path)}
    parser = launch_parser()
    assert read_settings(parser, [], home).file == Path(found)
    assert read_settings(parser, [], home).arguments.tp == 2
    assert read_settings(parser, [], {**home, "VLMRT_CONFIG": named}).arguments.tp == 3
    assert read_settings(parser, ["--config", other], {**home, "VLMRT_CONFIG": named}).arguments.tp == 4
    assert read_settings(parser, ["--config", "none"], {**home, "VLMRT_CONFIG": named}).arguments.tp == 1
    assert read_settings(parser, [], {**home, "VLMRT_CONFIG": "none"}).file is None
    assert read_settings(parser, [], {"XDG_CONFIG_HOME": "relative", "HOME": str(tmp_path)}).file is None
    assert read_settings(parser, [], {}).file is None


def test_the_configuration_directory_is_below_the_home_directory_unless_said(tmp_path: Path) -> None:
    (tmp_path / ".config" / "vlmrt").mkdir(parents=True)
    found = file_of(tmp_path, "tp: 2", ".config/vlmrt/config.yaml")
    assert settings(HOME=str(tmp_path)).file == Path(found)
    file_of(tmp_path, "tp = 2", ".config/vlmrt/config.toml")
    assert "both" in refused([], {"HOME": str(tmp_path)})


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("c.toml", None, "No such file"),
        ("c.json", "{}", "a configuration file ends in .toml, .yaml or .yml"),
        ("c.toml", "tp = \n", "at line 1"),
        ("c.toml", "\ntp = 1\ntp = 2\n", "at line 3"),
        ("c.yaml", "\ntp: [", "line 2"),
        ("c.yaml", "tp: 1\ntp: 2\n", "c.yaml, line 2: tp is there twice"),
        ("c.yaml", "- tp\n", "lines of KEY: VALUE are expected"),
        ("c.yaml", "tp: !!python/object/apply:os.system ['true']\n", "line 1: could not determine a constructor"),
        ("c.yaml", "tp: *x\n", "found undefined alias"),
        ("c.yaml", "[" * 3_000, "c.yaml"),
        ("c.toml", "tp = " + "[" * 3_000, "recursion"),
        ("c.toml", "tp = " + "9" * 5_000, "c.toml: Exceeds the limit"),
        ("c.yaml", "host: '\x07'", "special characters are not allowed"),
        ("c.toml", "#" * (MAX_FILE_BYTES + 1), "more than 1 MiB"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named(name: str, content: str | None, says: str, tmp_path: Path) -> None:
    path = str(tmp_path / name) if content is None else file_of(tmp_path, content, name)
    message = refused(["--config", path])
    assert message.startswith(path)
    assert says in message


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(b"\xff\xfe")
    assert refused(["--config", str(path)]) == f"{path}: not a text file in UTF-8"


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    for name in ("c.toml", "c.yaml"):
        assert read_settings_file(Path(file_of(tmp_path, "# nothing\n", name))) == []


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("max-num-seq = 3", "no such option: max-num-seq; did you mean max-num-seqs?"),
        ("max_num_seq = 3", "no such option: max_num_seq; did you mean max-num-seqs?"),
        ("quux = 3", "no such option: quux"),
        ("config = 'x.toml'", "no such option: config"),
        ("fault-hooks = true", "no such option: fault-hooks"),
        ("[memory]\nkv-cache-gib = 1", "no such option: memory; keys are those of the flags, in no sections"),
        ("[model]\nmodel = 'x'", "model: text is expected, not a section"),
        ("tp = 0", "tp: 0 is not at least 1"),
        ("tp = 9223372036854775808", "tp: 9223372036854775808 is not within 64 bits"),
        ("tp = 1.5", "tp: '1.5' is not a whole number"),
        ("tp = '2'", "tp: a number is expected, not the text '2'"),
        ("tp = true", "tp: a number is expected, not true"),
        ("tp = [1]", "tp: a number is expected, not a list"),
        ("tp = 1979-05-27", "tp: a number is expected, not a date"),
        ("gpu-memory-fraction = 1.5", "gpu-memory-fraction: 1.5 is not within (0, 1]"),
        ("kv-cache-gib = inf", "kv-cache-gib: inf is not a positive number"),
        ("kv-cache-gib = nan", "kv-cache-gib: nan is not a positive number"),
        ("revision = 1.0", "revision: text is expected, not 1.0; write it in quotes"),
        ("device = 'cud'", "device: invalid choice: 'cud' (choose from auto, cuda, cpu); did you mean cuda?"),
        ("admin-routes = 1", "admin-routes: true or false is expected, not 1"),
        ("admin-routes = 'yes'", "admin-routes: true or false is expected, not the text 'yes'"),
        ("cors-origins = [1]", "cors-origins: text is expected, not 1"),
        ("cors-origins = [['a']]", "cors-origins: text is expected, not a list"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_said_with_file_line_key_value_and_bound(line: str, says: str, tmp_path: Path) -> None:
    path = file_of(tmp_path, f"# mine\n\n{line}\n")
    assert refused(["--config", path]).startswith(f"{path}, line 3: {says}")


def test_a_wrong_entry_of_yaml_has_its_line_too(tmp_path: Path) -> None:
    path = file_of(tmp_path, "port: 1\n# more\ntp:\n  - 1\n", "c.yaml")
    assert refused(["--config", path]) == f"{path}, line 3: tp: a number is expected, not a list"


def test_a_key_in_both_spellings_is_there_twice(tmp_path: Path) -> None:
    path = file_of(tmp_path, "max-num-seqs = 1\nmax_num_seqs = 2\n")
    assert refused(["--config", path]) == f"{path}, line 2: max-num-seqs is there twice"


def test_nothing_in_yaml_is_as_left_out(tmp_path: Path) -> None:
    found = settings("--config", file_of(tmp_path, "max-model-len: null\ntp: ~\n", "c.yaml"))
    assert (found.arguments.max_model_len, found.arguments.tp, found.origins["tp"]) == (None, 1, "default")


@pytest.mark.parametrize(
    ("variable", "text", "says"),
    [
        ("VLMRT_TP", "x", "environment VLMRT_TP: 'x' is not a whole number"),
        ("VLMRT_TP", "0", "environment VLMRT_TP: 0 is not at least 1"),
        ("VLMRT_PORT", "70000", "environment VLMRT_PORT: 70000 is not within 0..65535"),
        ("VLMRT_DEVICE", "tpu", "environment VLMRT_DEVICE: invalid choice: 'tpu' (choose from auto, cuda, cpu)"),
        ("VLMRT_ADMIN_ROUTES", "maybe", "environment VLMRT_ADMIN_ROUTES: 'maybe' is none of 1, true, yes"),
    ],
)
def test_a_wrong_variable_is_said_with_its_bound(variable: str, text: str, says: str) -> None:
    assert refused([], {variable: text}).startswith(says)


def test_a_variable_that_was_probably_meant_is_warned_of() -> None:
    found = settings(VLMRT_MAX_NUM_SEQ="3", VLMRT_API_KEYS="x", VLMRT_RUN_DIR="/x", VLMRT_QUUX="1", MAX_NUM_SEQ="3")
    assert found.warnings == [
        "VLMRT_API_KEYS in the environment is no option; did you mean VLMRT_API_KEY?",
        "VLMRT_MAX_NUM_SEQ in the environment is no option; did you mean VLMRT_MAX_NUM_SEQS?",
    ]


def test_what_kubernetes_says_of_a_service_of_this_name_is_no_option() -> None:
    links = {
        "VLMRT_PORT": "tcp://10.0.0.1:8000",
        "VLMRT_SERVICE_HOST": "10.0.0.1",
        "VLMRT_SERVICE_PORT": "8000",
        "VLMRT_PORT_8000_TCP_PORT": "8000",
    }
    found = read_settings(launch_parser(), [], links)
    assert (found.arguments.port, found.arguments.host, found.warnings) == (8000, "127.0.0.1", [])


def test_an_address_in_the_environment_is_taken() -> None:
    found = settings(VLMRT_ADMIN_ADDRESS="tcp://10.0.0.1:5555")
    assert found.arguments.admin_address == "tcp://10.0.0.1:5555"
    assert found.origins["admin-address"] == "environment VLMRT_ADMIN_ADDRESS"


# ---------------------------------------------------------------- keys, the command, the Config


def test_no_key_is_shown_wherever_it_was_said(tmp_path: Path) -> None:
    for text in (f'api-key = "{SECRET}"', f'api-key = ["{SECRET}"]'):
        found = settings("--config", file_of(tmp_path, text), VLMRT_API_KEY=SECRET)
        assert found.arguments.api_key == [SECRET]
        assert found.origins["api-key"] == f"file {tmp_path}/vlmrt.toml, environment VLMRT_API_KEY"
        assert SECRET not in shown_settings(launch_parser(), found)
    assert SECRET not in refused(["--config", file_of(tmp_path, f'api-key = {{a = "{SECRET}"}}')])
    assert SECRET not in refused(["--config", file_of(tmp_path, f'api-key = [["{SECRET}"]]')])
    assert settings(VLMRT_API_KEY=SECRET).origins["api-key"] == "environment VLMRT_API_KEY"


def test_a_file_with_keys_that_others_may_read_is_warned_of(tmp_path: Path) -> None:
    path = file_of(tmp_path, f'api-key = "{SECRET}"')
    Path(path).chmod(0o640)
    assert settings("--config", path).warnings == [
        f"{path} has API keys, and other users may read it: chmod 600 {path}"
    ]
    assert settings("--config", path, "--api-key", "other").warnings == []
    Path(path).chmod(0o600)
    assert settings("--config", path).warnings == []


def test_what_is_shown_is_a_file_that_gives_the_same_options(tmp_path: Path) -> None:
    words = ["--tp", "2", "--served-model-name", 'a"b', "é", "--no-prefix-caching", "--kv-cache-gib", "0.5"]
    first = settings(*words, VLMRT_MAX_NUM_SEQS="7")
    shown = shown_settings(launch_parser(), first)
    assert "max-num-seqs = 7                          # environment VLMRT_MAX_NUM_SEQS\n" in shown
    assert "tp = 2                                    # flag\n" in shown
    assert "# num-vits: one per GPU; on a CPU one\n" in shown
    assert "# chat-template: none\n" in shown
    assert set(tomllib.loads(shown)) <= set(settings_of(launch_parser()))
    again = settings("--config", file_of(tmp_path, shown))
    own = ("command_line", "config")
    first_values, again_values = vars(first.arguments), vars(again.arguments)
    assert {name: value for name, value in again_values.items() if name not in own} == {
        name: value for name, value in first_values.items() if name not in own
    }


def test_show_config_prints_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launching, "launch", None)
    monkeypatch.setenv("VLMRT_MAX_NUM_SEQ", "1")
    path = file_of(tmp_path, "tp = 2")
    assert main(["launch", "--config", path, "--show-config"]) == 0
    shown = capsys.readouterr()
    assert f"# file {path}\n" in shown.out
    assert shown.err == "vlmrt: warning: VLMRT_MAX_NUM_SEQ in the environment is no option; did you mean " + (
        "VLMRT_MAX_NUM_SEQS?\n"
    )


def test_a_wrong_file_is_a_usage_error_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = file_of(tmp_path, "tp = 0")
    with pytest.raises(SystemExit) as ended:
        main(["launch", "--config", path])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"vlmrt launch: error: {path}, line 1: tp: 0 is not at least 1\nTry 'vlmrt launch --help'.\n"
    )


def test_what_only_the_model_can_refuse_says_where_it_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLMRT_MAX_MODEL_LEN", "1000000")
    monkeypatch.setattr(launching, "set_up_logging", lambda *_: None)
    assert main(["launch", "--config", "none"]) == 1
    assert capsys.readouterr().err.strip().endswith("(from environment VLMRT_MAX_MODEL_LEN)")
    with pytest.raises(StartupError, match="--max-model-len 1000000"):
        build_config(settings("--max-model-len", "1000000").arguments)


def test_the_config_that_processes_get_has_the_origins(tmp_path: Path) -> None:
    path = file_of(tmp_path, "max-num-seqs = 3")
    found = settings("--config", path, "--device", "cpu", VLMRT_MAX_WAITING="5")
    config = build_config(found.arguments, found.origins)[0]
    assert (config.scheduling.max_num_seqs, config.scheduling.max_waiting) == (3, 5)
    assert config.origins["max-num-seqs"] == f"file {path}"
    assert config.origins["max-waiting"] == "environment VLMRT_MAX_WAITING"
    assert config.origins["device"] == "flag"
    assert config.origins["port"] == "default"
    assert set(config.origins) == set(settings_of(launch_parser()))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=Config) == config


def test_the_environment_of_this_process_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMRT_TP", "2")
    before = dict(os.environ)
    read_settings(launch_parser(), [], os.environ)
    assert dict(os.environ) == before


# ---------------------------------------------------------------- the page about it


def test_the_page_has_the_options_that_there_are() -> None:
    page = PAGE.read_text()
    assert page == replaced(page), "write it anew: python -m tests.tools.option_table"
    assert all(f"`--{name}" in page for name in settings_of(launch_parser()))


def test_the_files_of_the_page_are_read_and_mean_the_same(tmp_path: Path) -> None:
    blocks = dict(re.findall(r"```(toml|yaml)\n(.*?)```", PAGE.read_text(), re.DOTALL))
    found = [settings("--config", file_of(tmp_path, text, f"c.{suffix}")) for suffix, text in blocks.items()]
    own = ("command_line", "config")
    of_toml, of_yaml = ({k: v for k, v in vars(one.arguments).items() if k not in own} for one in found)
    assert of_toml == of_yaml
    assert of_toml["tp"] == 2
    assert of_toml["served_model_name"] == ["qwen", "vision"]
