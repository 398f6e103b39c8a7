"""Recipes: those that come with berth, how one is chosen, what it makes berth run, and the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from berth.adapt.bootable import adapted_name
from berth.adapt.facts import Facts
from berth.adapt.recipes import Recipe, find_recipe, load_recipes, plan_steps, read_recipe
from berth.errors import StateFormatError
from berth.layout import Layout
from berth.names import parse_reference

FAMILIES = {
    "debian": ("debian", "apt-get"), "fedora": ("fedora", "dnf"), "opensuse": ("opensuse-leap", "zypper"),
    "arch": ("arch", "pacman"), "alpine": ("alpine", "apk"), "void": ("void", "xbps-install"),
}  # fmt: skip
MINE = """
schema = 1
version = 7
ids = ["debian"]
managers = ["apt-get"]
steps = [{ say = "mine", run = ["/bin/true"] }]
"""


def image(*ids: str, managers: tuple[str, ...] = ("apt-get",), has_shell: bool = True) -> Facts:
    return Facts(has_init=False, has_shell=has_shell, managers=managers, ids=ids)


def write(layout: Layout, name: str, text: str) -> Path:
    layout.recipes.mkdir(parents=True, exist_ok=True)
    path = layout.recipes / f"{name}.toml"
    path.write_text(text)
    return path


def test_there_is_one_for_each_family(layout: Layout) -> None:
    recipes = load_recipes(layout)
    assert {recipe.name for recipe in recipes} == set(FAMILIES)
    for name, (distribution, manager) in FAMILIES.items():
        found = find_recipe(recipes, image(distribution, managers=(manager,)))
        assert found is not None
        assert found.name == name
        steps = plan_steps(found, image(distribution, managers=(manager,)))
        words = [word for step in steps for word in step.argv]
        assert set(found.packages) <= set(words)
        assert not [word for word in words if word in ("{manager}", "{packages}")]
        assert "/etc/machine-id" in found.empty


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        (image("ubuntu", "debian"), "debian"),
        (image("pop", "ubuntu", "debian"), "debian"),
        (image("rocky", "rhel", "centos", "fedora", managers=("microdnf",)), "fedora"),
        (image("debian", managers=("apk",)), None),
        (image("debian", managers=()), None),
        (image("debian", has_shell=False), None),
        (image("gentoo"), None),
        (image(), None),
    ],
)
def test_the_distribution_and_its_package_manager_decide(layout: Layout, facts: Facts, name: str | None) -> None:
    found = find_recipe(load_recipes(layout), facts)
    assert (found.name if found else None) == name


def test_the_steps_for_debian(layout: Layout) -> None:
    facts = image("debian")
    recipe = find_recipe(load_recipes(layout), facts)
    assert recipe is not None
    steps = plan_steps(recipe, facts)
    assert [step.say for step in steps] == [
        "getting the package lists", "installing packages", "removing the packages' archives",
        "removing the package lists", "masking units", "emptying files", "looking for /sbin/init",
    ]  # fmt: skip
    assert steps[1].argv[:3] == ("apt-get", "-q", "-y")
    assert steps[1].argv[-len(recipe.packages) :] == recipe.packages
    assert steps[4].argv[:2] == ("/bin/sh", "-c")
    assert steps[4].argv[4:] == recipe.mask


def test_the_package_manager_that_is_there_is_used(layout: Layout) -> None:
    facts = image("almalinux", managers=("microdnf", "yum"))
    recipe = find_recipe(load_recipes(layout), facts)
    assert recipe is not None
    assert plan_steps(recipe, facts)[0].argv[0] == "microdnf"


def test_a_users_file_takes_the_place_of_berths(layout: Layout) -> None:
    path = write(layout, "debian", MINE)
    recipes = load_recipes(layout)
    assert [recipe.name for recipe in recipes].count("debian") == 1
    first = find_recipe(recipes, image("debian"))
    assert first is not None
    assert first.steps[0].say == "mine"
    path.write_text(MINE.replace("mine", "other"))
    second = find_recipe(load_recipes(layout), image("debian"))
    assert second is not None
    assert second.version != first.version, "a changed recipe must make a new image"


def test_a_users_further_recipe_comes_first(layout: Layout) -> None:
    write(layout, "zzz-mine", MINE)
    found = find_recipe(load_recipes(layout), image("debian"))
    assert found is not None
    assert found.name == "zzz-mine"


def test_the_name_of_the_result_can_be_a_reference(layout: Layout) -> None:
    write(layout, "debian", MINE)
    digest = "sha256:" + "ab" * 32
    for recipe in load_recipes(layout):
        name = adapted_name(digest, recipe)
        assert str(parse_reference(name)) == name
        assert "abababababababab" in name
        assert recipe.version in name


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("schema = 2", "'schema' is not 1"),
        ("version = 0", "'version' is no whole number"),
        ("version = true", "'version' is no whole number"),
        ("ids = []", "'ids' is no list of texts"),
        ("managers = [1]", "'managers' is no list of texts"),
        ('packages = "vim"', "'packages' is no list of texts"),
        ('steps = [{ say = "x", run = "apt-get update" }]', "'steps' holds something"),
        ('steps = [{ say = "x", run = [] }]', "'steps' is no list of commands"),
        ('steps = [{ run = ["x"] }]', "'steps' holds something"),
        ('steps = [{ say = "x", run = ["x"], user = "me" }]', "'steps' holds something"),
        ("steps = []", "'steps' is no list of commands"),
        ('mask = ["../x"]', "'mask' holds '../x'"),
        ('empty = ["relative"]', "'empty' holds 'relative'"),
        ('env = ["novalue"]', "'env' holds 'novalue'"),
        ('maks = ["x.service"]', "'maks' is not known"),
        ("=", "can't be read"),
    ],
)
def test_a_wrong_recipe_is_told(layout: Layout, line: str, why: str) -> None:
    key = line.partition(" ")[0]
    kept = "\n".join(other for other in MINE.splitlines() if not other.startswith(f"{key} ="))
    write(layout, "mine", f"{kept}\n{line}\n")
    with pytest.raises(StateFormatError) as caught:
        load_recipes(layout)
    assert why in caught.value.message
    assert "mine.toml" in caught.value.message


def test_a_file_with_an_odd_name_is_told(layout: Layout) -> None:
    with pytest.raises(StateFormatError, match="no valid name"):
        read_recipe(write(layout, "My Recipe", MINE), own=False)


def test_recipes_are_compared_by_what_they_say() -> None:
    recipe = Recipe("x", "1", ("a",), ("apk",), (), ())
    assert str(recipe) == "x 1"
