"""What README.md, BUILD.md, docs/ and the heads of the configs name is there: settings, commands, extras, links."""

import dataclasses
import re
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxrl.config import Config, load

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "BUILD.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
FREE = re.compile(r"data\.(train_kwargs|val_kwargs|apply_chat_template_kwargs)\.|rollout\.vllm\.(args|env)\.")


def settings_of(cls: type, where: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(cls).items():
        yield where + name
        for section in filter(dataclasses.is_dataclass, (hint, *typing.get_args(hint))):
            yield from settings_of(typing.cast(type, section), f"{where}{name}.")


@pytest.mark.parametrize("path", [*DOCUMENTS, *CONFIGS], ids=lambda path: path.name)
def test_every_setting_that_is_named_exists(path):
    sections = "|".join(typing.get_type_hints(Config))
    named = set(re.findall(rf"(?<![\w./-])(?:{sections})(?:\.[a-z]\w*)+(?![\w(/])", path.read_text()))
    files = {name for name in named if re.search(r"\.(py|png|yaml)$", name)}
    unknown = named - files - set(settings_of(Config))
    assert not {name for name in unknown if not FREE.match(name)}


@pytest.mark.parametrize("path", [*DOCUMENTS, *CONFIGS], ids=lambda path: path.name)
def test_every_command_has_its_script_its_options_and_a_config_that_loads(path):
    text = path.read_text().replace("\\\n", " ")
    commands = re.findall(r"(?<!\w)(scripts/[\w/]+\.(?:py|sh|sbatch))([^\n`|>]*)", text)
    for script, arguments in commands:
        assert (source := ROOT / script).is_file(), script
        options = re.findall(r"(?<!\S)--?[a-z][\w-]*", arguments.partition(" #")[0])
        # What a launcher does not know goes on to train.py.
        known = source.read_text() + (ROOT / "scripts" / "train.py").read_text() * ("launch" in script)
        assert not [option for option in options if not re.search(rf"[\"' |\[]{option}[\"' |\])]", known)], script
        if config := re.search(r"--config (configs/\S+\.yaml)", arguments):
            words = [word.strip("'\"") for word in arguments.split()]
            load(ROOT / config[1], [word for word in words if re.match(r"\w+(\.\w+)+=[^$]+$", word)])


def test_every_extra_that_is_named_exists():
    text = "".join(path.read_text() for path in [*DOCUMENTS, *CONFIGS])
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra for names in re.findall(r"\.\[([\w,-]+)\]", text) for extra in names.split(",")}
    assert named and named <= extras.keys()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        assert there.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target
