"""How images of a distribution get an init: recipes, which are data. Owns their format; `bootable` uses it.

One TOML file each, berth's own beside this module and the user's in `Layout.recipes`. A user's file takes the place of
berth's of the same name; another name is one more recipe, looked at first. docs/adapting.md explains the members.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from berth.adapt.facts import INIT, Facts
from berth.errors import BerthError, StateFormatError
from berth.layout import Layout

SCHEMA = 1
_OWN = Path(__file__).parent / "recipes"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_UNIT = re.compile(r"[A-Za-z0-9@:._\\-]+\.[a-z]+")
_ENV = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^\0]*")
_MEMBERS = frozenset((
    "schema", "version", "ids", "managers", "packages", "env", "steps", "mask", "empty",
))  # fmt: skip
# $1 …: the units. A mask for a unit that is not there would only be one more file.
_MASK = (
    'for unit; do for folder in /usr/lib /lib /etc; do if [ -e "$folder/systemd/system/$unit" ]; then '
    'mkdir -p /etc/systemd/system && ln -sf /dev/null "/etc/systemd/system/$unit"; fi; done; done'
)
_EMPTY = 'for file; do if [ -e "$file" ]; then : > "$file"; fi; done'


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One command, run as root in the image. say: what it does, for the person who waits."""

    say: str
    argv: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """ids: of os-release, this recipe's distributions. managers: the package managers it can work with, best first.

    version: the file's number; of a user's file also some digits of its content, so that a change makes a new image.
    steps may hold the words ``{manager}`` and ``{packages}``. mask: systemd units, if they are there. empty: files.
    """

    name: str
    version: str
    ids: tuple[str, ...]
    managers: tuple[str, ...]
    packages: tuple[str, ...]
    steps: tuple[Step, ...]
    env: tuple[str, ...] = ()
    mask: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    def manager_of(self, facts: Facts) -> str | None:
        """Choose the package manager that it works with in an image."""
        return next((name for name in self.managers if name in facts.managers), None)


def load_recipes(layout: Layout) -> list[Recipe]:
    """Read all recipes, the user's first. Raises StateFormatError, which names the file and the member."""
    theirs = {path.stem: path for path in sorted(layout.recipes.glob("*.toml"))} if layout.recipes.is_dir() else {}
    own = {path.stem: path for path in sorted(_OWN.glob("*.toml")) if path.stem not in theirs}
    return [read_recipe(path, own=False) for path in theirs.values()] + [
        read_recipe(path, own=True) for path in own.values()
    ]


def find_recipe(recipes: Sequence[Recipe], facts: Facts) -> Recipe | None:
    """Choose the recipe for an image: the one for its distribution, else for what that is like; None when none fits."""
    if not facts.has_shell:
        return None
    fitting = [recipe for recipe in recipes if recipe.manager_of(facts) is not None]
    return next((recipe for word in facts.ids for recipe in fitting if word in recipe.ids), None)


def plan_steps(recipe: Recipe, facts: Facts) -> list[Step]:
    """Say what is run in the image, in order. Pure."""
    manager = recipe.manager_of(facts) or recipe.managers[0]
    steps = [Step(step.say, tuple(_expanded(step.argv, manager, recipe.packages))) for step in recipe.steps]
    if recipe.mask:
        steps.append(Step("masking units", ("/bin/sh", "-c", _MASK, "mask", *recipe.mask)))
    if recipe.empty:
        steps.append(Step("emptying files", ("/bin/sh", "-c", _EMPTY, "empty", *recipe.empty)))
    return [*steps, Step(f"looking for {INIT}", ("/bin/sh", "-c", f"test -x {INIT} || {{ ls -l {INIT}; exit 1; }}"))]


def read_recipe(path: Path, *, own: bool) -> Recipe:
    """Read one file. Raises StateFormatError."""
    import tomllib  # 5 ms that a machine of a bootable image need not wait for

    try:
        data = path.read_bytes()
        document = tomllib.loads(data.decode())
    except (OSError, ValueError) as error:
        raise StateFormatError(f"recipe {path} can't be read: {error}") from error
    if not _NAME.fullmatch(path.stem):
        raise StateFormatError(f"recipe {path} has no valid name", hint="lower-case letters, digits and '-'")
    return _Reader(document, path).recipe("" if own else f"-{hashlib.sha256(data).hexdigest()[:8]}")


def _expanded(argv: Sequence[str], manager: str, packages: Sequence[str]) -> list[str]:
    words: list[str] = []
    for word in argv:
        words += packages if word == "{packages}" else [manager if word == "{manager}" else word]
    return words


class _Reader:
    """Takes typed members out of a recipe; every error names the file and the member."""

    def __init__(self, document: Mapping[str, object], path: Path) -> None:
        self._document = document
        self._path = path

    def recipe(self, suffix: str) -> Recipe:
        if self._document.get("schema") != SCHEMA:
            raise self._wrong("schema", f"is not {SCHEMA}")
        unknown = sorted(self._document.keys() - _MEMBERS)
        if unknown:
            raise self._wrong(unknown[0], "is not known")
        version = self._document.get("version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise self._wrong("version", "is no whole number from 1 on")
        return Recipe(
            name=self._path.stem,
            version=f"{version}{suffix}",
            ids=self._texts("ids", some=True),
            managers=self._texts("managers", some=True),
            packages=self._texts("packages"),
            steps=self._steps(),
            env=self._texts("env", _ENV),
            mask=self._texts("mask", _UNIT),
            empty=self._texts("empty", re.compile(r"/[^\0]+")),
        )

    def _steps(self) -> tuple[Step, ...]:
        value = self._document.get("steps")
        items = cast("list[object]", value) if isinstance(value, list) else []
        steps: list[Step] = []
        for item in items:
            members = cast("dict[str, object]", item) if isinstance(item, dict) else {}
            say, words = members.get("say"), _all_texts(members.get("run"))
            if not isinstance(say, str) or words is None or len(members) != 2:
                raise self._wrong("steps", "holds something that is not { say = TEXT, run = [WORD, …] }")
            steps.append(Step(say, tuple(words)))
        if not steps or not all(step.argv for step in steps):
            raise self._wrong("steps", "is no list of commands")
        return tuple(steps)

    def _texts(self, name: str, pattern: re.Pattern[str] | None = None, *, some: bool = False) -> tuple[str, ...]:
        texts = _all_texts(self._document.get(name, []))
        if texts is None or (some and not texts):
            raise self._wrong(name, "is no list of texts")
        for text in texts:
            if not text or "\0" in text or (pattern is not None and not pattern.fullmatch(text)):
                raise self._wrong(name, f"holds {text!r:.80}, which is not valid")
        return tuple(texts)

    def _wrong(self, member: str, why: str) -> BerthError:
        return StateFormatError(f"recipe {self._path} is not valid: '{member}' {why}", hint="see docs/adapting.md")


def _all_texts(value: object) -> list[str] | None:
    items = cast("list[object]", value) if isinstance(value, list) else None
    return None if items is None or not all(isinstance(item, str) for item in items) else cast("list[str]", items)
