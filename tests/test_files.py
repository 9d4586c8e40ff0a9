"""Files and errors: what is written appears whole, what is wrong is one line."""

import io
import json
import os
import sys

import pytest

from support.files import (check_option, clear_errors, new_folder, parse_lines, printable,
                           read_json, warn, write_json)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_has_its_name_when_all_is_written_and_is_never_half_there(tmp_path):
    with new_folder(tmp_path / "a") as folder:
        (folder / "file").write_text("whole")
        assert "a" not in names(tmp_path)
    assert names(tmp_path) == ["a"] and (tmp_path / "a/file").read_text() == "whole"
    with pytest.raises(KeyError), new_folder(tmp_path / "b") as folder:
        (folder / "file").write_text("half")
        raise KeyError
    assert names(tmp_path) == ["a"]


def test_a_folder_that_is_there_stays_as_it_is(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(FileExistsError, match="a exists: choose"), new_folder(tmp_path / "a"):
        pass
    with pytest.raises(FileExistsError, match="another process has made"), \
            new_folder(tmp_path / "b") as folder:
        (folder / "file").write_text("ours")
        (tmp_path / "b").mkdir()
        (tmp_path / "b/file").write_text("theirs")
    assert names(tmp_path) == ["a", "b"] and (tmp_path / "b/file").read_text() == "theirs"


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which processes live")
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    dead, living, other = "a.tmp-999999999", f"a.tmp-{os.getppid()}", "a.tmp"
    for name in (dead, living, other):
        (tmp_path / name).mkdir()
    with new_folder(tmp_path / "a"):
        pass
    assert names(tmp_path) == sorted(["a", other, living])


def test_json_with_nan_is_refused_and_the_file_before_stays(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert read_json(tmp_path / "a.json") == {"a": 1} and names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"{", b"\xff{}", b"[" * 9999, b'{"a": 1} x'])
def test_a_file_without_a_json_object_is_named(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json: expected a JSON object"):
        read_json(tmp_path / "a.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
@pytest.mark.parametrize("read", [read_json, lambda path: list(parse_lines(path, json.loads, "a"))])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(read, tmp_path):
    os.mkfifo(tmp_path / "a")
    with pytest.raises(ValueError, match="a: expected a regular file"):
        read(tmp_path / "a")


@pytest.mark.parametrize("value, kind, least, most, right", [
    (1, int, 1, 5, True), (5, int, 1, 5, True), (0, int, 1, 5, False), (6, int, 1, 5, False),
    (1.0, int, 1, 5, False), (True, int, 0, 5, False), (True, bool, 0, 5, True),
    (1, bool, 0, 5, False), (2, float, 0, 5, True), (float("nan"), float, 0, 5, False),
    (float("inf"), float, 0, 5, False), (10**400, float, 0, 5, False), (None, int, 0, 5, False),
    (None, int | None, 1, 5, True), (0, int | None, 1, 5, False), ("a", str, 1, 5, True),
    ("", str, 1, 5, False), ("", str, 0, 5, True), ([1], str, 0, 5, False)])
def test_an_option_has_its_type_and_lies_in_its_range(value, kind, least, most, right):
    if right:
        check_option("--x", value, kind, least, most)
    else:
        with pytest.raises(ValueError, match=r"--x must be .*, got "):
            check_option("--x", value, kind, least, most)


@pytest.mark.parametrize("error, status, text", [
    (ValueError("bad \x1b[31m\nmore"), 2, "error: bad \\x1b[31m\n"),
    (ValueError(), 2, "error: ValueError\n"),
    (FileNotFoundError(2, "No such file", "a"), 2, "error: [Errno 2] No such file: 'a'\n"),
    (MemoryError(), 2, "error: MemoryError\n"),
    (RuntimeError("CUDA out of memory. Tried"), 2, "error: CUDA out of memory. Tried\n"),
    (KeyboardInterrupt("; go on"), 130, "stopped; go on\n"),
    (KeyboardInterrupt(), 130, "stopped\n")])
def test_what_a_user_can_mend_is_one_line(error, status, text, capsys):
    with pytest.raises(SystemExit) as stop, clear_errors():
        raise error
    assert stop.value.code == status and capsys.readouterr().err == text


def test_a_fault_of_ours_keeps_its_traceback():
    for error in (RuntimeError("shapes differ"), TypeError("x"), KeyError("x")):
        with pytest.raises(type(error)), clear_errors():
            raise error


def test_a_console_that_is_not_utf_8_shows_escapes(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with clear_errors():
        print("a \u2192 \udcff", flush=True)
    assert stream.buffer.getvalue() == b"a \\u2192 \\udcff\n"


def test_what_is_printed_cannot_steer_a_terminal(capsys):
    assert printable("a\x1b[31m\x07\u202e\x85b\tc\ud800") == "a\\x1b[31m\\x07\\u202e b c\\ud800"
    warn("x\x07.jsonl", 3, "odd"), warn("y", 0, "odd")
    assert capsys.readouterr().err == "warning: x\\x07.jsonl:3: odd\nwarning: y: odd\n"
