"""YAML as people write it: `3e-4` is a number, and a key given twice is an error."""

import re
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    problem="a key is a list or a mapping",
                    problem_mark=key_node.start_mark,
                )
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key_node.value!r} is given twice",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1, which PyYAML reads, wants a dot and a sign: 3.0e-4. Without this, 3e-4 is a string.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse_value(text: str) -> Any:
    """
    Reads one YAML value.

    Raises:
        ValueError: in one sentence, if it is not valid YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"not valid YAML at line {line}: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}.") from error
    except RecursionError:
        raise ValueError("not valid YAML: it is nested too deeply.") from None
    except ValueError as error:  # a date that does not exist, a number of 10,000 digits
        raise ValueError(f"not valid YAML: {error}.") from error


def read_mapping(path: str | Path) -> dict[str, Any]:
    """
    Reads a YAML file that holds a mapping.

    Raises:
        ValueError: in one sentence, if it does not.
        FileNotFoundError: if there is no such file.
    """
    content = parse_value(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("the file must hold a mapping of settings.")
    return content
