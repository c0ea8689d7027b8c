"""YAML that a person wrote -> values, where nothing is dropped or exhausting: the reader of recipes, policies and keys.

PyYAML's safe loader in Python (the one in C crashes on deep nesting) which also refuses a key that is given twice,
merge keys, nesting deeper than Python's stack, and aliases that multiply.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

MAX_YAML_BYTES = 16_000_000  # a policy of some 100,000 tenants
_MAX_DEPTH = 32
_MAX_ALIASED = 100_000  # values that aliases stand for


def read_yaml(path: Path, tidy: Callable[[yaml.Node], object] = lambda node: None) -> Any:
    """Return what a YAML file holds; `tidy` may change its nodes before they become values.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such YAML; see `parse_yaml`.
    """
    with path.open("rb") as stream:
        return parse_yaml(stream.read(MAX_YAML_BYTES + 1), tidy)


def parse_yaml(data: bytes | str, tidy: Callable[[yaml.Node], object] = lambda node: None) -> Any:
    """Return what a YAML text holds; see `read_yaml`.

    Raises:
        ValueError: saying what is wrong and where, without the text's own words, which may be secret.
    """
    if len(data) > MAX_YAML_BYTES:
        raise ValueError(f"more than {MAX_YAML_BYTES / 1e6:.0f} MB")
    try:
        loader = _Loader(data)
        node = loader.get_single_node()
        if node is None:
            return None
        tidy(node)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = str(error.problem or error.context or "unreadable")
        raise ValueError(where + (problem if isinstance(error, _Refused) else _without_quotes(problem))) from None
    except yaml.reader.ReaderError as error:
        raise ValueError(f"it is no text in UTF-8, or holds a control character (at {error.position})") from None
    except (ValueError, ArithmeticError, LookupError, AttributeError) as error:  # as PyYAML meets `!!bool x`
        raise ValueError(f"a date or number that cannot be read ({type(error).__name__})") from None


class _Refused(yaml.constructor.ConstructorError):
    """What this loader refuses beyond PyYAML's own errors; its text is fit to be shown."""


class _Loader(yaml.SafeLoader):
    def __init__(self, stream: bytes | str) -> None:
        super().__init__(stream)
        self._open = self._lists = self._aliased = 0
        self._sizes: dict[int, tuple[int, int]] = {}  # by node: how many values and how many levels it has

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark, is_alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)  # type: ignore[no-untyped-call]
        self._open += 1
        if self._open > _MAX_DEPTH:
            raise _Refused(None, None, f"nested deeper than {_MAX_DEPTH} levels", mark)
        node = super().compose_node(parent, index)
        if is_alias:
            size, levels = self._sizes.get(id(node), (_MAX_ALIASED, 0))  # not yet: it holds itself
            self._aliased += size
            if self._aliased >= _MAX_ALIASED or self._open + levels > _MAX_DEPTH:
                raise _Refused(None, None, "this alias stands for too much: write it out", mark)
        elif node is not None:
            inner = node.value if isinstance(node.value, list) else []
            parts = [part for pair in inner for part in (pair if isinstance(pair, tuple) else (pair,))]
            sizes = [self._sizes[id(part)] for part in parts]
            self._sizes[id(node)] = 1 + sum(n for n, _ in sizes), 1 + max((n for _, n in sizes), default=0)
        self._open -= 1
        return node

    def compose_sequence_node(self, anchor: Any) -> yaml.SequenceNode:
        self._lists += 1
        node = super().compose_sequence_node(anchor)
        self._lists -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.tag == "tag:yaml.org,2002:merge":
                raise _Refused(None, None, "'<<' is not taken here: write the entries out", key.start_mark)
            if key.value in first:
                name = "a key" if self._lists else f"'{key.value}'"  # in a list, of rows, it may be their text
                raise _Refused(None, None, f"{name} is given twice, first in line {first[key.value]}", key.start_mark)
            first[key.value] = key.start_mark.line + 1
        return node


def _without_quotes(problem: str) -> str:
    return re.sub(r"'[^']{2,}'", "'...'", problem)
