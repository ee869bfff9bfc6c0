"""Safe reading of YAML files of plain values, with size limits."""

import os
from pathlib import Path
from typing import Any

import yaml


MAX_BYTES = 2**18  # PyYAML reads some 50 KB/s
MAX_DEPTH = 32
MAX_VALUES = 20_000  # aliases count at every use
MERGE = "tag:yaml.org,2002:merge"  # tag of the key `<<`
STRING, INTEGER = "tag:yaml.org,2002:str", "tag:yaml.org,2002:int"


def read_yaml(path: str | os.PathLike, name: str, number_keys: bool = False) -> Any:
    """Read a YAML file: dicts with strings as keys, lists, strings, numbers, booleans, dates and None.

    Args:
        path (`str` or `os.PathLike`): The file.
        name (`str`): The argument's name, for the message.
        number_keys (`bool`): Whether integer keys are allowed; they are converted to strings.

    Raises:
        ValueError: If it is not a regular file, cannot be read, is not YAML, has a duplicate key, a key that is not a
            string or a tag (`!!python/object`), or is too long, too deeply nested or, with its aliases resolved, too
            large. Names argument and file.
    """
    try:
        return load(read_bytes(Path(path)), number_keys)
    except yaml.MarkedYAMLError as error:
        reason = f"{error.problem or error.context}{of_line(error.problem_mark or error.context_mark)}"
    except (OSError, ValueError, ArithmeticError, RecursionError, yaml.YAMLError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    raise ValueError(f"`{name}` is '{path}', which cannot be read: {' '.join(reason.split())}")


def read_bytes(path: Path) -> bytes:
    """Read a regular file of limited size."""
    if not path.exists():
        raise ValueError("there is no such file")
    if not path.is_file():  # reading a FIFO or a device may never end
        raise ValueError("it is not a regular file")
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
    return content


def load(content: bytes, number_keys: bool = False) -> Any:
    """Parse a YAML document."""
    loader = BoundedLoader(content)
    loader.number_keys = number_keys
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        count_values(root)
        return loader.construct_document(root)
    finally:
        loader.dispose()


class BoundedLoader(yaml.SafeLoader):
    """SafeLoader with limited nesting depth, without tags, and with unique string keys."""

    depth = 0
    number_keys = False

    def compose_node(self, parent, index):
        event = self.peek_event()
        if getattr(event, "tag", None) not in (None, "!"):
            raise refusal(f"it has the tag {event.tag[:60]!r}", event.start_mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise refusal(f"it is nested more than {MAX_DEPTH} deep", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if self.number_keys and key.tag == INTEGER:
                key.tag = STRING
            if key.tag not in (STRING, MERGE) or not isinstance(key, yaml.ScalarNode):
                raise refusal("a key is not a string (quote it)", key.start_mark)
            if key.value in seen:
                raise refusal(f"it has the key {key.value[:60]!r} twice", key.start_mark)
            seen.add(key.value)
        return node


def count_values(root: yaml.Node) -> None:
    """Raise an error for a document that is too large with its aliases resolved, or contains itself."""
    counts: dict[yaml.Node, int] = {}  # 0: being counted

    def count(node: yaml.Node) -> int:
        if node not in counts:
            counts[node] = 0
            counts[node] = 1 + sum(count(child) for child in children(node))
        elif not counts[node]:
            raise refusal("it contains itself", node.start_mark)
        if counts[node] > MAX_VALUES:
            raise refusal(f"it has more than {MAX_VALUES:,} values", node.start_mark)
        return counts[node]

    count(root)


def children(node: yaml.Node) -> list[yaml.Node]:
    """Return the child nodes of a node."""
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def refusal(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    """Return an error with its line number."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def of_line(mark: yaml.Mark) -> str:
    """Format the line number of an error."""
    return "" if mark is None else f" (line {mark.line + 1})"
