"""argparse for every command line of this project: option names written out, and a hint at the nearest for a wrong one.

Dashes and underscores inside an option's name are alike. Refused, with exit status 2: abbreviations and unknown options
(before anything else that is wrong, for what is missing may be what was misspelt), unknown commands and choices.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from bert2bert.errors import did_you_mean


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose options are never abbreviated; its sub-commands' parsers are of this class too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)
        self.passed_on: str | None = None
        """Where the words behind ``--`` are kept, for another program; None: they are positional arguments."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but options that are not known are an error here, in the parser that knows the others."""
        words = list(sys.argv[1:] if args is None else args)
        if self.passed_on is not None:
            at = words.index("--") if "--" in words else len(words)
            namespace = argparse.Namespace() if namespace is None else namespace
            setattr(namespace, self.passed_on, words[at + 1 :])
            words = words[:at]
        for i, word in enumerate(words):
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                break  # what follows is not an option, or a sub-command's own
            number = word[1:2].isdigit() or word[1:2] == "."  # -1 and -.5 are values
            if word.startswith("-") and word != "-" and " " not in word and not number:
                words[i] = self._known(word)
        parsed, rest = super().parse_known_args(words, namespace)
        if rest:
            self.error(f"unexpected {' '.join(rest)!r}; {self.prog} --help lists what is understood")
        return parsed, rest

    def _known(self, word: str) -> str:
        """The word with its option's name as it was declared; ends the program for an unknown one."""
        name, equals, value = word.partition("=")
        if name in self._option_string_actions or (name[:2] in self._option_string_actions and name[1] != "-"):
            return word  # the latter: a short option with its value, such as -n4
        alike = {option.replace("_", "-"): option for option in self._option_string_actions}
        if (known := alike.get(name.replace("_", "-"))) is not None:
            return known + equals + value
        shown = [s for action in self._actions if action.help != argparse.SUPPRESS for s in action.option_strings]
        longer = [option for option in shown if option.startswith(name) and name.startswith("--")]
        self.error(f"unknown option {name}: {did_you_mean(name, longer or shown)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            near = did_you_mean(str(value), map(str, action.choices))
            raise argparse.ArgumentError(action, f"unknown {value!r}: {near}")
