import datetime
import os

import pytest

from diffusers_imagen.utils.yaml import MAX_BYTES, MAX_DEPTH, MAX_VALUES, read_yaml


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{k{i}: 1, <<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
)


def read(tmp_path, content: str | bytes):
    (tmp_path / "run.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    return read_yaml(tmp_path / "run.yaml", "config")


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ("", None),
        ("a: 1\nb: [1.5, null, 'x', on]\nc: {d: 1e-4}\n", {"a": 1, "b": [1.5, None, "x", True], "c": {"d": "1e-4"}}),
        ("a: &a {x: 1, y: 2}\nb: *a\nc:\n  <<: *a\n  y: 3\n", {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 2}, "c": {"x": 1, "y": 3}}),
        ("a: 2026-01-02\n", {"a": datetime.date(2026, 1, 2)}),
        ("a: '☃'\n", {"a": "☃"}),
    ],
)  # fmt: skip
def test_a_configuration_is_read(tmp_path, content, value):
    assert read(tmp_path, content) == value


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (BOMB, f"it has more than {MAX_VALUES:,} values (line "),
        (MERGE_BOMB, f"it has more than {MAX_VALUES:,} values (line "),
        ("a: &a [*a]\n", "it contains itself (line 1)"),
        ("[" * 100_000, f"it is nested more than {MAX_DEPTH} deep (line 1)"),
        ("- " * 100_000, f"it is nested more than {MAX_DEPTH} deep (line 1)"),
        ("a: {" * 1000, f"it is nested more than {MAX_DEPTH} deep (line 1)"),
        ("a" * (MAX_BYTES + 1), f"it has more than {MAX_BYTES:,} bytes"),
        ("a: 1\nb: 2\na: 3\n", "it has the key 'a' twice (line 3)"),
        ("1: a\n", "a key is not a string (quote it) (line 1)"),
        ("yes: a\n", "a key is not a string (quote it) (line 1)"),
        ("? [a]\n: b\n", "a key is not a string (quote it) (line 1)"),
        ("a: !!python/object/apply:os.system [touch pwned]\n", "it has the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        ("a: !!bool x\n", "it has the tag 'tag:yaml.org,2002:bool'"),
        ("a: 2026-99-99\n", "month must be in 1..12"),
        ("a: 0b_\n", "invalid literal for int()"),
        ("a: " + "1:" * 400 + "1.5\n", "int too large to convert to float"),
        ("a: " + "9" * 5000 + "\n", "Exceeds the limit"),
        ("a: *b\n", "found undefined alias 'b' (line 1)"),
        ("a: [\n", "(line 2)"),
        ("a: 1\n---\nb: 2\n", "but found another document (line 2)"),
        (b"a: \xff\xfe\n", "invalid start byte"),
        (b"a: \0\n", "special characters are not allowed"),
    ],
)  # fmt: skip
def test_what_is_no_configuration_is_refused_in_a_line_that_names_it(tmp_path, content, reason):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, content)
    message = str(caught.value)
    assert message.startswith(f"`config` is '{tmp_path / 'run.yaml'}', which cannot be read: ")
    assert reason in message and "\n" not in message and len(message) < 500


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match="which cannot be read: it is not a regular file"):
            read_yaml(path, "config")
    with pytest.raises(ValueError, match="`config` is '.*', which cannot be read: there is no such file"):
        read_yaml(tmp_path / "nowhere.yaml", "config")


def test_keys_may_be_numbers_where_that_is_asked_for(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("radius: {8: 1, a: 2}")
    assert read_yaml(path, "x", number_keys=True) == {"radius": {"8": 1, "a": 2}}
    for text, message in (("{8: 1, '8': 2}", "it has the key '8' twice"), ("{1.5: 1}", "a key is not a string")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_yaml(path, "x", number_keys=True)
